"""What an edge (or the cloud) keeps of a device's examples: activations, lengths, and how many rows carry a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


def rows_for_tail(hidden_BTD: Tensor, lengths: Sequence[int], num_labels: Sequence[int], whole: bool) -> Tensor:
    """The rows [N, D] that a tail needs, sequence after sequence.

    Args:
        hidden_BTD: Body output, padded on the right.
        lengths: Real positions of each sequence.
        num_labels: How many of the last real positions predict a label.
        whole: Every real position, because the tail has layers of its own; otherwise label positions only.
    """
    firsts = [0] * len(lengths) if whole else [n - k for n, k in zip(lengths, num_labels, strict=True)]
    longest = hidden_BTD.shape[1]
    rows = [b * longest + t for b, (first, n) in enumerate(zip(firsts, lengths, strict=True)) for t in range(first, n)]
    # All at once: the gradient of a slice per sequence would be a whole batch of zeros per sequence.
    return hidden_BTD.flatten(0, 1).index_select(0, torch.tensor(rows, device=hidden_BTD.device))


def rows_per_example(lengths: Sequence[int], num_labels: Sequence[int], whole: bool) -> list[int]:
    """How many rows ``rows_for_tail`` takes of each sequence."""
    return list(lengths if whole else num_labels)
