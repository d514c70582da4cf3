"""Pre-training of an image encoder without labels: masked autoencoding (He et al., arXiv 2111.06377).

Most patches of an image are masked, the encoder sees the others, and a small decoder, discarded afterwards,
reconstructs the masked ones. The part of transformers' ViTMAE that is kept is a plain ViT, which any loader of ViTs
reads.

Shape legend: N images, B images of a step, C channels, H and W pixels, P patches and the class token, D hidden size.
"""

import math

import torch
from pydantic import Field
from torch import Tensor
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from gaisnet.config.learning import Settings
from gaisnet.errors import DataError, NotFinite
from gaisnet.progress import Progress, silent

_BETAS, _WEIGHT_DECAY = (0.9, 0.95), 0.05  # the paper's, table 8
_WARMUP, _MAX_NORM = (
    0.1,
    1.0,
)  # ours: share of all steps, and norm of gradients; such short training is unstable without
_WAVELENGTH = 10_000.0  # the longest of the position embeddings
LEARNED_BY = 1
"""Version of the procedure; raised when equal settings train differently, so that cached results are not reused."""


class MaskedSettings(Settings):
    """A small ViT and its training.

    Values follow the paper's section 4 and table 8 where they suit so small a model.
    """

    image_side: int = Field(28, ge=1, description="Pixels of an image, down and across.")
    channels: int = Field(1, ge=1, description="Of an image.")
    patch_side: int = Field(7, ge=1, description="Pixels of a patch; divides image_side.")
    width: int = Field(96, ge=4, description="Hidden size.")
    layers: int = Field(6, ge=1, description="Of the encoder.")
    heads: int = Field(4, ge=1, description="Of its attention, and the decoder's.")
    decoder_width: int = Field(64, ge=4, description="Hidden size of the decoder.")
    decoder_layers: int = Field(1, ge=1, description="Of the decoder.")
    mask_share: float = Field(0.75, gt=0.0, lt=1.0, description="Of an image's patches, that the encoder does not see.")
    steps: int = Field(4000, ge=1, description="Of the optimiser.")
    batch_size: int = Field(128, ge=1, description="Images of a step.")
    learning_rate: float = Field(1.5e-3, gt=0.0, description="The highest of AdamW's, after the warm-up.")
    seed: int = Field(0, ge=0, description="Of the first weights, the order of the images, and the masks.")


def pretrain(settings: MaskedSettings, pixels_NCHW: Tensor, progress: Progress = silent) -> ViTModel:
    """Train an encoder to reconstruct the masked parts of ``pixels_NCHW`` (float32); reproducible by seed.

    ``progress`` is told the loss: the mean squared error of masked pixels.

    Raises:
        DataError: Images of another shape than in the settings, or fewer than a batch.
        NotFinite: The loss is not finite.
    """
    _check(settings, pixels_NCHW)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        model = masked_model(settings).train()
        _learn(model, settings, pixels_NCHW, progress)
        return as_vit(model)


def masked_model(settings: MaskedSettings) -> ViTMAEForPreTraining:
    """Make a model with fixed position embeddings and weights drawn from torch's current seed."""
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=settings.image_side,
            patch_size=settings.patch_side,
            num_channels=settings.channels,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=4 * settings.width,
            decoder_hidden_size=settings.decoder_width,
            decoder_num_hidden_layers=settings.decoder_layers,
            decoder_num_attention_heads=settings.heads,
            decoder_intermediate_size=4 * settings.decoder_width,
            mask_ratio=settings.mask_share,
            # Xavier, as in He et al.'s code. With transformers' 0.02 so narrow a model would see positions only.
            initializer_range=settings.width**-0.5,
        )
    )
    # transformers 5 leaves them zero in a model that is not loaded, and patches would have no position.
    num_down = settings.image_side // settings.patch_side
    for positions_1PD in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        positions_1PD.data.copy_(sin_cos_positions(num_down, positions_1PD.shape[-1]))
    return model


def sin_cos_positions(num_down: int, width: int) -> Tensor:
    """Return fixed position embeddings [1, P, D] of a square of patches, row by row, after zeros for the class token.

    The first half of ``width``, a multiple of 4, encodes columns, the second rows (as in He et al.'s code).
    """
    num_waves = width // 4
    angle_per_place = _WAVELENGTH ** -(torch.arange(num_waves) / num_waves)
    angles = torch.arange(num_down)[:, None] * angle_per_place
    places = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([places.repeat(num_down, 1), places.repeat_interleave(num_down, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width), grid])[None]


def as_vit(model: ViTMAEForPreTraining) -> ViTModel:
    """Return its encoder as a plain ViT without a pooler, in eval mode, with the same features of unmasked images."""
    shared = {key: value for key, value in model.config.to_dict().items() if key in ViTConfig.__annotations__}
    encoder: ViTModel = ViTModel(ViTConfig(**shared), add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())  # strict: every weight has its place
    encoder.eval()
    return encoder


def _learn(model: ViTMAEForPreTraining, settings: MaskedSettings, pixels_NCHW: Tensor, progress: Progress) -> None:
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        settings.learning_rate,
        betas=_BETAS,
        weight_decay=_WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, settings.steps))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(settings.steps):
        if len(order) < settings.batch_size:
            order = torch.randperm(len(pixels_NCHW))
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        loss = model(pixels_NCHW[chosen]).loss
        if not loss.isfinite():
            raise NotFinite("the loss of masked autoencoding", f"step {step}", loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        schedule.step()
        progress("pretrain", step + 1, settings.steps, {"loss": loss.item()})


def _pace(step: int, num_steps: int) -> float:
    """Return the share of the highest learning rate: a linear warm-up, then half a cosine."""
    warm = max(1.0, _WARMUP * num_steps)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (num_steps - warm + 1)))


def _check(settings: MaskedSettings, pixels_NCHW: Tensor) -> None:
    side, channels = settings.image_side, settings.channels
    asked = f"masked autoencoding on images of shape {tuple(pixels_NCHW.shape)}"
    if tuple(pixels_NCHW.shape[1:]) != (channels, side, side):
        raise DataError(asked, f"the settings say ({channels}, {side}, {side}) each", "change one of them")
    if len(pixels_NCHW) < settings.batch_size:
        do = "lower batch_size, or give more images"
        raise DataError(asked, f"they are fewer than the {settings.batch_size} of a step", do)
