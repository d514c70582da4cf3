import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gaisnet.engines.nvflare.job import JobKeeper
from gaisnet.engines.nvflare.job_files import write_job
from gaisnet.engines.nvflare.job_session import JobWatch
from gaisnet.errors import KitUnreadable
from tests.engines.nvflare.sites import free_ports, until


class Session:
    """What ``JobWatch`` uses of NVFlare's session."""

    def __init__(self) -> None:
        self.clients = ["edge1", "edge2"]
        self.running: list[str] = []
        self.status: dict[str, str] = {}
        self.server_start = 1.0
        self.submitted: list[dict[str, Any]] = []
        self.aborted: list[str] = []

    def get_system_info(self) -> SimpleNamespace:
        return SimpleNamespace(
            server_info=SimpleNamespace(start_time=self.server_start),
            client_info=[SimpleNamespace(name=name) for name in self.clients],
            job_info=[SimpleNamespace(job_id=job) for job in self.running],
        )

    def get_job_status(self, job: str) -> str:
        return self.status[job]

    def list_jobs(self, name_prefix: str) -> list[dict[str, str]]:
        assert name_prefix == "gaisnet"
        return [{"job_id": job, "status": status} for job, status in self.status.items()]

    def submit_job(self, folder: str) -> str:
        self.submitted.append(json.loads((Path(folder) / "meta.json").read_text()))
        job = f"job{len(self.submitted)}"
        self.status[job] = "SUBMITTED"
        return job

    def abort_job(self, job: str) -> None:
        self.aborted.append(job)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]


def watch(session: Session, job: str = "", server: object = None) -> JobWatch:
    return JobWatch(session, ["edge1", "edge2"], job, server)


def test_a_job_is_submitted_when_every_edge_is_connected(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    session.clients = ["edge2"]
    watched = watch(session)
    watched.look()
    assert session.submitted == []
    session.clients = ["edge2", "edge1", "another"]
    watched.look()
    watched.look()
    assert len(session.submitted) == 1
    session.running, session.status["job1"] = ["job1"], "RUNNING"
    watched.look()
    session.clients = ["edge1"]
    watched.look()
    assert told(capsys) == [
        "waiting for edge1 to connect",
        "job job1 is submitted",
        "job job1 is running",
        "job job1 is running; away: edge2",
    ]


def test_a_job_that_is_over_is_submitted_again_with_pauses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("gaisnet.engines.nvflare.job_session.time", SimpleNamespace(monotonic=lambda: now))
    session = Session()
    watched = watch(session)
    submitted_at = []
    for _ in range(100):
        before = len(session.submitted)
        watched.look()
        if len(session.submitted) > before:
            submitted_at.append(now - 1000)
        session.status = dict.fromkeys(session.status, "FINISHED:EXECUTION_EXCEPTION")
        now += 1
    assert submitted_at == [0, 1, 3, 7, 15, 31, 61, 91]
    assert "job job1 is over: FINISHED:EXECUTION_EXCEPTION" in told(capsys)


def test_a_job_that_the_store_calls_running_after_the_server_died_is_submitted_again() -> None:
    session = Session()
    session.status = {"old": "RUNNING"}
    session.server_start = 2.0
    watch(session, "old", 1.0).look()
    assert len(session.submitted) == 1


def test_our_own_job_survives_a_new_session() -> None:
    session = Session()
    session.status, session.running = {"ours": "RUNNING"}, ["ours"]
    watched = watch(session, "ours", 1.0)
    watched._abort_stale()
    watched.look()
    assert session.aborted == []
    assert session.submitted == []


def test_jobs_of_an_earlier_life_are_aborted() -> None:
    session = Session()
    session.status = {"a": "RUNNING", "b": "RUNNING", "c": "SUBMITTED", "d": "FINISHED:ABORTED"}
    session.running = ["a"]
    watch(session)._abort_stale()
    assert session.aborted == ["a", "c"]


def test_the_job_names_classes_and_no_settings_of_a_site(tmp_path: Path) -> None:
    job = write_job(tmp_path, ["edge1"])
    text = "".join(path.read_text() for path in job.rglob("*.json"))
    assert {str(path.relative_to(job)) for path in job.rglob("*.json")} == {
        "meta.json",
        "app/config/config_fed_server.json",
        "app/config/config_fed_client.json",
    }
    assert "CloudBridge" in text
    assert "EdgeBridge" in text
    assert json.loads((job / "meta.json").read_text())["deploy_map"] == {"app": ["server", "edge1"]}
    assert "port" not in text
    assert ".key" not in text


def admin_kit(folder: Path, port: int) -> Path:
    (folder / "startup").mkdir()
    (folder / "transfer").mkdir()
    admin = {"admin": {"username": "admin@net.example", "host": "localhost", "port": port}}
    (folder / "startup" / "fed_admin.json").write_text(json.dumps(admin))
    return folder


def test_a_server_that_is_away(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    keeper = JobKeeper(admin_kit(tmp_path, port), ["edge1"])
    assert keeper.describe() == "not started"
    keeper.start()
    assert until(lambda: keeper.describe() == f"NVFlare's server cannot be reached at localhost:{port}", 5)
    began = time.monotonic()
    keeper.close()
    assert time.monotonic() - began < 3
    assert keeper.describe() == "closed"


def test_close_without_start(tmp_path: Path) -> None:
    JobKeeper(admin_kit(tmp_path, 1), []).close()


def test_a_folder_that_is_no_admin_kit(tmp_path: Path) -> None:
    with pytest.raises(KitUnreadable, match=r"fed_admin\.json"):
        JobKeeper(tmp_path, [])
