"""The closing table and ``report.html``."""

import json
import re
import subprocess
import sys
from functools import cache
from html import escape
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from gaisnet.cli.baselines import _table as baselines_table
from gaisnet.runs.plots import INK
from gaisnet.runs.report import render_report
from gaisnet.runs.summary import Examples, Summary
from gaisnet.runs.table import (
    against_rows,
    closing_captions,
    closing_rows,
    closing_table,
    human_bytes,
    human_seconds,
    percent,
)

HOSTILE = "<script>alert(1)</script>[red]\"'&$x^2$_b"
MIB = 2**20


def _cycle(number: int, domains: tuple[str, ...], relay: bool) -> dict[str, Any]:
    def scores(accuracy: float) -> dict[str, Any]:
        return {name: {"accuracy": accuracy, "loss": 1.0, "num_examples": 210} for name in domains}

    trained = number > 0
    adapters = {**dict.fromkeys(domains, 20.0 + number), "merged": 20.5} if trained else {}
    return {
        "cycle": number,
        "foundation": scores(0.7 if trained else 0.1),
        "domain": scores(0.625 if trained else 0.05),
        "merged": scores(0.6) if trained else {},
        "retention": {"perplexity": 20.0 + number, "adapters": adapters},
        "bytes": {"device_edge": {"up": 3 * MIB, "down": MIB}, "edge_cloud": {"up": 512, "down": 0}},
        "seconds": {"release": 1.0, "fine_tune": 2.0, "absorb": 3.0, "evaluate": 34.0},
        "gate": [f"{name}: accepted" for name in domains] if trained else [],
        "relay": dict.fromkeys(domains, {"loss_before": 2.0, "loss_after": 0.5}) if trained and relay else {},
    }


def _summary(domains: tuple[str, ...] = ("medical", "licences"), cycles: int = 3, relay: bool = True) -> Summary:
    raw = {
        "seed": 7,
        "config": {"model": {"foundation": "smollm2-135m-instruct"}, "absorb": {"max_retention_increase": 0.15}},
        "model": {
            "foundation_params": 134_515_008,
            "foundation_layers": 30,
            "domain_layers": 24,
            "trainable_params": 9,
        },
        "device": {"params_fraction": 0.263},
        "majority": {name: 0.14 if index == 0 else None for index, name in enumerate(domains)},
        "cycles": [_cycle(number, domains, relay) for number in range(cycles)],
    }
    return Summary.model_validate(raw)


@cache
def _html() -> str:
    """The usual page: drawing it takes a while, and it is always the same."""
    return render_report(_summary())


def test_a_merged_adapter_that_does_nothing_right_is_shown_and_one_that_is_not_there_is_not() -> None:
    raw = _summary(("medical",)).to_json()
    for cycle in raw["cycles"]:
        for score in cycle["merged"].values():
            score["accuracy"] = 0.0
    assert "FM with the merged adapter" in render_report(Summary.model_validate(raw))
    for cycle in raw["cycles"]:
        cycle["merged"] = {}
    assert "FM with the merged adapter" not in render_report(Summary.model_validate(raw))


def test_a_run_that_was_scored_everywhere_shows_every_model_on_every_domain() -> None:
    raw = _summary(("medical", HOSTILE)).to_json()
    names = ("medical", HOSTILE)

    def scores(*accuracies: float) -> dict[str, Any]:
        return {n: {"accuracy": a, "loss": 1.0, "num_examples": 210} for n, a in zip(names, accuracies, strict=True)}

    foundation = {"none": scores(0.015, 0.025), "medical": scores(0.711, 0.033), HOSTILE: scores(0.044, 0.822)}
    domain = {"medical": scores(0.655, 0.066), HOSTILE: scores(0.077, 0.588)}
    raw["cycles"][-1]["matrix"] = {"foundation": {**foundation, "merged": scores(0.6, 0.5)}, "domain": domain}
    page = render_report(Summary.model_validate(raw))
    assert HOSTILE not in page
    section = page[page.index("Every model on every domain") :]
    shares = (0.015, 0.025, 0.711, 0.033, 0.044, 0.822, 0.6, 0.5, 0.655, 0.066, 0.077, 0.588)
    positions = [section.index(f">{percent(share)}</td>") for share in shares]
    assert positions == sorted(positions)
    assert "Every model on every domain" not in _html()


def _with_a_newcomer(first_scored: int = 3) -> Summary:
    """The last domain follows the first; before entry ``first_scored`` the FM was scored at its edge."""
    raw = _summary(("medical", "licences", "rural")).to_json()
    raw["follows"] = {"rural": "medical"}
    for cycle in raw["cycles"][first_scored:]:
        for body in ("foundation", "merged"):
            cycle[body].pop("rural", None)
    return Summary.model_validate(raw)


