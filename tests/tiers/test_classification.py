"""Split training of classifiers: an edge's domain model of a ViT or BERT, and devices with labels.

The reference is the unsplit model with an independently built adapter, on all examples as one batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from gaisnet.adapters.full import FullSpec
from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import LoraSpec, parameters_of, trainable
from gaisnet.config import Config, FaultSettings
from gaisnet.errors import ConfigError, CutError, LinkTimeout, ModelError, WireFormatError
from gaisnet.messages import BodyOutput, Message, ModelRelease, SmashedData
from gaisnet.models.encoders import EncoderBody, EncoderHead, cut_encoder
from gaisnet.models.families import ENCODERS, VIT, Encoder
from gaisnet.models.parts import CutLayers
from gaisnet.models.ragged import Ragged, by_length
from gaisnet.models.release import ReleasedEncoder, release_encoder, restrict
from gaisnet.progress import silent
from gaisnet.tiers.device.classification import compute_class_gradient, evaluate_class_output
from gaisnet.tiers.edge.activation_store import ActivationStore
from gaisnet.tiers.split.activations import Activations, select_tail_rows
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, Outcome
from gaisnet.transport.codec import Codec
from tests.tiers.cohort import ONE_STEP, cohort_config
from tests.tiny import NUM_LAYERS, tiny_config, tiny_encoder, tiny_inputs
from tests.unsplit import UNSEEN, Whole, assert_same_step, unsplit

pytestmark = pytest.mark.numeric

NUM_CLASSES = 4
CLASSES = torch.tensor([3, 0, 1, 2, 0, 3, 1])
LENGTHS = (3, 9, 6, 1, 6, 4, 12)
CUTS = [(1,), (0, 2), (2, 0, 1)]
KINDS = ["lora", "prompts", "full"]


def class_config(heads: Sequence[int], kind: str = "lora", **changes: Any) -> Config:
    adapters = {"kind": kind, "rank": 2, "alpha": 6, "num_prompts": 4, "first_layer": 3}
    devices = [{"name": f"device-{i}", "head_layers": head} for i, head in enumerate(heads)]
    edges = [{"name": "edge", "domain": "facts", "labels": ["a", "b", "c", "d"], "devices": devices}]
    return cohort_config(heads, adapters=adapters, **{"edges": edges, **changes})


def inputs_of(family: str) -> list[Tensor]:
    """Return an image [3, 12, 8], or a text of a different length, per example."""
    if family == "vit":
        return list(tiny_inputs("vit", len(CLASSES)))
    return [tiny_inputs("bert", 1, n, seed)[0] for seed, n in enumerate(LENGTHS)]


@dataclass
class Site:
    """A device: its head, its examples and their classes."""

    name: str
    head: EncoderHead
    inputs: list[Tensor]
    classes: Tensor

    def smashed(self) -> SmashedData:
        with torch.no_grad():
            rows = [self.head(one[None])[0] for one in self.inputs]
        lengths_E = torch.tensor([len(each) for each in rows], dtype=torch.int32)
        num_labels_E = torch.ones_like(lengths_E)
        return SmashedData(self.name, "train", len(self.head.stack.indices), lengths_E, num_labels_E, torch.cat(rows))


class ClassCohort:
    """Devices, and an edge's domain model with a random adapter; messages between them are coded as on a link."""

    def __init__(self, family: str, config: Config) -> None:
        self.config = config
        self.codec = Codec(config.wire)
        self.layout = Layout(config, NUM_LAYERS, ENCODERS[family])
        encoder = Encoder(tiny_encoder(family))
        _, whole_body = cut_encoder(encoder, CutLayers(self.layout.first_cut))
        self.release: ModelRelease = self.sent(release_encoder(encoder, whole_body, (), self.layout.last_cut))
        self.body = ReleasedEncoder(self.release).body(self.layout.first_cut)
        self.domain = DomainModel(self.body, self.layout, num_classes=NUM_CLASSES)
        self.domain.set_adapter("domain", random_adapter(self.domain.copy_adapter("domain")))
        inputs, heads = inputs_of(family), [device.head_layers for _, device in config.each_device()]
        bounds = [len(inputs) * i // len(heads) for i in range(len(heads) + 1)]
        self.sites = [
            Site(f"device-{i}", self.head(head), inputs[a:b], CLASSES[a:b])
            for i, (head, a, b) in enumerate(zip(heads, bounds, bounds[1:], strict=False))
        ]

    def head(self, num_layers: int) -> EncoderHead:
        """Build a device's head from its own release."""
        mine = restrict(self.release, range(num_layers))
        return ReleasedEncoder(self.sent(mine)).head(CutLayers(num_layers))

    def sent(self, message: Message) -> Any:
        return self.codec.decode(self.codec.encode(message))

    def members(self) -> list[Member]:
        found = []
        for site in self.sites:
            smashed = Activations.from_smashed(self.sent(site.smashed()), *self.domain.placement())
            found.append(Member(site.name, self.domain.run_prefix(smashed)))
        return found

    def labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        classes = {site.name: site.classes for site in self.sites}
        return {
            name: self.sent(compute_class_gradient(self.sent(output), classes[name]))
            for name, output in outputs.items()
        }


def random_adapter(like: AdapterTensors) -> AdapterTensors:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, tensor in like.items():
        noise = torch.randn(tensor.shape, generator=generator)
        added = ".prompts." in name or name.startswith("classifier.")
        found[name] = noise * 0.5 if added else noise * 0.1 if ".lora_" in name else tensor + noise * 0.05
    return found


def one_piece(family: str, cohort: ClassCohort) -> tuple[Whole, Tensor]:
    """Return the unsplit model with the cohort's adapter, and its logits of all examples."""
    spec = cohort.layout.class_spec(NUM_CLASSES)
    whole = unsplit(tiny_encoder(family), spec, cohort.domain.copy_adapter("domain"))
    inputs = inputs_of(family)
    if family == "vit":
        return whole, whole[0](torch.stack(inputs))
    mask_BT = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True)
    return whole, whole[0](pad_sequence(inputs, batch_first=True), mask_BT)


