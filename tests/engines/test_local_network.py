"""Whole runs of cloud, edges and devices in one process, and what they left on the links."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from gaisnet.adapters.arithmetic import side_by_side
from gaisnet.adapters.state import AdapterTensors, save_adapter
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import Config, DevicePrecision, FaultSettings
from gaisnet.config.learning import ModelSettings
from gaisnet.data.examples import DeviceData, Example, tokenize
from gaisnet.engines.local import build_network
from gaisnet.errors import AdapterMismatch, CutError, DataError, UnexpectedMessage
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import Distillation, TaskTemplate
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRequest,
    BodyRequest,
    Done,
    EvaluateGuest,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Message,
    ModelRelease,
    ModelRequest,
    SmashedData,
)
from gaisnet.models.foundation import Foundation, load_foundation
from gaisnet.network import NO_ADAPTER, Network, Scores
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.decoder_model import PerplexityGate
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.edge.edge import Edge
from gaisnet.transport.ledger import Ledger, LinkKind, Traffic
from tests.frames import Frames
from tests.tiny import (
    NUM_LAYERS,
    round_weights,
    save_tiny_foundation,
    tiny_config,
    tiny_data,
    tiny_edge,
    tiny_foundation,
    tiny_newcomer,
    tiny_tokenizer,
)

pytestmark = [pytest.mark.integration, pytest.mark.numeric]

PUBLIC_TEXT = "All animals are equal, but some animals are more equal than others. It was a bright cold day in April."
EXACT = {
    "smashed": "float32",
    "body_output": "float32",
    "gradient": "float32",
    "anchor": "float32",
    "adapter": "float32",
}
WEIGHTS = 0.1
MIDDLE, SUFFIX = {2, 3}, {4, 5}


@dataclass
class Run:
    """A network with what its verbs gave, cycle after cycle; entry 0 of ``scores`` is before the first."""

    config: Config
    data: Mapping[str, DeviceData] | None = None
    foundation: Foundation | None = None
    ledger: Frames = field(default_factory=Frames)
    scores: list[Scores] = field(default_factory=list)
    relays: list[dict[str, Distillation]] = field(default_factory=list)
    updates: list[dict[str, AdapterUpdate]] = field(default_factory=list)
    verdicts: list[list[Verdict]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.foundation = self.foundation or tiny_foundation(initializer_range=WEIGHTS)
        shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in self.config.edges}
        data = self.data or tiny_data(self.config)
        self.network: Network = build_network(
            self.config, self.foundation, shapes, data, PUBLIC_TEXT, self.note, self.ledger.another
        )

    def note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.told.append(stage)

    def go(self) -> "Run":
        self.network.install()
        self.scores.append(self.network.evaluate())
        for _ in range(self.config.cycles):
            self.relays.append(self.network.release())
            self.updates.append(self.network.fine_tune())
            self.verdicts.append(self.network.absorb())
            self.scores.append(self.network.evaluate())
        return self


def quick(**changes: Any) -> Config:
    """A run whose gate lets everything through."""
    absorb = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
    return tiny_config(**{"absorb": absorb, **changes})


def alone(edge: str = "north", **changes: Any) -> Config:
    """One cycle of one edge."""
    return quick(edges=[tiny_edge(edge, "shapes")], cycles=1, **changes)


def alone_perplexity(run: Run) -> float:
    """Return the perplexity of the FM without an adapter."""
    gate = run.network.cloud._model.gate
    assert isinstance(gate, PerplexityGate)
    return gate.perplexity_before


@pytest.fixture(scope="module")
def finished() -> Run:
    """A whole run of the tiny configuration, for all who only look."""
    return Run(quick()).go()


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_every_model_is_scored_on_every_held_out_example(finished: Run) -> None:
    assert len(finished.scores) == 3
    for scores in finished.scores:
        for reports in (scores.domain, scores.foundation, scores.merged):
            assert reports.keys() == {"shapes", "tastes"}
            assert all(report.num_examples == 3 * 3 for report in reports.values())
            assert all(0 <= report.num_correct <= 9 and report.loss_sum > 0.0 for report in reports.values())


def test_before_anything_is_trained_no_adapter_acts(finished: Run) -> None:
    first = finished.scores[0]
    assert first.merged == first.foundation
    bare = Run(quick(relay={"enabled": False}, domain={"precision": "float32"}, wire=EXACT))
    bare.network.install()
    scores = bare.network.evaluate()
    for domain, report in scores.domain.items():  # with nothing changed the domain model is the foundation model
        assert report.loss_sum == pytest.approx(scores.foundation[domain].loss_sum, rel=1e-6)


def test_learning_makes_all_models_better(finished: Run) -> None:
    first, last = finished.scores[0], finished.scores[-1]
    for domain in ("shapes", "tastes"):
        for before, after in (
            (first.domain, last.domain),
            (first.foundation, last.foundation),
            (first.merged, last.merged),
        ):
            assert after[domain].loss_sum < before[domain].loss_sum - 1.0


def test_updates_tell_how_much_was_learned(finished: Run) -> None:
    for cycle in finished.updates:
        for update in cycle.values():
            assert update.num_examples == 3 * 5
            assert update.num_steps == 3 + 2  # ten examples of two split devices in fours, five of the local one
            assert update.loss > 0.0
    assert all(finished.updates[1][d].loss < finished.updates[0][d].loss for d in ("shapes", "tastes"))


def test_a_relay_is_distilled_for_every_domain_in_every_cycle(finished: Run) -> None:
    assert [relays.keys() for relays in finished.relays] == [{"shapes", "tastes"}] * 2
    assert all(0.0 < relay.error_after < relay.error_before for relay in finished.relays[0].values())
    assert all(0.0 < relay.kl_after < relay.kl_before for relay in finished.relays[0].values())
    first, second = ({d: r.error_before for d, r in relays.items()} for relays in finished.relays)
    assert all(second[domain] < 0.9 * first[domain] for domain in first)  # it has the first cycle's


def test_a_relay_that_makes_a_domain_model_worse_is_not_released() -> None:
    raw, whole = {"rank": 8, "sequences": 16, "tokens": 12}, {"precision": "int8"}
    ruinous = Run(alone(relay={**raw, "sequences": 8, "penalty": 1e-9}, domain=whole))  # learns noise by heart
    ruinous.network.install()
    before = ruinous.network.evaluate()
    assert not any(relay.helped for relay in ruinous.network.release().values())
    assert ruinous.network.evaluate() == before
    useful = Run(alone(relay=raw))
    useful.network.install()
    before = useful.network.evaluate()
    assert all(relay.helped for relay in useful.network.release().values())
    assert useful.network.evaluate().domain != before.domain


def test_the_gate_speaks_of_every_adapter(finished: Run) -> None:
    for verdicts in finished.verdicts:
        assert [verdict.adapter for verdict in verdicts] == ["shapes", "tastes", MERGED]
        assert all(verdict.accepted and str(verdict).startswith("accepted '") for verdict in verdicts)
    assert finished.network.cloud.retention == {v.adapter: v.perplexity for v in finished.verdicts[-1]}


def test_what_came_up_is_what_is_plugged_in(finished: Run) -> None:
    for domain, update in finished.updates[-1].items():
        _, tensors = finished.network.cloud.adapter(domain)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in update.tensors.items())


def products(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {a: adapter[a.replace(".lora_A.", ".lora_B.")] @ adapter[a] for a in adapter if ".lora_A." in a}


def merged_and_parts(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    cloud = run.network.cloud
    return products(cloud.adapter(MERGED)[1]), [products(cloud.adapter(d)[1]) for d in ("shapes", "tastes")]


@pytest.mark.parametrize("method", ["regression", "sum", "ties", "dare"])
def test_with_a_single_domain_the_merged_adapter_is_the_domains_own(method: str) -> None:
    absorb = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
    run = Run(alone(absorb={**absorb, "merge": {"method": method, "weight": 0.5}})).go()
    own, merged = (run.network.cloud.adapter(name) for name in ("shapes", MERGED))
    assert own[0] == merged[0] and any(bool(t.any()) for t in products(own[1]).values())
    assert all(torch.equal(merged[1][key], tensor) for key, tensor in own[1].items())
    assert run.scores[-1].merged == run.scores[-1].foundation


def test_the_merged_adapter_is_fitted_to_each_domain_on_its_own_text(finished: Run) -> None:
    cloud, foundation = finished.network.cloud, finished.foundation
    spec, merged = cloud.adapter(MERGED)
    assert foundation is not None and isinstance(spec, LoraSpec) and (spec.rank, spec.alpha) == (2 * 2, 2 * 4)
    assert cloud._model.relay_trainer is not None
    parts = {domain: cloud.adapter(domain)[1] for domain in ("shapes", "tastes")}
    weight = finished.config.absorb.merge.weight
    sums = side_by_side(list(parts.values()), weight)
    whole = side_by_side(list(parts.values()))
    assert all(torch.equal(t, whole[key]) for key, t in merged.items() if ".lora_B." in key)  # they stay
    texts = {domain: cloud._model.relay_trainer._text.by_domain[domain] for domain in parts}
    assert texts["shapes"] != texts["tastes"]

    def apart(found: AdapterTensors) -> float:
        """Return the distance between the first adapted module's output for a domain's text and the domain's own."""
        a, b = (f"layers.4.self_attn.q_proj.lora_{x}.weight" for x in "AB")
        total = 0.0
        for domain, part in parts.items():
            for ids in texts[domain]:
                hidden = foundation.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0, 1:]
                x = cast(Any, foundation.decoder.layers[4]).input_layernorm(hidden)
                total += float((x @ (found[b] @ found[a] - part[b] @ part[a]).T).square().sum())
        return total

    assert apart(merged) < 0.9 * apart(sums)


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_the_merged_adapter_may_be_made_of_weights_alone(method: str) -> None:
    absorb = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
    merge = {"method": [method], "weight": 0.5}
    run = Run(tiny_config(absorb={**absorb, "merge": merge}, cycles=1)).go()
    merged, parts = merged_and_parts(run)
    halves = {key: (parts[0][key] + parts[1][key]) * 0.5 for key in merged}
    same = all(torch.allclose(merged[key], halves[key], atol=1e-6, rtol=1e-5) for key in merged)
    assert same == (method == "sum")
    assert any(bool(t.any()) for t in merged.values())


