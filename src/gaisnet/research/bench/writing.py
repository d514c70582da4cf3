"""Answers written to be timed: by the network, split, one or many at once, and by the same model in one piece."""

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
from gaisnet.serving.generation.bodies import Bodies, Place, Target
from gaisnet.serving.generation.decoding import DeviceParts, Tokens, write
from gaisnet.serving.generation.device import AnsweringDevice
from gaisnet.serving.generation.sampling import Sampling

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """Greedy answers to some prompts, and how long they took together."""

    answers: tuple[Prompt, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """All tokens over all of the time, prompts included."""
        return sum(map(len, self.answers)) / self.seconds


@dataclass(frozen=True)
class WrittenBySessions(Written):
    """The same by sessions, of which it is known when every prompt was read."""

    writing_s: float  # after every first token

    @property
    def writing_tokens_per_s(self) -> float:
        """Tokens but the first ones, while nothing but tokens is written."""
        return sum(len(answer) - 1 for answer in self.answers) / self.writing_s


def num_same(some: Sequence[Prompt], others: Sequence[Prompt]) -> int:
    """Answers that are the same, token for token."""
    return sum(one == other for one, other in zip(some, others, strict=True))


class Writers:
    """Lets the network write.

    Args:
        parts: The device's.
        bodies: Where it asks.
    """

    def __init__(self, parts: DeviceParts, bodies: Bodies) -> None:
        self.parts = parts
        self.bodies = bodies

    def one_by_one(self, target: Target, prompts: Sequence[Prompt], num_tokens: int) -> WrittenBySessions:
        """One session at a time, each of exactly ``num_tokens``."""
        every = [self.at_once(target, [prompt], num_tokens) for prompt in prompts]
        seconds, writing_s = sum(one.seconds for one in every), sum(one.writing_s for one in every)
        return WrittenBySessions(tuple(answer for one in every for answer in one.answers), seconds, writing_s)

    def at_once(self, target: Target, prompts: Sequence[Prompt], num_tokens: int) -> WrittenBySessions:
        """All at the same time, each in a thread of its own; who has its first token waits for the others."""
        all_begun, begun_at = threading.Barrier(len(prompts)), []

        def one(prompt: Prompt) -> Prompt:
            try:
                with closing(self._tokens(target, prompt, num_tokens)) as tokens:
                    first = next(tokens)
                    all_begun.wait()
                    begun_at.append(time.perf_counter())
                    return (first, *tokens)
            except BaseException:
                all_begun.abort()  # the others need not wait for this one
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
        """Seconds between two tokens of an answer, while ``at_once`` sessions write one answer after the other."""
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
        session = self.bodies.open(target, self.parts.first, self.parts.stop, len(prompt) + num_tokens)
        return write(self.parts, session, prompt, Sampling(max_tokens=num_tokens))


class Unsplit:
    """The same model in one piece, as transformers runs it.

    Args:
        model: Freshly loaded; it is taken over.
        compute_lock: Of the machine.
    """

    def __init__(self, model: PreTrainedModel, compute_lock: ComputeLock) -> None:
        self._model: Any = model
        self._compute_lock = compute_lock
        model.generation_config.eos_token_id = None  # answers have all their tokens, as those they are compared with
        self._pad = model.config.vocab_size - 1

    def write(self, prompts: Sequence[Prompt], num_tokens: int) -> Written:
        """What ``generate`` writes greedily, to one prompt at a time."""
        started = time.perf_counter()
        answers = tuple(self._answer(prompt, num_tokens) for prompt in prompts)
        return Written(answers, time.perf_counter() - started)

    def with_body(self, body: Body, first: int) -> "Unsplit":
        """The model with a body in place of its layers from ``first`` on; adapters act as they do at the moment."""
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
    """The model that writes for ``device`` at ``place``: the foundation model as transformers loads it, or the DM."""
    model = load_foundation(served.config.model, plain=place == "cloud").model
    unsplit = Unsplit(model, served.bodies.compute_lock)
    if place == "cloud":
        return unsplit
    return unsplit.with_body(served.bodies.body("edge", device.domain), device.parts.first)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """So many at a time, and from the beginning again."""
    endless = cycle(prompts)
    while True:
        yield [next(endless) for _ in range(size)]
