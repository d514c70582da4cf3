"""Decoding on a device, token by token: its head, a body anywhere, its tail.

Shape legend: T new positions, W wanted ones, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gaisnet.compute_lock import ComputeLock
from gaisnet.errors import ContextFull, LinkTimeout, SessionRefused
from gaisnet.models.parts import Head, Tail
from gaisnet.serving.engine.rows import BatchedLayers, BatchEntry, KVCache
from gaisnet.serving.generation.batching_call import BatchingCall
from gaisnet.serving.generation.text import Sampler, Sampling

PREFILL_CHUNK = 64
_MOST_ROWS = 256  # of all answers together, in one run of a part

Tokens = Generator[int, None, None]
"""Token ids, one by one; ``close`` it to stop."""


class BodySession(Protocol):
    """One sequence on a body."""

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions [T, D]; return the last ``want`` output rows. Raises a ``GaisnetError``."""

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""

    def close(self) -> None:
        """Close the session and free its memory; may be called more than once."""


@runtime_checkable
class AsyncBodySession(Protocol):
    """A session that can also be asked without waiting, so that many answers in as many threads proceed together."""

    @property
    def deadline_s(self) -> float | None:
        """Seconds to wait for rows; None if they are certain to come or fail."""

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """Run new positions like ``BodySession.extend``; errors are raised here or by the future."""


@dataclass(frozen=True)
class _Finish:
    """Body output of one answer on its way through the tail."""

    output_TD: Tensor
    want: int
    cache: KVCache


