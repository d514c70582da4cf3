"""The output folder: who may have it, what lands in it, what happens when it cannot be written."""

import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gaisnet.errors import NotFinite, OutputInUse, OutputNotWritable
from gaisnet.locks import Lock
from gaisnet.runs.output import LOCK_NAME, RunFolder, cycle_scalars
from gaisnet.runs.summary import Cycle, Summary


def _cycle(number: int = 1) -> Cycle:
    score = {"accuracy": 0.5, "loss": 1.25, "num_examples": 210}
    return Cycle.model_validate(
        {
            "cycle": number,
            "foundation": {"medical": score},
            "domain": {"medical": score},
            "merged": {"medical": score},
            "retention": {"perplexity": 19.0, "adapters": {"medical": 19.0, "merged": 18.0}},
            "bytes": {"device_edge": {"up": 1, "down": 2}, "edge_cloud": {"up": 3, "down": 4}},
            "seconds": {"release": 0.25, "fine_tune": 0.5, "absorb": 1.0, "evaluate": 2.5},
            "relay": {"medical": {"loss_before": 2.0, "loss_after": 0.5}},
        }
    )


def _summary() -> Summary:
    raw: dict[str, Any] = {
        "seed": 7,
        "config": {},
        "model": {"foundation_params": 100, "foundation_layers": 30, "domain_layers": 24, "trainable_params": 9},
        "device": {"params_fraction": 0.25},
        "majority": {"medical": 0.14},
        "cycles": [_cycle(0), _cycle(1)],
    }
    return Summary.model_validate(raw)


