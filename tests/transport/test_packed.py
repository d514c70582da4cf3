"""A frame cut out of its tensors: the pieces are a safetensors file, and what is no such file is refused."""

import json
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gaisnet.errors import WireFormatError
from gaisnet.transport.packed import Packed, read_tensors

METADATA = {"message": "ModelRelease", "fields": '{"a": "é"}'}
Header = dict[str, Any]


def tensors() -> dict[str, Tensor]:
    numbers = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8)
    every = {str(kind): (10 * numbers).abs().to(kind) for kind in kinds}
    odd = {"turned": numbers.t(), "number": torch.tensor(3), "nothing": torch.zeros(0, 4), "truth": numbers > 0}
    return {**every, **odd}


def in_memory(content: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(content))
    memory.write(content)
    return memory


@pytest.mark.parametrize("step", [1, 7, 64, 1000, 10**6])
def test_pieces_of_any_length_are_a_safetensors_file(step: int) -> None:
    packed = Packed(tensors(), METADATA)
    starts = range(0, packed.size_bytes, step)
    content = b"".join(packed.cut(start, min(start + step, packed.size_bytes)) for start in starts)
    assert len(content) == packed.size_bytes
    for found in (safetensors.torch.load(content), read_tensors(in_memory(content))):
        assert found.keys() == tensors().keys()
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors().items())


def test_the_whole_is_no_longer_than_it_says() -> None:
    for some in (tensors(), {}, {"a": torch.zeros(3)}):
        packed = Packed(some, METADATA)
        assert packed.size_bytes - 64 <= len(packed.whole()) <= packed.size_bytes


def test_tensors_lie_where_they_can_be_used() -> None:
    packed = Packed({"b": torch.zeros(4, 32), "a": torch.ones(64)}, METADATA)
    found = read_tensors(in_memory(bytes(packed.cut(0, packed.size_bytes))))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_a_snapshot_does_not_change_with_its_tensors() -> None:
    mine = torch.ones(8)
    shot = Packed({"a": mine}, METADATA).snapshot()
    mine.zero_()
    assert torch.equal(safetensors.torch.load(bytes(shot.cut(0, shot.size_bytes)))["a"], torch.ones(8))


def put(name: str, key: str, value: object) -> Callable[[Header], object]:
    return lambda header: header[name].update({key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        put("a", "data_offsets", [0, 2**40]),
        put("a", "data_offsets", [-8, 24]),
        put("a", "data_offsets", [4, 36]),
        put("b", "data_offsets", [0, 32]),
        put("a", "shape", [2**31, 2**31, 8]),
        put("a", "shape", [-8, -1]),
        put("a", "shape", [True, 8]),
        put("a", "shape", 8),
        put("a", "dtype", "F33"),
        put("a", "dtype", "F64"),
        put("a", "more", 1),
        lambda header: header.pop("b"),
        lambda header: header.update({"a": None}),
        lambda header: header.clear(),
    ],
)
def test_a_header_that_does_not_fit_its_numbers_is_refused(spoil: Callable[[Header], object]) -> None:
    packed = Packed({"a": torch.ones(8), "b": torch.zeros(8)}, METADATA)
    content = bytes(packed.cut(0, packed.size_bytes))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    spoil(header)
    text = json.dumps(header).encode()
    with pytest.raises(WireFormatError):
        read_tensors(in_memory(len(text).to_bytes(8, "little") + text + content[8 + size :]))
