"""A device prepared for generation: thresholds calibrated or read, routing set for every domain."""

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gaisnet.config import FrontSettings, RoutingSettings
from gaisnet.errors import ConfigError
from gaisnet.progress import Progress, silent
from gaisnet.serving.generation.answering import MERGED, Answering, Domain
from gaisnet.serving.generation.calibration import (
    Calibration,
    CalibrationExample,
    Trial,
    calibrate,
    collect,
    read_calibrations,
    write_calibrations,
)
from gaisnet.serving.generation.decoding import DeviceParts
from gaisnet.serving.generation.routing import DEFAULT_MEASURE, Bodies, Routing, Target

_AT_ONCE = 8  # test examples at once; they share the bodies' steps


@dataclass(frozen=True)
class ServedDomain:
    """A domain that a device reaches."""

    adapters: tuple[str, ...]  # on the DM, named as its service knows them
    foundation_adapters: tuple[str, ...]  # on the FM, for this domain alone
    held_out: Sequence[CalibrationExample] = ()  # of this device, or of all devices in this process


@dataclass(frozen=True)
class AnsweringDevice:
    """A run, opened by an engine for the HTTP endpoint."""

    domain: str  # its own
    parts: DeviceParts
    tokenizer: PreTrainedTokenizerBase
    bodies: Bodies
    domains: Mapping[str, ServedDomain]
    merged: bool = False  # whether the FM has a merged adapter
    absent: Mapping[str, str] = field(default_factory=dict)  # devices whose test examples are missing, and why
    gauges: Mapping[str, Callable[[], float]] = field(default_factory=dict)  # figures for /metrics, by name
    front: FrontSettings = FrontSettings()  # limits of the endpoint

    def answering(
        self, settings: RoutingSettings, calibrations: Mapping[str, Calibration], speculate: bool
    ) -> Answering:
        """Return the generator for this device. A domain without a threshold is never escalated by 'auto'."""
        domains = {
            name: Domain(self.routing(name, settings, calibrations), d.adapters) for name, d in self.domains.items()
        }
        return Answering(self.parts, self.tokenizer, self.bodies, domains, self.domain, speculate)

    def trials(
        self, name: str, settings: RoutingSettings, measure: str, progress: Progress = silent
    ) -> tuple[list[Trial], list[Trial]]:
        """Try a domain's DM, and the FM, on test examples of the domain and on ``others``; their text stays here.

        Raises the bodies' errors.
        """
        target, adapters = self.target(name), self.escalation(name, settings).adapters
        own, others = self.domains[name].held_out, self.others(name, settings)

        def one(held_out: CalibrationExample) -> Trial:
            return collect(self.parts, self.bodies, target, adapters, held_out, measure)

        found: list[Trial] = []
        total = len(own) + len(others)
        progress("calibrate", 0, total, {})
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for trial in pool.map(one, [*own, *others]):
                found.append(trial)
                progress("calibrate", len(found), total, {})
        return found[: len(own)], found[len(own) :]

    def calibration(self, name: str, settings: RoutingSettings, progress: Progress = silent) -> Calibration:
        """Calibrate a new threshold for a domain. Raises the bodies' errors."""
        own, others = self.trials(name, settings, DEFAULT_MEASURE, progress)
        adapters = self.escalation(name, settings).adapters
        return calibrate([*own, *others], settings, DEFAULT_MEASURE, adapters, len(others))

    def others(self, name: str, settings: RoutingSettings) -> list[CalibrationExample]:
        """Return examples of other domains for a domain's mix, always the same; fewer if this process has few."""
        known = self.domains[name].foundation_adapters  # a newcomer's domain does not count as another
        foreign = [domain for domain in self.domains.values() if domain.foundation_adapters != known]
        every = [one for domain in foreign for one in domain.held_out]
        share, own = settings.other_domains, len(self.domains[name].held_out)
        return random.Random(f"others than {name}").sample(every, min(len(every), round(own * share / (1 - share))))

    def target(self, name: str) -> Target:
        """Return the target of a domain's DM."""
        return Target("edge", self.domains[name].adapters, name)

    def escalation(self, name: str, settings: RoutingSettings) -> Target:
        """Return the target of the FM, with the adapters used on escalation."""
        merged = settings.escalate_to == "merged" and self.merged
        return Target("cloud", (MERGED,) if merged else self.domains[name].foundation_adapters, name)

    def fits(self, name: str, settings: RoutingSettings, calibration: Calibration) -> bool:
        """Return whether a threshold matches a domain's escalation, limit and expected mix.

        If examples are missing now, the mix is the earlier one.
        """
        asked = self.escalation(name, settings).adapters, settings.most_escalated
        if (calibration.adapters, calibration.most_escalated) != asked:
            return False
        return bool(self.absent) or calibration.num_others == len(self.others(name, settings))

    def routing(self, name: str, settings: RoutingSettings, calibrations: Mapping[str, Calibration]) -> Routing:
        """Return the routing of a domain."""
        known = calibrations.get(name)
        adapters = self.escalation(name, settings).adapters
        if settings.threshold is not None:
            return Routing(adapters, settings.escalate, settings.threshold)
        if known is None or not self.fits(name, settings, known):
            return Routing(adapters, "never" if settings.escalate == "auto" else settings.escalate)
        return Routing(adapters, settings.escalate, known.threshold, known.measure)


def uncalibrated(device: AnsweringDevice, settings: RoutingSettings, run: Path) -> list[str]:
    """Return domains that have examples but no matching threshold in the run's folder. Raises ``CheckpointError``."""
    if settings.escalate != "auto" or settings.threshold is not None:
        return []
    known = read_calibrations(run)
    return [
        name
        for name, domain in device.domains.items()
        if domain.held_out and not (name in known and device.fits(name, settings, known[name]))
    ]


def calibrated(
    device: AnsweringDevice, settings: RoutingSettings, run: Path, progress: Progress = silent
) -> dict[str, Calibration]:
    """Return thresholds by domain: those in the run's folder, and newly calibrated ones, which are saved there.

    Raises:
        CheckpointError: The file is damaged.
        ConfigError: The device's own domain has no threshold, and no examples to calibrate one on.
        OutputNotWritable: The file cannot be written.
        GaisnetError: An error of a body.
    """
    known, wanted = read_calibrations(run), uncalibrated(device, settings, run)
    if settings.escalate == "auto" and settings.threshold is None:
        _refuse_without_examples(device, settings, known)
    for name in wanted:
        known[name] = device.calibration(name, settings, progress)
    if wanted:
        write_calibrations(run, known)
    return known


def _refuse_without_examples(
    device: AnsweringDevice, settings: RoutingSettings, known: Mapping[str, Calibration]
) -> None:
    """Raise ``ConfigError`` if 'auto' would never escalate because examples that existed are missing now."""
    home = device.domain
    if not device.absent or device.domains[home].held_out:
        return
    if home not in known or not device.fits(home, settings, known[home]):
        why = next(iter(device.absent.values()))
        raise ConfigError(
            f"a threshold for 'auto' in domain '{home}'",
            f"none was calibrated for this, and the examples to calibrate it on are not there ({why})",
            "use gaisnet serve with --threshold, or with --escalate never or always; or say where the examples are "
            "with --set edges.N.devices.N.data=FOLDER",
        )
