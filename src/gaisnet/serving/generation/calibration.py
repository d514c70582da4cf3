"""How sure is sure enough: from held-out examples, which never leave their device, to a threshold.

A device lets its DM write each answer and the FM too, and keeps of each only how sure the DM was and who was right.
Examples of other domains may be among them, as they are among its requests: the DM has not learned those.
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
from gaisnet.serving.generation.bodies import Bodies, Target
from gaisnet.serving.generation.decoding import DeviceParts, write
from gaisnet.serving.generation.routing import Routing, Trace, write_routed
from gaisnet.serving.generation.sampling import Sampling

FILE_NAME = "calibration.json"


@dataclass(frozen=True)
class Trial:
    """One held-out example. For an answer of one token it is: how sure, DM right?, FM right?"""

    confidences: tuple[float, ...]  # of the DM in each token of its answer
    wrong_at: int | None  # the first token that is wrong; None if the DM's answer is right
    foundation_right: bool

    def escalated(self, threshold: float) -> bool:
        """Whether the FM is asked."""
        return min(self.confidences) < threshold

    def right(self, threshold: float) -> bool:
        """Whether the answer is right: the FM mends it if it is asked before the first wrong token is written.

        Where it takes over a right beginning it is taken to do as well as from the start.
        """
        at = next((i for i, confidence in enumerate(self.confidences) if confidence < threshold), None)
        if at is None:
            return self.wrong_at is None
        return self.foundation_right and (self.wrong_at is None or at <= self.wrong_at)


class Calibration(BaseModel):
    """A threshold, and what it did on the examples that it was chosen on."""

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
        """Share of what always asking gains; None where it gains nothing."""
        gain = self.foundation_accuracy - self.domain_accuracy
        return (self.accuracy - self.domain_accuracy) / gain if gain > 0 else None


def calibrate(
    trials: Sequence[Trial],
    settings: RoutingSettings,
    measure: str,
    adapters: tuple[str, ...] = (),
    num_others: int = 0,
) -> Calibration:
    """The threshold that is right most often with at most ``most_escalated``; of neighbours, the one in their middle.

    At the edge of those that do equally well it would be right here and wrong elsewhere. Where the FM does no better
    than the DM, it is one below all confidences: the FM is never asked.

    Args:
        trials: Examples that the DM of one domain was asked.
        settings: What is wanted.
        measure: What ``confidences`` of the trials are.
        adapters: On the FM of the trials.
        num_others: So many trials are of other domains.
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


_NEVER = -1e9  # below whatever a measure says, and a number in JSON


def _candidates(trials: Sequence[Trial]) -> list[float]:
    """Thresholds that differ in what they do, ascending: between two confidences that were seen, and above all."""
    seen = sorted({confidence for trial in trials for confidence in trial.confidences})
    return [*((lower + upper) / 2 for lower, upper in pairwise(seen)), *(nextafter(c, inf) for c in seen[-1:])]


@dataclass(frozen=True)
class CalibrationExample:
    """An example that a device held out, in token ids. It stays on the device."""

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
    """Let the DM write the answer to an example, then the FM, greedily. Raises what the bodies raise.

    Any token that ends an answer of the model will do at the end.

    Args:
        parts: The device's.
        bodies: Where both are.
        domain: The DM.
        adapters: On the FM.
        held_out: The example.
        measure: Of confidence.
    """
    span, num_positions = (parts.first, parts.stop), len(held_out.prompt) + len(held_out.answer)
    ends = frozenset((*held_out.answer[-1:], *ends_of(parts.head.stack.config)))
    sampling = Sampling(max_tokens=len(held_out.answer), stop_ids=ends)
    trace, routing = Trace(), Routing((), "never", measure=measure)
    session = bodies.open_escalating(domain, *span, num_positions)
    written = tuple(write_routed(parts, session, held_out.prompt, sampling, routing, trace))
    asked = bodies.open(Target("cloud", adapters, domain.domain), *span, num_positions)
    by_foundation = tuple(write(parts, asked, held_out.prompt, sampling))
    expected = _ended(held_out.answer, ends)
    wrong_at = _first_difference(_ended(written, ends), expected)
    return Trial(tuple(trace.confidences), wrong_at, _ended(by_foundation, ends) == expected)


def _ended(ids: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """The same with one token in the place of any that ends an answer."""
    return tuple(min(ends) if token in ends else token for token in ids)


def _first_difference(written: Sequence[int], right: Sequence[int]) -> int | None:
    if tuple(written) == tuple(right):
        return None
    same = next((i for i, (a, b) in enumerate(zip(written, right, strict=False)) if a != b), None)
    return min(len(written), len(right)) - 1 if same is None else same


class _Kind(BaseModel):
    """What kind of file it is."""

    schema_name: str = Field(alias="schema")


_BEFORE = "gaisnet.calibration/1"  # it does not say what acted on the FM, nor on which mix


class _File(BaseModel):
    """The whole of ``calibration.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.calibration/2", alias="schema", pattern="^gaisnet.calibration/2$")
    domains: dict[str, Calibration]


def write_calibrations(folder: Path, domains: Mapping[str, Calibration]) -> None:
    """Keep them, by domain, in a run's folder. Raises ``OutputNotWritable``."""
    write_text(folder / FILE_NAME, _File(domains=dict(domains)).model_dump_json(indent=2) + "\n")


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """Those of a run's folder; none where it has none, or has them from before they said what they are of.

    Raises ``CheckpointError`` for a file that is damaged.
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
