"""NVFlare's own processes, with mutual TLS on loopback; the residents are listeners of this process."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.flare_api.api_spec import TargetType
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from gaisnet.deployment.launcher import Launcher
from gaisnet.engines.nvflare.job_files import write_job
from gaisnet.engines.nvflare.kit import ORDERS, read_seal
from gaisnet.engines.nvflare.provision import ADMIN
from gaisnet.errors import ConfigError, LinkLost, PeerError
from gaisnet.transport.stream import ByteLink
from tests.engines.nvflare.sites import EDGES, Handle, Sites, plans, running, until
from tests.engines.nvflare.thief import ANSWERS as ANSWERS_FILE
from tests.engines.nvflare.thief import ORDERS as ORDERS_FILE
from tests.engines.nvflare.thief import open_the_server, write_evil_job

START_S = 60


def answer(name: str, payload: bytes) -> bytes:
    if payload == b"fail":
        raise ConfigError("cycles", "is 0", "use 1 or more")
    return payload[::-1]


def ask_again(link: ByteLink, payload: bytes, timeout_s: float = 30) -> bytes:
    """As the cloud does: a job that ends takes the requests with it, also those sent before the next one dials."""
    for _ in range(5):
        with contextlib.suppress(LinkLost):
            return link.send(payload).result(timeout_s)
    raise AssertionError("lost five times")


def parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def shows(file: Path, secret: bytes) -> bool:
    content = file.read_bytes()
    return secret in content or secret.hex().encode() in content


def _is_refused(session: Session, job: str) -> bool:
    return "runs GaisNet's own job only" in str(session.get_job_meta(job))


@pytest.mark.integration
def test_requests_of_the_cloud_reach_the_edges_and_a_thief_of_its_kit_runs_nothing_there(tmp_path: Path) -> None:
    handles: dict[str, Handle] = {"edge1": answer, "edge2": lambda name, payload: payload}
    with running(tmp_path, handles, change=open_the_server) as sites, sites.keeper() as keeper:
        links = {edge: sites.link(edge) for edge in EDGES}
        assert links["edge1"].send(b"abc").result(START_S) == b"cba"
        assert links["edge2"].send(b"abc").result(START_S) == b"abc"

        for size in (0, 1024, 8 * 2**20):
            payload = os.urandom(size)
            answers = [links[edge].send(payload) for edge in EDGES]
            assert answers[0].result(30) == payload[::-1]
            assert answers[1].result(30) == payload

        with pytest.raises(PeerError) as caught:
            links["edge1"].send(b"fail").result(30)
        assert (caught.value.peer_name, caught.value.kind) == (ORDERS + "edge1", "ConfigError")
        assert caught.value.text == "cycles: is 0; use 1 or more"

        assert until(lambda: keeper.describe().endswith("is running"), 10)
        job = keeper.describe().split()[1]
        _rob(sites, tmp_path, job)
        assert keeper.describe() == f"job {job} is running"
        assert links["edge1"].send(b"still here").result(30) == b"ereh llits"

        began = time.monotonic()
        keeper.close()
        assert time.monotonic() - began < 15
        assert keeper.describe() == "closed"
        assert until(lambda: not any(sites.connected().values()), 10)
    assert {state.stage for state in sites.launcher.states().values()} == {"stopped"}
    assert {state.starts for state in sites.launcher.states().values()} == {1}
    # Neither the job nor any log of NVFlare's processes shows a secret.
    for secret in (read_seal(sites.kits[edge], edge) for edge in EDGES):
        held = {file for file in tmp_path.rglob("*") if file.is_file() and shows(file, secret)}
        assert all(file.parent.name in ("seals", ".seals") for file in held)
        assert len(held) == 3


def _rob(sites: Sites, folder: Path, job: str) -> None:
    """All that a thief of the cloud's kit can send to edges: by a server of his own, as administrator, and by jobs."""
    cloud = sites.kits["cloud"]
    orders = [
        {"topic": "sys.shell", "body": "cat local/gaisnet.json"},
        {"topic": "sys.configure_site_log", "body": "debug"},
        {"topic": "sys.report_env", "body": ""},
        {"topic": "train.restart", "body": ""},
        {"topic": "train.shutdown", "body": ""},
        {"topic": "train.delete_run", "body": "", "headers": {"job_id": job}},
        {"topic": "configure_job_log", "body": "debug", "job": job},
    ]
    (cloud / "part").write_text(json.dumps(orders), encoding="utf-8")
    (cloud / "part").rename(cloud / ORDERS_FILE)
    with admin_session(sites.kits[ADMIN]) as session:
        steals: tuple[Callable[[], Any], ...] = (
            lambda: session.get_working_directory("edge1"),
            lambda: session.ls_target("edge1", "-la", "startup"),
            lambda: session.cat_target("edge1", "", "local/gaisnet.json"),
            lambda: session.get_client_env(["edge1"]),
            lambda: session.report_resources(TargetType.CLIENT, ["edge1"]),
        )
        for steal in steals:
            assert "invalid_request" in str(steal())
        marker, honest = folder / "ran-on-the-edge", write_job(folder / "honest", EDGES)
        for module in ("evil", "gaisnet.evil"):
            evil = session.submit_job(str(write_evil_job(folder / module, module, marker, honest)))
            assert until(partial(_is_refused, session, evil), START_S)
    assert not marker.exists()
    assert until((cloud / ANSWERS_FILE).exists, START_S)
    answers = json.loads((cloud / ANSWERS_FILE).read_text(encoding="utf-8"))
    assert len(answers) == len(orders)
    assert all(len(told) == len(EDGES) and all("invalid_request" in one for one in told) for told in answers)


