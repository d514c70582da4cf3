"""The state of an edge in a run: model, anchor, adapters and progress, kept on a store to survive a restart."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from gaisnet.checkpoint import CheckpointStore, under
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
    """Progress through the edge rounds of a cycle."""

    cycle: int
    base: int  # version of the domain adapter at the start of the cycle
    done: int = 0
    num_steps: int = 0
    num_examples: int = 0  # of the last round
    loss: float = 0.0  # of the last round
    faults: tuple[str, ...] = ()


@dataclass
class EdgeState:
    """Everything that an edge needs to continue a run.

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
    local_start: AdapterRelease | None = None  # domain adapter from which local devices train next
    domain: DomainModel = field(init=False)
    layout: Layout = field(init=False)
    hidden_size: int = field(init=False)
    max_positions: int = field(init=False)  # of an example

    def __post_init__(self) -> None:
        model = released(self.release)
        self.hidden_size = model.config.hidden_size
        self.layout = layout = Layout(self.config, model.num_layers, model.family)
        body = model.body(layout.first_cut, layout.tail_start)
        self.domain = DomainModel(body, layout, self.compute_lock, self.num_classes)
        self.domain.gradient_bounds = GradientBounds.from_release(
            self.release, self.config.tail_layers, model.family.is_encoder
        )
        self.max_positions = max_positions(model.config, self.config.model.most_tokens)
        self.domain.set_anchor(self.anchor)

    def release_for(self, device: DeviceSettings) -> ModelRelease:
        """Return a device's part: head and tail in ``device_precision``, and the DM in between if it is local."""
        held = (*range(device.head_layers), *range(self.layout.tail_start, self.layout.num_layers))
        if device.mode == "local":
            return rounded(self.release, held, self.config.device_precision)
        return restrict(self._outer, held)

    @cached_property
    def _outer(self) -> ModelRelease:
        """Heads and tails of all devices, rounded once."""
        layers = (*range(self.layout.last_cut), *range(self.layout.tail_start, self.layout.num_layers))
        return rounded(restrict(self.release, layers), layers, self.config.device_precision)

    def install_adapter(self, release: AdapterRelease) -> None:
        """Put a released adapter into the DM. Raises ``AdapterMismatch``."""
        self.domain.install_adapter(release)
        if release.role == "relay":
            self.relay = release
        else:
            self.rounds = None
        self.local_start = self.domain_release()

    def domain_release(self) -> AdapterRelease:
        """Copy the current domain adapter into a message."""
        return AdapterRelease("domain", self.domain.versions["domain"], self.domain.copy_adapter("domain"))

    def save_model(self, store: CheckpointStore) -> None:
        """Write the parts that never change within a run."""
        release = self.release
        state = {
            "run": self.run,
            "digest": self.digest,
            "config_json": release.config_json,
            "layers": release.layers,
            "int8_layers": release.int8_layers,
        }
        store.save("model", state, release.tensors)
        store.save("anchor", {"run": self.run}, {"lengths": self.anchor.lengths_E, "hidden": self.anchor.hidden_ND})

    def save_progress(self, store: CheckpointStore, ledger: Ledger) -> None:
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
        store.save("progress", state, tensors)


def load_state(
    store: CheckpointStore, config: Config, ledger: Ledger, compute_lock: ComputeLock, num_classes: int = 0
) -> EdgeState | None:
    """Load the saved state; None where the store has no complete one. Raises ``CheckpointError``."""
    model, anchor, progress = store.load("model"), store.load("anchor"), store.load("progress")
    if model is None or anchor is None or progress is None:
        return None
    saved, tensors = model
    run = saved["run"]
    if anchor[0]["run"] != run or progress[0]["run"] != run:
        return None  # stopped while a new run replaced an old one: the cloud will send everything again
    release = ModelRelease(saved["config_json"], tuple(saved["layers"]), tuple(saved["int8_layers"]), tensors)
    anchor_release = AnchorRelease(anchor[1]["lengths"], anchor[1]["hidden"])
    state = EdgeState(config, run, saved["digest"], release, anchor_release, compute_lock, num_classes)
    _restore_progress(state, progress[0], progress[1])
    for kind in _KINDS:
        ledger.add(kind, Traffic(**progress[0]["traffic"][kind]))
    return state


def _restore_progress(state: EdgeState, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    versions = saved["versions"]
    relay = under("relay/", tensors)
    if relay:
        state.install_adapter(AdapterRelease("relay", versions["relay"], relay))
    state.install_adapter(AdapterRelease("domain", versions["domain"], under("domain/", tensors)))
    if saved["rounds"]:
        state.rounds = RoundProgress(**{**saved["rounds"], "faults": tuple(saved["rounds"]["faults"])})
