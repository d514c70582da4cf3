"""``summary.json``: a run's measurements as frozen pydantic models, written whole or not at all."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from gaisnet.checkpoint import write_text
from gaisnet.errors import NotFinite


class Record(BaseModel):
    """A frozen group of measured values that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class ModelFigures(Record):
    """Sizes of the models."""

    foundation_params: int = Field(ge=1, description="Parameters of the FM.")
    foundation_layers: int = Field(ge=1, description="Layers of the FM.")
    domain_layers: int = Field(ge=1, description="Layers of every DM.")
    trainable_params: int = Field(ge=0, description="Parameters of one domain adapter.")
    context: int | None = Field(
        None, description="Tokens that an example may have, as model.context says or leaves it."
    )
    longest_example: int | None = Field(None, description="Tokens of an example that the FM could take.")


class Examples(Record):
    """Lengths of a device's examples, all splits together; only these counts leave it."""

    num_examples: int = Field(ge=0)
    num_truncated: int = Field(ge=0, description="Those that have more tokens than the context holds.")
    longest: int = Field(ge=0, description="Tokens of the longest one: a context that holds all. 0 where none is text.")


class DeviceFigures(Record):
    """Sizes of the devices."""

    params_fraction: float = Field(ge=0.0, description="Parameters of the largest split device over the FM's.")


class Score(Record):
    """Scores of one body on one domain's test set, over all devices of the domain."""

    accuracy: float = Field(
        ge=0.0, le=1.0, description="Share of greedy completions, or of classes, that match exactly."
    )
    loss: float = Field(description="Mean cross-entropy per labelled token.")
    num_examples: int = Field(ge=0, description="Held-out examples behind both.")


class Matrix(Record):
    """Scores of every model on every domain: by the model's domain, then by the test set's domain."""

    foundation: dict[str, dict[str, Score]] = Field(
        description="The FM by the adapter that acts: a domain's, the merged one ('merged'), or none ('none')."
    )
    domain: dict[str, dict[str, Score]] = Field(description="Every DM that learns, by its domain.")


class Retention(Record):
    """Cost of adapters for the FM's general ability; lower is better. All empty if it cannot be measured."""

    perplexity: float | None = Field(
        None,
        description="Of an FM that writes, on public text that no domain trains on: largest over the domain adapters; "
        "of the FM alone at entry 0.",
    )
    drift: float | None = Field(
        None,
        description="Of an encoder, how far its features of public inputs move, as a share of their length: largest "
        "over the domain adapters.",
    )
    adapters: dict[str, float] = Field(default_factory=dict, description="With each adapter plugged in, by its name.")


class Traffic(Record):
    """Bytes on all links of one kind in a cycle, in both directions."""

    up: int = Field(ge=0, description="Toward the cloud.")
    down: int = Field(ge=0, description="Away from the cloud.")


class LinkBytes(Record):
    """Bytes of a cycle by the kind of link."""

    device_edge: Traffic
    edge_cloud: Traffic


class Seconds(Record):
    """Wall time of a cycle by verb."""

    release: float = Field(ge=0.0)
    fine_tune: float = Field(ge=0.0)
    absorb: float = Field(ge=0.0)
    evaluate: float = Field(ge=0.0)


class RelayLoss(Record):
    """Distillation loss of one DM on generated text that its relay was not trained on."""

    loss_before: float
    loss_after: float
    kl_before: float | None = Field(None, description="Divergence of the DM's next token from the FM's there, in nats.")
    kl_after: float | None = None


FALL = 0.02
"""Drop in accuracy from one cycle to the next beyond which it is reported."""
_BODIES = {"foundation": "the FM with the domain's adapter", "domain": "the DM", "merged": "the FM, merged,"}


class Cycle(Record):
    """One entry of ``cycles``; entry 0 is measured before anything was trained."""

    cycle: int = Field(ge=0)
    foundation: dict[str, Score] = Field(description="The FM with the domain's adapter, by domain that learns.")
    domain: dict[str, Score] = Field(description="The DM of the domain, by domain; newcomers too.")
    merged: dict[str, Score] = Field(
        description="The FM with the merged adapter, by domain that learns; empty where there is none, as with an "
        "encoder."
    )
    matrix: Matrix | None = Field(None, description="Where evaluate.everywhere is set.")
    retention: Retention
    bytes: LinkBytes
    seconds: Seconds
    gate: list[str] = Field(
        default_factory=list, description="What the cloud's gate said, a sentence each, and what fell."
    )
    faults: list[str] = Field(
        default_factory=list,
        description="Devices that a round went on without, edges that the cycle did, and why, a sentence each.",
    )
    relay: dict[str, RelayLoss] = Field(default_factory=dict, description="By domain; empty if the relay is disabled.")

    def bodies(self) -> dict[str, dict[str, Score]]:
        """Return the three groups of scores by the name of their field."""
        return {"foundation": self.foundation, "domain": self.domain, "merged": self.merged}

    def fallen_since(self, before: "Cycle") -> list[str]:
        """Return a sentence for every body that scores worse on a domain than before, by more than ``FALL``."""
        earlier = before.bodies()
        return [
            f"{_BODIES[body]} does worse on '{name}' than a cycle before: {score.accuracy:.1%} of what the devices "
            f"hold out, it was {earlier[body][name].accuracy:.1%}"
            for body, scores in self.bodies().items()
            for name, score in scores.items()
            if name in earlier[body] and score.accuracy < earlier[body][name].accuracy - FALL
        ]

    def merged_below_own(self) -> list[str]:
        """Return a sentence for every domain on which the merged adapter is clearly worse than the domain's own.

        Clearly: the difference in accuracy exceeds two standard errors of a difference of two independent shares. On
        the same examples, as here, the true error is smaller.
        """
        return [
            f"the merged adapter is clearly worse on '{name}' than the domain's own: {score.accuracy:.1%} of the test "
            f"examples, the domain's own {self.foundation[name].accuracy:.1%}; use the domain's own adapter there"
            for name, score in self.merged.items()
            if name in self.foundation and _clearly_below(score, self.foundation[name])
        ]


