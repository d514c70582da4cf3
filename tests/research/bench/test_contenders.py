"""Contenders on a tiny model: each is what it says it is, and plain split learning learns as the model in one piece."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gaisnet.config.file import parse_config
from gaisnet.data.examples import DeviceData, Example, Tokens, tokenize
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.families import Decoder
from gaisnet.models.foundation import load_foundation
from gaisnet.models.release import ReleasedModel
from gaisnet.research.bench.contenders.centralised import Centralised, adapted, train
from gaisnet.research.bench.contenders.federated import Federated
from gaisnet.research.bench.contenders.network import GaisNet
from gaisnet.research.bench.contenders.plain_split import PlainSplit
from gaisnet.research.bench.contenders.task import Task, accuracy, answered, padded
from gaisnet.research.bench.contenders.unsplit import run_unsplit, unsplit_domain_model
from gaisnet.tiers.cloud.cloud import Cloud
from tests.tiny import NUM_LAYERS, save_tiny_foundation, tiny_raw_config, tiny_tokenizer

LATE = 4


def data() -> dict[str, DeviceData]:
    """Two devices with examples of different lengths."""
    every = [Example("ab" * (1 + i % 5) + "?", " yes" if i % 2 else " no") for i in range(20)]
    return {"a": DeviceData(tuple(every[:12]), tuple(every[:2])), "b": DeviceData(tuple(every[12:]), tuple(every[2:4]))}


def task_in(tmp_path: Path, **domain: Any) -> Task:
    """The examples, and a domain model by recipe."""
    folder = save_tiny_foundation(tmp_path / "foundation")
    devices = [{"name": name, "mode": "split", "head_layers": 1} for name in ("a", "b")]
    edge = {"name": "north", "domain": "d", "template": "{text}", "labels": ["yes", "no"], "devices": devices}
    raw = tiny_raw_config(edges=[edge], relay={"enabled": False}, model={"foundation": str(folder), "context": 48})
    raw["domain"] |= domain
    raw["fine_tune"] = {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.01}
    config, tokenizer = parse_config(raw), tiny_tokenizer()
    tokens = {name: tokenize(mine.train, tokenizer, 48, name) for name, mine in data().items()}
    held_out = [t for name, mine in data().items() for t in tokenize(mine.test, tokenizer, 48, name)]
    return Task(config, tokens, held_out)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return task_in(tmp_path)


def test_plain_split_learns_as_the_model_in_one_piece(task: Task) -> None:
    whole, split = Centralised("centralised_late", late=True).run(task, 0), PlainSplit().run(task, 0)
    assert len(whole.losses) == 10
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    assert whole.losses[-1] < whole.losses[0]
    assert (whole.bytes_up, split.accuracy) == (0, whole.accuracy)
    positions = sum(len(t.input_ids) for t in task.pooled) * task.epochs
    one_way = positions * 32 * 4  # float32 rows of width 32
    assert 2 * one_way < split.bytes_up < 2 * one_way + 10 * 2_000  # head's output and gradient, and headers
    assert one_way < split.bytes_down < one_way + 10 * 1_000


@pytest.mark.parametrize(("late", "layers"), [(True, range(LATE, NUM_LAYERS)), (False, range(NUM_LAYERS))])
def test_which_layers_learn(task: Task, late: bool, layers: range) -> None:
    names = [name for name, p in adapted(task, late, 0).named_parameters() if p.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(layers)
    assert all("lora_" in name for name in names)


def test_devices_start_an_epoch_with_the_average_of_the_last(task: Task) -> None:
    result = Federated().run(task, 0)
    assert len(result.losses) == 2 * (3 + 2)
    assert result.losses[-1] < result.losses[0]
    size = sum(p.numel() for p in adapted(task, late=False, seed=0).parameters() if p.requires_grad) * 4
    assert (
        4 * size < result.bytes_up < 4 * size * 1.6
    )  # two devices, twice; names and headers weigh in so small a model
    assert 4 * size < result.bytes_down < 4 * size * 1.6


def test_gaisnet_itself(task: Task) -> None:
    contender = GaisNet(data(), TaskTemplate("{text}", ("yes", "no")), "some public text " * 40)
    result = contender.run(task, 0)
    assert result.num_samples == 40
    assert len(result.losses) == 10
    assert result.losses[-1] < result.losses[0]
    assert 0 < result.bytes_per_sample < PlainSplit().run(task, 0).bytes_per_sample


def test_the_domain_model_in_one_piece_without_a_recipe_is_the_foundation_model(tmp_path: Path) -> None:
    task = task_in(tmp_path, precision="float32", keep_layers=None)
    unsplit, whole = run_unsplit(task, 0), Centralised("centralised_late", late=True).run(task, 0)
    assert len(unsplit.losses) == 10
    assert (unsplit.losses, unsplit.accuracy) == (whole.losses, whole.accuracy)  # to the bit


def test_the_domain_model_in_one_piece_is_the_one_that_an_edge_has(task: Task) -> None:
    model, config = unsplit_domain_model(task, seed=5), task.config.model_copy(update={"seed": 5})
    cloud = Cloud(
        load_foundation(config.model), config, {"d": TaskTemplate("{text}", ("yes", "no"))}, "public text " * 40
    )
    released = ReleasedModel(cloud.model_release)
    body, layers = released.body(1, NUM_LAYERS), Decoder(model).layers
    assert len(body.indices) == NUM_LAYERS - 2  # without the head's layer, and the one that the recipe drops
    for index in body.indices:
        own, of_edge = layers[index].state_dict(), body.layers[str(index)].state_dict()
        assert own.keys() == of_edge.keys()
        assert all(torch.equal(own[key], of_edge[key]) for key in own)
    hidden_BTD = torch.randn(2, 7, 32)
    (dropped,) = set(range(1, NUM_LAYERS)) - set(body.indices)
    assert torch.equal(layers[dropped](hidden_BTD, attention_mask=None), hidden_BTD)


def test_the_domain_model_in_one_piece_learns(task: Task) -> None:
    result = run_unsplit(task, 0)
    assert result.losses[-1] < result.losses[0]
    assert result.losses != Centralised("centralised_late", late=True).run(task, 0).losses


def test_logits_of_answers_alone_give_the_same_losses(task: Task) -> None:
    found = [train(adapted(task, False, 0), task, 0, "linear", collate).losses for collate in (padded, answered)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    batch = answered(task.pooled[:3])
    assert batch["labels"].shape == (3, batch["logits_to_keep"])
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]


def test_what_stands_before_every_example_is_read_once_and_makes_no_difference(task: Task) -> None:
    model, shown = task.foundation().model, tiny_tokenizer().encode("abab? yes\n\nab? no\n\n")
    for parameter in model.parameters():
        parameter.data.mul_(8.0 if parameter.ndim == 2 else 1.0)  # for it to look further back than one token
    asked = [likely(model, shown, tokens) for tokens in task.pooled]
    asked[3] = Tokens(asked[3].input_ids, (asked[3].label_ids[0] ^ 1, *asked[3].label_ids[1:]))
    assert len({len(tokens.input_ids) for tokens in asked}) > 2
    joined = [Tokens((*shown, *tokens.input_ids), tokens.label_ids) for tokens in asked]
    assert accuracy(model, asked, shown) == accuracy(model, joined) == (len(asked) - 1) / len(asked)
    assert accuracy(model, asked) < accuracy(model, asked, shown)


@torch.no_grad()
def likely(model: Any, shown: Sequence[int], tokens: Tokens) -> Tokens:
    """The example with one label: what the model itself would write behind what is shown and the prompt."""
    prompt = tokens.input_ids[: len(tokens.input_ids) - len(tokens.label_ids) + 1]
    logits_V = model(torch.tensor([[*shown, *prompt]])).logits[0, -1]
    return Tokens(prompt, (int(logits_V.argmax()),))


def test_accuracy_counts_whole_answers(task: Task) -> None:
    model = task.foundation().model
    assert accuracy(model, []) != accuracy(model, [])  # nothing known
    assert accuracy(model, task.test) == 0.0
