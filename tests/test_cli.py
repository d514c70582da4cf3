"""The command ``gaisnet``: it teaches, it runs, and what goes wrong is a sentence and not a traceback."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from gaisnet.cli.app import app
from gaisnet.cli.display import LiveProgress, told_errors
from tests.tiny import tiny_edge, write_tiny_run


def gaisnet(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def words(text: str) -> str:
    """Output without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def small_run(folder: Path, **changes: Any) -> Path:
    absorb = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
    return write_tiny_run(folder, **{"edges": [tiny_edge("north", "shapes")], "cycles": 1, "absorb": absorb, **changes})


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_says_what_it_is_for_and_what_it_can_do(arguments: list[str]) -> None:
    result = gaisnet(*arguments)
    text = words(result.output)
    assert (
        "a foundation model and domain models make each other better, while the data stays on the devices"
        in text.lower()
    )
    assert "run Run the cycle release, fine-tune, absorb on this machine, and measure it." in text


def test_help_of_run_teaches() -> None:
    result = gaisnet("run", "--help")
    text = words(result.output)
    assert result.exit_code == 0
    for taught in (
        "configs/demo.yaml",
        "--out",
        "new or empty",
        "--set",
        "relay.enabled=false",
        "summary.json",
        "adapters/",
    ):
        assert taught in text


def test_an_option_that_does_not_exist_is_a_usage_error() -> None:
    result = gaisnet("run", "x.yaml", "--ouput", "y")
    assert result.exit_code == 2
    assert "No such option: --ouput" in words(result.output)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, gaisnet.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_run_works_says_what_came_of_it_and_keeps_its_folder(tmp_path: Path) -> None:
    config, out = small_run(tmp_path), tmp_path / "out"
    result = gaisnet("run", config, "--out", out)
    text = words(result.output)
    assert result.exit_code == 0, text
    for stage in ("loading the foundation model", "release: foundation", "fine-tune: split", "absorb:", "evaluate:"):
        assert stage in text
    assert "shapes" in text and "Majority" in text
    assert "report.html; adapters for peft are in" in text
    assert summary_of(out)["cycles"][-1]["cycle"] == 1
    before = (out / "summary.json").read_bytes()
    assert_fails(gaisnet("run", config, "--out", out), "OutputInUse: output folder '")
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.integration
def test_set_changes_settings_and_without_out_a_folder_is_named_by_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = ["--set", "seed=11", "--set", "relay.enabled=false", "--set", "edges.0.devices.1.head_layers=0"]
    result = gaisnet("run", config, *changes)
    assert result.exit_code == 0, result.output
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", out.name)
    summary = summary_of(out)
    assert summary["seed"] == summary["config"]["seed"] == 11
    assert summary["config"]["relay"]["enabled"] is False and summary["cycles"][1]["relay"] == {}
    assert summary["config"]["edges"][0]["devices"][1]["head_layers"] == 0


# -- a run that goes on ------------------------------------------------------------------------------------------------


def test_help_of_run_teaches_how_to_go_on() -> None:
    text = words(gaisnet("run", "--help").output)
    assert "--resume" in text and "--resume DIR --set cycles=4" in text


