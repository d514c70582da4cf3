"""Rounds of a measurement of answers: the prompts of each, and progress."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from gaisnet.progress import Progress
from gaisnet.research.bench.writing import Prompt, batches


@dataclass(frozen=True)
class Effort:
    """Amount of work."""

    rounds: int = 5
    prompts: int = 4  # per round, for one session
    tokens: int = 64
    at_once: int = 16
    beside: int = 4  # sessions that answer beside fine-tuning
    seconds: float = 15.0  # length of a window without fine-tuning; with it, a window is a round


@dataclass(frozen=True)
class Rounds:
    """Rounds of a stage.

    Attributes:
        prompts: All prompts; taken in turn, and from the beginning again.
        effort: Amount of work.
        progress: Told before every round, with the median so far.
    """

    prompts: Sequence[Prompt]
    effort: Effort
    progress: Progress

    def each_round(self, stage: str, num_prompts: int, found: Sequence[float]) -> Iterator[list[Prompt]]:
        """Yield the prompts of every round. ``found`` grows by one in each."""
        for number, prompts in enumerate(islice(batches(self.prompts, num_prompts), self.effort.rounds)):
            self._tell(stage, number, found)
            yield prompts
        self._tell(stage, self.effort.rounds, found)

    def _tell(self, stage: str, number: int, found: Sequence[float]) -> None:
        figures = {"median": median(found)} if found else {}
        self.progress(f"bench_{stage}", number, self.effort.rounds, figures)
