"""Sampling: temperature, nucleus (top-p) sampling (Holtzman et al., arXiv 1904.09751), and a seed.

Shape legend: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gaisnet.errors import SessionRefused

_COLDEST = 1e-5
"""Lower temperatures count as 0: dividing by them would overflow float32."""


@dataclass(frozen=True)
class Sampling:
    """Choice of tokens, and the end of an answer."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0, or almost 0, takes the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this much probability is drawn from
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer, included as its last token

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SessionRefused("max_tokens", f"it is {self.max_tokens}", "use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise SessionRefused("temperature", f"it is {self.temperature}", "use 0 or more")
        if not 0 < self.top_p <= 1:
            raise SessionRefused("top_p", f"it is {self.top_p}", "use more than 0, and at most 1")


class Sampler:
    """Draws tokens. Equal seed and logits give equal tokens.

    Args:
        sampling: Temperature, top-p and seed.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = 0.0 if sampling.temperature < _COLDEST else sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Return the distribution to draw from, float32 [V] on the CPU.

        At temperature 0, all on the most likely token.
        """
        logits_V = logits_V.float().cpu()
        if not self._temperature:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        probabilities_V = (logits_V / self._temperature).softmax(0)
        return probabilities_V if self._top_p == 1 else _nucleus(probabilities_V, self._top_p)

    def draw(self, probabilities_V: Tensor) -> int:
        """Draw a token; probabilities need not sum to one."""
        if not self._temperature:
            return int(probabilities_V.argmax())
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))

    def accepts(self, probability: float) -> bool:
        """Return True with this probability."""
        if probability >= 1 or not self._temperature:
            return probability >= 1
        return float(torch.rand((), generator=self._generator)) < probability


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Keep only the most likely tokens that together reach ``top_p``; at least one."""
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    dropped_V = sorted_V.cumsum(0) - sorted_V >= top_p  # earlier ones reach top_p
    dropped_V[0] = False  # also if float32 rounds top_p to 0
    kept_V = probabilities_V.index_fill(0, order_V[dropped_V], 0.0)
    return kept_V / kept_V.sum()
