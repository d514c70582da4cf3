"""Arguments that several commands share."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one setting: key=value, e.g. --set relay.enabled=false --set seed=1. A relative path given "
        "here starts at the current directory; one in CONFIG starts at the folder of CONFIG.",
    ),
]
ServiceOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting of service, front or faults, e.g. --set front.max_answers=16, or name the new place of "
        "moved files: --set model.foundation=FOLDER --set edges.0.devices.1.data=FOLDER.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.")]
Out = Annotated[Path | None, typer.Option(show_default="runs/<time>", help="Output folder; must be new or empty.")]
Resume = Annotated[Path | None, typer.Option(help="In place of CONFIG: resume the run in this output folder.")]

Stay = Annotated[bool, typer.Option("--stay", help="The cloud keeps serving after the run has finished.")]
ServeOn = Annotated[
    int | None,
    typer.Option(
        "--serve",
        metavar="PORT",
        min=0,
        max=65535,
        help="TCP port of an HTTP endpoint on this device; 0 takes a free one.",
    ),
]

_ANSWERS = "Answers"  # a panel of the help
Host = Annotated[
    str,
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="Address to listen on. One that other machines can reach, such as 0.0.0.0, needs API keys.",
    ),
]
ApiKeysFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_ANSWERS,
        show_default="$GAISNET_API_KEYS, with commas between",
        help="File with one key per line.",
    ),
]
Escalate = Annotated[
    Literal["never", "auto", "always"],
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="For the model 'auto': escalate to the foundation model never, where the DM is unsure, or always.",
    ),
]
EscalateTo = Annotated[
    Literal["merged", "domain"],
    typer.Option(
        rich_help_panel=_ANSWERS,
        help="Adapter on the foundation model after escalation: merged from all domains, or the DM's own.",
    ),
]
MostEscalated = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        rich_help_panel=_ANSWERS,
        help="Largest share of the answers that may be escalated, for the calibration.",
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
        help="The DM drafts and the foundation model checks: fewer calls to the foundation model.",
    ),
]


def output_folder(config: Path | None, out: Path | None, resume: Path | None) -> Path:
    """Return the output folder that CONFIG, --out and --resume name."""
    if (config is None) == (resume is None):
        raise typer.BadParameter("give either CONFIG or --resume DIR", param_hint="CONFIG")
    if resume is not None and out is not None:
        raise typer.BadParameter("a run that goes on stays in its folder; leave out --out", param_hint="--out")
    return resume or out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
