"""``gaisnet baselines``: baselines for a finished run."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, told_errors
from gaisnet.cli.options import ServiceOverrides

if TYPE_CHECKING:
    from rich.table import Table

    from gaisnet.runs.summary import Summary


class Kind(StrEnum):
    """The baselines; typer takes no list of literals."""

    ZERO_SHOT = "zero_shot"
    FEW_SHOT = "few_shot"
    NO_RELAY = "no_relay"
    POOLED = "pooled"
    SCRATCH = "scratch"


def baselines(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    only: Annotated[
        list[Kind] | None,
        typer.Option(help="Run only this baseline; may be given several times."),
    ] = None,
    overrides: ServiceOverrides = None,
) -> None:
    """Compare a finished run with its alternatives, on the same examples with as many passes over them.

    pooled: LoRA on all layers of the foundation model (FM), with a domain's examples in one place, which the network
    avoids. scratch: an edge alone, with a model of the domain model's (DM's) size trained from scratch. no_relay: an
    edge alone with its devices and the DM. zero_shot and few_shot: the FM as it is.

    Writes them into RUN/summary.json and report.html, with the share of the gap to pooled that the network closed
    (gap_closed). A stopped measurement resumes. The examples must be on this machine.
    """
    with told_errors():
        quiet_libraries()
        from gaisnet.research.bench.baselines import KINDS, measure_baselines

        with LiveProgress(console) as progress:
            summary = measure_baselines(run, progress, only or KINDS, overrides or ())
    console.print(_table(summary))
    console.print(f"All of it is in {run / 'summary.json'} and {run / 'report.html'}", highlight=False, soft_wrap=True)


def _table(summary: "Summary") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from gaisnet.runs.table import against_rows

    table = Table("", title="Accuracy on held-out examples")
    for name in summary.domains:
        table.add_column(Text(name), justify="right")
    for label, cells in against_rows(summary):
        table.add_row(Text(label), *cells)
    return table
