"""A whole run from a configuration file: what it leaves on the disk, and what is left when it breaks off."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.nn import functional as F

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import Config
from gaisnet.config.file import load_config
from gaisnet.data.devices import load_domains
from gaisnet.data.examples import tokenize
from gaisnet.errors import CutError, DataError, ModelError, NotFinite
from gaisnet.messages import Lengths
from gaisnet.models.foundation import load_foundation
from gaisnet.progress import silent
from gaisnet.runs.model_card import render_card
from gaisnet.runs.output import RunFolder
from gaisnet.runs.run import Run, local_build, run_experiment
from gaisnet.runs.summary import Cycle, Summary
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.transport.ledger import Ledger
from tests.frames import Frames
from tests.tiny import tiny_config, tiny_edge, write_tiny_run

pytestmark = pytest.mark.integration

EXACT = {
    "smashed": "float32",
    "body_output": "float32",
    "gradient": "float32",
    "anchor": "float32",
    "adapter": "float32",
}
OPEN_GATE = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}


def strictly(text: str) -> Any:
    """JSON as the standard has it: without NaN and infinities."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def read_summary(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = strictly((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def small_config(folder: Path, **changes: Any) -> Config:
    """One edge, one cycle."""
    raw = {"edges": [tiny_edge("north", "shapes")], "cycles": 1, "absorb": OPEN_GATE, **changes}
    return load_config(write_tiny_run(folder, **raw))


