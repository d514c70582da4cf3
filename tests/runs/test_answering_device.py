"""A run that has finished, asked over HTTP: the whole way from a caller to the bodies and back."""

import shutil
from pathlib import Path

import httpx
import pytest

from gaisnet.cli.serve import opened
from gaisnet.config import RoutingSettings
from gaisnet.config.file import load_config
from gaisnet.errors import ConfigError, ServiceFull
from gaisnet.runs.answering_device import open_device
from gaisnet.runs.run import run_experiment
from gaisnet.runs.table import closing_captions
from gaisnet.serving.generation.calibration import read_calibrations
from gaisnet.serving.generation.routing import Target
from gaisnet.serving.http.callers import ApiKeys
from tests.runs.test_served_run import without
from tests.serving.servers import until
from tests.tiny import tiny_edge, tiny_newcomer, write_tiny_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one cycle of one edge."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, edges=[tiny_edge("north", "shapes")], cycles=1)
    run_experiment(load_config(folder / "run.yaml"), folder / "out")
    return folder / "out"


def test_a_run_answers_callers(finished: Path) -> None:
    with opened(finished, "north-b", RoutingSettings(), False, ApiKeys(), ("127.0.0.1", 0)) as (answering, server):
        assert answering.models == ("auto", "foundation", "merged", "shapes")
        assert read_calibrations(finished)["shapes"].num_trials == 9
        with server.in_thread() as url:
            texts = {}
            for model, more in [*((name, {}) for name in answering.models), ("auto", {"speculate": True})]:
                asked = {"model": model, "prompt": "Is it so?", "max_tokens": 6, "temperature": 0, **more}
                response = httpx.post(f"{url}/v1/completions", json=asked, timeout=280)
                assert response.status_code == 200, response.text
                texts[model, bool(more)] = response.json()["choices"][0]["text"], response.json()["gaisnet"]["body"]
            assert {body for _, body in texts.values()} == {"edge", "cloud"}
            assert texts["shapes", False][1] == "edge"
            until(lambda: "gaisnet_sessions 0.0" in httpx.get(f"{url}/metrics").text)
            assert "gaisnet_cache_bytes 0.0" in httpx.get(f"{url}/metrics").text


def test_always_asking_is_the_foundation_model_with_the_adapter(finished: Path) -> None:
    routing = RoutingSettings(escalate="always")
    with opened(finished, None, routing, False, ApiKeys(), ("127.0.0.1", 0)) as (_, server), server.in_thread() as url:
        asked = {"model": "auto", "prompt": "Is it so?", "max_tokens": 6, "temperature": 0}
        always = httpx.post(f"{url}/v1/completions", json=asked, timeout=280).json()
        drafted = httpx.post(f"{url}/v1/completions", json={**asked, "speculate": True}, timeout=280).json()
        assert always["gaisnet"] == {"body": "cloud", "domain": "shapes", "escalated_at": 0}
        assert always["choices"][0]["text"] == drafted["choices"][0]["text"]


def test_a_newcomers_device_answers_with_what_its_domain_follows(tmp_path: Path) -> None:
    edges = [tiny_edge("north", "shapes"), tiny_edge("south", "tastes"), tiny_newcomer("west", "forms", "shapes")]
    write_tiny_run(tmp_path, edges=edges, cycles=1, evaluate={"everywhere": True})
    summary = run_experiment(load_config(tmp_path / "run.yaml"), tmp_path / "out")
    assert summary.follows == {"forms": "shapes"}
    assert any("'forms' starts with what 'shapes' has learned" in line for line in closing_captions(summary))
    assert summary.domains == ("shapes", "tastes", "forms")
    for cycle in summary.cycles:
        assert tuple(cycle.foundation) == tuple(cycle.merged) == ("shapes", "tastes")
        assert cycle.matrix is not None and cycle.matrix.foundation["merged"] == cycle.merged
    assert "DM of shapes" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with open_device(tmp_path / "out", "west-a") as device:
        own = RoutingSettings(escalate_to="domain", other_domains=0.5)
        assert device.escalation("forms", own) == Target("cloud", ("shapes",), "forms")
        tastes = {tuple(one.prompt) for one in device.domains["tastes"].held_out}
        for name in ("forms", "shapes"):  # neither is foreign to the other
            assert {tuple(one.prompt) for one in device.others(name, own)} <= tastes
        assert device.others("tastes", own)