# -- split equals unsplit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(ENCODERS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", CUTS, ids=str)
def test_a_split_step_is_that_of_the_unsplit_model(family: str, kind: str, heads: tuple[int, ...]) -> None:
    cohort = ClassCohort(family, class_config(heads, kind))
    before = cohort.domain.copy_adapter("domain")
    (_, expected), logits_EC = one_piece(family, cohort)
    loss = F.cross_entropy(logits_EC, CLASSES)
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in expected.items()}
    members, every = cohort.members(), list(range(len(CLASSES)))

    trainable(cohort.body, "domain")
    loss_sum, num_labels, failed = cohort.domain.backward_step(members, every, 0, cohort.labels, "here")
    assert (num_labels, failed) == (len(CLASSES), {})
    assert loss_sum == pytest.approx(loss.item() * len(CLASSES), rel=1e-5)
    for name, parameter in parameters_of(cohort.body, "domain").items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)

    learned = cohort.domain.train_adapter(
        members, cohort.labels, TrainingSchedule(cohort.config.fine_tune, 1, "here"), silent
    )
    assert (learned.num_examples, learned.num_steps) == (len(CLASSES), 1)
    assert learned.loss == pytest.approx(loss.item(), rel=1e-5)
    settings = cohort.config.fine_tune
    clip_grad_norm_(expected.values(), settings.max_grad_norm)
    torch.optim.AdamW(expected.values(), settings.learning_rate, weight_decay=settings.weight_decay).step()
    after = cohort.domain.copy_adapter("domain")
    assert_same_step(after, {name: p.detach() for name, p in expected.items()}, gradients)
    assert all((after[name] - before[name]).abs().max() > 1e-3 for name in after if not name.endswith(UNSEEN))


