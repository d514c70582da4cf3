"""The up flow's gate: what adapters cost the foundation model (FM) in general ability, and what devices say of them."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.messages import EvaluationReport

_BISECTIONS = 3
CHUNK_ROWS = 64
"""Given to a vocabulary head at once: it is long, and more would keep answers on the same machine waiting."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about an adapter, and why."""

    accepted: bool
    adapter: str
    perplexity: float
    limit: float
    unfit: str = ""  # why it was not taken, where that is not its perplexity
    share: float = 1.0  # of its strength, with which it was tried
    said: str = ""  # what was looked at, where there is no perplexity
    made: str = ""  # how the adapter came to be, where that is not plain
    reported: str = ""  # by devices

    def __str__(self) -> str:
        """The decision in a sentence."""
        weaker = f" at {self.share:.0%} of its strength" if self.share < 1.0 else ""
        found = f"perplexity on public text {self.perplexity:.2f}, limit {self.limit:.2f}"
        reasons = [self.unfit or self.said or found, *([self.reported] if self.reported else [])]
        word = "accepted" if self.accepted else "refused"
        return f"{word} '{self.adapter}'{self.made}{weaker}: {'; '.join(reasons)}"


def refused(adapter: str, why: str) -> Verdict:
    """One that was not taken for another reason than its perplexity."""
    return Verdict(False, adapter, math.nan, math.nan, why)


def comparable(one: EvaluationReport, other: EvaluationReport) -> bool:
    """Whether both are of the same examples, as far as their numbers tell: a device may have been away for one."""
    return (one.num_examples, one.num_tokens) == (other.num_examples, other.num_tokens)


def fell(before: EvaluationReport, after: EvaluationReport, most: float) -> bool:
    """Whether accuracy fell by more than ``most`` and two standard errors of a difference; not of other examples.

    The errors are those of two independent counts; on the same examples the true ones are smaller.
    """
    if not comparable(before, after):
        return False
    shares = [report.num_correct / report.num_examples for report in (before, after)]
    errors = sum(share * (1.0 - share) for share in shares) / before.num_examples
    return shares[0] - shares[1] > most + 2.0 * math.sqrt(errors)


def standing(reports: Collection[EvaluationReport]) -> tuple[float, float]:
    """Rank of an adapter over several domains, the better the larger: mean accuracy, then the negative loss.

    Zeros where nobody says anything.
    """
    if not reports:
        return 0.0, 0.0
    accuracy = sum(report.num_correct / report.num_examples for report in reports) / len(reports)
    return accuracy, -sum(report.loss_sum / report.num_tokens for report in reports) / len(reports)


def gate(adapter: str, perplexity: float, before: float, max_increase: float, share: float = 1.0) -> Verdict:
    """Refuse an adapter that raises the FM's perplexity on public text from ``before`` by more than a share.

    A perplexity that is not a number is refused, too. ``share``: of its strength, with which it was measured.
    """
    limit = before * (1.0 + max_increase)
    return Verdict(perplexity <= limit, adapter, perplexity, limit, share=share)


def strongest(judge: Callable[[float], Verdict], least: float) -> Verdict:
    """The verdict on the largest share of an adapter's strength that is accepted; its refusal if it is below ``least``.

    What an adapter costs grows with its strength, so a bisection finds the share, to within a sixteenth for a half.
    """
    whole = judge(1.0)
    best = whole if whole.accepted or least >= 1.0 else judge(least)
    if best is whole or not best.accepted:
        return whole
    low, high = least, 1.0
    for _ in range(_BISECTIONS):
        tried = judge((low + high) / 2)
        if tried.accepted:
            best, low = tried, tried.share
        else:
            high = tried.share
    return best


@torch.no_grad()
def perplexity(output_BTD: Tensor, logits: Callable[[Tensor], Tensor], input_ids_BT: Tensor) -> float:
    """Exp of the mean next-token loss over all windows.

    Args:
        output_BTD: Output of the last layer for ``input_ids_BT``.
        logits: Last norm and vocabulary head, [N, D] -> [N, V].
        input_ids_BT: int64 windows of text.
    """
    rows_ND = output_BTD[:, :-1].flatten(0, 1)
    targets_N = input_ids_BT[:, 1:].flatten()
    chunks = zip(rows_ND.split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), strict=True)
    loss = sum(F.cross_entropy(logits(rows).float(), targets, reduction="sum").item() for rows, targets in chunks)
    return float(torch.tensor(loss / len(targets_N), dtype=torch.float64).exp())
