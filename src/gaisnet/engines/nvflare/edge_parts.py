"""Parts that GaisNet adds to NVFlare's client on an edge's host: they admit GaisNet's own job and no other.

An edge must not trust the cloud's host further: the holder of the cloud's kit can change its policy, and a
forged server may omit every question that an honest one asks.
"""

import json
from pathlib import Path

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from gaisnet.engines.nvflare.job_files import CLIENT_FILE, CONFIG, SERVER_FILE, client_settings
from gaisnet.engines.nvflare.kit import NARROWED

_SIGNATURES = (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE)
_KNOWN = {CONFIG, CLIENT_FILE, SERVER_FILE, *_SIGNATURES, *(f"{CONFIG}/{name}" for name in _SIGNATURES)}


class OwnJobOnly(AppValidator):  # type: ignore[misc]
    """Refuses every job but the one that GaisNet's cloud submits, before anything of it runs."""

    def validate(self, app_folder: str) -> tuple[str, dict[str, bool]]:
        """Compare the job's part for this edge, unpacked in ``app_folder``; the error is "" for GaisNet's own."""
        folder = Path(app_folder)
        foreign = sorted({str(path.relative_to(folder)) for path in folder.rglob("*")} - _KNOWN)
        if foreign:
            return _refusal(f"it brings '{foreign[0]}'"), {}
        try:
            settings = json.loads((folder / CLIENT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return _refusal(f"its '{CLIENT_FILE}' cannot be read ({type(error).__name__})"), {}
        return ("" if settings == client_settings() else _refusal(f"its '{CLIENT_FILE}' is another")), {}


def _refusal(found: str) -> str:
    return f"this edge runs GaisNet's own job only: {found}"


class NarrowedJobLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Starts job processes that take as few commands as the client itself; see ``narrowed``."""

    def get_command(self, job_meta: dict[str, object], fl_ctx: FLContext) -> str:
        """Return the command line of a job's process, which NVFlare splits as a shell would."""
        arguments = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
        flag, module = arguments[JobProcessArgs.EXE_MODULE]
        narrowed = {**arguments, JobProcessArgs.EXE_MODULE: (flag, f"{NARROWED} {module}")}
        fl_ctx.set_prop(FLContextKey.JOB_PROCESS_ARGS, narrowed, private=True, sticky=False)
        return str(super().get_command(job_meta, fl_ctx))
