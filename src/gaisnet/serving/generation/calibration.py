"""Calibration of confidence: from test examples, which never leave their device, to a threshold.

A device lets both DM and FM write each answer, and keeps only the DM's confidence and who was right.
Examples of other domains may be among them, as among its requests: the DM was not trained on those.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf, nextafter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gaisnet.checkpoint import write_text
from gaisnet.config import RoutingSettings
from gaisnet.errors import CheckpointError
from gaisnet.models.tokenization import ends_of
from gaisnet.serving.generation.decoding import DeviceParts, generate
from gaisnet.serving.generation.routing import Bodies, Routing, Target, Trace, generate_routed
from gaisnet.serving.generation.text import Sampling

FILE_NAME = "calibration.json"


@dataclass(frozen=True)
class Trial:
    """One test example. For an answer of one token: confidence, whether the DM is right, whether the FM is."""

    confidences: tuple[float, ...]  # the DM's, for each token of its answer
    wrong_at: int | None  # the first wrong token; None if the DM's answer is right
    foundation_right: bool

    def escalated(self, threshold: float) -> bool:
        """Return whether the FM is asked."""
        return min(self.confidences) < threshold

    def right(self, threshold: float) -> bool:
        """Return whether the answer is right: the FM repairs it if it is asked before the first wrong token is written.

        An FM that takes over a right beginning is assumed to do as well as from the start.
        """
        at = next((i for i, confidence in enumerate(self.confidences) if confidence < threshold), None)
        if at is None:
            return self.wrong_at is None
        return self.foundation_right and (self.wrong_at is None or at <= self.wrong_at)


class Calibration(BaseModel):
    """A threshold, and its results on the examples that it was chosen on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str = Field(description="Of confidence, by its name in serving/routing.py.")
    threshold: float = Field(description="A token that the DM is less sure of is the FM's to write.")
    adapters: tuple[str, ...] = Field(description="What acts on the FM.")
    num_trials: int = Field(ge=0, description="Held-out examples.")
    num_others: int = Field(ge=0, description="So many of them are of other domains.")
    most_escalated: float = Field(0.3, description="Share of the answers that might be escalated.")
    domain_accuracy: float = Field(description="Of the DM alone.")
    foundation_accuracy: float = Field(description="Of the FM with these adapters, always asked.")
    accuracy: float = Field(description="With this threshold.")
    escalated: float = Field(description="Share of the answers that the FM is asked for.")

    @property
    def gain_kept(self) -> float | None:
        """Share of the gain of always asking; None if there is none."""
        gain = self.foundation_accuracy - self.domain_accuracy
        return (self.accuracy - self.domain_accuracy) / gain if gain > 0 else None