def _clearly_below(score: Score, other: Score) -> bool:
    variances = [s.accuracy * (1.0 - s.accuracy) / max(s.num_examples, 1) for s in (score, other)]
    return other.accuracy - score.accuracy > 2.0 * math.sqrt(sum(variances))


class Baselines(Record):
    """Baselines of a run: accuracies on the same test sets, by domain. ``gaisnet baselines`` adds them.

    Trained baselines make as many passes over the examples as the network in as many cycles, ``pooled`` with the same
    LoRA rank and learning rate; ``pooled`` and ``scratch`` let it fall to zero. None trains on validation sets.
    """

    cycles: int = Field(ge=1, description="That the run had when they were measured; they speak of no other number.")

    zero_shot: dict[str, float] = Field(
        default_factory=dict, description="The FM as it is, asked; its answer may go on after the completion."
    )
    few_shot: dict[str, float] = Field(
        default_factory=dict, description="The same, with some of the domain's training examples in the prompt."
    )
    no_relay: dict[str, float] = Field(
        default_factory=dict, description="An edge alone with its devices: the DM, no relay, no cloud after the start."
    )
    pooled: dict[str, float] = Field(
        default_factory=dict, description="The FM, LoRA on all its layers, the domain's examples in one place."
    )
    scratch: dict[str, float] = Field(
        default_factory=dict, description="An edge alone: a model of the DM's size, learned from nothing, on the same."
    )


class GapClosed(Record):
    """(After - before) / (pooled - before) in accuracy, by domain; before: entry 0. null where pooled is no higher."""

    foundation: dict[str, float | None] = Field(description="The FM with the domain's adapter.")
    merged: dict[str, float | None] = Field(description="The FM with the merged adapter.")
    domain: dict[str, float | None] = Field(description="The DM.")


class Summary(Record):
    """Contents of ``summary.json``."""

    # Not named `schema`: that would hide a method of pydantic's BaseModel. The JSON key is `schema` both ways.
    schema_name: Literal["gaisnet.summary/1"] = Field("gaisnet.summary/1", alias="schema")
    seed: int
    config: dict[str, JsonValue] = Field(description="``Config.model_dump(mode='json')`` of the run.")
    model: ModelFigures
    device: DeviceFigures
    examples: dict[str, Examples] = Field(
        default_factory=dict, description="By device, as far as devices were there when the run began."
    )
    majority: dict[str, float | None] = Field(
        description="Accuracy of always naming the commonest class, by domain; null where a domain has no classes."
    )
    follows: dict[str, str] = Field(
        default_factory=dict, description="Domains without data to learn from, and the domain that each starts from."
    )
    cycles: list[Cycle] = Field(min_length=1)
    baselines: Baselines | None = Field(None, description="Once they were measured.")
    gap_closed: GapClosed | None = Field(None, description="Once there is a pooled baseline, of as many cycles.")

    def with_gaps(self) -> "Summary":
        """Return the summary with ``gap_closed`` from its last cycle and baselines."""
        baselines = self.baselines
        if baselines is None or not baselines.pooled or baselines.cycles != len(self.cycles) - 1:
            return self.model_copy(update={"gap_closed": None})
        pooled = baselines.pooled
        first, last = self.cycles[0].bodies(), self.cycles[-1].bodies()
        gaps = {
            body: {
                name: _gap(first[body][name].accuracy, last[body][name].accuracy, bound)
                for name, bound in pooled.items()
                if name in first[body] and name in last[body]
            }
            for body in GapClosed.model_fields
        }
        return self.model_copy(update={"gap_closed": GapClosed(**gaps)})

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all domains, newcomers too, in the order in which they were first scored."""
        return tuple(dict.fromkeys(name for cycle in self.cycles for name in cycle.domain))

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers for ``write_json``; a NaN stays one, to be refused there."""
        return self.model_dump(mode="json", by_alias=True)


def _gap(before: float, after: float, bound: float) -> float | None:
    return (after - before) / (bound - before) if bound > before else None


def strict_json(data: Mapping[str, Any], target: str, indent: int | None = None) -> str:
    """Return ``data`` as strict JSON. Raises ``NotFinite``, naming the entry that is NaN or infinite."""
    try:
        return json.dumps(data, allow_nan=False, indent=indent)
    except ValueError:
        for where, value in _numbers(data, ""):
            if not math.isfinite(value):
                raise NotFinite(where, f"writing {target}", value) from None
        raise  # something else, such as a circular reference: a bug, not a measurement


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write strict JSON atomically. Raises ``NotFinite`` before the file is touched, or ``OutputNotWritable``."""
    write_text(path, strict_json(data, path.name, indent=2) + "\n")


def _numbers(data: Any, where: str) -> Iterator[tuple[str, float]]:
    """Yield every float inside ``data`` with its dotted place."""
    if isinstance(data, float):
        yield where, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _numbers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _numbers(value, f"{where}.{index}")
