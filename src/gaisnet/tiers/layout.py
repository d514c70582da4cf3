"""Whose layers are whose: one reading of the configuration that cloud, edges and devices share."""

from dataclasses import dataclass

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import Config, DeviceSettings
from gaisnet.errors import CutError
from gaisnet.models.domain import Middle, check_recipe
from gaisnet.models.parts import CutLayers

_LAST_MODULE = "down_proj"  # of a layer of every family in ``models.families``


@dataclass(frozen=True)
class Layout:
    """Layer numbers of a run on a foundation model with ``num_layers`` layers."""

    config: Config
    num_layers: int

    def __post_init__(self) -> None:
        """Raise ``CutError`` where cuts, recipe and adapters do not fit the model or each other."""
        first, last = self.config.adapters.first_layer, self.tail_start - 1
        if last < 1:
            found, do = f"the model has {self.num_layers} layers", f"use 0 to {self.num_layers - 2}"
            raise CutError("tail_layers", self.config.tail_layers, found, do)
        if first > last:
            found = f"the model has {self.num_layers} layers and the devices' tails take {self.config.tail_layers}"
            raise CutError("adapters.first_layer", first, found, f"use 1 to {last}")
        for _, device in self.config.each_device():
            if device.head_layers >= first:
                found = f"the model has {self.num_layers} layers and adapters start at {first}"
                raise CutError(
                    f"head_layers of device '{device.name}'", device.head_layers, found, f"use 0 to {first - 1}"
                )
        check_recipe(self.config.domain, self.middle, self.num_layers)

    @property
    def first_cut(self) -> int:
        """Layers of the shallowest device head: where bodies begin."""
        return min(device.head_layers for _, device in self.config.each_device())

    @property
    def last_cut(self) -> int:
        """Layers of the deepest device head: where recipes may begin."""
        return max(device.head_layers for _, device in self.config.each_device())

    @property
    def first_adapted(self) -> int:
        """Where domain adapters start: the prefix before is frozen, the suffix from here learns."""
        return self.config.adapters.first_layer

    @property
    def tail_start(self) -> int:
        """Where the devices' tails begin and bodies end."""
        return self.num_layers - self.config.tail_layers

    @property
    def middle(self) -> Middle:
        """Layers that a DM's recipe may change and its relay repairs."""
        return Middle(self.last_cut, self.first_adapted)

    def cut(self, device: DeviceSettings) -> CutLayers:
        """What a device holds."""
        return CutLayers(device.head_layers, self.config.tail_layers)

    def domain_spec(self, num_merged: int = 1) -> LoraSpec:
        """Shape of a domain adapter, or of ``num_merged`` of them side by side."""
        settings = self.config.adapters
        layers = tuple(range(self.first_adapted, self.tail_start))
        return LoraSpec(settings.rank * num_merged, settings.alpha * num_merged, settings.targets, layers)

    def relay_spec(self, kept: tuple[int, ...]) -> LoraSpec:
        """Shape of a relay adapter: beside the gaps that a recipe left, or, where it left none, on the whole middle.

        One layer before a gap, and two behind it. Only the module that ends a layer has it: see ``relay.downward``.
        """
        rank, middle = self.config.relay.rank, [index for index in kept if index in self.middle]
        gone = set(self.middle.layers()) - set(middle)
        near = [index for index in middle if gone & {index + 1, index - 1} or index - 1 in middle and index - 2 in gone]
        return LoraSpec(rank, rank, (_LAST_MODULE,), tuple(near if gone else middle))
