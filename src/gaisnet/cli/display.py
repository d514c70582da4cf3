"""The terminal of every command: live progress, the closing table, error messages."""

import errno
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from gaisnet.errors import GaisnetError, MissingPackage, OutputNotWritable
from gaisnet.terminal import safe, safe_line

if TYPE_CHECKING:
    from gaisnet.runs.summary import Summary


class _Safe:
    """A renderable whose control sequences are shown, not obeyed."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._shown, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)


class _SafeHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """See ``RenderHook``."""
        return [each if isinstance(each, Control) else _Safe(each) for each in renderables]


def safe_console(stderr: bool = False) -> Console:
    """Return a console on which foreign text is only text: no markup, no escapes."""
    made = Console(stderr=stderr, markup=False, emoji=False)
    made.push_render_hook(_SafeHook())
    return made


console = safe_console()
_errors = safe_console(stderr=True)

_EXTRAS = {
    "nvflare": ("a network of several sites", "nvflare"),
    "sklearn": ("an experiment", "paper"),
    **dict.fromkeys(("fastapi", "prometheus_client", "starlette", "uvicorn"), ("answers over HTTP", "serve")),
}
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})  # nothing but writing ends in one of these
_STAGES = {
    "prepare": "making a kit for every site",
    "start": "starting every site",
    "load": "loading the foundation model and sending every site its part",
    "release": "release: foundation knowledge goes down",
    "relay": "release: distilling a relay on generated text",
    "fine_tune": "fine-tune: split learning on private data",
    "absorb": "absorb: domain knowledge goes up",
    "last_mile": "absorb: the merged adapter learns on the foundation model, its labels on devices",
    "calibrate": "calibrate: how sure a domain model must be, on held-out examples where they are",
    "bench_learning": "bench: contenders fine-tune in turn",
    "bench_single_edge": "bench: one session on a domain model, split and in one piece",
    "bench_single_cloud": "bench: one session on the foundation model, split and in one piece",
    "bench_batch_edge": "bench: many sessions on a domain model",
    "bench_batch_cloud": "bench: many sessions on the foundation model",
    "bench_speculation": "bench: a domain model drafts, the foundation model checks",
    "bench_tuning": "bench: answers and fine-tuning, alone and together",
    "bench_scale": "bench: networks of many devices, in turn",
    "pretrain": "pre-training: an encoder learns from images without labels",
    "baselines": "baselines: learning and asking without the network",
    "evaluate": "evaluate: scoring held-out examples where they are",
}


@contextmanager
def told_errors(exit_code: int = 1) -> Iterator[None]:
    """Show one of our errors as its message, without a traceback, and exit with ``exit_code``."""
    try:
        try:
            yield
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            wanted, extra = _EXTRAS[package]
            raise MissingPackage(wanted, package, f"pip install 'gaisnet[{extra}]'") from error
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise OutputNotWritable(Path(error.filename or "a file"), error.strerror or str(error)) from error
    except GaisnetError as error:
        told = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        _errors.print(told, highlight=False, soft_wrap=True)  # a path can be copied
        raise typer.Exit(exit_code) from error


def tell_summary(summary: "Summary", folder: Path) -> None:
    """Show the closing table, and where the rest is."""
    from gaisnet.runs.table import closing_table

    console.print(closing_table(summary))
    found = f"Open {folder / 'report.html'}; adapters for peft are in {folder / 'adapters'}"
    console.print(found, highlight=False, soft_wrap=True)


class LiveProgress:
    """Live progress: a line per running stage on a terminal, a line per finished stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=None, figures="")
        self._stage = ""
        self._done = 0

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
        if stage != self._stage or done < self._done:
            self._stage, self._done = stage, -1
            said = safe_line(_STAGES.get(stage, stage))
            self._bars.reset(self._task, description=said, total=total)
            if not self._console.is_terminal and done == 0:
                self._console.print(said)
        text = safe_line("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        if not self._console.is_terminal and self._done < done == total and text:
            self._console.print(f"  {text}", highlight=False)
        self._done = done
        self._bars.update(self._task, completed=done, total=total, figures=text)


_QUIET = {  # the same for processes that this one starts
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of the live display; their errors still come through."""
    import transformers

    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\..*")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
