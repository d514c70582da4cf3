"""Speculative decoding: a small body drafts tokens, a large one verifies them in one pass (arXiv 2211.17192).

The answer has the distribution of the large body's own; greedy, it is the same. Both bodies take the same
smashed rows, so the device's head runs once for both, and drafting needs no extra model. Source: Leviathan et al.

Shape legend: K drafted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaisnet.serving.generation.decoding import (
    BodySession,
    CachedHead,
    CachedTail,
    DeviceParts,
    Tokens,
    check_prompt,
    prefill,
)
from gaisnet.serving.generation.text import Sampler, Sampling

_FORGET = 0.9
_PRIOR = 0.7  # assumed acceptance before any was seen


class DraftLength:
    """Chooses how many tokens to draft, from the observed acceptance.

    With acceptance a, a draft of k tokens gives (1 - a^(k+1)) / (1 - a) tokens on average and costs one check and k
    drafts; the best k is chosen (Leviathan et al., section 3.5).

    Args:
        longest: Upper limit.
        cost: Time of drafting a token relative to a check, including the call to the large body.
    """

    def __init__(self, longest: int = 8, cost: float = 0.1) -> None:
        self._longest = longest
        self._cost = cost
        self._tried, self._accepted = 1.0, _PRIOR

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that was accepted recently."""
        return self._accepted / self._tried

    def record_draft(self, num_drafted: int, num_accepted: int) -> None:
        """Count a checked draft. Tokens after the first rejected one were not tried."""
        tried = min(num_drafted, num_accepted + 1)
        self._tried = _FORGET * self._tried + tried
        self._accepted = _FORGET * self._accepted + num_accepted

    def choose_length(self) -> int:
        """Return how many tokens to draft now."""
        return max(range(1, self._longest + 1), key=self._tokens_per_time)

    def _tokens_per_time(self, num_drafted: int) -> float:
        expected = sum(self.acceptance**i for i in range(num_drafted + 1))
        return expected / (1 + self._cost * num_drafted)


@dataclass
class Tally:
    """Counts of an answer's work."""

    num_checks: int = 0  # calls to the large body, the prompt's not counted
    num_drafted: int = 0
    num_accepted: int = 0
    num_tokens: int = 0


def verify_draft(drafted: Sequence[int], drafts_KV: Tensor, checks_KV: Tensor, sampler: Sampler) -> list[int]:
    """Return the tokens gained by a draft: the accepted ones, and one that the large body adds.

    Args:
        drafted: K tokens.
        drafts_KV: Probabilities that each was drawn from.
        checks_KV: The large body's at the same places, and at the next one, [K + 1, V].
        sampler: Source of randomness.
    """
    for at, token in enumerate(drafted):
        draft_V, check_V = drafts_KV[at], checks_KV[at]
        if not sampler.accepts(float(check_V[token] / draft_V[token])):
            left_V = (check_V - draft_V).clamp(min=0)
            return [
                *drafted[:at],
                sampler.draw(left_V if left_V.any() else check_V),
            ]  # nothing left, because of rounding
    return [*drafted, sampler.draw(checks_KV[-1])]


class _Pair:
    """Both bodies and the head, kept at the same place of one sequence."""

    def __init__(self, parts: DeviceParts, drafter: BodySession, checker: BodySession, sampler: Sampler) -> None:
        self._head = CachedHead(parts)
        self._drafter = CachedTail(parts, drafter)
        self._checker = CachedTail(parts, checker)
        self._sampler = sampler
        self._length = 0  # positions that the checker holds
        self._ahead: list[Tensor] = []  # smashed rows that the drafter has not seen

    def prefill(self, ids: Sequence[int]) -> None:
        prefill(self._head, [self._drafter, self._checker], ids)
        self._length = len(ids)

    def draft(self, token: int, num: int, stop_ids: frozenset[int]) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Draft at most ``num`` tokens after ``token``; return them, their probabilities, and all smashed rows."""
        drafted: list[int] = []
        probabilities: list[Tensor] = []
        rows = [self._head.smash([token])]
        while len(drafted) < num and token not in stop_ids:
            logits_V = self._drafter.compute_logits(torch.cat([*self._ahead, rows[-1]]))[0]
            self._ahead = []
            probabilities.append(self._sampler.probabilities(logits_V))
            token = self._sampler.draw(probabilities[-1])
            drafted.append(token)
            rows.append(self._head.smash([token]))
        return drafted, probabilities, rows

    def verify(self, drafted: list[int], drafts: list[Tensor], rows: list[Tensor]) -> list[int]:
        """Verify a draft; afterwards all parts stand after the accepted tokens."""
        logits_KV = self._checker.compute_logits(torch.cat(rows), want=len(rows))
        checks_KV = torch.stack([self._sampler.probabilities(logits_V) for logits_V in logits_KV])
        drafts_KV = torch.stack(drafts) if drafts else checks_KV[:0]
        tokens = verify_draft(drafted, drafts_KV, checks_KV, self._sampler)
        self._length += len(tokens)
        self._head.crop(self._length)
        self._checker.crop(self._length)
        if len(tokens) > len(drafted):  # the drafter has not seen its own last token
            self._ahead.append(rows[-1])
        else:
            self._drafter.crop(self._length)
        return tokens


def generate_speculatively(
    parts: DeviceParts,
    drafter: BodySession,
    checker: BodySession,
    prompt: Sequence[int],
    sampling: Sampling,
    length: DraftLength | None = None,
    tally: Tally | None = None,
) -> Tokens:
    """Yield token ids of the answer that ``checker`` would write; ends and raises as ``decoding.generate`` does.

    Args:
        parts: The device's parts.
        drafter: A session of the small body.
        checker: A session of the large one.
        prompt: Token ids.
        sampling: How both choose tokens.
        length: Length of drafts, adapted as it goes.
        tally: Counts, updated as it goes.
    """
    length, tally = length or DraftLength(), tally or Tally()
    try:
        check_prompt(parts, prompt, sampling)
        pair = _Pair(parts, drafter, checker, Sampler(sampling))
        pair.prefill(prompt[:-1])
        token, left = prompt[-1], sampling.max_tokens
        while left:
            num = min(length.choose_length(), left - 1)
            tokens = _round(pair, token, num, sampling.stop_ids, length, tally)
            for token in tokens:
                tally.num_tokens += 1
                left -= 1
                yield token
                if token in sampling.stop_ids:
                    return
    finally:
        drafter.close()
        checker.close()


def _round(pair: _Pair, token: int, num: int, stop_ids: frozenset[int], length: DraftLength, tally: Tally) -> list[int]:
    drafted, probabilities, rows = pair.draft(token, num, stop_ids)
    tokens = pair.verify(drafted, probabilities, rows)
    if drafted:
        length.record_draft(len(drafted), len(tokens) - 1)
    tally.num_checks += 1
    tally.num_drafted += len(drafted)
    tally.num_accepted += len(tokens) - 1
    return tokens
