"""``gaisnet cloud``, ``edge`` and ``device``: the resident processes, started by ``gaisnet deploy start``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gaisnet.cli.display import quiet_libraries, told_errors
from gaisnet.cli.options import (
    ApiKeysFile,
    Escalate,
    EscalateTo,
    Host,
    MostEscalated,
    ServeOn,
    Speculate,
    Stay,
    Threshold,
)
from gaisnet.config import RoutingSettings
from gaisnet.deployment.launcher import FINAL
from gaisnet.terminal import log_to_stderr


def cloud(
    kit: Annotated[Path, typer.Argument(help="The cloud's kit.")],
    out: Annotated[
        Path | None, typer.Option(show_default="KIT/run", help="Output folder; a run in it is resumed.")
    ] = None,
    stay: Stay = False,
) -> None:
    """Run the cloud's process: it holds the foundation model, carries out the run, and ends with it."""
    with _site_process():
        from gaisnet.deployment.resident import run_cloud

        run_cloud(kit, out, stay)


def edge(kit: Annotated[Path, typer.Argument(help="The edge's kit.")]) -> None:
    """Run an edge's process: it holds a domain model, serves its devices, and stays."""
    with _site_process():
        from gaisnet.deployment.resident import run_edge

        run_edge(kit)


def device(
    kit: Annotated[Path, typer.Argument(help="The device's kit.")],
    serve: ServeOn = None,
    host: Host = "127.0.0.1",
    api_keys: ApiKeysFile = None,
    escalate: Escalate = "auto",
    escalate_to: EscalateTo = "merged",
    most_escalated: MostEscalated = 0.3,
    threshold: Threshold = None,
    speculate: Speculate = False,
) -> None:
    """Run a device's process: it holds private data, head and tail, and stays.

    With --serve, to which the options under Answers belong, it also answers callers on this device, as gaisnet serve
    does for a finished run: with the network's current models, while it trains. The confidence threshold is calibrated
    on the device's own test examples, anew for every served version. The models are the device's own domain, auto,
    foundation and merged.
    """
    with _site_process():
        from gaisnet.deployment.resident import run_device

        if serve is None:
            run_device(kit)
        from gaisnet.deployment.http_endpoint import EndpointSettings
        from gaisnet.serving.http.callers import check_bind, read_keys

        keys = read_keys(api_keys)
        check_bind(host, keys)
        routing = RoutingSettings(
            escalate=escalate, escalate_to=escalate_to, most_escalated=most_escalated, threshold=threshold
        )
        run_device(kit, EndpointSettings((host, serve), keys, routing, speculate))


@contextmanager
def _site_process() -> Iterator[None]:
    """Set up a resident process: a log on standard error, an orderly end."""
    from gaisnet.deployment.resident import end_in_order

    log_to_stderr(logging.INFO, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    end_in_order()
    quiet_libraries()
    with told_errors(FINAL):
        yield
