"""A whole ViT classifier, the reference for the network's parts.

Shape legend: B images of a step, C channels, H and W pixels.
"""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from gaisnet.data.images import Images
from gaisnet.errors import NotFinite
from gaisnet.models.pretrained import pretrained_config, pretrained_model

_BATCH, _SCORED_AT_ONCE = 50, 500
_WEIGHT_DECAY, _MAX_NORM, _WARMUP = 0.05, 1.0, 0.1


def pretrained_classifier(folder: Path, num_labels: int) -> ViTForImageClassification:
    """Return the encoder in ``folder`` with a classifier drawn from torch's current seed."""
    model, _ = pretrained_model(ViTForImageClassification, str(folder), str(folder), num_labels=num_labels)
    return cast(ViTForImageClassification, model)


def random_classifier(folder: Path, num_labels: int) -> ViTForImageClassification:
    """Return a model of the same shape with all weights drawn from torch's current seed."""
    config = pretrained_config(str(folder), str(folder))
    config.num_labels = num_labels
    return ViTForImageClassification(cast(ViTConfig, config))


def fine_tune(model: nn.Module, images: Images, steps: int, learning_rate: float) -> None:
    """Train every trainable weight with AdamW, one batch per step, in an order drawn from torch's current seed.

    Args:
        model: Maps pixels [B, C, H, W] to an output with ``logits``.
        images: The training set.
        steps: Number of steps; the learning rate rises over the first tenth, then falls to zero along a cosine.
        learning_rate: The highest rate.

    Raises:
        NotFinite: The loss is not finite.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=_WARMUP)
    pixels_NCHW, order = images.pixels_NCHW(), torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        if not len(order):
            order = torch.randperm(len(images))
        chosen, order = order[:_BATCH], order[_BATCH:]
        loss = nn.functional.cross_entropy(model(pixels_NCHW[chosen]).logits, images.labels_N[chosen])
        if not loss.isfinite():
            raise NotFinite("the loss of a classifier", f"step {step}", loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, _MAX_NORM)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of ``images`` whose label is the most likely one."""
    model.eval()
    num_correct = 0
    for start in range(0, len(images), _SCORED_AT_ONCE):
        some = images.select(range(start, min(start + _SCORED_AT_ONCE, len(images))))
        num_correct += int((model(some.pixels_NCHW()).logits.argmax(1) == some.labels_N).sum())
    return num_correct / len(images)
