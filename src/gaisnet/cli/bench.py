"""``gaisnet bench``: what the network costs and gives, in ratios of things that are done in turn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, told_errors

if TYPE_CHECKING:
    from rich.table import Table

    from gaisnet.bench.serving import ServingFigures


def bench(
    serving: Annotated[
        Path, typer.Option(metavar="RUN", help="Output folder of a finished run, whose answers are measured.")
    ],
    out: Annotated[Path | None, typer.Option(show_default="RUN/serving.json", help="File to write.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every figure is the median of them.")] = 5,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Of each window in which answers and fine-tuning run, alone and together.")
    ] = 15.0,
) -> None:
    """Measure how well a finished run answers.

    One session against transformers' generate, 16 sessions against one, answers beside fine-tuning against answers
    alone, tokens per call to the foundation model with speculation, and what the model 'auto' keeps of always asking
    it. Every figure is a ratio of two things that are done in turn, so a slow machine does not matter, but a machine
    whose load changes does: leave it alone meanwhile. Nothing of the run is changed. Writes serving.json.
    """
    with told_errors():
        quiet_libraries()
        from gaisnet.bench.serving import FILE_NAME, Effort, measure_serving, write_figures

        with LiveProgress(console) as progress:
            figures = measure_serving(serving, Effort(rounds=rounds, seconds=seconds), progress)
        path = out or serving / FILE_NAME
        write_figures(figures, path)
        console.print(_table(figures))
        same = figures.same
        console.print(
            f"Equal to the model in one piece, of {same.num_answers} answers: {same.edge} of the domain model, "
            f"{same.cloud} of the foundation model; with drafts as without: {same.speculative}.",
            highlight=False,
        )
        console.print(f"All figures are in {path}", highlight=False, soft_wrap=True)


def _table(figures: "ServingFigures") -> "Table":
    from rich.table import Table

    table = Table("", "median", "min", "max", title=f"Answers of {figures.run}, on {figures.cores} cores")
    rows = {name: getattr(figures.ratios, name) for name in type(figures.ratios).model_fields}
    for domain, auto in figures.auto.items():
        rows |= {f"auto, {domain}: {name}": getattr(auto, name) for name in type(auto).model_fields}
    for name, spread in rows.items():
        cells = ("–",) * 3 if spread is None else (f"{v:.2f}" for v in (spread.median, spread.min, spread.max))
        table.add_row(name, *cells)
    return table
