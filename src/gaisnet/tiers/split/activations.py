"""Activations of a device's examples as an edge or the cloud keeps them, with lengths and label counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from gaisnet.messages import SmashedData
from gaisnet.models.ragged import Ragged

RowSelection = Literal["every", "last", "first"]
"""Rows of a sequence that its owner needs: all of them, or those that carry labels, which are its last or its first."""


@dataclass(frozen=True)
class Activations:
    """Hidden states of one split of a device's examples, ready for layer ``next_layer``."""

    hidden: Ragged
    num_labels: tuple[int, ...]
    next_layer: int

    @classmethod
    def from_smashed(cls, smashed: SmashedData, device: torch.device, dtype: torch.dtype) -> "Activations":
        """Read a message."""
        rows_ND = smashed.hidden_ND.to(device, dtype)
        return cls(
            Ragged(rows_ND, tuple(smashed.lengths_E.tolist())), tuple(smashed.num_labels_E.tolist()), smashed.next_layer
        )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.hidden)

    def run_layers(
        self, run: Callable[[Tensor], Tensor], next_layer: int, batch_size: int, causal: bool = True
    ) -> "Activations":
        """Run the examples through some layers; see ``Ragged.map_batches``."""
        return replace(self, hidden=self.hidden.map_batches(run, batch_size, causal), next_layer=next_layer)


def select_tail_rows(lengths: Sequence[int], num_labels: Sequence[int], selection: RowSelection) -> list[range]:
    """Return the rows that a tail needs of each sequence, counted over the rows of all sequences in order.

    Args:
        lengths: Number of positions of each sequence.
        num_labels: Number of positions that carry a label, per sequence.
        selection: Rows to select; every row if the tail has layers of its own.
    """
    spans = zip(accumulate(lengths), lengths, num_labels, strict=True)
    if selection == "first":
        return [range(end - n, end - n + k) for end, n, k in spans]
    return [range(end - (n if selection == "every" else k), end) for end, n, k in spans]
