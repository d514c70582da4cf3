"""Masked autoencoding: what is learned without labels, and that what is kept of it is a plain ViT."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, ViTForImageClassification, ViTMAEModel, ViTModel

from gaisnet.errors import DataError, NotFinite
from gaisnet.models.masked_autoencoder import MaskedSettings, as_vit, masked_model, pretrain, sin_cos_positions

pytestmark = pytest.mark.numeric

TINY = MaskedSettings(
    image_side=8,
    patch_side=2,
    width=16,
    layers=2,
    heads=2,
    decoder_width=8,
    steps=80,
    batch_size=16,
    learning_rate=1e-2,
)


WEIGHT = "layers.0.mlp.fc1.weight"


def stripes(count: int = 32) -> Tensor:
    """Images that are easily painted: each is white on the left or on the right, and black elsewhere."""
    left = torch.arange(count) % 2 == 0
    halves = torch.stack([left, ~left], dim=1).float() * 2 - 1
    return halves[:, None, None].repeat_interleave(4, dim=3).expand(count, 1, 8, 8).contiguous()


def random_vit(seed: int = 0) -> tuple[ViTModel, ViTMAEModel]:
    torch.manual_seed(seed)
    masked = masked_model(TINY).eval()
    return as_vit(masked), masked.vit


def test_the_plain_vit_sees_what_the_masked_one_sees_of_a_whole_image() -> None:
    plain, masked = random_vit()
    masked.config.mask_ratio = 0.0
    pixels_BCHW = torch.randn(3, 1, 8, 8)
    noise_BP = torch.rand(3, 16)  # the order in which the masked one takes the patches
    with torch.no_grad():
        shuffled_BPD = masked(pixels_BCHW, noise=noise_BP).last_hidden_state
        plain_BPD = plain(pixels_BCHW).last_hidden_state
    places_BP1 = noise_BP.argsort(dim=1)[:, :, None].expand(-1, -1, 16)
    torch.testing.assert_close(shuffled_BPD[:, 0], plain_BPD[:, 0])
    torch.testing.assert_close(shuffled_BPD[:, 1:], plain_BPD[:, 1:].gather(1, places_BP1))


def test_a_saved_encoder_is_read_by_any_loader_of_vits(tmp_path: Path) -> None:
    plain, _ = random_vit()
    plain.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    pixels_BCHW = torch.randn(2, 1, 8, 8)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    classifier = ViTForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    with torch.no_grad():
        expected_BPD = plain(pixels_BCHW).last_hidden_state
        torch.testing.assert_close(loaded(pixels_BCHW).last_hidden_state, expected_BPD)
        torch.testing.assert_close(classifier.vit(pixels_BCHW).last_hidden_state, expected_BPD)


def test_both_halves_know_where_a_patch_is_and_it_is_what_transformers_would_have_set() -> None:
    model = masked_model(TINY)
    encoder_1PD = model.vit.embeddings.position_embeddings
    decoder_1PD = model.decoder.decoder_pos_embed
    for positions_1PD in (encoder_1PD, decoder_1PD):
        assert len(positions_1PD[0].unique(dim=0)) == 17  # the class token's is zero
    ours_1PD = decoder_1PD.detach().clone()
    model.decoder.initialize_weights(16)
    torch.testing.assert_close(ours_1PD, decoder_1PD)
    torch.testing.assert_close(sin_cos_positions(4, 16), encoder_1PD.detach())


def test_it_learns_to_paint_and_the_same_seed_gives_the_same_encoder() -> None:
    losses: list[float] = []
    encoder = pretrain(TINY, stripes(), lambda stage, done, total, figures: losses.append(figures["loss"]))
    assert len(losses) == TINY.steps and not encoder.training
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    again, other = pretrain(TINY, stripes()), pretrain(TINY.model_copy(update={"seed": 1}), stripes())
    weight, same, different = (one.state_dict()[WEIGHT] for one in (encoder, again, other))
    assert torch.equal(weight, same) and not torch.equal(weight, different)


def test_it_leaves_the_generator_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pretrain(TINY.model_copy(update={"steps": 1}), stripes())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("pixels", "found"),
    [(torch.zeros(32, 3, 8, 8), r"the settings say \(1, 8, 8\)"), (torch.zeros(15, 1, 8, 8), "fewer than the 16")],
)
def test_images_that_do_not_fit_the_settings_are_refused(pixels: Tensor, found: str) -> None:
    with pytest.raises(DataError, match=found):
        pretrain(TINY, pixels)


def test_a_loss_that_is_not_finite_stops_it() -> None:
    with pytest.raises(NotFinite, match="masked autoencoding at step 0"):
        pretrain(TINY, torch.full((16, 1, 8, 8), float("nan")))
