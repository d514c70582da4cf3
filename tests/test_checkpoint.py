"""Files that are whole or not there, whatever happens in between."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gaisnet import checkpoint
from gaisnet.checkpoint import (
    FolderStore,
    NullStore,
    append_text,
    digest_of,
    make_room_for,
    replacing,
    replacing_folder,
    under,
    write_text,
)
from gaisnet.errors import CheckpointError, OutputNotWritable
from tests.disk import largest_file

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
STATE = {"run": "é", "numbers": [1, 2.5, 0.1 + 0.2], "nothing": None, "deep": {"yes": True}}
OLD = ({"age": "old"}, {"w": torch.arange(3.0)})
NEW = ({"age": "new"}, {"w": torch.arange(4.0)})
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    random_34 = torch.randn(3, 4, generator=generator)
    return {
        **{str(dtype): random_34.to(dtype) for dtype in FLOATS},
        **{str(dtype): (random_34 * 100).clamp(min=0.0).to(dtype) for dtype in INTEGERS},
        "negative int8": torch.tensor([-128, 127], dtype=torch.int8),
        "bool": random_34 > 0,
        "number": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "transposed": random_34.T,
        "slice": random_34[:, 1:3],
        "learning": torch.nn.Parameter(random_34),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def assert_kept(store: FolderStore, expected: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    found = store.load("it")
    assert found is not None
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], tensor) for key, tensor in expected[1].items())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


# -- there and back ----------------------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    FolderStore(tmp_path / "a" / "b").save("it", STATE, samples())
    found = FolderStore(tmp_path / "a" / "b").load("it")
    assert found is not None and found[0] == STATE
    for name, tensor in samples().items():
        back = found[1].pop(name)
        assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor)), name
        assert not back.requires_grad
    assert not found[1]
    assert names_in(tmp_path / "a" / "b") == ["it.safetensors"]


def test_tensors_that_share_their_memory_are_kept_each(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    FolderStore(tmp_path).save("it", {}, {"whole": whole, "same": whole, "half": whole[3:]})
    assert_kept(FolderStore(tmp_path), ({}, {"whole": whole, "same": whole, "half": whole[3:]}))


def test_a_state_alone_and_nothing_at_all(tmp_path: Path) -> None:
    FolderStore(tmp_path).save("it", STATE, {})
    assert FolderStore(tmp_path).load("it") == (STATE, {})
    assert FolderStore(tmp_path).load("another") is None
    assert FolderStore(tmp_path / "nowhere").load("it") is None


def test_the_last_one_counts_and_others_stay(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save("other", *OLD)
    store.save("it", *OLD)
    store.save("it", *NEW)
    assert_kept(store, NEW)
    other = store.load("other")
    assert other is not None and other[0] == OLD[0]
    assert names_in(tmp_path) == ["it.safetensors", "other.safetensors"]


def test_no_shelf_keeps_nothing() -> None:
    NullStore().save("it", *NEW)
    assert NullStore().load("it") is None  # type: ignore[func-returns-value]


def test_under_a_prefix() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert under("x/", {"x/a": a, "x/x/b": b, "xa": a, "y/x/": b}) == {"a": a, "x/b": b}


# -- whole or not there ------------------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for whatever may happen."""


@pytest.mark.parametrize("error", [Crash(), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_crash_in_the_middle_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half of the n", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert names_in(tmp_path) == ["file"]


def test_a_crash_before_anything_was_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Crash), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise Crash
    assert names_in(tmp_path) == []


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old" and temporary.parent == path.parent
    assert path.read_text(encoding="utf-8") == "new"


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_before_anything_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        order.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        order.append(f"rename {source} {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert order == [f"sync {temporary}", f"rename {temporary} {tmp_path / 'file'}", f"sync {tmp_path}"]


def test_what_a_killed_process_left_behind_is_not_read(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save("it", *OLD)
    (tmp_path / ".it.safetensors.1234.tmp").write_bytes(b"half of it")
    assert_kept(store, OLD)
    store.save("it", *NEW)
    assert_kept(store, NEW)


def test_a_state_that_is_no_strict_json_touches_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save("it", *OLD)
    with pytest.raises(ValueError, match="JSON"):
        store.save("it", {"loss": float("nan")}, NEW[1])
    assert_kept(store, OLD)


# -- a disk that is full -----------------------------------------------------------------------------------------------


def breaks_off(error: Exception) -> Callable[..., NoReturn]:
    """``save_file`` on a disk that fills up."""

    def save_file(tensors: object, path: Path, metadata: object) -> NoReturn:
        path.write_bytes(b"half of it")
        raise error

    return save_file


def refuses(error: Exception) -> Callable[..., NoReturn]:
    def refused(*arguments: object) -> NoReturn:
        raise error

    return refused


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (NO_SPACE, "No space left on device"),
        (SafetensorError("I/O error: No space left (os error 28)"), "No space left"),
    ],
    ids=["system", "safetensors"],
)
def test_a_disk_that_is_full_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, found: str
) -> None:
    store = FolderStore(tmp_path)
    store.save("it", *OLD)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", breaks_off(error))
        with pytest.raises(OutputNotWritable, match=f"it.safetensors': .*{found}.*; free some space"):
            store.save("it", *NEW)
    assert_kept(store, OLD)
    assert names_in(tmp_path) == ["it.safetensors"]
    store.save("it", *NEW)
    assert_kept(store, NEW)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_found_to_be_full_late_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = FolderStore(tmp_path)
    store.save("it", *OLD)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuses(NO_SPACE))
        with pytest.raises(OutputNotWritable, match="No space left on device"):
            store.save("it", *NEW)
    assert_kept(store, OLD)
    assert names_in(tmp_path) == ["it.safetensors"]


