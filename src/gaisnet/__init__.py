r"""GaisNet: a foundation model and domain models make each other better, while the data stays on the devices.

::

    for cycle in gaisnet.run("my.yaml", out="runs/first"):
        print(cycle.domain["maintenance"].accuracy)

    with gaisnet.open_run("runs/first").answers() as answers:
        print(answers.generate("Report: the pump is loud\nFault:"))

The names below are the public interface (docs/own-data.md); everything else may change without notice.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from gaisnet.openmp import set_wait_policy

if TYPE_CHECKING:
    from gaisnet.config import Config
    from gaisnet.config.file import load_config
    from gaisnet.runs.api import Answers, FinishedRun, RunningRun, open_run, resume, run

__all__ = [
    "Answers",
    "Config",
    "FinishedRun",
    "RunningRun",
    "__version__",
    "load_config",
    "open_run",
    "resume",
    "run",
]

__version__ = metadata.version("gaisnet")
_HOMES = {
    "Config": "gaisnet.config",
    "load_config": "gaisnet.config.file",
    **dict.fromkeys(("Answers", "FinishedRun", "RunningRun", "open_run", "resume", "run"), "gaisnet.runs.api"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gaisnet' has no attribute '{name}'")
    set_wait_policy()
    return getattr(import_module(_HOMES[name]), name)
