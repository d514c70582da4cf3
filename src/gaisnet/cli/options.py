"""Arguments that several commands have."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: key=value, e.g. --set relay.enabled=false --set seed=1."),
]
ConfigFile = Annotated[Path | None, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.")]
Out = Annotated[Path | None, typer.Option(help="Output folder; must be new or empty. [default: runs/<time>]")]
Resume = Annotated[Path | None, typer.Option(help="In place of CONFIG: go on with the run in this output folder.")]

Stay = Annotated[bool, typer.Option("--stay", help="A cloud goes on answering when the run has finished.")]
ServeOn = Annotated[
    int | None,
    typer.Option("--serve", metavar="PORT", min=0, max=65535, help="A device answers callers at this port of its own."),
]


def output_folder(config: Path | None, out: Path | None, resume: Path | None) -> Path:
    """The output folder that CONFIG, --out and --resume mean."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either CONFIG or --resume DIR", param_hint="CONFIG")
    if resume is not None and out is not None:
        raise typer.BadParameter("a run that goes on stays in its folder; leave out --out", param_hint="--out")
    return resume or out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
