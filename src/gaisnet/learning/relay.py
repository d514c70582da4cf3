"""The down flow: data-free knowledge relay. The FM generates text, and a DM is fitted to the FM's hidden states on it.

No data set is used. The public task template and label names may shape the text. The relay must repair the input
of the layers that both models share (from ``adapters.first_layer`` on), so the target is the FM's hidden state on the
way there. A relay sits on the last linear module of a layer and adds to the layer's output; so its best low-rank
weights have a closed form, layer after layer, and no optimizer is needed.

Shape legend: N rows (positions of all sequences), I inputs of a linear module, D hidden size, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config.learning import RelaySettings
from gaisnet.errors import NotFinite
from gaisnet.learning.regression import fit_low_rank, trace_layer
from gaisnet.models.parts import Layers
from gaisnet.models.ragged import Ragged, join
from gaisnet.models.tokenization import decoded, pair_ids, prompt_ids, start_ids
from gaisnet.progress import Progress

RELAY = "relay"
_GENERATION_BATCH = 128
_BATCH = 32
_TEST_EVERY = 8
_TEXT = "{text}"


@dataclass(frozen=True)
class TaskTemplate:
    """The public description of a task: a template with ``{text}``, which the answer follows, and the label names."""

    template: str | None
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Distillation:
    """Distance of a DM from the FM, on generated text that its relay was not fitted to, before and after.

    Attributes:
        error_before: Mean relative error of the suffix's input.
        error_after: The same.
        kl_before: Mean divergence of the DM's next token from the FM's, in nats, both with the FM's adapter for the
            domain.
        kl_after: The same.
    """

    error_before: float
    error_after: float
    kl_before: float
    kl_after: float

    @property
    def helped(self) -> bool:
        """Whether the DM is nearer to the FM than before; otherwise the relay is not released."""
        return self.error_after < self.error_before


@dataclass(frozen=True)
class TextStates:
    """Generated text as the FM sees it: inputs of layers of the middle, and the middle's output."""

    states: Mapping[int, Ragged]  # by the number of the FM layer that they enter

    @property
    def middle(self) -> tuple[int, int]:
        """First layer, and the layer to stop before."""
        return min(self.states), max(self.states)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.states[self.middle[0]])

    def select(self, indices: Sequence[int]) -> "TextStates":
        """Return the sequences with these indices."""
        return TextStates({layer: states.some(indices) for layer, states in self.states.items()})

    def concatenate(self, other: "TextStates") -> "TextStates":
        """Append the sequences of another text."""
        return TextStates({layer: join([states, other.states[layer]]) for layer, states in self.states.items()})

    def split(self) -> "tuple[TextStates, TextStates]":
        """Split into text to fit to, and every eighth sequence to test the result on."""
        every = range(len(self))
        return self.select([i for i in every if i % _TEST_EVERY]), self.select(every[::_TEST_EVERY])


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: TaskTemplate,
    num: int,
    settings: RelaySettings,
    seed: int,
) -> list[list[int]]:
    """Sample ``num`` sequences of at most ``settings.tokens`` token ids from the FM.

    They fill the task's template: the FM continues the part before ``{text}``, and a random label name follows.
    Without a template they continue nothing but the beginning-of-sequence token. Special tokens written
    into a template are left out.
    """
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        if shape.template is None:
            opening = list(start_ids(tokenizer))
            return _sample(model, tokenizer, opening, num, settings.tokens - len(opening), settings)
        return _shaped(model, tokenizer, shape.template, shape.labels, num, settings)


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _shaped(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    labels: Sequence[str],
    num: int,
    settings: RelaySettings,
) -> list[list[int]]:
    before, _, after = template.partition(_TEXT)
    endings = [f"{after} {label}" for label in labels] or [after]
    opening = list(prompt_ids(tokenizer, before.rstrip() or " "))
    shortest = min(len(pair_ids(tokenizer, before, ending).completion) for ending in endings)
    room = settings.tokens - len(opening) - shortest  # anything beyond it would be cut off
    written = _sample(model, tokenizer, opening, num, max(1, room), settings)
    sequences = []
    for ids, pick in zip(written, torch.randint(len(endings), (num,)).tolist(), strict=True):
        line = decoded(tokenizer, ids[len(opening) :]).strip().partition("\n")[0]
        pair = pair_ids(tokenizer, before + line, endings[pick])
        body = [*pair.opening, *pair.prompt][: max(1, settings.tokens - len(pair.completion))]
        filled = [*body, *pair.completion][: settings.tokens]
        sequences.append(filled if len(filled) > 1 else ids[: settings.tokens])  # a single token teaches nothing
    return sequences


