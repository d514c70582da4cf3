"""A stretch of learning: what a party does in an edge round, before it is averaged with others or hands the model on.

Whole passes over its examples, or a part of one: parties that take turns after a few steps learn nearly as one that has
the examples of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch

from gaisnet.config import Config
from gaisnet.learning_settings import FineTuneSettings
from gaisnet.models.ragged import shuffled_batches


@dataclass(frozen=True)
class Step:
    """Of an optimizer.

    Attributes:
        number: Counted from 0, where its pass or passes begin.
        examples: Places of its examples among all.
        pulled: Places of the generated sequences that pull in it, if any do.
    """

    number: int
    examples: Sequence[int]
    pulled: Sequence[int]


@dataclass(frozen=True)
class Stint:
    """How a party learns, from which batches in which order.

    Attributes:
        settings: How; the learning rate is that of the cycle.
        seed: Of all that is random in its passes; parts of a pass have the same.
        where: Names it in errors.
        part: Which part of a pass it is, counted from 0, if it has not the whole.
    """

    settings: FineTuneSettings
    seed: int
    where: str
    part: int = 0

    @classmethod
    def of(cls, config: Config, party: str, name: str, cycle: int, edge_round: int) -> "Stint":
        """An edge round, of the 'edge' or the 'device' of that name; the same after a restart."""
        passes, part = divmod(edge_round, config.fine_tune.rounds_in_pass)
        seed = config.seed_for("fine_tune", name, cycle, passes)
        where = f"{party} '{name}', cycle {cycle}, edge round {edge_round}"
        return cls(config.fine_tune.in_cycle(cycle), seed, where, part)

    def passes(self, lengths: Sequence[int], num_sequences: int) -> list[list[Step]]:
        """The steps of every pass, or of its part of one.

        Args:
            lengths: Of the examples.
            num_sequences: How many generated sequences there are; with none, nothing pulls.
        """
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed)
        orders = [
            list(shuffled_batches(lengths, settings.batch_size, generator)) for _ in range(settings.passes_in_round)
        ]
        numbers = count()

        def step(examples: Sequence[int]) -> Step:
            number, size = next(numbers), settings.anchor_batch_size
            if not num_sequences or not settings.anchor_weight or (number + 1) % settings.anchor_every:
                return Step(number, examples, ())
            return Step(number, examples, torch.randint(num_sequences, (size,), generator=generator).tolist())

        steps, parts = [[step(examples) for examples in order] for order in orders], settings.rounds_in_pass
        begin, end = (n * len(steps[0]) // parts for n in (self.part, self.part + 1))
        return steps if parts == 1 else [steps[0][begin:end]]
