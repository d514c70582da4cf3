"""Hybrid federated split learning compared with training that is neither federated nor split.

The reference is a naive loop over the unsplit model with a peft adapter: one example after the other, one label token
after the other, no cache, no batch, no link.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from gaisnet.adapters.state import AdapterTensors, take_out
from gaisnet.adapters.tuning import LoraSpec, trainable
from gaisnet.config import Config, DevicePrecision
from gaisnet.data.examples import DeviceData, Example
from gaisnet.errors import GaisnetError, LinkTimeout
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyOutputGrad,
    Evaluate,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Message,
    ModelRelease,
    ModelRequest,
    SmashedData,
)
from gaisnet.models.ragged import shuffled_batches
from gaisnet.models.recipe import Recipe
from gaisnet.progress import silent
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.edge.edge import Edge
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, Outcome, RequestGradients
from gaisnet.tiers.split.trainable_body import TrainingResult
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink
from tests.frames import Frames
from tests.tiers.cohort import (
    ALL,
    EXAMPLES,
    FIRST_ADAPTED,
    WEIGHTS,
    Cohort,
    cohort_config,
    deal,
    model_release,
    random_adapter,
)
from tests.tiny import NUM_LAYERS, round_weights, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.numeric

CUTS = [((1,), 0), ((0,), 0), ((2,), 0), ((1, 2), 0), ((2, 0, 1), 0), ((1,), 1), ((2, 1), 2)]
EOS = 257

# -- the unsplit model -------------------------------------------------------------------------------------------------


def unsplit(
    spec: LoraSpec, tensors: AdapterTensors, precision: DevicePrecision = "float32", outer: Iterable[int] = ()
) -> PeftModel:
    """Return the foundation model with an adapter, made by peft; the devices' parts are rounded."""
    foundation = round_weights(tiny_model(initializer_range=WEIGHTS), outer, precision)
    model = cast(PeftModel, get_peft_model(foundation, spec.peft_config()))
    model.eval()
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(tensors[name])
    return model


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return adapter parameters by GaisNet's names."""
    return {
        name.removeprefix("base_model.model.model.").replace(".default.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def naive_losses(model: PeftModel, example: Example) -> list[Tensor]:
    """Return the losses of all completion tokens and of the end."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.encode(example.prompt)
    answer = [*tokenizer.encode(example.completion), EOS]
    losses = []
    for position, token in enumerate(answer):
        logits_V = model(torch.tensor([prompt + answer[:position]])).logits[0, -1]
        losses.append(-torch.log_softmax(logits_V, dim=-1)[token])
    return losses


def naive_step(model: PeftModel, examples: Sequence[Example], config: Config) -> tuple[float, dict[str, Tensor]]:
    """Run one AdamW step on the mean loss per label token. Return the sum of losses and the unclipped gradients."""
    parameters = adapter_parameters(model)
    settings = config.fine_tune
    optimizer = torch.optim.AdamW(parameters.values(), settings.learning_rate, weight_decay=settings.weight_decay)
    losses = [loss for example in examples for loss in naive_losses(model, example)]
    total = torch.stack(losses).sum()
    (total / len(losses)).backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    optimizer.step()
    return total.item(), gradients


def assert_same(found: AdapterTensors, expected: AdapterTensors, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs()
        assert bool((error <= tolerance + 1e-5 * tensor.abs()).all()), f"{name}: off by {error.max():.2e}"


def assert_same_step(found: AdapterTensors, expected: AdapterTensors, gradients: Mapping[str, Tensor]) -> None:
    """AdamW's first step divides a gradient by its size plus 1e-8, so rounding shows in small gradients."""
    settled = {name: gradient.abs() > 1e-6 for name, gradient in gradients.items()}
    assert all(bool(mask.any()) for mask in settled.values())
    assert_same({n: found[n][m] for n, m in settled.items()}, {n: expected[n][m] for n, m in settled.items()})
    assert_same(found, expected, 1e-3)


def gradients(cohort: Cohort, members: Sequence[Member], batch: Sequence[int]) -> tuple[float, AdapterTensors]:
    """Return loss and gradients of one split step."""
    parameters = trainable(cohort.body, "domain")
    for parameter in parameters:
        parameter.grad = None
    loss, _, _ = cohort.domain.backward_step(members, batch, 0, cohort.labels, "here")
    names = cohort.domain.copy_adapter("domain").keys()
    return loss, {n: p.grad.clone() for n, p in zip(names, parameters, strict=True) if p.grad is not None}


def learn(
    cohort: Cohort, members: Sequence[Member], seed: int = 1, labels: RequestGradients | None = None
) -> TrainingResult:
    return cohort.domain.train_adapter(
        members, labels or cohort.labels, TrainingSchedule(cohort.config.fine_tune, seed, "here"), silent
    )


# -- (a), (d): split equals unsplit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "tail_layers", "precision"),
    [
        *((*cut, "float32") for cut in CUTS),
        *((heads, tail, p) for p in ("int8", "int4") for heads, tail in [((1,), 0), ((2, 2), 0), ((1, 1), 2)]),
    ],
)
def test_a_split_step_is_that_of_the_unsplit_model(
    heads: tuple[int, ...], tail_layers: int, precision: DevicePrecision
) -> None:
    cohort = Cohort(cohort_config(heads, tail_layers, device_precision=precision))
    before = cohort.domain.copy_adapter("domain")
    outer = (*range(heads[0]), *range(NUM_LAYERS - tail_layers, NUM_LAYERS))
    model = unsplit(cohort.layout.domain_spec(), before, precision, outer)
    expected_loss, expected = naive_step(model, EXAMPLES, cohort.config)
    members = cohort.members()

    loss, found = gradients(cohort, members, cohort.everything())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values())
    assert_same(found, expected)

    learned = learn(cohort, members)
    num_tokens = sum(len(example.completion) + 1 for example in EXAMPLES)
    assert (learned.num_examples, learned.num_steps) == (len(EXAMPLES), 1)
    assert learned.loss == pytest.approx(expected_loss / num_tokens, rel=1e-5)
    after = cohort.domain.copy_adapter("domain")
    assert_same_step(after, {name: p.detach() for name, p in adapter_parameters(model).items()}, expected)
    assert all((after[name] - before[name]).abs().max() > 1e-3 for name in after)


