"""Least squares on layers' outputs for a text: the closed forms behind relays and merged adapters.

Shape legend: N rows (positions of all sequences), I inputs of a linear module, D hidden size, R rank, K of a system.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.adapters.tuning import watched
from gaisnet.models.parts import Layers
from gaisnet.models.ragged import Ragged

_BATCH = 32


def fit_low_rank(x_NI: Tensor, y_ND: Tensor, rank: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return A [R, I] and B [D, R] with ``x @ A.T @ B.T`` nearest to ``y``: reduced-rank ridge regression.

    Least squares plus ``penalty`` times the mean square of a column of ``x``, times that of the weights B A (Mukherjee
    and Zhu, Statistical Analysis and Data Mining 4, 2011). float32.
    """
    x_NI, y_ND = x_NI.float(), y_ND.float()
    ridge = penalty * float(x_NI.square().sum()) / x_NI.shape[1]
    if len(x_NI) < x_NI.shape[1]:  # both give the same weights; the smaller system is solved
        full_ID = x_NI.T @ solve_ridge(x_NI @ x_NI.T, ridge, y_ND)
    else:
        full_ID = solve_ridge(x_NI.T @ x_NI, ridge, x_NI.T @ y_ND)
    _, directions_DD = torch.linalg.eigh(y_ND.T @ x_NI @ full_ID)  # in order of explained variance
    b_DR = directions_DD[:, -rank:]
    a_RI = (full_ID @ b_DR).T
    lacking = rank - len(a_RI)  # for a rank above the width
    return F.pad(a_RI, (0, 0, 0, lacking)).contiguous(), F.pad(b_DR, (0, lacking)).contiguous()


def solve_ridge(gram_KK: Tensor, ridge: float, right_KD: Tensor) -> Tensor:
    """Solve (gram + ridge) @ solution = right, also where rounding or NaN defeats Cholesky."""
    system_KK = gram_KK + ridge * torch.eye(len(gram_KK), device=gram_KK.device)
    factor_KK, failed = torch.linalg.cholesky_ex(system_KK)
    return torch.linalg.solve(system_KK, right_KD) if failed else torch.cholesky_solve(right_KD, factor_KK)


def second_moments(rows_NI: Tensor) -> Tensor:
    """Return the mean outer product [I, I] of the rows, in float32."""
    rows_NI = rows_NI.float()
    return rows_NI.T @ rows_NI / max(len(rows_NI), 1)


def trace_layer(body: Layers, adapter: str, layer: int, hidden: Ragged) -> tuple[dict[str, Ragged], Ragged]:
    """Run a layer; return the inputs of each module that has ``adapter``, by the module's path, and the layer's output.

    The adapter need not be active. Without gradients.
    """
    widths: list[int] = []
    with watched(body.layers[str(layer)], adapter) as seen:

        def run(hidden_BTD: Tensor) -> Tensor:
            leaving_BTD = body.run(hidden_BTD, layer, layer + 1)
            every = [*(inputs.pop() for inputs in seen.values()), leaving_BTD]
            widths[:] = [each.shape[-1] for each in every]
            return torch.cat(every, dim=-1)

        both = hidden.map_batches(run, _BATCH)
    *entering, leaving_ND = both.rows_ND.split(widths, dim=1)
    inputs = {path: Ragged(rows_NI, hidden.lengths) for path, rows_NI in zip(seen, entering, strict=True)}
    return inputs, Ragged(leaving_ND, hidden.lengths)
