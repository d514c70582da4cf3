"""Kits, and a whole network of processes over real sockets: the figures are those of one process."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import yaml

from gaisnet.cli.serve import opened
from gaisnet.config import Config, RoutingSettings
from gaisnet.config.file import load_config
from gaisnet.deployment.http_endpoint import EndpointSettings
from gaisnet.deployment.kits import prepare
from gaisnet.deployment.launcher import Launcher
from gaisnet.deployment.one_machine import kits_in, run_kits, run_network, sites_of
from gaisnet.deployment.outcome import OUTCOME_FILE, read_outcome, record_failure, recorded
from gaisnet.deployment.resident import Watched, links_status, run_cloud, run_device, run_edge
from gaisnet.deployment.site import CLOUD, START_LOCK, Role, certificates, claimed, read_site
from gaisnet.deployment.start import failure_recorded, plans, start_site
from gaisnet.deployment.status import exit_code, network_status
from gaisnet.deployment.validity import check_validity
from gaisnet.errors import (
    CertificateInvalid,
    ConfigError,
    DataError,
    KitInUse,
    KitUnreadable,
    OutputInUse,
    OutputNotWritable,
    ProcessFailed,
)
from gaisnet.runs.output import LOCK_NAME
from gaisnet.runs.run import run_experiment
from gaisnet.runs.summary import Summary
from gaisnet.serving.generation.calibration import read_calibrations
from gaisnet.serving.http.address import ADDRESS_NAME
from gaisnet.serving.http.callers import ApiKeys
from gaisnet.transport.grpc.dialer import Dialer
from gaisnet.transport.grpc.listener import Listener
from tests.tiny import tiny_edge, write_tiny_bert_run, write_tiny_run, write_tiny_vit_run

OPEN_GATE = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
SITES = {"cloud", "north", "south", *(f"{edge}-{device}" for edge in ("north", "south") for device in "abc")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    edges = [tiny_edge("north", "shapes", "ac"), tiny_edge("south", "tastes", "b")]
    absorb = {**OPEN_GATE, "validation_share": 0.2, "last_mile": {"epochs": 1}}
    return load_config(write_tiny_run(tmp_path_factory.mktemp("tiny"), edges=edges, absorb=absorb))


@pytest.fixture(scope="module")
def kits(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare(config, tmp_path_factory.mktemp("kits") / "sites")


# -- kits --------------------------------------------------------------------------------------------------------------


def test_there_is_a_kit_for_every_site_and_it_says_whose_it_is(config: Config, kits: Mapping[str, Path]) -> None:
    assert kits.keys() == SITES
    for name, folder in kits.items():
        site = read_site(folder)
        assert site.name == folder.name == name
        others = {"cloud", "edges", "elsewhere", "model"}
        assert site.config.model_dump(exclude=others) == config.model_dump(exclude=others)
        assert os.access(folder / "start.sh", os.X_OK)
        certificates(folder, site.role).read()
    assert kits_in(kits[CLOUD].parent).keys() == SITES


def test_every_kit_of_an_encoders_network_holds_the_same_resolved_settings(tmp_path: Path) -> None:
    given = load_config(write_tiny_bert_run(tmp_path))
    assert given.relay.enabled and given.fine_tune.anchor_weight
    for folder in prepare(given, tmp_path / "sites").values():
        kept = read_site(folder).config
        assert not kept.relay.enabled and not kept.fine_tune.anchor_weight
        assert (kept.wire, kept.absorb, kept.adapters) == (given.wire, given.absorb, given.adapters)


def test_every_port_is_another_and_all_kits_agree(kits: Mapping[str, Path]) -> None:
    found: dict[str, set[int]] = {}
    for folder in kits.values():
        config = read_site(folder).config
        for edge in config.edges:
            found.setdefault(edge.name, set()).add(edge.link_port)
        for name in ("nvflare_port", "link_port") if config.cloud.link_port else ():
            found.setdefault(name, set()).add(getattr(config.cloud, name))
    ports = {port for every in found.values() for port in every}
    assert len(ports) == len(found) == 4 and all(1024 <= port <= 65535 for port in ports)


def test_private_keys_are_for_their_owner_only_and_each_kit_has_just_its_own(kits: Mapping[str, Path]) -> None:
    keys: dict[str, bytes] = {}
    for name, folder in kits.items():
        for key in folder.rglob("*.key"):
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
        keys[name] = certificates(folder, read_site(folder).role).read()[2]
    assert len(set(keys.values())) == len(keys)
    for name, folder in kits.items():
        others = [key for owner, key in keys.items() if owner != name]
        for file in folder.rglob("*"):
            assert not file.is_file() or not any(key in file.read_bytes() for key in others)


def test_a_device_has_a_tokenizer_and_nothing_of_nvflare(kits: Mapping[str, Path]) -> None:
    names = {path.name for path in kits["north-a"].iterdir()}
    assert names == {"site.yaml", "start.sh", "rootCA.pem", "client.crt", "client.key", "tokenizer"}
    assert [plan.name for plan in plans(kits["north-a"], Path("logs"))] == ["north-a"]
    assert [plan.name for plan in plans(kits["north"], Path("logs"))] == ["north-nvflare", "north"]


@pytest.mark.parametrize("name", ["cloud", "north", "north-a"])
def test_two_processes_of_one_site_never_share_its_kit(
    kits: Mapping[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Callable[[Path], object]] = {"cloud": run_cloud, "north": run_edge, "north-a": run_device}
    kept = sorted(kits[name].iterdir())
    with claimed(kits[name]), pytest.raises(KitInUse, match=rf"site kit '.*{name}': is taken by process {os.getpid()}"):
        runs[name](kits[name])
    monkeypatch.setattr("gaisnet.deployment.start.Launcher", None)  # nothing is started
    monkeypatch.setattr("gaisnet.deployment.one_machine.Launcher", None)
    with claimed(kits[name], START_LOCK):
        with pytest.raises(KitInUse, match="wait until that process ends"):
            start_site(kits[name])
        with pytest.raises(KitInUse, match="wait until that process ends"):
            run_kits(kits, kits[name].parent / "out", Watch())
    assert sorted(kits[name].iterdir()) == kept


def test_a_device_of_a_model_of_images_has_no_tokenizer(tmp_path: Path) -> None:
    kits = prepare(load_config(write_tiny_vit_run(tmp_path / "run")), tmp_path / "sites")
    assert {path.name for path in kits["a"].iterdir()} == {
        "site.yaml",
        "start.sh",
        "rootCA.pem",
        "client.crt",
        "client.key",
    }


def test_every_kit_has_the_context_that_the_model_lets_it(config: Config, tmp_path: Path) -> None:
    model = config.model.model_copy(update={"context": None})
    kits = prepare(config.model_copy(update={"model": model}), tmp_path / "sites")
    assert {read_site(kit).config.model.context for kit in kits.values()} == {127}


def test_kits_are_not_written_over(config: Config, kits: Mapping[str, Path]) -> None:
    with pytest.raises(OutputInUse, match="is not empty"):
        prepare(config, kits[CLOUD].parent)
    with pytest.raises(OutputNotWritable, match="Not a directory"):
        prepare(config, kits[CLOUD] / "start.sh")


def test_the_kits_of_a_run_in_the_current_directory_are_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sites_of(Path()) == tmp_path.with_name(f"{tmp_path.name}-sites")
    assert sites_of(Path("out")) == Path("out-sites")


def test_a_folder_that_is_no_kit(tmp_path: Path) -> None:
    with pytest.raises(KitUnreadable, match=r"it has no site\.yaml"):
        read_site(tmp_path)
    with pytest.raises(KitUnreadable, match="there is no kit of a cloud in it"):
        kits_in(tmp_path)
    (tmp_path / "site.yaml").write_text("role: [", encoding="utf-8")
    with pytest.raises(KitUnreadable, match=r"site\.yaml cannot be read"):
        read_site(tmp_path)


def test_the_kit_of_another_role(kits: Mapping[str, Path]) -> None:
    with pytest.raises(KitUnreadable, match="it is that of the device 'north-a', not of a edge"):
        run_edge(kits["north-a"])
    with pytest.raises(KitUnreadable, match="it is that of the edge 'north', not of a device"):
        run_device(kits["north"])


def test_a_site_that_its_own_configuration_does_not_name(kits: Mapping[str, Path], tmp_path: Path) -> None:
    raw = yaml.safe_load((kits["north-a"] / "site.yaml").read_text(encoding="utf-8"))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**raw, "name": "west-a"}), encoding="utf-8")
    with pytest.raises(KitUnreadable, match="is of device 'west-a', which its config does not name"):
        read_site(tmp_path)


def test_a_device_whose_data_are_not_there_says_so_before_it_dials(kits: Mapping[str, Path], tmp_path: Path) -> None:
    raw = yaml.safe_load((kits["north-a"] / "site.yaml").read_text(encoding="utf-8"))
    raw["config"]["edges"][0]["devices"][0]["data"] = str(tmp_path / "nowhere")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (tmp_path / "tokenizer").symlink_to(kits["north-a"] / "tokenizer")
    with pytest.raises(DataError, match="there is no such file"):
        run_device(tmp_path)


def test_only_clouds_stay_and_only_devices_serve(kits: Mapping[str, Path]) -> None:
    with pytest.raises(ConfigError, match="--stay at 'north': the kit's role is edge; give it to a cloud"):
        start_site(kits["north"], stay=True)
    with pytest.raises(ConfigError, match="--serve at 'cloud': the kit's role is cloud; give it to a device"):
        start_site(kits[CLOUD], serve=0)


def test_a_port_that_is_taken_is_told(kits: Mapping[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        door = EndpointSettings(taken.getsockname(), ApiKeys(), RoutingSettings())
        with pytest.raises(ConfigError, match="listening on '127.0.0.1'"):
            run_device(kits["north-a"], door)


def test_a_network_that_is_not_there_is_told_as_it_is(kits: Mapping[str, Path]) -> None:
    states = {state.name: state for state in network_status(kits[CLOUD])}
    assert states.keys() == SITES
    assert {state.health for state in states.values() if state.role != "device"} == {"unreachable"}
    assert {state.health for state in states.values() if state.role == "device"} == {"unknown"}


def test_the_state_of_a_device_is_what_its_edge_sees_now(kits: Mapping[str, Path]) -> None:
    site, watched = read_site(kits["north"]), Watched()
    names = ["north-a", "north-b", "north-c"]
    listener = Listener(
        f"localhost:{site.edge.link_port}",
        certificates(kits["north"], "edge"),
        "north",
        names,
        lambda _asker, frame: frame,
        status=lambda: {**watched.describe(), "links": links_status(listener.states())},
    )
    own = certificates(kits["north-a"], "device")
    device = Dialer(site.edge_address, own, "north-a", "north", lambda _asker, frame: frame)
    try:
        assert listener.link("north-a").send(b"are you there?").result(20) == b"are you there?"
        watched("fine_tune", 3, 7, {"loss": 0.5})
        found = {state.name: state for state in network_status(kits[CLOUD])}
        assert (found["north"].health, found["cloud"].health, found["south-a"].health) == (
            "up",
            "unreachable",
            "unknown",
        )
        assert found["north"].detail == "fine_tune 3/7; no link to north-b, north-c"
        ours = network_status(kits["north"])
        assert [one.name for one in ours] == ["cloud", "north", *names] and ours[1] == found["north"]
        assert [one.name for one in network_status(kits["north-a"])] == ["north", "north-a"]
        assert (found["north-a"].health, found["north-b"].health) == ("up", "away")
        assert found["north-b"].detail == "has not come yet"
        device.close()
        until = time.monotonic() + 20
        while listener.link("north-a").peer and time.monotonic() < until:
            time.sleep(0.02)
        found = {state.name: state for state in network_status(kits[CLOUD])}
        assert found["north-a"].health == "away" and found["north-a"].detail.startswith("away for ")
    finally:
        device.close()
        listener.close()


@pytest.mark.parametrize(
    ("stage", "health", "code", "told"),
    [
        ("finished", "finished", 0, r"its output is in /.*/run"),
        ("failed", "failed", 3, "cycles: is 0; use 1 or more"),
        ("stopped", "unreachable", 1, "was stopped at .* UTC; .*cannot be reached|was stopped at"),
        ("killed", "unreachable", 1, "was started at .* UTC and did not end in order"),
    ],
)
def test_a_status_tells_how_a_cloud_ended_when_nobody_is_left_to_ask(
    kits: Mapping[str, Path], tmp_path: Path, stage: str, health: str, code: int, told: str
) -> None:
    kit = tmp_path / "cloud"
    shutil.copytree(kits[CLOUD], kit)
    ended: dict[str, BaseException] = {
        "failed": ConfigError("cycles", "is 0", "use 1 or more"),
        "stopped": SystemExit(143),
    }
    before = time.time()
    with suppress(ConfigError, SystemExit), recorded(kit, tmp_path / "run"):
        during = read_outcome(kit)
        if stage in ended:
            raise ended[stage]
    assert during is not None and during.stage == "running" and during.since >= before
    if stage == "killed":
        (kit / OUTCOME_FILE).write_text(during.model_dump_json(), encoding="utf-8")
    states = network_status(kit)
    assert (states[0].health, exit_code(states)) == (health, code)
    assert re.search(told, states[0].detail)


def test_a_site_that_is_given_up_says_why_in_its_kit(kits: Mapping[str, Path], tmp_path: Path) -> None:
    kit = tmp_path / "north-a"
    shutil.copytree(kits["north-a"], kit)
    raw = yaml.safe_load((kit / "site.yaml").read_text(encoding="utf-8"))
    raw["config"]["edges"][0]["devices"][0]["data"] = str(tmp_path / "nowhere")
    (kit / "site.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    lines: list[str] = []
    with pytest.raises(ProcessFailed):
        start_site(kit, tell=lines.append)
    outcome = read_outcome(kit)
    assert outcome is not None and outcome.stage == "failed" and "there is no such file" in outcome.reason
    assert re.fullmatch(rf"north-a: started as process \d+; its log is {kit}/logs/north-a\.log", lines[0])


def test_a_failed_start_says_its_own_reason_and_not_that_of_an_earlier_one(tmp_path: Path) -> None:
    record_failure(tmp_path, ConfigError("cycles", "is 0", "use 1 or more"))
    with suppress(KitUnreadable), failure_recorded(tmp_path):
        raise KitUnreadable(tmp_path, "it has no certificate")
    outcome = read_outcome(tmp_path)
    assert outcome is not None and "it has no certificate" in outcome.reason
    with suppress(ProcessFailed), failure_recorded(tmp_path):
        record_failure(tmp_path, ConfigError("cycles", "is 0", "use 1 or more"))  # the site itself knows better
        raise ProcessFailed("north", "ended with exit code 3", tmp_path / "log", "")
    outcome = read_outcome(tmp_path)
    assert outcome is not None and "use 1 or more" in outcome.reason


def in_days(kit: Path, role: Role, days: float) -> datetime:
    """So long before the certificates of a kit expire."""
    return check_validity(kit, role).end - timedelta(days=days)


def test_certificates_that_expire_soon_are_told_and_expired_ones_explained(kits: Mapping[str, Path]) -> None:
    roles: dict[str, Role] = {"cloud": "cloud", "north": "edge", "north-a": "device"}
    for name, role in roles.items():
        kit = kits[name]
        assert check_validity(kit, role).warning(datetime.now(UTC)) == ""
        assert check_validity(kit, role).warning(in_days(kit, role, 30.5)) == ""
        warning = check_validity(kit, role).warning(in_days(kit, role, 29.5))
        assert warning.startswith("certificate expires in 29 days, on 20") and "deploy prepare" in warning
        with pytest.raises(CertificateInvalid, match=r"expired on .* UTC, and it is .*; make new kits with 'deploy"):
            check_validity(kit, role, in_days(kit, role, -1))
        with pytest.raises(CertificateInvalid, match=r"valid from .* UTC on, and it is .*; set this host's clock"):
            check_validity(kit, role, datetime.now(UTC) - timedelta(days=2))
        check_validity(kit, role, datetime.now(UTC) - timedelta(hours=23))  # a clock that is behind


@pytest.mark.parametrize("where", ["GAISNET", "kit", "beside", "home", "nowhere"])
def test_a_start_script_finds_the_command_on_a_short_path_and_says_what_it_does(
    kits: Mapping[str, Path], tmp_path: Path, where: str
) -> None:
    kit, home = tmp_path / "kits" / "north-a", tmp_path / "home"
    kit.mkdir(parents=True)
    shutil.copy(kits["north-a"] / "start.sh", kit)
    places = {
        "GAISNET": tmp_path / "tool",
        "kit": kit / ".venv/bin/gaisnet",
        "beside": tmp_path / "kits/.venv/bin/gaisnet",
        "home": home / ".local/bin/gaisnet",
    }
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    environment |= {"GAISNET": str(places[where])} if where == "GAISNET" else {}
    environment |= {"HOME": str(home)} if where == "home" else {}
    if where in places:
        places[where].parent.mkdir(parents=True, exist_ok=True)
        places[where].write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
        places[where].chmod(0o755)
    ran = subprocess.run([kit / "start.sh", "--serve", "1"], env=environment, capture_output=True, text=True, cwd="/")
    if where == "nowhere":
        assert (ran.returncode, ran.stdout) == (127, "") and "set GAISNET to its full path" in ran.stderr
        return
    first, second = ran.stdout.splitlines()
    assert first.endswith(f"runs the site in {kit}; logs are in {kit}/logs")
    assert second == f"deploy start {kit} --serve 1"


def test_a_device_needs_no_nvflare() -> None:
    code = "import sys; sys.modules['nvflare'] = None; import gaisnet.deployment.resident, gaisnet.deployment.start"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


# -- a whole network ---------------------------------------------------------------------------------------------------


class Watch:
    """Sees what a run tells."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.stages.append(stage)


