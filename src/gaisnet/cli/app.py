"""The command ``gaisnet`` and its subcommands."""

from typing import Annotated

import typer

from gaisnet import __version__
from gaisnet.cli.baselines import baselines
from gaisnet.cli.bench import bench
from gaisnet.cli.chat import chat
from gaisnet.cli.deploy import deploy
from gaisnet.cli.display import LiveProgress, console, quiet_libraries, tell_summary, told_errors
from gaisnet.cli.options import ConfigFile, Out, Overrides, Resume, output_folder
from gaisnet.cli.paper import paper
from gaisnet.cli.serve import serve
from gaisnet.cli.sites import cloud, device, edge
from gaisnet.config.file import load_config
from gaisnet.openmp import set_wait_policy

set_wait_policy()  # before torch is imported, which commands do when they run

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gaisnet {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """GaisNet: a foundation model and domain models make each other better, while the data stays on the devices."""


@app.command()
def run(
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = None,
    overrides: Overrides = None,
) -> None:
    """Run the cycle release, fine-tune, absorb on this machine, and measure it.

    Writes summary.json, metrics.jsonl, report.html, TensorBoard events and adapters/ (in peft's format) to the output
    folder. The models are evaluated once before training.

    A stopped run resumes after its last finished cycle with --resume DIR; --resume DIR --set cycles=4 gives a
    finished one more cycles. DIR may be moved. If the model or the data were moved, say where: --resume DIR
    --set model.foundation=FOLDER --set edges.0.devices.1.data=FOLDER.
    """
    folder = output_folder(config, out, resume)
    with told_errors():
        settings = load_config(config, overrides or []) if config else None
        quiet_libraries()
        from gaisnet.runs.run import resume_experiment, run_experiment

        with LiveProgress(console) as progress:
            if settings is None:
                summary = resume_experiment(folder, overrides or [], progress)
            else:
                summary = run_experiment(settings, folder, progress)
    tell_summary(summary, folder)


app.command()(serve)
app.command()(chat)
app.command()(baselines)
app.command()(bench)
app.command()(paper)
app.add_typer(deploy, name="deploy")
for site in (cloud, edge, device):
    app.command()(site)
