"""Whose layers are whose: one reading of the configuration that cloud, edges and devices share."""

from dataclasses import dataclass, replace

from gaisnet.adapters.full import FullSpec
from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec
from gaisnet.config import Config, DeviceSettings
from gaisnet.errors import ConfigError, CutError
from gaisnet.models.families import LLAMA, Family
from gaisnet.models.parts import CutLayers
from gaisnet.models.recipe import Middle, check_recipe
from gaisnet.row_quant import GROUP
from gaisnet.tiers.split.activations import RowSelection

_LAST_MODULE = "down_proj"  # of a layer of every decoder in ``models.families``


def with_family_defaults(config: Config, family: Family) -> Config:
    """Return the configuration with the family's values in place of defaults that do not suit it.

    The defaults are those of a decoder. Settings that the user has set stay; ``Layout`` refuses them where the family
    cannot have them. Every site of a network needs the result, so kits hold it.
    """
    if not family.is_encoder:
        return config
    defaults: dict[str, dict[str, object]] = {
        "relay": {"enabled": False},  # an encoder writes no text to fit a relay to
        "fine_tune": {"anchor_weight": 0.0},  # nor text for an anchor
    }
    if max(len(edge.labels) for edge in config.edges) >= GROUP:  # see ``Layout._check_labels``
        defaults["wire"] = {"body_output": "float16", "gradient": "float16"}
    groups: dict[str, object] = {}
    for name, values in defaults.items():
        group = getattr(config, name)
        unset = {key: value for key, value in values.items() if key not in group.model_fields_set}
        groups[name] = group.model_copy(update=unset)
    return config.model_copy(update=groups)


@dataclass(frozen=True)
class Layout:
    """Layer numbers of a run on a foundation model with ``num_layers`` layers, and what its family makes of them."""

    config: Config
    num_layers: int
    family: Family = LLAMA

    def __post_init__(self) -> None:
        """Raise ``CutError`` where cuts, recipe and adapters do not fit the model or each other, or ``ConfigError``."""
        self._check_family()
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

    def _check_family(self) -> None:
        """What an encoder cannot do, and what only an encoder can."""
        if self.family.is_encoder:
            self._check_nothing_is_written()
            self._check_labels()
        elif (kind := self.config.adapters.kind) != "lora":
            raise ConfigError("adapters.kind", f"is '{kind}', but the model is a decoder", "use 'lora'")

    def _check_nothing_is_written(self) -> None:
        config = self.config
        if config.tail_layers:
            found = "the model is an encoder, whose last layers learn together with its classifier, at the edge"
            raise CutError("tail_layers", config.tail_layers, found, "use 0")
        if config.relay.enabled:
            found = "is true, but the model is an encoder, which writes no text to learn from"
            raise ConfigError("relay.enabled", found, "set it to false")
        if config.fine_tune.anchor_weight:
            found = (
                f"is {config.fine_tune.anchor_weight:g}, but the model is an encoder, which writes no text to hold to"
            )
            raise ConfigError("fine_tune.anchor_weight", found, "set it to 0")
        if len(config.absorb.merge.ways) > 1:
            found = f"are {', '.join(config.absorb.merge.ways)}, but the model is an encoder, which merges no adapters"
            raise ConfigError("absorb.merge.method", found, "leave it out")
        if config.absorb.last_mile.epochs:
            found = f"is {config.absorb.last_mile.epochs}, but the model is an encoder, which has no merged adapter"
            raise ConfigError("absorb.last_mile.epochs", found, "set it to 0")
        if config.evaluate.everywhere:
            found = "is true, but the model is an encoder, whose adapters know the classes of their own domain only"
            raise ConfigError("evaluate.everywhere", found, "set it to false")

    def _check_labels(self) -> None:
        for index, edge in enumerate(self.config.edges):
            if len(edge.labels) < 2:
                found = f"are {list(edge.labels)}, but the model is an encoder, which tells classes apart"
                raise ConfigError(f"edges.{index}.labels", found, "name the classes of the domain, two or more")
            if edge.labels != self.class_labels(edge.adapter):
                found = f"are not those of '{edge.adapter}', whose adapter and classes it takes over"
                raise ConfigError(f"edges.{index}.labels", found, "name the same, in the same order")
            for setting in ("body_output", "gradient") if len(edge.labels) >= GROUP else ():
                if getattr(self.config.wire, setting) == "int4":
                    classes = f"{len(edge.labels)} classes of '{edge.domain}'"
                    found = f"is int4, in which the likeliest of the {classes} is often another one"
                    raise ConfigError(f"wire.{setting}", found, "use float16 or int8")

    def class_labels(self, domain: str) -> tuple[str, ...]:
        """Names of a domain's classes, if it has a closed set of them."""
        own = next((edge.labels for edge in self.config.edges if edge.domain == domain), None)
        # At a newcomer, which follows an edge that is not named there: its labels are the same.
        return own if own is not None else next(edge.labels for edge in self.config.edges if edge.adapter == domain)

    @property
    def first_cut(self) -> int:
        """Layers of the shallowest device head: where bodies begin."""
        return self.config.cuts[0]

    @property
    def last_cut(self) -> int:
        """Layers of the deepest device head: where recipes may begin."""
        return self.config.cuts[1]

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

    def device_cut(self, device: DeviceSettings) -> CutLayers:
        """What a device holds."""
        return CutLayers(device.head_layers, self.config.tail_layers)

    @property
    def row_selection(self) -> RowSelection:
        """Rows of the body's output that a device's tail needs."""
        if self.family.is_encoder:
            return "first"
        return "every" if self.config.tail_layers else "last"

    @property
    def _adapted(self) -> tuple[int, ...]:
        return tuple(range(self.first_adapted, self.tail_start))

    def domain_spec(self, num_merged: int = 1) -> LoraSpec:
        """Shape of a decoder's domain adapter, or of ``num_merged`` of them side by side."""
        settings = self.config.adapters
        targets = settings.targets or self.family.targets
        return LoraSpec(settings.rank * num_merged, settings.alpha * num_merged, targets, self._adapted)

    def class_spec(self, num_classes: int) -> AdapterSpec:
        """Shape of an encoder's domain adapter, with a classifier for the domain's classes."""
        settings = self.config.adapters
        if settings.kind == "prompts":
            return PromptSpec(settings.num_prompts, self._adapted, num_classes)
        if settings.kind == "full":
            return FullSpec(self._adapted, num_classes)
        return replace(self.domain_spec(), num_classes=num_classes)

    def relay_spec(self, kept: tuple[int, ...]) -> LoraSpec:
        """Shape of a relay adapter: beside the gaps that a recipe left, or, where it left none, on the whole middle.

        One layer before a gap, and two behind it. Only the module that ends a layer has it: see ``relay.downward``.
        """
        rank, middle = self.config.relay.rank, [index for index in kept if index in self.middle]
        gone = set(self.middle.layers()) - set(middle)
        near = [index for index in middle if gone & {index + 1, index - 1} or index - 1 in middle and index - 2 in gone]
        return LoraSpec(rank, rank, (_LAST_MODULE,), tuple(near if gone else middle))
