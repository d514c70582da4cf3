"""Runs a module of NVFlare's client with only those commands that GaisNet's job needs.

``python -m gaisnet.engines.nvflare.narrowed MODULE ARGUMENTS...`` is ``python -m MODULE ARGUMENTS...`` where MODULE is
NVFlare's client or a job process of it. NVFlare asks the edge's policy before a command only where the message says so,
and a thief's server need not say so. So a command that is not listed here does not exist: no shell commands, no log
settings, no reports of the host, no deletion, restart or shutdown.
"""

import runpy
import sys

from nvflare.private.fed.client.admin_commands import AbortCommand, AdminCommands, CheckStatusCommand
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.scheduler_cmds import CancelResourceProcessor, CheckResourceProcessor, StartJobProcessor
from nvflare.private.fed.client.training_cmds import AbortAppProcessor, DeployProcessor, NotifyJobStatusProcessor

TO_CLIENT = (
    CheckResourceProcessor,
    CancelResourceProcessor,
    DeployProcessor,
    StartJobProcessor,
    NotifyJobStatusProcessor,
    AbortAppProcessor,
)
"""A job's way to an edge: asked for room, handed out, started, followed, ended."""

TO_JOB = (CheckStatusCommand, AbortCommand)


def narrow() -> None:
    """Leave out all other commands of this process's NVFlare, to the client as to its job processes."""
    ClientRequestProcessors.request_processors[:] = [processor() for processor in TO_CLIENT]
    AdminCommands.commands[:] = [command() for command in TO_JOB]


if __name__ == "__main__":
    narrow()
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
