"""Devices' scores of adapters, and training of the merged adapter on the foundation model itself."""

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_

from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import Config, WireSettings
from gaisnet.data.examples import DeviceData, Example
from gaisnet.engines.local import NoPublishers, Tiers, build_tiers
from gaisnet.errors import ConfigError, DataError, LinkTimeout, OutOfBounds, UnexpectedMessage, WireFormatError
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import (
    AdapterUpdate,
    AnchorRequest,
    BodyOutput,
    BodyRequest,
    Done,
    Evaluate,
    EvaluationReport,
    Installed,
    LabelRequest,
    Message,
    ModelRequest,
    Shared,
    ShareRequest,
    SmashedData,
)
from gaisnet.models.ragged import Ragged
from gaisnet.progress import silent
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.decoder_model import PerplexityGate
from gaisnet.tiers.split.step import Outcome
from gaisnet.transport.codec import Codec
from tests.frames import Frames
from tests.tiny import tiny_config, tiny_data, tiny_edge, tiny_foundation, tiny_tokenizer
from tests.unsplit import assert_same_step

pytestmark = [pytest.mark.integration, pytest.mark.numeric]

PUBLIC_TEXT = "All animals are equal, but some animals are more equal than others. It was a bright cold day in April."
EXACT = dict.fromkeys(("smashed", "body_output", "gradient", "anchor", "adapter"), "float32")
WEIGHTS = 0.1
EOS = 257


def config_of(travelling: tuple[str, str] = ("b", "b"), absorb: Mapping[str, Any] = {}, **changes: Any) -> Config:
    """Two edges whose gate lets everything through, with the letters of devices whose activations may travel."""
    edges = [tiny_edge("north", "shapes", travelling[0]), tiny_edge("south", "tastes", travelling[1])]
    gate = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 1e9}
    return tiny_config(**{"edges": edges, "absorb": {**gate, **absorb}, "cycles": 1, "wire": EXACT, **changes})


def tiers_of(config: Config, ledger: Frames | None = None) -> Tiers:
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    share = config.absorb.validation_share
    data = {name: mine.with_validation_split(share, name) for name, mine in tiny_data(config).items()}
    foundation, frames = tiny_foundation(initializer_range=WEIGHTS), ledger or Frames()
    tiers = build_tiers(config, foundation, shapes, data, PUBLIC_TEXT, silent, frames.another, NoPublishers())
    tiers.network.install()
    return tiers


class Gone(Exception):
    """The power is."""


class Reports:
    """Devices that say what a test wants of what is plugged in; ``of`` is asked for (right, loss) out of ten."""

    def __init__(self, tiers: Tiers, of: Any) -> None:
        self.asked: list[dict[str, str]] = []
        self._tiers = tiers
        self._of = of

    def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
        self.asked.append(dict(adapters))
        found = {}
        for domain, adapter in adapters.items():
            right, loss = self._of(domain, self._tiers.cloud.adapter(adapter)[1])
            found[domain] = EvaluationReport(10, right, 10, loss)
        return found

    def request_activations(self) -> tuple[str, ...]:
        return self._tiers.network.edges.request_activations()

    def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return self._tiers.network.edges.request_gradients(outputs)


def same(one: AdapterTensors, other: AdapterTensors) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


# -- the last mile -----------------------------------------------------------------------------------------------------


def naive_losses(model: PeftModel, example: Example) -> list[torch.Tensor]:
    """The loss of every token that should be written after the prompt, and of the end, one after the other."""
    prompt = tiny_tokenizer().encode(example.prompt)
    answer = [*tiny_tokenizer().encode(example.completion), EOS]
    return [
        -torch.log_softmax(model(torch.tensor([prompt + answer[:i]])).logits[0, -1], dim=-1)[token]
        for i, token in enumerate(answer)
    ]


