"""Assembles the cloud's model from an encoder: every domain has its own classifier beside its adapter.

An encoder generates no text, so there is no relay, no anchor and no perplexity. Classifiers of different classes do not
add up, so there is no merged adapter.

Shape legend: B sequences, T positions, D hidden size, N inputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.compute_lock import ComputeLock
from gaisnet.data.examples import Input
from gaisnet.errors import ConfigError
from gaisnet.learning.gate import Verdict
from gaisnet.messages import AnchorRelease
from gaisnet.models.encoders import EncoderBody, cut_encoder
from gaisnet.models.families import Encoder
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import Body, CutLayers
from gaisnet.models.preemption import pause_within
from gaisnet.models.ragged import Ragged, by_length
from gaisnet.models.recipe import Recipe, choose_recipe, make_domain_body, num_parameters
from gaisnet.models.release import release_encoder
from gaisnet.tiers.cloud.adapted_body import AdaptedBody
from gaisnet.tiers.cloud.model import CloudModel, Sizes
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.inputs import EncoderInputs
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH, compute_body_output_rows

_CALIBRATION_INPUTS = 16


def build_encoder_model(
    foundation: Foundation, layout: Layout, public: Sequence[Input], compute_lock: ComputeLock
) -> CloudModel:
    """Fill in the recipe, and put adapters with classifiers beside the FM's late layers.

    Args:
        foundation: The FM; its weights do not change.
        layout: Layers of each party.
        public: Unlabelled public inputs: they fill in and calibrate the recipe, and measure how far adapters move the
            FM's features. There may be none.
        compute_lock: Held while the model runs.

    Raises:
        ConfigError: The recipe needs public inputs and there are none.
        DataError: The FM cannot read them.
    """
    encoder, config = foundation.encoder, layout.config
    head, body = cut_encoder(encoder, CutLayers(layout.first_cut))
    adapted = AdaptedBody(body, layout, compute_lock)

    def run_head(inputs: Tensor) -> Tensor:
        with compute_lock.learning():
            hidden_BTD: Tensor = head(inputs.to(adapted.device))
        return hidden_BTD

    inputs = EncoderInputs(public, foundation.reader, config.model.most_tokens, "the cloud's public inputs")
    at_cut = inputs.map_batches(run_head) if public else None
    recipe, domain_body = _domain_body(encoder, body, layout, at_cut, compute_lock)
    # Taken before adapters stand between the layers and their weights.
    model_release = release_encoder(encoder, domain_body, recipe.int8, layout.last_cut)
    nothing_ND = torch.zeros(0, body.config.hidden_size)
    anchor_release = AnchorRelease(torch.zeros(0, dtype=torch.int32), nothing_ND)
    device_params = _device_params(encoder, layout)
    sizes = Sizes(num_parameters(foundation.model), layout.num_layers, len(recipe.kept), device_params)
    pause_within(body.layers.values(), compute_lock.pause)
    gate = DriftGate(adapted, body, layout, None if at_cut is None else _at_suffix(body, layout, at_cut))
    domains = [edge.domain for edge in config.learning_edges()]
    specs = {name: layout.class_spec(len(layout.class_labels(name))) for name in domains}
    for name, spec in specs.items():
        adapted.add(name, spec, config.seed_for("domain adapter"))
    gate.measure_drift(specs)
    return CloudModel(adapted, specs, gate, model_release, anchor_release, sizes)


class DriftGate:
    """Accepts every adapter with finite features, and reports how far it moves the FM's features of public inputs.

    It sets no limit: the FM alone does not change, and other domains have their own adapters.

    Args:
        adapted: The FM's body, which has no adapter yet.
        body: The same body without adapters, for its classifier's input.
        layout: Layers of each party.
        public: Public inputs at the suffix; None if there are none.

    Attributes:
        retention: Mean relative drift of features with each adapter in place, by its name; empty without public inputs.
    """

    def __init__(self, adapted: AdaptedBody, body: EncoderBody, layout: Layout, public: Activations | None) -> None:
        self._adapted = adapted
        self._body = body
        self._layout = layout
        self._public = public
        self._alone_ND = torch.zeros(0) if public is None else self._features(public, None)
        self.retention: dict[str, float] = {}

    def measure_drift(self, names: Mapping[str, object]) -> None:
        """Measure the drift of adapters as they are in place now."""
        if self._public is not None:
            self.retention = {name: self._drift(self._public, name) for name in names}

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """Plug an adapter in; if it makes features that are not finite, the previous one is restored."""
        before = self._adapted.copy_adapter(name)
        self._adapted.set_adapter(name, tensors)
        if self._public is None:
            evidence = "its shape and numbers were looked at, and nothing else: the cloud has no public inputs"
            return Verdict(True, name, math.nan, math.nan, evidence=evidence)
        drift = self._drift(self._public, name)
        if not math.isfinite(drift):
            self._adapted.set_adapter(name, before)
            return Verdict(False, name, math.nan, math.nan, "it makes features that are not finite of public inputs")
        self.retention[name] = drift
        evidence = f"its shape and numbers fit; it moves the features of public inputs by {drift:.1%} of their length"
        return Verdict(True, name, math.nan, math.nan, evidence=evidence)

    @torch.no_grad()
    def _features(self, public: Activations, adapter: str | None) -> Tensor:
        """Return the classifier's input for the public inputs, [N, D], with an adapter or without."""
        with self._adapted.active_adapter(adapter):
            rows_ND = compute_body_output_rows(
                self._adapted.run_suffix, public, self._layout.row_selection, causal=False
            )
            return self._body.features(rows_ND).float()

    def _drift(self, public: Activations, adapter: str) -> float:
        """Return the mean over the public inputs of |features with the adapter - without| / |without|."""
        moved_ND = self._features(public, adapter) - self._alone_ND
        return float((moved_ND.norm(dim=-1) / self._alone_ND.norm(dim=-1)).mean())

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for ``load_state_dict``."""
        return {"retention": self.retention}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of ``state``."""
        self.retention = state["retention"]