class Finished:
    """A run that came to its end, for all who only look."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(write_tiny_run(folder, wire=EXACT, absorb=OPEN_GATE))
        self.out = folder / "runs" / "first"
        self.frames = Frames()
        self.told: list[str] = []
        self.returned = run_experiment(self.config, self.out, self.note, self.frames.another)
        self.summary = read_summary(self.out)

    def note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        assert 0 <= done <= total
        self.told.append(stage)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("run"))


# -- what is on the disk -----------------------------------------------------------------------------------------------


def test_all_files_are_there_and_no_other(finished: Finished) -> None:
    names = {path.name for path in finished.out.iterdir()}
    assert names == {"summary.json", "metrics.jsonl", "report.html", "tensorboard", "adapters", "checkpoint"}
    adapters = {path.name: {file.name for file in path.iterdir()} for path in (finished.out / "adapters").iterdir()}
    assert adapters.keys() == {"shapes", "tastes", "merged"}
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert all(files == expected for files in adapters.values())


def test_the_summary_has_every_key_that_was_promised(finished: Finished) -> None:
    summary = finished.summary
    assert summary.keys() >= {"schema", "seed", "config", "model", "device", "majority", "cycles"}
    assert summary["schema"] == "gaisnet.summary/1" and summary["seed"] == 3
    assert summary["config"] == finished.config.model_dump(mode="json")
    assert summary["model"].keys() >= {"foundation_params", "foundation_layers", "domain_layers", "trainable_params"}
    assert 0.0 < summary["device"]["params_fraction"] < 1.0
    assert summary["majority"].keys() == {"shapes", "tastes"}
    assert [cycle["cycle"] for cycle in summary["cycles"]] == [0, 1, 2]
    for cycle in summary["cycles"]:
        for body in ("foundation", "domain", "merged"):
            assert cycle[body].keys() == {"shapes", "tastes"}
            assert all({"accuracy", "loss"} <= score.keys() for score in cycle[body].values())
        assert cycle["retention"]["perplexity"] > 1.0
        assert cycle["bytes"].keys() == {"device_edge", "edge_cloud"}
        assert all(traffic.keys() == {"up", "down"} for traffic in cycle["bytes"].values())
        assert cycle["seconds"].keys() == {"release", "fine_tune", "absorb", "evaluate"}


def test_the_summary_is_what_was_returned(finished: Finished) -> None:
    assert Summary.model_validate(finished.summary) == finished.returned


def test_every_entry_has_the_whole_matrix_where_it_is_asked_for(finished: Finished, tmp_path: Path) -> None:
    assert all(cycle["matrix"] is None for cycle in finished.summary["cycles"])
    config = load_config(write_tiny_run(tmp_path, cycles=1, absorb=OPEN_GATE, evaluate={"everywhere": True}))
    summary = run_experiment(config, tmp_path / "out")
    for cycle in summary.cycles:
        assert cycle.matrix is not None
        assert cycle.matrix.foundation.keys() == {"shapes", "tastes", "merged", "none"}
        assert cycle.matrix.domain.keys() == {"shapes", "tastes"}
        for name in ("shapes", "tastes"):
            assert cycle.matrix.foundation[name][name] == cycle.foundation[name]
            assert cycle.matrix.domain[name][name] == cycle.domain[name]
            assert cycle.matrix.domain[name].keys() == {"shapes", "tastes"}
        assert cycle.matrix.foundation["merged"] == cycle.merged
        assert cycle.matrix.foundation["none"] == summary.cycles[0].foundation
    assert "Every model on every domain" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_summary_says_of_every_device_how_long_its_examples_are(finished: Finished) -> None:
    tokenizer = load_foundation(finished.config.model).tokenizer
    expected = {}
    for domain in load_domains(finished.config).values():
        for name, data in domain.devices.items():
            lengths = [
                len(t.input_ids) for each in data.splits().values() for t in tokenize(each, tokenizer, 999, name)
            ]
            expected[name] = {"num_examples": len(lengths), "num_truncated": 0, "longest": max(lengths)}
    assert finished.summary["examples"] == expected
    assert finished.summary["model"]["context"] == 48


def test_without_a_context_every_example_is_whole_and_a_smaller_one_is_reported(tmp_path: Path) -> None:
    config = small_config(tmp_path).model_copy(update={"cycles": 0})

    def examples(context: int | None) -> Summary:
        model = config.model.model_copy(update={"context": context})
        return run_experiment(config.model_copy(update={"model": model}), tmp_path / f"runs-{context}")

    whole, cut = examples(None), examples(30)
    assert whole.model.context == 127  # of the 128 positions, one is for the end
    assert all(each.num_truncated == 0 for each in whole.examples.values())
    assert any(each.num_truncated > 0 for each in cut.examples.values())
    assert {n: e.longest for n, e in cut.examples.items()} == {n: e.longest for n, e in whole.examples.items()}


def test_the_models_sizes(finished: Finished) -> None:
    model = load_foundation(finished.config.model).model
    params = sum(p.numel() for p in model.parameters())
    per_layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    figures = finished.summary["model"]
    assert (figures["foundation_params"], figures["foundation_layers"], figures["domain_layers"]) == (params, 6, 5)
    # Rank 2 beside q, k, v, o, gate, up and down of layers 4 and 5.
    inputs_and_outputs = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 48) + (48 + 32)
    assert figures["trainable_params"] == 2 * 2 * inputs_and_outputs
    assert finished.summary["device"]["params_fraction"] == pytest.approx((300 * 32 + 32 + 2 * per_layer) / params)


def test_entry_0_was_measured_before_anything_was_trained(finished: Finished) -> None:
    entry = finished.summary["cycles"][0]
    assert all(entry["seconds"][verb] == 0.0 for verb in ("release", "fine_tune", "absorb"))
    assert entry["seconds"]["evaluate"] > 0.0 and entry["gate"] == [] and entry["relay"] == {}
    assert entry["merged"] == entry["foundation"]
    assert len(set(entry["retention"]["adapters"].values())) == 1
    for domain in ("shapes", "tastes"):
        assert entry["foundation"][domain]["loss"] == pytest.approx(unsplit_loss(finished, domain, None), rel=1e-5)


def test_later_entries_were_measured_after_learning(finished: Finished) -> None:
    cycles = finished.summary["cycles"]
    for body in ("foundation", "domain", "merged"):
        for domain in ("shapes", "tastes"):
            assert cycles[2][body][domain]["loss"] < cycles[0][body][domain]["loss"]
    for cycle in cycles[1:]:
        assert all(seconds > 0.0 for seconds in cycle["seconds"].values())
        judged = [text.split("'")[1] for text in cycle["gate"] if "perplexity" in text]  # others tell of relays
        assert judged == ["shapes", "tastes", MERGED]
        assert cycle["relay"].keys() == {"shapes", "tastes"}


def test_bytes_of_all_entries_are_those_of_the_ledger(finished: Finished) -> None:
    asking = 512  # bytes at most that it takes to ask for the last figures
    for kind in ("device_edge", "edge_cloud"):
        frames = [(way, len(frame)) for link, way, frame in finished.frames.frames if link == kind]
        sizes = {direction: sum(size for way, size in frames if way == direction) for direction in ("up", "down")}
        entries = [cycle["bytes"][kind] for cycle in finished.summary["cycles"]]
        assert all(entry["up"] > 0 and entry["down"] > 0 for entry in entries)
        for way in ("up", "down"):
            uncounted = sizes[way] - sum(entry[way] for entry in entries)
            assert 0 <= uncounted <= (asking * 2 if kind == "edge_cloud" else 0)


def test_metrics_are_lines_of_strict_json_with_every_cycle(finished: Finished) -> None:
    events = [strictly(line) for line in (finished.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    cycles = [{k: v for k, v in event.items() if k != "event"} for event in events if event["event"] == "cycle"]
    assert cycles == finished.summary["cycles"]
    learned = [event for event in events if event["event"] == "fine_tune"]
    assert [event["cycle"] for event in learned] == [1, 2]
    assert all(event["domains"][d]["num_examples"] == 15 for event in learned for d in ("shapes", "tastes"))


def test_the_report_is_one_file_that_speaks_of_every_domain(finished: Finished) -> None:
    text = (finished.out / "report.html").read_text(encoding="utf-8")
    assert "shapes" in text and "tastes" in text and "data:image" in text or "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_tensorboard_has_curves_of_steps_and_cycles(finished: Finished) -> None:
    events = EventAccumulator(str(finished.out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"steps/loss", "steps/relay_loss", "accuracy/foundation/shapes", "retention/perplexity"} <= tags
    assert [point.step for point in events.Scalars("loss/domain/tastes")] == [0, 1, 2]
    assert len(events.Scalars("steps/loss")) == 2 * 2 * (
        3 + 2
    )  # cycles, edges, steps of the cohort and of the local one


def test_every_stage_is_told(finished: Finished) -> None:
    assert set(finished.told) == {"load", "evaluate", "release", "relay", "fine_tune", "absorb"}
    firsts = list(dict.fromkeys(finished.told))
    assert firsts == ["load", "evaluate", "release", "relay", "fine_tune", "absorb"]


# -- adapters ----------------------------------------------------------------------------------------------------------


def unsplit_loss(finished: Finished, domain: str, adapter: str | None) -> float:
    """Mean loss per label token of a domain's held-out examples, under the unsplit model with a saved adapter."""
    foundation = load_foundation(finished.config.model)
    model: Any = foundation.model
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(finished.out / "adapters" / adapter)).eval()
    losses: list[float] = []
    for name, data in load_domains(finished.config)[domain].devices.items():
        for tokens in tokenize(data.test, foundation.tokenizer, 48, name):
            logits_TV = model(torch.tensor([tokens.input_ids])).logits[0, -len(tokens.label_ids) :]
            losses += F.cross_entropy(logits_TV, torch.tensor(tokens.label_ids), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("domain", ["shapes", "tastes"])
def test_the_adapters_load_in_plain_peft_and_give_the_scores_of_the_summary(finished: Finished, domain: str) -> None:
    last = finished.summary["cycles"][-1]
    assert unsplit_loss(finished, domain, domain) == pytest.approx(last["foundation"][domain]["loss"], rel=1e-5)
    assert unsplit_loss(finished, domain, MERGED) == pytest.approx(last["merged"][domain]["loss"], rel=1e-5)


def code_in(card: str) -> str:
    """The first lines of Python in a model card."""
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("adapter", ["shapes", MERGED])
def test_the_card_of_an_adapter_says_how_to_load_it_and_that_loads_it_from_anywhere(
    finished: Finished, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(finished.out / "adapters" / adapter, tmp_path / "moved"))
    card = (moved / "README.md").read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "peft", "license": "unknown", "tags": ["gaisnet", "lora"]}
    score = finished.returned.cycles[-1].bodies()["merged" if adapter == MERGED else "foundation"]["shapes"]
    assert f"{score.accuracy:.1%} of {score.num_examples}, loss {score.loss:.3f}" in text
    assert f"Base model: `{finished.config.model.foundation}`" in text and "base_model_name_or_path" in text
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code_in(card).replace("path/of/this/folder", str(moved)), found)
    foundation = load_foundation(finished.config.model, plain=True)
    expected: Any = PeftModel.from_pretrained(foundation.model, str(moved))
    ids = found["tokenizer"]("Is it so?", return_tensors="pt")["input_ids"]
    assert torch.equal(found["model"](ids).logits, expected(ids).logits)


