"""The outcome of a site's last start, in a file of its kit, readable when no process of the site is left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gaisnet.errors import GaisnetError

OUTCOME_FILE = "outcome.json"
_LONGEST = 2000  # of a reason, in characters


class Outcome(BaseModel):
    """The end of a site's last start.

    Attributes:
        stage: "running" also stands there when the site was killed, or its host went down.
        since: Unix time in seconds at which it became so.
        reason: Why it failed; "" otherwise.
        output: Folder of a cloud's run, as an absolute path; "" elsewhere.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    stage: Literal["running", "stopped", "finished", "failed"]
    since: float
    reason: str = ""
    output: str = ""


@contextmanager
def recorded(kit: Path, output: Path | None = None) -> Iterator[None]:
    """Write down how the block ends: in order, by an error, or stopped from outside.

    Args:
        kit: Folder of the site.
        output: Folder of a cloud's run.
    """
    where = str(output.resolve()) if output else ""
    _write(kit, Outcome(stage="running", since=time.time(), output=where))
    try:
        yield
    except GaisnetError as error:
        record_failure(kit, error, where)
        raise
    except (SystemExit, KeyboardInterrupt):
        _write(kit, Outcome(stage="stopped", since=time.time(), output=where))
        raise
    except Exception as error:
        record_failure(kit, error, where)
        raise
    _write(kit, Outcome(stage="finished", since=time.time(), output=where))


def record_failure(kit: Path, error: Exception, output: str = "") -> None:
    """Write down that a site has failed, and why."""
    text = str(error) if isinstance(error, GaisnetError) else f"{type(error).__name__}: {error}"
    _write(kit, Outcome(stage="failed", since=time.time(), reason=text[:_LONGEST], output=output))


def read_outcome(kit: Path) -> Outcome | None:
    """Read the last outcome that was written; None where there is none, or none that can be read."""
    try:
        return Outcome.model_validate_json((kit / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None


def _write(kit: Path, outcome: Outcome) -> None:
    """Write whole or not at all. A site whose disk is full has other errors to report."""
    part = kit / f".{OUTCOME_FILE}.part"
    with suppress(OSError):
        part.write_text(outcome.model_dump_json() + "\n", encoding="utf-8")
        part.replace(kit / OUTCOME_FILE)
