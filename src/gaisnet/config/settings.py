"""A run's configuration: pydantic models, checked once. Every field is documented where it is declared.

``config.file`` reads one from YAML. Settings of training are in ``config.learning``, those of links and services in
``config.infrastructure``.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from gaisnet.config.hosts import Host
from gaisnet.config.infrastructure import (
    CloudSettings,
    FaultSettings,
    FrontSettings,
    ServiceSettings,
    WireSettings,
)
from gaisnet.config.learning import (
    AbsorbSettings,
    AdapterSettings,
    DomainSettings,
    EvaluateSettings,
    FineTuneSettings,
    ModelSettings,
    RelaySettings,
    Settings,
)

DevicePrecision = Literal["float32", "int8", "int4"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
RESERVED_DOMAINS = frozenset({"auto", "foundation", "merged", "none"})  # names of adapters in the cloud, and of models
RESERVED_SITES = frozenset(
    {"cloud", "admin", "authority", "logs"}
)  # names of folders beside those of edges and devices


class DataSettings(Settings):
    """Draw of a built-in data set, and its distribution over an edge's devices."""

    train_examples: int = Field(420, ge=1, description="Training examples per domain, over all devices.")
    test_examples: int = Field(210, ge=1, description="Test examples per domain, over all devices.")
    dirichlet_alpha: float = Field(
        0.5, gt=0.0, description="Label skew between devices (Dirichlet); smaller means more non-IID."
    )
    licence_categories: int = Field(
        6, ge=2, le=7, description="Number of balanced categories in the domain 'licences'."
    )


class DeviceSettings(Settings):
    """One device and its private data."""

    name: Name = Field(description="Unique in the run.")
    mode: Literal["split", "local"] = Field(
        "split",
        description="'split': it holds head and tail; 'local': it holds the whole DM and trains it alone.",
    )
    head_layers: int = Field(
        1, ge=0, description="The cut: number of layers that the device runs after the embeddings."
    )
    activations_to: Literal["edge", "cloud"] = Field(
        "edge",
        description="How far activations and gradients of this device's training examples may travel. 'cloud' lets "
        "the device take part in the last mile, if there is one. Activations of its test and validation "
        "examples travel to the cloud in either case, for scoring.",
    )
    data: Path | None = Field(
        None,
        description="Folder with train.jsonl and test.jsonl; a relative path starts at the folder of this file. Each "
        "line has a prompt and a completion; for an encoder, a text and a label, or an image (a file in "
        "the same folder) and a label.",
    )


class EdgeSettings(Settings):
    """One edge server, the domain it serves and its devices."""

    name: Name = Field(description="Unique in the run.")
    domain: Name = Field(
        description="'medical', 'licences' or 'languages' (built in), or a name of your own if each device names its "
        "data."
    )
    follows: Name | None = Field(
        None,
        description="Domain of another edge, for a newcomer without training data: it starts with that domain's "
        "adapter and a relay of its own. Its devices hold test examples, which show how good that start "
        "is; of a built-in domain they are dealt examples that no other edge has.",
    )
    template: str | None = Field(
        None, description="Public task template containing {text}; it shapes the generated text."
    )
    labels: tuple[str, ...] = Field(
        (),
        description="Public label names, if the task has a closed set of answers. For an encoder: the classes, in the "
        "order of the classifier's rows.",
    )
    devices: tuple[DeviceSettings, ...] = Field(min_length=1, description="The devices of this edge's cluster.")
    host: Host = Field("localhost", description="Deployed: DNS name or IP address at which devices reach this edge.")
    link_port: int = Field(
        0, ge=0, le=65535, description="Deployed: TCP port for the links of its devices; 0 takes a free one."
    )

    @property
    def adapter(self) -> str:
        """The domain whose adapter is active here."""
        return self.follows or self.domain

    @property
    def travelling(self) -> tuple[str, ...]:
        """Names of devices that allow activations of training examples at the cloud."""
        return tuple(device.name for device in self.devices if device.activations_to == "cloud")

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and self.template.count("{text}") != 1:
            raise ValueError("template must contain {text} exactly once")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if not all(label.strip() for label in self.labels):
            raise ValueError("a label is empty")
        repeated = _repeated(self.labels)
        if repeated:
            raise ValueError(f"labels must differ, but these are given twice: {', '.join(repeated)}")
        return self


