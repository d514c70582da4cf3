"""Whole runs on encoders, in one process: ViT on images and BERT on texts, every domain with its own classes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.state import save_adapter
from gaisnet.checkpoint import FolderStore
from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.examples import DeviceData, Example, Input, Labelled
from gaisnet.engines.local import NoPublishers, build_network, build_tiers
from gaisnet.errors import ConfigError, DataError, SessionRefused
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import (
    AdapterUpdate,
    AnchorRelease,
    BodyOutput,
    BodyOutputGrad,
    Evaluate,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    ModelRelease,
    SmashedData,
)
from gaisnet.models.families import BERT, ENCODERS, VIT
from gaisnet.models.foundation import Foundation
from gaisnet.network import Network, Scores
from gaisnet.progress import silent
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.edge.edge import Edge
from gaisnet.tiers.split.inputs import EncoderInputs
from gaisnet.tiers.split.layout import Layout, with_family_defaults
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink
from tests.frames import Frames
from tests.tiny import (
    NUM_LAYERS,
    SHAPES,
    TASTES,
    encoder_data,
    encoder_raw_config,
    tiny_bert_tokenizer,
    tiny_encoder,
    tiny_encoder_foundation,
    tiny_foundation,
    tiny_inputs,
)
from tests.unsplit import with_prompts

pytestmark = [pytest.mark.integration, pytest.mark.numeric]

FAMILIES, KINDS = sorted(ENCODERS), ["lora", "prompts"]
CLASSES = {"shapes": SHAPES, "tastes": TASTES}
EXACT = {"smashed": "float32", "body_output": "float32", "gradient": "float32"}
PUBLIC: dict[str, Sequence[Input]] = {
    "vit": list(tiny_inputs("vit", 6, seed=99)),
    "bert": ["a first text", "and another one, longer", "short", "of some length"],
}


def encoder_config(kind: str = "lora", **changes: Any) -> Config:
    return parse_config(encoder_raw_config(kind, **changes))


@dataclass
class Run:
    """A network with what its verbs gave, cycle after cycle; entry 0 of ``scores`` is before the first."""

    family: str
    config: Config
    data: Mapping[str, DeviceData[Any]] | None = None
    public: Sequence[Input] = ()
    foundation: Foundation | None = None
    ledger: Frames = field(default_factory=Frames)
    scores: list[Scores] = field(default_factory=list)
    updates: list[dict[str, AdapterUpdate]] = field(default_factory=list)
    verdicts: list[list[Verdict]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = self.data or encoder_data(self.config, self.family)
        shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in self.config.edges}
        self.network: Network = build_network(
            self.config,
            self.foundation or tiny_encoder_foundation(self.family),
            shapes,
            self.data,
            "",
            new_ledger=self.ledger.another,
            public_inputs=self.public,
        )

    def go(self) -> "Run":
        self.network.install()
        self.scores.append(self.network.evaluate())
        for _ in range(self.config.cycles):
            assert self.network.release() == {}
            self.updates.append(self.network.fine_tune())
            self.verdicts.append(self.network.absorb())
            self.scores.append(self.network.evaluate())
        return self


@pytest.fixture(scope="module", params=[(family, kind) for family in FAMILIES for kind in KINDS], ids="-".join)
def finished(request: pytest.FixtureRequest) -> Run:
    """A whole run, for all who only look."""
    family, kind = request.param
    return Run(family, encoder_config(kind, wire=EXACT), public=PUBLIC[family]).go()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_the_late_layers_go_through_the_three_verbs(family: str) -> None:
    run = Run(family, encoder_config("full", wire=EXACT)).go()
    for domain in CLASSES:
        first, *_, last = (scores.domain[domain] for scores in run.scores)
        assert last.loss_sum < 0.95 * first.loss_sum
        assert run.scores[-1].foundation[domain].num_correct == last.num_correct
        tensors = run.network.cloud.adapter(domain)[1]
        assert len(tensors) == 16 * (NUM_LAYERS - run.config.adapters.first_layer) + 2
    assert run.updates[-1].keys() == CLASSES.keys()


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_learning_makes_all_models_better(finished: Run) -> None:
    assert len(finished.scores) == 3
    for domain in CLASSES:
        for scores in ([s.domain for s in finished.scores], [s.foundation for s in finished.scores]):
            first, _, last = (each[domain] for each in scores)
            assert (first.num_examples, first.num_tokens) == (3 * 4, 3 * 4)
            assert last.loss_sum < 0.95 * first.loss_sum
            assert last.num_correct > first.num_correct
    losses = [{domain: update.loss for domain, update in cycle.items()} for cycle in finished.updates]
    assert all(losses[1][domain] < losses[0][domain] for domain in CLASSES)


def test_a_domain_model_that_is_the_foundation_model_scores_as_it_does(finished: Run) -> None:
    for scores in finished.scores:
        for domain, report in scores.domain.items():
            assert report.loss_sum == pytest.approx(scores.foundation[domain].loss_sum, rel=1e-5)


def test_there_is_no_merged_adapter(finished: Run) -> None:
    assert finished.network.cloud.adapters == ("shapes", "tastes")
    assert all(scores.merged == {} for scores in finished.scores)
    assert all([verdict.adapter for verdict in verdicts] == ["shapes", "tastes"] for verdicts in finished.verdicts)


def test_every_device_took_part_and_every_domain_has_its_classes(finished: Run) -> None:
    for update in finished.updates[-1].values():
        assert (update.num_examples, update.faults) == (3 * 6, ())
    for domain, labels in CLASSES.items():
        _, tensors = finished.network.cloud.adapter(domain)
        assert tensors["classifier.weight"].shape == (len(labels), 32)
        assert all(torch.equal(tensors[key], t) for key, t in finished.updates[-1][domain].tensors.items())


def test_the_gate_says_what_it_looked_at(finished: Run) -> None:
    for verdict in finished.verdicts[-1]:
        drift = finished.network.cloud.retention[verdict.adapter]
        assert verdict.accepted and 0.0 < drift
        expected = f"its shape and numbers fit; it moves the features of public inputs by {drift:.1%} of their length"
        assert str(verdict) == f"accepted '{verdict.adapter}': {expected}"


def saved(run: Run, domain: str, folder: Path) -> Any:
    """Logits of the model in one piece with the adapter that a run has saved, as others load it."""
    spec, tensors = run.network.cloud.adapter(domain)
    save_adapter(folder, spec, tensors, "tiny", ENCODERS[run.family].layers_path)
    model = tiny_encoder(run.family, num_classes=len(CLASSES[domain]))
    if isinstance(spec, PromptSpec):
        return with_prompts(model, load_file(folder / "prompts.safetensors"))[0]
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    return lambda inputs: adapted(inputs).logits


def as_model_input(example: Labelled) -> Tensor:
    if isinstance(example.input, str):
        return torch.tensor([tiny_bert_tokenizer()(example.input)["input_ids"]])
    return example.input[None]


def test_scores_through_the_split_are_those_of_the_unsplit_model_with_the_saved_adapter(
    finished: Run, tmp_path: Path
) -> None:
    for edge in finished.config.edges:
        logits = saved(finished, edge.domain, tmp_path / edge.domain)
        assert finished.data is not None
        loss, correct = 0.0, 0
        for example in (example for device in edge.devices for example in finished.data[device.name].test):
            label = torch.tensor([edge.labels.index(example.label)])
            with torch.no_grad():
                found_1C = logits(as_model_input(example))
            loss, correct = loss + F.cross_entropy(found_1C, label).item(), correct + int(found_1C.argmax() == label)
        report = finished.scores[-1].foundation[edge.domain]
        assert report.loss_sum == pytest.approx(loss, rel=1e-4)
        assert report.num_correct == correct


def drift_by_hand(run: Run, domain: str) -> float:
    """Return the last layer's [CLS] rows behind norm or pooler, computed without our parts."""
    _, tensors = run.network.cloud.adapter(domain)
    family = ENCODERS[run.family]
    seen: list[Tensor] = []

    def features(model: Any, plain: Any) -> list[Tensor]:
        ending = plain.base_model.get_submodule(family.ending)
        handle = ending.register_forward_hook(lambda _m, _a, out: seen.append(out[:, 0] if out.ndim == 3 else out))
        seen.clear()
        with torch.no_grad():
            for each in run.public:
                model(as_model_input(Labelled(each, "")))
        handle.remove()
        return list(seen)

    plain = tiny_encoder(run.family, num_classes=len(CLASSES[domain]))
    alone = features(plain, plain)
    prompted = with_prompts(plain, tensors)[0]
    moved = features(prompted, plain)
    return sum(float((m - a).norm() / a.norm()) for m, a in zip(moved, alone, strict=True)) / len(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_what_the_unsplit_model_shows(family: str) -> None:
    run = Run(family, encoder_config("prompts", cycles=1, wire=EXACT), public=PUBLIC[family])
    for domain, drift in run.network.cloud.retention.items():  # prompts are seen from the beginning
        assert drift == pytest.approx(drift_by_hand(run, domain), rel=1e-3) and drift > 0.0


def test_without_public_inputs_nothing_is_measured_and_the_gate_says_so() -> None:
    run = Run("vit", encoder_config(cycles=1)).go()
    assert run.network.cloud.retention == {}
    found = "its shape and numbers were looked at, and nothing else: the cloud has no public inputs"
    assert [str(verdict) for verdict in run.verdicts[0]] == [f"accepted '{name}': {found}" for name in CLASSES]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_is_calibrated_on_public_inputs(family: str) -> None:
    config = encoder_config(domain={"precision": "int8", "keep_layers": 5}, cycles=1)
    run = Run(family, config, public=PUBLIC[family]).go()
    (release, *_) = run.ledger.of(ModelRelease)
    assert len(release.layers) == 5 and len(release.int8_layers) == 1 and set(release.int8_layers) < {2, 3}
    for domain in CLASSES:
        assert run.scores[-1].domain[domain].loss_sum < run.scores[0].domain[domain].loss_sum
        assert run.scores[-1].foundation[domain].loss_sum < run.scores[0].foundation[domain].loss_sum


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_devices_may_hold_their_layers_in_few_bits(precision: str) -> None:
    run = Run("bert", encoder_config(cycles=1, device_precision=precision)).go()
    assert all(run.scores[1].domain[d].loss_sum < run.scores[0].domain[d].loss_sum for d in CLASSES)


def test_products_of_adapters_may_be_averaged() -> None:
    tune = {"local_epochs": 4, "batch_size": 4, "learning_rate": 0.01, "average": "products"}
    for kind in KINDS:
        run = Run("vit", encoder_config(kind, cycles=1, fine_tune=tune)).go()
        assert all(run.scores[1].domain[d].loss_sum < run.scores[0].domain[d].loss_sum for d in CLASSES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("public", [True, False])
def test_an_adapter_that_devices_do_worse_with_is_taken_out(kind: str, public: bool) -> None:
    absorb = {"validation_share": 0.4, "max_fall": 0.0}
    config = encoder_config(kind, cycles=1, wire=EXACT, absorb=absorb)
    data = {name: mine.with_validation_split(0.4, name) for name, mine in encoder_data(config, "vit").items()}
    run = Run("vit", config, data, PUBLIC["vit"] if public else ())
    network, cloud = run.network, run.network.cloud
    network.install()
    updates = network.fine_tune()
    before, retention = {d: cloud.adapter(d)[1] for d in CLASSES}, dict(cloud.retention)
    asked: list[dict[str, str]] = []

    class Say:
        """Return devices' scores: in one domain all examples were right before, and none is afterwards."""

        def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
            asked.append(dict(adapters))
            found = network.edges.collect_reports(adapters)
            right = {d: r.num_examples if len(asked) == 1 else 0 for d, r in found.items() if d == "shapes"}
            return {d: replace(r, num_correct=right.get(d, r.num_correct)) for d, r in found.items()}

    verdicts = {v.adapter: v for v in cloud.absorb(updates, 0, cast(Any, Say()))}
    assert asked == [{d: d for d in CLASSES}] * 2
    assert not verdicts["shapes"].accepted and "devices say 0 right of" in str(verdicts["shapes"])
    assert all(torch.equal(tensor, before["shapes"][key]) for key, tensor in cloud.adapter("shapes")[1].items())
    assert cloud.version("domain", "shapes") == 0 and cloud.retention.get("shapes") == retention.get("shapes")
    for domain in CLASSES.keys() - {"shapes"}:
        assert cloud.version("domain", domain) == int(verdicts[domain].accepted)


def test_an_edge_without_data_starts_with_what_another_has_learned() -> None:
    raw = encoder_raw_config(cycles=1)
    raw["edges"][1] |= {"follows": "shapes", "labels": SHAPES}
    run = Run("vit", parse_config(raw)).go()
    assert run.scores[1].domain["tastes"].loss_sum < run.scores[0].domain["tastes"].loss_sum
    assert run.network.cloud.adapters == ("shapes",)
    assert all(scores.foundation.keys() == {"shapes"} for scores in run.scores)


# -- what comes up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("shape", "expected 'classifier.weight' of shape (3, 32), found (4, 32)"),
        ("nan", "expected finite numbers in 'classifier.weight', found NaN or infinity"),
        ("lacks", "different from 'classifier.weight' on"),
        ("stale", "expected one grown out of version 0, found version 7"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_was_in_place_stays(how: str, found: str) -> None:
    network = Run("vit", encoder_config()).network
    cloud = network.cloud
    _, tensors = cloud.adapter("shapes")
    learned = {key: tensor + 1.0 for key, tensor in tensors.items()}
    update = AdapterUpdate(1, 7 if how == "stale" else 0, 5, 5, 0.5, (), learned)
    if how == "shape":
        learned["classifier.weight"] = torch.zeros(4, 32)
    elif how == "nan":
        learned["classifier.weight"][0, 0] = torch.nan
    elif how == "lacks":
        del learned["classifier.weight"]
    (verdict,) = cloud.absorb({"shapes": update}, 0, network.edges)
    assert not verdict.accepted and found in str(verdict)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in cloud.adapter("shapes")[1].items())
    assert cloud.version("domain", "shapes") == 0


def test_features_that_are_not_finite_are_refused() -> None:
    network = Run("vit", encoder_config(), public=PUBLIC["vit"]).network
    cloud = network.cloud
    _, tensors = cloud.adapter("shapes")
    huge = {key: torch.full_like(tensor, 3e38) for key, tensor in tensors.items()}
    (verdict,) = cloud.absorb({"shapes": AdapterUpdate(1, 0, 5, 5, 0.5, (), huge)}, 0, network.edges)
    assert str(verdict) == "refused 'shapes': it makes features that are not finite of public inputs"
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in cloud.adapter("shapes")[1].items())


def test_an_edge_that_restarts_goes_on_from_its_shelf(tmp_path: Path) -> None:
    config = with_family_defaults(encoder_config("prompts", edges=changed(0)[:1], cycles=1), BERT)
    codec, data, cloud = Codec(config.wire), encoder_data(config, "bert"), Run("bert", config).network.cloud
    devices = {
        one.name: Device(one, config, tiny_bert_tokenizer(), data[one.name], labels=edge.labels)
        for edge, one in config.each_device()
    }

    def edge() -> Edge:
        to_cloud = LocalLink(cloud, codec, Ledger(), "edge_cloud", "up")
        links = {name: LocalLink(one, codec, Ledger(), "device_edge", "down") for name, one in devices.items()}
        return Edge(config.edges[0], config, to_cloud, links, Ledger(), FolderStore(tmp_path))

    first = edge()
    assert first.handle(Install("run", cloud.model_digest)) == Installed(0, -1)
    first.handle(cloud.adapter_release("domain", "shapes"))
    update, report = first.handle(FineTune(0)), first.handle(Evaluate("domain", None))
    again = edge()
    assert again.handle(Install("run", cloud.model_digest)) == Installed(0, 1)
    assert again.handle(Evaluate("domain", None)) == report
    repeated = again.handle(FineTune(0))
    assert isinstance(update, AdapterUpdate) and isinstance(repeated, AdapterUpdate)
    assert all(torch.equal(repeated.tensors[key], tensor) for key, tensor in update.tensors.items())


# -- what is on the links ----------------------------------------------------------------------------------------------

STRETCH = 6
NO_DIGITS = str.maketrans("0123456789", "ghijklmnop")  # a loss is written as a number: digits can be in it by chance
TEXT_KINDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
PIXEL_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def secret_data(config: Config, family: str) -> dict[str, DeviceData[Labelled]]:
    """Inputs, and orders of labels, that are nowhere by chance."""

    def one(*whose: object) -> Labelled:
        digest = hashlib.sha256(str(whose).encode())
        number = int(digest.hexdigest(), 16)
        labels = next(edge.labels for edge, device in config.each_device() if device.name == whose[0])
        label = labels[number % len(labels)]
        text = digest.hexdigest().translate(NO_DIGITS)
        return Labelled(tiny_inputs("vit", 1, seed=number % 2**31)[0] if family == "vit" else text, label)

    return {
        device.name: DeviceData(
            tuple(one(device.name, i) for i in range(24)), tuple(one(device.name, -i) for i in range(1, 25))
        )
        for _, device in config.each_device()
    }


def raw_bytes(numbers: Tensor, kinds: Sequence[torch.dtype]) -> list[bytes]:
    return [numbers.to(kind).contiguous().view(torch.uint8).numpy().tobytes() for kind in kinds]


def secrets(data: Mapping[str, DeviceData[Labelled]], config: Config) -> Iterator[list[bytes]]:
    """Every private stretch, in all encodings in which it could stand in a frame."""
    labels_of = {device.name: edge.labels for edge, device in config.each_device()}
    for name, held in data.items():
        for examples in (held.train, held.test):
            classes = [labels_of[name].index(example.label) for example in examples]
            yield [*raw_bytes(torch.tensor(classes), TEXT_KINDS), json.dumps(classes)[1:-1].encode()]
            for example in examples:
                yield from stretches(example.input)


made_once = cache(tiny_bert_tokenizer)


def stretches(private: Input) -> Iterator[list[bytes]]:
    if isinstance(private, Tensor):
        for row in private.flatten().split(STRETCH):
            yield raw_bytes(row, PIXEL_KINDS)
        return
    tokenizer = made_once()
    for at in range(0, len(private) - STRETCH + 1, STRETCH):
        piece = private[at : at + STRETCH]
        ids = tokenizer.encode(piece, add_special_tokens=False)
        yield [piece.encode(), json.dumps(ids)[1:-1].encode(), *raw_bytes(torch.tensor(ids), TEXT_KINDS)]


def num_leaks(frames: Sequence[bytes], data: Mapping[str, DeviceData[Labelled]], config: Config) -> int:
    everything = b"|".join(frames)
    return sum(any(raw in everything for raw in encodings) for encodings in secrets(data, config))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_labels_no_pixels_and_no_token_ids_are_on_any_link(family: str) -> None:
    raw = encoder_raw_config("prompts", cycles=1, model={"foundation": "tiny", "context": 80})
    raw["edges"] = raw["edges"][:1]
    raw["edges"][0]["devices"][0]["head_layers"] = 0  # embeddings alone
    raw["fine_tune"]["local_epochs"] = 1
    config = parse_config(raw)
    data = secret_data(config, family)
    run = Run(family, config, data).go()
    frames = [frame for _, _, frame in run.ledger.frames]
    assert len(frames) > 40
    assert num_leaks(frames, data, config) == 0
    every = list(secrets(data, config))
    for planted in (every[0], every[1], every[-1]):  # labels, an input's beginning, another's end
        for encoding in planted:
            assert num_leaks([b"\x01" + encoding + b"\x02"], data, config) >= 1


def test_only_logits_and_their_gradients_go_to_and_fro(finished: Run) -> None:
    widths = {len(labels) for labels in CLASSES.values()}
    outputs, grads = finished.ledger.of(BodyOutput), finished.ledger.of(BodyOutputGrad)
    assert {output.rows_ND.shape[1] for output in outputs} == {grad.grad_ND.shape[1] for grad in grads} == widths
    assert all(len(output.rows_ND) == len(output.examples_E) for output in outputs)
    assert all(set(smashed.num_labels_E.tolist()) == {1} for smashed in finished.ledger.of(SmashedData))
    assert {len(anchor.lengths_E) for anchor in finished.ledger.of(AnchorRelease)} == {0}


def test_a_split_device_is_not_given_what_the_model_ends_with(finished: Run) -> None:
    for kind, _, message in finished.ledger.messages():
        if isinstance(message, ModelRelease) and kind == "device_edge" and len(message.layers) < 6:
            assert not any(name.startswith(("ending.", "classifier.")) for name in message.tensors)


# -- before any work ---------------------------------------------------------------------------------------------------


def changed(index: int, **edge: Any) -> list[dict[str, Any]]:
    edges: list[dict[str, Any]] = encoder_raw_config()["edges"]
    edges[index] |= edge
    return edges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relay": {"enabled": True}}, "relay.enabled: is true, but the model is an encoder"),
        (
            {"fine_tune": {"anchor_weight": 10.0}},
            "fine_tune.anchor_weight: is 10, but .* writes no text to hold to; set it to 0",
        ),
        ({"evaluate": {"everywhere": True}}, "evaluate.everywhere: is true, but .*; set it to false"),
        ({"edges": changed(1, labels=[])}, r"edges.1.labels: are \[\], but .*; name the classes"),
        ({"edges": changed(0, labels=["one"])}, r"edges.0.labels: are \['one'\], but .* two or more"),
        ({"edges": changed(0, labels=["a", "b", "a"])}, "edges.0: labels must differ, but these are given twice: a;"),
        (
            {"edges": changed(0, labels=[str(i) for i in range(32)]), "wire": {"body_output": "int4"}},
            "wire.body_output: is int4, in which the likeliest of the 32 classes of 'shapes' .*; use float16 or int8",
        ),
        (
            {"edges": changed(0, labels=[str(i) for i in range(32)]), "wire": {"gradient": "int4"}},
            "wire.gradient: is int4, in which",
        ),
        ({"edges": changed(1, follows="shapes")}, "edges.1.labels: are not those of 'shapes'.*; name the same"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(with_family_defaults(encoder_config(**changes), VIT), NUM_LAYERS, VIT)


@pytest.mark.parametrize(("keep", "precision"), [(None, "int8"), (5, "float32")])
def test_a_recipe_that_must_be_calibrated_needs_public_inputs(keep: int | None, precision: str) -> None:
    config = encoder_config(domain={"precision": precision, "keep_layers": keep})
    with pytest.raises(ConfigError, match=f"are {precision} and {keep}, but .* model.public_inputs"):
        Run("vit", config)


def with_one(family: str, *examples: Any) -> tuple[Config, dict[str, DeviceData[Any]]]:
    """One device, with these examples to learn from."""
    edge = changed(0, devices=[{"name": "clinic"}])[0]
    config = encoder_config(edges=[edge], cycles=1)
    return config, {"clinic": DeviceData(examples, encoder_data(config, family)["clinic"].test)}


PIXELS = torch.zeros(3, 12, 8)


@pytest.mark.parametrize(
    ("family", "examples", "message"),
    [
        ("vit", [Labelled(PIXELS, "flat")], "train, example 1: has the label 'flat', the domain's are: round, square"),
        ("vit", [Labelled("text", "long")], "train: has texts, but the foundation model has no tokenizer"),
        ("vit", [Labelled(PIXELS, "long"), Labelled("x", "long")], "train: has 1 texts and 1 images; give it one kind"),
        ("vit", [Labelled(PIXELS[0], "long")], r"images of shape \(12, 8\), .*; give pixels"),
        ("vit", [Labelled(PIXELS.long(), "long")], "some of them torch.int64; give pixels"),
        ("vit", [Labelled(PIXELS, "long"), Labelled(PIXELS[:, :4], "long")], "images of shape .*, .*; give pixels"),
        ("vit", [Example("a", "b")], "has completions and labels; give it examples of one kind"),
        ("vit", [Labelled(PIXELS[:, :4], "long")], "its embeddings do not take one of shape"),
        ("bert", [Labelled(PIXELS, "long")], "its embeddings do not take one of shape"),
    ],
)
def test_examples_that_do_not_fit_are_refused(family: str, examples: list[Any], message: str) -> None:
    config, data = with_one(family, *examples)
    with pytest.raises(DataError, match=message):
        Run(family, config, data).go()


def test_examples_for_another_kind_of_model_are_refused() -> None:
    config, data = with_one("bert")
    completions = DeviceData((Example("a", "b"),), (Example("a", "b"),))
    with pytest.raises(
        DataError, match="'clinic': has prompts and completions, but the foundation model is an encoder"
    ):
        Run("bert", config, {"clinic": completions}).go()
    with pytest.raises(DataError, match="'clinic': has prompts .*, but the foundation model has no tokenizer"):
        Run("vit", config, {"clinic": completions}).go()
    raw = encoder_raw_config(edges=changed(0)[:1], absorb={"retention_windows": 1, "retention_tokens": 8})
    decoding = parse_config(raw | {"edges": changed(0, devices=[{"name": "clinic"}])[:1]})
    labelled = DeviceData((Labelled("x", "long"),), (Labelled("x", "long"),))
    shapes = {"shapes": TaskTemplate(None, ())}
    network = build_network(decoding, tiny_foundation(), shapes, {"clinic": labelled}, "some public text " * 9)
    network.install()
    with pytest.raises(DataError, match="'clinic': has examples with labels, but the foundation model is a decoder"):
        network.evaluate()


def test_a_text_that_is_too_long_loses_its_end() -> None:
    reader, text = tiny_bert_tokenizer(), "abcdefghijklmnopqrstuvwxyz"
    whole = EncoderInputs([text], reader, 28, "here").ids[0]
    assert whole == [256, *reader.encode(text, add_special_tokens=False), 257]
    assert EncoderInputs([text], reader, 10, "here").ids[0] == [*whole[:9], 257]


def test_a_device_of_an_encoder_writes_no_answers() -> None:
    config = encoder_config(cycles=1)
    tiers = build_tiers(
        config,
        tiny_encoder_foundation("bert"),
        {edge.domain: TaskTemplate(None, edge.labels) for edge in config.edges},
        encoder_data(config, "bert"),
        "",
        silent,
        Frames,
        NoPublishers(),
    )
    tiers.network.install()
    tiers.edges["shapes"].equip_device("north-a")
    with pytest.raises(SessionRefused, match="the foundation model is an encoder, .* writes no text; ask a run of a"):
        tiers.devices["north-a"].decoder_parts()