def test_where_nobody_wrote_text_yet_some_is_written_to_merge_on() -> None:
    absorb = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
    run = Run(tiny_config(absorb=absorb, cycles=1))
    run.network.install()
    run.network.fine_tune()
    assert all(verdict.accepted for verdict in run.network.absorb())
    merged, _ = merged_and_parts(run)
    assert any(bool(t.any()) for t in merged.values())


def test_the_foundation_models_weights_stay_as_they_were(finished: Run) -> None:
    assert finished.foundation is not None
    before = tiny_foundation(initializer_range=WEIGHTS).model.state_dict()
    after = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in finished.foundation.model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_seed_gives_the_same_run_whatever_the_global_generator_holds() -> None:
    def go(noise: int, **changes: Any) -> list[Scores]:
        foundation = tiny_foundation(initializer_range=WEIGHTS)
        torch.manual_seed(noise)
        return Run(alone(**changes), foundation=foundation).go().scores

    first = go(1)
    assert go(2) == first
    assert go(1, seed=4) != first


# -- the domain model and the foundation model -------------------------------------------------------------------------


def layers_of(tensors: AdapterTensors) -> set[int]:
    return {int(name.split(".")[1]) for name in tensors}


def test_the_relay_changes_the_domain_model_in_the_middle_only(finished: Run) -> None:
    """An edge's model is what it was given: the release once, then only adapters; and each has its place."""
    given = [
        message
        for kind, direction, message in finished.ledger.messages()
        if (kind, direction) == ("edge_cloud", "down")
    ]
    releases = [m for m in given if isinstance(m, ModelRelease)]
    adapters = [m for m in given if isinstance(m, AdapterRelease)]
    assert len(releases) == 2
    helped = sum(relay.helped for relays in finished.relays for relay in relays.values())
    assert sorted(adapter.role for adapter in adapters) == ["domain"] * 2 + ["relay"] * helped and helped >= 2
    kept = set(releases[0].layers)
    assert len(kept) == 5 and kept >= {0, 1, 4, 5} and set(releases[0].int8_layers) == kept & MIDDLE
    for adapter in adapters:
        assert layers_of(adapter.tensors) == (kept & MIDDLE if adapter.role == "relay" else SUFFIX)


