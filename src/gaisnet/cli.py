"""The command ``gaisnet``."""

import logging
import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gaisnet.config import load_config
from gaisnet.errors import GaisnetError

# Threads that wait for work must not spin: on a machine that is shared, one busy neighbour would slow every
# multiplication down many times. Read when torch is first imported, which is why torch is imported late.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
_console = Console()
_errors = Console(stderr=True)

_STAGES = {
    "load": "loading the foundation model and sending every site its part",
    "release": "release: foundation knowledge goes down",
    "relay": "release: distilling a relay on generated text",
    "fine_tune": "fine-tune: split learning on private data",
    "absorb": "absorb: domain knowledge goes up",
    "evaluate": "evaluate: scoring held-out examples where they are",
}


@app.callback()
def main() -> None:
    """GaisNet: a foundation model and domain models make each other better, while the data stays on the devices."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Output folder; must be new or empty. [default: runs/<time>]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting: key=value, e.g. --set relay.enabled=false --set seed=1."),
    ] = None,
) -> None:
    """Run the cycle release, fine-tune, absorb on this machine, and measure it.

    Writes summary.json, metrics.jsonl, report.html, TensorBoard events and adapters/ (in peft's format) to the output
    folder. An evaluation before anything is trained comes first.
    """
    folder = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        settings = load_config(config, overrides or [])
        _quiet_libraries()
        from gaisnet.experiments.run import run_experiment
        from gaisnet.experiments.table import closing_table

        with LiveProgress(_console) as progress:
            summary = run_experiment(settings, folder, progress)
    except GaisnetError as error:
        _errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        _errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error
    _console.print(closing_table(summary))
    _console.print(f"Open {folder / 'report.html'}; adapters for peft are in {folder / 'adapters'}", highlight=False)


class LiveProgress:
    """A line per stage that is under way, on a terminal; a line per finished stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=None, figures="")
        self._stage = ""

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """See ``gaisnet.progress.Progress``."""
        if stage != self._stage or done == 0:
            self._stage = stage
            self._bars.reset(self._task, description=_STAGES.get(stage, stage), total=total)
            if not self._console.is_terminal and done == 0:
                self._console.print(_STAGES.get(stage, stage))
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self._bars.update(self._task, completed=done, total=total, figures=text)


def _quiet_libraries() -> None:
    """Keep other libraries' chatter out of the live display; their errors still come through."""
    import transformers

    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\..*")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)


if __name__ == "__main__":
    app()
