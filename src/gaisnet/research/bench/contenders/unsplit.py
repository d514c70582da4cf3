"""The unsplit domain model (DM), trained centrally: the reference for GaisNet's accuracy.

It is not a contender. It is the DM that GaisNet splits, trained on pooled data: the difference to GaisNet is splitting,
rounding on links and the anchor; the difference to the foundation model is the recipe.
"""

from typing import Any

from torch import Tensor, nn

from gaisnet.compute_lock import ComputeLock
from gaisnet.models.families import Decoder
from gaisnet.models.foundation import load_foundation
from gaisnet.research.bench.contenders.centralised import train, with_adapters
from gaisnet.research.bench.contenders.task import Result, Task
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.split.layout import Layout


def run_unsplit(task: Task, seed: int) -> Result:
    """Train the DM's late layers with transformers' Trainer and peft, and score it."""
    return train(with_adapters(unsplit_domain_model(task, seed), task, late=True, seed=seed), task, seed)


def unsplit_domain_model(task: Task, seed: int) -> Any:
    """Load the foundation model as transformers does, with the DM's middle made as the cloud makes it."""
    config = task.config.model_copy(update={"seed": seed})
    foundation = load_foundation(config.model)
    cloud = DecoderParts(foundation, Layout(config, len(foundation.decoder.layers)), ComputeLock())
    recipe, body = cloud.make_domain_body(cloud.free_text())
    model = task.foundation().model
    layers = Decoder(model).layers
    for index in range(len(layers)):
        if index in recipe.int8:
            layers[index] = body.layers[str(index)]
        elif index not in recipe.kept:
            layers[index] = _Dropped()
    return model


class _Dropped(nn.Module):
    """Placeholder for a dropped layer, so that the others keep their numbers."""

    def forward(self, hidden_BTD: Tensor, **_: Any) -> Tensor:
        """Return the input."""
        return hidden_BTD
