"""A domain model (DM) as an edge or a local device runs it: a body with a relay and a domain adapter."""

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
    """A body with its two adapters.

    Args:
        body: The recipe's result, owned by this model from now on.
        layout: Assignment of layers to the tiers.
        compute_lock: Held while the body runs or changes, since it may also be served; None if it is not served.
        num_classes: Number of the domain's classes, where the body is an encoder's.

    Raises:
        ModelError: The layout is for another family, or the body has no layers.
    """

    def __init__(
        self, body: Body, layout: Layout, compute_lock: ComputeLock | None = None, num_classes: int = 0
    ) -> None:
        if body.family is not layout.family:
            raise ModelError(body.config.model_type, "its body is laid out as another family's", "name its own")
        if not body.indices:
            raise ModelError(body.config.model_type, "its body has no layers", "update both ends")
        super().__init__(body.to(layout.config.model.device), layout, compute_lock or ComputeLock(), "domain")
        self.versions = {"relay": 0, "domain": -1}  # a new relay changes nothing; a domain adapter must be installed
        spec = layout.domain_spec() if self._causal else layout.class_spec(num_classes)
        self._specs: dict[Role, AdapterSpec] = {"domain": spec}
        if layout.config.relay.enabled and (relay_spec := layout.relay_spec(tuple(body.indices))).layers:
            self._specs["relay"] = relay_spec
        for role, spec in self._specs.items():
            add_adapter(body, role, spec, seed=0)
        activate(body, ("relay", "domain"))
        pause_within(body.layers.values(), self._compute_lock.pause)

    @property
    def own_body(self) -> Body:
        """Return the body, to serve it."""
        return self._body

    @property
    def layers(self) -> range:
        """Return the FM layers that the body replaces."""
        return range(self._layout.first_cut, self._layout.tail_start)

    @property
    def generates_text(self) -> bool:
        """Whether it generates text and can be served; an encoder only classifies."""
        return self._causal

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Return device and dtype of the body's inputs."""
        return self.device, self.dtype

    def install_adapter(self, release: AdapterRelease) -> None:
        """Set a released adapter and its version. Raises ``AdapterMismatch``."""
        self.set_adapter(release.role, release.tensors)
        self.versions[release.role] = release.version

    def served_adapters(self) -> dict[Role, tuple[LoraSpec, AdapterTensors]]:
        """Return shapes and copies of the adapters to serve, by role; none for an encoder, which is not served."""
        served = {role: spec for role, spec in self._specs.items() if isinstance(spec, LoraSpec) and self._causal}
        return {role: (spec, self.copy_adapter(role)) for role, spec in served.items()}

    def set_anchor(self, anchor: AnchorRelease) -> None:
        """Keep text that the FM generated and the suffix's output on it without a domain adapter; nothing if empty.

        Raises ``OutOfBounds`` where its rows do not fit this model.
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
        """Run with the adapters of another domain inside this context; ``relay`` is empty where models have none.

        Served copies and versions do not change. Raises ``AdapterMismatch``.
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