def test_a_real_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputNotWritable, match="No space left on device"), checkpoint.writing(Path("/dev/full")):
        Path("/dev/full").write_text("x" * 100, encoding="utf-8")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputNotWritable, match=r"file/store/it\.safetensors'"):
        FolderStore(tmp_path / "file" / "store").save("it", *NEW)


def test_room_is_made_for_a_result_and_nothing_is_left_there(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there yet" / "bench.json"
    make_room_for(path)
    assert path.parent.is_dir() and not any(path.parent.iterdir())
    path.write_text("an old result")
    make_room_for(path)
    assert path.read_text() == "an old result"


def test_no_room_for_a_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "bench.json", tmp_path):
        with pytest.raises(OutputNotWritable, match="choose a writable folder"):
            make_room_for(path)


def test_text_is_written_whatever_is_in_it(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "é\n\udc80\n")
    assert (tmp_path / "file").read_bytes() == "é\n\\udc80\n".encode()


# -- damage ------------------------------------------------------------------------------------------------------------


def whole(folder: Path) -> bytes:
    FolderStore(folder).save("it", *OLD)
    return (folder / "it.safetensors").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"\xff" * len(content),
        lambda content: content.replace(b"state", b"stale"),
        lambda content: content.replace(b'{\\"age\\"', b'[\\"age\\"'),
        lambda content: safetensors.torch.save(OLD[1]),
    ],
    ids=["empty", "a byte short", "header cut", "noise", "no state", "state is no JSON", "no metadata"],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    content = whole(tmp_path)
    assert damage(content) != content
    (tmp_path / "it.safetensors").write_bytes(damage(content))
    with pytest.raises(CheckpointError, match=r"it\.safetensors' cannot be read: .*; remove it to start again"):
        FolderStore(tmp_path).load("it")


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "it.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        FolderStore(tmp_path).load("it")


# -- digests -----------------------------------------------------------------------------------------------------------


def test_a_digest_is_that_of_names_dtypes_shapes_and_numbers_and_of_nothing_else() -> None:
    tensors = samples()
    same = {name: tensor.detach().clone() for name, tensor in reversed(tensors.items())}
    assert digest_of(tensors) == digest_of(same)
    assert len(digest_of(tensors)) == 64


@pytest.mark.parametrize("name", list(samples()))
def test_a_digest_changes_with_every_tensor(name: str) -> None:
    tensors = samples()
    digests = [digest_of(tensors)]
    tensor = tensors.pop(name).detach()
    digests.append(digest_of(tensors))
    digests.append(digest_of({**tensors, name + " ": tensor}))
    digests.append(digest_of({**tensors, name: tensor[None]}))
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    digests.append(digest_of({**tensors, name: tensor.to(other)}))
    if tensor.numel():
        changed = tensor.contiguous().clone()
        changed.view(-1).view(torch.uint8)[-1] ^= 1  # the smallest change that there is
        digests.append(digest_of({**tensors, name: changed}))
    assert len(set(digests)) == len(digests)


def test_a_digest_tells_apart_numbers_of_the_same_bits() -> None:
    ones = torch.ones(4)
    same_bits = [ones, ones.view(torch.int32), ones[None], ones.view(2, 2)]
    assert len({digest_of({"w": tensor}) for tensor in same_bits}) == len(same_bits)
    assert digest_of({"a": ones, "b": ones * 2}) != digest_of({"a": ones * 2, "b": ones})


# -- folders, and lines at the end of a file ---------------------------------------------------------------------------


def put_two(folder: Path, size: int = 3000) -> None:
    with replacing_folder(folder) as scratch:
        (scratch / "a.txt").write_bytes(b"a" * 10)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "b.bin").write_bytes(b"b" * size)


def test_a_folder_stands_with_all_of_its_files(tmp_path: Path) -> None:
    put_two(tmp_path / "parent" / "it")
    assert [path.name for path in sorted((tmp_path / "parent").rglob("*"))] == ["it", "a.txt", "deep", "b.bin"]
    (tmp_path / "parent" / "it" / "kept.txt").write_text("of somebody else")
    put_two(tmp_path / "parent" / "it", size=7)
    assert (tmp_path / "parent" / "it" / "deep" / "b.bin").read_bytes() == b"b" * 7
    assert (tmp_path / "parent" / "it" / "kept.txt").is_file()
    assert names_in(tmp_path / "parent") == ["it"]


@pytest.mark.parametrize("room", [0, 5, 2000])
def test_a_full_disk_leaves_a_folder_absent_or_as_it_was(tmp_path: Path, room: int) -> None:
    with largest_file(room), pytest.raises(OutputNotWritable, match="it': File too large; free some space"):
        put_two(tmp_path / "it")
    assert names_in(tmp_path) == []
    put_two(tmp_path / "it", size=7)
    with largest_file(room), pytest.raises(OutputNotWritable):
        put_two(tmp_path / "it")
    assert (tmp_path / "it" / "deep" / "b.bin").read_bytes() == b"b" * 7
    assert names_in(tmp_path) == ["it"]


def test_an_error_of_the_writer_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "it") as scratch:
        (scratch / "half").touch()
        raise ZeroDivisionError
    assert names_in(tmp_path) == []


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_text(path, "first\n")
    with largest_file(20), pytest.raises(OutputNotWritable, match=r"metrics\.jsonl"):
        append_text(path, "x" * 100 + "\n")
    append_text(path, "last\n")
    assert path.read_text(encoding="utf-8") == "first\nlast\n"
