"""The frame of ``gaisnet paper``: rows are kept as they come, a killed run goes on, and the page says so."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gaisnet.errors import ConfigError, MissingPackage, OutputInUse
from gaisnet.research.paper.claims import Claim, Finding, verdict_of
from gaisnet.research.paper.experiment import Column, Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Curve, Drawing, drawn, legend_of
from gaisnet.research.paper.results import Machine, Result, read_result
from gaisnet.research.paper.running import REPORT, run_paper

HOSTILE = "<script>alert(1)</script>&'\""
Measure = Callable[[Condition, int, Setup], Measured]


def by_size(condition: Condition, seed: int, setup: Setup) -> Measured:
    """A figure that grows with the size, and a little with the seed."""
    return Measured(figures={"accuracy": float(condition["size"]) / 10 + seed / 100})


def experiment(
    name: str = "sizes", measure: Measure = by_size, sizes: Sequence[int] = (2, 4), data: Sequence[str] = ()
) -> Experiment:
    return Experiment(
        name=name,
        title=f"Larger against smaller {HOSTILE}",
        claim=Claim(f"Larger is better {HOSTILE}"),
        method="Sizes are measured.",
        rule="agrees where larger is better",
        data=data,
        conditions=lambda quick: [{"size": size, "kind": HOSTILE} for size in sizes[: 1 if quick else None]],
        measure=measure,
        columns={"accuracy": Column("share", lambda value: f"{value:.2f}")},
        judge=lambda rows: Finding("disagrees", f"{len(rows)} rows {HOSTILE}"),
        draw=lambda rows: [Drawing("Share by size", "size", "share", [_curve(rows)])],
    )


def _curve(rows: Sequence[Row]) -> Curve:
    sizes = sorted({float(row.condition["size"]) for row in rows})
    return Curve(
        HOSTILE, [(size, [r.figures["accuracy"] for r in rows if r.condition["size"] == size]) for size in sizes]
    )


class Breaking:
    """Measures as ``by_size`` does, counts, and dies at one of its calls."""

    def __init__(self, at: int | None) -> None:
        self.calls: list[tuple[Condition, int]] = []
        self._at = at

    def __call__(self, condition: Condition, seed: int, setup: Setup) -> Measured:
        if len(self.calls) == self._at:
            raise KeyboardInterrupt
        self.calls.append((condition, seed))
        return by_size(condition, seed, setup)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(out: Path) -> _Page:
    page = _Page()
    page.feed((out / REPORT).read_text(encoding="utf-8"))
    return page


def test_every_condition_is_measured_with_every_seed_and_kept(tmp_path: Path) -> None:
    results = run_paper([experiment()], tmp_path, Setup())
    kept = json.loads((tmp_path / "sizes.json").read_text())
    assert kept["schema"] == "gaisnet.paper/1" and kept["machine"]["cores"] >= 1
    assert [(row["condition"]["size"], row["seed"]) for row in kept["rows"]] == [
        *((2, 0), (4, 0), (2, 1), (4, 1), (2, 2), (4, 2))
    ]
    assert kept["rows"][3]["figures"] == {"accuracy": pytest.approx(0.41)}
    assert results["sizes"] == read_result(tmp_path, experiment(), quick=False)


def test_a_killed_run_goes_on_after_its_last_row(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_paper([experiment(measure=Breaking(at=4))], tmp_path, Setup())
    rest = Breaking(at=None)
    (result,) = run_paper([experiment(measure=rest)], tmp_path, Setup()).values()
    assert [(condition["size"], seed) for condition, seed in rest.calls] == [(2, 2), (4, 2)]
    assert len(result.rows) == 6 and result.finding_of(experiment()) is not None
    again = Breaking(at=0)
    run_paper([experiment(measure=again)], tmp_path, Setup())
    assert again.calls == []


def test_two_processes_never_measure_into_one_folder(tmp_path: Path) -> None:
    def another(condition: Condition, seed: int, setup: Setup) -> Measured:
        with pytest.raises(OutputInUse, match="is taken by process"):
            run_paper([experiment()], tmp_path, Setup())
        return by_size(condition, seed, setup)

    (result,) = run_paper([experiment(measure=another)], tmp_path, Setup()).values()
    assert len(result.rows) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [REPORT, "sizes.json"]


def test_rows_of_conditions_that_are_no_more_do_not_count(tmp_path: Path) -> None:
    run_paper([experiment(sizes=(1, 2))], tmp_path, Setup())
    (result,) = run_paper([experiment(sizes=(2, 3))], tmp_path, Setup()).values()
    assert [row.condition["size"] for row in result.rows_of(experiment(sizes=(2, 3)))] == [2, 3] * 3


def test_only_some_are_measured_and_the_others_are_on_the_page_as_not_measured(tmp_path: Path) -> None:
    first, second = Breaking(at=None), Breaking(at=None)
    both = [experiment("first", first), experiment("second", second)]
    run_paper(both, tmp_path, Setup(), only=["second"])
    assert (len(first.calls), len(second.calls)) == (0, 6)
    assert read_page(tmp_path).text.count("not measured") == 2  # in the overview, and in its section
    run_paper(both, tmp_path, Setup(), only=["first"])
    assert "not measured" not in read_page(tmp_path).text


def test_an_experiment_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experiment 'third'.*use one of: sizes"):
        run_paper([experiment()], tmp_path, Setup(), only=["third"])
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_missing_are_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAISNET_FASHION_MNIST", str(tmp_path / "nowhere"))
    first = Breaking(at=None)
    with pytest.raises(MissingPackage, match="apt-get install"):
        run_paper([experiment("first", first), experiment("second", data=["fashion"])], tmp_path, Setup())
    assert first.calls == []


def test_quick_and_full_results_do_not_mix(tmp_path: Path) -> None:
    run_paper([experiment()], tmp_path, Setup(quick=True))
    assert "quick run" in read_page(tmp_path).text
    with pytest.raises(ConfigError, match="measured with --quick, and this run is of the other kind"):
        run_paper([experiment()], tmp_path, Setup(quick=False))


@pytest.mark.parametrize("content", ["{", '{"schema": "gaisnet.paper/2"}', '{"experiment": "sizes"}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        run_paper([experiment()], tmp_path, Setup())


def test_the_results_of_another_experiment_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(
        Result(experiment="other", quick=False, method="", machine=Machine.present()).model_dump_json()
    )
    with pytest.raises(ConfigError, match="are those of 'other'"):
        run_paper([experiment()], tmp_path, Setup())


def test_rows_of_another_method_or_version_are_refused(tmp_path: Path) -> None:
    run_paper([experiment()], tmp_path, Setup())
    with pytest.raises(ConfigError, match="were measured by another method"):
        run_paper([replace(experiment(), method="in another way")], tmp_path, Setup())
    kept = json.loads((tmp_path / "sizes.json").read_text())
    kept["machine"]["torch"] = "1.0"
    (tmp_path / "sizes.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match="were measured with torch 1.0, here is"):
        run_paper([experiment()], tmp_path, Setup())


def test_the_page_says_claim_by_claim_what_was_found_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    run_paper([experiment()], tmp_path, Setup())
    page = read_page(tmp_path)
    assert page.outside == [] and "script" not in page.tags
    assert f"Larger is better {HOSTILE}" in page.text and f"6 rows {HOSTILE}" in page.text
    assert page.text.count("disagrees") == 2
    assert "0.21 (0.20 to 0.22)" in page.text  # mean, least and most of the three seeds
    assert page.tags.count("svg") >= 2 and "wall time" in page.text


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    run_paper([experiment()], tmp_path, Setup())
    first = (tmp_path / REPORT).read_bytes()
    run_paper([experiment()], tmp_path, Setup())
    assert (tmp_path / REPORT).read_bytes() == first


@pytest.mark.parametrize(
    ("holds", "verdict"), [([True, True], "agrees"), ([True, False], "partly"), ([False, False], "disagrees")]
)
def test_a_verdict_is_that_of_all_conditions(holds: list[bool], verdict: str) -> None:
    assert verdict_of(holds) == verdict


def test_there_is_no_verdict_on_nothing() -> None:
    with pytest.raises(ValueError, match="no verdict"):
        verdict_of([])


def test_a_picture_says_its_figures_and_its_curves_differ_in_the_legend() -> None:
    curves = [Curve(name, [(1.0, [0.5, 0.7]), (10.0, [0.9])]) for name in ("one", "two")]
    svg = drawn(Drawing("Share", "labels", "accuracy", curves, logarithmic=True))
    assert 'aria-label="Share, by labels: one 60.0 % at 1, 90.0 % at 10; two' in svg
    one, two = legend_of(Drawing("Share", "labels", "accuracy", curves))
    assert (one.colour, one.marker) != (two.colour, two.marker)
