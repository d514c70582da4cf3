"""Routing: the domain model writes; the foundation model takes over where it is unsure, on rows that the edge kept.

The device's tail measures confidence: the edge sees no probabilities. The answer stays with the foundation model:
its keys and values cover the whole sequence, and switching back would cost a prompt each time.

Shape legend: V vocabulary, D hidden size, W wanted output rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from gaisnet.errors import GaisnetError, SessionRefused
from gaisnet.serving.generation.decoding import (
    BodySession,
    CachedHead,
    CachedTail,
    DeviceParts,
    Tokens,
    check_prompt,
    prefill_prompt,
)
from gaisnet.serving.generation.text import Sampler, Sampling

Place = Literal["edge", "cloud"]


@dataclass(frozen=True)
class Target:
    """A body and its active adapters."""

    body: Place
    adapters: tuple[str, ...]  # names as the service knows them, () for none
    domain: str  # domain of the edge


class EscalatingSession(BodySession, Protocol):
    """A sequence that begins on a DM and may continue, once, on the FM, without a second uplink."""

    def escalate(self, adapters: tuple[str, ...], want: int) -> Tensor:
        """Forward all positions so far to the FM; return the FM's output rows [W, D] of the last ``want`` of them.

        Later ``extend``, ``crop`` and ``close`` go to the FM. After a ``GaisnetError`` nothing has changed: the
        session goes on where it was.

        Args:
            adapters: Adapters to activate on the FM, named as the service knows them.
            want: Number of rows to return.
        """


class Bodies(Protocol):
    """The bodies that a device reaches. Methods may be called from any thread."""

    def open_session(self, target: Target, first: int, stop: int, num_positions: int) -> BodySession:
        """Open a session of layers [first, stop).

        Args:
            target: The body and its adapters.
            first: FM layer that takes the rows.
            stop: FM layer to stop before.
            num_positions: Positions to reserve memory for: tokens of prompt and answer.

        Raises:
            GaisnetError: Full, unknown adapters, unreachable.
        """

    def open_escalating_session(self, target: Target, first: int, stop: int, num_positions: int) -> EscalatingSession:
        """Open such a session at an edge that keeps received rows, to forward them on escalation."""


Policy = Literal["never", "auto", "always"]
Measure = Callable[[Tensor], float]
"""Maps logits [V], at temperature 1 whatever the answer's is, to confidence; larger is surer."""


def top_probability(logits_V: Tensor) -> float:
    """Return the probability of the most likely token."""
    logits_V = logits_V.float()
    return float((logits_V.max() - logits_V.logsumexp(0)).exp())


def margin(logits_V: Tensor) -> float:
    """Return the probability of the most likely token minus that of the second."""
    first, second = logits_V.float().softmax(0).topk(2).values.tolist()
    return float(first - second)


def negative_entropy(logits_V: Tensor) -> float:
    """Return the negative entropy of the next token in nats: 0 if it is certain."""
    logs_V = logits_V.float().log_softmax(0)
    return float((logs_V.exp() * logs_V).sum())


MEASURES: Mapping[str, Measure] = {
    "top_probability": top_probability,
    "margin": margin,
    "negative_entropy": negative_entropy,
}
"""Measures by name; docs/decisions/0008 compares them."""
DEFAULT_MEASURE = "top_probability"


@dataclass(frozen=True)
class Routing:
    """When to ask the foundation model, and with which adapters."""

    adapters: tuple[str, ...]  # on the FM
    policy: Policy = "auto"
    threshold: float = 0.0  # a token with less confidence is written by the FM
    measure: str = DEFAULT_MEASURE

    def __post_init__(self) -> None:
        """Raise ``SessionRefused`` for an unknown measure."""
        if self.measure not in MEASURES:
            raise SessionRefused(f"measure '{self.measure}'", "it is not known", f"use {' or '.join(sorted(MEASURES))}")

    def asks(self, confidence: float) -> bool:
        """Return whether a token of this confidence goes to the FM."""
        return self.policy == "always" or (self.policy == "auto" and confidence < self.threshold)


@dataclass
class Trace:
    """Record of who wrote what of an answer, filled as it is written."""

    bodies: list[Place] = field(default_factory=list)  # of each token
    confidences: list[float] = field(default_factory=list)  # the DM's, as long as it wrote
    escalated_at: int | None = None  # first token of the FM
    refusal: str | None = None  # why the DM went on although it was unsure

    @property
    def current_body(self) -> Place:
        """The place at which the answer is written now."""
        return "edge" if self.escalated_at is None else "cloud"


class _RoutedTail(CachedTail):
    """A tail after a body that may change."""

    def __init__(self, parts: DeviceParts, body: EscalatingSession) -> None:
        super().__init__(parts, body)
        self._escalating = body

    def escalate(self, adapters: tuple[str, ...]) -> Tensor:
        """Return the FM's logits [V] at the last position. After an error of the session, nothing has changed."""
        own_layers = bool(self._parts.tail_layers.indices)  # they have seen outputs of the other body
        rows_WD = self._escalating.escalate(adapters, self._cache.length if own_layers else 1)
        self._cache.crop(0)
        return self._parts.logits(rows_WD, 1, self._cache)[0]


def generate_routed(
    parts: DeviceParts,
    body: EscalatingSession,
    prompt: Sequence[int],
    sampling: Sampling,
    routing: Routing,
    trace: Trace | None = None,
) -> Tokens:
    """Yield token ids of an answer that the DM begins; ends and raises as ``decoding.generate`` does.

    If the FM cannot be reached, the DM goes on to the end, and the trace says why.

    Args:
        parts: The device's parts.
        body: A session of the DM.
        prompt: Token ids.
        sampling: How tokens are chosen, by either model.
        routing: When to ask the FM.
        trace: Filled as the answer is written.
    """
    trace = trace if trace is not None else Trace()
    try:
        check_prompt(parts, prompt, sampling)
        head, tail, sampler = CachedHead(parts), _RoutedTail(parts, body), Sampler(sampling)
        ids = prefill_prompt(head, tail, prompt)
        for _ in range(sampling.max_tokens):
            logits_V = _routed(tail, tail.compute_logits(head.smash(ids))[0], routing, trace)
            token = sampler.draw(sampler.probabilities(logits_V))
            trace.bodies.append(trace.current_body)
            yield token
            if token in sampling.stop_ids:
                return
            ids = [token]
    finally:
        body.close()


def _routed(tail: _RoutedTail, logits_V: Tensor, routing: Routing, trace: Trace) -> Tensor:
    """Return the logits to sample from: the DM's, or the FM's at the same position."""
    if trace.escalated_at is not None:
        return logits_V
    confidence = MEASURES[routing.measure](logits_V)
    trace.confidences.append(confidence)
    if trace.refusal is not None or not routing.asks(confidence):
        return logits_V
    try:
        logits_V = tail.escalate(routing.adapters)
    except GaisnetError as error:
        trace.refusal = str(error)
    else:
        trace.escalated_at = len(trace.bodies)
    return logits_V
