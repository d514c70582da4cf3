"""The training schedule of a party in an edge round: whole passes over its examples, or a part of one.

With short rounds, parties that take turns train nearly as one party with all examples would.
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
    """An optimizer step.

    Attributes:
        number: Number of the step, counted from 0 at the start of its pass or passes.
        examples: Indices of its examples.
        anchor_sequences: Indices of the generated sequences in its anchor loss, if any.
        learning_rate: Learning rate of the step.
    """

    number: int
    examples: Sequence[int]
    anchor_sequences: Sequence[int]
    learning_rate: float


@dataclass(frozen=True)
class TrainingSchedule:
    """Batches, their order and the learning rates of a party's training.

    Attributes:
        settings: Settings with the cycle's learning rate.
        seed: Seed of its passes; all parts of a pass have the same.
        where: Name of the training in errors.
        edge_round: Number of the edge round in its cycle, counted from 0.
    """

    settings: FineTuneSettings
    seed: int
    where: str
    edge_round: int = 0

    @classmethod
    def for_edge_round(cls, config: Config, party: str, name: str, cycle: int, edge_round: int) -> "TrainingSchedule":
        """Return the schedule of an 'edge' or a 'device' for an edge round; the same after a restart."""
        seed = config.seed_for("fine_tune", name, cycle, edge_round // config.fine_tune.rounds_in_pass)
        where = f"{party} '{name}', cycle {cycle}, edge round {edge_round}"
        return cls(config.fine_tune.in_cycle(cycle), seed, where, edge_round)

    def plan_passes(self, lengths: Sequence[int], num_sequences: int) -> list[list[Step]]:
        """Return the steps of every pass, or of one part of a pass.

        Args:
            lengths: Lengths of the examples.
            num_sequences: Number of generated sequences for the anchor loss; 0 for no anchor loss.
        """
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed)
        orders = [
            list(shuffled_batches(lengths, settings.batch_size, generator)) for _ in range(settings.passes_in_round)
        ]
        part, parts = self.edge_round % settings.rounds_in_pass, settings.rounds_in_pass
        begin, end = (n * len(orders[0]) // parts for n in (part, part + 1))
        numbers, total = count(), end - begin if parts > 1 else sum(map(len, orders))

        def step(examples: Sequence[int]) -> Step:
            number, size, chosen = next(numbers), settings.anchor_batch_size, []
            if num_sequences and settings.anchor_weight and not (number + 1) % settings.anchor_every:
                chosen = torch.randint(num_sequences, (size,), generator=generator).tolist()
            return Step(number, examples, chosen, self._learning_rate((number - begin) / max(total, 1)))

        steps = [[step(examples) for examples in order] for order in orders]
        return steps if parts == 1 else [steps[0][begin:end]]

    def _learning_rate(self, share: float) -> float:
        """Return the learning rate after a share of the schedule's steps."""
        settings, left = self.settings, 1.0 - (self.edge_round + share) / self.settings.edge_rounds
        return settings.learning_rate * (min(1.0, left / settings.cooldown) if settings.cooldown else 1.0)
