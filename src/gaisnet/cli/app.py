"""The command ``gaisnet`` and its subcommands."""

import os

import typer

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

# How long OpenMP's threads spin before they sleep. Within a layer the next product comes in microseconds, and to be
# woken takes longer than a small product; but on a machine that is shared, threads that spin for milliseconds, as they
# would, slow down all others (docs/decisions/0009). Read when torch is first imported: it is imported late.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"  # without it, as soon as two threads compute, theirs hardly spin at all
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's OpenMP would spin without end

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


@app.callback()
def main() -> None:
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
