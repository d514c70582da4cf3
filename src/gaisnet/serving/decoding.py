"""A device writes an answer: its head, a body anywhere, its tail, a token; then again.

Shape legend: T new positions, W wanted ones, D hidden size, V vocabulary.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from gaisnet.errors import ContextFull, SessionRefused
from gaisnet.models.parts import Head, Tail
from gaisnet.serving.cache import SessionCache
from gaisnet.serving.rows import SessionLayers, Share
from gaisnet.serving.sampling import Sampler, Sampling
from gaisnet.serving.sessions import BodySession

PREFILL_CHUNK = 64

Tokens = Generator[int, None, None]
"""Token ids, one by one; ``close`` it to break off."""


class DeviceParts:
    """A device's head and tail, for any number of answers, also in several threads at once.

    Args:
        head: Its first layers.
        tail: Its last.
    """

    def __init__(self, head: Head, tail: Tail) -> None:
        self.head = head
        self.tail = tail
        self.head_layers = SessionLayers(head.stack)
        self.tail_layers = SessionLayers(tail.stack)
        self.context = int(head.stack.config.max_position_embeddings)

    @property
    def first(self) -> int:
        """FM layer at which a body takes over."""
        return len(self.head_layers.indices)

    @property
    def stop(self) -> int:
        """FM layer before which it stops."""
        return int(self.head.stack.config.num_hidden_layers) - len(self.tail_layers.indices)


class HeadSession:
    """Token ids in, smashed rows out."""

    def __init__(self, parts: DeviceParts) -> None:
        self._parts = parts
        self._cache = SessionCache()

    @torch.no_grad()
    def run(self, ids: Sequence[int]) -> Tensor:
        """Smashed rows [T, D] of the next tokens."""
        embed = self._parts.head.embed_tokens
        rows_TD = embed(torch.tensor(ids, device=embed.weight.device))
        return self._parts.head_layers.run([Share(rows_TD, self._cache, 0, self._parts.first)])[0]

    def crop(self, length: int) -> None:
        """Forget tokens from ``length`` on."""
        self._cache.crop(length)


class TailSession:
    """A body and the device's tail behind it: smashed rows in, logits out."""

    def __init__(self, parts: DeviceParts, body: BodySession) -> None:
        self._parts = parts
        self._body = body
        self._cache = SessionCache()

    @torch.no_grad()
    def run(self, rows_TD: Tensor, want: int = 1) -> Tensor:
        """Logits [W, V] at the last ``want`` of the new positions."""
        layers = self._parts.tail_layers.indices
        output_TD = self._body.extend(rows_TD, len(rows_TD) if layers else want).to(rows_TD)
        if layers:  # they must see every position
            share = Share(output_TD, self._cache, layers[0], layers[-1] + 1)
            output_TD = self._parts.tail_layers.run([share])[0]
        return self._parts.tail.logits(output_TD[len(output_TD) - want :])

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        self._body.crop(length)
        self._cache.crop(length)


def prefill(head: HeadSession, tails: Sequence[TailSession], ids: Sequence[int]) -> None:
    """Let all see a prompt, a chunk at a time; the head runs once for all."""
    for first in range(0, len(ids), PREFILL_CHUNK):
        rows_TD = head.run(ids[first : first + PREFILL_CHUNK])
        for tail in tails:
            tail.run(rows_TD, want=0)


def check_prompt(parts: DeviceParts, prompt: Sequence[int], sampling: Sampling) -> None:
    """Raise ``SessionRefused`` or ``ContextFull`` for a prompt that cannot be answered."""
    if not prompt:
        raise SessionRefused("a prompt", "it has no tokens", "begin with at least one")
    num_tokens = parts.head.embed_tokens.num_embeddings
    if min(prompt) < 0 or max(prompt) >= num_tokens:
        raise SessionRefused("a prompt", "it has token ids that the model lacks", f"use 0 to {num_tokens - 1}")
    if len(prompt) + sampling.max_tokens > parts.context:
        raise ContextFull(len(prompt) + sampling.max_tokens, parts.context)


def write(parts: DeviceParts, body: BodySession, prompt: Sequence[int], sampling: Sampling) -> Tokens:
    """Token ids of an answer, as they come; closes the session when the answer ends or nobody wants more of it.

    Raises:
        SessionRefused, ContextFull: At the first token, for a prompt that cannot be answered.
        GaisnetError: What the body raises.
    """
    try:
        check_prompt(parts, prompt, sampling)
        head, tail, sampler = HeadSession(parts), TailSession(parts, body), Sampler(sampling)
        prefill(head, [tail], prompt[:-1])
        token = prompt[-1]
        for _ in range(sampling.max_tokens):
            logits_V = tail.run(head.run([token]))[0]
            token = sampler.draw(sampler.probabilities(logits_V))
            yield token
            if token in sampling.stop_ids:
                return
    finally:
        body.close()
