"""Federated averaging (McMahan et al., arXiv 1602.05629, algorithm 1): the mean weighted by number of examples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, check_same_shapes


def fedavg(updates: Sequence[tuple[AdapterTensors, int]]) -> AdapterTensors:
    """Average adapters tensor by tensor, weighted by ``num_examples``.

    Args:
        updates: Pairs of an adapter and the number of examples that it learned from; at least one, all of one shape.

    Raises:
        AdapterMismatch: Adapters of different shape, or with a number that is not finite.
        ValueError: No update, or no example among all of them.
    """
    total = sum(num_examples for _, num_examples in updates)
    if total < 1:
        raise ValueError("fedavg needs at least one update with at least one example")
    reference = updates[0][0]
    for adapter, _ in updates:
        check_same_shapes("update", reference, adapter)
    return {key: _mean([(adapter[key], n / total) for adapter, n in updates]) for key in reference}


def _mean(weighted: Sequence[tuple[Tensor, float]]) -> Tensor:
    return torch.stack([tensor * weight for tensor, weight in weighted]).sum(dim=0)
