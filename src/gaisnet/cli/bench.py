"""``gaisnet bench``: costs and gains of the network, as ratios of things done in turn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, told_errors
from gaisnet.cli.options import ConfigFile, Overrides
from gaisnet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from gaisnet.research.bench.contest import LearningFigures
    from gaisnet.research.bench.scale import ScaleFigures
    from gaisnet.research.bench.serving import ServingFigures


def bench(
    config: ConfigFile = None,
    serving: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="In place of CONFIG: folder of a finished run; measures its serving."),
    ] = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="In place of CONFIG: measure networks of many simulated devices.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(show_default="bench.json, RUN/serving.json, or scale.json", help="File to write."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every figure is the median of them.")] = 5,
    seconds: Annotated[
        float,
        typer.Option(
            min=1.0, help="With --serving: length of each window in which requests and fine-tuning run together."
        ),
    ] = 15.0,
    sizes: Annotated[
        str, typer.Option(metavar="N,N,...", help="With --scale: numbers of devices, one network each.")
    ] = "10,100,1000,10000",
    overrides: Overrides = None,
) -> None:
    """Measure costs and gains of the network, as ratios of things done in turn.

    With CONFIG, such as configs/bench.yaml: fine-tuning by GaisNet against centralised LoRA (transformers' Trainer and
    peft, on all layers and on the late ones), federated LoRA and plain split learning, on the same examples: speed,
    bytes, memory and operations of a device, accuracy. Writes bench.json, and draws it in bench.png.

    With --serving RUN: how well a finished run answers. One session against transformers' generate, 16 sessions against
    one, answers beside fine-tuning against answers alone, tokens per call to the foundation model with speculation, and
    the gain that the model 'auto' keeps of always asking it. The run is not changed. Writes serving.json.

    With --scale: networks of 10 to 10,000 simulated devices with a tiny model, each in a process of its own:
    computation per device round, and memory per device. Also the cost of models of 135M to 70B, from their shapes.
    Writes scale.json.

    A slow machine does not matter, but one with changing load does: leave it alone meanwhile.
    """
    with told_errors():
        quiet_libraries()
        num_given = (config is not None) + (serving is not None) + scale
        if num_given != 1:
            found = "none was given" if num_given == 0 else f"{num_given} were given"
            raise ConfigError("CONFIG, --serving RUN or --scale", found, "give one of them")
        if scale:
            _scale(sizes, out, rounds)
        elif config is not None:
            _learning(config, overrides or [], out or Path("bench.json"), rounds)
        elif serving is not None:
            _serving(serving, out, rounds, seconds)


def _learning(file: Path, overrides: list[str], out: Path, rounds: int) -> None:
    from gaisnet.checkpoint import make_room_for
    from gaisnet.config.file import load_config
    from gaisnet.research.bench.contest import measure_learning, write_learning
    from gaisnet.research.bench.picture import draw_learning

    picture = out.with_suffix(".png")
    if picture == out:
        raise ConfigError(f"--out {out}", "is where the picture would go", "name the figures' file, such as bench.json")
    config = load_config(file, overrides)
    make_room_for(out)
    with LiveProgress(console) as progress:
        figures = measure_learning(config, rounds, progress)
    write_learning(figures, out)
    draw_learning(figures, picture)
    for table in _learning_tables(figures):
        console.print(table)
    console.print(f"All figures are in {out}, drawn in {picture}", highlight=False, soft_wrap=True)


def _learning_tables(figures: "LearningFigures") -> "Iterator[Table]":
    from rich.table import Table

    epochs, cores = figures.config["fine_tune"]["local_epochs"], figures.cores
    title = f"{epochs} epochs of {figures.num_examples} examples, on {cores} cores; medians"
    columns = "samples/s", "s to\naccuracy", "KiB a\nsample", "device\nMiB", "GFLOP a\nsample", "accuracy"
    table = Table("", *columns, title=title)
    table.columns[0].no_wrap = True
    for name in type(figures.contenders).model_fields:
        own = getattr(figures.contenders, name)
        table.add_row(
            name,
            f"{own.samples_per_s.median:.2f}",
            "–" if own.seconds_to_accuracy is None else f"{own.seconds_to_accuracy.median:.0f}",
            f"{own.bytes_per_sample.median / 1024:.1f}",
            f"{own.device_peak_bytes.median / 2**20:.0f}",
            f"{own.device_flops_per_sample.median / 1e9:.2f}",
            f"{own.accuracy.median:.1%}",
        )
    unsplit = figures.unsplit_domain_model
    speed, accuracy = f"{unsplit.samples_per_s.median:.2f}", f"{unsplit.accuracy.median:.1%}"
    table.add_row("(DM unsplit)", speed, *["–"] * 4, accuracy, style="dim")
    yield table
    against = Table("GaisNet against the other", "median", "min", "max")
    for every, show in ((figures.ratios, "{:.3g}"), (figures.differences, "{:+.1%}")):
        for name in type(every).model_fields:
            spread = getattr(every, name)
            against.add_row(name, *(show.format(value) for value in (spread.median, spread.min, spread.max)))
    yield against


def _serving(run: Path, out: Path | None, rounds: int, seconds: float) -> None:
    from gaisnet.checkpoint import make_room_for
    from gaisnet.research.bench.rounds import Effort
    from gaisnet.research.bench.serving import FILE_NAME, measure_serving, write_figures

    path = out or run / FILE_NAME
    if out is not None:  # the folder of a run is its own; what is wrong with it, reading it says
        make_room_for(path)
    with LiveProgress(console) as progress:
        figures = measure_serving(run, Effort(rounds=rounds, seconds=seconds), progress)
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


def _scale(sizes: str, out: Path | None, rounds: int) -> None:
    from gaisnet.checkpoint import make_room_for
    from gaisnet.research.bench.scale import FILE_NAME, measure_scale, write_scale

    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise ConfigError("--sizes", f"is '{sizes}'", "give numbers with commas between, such as 10,100") from None
    path = out or Path(FILE_NAME)
    make_room_for(path)
    with LiveProgress(console) as progress:
        figures = measure_scale(numbers, rounds, progress)
    write_scale(figures, path)
    for table in _scale_tables(figures):
        console.print(table)
    console.print(f"All figures are in {path}", highlight=False, soft_wrap=True)


def _scale_tables(figures: "ScaleFigures") -> "Iterator[Table]":
    from rich.table import Table

    against = f"against {figures.reference} devices"
    columns = "ms per device round", against, "ms to equip", "idle KiB", "KiB after a round"
    table = Table("devices", "edges", *columns, title="Networks with a tiny model, per device; medians")
    for own in figures.sizes:
        table.add_row(
            f"{own.devices:,}",
            f"{own.edges}",
            f"{own.device_round_s.median * 1e3:.2f}",
            f"{own.device_round_vs_reference.median:.2f}",
            f"{own.equip_s.median * 1e3:.2f}",
            f"{own.idle_bytes.median / 1024:.0f}",
            f"{own.kept_bytes.median / 1024:.0f}",
        )
    yield table
    costs = "device MiB", "edge MiB", "adapter MiB", "KiB up", "KiB down", "device GFLOP", "edge GFLOP"
    paper = Table("on paper", *costs, title="Weights; and per sample, in 3 epochs of configs/bench.yaml")
    for name, cost in figures.on_paper.items():
        sizes = (cost.device_weights_bytes, cost.edge_weights_bytes, cost.adapter_bytes)
        cells = [f"{size / 2**20:,.0f}" for size in sizes]
        cells += [f"{size / 2**10:.1f}" for size in (cost.bytes_up, cost.bytes_down)]
        paper.add_row(name, *cells, f"{cost.device_flops / 1e9:.2f}", f"{cost.edge_flops / 1e9:,.1f}")
    yield paper
