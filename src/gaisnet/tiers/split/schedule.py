"""A stretch of learning: what a party does in an edge round, before it is averaged with others or hands the model on.

Whole passes over its examples, or a part of one: parties that take turns after a few steps learn nearly as one that has
the examples of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch

from gaisnet.config import Config
from gaisnet.config.learning import FineTuneSettings
from gaisnet.models.ragged import shuffled_batches


@dataclass(frozen=True)
class Step:
    """Of an optimizer.

    Attributes:
        number: Counted from 0, where its pass or passes begin.
        examples: Places of its examples among all.
        pulled: Places of the generated sequences that pull in it, if any do.
        learning_rate: In it.
    """

    number: int
    examples: Sequence[int]
    pulled: Sequence[int]
    learning_rate: float


@dataclass(frozen=True)
class TrainingSchedule:
    """How a party learns, from which batches in which order.

    Attributes:
        settings: How; the learning rate is that of the cycle.
        seed: Of all that is random in its passes; parts of a pass have the same.
        where: Names it in errors.
        edge_round: Which of a cycle's it is, counted from 0.
    """

    settings: FineTuneSettings
    seed: int
    where: str
    edge_round: int = 0

    @classmethod
    def for_edge_round(cls, config: Config, party: str, name: str, cycle: int, edge_round: int) -> "TrainingSchedule":
        """An edge round, of the 'edge' or the 'device' of that name; the same after a restart."""
        seed = config.seed_for("fine_tune", name, cycle, edge_round // config.fine_tune.rounds_in_pass)
        where = f"{party} '{name}', cycle {cycle}, edge round {edge_round}"
        return cls(config.fine_tune.in_cycle(cycle), seed, where, edge_round)

    def plan_passes(self, lengths: Sequence[int], num_sequences: int) -> list[list[Step]]:
        """The steps of every pass, or of its part of one.

        Args:
            lengths: Of the examples.
            num_sequences: How many generated sequences there are; with none, nothing pulls.
        """
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed)
        orders = [
            list(shuffled_batches(lengths, settings.batch_size, generator)) for _ in range(settings.passes_in_round)
        ]
        part, parts = self.edge_round % settings.rounds_in_pass, settings.rounds_in_pass
        begin, end = (n * len(orders[0]) // parts for n in (part, part + 1))
        numbers, total = count(), end - begin if parts > 1 else sum(map(len, orders))

        def step(examples: Sequence[int]) -> Step:
            number, size, pulled = next(numbers), settings.anchor_batch_size, []
            if num_sequences and settings.anchor_weight and not (number + 1) % settings.anchor_every:
                pulled = torch.randint(num_sequences, (size,), generator=generator).tolist()
            return Step(number, examples, pulled, self._learning_rate((number - begin) / max(total, 1)))

        steps = [[step(examples) for examples in order] for order in orders]
        return steps if parts == 1 else [steps[0][begin:end]]

    def _learning_rate(self, share: float) -> float:
        """After a share of the stint's steps."""
        settings, left = self.settings, 1.0 - (self.edge_round + share) / self.settings.edge_rounds
        return settings.learning_rate * (min(1.0, left / settings.cooldown) if settings.cooldown else 1.0)
