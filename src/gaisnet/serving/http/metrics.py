"""Metrics for Prometheus; the one home of its client."""

import time
from collections.abc import Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gaisnet.serving.generation.answering import Course

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts of one endpoint. Methods may be called from any thread.

    Args:
        gauges: More figures by name, read at every scrape: 'sessions', 'cache_bytes'.
    """

    def __init__(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gaisnet_requests", "Requests that have ended.", ["model", "body", "status"], registry=registry
        )
        self._tokens = Counter("gaisnet_tokens", "Tokens of prompts and answers.", ["model", "kind"], registry=registry)
        self._first = Histogram(
            "gaisnet_time_to_first_token_seconds",
            "From a request to its first token.",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._between = Histogram(
            "gaisnet_time_between_tokens_seconds",
            "From one token to the next.",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._answers = Gauge("gaisnet_answers", "Answers under way.", registry=registry)
        self._escalations = Counter("gaisnet_escalations", "Answers that the FM took over.", registry=registry)
        self._refused = Counter(
            "gaisnet_escalations_refused", "Answers that the DM had to finish though not sure.", registry=registry
        )
        self._drafted = Counter("gaisnet_drafted_tokens", "Tokens that a DM drafted.", registry=registry)
        self._accepted = Counter("gaisnet_accepted_tokens", "Drafted tokens that the FM took.", registry=registry)
        for name, read in gauges.items():
            Gauge(f"gaisnet_{name}", f"{name} now.", registry=registry).set_function(read)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def count_begun(self) -> None:
        """Count an answer that begins."""
        self._answers.inc()

    def count_ended(self, model: str, status: int, course: Course | None) -> None:
        """Count an answer that ended; ``course`` is None if it could not begin."""
        self._answers.dec()
        self.count_response(model, status, "none" if course is None else course.now)
        if course is None:
            return
        self._tokens.labels(model, "prompt").inc(course.num_prompt_tokens)
        self._tokens.labels(model, "answer").inc(course.num_tokens)
        self._escalations.inc(course.escalated_at is not None)
        self._refused.inc(course.cloud_refused)
        if course.tally is not None:
            self._drafted.inc(course.tally.num_drafted)
            self._accepted.inc(course.tally.num_accepted)

    def count_response(self, model: str, status: int, body: str = "none") -> None:
        """Count a response with this status."""
        self._requests.labels(model, body, str(status)).inc()

    def start_timer(self, model: str) -> Callable[[], None]:
        """Return a function to call at each token of an answer requested now."""
        last, first = time.perf_counter(), True

        def token() -> None:
            nonlocal last, first
            now = time.perf_counter()
            (self._first if first else self._between).labels(model).observe(now - last)
            last, first = now, False

        return token