def test_a_newcomer_has_figures_of_its_domain_model_and_dashes_for_the_foundation_model() -> None:
    raw = _with_a_newcomer(0).to_json()
    pooled = {"medical": 0.8, "licences": 0.8}
    raw["baselines"] = {"cycles": 2, "pooled": pooled, "zero_shot": pooled}
    summary = Summary.model_validate(raw).with_gaps()
    assert closing_rows(summary)[-1].cells() == ("rural", "–", "5.0 % → 62.5 % (+57.5)", "–", "–")
    rows = {label: cells[-1] for label, cells in against_rows(summary)}
    assert rows == {
        "FM, asked": "–",
        "DM": "62.5 %",
        "FM, merged adapter": "–",
        "FM, domain's adapter": "–",
        "pooled, FM, all layers": "–",
        "gap closed, DM": "–",
        "gap closed, FM, merged adapter": "–",
        "gap closed, FM, domain's adapter": "–",
    }
    html = render_report(summary)
    page = _Page(html)
    flows = [label.partition(",")[0] for label in _labels(page) if "flow, " in label]
    assert flows == ["Down flow"] * 3 + ["Up flow"] * 2
    (down,) = [label for label in _labels(page) if label.startswith("Down flow, rural")]
    assert "DM of the domain 5.0 %, 62.5 %, 62.5 %; FM at the start –;" in down
    # The newcomer is the last domain, and what it lacks is in the legend all the same.
    assert {"FM at the start", "FM with the merged adapter"} <= set(page.text)
    assert "nan" not in html
    printed = Console(width=200, record=True, file=StringIO())
    printed.print(baselines_table(summary))
    assert re.search(r"FM, domain's adapter +│ +70\.0 % │ +70\.0 % │ +– │", printed.export_text())


def test_a_run_that_scored_the_foundation_model_at_newcomers_is_shown_as_it_was() -> None:
    whole, went_on = _with_a_newcomer(3), _with_a_newcomer(2)
    assert closing_rows(whole)[-1].cells()[3:] == ("10.0 % → 70.0 % (+60.0)", "60.0 %")
    assert closing_rows(went_on)[-1].cells()[3:] == ("10.0 % → –", "–")
    for summary, told in ((whole, "10.0 %, 70.0 %, 70.0 %;"), (went_on, "10.0 %, 70.0 %, –;")):
        (up,) = [label for label in _labels(_Page(render_report(summary))) if label.startswith("Up flow, rural")]
        assert f"FM with the domain's adapter {told}" in up


class _Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _labels(page: _Page) -> list[str]:
    return [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]


def test_report_shows_every_domain_in_both_flows_and_the_configuration() -> None:
    html = _html()
    page = _Page(html)
    labels = _labels(page)
    for name in ("medical", "licences"):
        assert any(
            label.startswith(f"Down flow, {name}") and "relay loss after –, 0.5, 0.5" in label for label in labels
        )
        assert any(label.startswith(f"Up flow, {name}") and "10.0 %, 70.0 %, 70.0 %" in label for label in labels)
        assert page.text.count(name) >= 3
    assert len(labels) == 2 * 2 + 3
    assert any("limit of the gate (+15 %) 23.00" in label for label in labels)
    assert "GaisNet run, seed 7" in html and "smollm2-135m-instruct" in html
    assert "Cycle 1: medical: accepted" in html
    assert "max_retention_increase: 0.15" in html
    assert [tag for tag, _ in page.tags].count("details") == 1


def test_report_refers_to_nothing_outside_itself() -> None:
    html = _html()
    assert not re.search(r"https?://|url\((?!#)|@import", html)
    tags = _Page(html).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    links = [value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links and all(value is not None and value.startswith("#") for value in links)


def test_every_reference_inside_the_page_meets_exactly_one_id() -> None:
    html = render_report(_summary(("a", "b", "c")))
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'xlink:href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_hostile_domain_names_are_shown_and_do_nothing() -> None:
    html = render_report(_summary((HOSTILE, "licences")))
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert HOSTILE in page.text
    assert escape(HOSTILE) in html
    assert any(label.startswith(f"Up flow, {HOSTILE},") for label in _labels(page))


def test_texts_and_axes_take_the_colour_of_the_page() -> None:
    html = _html()
    assert INK not in html
    assert "currentColor" in html
    assert not re.search(r"(fill|stroke): #(000000|ffffff)", html)


def test_the_same_summary_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "import sys; from gaisnet.runs.report import render_report; "
        "from gaisnet.runs.summary import Summary; "
        "sys.stdout.buffer.write(render_report(Summary.model_validate_json(sys.stdin.read())).encode())"
    )
    text = json.dumps(_summary().to_json())
    done = subprocess.run([sys.executable, "-c", code], input=text.encode(), capture_output=True, check=True)
    assert done.stdout.decode("utf-8") == _html()


