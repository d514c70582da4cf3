"""``NAME.json`` of an experiment: every row as soon as it is measured, and the machine that measured it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gaisnet.checkpoint import write_text
from gaisnet.errors import ConfigError
from gaisnet.research.paper.claims import Finding
from gaisnet.research.paper.experiment import Experiment, Row


class Machine(BaseModel):
    """The machine and the versions of a measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cores: int
    threads: int = Field(description="That torch computes with.")
    processor: str
    system: str
    python: str
    torch: str
    transformers: str
    gaisnet: str

    @classmethod
    def present(cls) -> Self:
        """Describe this machine."""
        return cls(
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            processor=platform.machine(),
            system=platform.system(),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            gaisnet=version("gaisnet"),
        )


class Result(BaseModel):
    """Contents of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.paper/1", alias="schema", pattern="^gaisnet.paper/1$")
    experiment: str
    quick: bool
    method: str = Field(description="What was done, in the experiment's words, and how it is judged.")
    machine: Machine
    rows: tuple[Row, ...] = ()

    @property
    def seconds(self) -> float:
        """Return the wall time of all rows, in seconds."""
        return sum(row.seconds for row in self.rows)

    def with_row(self, row: Row) -> Self:
        """Return a copy with one more row."""
        return self.model_copy(update={"rows": (*self.rows, row)})

    def finding_of(self, experiment: Experiment) -> Finding | None:
        """Judge all rows; None while some are missing."""
        rows = self.rows_of(experiment)
        return experiment.judge(rows) if len(rows) == len(experiment.units(self.quick)) else None

    def rows_of(self, experiment: Experiment) -> list[Row]:
        """Return the rows of the experiment's present conditions, in their order.

        Fewer than its units while some are missing.
        """
        rows = {row.key: row for row in self.rows}
        return [rows[key] for key in experiment.units(self.quick) if key in rows]


def path_of(out: Path, name: str) -> Path:
    """Return the path of an experiment's file."""
    return out / f"{name}.json"


def method_of(experiment: Experiment) -> str:
    """Return a description of the method; rows measured by another one are refused."""
    return f"{experiment.method} {experiment.rule}"


def read_result(out: Path, experiment: Experiment, quick: bool) -> Result | None:
    """Read the rows measured so far; None if there are none.

    Raises ``ConfigError`` if the file is not a result, comes from a quick run and this one is not (or the reverse), or
    was measured by another method or with other versions.
    """
    name = experiment.name
    path = path_of(out, name)
    asked, do = f"results '{path}'", "choose another folder with --out, or remove the file"
    try:
        text = path.read_text(encoding="utf-8")
        result = Result.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(asked, f"cannot be read ({error})", do) from error
    if result.experiment != name:
        raise ConfigError(asked, f"are those of '{result.experiment}'", do)
    if result.quick != quick:
        found = f"were measured {'with' if result.quick else 'without'} --quick, and this run is of the other kind"
        raise ConfigError(asked, found, do)
    if result.method != method_of(experiment):
        raise ConfigError(asked, "were measured by another method, or are judged by another rule", do)
    now = Machine.present()
    for package in ("gaisnet", "torch", "transformers"):
        then, here = getattr(result.machine, package), getattr(now, package)
        if then != here:
            raise ConfigError(asked, f"were measured with {package} {then}, here is {here}", do)
    return result


def write_result(out: Path, result: Result) -> None:
    """Write the file whole or not at all. Raises ``OutputNotWritable``."""
    write_text(path_of(out, result.experiment), result.model_dump_json(indent=1) + "\n")
