"""The contest: every contender has its turn, and the figures are those of its turns."""

import json
from pathlib import Path

import pytest

from gaisnet.config import Config
from gaisnet.config.file import load_config, parse_config
from gaisnet.errors import ConfigError
from gaisnet.research.bench.contest import check_contest, measure_learning, write_learning
from gaisnet.research.bench.picture import draw_learning
from tests.tiny import tiny_edge, write_tiny_run

MIB = 2**20


def contest(folder: Path) -> Config:
    """A tiny one of two devices."""
    write_tiny_run(folder, edges=[tiny_edge("north", "shapes")], cycles=1)
    config = load_config(folder / "run.yaml")
    raw = json.loads(config.model_dump_json())
    for device in raw["edges"][0]["devices"]:
        device["mode"], device["head_layers"] = "split", 1
    raw["fine_tune"] |= {"local_epochs": 2, "batch_size": 4}
    raw["relay"]["enabled"] = False
    return parse_config(raw)


@pytest.mark.slow  # a process for each contender; `make bench-quick`, which CI runs, has them all learn the real model
@pytest.mark.integration
def test_all_have_their_turns(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    figures = measure_learning(contest(tmp_path), 1, lambda stage, done, total, _: told.append((done, total)))
    write_learning(figures, tmp_path / "bench.json")
    draw_learning(figures, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert told == [(done, 6) for done in range(7)]
    names = {"centralised_all", "centralised_late", "federated", "split_plain", "gaisnet"}
    assert set(written["contenders"]) == names
    for own in written["contenders"].values():
        for key in ("samples_per_s", "bytes_per_sample", "device_peak_bytes", "device_flops_per_sample", "accuracy"):
            assert own[key]["min"] <= own[key]["median"] <= own[key]["max"]
            assert own[key]["rounds"] == 1
        assert own["device_peak_bytes"]["min"] > 100 * MIB  # torch alone takes more
    own, plain = written["contenders"]["gaisnet"], written["contenders"]["split_plain"]
    assert own["device_flops_per_sample"]["median"] < plain["device_flops_per_sample"]["median"]
    assert written["contenders"]["centralised_all"]["bytes_per_sample"]["max"] == 0
    assert written["contenders"]["centralised_all"]["seconds_to_accuracy"]["rounds"] == 1  # it reaches its own
    assert written["ratios"]["bytes_vs_split_plain"]["max"] < 1
    assert 0 <= written["unsplit_domain_model"]["accuracy"]["min"] <= 1
    assert len(written["differences"]) == 3
    assert all(-1 <= spread["min"] <= spread["max"] <= 1 for spread in written["differences"].values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edges": "twice"}, "name one"),
        ({"mode": "local"}, "let all devices be split"),
        ({"tail_layers": 1}, "set it to 0"),
        ({"fine_tune": {"local_epochs": 0.5, "edge_rounds": 2}}, "name whole passes"),
    ],
)
def test_a_network_that_not_all_can_learn_on(tmp_path: Path, change: dict[str, object], said: str) -> None:
    raw = json.loads(contest(tmp_path).model_dump_json())
    if "edges" in change:
        other = json.loads(json.dumps(raw["edges"][0]))
        other |= {"name": "south", "domain": "tastes"}
        for device in other["devices"]:
            device["name"] += "-south"
        raw["edges"].append(other)
    if "mode" in change:
        raw["edges"][0]["devices"][0]["mode"] = "local"
    raw |= {key: change[key] for key in ("tail_layers", "fine_tune") if key in change}
    with pytest.raises(ConfigError, match=said):
        check_contest(parse_config(raw))
