"""The cloud: holds the foundation model (FM), teaches domain models with text that it writes, takes adapters in."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, check_same_shapes, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter, trainable
from gaisnet.checkpoint import digest_of, under
from gaisnet.config import Config
from gaisnet.errors import AdapterError, DataError, StaleAdapter, UnexpectedMessage, WireFormatError
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyRequest,
    Done,
    Message,
    ModelRelease,
    ModelRequest,
    Role,
    SmashedData,
)
from gaisnet.models.domain import choose_recipe, make_domain_body, num_parameters
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.ragged import Ragged
from gaisnet.models.release import release_model
from gaisnet.progress import Progress, silent
from gaisnet.relay.downward import Distillation, TaskShape, distil, generate_text
from gaisnet.relay.upward import Verdict, gate, merge, perplexity
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.domain_model import PREFIX_BATCH, body_output_rows
from gaisnet.tiers.layout import Layout

MERGED = "merged"
_CALIBRATION_SEQUENCES = 16
_CHOICE_SEQUENCES = 8


@dataclass(frozen=True)
class Sizes:
    """What a run's models hold, in layers and parameters."""

    foundation_params: int
    foundation_layers: int
    domain_layers: int
    split_device_params: int  # of the largest split device


class Cloud:
    """Owns the FM and the adapters that plug into it.

    Args:
        foundation: The FM; adapters are put beside its late layers, the weights stay as they are.
        config: The run's configuration.
        shapes: What is public about each domain's task, by domain.
        retention_text: Public text that no domain trains on, to watch general ability with.
        progress: Told while it generates and distils.

    Raises:
        CutError: The configuration does not fit the FM.
        DataError: Too little public text.
    """

    def __init__(
        self,
        foundation: Foundation,
        config: Config,
        shapes: Mapping[str, TaskShape],
        retention_text: str,
        progress: Progress = silent,
    ) -> None:
        decoder = foundation.decoder
        self.layout = Layout(config, len(decoder.layers))
        self._foundation = foundation
        self._config = config
        self._shapes = shapes
        self._progress = progress
        cut = CutLayers(self.layout.first_cut, config.tail_layers)
        self._head, self._body, self._tail = cut_decoder(decoder, cut)
        self._retention_ids_BT = self._windows(retention_text)
        free_text = self._free_text()
        self._dm_body = self._make_domain_body(free_text)
        # Both are taken before adapters stand between the layers and their weights.
        self.model_release = self._release()
        self.anchor_release = self._anchor(free_text)
        self.sizes = self._measure()
        self.model_digest = digest_of(self.model_release.tensors)
        self._lock = threading.RLock()  # adapters are switched on and off: one question at a time
        self._relays: dict[str, AdapterTensors] = {}
        self.versions: dict[Role, dict[str, int]] = {
            "relay": dict.fromkeys(shapes, 0),
            "domain": dict.fromkeys(shapes, 0),
        }
        self._evaluated: dict[str, Activations] = {}
        self._add_adapters()
        self._retention_inputs = self._at_suffix(self._retention_ids_BT)
        self.perplexity_before = self._perplexity(None)
        # With each adapter that is in place; at the start they are all zero.
        self.retention = dict.fromkeys((*shapes, MERGED), self.perplexity_before)

    # -- once ----------------------------------------------------------------------------------------------------------

    def _windows(self, text: str) -> Tensor:
        settings = self._config.absorb
        wanted = settings.retention_windows * settings.retention_tokens
        ids = self._foundation.tokenizer.encode(text, add_special_tokens=False)[:wanted]
        if len(ids) < wanted:
            found = f"it has {len(ids)} tokens but {wanted} are wanted"
            raise DataError("the public text for retention", found, "lower absorb.retention_windows")
        return torch.tensor(ids, device=self._device).view(settings.retention_windows, -1)

    def _free_text(self) -> Tensor:
        """Token ids [B, T] of text that the FM writes when nobody asks for anything."""
        num = max(_CALIBRATION_SEQUENCES, self._config.fine_tune.anchor_sequences)
        settings = self._config.relay.model_copy(update={"sequences": num})
        seed, foundation = self._config.seed_for("free text"), self._foundation
        ids = generate_text(foundation.model, foundation.tokenizer, TaskShape(None, ()), settings, seed)
        return torch.tensor(ids, device=self._device)

    def _anchor(self, free_text_BT: Tensor) -> AnchorRelease:
        hidden = self._at_suffix(free_text_BT[: self._config.fine_tune.anchor_sequences])
        return AnchorRelease(torch.tensor(hidden.lengths, dtype=torch.int32), hidden.rows_ND)

    def _make_domain_body(self, free_text_BT: Tensor) -> Body:
        """The DM that every edge gets: recipe filled in and int8 calibrated on text that the FM wrote."""
        hidden_BTD = self._at_middle(free_text_BT[:_CALIBRATION_SEQUENCES])
        middle = self.layout.middle
        self.recipe = choose_recipe(self._config.domain, middle, self._body, hidden_BTD[:_CHOICE_SEQUENCES])
        decoder, first = self._foundation.decoder, self.layout.first_cut
        return make_domain_body(decoder, first, self.layout.tail_start, self.recipe, middle, hidden_BTD)

    def _release(self) -> ModelRelease:
        """What an edge and its devices need, once; the tensors are the FM's and the DM's own, not copies."""
        layout, decoder = self.layout, self._foundation.decoder
        return release_model(decoder, self._dm_body, self.recipe.int8, layout.last_cut, layout.tail_start)

    def _add_adapters(self) -> None:
        seed = self._config.seed_for("domain adapter")
        for domain in self._shapes:
            add_adapter(self._body, domain, self.layout.domain_spec(), seed)
        add_adapter(self._body, MERGED, self.layout.domain_spec(len(self._shapes)), seed)
        self._put_merged()
        relay_spec = self.layout.relay_spec(self.recipe.kept)
        if self._config.relay.enabled and relay_spec.layers:
            add_adapter(self._dm_body, "relay", relay_spec, self._config.seed_for("relay adapter"))
            activate(self._dm_body, ("relay",))
            self._relays = {domain: take_out(self._dm_body, "relay") for domain in self._shapes}

    # -- down ----------------------------------------------------------------------------------------------------------

    def distil(self, domain: str, cycle: int) -> Distillation | None:
        """Write text for a domain and distil the FM into its DM; None where there is no relay.

        A relay that does not help on text that it did not learn from is not kept: the one before stays.
        """
        if domain not in self._relays:
            return None
        with self._lock:
            result, tensors = self._distil(domain, cycle)
        if result.helped:
            self._relays[domain] = tensors
            self.versions["relay"][domain] = cycle + 1
        return result

    def _distil(self, domain: str, cycle: int) -> tuple[Distillation, AdapterTensors]:
        texts = self._write(domain, cycle)
        inputs = Ragged(*texts).map_batches(lambda ids: self._at_middle(ids[..., 0]), PREFIX_BATCH)
        middle = self.layout.middle
        targets = inputs.map_batches(lambda h: self._body.run(h, middle.start, middle.stop), PREFIX_BATCH)
        put_in(self._dm_body, "relay", self._relays[domain])
        result = distil(
            lambda h: self._dm_body.run(h, middle.start, middle.stop),
            trainable(self._dm_body, "relay"),
            inputs,
            targets,
            self._config.relay,
            self._logits,
            self._config.seed_for("relay", domain, cycle),
            self._progress,
        )
        self._dm_body.requires_grad_(False)
        return result, take_out(self._dm_body, "relay")

    def _write(self, domain: str, cycle: int) -> tuple[Tensor, tuple[int, ...]]:
        """Token ids [N, 1] and lengths of new text; the FM writes with what it has learned of the domain so far."""
        activate(self._body, (domain,))
        seed = self._config.seed_for("text", domain, cycle)
        foundation, shape = self._foundation, self._shapes[domain]
        sequences = generate_text(foundation.model, foundation.tokenizer, shape, self._config.relay, seed)
        activate(self._body, ())
        ids_N1 = torch.tensor([i for ids in sequences for i in ids], device=self._device)[:, None]
        return ids_N1, tuple(map(len, sequences))

    def release(self, role: Role, domain: str) -> AdapterRelease:
        """The relay that a domain's DM should have, or the domain adapter that the FM holds."""
        tensors = self._relays[domain] if role == "relay" else take_out(self._body, domain)
        return AdapterRelease(role, self.versions[role][domain], tensors)

    # -- up ------------------------------------------------------------------------------------------------------------

    def absorb(self, updates: Mapping[str, AdapterUpdate]) -> list[Verdict]:
        """Plug domain adapters into the FM where the gate lets them, and merge what is in place. Updates by domain."""
        with self._lock:
            return [*(self._try(domain, update) for domain, update in updates.items()), self._try_merged()]

    def _try_merged(self) -> Verdict:
        before = take_out(self._body, MERGED)
        self._put_merged()
        verdict = self._gate(MERGED)
        if verdict.accepted:
            self.retention[MERGED] = verdict.perplexity
        else:
            put_in(self._body, MERGED, before)
        return verdict

    def _try(self, domain: str, update: AdapterUpdate) -> Verdict:
        before = take_out(self._body, domain)
        try:
            check_same_shapes(domain, before, update.tensors)
            if update.base != self.versions["domain"][domain]:
                raise StaleAdapter(domain, self.versions["domain"][domain], update.base)
        except AdapterError as error:
            return Verdict(False, domain, math.nan, math.nan, str(error))
        put_in(self._body, domain, update.tensors)
        verdict = self._gate(domain)
        if verdict.accepted:
            self.versions["domain"][domain] = update.version
            self.retention[domain] = verdict.perplexity
        else:
            put_in(self._body, domain, before)
        return verdict

    def _gate(self, adapter: str) -> Verdict:
        increase = self._config.absorb.max_retention_increase
        return gate(adapter, self._perplexity(adapter), self.perplexity_before, increase)

    def _put_merged(self) -> None:
        every = [take_out(self._body, domain) for domain in self._shapes]
        put_in(self._body, MERGED, merge(every, self._config.absorb.merge_weight))

    def _perplexity(self, adapter: str | None) -> float:
        """The FM's perplexity on public text, with an adapter or as it is."""
        activate(self._body, () if adapter is None else (adapter,))
        outputs = self._retention_inputs.map_batches(self._suffix, PREFIX_BATCH)
        activate(self._body, ())
        with torch.no_grad():
            hidden_BTD = self._tail.stack.run(outputs.rows_ND.view(*self._retention_ids_BT.shape, -1))
        return perplexity(hidden_BTD, self._tail.logits, self._retention_ids_BT)

    def adapter(self, name: str) -> tuple[LoraSpec, AdapterTensors]:
        """Shape and tensors of a domain's adapter or of the merged one, as they are plugged in now."""
        num_merged = len(self._shapes) if name == MERGED else 1
        return self.layout.domain_spec(num_merged), take_out(self._body, name)

    # -- after a restart -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a run has changed, for ``restore``; everything else follows from the configuration."""
        state = {"versions": self.versions, "retention": self.retention, "perplexity_before": self.perplexity_before}
        tensors = {
            f"adapter/{name}/{key}": t
            for name in (*self._shapes, MERGED)
            for key, t in take_out(self._body, name).items()
        }
        tensors |= {f"relay/{domain}/{key}": t for domain, relay in self._relays.items() for key, t in relay.items()}
        return state, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from where ``state`` was taken. Raises ``AdapterMismatch`` if the configuration is another one."""
        self.versions, self.retention = state["versions"], state["retention"]
        self.perplexity_before = state["perplexity_before"]
        for name in (*self._shapes, MERGED):
            put_in(self._body, name, under(f"adapter/{name}/", tensors))
        self._relays = {domain: under(f"relay/{domain}/", tensors) for domain in self._relays}

    # -- asked by edges ------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> Message:
        """Answer an edge. Raises ``UnexpectedMessage``."""
        match message:
            case ModelRequest():
                return self.model_release
            case AnchorRequest():
                return self.anchor_release
            case SmashedData(split="test"):
                with self._lock:
                    return self._keep(message)
            case BodyRequest() if message.owner in self._evaluated:
                with self._lock:
                    return self._output(message)
            case _:
                raise UnexpectedMessage("the cloud", type(message).__name__)

    def _keep(self, smashed: SmashedData) -> Done:
        """The FM's frozen prefix is run once over held-out examples and kept."""
        first = self.layout.first_adapted
        width = self._foundation.model.config.hidden_size
        if not self.layout.first_cut <= smashed.next_layer <= first or smashed.hidden_ND.shape[1] != width:
            found = f"rows of width {smashed.hidden_ND.shape[1]} for layer {smashed.next_layer}"
            raise WireFormatError(
                f"{found}, the model has width {width} and takes layers {self.layout.first_cut} to {first}"
            )
        dtype = self._foundation.model.dtype
        inputs = Activations.of(smashed, self._device, dtype)
        self._evaluated[smashed.owner] = inputs.through(
            lambda h: self._body.run(h, smashed.next_layer, first), first, PREFIX_BATCH
        )
        return Done()

    def _output(self, request: BodyRequest) -> BodyOutput:
        inputs = self._evaluated[request.owner]
        activate(self._body, () if request.adapter is None else (request.adapter,))
        rows_ND = body_output_rows(self._suffix, inputs, self._config.tail_layers > 0)
        activate(self._body, ())
        examples_E = torch.arange(len(inputs), dtype=torch.int32)
        return BodyOutput("test", 0, sum(inputs.num_labels), examples_E, rows_ND)

    # -- parts of the FM -----------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self._foundation.model.device

    def _at_middle(self, ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            return self._body.run(self._head(ids_BT), self.layout.first_cut, self.layout.middle.start)

    def _at_suffix(self, ids_BT: Tensor) -> Ragged:
        first = self.layout.first_adapted
        lengths = (ids_BT.shape[1],) * len(ids_BT)
        start = self.layout.first_cut
        ids = Ragged(ids_BT.reshape(-1, 1), lengths)
        return ids.map_batches(lambda i: self._body.run(self._head(i[..., 0]), start, first), PREFIX_BATCH)

    def _suffix(self, hidden_BTD: Tensor) -> Tensor:
        return self._body.run(hidden_BTD, self.layout.first_adapted)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        """Of the suffix and the tail, layers of the tail included."""
        logits: Tensor = self._tail(self._suffix(hidden_BTD))
        return logits

    def _measure(self) -> Sizes:
        embed, layers = self._head.embed_tokens, self._foundation.decoder.layers
        devices = [device for _, device in self._config.each_device() if device.mode == "split"]
        deepest = max((device.head_layers for device in devices), default=0)
        held = [*range(deepest), *range(self.layout.tail_start, self.layout.num_layers)]
        return Sizes(
            foundation_params=num_parameters(self._foundation.model),
            foundation_layers=self.layout.num_layers,
            domain_layers=len(self.recipe.kept),
            split_device_params=num_parameters(embed, self._tail.norm, self._tail.lm_head, *(layers[i] for i in held)),
        )
