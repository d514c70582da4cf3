"""The one job of a network in NVFlare's form: written by the cloud, compared by every edge with the job it knows.

No NVFlare here: both its client's process and the session that submits the job read this.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOB_NAME = "gaisnet"
CLOUD_CLASS = "gaisnet.engines.nvflare.bridge.CloudBridge"
EDGE_CLASS = "gaisnet.engines.nvflare.bridge.EdgeBridge"
CONFIG = "config"
SERVER_FILE = f"{CONFIG}/config_fed_server.json"
CLIENT_FILE = f"{CONFIG}/config_fed_client.json"


def write_job(folder: Path, edges: Sequence[str]) -> Path:
    """Write the job to ``folder/gaisnet`` and return that folder.

    Args:
        folder: An existing folder.
        edges: Names of the edges that take part.
    """
    job = folder / JOB_NAME
    # By name: a device's certificate opens NVFlare's door too, and a member of a job can end it for all.
    sites = ["server", *edges]
    # min_clients 1: with more, an edge that is away for a minute would end the job for all.
    meta = {"name": JOB_NAME, "min_clients": 1, "deploy_map": {"app": sites}, "resource_spec": {}}
    files = {
        "meta.json": meta,
        f"app/{SERVER_FILE}": _server_settings(edges),
        f"app/{CLIENT_FILE}": client_settings(),
    }
    for name, content in files.items():
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return job


def client_settings() -> dict[str, Any]:
    """The edges' part of the job; the same at every edge, since a bridge finds a site's settings in its kit."""
    edge = {"tasks": ["*"], "executor": {"path": EDGE_CLASS, "args": {}}}
    return {"format_version": 2, "executors": [edge], **_no_filters()}


def _server_settings(edges: Sequence[str]) -> dict[str, Any]:
    cloud = {"id": "bridge", "path": CLOUD_CLASS, "args": {"edges": list(edges)}}
    return {"format_version": 2, "workflows": [cloud], **_no_filters()}


def _no_filters() -> dict[str, Any]:
    return {"components": [], "task_data_filters": [], "task_result_filters": []}
