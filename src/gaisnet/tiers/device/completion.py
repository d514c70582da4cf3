"""A device's completion examples, for a decoder: head outputs, losses and scores.

Shape legend: B sequences, T positions, D hidden size, N rows (positions picked out of several sequences), V vocabulary,
R some rows at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gaisnet.compute_lock import ComputeLock
from gaisnet.data.examples import DeviceData, Tokens, tokenize
from gaisnet.errors import DataError, WireFormatError
from gaisnet.messages import BodyOutput, BodyOutputGrad, EvaluationReport, Lengths, Split
from gaisnet.models.parts import Tail
from gaisnet.models.ragged import Ragged, token_rows
from gaisnet.models.tokenization import ending_ids
from gaisnet.tiers.device.shared_weights import DeviceWeights

HEAD_BATCH = 32
_TAIL_ROWS = 64  # vocabularies are large: more rows would block answers on the same machine


class CompletionExamples:
    """Private examples for a decoder; see ``tiers.device.PrivateExamples``.

    Args:
        name: Name of the device.
        data: Its private examples.
        tokenizer: The FM's.
        context: Longest example in tokens.
        compute_lock: Held while it computes.

    Raises:
        DataError: A completion is empty or longer than the context.
    """

    def __init__(
        self, name: str, data: DeviceData, tokenizer: PreTrainedTokenizerBase, context: int, compute_lock: ComputeLock
    ) -> None:
        self._name = name
        self._compute_lock = compute_lock
        self._tokenizer = tokenizer
        self.tokens: dict[Split, list[Tokens]] = {
            split: tokenize(examples, tokenizer, context, f"device '{name}', {split}")
            for split, examples in data.splits().items()
        }

    def check_model(self, parts: DeviceWeights) -> None:
        """Raise ``DataError`` for an encoder, or where a completion has a token inside that ends an answer."""
        if parts.tail is None:
            found = "has prompts and completions, but the foundation model is an encoder, which tells classes apart"
            raise DataError(f"device '{self._name}'", found, "give it texts or images with labels")
        ends = ending_ids(self._tokenizer, parts.tail.stack.config)
        for split, tokens in self.tokens.items():
            for number, each in enumerate(tokens, 1):
                if not ends.isdisjoint(each.label_ids[:-1]):
                    asked = f"device '{self._name}', {split}, example {number}"
                    raise DataError(asked, "its completion holds a token that ends an answer", "write it otherwise")

    def count_rows(self, split: Split) -> int:
        """Count one row per token."""
        return sum(len(t.input_ids) for t in self.tokens[split])

    def compute_activations(self, split: Split, parts: DeviceWeights) -> Ragged:
        """Run the head on a split."""
        head, _ = parts.decoder_parts()

        def run(ids_BT1: Tensor) -> Tensor:
            with self._compute_lock.learning():
                hidden_BTD: Tensor = head(ids_BT1[..., 0])
            return hidden_BTD

        return token_rows([t.input_ids for t in self.tokens[split]], torch.device("cpu")).map_batches(run, HEAD_BATCH)

    def measure_lengths(self) -> Lengths:
        """Measure the examples; see ``tiers.device.PrivateExamples``."""
        every = [tokens for split in self.tokens.values() for tokens in split]
        longest = max((len(tokens.input_ids) + tokens.num_dropped for tokens in every), default=0)
        return Lengths(len(every), sum(tokens.num_dropped > 0 for tokens in every), longest)

    def count_labels(self, split: Split) -> list[int]:
        """Count the label tokens of each example."""
        return [len(t.label_ids) for t in self.tokens[split]]

    def compute_gradient(self, output: BodyOutput, parts: DeviceWeights) -> BodyOutputGrad:
        """Return the sum of the losses, and the gradient of (sum / labels of the whole step) at the rows."""
        _, tail = parts.decoder_parts()
        sent_ND = output.rows_ND.requires_grad_()
        rows_ND, labels_N = self._before_logits(output, sent_ND, tail)
        leaf_ND, loss_sum = rows_ND.detach().requires_grad_(), 0.0
        for logits_RV, labels_R in self._logits(leaf_ND, labels_N, tail):
            with self._compute_lock.learning():
                loss = F.cross_entropy(logits_RV.float(), labels_R, reduction="sum")
                (loss / output.num_labels_total).backward()
            loss_sum += loss.item()
        with self._compute_lock.learning():
            (grad_ND,) = torch.autograd.grad(rows_ND, sent_ND, leaf_ND.grad)
        return BodyOutputGrad(output.step, loss_sum, grad_ND)

    @torch.no_grad()
    def evaluate_output(self, output: BodyOutput, parts: DeviceWeights) -> EvaluationReport:
        """Count completions that greedy decoding would write up to an ending token, and sum the losses."""
        _, tail = parts.decoder_parts()
        ends = torch.tensor(sorted(ending_ids(self._tokenizer, tail.stack.config)))
        rows_ND, labels_N = self._before_logits(output, output.rows_ND, tail)
        correct, loss_sum = [], 0.0
        for logits_RV, labels_R in self._logits(rows_ND, labels_N, tail):
            written_R = logits_RV.argmax(dim=-1)
            correct.append((written_R == labels_R) | (torch.isin(written_R, ends) & torch.isin(labels_R, ends)))
            loss_sum += F.cross_entropy(logits_RV.float(), labels_R, reduction="sum").item()
        counts = [len(t.label_ids) for t in self._chosen(output)]
        num_correct = sum(bool(each.all()) for each in torch.cat(correct).split(counts))
        return EvaluationReport(len(counts), num_correct, len(labels_N), loss_sum)

    def _logits(self, rows_ND: Tensor, labels_N: Tensor, tail: Tail) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [R, V] and labels [R] of some rows at a time."""
        for rows_RD, labels_R in zip(rows_ND.split(_TAIL_ROWS), labels_N.split(_TAIL_ROWS), strict=True):
            with self._compute_lock.learning():
                logits_RV = tail.logits(rows_RD)
            yield logits_RV, labels_R

    def _before_logits(self, output: BodyOutput, rows_ND: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
        """Return inputs [N, D] of the last norm at label positions, and the labels [N]."""
        chosen = self._chosen(output)
        labels_N = torch.tensor([label for t in chosen for label in t.label_ids])
        norm = next(tail.norm.parameters())
        if rows_ND.shape[-1] != len(norm):
            raise WireFormatError(f"rows of width {rows_ND.shape[-1]} where the model has {len(norm)}")
        rows_ND = rows_ND.to(norm.dtype)
        if tail.stack.indices:
            with self._compute_lock.learning():
                rows_ND = _tail_layers(tail, rows_ND, chosen, self._name)
        if len(rows_ND) != len(labels_N):
            raise WireFormatError(f"{len(rows_ND)} rows for the {len(labels_N)} labels of device '{self._name}'")
        return rows_ND, labels_N

    def _chosen(self, output: BodyOutput) -> list[Tokens]:
        tokens = self.tokens[output.split]
        indices = output.examples_E.tolist()
        if not indices or min(indices) < 0 or max(indices) >= len(tokens):
            raise WireFormatError(f"example numbers that device '{self._name}' does not have")
        return [tokens[index] for index in indices]


def _tail_layers(tail: Tail, rows_ND: Tensor, chosen: Sequence[Tokens], name: str) -> Tensor:
    """Run the tail's own layers over whole sequences and return the label rows [N, D]."""
    lengths = [len(t.input_ids) for t in chosen]
    if len(rows_ND) != sum(lengths):
        raise WireFormatError(f"{len(rows_ND)} rows for {sum(lengths)} positions of device '{name}'")
    hidden_BTD = tail.stack.run(pad_sequence(list(rows_ND.split(lengths)), batch_first=True))
    return torch.cat(
        [hidden_BTD[b, n - len(t.label_ids) : n] for b, (n, t) in enumerate(zip(lengths, chosen, strict=True))]
    )
