"""A device that answers are written on, made ready: thresholds calibrated or read, every domain's routing set."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gaisnet.config import RoutingSettings
from gaisnet.progress import Progress, silent
from gaisnet.serving.answering import Answering, Domain
from gaisnet.serving.bodies import Bodies, Target
from gaisnet.serving.calibration import (
    Calibration,
    HeldOut,
    Trial,
    calibrate,
    collect,
    read_calibrations,
    write_calibrations,
)
from gaisnet.serving.decoding import DeviceParts
from gaisnet.serving.routing import DEFAULT_MEASURE, Routing

_AT_ONCE = 8  # held-out examples; they share the steps of the bodies


@dataclass(frozen=True)
class ServedDomain:
    """A domain that a device reaches."""

    adapters: tuple[str, ...]  # on the DM, names as its service knows them
    foundation_adapters: tuple[str, ...]  # on the FM
    held_out: Sequence[HeldOut] = ()  # examples of this device, or of all that are in this process


@dataclass(frozen=True)
class ServedDevice:
    """What an engine opens of a run for a front door."""

    domain: str  # its own
    parts: DeviceParts
    tokenizer: PreTrainedTokenizerBase
    bodies: Bodies
    domains: Mapping[str, ServedDomain]
    gauges: Mapping[str, Callable[[], float]] = field(default_factory=dict)  # figures for /metrics, by name

    def answering(
        self, settings: RoutingSettings, calibrations: Mapping[str, Calibration], speculate: bool
    ) -> Answering:
        """What writes answers on it. A domain without a threshold is never escalated by 'auto'."""
        domains = {
            name: Domain(self.routing(name, settings, calibrations), d.adapters) for name, d in self.domains.items()
        }
        return Answering(self.parts, self.tokenizer, self.bodies, domains, self.domain, speculate)

    def trials(self, name: str, measure: str, progress: Progress = silent) -> list[Trial]:
        """Both models on a domain's held-out examples, whose text stays here. Raises what the bodies raise."""
        domain = self.domains[name]
        target, total = self.target(name), len(domain.held_out)

        def one(held_out: HeldOut) -> Trial:
            return collect(self.parts, self.bodies, target, domain.foundation_adapters, held_out, measure)

        found: list[Trial] = []
        progress("calibrate", 0, total, {})
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for trial in pool.map(one, domain.held_out):
                found.append(trial)
                progress("calibrate", len(found), total, {})
        return found

    def target(self, name: str) -> Target:
        """The DM of a domain."""
        return Target("edge", self.domains[name].adapters, name)

    def routing(self, name: str, settings: RoutingSettings, calibrations: Mapping[str, Calibration]) -> Routing:
        """When the FM is asked in a domain."""
        known = calibrations.get(name)
        adapters = self.domains[name].foundation_adapters
        if settings.threshold is not None:
            return Routing(adapters, settings.escalate, settings.threshold)
        if known is None:
            return Routing(adapters, "never" if settings.escalate == "auto" else settings.escalate)
        return Routing(adapters, settings.escalate, known.threshold, known.measure)


def uncalibrated(device: ServedDevice, settings: RoutingSettings, run: Path) -> list[str]:
    """Domains that need a threshold, have none in the run's folder, and have examples. Raises ``CheckpointError``."""
    if settings.escalate != "auto" or settings.threshold is not None:
        return []
    known = read_calibrations(run)
    return [name for name, domain in device.domains.items() if domain.held_out and name not in known]


def calibrated(
    device: ServedDevice, settings: RoutingSettings, run: Path, progress: Progress = silent
) -> dict[str, Calibration]:
    """Thresholds by domain: those in the run's folder, and new ones, put there, for what has none but examples.

    Raises:
        CheckpointError: The file is damaged.
        OutputNotWritable: It cannot be written.
        GaisnetError: What the bodies raise.
    """
    known, wanted = read_calibrations(run), uncalibrated(device, settings, run)
    for name in wanted:
        known[name] = calibrate(device.trials(name, DEFAULT_MEASURE, progress), settings, DEFAULT_MEASURE)
    if wanted:
        write_calibrations(run, known)
    return known
