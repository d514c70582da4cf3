"""Activations beyond what an edge may keep in memory: in files that are mapped, and gone with the last use of them."""

import os
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor

from gaisnet.errors import ActivationsNotKept

_MIB = 2**20


def spill_beyond(rows: Tensor, others: Iterable[Tensor], max_mib: int | None) -> Tensor:
    """The rows themselves, or the same in a file, if with them more than ``max_mib`` would be in memory.

    The file is written before it is mapped, so that a full disk is an error and not a signal. It has no name any more
    when this returns: the system removes it when the tensor, or the process, has ended. Only what is in main memory
    counts, and only that is moved.

    Args:
        rows: Any shape and dtype.
        others: What is kept besides, in memory or in files.
        max_mib: None for no limit.

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
