"""``gaisnet serve``: a run's models behind OpenAI's endpoints."""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gaisnet.cli.display import LiveProgress, console, quiet_libraries, told_errors
from gaisnet.cli.options import (
    ApiKeysFile,
    Escalate,
    EscalateTo,
    Host,
    MostEscalated,
    ServiceOverrides,
    Speculate,
    Threshold,
)
from gaisnet.config import RoutingSettings
from gaisnet.progress import Progress, silent
from gaisnet.serving.http.address import publish_address
from gaisnet.terminal import log_to_stderr

if TYPE_CHECKING:
    from gaisnet.serving.generation.answering import Answering
    from gaisnet.serving.generation.device import AnsweringDevice
    from gaisnet.serving.http.callers import ApiKeys
    from gaisnet.serving.http.server import Server


def open_device(
    run: Path, name: str | None, overrides: Sequence[str] = ()
) -> "AbstractContextManager[AnsweringDevice]":
    """Open a device of a finished run, and the bodies that it reaches, for the duration of the block.

    Args:
        run: The run's output folder.
        name: The device; None for the first split one.
        overrides: As for ``serve_run``.
    """
    from gaisnet.runs.answering_device import open_device as opened_device

    return opened_device(run, name, overrides)


def serve(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run, such as runs/demo-...")],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = 8000,
    device: Annotated[
        str | None, typer.Option(show_default="the first split one", help="Device that generates the answers.")
    ] = None,
    api_keys: ApiKeysFile = None,
    escalate: Escalate = "auto",
    escalate_to: EscalateTo = "merged",
    other_domains: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Expected share of requests of other domains, for the calibration.")
    ] = 0.2,
    most_escalated: MostEscalated = 0.3,
    threshold: Threshold = None,
    speculate: Speculate = False,
    overrides: ServiceOverrides = None,
) -> None:
    """Serve a run's models on a device: text and token ids stay on it.

    The endpoints are OpenAI's: /v1/chat/completions, /v1/completions, /v1/models; and /health, and /metrics for
    Prometheus. Models are foundation, merged, one per domain, and auto: the domain model writes and escalates to the
    foundation model where it is unsure. The confidence threshold is calibrated once, on test examples of the
    domain and some of others, and kept in RUN/calibration.json.

    RUN may be moved, and the examples may be missing: an earlier threshold is kept. If the model was
    moved, say where: --set model.foundation=FOLDER.

    Try it: gaisnet chat RUN --model auto, or

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    with told_errors():
        routing = RoutingSettings(
            escalate=escalate,
            escalate_to=escalate_to,
            other_domains=other_domains,
            most_escalated=most_escalated,
            threshold=threshold,
        )
        quiet_libraries()
        log_to_stderr(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
        end_on_signals()
        from gaisnet.serving.http.callers import check_bind, read_keys

        keys = read_keys(api_keys)
        check_bind(host, keys)  # before the models are loaded
        with opened(run, device, routing, speculate, keys, (host, port), overrides or ()) as (answering, server):
            console.print(f"Serving {', '.join(answering.models)}", highlight=False)
            console.print(f"at {server.url}/v1; end it with Ctrl-C", highlight=False)
            with publish_address(run, server.url):
                try:
                    server.run()
                except KeyboardInterrupt:
                    console.print("ended")


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process like Ctrl-C: links are closed, and files removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup it is to outlive its terminal
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextmanager
def opened(
    run: Path,
    device: str | None,
    routing: RoutingSettings,
    speculate: bool,
    keys: "ApiKeys",
    address: tuple[str, int],
    overrides: Sequence[str] = (),
) -> "Iterator[tuple[Answering, Server]]":
    """Open a run for serving: its generator, and a server that listens and does not answer yet."""
    from gaisnet.serving.generation.device import calibrated, uncalibrated
    from gaisnet.serving.http.api import make_app
    from gaisnet.serving.http.server import Server

    with open_device(run, device, overrides) as served:
        # It takes minutes, but only once.
        _tell_absent(served)
        wanted = uncalibrated(served, routing, run)
        shown: AbstractContextManager[Progress] = LiveProgress(console) if wanted else nullcontext(silent)
        with shown as progress:
            calibrations = calibrated(served, routing, run, progress)
        answering = served.answering(routing, calibrations, speculate)
        app = make_app(answering, served.front, keys, served.gauges)
        yield answering, Server(app, *address, keys, settings=served.front)


def _tell_absent(device: "AnsweringDevice") -> None:
    """Report devices whose examples are missing, and the consequence."""
    if device.absent:
        name, why = next(iter(device.absent.items()))
        more = f" and of {len(device.absent) - 1} other devices" if len(device.absent) > 1 else ""
        said = f"Without the examples of device '{name}'{more}: {why}. Thresholds that were calibrated before are kept."
        console.print(said, style="yellow", markup=False, highlight=False)
