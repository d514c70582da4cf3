"""A cohort of real devices behind links, and the edge's half of split learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config
from gaisnet.data.examples import DeviceData, Example
from gaisnet.errors import GaisnetError
from gaisnet.messages import BodyOutput, BodyOutputGrad, ModelRelease, SmashedData, SmashRequest, Split
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.recipe import Recipe, make_domain_body
from gaisnet.models.release import ReleasedModel, release_model, restrict, rounded
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.step import Member, Outcome
from gaisnet.transport.codec import Codec
from gaisnet.transport.local import LocalLink
from tests.frames import Frames
from tests.tiny import NUM_LAYERS, tiny_config, tiny_model, tiny_tokenizer

EXACT = {
    "smashed": "float32",
    "body_output": "float32",
    "gradient": "float32",
    "anchor": "float32",
    "adapter": "float32",
}
ONE_STEP = {"local_epochs": 1, "batch_size": 64, "learning_rate": 0.01, "anchor_weight": 0.0}
ALL = tuple(range(NUM_LAYERS))
FIRST_ADAPTED = 3
WEIGHTS = 0.1  # their spread: large enough for every layer to matter, small enough for gradients of about one

EXAMPLES = (
    Example("Is water wet?", " yes"),
    Example("Is a very long and winding road short?", " no"),
    Example("Fire?", " hot"),
    Example("Is ice so?", " no"),
    Example("Is this the last of them?", " yes indeed"),
)


def cohort_config(heads: Sequence[int], tail_layers: int = 0, **changes: Any) -> Config:
    """Configure one edge with a split device per head; the DM is the FM, and links are exact."""
    devices = [{"name": f"device-{i}", "mode": "split", "head_layers": head} for i, head in enumerate(heads)]
    raw: dict[str, Any] = {
        "tail_layers": tail_layers,
        "domain": {"precision": "float32"},
        "adapters": {"rank": 2, "alpha": 6, "first_layer": FIRST_ADAPTED},
        "relay": {"enabled": False},
        "fine_tune": {**ONE_STEP, **changes.pop("fine_tune", {})},
        "wire": EXACT,
        "edges": [{"name": "edge", "domain": "facts", "devices": devices}],
    }
    return tiny_config(**{**raw, **changes})


def deal(examples: Sequence[Example], num: int) -> list[tuple[Example, ...]]:
    """Divide examples between ``num`` devices, block by block."""
    return [tuple(examples[i * len(examples) // num : (i + 1) * len(examples) // num]) for i in range(num)]


def model_release(config: Config, recipe: Recipe) -> ModelRelease:
    """Return the release of a cloud with the tiny model."""
    decoder = Decoder(tiny_model(initializer_range=WEIGHTS))
    layout = Layout(config, NUM_LAYERS)
    head, _, _ = cut_decoder(decoder, CutLayers(layout.last_cut))
    calibration_BTD = head(torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0)))
    body = make_domain_body(decoder, layout.first_cut, layout.tail_start, recipe, layout.middle, calibration_BTD)
    return release_model(decoder, body, recipe.int8, layout.last_cut, layout.tail_start)


def random_adapter(like: AdapterTensors, seed: int) -> AdapterTensors:
    """Draw both factors randomly: a new adapter's B is zero, so A would have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensor.shape, generator=generator) * 0.1 for key, tensor in like.items()}


@dataclass
class Cohort:
    """Devices, links to them, and the domain model at the edge with a random domain adapter."""

    config: Config
    examples: Sequence[Example] = EXAMPLES
    recipe: Recipe = Recipe(ALL, ())
    ledger: Frames = field(default_factory=Frames)

    def __post_init__(self) -> None:
        self.release = model_release(self.config, self.recipe)
        self.layout = Layout(self.config, NUM_LAYERS)
        settings = [device for _, device in self.config.each_device()]
        parts = deal(self.examples, len(settings))
        self.devices = [
            Device(one, self.config, tiny_tokenizer(), DeviceData(part, part))
            for one, part in zip(settings, parts, strict=True)
        ]
        codec = Codec(self.config.wire)
        self.links = [LocalLink(device, codec, self.ledger, "device_edge", "down") for device in self.devices]
        for link, one in zip(self.links, settings, strict=True):
            holds = (*range(one.head_layers), *range(self.layout.tail_start, NUM_LAYERS))
            link.send(rounded(restrict(self.release, holds), holds, self.config.device_precision)).result()
        self.body: Body = ReleasedModel(self.release).body(self.layout.first_cut, self.layout.tail_start)
        self.domain = DomainModel(self.body, self.layout)
        self.domain.set_adapter("domain", random_adapter(self.domain.copy_adapter("domain"), seed=5))

    def smashed(self, number: int, split: Split = "train") -> SmashedData:
        """Return the smashed data of device ``number``."""
        message = self.links[number].send(SmashRequest(split)).result()
        assert isinstance(message, SmashedData)
        return message

    def member(self, number: int) -> Member:
        """Return device ``number`` with its activations after the frozen prefix."""
        inputs = Activations.from_smashed(self.smashed(number), *self.domain.placement())
        return Member(self.devices[number].name, self.domain.run_prefix(inputs))

    def labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        """Request gradients from all owners; an error stands for a missing gradient."""
        return {name: self._label(name, output) for name, output in outputs.items()}

    def _label(self, name: str, output: BodyOutput) -> Outcome:
        number = next(i for i, device in enumerate(self.devices) if device.name == name)
        try:
            reply = self.links[number].send(output).result()
        except GaisnetError as error:
            return error
        assert isinstance(reply, BodyOutputGrad)
        return reply

    def members(self) -> list[Member]:
        """Return all devices as members."""
        return [self.member(number) for number in range(len(self.devices))]

    def everything(self) -> list[int]:
        """Return the indices of all examples."""
        return list(range(len(self.examples)))