def unsplit_losses(foundation: Foundation, data: Mapping[str, DeviceData], folder: Path) -> dict[str, float]:
    """Summed loss of each device's held-out examples under the unsplit model with an adapter that a run has saved."""
    model = PeftModel.from_pretrained(foundation.model, str(folder)).eval()
    losses = {}
    for name, held in data.items():
        losses[name] = 0.0
        for tokens in tokenize(held.test, foundation.tokenizer, 48, name):
            logits_TV = model(torch.tensor([tokens.input_ids])).logits[0, -len(tokens.label_ids) :]
            losses[name] += F.cross_entropy(logits_TV, torch.tensor(tokens.label_ids), reduction="sum").item()
    return losses


@pytest.mark.parametrize("tail_layers", [0, 1])
def test_scores_through_the_split_are_those_of_the_unsplit_model_with_the_saved_adapter(
    tmp_path: Path, tail_layers: int
) -> None:
    run = Run(alone(wire=EXACT, tail_layers=tail_layers)).go()
    spec, tensors = run.network.cloud.adapter("shapes")
    save_adapter(tmp_path, spec, tensors, "tiny", "model.layers")
    losses = unsplit_losses(tiny_foundation(initializer_range=WEIGHTS), tiny_data(run.config), tmp_path)
    assert run.scores[-1].foundation["shapes"].loss_sum == pytest.approx(sum(losses.values()), rel=1e-5)


@pytest.mark.parametrize(("precision", "tail_layers"), [("int8", 0), ("int4", 1)])
def test_scores_of_devices_in_few_bits_are_those_of_models_so_rounded(
    tmp_path: Path, precision: DevicePrecision, tail_layers: int
) -> None:
    """Heads of different lengths, and a local device, so each has a model of its own."""
    run = Run(alone(wire=EXACT, device_precision=precision, tail_layers=tail_layers)).go()
    spec, tensors = run.network.cloud.adapter("shapes")
    save_adapter(tmp_path, spec, tensors, "tiny", "model.layers")
    loss_sum = 0.0
    for _, device in run.config.each_device():
        held = (*range(device.head_layers), *range(NUM_LAYERS - tail_layers, NUM_LAYERS))
        foundation = tiny_foundation(initializer_range=WEIGHTS)
        round_weights(foundation.model, held, precision)
        losses = unsplit_losses(foundation, {device.name: tiny_data(run.config)[device.name]}, tmp_path)
        loss_sum += losses[device.name]
    assert run.scores[-1].foundation["shapes"].loss_sum == pytest.approx(loss_sum, rel=1e-5)
    assert run.scores[-1].domain["shapes"].loss_sum < run.scores[0].domain["shapes"].loss_sum