@pytest.mark.parametrize("changes", [{"weight_decay": 0.5}, {"max_grad_norm": 0.01}])
def test_the_optimizers_settings_are_obeyed(changes: dict[str, float]) -> None:
    plain = cohort_config((1, 2))
    config = plain.model_copy(update={"fine_tune": plain.fine_tune.model_copy(update=changes)})
    results = []
    for one in (plain, config):
        cohort = Cohort(one)
        model = unsplit(cohort.layout.domain_spec(), cohort.domain.copy_adapter("domain"))
        naive_step(model, EXAMPLES, one)
        learn(cohort, cohort.members())
        results.append(cohort.domain.copy_adapter("domain"))
        # Clipped to so little, a gradient is not large beside AdamW's epsilon, so its rounding shows.
        assert_same(results[-1], {n: p.detach() for n, p in adapter_parameters(model).items()}, 1e-4)
    assert any((results[0][name] - results[1][name]).abs().max() > 1e-5 for name in results[0])


@pytest.mark.parametrize("batch", [[4], [3, 1, 0]])
def test_a_part_of_the_examples_is_a_batch_too(batch: list[int]) -> None:
    cohort = Cohort(cohort_config((1, 2)))
    model = unsplit(cohort.layout.domain_spec(), cohort.domain.copy_adapter("domain"))
    expected_loss, expected = naive_step(model, [EXAMPLES[i] for i in batch], cohort.config)
    loss, found = gradients(cohort, cohort.members(), batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same(found, expected)


def test_a_prompt_longer_than_the_context_loses_its_beginning() -> None:
    config = cohort_config((1,), model={"foundation": "tiny", "context": 12})
    long, short = "what is more, is water wet?", "r wet?"
    completion = " it is"  # six tokens: six are left for the prompt
    cohort = Cohort(config, (Example(long, completion),))
    model = unsplit(cohort.layout.domain_spec(), cohort.domain.copy_adapter("domain"))
    expected_loss, _ = naive_step(model, (Example(short, completion),), config)
    assert gradients(cohort, cohort.members(), [0])[0] == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("recipe", [Recipe(ALL, (2,)), Recipe((0, 1, 3, 4, 5), ()), Recipe((0, 1, 3, 4, 5), (1,))])
def test_a_domain_model_made_smaller_learns_as_it_would_in_one_piece(recipe: Recipe) -> None:
    """Transformers has no such models, so the reference is one device with all examples."""
    changes: dict[str, Any] = {"domain": {"precision": "int8", "keep_layers": list(recipe.kept)}}
    one, many = (
        Cohort(cohort_config((1,), **changes), recipe=recipe),
        Cohort(cohort_config((1, 1), **changes), recipe=recipe),
    )
    expected_loss, expected = gradients(one, one.members(), one.everything())
    loss, found = gradients(many, many.members(), many.everything())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same(found, expected)


# -- (b): the cache ----------------------------------------------------------------------------------------------------


def with_relay(cohort: Cohort, seed: int = 8) -> None:
    """Add a random relay to the frozen prefix, so that cached activations differ from the foundation model's."""
    shapes = {k: torch.empty(t.shape) for k, t in relay_tensors(cohort).items()}
    cohort.domain.install_adapter(AdapterRelease("relay", 1, random_adapter(shapes, seed)))


def relay_tensors(cohort: Cohort) -> AdapterTensors:
    return take_out(cohort.body, "relay")


@pytest.mark.parametrize("cooldown", [0.0, 2 / 3])
def test_learning_from_the_cache_is_learning_with_a_fresh_prefix_in_every_step(cooldown: float) -> None:
    changes: dict[str, Any] = {
        "fine_tune": {"local_epochs": 3, "batch_size": 2, "learning_rate": 0.002, "cooldown": cooldown},
        "relay": {"enabled": True, "rank": 2},
        "domain": {"precision": "int8"},
    }
    config = cohort_config((1, 0), **changes)
    cached, fresh = Cohort(config, recipe=Recipe(ALL, (1, 2))), Cohort(config, recipe=Recipe(ALL, (1, 2)))
    with_relay(cached)
    with_relay(fresh)
    learned = learn(cached, cached.members(), seed=4)

    settings, generator = config.fine_tune, torch.Generator().manual_seed(4)
    parameters = trainable(fresh.body, "domain")
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    lengths = [n for member in fresh.members() for n in member.inputs.hidden.lengths]
    num_steps = 0
    losses: list[tuple[float, int]] = []
    for _ in range(settings.passes_in_round):
        losses = []
        for batch in shuffled_batches(lengths, settings.batch_size, generator):
            optimizer.zero_grad()
            if cooldown:  # nine steps, six of which cool down
                optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (9 - num_steps) / 6)
            # Heads and prefix run again.
            loss, tokens, _ = fresh.domain.backward_step(fresh.members(), batch, num_steps, fresh.labels, "here")
            losses.append((loss, tokens))
            clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            num_steps += 1
    assert num_steps == learned.num_steps == 9
    assert learned.loss == pytest.approx(sum(loss for loss, _ in losses) / sum(count for _, count in losses), rel=1e-5)
    assert_same(cached.domain.copy_adapter("domain"), fresh.domain.copy_adapter("domain"))