def _refuse_alike(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for names that are one folder, or one host, wherever case does not count."""
    alike = _repeated(map(str.lower, names))
    if alike:
        both = [name for name in names if name.lower() == alike[0]]
        raise ValueError(f"names must differ in more than upper and lower case, but there are {' and '.join(both)}")


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


class DealtShare(Settings):
    """A device's part of a built-in data set, by numbers, drawn as for the whole network."""

    num_devices: int = Field(ge=1, description="Number of devices at the edge.")
    device: int = Field(ge=0, description="Index of this device among them.")
    num_newcomers: int = Field(ge=0, description="Number of edges that follow the domain and are dealt examples.")
    newcomer: int = Field(0, ge=0, description="Index of this device's edge among them, if it is one.")


class Elsewhere(Settings):
    """Facts about other sites that a site's configuration leaves out; see ``deployment.site_config``."""

    first_cut: int = Field(ge=0, description="head_layers of the network's shallowest device.")
    last_cut: int = Field(ge=0, description="head_layers of the network's deepest device.")
    num_learning: int = Field(ge=1, description="Number of domains that learn.")
    own_data: tuple[Name, ...] = Field(
        (), description="Edges whose devices have data of their own; their paths are not included."
    )
    share: DealtShare | None = Field(None, description="Share of this device, if it is dealt its examples.")


class Config(Settings):
    """Everything that defines a run."""

    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    cycles: int = Field(2, ge=1, description="Number of cycles; each is release, fine_tune, absorb.")
    tail_layers: int = Field(
        0,
        ge=0,
        description="Number of last layers on every device; with 0, only labelled positions travel to the tail.",
    )
    device_precision: DevicePrecision = Field(
        "float32",
        description="Precision of the frozen matrices on every device: embeddings, vocabulary head, and the layers of "
        "the device's head and tail. int8 and int4 (weights only) take a quarter or an eighth of the "
        "memory and of the download; the network then equals an unsplit model with these weights rounded. "
        "With float32 it equals the model itself.",
    )
    model: ModelSettings = ModelSettings()
    domain: DomainSettings = DomainSettings()
    adapters: AdapterSettings = AdapterSettings()
    relay: RelaySettings = RelaySettings()
    fine_tune: FineTuneSettings = FineTuneSettings()
    absorb: AbsorbSettings = AbsorbSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    wire: WireSettings = WireSettings()
    faults: FaultSettings = FaultSettings()
    service: ServiceSettings = ServiceSettings()
    front: FrontSettings = FrontSettings()
    data: DataSettings = DataSettings()
    cloud: CloudSettings = CloudSettings()
    edges: tuple[EdgeSettings, ...] = Field(min_length=1)
    elsewhere: Elsewhere | None = Field(
        None, description="Facts about other sites in the kits of 'deploy prepare'; not to be written by hand."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [edge.name for edge in self.edges] + [device.name for _, device in self.each_device()]
        repeated = _repeated(names)
        if repeated:
            raise ValueError(f"names must be unique, but these are used twice: {', '.join(repeated)}")
        _refuse_alike(names)
        if RESERVED_SITES.intersection(map(str.lower, names)):
            raise ValueError(f"an edge or a device cannot be named {' or '.join(sorted(RESERVED_SITES))}")
        domains = [edge.domain for edge in self.edges]
        if RESERVED_DOMAINS.intersection(map(str.lower, domains)):
            raise ValueError(f"a domain cannot be named {' or '.join(sorted(RESERVED_DOMAINS))}")
        if len(set(domains)) < len(domains):
            raise ValueError("each edge serves one domain of its own, but a domain is named twice")
        _refuse_alike(domains)
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        cloud = self.cloud
        ports = [
            (cloud.host, cloud.nvflare_port, "cloud.nvflare_port"),
            (cloud.host, cloud.link_port, "cloud.link_port"),
        ]
        ports += [(edge.host, edge.link_port, f"link_port of edge '{edge.name}'") for edge in self.edges]
        taken: dict[tuple[str, int], str] = {}
        for host, port, setting in ports:
            first = taken.setdefault((host.lower(), port), setting) if port else setting
            if first != setting:
                raise ValueError(f"{first} and {setting} are both {port} on host '{host}'; give each a port of its own")
        return self

    @model_validator(mode="after")
    def _check_followers(self) -> Self:
        if self.elsewhere is not None:  # the domains that learn may be of edges that are not named here
            return self
        learning = [edge.domain for edge in self.learning_edges()]
        for edge in self.edges:
            if edge.adapter not in learning:
                known = ", ".join(learning) or "none: every edge follows another"
                raise ValueError(f"edge '{edge.name}' follows '{edge.follows}', but the domains that learn are {known}")
        return self

    @model_validator(mode="after")
    def _check_absorb(self) -> Self:
        for edge in self.edges:
            if edge.travelling and edge.follows is not None:
                raise ValueError(f"device '{edge.travelling[0]}' has activations_to: cloud, but nothing to learn from")
        ways = self.absorb.merge.ways
        if not ways or len(set(ways)) < len(ways):
            raise ValueError("absorb.merge.method must name one method, or several different ones")
        travelling = any(edge.travelling for edge in self.learning_edges())
        if self.absorb.last_mile.epochs and not travelling and self.elsewhere is None:
            raise ValueError("absorb.last_mile needs a device with activations_to: cloud, at an edge that learns")
        if len(ways) > 1 and not self.absorb.validation_share:
            raise ValueError("of several in absorb.merge.method devices say which, so set absorb.validation_share")
        return self

    @model_validator(mode="after")
    def _check_min_edges(self) -> Self:
        if self.faults.min_edges > len(self.edges):
            raise ValueError(f"faults.min_edges is {self.faults.min_edges}, but there are {len(self.edges)} edges")
        return self

    def learning_edges(self) -> list[EdgeSettings]:
        """Return the edges whose devices have training examples."""
        return [edge for edge in self.edges if edge.follows is None]

    @property
    def num_learning(self) -> int:
        """Number of the network's domains that train."""
        return self.elsewhere.num_learning if self.elsewhere else len(self.learning_edges())

    def deals(self, edge: EdgeSettings) -> bool:
        """Return whether an edge's devices are dealt built-in examples; otherwise all have data of their own."""
        own_data = self.elsewhere.own_data if self.elsewhere else ()
        return edge.name not in own_data and all(device.data is None for device in edge.devices)

    @property
    def cuts(self) -> tuple[int, int]:
        """Layers of the network's shallowest and deepest device heads."""
        if self.elsewhere:
            return self.elsewhere.first_cut, self.elsewhere.last_cut
        layers = [device.head_layers for _, device in self.each_device()]
        return min(layers), max(layers)

    def each_device(self) -> Iterator[tuple[EdgeSettings, DeviceSettings]]:
        """Yield every device with its edge, in the order of the file."""
        for edge in self.edges:
            for device in edge.devices:
                yield edge, device

    def seed_for(self, *purpose: object) -> int:
        """Return a seed in [0, 2**63) for a purpose, the same at every site and in every process."""
        text = "/".join(map(str, (self.seed, *purpose)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
