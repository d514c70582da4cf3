"""The activations of a cluster's devices: asked for once, checked, and kept up to where the suffix begins.

Beyond a limit they are kept in files, with the same results.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from gaisnet.config import EdgeSettings, FaultSettings
from gaisnet.errors import GaisnetError, WireFormatError
from gaisnet.messages import SmashedData, SmashRequest, Split
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.cluster import Cluster
from gaisnet.tiers.domain_model import DomainModel
from gaisnet.tiers.on_disk import kept_within


class SmashedStore:
    """What an edge keeps of its devices' examples.

    Args:
        settings: The edge's own entry of the configuration: what a device says of its rows is held against it.
        faults: Deadlines.
        cluster: The devices.
        max_mib: Of activations in memory; None for no limit.
    """

    def __init__(
        self, settings: EdgeSettings, faults: FaultSettings, cluster: Cluster, max_mib: int | None = None
    ) -> None:
        self._next_layers = {device.name: device.head_layers for device in settings.devices}
        self._faults = faults
        self._cluster = cluster
        self._max_mib = max_mib
        self._smashed: dict[tuple[str, Split], SmashedData] = {}
        self._prefixed: dict[tuple[str, Split], Activations] = {}
        self._hidden_size = 0
        self._classifies = False

    def begin(self, hidden_size: int, classifies: bool) -> None:
        """Forget everything: a new run begins, with a model of this width, which tells classes apart or writes."""
        self._smashed.clear()
        self._prefixed.clear()
        self._hidden_size = hidden_size
        self._classifies = classifies

    def forget_prefixes(self) -> None:
        """The prefix has changed."""
        self._prefixed.clear()

    def fetch(self, names: Iterable[str], split: Split) -> dict[str, GaisnetError]:
        """Ask those whose heads' output is not here yet; says who failed, and why. Raises ``ActivationsNotKept``."""
        missing = {name: SmashRequest(split) for name in names if (name, split) not in self._smashed}
        failed: dict[str, GaisnetError] = {}
        for name, smashed in self._cluster.ask(missing, SmashedData, self._faults.round_deadline_s).items():
            try:
                if isinstance(smashed, GaisnetError):
                    raise smashed
                self._check(name, split, smashed)
            except GaisnetError as error:
                failed[name] = error
            else:
                self._smashed[name, split] = replace(smashed, hidden_ND=self._kept(smashed.hidden_ND))
        return failed

    def raw(self, name: str, split: Split) -> SmashedData:
        """As the device sent it. Only of those that were fetched."""
        return self._smashed[name, split]

    def inputs(self, domain: DomainModel, name: str, split: Split) -> Activations:
        """Ready for the suffix: the frozen prefix is computed once per relay. Raises ``ActivationsNotKept``."""
        if (name, split) not in self._prefixed:
            inputs = domain.prefix(Activations.of(self.raw(name, split), *domain.placement()))
            rows_ND = self._kept(inputs.hidden.rows_ND)
            self._prefixed[name, split] = replace(inputs, hidden=replace(inputs.hidden, rows_ND=rows_ND))
        return self._prefixed[name, split]

    def _kept(self, rows_ND: Tensor) -> Tensor:
        raw = (smashed.hidden_ND for smashed in self._smashed.values())
        prefixed = (inputs.hidden.rows_ND for inputs in self._prefixed.values())
        return kept_within(rows_ND, (*raw, *prefixed), self._max_mib)

    def _check(self, name: str, split: Split, smashed: SmashedData) -> None:
        found = (smashed.owner, smashed.split, smashed.next_layer, smashed.hidden_ND.shape[1])
        expected = (name, split, self._next_layers[name], self._hidden_size)
        if found != expected or not torch.isfinite(smashed.hidden_ND).all():
            raise WireFormatError(f"smashed data (owner, split, next layer, width) {found} where {expected} belongs")
        if self._classifies and not bool((smashed.num_labels_E == 1).all()):
            raise WireFormatError(f"examples of device '{name}' with more than the one label that a classifier takes")