class DeviceParts:
    """A device's head and tail for many answers in as many threads; concurrent calls run as one batch.

    A vocabulary head is read from memory as a whole for one row, and only once for the rows of all answers.

    Args:
        head: The first layers.
        tail: The last layers.
        compute_lock: The lock of its machine, if others compute there too.
    """

    def __init__(self, head: Head, tail: Tail, compute_lock: ComputeLock | None = None) -> None:
        self._computing: Callable[[], AbstractContextManager[None]] = (
            compute_lock.serving if compute_lock is not None else nullcontext
        )
        self.head = head
        self.tail = tail
        self.head_layers = BatchedLayers(head.stack)
        self.tail_layers = BatchedLayers(tail.stack)
        norm = next(tail.norm.parameters())
        self._placement = norm.device, norm.dtype
        self.context = int(head.stack.config.max_position_embeddings)
        self._begin: BatchingCall[BatchEntry, Tensor] = BatchingCall(
            self._begin_all, lambda s: len(s.rows_TD), _MOST_ROWS
        )
        self._finish: BatchingCall[_Finish, Tensor] = BatchingCall(
            self._finish_all, lambda f: len(f.output_TD), _MOST_ROWS
        )

    @property
    def first(self) -> int:
        """FM layer at which a body takes over."""
        return len(self.head_layers.indices)

    @property
    def stop(self) -> int:
        """FM layer before which it stops."""
        return int(self.head.stack.config.num_hidden_layers) - len(self.tail_layers.indices)

    @torch.no_grad()
    def smash(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Return smashed rows [T, D] of the next tokens of the answer with this ``cache``."""
        rows_TD: Tensor = self.head.embed_tokens(torch.tensor(ids, device=self._placement[0]))
        return self._begin(BatchEntry(rows_TD, cache, 0, self.first)) if self.first else rows_TD

    def logits(
        self,
        output_TD: "Tensor | Future[Tensor]",
        want: int,
        cache: KVCache,
        deadline_s: float | None = None,
    ) -> Tensor:
        """Return logits [W, V] at the last ``want`` of the body's outputs [T, D], which may still be pending.

        Only layers in the tail need the outputs at all new positions. Raises their errors, and
        ``LinkTimeout`` if they have not come after ``deadline_s``.
        """

        def finish(output_TD: Tensor) -> _Finish:
            return _Finish(output_TD.to(*self._placement), want, cache)

        if not isinstance(output_TD, Future):
            return self._finish(finish(output_TD))
        try:
            return self._finish.after(output_TD, finish, deadline_s)
        except CancelledError:
            raise LinkTimeout("a session, waiting for output rows", f"none for {deadline_s} s") from None

    def _begin_all(self, every: Sequence[BatchEntry]) -> Sequence[Tensor]:
        with self._computing():
            return self.head_layers.run_sessions(every)

    @torch.no_grad()
    def _finish_all(self, every: Sequence[_Finish]) -> Sequence[Tensor]:
        with self._computing():
            return self._logits(every)

    def _logits(self, every: Sequence[_Finish]) -> Sequence[Tensor]:
        outputs = [one.output_TD for one in every]
        if layers := self.tail_layers.indices:  # they must see every position
            first, stop = layers[0], layers[-1] + 1
            outputs = self.tail_layers.run_sessions(
                [BatchEntry(one.output_TD, one.cache, first, stop) for one in every]
            )
        wanted = [output_TD[len(output_TD) - one.want :] for one, output_TD in zip(every, outputs, strict=True)]
        logits_NV = self.tail.logits(torch.cat(wanted))
        return list(logits_NV.split([one.want for one in every]))


class CachedHead:
    """Maps token ids to smashed rows."""

    def __init__(self, parts: DeviceParts) -> None:
        self._parts = parts
        self._cache = KVCache()

    def smash(self, ids: Sequence[int]) -> Tensor:
        """Return smashed rows [T, D] of the next tokens."""
        return self._parts.smash(ids, self._cache)

    def crop(self, length: int) -> None:
        """Drop tokens from ``length`` on."""
        self._cache.crop(length)


class CachedTail:
    """A body followed by the device's tail: maps smashed rows to logits."""

    def __init__(self, parts: DeviceParts, body: BodySession) -> None:
        self._parts = parts
        self._body = body
        self._ask: Callable[[Tensor, int], Tensor | Future[Tensor]] = body.extend
        self._deadline_s: float | None = None
        if isinstance(body, AsyncBodySession):
            self._ask, self._deadline_s = body.send, body.deadline_s
        self._cache = KVCache()

    def compute_logits(self, rows_TD: Tensor, want: int = 1) -> Tensor:
        """Return logits [W, V] at the last ``want`` of the new positions."""
        needed = len(rows_TD) if self._parts.tail_layers.indices else want
        return self._parts.logits(self._ask(rows_TD, needed), want, self._cache, self._deadline_s)

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""
        self._body.crop(length)
        self._cache.crop(length)


def prefill(head: CachedHead, tails: Sequence[CachedTail], ids: Sequence[int]) -> None:
    """Run a prompt through all sessions, a chunk at a time; the head runs once for all."""
    for first in range(0, len(ids), PREFILL_CHUNK):
        rows_TD = head.smash(ids[first : first + PREFILL_CHUNK])
        for tail in tails:
            tail.compute_logits(rows_TD, want=0)


def prefill_prompt(head: CachedHead, tail: CachedTail, prompt: Sequence[int]) -> Sequence[int]:
    """Run all of a prompt but its last chunk; return that chunk, from which the first token comes."""
    last = (len(prompt) - 1) // PREFILL_CHUNK * PREFILL_CHUNK
    prefill(head, [tail], prompt[:last])
    return prompt[last:]


def check_prompt(parts: DeviceParts, prompt: Sequence[int], sampling: Sampling) -> None:
    """Raise ``SessionRefused`` or ``ContextFull`` for a prompt that cannot be answered."""
    if not prompt:
        raise SessionRefused("a prompt", "it has no tokens", "begin with at least one")
    num_tokens = parts.head.embed_tokens.num_embeddings
    if min(prompt) < 0 or max(prompt) >= num_tokens:
        raise SessionRefused("a prompt", "it has token ids that the model lacks", f"use 0 to {num_tokens - 1}")
    if len(prompt) + sampling.max_tokens > parts.context:
        raise ContextFull(len(prompt) + sampling.max_tokens, parts.context)


def generate(parts: DeviceParts, body: BodySession, prompt: Sequence[int], sampling: Sampling) -> Tokens:
    """Yield token ids of an answer; close the session when the answer ends or the caller stops.

    Raises:
        SessionRefused, ContextFull: At the first token, for a prompt that cannot be answered.
        GaisnetError: An error of the body.
    """
    try:
        check_prompt(parts, prompt, sampling)
        head, tail, sampler = CachedHead(parts), CachedTail(parts, body), Sampler(sampling)
        ids = prefill_prompt(head, tail, prompt)
        for _ in range(sampling.max_tokens):
            token = sampler.draw(sampler.probabilities(tail.compute_logits(head.smash(ids))[0]))
            yield token
            if token in sampling.stop_ids:
                return
            ids = [token]
    finally:
        body.close()