def test_a_card_has_the_licence_that_is_given_and_words_of_others_as_they_are(finished: Finished) -> None:
    spec = LoraSpec(2, 4, ("q_proj",), (3, 4))
    edge = finished.config.edges[0].model_copy(update={"labels": ("```\n# no", "yes"), "template": "# {text}\n---"})
    adapters = finished.config.adapters.model_copy(update={"licence": "mit"})
    config = finished.config.model_copy(update={"edges": (edge, *finished.config.edges[1:]), "adapters": adapters})
    card = render_card("shapes", spec, "org/model", True, config, finished.returned)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "org/model" and yaml.safe_load(header)["license"] == "mit"
    assert not any(line.startswith(("# no", "---")) for line in text.splitlines())
    assert "base_model_name_or_path" not in text  # a hub id is found everywhere


def test_the_lengths_of_examples_of_an_edge_that_is_away_are_missing() -> None:
    network = SimpleNamespace(lengths=lambda: {"tastes": {"south-a": Lengths(4, 1, 60)}})
    run: Any = SimpleNamespace(_network=network, _config=tiny_config())
    assert {name: each.longest for name, each in Run._examples(run).items()} == {"south-a": 60}


def test_a_card_tells_the_scores_there_are_where_an_edge_was_away_in_a_cycle(finished: Finished) -> None:
    spec, summary = LoraSpec(2, 4, ("q_proj",), (3, 4)), finished.returned

    def away(cycle: Cycle) -> Cycle:
        return cycle.model_copy(update={"foundation": {"tastes": cycle.foundation["tastes"]}})

    def card(name: str, cycles: list[Cycle]) -> str:
        return render_card(
            name, spec, "org/model", True, finished.config, summary.model_copy(update={"cycles": cycles})
        )

    first, last = summary.cycles[0], summary.cycles[-1]
    for name, scores in (("shapes", last.foundation), (MERGED, last.merged)):
        score = scores["shapes"]
        row = f"| shapes | not scored | {score.accuracy:.1%} of {score.num_examples}, loss {score.loss:.3f} |"
        assert row in card(name, [away(first), last])
    assert "It was not scored in the last cycle." in card("shapes", [first, away(last)])


