"""The gate of the up flow: an adapter's cost for the FM's general ability, and devices' scores."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.messages import EvaluationReport

_BISECTIONS = 3
CHUNK_ROWS = 64
"""Rows for a vocabulary head at once: vocabularies are large, and answers on the same machine wait."""


@dataclass(frozen=True)
class Verdict:
    """The gate's decision about an adapter, and its reasons."""

    accepted: bool
    adapter: str
    perplexity: float
    limit: float
    rejection: str = ""  # reason other than perplexity
    share: float = 1.0  # share of its strength at which it was tried
    evidence: str = ""  # evidence where there is no perplexity
    origin: str = ""  # how the adapter was made, where that is not plain
    device_feedback: str = ""  # scores by devices

    def __str__(self) -> str:
        """Return the decision as a sentence."""
        weaker = f" at {self.share:.0%} of its strength" if self.share < 1.0 else ""
        found = f"perplexity on public text {self.perplexity:.2f}, limit {self.limit:.2f}"
        reasons = [self.rejection or self.evidence or found, *([self.device_feedback] if self.device_feedback else [])]
        word = "accepted" if self.accepted else "refused"
        return f"{word} '{self.adapter}'{self.origin}{weaker}: {'; '.join(reasons)}"


def reject(adapter: str, why: str) -> Verdict:
    """Return a rejection for a reason other than perplexity."""
    return Verdict(False, adapter, math.nan, math.nan, why)


def same_examples(one: EvaluationReport, other: EvaluationReport) -> bool:
    """Return whether two reports cover the same examples, judging by their counts.

    A device may have been away for one.
    """
    return (one.num_examples, one.num_tokens) == (other.num_examples, other.num_tokens)


def accuracy_fell(before: EvaluationReport, after: EvaluationReport, most: float) -> bool:
    """Return whether accuracy fell by more than ``most`` plus two standard errors; False for different examples.

    The errors are those of two independent counts; on the same examples the true ones are smaller.
    """
    if not same_examples(before, after):
        return False
    shares = [report.num_correct / report.num_examples for report in (before, after)]
    errors = sum(share * (1.0 - share) for share in shares) / before.num_examples
    return shares[0] - shares[1] > most + 2.0 * math.sqrt(errors)


def mean_scores(reports: Collection[EvaluationReport]) -> tuple[float, float]:
    """Rank an adapter over several domains, larger is better: mean accuracy, then the negative loss.

    Zeros without reports.
    """
    if not reports:
        return 0.0, 0.0
    accuracy = sum(report.num_correct / report.num_examples for report in reports) / len(reports)
    return accuracy, -sum(report.loss_sum / report.num_tokens for report in reports) / len(reports)


def verdict_on_perplexity(
    adapter: str, perplexity: float, before: float, max_increase: float, share: float = 1.0
) -> Verdict:
    """Reject an adapter that raises the FM's perplexity on public text from ``before`` by more than a share.

    A perplexity of NaN is rejected, too. ``share``: the adapter's strength at which it was measured.
    """
    limit = before * (1.0 + max_increase)
    return Verdict(perplexity <= limit, adapter, perplexity, limit, share=share)


def strongest_accepted(judge: Callable[[float], Verdict], least: float) -> Verdict:
    """Return the verdict on the largest accepted share of an adapter's strength; a rejection if it is below ``least``.

    Cost grows with strength, so a bisection finds the share, to within a sixteenth for a half.
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
    """Return exp of the mean next-token loss over all windows.

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
