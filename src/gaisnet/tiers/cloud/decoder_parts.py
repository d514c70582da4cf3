"""A decoder as foundation model (FM), in parts: text generation, hidden states, perplexity.

Shape legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.compute_lock import ComputeLock
from gaisnet.config.learning import RelaySettings
from gaisnet.errors import DataError
from gaisnet.learning.gate import CHUNK_ROWS, perplexity
from gaisnet.learning.merging import merge_by_regression
from gaisnet.learning.regression import trace_layer
from gaisnet.learning.relay import TaskTemplate, generate_text
from gaisnet.messages import ModelRelease
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.ragged import Ragged, token_rows
from gaisnet.models.recipe import Recipe, choose_recipe, make_domain_body, num_parameters
from gaisnet.models.release import release_model
from gaisnet.models.tokenization import window_ids
from gaisnet.tiers.cloud.adapted_body import AdaptedBody
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH

_CHOICE_SEQUENCES, _CALIBRATION_SEQUENCES = 8, 16


class DecoderParts(AdaptedBody):
    """A decoder in parts; its weights do not change.

    Args:
        foundation: Model and tokenizer.
        layout: Layers of each party.
        compute_lock: Held while the model runs or adapters are switched, since it may be served, too.
    """

    def __init__(self, foundation: Foundation, layout: Layout, compute_lock: ComputeLock) -> None:
        cut = CutLayers(layout.first_cut, layout.config.tail_layers)
        self._head, body, self._tail = cut_decoder(foundation.decoder, cut)
        super().__init__(body, layout, compute_lock)
        self._foundation = foundation

    @property
    def body(self) -> Body:
        """The body, for its service."""
        return self._body

    @property
    def layers(self) -> range:
        """The FM layers of the body."""
        return range(self._layout.first_cut, self._layout.tail_start)

    # -- what is made of it, before it has adapters --------------------------------------------------------------------

    def free_text(self) -> Tensor:
        """Generate unconditional text, token ids [B, T], for the recipe, the anchor and relays."""
        config = self._layout.config
        num = max(_CALIBRATION_SEQUENCES, config.fine_tune.anchor_sequences, config.relay.num_free)
        ids = self.generate(TaskTemplate(None, ()), num, config.relay, config.seed_for("free text"), None)
        return torch.tensor(ids, device=self.device)

    def make_domain_body(self, text_BT: Tensor) -> tuple[Recipe, Body]:
        """Make the DM's body: fill in the recipe and calibrate int8 on the first sequences of ``text_BT`` (int64)."""
        layout = self._layout
        hidden_BTD = self.at_middle(text_BT[:_CALIBRATION_SEQUENCES])
        recipe = choose_recipe(layout.config.domain, layout.middle, self._body, hidden_BTD[:_CHOICE_SEQUENCES])
        decoder, first, stop = self._foundation.decoder, layout.first_cut, layout.tail_start
        return recipe, make_domain_body(decoder, first, stop, recipe, layout.middle, hidden_BTD)

    def build_release(self, recipe: Recipe, domain_body: Body) -> ModelRelease:
        """Release everything that an edge and its devices need; tensors are the FM's and the DM's own, not copies."""
        layout = self._layout
        return release_model(self._foundation.decoder, domain_body, recipe.int8, layout.last_cut, layout.tail_start)

    def num_parameters(self) -> tuple[int, int]:
        """Count the parameters of the FM, and of the largest split device's parts."""
        layout, layers = self._layout, self._foundation.decoder.layers
        devices = [device for _, device in layout.config.each_device() if device.mode == "split"]
        deepest = max((device.head_layers for device in devices), default=0)
        held = [layers[i] for i in (*range(deepest), *range(layout.tail_start, layout.num_layers))]
        of_device = num_parameters(self._head.embed_tokens, self._tail.norm, self._tail.lm_head, *held)
        return num_parameters(self._foundation.model), of_device

    # -- running it ----------------------------------------------------------------------------------------------------

    def generate(
        self, shape: TaskTemplate, num: int, settings: RelaySettings, seed: int, adapter: str | None
    ) -> list[list[int]]:
        """Generate texts as token ids, see ``learning.relay.generate_text``."""
        with self.active_adapter(adapter):
            return generate_text(self._foundation.model, self._foundation.tokenizer, shape, num, settings, seed)

    def windows(self, text: str, num: int, num_tokens: int) -> Tensor:
        """Return the beginning of a text as token ids [num, num_tokens]. Raises ``DataError`` if it is too short."""
        windows = window_ids(self._foundation.tokenizer, text, num, num_tokens)
        if len(windows) < num:
            found = f"it fills {len(windows)} windows of {num_tokens} tokens but {num} are wanted"
            raise DataError("the public text for retention", found, "lower absorb.retention_windows")
        return torch.tensor(windows, device=self.device)

    def at_middle(self, ids_BT: Tensor) -> Tensor:
        """Return the middle's input [B, T, D]."""
        with torch.no_grad(), self._compute_lock.learning():
            return self._body.run(self._head(ids_BT), self._layout.first_cut, self._layout.middle.start)

    def between(self, hidden: Ragged, start: int, stop: int) -> Ragged:
        """Run the layers [start, stop) on hidden states, without gradients."""
        return hidden.map_batches(lambda hidden_BTD: self._run(hidden_BTD, start, stop), PREFIX_BATCH)

    def at_suffix(self, sequences: Sequence[Sequence[int]]) -> Ragged:
        """Return the suffix's input, at the first adapted layer, for texts of token ids."""
        start, first = self._layout.first_cut, self._layout.first_adapted

        def run(ids_BT1: Tensor) -> Tensor:
            with self._compute_lock.learning():
                return self._body.run(self._head(ids_BT1[..., 0]), start, first)

        return token_rows(sequences, self.device).map_batches(run, PREFIX_BATCH)

    def merge_by_regression(self, entering: Mapping[str, Ragged], free: Ragged) -> AdapterTensors:
        """Merge the adapters of ``entering`` by regression, see ``learning.merging``.

        The model is locked for a layer at a time, so that it can be served in between.
        """
        adapters = {name: self.copy_adapter(name) for name in entering}
        some, layers = next(iter(adapters)), [i for i in self._body.indices if i >= self._layout.first_adapted]

        def trace(name: str | None, layer: int, states: Ragged) -> tuple[dict[str, Ragged], Ragged]:
            with self.active_adapter(name):
                return trace_layer(self._body, some, layer, states)

        return merge_by_regression(adapters, entering, free, layers, trace, self._layout.config.absorb.merge)

    def perplexity(self, ids_BT: Tensor, entering: Ragged, adapter: str | None) -> float:
        """Return the perplexity of text, with an adapter or without; ``entering`` is its ``at_suffix``."""
        with self.active_adapter(adapter), torch.no_grad():
            outputs = entering.map_batches(self.run_suffix, PREFIX_BATCH)
            hidden_BTD = self._tail.stack.run(outputs.rows_ND.view(*ids_BT.shape, -1))
            return perplexity(hidden_BTD, self._tail_logits, ids_BT)

    def divergence(self, entering: Ragged, other: Ragged, adapter: str) -> float:
        """Return the mean over positions of KL(p || q) of the next token, in nats.

        Args:
            entering: The suffix's input in the FM, for p.
            other: The same in another model with the same suffix, for q.
            adapter: Active in both.
        """
        with self.active_adapter(adapter), torch.no_grad():
            chances = zip(self._log_chances(entering), self._log_chances(other), strict=True)
            total = sum(float((p_RV.exp() * (p_RV - q_RV)).sum()) for p_RV, q_RV in chances)
        return total / max(len(entering.rows_ND), 1)

    def _log_chances(self, entering: Ragged) -> Iterator[Tensor]:
        """Yield next-token log probabilities of some positions at a time, float32 [R, V]."""
        outputs = entering.map_batches(
            lambda hidden_BTD: self._tail.stack.run(self.run_suffix(hidden_BTD)), PREFIX_BATCH
        )
        for rows_RD in outputs.rows_ND.split(CHUNK_ROWS):
            yield self._tail_logits(rows_RD).float().log_softmax(dim=-1)

    def _tail_logits(self, rows_ND: Tensor) -> Tensor:
        self._compute_lock.pause()
        return self._tail.logits(rows_ND)