def calibrate(
    trials: Sequence[Trial],
    settings: RoutingSettings,
    measure: str,
    adapters: tuple[str, ...] = (),
    num_others: int = 0,
) -> Calibration:
    """Return the threshold with most right answers and at most ``most_escalated``, in the middle of equally good ones.

    At the edge of equally good thresholds it would be right here and wrong elsewhere. If the FM is no better
    than the DM, it is below all confidences: the FM is never asked.

    Args:
        trials: Examples that the DM of one domain was asked.
        settings: Targets.
        measure: The measure of confidence.
        adapters: Adapters on the FM in the trials.
        num_others: Number of trials from other domains.
    """
    total = max(len(trials), 1)
    alone, always = sum(t.wrong_at is None for t in trials), sum(t.foundation_right for t in trials)
    known = [(_NEVER, alone)]
    for threshold in _candidates(trials) if always > alone else ():
        if sum(t.escalated(threshold) for t in trials) > settings.most_escalated * total:
            break
        known.append((threshold, sum(t.right(threshold) for t in trials)))
    num_right = max(right for _, right in known)
    runs = [[threshold for threshold, _ in run] for right, run in groupby(known, lambda k: k[1]) if right == num_right]
    best = max(runs, key=len)
    threshold = _NEVER if _NEVER in best else best[len(best) // 2]
    num_escalated = sum(t.escalated(threshold) for t in trials)
    return Calibration(
        measure=measure,
        threshold=threshold,
        adapters=adapters,
        num_trials=len(trials),
        num_others=num_others,
        most_escalated=settings.most_escalated,
        domain_accuracy=alone / total,
        foundation_accuracy=always / total,
        accuracy=num_right / total,
        escalated=num_escalated / total,
    )


_NEVER = -1e9  # below the values of all measures, and a number in JSON


def _candidates(trials: Sequence[Trial]) -> list[float]:
    """Return thresholds with different effects, ascending: between two seen confidences, and above all."""
    seen = sorted({confidence for trial in trials for confidence in trial.confidences})
    return [*((lower + upper) / 2 for lower, upper in pairwise(seen)), *(nextafter(c, inf) for c in seen[-1:])]


@dataclass(frozen=True)
class CalibrationExample:
    """A test example in token ids. It stays on the device."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # with the token that ends it


def collect(
    parts: DeviceParts,
    bodies: Bodies,
    domain: Target,
    adapters: tuple[str, ...],
    held_out: CalibrationExample,
    measure: str,
) -> Trial:
    """Let the DM, then the FM, write the answer to an example greedily. Raises the bodies' errors.

    Any token that ends an answer of the model will do at the end.

    Args:
        parts: The device's parts.
        bodies: Both bodies.
        domain: The DM's domain.
        adapters: Adapters on the FM.
        held_out: The example.
        measure: The measure of confidence.
    """
    span, num_positions = (parts.first, parts.stop), len(held_out.prompt) + len(held_out.answer)
    ends = frozenset((*held_out.answer[-1:], *ends_of(parts.head.stack.config)))
    sampling = Sampling(max_tokens=len(held_out.answer), stop_ids=ends)
    trace, routing = Trace(), Routing((), "never", measure=measure)
    session = bodies.open_escalating_session(domain, *span, num_positions)
    written = tuple(generate_routed(parts, session, held_out.prompt, sampling, routing, trace))
    asked = bodies.open_session(Target("cloud", adapters, domain.domain), *span, num_positions)
    by_foundation = tuple(generate(parts, asked, held_out.prompt, sampling))
    expected = _ended(held_out.answer, ends)
    wrong_at = _first_difference(_ended(written, ends), expected)
    return Trial(tuple(trace.confidences), wrong_at, _ended(by_foundation, ends) == expected)


def _ended(ids: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """Replace any token that ends an answer by one of them."""
    return tuple(min(ends) if token in ends else token for token in ids)


def _first_difference(written: Sequence[int], right: Sequence[int]) -> int | None:
    if tuple(written) == tuple(right):
        return None
    same = next((i for i, (a, b) in enumerate(zip(written, right, strict=False)) if a != b), None)
    return min(len(written), len(right)) - 1 if same is None else same


class _Kind(BaseModel):
    """The schema field of a file."""

    schema_name: str = Field(alias="schema")


_BEFORE = "gaisnet.calibration/1"  # does not name the FM's adapters or the mix of trials


class _File(BaseModel):
    """Contents of ``calibration.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.calibration/2", alias="schema", pattern="^gaisnet.calibration/2$")
    domains: dict[str, Calibration]


def write_calibrations(folder: Path, domains: Mapping[str, Calibration]) -> None:
    """Write calibrations by domain into a run's folder. Raises ``OutputNotWritable``."""
    write_text(folder / FILE_NAME, _File(domains=dict(domains)).model_dump_json(indent=2) + "\n")


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """Read a run folder's calibrations; empty if there are none, or only of an older schema.

    Raises ``CheckpointError`` for a damaged file.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
        if _Kind.model_validate_json(text).schema_name == _BEFORE:
            return {}
        return _File.model_validate_json(text).domains
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(path, str(error)) from error
