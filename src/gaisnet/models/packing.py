"""Sequences of a batch as rows, one after the other, through layers that are made for padded batches.

Everything in a layer but attention is done row by row, so that padding there is computed for nothing. Only attention
sees the sequences padded, and makes rows of what it found. Outputs, gradients and an optimizer step are those of the
padded batch, in another order of sums.

Shape legend: B sequences of T positions at most, N rows of all of them and some more, D hidden size, or size of a head;
H attention heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gaisnet.models.attention import attend_to_all

_ROWS_AT_ONCE = 16
"""Blocks are filled up to a multiple: oneDNN makes code for every number of rows, which takes longer than the rows."""


class Packing:
    """Where the rows of a batch's sequences are.

    Args:
        lengths: Of the sequences, one at least.
        device: Of the rows.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        real_BT = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        slots_N, filling = real_BT.flatten().nonzero()[:, 0], -sum(lengths) % _ROWS_AT_ONCE
        self._real_BT = real_BT
        self._shape_BT = real_BT.shape
        self._filling = filling
        self._slot_of_row_N = torch.cat([slots_N, slots_N.new_zeros(filling)])
        self._row_of_slot_S = torch.zeros_like(real_BT, dtype=torch.long).flatten()  # padding: any row, never seen
        self._row_of_slot_S[slots_N] = torch.arange(len(slots_N), device=device)
        self._padding = (~real_BT).flatten().nonzero()[:, 0]
        self._fill_rows = torch.arange(len(slots_N), len(slots_N) + filling, device=device)

    def rows(self, sequences: Sequence[Tensor]) -> Tensor:
        """The sequences [T, D] as [1, N, D]."""
        fill_ND = sequences[0].new_zeros(self._filling, sequences[0].shape[-1])
        return torch.cat([*sequences, fill_ND])[None]

    @property
    def positions_1N(self) -> Tensor:
        """Of each row in its sequence."""
        return (self._slot_of_row_N % self._shape_BT[1])[None]

    @property
    def real_BT(self) -> Tensor | None:
        """Which positions of the padded batch are real; None if all are."""
        return self._real_BT if len(self._padding) else None

    def padded_like(self, rows_1ND: Tensor) -> Tensor:
        """Something of the shape [B, T, D] of the padded batch, without memory, for who looks at no more than that."""
        return rows_1ND.new_empty(1, 1, 1).expand(*self._shape_BT, rows_1ND.shape[-1])

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention within each sequence, [1, H, N, D] -> [1, N, H, D]; ``mask`` is that of the padded batch."""
        found_BTHD, weights = attend_to_all(
            module, self._padded(query), self._padded(key), self._padded(value), mask, *args, **kw
        )
        slots = found_BTHD.reshape(len(self._row_of_slot_S), -1)
        rows = _Moved.apply(slots, self._slot_of_row_N, self._row_of_slot_S, self._padding)
        return rows.view(1, -1, *found_BTHD.shape[2:]), weights

    def _padded(self, heads_1HND: Tensor) -> Tensor:
        """[1, H, N, D] -> [B, H, T, D]."""
        rows_NHD = heads_1HND[0].transpose(0, 1)
        slots = _Moved.apply(rows_NHD.flatten(1), self._row_of_slot_S, self._slot_of_row_N, self._fill_rows)
        padded_BTHD: Tensor = slots.view(*self._shape_BT, *rows_NHD.shape[1:])
        return padded_BTHD.transpose(1, 2)


class _Moved(torch.autograd.Function):
    """Rows elsewhere: place i has row ``there[i]``. Its gradient goes back by ``back``; none to the rows ``unseen``.

    torch's own gradient of a choice of rows adds up, since a row may be chosen twice; here nobody sees the second one.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor, unseen: Tensor) -> Tensor:
        ctx.back, ctx.unseen = back, unseen
        return rows.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_outputs[0].index_select(0, ctx.back).index_fill_(0, ctx.unseen, 0.0), None, None, None
