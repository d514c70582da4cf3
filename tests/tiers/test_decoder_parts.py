"""The foundation model in parts gives the same divergence from other models as the whole model."""

import pytest
import torch
from torch import Tensor

from gaisnet.compute_lock import ComputeLock
from gaisnet.models.ragged import Ragged
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.split.layout import Layout
from tests.tiny import NUM_LAYERS, tiny_config, tiny_foundation

TEXTS = [[256, 7, 9, 30, 2], [256, 40, 41], [3, 4, 5, 6, 7, 8]]


def model(tail_layers: int = 0) -> DecoderParts:
    layout = Layout(tiny_config(tail_layers=tail_layers), NUM_LAYERS)
    found = DecoderParts(tiny_foundation(initializer_range=0.2), layout, ComputeLock())
    found.add("shapes", layout.domain_spec(), seed=1)
    tensors = found.copy_adapter("shapes")
    generator = torch.Generator().manual_seed(2)
    found.set_adapter("shapes", {key: torch.randn(t.shape, generator=generator) * 0.2 for key, t in tensors.items()})
    return found


def moved(entering: Ragged, by: float) -> Ragged:
    noise = torch.randn(entering.rows_ND.shape, generator=torch.Generator().manual_seed(3))
    return Ragged(entering.rows_ND + by * noise, entering.lengths)


@pytest.mark.parametrize("tail_layers", [0, 1])
def test_divergence_is_that_of_the_whole_model_by_hand(tail_layers: int) -> None:
    found, whole = model(tail_layers), tiny_foundation(initializer_range=0.2).model
    entering = found.at_suffix(TEXTS)
    other = moved(entering, 0.5)

    def log_chances(states: Ragged) -> Tensor:
        """Run each sequence through the body with the adapter and the rest of the whole model."""
        with found.active_adapter("shapes"), torch.no_grad():
            rows = []
            for sequence in states.sequences():
                hidden = found.body.run(sequence[None], 4)
                for layer in whole.model.layers[NUM_LAYERS - tail_layers :]:
                    positions = torch.arange(len(sequence))[None]
                    rotary = whole.model.rotary_emb(hidden, position_ids=positions)
                    hidden = layer(hidden, position_embeddings=rotary, position_ids=positions, attention_mask=None)
                rows.append(whole.lm_head(whole.model.norm(hidden[0])).double().log_softmax(-1))
        return torch.cat(rows)

    p, q = log_chances(entering), log_chances(other)
    expected = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert expected > 0.01
    assert found.divergence(entering, other, "shapes") == pytest.approx(expected, rel=1e-4)
    assert found.divergence(entering, entering, "shapes") == 0.0
    assert found.divergence(entering, moved(entering, 0.05), "shapes") < 0.2 * expected
