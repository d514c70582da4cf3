"""The down flow: data-free knowledge relay. The FM writes text, and a DM learns to see in it what the FM sees.

No data set enters. The public task template and label names may shape the text. What has to be repaired is the input
of the layers that both models share (from ``adapters.first_layer`` on), so the target is the FM's hidden state there,
or the logits that follow from it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gaisnet.config import RelaySettings
from gaisnet.errors import NotFinite
from gaisnet.models.ragged import Ragged, by_length, length_mask, relative_square, shuffled_batches
from gaisnet.progress import Progress

_GENERATION_BATCH = 128
_TEXT = "{text}"


@dataclass(frozen=True)
class TaskShape:
    """What is public about a task: a template with ``{text}``, which the answer follows, and the answers' names."""

    template: str | None
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Distillation:
    """Mean relative error of the hidden state that the suffix reads, on generated text that was not trained on."""

    error_before: float
    error_after: float

    @property
    def helped(self) -> bool:
        """Whether the DM is nearer to the FM than before; what does not help is not released."""
        return self.error_after < self.error_before


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: TaskShape, settings: RelaySettings, seed: int
) -> list[list[int]]:
    """``settings.sequences`` sequences of at most ``settings.tokens`` token ids, sampled from the FM.

    A share of them fills the task's template: the FM continues what stands before ``{text}``, and a random label name
    follows. The others continue nothing but the beginning-of-sequence token.
    """
    num_shaped = round(settings.sequences * settings.template_share) if shape.template else 0
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        free = _sample(model, tokenizer, [_start_token(tokenizer)], settings.sequences - num_shaped, settings)
        if not num_shaped or shape.template is None:
            return free
        return free + _shaped(model, tokenizer, shape.template, shape.labels, num_shaped, settings)


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


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
    opening = tokenizer.encode(before.rstrip() or " ", add_special_tokens=False)
    written = _sample(model, tokenizer, opening, num, settings)
    picks = torch.randint(len(labels), (num,)).tolist() if labels else []
    sequences = []
    for i, ids in enumerate(written):
        line = str(tokenizer.decode(ids[len(opening) :])).strip().partition("\n")[0]
        closing = tokenizer.encode(after + (f" {labels[picks[i]]}" if labels else ""), add_special_tokens=False)
        body = tokenizer.encode(before + line, add_special_tokens=False)[: max(1, settings.tokens - len(closing))]
        filled = (body + closing)[: settings.tokens]
        sequences.append(filled if len(filled) > 1 else ids[: settings.tokens])  # one token teaches nothing
    return sequences


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: list[int], num: int, settings: RelaySettings
) -> list[list[int]]:
    sequences: list[list[int]] = []
    while len(sequences) < num:
        batch = min(_GENERATION_BATCH, num - len(sequences))
        prompt_BT = torch.tensor([opening] * batch, device=model.device)
        new = max(1, settings.tokens - len(opening))
        written_BT = cast(Any, model).generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=tokenizer.eos_token_id,
        )
        sequences.extend(written_BT.tolist())
    return sequences


def distil(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    inputs: Ragged,
    targets: Ragged,
    settings: RelaySettings,
    logits: Callable[[Tensor], Tensor],
    seed: int,
    progress: Progress,
) -> Distillation:
    """Train a relay adapter so that the DM's middle gives what the FM's gives.

    Args:
        run: The DM's middle with the relay active, [B, T, D] -> [B, T, D].
        parameters: The relay adapter's parameters; nothing else changes.
        inputs: What both middles start from, on generated text.
        targets: What the FM's middle makes of ``inputs``.
        settings: Epochs, batch size, learning rate, and which target to match.
        logits: Suffix and tail, [B, T, D] -> [B, T, V]; called only for target 'logits'.
        seed: Of the order of the batches.
        progress: Told after every step.

    Raises:
        NotFinite: The loss stopped being a number.
    """
    held_out = list(range(0, len(inputs), 8))
    learned = [index for index in range(len(inputs)) if index not in set(held_out)]
    before = _error(run, inputs, targets, held_out, settings.batch_size)
    loss_of = relative_square if settings.target == "hidden" else _logits_loss(logits)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * math.ceil(len(learned) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = 0
    for _ in range(settings.epochs):
        for chosen in shuffled_batches([inputs.lengths[i] for i in learned], settings.batch_size, generator):
            batch = [learned[i] for i in chosen]
            mask_BT = length_mask([inputs.lengths[i] for i in batch], inputs.rows_ND.device)
            loss = loss_of(run(inputs.padded(batch)), targets.padded(batch), mask_BT)
            if not torch.isfinite(loss):
                raise NotFinite("the relay's loss", f"step {step}", loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            progress("relay", step, steps, {"relay_loss": loss.item()})
    return Distillation(before, _error(run, inputs, targets, held_out, settings.batch_size))


def _logits_loss(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Mean over tokens of KL(FM || DM) (Hinton et al., arXiv 1503.02531, temperature 1)."""

    def loss(hidden_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        with torch.no_grad():
            expected_NV = F.log_softmax(logits(target_BTD)[mask_BT].float(), dim=-1)
        found_NV = F.log_softmax(logits(hidden_BTD)[mask_BT].float(), dim=-1)
        return F.kl_div(found_NV, expected_NV, log_target=True, reduction="batchmean")

    return loss


@torch.no_grad()
def _error(
    run: Callable[[Tensor], Tensor], inputs: Ragged, targets: Ragged, indices: Sequence[int], batch_size: int
) -> float:
    total, count = 0.0, 0
    for places in by_length([inputs.lengths[i] for i in indices], batch_size):
        batch = [indices[place] for place in places]
        mask_BT = length_mask([inputs.lengths[i] for i in batch], inputs.rows_ND.device)
        hidden_ND, target_ND = run(inputs.padded(batch))[mask_BT], targets.padded(batch)[mask_BT]
        total += float(((hidden_ND - target_ND).norm(dim=-1) / target_ND.norm(dim=-1)).sum())
        count += len(target_ND)
    return total / max(count, 1)