def _domain_body(
    encoder: Encoder, body: Body, layout: Layout, at_cut: Ragged | None, compute_lock: ComputeLock
) -> tuple[Recipe, Body]:
    settings = layout.config.domain
    if at_cut is None and (settings.precision == "int8" or isinstance(settings.keep_layers, int)):
        found = f"are {settings.precision} and {settings.keep_layers}, but there is nothing to calibrate an encoder on"
        do = "use float32 and null, or a list of layers; or name a file of inputs as model.public_inputs"
        raise ConfigError("domain.precision and domain.keep_layers", found, do)
    hidden_BTD = torch.zeros(0) if at_cut is None else _at_middle(body, layout, at_cut, compute_lock)
    recipe = choose_recipe(settings, layout.middle, body, hidden_BTD)
    first, stop = layout.first_cut, layout.tail_start
    return recipe, make_domain_body(encoder, first, stop, recipe, layout.middle, hidden_BTD)


def _at_middle(body: Body, layout: Layout, at_cut: Ragged, compute_lock: ComputeLock) -> Tensor:
    """Return some inputs without padding, [B, T, D]: the longer half, cut to the shortest length among them."""
    longer = by_length(at_cut.lengths, len(at_cut))[0][len(at_cut) // 2 :]
    some, length = longer[:_CALIBRATION_INPUTS], at_cut.lengths[longer[0]]
    hidden_BTD = torch.stack([at_cut.sequences()[index][:length] for index in some])
    with torch.no_grad(), compute_lock.learning():
        return body.run(hidden_BTD, layout.first_cut, layout.middle.start)


def _at_suffix(body: Body, layout: Layout, at_cut: Ragged) -> Activations:
    """Return every input at the first adapted layer; one row of each is looked at."""
    first = layout.first_adapted
    every = Activations(at_cut, (1,) * len(at_cut), layout.first_cut)
    return every.run_layers(
        lambda hidden_BTD: body.run(hidden_BTD, every.next_layer, first), first, PREFIX_BATCH, causal=False
    )


def _device_params(encoder: Encoder, layout: Layout) -> int:
    """Return the parameters of the largest split device."""
    devices = [device for _, device in layout.config.each_device() if device.mode == "split"]
    deepest = max((device.head_layers for device in devices), default=0)
    return num_parameters(encoder.embeddings, *(encoder.layers[index] for index in range(deepest)))
