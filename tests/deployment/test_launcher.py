import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gaisnet.deployment import processes
from gaisnet.deployment.launcher import Launcher, ProcessPlan, Restarts
from gaisnet.errors import ProcessFailed

# Starts a child in a session of its own, as NVFlare does; writes its id; neither listens to SIGTERM.
PARENT = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"],
                         start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
LAUNCH = """
import pathlib, sys, time
from gaisnet.deployment.launcher import Launcher, ProcessPlan
folder = pathlib.Path(sys.argv[1])
command = (sys.executable, "-S", "-c", sys.argv[2], str(folder / "child"))
launcher = Launcher([ProcessPlan("site", command, folder / "site.log")])
launcher.start()
(folder / "site").write_text(str(launcher.states()["site"].pid))
time.sleep(600)
"""
SLEEP = "import time; time.sleep(600)"


def plan(
    tmp_path: Path, name: str, code: str, *arguments: str, finish: bool = False, grace_s: float = 2
) -> ProcessPlan:
    command = (sys.executable, "-S", "-u", "-c", code, *arguments)
    return ProcessPlan(name, command, tmp_path / f"{name}.log", may_finish=finish, grace_s=grace_s)


def alive(process: int) -> bool:
    """Running: neither gone nor a zombie."""
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False


def exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def until(true: Callable[[], bool], timeout_s: float = 10) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def number_in(path: Path) -> int:
    assert until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def pid(launcher: Launcher, name: str) -> int:
    found = launcher.states()[name].pid
    assert found is not None
    return found


@pytest.fixture
def stop_later() -> Iterator[list[Launcher]]:
    launchers: list[Launcher] = []
    yield launchers
    for launcher in launchers:
        launcher.stop()


def test_runs_each_process_with_its_own_log_and_environment(tmp_path: Path) -> None:
    code = "import os; print('hello', os.environ['WHO'])"
    plans = [
        ProcessPlan(who, (sys.executable, "-c", code), tmp_path / "logs" / who, {"WHO": who}, may_finish=True)
        for who in ("a", "b")
    ]
    with Launcher(plans) as launcher:
        assert launcher.wait("a", 10)
        assert launcher.wait("b", 10)
        assert launcher.states()["a"].exit_code == 0
    assert (tmp_path / "logs" / "a").read_text() == "hello a\n"
    assert (tmp_path / "logs" / "b").read_text() == "hello b\n"


def test_wait_tells_when_a_process_goes_on(tmp_path: Path) -> None:
    with Launcher([plan(tmp_path, "long", SLEEP, finish=True)]) as launcher:
        assert not launcher.wait("long", 0.2)


def test_stop_is_quick_with_processes_that_listen(tmp_path: Path) -> None:
    launcher = Launcher([plan(tmp_path, name, SLEEP, grace_s=30) for name in "abcd"])
    launcher.start()
    numbers = [pid(launcher, name) for name in "abcd"]
    assert until(lambda: all(SLEEP in Path(f"/proc/{number}/cmdline").read_text() for number in numbers))
    began = time.monotonic()
    launcher.stop()
    assert time.monotonic() - began < 3
    assert not any(exists(number) for number in numbers)
    assert {state.stage for state in launcher.states().values()} == {"stopped"}
    assert {state.exit_code for state in launcher.states().values()} == {-signal.SIGTERM}
    launcher.stop()


def test_stop_kills_what_does_not_listen_and_what_it_started(tmp_path: Path) -> None:
    launcher = Launcher([plan(tmp_path, "deaf", PARENT, str(tmp_path / "child"), grace_s=0.5)])
    launcher.start()
    child, parent = number_in(tmp_path / "child"), pid(launcher, "deaf")
    launcher.stop()
    # Not even as zombies.
    assert not exists(parent)
    assert not exists(child)
    assert launcher.states()["deaf"].exit_code == -signal.SIGKILL


def test_stop_without_start(tmp_path: Path) -> None:
    Launcher([plan(tmp_path, "never", SLEEP)]).stop()


def test_a_killed_process_is_started_again_and_its_remains_are_killed_first(
    tmp_path: Path, stop_later: list[Launcher]
) -> None:
    launcher = Launcher([plan(tmp_path, "site", PARENT, str(tmp_path / "child"), grace_s=0)])
    stop_later.append(launcher)
    launcher.start()
    child, parent = number_in(tmp_path / "child"), pid(launcher, "site")
    (tmp_path / "child").unlink()
    os.kill(parent, signal.SIGKILL)
    assert number_in(tmp_path / "child") != child
    assert not exists(child)
    state = launcher.states()["site"]
    assert (state.stage, state.starts, state.exit_code) == ("running", 2, -signal.SIGKILL)
    launcher.check()
    assert "exit code -9; next start in 0.5 s" in (tmp_path / "site.log").read_text()


def test_a_process_that_should_go_on_is_started_again_after_exit_code_0(
    tmp_path: Path, stop_later: list[Launcher]
) -> None:
    launcher = Launcher([plan(tmp_path, "site", "pass")])
    stop_later.append(launcher)
    launcher.start()
    assert until(lambda: launcher.states()["site"].starts >= 2)


def test_a_process_that_dies_again_and_again_is_given_up(tmp_path: Path, stop_later: list[Launcher]) -> None:
    plans = [plan(tmp_path, "other", SLEEP), plan(tmp_path, "bad", "print('no such thing'); raise SystemExit(3)")]
    launcher = Launcher(plans, Restarts(most=1, within_s=60))
    stop_later.append(launcher)
    launcher.start()
    with pytest.raises(ProcessFailed, match=r"(?s)'bad' ended 2 times .*exit code 3; .*bad\.log.*no such thing"):
        launcher.wait("other", 20)
    assert launcher.states()["bad"].stage == "failed"
    assert launcher.states()["other"].stage == "running"


def test_a_program_that_is_missing_is_an_ordinary_death_with_a_log(tmp_path: Path) -> None:
    missing = ProcessPlan("site", ("/no/such/program",), tmp_path / "log")
    with (
        Launcher([missing], Restarts(most=0)) as launcher,
        pytest.raises(ProcessFailed, match="/no/such/program|No such"),
    ):
        launcher.wait("site", 10)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = ProcessPlan("site", (sys.executable, "-c", "pass"), tmp_path / "file" / "log")
    with Launcher([bad]) as launcher, pytest.raises(ProcessFailed, match="could not be started"):
        launcher.check()


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path), PARENT])
    try:
        site, child = number_in(tmp_path / "site"), number_in(tmp_path / "child")
        assert alive(site)
        assert alive(child)
    finally:
        launcher.kill()
        launcher.wait()
    assert until(lambda: not alive(site))
    assert until(lambda: not alive(child))


def test_marks_do_not_match_beginnings(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", SLEEP], env={**os.environ, processes.MARK: "a-test-mark/edge10"}
    ) as process:
        try:
            assert until(lambda: processes.marked("a-test-mark") == [process.pid])
            assert processes.marked("a-test-mark/edge10") == [process.pid]
            assert processes.marked("a-test-mark/edge1") == []
            assert processes.marked("a-test") == []
        finally:
            process.kill()
