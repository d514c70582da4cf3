"""A domain model (DM) as an edge, or a local device, runs it: a body with its relay and its domain adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec, activate, add_adapter
from gaisnet.compute_lock import ComputeLock
from gaisnet.errors import ModelError
from gaisnet.messages import MOST, AdapterRelease, AnchorRelease, Role
from gaisnet.models.parts import Body
from gaisnet.models.preemption import pause_within
from gaisnet.models.ragged import Ragged
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH, TrainableBody


class DomainModel(TrainableBody):
    """Body with its two adapters.

    Args:
        body: Made by the recipe; it is this model's own from now on.
        layout: Whose layers are whose.
        compute_lock: Held while the body runs or changes, for others may serve it; None where nobody does.
        num_classes: Of the domain, where the body is an encoder's.

    Raises:
        ModelError: The layout is another family's, or the body has no layers.
    """

    def __init__(
        self, body: Body, layout: Layout, compute_lock: ComputeLock | None = None, num_classes: int = 0
    ) -> None:
        if body.family is not layout.family:
            raise ModelError(body.config.model_type, "its body is laid out as another family's", "name its own")
        if not body.indices:
            raise ModelError(body.config.model_type, "its body has no layers", "update both ends")
        super().__init__(body.to(layout.config.model.device), layout, compute_lock or ComputeLock(), "domain")
        self.versions = {"relay": 0, "domain": -1}  # a relay starts as nothing; a domain adapter is given
        spec = layout.domain_spec() if self._causal else layout.class_spec(num_classes)
        self._specs: dict[Role, AdapterSpec] = {"domain": spec}
        if layout.config.relay.enabled and (relay_spec := layout.relay_spec(tuple(body.indices))).layers:
            self._specs["relay"] = relay_spec
        for role, spec in self._specs.items():
            add_adapter(body, role, spec, seed=0)
        activate(body, ("relay", "domain"))
        pause_within(body.layers.values(), self._compute_lock.pause)

    @property
    def body(self) -> Body:
        """To serve it."""
        return self._body

    @property
    def layers(self) -> range:
        """The FM layers that the body stands for."""
        return range(self._layout.first_cut, self._layout.tail_start)

    @property
    def generates_text(self) -> bool:
        """Whether it writes answers, so that it can be served; an encoder only classifies."""
        return self._causal

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Where activations must be, and in which dtype, to enter the body."""
        return self.device, self.dtype

    def install_adapter(self, release: AdapterRelease) -> None:
        """Put a released adapter in. Raises ``AdapterMismatch``."""
        self.set_adapter(release.role, release.tensors)
        self.versions[release.role] = release.version

    def served_adapters(self) -> dict[Role, tuple[LoraSpec, AdapterTensors]]:
        """Shape of both adapters, and copies of their tensors as they are now; no relay where it has none.

        They are there to be served, so an encoder, which writes no answers, has none.
        """
        served = {role: spec for role, spec in self._specs.items() if isinstance(spec, LoraSpec) and self._causal}
        return {role: (spec, self.copy_adapter(role)) for role, spec in served.items()}

    def set_anchor(self, anchor: AnchorRelease) -> None:
        """Keep text that the FM wrote, and what the suffix makes of it without a domain adapter; if it wrote any.

        Raises ``OutOfBounds`` where its rows are not this model's.
        """
        config = self._body.config
        longest = getattr(config, "max_position_embeddings", MOST)
        bounds.check_anchor("the cloud", anchor, config.hidden_size, longest)
        if not len(anchor.lengths_E):
            return
        rows_ND = anchor.hidden_ND.to(*self.placement())
        inputs = Ragged(rows_ND, tuple(anchor.lengths_E.tolist()))
        with self._compute_lock.learning():
            activate(self._body, ("relay",))
            self._anchor = inputs, inputs.map_batches(self.run_suffix, PREFIX_BATCH)
            activate(self._body, ("relay", "domain"))

    @contextmanager
    def guest_adapters(self, relay: AdapterTensors, domain: AdapterTensors) -> Iterator[None]:
        """Inside, it is another domain's model: with its adapters; ``relay`` is empty where models have none.

        What is served does not change, nor do versions. Raises ``AdapterMismatch``.
        """
        own = {role: self.copy_adapter(role) for role in self._specs}
        try:
            self.set_adapter("domain", domain)
            if relay:
                self.set_adapter("relay", relay)
            yield
        finally:
            for role, tensors in own.items():
                self.set_adapter(role, tensors)
