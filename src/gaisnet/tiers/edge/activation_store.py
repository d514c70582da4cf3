"""Activations of an edge's devices: requested once, checked, and kept up to the start of the suffix.

Beyond a memory limit they spill to disk, with the same results.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from gaisnet.config import EdgeSettings, FaultSettings
from gaisnet.errors import GaisnetError
from gaisnet.messages import MOST, SmashedData, SmashRequest, Split
from gaisnet.tiers.edge.device_pool import DevicePool
from gaisnet.tiers.edge.spill import spill_beyond
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.domain_model import DomainModel


class ActivationStore:
    """Activations of the devices' examples.

    Args:
        settings: The edge's own entry of the configuration, against which rows are checked.
        faults: Deadlines, and the limit on a device's share of the examples.
        device_pool: The devices.
        max_mib: Limit for activations in memory; None for no limit.
        granted: Number of examples of a split that any device may have, however few the others have.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        faults: FaultSettings,
        device_pool: DevicePool,
        max_mib: int | None = None,
        granted: Callable[[Split], int] = lambda split: 0,
    ) -> None:
        self._next_layers = {device.name: device.head_layers for device in settings.devices}
        self._granted = granted
        self._faults = faults
        self._device_pool = device_pool
        self._max_mib = max_mib
        self._smashed: dict[tuple[str, Split], SmashedData] = {}
        self._prefixed: dict[tuple[str, Split], Activations] = {}
        self._hidden_size = 0
        self._classifies = False
        self._max_positions = MOST

    def reset_for_run(self, hidden_size: int, classifies: bool, max_positions: int) -> None:
        """Forget everything before a new run.

        Args:
            hidden_size: Width of its model.
            classifies: Whether the model is a classifier; otherwise it generates text.
            max_positions: Most positions of an example.
        """
        self._smashed.clear()
        self._prefixed.clear()
        self._hidden_size = hidden_size
        self._classifies = classifies
        self._max_positions = max_positions

    def clear_prefixes(self) -> None:
        """Forget activations after the prefix, which has changed."""
        self._prefixed.clear()

    def fetch_activations(self, names: Iterable[str], split: Split) -> dict[str, GaisnetError]:
        """Request missing activations. Return the errors of devices that failed. Raises ``ActivationsNotKept``."""
        missing = {name: SmashRequest(split) for name in names if (name, split) not in self._smashed}
        failed: dict[str, GaisnetError] = {}
        fitting: dict[str, SmashedData] = {}
        for name, smashed in self._device_pool.ask_devices(missing, SmashedData, self._faults.round_deadline_s).items():
            try:
                if isinstance(smashed, GaisnetError):
                    raise smashed
                self._check_smashed(name, split, smashed)
            except GaisnetError as error:
                failed[name] = error
            else:
                fitting[name] = smashed
        beyond = self._find_outnumbering(fitting, split)
        for name in (name for name in fitting if name not in beyond):
            kept = self._spill(fitting[name].hidden_ND)
            self._smashed[name, split] = replace(fitting[name], hidden_ND=kept)
        return failed | beyond

    def _find_outnumbering(self, found: Mapping[str, SmashedData], split: Split) -> dict[str, GaisnetError]:
        """Return devices in ``found`` whose example counts are too large compared with those of the others."""
        here = {name: smashed for (name, kept_split), smashed in self._smashed.items() if kept_split == split}
        counts = {name: len(smashed.lengths_E) for name, smashed in {**here, **found}.items()}
        beyond = bounds.find_outnumbering(counts, self._faults.max_example_ratio, self._granted(split))
        return {name: error for name, error in beyond.items() if name in found}

    def count_examples(self, name: str, split: Split) -> int | None:
        """Count a device's examples by its activations; None where they have not been fetched."""
        smashed = self._smashed.get((name, split))
        return None if smashed is None else len(smashed.lengths_E)

    def get_smashed(self, name: str, split: Split) -> SmashedData:
        """Return fetched activations as the device sent them."""
        return self._smashed[name, split]

    def get_inputs(self, domain: DomainModel, name: str, split: Split) -> Activations:
        """Return suffix inputs; the frozen prefix runs once per relay. Raises ``ActivationsNotKept``."""
        if (name, split) not in self._prefixed:
            inputs = domain.run_prefix(Activations.from_smashed(self.get_smashed(name, split), *domain.placement()))
            rows_ND = self._spill(inputs.hidden.rows_ND)
            self._prefixed[name, split] = replace(inputs, hidden=replace(inputs.hidden, rows_ND=rows_ND))
        return self._prefixed[name, split]

    def _spill(self, rows_ND: Tensor) -> Tensor:
        raw = (smashed.hidden_ND for smashed in self._smashed.values())
        prefixed = (inputs.hidden.rows_ND for inputs in self._prefixed.values())
        return spill_beyond(rows_ND, (*raw, *prefixed), self._max_mib)

    def _check_smashed(self, name: str, split: Split, smashed: SmashedData) -> None:
        next_layer = self._next_layers[name]
        bounds.check_smashed(name, split, smashed, next_layer, self._hidden_size, self._max_positions, self._classifies)
