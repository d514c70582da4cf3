"""Additions of GaisNet to NVFlare's server process: stores inside the kit, and a way back into the job for a site.

Both rely on calls that NVFlare does not document: therefore 2.9.0 is pinned, and tested on real processes.
"""

import os
import threading
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import Job
from nvflare.apis.job_scheduler_spec import DispatchInfo
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

_FIRST_TRY_S = 1.0
_PATIENCE_S = 120.0
_NOT_DEPLOYED = "does not exist"


class KitStorage(FilesystemStorage):  # type: ignore[misc]
    """A file store in ``folder`` of the kit. NVFlare takes absolute paths only, but a kit is copied to another host."""

    def __init__(self, folder: str) -> None:
        # NVFlare's server and its job processes work in the kit's folder.
        super().__init__(root_dir=os.path.abspath(folder))


class Rejoin(FLComponent):  # type: ignore[misc]
    """Starts the job process of an edge that came back while the job goes on. NVFlare itself never does.

    Args:
        edges: Names of the edges. What others say is not listened to, since it could end the job.
    """

    def __init__(self, edges: list[str]) -> None:
        super().__init__()
        self._edges = edges

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Called by NVFlare in the thread that registers a client."""
        if event_type != EventType.CLIENT_REGISTER_PROCESSED:
            return
        peer, engine = fl_ctx.get_peer_context(), fl_ctx.get_engine()
        site = peer.get_identity_name() if peer else None
        jobs = list(engine.job_runner.running_jobs.values())
        if site in self._edges and jobs:
            # The client does not take commands before it has the answer to its registration.
            threading.Thread(target=self._bring_back, args=(engine, jobs, site), daemon=True).start()

    def _bring_back(self, engine: Any, jobs: list[Job], site: str) -> None:
        for job in jobs:
            end = time.monotonic() + _PATIENCE_S
            found = ""
            while time.monotonic() < end and job.job_id in engine.job_runner.running_jobs:
                time.sleep(_FIRST_TRY_S)
                found = self._start(engine, job, site)
                if found:
                    break
            self.logger.info(f"site {site} came back into job {job.job_id}: {found or 'no answer'}")
            if _NOT_DEPLOYED in found:
                # It was away when the job began, so that it cannot join: another job must be submitted.
                self.logger.info(f"job {job.job_id} is ended, since site {site} has never been given it")
                with engine.new_context() as fl_ctx:
                    engine.job_runner.stop_run(job.job_id, fl_ctx)

    def _start(self, engine: Any, job: Job, site: str) -> str:
        """Return the site's reply to the order to start its job process; "" without one."""
        with engine.new_context() as fl_ctx:
            ready, token = engine.check_client_resources(job, {site: {}}, fl_ctx).get(site, (False, ""))
            if not ready:
                return ""
            dispatch = DispatchInfo(app_name="app", resource_requirements={}, token=token)
            replies = engine.start_client_job(job, {site: dispatch}, fl_ctx)
        return next((str(reply.reply.body) for reply in replies if reply.reply), "")