@pytest.mark.parametrize(("cycles", "relay"), [(1, True), (2, False), (12, True)])
def test_any_number_of_cycles_is_drawn(cycles: int, relay: bool) -> None:
    summary = _summary(("medical",), cycles, relay)
    html = render_report(summary)
    assert ("relay loss" in html) == (relay and cycles > 1)
    assert "nan" not in html


def test_a_relay_and_a_configuration_with_holes_are_drawn() -> None:
    raw = _summary().to_json()
    raw["config"] = {}
    raw["cycles"][1]["relay"] = {}
    raw["cycles"][2]["relay"].pop("licences")
    raw["cycles"][2]["merged"].pop("medical")
    html = render_report(Summary.model_validate(raw))
    assert "limit of the gate" not in html


def test_closing_rows_compare_entry_0_with_the_last_cycle() -> None:
    first, second = closing_rows(_summary())
    assert (first.domain, first.majority, second.majority) == ("medical", 0.14, None)
    assert first.cells() == ("medical", "14.0 %", "5.0 % → 62.5 % (+57.5)", "10.0 % → 70.0 % (+60.0)", "60.0 %")
    assert closing_rows(_summary(cycles=1))[0].cells()[-1] == "–"


def test_closing_captions_add_up_the_cycles() -> None:
    assert closing_captions(_summary()) == [
        "Retention: the FM's perplexity on public text went from 20.00 to 22.00 (+10.0 %)",
        "Bytes, device–edge: 9.0 MiB up, 3.0 MiB down; edge–cloud: 1.5 KiB up, 0 B down",
        "Wall time: 2 min 0 s",
        "The largest split device holds 26.3 % of the FM's parameters",
        *(f"Note: {sentence}" for sentence in _summary().cycles[-1].merged_below_own()),
    ]
    assert len(_summary().cycles[-1].merged_below_own()) == 2


def test_closing_captions_and_report_name_devices_whose_examples_are_truncated() -> None:
    summary = _summary()
    model = summary.model.model_copy(update={"context": 96, "longest_example": 2000})
    counts = {"a": (20, 12, 412), "b": (9, 0, 96), "c": (5, 1, 2048)}
    examples = {n: Examples(num_examples=e, num_truncated=t, longest=m) for n, (e, t, m) in counts.items()}
    summary = summary.model_copy(update={"model": model, "examples": examples})
    said = [line for line in closing_captions(summary) if "truncated" in line]
    assert said == [
        "Device 'a': 12 of 20 examples are truncated to model.context, 96 tokens; 412 would hold all",
        "Device 'c': 1 of 5 examples are truncated to model.context, 96 tokens; 2048 would hold all, but the FM takes "
        "2000",
    ]
    assert all(escape(line) in render_report(summary) for line in said)


def test_closing_captions_name_the_devices_that_a_round_went_on_without() -> None:
    summary = _summary()
    faulty = summary.cycles[-1].model_copy(update={"faults": ["medical: cycle 1, edge round 0: without a: away"]})
    captions = closing_captions(summary.model_copy(update={"cycles": [*summary.cycles[:-1], faulty]}))
    assert captions[:-1] == closing_captions(summary)
    assert captions[-1] == "Left out: medical: cycle 1, edge round 0: without a: away"


def test_closing_table_prints_names_as_they_are() -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(closing_table(_summary((HOSTILE, "licences"))))
    printed = console.export_text()
    assert HOSTILE in printed
    assert "5.0 % → 62.5 % (+57.5)" in printed
    assert "26.3 % of the FM's parameters" in printed


def test_units_are_those_a_person_would_choose() -> None:
    sizes = (0, 1023, 1024, 1536, MIB - 1, 3 * 2**30, 5 * 2**50)
    assert [human_bytes(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 GiB",
        "5120.0 TiB",
    ]
    assert [human_seconds(value) for value in (0.04, 59.9, 119.6, 3725)] == [
        "0.0 s",
        "59.9 s",
        "2 min 0 s",
        "1 h 2 min",
    ]
    assert (percent(None), percent(0.1234)) == ("–", "12.3 %")
