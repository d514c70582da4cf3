"""Answers of a finished run, as ratios of two things done in turn in one process, round after round.

The run is not changed: anything trained here is discarded.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from gaisnet.checkpoint import write_text
from gaisnet.engines.local_serving import num_cores
from gaisnet.errors import MeasureError
from gaisnet.progress import Progress, silent
from gaisnet.research.bench.escalation import AutoFigures, measure_auto
from gaisnet.research.bench.interference import InterferenceFigures, beside_learning
from gaisnet.research.bench.rounds import Effort, Rounds
from gaisnet.research.bench.sessions import Batch, Single, batch, single, speculation
from gaisnet.research.bench.spread import Spread
from gaisnet.research.bench.writing import Writers, in_one_piece
from gaisnet.runs.answering_device import device_of
from gaisnet.runs.served_run import ServedRun, serve_run
from gaisnet.serving.generation.routing import Place, Target

FILE_NAME = "serving.json"


class Ratios(BaseModel):
    """The purpose of the command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    single_vs_generate: Spread = Field(description="Tokens/s of one session, split, over transformers' generate.")
    batch16_vs_single: Spread = Field(
        description="Tokens/s of 16 sessions at once over those of one, once all have read their prompts."
    )
    p95_tuning_vs_idle: Spread = Field(
        description="Time between tokens, 95th percentile, with fine-tuning over without."
    )
    tuning_speed_kept: Spread = Field(
        description="Speed of a round of fine-tuning while it answers over that while it does not."
    )
    tokens_per_cloud_call: Spread = Field(description="Tokens of speculative answers per call to the FM's body.")


class Same(BaseModel):
    """Shares of answers that equal the reference model's, token for token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_answers: int
    edge: int = Field(description="Of the DM, split, and the DM in one piece.")
    cloud: int = Field(description="Of the FM, split, and the FM in one piece.")
    speculative: int = Field(description="Of the FM with the domain's adapter, with drafts and without.")


class ServingFigures(BaseModel):
    """Contents of ``serving.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.serving/2", alias="schema", pattern="^gaisnet.serving/2$")
    run: str
    cores: int
    torch: str
    ratios: Ratios
    auto: dict[str, AutoFigures] = Field(
        description="By domain, on its own examples; as 'DOMAIN+others' on a mix with those of other domains."
    )
    same: Same
    by_body: dict[str, dict[str, Spread]] = Field(description="What the ratios are made of, for 'edge' and 'cloud'.")


def measure_serving(run: Path, effort: Effort | None = None, progress: Progress = silent) -> ServingFigures:
    """Measure a finished run; its folder is locked meanwhile. Raises ``GaisnetError``."""

    def told(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if stage != "fine_tune":  # a measurement reports its own rounds
            progress(stage, done, total, figures)

    with serve_run(run, (), told) as served:
        for name, found in served.absent.items():
            raise MeasureError(f"how well '{run}' answers", f"the examples of device '{name}' are not there ({found})")
        return _measure(run.name, served, effort or Effort(), progress)


def write_figures(figures: ServingFigures, path: Path) -> None:
    """Write the figures to a file. Raises ``OutputNotWritable``."""
    write_text(path, figures.model_dump_json(indent=2) + "\n")


def _measure(run: str, served: ServedRun, effort: Effort, progress: Progress) -> ServingFigures:
    """Take all figures with the models as they are; fine-tuning comes last."""
    device = device_of(served, None)
    home, domain = device.domain, device.domains[device.domain]
    writers = Writers(device.parts, served.bodies)
    rounds = Rounds([each.prompt for each in domain.held_out], effort, progress)
    targets: dict[Place, Target] = {"edge": Target("edge", domain.adapters, home), "cloud": Target("cloud", (), home)}
    singles = {
        place: single(writers, target, in_one_piece(served, device, place), rounds, f"single_{place}")
        for place, target in targets.items()
    }
    many = {place: batch(writers, target, rounds, f"batch_{place}") for place, target in targets.items()}
    checker = Target("cloud", domain.foundation_adapters, home)
    speculated = speculation(writers, targets["edge"], checker, rounds)
    auto = {key: found for name in device.domains for key, found in measure_auto(device, name, progress).items()}
    beside = beside_learning(writers, targets["edge"], served.bodies.network, rounds)
    return ServingFigures(
        run=run,
        cores=num_cores(),
        torch=torch.__version__,
        ratios=Ratios(
            single_vs_generate=_worst(one.ratio for one in singles.values()),
            batch16_vs_single=_worst(one.ratio for one in many.values()),
            p95_tuning_vs_idle=beside.tuning_vs_idle,
            tuning_speed_kept=beside.speed_kept,
            tokens_per_cloud_call=speculated.tokens_per_check,
        ),
        auto=auto,
        same=Same(
            num_answers=effort.rounds * effort.prompts,
            edge=singles["edge"].num_same,
            cloud=singles["cloud"].num_same,
            speculative=speculated.num_same,
        ),
        by_body=_by_body(singles, many, beside),
    )


def _worst(ratios: Iterable[Spread]) -> Spread:
    """Return the lowest figure over all bodies."""
    return min(ratios, key=lambda spread: spread.median)


def _by_body(
    singles: Mapping[Place, Single], many: Mapping[Place, Batch], beside: InterferenceFigures
) -> dict[str, dict[str, Spread]]:
    """Return the figures behind the ratios; the DM is the one that is trained."""
    found: dict[str, dict[str, Spread]] = {
        place: {
            "single_tokens_per_s": one.split,
            "generate_tokens_per_s": one.whole,
            "single_vs_generate": one.ratio,
            "batch_tokens_per_s": many[place].many,
            "batch16_vs_single": many[place].ratio,
            "batch16_vs_single_with_prompts": many[place].ratio_with_prompts,
        }
        for place, one in singles.items()
    }
    found["edge"] |= {"p95_idle_s": beside.idle_s, "p95_tuning_s": beside.tuning_s}
    return found
