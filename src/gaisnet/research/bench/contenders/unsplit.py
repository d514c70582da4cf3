"""The domain model (DM) in one piece, centralised: what GaisNet's accuracy is held against.

It is no contender: nobody would have it. It is the DM that GaisNet splits, on pooled data, so that what is between
the two is splitting, rounding on links and the anchor; and between it and the foundation model, the recipe.
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
    """Let the late layers of the DM learn, with transformers' Trainer and peft, and score it."""
    return train(with_adapters(unsplit_domain_model(task, seed), task, late=True, seed=seed), task, seed)


def unsplit_domain_model(task: Task, seed: int) -> Any:
    """The foundation model as transformers has it, but with the DM's middle, made as the cloud makes it in a run."""
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
    """In place of a layer, so that the others keep their numbers."""

    def forward(self, hidden_BTD: Tensor, **_: Any) -> Tensor:
        """What came in."""
        return hidden_BTD