def test_create_makes_parents_and_holds_a_lock_until_closed(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with RunFolder.create(path) as folder:
        assert folder.path == path
        with pytest.raises(OutputInUse, match=f"is taken by process {os.getpid()} on host '{socket.gethostname()}'"):
            RunFolder.create(path)
    assert list(path.iterdir()) == []
    folder.close()  # twice is harmless


def test_a_run_that_wrote_nothing_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunFolder.create(tmp_path / "out"):
        raise KeyError("bad input")
    RunFolder.create(tmp_path / "out").close()


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    (tmp_path / "zebra").mkdir()
    with pytest.raises(OutputInUse, match=r"not empty, it holds 'thesis\.tex' and 1 more"):
        RunFolder.create(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["thesis.tex", "zebra"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(OutputInUse, match="is a file, not a folder"):
        RunFolder.create(tmp_path / "out")
    with pytest.raises(OutputNotWritable, match="Not a directory"):
        RunFolder.create(tmp_path / "out" / "deeper")


@pytest.mark.parametrize("content", ["", "0", "1", "99999999999999999999", "not a number", "\udce9"])
def test_a_lock_file_that_no_process_has_locked_keeps_nobody_out(tmp_path: Path, content: str) -> None:
    """Process 1 is always alive, and another one than the one that wrote the file."""
    (tmp_path / LOCK_NAME).write_text(content, encoding="utf-8", errors="surrogateescape")
    RunFolder.create(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_NAME).symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(OutputNotWritable):
        RunFolder.create(tmp_path / "out")
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_the_remains_of_a_run_that_died_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("4194305\n", encoding="ascii")
    (tmp_path / "metrics.jsonl").write_text("{}", encoding="ascii")
    with pytest.raises(OutputInUse, match=r"is not empty, it holds 'metrics\.jsonl'"):
        RunFolder.create(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [LOCK_NAME, "metrics.jsonl"]
    RunFolder.claim(tmp_path).close()  # for a process that is started again they are its own
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_of_a_run_that_died_is_refused_by_a_process_that_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}", encoding="ascii")
    with pytest.raises(OutputInUse, match="is not empty"):
        RunFolder.claim(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_came_and_went_before_our_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gaisnet.runs import output

    take_lock = output._take_lock

    def late(folder: Path) -> Lock:
        (folder / "summary.json").write_text("{}", encoding="utf-8")
        return take_lock(folder)

    monkeypatch.setattr(output, "_take_lock", late)
    with pytest.raises(OutputInUse, match="not empty"):
        RunFolder.create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_nearly_full_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 3 * 2**20))
    with pytest.raises(OutputNotWritable, match=r"has 3\.0 MiB free, a run needs at least 64 MiB"):
        RunFolder.create(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object, **__: object) -> int:
        raise OSError(122, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OutputNotWritable, match="Disk quota exceeded"):
            RunFolder.create(tmp_path)
    RunFolder.create(tmp_path).close()  # nothing is left that would keep anybody out
    assert list(tmp_path.iterdir()) == []


def test_log_appends_a_line_that_is_readable_at_once(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.log({"event": "step", "loss": 1.5})
        folder.log({"event": "note", "text": "zwei\nZeilen"})
        lines = folder.metrics_path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [
            {"event": "step", "loss": 1.5},
            {"event": "note", "text": "zwei\nZeilen"},
        ]
        with pytest.raises(NotFinite, match=r"losses\.1 at writing metrics\.jsonl is nan"):
            folder.log({"losses": [1.0, math.nan]})
        assert len(folder.metrics_path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_fills_during_the_run_is_a_gaisnet_error(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.metrics_path.symlink_to("/dev/full")
        with pytest.raises(OutputNotWritable, match=r"metrics\.jsonl.*No space left on device"):
            folder.log({"event": "step"})


def test_a_tensorboard_folder_that_cannot_be_made_is_a_gaisnet_error(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.tensorboard_dir.write_text("in the way", encoding="utf-8")
        with pytest.raises(OutputNotWritable, match="tensorboard"):
            folder.scalar("train/loss", 1.0, 0)


def test_an_error_in_the_block_is_not_hidden_by_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenEvents:
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(KeyError), RunFolder.create(tmp_path) as folder:
        monkeypatch.setattr(folder, "_events", BrokenEvents())
        raise KeyError("the real reason")
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_run_writes_everything_and_the_folder_is_then_taken(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.scalar("train/medical/loss", 2.5, 3)
        folder.log_cycle(_cycle())
        folder.write_summary(_summary())
        folder.write_report(_summary())
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["metrics.jsonl", "report.html", "summary.json", "tensorboard"]
    assert Summary.model_validate_json(folder.summary_path.read_text(encoding="utf-8")) == _summary()
    (line,) = folder.metrics_path.read_text(encoding="utf-8").splitlines()
    event = json.loads(line)
    assert event.pop("event") == "cycle"
    assert Cycle.model_validate(event) == _cycle()
    assert folder.adapters_dir == tmp_path / "adapters"
    with pytest.raises(OutputInUse):
        RunFolder.create(tmp_path)


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        EventFileLoader,
    )

    with RunFolder.create(tmp_path) as folder:
        folder.scalar("train/medical/loss", 2.5, 3)
        folder.log_cycle(_cycle())
    (path,) = folder.tensorboard_dir.iterdir()
    found = {
        value.tag: (event.step, value.tensor.float_val[0])
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert found.pop("train/medical/loss") == (3, 2.5)
    assert found == {tag: (1, value) for tag, value in cycle_scalars(_cycle()).items()}


def test_scalars_of_a_cycle_cover_every_body_link_and_verb() -> None:
    scalars = cycle_scalars(_cycle())
    assert scalars["accuracy/merged/medical"] == 0.5
    assert scalars["loss/domain/medical"] == 1.25
    assert scalars["retention/adapters/merged"] == 18.0
    assert scalars["bytes/edge_cloud/down"] == 4
    assert scalars["seconds/evaluate"] == 2.5
    assert scalars["relay/medical/after"] == 0.5
    assert len(scalars) == 3 * 2 + 3 + 4 + 4 + 2


def test_scalars_of_a_newcomer_are_those_of_its_domain_model() -> None:
    cycle = _cycle()
    with_newcomer = cycle.model_copy(update={"domain": {**cycle.domain, "rural": cycle.domain["medical"]}})
    more = cycle_scalars(with_newcomer).keys() - cycle_scalars(cycle).keys()
    assert more == {"accuracy/domain/rural", "loss/domain/rural"}


def test_a_run_that_is_stopped_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunFolder.claim(tmp_path / "run") as folder:
        folder.scalar("loss", 1.0, 1)
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "tensorboard").is_dir()
    with RunFolder.claim(tmp_path / "run") as folder:
        assert not folder.tensorboard_dir.exists()