def processes_of(out: Path) -> Iterator[tuple[int, list[str]]]:
    """Living processes whose command line names a kit of the run."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(word.startswith(str(sites_of(out))) for word in words):
                yield int(entry.name), words


def left_behind(out: Path) -> list[object]:
    """What no run may leave."""
    return [*processes_of(out), *out.rglob(LOCK_NAME)]


def figures(summary: Summary) -> list[object]:
    """All that does not depend on the clock."""
    return [
        (one.domain, one.foundation, one.merged, one.retention, one.gate, one.relay, one.faults)
        for one in summary.cycles
    ]


@pytest.fixture(scope="module")
def in_one_process(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return run_experiment(config, tmp_path_factory.mktemp("local") / "out")


@pytest.mark.integration
def test_a_network_of_processes_has_the_figures_of_one_process(
    config: Config, in_one_process: Summary, tmp_path: Path
) -> None:
    watch = Watch()
    summary = run_network(config, tmp_path / "out", watch)
    assert figures(summary) == figures(in_one_process)
    assert [one.bytes for one in summary.cycles] == [one.bytes for one in in_one_process.cycles]
    assert left_behind(tmp_path / "out") == []
    assert "prepare" in watch.stages
    states = network_status(sites_of(tmp_path / "out") / CLOUD)
    assert (states[0].health, exit_code(states)) == ("finished", 0)
    assert states[0].detail.endswith(f"its output is in {tmp_path / 'out'}")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"summary.json", "metrics.jsonl", "report.html", "tensorboard", "adapters", "checkpoint"}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("write", [write_tiny_bert_run, write_tiny_vit_run])
def test_a_network_that_classifies_has_the_figures_of_one_process(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    config = load_config(write(tmp_path / "run"))
    summary = run_network(config, tmp_path / "out", Watch())
    assert figures(summary) == figures(run_experiment(config, tmp_path / "alone"))
    assert left_behind(tmp_path / "out") == []


@pytest.mark.integration
def test_a_network_answers_its_devices_callers(config: Config, tmp_path: Path) -> None:
    """The text that a device's callers get is that of the run it leaves behind, split in one process."""
    out, asked = tmp_path / "out", {"prompt": "Is it so?", "max_tokens": 6, "temperature": 0}
    kits = prepare(config, sites_of(out))
    more = {"cloud": ["--stay"], "north-a": ["--serve", "0"]}
    every = [plan for name, kit in kits.items() for plan in plans(kit, sites_of(out) / "logs", out, more.get(name, ()))]
    texts = {}
    with Launcher(every):
        finished = sites_of(out) / "logs" / "cloud.log"
        wait_until(lambda: finished.exists() and "the run has finished" in finished.read_text(encoding="utf-8"))
        # The threshold is for what is served in the end, on the FM too, which learns later than the edge.
        # A relay is that of the last cycle in which one helped.
        versions = re.compile(rf"calibrated on relay@\d+, domain@{config.cycles}, merged@{config.cycles}:")
        device_log = sites_of(out) / "logs" / "north-a.log"
        wait_until(lambda: versions.search(device_log.read_text(encoding="utf-8")))
        calibration = read_calibrations(kits["north-a"])["shapes"]
        assert (calibration.adapters, calibration.num_trials, calibration.num_others) == (("merged",), 3, 0)
        url = (kits["north-a"] / ADDRESS_NAME).read_text(encoding="utf-8").splitlines()[0]
        for model in ("shapes", "foundation", "merged"):
            response = httpx.post(f"{url}/v1/completions", json={**asked, "model": model}, timeout=60)
            assert response.status_code == 200, response.text
            texts[model] = response.json()["choices"][0]["text"], response.json()["gaisnet"]["body"]
        refused = httpx.post(f"{url}/v1/completions", json={**asked, "model": "tastes"}, timeout=60)
        assert refused.status_code == 404
    assert left_behind(out) == []
    assert {model: body for model, (_, body) in texts.items()} == {
        "shapes": "edge",
        "foundation": "cloud",
        "merged": "cloud",
    }
    with opened(out, "north-a", RoutingSettings(escalate="never"), False, ApiKeys(), ("127.0.0.1", 0)) as (_, server):
        with server.in_thread() as url:
            for model, (text, _) in texts.items():
                again = httpx.post(f"{url}/v1/completions", json={**asked, "model": model}, timeout=60).json()
                assert again["choices"][0]["text"] == text


