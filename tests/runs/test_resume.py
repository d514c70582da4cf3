"""A run that was stopped, or has finished, goes on: to the same end, bit for bit, as one that was never stopped."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from gaisnet.checkpoint import FolderStore, write_text
from gaisnet.config import Config
from gaisnet.config.file import load_config
from gaisnet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NothingToResume,
    OutputInUse,
    OutputNotWritable,
)
from gaisnet.runs.output import LOCK_NAME, RunFolder
from gaisnet.runs.run import resume_experiment, run_experiment
from gaisnet.runs.summary import Summary
from tests.tiny import save_tiny_foundation, tiny_edge, tiny_newcomer, write_tiny_run

pytestmark = pytest.mark.integration

EDGES = [tiny_edge("north", "shapes", "b"), tiny_edge("south", "tastes", "c"), tiny_newcomer("west", "forms", "shapes")]
EDGES[1]["devices"] = EDGES[1]["devices"][::2]
EDGES[2]["devices"] = EDGES[2]["devices"][::2]
OPEN_GATE = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
ASKING_GATE = {
    **OPEN_GATE,
    "validation_share": 0.2,
    "merge": {"method": ["sum", "regression"]},
    "last_mile": {"epochs": 1},
}


class Power:
    """A progress callback that fails in the second cycle, after so many steps of a stage.

    ``cycles`` are those that were finished before anything is told.
    """

    def __init__(self, stage: str, after: int = 0, cycles: int = 0) -> None:
        self._stage = stage
        self._left = after
        self._cycle = cycles

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._cycle += stage == "release" and done == 0
        if self._cycle == 2 and stage == self._stage:
            if not self._left:
                raise Gone
            self._left -= 1


class Gone(Exception):
    """The power is."""


def at(folder: Path) -> Config:
    return load_config(folder / "run.yaml")


def read_summary(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def outcome(summary: dict[str, Any]) -> dict[str, Any]:
    """All figures that do not depend on when the run was stopped: a restart sends models again, and takes time."""
    kept = [{k: v for k, v in cycle.items() if k not in ("seconds", "bytes")} for cycle in summary["cycles"]]
    return {**summary, "cycles": kept}


def files(folder: Path) -> dict[str, bytes]:
    """Content by name of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def events(out: Path) -> list[tuple[str, int]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(event["event"], event["cycle"]) for event in map(json.loads, lines)]


def curve(out: Path, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    return [(point.step, point.value) for point in read.Scalars(tag)]


def assert_same_end(out: Path, whole: Path) -> None:
    """Summary, adapters, events and curves are those of a run that was never stopped, and nothing else is there."""
    summary, expected = read_summary(out), read_summary(whole)
    assert outcome(summary) == outcome(expected)
    assert files(out / "adapters") == files(whole / "adapters")
    assert (out / "report.html").read_text() == (whole / "report.html").read_text()
    assert events(out) == events(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for tag in ("steps/loss", "steps/relay_loss"):
        assert curve(out, tag) == curve(whole, tag)
    # The point of a cycle that was measured and not kept is there twice: the same one.
    assert dict(curve(out, "loss/domain/tastes")) == dict(curve(whole, "loss/domain/tastes"))
    for cycle, other in zip(summary["cycles"], expected["cycles"], strict=True):
        for kind, traffic in other["bytes"].items():
            assert all(cycle["bytes"][kind][way] >= size for way, size in traffic.items())


def leave_lock_of_the_dead(out: Path) -> None:
    """As a process that was killed leaves it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (out / LOCK_NAME).write_text(f"{process.pid}\n", encoding="ascii")


@pytest.fixture(scope="module", autouse=True)
def quick_reports() -> Iterator[None]:
    """To draw a report takes as long as all the rest."""

    def write_report(folder: RunFolder, summary: Summary) -> None:
        write_text(folder.report_path, f"{len(summary.cycles)} entries")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_report", write_report)
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration of two cycles and all that it names."""
    folder = tmp_path_factory.mktemp("site")
    write_tiny_run(folder, edges=EDGES, absorb=ASKING_GATE)
    return folder


@pytest.fixture(scope="module")
def whole(site: Path) -> Path:
    """A run of two cycles that was never stopped."""
    run_experiment(at(site), site / "whole")
    return site / "whole"


@pytest.fixture(scope="module")
def one_cycle(site: Path) -> Path:
    run_experiment(at(site).model_copy(update={"cycles": 1}), site / "short")
    return site / "short"


@pytest.fixture
def short(one_cycle: Path, tmp_path: Path) -> Path:
    """A run of one cycle, to do something with."""
    return Path(shutil.copytree(one_cycle, tmp_path / "out"))


# -- to the same end ---------------------------------------------------------------------------------------------------


def test_a_finished_run_that_gets_another_cycle_ends_as_one_that_had_it_from_the_start(
    short: Path, whole: Path
) -> None:
    before = read_summary(short)
    returned = resume_experiment(short, ["cycles=2"])
    assert_same_end(short, whole)
    summary = read_summary(short)
    assert summary["cycles"][:2] == before["cycles"]
    assert Summary.model_validate(summary) == returned


def test_a_run_that_breaks_off_in_its_second_cycle_goes_on_to_the_same_end(
    site: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Gone):
        run_experiment(at(site), out, Power("fine_tune", after=4))
    assert [cycle["cycle"] for cycle in read_summary(out)["cycles"]] == [0, 1]
    leave_lock_of_the_dead(out)
    resume_experiment(out)
    assert_same_end(out, whole)


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        pytest.param("release", 0, id="before", marks=pytest.mark.slow),
        pytest.param("relay", 1, id="in a relay", marks=pytest.mark.slow),
        pytest.param("fine_tune", 4, id="in a step"),
        pytest.param("absorb", 1, id="after absorb", marks=pytest.mark.slow),
        pytest.param("evaluate", 1, id="after evaluate"),
    ],
)
def test_a_run_that_goes_on_may_break_off_as_well(short: Path, whole: Path, stage: str, after: int) -> None:
    with pytest.raises(Gone):
        resume_experiment(short, ["cycles=2"], Power(stage, after, cycles=1))
    leave_lock_of_the_dead(short)
    resume_experiment(short, ["cycles=2"])
    assert_same_end(short, whole)