def updates_of(tiers: Tiers, seed: int = 7) -> dict[str, AdapterUpdate]:
    """Return updates with adapters that have an effect."""
    generator = torch.Generator().manual_seed(seed)
    return {
        domain: AdapterUpdate(
            1,
            0,
            5,
            5,
            0.5,
            (),
            {
                key: torch.randn(tensor.shape, generator=generator) * 0.1
                for key, tensor in tiers.cloud.adapter(domain)[1].items()
            },
        )
        for domain in tiers.cloud.learning
    }


def merged_with(config: Config, ledger: Frames | None = None) -> tuple[Tiers, list[Verdict]]:
    """A network that has taken in ``updates_of``."""
    tiers = tiers_of(config, ledger)
    return tiers, tiers.cloud.absorb(updates_of(tiers), 0, tiers.network.edges)


def unsplit(spec: LoraSpec, tensors: AdapterTensors) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """The foundation model in one piece with an adapter, as peft has it; its parameters by our names."""
    model = cast(PeftModel, get_peft_model(tiny_foundation(initializer_range=WEIGHTS).model, spec.peft_config())).eval()
    parameters = {
        name.removeprefix("base_model.model.model.").replace(".default.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
    return model, parameters


@pytest.mark.parametrize("tail_layers", [0, 1])
def test_a_step_of_the_last_mile_is_that_of_the_unsplit_foundation_model(tail_layers: int) -> None:
    tune = {"local_epochs": 3, "batch_size": 64, "learning_rate": 0.01, "anchor_weight": 0.0}
    merge = {"method": ["sum"]}
    with_mile = {"merge": merge, "last_mile": {"epochs": 1, "learning_rate": 0.02}}
    changes: dict[str, Any] = {"fine_tune": tune, "tail_layers": tail_layers}
    short, _ = merged_with(config_of(absorb={"merge": merge}, **changes))
    config = config_of(absorb=with_mile, **changes)
    long, verdicts = merged_with(config)
    assert [v.adapter for v in verdicts] == ["shapes", "tastes", MERGED, MERGED]
    assert "after a last mile of 1 steps on 10 examples" in str(verdicts[-1])

    spec, start = short.cloud.adapter(MERGED)
    assert isinstance(spec, LoraSpec)
    model, parameters = unsplit(spec, start)
    data = tiny_data(config)
    losses = [loss for name in ("north-b", "south-b") for e in data[name].train for loss in naive_losses(model, e)]
    torch.stack(losses).mean().backward()
    gradients = {name: cast(torch.Tensor, parameter.grad).clone() for name, parameter in parameters.items()}
    clip_grad_norm_(parameters.values(), config.fine_tune.max_grad_norm)
    torch.optim.AdamW(parameters.values(), 0.02, weight_decay=0.0).step()
    _, found = long.cloud.adapter(MERGED)
    assert_same_step(found, {name: parameter.data for name, parameter in parameters.items()}, gradients)
    assert not same(found, start)


def test_what_domains_have_and_what_is_not_allowed_to_travel_stay_as_they_were() -> None:
    frames = Frames()
    tiers, _ = merged_with(config_of(("a", "c"), {"last_mile": {"epochs": 2}}), frames)
    for domain, update in updates_of(tiers).items():
        assert same(tiers.cloud.adapter(domain)[1], update.tensors)
    up = [m for kind, _, m in frames.messages() if kind == "edge_cloud" and isinstance(m, SmashedData)]
    assert sorted((m.owner, m.split) for m in up) == [("north-a", "train"), ("south-c", "train")]
    assert {m.owner for m in frames.of(LabelRequest)} == {"north-a", "south-c"}


def test_it_travels_once_while_cloud_and_edge_live() -> None:
    frames = Frames()
    tiers, _ = merged_with(config_of(absorb={"last_mile": {"epochs": 1}}), frames)
    tiers.cloud.absorb({}, 1, tiers.network.edges)
    up = [m for kind, _, m in frames.messages() if kind == "edge_cloud" and isinstance(m, SmashedData)]
    assert len(up) == 2


def test_an_edge_asks_no_device_whose_activations_stay_with_it() -> None:
    tiers = tiers_of(config_of(("b", ""), {"last_mile": {"epochs": 1}}))
    rows, one = torch.zeros(1, 32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(UnexpectedMessage, match="edge 'north' does not take a LabelRequest for 'north-a', whose"):
        tiers.edges["shapes"].handle(LabelRequest("north-a", 0, 1, one, rows))
    with pytest.raises(UnexpectedMessage, match="the cloud does not take a SmashedData here"):
        tiers.cloud.handle(SmashedData("north-a", "train", 1, one + 1, one + 1, rows))


def test_a_member_that_fails_is_named_and_the_others_go_on() -> None:
    tiers = tiers_of(config_of(absorb={"last_mile": {"epochs": 1}}))

    class Without(Reports):
        def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
            good = super().request_gradients({name: out for name, out in outputs.items() if name != "north-b"})
            return {**good, **({"north-b": LinkTimeout("north-b", "it is away")} if "north-b" in outputs else {})}

    verdict = tiers.cloud.absorb(updates_of(tiers), 0, Without(tiers, None))[-1]
    assert verdict.accepted
    assert "on 5 examples, without north-b: " in str(verdict) and "it is away" in str(verdict)


def test_where_nobody_is_left_the_merged_adapter_stays_as_it_was() -> None:
    class Nobody(Reports):
        def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
            return {name: LinkTimeout(name, "it is away") for name in outputs}

    class Empty(Reports):
        def request_activations(self) -> tuple[str, ...]:
            return ()

    merge = {"method": ["sum"]}
    short, _ = merged_with(config_of(absorb={"merge": merge}))
    for kind, said in ((Nobody, "the last mile has nobody left, without "), (Empty, "no device for the last mile")):
        tiers = tiers_of(config_of(absorb={"merge": merge, "last_mile": {"epochs": 1}}))
        verdict = tiers.cloud.absorb(updates_of(tiers), 0, kind(tiers, None))[-1]
        assert not verdict.accepted and said in str(verdict)
        assert same(tiers.cloud.adapter(MERGED)[1], short.cloud.adapter(MERGED)[1])


def test_an_edge_cannot_name_whom_it_sent_nothing_of() -> None:
    tiers = tiers_of(config_of(absorb={"last_mile": {"epochs": 1}}))
    with pytest.raises(OutOfBounds, match="devices whose activations came up of the edge of 'shapes': .*'north-a'"):
        tiers.cloud.check_reply("shapes", ShareRequest(), Shared(("north-a",)))


def test_it_is_pulled_toward_the_foundation_models_own_output() -> None:
    def moved(weight: float) -> float:
        """Return the shift of the suffix's output by the merged adapter, on text that the FM generated."""
        tune = {"local_epochs": 1, "batch_size": 4, "anchor_weight": weight, "anchor_every": 1, "max_grad_norm": 1e9}
        absorb = {"last_mile": {"epochs": 8, "learning_rate": 0.02}}
        tiers, _ = merged_with(config_of(absorb=absorb, fine_tune=tune))
        body = tiers.cloud._model.body
        inputs = Ragged(tiers.cloud.anchor_release.hidden_ND, tuple(tiers.cloud.anchor_release.lengths_E.tolist()))
        found = []
        for adapter in (None, MERGED):
            with body.active_adapter(adapter):
                found.append(inputs.map_batches(body.run_suffix, 8).later())
        return float((found[0] - found[1]).square().mean())

    assert moved(100.0) < 0.5 * moved(0.0)


def test_an_error_on_the_way_leaves_the_merged_adapter_as_it_was() -> None:
    merge = {"method": "sum"}
    start = merged_with(config_of(absorb={"merge": merge}))[0].cloud.adapter(MERGED)[1]
    absorb = {"merge": merge, "last_mile": {"epochs": 1, "learning_rate": 0.02}}
    tiers = tiers_of(config_of(absorb=absorb, fine_tune={"local_epochs": 1, "batch_size": 4}))
    steps = 0

    class Broken(Reports):
        def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
            nonlocal steps
            steps += 1
            if steps == 3:
                raise Gone
            return super().request_gradients(outputs)

    with pytest.raises(Gone):
        tiers.cloud.absorb(updates_of(tiers), 0, Broken(tiers, None))
    assert steps == 3 and same(tiers.cloud.adapter(MERGED)[1], start)
    again = tiers.cloud.absorb({}, 0, tiers.network.edges)
    assert all(verdict.accepted for verdict in again)


def test_nobody_switches_adapters_while_one_learns() -> None:
    tiers = tiers_of(config_of(absorb={"last_mile": {"epochs": 1}}))
    tiers.network.evaluate()
    refusals = []

    class Asking(Reports):
        def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
            with pytest.raises(
                UnexpectedMessage, match="on which an adapter learns, does not take a request"
            ) as caught:
                tiers.cloud.handle(BodyRequest("north-a", None))
            refusals.append(caught.value)
            return super().request_gradients(outputs)

    assert tiers.cloud.absorb(updates_of(tiers), 0, Asking(tiers, None))[-1].accepted
    assert refusals


def test_whose_activations_cannot_be_had_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tiers = tiers_of(config_of(absorb={"last_mile": {"epochs": 1}}))
    take = tiers.cloud.handle

    def refuse_one(message: Message) -> Message:
        if isinstance(message, SmashedData) and message.owner == "north-b":
            raise LinkTimeout("the cloud", "no answer")
        return take(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiers.cloud, "handle", refuse_one)
        verdict = tiers.cloud.absorb(updates_of(tiers), 0, tiers.network.edges)[-1]
    assert verdict.accepted and "on 5 examples" in str(verdict)
    assert "edge 'north' shares nothing of north-b with the cloud" in caplog.text


# -- what devices report -----------------------------------------------------------------------------------------------


def test_an_adapter_that_devices_do_worse_with_is_refused_and_what_was_there_stays() -> None:
    tiers = tiers_of(config_of(absorb={"validation_share": 0.2}))
    before = tiers.cloud.adapter("shapes")[1]
    updates = updates_of(tiers)

    def of(domain: str, plugged: AdapterTensors) -> tuple[int, float]:
        return (1 if domain == "shapes" and same(plugged, updates["shapes"].tensors) else 9), 1.0

    verdicts = tiers.cloud.absorb(updates, 0, Reports(tiers, of))
    assert [(v.adapter, v.accepted) for v in verdicts] == [("shapes", False), ("tastes", True), (MERGED, True)]
    said = "devices say 1 right of 10 of their validation examples, 9 with the one before"
    assert str(verdicts[0]) == f"refused 'shapes': {said}"
    assert same(tiers.cloud.adapter("shapes")[1], before)
    assert tiers.cloud.version("domain", "shapes") == 0 and tiers.cloud.version("domain", "tastes") == 1


def test_devices_speak_of_an_adapter_as_strong_as_it_is_plugged_in() -> None:
    free, _ = merged_with(config_of())
    costs = free.cloud.retention
    before = free.cloud._model.gate
    assert isinstance(before, PerplexityGate)
    limit = 0.7 * (max(costs["shapes"], costs["tastes"]) / before.perplexity_before - 1.0)
    absorb = {"validation_share": 0.2, "max_retention_increase": limit, "least_share": 0.01}
    tiers = tiers_of(config_of(absorb=absorb))
    seen: dict[str, AdapterTensors] = {}

    def of(domain: str, plugged: AdapterTensors) -> tuple[int, float]:
        seen[domain] = plugged
        return 5, 1.0

    verdicts = tiers.cloud.absorb(updates_of(tiers), 0, Reports(tiers, of))
    assert any(verdict.accepted and verdict.share < 1.0 for verdict in verdicts[:2])
    for verdict in verdicts[:2]:
        assert verdict.accepted and same(seen[verdict.adapter], tiers.cloud.adapter(verdict.adapter)[1])


def test_what_different_devices_say_decides_nothing() -> None:
    tiers = tiers_of(config_of(absorb={"validation_share": 0.2, "merge": {"method": ["sum", "ties"]}}))

    class Coming(Reports):
        def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
            found = super().collect_reports(adapters)
            num = 10 + len(self.asked)
            return {domain: EvaluationReport(num, one.num_correct, num, 1.0) for domain, one in found.items()}

    rights = iter((9, 9, 1, 1, 3, 3, 8, 8))
    verdicts = tiers.cloud.absorb(updates_of(tiers), 0, Coming(tiers, lambda domain, plugged: (next(rights), 1.0)))
    assert all(verdict.accepted for verdict in verdicts)
    assert "1 right of 12 of their validation examples, 9 of 11 with the one before, but of other examples" in str(
        verdicts[0]
    )
    whole, _ = merged_with(config_of(absorb={"merge": {"method": "sum"}}))
    assert same(tiers.cloud.adapter(MERGED)[1], whole.cloud.adapter(MERGED)[1])  # the first that is named


def strong(tiers: Tiers) -> None:
    """Domains' adapters that cost general ability, put in past the gate."""
    for domain, update in updates_of(tiers, seed=9).items():
        tiers.cloud._model.body.set_adapter(domain, {key: 3.0 * tensor for key, tensor in update.tensors.items()})


def test_a_way_to_merge_that_the_gate_refuses_is_not_taken_however_good() -> None:
    made, costs = {}, {}
    for way in ("sum", "ties"):
        tiers = tiers_of(config_of(absorb={"merge": {"method": way}}))
        strong(tiers)
        tiers.cloud.absorb({}, 0, tiers.network.edges)
        gate = tiers.cloud._model.gate
        assert isinstance(gate, PerplexityGate)
        made[way] = tiers.cloud.adapter(MERGED)[1]
        costs[way] = tiers.cloud.retention[MERGED] / gate.perplexity_before - 1.0
    cheap, dear = sorted(costs, key=lambda way: costs[way])
    limit = (costs[cheap] + costs[dear]) / 2
    assert 0.0 < costs[cheap] < limit < costs[dear]

    def of(domain: str, plugged: AdapterTensors) -> tuple[int, float]:
        return (9 if same(plugged, made[dear]) else 1), 1.0

    for ways in (["sum", "ties"], ["ties", "sum"]):
        strict = {"validation_share": 0.2, "max_retention_increase": limit, "least_share": 1.0}
        tiers = tiers_of(config_of(absorb={**strict, "merge": {"method": ways}}))
        strong(tiers)
        reports = Reports(tiers, of)
        (verdict,) = tiers.cloud.absorb({}, 0, reports)
        assert verdict.accepted and f"by {dear}" not in str(verdict) and len(reports.asked) == 1
        assert same(tiers.cloud.adapter(MERGED)[1], made[cheap])
    tiers = tiers_of(
        config_of(absorb={**strict, "max_retention_increase": costs[cheap] / 2, "merge": {"method": ways}})
    )
    start, retention = tiers.cloud.adapter(MERGED)[1], tiers.cloud.retention[MERGED]
    strong(tiers)
    reports = Reports(tiers, of)
    (verdict,) = tiers.cloud.absorb({}, 0, reports)
    assert not verdict.accepted and not reports.asked
    assert same(tiers.cloud.adapter(MERGED)[1], start) and tiers.cloud.retention[MERGED] == retention


def test_a_last_mile_that_other_devices_speak_of_stays() -> None:
    absorb = {"validation_share": 0.2, "merge": {"method": "sum"}, "last_mile": {"epochs": 1}}
    start = merged_with(config_of(absorb={"merge": {"method": "sum"}}))[0].cloud.adapter(MERGED)[1]
    tiers = tiers_of(config_of(absorb=absorb))

    class Leaving(Reports):
        def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
            found = super().collect_reports(adapters)
            num = 20 - len(self.asked)
            return {domain: EvaluationReport(num, one.num_correct, num, 1.0) for domain, one in found.items()}

    def of(domain: str, plugged: AdapterTensors) -> tuple[int, float]:
        return (9 if same(plugged, start) else 3), 1.0

    verdict = tiers.cloud.absorb(updates_of(tiers), 0, Leaving(tiers, of))[-1]
    assert verdict.accepted and "but of other examples, so nothing follows" in str(verdict)
    assert not same(tiers.cloud.adapter(MERGED)[1], start)


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_if_devices_cannot_be_asked_nothing_is_left_half_tried(failing: int) -> None:
    """Asked of the adapters before and after, of two ways to merge, and after the last mile."""
    absorb = {"validation_share": 0.2, "merge": {"method": ["sum", "ties"]}, "last_mile": {"epochs": 1}}
    tiers = tiers_of(config_of(absorb=absorb))
    cloud, start = tiers.cloud, {name: tiers.cloud.adapter(name)[1] for name in tiers.cloud.adapters}
    retention, updates = dict(cloud.retention), updates_of(tiers)

    class Failing(Reports):
        def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
            if len(self.asked) + 1 == failing:
                raise LinkTimeout("the edge of 'tastes'", "it is away")
            return super().collect_reports(adapters)

    with pytest.raises(LinkTimeout):
        cloud.absorb(updates, 0, Failing(tiers, lambda domain, plugged: (5, 1.0)))
    taken = failing > 2
    for domain, update in updates.items():
        assert same(cloud.adapter(domain)[1], update.tensors if taken else start[domain])
        assert cloud.version("domain", domain) == (1 if taken else 0)
        assert (cloud.retention[domain] == retention[domain]) is not taken
    if failing < 5:
        assert same(cloud.adapter(MERGED)[1], start[MERGED]) and cloud.retention[MERGED] == retention[MERGED]
    else:
        whole, _ = merged_with(config_of(absorb={"merge": {"method": "sum"}}))
        assert same(cloud.adapter(MERGED)[1], whole.cloud.adapter(MERGED)[1])


def test_of_several_ways_to_merge_devices_choose() -> None:
    methods = ["regression", "sum", "ties"]
    made = {}
    for method in methods:
        tiers, _ = merged_with(config_of(absorb={"merge": {"method": [method]}}))
        made[method] = tiers.cloud.adapter(MERGED)[1]
    for best in methods:
        tiers = tiers_of(config_of(absorb={"validation_share": 0.2, "merge": {"method": methods}}))
        updates = updates_of(tiers)

        def of(domain: str, plugged: AdapterTensors, best: str = best) -> tuple[int, float]:
            return 5, (0.5 if same(plugged, made[best]) else 1.0)

        verdict = tiers.cloud.absorb(updates, 0, Reports(tiers, of))[-1]
        assert same(tiers.cloud.adapter(MERGED)[1], made[best])
        assert all(f"50.0% right by {method}" in str(verdict) for method in methods)


@pytest.mark.parametrize(("short", "long", "stays"), [(7, 5, False), (5, 7, True)])
def test_a_last_mile_after_which_devices_do_worse_is_undone(short: int, long: int, stays: bool) -> None:
    merge = {"method": ["sum"]}
    start = merged_with(config_of(absorb={"merge": merge}))[0].cloud.adapter(MERGED)[1]
    tiers = tiers_of(config_of(absorb={"validation_share": 0.2, "merge": merge, "last_mile": {"epochs": 1}}))
    retention: list[float] = []

    def of(domain: str, plugged: AdapterTensors) -> tuple[int, float]:
        retention.append(tiers.cloud.retention[MERGED])
        return (short if same(plugged, start) else long), 1.0

    verdict = tiers.cloud.absorb(updates_of(tiers), 0, Reports(tiers, of))[-1]
    assert verdict.accepted is stays
    assert same(tiers.cloud.adapter(MERGED)[1], start) is not stays
    assert retention[-1] != retention[-3]  # of either domain, with the last mile and without
    assert tiers.cloud.retention[MERGED] == retention[-1 if stays else -3]


def test_devices_report_on_what_they_hold_back_and_no_example_travels() -> None:
    frames = Frames()
    config = config_of(absorb={"validation_share": 0.4, "merge": {"method": ["regression", "sum"]}})
    tiers, verdicts = merged_with(config, frames)
    share = config.absorb.validation_share
    for name, mine in tiny_data(config).items():
        held = mine.with_validation_split(share, name)
        assert len(held.validate) == 2 and len(held.train) == 3
        assert sorted(held.train + held.validate, key=repr) == sorted(mine.train, key=repr)
    asked = [m for m in frames.of(Evaluate) if m.split == "validate"]
    assert [m.adapter for m in asked] == ["shapes", "tastes"] * 2 + [MERGED] * 4
    assert all(f"of {2 * 3} of their validation examples" in str(verdict) for verdict in verdicts[:2])
    up = {type(m) for kind, way, m in frames.messages() if (kind, way) == ("edge_cloud", "up")}
    assert up <= {SmashedData, EvaluationReport, BodyRequest, Done, Installed, ModelRequest, AnchorRequest}
    rows = [m for kind, _, m in frames.messages() if kind == "edge_cloud" and isinstance(m, SmashedData)]
    assert {m.split for m in rows} == {"validate"} and len(rows) == 6


def test_one_device_whose_activations_the_cloud_does_not_take_is_scored_without() -> None:
    tiers = tiers_of(config_of())
    take = tiers.cloud.handle

    def refuse_one(message: Message) -> Message:
        if isinstance(message, SmashedData) and message.owner == "north-b":
            raise WireFormatError("rows that it does not like")
        return take(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiers.cloud, "handle", refuse_one)
        reports = tiers.network.evaluate().foundation
    assert (reports["shapes"].num_examples, reports["tastes"].num_examples) == (6, 9)


def test_training_examples_are_not_scored() -> None:
    tiers = tiers_of(config_of(("b", ""), {"last_mile": {"epochs": 1}}))
    asked = Evaluate("foundation", None, cast(Any, "train"))
    with pytest.raises(WireFormatError, match="Evaluate with wrong fields"):
        Codec(WireSettings()).decode(Codec(WireSettings()).encode(asked))
    frames = Frames()
    tiers = tiers_of(config_of(("b", ""), {"last_mile": {"epochs": 1}}), frames)
    with pytest.raises(UnexpectedMessage, match="edge 'north' does not take a Evaluate here"):
        tiers.edges["shapes"].handle(asked)
    assert not [m for kind, _, m in frames.messages() if kind == "edge_cloud" and isinstance(m, SmashedData)]


def test_who_is_asked_must_have_held_something_back() -> None:
    config = config_of(absorb={"validation_share": 0.2})
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    with pytest.raises(
        DataError, match="device 'north-a': has no validate examples; call DeviceData.with_validation_split"
    ):
        build_tiers(config, tiny_foundation(), shapes, tiny_data(config), PUBLIC_TEXT, silent, Frames, NoPublishers())


# -- before any work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("absorb", "found"),
    [
        ({"last_mile": {"epochs": 1}}, "absorb.last_mile needs a device with activations_to: cloud"),
        ({"merge": {"method": ["sum", "ties"]}}, "so set absorb.validation_share"),
        ({"merge": {"method": []}}, "absorb.merge.method must name one method"),
        ({"merge": {"method": ["sum", "sum"]}, "validation_share": 0.1}, "or several different ones"),
        ({"validation_share": 0.6}, "absorb.validation_share"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(absorb: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        config_of(("", ""), absorb)


def test_a_newcomer_has_nothing_that_could_travel() -> None:
    newcomer = {**tiny_edge("west", "forms", "a"), "follows": "shapes"}
    with pytest.raises(ConfigError, match="device 'west-a' has activations_to: cloud, but nothing to learn from"):
        tiny_config(edges=[tiny_edge("north", "shapes"), newcomer])


def test_an_example_cannot_be_learned_from_and_held_back() -> None:
    data = DeviceData((Example("Is it?", " yes"),), (Example("Is it not?", " no"),))
    with pytest.raises(DataError, match="device 'north-a': has one training example"):
        data.with_validation_split(0.1, "north-a")
    assert data.with_validation_split(0.0, "north-a") is data
