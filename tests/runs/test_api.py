"""The Python interface: ``import gaisnet``."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gaisnet
from gaisnet.errors import ConfigError, DataError, NothingToResume, OutputInUse
from gaisnet.runs.summary import Cycle, Summary
from tests.tiny import tiny_config, tiny_data, write_tiny_run

pytestmark = pytest.mark.integration


def figures(summary: Summary) -> list[dict[str, Any]]:
    return [cycle.model_dump(exclude={"seconds", "bytes"}) for cycle in summary.cycles]


def rows_of(name: str) -> dict[str, list[dict[str, str]]]:
    """A device's examples of the tiny run, in memory."""
    mine = tiny_data(tiny_config())[name]
    sets = {"train": mine.train, "test": mine.test}
    return {key: [{"prompt": e.prompt, "completion": e.completion} for e in each] for key, each in sets.items()}


class Dataset:
    """The part of a Hugging Face dataset that is used: rows as dictionaries."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self._rows)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> gaisnet.FinishedRun:
    return gaisnet.run(config, out=tmp_path_factory.mktemp("whole")).finish()


def test_the_public_names() -> None:
    assert gaisnet.__all__ == [
        *("Answers", "Config", "FinishedRun", "RunningRun", "__version__", "load_config", "open_run", "resume", "run")
    ]
    assert all(getattr(gaisnet, name) is not None for name in gaisnet.__all__)
    parameters = {name: list(inspect.signature(getattr(gaisnet, name)).parameters) for name in ("run", "resume")}
    assert parameters == {
        "run": ["config", "out", "data", "overrides", "progress"],
        "resume": ["out", "data", "overrides", "progress"],
    }
    assert list(inspect.signature(gaisnet.open_run).parameters) == ["out"]
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = gaisnet.fly


def test_an_import_is_quick_and_sets_openmp_before_torch() -> None:
    code = """
import sys, os, gaisnet
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
assert "OMP_WAIT_POLICY" not in os.environ
gaisnet.run
assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "torch" in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_package_is_typed() -> None:
    assert (Path(inspect.getfile(gaisnet)).parent / "py.typed").is_file()


def test_a_run_is_watched_stopped_and_resumed_to_the_same_end(
    config: Path, whole: gaisnet.FinishedRun, tmp_path: Path
) -> None:
    told: list[str] = []
    seen: list[Cycle] = []
    running = gaisnet.run(config, out=tmp_path / "out", progress=lambda stage, *_: told.append(stage))
    for cycle in running:
        seen.append(cycle)
        if cycle.cycle == 1:
            break
    del running
    assert [cycle.cycle for cycle in seen] == [0, 1] and {"load", "fine_tune"} <= set(told)
    assert len(gaisnet.open_run(tmp_path / "out").summary.cycles) == 2
    with pytest.raises(OutputInUse):
        gaisnet.run(config, out=tmp_path / "out").finish()
    assert [cycle.cycle for cycle in gaisnet.resume(tmp_path / "out")] == [2]
    assert figures(gaisnet.open_run(tmp_path / "out").summary) == figures(whole.summary)
    more = gaisnet.resume(tmp_path / "out", overrides=["cycles=3"]).finish()
    assert len(more.summary.cycles) == 4


def test_data_in_memory_is_as_data_in_folders_and_is_not_kept(
    config: Path, whole: gaisnet.FinishedRun, tmp_path: Path
) -> None:
    raw = yaml.safe_load(config.read_text(encoding="utf-8"))
    for edge in raw["edges"]:
        for device in edge["devices"]:
            device["data"] = str(config.parent / device["data"])
    pairs = {key: [(row["prompt"], row["completion"]) for row in rows] for key, rows in rows_of("north-b").items()}
    data: dict[str, Any] = {
        "north-a": rows_of("north-a"),
        "north-b": pairs,
        "north-c": {key: Dataset(rows) for key, rows in rows_of("north-c").items()},
        "south-a": config.parent / "data" / "south-a",
    }
    out = tmp_path / "out"
    next(iter(gaisnet.run(raw, out=out, data=data, overrides=["cycles=1"])))
    found = gaisnet.resume(out, data=data, overrides=["cycles=2"]).finish()
    assert figures(found.summary) == figures(whole.summary)
    secret = rows_of("north-a")["train"][0]["prompt"].encode()
    assert not any(secret in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with pytest.raises(DataError, match="'north-a': were given as Python objects, .*give them again"):
        gaisnet.resume(out, overrides=["cycles=3"]).finish()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"nobody": {}}, ConfigError, "no such device: nobody; name some of: north-a"),
        ({"north-a": {"train": [("a", "b")]}}, DataError, r"'north-a': has rows for \['train'\]; give rows for test"),
        (
            {"north-a": {"train": [], "test": [("a", "b")]}},
            DataError,
            "train examples of device 'north-a': there are none",
        ),
        (
            {"north-a": {"train": [("a", "b"), 3], "test": [("a", "b")]}},
            DataError,
            "'north-a', row 1: is a int; give a",
        ),
        ({"north-a": {"train": [("a", 3)], "test": [("a", "b")]}}, DataError, "row 0: 'completion' is 3, not text"),
        ({"north-a": {"train": [{"prompt": "a"}], "test": [("a", "b")]}}, DataError, "row 0: lacks 'completion'"),
    ],
    ids=["an unknown device", "no test set", "no rows", "a row that is none", "a number", "a key that is missing"],
)
def test_wrong_data_are_refused_before_any_work(
    config: Path, tmp_path: Path, data: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gaisnet.run(config, out=tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_has_its_figures_adapters_and_answers(whole: gaisnet.FinishedRun) -> None:
    again = gaisnet.open_run(str(whole.out))
    assert again.summary == whole.summary
    assert list(again.adapters) == ["merged", "shapes", "tastes"]
    assert all((folder / "adapter_config.json").is_file() for folder in again.adapters.values())
    with again.answers() as answers:
        assert set(answers.models) == {"auto", "foundation", "merged", "shapes", "tastes"}
        options: dict[str, Any] = {"model": "foundation", "temperature": 1.5, "max_tokens": 9}
        text = answers.generate("Is it so?", seed=1, **options)
        assert text and text == "".join(answers.stream("Is it so?", seed=1, **options))
        assert text != answers.generate("Is it so?", seed=2, **options)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(NothingToResume):
        gaisnet.open_run(tmp_path)
