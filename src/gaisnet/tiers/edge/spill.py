"""Spill activations to mapped files once an edge's memory limit is reached."""

import os
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor

from gaisnet.errors import ActivationsNotKept

_MIB = 2**20


def spill_beyond(rows: Tensor, others: Iterable[Tensor], max_mib: int | None) -> Tensor:
    """Return the rows, moved to a mapped file if they would raise memory use above ``max_mib``.

    The file is written before it is mapped, so that a full disk is an error and not a signal. It is unlinked before
    this returns: the system removes it with the tensor or the process. Only tensors in main memory count and move.

    Args:
        rows: A tensor of any shape and dtype.
        others: Other tensors that are kept, in memory or in files.
        max_mib: Limit for all of them; None for no limit.

    Raises:
        ActivationsNotKept: The file cannot be written; nothing has changed.
    """
    in_memory = sum(each.nbytes for each in (*others, rows) if _is_in_memory(each))
    if max_mib is None or in_memory <= max_mib * _MIB or not rows.nbytes or not _is_in_memory(rows):
        return rows
    try:
        with tempfile.NamedTemporaryFile(prefix="gaisnet-activations-") as file:
            file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=rows.numel(), dtype=rows.dtype)
    except (OSError, RuntimeError) as error:  # torch's own mapping raises the latter
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")  # gettempdir fails where none can be written
        raise ActivationsNotKept(rows.nbytes, str(folder), str(error)) from error
    return mapped.view(rows.shape)


def _is_in_memory(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.untyped_storage().filename is None
