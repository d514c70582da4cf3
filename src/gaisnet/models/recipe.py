"""The recipe that makes a domain model (DM) from the foundation model (FM): precision and depth of the middle.

The middle is every layer from the end of the deepest device head to the first domain adapter. Outside of it a
DM *is* the FM: devices' heads fit both bodies, and an adapter trained on the late layers of one plugs into the other.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gaisnet.config.learning import DomainSettings
from gaisnet.errors import CutError
from gaisnet.models.encoders import EncoderBody
from gaisnet.models.families import Decoder, Encoder
from gaisnet.models.int8 import input_peaks, to_int8
from gaisnet.models.parts import Body, Layers
from gaisnet.models.ragged import relative_square


@dataclass(frozen=True)
class Middle:
    """FM layers [start, stop) that a recipe may change."""

    start: int
    stop: int

    def __contains__(self, layer: int) -> bool:
        """Return whether FM layer ``layer`` is in the middle."""
        return self.start <= layer < self.stop

    def layers(self) -> range:
        """Return the FM layers of the middle."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Recipe:
    """The FM layers that a DM keeps (all of them, not only the middle), and those of them in int8."""

    kept: tuple[int, ...]
    int8: tuple[int, ...]


def check_recipe(settings: DomainSettings, middle: Middle, num_layers: int) -> None:
    """Raise ``CutError`` if ``keep_layers`` drops a layer outside of the middle, by name or by number."""
    keep = settings.keep_layers
    outside = num_layers - len(middle.layers())
    where = f"only the middle, layers {middle.start} to {middle.stop - 1} of {num_layers}, may lose any"
    if isinstance(keep, int) and keep != num_layers and not outside < keep < num_layers:
        raise CutError("domain.keep_layers", keep, where, f"use {outside + 1} to {num_layers}, or null for all")
    if isinstance(keep, tuple):
        lost = sorted(set(range(num_layers)) - set(keep) - set(middle.layers()))
        unknown = sorted(set(keep) - set(range(num_layers)))
        if lost or unknown:
            found = f"it {'names unknown' if unknown else 'drops'} layers {unknown or lost} but {where}"
            raise CutError("domain.keep_layers", list(keep), found, "correct the list, or give a number of layers")


@torch.no_grad()
def choose_recipe(settings: DomainSettings, middle: Middle, body: Layers, hidden_BTD: Tensor) -> Recipe:
    """Fill in a recipe: the user's layers, or those whose loss changes the adapters' input least.

    Args:
        settings: The user's settings, checked.
        middle: The layers that may be dropped.
        body: The FM's layers, including the middle.
        hidden_BTD: Input of layer ``middle.start`` on text that the FM generated (or public text, or images).
    """
    num_layers = body.config.num_hidden_layers
    keep = settings.keep_layers
    if keep is None:
        kept = set(range(num_layers))
    elif isinstance(keep, int):
        kept = set(range(num_layers)) - _least_influence(middle, body, hidden_BTD, num_layers - keep)
    else:
        kept = set(keep)
    int8 = kept & set(middle.layers()) if settings.precision == "int8" else set()
    return Recipe(tuple(sorted(kept)), tuple(sorted(int8)))


def _least_influence(middle: Middle, body: Layers, hidden_BTD: Tensor, num_drop: int) -> set[int]:
    """Greedily drop the layer whose absence changes the hidden state at ``middle.stop`` least."""
    target_ND = _rows(body.run(hidden_BTD, middle.start, middle.stop))
    dropped: set[int] = set()
    for _ in range(num_drop):
        candidates = [layer for layer in middle.layers() if layer not in dropped]
        errors = [
            float(relative_square(_rows(_run_without(body, hidden_BTD, middle, dropped | {layer})), target_ND))
            for layer in candidates
        ]
        dropped.add(candidates[min(range(len(candidates)), key=errors.__getitem__)])
    return dropped


def _rows(hidden_BTD: Tensor) -> Tensor:
    """Return all rows but the first of each sequence, an attention sink with a huge norm."""
    return hidden_BTD[:, 1:].flatten(0, 1)


def _run_without(body: Layers, hidden_BTD: Tensor, middle: Middle, dropped: Iterable[int]) -> Tensor:
    kept = {layer: body.layers[str(layer)] for layer in middle.layers() if layer not in set(dropped)}
    return Layers(body.config, kept, body.rotary_emb).run(hidden_BTD, middle.start, middle.stop)


@torch.no_grad()
def make_domain_body(
    model: Decoder | Encoder, first: int, stop: int, recipe: Recipe, middle: Middle, hidden_BTD: Tensor
) -> Body:
    """Make a DM's body: the FM's kept layers in [first, stop), those of the middle copied and some of them in int8.

    An encoder's body ends the model (``EncoderBody``), so ``stop`` is its number of layers.

    Args:
        model: The FM; not changed.
        first: Shallowest head cut of the edge's devices.
        stop: First layer of the devices' tails.
        recipe: Layers to keep, and layers in int8.
        middle: Layers that the recipe covers.
        hidden_BTD: Input of layer ``middle.start`` on generated text, or of an encoder on public inputs, to calibrate
            int8; without padding.
    """
    own = {i: copy.deepcopy(model.layers[i]) for i in recipe.kept if i in middle}
    layers = {i: own.get(i, model.layers[i]) for i in recipe.kept if first <= i < stop}
    if isinstance(model, Encoder):
        body: Body = EncoderBody(model.config, layers, model.ending, model.classifier)
    else:
        body = Body(model.config, layers, model.rotary_emb)
    if recipe.int8:
        peaks = input_peaks(body, lambda: body.run(hidden_BTD, middle.start, middle.stop))
        for layer in recipe.int8:
            prefix = f"layers.{layer}."
            to_int8(body.layers[str(layer)], peaks, prefix)
    return body.requires_grad_(False).eval()


def num_parameters(*modules: nn.Module) -> int:
    """Count the numbers that modules hold, int8 weights included, shared tensors once."""
    tensors = {t.data_ptr(): t.numel() for m in modules for t in (*m.parameters(), *_weights_in_buffers(m))}
    return sum(tensors.values())


def _weights_in_buffers(module: nn.Module) -> Iterable[Tensor]:
    return (t for name, t in module.named_buffers() if name.endswith(("weight", "bias")))