def test_the_prefix_starts_from_wherever_a_device_stopped() -> None:
    cohort = Cohort(cohort_config((0, 1, 2)), EXAMPLES[:1] * 3)
    prefixed = [member.inputs for member in cohort.members()]
    assert {inputs.next_layer for inputs in prefixed} == {FIRST_ADAPTED}
    for inputs in prefixed[1:]:
        torch.testing.assert_close(inputs.hidden.rows_ND, prefixed[0].hidden.rows_ND, atol=1e-5, rtol=1e-5)


def test_the_prefix_of_a_batch_is_that_of_each_example() -> None:
    cohort = Cohort(cohort_config((1,)))
    whole = cohort.member(0).inputs.hidden
    smashed = Activations.from_smashed(cohort.smashed(0), *cohort.domain.placement())
    for sequence, expected in zip(smashed.hidden.sequences(), whole.sequences(), strict=True):
        alone = cohort.body.run(sequence[None], 1, FIRST_ADAPTED)[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


def test_a_guest_is_another_model_and_leaves_its_host_as_it_was() -> None:
    changes: dict[str, Any] = {"relay": {"enabled": True, "rank": 2}, "domain": {"precision": "int8"}}
    host, other = (Cohort(cohort_config((1,), **changes), recipe=Recipe(ALL, (1, 2))) for _ in range(2))
    with_relay(host, 8)
    guests = {role: random_adapter(tensors, 21) for role, (_, tensors) in host.domain.served_adapters().items()}
    for role, tensors in guests.items():
        other.domain.install_adapter(AdapterRelease(role, 3, tensors))

    def rows_of(cohort: Cohort) -> Tensor:
        inputs = Activations.from_smashed(cohort.smashed(0), *cohort.domain.placement())
        return cohort.domain.compute_output_rows(cohort.domain.run_prefix(inputs))

    before, versions, own_ND = host.domain.served_adapters(), dict(host.domain.versions), rows_of(host)
    with host.domain.guest_adapters(guests["relay"], guests["domain"]):
        assert torch.equal(rows_of(host), rows_of(other))
        assert not torch.allclose(rows_of(host), own_ND, atol=1e-3)
    assert torch.equal(rows_of(host), own_ND) and host.domain.versions == versions
    for role, (_, tensors) in host.domain.served_adapters().items():
        assert all(torch.equal(tensor, before[role][1][name]) for name, tensor in tensors.items())


def test_learning_leaves_the_cache_and_everything_frozen() -> None:
    cohort = Cohort(cohort_config((1, 2), relay={"enabled": True, "rank": 2}))
    members = cohort.members()
    caches = [member.inputs.hidden.rows_ND.clone() for member in members]
    before = {name: tensor.clone() for name, tensor in cohort.body.state_dict().items()}
    learn(cohort, members)
    assert all(torch.equal(m.inputs.hidden.rows_ND, cache) for m, cache in zip(members, caches, strict=True))
    changed = {name for name, tensor in cohort.body.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(cohort.domain.copy_adapter("domain"))
    assert all("lora_" in name and "domain" in name for name in changed)
    assert not any(p.requires_grad for p in cohort.body.parameters())


# -- (c): batches over devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "tail_layers"), [((1, 1), 0), ((2, 1, 0), 0), ((1, 1, 1, 1, 1), 0), ((1, 2), 1)])
def test_a_batch_over_devices_is_the_same_rows_held_by_one(heads: tuple[int, ...], tail_layers: int) -> None:
    one, many = Cohort(cohort_config((1,), tail_layers)), Cohort(cohort_config(heads, tail_layers))
    for batch in (one.everything(), [4, 0, 2], [3]):
        expected_loss, expected = gradients(one, one.members(), batch)
        loss, found = gradients(many, many.members(), batch)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_same(found, expected)


def test_epochs_over_devices_are_epochs_over_one() -> None:
    changes: dict[str, Any] = {"fine_tune": {"local_epochs": 3, "batch_size": 2, "learning_rate": 0.002}}
    one, many = Cohort(cohort_config((1,), **changes)), Cohort(cohort_config((1, 1), **changes))
    first, second = learn(one, one.members()), learn(many, many.members())
    assert replace(second, loss=0.0) == replace(first, loss=0.0) == TrainingResult(5, 9, 0.0)
    assert second.loss == pytest.approx(first.loss, rel=1e-4)
    assert_same(many.domain.copy_adapter("domain"), one.domain.copy_adapter("domain"), 1e-4)


def test_epochs_are_repeated_by_their_seed() -> None:
    def learned(seed: int) -> AdapterTensors:
        cohort = Cohort(cohort_config((1, 2), fine_tune={"local_epochs": 2, "batch_size": 2}))
        learn(cohort, cohort.members(), seed)
        return cohort.domain.copy_adapter("domain")

    first, again, other = learned(1), learned(1), learned(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# -- (e): what travels -------------------------------------------------------------------------------------------------


def test_only_labelled_positions_travel_to_the_tail() -> None:
    cohort = Cohort(cohort_config((1, 2)))
    learn(cohort, cohort.members())
    outputs = cohort.ledger.of(BodyOutput)
    replies = cohort.ledger.of(BodyOutputGrad)
    held = [EXAMPLES[:2], EXAMPLES[2:]]  # as the cohort deals them
    assert len(outputs) == len(replies) == 2
    for output, reply, examples in zip(outputs, replies, held, strict=True):
        num_labels = sum(len(examples[i].completion) + 1 for i in output.examples_E.tolist())
        assert output.rows_ND.shape == reply.grad_ND.shape == (num_labels, 32)
        assert output.num_labels_total == sum(len(example.completion) + 1 for example in EXAMPLES)


def test_with_layers_in_the_tail_every_position_travels() -> None:
    cohort = Cohort(cohort_config((1,), tail_layers=1))
    learn(cohort, cohort.members())
    (output,) = cohort.ledger.of(BodyOutput)
    assert len(output.rows_ND) == sum(len(example.prompt + example.completion) for example in EXAMPLES)


def test_smashed_data_has_a_row_for_every_token_but_the_last() -> None:
    cohort = Cohort(cohort_config((1,)))
    smashed = cohort.smashed(0)
    assert smashed.owner == "device-0" and smashed.next_layer == 1
    assert smashed.lengths_E.tolist() == [len(e.prompt + e.completion) for e in EXAMPLES]
    assert smashed.num_labels_E.tolist() == [len(e.completion) + 1 for e in EXAMPLES]


def traces(ids: Sequence[int]) -> list[bytes]:
    """Return encodings of token ids that a frame could contain."""
    numbers = torch.tensor(ids)
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float16)
    written = [numbers.to(kind).numpy().tobytes() for kind in kinds]
    return [*written, str(list(ids)).encode(), ",".join(map(str, ids)).encode()]


def test_no_label_is_in_a_message() -> None:
    secret = Example("What is the word?", " supercalifragilistic")
    cohort = Cohort(cohort_config((1,)), (secret, *EXAMPLES[:2]))
    learn(cohort, cohort.members())
    label_ids = tiny_tokenizer().encode(secret.completion)
    assert len(cohort.ledger.frames) >= 6
    for _, _, frame in cohort.ledger.frames:
        assert b"supercalifragilistic" not in frame
        assert not any(trace in frame for trace in traces(label_ids))
    planted = BodyOutput("train", 0, 1, torch.tensor(label_ids, dtype=torch.int32), torch.zeros(1, 4))
    assert any(trace in Codec(cohort.config.wire).encode(planted) for trace in traces(label_ids))


# -- the anchor --------------------------------------------------------------------------------------------------------


def test_the_anchor_adds_the_gradient_of_its_pull() -> None:
    weight = 0.7
    changes = {"local_epochs": 1, "batch_size": 64, "learning_rate": 0.01, "max_grad_norm": 1e9}
    anchor = {"anchor_weight": weight, "anchor_batch_size": 2, "anchor_every": 1}
    config = cohort_config((1,), fine_tune={**changes, **anchor})
    cohort = Cohort(config)
    text_T = torch.randint(256, (7,), generator=torch.Generator().manual_seed(3))
    model = unsplit(cohort.layout.domain_spec(), cohort.domain.copy_adapter("domain"))
    layers = cast(PreTrainedModel, model.get_base_model()).get_decoder().layers
    seen: dict[str, Tensor] = {}
    layers[FIRST_ADAPTED].register_forward_pre_hook(lambda _, inputs: seen.update(into=inputs[0]))
    layers[-1].register_forward_hook(lambda _, inputs, output: seen.update(out=output))
    with torch.no_grad(), model.disable_adapter():
        model(text_T[None])
    entering, target = seen["into"][0], seen["out"][0]
    cohort.domain.set_anchor(AnchorRelease(torch.tensor([7], dtype=torch.int32), entering))

    model(text_T[None])
    errors = [((seen["out"][0, t] - target[t]).norm() / target[t].norm()) ** 2 for t in range(1, 7)]
    (weight * torch.stack(errors).mean()).backward()
    naive_step(model, EXAMPLES, config)  # its gradients add to those of the pull
    learn(cohort, cohort.members())
    assert_same(cohort.domain.copy_adapter("domain"), {n: p.detach() for n, p in adapter_parameters(model).items()})


def anchored(**changes: object) -> AdapterTensors:
    """Return the adapter after two passes of one step each with an anchor loss."""
    settings = {"local_epochs": 2, "batch_size": 64, "learning_rate": 0.01, "anchor_weight": 0.7, **changes}
    cohort = Cohort(cohort_config((1,), fine_tune=settings))
    entering = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    cohort.domain.set_anchor(AnchorRelease(torch.tensor([7], dtype=torch.int32), entering))
    learn(cohort, cohort.members())
    return cohort.domain.copy_adapter("domain")


def differ(one: AdapterTensors, other: AdapterTensors) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_a_step_pulls_when_it_is_its_turn() -> None:
    never = anchored(anchor_weight=0.0)
    assert not differ(anchored(anchor_every=3), never)  # there are two steps
    seldom, always = anchored(anchor_every=2), anchored(anchor_every=1)
    assert differ(seldom, never) and differ(seldom, always)


def test_an_anchor_without_weight_changes_nothing() -> None:
    results = []
    for anchored in (True, False):
        cohort = Cohort(cohort_config((1, 2)))
        if anchored:
            cohort.domain.set_anchor(AnchorRelease(torch.tensor([3], dtype=torch.int32), torch.randn(3, 32)))
        learn(cohort, cohort.members())
        results.append(cohort.domain.copy_adapter("domain"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# -- (f): hybrid and federated -----------------------------------------------------------------------------------------

PRIVATE = {
    "split-a": EXAMPLES[:2],
    "split-b": EXAMPLES[2:3],
    "local-a": (Example("Is the moon made of cheese?", " no"), Example("Is grass green?", " yes")),
    "local-b": EXAMPLES[3:],
}


def hybrid_config(names: Sequence[str], edge_rounds: int = 1) -> Config:
    heads = {"split-a": 2, "split-b": 1, "local-a": 1, "local-b": 1}
    devices = [{"name": n, "mode": n.partition("-")[0], "head_layers": heads[n]} for n in names]
    return cohort_config(
        (),
        edges=[{"name": "edge", "domain": "facts", "devices": devices}],
        fine_tune={"edge_rounds": edge_rounds, "local_epochs": 2, "batch_size": 2, "learning_rate": 0.002},
    )


@dataclass
class Releases:
    """A cloud that only sends the model and its anchor."""

    model: ModelRelease
    peer = "here"

    def send(self, message: Message) -> Future[Message]:
        answer: Future[Message] = Future()
        assert isinstance(message, ModelRequest | AnchorRequest)
        anchor = AnchorRelease(torch.tensor([3], dtype=torch.int32), torch.randn(3, 32))
        answer.set_result(self.model if isinstance(message, ModelRequest) else anchor)
        return answer


def hybrid_edge(config: Config, ledger: Ledger | None = None) -> tuple[Edge, AdapterTensors]:
    """Return an installed edge with its devices, and its initial domain adapter."""
    codec = Codec(config.wire)
    links = {
        one.name: LocalLink(
            Device(one, config, tiny_tokenizer(), DeviceData(PRIVATE[one.name], PRIVATE[one.name])),
            codec,
            ledger or Ledger(),
            "device_edge",
            "down",
        )
        for _, one in config.each_device()
    }
    release = model_release(config, Recipe(ALL, ()))
    edge = Edge(config.edges[0], config, Releases(release), links, Ledger())
    assert edge.handle(Install("run", "digest")) == Installed(0, -1)
    start = random_adapter(Cohort(cohort_config((1,))).domain.copy_adapter("domain"), seed=5)
    edge.handle(AdapterRelease("domain", 3, start))
    return edge, start


def fine_tuned(edge: Edge, cycle: int = 0) -> AdapterUpdate:
    update = edge.handle(FineTune(cycle))
    assert isinstance(update, AdapterUpdate)
    return update


def learned_alone(
    config: Config, names: Sequence[str], start: AdapterTensors, seed: int, edge_round: int = 0
) -> tuple[AdapterTensors, TrainingResult]:
    """Train an adapter on devices together, without an edge."""
    examples = [example for name in names for example in PRIVATE[name]]
    cohort = Cohort(cohort_config([1], fine_tune=config.fine_tune.model_dump()), examples)
    cohort.domain.set_adapter("domain", start)
    learned = cohort.domain.train_adapter(
        cohort.members(), cohort.labels, TrainingSchedule(config.fine_tune, seed, "here", edge_round), silent
    )
    return cohort.domain.copy_adapter("domain"), learned


def with_settings(config: Config, **fine_tune: Any) -> Config:
    return config.model_copy(update={"fine_tune": config.fine_tune.model_copy(update=fine_tune)})


@pytest.mark.parametrize("names", [("split-a", "split-b", "local-a", "local-b"), ("local-a", "split-a")])
@pytest.mark.parametrize("edge_rounds", [1, 2])
@pytest.mark.parametrize("local_devices", ["parallel", "sequential"])
def test_parties_that_learn_in_parallel_are_averaged_by_their_examples(
    names: tuple[str, ...], edge_rounds: int, local_devices: str
) -> None:
    """In sequence, local devices continue from the split cohort's adapter, and only they are averaged."""
    config = with_settings(hybrid_config(names, edge_rounds), local_devices=local_devices)
    edge, adapter = hybrid_edge(config)
    update = fine_tuned(edge, cycle=4)
    local, split = [name for name in names if name.startswith("local")], [n for n in names if n.startswith("split")]
    learned: list[tuple[AdapterTensors, TrainingResult]] = []
    for edge_round in range(edge_rounds):
        cohort = learned_alone(config, split, adapter, config.seed_for("fine_tune", "edge", 4, edge_round))
        begun = adapter if local_devices == "parallel" else cohort[0]
        learned = [
            learned_alone(config, (name,), begun, config.seed_for("fine_tune", name, 4, edge_round)) for name in local
        ]
        averaged = [*learned, cohort] if local_devices == "parallel" else learned
        num_examples = sum(one.num_examples for _, one in averaged)
        adapter = {
            key: sum((tensors[key] * (one.num_examples / num_examples) for tensors, one in averaged), torch.tensor(0.0))
            for key in adapter
        }
        learned.append(cohort)
    assert_same(update.tensors, adapter, 1e-4)
    assert (update.version, update.base) == (5, 3)
    assert update.num_examples == sum(len(PRIVATE[name]) for name in names)
    weighted = sum(one.loss * one.num_examples for _, one in learned) / update.num_examples
    assert update.loss == pytest.approx(weighted, rel=1e-4)


def test_parties_take_turns_in_parts_of_a_pass() -> None:
    names, cohort = ("split-a", "split-b", "local-a"), ("split-a", "split-b")
    turns = {"local_devices": "sequential", "local_epochs": 0.5, "edge_rounds": 4, "batch_size": 1}
    config = with_settings(hybrid_config(names), **turns)
    edge, adapter = hybrid_edge(config)
    update, num_steps = fine_tuned(edge, cycle=4), 0
    for passes, part in product(range(2), range(2)):
        for party, members in (("edge", cohort), ("local-a", ("local-a",))):
            seed = config.seed_for("fine_tune", party, 4, passes)
            adapter, learned = learned_alone(config, members, adapter, seed, 2 * passes + part)
            num_steps += learned.num_steps
    assert_same(update.tensors, adapter, 1e-4)
    assert update.num_steps == num_steps == 2 * (3 + 2)


def test_all_steps_of_all_rounds_are_counted() -> None:
    steps = [fine_tuned(hybrid_edge(hybrid_config(tuple(PRIVATE), rounds))[0]).num_steps for rounds in (1, 2)]
    # Two epochs each: 2 batches of the split cohort's 3 examples, 1 of each local device's 2.
    assert steps == [2 * (2 + 1 + 1), 2 * 2 * (2 + 1 + 1)]


@pytest.mark.parametrize("names", [("local-a",), ("split-a",)])
@pytest.mark.parametrize("changes", [{}, {"local_devices": "sequential"}])
def test_one_party_alone_is_not_averaged(names: tuple[str, ...], changes: dict[str, Any]) -> None:
    config = with_settings(hybrid_config(names), **changes)
    edge, start = hybrid_edge(config)
    owner = names[0] if names[0].startswith("local") else "edge"
    expected, _ = learned_alone(config, names, start, config.seed_for("fine_tune", owner, 0, 0))
    assert_same(fine_tuned(edge).tensors, expected, 1e-4)


def test_a_local_device_sends_nothing_of_its_training_examples() -> None:
    ledger = Frames()
    config = hybrid_config(("local-a", "split-a"))
    edge, _ = hybrid_edge(config, ledger)
    fine_tuned(edge)
    assert {(s.owner, s.split) for s in ledger.of(SmashedData)} == {("split-a", "train")}
    edge.handle(Evaluate("domain", None))
    assert {(s.owner, s.split) for s in ledger.of(SmashedData)} == {
        *(("split-a", "train"), ("split-a", "test"), ("local-a", "test"))
    }


def test_smashed_data_is_asked_for_once() -> None:
    ledger = Frames()
    edge, _ = hybrid_edge(hybrid_config(("split-a", "split-b"), edge_rounds=2), ledger)
    for cycle in range(2):
        fine_tuned(edge, cycle)
        edge.handle(Evaluate("domain", None))
    assert len(ledger.of(SmashedData)) == 4


def test_a_new_relay_makes_every_cache_stale() -> None:
    raw = hybrid_config(("split-a", "local-a")).model_dump()
    config = tiny_config(**{**raw, "relay": {"enabled": True, "rank": 2}})
    probe = Cohort(cohort_config((1, 2), relay={"enabled": True, "rank": 2}))
    relays = [random_adapter(relay_tensors(probe), seed) for seed in (1, 2)]

    def run(*versions: int) -> tuple[AdapterTensors, EvaluationReport]:
        edge, start = hybrid_edge(config)
        update = report = None
        for version in versions:
            edge.handle(AdapterRelease("relay", version, relays[version]))
            edge.handle(AdapterRelease("domain", 0, start))
            update, report = fine_tuned(edge), edge.handle(Evaluate("domain", None))
        assert update is not None and isinstance(report, EvaluationReport)
        return update.tensors, report

    fresh, again, other = run(1), run(0, 1), run(0)
    assert_same(again[0], fresh[0], 1e-6)
    assert again[1].loss_sum == pytest.approx(fresh[1].loss_sum, rel=1e-5)
    assert other[1].loss_sum != pytest.approx(fresh[1].loss_sum, rel=1e-3)


# -- evaluation --------------------------------------------------------------------------------------------------------


LARGE = {"rank": 8, "alpha": 16, "first_layer": FIRST_ADAPTED}  # an adapter that can learn five answers by heart


@pytest.mark.parametrize(
    ("heads", "tail_layers", "epochs", "about"),
    [((2, 0), 0, 1, {0}), ((2, 0), 0, 20, {2, 3, 4}), ((1, 2), 1, 20, {2, 3, 4})],
)
def test_scores_are_those_of_greedy_decoding_with_the_unsplit_model(
    heads: tuple[int, ...], tail_layers: int, epochs: int, about: set[int]
) -> None:
    cohort = Cohort(
        cohort_config(
            heads,
            tail_layers,
            adapters=LARGE,
            fine_tune={"local_epochs": epochs, "learning_rate": 0.005, "batch_size": 2},
        )
    )
    learn(cohort, cohort.members())
    model = unsplit(cohort.layout.domain_spec(), cohort.domain.copy_adapter("domain"))
    report = EvaluationReport(0, 0, 0, 0.0)
    for number, link in enumerate(cohort.links):
        inputs = cohort.domain.run_prefix(
            Activations.from_smashed(cohort.smashed(number, "test"), *cohort.domain.placement())
        )
        examples_E = torch.arange(len(inputs), dtype=torch.int32)
        rows_ND = cohort.domain.compute_output_rows(inputs)
        part = link.send(BodyOutput("test", 0, sum(inputs.num_labels), examples_E, rows_ND)).result()
        assert isinstance(part, EvaluationReport)
        report += part
    with torch.no_grad():
        losses = [loss.item() for example in EXAMPLES for loss in naive_losses(model, example)]
    assert (report.num_examples, report.num_tokens) == (len(EXAMPLES), len(losses))
    assert report.loss_sum == pytest.approx(sum(losses), rel=1e-4)
    assert report.num_correct == sum(answers_right(model, example) for example in EXAMPLES)
    assert report.num_correct in about


def answers_right(model: PeftModel, example: Example) -> bool:
    """Return whether greedy decoding after the prompt writes the completion and stops."""
    ids = tiny_tokenizer().encode(example.prompt)
    answer = tiny_tokenizer().encode(example.completion)
    written = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
    )
    return bool(written[0, len(ids) :].tolist() == [*answer, EOS])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def spoilt(cohort: Cohort, name: str, change: Any) -> RequestGradients:
    """A device whose replies are changed."""

    def labels(outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return {owner: change(reply) if owner == name else reply for owner, reply in cohort.labels(outputs).items()}

    return labels


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(odd: float) -> None:
    cohort = Cohort(cohort_config((1,), fine_tune={"batch_size": 2}))
    labels = spoilt(cohort, "device-0", lambda reply: replace(reply, loss_sum=odd) if reply.step == 2 else reply)
    learned = learn(cohort, cohort.members(), labels=labels)
    assert learned.num_examples == 0
    assert re.match(f"the training loss at here, step 2 is {odd}.*is on disk", str(learned.excluded["device-0"]))


def test_a_loss_that_is_not_finite_comes_through_the_link() -> None:
    cohort = Cohort(cohort_config((1, 2)))
    spoilt_adapter = {k: torch.full_like(t, 1e30) for k, t in cohort.domain.copy_adapter("domain").items()}
    cohort.domain.set_adapter("domain", spoilt_adapter)
    learned = learn(cohort, cohort.members())
    assert learned.excluded.keys() == {"device-0", "device-1"}
    assert all("the training loss at here, step 0 is nan" in str(error) for error in learned.excluded.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: replace(reply, grad_ND=reply.grad_ND[:1]),
        lambda reply: replace(reply, grad_ND=reply.grad_ND[0]),
        lambda reply: replace(reply, grad_ND=reply.grad_ND[:, :1]),
        lambda reply: replace(reply, grad_ND=reply.grad_ND[:-1]),
        lambda reply: replace(reply, grad_ND=torch.zeros(0, 32)),
        lambda reply: replace(reply, grad_ND=reply.grad_ND * float("nan")),
        lambda reply: replace(reply, step=reply.step + 1),
        lambda _: LinkTimeout("device", "away"),
    ],
    ids=["one row", "a vector", "one column", "a row less", "nothing", "not a number", "another step", "away"],
)
def test_a_member_that_answers_badly_is_left_out_and_the_others_learn_as_without_it(change: Any) -> None:
    cohort, without = Cohort(cohort_config((1, 1))), Cohort(cohort_config((1, 1)))
    learned = learn(cohort, cohort.members(), labels=spoilt(cohort, "device-1", change))
    assert learned.excluded.keys() == {"device-1"} and isinstance(learned.excluded["device-1"], GaisnetError)
    expected = learn(without, [without.member(0)])
    assert learned.num_examples == expected.num_examples == len(deal(EXAMPLES, 2)[0])
    assert learned.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_same(cohort.domain.copy_adapter("domain"), without.domain.copy_adapter("domain"), 1e-4)


def test_a_member_that_leaves_later_is_asked_no_more() -> None:
    cohort = Cohort(cohort_config((1, 1), fine_tune={"local_epochs": 3, "batch_size": 1, "learning_rate": 0.001}))
    asked: list[str] = []

    def labels(outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        asked.extend(outputs)
        gone = {name: LinkTimeout(name, "away") for name in outputs if name == "device-1" and len(asked) > 2}
        return {**cohort.labels(outputs), **gone}

    learned = learn(cohort, cohort.members(), labels=labels)
    assert learned.excluded.keys() == {"device-1"}
    assert asked.count("device-0") == 3 * len(deal(EXAMPLES, 2)[0])
    assert sum(name == "device-1" for name in asked[2:]) == 1
