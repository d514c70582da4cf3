"""``gaisnet deploy``: cloud, edges and devices as separate sites."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, tell_summary, told_errors
from gaisnet.cli.options import ConfigFile, Out, Overrides, Resume, ServeOn, Stay, output_folder
from gaisnet.config.file import load_config
from gaisnet.errors import ConfigError

deploy = typer.Typer(no_args_is_help=True, help="Cloud, edges and devices as separate sites.")


@deploy.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; cloud.host and edges.*.host name the machines.")],
    out: Annotated[Path, typer.Option(help="Folder for the kits, one per site; must be new or empty.")],
    overrides: Overrides = None,
) -> None:
    """Write one kit per site: certificates, settings, start script. Copy each to its host; see docs/deploy.md.

    OUT/authority holds the network's private keys: keep it where the network is prepared, and give it to nobody.
    """
    with told_errors():
        settings = load_config(config, overrides or [])
        quiet_libraries()
        from gaisnet.deployment.kits import prepare as make_kits

        for name, folder in make_kits(settings, out).items():
            console.print(f"{name}: {folder}", highlight=False, soft_wrap=True)


@deploy.command("run")
def deploy_run(
    config: ConfigFile = None,
    out: Out = None,
    resume: Resume = None,
    overrides: Overrides = None,
) -> None:
    """Run a whole network on this machine, every site a process of its own, with mutual TLS between them.

    The output folder is that of gaisnet run; kits and logs of the sites are beside it, in OUT-sites.
    """
    folder = output_folder(config, out, resume)
    with told_errors():
        if overrides and config is None:
            found = "its sites take their settings from site.yaml in their kits"
            raise ConfigError(f"--set {overrides[0]} on a network that goes on", found, "change it there")
        settings = load_config(config, overrides or []) if config else None
        quiet_libraries()
        from gaisnet.deployment.one_machine import resume_network, run_network
        from gaisnet.deployment.resident import end_in_order

        end_in_order()
        with LiveProgress(console) as progress:
            if settings is None:
                summary = resume_network(folder, progress)
            else:
                summary = run_network(settings, folder, progress)
    tell_summary(summary, folder)


@deploy.command()
def start(
    kit: Annotated[Path, typer.Argument(help="A site's kit.")],
    out: Annotated[Path | None, typer.Option(show_default="KIT/run", help="Output folder of the cloud.")] = None,
    stay: Stay = False,
    serve: ServeOn = None,
) -> None:
    """Run one site on this host and restart it when it dies, as start.sh in a kit does.

    For a network that answers: --stay at the cloud, --serve PORT at the devices that have callers.
    """
    with told_errors():
        from gaisnet.deployment.resident import end_in_order
        from gaisnet.deployment.start import start_site

        end_in_order()
        start_site(
            kit, out, stay, serve, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        )


@deploy.command()
def status(kit: Annotated[Path, typer.Argument(help="A site's kit.")]) -> None:
    """Ask every site for its status, and the kit for the outcome of its own site.

    Exits with 0 if all are up or the run has finished, with 3 if it has failed, with 1 if a site is away.
    """
    with told_errors():
        from gaisnet.deployment.status import exit_code, network_status

        states = network_status(kit)
    table = Table("site", "role", "state", "what it says")
    for state in states:
        table.add_row(state.name, state.role, state.health, state.detail)
    console.print(table)
    if code := exit_code(states):
        raise typer.Exit(code)
