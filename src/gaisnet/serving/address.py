"""Where something is served: a file beside it says so, as long as it is."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESS_NAME = "serving.url"
"""File in the folder of a run, or of a device's kit."""


@contextmanager
def announced(folder: Path, url: str) -> Iterator[None]:
    """Inside, whoever knows the folder finds the server."""
    path = folder / ADDRESS_NAME
    with suppress(OSError):  # it may lie where nobody writes
        path.write_text(f"{url}\n", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