@pytest.mark.parametrize("tail_layers", [0, 1])
def test_retention_is_the_unsplit_models_perplexity_with_the_saved_adapter(tmp_path: Path, tail_layers: int) -> None:
    run = Run(alone(tail_layers=tail_layers))
    ids_BT = torch.tensor(tiny_tokenizer().encode(PUBLIC_TEXT)[:32]).view(2, 16)
    model = tiny_foundation(initializer_range=WEIGHTS).model

    def perplexity(one: Any) -> float:
        return float(one(ids_BT, labels=ids_BT).loss.exp())

    assert alone_perplexity(run) == pytest.approx(perplexity(model), rel=1e-5)
    assert set(run.network.cloud.retention.values()) == {alone_perplexity(run)}
    run.go()
    spec, tensors = run.network.cloud.adapter("shapes")
    save_adapter(tmp_path, spec, tensors, "tiny", "model.layers")
    adapted = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    assert run.network.cloud.retention["shapes"] == pytest.approx(perplexity(adapted), rel=1e-5)
    assert perplexity(adapted) != pytest.approx(alone_perplexity(run), rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "int8")]
)
def test_a_run_in_half_precision(tmp_path: Path, dtype: str, precision: str) -> None:
    folder = save_tiny_foundation(tmp_path, initializer_range=WEIGHTS)
    foundation = load_foundation(ModelSettings.model_validate({"foundation": str(folder), "dtype": dtype}))
    run = Run(alone(device_precision=precision), foundation=foundation).go()
    assert run.scores[-1].domain["shapes"].loss_sum < run.scores[0].domain["shapes"].loss_sum


@pytest.mark.parametrize("modes", [("local",), ("split",), ("split", "local")])
def test_any_mix_of_devices(modes: tuple[str, ...]) -> None:
    devices = [{"name": f"d{i}", "mode": mode, "head_layers": i + 1} for i, mode in enumerate(modes)]
    run = Run(quick(edges=[{"name": "e", "domain": "shapes", "devices": devices}], cycles=1)).go()
    assert run.scores[-1].domain["shapes"].num_examples == 3 * len(modes)
    assert run.scores[-1].domain["shapes"].loss_sum < run.scores[0].domain["shapes"].loss_sum


# -- the gate ----------------------------------------------------------------------------------------------------------


