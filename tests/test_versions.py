"""Versions of what crosses links and of what is kept: another one is refused with a sentence that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gaisnet.checkpoint import CHECKPOINT_VERSION, FolderStore
from gaisnet.config import WireSettings
from gaisnet.deployment.site import KIT_VERSION, SITE_FILE, Site, read_site, write_site
from gaisnet.errors import CheckpointVersion, KitVersion, WireVersion
from gaisnet.messages import Done, FineTune
from gaisnet.runs.run import read_summary
from gaisnet.transport.codec import WIRE_VERSION, Codec
from tests.tiny import tiny_config

OLD_FRAME = bytes.fromhex(
    "4100000000000000"  # the length of the header
    "7b225f5f6d657461646174615f5f223a7b226d657373616765223a2246696e6554756e65222c226669656c6473223a227b"
    "5c226379636c655c223a20317d227d7d"
)
"""An order as the first releases wrote it: no version."""
SENTENCE = r"version {found} of the wire protocol, and this site speaks version 1; install the same release of GaisNet"


def test_a_frame_of_today_says_its_version() -> None:
    frame = Codec(WireSettings()).encode(Done())
    assert json.loads(frame[8:])["__metadata__"]["version"] == WIRE_VERSION == "1"


def test_a_frame_of_the_first_releases_is_refused() -> None:
    with pytest.raises(WireVersion, match=SENTENCE.format(found="0")):
        Codec(WireSettings()).decode(OLD_FRAME)


@pytest.mark.parametrize("version", ["2", "10", 1, None, "1.5", "x" * 1000])
def test_a_frame_of_another_version_is_refused_before_its_fields_are_read(version: Any) -> None:
    frame = Codec(WireSettings()).encode(FineTune(1))
    header = json.loads(frame[8:])
    header["__metadata__"] |= {"version": version, "fields": "of another kind"}
    text = json.dumps(header).encode()
    with pytest.raises(WireVersion) as refused:
        Codec(WireSettings()).decode(len(text).to_bytes(8, "little") + text)
    assert len(str(refused.value)) < 300


def keep(path: Path, **metadata: str) -> Path:
    """Write a checkpoint by other means than the store."""
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata)
    return path


def test_a_checkpoint_of_today_says_its_version(tmp_path: Path) -> None:
    FolderStore(tmp_path).save("run", {"a": 1}, {"x": torch.ones(2)})
    with safetensors.safe_open(tmp_path / "run.safetensors", "pt") as file:
        assert json.loads(file.metadata()["checkpoint"])["version"] == CHECKPOINT_VERSION == "1"
    loaded = FolderStore(tmp_path).load("run")
    assert loaded is not None and loaded[0] == {"a": 1}


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        FolderStore(tmp_path).save(name, {"a": 1, "b": 2}, {"x": torch.ones(2), "y": torch.zeros(3)})
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in ("a", "b", "c", "d")}) == 1


@pytest.mark.parametrize(
    ("metadata", "found"),
    [({"state": "{}"}, "0"), ({"checkpoint": '{"version": "2"}'}, "2")],
    ids=["an old one", "a newer one"],
)
def test_a_checkpoint_of_another_version_is_refused_and_stays(
    tmp_path: Path, metadata: dict[str, str], found: str
) -> None:
    path = keep(tmp_path / "checkpoint" / "run.safetensors", **metadata)
    before = path.read_bytes()
    said = f"is in format {found}, and this release reads format 1; finish the run with the release that began it"
    with pytest.raises(CheckpointVersion, match=said):
        FolderStore(path.parent).load("run")
    assert path.read_bytes() == before


def newer(text: str) -> str:
    return text.replace("version: 1", "version: 2")


def older(text: str) -> str:
    return text.replace("version: 1\n", "")


@pytest.mark.parametrize(("change", "found"), [(older, "0"), (newer, "2")])
def test_a_kit_of_another_version_is_refused(tmp_path: Path, change: Callable[[str], str], found: str) -> None:
    write_site(tmp_path, Site(role="cloud", name="cloud", config=tiny_config()))
    assert read_site(tmp_path).version == KIT_VERSION
    file = tmp_path / SITE_FILE
    changed = change(file.read_text(encoding="utf-8"))
    assert changed != file.read_text(encoding="utf-8")
    file.write_text(changed, encoding="utf-8")
    with pytest.raises(KitVersion, match=f"is in format {found}, .* make new kits with 'gaisnet deploy prepare'"):
        read_site(tmp_path)


def test_a_summary_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"schema": "gaisnet.summary/2", "news": 1}', encoding="utf-8")
    with pytest.raises(CheckpointVersion, match=r"summary\.json' is in format 2, and this release reads format 1"):
        read_summary(tmp_path)