def wait_until(true: Callable[[], object]) -> None:
    until = time.monotonic() + 240
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


def kill(out: Path, role: str) -> None:
    """SIGKILL for the first process of a role."""
    victim = next(pid for pid, words in processes_of(out) if "gaisnet.cli" in words and role in words)
    os.kill(victim, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize("role", ["device", "edge", "cloud"])
def test_a_network_ends_with_the_same_figures_when_a_site_is_killed(
    config: Config, in_one_process: Summary, tmp_path: Path, role: str
) -> None:
    out = tmp_path / "out"
    killed = threading.Thread(target=_kill_later, args=(out, role))
    killed.start()
    summary = run_network(config, out, Watch())
    killed.join()
    assert figures(summary) == figures(in_one_process)
    assert left_behind(out) == []


def _kill_later(out: Path, role: str) -> None:
    """Wait until the cloud has measured the beginning, then kill."""
    until = time.monotonic() + 120
    while not (out / "checkpoint").exists() and time.monotonic() < until:
        time.sleep(0.05)
    kill(out, role)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_launcher_that_is_killed_leaves_no_process_and_a_run_that_resumes(
    config: Config, in_one_process: Summary, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "gaisnet.cli", "deploy", "run"]
    with subprocess.Popen([*command, str(file), "--out", str(out)], stdout=subprocess.DEVNULL) as launch:
        until = time.monotonic() + 180
        while not (out / "checkpoint").exists() and time.monotonic() < until:
            time.sleep(0.05)
        launch.kill()
    until = time.monotonic() + 20
    while list(processes_of(out)) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(processes_of(out)) == []
    subprocess.run([*command, "--resume", str(out)], check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert figures(Summary.model_validate_json((out / "summary.json").read_text(encoding="utf-8"))) == figures(
        in_one_process
    )
    assert left_behind(out) == []