# -- the same again ----------------------------------------------------------------------------------------------------


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "cycles": [{k: v for k, v in cycle.items() if k != "seconds"} for cycle in summary["cycles"]]}


def test_a_seed_gives_the_same_figures_twice(finished: Finished, tmp_path: Path) -> None:
    torch.manual_seed(99)
    run_experiment(finished.config, tmp_path / "again")
    assert without_seconds(read_summary(tmp_path / "again")) == without_seconds(finished.summary)


# -- what breaks off ---------------------------------------------------------------------------------------------------


def edges_of(mode: str) -> list[dict[str, Any]]:
    return [
        {"name": "north", "domain": "shapes", "devices": [{"name": "a", "mode": mode}, {"name": "b", "mode": mode}]}
    ]


@pytest.mark.parametrize(
    ("mode", "where"),
    [("split", r"edge 'north', cycle 0, edge round 0"), ("local", r"device 'a', cycle 0, edge round 0")],
)
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_what_was_finished(
    tmp_path: Path, mode: str, where: str
) -> None:
    fine_tune = {"local_epochs": 3, "batch_size": 4, "learning_rate": 1e30}
    config = small_config(tmp_path, edges=edges_of(mode), fine_tune=fine_tune)
    with pytest.raises(NotFinite, match=rf"the training loss at {where}, step [1-9]\d* is (nan|inf)"):
        run_experiment(config, tmp_path / "out")
    assert [cycle["cycle"] for cycle in read_summary(tmp_path / "out")["cycles"]] == [0]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"summary.json", "report.html", "adapters"}
    assert not (tmp_path / "out" / ".lock").exists()


