"""A run that has finished answers, and goes on meanwhile, to the same end as one that serves nobody."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gaisnet.config.file import load_config
from gaisnet.errors import ConfigError, DataError, NothingToResume, OutputInUse
from gaisnet.runs.run import resume_experiment, run_experiment
from gaisnet.runs.served_run import ServedRun, serve_run
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.routing import Target
from gaisnet.serving.generation.text import Sampling
from tests.tiny import tiny_edge, write_tiny_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one cycle of one edge."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, edges=[tiny_edge("north", "shapes")], cycles=1)
    run_experiment(load_config(folder / "run.yaml"), folder / "out")
    return folder / "out"


def copy_of(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder / "out")
    return folder / "out"


def answer(served: ServedRun, target: Target) -> list[int]:
    parts = served.bodies.parts("north-a")
    session = served.bodies.open_session(target, parts.first, parts.stop, 20)
    return list(generate(parts, session, served.foundation.tokenizer.encode("Is it so?"), Sampling(max_tokens=6)))


def cycles(out: Path) -> list[dict[str, Any]]:
    """What a run has measured, without what depends on the clock or on how often it was started."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return [{k: v for k, v in cycle.items() if k not in ("seconds", "bytes")} for cycle in summary["cycles"]]


@contextmanager
def without(folder: Path) -> Iterator[None]:
    """Inside, a folder is somewhere else."""
    away = folder.rename(folder.with_name(f"{folder.name}-away"))
    try:
        yield
    finally:
        away.rename(folder)


EDGE, CLOUD = Target("edge", ("relay", "domain"), "shapes"), Target("cloud", ("shapes",), "shapes")


def test_it_serves_what_the_run_has_learned(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished, tmp_path)
    with serve_run(out, ["service.max_sessions=1"]) as served:
        assert served.bodies.adapters("edge", "shapes") == ["domain", "relay"]
        parts = served.bodies.parts("north-a")
        for target, versions in ((EDGE, ("relay@1", "domain@1")), (CLOUD, ("shapes@1",))):
            session = served.bodies.open_session(target, parts.first, parts.stop, 20)
            assert session.versions == versions
            session.close()
            assert len(answer(served, target)) == 6
        assert served.config.service.max_sessions == 1
        with pytest.raises(OutputInUse), serve_run(out):
            pass
    assert cycles(out) == cycles(finished)


def test_it_goes_on_with_the_run_while_it_serves(finished: Path, tmp_path: Path) -> None:
    out, alone = copy_of(finished, tmp_path), copy_of(finished, tmp_path / "alone")
    with serve_run(out) as served:
        end, num_answers = served.learn(1), 0
        while not end.done() or not num_answers:
            num_answers += len({tuple(answer(served, target)) for target in (EDGE, CLOUD)})
        end.result()
        assert served.num_cycles == 2
        parts = served.bodies.parts("north-a")
        assert served.bodies.open_session(EDGE, parts.first, parts.stop, 20).versions[1] == "domain@2"
    resume_experiment(alone, ["cycles=2"])
    assert [c["domain"] for c in cycles(out)] == [c["domain"] for c in cycles(alone)]
    assert cycles(out) == cycles(alone)


def test_learning_that_is_broken_off_leaves_the_last_finished_cycle(finished: Path, tmp_path: Path) -> None:
    out, seen = copy_of(finished, tmp_path), []

    def watch(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if stage == "fine_tune" and figures:
            seen.append(done)
            served._stopping.set()

    with serve_run(out, progress=watch) as served:
        served.learn(5).result(timeout=120)
        assert served.num_cycles == 1
        assert len(answer(served, EDGE)) == 6  # answers go on
    assert seen == [1]
    assert cycles(out) == cycles(finished)
    resume_experiment(out, ["cycles=2"])


def test_it_answers_as_before_where_the_examples_are_gone_and_only_learning_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(finished, tmp_path)
    with serve_run(out) as served:
        before = [answer(served, target) for target in (EDGE, CLOUD)]
    monkeypatch.chdir(tmp_path)
    with without(finished.parent / "data"), serve_run(Path("out")) as served:
        assert [answer(served, target) for target in (EDGE, CLOUD)] == before
        assert list(served.absent) == ["north-a", "north-b", "north-c"]
        with pytest.raises(DataError, match=r"'north-a': they are not there .*--set edges\.0\.devices\.0\.data=FOLDER"):
            served.learn(1)
    assert cycles(out) == cycles(finished)
    resume_experiment(out, ["cycles=2"])


def test_what_learning_fails_with_is_told(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("too much")

    with serve_run(copy_of(finished, tmp_path)) as served:
        monkeypatch.setattr("gaisnet.network.Network.fine_tune", fail)
        with pytest.raises(MemoryError):
            served.learn(1).result(timeout=120)
        assert len(answer(served, EDGE)) == 6


def test_a_folder_without_a_run_is_refused(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(NothingToResume), serve_run(tmp_path):
        pass
    with pytest.raises(ConfigError, match="seed"), serve_run(copy_of(finished, tmp_path), ["seed=1"]):
        pass