@pytest.mark.integration
def test_resume_gives_a_run_another_cycle(tmp_path: Path) -> None:
    config, out = small_run(tmp_path), tmp_path / "out"
    assert gaisnet("run", config, "--out", out).exit_code == 0
    result = gaisnet("run", "--resume", out, "--set", "cycles=2")
    assert result.exit_code == 0, result.output
    assert f"Open {out / 'report.html'}" in result.output
    assert [cycle["cycle"] for cycle in summary_of(out)["cycles"]] == [0, 1, 2]
    before = (out / "summary.json").read_bytes()
    assert_fails(gaisnet("run", "--resume", out, "--set", "seed=1"), "ConfigError: --set seed=1 on a run that goes on")
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either CONFIG or --resume DIR"),
        (["run.yaml", "--resume", "out"], "give either CONFIG or --resume DIR"),
        (["--resume", "out", "--out", "elsewhere"], "a run that goes on stays in its folder; leave out --out"),
    ],
    ids=["neither", "both", "another folder"],
)
def test_a_run_is_new_or_goes_on_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = gaisnet("run", *arguments)
    assert result.exit_code == 2
    assert "Usage: " in words(result.output) and expected in words(result.output)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_cannot_go_on(tmp_path: Path) -> None:
    expected = "NothingToResume: output folder '", "no part of a run was finished in it; start one with --out"
    assert_fails(gaisnet("run", "--resume", tmp_path / "nowhere"), *expected)
    assert not (tmp_path / "nowhere").exists()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def assert_fails(result: Result, *expected: str) -> None:
    text = words(result.output)
    assert result.exit_code == 1, text
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in text
    for part in expected:
        assert part in text


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    result = gaisnet("run", config, "--set", "fine_tune.learning_rat=1", "--out", tmp_path / "out")
    assert_fails(
        result,
        "UnknownKey",
        "'fine_tune.learning_rat': is not known; did you mean 'learning_rate'?",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "seed"], "ConfigError: --set seed: is not of the form key=value; as in --set relay.enabled=false"),
        (
            ["--set", "cycles=0"],
            "cycles: Input should be greater than or equal to 1 (found 0); correct it and run again",
        ),
        (["--set", "edges.0.devices.7.mode=local"], "'7' is no item of a list of 3"),
        (["--set", "adapters.first_layer=9"], "CutError: adapters.first_layer is 9 but the model has 6 layers"),
        (["--set", "model.foundation=no/such/model"], "ModelError: foundation model 'no/such/model': cannot be loaded"),
        (["--set", "edges.0.devices.0.data=nowhere"], "DataError: examples '"),
        (
            ["--set", "fine_tune.learning_rate=1e30", "--set", "fine_tune.local_epochs=4"],
            "NotFinite: the training loss at",
        ),
    ],
)
def test_an_error_is_a_sentence(tmp_path: Path, arguments: list[str], expected: str) -> None:
    assert_fails(gaisnet("run", small_run(tmp_path), "--out", tmp_path / "out", *arguments), expected)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    result = gaisnet("run", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert_fails(
        result, "ConfigError: configuration '", "there is no such file; name a YAML file; see configs/demo.yaml"
    )


def test_figures_and_their_picture_are_two_files(tmp_path: Path) -> None:
    result = gaisnet("bench", small_run(tmp_path), "--out", tmp_path / "bench.png")
    assert_fails(result, "is where the picture would go; name the figures' file, such as bench.json")


def test_a_bench_whose_file_cannot_be_written_fails_before_it_measures(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for subject in (["bench", small_run(tmp_path)], ["bench", "--scale"], ["bench", "--serving", tmp_path / "run"]):
        assert_fails(gaisnet(*subject, "--out", tmp_path / "file" / "b.json"), "choose a writable folder")


def test_brackets_in_a_message_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "[red]run.yaml"
    assert_fails(gaisnet("run", path, "--out", tmp_path / "out"), "[red]run.yaml")


def test_an_output_folder_in_use(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("do not lose me", encoding="utf-8")
    result = gaisnet("run", config, "--out", tmp_path / "out")
    assert_fails(
        result,
        "OutputInUse: output folder '",
        "is not empty, it holds 'thesis.txt'; choose another with --out, or remove it",
    )
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "do not lose me"


def test_where_nobody_watches_a_stage_has_a_line_and_what_came_of_it_has_one() -> None:
    shown = io.StringIO()
    with LiveProgress(Console(file=shown, width=200)) as progress:
        for stage in ("fine_tune", "evaluate", "fine_tune"):
            for done in (0, 1, 2, 2, 2):  # the last one is told as often as somebody asks
                progress(stage, done, 2, {"loss": 0.5} if done and stage == "fine_tune" else {})
    lines = shown.getvalue().splitlines()
    stage, result = "fine-tune: split learning on private data", "  loss 0.500"
    between = "evaluate: scoring held-out examples where they are"
    assert lines[:5] == [stage, result, between, stage, result]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_a_sentence_whoever_wrote(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a library writes, as NVFlare does while it makes kits."""
    with pytest.raises(typer.Exit) as caught, told_errors():
        raise OSError(number, os.strerror(number), "/kits/north/startup")
    assert caught.value.exit_code == 1
    told = capsys.readouterr().err
    assert f"OutputNotWritable: writing '/kits/north/startup': {os.strerror(number)}; free some space" in told


def test_another_error_of_the_system_is_not_taken_for_one_of_ours() -> None:
    with pytest.raises(ConnectionResetError), told_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_the_version_is_shown() -> None:
    shown = gaisnet("--version")
    assert shown.exit_code == 0 and re.fullmatch(r"gaisnet \d+\.\d+\.\d+\S*\n", shown.output)
