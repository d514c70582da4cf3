"""Sequences of different lengths as one block of rows, and batches of them.

Shape legend: N rows of all sequences, one after the other; B sequences of a batch, T positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Ragged:
    """Rows [N, D] of sequences with the given lengths."""

    rows_ND: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    def sequences(self) -> tuple[Tensor, ...]:
        """Return views [length, D], one per sequence."""
        return tuple(torch.split(self.rows_ND, list(self.lengths)))

    def later(self) -> Tensor:
        """Return the rows of all positions but the first of each sequence, an attention sink with a huge norm."""
        later_N = torch.cat([torch.arange(length) > 0 for length in self.lengths])
        return self.rows_ND[later_N.to(self.rows_ND.device)]

    def some(self, indices: Sequence[int]) -> "Ragged":
        """Return some of the sequences, in the order of ``indices``."""
        every = self.sequences()
        return Ragged(torch.cat([every[i] for i in indices]), tuple(self.lengths[i] for i in indices))

    def padded(self, indices: Sequence[int]) -> Tensor:
        """Return some sequences as [B, T, D], padded with zeros on the right."""
        every = self.sequences()
        return pad_sequence([every[index] for index in indices], batch_first=True)

    def map_batches(self, function: Callable[[Tensor], Tensor], batch_size: int, causal: bool = True) -> "Ragged":
        """Apply a function [B, T, D] -> [B, T, E] in batches of similar lengths, without gradients.

        Args:
            function: Gets sequences padded on the right if it is causal, and unpadded if not.
            batch_size: Most sequences at once.
            causal: Whether the output at a position is independent of later ones.
        """
        results: list[Tensor] = []  # views of one block
        with torch.no_grad():
            for batch in by_length(self.lengths, batch_size, equal=not causal):
                output_BTE = function(self.padded(batch))
                if not results:
                    block_NE = output_BTE.new_empty(len(self.rows_ND), output_BTE.shape[-1])
                    results = list(torch.split(block_NE, list(self.lengths)))
                for index, rows in zip(batch, output_BTE, strict=True):
                    results[index].copy_(rows[: self.lengths[index]])
        return Ragged(block_NE, self.lengths)


def token_rows(sequences: Sequence[Sequence[int]], device: torch.device) -> Ragged:
    """Return token ids as rows [N, 1] of int64."""
    return Ragged(
        torch.tensor([i for ids in sequences for i in ids], device=device)[:, None], tuple(map(len, sequences))
    )


def join(parts: Sequence[Ragged]) -> Ragged:
    """Concatenate blocks of sequences."""
    return Ragged(torch.cat([p.rows_ND for p in parts]), tuple(n for p in parts for n in p.lengths))


def by_length(lengths: Sequence[int], batch_size: int, equal: bool = False) -> list[list[int]]:
    """Return all indices in batches of similar lengths, shortest first; ``equal`` allows one length per batch."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    alike = [list(some) for _, some in groupby(order, key=lengths.__getitem__)] if equal else [order]
    return [some[first : first + batch_size] for some in alike for first in range(0, len(some), batch_size)]


def shuffled_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Return one epoch of random batches with sequences of similar lengths, so that little is padded.

    The order is random; within windows of a few batches sequences are sorted by length, then the batches are shuffled.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    window = batch_size * _WINDOW_BATCHES
    for first in range(0, len(order), window):
        inside = sorted(order[first : first + window], key=lambda index: lengths[index])
        batches.extend(inside[at : at + batch_size] for at in range(0, len(inside), batch_size))
    for position in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[position]


def relative_square(hidden_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Return the mean over rows of |hidden - target|^2 / |target|^2; zero if there are no rows."""
    errors_N = (hidden_ND - target_ND).square().sum(-1) / target_ND.square().sum(-1)
    return errors_N.sum() / max(len(errors_N), 1)
