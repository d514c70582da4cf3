"""The domain model writes; where it is not sure, the foundation model takes over, on smashed data that the edge holds.

How sure it is, the device's tail says: the edge sees no probabilities. The answer goes on at the foundation model once
and for all: its keys and values are those of the whole sequence, and to go back would cost a prompt for each change.

Shape legend: V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gaisnet.errors import GaisnetError, SessionRefused
from gaisnet.serving.generation.bodies import EscalatingSession, Place
from gaisnet.serving.generation.decoding import DeviceParts, HeadSession, TailSession, Tokens, check_prompt, read
from gaisnet.serving.generation.sampling import Sampler, Sampling

Policy = Literal["never", "auto", "always"]
Measure = Callable[[Tensor], float]
"""From logits [V], at temperature 1 whatever the answer's is, to how sure a model is; larger is surer."""


def top_probability(logits_V: Tensor) -> float:
    """Probability of the likeliest token."""
    logits_V = logits_V.float()
    return float((logits_V.max() - logits_V.logsumexp(0)).exp())


def margin(logits_V: Tensor) -> float:
    """Probability of the likeliest token less that of the second."""
    first, second = logits_V.float().softmax(0).topk(2).values.tolist()
    return float(first - second)


def negative_entropy(logits_V: Tensor) -> float:
    """Entropy of the next token in nats, negative: 0 where it is certain."""
    logs_V = logits_V.float().log_softmax(0)
    return float((logs_V.exp() * logs_V).sum())


MEASURES: Mapping[str, Measure] = {
    "top_probability": top_probability,
    "margin": margin,
    "negative_entropy": negative_entropy,
}
"""By name; docs/decisions/0008 compares them."""
DEFAULT_MEASURE = "top_probability"


@dataclass(frozen=True)
class Routing:
    """When to ask the foundation model, and for which adapters."""

    adapters: tuple[str, ...]  # on the FM
    policy: Policy = "auto"
    threshold: float = 0.0  # a token that the DM is less sure of is the FM's to write
    measure: str = DEFAULT_MEASURE

    def __post_init__(self) -> None:
        """Raise ``SessionRefused`` for a measure that there is not."""
        if self.measure not in MEASURES:
            raise SessionRefused(f"measure '{self.measure}'", "it is not known", f"use {' or '.join(sorted(MEASURES))}")

    def asks(self, confidence: float) -> bool:
        """Whether a token of this confidence goes to the FM."""
        return self.policy == "always" or (self.policy == "auto" and confidence < self.threshold)


@dataclass
class Trace:
    """Who wrote what of an answer, filled as it is written."""

    bodies: list[Place] = field(default_factory=list)  # of each token
    confidences: list[float] = field(default_factory=list)  # of the DM, as long as it wrote
    escalated_at: int | None = None  # first token of the FM
    refusal: str | None = None  # why the DM went on although it was not sure

    @property
    def body(self) -> Place:
        """Where the answer is written now."""
        return "edge" if self.escalated_at is None else "cloud"


class _RoutedTail(TailSession):
    """A tail behind a body that may change."""

    def __init__(self, parts: DeviceParts, body: EscalatingSession) -> None:
        super().__init__(parts, body)
        self._escalating = body

    def escalate(self, adapters: tuple[str, ...]) -> Tensor:
        """The FM's logits [V] at the last position. Raises what the session raises, and then nothing has changed."""
        own_layers = bool(self._parts.tail_layers.indices)  # they have seen outputs of the other body
        rows_WD = self._escalating.escalate(adapters, self._cache.length if own_layers else 1)
        self._cache.crop(0)
        return self._parts.logits(rows_WD, 1, self._cache)[0]


def write_routed(
    parts: DeviceParts,
    body: EscalatingSession,
    prompt: Sequence[int],
    sampling: Sampling,
    routing: Routing,
    trace: Trace | None = None,
) -> Tokens:
    """Token ids of an answer that the DM begins, as they come; ends and raises as ``decoding.write`` does.

    If the FM cannot be had, the DM goes on to the end, and the trace says why.

    Args:
        parts: The device's.
        body: A session of the DM.
        prompt: Token ids.
        sampling: How tokens are chosen, whoever writes.
        routing: When to ask the FM.
        trace: Filled, for whoever wants to know.
    """
    trace = trace if trace is not None else Trace()
    try:
        check_prompt(parts, prompt, sampling)
        head, tail, sampler = HeadSession(parts), _RoutedTail(parts, body), Sampler(sampling)
        ids = read(head, tail, prompt)
        for _ in range(sampling.max_tokens):
            logits_V = _routed(tail, tail.run(head.run(ids))[0], routing, trace)
            token = sampler.draw(sampler.probabilities(logits_V))
            trace.bodies.append(trace.body)
            yield token
            if token in sampling.stop_ids:
                return
            ids = [token]
    finally:
        body.close()


def _routed(tail: _RoutedTail, logits_V: Tensor, routing: Routing, trace: Trace) -> Tensor:
    """The logits to write from: the DM's, or the FM's at the same position."""
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
