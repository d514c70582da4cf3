"""A device on its own: refusals and their messages."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.data.examples import DeviceData, Example, tokenize
from gaisnet.errors import AdapterMismatch, DataError, GaisnetError, UnexpectedMessage, WireFormatError
from gaisnet.messages import (
    AdapterRelease,
    AnchorRelease,
    BodyOutput,
    BodyRequest,
    Done,
    Evaluate,
    EvaluationReport,
    FineTune,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    SmashRequest,
    Split,
)
from gaisnet.models.recipe import Recipe
from gaisnet.models.release import restrict
from gaisnet.tiers.device.device import Device
from tests.tiers.cohort import ALL, EXAMPLES, Cohort, cohort_config, model_release
from tests.tiny import tiny_tokenizer

GOOD = (Example("Is water wet?", " yes"),)


def device(
    train: tuple[Example, ...] = GOOD, test: tuple[Example, ...] = GOOD, context: int = 48, mode: str = "split"
) -> Device:
    devices = [{"name": "clinic", "mode": mode, "head_layers": 1}]
    edges = [{"name": "edge", "domain": "facts", "devices": devices}]
    config = cohort_config((), edges=edges, model={"foundation": "tiny", "context": context})
    return Device(config.edges[0].devices[0], config, tiny_tokenizer(), DeviceData(train, test))


def with_split(split: str, examples: tuple[Example, ...]) -> Device:
    return device(train=examples) if split == "train" else device(test=examples)


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_examples(split: str) -> None:
    with pytest.raises(
        DataError, match=f"device 'clinic': has no {split} examples; give it some, or remove the device"
    ):
        with_split(split, ())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_completion_that_fills_the_context(split: str) -> None:
    fits, too_long = Example("?", "y" * 47), Example("?", "y" * 48)
    with_split(split, (fits,))
    found = "the completion has 48 tokens but the context holds 48; shorten it or raise model.context"
    with pytest.raises(DataError, match=f"device 'clinic', {split}, example 2: {found}"):
        with_split(split, (fits, too_long))


@pytest.mark.parametrize("example", [Example("", " yes"), Example("Is it?", "")])
def test_an_empty_prompt_or_completion(example: Example) -> None:
    with pytest.raises(DataError, match="device 'clinic', train, example 1: has an empty prompt or completion"):
        device(train=(example,))


def test_token_ids_by_hand() -> None:
    (tokens,) = tokenize([Example("ab", "cd")], tiny_tokenizer(), 48, "device")
    a, b, c, d = tiny_tokenizer().encode("abcd")
    assert tokens.input_ids == (a, b, c, d) and tokens.label_ids == (c, d, 257)
    (shortened,) = tokenize([Example("ab", "cd")], tiny_tokenizer(), 3, "device")
    assert shortened.input_ids == (b, c, d) and shortened.label_ids == (c, d, 257)


def test_a_device_counts_what_the_context_truncates_and_says_which_would_hold_all() -> None:
    short, long = Example("?", " yes"), Example("x" * 60, " no")
    lengths = device(train=(short, long, short), test=(long,), context=48).handle(LengthsRequest())
    assert lengths == Lengths(num_examples=4, num_truncated=2, longest=63)
    assert device(train=(short, long, short), test=(long,), context=63).handle(LengthsRequest()) == Lengths(4, 0, 63)


@pytest.mark.parametrize("counts", [(-1, 0, 5), (1, 2, 5), (1, 0, -1), (2**31, 0, 0), (1, 0, 10**400)])
def test_lengths_that_are_no_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no counts"):
        Lengths(*counts)
    with pytest.raises(ValueError, match="no counts"):
        LengthsOfDevices(("a",), (counts,))


def test_lengths_are_one_entry_per_device() -> None:
    for owners, counts in ((("a", "a"), ((1, 0, 1),) * 2), (("a",), ())):
        with pytest.raises(ValueError):
            LengthsOfDevices(owners, counts)


def test_a_completion_that_the_model_would_end_in_its_middle_is_refused_when_the_model_comes() -> None:
    ends = [257, *tiny_tokenizer().encode("!")]
    plain = model_release(one_device_config(), Recipe(ALL, ()))
    release = replace(plain, config_json=json.dumps({**json.loads(plain.config_json), "eos_token_id": ends}))
    device().handle(release)
    with pytest.raises(DataError, match="'clinic', test, example 1: its completion holds a token that ends an answer"):
        device(test=(Example("Is it?", " yes! no"),)).handle(release)


# -- messages ----------------------------------------------------------------------------------------------------------


def output(split: Split = "train") -> BodyOutput:
    return BodyOutput(split, 0, 5, torch.tensor([0], dtype=torch.int32), torch.zeros(5, 32))


@pytest.mark.parametrize("message", [SmashRequest("train"), SmashRequest("test"), output("train"), output("test")])
def test_a_device_without_a_model_says_so(message: Message) -> None:
    with pytest.raises(UnexpectedMessage, match="device 'clinic', which has no model yet"):
        device().handle(message)


FOR_LOCAL = [
    FineTune(0),
    AdapterRelease("domain", 0, {}),
    AnchorRelease(torch.tensor([1], dtype=torch.int32), torch.zeros(1, 32)),
]


@pytest.mark.parametrize("message", [*FOR_LOCAL, Evaluate("domain", None), BodyRequest("clinic", None), Done()])
@pytest.mark.parametrize("installed", [False, True])
def test_a_split_device_takes_only_what_is_for_it(message: Message, installed: bool) -> None:
    cohort = Cohort(cohort_config((1,)))
    one = cohort.devices[0] if installed else device()
    with pytest.raises(UnexpectedMessage, match=f"device '{one.name}' does not take a {type(message).__name__} here"):
        one.handle(message)


def test_a_local_device_takes_adapters_and_learns() -> None:
    one = device(mode="local")
    for message in FOR_LOCAL:
        with pytest.raises(UnexpectedMessage, match="device 'clinic' does not take"):
            one.handle(message)
    one.handle(model_release(one_device_config(), Recipe(ALL, ())))
    with pytest.raises(AdapterMismatch, match="adapter 'domain'"):
        one.handle(AdapterRelease("domain", 0, {}))
    assert isinstance(one.handle(FOR_LOCAL[2]), Done)
    one.handle(FineTune(0))


def one_device_config() -> Any:
    return cohort_config((1,))


def test_an_adapter_for_a_part_that_is_not_there_is_refused() -> None:
    one = device(mode="local")
    one.handle(model_release(one_device_config(), Recipe(ALL, ())))
    with pytest.raises(AdapterMismatch, match="adapter 'relay'"):  # relay.enabled is false
        one.handle(AdapterRelease("relay", 0, {"layers.1.x": torch.zeros(1)}))


def test_a_release_that_lacks_the_devices_layers_is_refused() -> None:
    release = model_release(one_device_config(), Recipe(ALL, ()))
    with pytest.raises(GaisnetError, match=r"layers\.0"):
        device().handle(restrict(release, (4, 5)))
    with pytest.raises(GaisnetError, match=r"layers\.0"):
        device(mode="local").handle(restrict(release, (4, 5)))


# -- rows --------------------------------------------------------------------------------------------------------------

NUM_LABELS = [len(example.completion) + 1 for example in EXAMPLES]
NUM_POSITIONS = [len(example.prompt + example.completion) for example in EXAMPLES]
SPLITS: list[Split] = ["train", "test"]


def ask(cohort: Cohort, examples: list[int], num_rows: int, split: Split = "train", **changes: Any) -> Message:
    rows_ND = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(0))
    message = BodyOutput(split, 0, max(num_rows, 1), torch.tensor(examples, dtype=torch.int32), rows_ND)
    return cohort.devices[0].handle(replace(message, **changes))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("examples", [[-1], [5], [0, 5], [0, -1, 1], [2**31 - 1]])
def test_example_numbers_out_of_range(examples: list[int], split: Split) -> None:
    with pytest.raises(WireFormatError, match="example numbers that device 'device-0' does not have"):
        ask(Cohort(cohort_config((1,))), examples, 5, split)


def test_a_step_without_examples_is_refused() -> None:
    with pytest.raises(WireFormatError, match="the examples of a step of the edge of device 'device-0': 0, where"):
        ask(Cohort(cohort_config((1,))), [], 5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("more", [-1, 1, 10])
def test_a_wrong_number_of_rows(more: int, split: Split) -> None:
    cohort = Cohort(cohort_config((1,)))
    ask(cohort, [0, 2], NUM_LABELS[0] + NUM_LABELS[2], split)
    num_rows = NUM_LABELS[0] + NUM_LABELS[2] + more
    with pytest.raises(WireFormatError, match=f"{num_rows} rows for the {num_rows - more} labels of device 'device-0'"):
        ask(cohort, [0, 2], num_rows, split)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("more", [-1, 1])
def test_a_wrong_number_of_rows_where_the_tail_has_layers(more: int, split: Split) -> None:
    cohort = Cohort(cohort_config((1,), tail_layers=1))
    ask(cohort, [0, 2], NUM_POSITIONS[0] + NUM_POSITIONS[2], split)
    num_rows = NUM_POSITIONS[0] + NUM_POSITIONS[2] + more
    with pytest.raises(WireFormatError, match=f"{num_rows} rows for {num_rows - more} positions of device 'device-0'"):
        ask(cohort, [0, 2], num_rows, split)


HOSTILE: dict[str, Callable[[int], dict[str, Tensor | int]]] = {
    "example numbers that are fractions": lambda n: {"examples_E": torch.tensor([0.0])},
    "example numbers in a table": lambda n: {"examples_E": torch.zeros(1, 1, dtype=torch.int32)},
    "example numbers as yes and no": lambda n: {"examples_E": torch.tensor([False])},
    "narrow rows": lambda n: {"rows_ND": torch.zeros(n, 31)},
    "flat rows": lambda n: {"rows_ND": torch.zeros(n)},
    "deep rows": lambda n: {"rows_ND": torch.zeros(n, 1, 32)},
    "no labels in all": lambda n: {"num_labels_total": 0},
    "fewer labels than none": lambda n: {"num_labels_total": -3},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("tail_layers", [0, 1])
def test_what_no_edge_of_ours_would_send_is_refused(changes: Callable[[int], dict[str, Any]], tail_layers: int) -> None:
    """Building the message fails, which the codec turns into a wire error, or the device refuses it."""
    cohort = Cohort(cohort_config((1,), tail_layers))
    num_rows = (NUM_POSITIONS if tail_layers else NUM_LABELS)[0]
    ask(cohort, [0], num_rows)
    with pytest.raises((WireFormatError, ValueError)):
        ask(cohort, [0], num_rows, **changes(num_rows))


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_example_may_come_twice(split: Split) -> None:
    cohort = Cohort(cohort_config((1,)))
    reply = ask(cohort, [0, 0], 2 * NUM_LABELS[0], split)
    assert not isinstance(reply, EvaluationReport) or reply.num_examples == 2


def test_smashing_disturbs_nothing() -> None:
    cohort = Cohort(cohort_config((1,)))
    first, again = cohort.smashed(0), cohort.smashed(0)
    assert torch.equal(first.hidden_ND, again.hidden_ND)
    assert not first.hidden_ND.requires_grad