@pytest.mark.parametrize("family", sorted(ENCODERS))
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_unsplit_model(family: str, kind: str) -> None:
    cohort = ClassCohort(family, class_config((2, 1), kind))
    _, logits_EC = one_piece(family, cohort)
    expected = F.cross_entropy(logits_EC, CLASSES, reduction="sum").item()
    rows, reports = [], []
    for site, member in zip(cohort.sites, cohort.members(), strict=True):
        rows.append(cohort.domain.compute_output_rows(member.inputs))
        which_E = torch.arange(len(site.inputs), dtype=torch.int32)
        reports.append(evaluate_class_output(BodyOutput("test", 0, len(which_E), which_E, rows[-1]), site.classes))
    torch.testing.assert_close(torch.cat(rows), logits_EC, atol=1e-5, rtol=1e-4)
    report = reports[0] + reports[1]
    assert report.num_correct == int((logits_EC.argmax(-1) == CLASSES).sum())
    assert (report.num_examples, report.num_tokens) == (7, 7)
    assert report.loss_sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_logits_go_to_the_owners(kind: str) -> None:
    cohort = ClassCohort("vit", class_config((1, 1), kind))
    seen: dict[str, BodyOutput] = {}

    def labels(outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        seen.update(outputs)
        return cohort.labels(outputs)

    trainable(cohort.body, "domain")
    cohort.domain.backward_step(cohort.members(), [0, 2, 5], 3, labels, "here")
    assert {name: tuple(output.rows_ND.shape) for name, output in seen.items()} == {
        "device-0": (2, NUM_CLASSES),
        "device-1": (1, NUM_CLASSES),
    }
    assert {name: output.examples_E.tolist() for name, output in seen.items()} == {"device-0": [0, 2], "device-1": [2]}


def test_learning_makes_the_classes_known() -> None:
    changes = {"fine_tune": {**ONE_STEP, "local_epochs": 30, "batch_size": 4}}
    cohort = ClassCohort("vit", class_config((1, 2), "prompts", **changes))
    learned = cohort.domain.train_adapter(
        cohort.members(), cohort.labels, TrainingSchedule(cohort.config.fine_tune, 1, "here"), silent
    )
    assert learned.loss < 0.1


def test_a_member_that_is_away_is_left_out_and_the_others_learn_as_without_it() -> None:
    cohort, without = (ClassCohort("bert", class_config((1, 1))) for _ in range(2))

    def labels(outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return {**cohort.labels(outputs), "device-1": LinkTimeout("device-1", "away")}

    settings = cohort.config.fine_tune
    learned = cohort.domain.train_adapter(cohort.members(), labels, TrainingSchedule(settings, 1, "here"), silent)
    alone = without.domain.train_adapter(
        without.members()[:1], without.labels, TrainingSchedule(settings, 1, "here"), silent
    )
    assert learned.excluded.keys() == {"device-1"} and learned.loss == pytest.approx(alone.loss, rel=1e-5)
    found = cohort.domain.copy_adapter("domain")
    for name, tensor in without.domain.copy_adapter("domain").items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_nothing_of_an_encoder_is_served() -> None:
    assert ClassCohort("vit", class_config((1,))).domain.served_adapters() == {}


# -- what it stands on -------------------------------------------------------------------------------------------------


def test_an_encoders_label_rows_are_its_first() -> None:
    assert select_tail_rows([4, 3], [1, 1], "first") == [range(0, 1), range(4, 5)]
    assert select_tail_rows([4, 3], [2, 1], "last") == [range(2, 4), range(6, 7)]
    assert select_tail_rows([4, 3], [2, 1], "every") == [range(0, 4), range(4, 7)]


def test_what_is_not_causal_sees_no_padding() -> None:
    lengths = (3, 2, 3, 1, 3, 2)
    assert by_length(lengths, 2, equal=True) == [[3], [1, 5], [0, 2], [4]]
    rows = Ragged(torch.randn(sum(lengths), 2), lengths)
    means = rows.map_batches(lambda h: h.mean(1, keepdim=True).expand_as(h), 4, causal=False)
    for found, sequence in zip(means.sequences(), rows.sequences(), strict=True):
        torch.testing.assert_close(found, sequence.mean(0).expand_as(sequence))


def test_the_families_own_modules_are_adapted_unless_the_user_names_others() -> None:
    for family in ENCODERS.values():
        spec = Layout(class_config((1,)), NUM_LAYERS, family).class_spec(3)
        assert spec == LoraSpec(2, 6, family.targets, (3, 4, 5), 3)
    named = class_config((1,)).model_dump() | {"adapters": {"first_layer": 4, "targets": ["fc1"]}}
    spec = Layout(tiny_config(**named), NUM_LAYERS, VIT).class_spec(3)
    assert isinstance(spec, LoraSpec) and spec.targets == ("fc1",)
    assert Layout(class_config((1,), "prompts"), NUM_LAYERS, VIT).class_spec(3) == PromptSpec(4, (3, 4, 5), 3)
    assert Layout(class_config((1,), "full"), NUM_LAYERS, VIT).class_spec(3) == FullSpec((3, 4, 5), 3)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_what_an_encoder_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(CutError, match="tail_layers is 1 but the model is an encoder.*use 0"):
        Layout(cohort_config((1,), tail_layers=1), NUM_LAYERS, VIT)
    with pytest.raises(ConfigError, match="relay.enabled: is true, but the model is an encoder.*set it to false"):
        Layout(cohort_config((1,), relay={"enabled": True}), NUM_LAYERS, VIT)
    for kind in ("prompts", "full"):
        with pytest.raises(ConfigError, match=f"adapters.kind: is '{kind}', but the model is a decoder; use 'lora'"):
            Layout(class_config((1,), kind), NUM_LAYERS)


def test_a_body_of_another_family_is_refused() -> None:
    config = class_config((1,))
    body: EncoderBody = cut_encoder(Encoder(tiny_encoder("vit")), CutLayers(1))[1]
    with pytest.raises(ModelError, match="'vit': its body is laid out as another family's"):
        DomainModel(body, Layout(config, NUM_LAYERS), num_classes=3)


@pytest.mark.parametrize(
    ("examples", "shape", "found"),
    [
        ([0, 3], (2, 4), "a device with 3 examples does not have"),
        ([-1], (1, 4), "a device with 3 examples does not have"),
        ([], (0, 4), "a device with 3 examples does not have"),
        ([0, 1], (3, 4), "3 rows of logits for 2 examples"),
        ([0, 1], (2, 2), "logits of 2 classes where a label has number 2"),
    ],
)
def test_logits_that_do_not_fit_are_refused(examples: list[int], shape: tuple[int, int], found: str) -> None:
    output = BodyOutput("train", 0, 2, torch.tensor(examples, dtype=torch.int32), torch.zeros(shape))
    for ask in (compute_class_gradient, evaluate_class_output):
        with pytest.raises(WireFormatError, match=found):
            ask(output, torch.tensor([0, 2, 1]))


def test_a_loss_by_hand() -> None:
    output = BodyOutput("train", 7, 4, torch.tensor([1], dtype=torch.int32), torch.zeros(1, 2))
    reply = compute_class_gradient(output, torch.tensor([1, 0]))
    assert reply.step == 7 and reply.loss_sum == pytest.approx(0.6931472)
    torch.testing.assert_close(reply.grad_ND, torch.tensor([[-0.125, 0.125]]))


@pytest.mark.parametrize("classifies", [True, False])
def test_an_example_that_is_classified_has_one_label(classifies: bool) -> None:
    """A device that claims more would take the others' share of a step."""
    settings = tiny_config().edges[0]
    lengths_E, labels_E = torch.tensor([3], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    sent = SmashedData("north-a", "train", 1, lengths_E, labels_E, torch.ones(3, 8))

    class Asked:
        def ask_devices(self, *_: object) -> dict[str, SmashedData]:
            return {"north-a": sent}

    store = ActivationStore(settings, FaultSettings(), cast(Any, Asked()))
    store.reset_for_run(8, classifies, max_positions=3)
    failed = store.fetch_activations(["north-a"], "train")
    assert failed.keys() == ({"north-a"} if classifies else set())
    assert all(
        "the labels of an example of device 'north-a': 2, where a number from 1 to 1" in str(error)
        for error in failed.values()
    )
