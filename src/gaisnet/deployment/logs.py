"""Log files of limited size, whoever writes them.

The writers are other processes (NVFlare's too), which hold their file open to append. So a full log is
copied aside and emptied in place, as logrotate's ``copytruncate`` does: the writer's next line is the first of the
empty file. Lines written during the copy, which takes milliseconds, are lost.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

MOST_BYTES = 10 * 2**20
NUM_KEPT = 3
"""Old files beside each log, as ``LOG.1`` (the latest) and so on: a log takes ``MOST_BYTES * (NUM_KEPT + 1)`` at most,
and what its writer adds within the second between two looks."""


def rotate(log: Path, most_bytes: int = MOST_BYTES, kept: int = NUM_KEPT) -> bool:
    """Start ``log`` anew if it is longer than ``most_bytes``.

    Return whether it was. A full disk loses only old lines.
    """
    try:
        if log.stat().st_size <= most_bytes:
            return False
    except OSError:  # it is not there yet
        return False
    with suppress(OSError):
        for number in range(kept, 1, -1):
            with suppress(FileNotFoundError):
                _old(log, number - 1).replace(_old(log, number))
        shutil.copyfile(log, _old(log, 1))
    with suppress(OSError):
        os.truncate(log, 0)
    return True


def _old(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")
