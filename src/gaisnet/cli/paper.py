"""``gaisnet paper``: the paper's claims, measured on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, told_errors

if TYPE_CHECKING:
    from rich.table import Table

    from gaisnet.research.paper.results import Result


def paper(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Smaller experiments, in minutes: they show that all of it runs, and roughly what it finds."
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this experiment; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            show_default="runs/paper, or runs/paper-quick", help="Output folder; finished experiments in it are kept."
        ),
    ] = None,
) -> None:
    """Reproduce the experiments of the paper that GaisNet comes from (arXiv 2401.02668), with images.

    A small Vision Transformer learns without labels from Fashion-MNIST (masked autoencoding), once: it goes to the
    cache. Each experiment then measures a claim of the paper with three seeds:

    pretraining: fine-tuning it with few labels, against the same network from scratch, and against raw pixels.

    kinds: deep prompts, LoRA, or all weights of the late layers: accuracy, weights that learn, bytes.

    hybrid: hybrid federated split learning against federated, split and pooled: by round, byte and operation.

    skew: devices whose labels differ, from much to hardly.

    clusters: from one adapter for all devices to one for each.

    inference: an image through device and edge, cut at every layer: time of each part, bytes, latency by link.

    Writes a file NAME.json for every experiment, row by row, so that a run that was stopped goes on where it was, and
    report.html: claim by claim what the paper says, what was measured here, and whether they agree.

    Needs Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist; or its four files in a folder
    that the environment variable GAISNET_FASHION_MNIST names) and scikit-learn (pip install scikit-learn).
    """
    folder = out or Path("runs") / ("paper-quick" if quick else "paper")
    with told_errors():
        quiet_libraries()
        from gaisnet.research.paper.catalogue import EXPERIMENTS
        from gaisnet.research.paper.experiment import Setup
        from gaisnet.research.paper.running import REPORT, run_paper

        with LiveProgress(console) as progress:
            results = run_paper(EXPERIMENTS, folder, Setup(quick, progress), only or ())
    console.print(_table(results))
    console.print(f"Open {folder / REPORT}; every row is in {folder}", highlight=False, soft_wrap=True)


def _table(results: "dict[str, Result]") -> "Table":
    from rich.table import Table

    from gaisnet.research.paper.catalogue import EXPERIMENTS

    table = Table("", "Measured", "The paper's claim", title="The paper's claims, measured")
    for experiment in EXPERIMENTS:
        result = results.get(experiment.name)
        finding = result.finding_of(experiment) if result else None
        cells = (finding.measured, finding.verdict) if finding else ("–", "not measured")
        table.add_row(experiment.title, *cells)
    return table
