"""A foundation model (FM) that tells classes apart: every domain has a classifier of its own beside its adapter.

It writes no text, so there is no relay, no anchor and no perplexity; and classifiers of different classes do not add
up, so there is no merged adapter.

Shape legend: B sequences, T positions, D hidden size, N inputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import AdapterSpec
from gaisnet.compute_lock import ComputeLock
from gaisnet.data.examples import Input
from gaisnet.errors import ConfigError, ModelError
from gaisnet.learning.gate import Verdict
from gaisnet.messages import AnchorRelease, SmashedData
from gaisnet.models.encoders import cut_encoder
from gaisnet.models.families import Encoder
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import Body, CutLayers
from gaisnet.models.preemption import pause_within
from gaisnet.models.ragged import Ragged, by_length
from gaisnet.models.recipe import Recipe, choose_recipe, make_domain_body, num_parameters
from gaisnet.models.release import release_encoder
from gaisnet.tiers.cloud.adapted_body import AdaptedBody
from gaisnet.tiers.cloud.model import Sizes
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.inputs import EncoderInputs
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH, TrainingResult, compute_body_output_rows

_CALIBRATION_INPUTS = 16


class EncoderCloudModel:
    """An encoder as the cloud runs it; see ``CloudModel``.

    Args:
        foundation: The FM; adapters are put beside its late layers, the weights stay as they are.
        layout: Whose layers are whose.
        public: Unlabelled inputs that are nobody's secret: a recipe is filled in and calibrated on them, and how far
            adapters move the FM's features is measured. There may be none.
        compute_lock: Held while the model runs.

    Raises:
        ConfigError: The recipe needs public inputs and there are none.
        DataError: The FM cannot read them.
    """

    def __init__(
        self, foundation: Foundation, layout: Layout, public: Sequence[Input], compute_lock: ComputeLock
    ) -> None:
        self._layout = layout
        self._compute_lock = compute_lock
        encoder = foundation.encoder
        self._head, self._body = cut_encoder(encoder, CutLayers(layout.first_cut))
        self._plugged = AdaptedBody(self._body, layout, compute_lock)
        inputs = EncoderInputs(public, foundation.reader, layout.config.model.most_tokens, "the cloud's public inputs")
        at_cut = inputs.map_batches(self._run_head) if public else None
        recipe, domain_body = self._make_domain_body(encoder, at_cut)
        # Taken before adapters stand between the layers and their weights.
        self.model_release = release_encoder(encoder, domain_body, recipe.int8, layout.last_cut)
        nothing_ND = torch.zeros(0, self._body.config.hidden_size)
        self.anchor_release = AnchorRelease(torch.zeros(0, dtype=torch.int32), nothing_ND)
        self.sizes = Sizes(
            num_parameters(foundation.model), layout.num_layers, len(recipe.kept), self._device_params(encoder)
        )
        pause_within(self._body.layers.values(), compute_lock.pause)
        self.names = tuple(edge.domain for edge in layout.config.learning_edges())
        self.relays: dict[str, AdapterTensors] = {}
        self._public = None if at_cut is None else self._at_suffix(at_cut)
        self._alone_ND = torch.zeros(0) if self._public is None else self._features(self._public, None)
        seed = layout.config.seed_for("domain adapter")
        for name in self.names:
            self._plugged.add(name, self.spec(name), seed)
        self.retention: dict[str, float] = {}
        if self._public is not None:
            self.retention = {name: self._drift(self._public, name) for name in self.names}

    # -- what is made of it, before it has adapters --------------------------------------------------------------------

    def _make_domain_body(self, encoder: Encoder, at_cut: Ragged | None) -> tuple[Recipe, Body]:
        layout, settings = self._layout, self._layout.config.domain
        if at_cut is None and (settings.precision == "int8" or isinstance(settings.keep_layers, int)):
            found = (
                f"are {settings.precision} and {settings.keep_layers}, but there is nothing to calibrate an encoder on"
            )
            do = "use float32 and null, or a list of layers; or name a file of inputs as model.public_inputs"
            raise ConfigError("domain.precision and domain.keep_layers", found, do)
        hidden_BTD = torch.zeros(0) if at_cut is None else self._at_middle(at_cut)
        recipe = choose_recipe(settings, layout.middle, self._body, hidden_BTD)
        first, stop = layout.first_cut, layout.tail_start
        return recipe, make_domain_body(encoder, first, stop, recipe, layout.middle, hidden_BTD)

    def _at_middle(self, at_cut: Ragged) -> Tensor:
        """Some inputs, none of them padded, [B, T, D]: the longer half, cut to the length of the shortest of it."""
        longer = by_length(at_cut.lengths, len(at_cut))[0][len(at_cut) // 2 :]
        some, length = longer[:_CALIBRATION_INPUTS], at_cut.lengths[longer[0]]
        hidden_BTD = torch.stack([at_cut.sequences()[index][:length] for index in some])
        with torch.no_grad(), self._compute_lock.learning():
            return self._body.run(hidden_BTD, self._layout.first_cut, self._layout.middle.start)

    def _at_suffix(self, at_cut: Ragged) -> Activations:
        """Every input where adapters start; one row of each is looked at."""
        first = self._layout.first_adapted
        every = Activations(at_cut, (1,) * len(at_cut), self._layout.first_cut)
        return every.run_layers(
            lambda hidden_BTD: self._body.run(hidden_BTD, every.next_layer, first), first, PREFIX_BATCH, causal=False
        )

    def _device_params(self, encoder: Encoder) -> int:
        """Of the largest split device's part."""
        devices = [device for _, device in self._layout.config.each_device() if device.mode == "split"]
        deepest = max((device.head_layers for device in devices), default=0)
        return num_parameters(encoder.embeddings, *(encoder.layers[index] for index in range(deepest)))

    def _run_head(self, inputs: Tensor) -> Tensor:
        with self._compute_lock.learning():
            hidden_BTD: Tensor = self._head(inputs.to(self._plugged.device))
        return hidden_BTD

    # -- down, of which there is nothing, and up -----------------------------------------------------------------------

    def teach(self, domain: str, cycle: int) -> None:
        """Nothing: it writes no text to teach with."""

    def merges(self) -> dict[str, AdapterTensors]:
        """None: see the module."""
        return {}

    def set_gradient_bounds(self, gradient_bounds: GradientBounds) -> None:
        """See ``CloudModel``."""
        self._plugged.gradient_bounds = gradient_bounds

    def learn(self, *args: Any) -> TrainingResult:
        """Nothing: it has no merged adapter, and a layout that asks for it is refused."""
        raise ModelError("a merged adapter that learns", "an encoder has none", "set absorb.last_mile.epochs to 0")

    def publish(self, name: str, version: int) -> None:
        """Nothing: it writes no answers."""

    def spec(self, name: str) -> AdapterSpec:
        """See ``CloudModel``."""
        return self._layout.class_spec(len(self._layout.class_labels(name)))

    def adapter(self, name: str) -> AdapterTensors:
        """See ``CloudModel``."""
        return self._plugged.copy_adapter(name)

    def put(self, name: str, tensors: AdapterTensors) -> None:
        """See ``CloudModel``."""
        self._plugged.set_adapter(name, tensors)

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """As it is, and say how far it moves the features of public inputs; see ``CloudModel``.

        It may move them as far as it likes: the FM alone is as it was, and other domains have adapters of their own.
        """
        before = self.adapter(name)
        self.put(name, tensors)
        if self._public is None:
            said = "its shape and numbers were looked at, and nothing else: the cloud has no public inputs"
            return Verdict(True, name, math.nan, math.nan, said=said)
        drift = self._drift(self._public, name)
        if not math.isfinite(drift):
            self.put(name, before)
            return Verdict(False, name, math.nan, math.nan, "it makes features that are not finite of public inputs")
        self.retention[name] = drift
        said = f"its shape and numbers fit; it moves the features of public inputs by {drift:.1%} of their length"
        return Verdict(True, name, math.nan, math.nan, said=said)

    @torch.no_grad()
    def _features(self, public: Activations, adapter: str | None) -> Tensor:
        """What a classifier sees of the public inputs, [N, D], with an adapter or without."""
        with self._plugged.active_adapter(adapter):
            rows_ND = compute_body_output_rows(
                self._plugged.run_suffix, public, self._layout.row_selection, causal=False
            )
            return self._body.features(rows_ND).float()

    def _drift(self, public: Activations, adapter: str) -> float:
        """Mean over the public inputs of |features with the adapter - without| / |without|."""
        moved_ND = self._features(public, adapter) - self._alone_ND
        return float((moved_ND.norm(dim=-1) / self._alone_ND.norm(dim=-1)).mean())

    # -- asked by edges, and after a restart ---------------------------------------------------------------------------

    def prefix(self, smashed: SmashedData) -> Activations:
        """See ``CloudModel``."""
        return self._plugged.prefix(smashed)

    def output_rows(self, inputs: Activations, adapter: str | None) -> Tensor:
        """Logits; see ``CloudModel``."""
        return self._plugged.output_rows(inputs, adapter)

    def state(self) -> dict[str, Any]:
        """See ``CloudModel``."""
        return {"retention": self.retention}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See ``CloudModel``."""
        self.retention = state["retention"]
