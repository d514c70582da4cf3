"""The activations of a cluster's devices: asked for once, checked, and kept up to where the suffix begins.

Beyond a limit they are kept in files, with the same results.
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
    """What an edge keeps of its devices' examples.

    Args:
        settings: The edge's own entry of the configuration: a device's rows are held against it.
        faults: Deadlines, and how many examples a device may say it has.
        cluster: The devices.
        max_mib: Of activations in memory; None for no limit.
        granted: Examples of a split that any device may have, whatever the others have.
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
        self._longest = MOST

    def reset_for_run(self, hidden_size: int, classifies: bool, longest: int) -> None:
        """Forget everything: a new run begins.

        Args:
            hidden_size: Width of its model.
            classifies: Whether that tells classes apart; otherwise it writes.
            longest: Positions of an example.
        """
        self._smashed.clear()
        self._prefixed.clear()
        self._hidden_size = hidden_size
        self._classifies = classifies
        self._longest = longest

    def clear_prefixes(self) -> None:
        """The prefix has changed."""
        self._prefixed.clear()

    def fetch_activations(self, names: Iterable[str], split: Split) -> dict[str, GaisnetError]:
        """Ask those whose heads' output is not here yet; says who failed, and why. Raises ``ActivationsNotKept``."""
        missing = {name: SmashRequest(split) for name in names if (name, split) not in self._smashed}
        failed: dict[str, GaisnetError] = {}
        fitting: dict[str, SmashedData] = {}
        for name, smashed in self._device_pool.ask_devices(missing, SmashedData, self._faults.round_deadline_s).items():
            try:
                if isinstance(smashed, GaisnetError):
                    raise smashed
                self._check(name, split, smashed)
            except GaisnetError as error:
                failed[name] = error
            else:
                fitting[name] = smashed
        beyond = self._outnumbering(fitting, split)
        for name in (name for name in fitting if name not in beyond):
            kept = self._kept(fitting[name].hidden_ND)
            self._smashed[name, split] = replace(fitting[name], hidden_ND=kept)
        return failed | beyond

    def _outnumbering(self, found: Mapping[str, SmashedData], split: Split) -> dict[str, GaisnetError]:
        """Those of ``found`` that say they have too many examples, beside what others have."""
        here = {name: smashed for (name, of), smashed in self._smashed.items() if of == split}
        counts = {name: len(smashed.lengths_E) for name, smashed in {**here, **found}.items()}
        beyond = bounds.find_outnumbering(counts, self._faults.max_example_ratio, self._granted(split))
        return {name: error for name, error in beyond.items() if name in found}

    def count_examples(self, name: str, split: Split) -> int | None:
        """As the device's activations say; None where these are not here."""
        smashed = self._smashed.get((name, split))
        return None if smashed is None else len(smashed.lengths_E)

    def get_smashed(self, name: str, split: Split) -> SmashedData:
        """As the device sent it. Only of those that were fetched."""
        return self._smashed[name, split]

    def get_inputs(self, domain: DomainModel, name: str, split: Split) -> Activations:
        """Ready for the suffix: the frozen prefix is computed once per relay. Raises ``ActivationsNotKept``."""
        if (name, split) not in self._prefixed:
            inputs = domain.run_prefix(Activations.from_smashed(self.get_smashed(name, split), *domain.placement()))
            rows_ND = self._kept(inputs.hidden.rows_ND)
            self._prefixed[name, split] = replace(inputs, hidden=replace(inputs.hidden, rows_ND=rows_ND))
        return self._prefixed[name, split]

    def _kept(self, rows_ND: Tensor) -> Tensor:
        raw = (smashed.hidden_ND for smashed in self._smashed.values())
        prefixed = (inputs.hidden.rows_ND for inputs in self._prefixed.values())
        return spill_beyond(rows_ND, (*raw, *prefixed), self._max_mib)

    def _check(self, name: str, split: Split, smashed: SmashedData) -> None:
        next_layer = self._next_layers[name]
        bounds.check_smashed(name, split, smashed, next_layer, self._hidden_size, self._longest, self._classifies)
