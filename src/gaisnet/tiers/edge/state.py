"""What an edge holds of a run: model, anchor, adapters, how far it is; on a shelf, to outlive the process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from gaisnet.checkpoint import Shelf, under
from gaisnet.compute_lock import ComputeLock
from gaisnet.config import Config, DeviceSettings
from gaisnet.messages import AdapterRelease, AnchorRelease, ModelRelease
from gaisnet.models.release import released, restrict, rounded
from gaisnet.tiers.split.bounds import GradientBounds, max_positions
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.layout import Layout
from gaisnet.transport.ledger import Ledger, LinkKind, Traffic

_KINDS: tuple[LinkKind, ...] = ("device_edge", "edge_cloud")


@dataclass(frozen=True)
class RoundProgress:
    """How far a cycle's edge rounds are."""

    cycle: int
    base: int  # version of the domain adapter that the cycle began with
    done: int = 0
    num_steps: int = 0
    num_examples: int = 0  # of the last round
    loss: float = 0.0  # of the last round
    faults: tuple[str, ...] = ()


@dataclass
class EdgeState:
    """Everything that an edge must have to go on with a run.

    Raises ``ModelError`` or ``CutError`` where the release does not fit the configuration.
    """

    config: Config
    run: str
    digest: str
    release: ModelRelease
    anchor: AnchorRelease
    compute_lock: ComputeLock = field(default_factory=ComputeLock)
    num_classes: int = 0  # of the domain, where the model is an encoder
    relay: AdapterRelease | None = None
    rounds: RoundProgress | None = None
    domain: DomainModel = field(init=False)
    layout: Layout = field(init=False)
    hidden_size: int = field(init=False)
    max_positions: int = field(init=False)  # positions of an example

    def __post_init__(self) -> None:
        model = released(self.release)
        self.hidden_size = model.config.hidden_size
        self.layout = layout = Layout(self.config, model.num_layers, model.family)
        body = model.body(layout.first_cut, layout.tail_start)
        self.domain = DomainModel(body, layout, self.compute_lock, self.num_classes)
        self.domain.gradient_bounds = GradientBounds.from_release(
            self.release, self.config.tail_layers, model.family.is_encoder
        )
        self.longest = max_positions(model.config, self.config.model.most_tokens)
        self.domain.set_anchor(self.anchor)

    def release_for(self, device: DeviceSettings) -> ModelRelease:
        """What a device needs: head and tail in ``device_precision``, and if it is local, all of the DM between."""
        held = (*range(device.head_layers), *range(self.layout.tail_start, self.layout.num_layers))
        if device.mode == "local":
            return rounded(self.release, held, self.config.device_precision)
        return restrict(self._outer, held)

    @cached_property
    def _outer(self) -> ModelRelease:
        """Head and tail of all devices; rounded once."""
        layers = (*range(self.layout.last_cut), *range(self.layout.tail_start, self.layout.num_layers))
        return rounded(restrict(self.release, layers), layers, self.config.device_precision)

    def install_adapter(self, release: AdapterRelease) -> None:
        """Put a released adapter in. Raises ``AdapterMismatch``."""
        self.domain.install_adapter(release)
        if release.role == "relay":
            self.relay = release
        else:
            self.rounds = None

    def save_model(self, shelf: Shelf) -> None:
        """Write what never changes within a run."""
        release = self.release
        state = {
            "run": self.run,
            "digest": self.digest,
            "config_json": release.config_json,
            "layers": release.layers,
            "int8_layers": release.int8_layers,
        }
        shelf.put("model", state, release.tensors)
        shelf.put("anchor", {"run": self.run}, {"lengths": self.anchor.lengths_E, "hidden": self.anchor.hidden_ND})

    def save_progress(self, shelf: Shelf, ledger: Ledger) -> None:
        """Write adapters, rounds and the ledger."""
        state = {
            "run": self.run,
            "versions": self.domain.versions,
            "rounds": asdict(self.rounds) if self.rounds else None,
            "traffic": {kind: asdict(ledger.traffic(kind)) for kind in _KINDS},
        }
        tensors = {f"domain/{key}": tensor for key, tensor in self.domain.copy_adapter("domain").items()}
        if self.relay:
            tensors |= {f"relay/{key}": tensor for key, tensor in self.relay.tensors.items()}
        shelf.put("progress", state, tensors)


def load_state(
    shelf: Shelf, config: Config, ledger: Ledger, compute_lock: ComputeLock, num_classes: int = 0
) -> EdgeState | None:
    """What was kept last; None if that was nothing whole. Raises ``CheckpointError``."""
    model, anchor, progress = shelf.get("model"), shelf.get("anchor"), shelf.get("progress")
    if model is None or anchor is None or progress is None:
        return None
    state, tensors = model
    run = state["run"]
    if anchor[0]["run"] != run or progress[0]["run"] != run:
        return None  # it was stopped while a new run replaced an old one: the cloud will send it all again
    release = ModelRelease(state["config_json"], tuple(state["layers"]), tuple(state["int8_layers"]), tensors)
    anchored = AnchorRelease(anchor[1]["lengths"], anchor[1]["hidden"])
    held = EdgeState(config, run, state["digest"], release, anchored, compute_lock, num_classes)
    _restore(held, progress[0], progress[1])
    for kind in _KINDS:
        ledger.add(kind, Traffic(**progress[0]["traffic"][kind]))
    return held


def _restore(held: EdgeState, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    versions = state["versions"]
    relay = under("relay/", tensors)
    if relay:
        held.install_adapter(AdapterRelease("relay", versions["relay"], relay))
    held.install_adapter(AdapterRelease("domain", versions["domain"], under("domain/", tensors)))
    if state["rounds"]:
        held.rounds = RoundProgress(**{**state["rounds"], "faults": tuple(state["rounds"]["faults"])})
