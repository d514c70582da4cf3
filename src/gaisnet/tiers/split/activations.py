"""What an edge (or the cloud) keeps of a device's examples: activations, lengths, and how many rows carry a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from gaisnet.messages import SmashedData
from gaisnet.models.ragged import Ragged

RowSelection = Literal["every", "last", "first"]
"""Rows that an owner needs of a sequence: all of them, or those that carry labels, which are its last or its first."""


@dataclass(frozen=True)
class Activations:
    """Hidden states of one device's split, ready for layer ``next_layer``."""

    hidden: Ragged
    num_labels: tuple[int, ...]
    next_layer: int

    @classmethod
    def from_smashed(cls, smashed: SmashedData, device: torch.device, dtype: torch.dtype) -> "Activations":
        """Out of a message."""
        rows_ND = smashed.hidden_ND.to(device, dtype)
        return cls(
            Ragged(rows_ND, tuple(smashed.lengths_E.tolist())), tuple(smashed.num_labels_E.tolist()), smashed.next_layer
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.hidden)

    def run_layers(
        self, run: Callable[[Tensor], Tensor], next_layer: int, batch_size: int, causal: bool = True
    ) -> "Activations":
        """The same examples some layers later; see ``Ragged.map_batches``."""
        return replace(self, hidden=self.hidden.map_batches(run, batch_size, causal), next_layer=next_layer)


def tail_rows(lengths: Sequence[int], num_labels: Sequence[int], wanted: RowSelection) -> list[range]:
    """Which rows a tail needs of each sequence, out of the rows of all, one sequence after the other.

    Args:
        lengths: Positions of each sequence.
        num_labels: How many of them carry a label.
        wanted: Which; every one if the tail has layers of its own.
    """
    spans = zip(accumulate(lengths), lengths, num_labels, strict=True)
    if wanted == "first":
        return [range(end - n, end - n + k) for end, n, k in spans]
    return [range(end - (n if wanted == "every" else k), end) for end, n, k in spans]
