"""Packed batches: sequences as consecutive rows, through layers made for padded batches.

A layer works row by row except for attention, so padding would only waste time. Attention alone gets the sequences
padded, and its output is packed again. Outputs, gradients and an optimizer step equal those of the padded batch, up to
the order of sums.

Shape legend: B sequences of at most T positions, N rows of all of them and some more, D hidden size, or size of a head;
H attention heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gaisnet.models.attention import attend_to_all

_ROWS_AT_ONCE = 16
"""Blocks are filled up to a multiple of this.

OneDNN compiles code per number of rows, which takes longer than the rows.
"""


class Packing:
    """Positions of the rows of a batch's sequences.

    Args:
        lengths: Lengths of the sequences, at least one.
        device: Device of the rows.
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
        """Pack sequences [T, D] as [1, N, D]."""
        fill_ND = sequences[0].new_zeros(self._filling, sequences[0].shape[-1])
        return torch.cat([*sequences, fill_ND])[None]

    @property
    def positions_1N(self) -> Tensor:
        """Position of each row in its sequence."""
        return (self._slot_of_row_N % self._shape_BT[1])[None]

    @property
    def real_BT(self) -> Tensor | None:
        """Mask of real positions in the padded batch; None if all are."""
        return self._real_BT if len(self._padding) else None

    def padded_like(self, rows_1ND: Tensor) -> Tensor:
        """Return a tensor of the padded batch's shape [B, T, D] without memory, for callers that need the shape."""
        return rows_1ND.new_empty(1, 1, 1).expand(*self._shape_BT, rows_1ND.shape[-1])

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each sequence, [1, H, N, D] -> [1, N, H, D]; ``mask`` is that of the padded batch."""
        found_BTHD, weights = attend_to_all(
            module, self._padded(query), self._padded(key), self._padded(value), mask, *args, **kw
        )
        slots = found_BTHD.reshape(len(self._row_of_slot_S), -1)
        rows = _Moved.apply(slots, self._slot_of_row_N, self._row_of_slot_S, self._padding)
        return rows.view(1, -1, *found_BTHD.shape[2:]), weights

    def _padded(self, heads_1HND: Tensor) -> Tensor:
        """Pad [1, H, N, D] -> [B, H, T, D]."""
        rows_NHD = heads_1HND[0].transpose(0, 1)
        slots = _Moved.apply(rows_NHD.flatten(1), self._row_of_slot_S, self._slot_of_row_N, self._fill_rows)
        padded_BTHD: Tensor = slots.view(*self._shape_BT, *rows_NHD.shape[1:])
        return padded_BTHD.transpose(1, 2)


class _Moved(torch.autograd.Function):
    """Permutation of rows: place i gets row ``there[i]``. Its gradient goes back by ``back``; rows ``unseen`` get none.

    torch's own gradient of indexing accumulates, since a row may be chosen twice; here none is.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor, unseen: Tensor) -> Tensor:
        ctx.back, ctx.unseen = back, unseen
        return rows.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_outputs[0].index_select(0, ctx.back).index_fill_(0, ctx.unseen, 0.0), None, None, None
