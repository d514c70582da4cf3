"""``summary.json``: exact names, round trip, strictness, and all-or-nothing writing."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gaisnet.checkpoint import write_text
from gaisnet.errors import NotFinite, OutputNotWritable
from gaisnet.runs.summary import Cycle, Summary, write_json


def _raw() -> dict[str, Any]:
    """A ``summary.json`` as issue 2 spells it, with one domain."""
    score = {"accuracy": 0.5, "loss": 1.25, "num_examples": 210}
    return {
        "schema": "gaisnet.summary/1",
        "seed": 7,
        "config": {"seed": 7, "domain": {"keep_layers": None}, "edges": [{"labels": ["a", "b"]}]},
        "model": {"foundation_params": 100, "foundation_layers": 30, "domain_layers": 24, "trainable_params": 9},
        "device": {"params_fraction": 0.25},
        "majority": {"medical": 0.14, "free text": None},
        "cycles": [
            {
                "cycle": 0,
                "foundation": {"medical": score},
                "domain": {"medical": score},
                "merged": {},
                "retention": {"perplexity": 18.5, "adapters": {"medical": 18.5}},
                "bytes": {"device_edge": {"up": 1, "down": 2}, "edge_cloud": {"up": 3, "down": 4}},
                "seconds": {"release": 0.0, "fine_tune": 0.5, "absorb": 1.0, "evaluate": 2.5},
                "gate": ["medical: accepted"],
                "faults": ["medical: cycle 0, edge round 0: without clinic-a: it is away"],
                "relay": {"medical": {"loss_before": 2.0, "loss_after": 0.5}},
            }
        ],
    }


def test_names_are_those_of_the_issue_and_survive_the_disk(tmp_path: Path) -> None:
    summary = Summary.model_validate(_raw())
    write_json(tmp_path / "summary.json", summary.to_json())
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    measured_later: dict[str, Any] = {"baselines": None, "gap_closed": None, "follows": {}}
    relay = {"medical": {"loss_before": 2.0, "loss_after": 0.5, "kl_before": None, "kl_after": None}}
    cycles = [
        {**cycle, "matrix": None, "retention": {**cycle["retention"], "drift": None}, "relay": relay}
        for cycle in _raw()["cycles"]
    ]
    sizes = {**_raw()["model"], "context": None, "longest_example": None}
    assert json.loads(text) == {**_raw(), **measured_later, "model": sizes, "examples": {}, "cycles": cycles}
    assert Summary.model_validate_json(text) == summary
    assert summary.domains == ("medical",)


def test_the_gap_is_closed_by_a_share_of_the_way_to_pooled() -> None:
    def scores(accuracy: float) -> dict[str, Any]:
        return {"medical": {"accuracy": accuracy, "loss": 1.0, "num_examples": 210}}

    raw = _raw()
    first = raw["cycles"][0] | {"foundation": scores(0.1), "merged": scores(0.1), "domain": scores(0.0)}
    last = first | {"cycle": 1, "foundation": scores(0.7), "merged": scores(0.4), "domain": scores(0.8)}
    raw["cycles"] = [first, last]
    assert Summary.model_validate(raw).with_gaps().gap_closed is None
    raw["baselines"] = {"cycles": 1, "pooled": {"medical": 0.7}}
    gaps = Summary.model_validate(raw).with_gaps().gap_closed
    assert gaps is not None
    assert gaps.foundation == {"medical": pytest.approx(1.0)}
    assert gaps.merged == {"medical": pytest.approx(0.5)}
    assert gaps.domain == {"medical": pytest.approx(0.8 / 0.7)}
    raw["baselines"] = {"cycles": 1, "pooled": {"medical": 0.1}}  # no way to go
    gaps = Summary.model_validate(raw).with_gaps().gap_closed
    assert gaps is not None and gaps.foundation == {"medical": None}
    raw["baselines"]["cycles"] = 2  # they speak of more learning than there was
    assert Summary.model_validate(raw).with_gaps().gap_closed is None
    raw["cycles"] = [first]
    assert Summary.model_validate(raw).with_gaps().gap_closed is None


def test_what_falls_from_one_cycle_to_the_next_is_said() -> None:
    def scores(accuracy: float) -> dict[str, Any]:
        return {"medical": {"accuracy": accuracy, "loss": 1.0, "num_examples": 210}}

    raw = _raw()["cycles"][0]
    before = Cycle.model_validate({**raw, "foundation": scores(0.5), "domain": scores(0.5), "merged": scores(0.5)})
    after = Cycle.model_validate({**raw, "foundation": scores(0.479), "domain": scores(0.481), "merged": scores(0.9)})
    (said,) = after.fallen_since(before)
    assert said == (
        "the FM with the domain's adapter does worse on 'medical' than a cycle before: "
        "47.9% of what the devices hold out, it was 50.0%"
    )
    assert before.fallen_since(before) == []
    new = after.model_copy(update={"foundation": {}, "merged": {"licences": after.domain["medical"]}})
    assert new.fallen_since(before) == []  # nothing to compare with


def test_a_merged_adapter_that_is_clearly_worse_than_a_domains_own_is_reported() -> None:
    def scores(num_examples: int, **accuracies: float) -> dict[str, Any]:
        return {name: {"accuracy": a, "loss": 1.0, "num_examples": num_examples} for name, a in accuracies.items()}

    def cycle(own: dict[str, Any], merged: dict[str, Any]) -> Cycle:
        return Cycle.model_validate({**_raw()["cycles"][0], "foundation": own, "merged": merged})

    (said,) = cycle(scores(24, tickets=0.875, other=0.5), scores(24, tickets=1 / 6, other=0.4)).merged_below_own()
    assert said == (
        "the merged adapter is clearly worse on 'tickets' than the domain's own: 16.7% of the test examples, "
        "the domain's own 87.5%; use the domain's own adapter there"
    )
    # With p = 0.5 and 0.4 the standard error of a difference is sqrt(0.49 / n): 2 of them are 0.1 at n = 196.
    assert cycle(scores(195, a=0.5), scores(195, a=0.4)).merged_below_own() == []
    assert len(cycle(scores(197, a=0.5), scores(197, a=0.4)).merged_below_own()) == 1
    assert cycle(scores(9, a=1.0), {}).merged_below_own() == []  # no merged adapter


def test_newcomers_are_domains_and_have_no_figures_of_the_foundation_model() -> None:
    def scores(**accuracies: float) -> dict[str, Any]:
        return {name: {"accuracy": a, "loss": 1.0, "num_examples": 210} for name, a in accuracies.items()}

    raw = _raw()
    first = raw["cycles"][0] | {"foundation": scores(medical=0.5), "merged": scores(medical=0.5)}
    first["domain"] = scores(rural=0.1, medical=0.2)
    old = first | {"foundation": scores(rural=0.9, medical=0.1), "merged": scores(rural=0.9, medical=0.1)}
    last = first | {"cycle": 1, "domain": scores(rural=0.0, medical=0.8)}
    raw |= {"follows": {"rural": "medical"}, "baselines": {"cycles": 1, "pooled": {"medical": 1.0}}}
    for start in (first, old):  # runs once had the FM scored at newcomers' edges, and may go on without
        summary = Summary.model_validate({**raw, "cycles": [start, last]}).with_gaps()
        assert summary.domains == ("rural", "medical")
        assert summary.gap_closed is not None
        assert {tuple(getattr(summary.gap_closed, body)) for body in ("foundation", "merged", "domain")} == {
            ("medical",)
        }
        (said,) = summary.cycles[1].fallen_since(summary.cycles[0])
        assert said.startswith("the DM does worse on 'rural' than a cycle before")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("surprise",), 1),
        (("schema",), "gaisnet.summary/2"),
        (("cycles",), []),
        (("cycles", 0, "seconds", "serve"), 1.0),
        (("cycles", 0, "domain", "medical", "accuracy"), 1.01),
        (("cycles", 0, "domain", "medical", "accuracy"), math.nan),
        (("cycles", 0, "bytes", "edge_cloud", "up"), -1),
    ],
)
def test_what_does_not_belong_is_refused(place: tuple[str | int, ...], value: object) -> None:
    raw = _raw()
    target: Any = raw
    for part in place[:-1]:
        target = target[part]
    target[place[-1]] = value
    with pytest.raises(ValidationError):
        Summary.model_validate(raw)


def test_summary_is_frozen() -> None:
    summary = Summary.model_validate(_raw())
    with pytest.raises(ValidationError):
        summary.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_at_write_with_its_place(tmp_path: Path, value: float) -> None:
    raw = _raw()
    raw["cycles"][0]["domain"] = {"medical": {"accuracy": 0.5, "loss": value, "num_examples": 1}}
    path = tmp_path / "summary.json"
    with pytest.raises(NotFinite, match=r"cycles\.0\.domain\.medical\.loss at writing summary\.json"):
        write_json(path, Summary.model_validate(raw).to_json())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_replace_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputNotWritable, match=r"summary\.json.*No space left on device; free some space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_text_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file"
        order.append(f"fsync {kind}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "report.html", "new")
    assert order == ["fsync file", "replace", "fsync folder"]


def test_missing_folder_is_a_gaisnet_error(tmp_path: Path) -> None:
    with pytest.raises(OutputNotWritable, match="No such file or directory"):
        write_json(tmp_path / "gone" / "summary.json", {})