def test_an_evaluation_that_is_not_finite_is_named_and_not_written(tmp_path: Path) -> None:
    fine_tune = {"local_epochs": 1, "batch_size": 64, "learning_rate": 1e30}  # one step, whose own loss is finite
    config = small_config(tmp_path, edges=edges_of("local"), fine_tune=fine_tune)
    with pytest.raises(NotFinite, match="the output of the body at edge 'north', scoring 'a' is nan"):
        run_experiment(config, tmp_path / "out")
    assert [cycle["cycle"] for cycle in read_summary(tmp_path / "out")["cycles"]] == [0]


def test_finished_cycles_stay_when_a_later_one_breaks_off(tmp_path: Path) -> None:
    config = small_config(tmp_path, cycles=3)
    out = tmp_path / "out"
    with pytest.raises(NotFinite, match=r"the relay's error at layer 2 is nan"), RunFolder.create(out) as folder:
        domains = load_domains(config)
        run = Run(config, folder, silent, local_build(config, domains, Ledger), {})
        run.cycle()
        trainer = run._network.cloud._model.relay_trainer
        assert trainer is not None
        body = trainer._body
        (middle, *_) = (index for index in body.indices if index in (2, 3))
        body.get_parameter(f"layers.{middle}.input_layernorm.weight").data[0] = math.inf
        run.cycle()
    summary = read_summary(out)
    assert [cycle["cycle"] for cycle in summary["cycles"]] == [0, 1]
    assert Summary.model_validate(summary) == run.summary
    assert (out / "adapters" / "merged" / "adapter_model.safetensors").is_file()


def fails_before_any_result(config: Config, out: Path, error: type[Exception], match: str) -> None:
    """The next run may have the folder."""
    with pytest.raises(error, match=match):
        run_experiment(config, out)
    with RunFolder.create(out):
        pass


def test_a_model_that_is_not_there_leaves_the_folder_to_the_next_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"foundation": "no/such/model", "context": 48})
    fails_before_any_result(config, tmp_path / "out", ModelError, "'no/such/model': cannot be loaded")


def test_a_layout_that_does_not_fit_leaves_the_folder_to_the_next_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, adapters={"first_layer": 6})
    fails_before_any_result(config, tmp_path / "out", CutError, "adapters.first_layer is 6 but the model has 6 layers")


def test_a_completion_longer_than_the_context_leaves_the_folder_to_the_next_run(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    line = json.dumps({"prompt": "a", "completion": "b" * 48})
    (tmp_path / "data" / "north-c" / "test.jsonl").write_text(line, encoding="utf-8")
    expected = "device 'north-c', test, example 1: the completion has 48 tokens but the context holds 48"
    fails_before_any_result(config, tmp_path / "out", DataError, expected)


def test_data_that_cannot_be_read_touches_no_folder(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    broken = tmp_path / "data" / "north-b" / "train.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"north-b/train\.jsonl, line 2: is not valid JSON"):
        run_experiment(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
