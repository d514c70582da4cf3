"""Arguments that several commands share."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one setting: key=value, e.g. --set relay.enabled=false --set seed=1. A relative path in it is "
        "taken from the current directory, one in CONFIG from the folder of CONFIG.",
    ),
]
ServiceOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting of the service, the front or of faults, e.g. --set front.max_answers=16, or say where "
        "moved files are now: --set model.foundation=FOLDER --set edges.0.devices.1.data=FOLDER.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.")]
Out = Annotated[Path | None, typer.Option(show_default="runs/<time>", help="Output folder; must be new or empty.")]
Resume = Annotated[Path | None, typer.Option(help="In place of CONFIG: go on with the run in this output folder.")]

Stay = Annotated[bool, typer.Option("--stay", help="A cloud goes on answering when the run has finished.")]
ServeOn = Annotated[
    int | None,
    typer.Option("--serve", metavar="PORT", min=0, max=65535, help="A device answers callers at this port of its own."),
]

_ANSWERS = "Answers"  # a panel of the help
Host = Annotated[
    str,
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="Address to listen on. Beyond this machine, such as 0.0.0.0, API keys are needed.",
    ),
]
ApiKeysFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_ANSWERS,
        show_default="$GAISNET_API_KEYS, with commas between",
        help="File with a key per line.",
    ),
]
Escalate = Annotated[
    Literal["never", "auto", "always"],
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="For the model 'auto': never ask the foundation model, where the DM is not sure, always.",
    ),
]
EscalateTo = Annotated[
    Literal["merged", "domain"],
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="The adapter on the foundation model then: that of all domains, or of the DM's own.",
    ),
]
MostEscalated = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, rich_help_panel=_ANSWERS, help="To calibrate: share of answers that may be escalated."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_ANSWERS,
        show_default="calibrated",
        help="Escalate below this probability of the DM's likeliest token.",
    ),
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate",
        rich_help_panel=_ANSWERS,
        help="The DM drafts what the foundation model writes: fewer calls to it.",
    ),
]


def output_folder(config: Path | None, out: Path | None, resume: Path | None) -> Path:
    """Return the output folder that CONFIG, --out and --resume name."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either CONFIG or --resume DIR", param_hint="CONFIG")
    if resume is not None and out is not None:
        raise typer.BadParameter("a run that goes on stays in its folder; leave out --out", param_hint="--out")
    return resume or out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
