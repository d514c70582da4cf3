"""Timed answers: by the split network, one or many at once, and by the same model in one piece."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gaisnet.compute_lock import ComputeLock
from gaisnet.models.foundation import load_foundation
from gaisnet.models.parts import Body
from gaisnet.runs.served_run import ServedRun
from gaisnet.serving.generation.decoding import DeviceParts, Tokens, generate
from gaisnet.serving.generation.device import AnsweringDevice
from gaisnet.serving.generation.routing import Bodies, Place, Target
from gaisnet.serving.generation.text import Sampling

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """Greedy answers to some prompts, and the seconds that they took together."""

    answers: tuple[Prompt, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over the whole time, prompts included."""
        return sum(map(len, self.answers)) / self.seconds


@dataclass(frozen=True)
class WrittenBySessions(Written):
    """Answers by sessions, with the moment at which every prompt had been read."""

    writing_s: float  # after every first token

    @property
    def writing_tokens_per_s(self) -> float:
        """Tokens per second without first tokens, while sessions only generate."""
        return sum(len(answer) - 1 for answer in self.answers) / self.writing_s


def num_same(some: Sequence[Prompt], others: Sequence[Prompt]) -> int:
    """Count answers that are equal, token for token."""
    return sum(one == other for one, other in zip(some, others, strict=True))


class Writers:
    """Lets the network write.

    Args:
        parts: The device's parts.
        bodies: The bodies to ask.
    """

    def __init__(self, parts: DeviceParts, bodies: Bodies) -> None:
        self.parts = parts
        self.bodies = bodies

    def one_by_one(self, target: Target, prompts: Sequence[Prompt], num_tokens: int) -> WrittenBySessions:
        """Write in one session at a time, exactly ``num_tokens`` each."""
        every = [self.at_once(target, [prompt], num_tokens) for prompt in prompts]
        seconds, writing_s = sum(one.seconds for one in every), sum(one.writing_s for one in every)
        return WrittenBySessions(tuple(answer for one in every for answer in one.answers), seconds, writing_s)

    def at_once(self, target: Target, prompts: Sequence[Prompt], num_tokens: int) -> WrittenBySessions:
        """Write all at the same time, in a thread each; sessions wait for each other after their first token."""
        all_begun, begun_at = threading.Barrier(len(prompts)), []

        def one(prompt: Prompt) -> Prompt:
            try:
                with closing(self._tokens(target, prompt, num_tokens)) as tokens:
                    first = next(tokens)
                    all_begun.wait()
                    begun_at.append(time.perf_counter())
                    return (first, *tokens)
            except BaseException:
                all_begun.abort()  # the others must not wait for this one
                raise

        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            written = [pool.submit(one, prompt) for prompt in prompts]
        ended = time.perf_counter()
        for error in (each.exception() for each in written):
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        answers = tuple(each.result() for each in written)
        return WrittenBySessions(answers, ended - started, ended - min(begun_at))

    def gaps(
        self, target: Target, prompts: Sequence[Prompt], num_tokens: int, at_once: int, enough: Callable[[], bool]
    ) -> list[float]:
        """Return the seconds between tokens while ``at_once`` sessions write one answer after another."""
        turns, guard = cycle(prompts), threading.Lock()

        def go_on(_: int) -> list[float]:
            found: list[float] = []
            while not enough():
                with guard:
                    prompt = next(turns)
                came = []
                with closing(self._tokens(target, prompt, num_tokens)) as tokens:
                    for _token in tokens:
                        came.append(time.perf_counter())
                        if enough():
                            break
                found += [later - earlier for earlier, later in pairwise(came)]
            return found

        with ThreadPoolExecutor(at_once) as pool:
            return [gap for gaps in pool.map(go_on, range(at_once)) for gap in gaps]

    def _tokens(self, target: Target, prompt: Prompt, num_tokens: int) -> Tokens:
        session = self.bodies.open_session(target, self.parts.first, self.parts.stop, len(prompt) + num_tokens)
        return generate(self.parts, session, prompt, Sampling(max_tokens=num_tokens))


class Unsplit:
    """The same model in one piece, run by transformers.

    Args:
        model: Freshly loaded; this object takes it over.
        compute_lock: The machine's lock.
    """

    def __init__(self, model: PreTrainedModel, compute_lock: ComputeLock) -> None:
        self._model: Any = model
        self._compute_lock = compute_lock
        model.generation_config.eos_token_id = None  # answers have full length, as the ones they are compared with
        self._pad = model.config.vocab_size - 1

    def write(self, prompts: Sequence[Prompt], num_tokens: int) -> Written:
        """Write greedily with ``generate``, one prompt at a time."""
        started = time.perf_counter()
        answers = tuple(self._answer(prompt, num_tokens) for prompt in prompts)
        return Written(answers, time.perf_counter() - started)

    def with_body(self, body: Body, first: int) -> "Unsplit":
        """Return the model with a body in place of its layers from ``first`` on; active adapters stay active."""
        own = list(self._model.model.layers[:first])
        self._model.model.layers = nn.ModuleList([*own, *body.layers.values()])
        return self

    @torch.no_grad()
    def _answer(self, prompt: Prompt, num_tokens: int) -> Prompt:
        input_ids = torch.tensor([prompt])
        with self._compute_lock.serving():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=self._pad,
            )
        return tuple(output[0, len(prompt) :].tolist())


def in_one_piece(served: ServedRun, device: AnsweringDevice, place: Place) -> Unsplit:
    """Return the unsplit model for ``device`` at ``place``: the FM as transformers loads it, or the DM."""
    model = load_foundation(served.config.model, plain=place == "cloud").model
    unsplit = Unsplit(model, served.bodies.compute_lock)
    if place == "cloud":
        return unsplit
    return unsplit.with_body(served.bodies.served_body("edge", device.domain), device.parts.first)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield this many prompts at a time, and from the beginning again."""
    endless = cycle(prompts)
    while True:
        yield [next(endless) for _ in range(size)]
