"""``gaisnet paper``: its help teaches, it writes a page, and what is missing is a sentence."""

from pathlib import Path

import pytest

from gaisnet.research.paper import catalogue
from tests.research.paper.test_running import experiment as of_sizes
from tests.test_cli import gaisnet, words


def test_help_of_paper_names_every_experiment_and_what_is_needed() -> None:
    text = words(gaisnet("paper", "--help").output)
    for one in catalogue.EXPERIMENTS:
        assert f"{one.name}: " in text
    for taught in ("apt-get install dataset-fashion-mnist", "pip install scikit-learn", "--quick", "report.html"):
        assert taught in text


def test_paper_measures_and_says_where_the_page_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "EXPERIMENTS", (of_sizes(),))
    result = gaisnet("paper", "--quick", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = words(result.output)
    assert "disagrees" in text and "3 rows" in text and "report.html" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "sizes.json"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--only", "nope"], "use one of: pretraining"), ([], "run: apt-get install dataset-fashion-mnist")],
)
def test_what_cannot_be_done_is_a_sentence(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAISNET_FASHION_MNIST", str(tmp_path / "nowhere"))
    result = gaisnet("paper", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert told in words(result.output) and "Traceback" not in result.output