@contextlib.contextmanager
def admin_session(kit: Path) -> Iterator[Session]:
    user = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]["username"]
    session = new_secure_session(user, str(kit), timeout=10)
    try:
        yield session
    finally:
        session.close()


@pytest.mark.slow
@pytest.mark.integration
def test_a_request_is_answered_although_the_client_was_killed(tmp_path: Path) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(name: str, payload: bytes) -> bytes:
        asked.set()
        go_on.wait(60)
        return payload

    with running(tmp_path, {"edge1": slow, "edge2": answer}) as sites, sites.keeper() as keeper:
        outstanding = sites.link("edge1").send(b"slow")
        assert asked.wait(START_S)
        job = keeper.describe()
        os.kill(sites.pid("edge1"), signal.SIGKILL)
        assert until(lambda: sites.launcher.states()["edge1"].starts == 2, 10)
        assert sites.link("edge2").send(b"ab").result(30) == b"ba"
        go_on.set()
        assert outstanding.result(60) == b"slow"
        assert until(lambda: keeper.describe() == job, 10)
        assert sites.link("edge1").send(b"again").result(30) == b"again"


@pytest.mark.slow
@pytest.mark.integration
def test_the_job_is_submitted_again_after_the_server_was_killed(tmp_path: Path) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(name: str, payload: bytes) -> bytes:
        asked.set()
        go_on.wait(60)
        return payload

    with running(tmp_path, {"edge1": slow, "edge2": answer}) as sites, sites.keeper() as keeper:
        outstanding = sites.link("edge1").send(b"slow")
        assert asked.wait(START_S)
        job = keeper.describe()
        os.kill(sites.pid("server"), signal.SIGKILL)
        go_on.set()
        with pytest.raises(LinkLost):
            outstanding.result(90)
        assert ask_again(sites.link("edge1"), b"again", 30) == b"again"
        assert ask_again(sites.link("edge2"), b"ab", 30) == b"ba"
        assert until(lambda: keeper.describe().endswith("is running"), 10)
        assert keeper.describe() != job


@pytest.mark.slow
@pytest.mark.integration
def test_the_job_is_submitted_again_after_a_job_process_was_killed(tmp_path: Path) -> None:
    with running(tmp_path, {edge: answer for edge in EDGES}) as sites, sites.keeper() as keeper:
        assert ask_again(sites.link("edge1"), b"ab", START_S) == b"ba"
        assert until(lambda: keeper.describe().endswith("is running"), 10)
        job = keeper.describe()
        children = [pid for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == sites.pid("edge1")]
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        assert children
        assert until(lambda: keeper.describe().endswith("is running") and keeper.describe() != job, 90)
        for edge in EDGES:
            assert ask_again(sites.link(edge), b"ab", 30) == b"ba"


@pytest.mark.slow
@pytest.mark.integration
def test_a_job_of_an_earlier_life_of_the_cloud_is_aborted(tmp_path: Path) -> None:
    with running(tmp_path, {edge: answer for edge in EDGES}) as sites:
        with sites.keeper() as first:
            assert ask_again(sites.link("edge1"), b"ab", START_S) == b"ba"
            first_life = sites.life("edge1")
            session = first._session
            assert session is not None
            session.kill()
            first._closing.set()
        with sites.keeper() as second:
            assert until(lambda: sites.life("edge1") != first_life, START_S)
            assert ask_again(sites.link("edge1"), b"ab", START_S) == b"ba"
            assert until(lambda: second.describe().endswith("is running"), START_S)
            # Only one job dials the cloud: a second one would take the link from it again and again.
            lives = set()
            for _ in range(20):
                lives.add(sites.life("edge1"))
                time.sleep(0.2)
            assert len(lives) == 1


@pytest.mark.slow
@pytest.mark.integration
def test_a_site_that_was_away_when_the_job_began_gets_another_job(tmp_path: Path) -> None:
    with running(tmp_path, {edge: answer for edge in EDGES}, start=["server", "edge1"]) as sites:
        with sites.keeper(("edge1",)) as keeper:
            assert ask_again(sites.link("edge1"), b"ab", START_S) == b"ba"
            assert until(lambda: keeper.describe().endswith("is running"), 10)
            job = keeper.describe()
            late = Launcher(plans(sites.kits)[2:])
            with late:
                assert until(lambda: keeper.describe().endswith("is running") and keeper.describe() != job, 60)
                assert ask_again(sites.link("edge1"), b"ab", START_S) == b"ba"


@pytest.mark.slow
@pytest.mark.integration
def test_a_large_request(tmp_path: Path) -> None:
    payload = os.urandom(200 * 2**20)
    with running(tmp_path, {edge: answer for edge in EDGES}) as sites, sites.keeper():
        assert sites.link("edge1").send(b"ab").result(START_S) == b"ba"
        assert sites.link("edge1").send(payload).result(240) == payload[::-1]