def foundation_that_knows(text: str) -> Foundation:
    """The tiny model, having learned the gate's own two windows of a text almost by heart.

    Their perplexity is then near 1, the least there is, so an adapter that changes the model much can only raise it:
    no matter how a processor rounds while the adapter learns.
    """
    foundation = tiny_foundation()
    model = foundation.model.requires_grad_(True)
    ids_BT = torch.tensor(foundation.tokenizer.encode(text)[:32]).view(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(1000):  # how many it takes depends on the processor
        optimizer.zero_grad()
        loss = model(ids_BT, labels=ids_BT).loss
        if loss.item() < 0.05:
            break
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    return foundation


def test_a_ruinous_adapter_is_refused_and_what_was_in_place_stays() -> None:
    absorb = {
        **{"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 0.0},
        "least_share": 1.0,  # a weak share of any change may lower the perplexity a little, by chance
    }
    fine_tune = {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.1, "anchor_weight": 0.0}
    run = Run(tiny_config(absorb=absorb, fine_tune=fine_tune, cycles=1), foundation=foundation_that_knows(PUBLIC_TEXT))
    cloud = run.network.cloud
    before = {name: cloud.adapter(name)[1] for name in ("shapes", "tastes")}
    run.go()
    limit = alone_perplexity(run)
    assert limit < 1.1
    for verdict in run.verdicts[0][:2]:
        assert not verdict.accepted
        assert str(verdict).startswith(f"refused '{verdict.adapter}': perplexity on public text ")
        assert str(verdict).endswith(f", limit {limit:.2f}")
        assert not verdict.perplexity <= limit
    for name, tensors in before.items():
        after = cloud.adapter(name)[1]
        assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
    assert run.verdicts[0][2].accepted  # merged of what stayed in place: it costs nothing
    assert not any(bool(t.any()) for t in products(cloud.adapter(MERGED)[1]).values())
    assert cloud.retention == dict.fromkeys(("shapes", "tastes", MERGED), limit)
    assert run.scores[1].foundation == run.scores[0].foundation
    assert run.scores[1].domain != run.scores[0].domain


def test_an_adapter_over_the_limit_is_plugged_in_weaker_and_its_domain_model_keeps_it_whole() -> None:
    def run(**absorb: float) -> Run:
        settings = {"retention_windows": 2, "retention_tokens": 16, **absorb}
        fine_tune = {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.02, "anchor_weight": 0.0}
        config = tiny_config(absorb=settings, fine_tune=fine_tune, cycles=1)
        return Run(config, foundation=foundation_that_knows(PUBLIC_TEXT)).go()

    free = run(max_retention_increase=1e9)
    cost = free.verdicts[0][0].perplexity / alone_perplexity(free) - 1.0
    strict = run(max_retention_increase=0.9 * cost)
    verdict, cloud = strict.verdicts[0][0], strict.network.cloud
    assert verdict.accepted and 0.5 <= verdict.share < 1.0
    assert cloud.retention["shapes"] == verdict.perplexity <= verdict.limit
    whole = strict.updates[0]["shapes"].tensors
    for key, tensor in cloud.adapter("shapes")[1].items():
        assert torch.equal(tensor, whole[key] * verdict.share if ".lora_B." in key else whole[key])
    assert strict.scores[1].domain["shapes"] == free.scores[1].domain["shapes"]


def test_a_network_that_goes_on_gives_its_domain_models_their_adapters_whole() -> None:
    settings = {"retention_windows": 2, "retention_tokens": 16}
    fine_tune = {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.02, "anchor_weight": 0.0}
    edges = [tiny_edge("north", "shapes")]

    def run(max_increase: float) -> Run:
        absorb = {**settings, "max_retention_increase": max_increase}
        config = tiny_config(absorb=absorb, fine_tune=fine_tune, cycles=1, edges=edges)
        return Run(config, foundation=foundation_that_knows(PUBLIC_TEXT))

    free = run(1e9).go()
    strict = 0.9 * (free.verdicts[0][0].perplexity / alone_perplexity(free) - 1.0)
    stopped = run(strict).go()
    assert stopped.verdicts[0][0].share < 1.0
    goes_on = run(strict)
    goes_on.network.restore(*stopped.network.checkpoint_state())
    goes_on.network.install()
    assert goes_on.network.evaluate() == stopped.scores[-1]
    assert stopped.scores[-1].domain == free.scores[-1].domain


def test_one_refused_adapter_does_not_stop_another() -> None:
    run = Run(quick(cycles=1)).go()
    cloud = run.network.cloud
    before = cloud.adapter("tastes")[1]
    sound = {key: tensor * 0.5 for key, tensor in run.updates[0]["shapes"].tensors.items()}
    broken = {key: torch.full_like(tensor, 1e20) for key, tensor in before.items()}
    verdicts = cloud.absorb(
        {"shapes": AdapterUpdate(2, 1, 1, 1, 0.1, (), sound), "tastes": AdapterUpdate(2, 1, 1, 1, 0.1, (), broken)},
        1,
        run.network.edges,
    )
    assert [(v.adapter, v.accepted) for v in verdicts] == [("shapes", True), ("tastes", False), (MERGED, True)]
    assert all(torch.equal(cloud.adapter("shapes")[1][key], tensor) for key, tensor in sound.items())
    assert all(torch.equal(cloud.adapter("tastes")[1][key], tensor) for key, tensor in before.items())


# -- without a relay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["factors", "products"])
def test_whoever_learned_is_averaged(average: str) -> None:
    fine_tune = {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.01, "average": average}
    run = Run(quick(fine_tune=fine_tune)).go()
    assert sum(s.loss_sum for s in run.scores[-1].domain.values()) < sum(
        s.loss_sum for s in run.scores[0].domain.values()
    )


def test_without_a_relay_nothing_is_distilled() -> None:
    run = Run(alone(relay={"enabled": False})).go()
    assert run.relays == [{}]
    assert "relay" not in run.told and "fine_tune" in run.told
    roles = [m.role for _, _, m in run.ledger.messages() if isinstance(m, AdapterRelease)]
    assert set(roles) == {"domain"}
    assert run.scores[-1].domain["shapes"].loss_sum < run.scores[0].domain["shapes"].loss_sum


def test_with_a_relay_it_is_told() -> None:
    assert {"relay", "fine_tune"} <= set(Run(alone()).go().told)


def test_the_learning_rate_falls_from_cycle_to_cycle_for_split_and_local_devices() -> None:
    fine_tune = {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.01, "cycle_decay": 1e-6}
    for keep in ((0,), (2,)):  # a split device, a local one
        edges = [{**edge, "devices": [edge["devices"][i] for i in keep]} for edge in (tiny_edge("north", "shapes"),)]
        run = Run(quick(fine_tune=fine_tune, edges=edges, relay={"enabled": False})).go()
        first, second = (updates["shapes"].tensors for updates in run.updates)
        learned = max(float(t.abs().max()) for key, t in first.items() if ".lora_B." in key)
        assert learned > 1e-3
        assert max(float((second[key] - first[key]).abs().max()) for key in first) < 1e-3 * learned


# -- newcomers ---------------------------------------------------------------------------------------------------------


def with_a_newcomer(**changes: Any) -> Run:
    """A third edge that follows the domain of the first and holds out the same examples."""
    newcomer = tiny_newcomer("west", "forms", follows="shapes")
    config = quick(edges=[tiny_edge("north", "shapes"), tiny_edge("south", "tastes"), newcomer], **changes)
    data = tiny_data(config)
    for device in ("a", "b", "c"):
        data[f"west-{device}"] = DeviceData((), data[f"north-{device}"].test)
    return Run(config, data).go()


def test_a_newcomer_starts_with_what_its_domain_has_learned_and_a_relay_of_its_own() -> None:
    run = with_a_newcomer()
    cloud, last = run.network.cloud, run.scores[-1]
    assert all(updates.keys() == {"shapes", "tastes"} for updates in run.updates)
    assert cloud.adapter_release("domain", "forms") == cloud.adapter_release("domain", "shapes")
    assert run.relays[-1].keys() == {"shapes", "tastes", "forms"}
    relays = [cloud.relay(name) for name in ("forms", "shapes")]
    assert any(not torch.equal(relays[0][key], relays[1][key]) for key in relays[0])
    # At the edge it has the other's newest adapter, and differs by its relay.
    assert last.domain["forms"].loss_sum == pytest.approx(last.domain["shapes"].loss_sum, rel=0.1)
    assert last.domain["forms"].loss_sum < run.scores[0].domain["forms"].loss_sum
    spec, _ = cloud.adapter(MERGED)
    assert isinstance(spec, LoraSpec) and spec.rank == 2 * 2  # only those that learn are in it
    assert run.network.evaluate_across_domains(last).domain.keys() == {"shapes", "tastes"}


def test_at_a_newcomer_only_its_domain_model_is_scored() -> None:
    run = with_a_newcomer()
    for scores in run.scores:
        assert list(scores.domain) == ["shapes", "tastes", "forms"]
        assert list(scores.foundation) == list(scores.merged) == ["shapes", "tastes"]
    in_cloud = {
        m.owner.partition("-")[0]
        for kind, _, m in run.ledger.messages()
        if kind == "edge_cloud" and isinstance(m, SmashedData)
    }
    assert in_cloud == {"north", "south"}  # what the newcomer's devices hold out stays at its edge


def test_without_relays_a_newcomers_model_is_that_of_the_domain_that_it_follows() -> None:
    run = with_a_newcomer(relay={"enabled": False})
    assert [s.domain["forms"] == s.domain["shapes"] for s in run.scores] == [True] * len(run.scores)


def test_the_others_learn_as_if_no_newcomer_were_there() -> None:
    run, alone = with_a_newcomer(), Run(quick()).go()
    for mine, other in zip(run.updates, alone.updates, strict=True):
        for domain, update in other.items():
            assert all(torch.equal(mine[domain].tensors[key], tensor) for key, tensor in update.tensors.items())


def test_who_learns_needs_examples_for_it() -> None:
    config = quick(edges=[tiny_edge("north", "shapes")])
    data = tiny_data(config)
    data["north-a"] = DeviceData((), data["north-a"].test)
    with pytest.raises(DataError, match="'north-a': has no train examples"):
        Run(config, data)


# -- every model on every domain ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same_examples() -> Run:
    """A whole run whose two edges have the same examples: a model must do as well at either."""
    config = quick()
    data = tiny_data(config)
    data |= {name.replace("north", "south"): mine for name, mine in data.items() if name.startswith("north")}
    return Run(config, data).go()


def test_every_model_is_scored_on_every_domain(same_examples: Run) -> None:
    scores = same_examples.scores[-1]
    matrix = same_examples.network.evaluate_across_domains(scores)
    domains = {"shapes", "tastes"}
    assert matrix.domain.keys() == domains
    assert matrix.foundation.keys() == {*domains, MERGED, NO_ADAPTER}
    for whose in domains:
        for on in domains:
            assert matrix.domain[whose][on] == scores.domain[whose]
            assert matrix.foundation[whose][on] == scores.foundation[whose]
    assert scores.domain["shapes"] != scores.domain["tastes"]  # they are not one model
    assert matrix.foundation[MERGED] == scores.merged
    assert matrix.foundation[NO_ADAPTER] == same_examples.scores[0].foundation


def test_before_anything_has_learned_nobody_need_be_asked_again() -> None:
    run = Run(quick())
    run.network.install()
    scores, asked = run.network.evaluate(), len(run.ledger.frames)
    matrix = run.network.evaluate_across_domains(scores)
    assert len(run.ledger.frames) == asked
    run.network.cycle = 1
    assert run.network.evaluate_across_domains(scores) == matrix
    assert len(run.ledger.frames) > asked


def test_also_a_model_whose_adapter_was_refused_is_scored_as_it_is() -> None:
    absorb = {
        **{"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 0.0},
        "least_share": 1.0,  # a weak share of any change may lower the perplexity a little, by chance
    }
    fine_tune = {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.1, "anchor_weight": 0.0}
    config = tiny_config(absorb=absorb, fine_tune=fine_tune, cycles=1)
    data = tiny_data(config)
    data |= {name.replace("north", "south"): mine for name, mine in data.items() if name.startswith("north")}
    run = Run(config, data, foundation_that_knows(PUBLIC_TEXT)).go()
    assert not any(verdict.accepted for verdict in run.verdicts[0][:2])
    matrix = run.network.evaluate_across_domains(run.scores[-1])
    assert matrix.domain["shapes"]["tastes"] == run.scores[-1].domain["shapes"] != run.scores[0].domain["shapes"]


def test_a_guest_that_does_not_fit_is_refused_and_the_host_stays(same_examples: Run) -> None:
    before = same_examples.network.evaluate()
    guest = same_examples.network._guest("tastes")
    narrow = {name: tensor[:1] for name, tensor in guest.domain.items()}
    with pytest.raises(AdapterMismatch):
        same_examples.network.edges.links["shapes"].send(EvaluateGuest(guest.relay, narrow)).result()
    assert same_examples.network.evaluate() == before


# -- privacy -----------------------------------------------------------------------------------------------------------

PIECE = 8  # tokens, which are bytes here: no piece of a secret this long is on a link by chance


def secrets_of(config: Config) -> dict[str, DeviceData]:
    """Examples that say something of their own in every prompt and in every completion."""

    def example(*whose: object) -> Example:
        secret = hashlib.sha256(str(whose).encode()).hexdigest()  # no stretch of it is anywhere by chance
        return Example(f"Is {secret[:24]} so?", f" {secret[24:48]}")

    return {
        device.name: DeviceData(
            tuple(example(device.name, "train", i) for i in range(2)), (example(device.name, "test", 0),)
        )
        for _, device in config.each_device()
    }


def pieces(text: str) -> list[str]:
    """Text cut so that whoever sends a stretch of it of any use sends a whole piece."""
    return [text[at : at + PIECE] for at in range(0, len(text) - PIECE + 1, PIECE)]


def encodings(text: str) -> list[bytes]:
    """Return the forms in which a private text could appear in a frame."""
    ids = tiny_tokenizer().encode(text)
    numbers = torch.tensor(ids)
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
    raw = [numbers.to(kind).view(torch.uint8).numpy().tobytes() for kind in kinds]
    listed = [json.dumps(ids)[1:-1].encode(), json.dumps(ids, separators=(",", ":"))[1:-1].encode()]
    return [text.encode(), json.dumps(text)[1:-1].encode(), *raw, *listed]


def leaks(frames: list[bytes], data: Mapping[str, DeviceData]) -> set[str]:
    """Every private piece that stands in a frame, in any encoding."""
    everything = b"|".join(frames)
    texts = [t for held in data.values() for e in (*held.train, *held.test) for t in (e.prompt, e.completion)]
    return {piece for text in texts for piece in pieces(text) if any(raw in everything for raw in encodings(piece))}


@pytest.fixture(scope="module")
def secret_run() -> Run:
    config = quick(model={"foundation": "tiny", "context": 80})
    return Run(config, secrets_of(config)).go()


def test_no_private_text_and_no_token_ids_are_on_any_link(secret_run: Run) -> None:
    frames = [frame for _, _, frame in secret_run.ledger.frames]
    assert len(frames) > 200
    assert leaks(frames, secrets_of(secret_run.config)) == set()


@pytest.mark.parametrize("number", range(len(encodings("x"))))
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_search_finds_what_is_planted(secret_run: Run, number: int, split: str) -> None:
    held = secrets_of(secret_run.config)["south-b"]
    (example, *_) = held.train if split == "train" else held.test
    for text in (example.prompt, example.completion):
        stretch = text[5:-4]  # even without its ends
        planted = b"\x01" + encodings(stretch)[number] + b"\x02"
        found = leaks([*(frame for _, _, frame in secret_run.ledger.frames[:20]), planted], {"south-b": held})
        assert found and all(piece in stretch for piece in found)


def test_the_search_looks_at_every_text_by_itself() -> None:
    data = secrets_of(quick())
    texts = [t for held in data.values() for e in (*held.train, *held.test) for t in (e.prompt, e.completion)]
    assert len(texts) == len(set(texts)) == 6 * 3 * 2
    every = [piece for text in texts for piece in pieces(text)]
    assert len(set(every)) == len(every) >= 3 * len(texts)


def test_smashed_data_travels_up_once_per_device_and_split(secret_run: Run) -> None:
    sent: dict[LinkKind, list[tuple[str, str]]] = {"device_edge": [], "edge_cloud": []}
    for kind, direction, message in secret_run.ledger.messages():
        if isinstance(message, SmashedData):
            assert direction == "up"
            sent[kind].append((message.owner, message.split))
    tests = [(f"{edge}-{device}", "test") for edge in ("north", "south") for device in "abc"]
    trains = [(f"{edge}-{device}", "train") for edge in ("north", "south") for device in "ab"]  # c is local
    assert sorted(sent["device_edge"]) == sorted(tests + trains)
    assert sorted(sent["edge_cloud"]) == tests


def test_only_counts_sums_adapters_and_activations_go_up(secret_run: Run) -> None:
    up = {(kind, type(m)) for kind, direction, m in secret_run.ledger.messages() if direction == "up"}
    to_edge = {t for kind, t in up if kind == "device_edge"}
    to_cloud = {t for kind, t in up if kind == "edge_cloud"}
    assert {t.__name__ for t in to_edge} == {
        "AdapterUpdate",
        "BodyOutputGrad",
        "Done",
        "EvaluationReport",
        "SmashedData",
    }
    asked_of_cloud = {AnchorRequest, BodyRequest, ModelRequest}
    assert to_cloud == {AdapterUpdate, EvaluationReport, Done, Installed, SmashedData} | asked_of_cloud


def test_the_ledger_counts_what_crossed(secret_run: Run) -> None:
    kinds: tuple[LinkKind, LinkKind] = ("device_edge", "edge_cloud")
    frames = list(secret_run.ledger.frames)
    traffic = secret_run.network.traffic()
    asking = [f for f in secret_run.ledger.frames[len(frames) :]]
    for kind in kinds:
        sizes = {way: sum(len(f) for k, d, f in frames if (k, d) == (kind, way)) for way in ("up", "down")}
        asked = {way: sum(len(f) for k, d, f in asking if (k, d) == (kind, way)) for way in ("up", "down")}
        assert traffic[kind] == Traffic(sizes["up"] + asked["up"], sizes["down"] + asked["down"])
        assert all(sizes.values())


# -- before any work, and what does not belong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"first_layer": 9}}, "adapters.first_layer is 9 but the model has 6 layers"),
        ({"adapters": {"first_layer": 2}}, "head_layers of device 'north-b' is 2 but"),
        ({"domain": {"keep_layers": 3}}, "domain.keep_layers is 3 but only the middle, layers 2 to 3 of 6"),
    ],
)
def test_a_layout_that_does_not_fit_stops_before_the_model_runs(changes: dict[str, Any], message: str) -> None:
    foundation = tiny_foundation()
    cast(Any, foundation.model).forward = None  # a call would be a TypeError
    with pytest.raises(CutError, match=message):
        Run(tiny_config(**changes), foundation=foundation)


def test_a_device_without_examples_stops_before_the_model_runs() -> None:
    foundation, config = tiny_foundation(), tiny_config()
    cast(Any, foundation.model).forward = None
    data = {**tiny_data(config), "south-c": DeviceData((), (Example("a", "b"),))}
    with pytest.raises(DataError, match="device 'south-c': has no train examples"):
        Run(config, data, foundation)


def test_too_little_public_text() -> None:
    absorb = {"retention_windows": 40, "retention_tokens": 16}
    found = "the public text for retention: it fills 6 windows of 16 tokens but 40 are wanted"
    with pytest.raises(DataError, match=found):
        Run(tiny_config(absorb=absorb))


def test_the_cloud_takes_only_what_is_for_it() -> None:
    cloud = Run(alone()).network.cloud
    rows = torch.zeros(2, 32)
    counts = torch.tensor([2], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    for message in (
        SmashedData("north-a", "train", 1, *counts, rows),
        BodyRequest("north-a", None),
        FineTune(0),
        Done(),
    ):
        with pytest.raises(UnexpectedMessage, match=f"the cloud does not take a {type(message).__name__} here"):
            cloud.handle(message)


class Nobody:
    """Whatever it is asked, it answers with an order."""

    peer = "here"

    def send(self, message: Message) -> Future[Message]:
        answer: Future[Message] = Future()
        answer.set_result(FineTune(0))
        return answer


def test_an_edge_takes_only_what_is_for_it() -> None:
    config = alone()
    devices = {device.name: Nobody() for _, device in config.each_device()}
    edge = Edge(config.edges[0], config, Nobody(), devices, Ledger())
    for message in (BodyRequest("north-a", None), Done(), EvaluationReport(1, 1, 1, 1.0)):
        with pytest.raises(UnexpectedMessage, match=f"edge 'north' does not take a {type(message).__name__} here"):
            edge.handle(message)
    with pytest.raises(UnexpectedMessage, match="edge 'north', which has no model yet"):
        edge.handle(FineTune(0))


def test_an_edge_says_which_answer_it_did_not_get() -> None:
    config = alone()
    devices = {device.name: Nobody() for _, device in config.each_device()}
    edge = Edge(config.edges[0], config, Nobody(), devices, Ledger())
    with pytest.raises(UnexpectedMessage, match="edge 'north', waiting for a ModelRelease, does not take a FineTune"):
        edge.handle(Install("run", "digest"))


def test_a_network_says_which_answer_it_did_not_get() -> None:
    cloud = Run(alone()).network.cloud
    network = Network(cloud, {"shapes": Nobody()}, Ledger(), FaultSettings())
    for verb, answer in (
        (network.install, "Installed"),
        (network.fine_tune, "AdapterUpdate"),
        (network.evaluate, "EvaluationReport"),
    ):
        with pytest.raises(UnexpectedMessage, match=f"the cloud, waiting for a {answer}, does not take a FineTune"):
            verb()


def test_a_device_of_the_configuration_is_needed_for_every_name() -> None:
    config = alone()
    assert {device.name for _, device in config.each_device()} == tiny_data(config).keys()
    assert Device(config.edges[0].devices[2], config, tiny_tokenizer(), tiny_data(config)["north-c"]).name == "north-c"
