"""What an edge (or the cloud) keeps of a device's examples: activations, lengths, and how many rows carry a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from gaisnet.messages import SmashedData
from gaisnet.models.ragged import Ragged


@dataclass(frozen=True)
class Activations:
    """Hidden states of one device's split, ready for layer ``next_layer``."""

    hidden: Ragged
    num_labels: tuple[int, ...]
    next_layer: int

    @classmethod
    def of(cls, smashed: SmashedData, device: torch.device, dtype: torch.dtype) -> "Activations":
        """Out of a message."""
        rows_ND = smashed.hidden_ND.to(device, dtype)
        return cls(
            Ragged(rows_ND, tuple(smashed.lengths_E.tolist())), tuple(smashed.num_labels_E.tolist()), smashed.next_layer
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.hidden)

    def through(self, run: Callable[[Tensor], Tensor], next_layer: int, batch_size: int) -> "Activations":
        """The same examples some layers later."""
        return replace(self, hidden=self.hidden.map_batches(run, batch_size), next_layer=next_layer)


def tail_rows(lengths: Sequence[int], num_labels: Sequence[int], whole: bool) -> list[range]:
    """Which rows a tail needs of each sequence, out of the rows of all, one sequence after the other.

    Args:
        lengths: Positions of each sequence.
        num_labels: How many of the last positions predict a label.
        whole: Every position, because the tail has layers of its own; otherwise label positions only.
    """
    ends = accumulate(lengths)
    return [range(e - (n if whole else k), e) for e, n, k in zip(ends, lengths, num_labels, strict=True)]
