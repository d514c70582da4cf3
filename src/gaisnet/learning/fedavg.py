"""Federated averaging (McMahan et al., arXiv 1602.05629, algorithm 1): the mean weighted by number of examples.

LoRA factors can be averaged, or their products: the mean of the factors B and A is not a pair of factors of the mean
of the products B A (Wang et al., arXiv 2409.05976).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import compressed, side_by_side, weakened
from gaisnet.adapters.state import AdapterTensors, check_same_shapes


def fedavg(updates: Sequence[tuple[AdapterTensors, int]]) -> AdapterTensors:
    """Average adapters tensor by tensor, weighted by ``num_examples``.

    Args:
        updates: Pairs of an adapter and the number of examples that it was trained on; at least one, all of one shape.

    Raises:
        AdapterMismatch: Adapters of different shape, or with a number that is not finite.
        ValueError: No update, or no example among all of them.
    """
    total, reference = _count_examples(updates), updates[0][0]
    return {key: _mean([(adapter[key], n / total) for adapter, n in updates]) for key in reference}


def average_products(updates: Sequence[tuple[AdapterTensors, int]]) -> AdapterTensors:
    """Average the products of LoRA adapters, and return the nearest adapter of one adapter's rank.

    Other tensors, such as a classifier's, are averaged directly. A single adapter is returned unchanged.
    Arguments and errors as for ``fedavg``.
    """
    total, mean = _count_examples(updates), fedavg(updates)
    ranks = [len(tensor) for key, tensor in mean.items() if ".lora_A." in key]
    if len(updates) == 1 or not ranks:
        return mean
    factors = [({key: t for key, t in adapter.items() if ".lora_" in key}, n / total) for adapter, n in updates]
    return mean | compressed(side_by_side([weakened(adapter, share) for adapter, share in factors]), ranks[0])


def _count_examples(updates: Sequence[tuple[AdapterTensors, int]]) -> int:
    """Check that updates agree in shape; return their number of examples."""
    total = sum(num_examples for _, num_examples in updates)
    if total < 1:
        raise ValueError("fedavg needs at least one update with at least one example")
    for adapter, _ in updates:
        check_same_shapes("update", updates[0][0], adapter)
    return total


def _mean(weighted: Sequence[tuple[Tensor, float]]) -> Tensor:
    return torch.stack([tensor * weight for tensor, weight in weighted]).sum(dim=0)
