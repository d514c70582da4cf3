"""Arithmetic on adapters by their weights alone.

Sums (task arithmetic, Ilharco et al., arXiv 2212.04089), and sparse sums as peft has
them: TIES (Yadav et al., arXiv 2306.01708) and DARE (Yu et al., arXiv 2311.03099).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor
from torch.nn import functional as F

from gaisnet.adapters.state import AdapterTensors

Sparse = Literal["ties", "dare"]


def weakened(adapter: AdapterTensors, share: float) -> AdapterTensors:
    """Scale an adapter's products B A by a share."""
    return {key: tensor * share if ".lora_B." in key else tensor for key, tensor in adapter.items()}


def side_by_side(adapters: Sequence[AdapterTensors], weight: float = 1.0) -> AdapterTensors:
    """Return the adapter whose product B A is exactly ``weight`` times the sum of all products.

    Products of averaged factors are not averaged products; concatenating factors keeps each product whole
    (peft's combination type "cat"). Its rank is the sum of the ranks, and so must its alpha be.
    """
    return {key: _joined([a[key] for a in adapters], key, weight) for key in adapters[0]}


def _joined(factors: Sequence[Tensor], key: str, weight: float) -> Tensor:
    if ".lora_A." in key:
        return torch.cat(list(factors), dim=0)
    return torch.cat(list(factors), dim=1) * weight


@torch.no_grad()
def compressed(adapter: AdapterTensors, rank: int) -> AdapterTensors:
    """Return the adapter of lower rank with the nearest products B A (by singular values)."""
    smaller: AdapterTensors = {}
    for key_a in (key for key in adapter if ".lora_A." in key):
        key_b = key_a.replace(".lora_A.", ".lora_B.")
        q_OK, r_KR = torch.linalg.qr(adapter[key_b].float())
        q_IK, r_LR = torch.linalg.qr(adapter[key_a].float().T)
        a_RL, b_KR = _factors(r_KR @ r_LR.T, rank)
        smaller[key_a], smaller[key_b] = a_RL @ q_IK.T, q_OK @ b_KR
    return smaller


@torch.no_grad()
def sparse_sum(
    adapters: Sequence[AdapterTensors], method: Sparse, weight: float, density: float, seed: int
) -> AdapterTensors:
    """Merge adapters into one with the ranks of all together, nearest to the merged products B A (by singular values).

    Args:
        adapters: Adapters of one shape.
        method: 'ties' keeps the largest numbers of each product, and of those the ones whose sign most agree on;
            'dare' keeps random ones and scales them up accordingly.
        weight: Weight of each product.
        density: Share of the numbers that are kept.
        seed: For 'dare'.
    """
    merged: AdapterTensors = {}
    device = next(iter(adapters[0].values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for key_a in (key for key in adapters[0] if ".lora_A." in key):
            key_b = key_a.replace(".lora_A.", ".lora_B.")
            products = [each[key_b].float() @ each[key_a].float() for each in adapters]
            weights = torch.full((len(products),), weight, device=device)
            product = (ties if method == "ties" else dare_linear)(products, weights, density)
            merged[key_a], merged[key_b] = _factors(product, sum(len(each[key_a]) for each in adapters))
    return merged


def _factors(product_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor a matrix into A [R, I] and B [O, R] with the nearest product B A, zero-padded beyond its own rank."""
    u_OK, s_K, v_KI = torch.linalg.svd(product_OI, full_matrices=False)
    root_K, lacking = s_K[:rank].sqrt(), max(0, rank - len(s_K))
    a_RI = F.pad(root_K[:, None] * v_KI[:rank], (0, 0, 0, lacking))
    b_OR = F.pad(u_OK[:, :rank] * root_K, (0, lacking))
    return a_RI.contiguous(), b_OR.contiguous()
