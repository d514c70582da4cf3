"""The down flow's teacher: the foundation model (FM) writes text, and a relay per domain model (DM) learns on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import activate, add_adapter, trainable
from gaisnet.models.domain import Recipe
from gaisnet.models.parts import Body
from gaisnet.models.ragged import Ragged
from gaisnet.progress import Progress
from gaisnet.relay.downward import Distillation, TaskShape, distil
from gaisnet.tiers.domain_model import PREFIX_BATCH
from gaisnet.tiers.foundation_model import FoundationModel
from gaisnet.tiers.layout import Layout


class Teacher:
    """Holds the cloud's copy of the DM's body, and the relay of every domain.

    Args:
        model: The FM.
        domain_body: What every edge's DM is made of.
        layout: Whose layers are whose.
        recipe: The layers that the DM keeps.
        shapes: What is public about each domain's task, by domain.
        progress: Told while a relay learns.
    """

    def __init__(
        self,
        model: FoundationModel,
        domain_body: Body,
        layout: Layout,
        recipe: Recipe,
        shapes: Mapping[str, TaskShape],
        progress: Progress,
    ) -> None:
        self.relays: dict[str, AdapterTensors] = {}  # by domain; empty where the recipe left nothing to repair
        self._model = model
        self._body = domain_body
        self._layout = layout
        self._config = layout.config
        self._shapes = shapes
        self._progress = progress
        spec = layout.relay_spec(recipe.kept)
        if self._config.relay.enabled and spec.layers:
            add_adapter(domain_body, "relay", spec, self._config.seed_for("relay adapter"))
            activate(domain_body, ("relay",))
            self.relays = {domain: take_out(domain_body, "relay") for domain in shapes}

    def teach(self, domain: str, cycle: int) -> Distillation | None:
        """Distil the FM's middle into the DM's on new text; None where there is no relay. It is kept where it helps."""
        if domain not in self.relays:
            return None
        inputs = Ragged(*self._text(domain, cycle)).map_batches(
            lambda i: self._model.at_middle(i[..., 0]), PREFIX_BATCH
        )
        targets = inputs.map_batches(self._model.middle, PREFIX_BATCH)
        put_in(self._body, "relay", self.relays[domain])
        with self._model.plugged_in(None):  # logits, where they are the target, are those of the FM alone
            result = distil(
                self._middle,
                trainable(self._body, "relay"),
                inputs,
                targets,
                self._config.relay,
                self._model.logits,
                self._config.seed_for("relay", domain, cycle),
                self._progress,
            )
        self._body.requires_grad_(False)
        if result.helped:
            self.relays[domain] = take_out(self._body, "relay")
        return result

    def _middle(self, hidden_BTD: Tensor) -> Tensor:
        return self._body.run(hidden_BTD, self._layout.middle.start, self._layout.middle.stop)

    def _text(self, domain: str, cycle: int) -> tuple[Tensor, tuple[int, ...]]:
        """Token ids [N, 1] and lengths of new text; the FM writes with what it has learned of the domain so far."""
        seed = self._config.seed_for("text", domain, cycle)
        sequences = self._model.write(self._shapes[domain], self._config.relay, seed, domain)
        ids_N1 = torch.tensor([i for ids in sequences for i in ids], device=self._model.device)[:, None]
        return ids_N1, tuple(map(len, sequences))