@pytest.mark.parametrize("call", ["write_summary", "write_report"])
def test_a_run_that_breaks_off_between_its_files_goes_on_to_the_same_end(
    short: Path, whole: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = getattr(RunFolder, call)

    def breaks_off(folder: RunFolder, summary: Summary) -> None:
        write(folder, summary)
        if len(summary.cycles) == 3:
            raise OutputNotWritable(folder.path, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputNotWritable):
        patch.setattr(RunFolder, call, breaks_off)
        resume_experiment(short, ["cycles=2"])
    assert events(short)[-1] == ("cycle", 2)  # all is known, but not all is kept
    resume_experiment(short, ["cycles=2"])
    assert_same_end(short, whole)


def test_a_run_that_has_all_its_cycles_has_nothing_more_to_do(whole: Path) -> None:
    before = read_summary(whole), events(whole), files(whole / "adapters")
    resume_experiment(whole)
    assert (read_summary(whole), events(whole), files(whole / "adapters")) == before
    resume_experiment(whole, ["cycles=1"])
    assert read_summary(whole)["cycles"] == before[0]["cycles"]
    resume_experiment(whole, ["cycles=2"])
    assert read_summary(whole) == before[0]


def test_a_run_goes_on_from_another_working_directory(
    site: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site)
    with pytest.raises(Gone):
        run_experiment(load_config(Path("run.yaml")), tmp_path / "out", Power("release"))
    monkeypatch.chdir(tmp_path)
    resume_experiment(Path("out"), ["cycles=2"])
    assert_same_end(tmp_path / "out", whole)


def test_a_run_whose_site_was_moved_goes_on_from_anywhere_to_the_same_end(
    site: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(site, old, ignore=shutil.ignore_patterns("whole", "short"))
    raw = yaml.safe_load((old / "run.yaml").read_text(encoding="utf-8"))
    raw["model"]["foundation"] = "foundation"
    (old / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_experiment(load_config(Path("old/run.yaml"), ["cycles=1"]), Path("old/out"))
    old.rename(new)
    monkeypatch.chdir(new)
    data = [
        f"edges.{i}.devices.{j}.data=data/{d['name']}" for i, e in enumerate(EDGES) for j, d in enumerate(e["devices"])
    ]
    assert_refused(Path("out"), DataError, "no such file.*name it anew")
    assert_refused(Path("out"), ModelError, "old/foundation': there is no such folder.*--set model.foundation=", *data)
    resume_experiment(Path("out"), ["cycles=2", "model.foundation=foundation", *data])
    assert outcome(read_summary(new / "out"))["cycles"] == outcome(read_summary(whole))["cycles"]
    learned = {name: content for name, content in files(whole / "adapters").items() if name.endswith(".safetensors")}
    assert learned.items() <= files(new / "out" / "adapters").items()
    monkeypatch.chdir(tmp_path)
    resume_experiment(new / "out")  # it knows by now where all is


def test_a_run_goes_on_with_the_model_that_it_began_with_and_no_other(short: Path, site: Path, tmp_path: Path) -> None:
    other = save_tiny_foundation(tmp_path / "other", seed=1, initializer_range=0.1)
    refused = r"'.*other' of the run in '.*out': has other weights than the model that the run began with"
    assert_refused(short, ConfigError, refused, f"model.foundation={other}")
    same = Path(shutil.copytree(site / "foundation", tmp_path / "same"))
    assert resume_experiment(short, [f"model.foundation={same}"]).config["model"]["foundation"] == str(same)  # type: ignore[index,call-overload]


def test_a_run_whose_newcomers_had_the_foundation_model_scored_goes_on_without(short: Path, whole: Path) -> None:
    store = FolderStore(short / "checkpoint")
    kept = store.load("run")
    assert kept is not None
    state, tensors = kept
    for cycle in state["summary"]["cycles"]:
        for body in ("foundation", "merged"):
            cycle[body]["forms"] = {"accuracy": 1.0, "loss": 0.5, "num_examples": 6}
    store.save("run", state, tensors)
    *old, new = resume_experiment(short, ["cycles=2"]).cycles
    assert [tuple(cycle.foundation) for cycle in old] == [("shapes", "tastes", "forms")] * 2
    expected = Summary.model_validate(read_summary(whole)).cycles[2]
    assert (new.foundation, new.domain, new.merged) == (expected.foundation, expected.domain, expected.merged)
    assert tuple(new.foundation) == ("shapes", "tastes")
    assert not any("the FM" in line and "'forms'" in line for line in new.gate)  # nothing fell


def test_deadlines_may_change(short: Path) -> None:
    summary = resume_experiment(short, ["faults.away_s=7", "faults.min_devices=2", "cycles=2"])
    faults = summary.config["faults"]
    assert isinstance(faults, dict) and (faults["away_s"], faults["min_devices"]) == (7.0, 2)
    assert read_summary(short)["config"] == summary.config
    assert resume_experiment(short).config == summary.config  # and are kept


# -- what cannot go on -------------------------------------------------------------------------------------------------


def everything(out: Path) -> dict[str, bytes]:
    return files(out) if out.exists() else {}


def assert_refused(out: Path, error: type[Exception], match: str, *overrides: str) -> None:
    """Nothing is changed, and no lock is left."""
    before = everything(out)
    with pytest.raises(error, match=match):
        resume_experiment(out, overrides)
    assert everything(out) == before


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert_refused(
            folder, NothingToResume, f"'{folder}': no part of a run was finished in it; start one with --out"
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.txt").write_text("do not lose me", encoding="utf-8")
    assert_refused(tmp_path, NothingToResume, "no part of a run")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("do not lose me", encoding="utf-8")
    with pytest.raises(NothingToResume):
        resume_experiment(tmp_path / "file")


def test_a_run_that_broke_off_before_its_first_checkpoint(site: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, figures: Mapping[str, float]) -> NoReturn:
        raise Gone

    with pytest.raises(Gone):
        run_experiment(at(site), tmp_path / "out", stop)
    assert_refused(tmp_path / "out", NothingToResume, "no part of a run")
    (tmp_path / "out" / "checkpoint").mkdir()
    assert_refused(tmp_path / "out", NothingToResume, "no part of a run")


def test_a_run_that_is_under_way(short: Path) -> None:
    with RunFolder.resume(short):
        assert_refused(short, OutputInUse, rf"is taken by process {os.getpid()} on host .*; wait until that process")
        assert (short / LOCK_NAME).exists()
    assert not (short / LOCK_NAME).exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (
            "seed=1",
            "--set seed=1 on a run that goes on: would make it another run; "
            "change cycles, evaluate, faults, front, service only, or where things are: model.foundation, ",
        ),
        ("fine_tune.learning_rate=1", "would make it another run"),
        ("edges.0.devices.0.mode=local", "would make it another run"),
        ("edges.0.devices=[]", "would make it another run"),
        ("model.foundationn=x", "would make it another run"),
        ("model={foundation: x}", "would make it another run"),
        ("model.foundation=../nowhere", r"model.foundation '../nowhere': there is no '/.*; correct it"),
        ("cycles_=3", "would make it another run"),
        ("faults.away=3", "'faults.away': is not known; did you mean 'away_s'"),
        ("cycles=0", "greater than or equal to 1"),
        ("cycles", "is not of the form key=value"),
    ],
)
def test_settings_that_would_make_it_another_run(short: Path, override: str, match: str) -> None:
    assert_refused(short, ConfigError, match, "cycles=2", override)


def test_a_damaged_checkpoint(short: Path) -> None:
    (path,) = (short / "checkpoint").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(short, CheckpointError, "cannot be read")


def test_data_that_is_gone(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, edges=EDGES[:1], absorb=OPEN_GATE, cycles=1)
    run_experiment(at(tmp_path), tmp_path / "out")
    (tmp_path / "data" / "north-a" / "train.jsonl").unlink()
    assert_refused(tmp_path / "out", DataError, "north-a", "cycles=2")