def test_where_there_are_several_domains_all_of_them_are_escalated_to(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, edges=[tiny_edge("north", "shapes"), tiny_edge("south", "tastes")], cycles=1)
    run_experiment(load_config(tmp_path / "run.yaml"), tmp_path / "out")
    routing = RoutingSettings(escalate="always")
    with opened(tmp_path / "out", None, routing, False, ApiKeys(), ("127.0.0.1", 0)) as (_, server):
        with server.in_thread() as url:
            asked = {"prompt": "Is it so?", "max_tokens": 6, "temperature": 0}
            always, merged = (
                httpx.post(f"{url}/v1/completions", json={**asked, "model": model}, timeout=280).json()
                for model in ("auto", "merged")
            )
    assert always["gaisnet"] == {"body": "cloud", "domain": "shapes", "escalated_at": 0}
    assert always["choices"][0]["text"] == merged["choices"][0]["text"]
    with open_device(tmp_path / "out", None) as device:
        assert device.escalation("shapes", RoutingSettings()).adapters == ("merged",)
        assert device.escalation("shapes", RoutingSettings(escalate_to="domain")).adapters == ("shapes",)
        assert len(device.others("shapes", RoutingSettings())) == 2  # a fifth of the mix, with nine of its own


def test_a_threshold_is_kept_where_the_examples_are_gone_and_none_is_made_up(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, auto, never = ("127.0.0.1", 0), RoutingSettings(), RoutingSettings(escalate="never")
    with opened(finished, None, auto, False, ApiKeys(), place) as (_, server), server.in_thread():
        kept = read_calibrations(finished)
    new = Path(shutil.copytree(finished, tmp_path / "new", ignore=shutil.ignore_patterns("calibration.json")))
    with without(finished.parent / "data"):
        capsys.readouterr()
        with opened(finished, None, auto, False, ApiKeys(), place) as (answering, server), server.in_thread():
            routing = answering._domains["shapes"].routing
            assert (routing.policy, routing.threshold) == ("auto", kept["shapes"].threshold)
        said = " ".join(capsys.readouterr().out.split())
        assert "Without the examples of device 'north-a' and of 2 other devices" in said and "are kept" in said
        with pytest.raises(ConfigError, match=r"'auto' in domain 'shapes': none was calibrated.*use gaisnet serve"):
            with opened(new, None, auto, False, ApiKeys(), place):
                pass
        for settings in (never, RoutingSettings(threshold=0.5)):
            with opened(new, None, settings, False, ApiKeys(), place) as (answering, server), server.in_thread():
                assert answering._domains["shapes"].routing.policy == settings.escalate
    assert read_calibrations(finished) == kept and not (new / "calibration.json").exists()


def test_the_service_of_a_run_may_be_changed_and_nothing_else(finished: Path) -> None:
    with open_device(finished, None, ["service.max_sessions=1"]) as device:
        asked = Target("edge", ("domain",), "shapes"), device.parts.first, device.parts.stop, 20
        first = device.bodies.open_session(*asked)
        with pytest.raises(ServiceFull, match="1 are open"):
            device.bodies.open_session(*asked)
        first.close()
    with pytest.raises(ConfigError, match="seed"), open_device(finished, None, ["seed=1"]):
        pass


def test_a_device_that_there_is_not(finished: Path) -> None:
    with pytest.raises(ConfigError, match="use one of: north-a, north-b, north-c"), open_device(finished, "south-a"):
        pass
