"""``gaisnet cloud``, ``edge`` and ``device``: the processes that stay. ``gaisnet deploy start`` starts them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gaisnet.cli.display import quiet_libraries, told_errors
from gaisnet.deployment.launcher import FINAL


def cloud(
    kit: Annotated[Path, typer.Argument(help="The cloud's kit.")],
    out: Annotated[
        Path | None, typer.Option(help="Output folder; goes on if it holds a run. [default: KIT/run]")
    ] = None,
) -> None:
    """The cloud's process: holds the foundation model, carries out the run, and ends with it."""
    with _site_process():
        from gaisnet.deployment.resident import run_cloud

        run_cloud(kit, out)


def edge(kit: Annotated[Path, typer.Argument(help="The edge's kit.")]) -> None:
    """An edge's process: holds a domain model, serves its devices, and stays."""
    with _site_process():
        from gaisnet.deployment.resident import run_edge

        run_edge(kit)


def device(kit: Annotated[Path, typer.Argument(help="The device's kit.")]) -> None:
    """A device's process: holds private data, head and tail, and stays."""
    with _site_process():
        from gaisnet.deployment.resident import run_device

        run_device(kit)


@contextmanager
def _site_process() -> Iterator[None]:
    """What is the same for every process that stays: a log on standard error, an end in order."""
    from gaisnet.deployment.resident import end_in_order

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    end_in_order()
    quiet_libraries()
    with told_errors(FINAL):
        yield
