"""One session with NVFlare's server: submits the job, watches it, submits it again. A process of its own, see ``job``.

Its one argument is a JSON object; on standard output it reports states, one JSON object per line. It ends, and aborts
the job, when its standard input ends. The job holds no settings of a site: the bridges find them in the kit of the
host they run on.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from gaisnet.engines.nvflare.job_files import JOB_NAME, write_job

_WATCH_S = 2.0
_CONNECT_S = 5.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0
_LEAVE_S = 13.0
_ON_ITS_WAY = ("SUBMITTED", "APPROVED", "DISPATCHED")


class JobWatch:
    """Keeps one job running over an open session.

    Args:
        session: Session of the administrator.
        edges: Names of the edges; a job is submitted when all of them are connected.
        job: Id of the job that is already ours, or "".
        server: Start time of the server it was submitted to.
    """

    def __init__(self, session: Session, edges: Sequence[str], job: str, server: object) -> None:
        self._session = session
        self._edges = list(edges)
        self._job = job
        self._server = server
        self._submitted = -_LONGEST_PAUSE_S
        self._pause_s = 0.0
        self._state = ""

    def keep(self, closing: threading.Event) -> None:
        """Watch the job until ``closing`` is set, then abort it."""
        self._abort_stale()
        while not closing.is_set():
            self.look()
            closing.wait(_WATCH_S)
        if self._job:
            self._session.abort_job(self._job)

    def look(self) -> None:
        """Check the job, and submit it if it is not running."""
        info = self._session.get_system_info()
        missing = sorted(set(self._edges) - {client.name for client in info.client_info})
        if self._job and self._is_alive(info):
            self.tell(f"job {self._job} is running" + (f"; away: {', '.join(missing)}" if missing else ""))
        elif missing:
            self.tell(f"waiting for {', '.join(missing)} to connect")
        elif time.monotonic() >= self._submitted + self._pause_s:
            self._submit(info.server_info.start_time)

    def tell(self, state: str) -> None:
        """Report the state on standard output, once."""
        if state != self._state:
            sys.stdout.write(json.dumps({"state": state, "job": self._job, "server": self._server}) + "\n")
            sys.stdout.flush()
        self._state = state

    def _is_alive(self, info: Any) -> bool:
        """Return whether the job is alive, by what the server runs.

        After a crash its job store says RUNNING forever.
        """
        if any(job.job_id == self._job for job in info.job_info):
            if time.monotonic() - self._submitted > _STEADY_S:
                self._pause_s = 0.0
            return True
        if info.server_info.start_time != self._server:
            self.tell(f"job {self._job} is over: NVFlare's server was started again")
            return False
        status = self._session.get_job_status(self._job)
        if status not in _ON_ITS_WAY:
            self.tell(f"job {self._job} is over: {status}")
        return status in _ON_ITS_WAY

    def _submit(self, server: object) -> None:
        """Submit the job; the pause before the next attempt grows while jobs do not last."""
        self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        with tempfile.TemporaryDirectory() as folder:
            self._job = self._session.submit_job(str(write_job(Path(folder), self._edges)))
        self._server, self._submitted = server, time.monotonic()
        self.tell(f"job {self._job} is submitted")

    def _abort_stale(self) -> None:
        """Abort jobs of an earlier incarnation of the cloud: their bridges would carry requests too."""
        running = {job.job_id for job in self._session.get_system_info().job_info}
        for job in self._session.list_jobs(name_prefix=JOB_NAME):
            number, status = job["job_id"], job["status"]
            if number != self._job and (number in running or status in _ON_ITS_WAY):
                self.tell(f"aborting job {number} of an earlier life")
                with suppress(Exception):
                    self._session.abort_job(number)


def _set_at_end_of_input(closing: threading.Event) -> None:
    while sys.stdin.buffer.read(1024):
        pass
    closing.set()
    # A call to a server that is away may take longer than anybody waits.
    time.sleep(_LEAVE_S)
    os._exit(1)


def main(order: dict[str, Any]) -> int:
    """Hold one session; the exit code is 1 if it broke off."""
    closing = threading.Event()
    threading.Thread(target=_set_at_end_of_input, args=(closing,), daemon=True).start()
    watch = JobWatch(None, order["edges"], order["job"], order["server"])
    # NVFlare raises a dozen unrelated classes, bare Exception and RuntimeError among them. Whatever it is, the session
    # cannot be trusted after it, and the next one may be better.
    try:
        session = new_secure_session(order["user"], order["kit"], timeout=_CONNECT_S)
        watch = JobWatch(session, order["edges"], order["job"], order["server"])
        watch.keep(closing)
        session.close()
    except Exception as error:
        watch.tell(f"NVFlare's server does not answer as it should ({type(error).__name__}: {error})")
        return 1
    return 0


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    # Threads of the session would keep the process for a while.
    os._exit(code)