class _Draw(LogitsProcessor):
    """Draws a token by inverting the cumulative distribution, and leaves only that choice.

    It takes one random number per sequence, where ``generate`` takes one per token of the vocabulary: a fifth of
    the time.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        at_B1 = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, at_B1, right=True)  # to the right: never one of probability zero
        return torch.full_like(scores, -math.inf).scatter(1, drawn_B1.clamp(max=scores.shape[1] - 1), 0.0)


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opening: list[int],
    num: int,
    num_new: int,
    settings: RelaySettings,
) -> list[list[int]]:
    sequences: list[list[int]] = []
    while len(sequences) < num:
        batch = min(_GENERATION_BATCH, num - len(sequences))
        prompt_BT = torch.tensor([opening] * batch, device=model.device)
        written_BT = cast(Any, model).generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            logits_processor=LogitsProcessorList([_Draw(settings.temperature)]),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            pad_token_id=tokenizer.eos_token_id,
        )
        sequences.extend(written_BT.tolist())
    return sequences


@torch.no_grad()
def fit_relay(body: Layers, spec: LoraSpec, text: TextStates, penalty: float, progress: Progress) -> AdapterTensors:
    """Fit a relay, layer after layer: each layer's output should match the input of the FM's next layer.

    A layer sees the outputs of the repaired layers before it, so each corrects what the others left. Rows are weighted
    by their relative errors: the first position, an attention sink, is hundreds of times as large as others.

    Args:
        body: The DM's, whose adapter ``RELAY`` is active. It is overwritten.
        spec: Shape of the relay, on one linear module per layer whose output is added to the layer's output.
        text: With the states behind every layer of ``spec``.
        penalty: On the weights, as in ``fit_low_rank``.
        progress: Told after every layer.

    Raises:
        NotFinite: An error is no longer finite.
    """
    relay = {key: torch.zeros_like(tensor) for key, tensor in take_out(body, RELAY).items()}
    put_in(body, RELAY, relay)
    first, end = text.middle
    kept = [index for index in body.indices if first <= index < end]
    hidden, scale = text.states[first], spec.alpha / spec.rank
    for layer, stop in pairwise([*kept, end]):
        if layer not in spec.layers:
            hidden = hidden.map_batches(partial(body.run, start=layer, stop=layer + 1), _BATCH)
            continue
        inputs, hidden = trace_layer(body, RELAY, layer, hidden)
        (entering,) = inputs.values()
        x_NI, target_ND = entering.rows_ND.float(), text.states[stop].rows_ND.float()
        size_N1 = target_ND.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        missing_ND = (target_ND - hidden.rows_ND) / size_N1
        a_RI, b_DR = fit_low_rank(x_NI / size_N1, missing_ND, spec.rank, penalty)
        relay |= _named(relay, layer, a_RI, b_DR / scale)
        added_ND = x_NI @ a_RI.T @ b_DR.T
        hidden = Ragged((hidden.rows_ND + added_ND).to(hidden.rows_ND.dtype), hidden.lengths)
        loss = float((missing_ND - added_ND / size_N1).square().sum(-1).mean())
        if not math.isfinite(loss):
            raise NotFinite("the relay's error", f"layer {layer}", loss)
        done = spec.layers.index(layer) + 1
        progress("relay", done, len(spec.layers), {"relay_loss": loss})
    put_in(body, RELAY, relay)
    return relay


def _named(relay: AdapterTensors, layer: int, a_RI: Tensor, b_DR: Tensor) -> AdapterTensors:
    mine = [key for key in relay if key.startswith(f"layers.{layer}.")]
    return {key: a_RI if ".lora_A." in key else b_DR for key in mine}


def run_middle(body: Layers, text: TextStates) -> Ragged:
    """Return ``body``'s output at the end of the middle for the text, without gradients."""
    first, end = text.middle
    return text.states[first].map_batches(lambda hidden_BTD: body.run(hidden_BTD, first, end), _BATCH)


def relative_error(found: Ragged, text: TextStates) -> float:
    """Return the mean of |hidden - target| / |target| at the end of the middle, without first positions."""
    target_ND = text.states[text.middle[1]].later()
    errors_N = (found.later() - target_ND).norm(dim=-1) / target_ND.norm(dim=-1)
    return float(errors_N.sum()) / max(len(errors_N), 1)
