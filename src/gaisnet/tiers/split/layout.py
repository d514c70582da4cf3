"""Assignment of layers to cloud, edges and devices, which all of them compute from the configuration."""

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
    """Layer numbers and adapter shapes of a run on a foundation model of ``num_layers`` layers and this family."""

    config: Config
    num_layers: int
    family: Family = LLAMA

    def __post_init__(self) -> None:
        """Raise ``CutError`` or ``ConfigError`` where cuts, recipe and adapters do not fit the model or each other."""
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
        """Raise ``CutError`` or ``ConfigError`` for settings that the family cannot have."""
        if self.family.is_encoder:
            self._check_no_generation()
            self._check_labels()
        elif (kind := self.config.adapters.kind) != "lora":
            raise ConfigError("adapters.kind", f"is '{kind}', but the model is a decoder", "use 'lora'")

    def _check_no_generation(self) -> None:
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
        """Return the names of a domain's classes, empty without a closed set of answers."""
        own = next((edge.labels for edge in self.config.edges if edge.domain == domain), None)
        # In a newcomer's kit the followed edge is missing, but the labels are the same.
        return own if own is not None else next(edge.labels for edge in self.config.edges if edge.adapter == domain)

    @property
    def first_cut(self) -> int:
        """First layer of bodies: the number of layers of the shallowest device head."""
        return self.config.cuts[0]

    @property
    def last_cut(self) -> int:
        """First layer that a recipe may change: the number of layers of the deepest device head."""
        return self.config.cuts[1]

    @property
    def first_adapted(self) -> int:
        """First layer of domain adapters: the prefix before it is frozen, the suffix from it is trained."""
        return self.config.adapters.first_layer

    @property
    def tail_start(self) -> int:
        """First layer of the devices' tails, where bodies end."""
        return self.num_layers - self.config.tail_layers

    @property
    def middle(self) -> Middle:
        """Layers that a DM's recipe may change and its relay compensates for."""
        return Middle(self.last_cut, self.first_adapted)

    def device_cut(self, device: DeviceSettings) -> CutLayers:
        """Return the layers of a device."""
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
        """Return the shape of a decoder's domain adapter, or of ``num_merged`` of them concatenated."""
        settings = self.config.adapters
        targets = settings.targets or self.family.targets
        return LoraSpec(settings.rank * num_merged, settings.alpha * num_merged, targets, self._adapted)

    def class_spec(self, num_classes: int) -> AdapterSpec:
        """Return the shape of an encoder's domain adapter, including a classifier for the domain's classes."""
        settings = self.config.adapters
        if settings.kind == "prompts":
            return PromptSpec(settings.num_prompts, self._adapted, num_classes)
        if settings.kind == "full":
            return FullSpec(self._adapted, num_classes)
        return replace(self.domain_spec(), num_classes=num_classes)

    def relay_spec(self, kept: tuple[int, ...]) -> LoraSpec:
        """Return the shape of a relay adapter: near the gaps of a recipe, or on the whole middle where it has none.

        It is on one layer before a gap and two after it, and there on the last module only: see ``learning.relay``.
        """
        rank, middle = self.config.relay.rank, [index for index in kept if index in self.middle]
        dropped = set(self.middle.layers()) - set(middle)
        near = [
            index
            for index in middle
            if dropped & {index + 1, index - 1} or index - 1 in middle and index - 2 in dropped
        ]
        return LoraSpec(rank, rank, (_LAST_MODULE,), tuple(near if dropped else middle))
