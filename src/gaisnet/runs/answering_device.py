"""A device of a finished run, opened for generation: all tiers, and the test sets, are in this process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gaisnet.config import DeviceSettings, EdgeSettings
from gaisnet.data.examples import Tokens, tokenize
from gaisnet.errors import ConfigError
from gaisnet.models.foundation import with_context
from gaisnet.runs.served_run import ServedRun, serve_run
from gaisnet.serving.generation.calibration import CalibrationExample
from gaisnet.serving.generation.device import AnsweringDevice, ServedDomain


@contextmanager
def open_device(run: Path, name: str | None, overrides: Sequence[str] = ()) -> Iterator[AnsweringDevice]:
    """Open a device of the run in a folder; it reaches all bodies, as of the run's last finished cycle.

    Args:
        run: The run's output folder.
        name: The device; None for the first split one.
        overrides: As for ``serve_run``.

    Raises:
        ConfigError: The run has no such device.
        GaisnetError: There is no run, or another process runs it.
    """
    with serve_run(run, overrides) as served:
        yield device_of(served, name)


def device_of(served: ServedRun, name: str | None) -> AnsweringDevice:
    """Return a device of a served run; None asks for the first split one. Raises ``ConfigError`` if it is unknown."""
    edge, device = _device(served, name)
    return AnsweringDevice(
        domain=edge.domain,
        parts=served.bodies.parts(device.name),
        tokenizer=served.foundation.tokenizer,
        bodies=served.bodies,
        domains={each.domain: _domain(served, each) for each in served.config.edges},
        merged=len(served.config.learning_edges()) > 1,
        absent=served.absent,
        front=served.config.front,
        gauges={
            "sessions": lambda: float(served.bodies.num_sessions),
            "cache_bytes": lambda: float(served.bodies.used_bytes),
        },
    )


def calibration_examples(examples: Sequence[Tokens]) -> list[CalibrationExample]:
    """Return prompts and their right answers."""
    return [CalibrationExample(t.input_ids[: len(t.input_ids) - len(t.label_ids) + 1], t.label_ids) for t in examples]


def _device(served: ServedRun, name: str | None) -> tuple[EdgeSettings, DeviceSettings]:
    every = list(served.config.each_device())
    if name is None:
        name = served.bodies.device(every[0][0].domain)
    found = next(((edge, device) for edge, device in every if device.name == name), None)
    if found is None:
        known = ", ".join(device.name for _, device in every)
        raise ConfigError(f"device '{name}'", "the run has none of this name", f"use one of: {known}")
    return found


def _domain(served: ServedRun, edge: EdgeSettings) -> ServedDomain:
    tokenizer = served.foundation.tokenizer
    context = with_context(served.config, served.foundation.model.config).model.most_tokens
    held_out = [
        example
        for device in edge.devices
        if device.name in served.data
        for example in calibration_examples(
            tokenize(served.data[device.name].test, tokenizer, context, f"device '{device.name}', test")
        )
    ]
    return ServedDomain(tuple(served.bodies.adapters("edge", edge.domain)), (edge.adapter,), held_out)
