"""Networks of simulated devices: what is measured has the right shape, and what devices share changes nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gaisnet.cli.app import app
from gaisnet.errors import ConfigError
from gaisnet.research.bench.scale import measure_scale
from gaisnet.research.bench.simulated import DEVICES_PER_EDGE, equip, num_edges, simulate


@pytest.mark.slow  # each size has a process of its own
@pytest.mark.integration
def test_the_command_lets_sizes_take_turns_and_writes_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    result = CliRunner().invoke(app, ["bench", "--scale", "--sizes", "12,3", "--rounds", "1", "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "70B" in result.output
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["schema"] == "gaisnet.scale/1"
    assert written["reference"] == 100
    few, many = written["sizes"]
    assert (few["devices"], many["devices"], many["edges"]) == (3, 12, 1)
    for own in (few, many):
        assert own["device_round_s"]["rounds"] == 1
        for key in ("device_round_s", "device_round_vs_reference", "equip_s", "kept_bytes"):
            assert 0 < own[key]["min"] <= own[key]["median"] <= own[key]["max"]
        assert own["idle_bytes"]["max"] <= own["kept_bytes"]["max"]
    assert written["on_paper"]["Llama 3 70B"]["device_flops"] > written["on_paper"]["SmolLM2 135M"]["device_flops"]


@pytest.mark.parametrize("sizes", [(), (10, 0)])
def test_sizes_that_are_none(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="name numbers of devices"):
        measure_scale(sizes)


def test_every_device_takes_part() -> None:
    num_devices = DEVICES_PER_EDGE + 2
    tiers = simulate(num_devices)
    assert len(tiers.devices) == num_devices
    assert len(tiers.edges) == num_edges(num_devices) == 2
    tiers.network.install()
    equip(tiers)
    updates = tiers.network.fine_tune()
    assert [update.num_examples for update in updates.values()] == [2 * DEVICES_PER_EDGE, 4]
    assert [update.faults for update in updates.values()] == [(), ()]


def test_idle_devices_of_one_cut_hold_the_same_parts() -> None:
    tiers = simulate(5)
    tiers.network.install()
    equip(tiers)
    first, *others = (device.decoder_parts() for device in tiers.devices.values())
    assert all(head is first[0] and tail is first[1] for head, tail in others)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "none was given; give one of them"),
        (["run.yaml", "--scale"], "2 were given; give one of them"),
        (["--scale", "--sizes", "ten"], "give numbers with commas between"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
