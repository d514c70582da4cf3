"""Each kit's part of a network's configuration: enough to draw, learn and answer as before, and no more."""

from pathlib import Path
from typing import Any

import pytest

from gaisnet.config import Config
from gaisnet.config.file import load_config, parse_config
from gaisnet.data.devices import load_device, load_domains, load_public_task
from gaisnet.deployment.kits import prepare
from gaisnet.deployment.site import CLOUD
from gaisnet.deployment.site_config import own_part
from gaisnet.errors import DataError
from gaisnet.tiers.split.layout import Layout
from tests.tiny import tiny_config, tiny_edge, tiny_newcomer, tiny_raw_config, write_tiny_run


def site_names(config: Config) -> list[str]:
    return [CLOUD, *(edge.name for edge in config.edges), *(device.name for _, device in config.each_device())]


def read_back(config: Config) -> Config:
    """As out of a kit: a part stands by itself, without the rest that it was checked with."""
    return parse_config(config.model_dump(mode="json"))


@pytest.fixture(scope="module")
def built_in() -> Config:
    """A domain that is built in, and two newcomers that are dealt examples of it."""
    edges: list[dict[str, Any]] = [
        {"name": name, "domain": domain, "follows": follows, "devices": [{"name": f"{name}-{i}"} for i in range(3)]}
        for name, domain, follows in (
            ("first", "languages", None),
            ("second", "later", "languages"),
            ("third", "latest", "languages"),
        )
    ]
    data = {"train_examples": 48, "test_examples": 24, "dirichlet_alpha": 50.0}
    return parse_config(tiny_raw_config(edges=edges, data=data, absorb={"validation_share": 0.2}))


def test_a_device_draws_its_share_of_built_in_data_without_knowing_its_neighbours(built_in: Config) -> None:
    whole = {name: data for domain in load_domains(built_in).values() for name, data in domain.devices.items()}
    assert len(whole) == 9
    for name, data in whole.items():
        part = read_back(own_part(built_in, name))
        assert [device.name for _, device in part.each_device()] == [name]
        assert load_device(part, name) == data


def test_the_cloud_knows_what_is_public_without_any_path(built_in: Config, tmp_path: Path) -> None:
    own_data = load_config(write_tiny_run(tmp_path, edges=[tiny_edge("north", "shapes"), tiny_edge("south", "tastes")]))
    for config in (built_in, own_data):
        part = read_back(own_part(config, CLOUD))
        assert [load_public_task(edge, part) for edge in part.edges] == [
            load_public_task(edge, config) for edge in config.edges
        ]
    with pytest.raises(DataError, match="its devices have data of their own, which this site's configuration"):
        load_domains(own_part(own_data, CLOUD))


def test_an_edge_knows_whether_its_devices_have_data_of_their_own(built_in: Config, tmp_path: Path) -> None:
    """Devices that are dealt a share of built-in data may have all of it; of others there is a bound."""
    own_data = load_config(write_tiny_run(tmp_path, edges=[tiny_edge("north", "shapes"), tiny_edge("south", "tastes")]))
    for config, deals in ((built_in, True), (own_data, False)):
        for edge in config.edges:
            part = read_back(own_part(config, edge.name))
            assert part.deals(part.edges[0]) is config.deals(edge) is deals


def test_layers_are_whose_they_are_in_the_whole_network() -> None:
    edges = [tiny_edge("north", "shapes"), tiny_newcomer("south", "tastes", "shapes")]
    edges[0]["devices"][1]["head_layers"], edges[1]["devices"][0]["head_layers"] = 3, 0
    config = tiny_config(edges=edges, domain={"precision": "int8"})
    whole = Layout(config, 8)
    assert (whole.first_cut, whole.last_cut) == (0, 3)
    for name in site_names(config):
        part = Layout(read_back(own_part(config, name)), 8)
        assert (part.first_cut, part.last_cut, part.middle) == (whole.first_cut, whole.last_cut, whole.middle)
        assert part.config.num_learning == config.num_learning == 1
        assert part.config.seed_for("device", name) == config.seed_for("device", name)


def test_a_newcomers_site_has_the_task_of_the_domain_that_it_follows() -> None:
    config = tiny_config(edges=[tiny_edge("north", "shapes"), {**tiny_newcomer("south", "tastes", "shapes")}])
    bare = config.edges[1].model_copy(update={"template": None, "labels": ()})
    config = config.model_copy(update={"edges": (config.edges[0], bare)})
    for name in ("south", "south-a"):
        (edge,) = read_back(own_part(config, name)).edges
        assert (edge.template, edge.labels) == (config.edges[0].template, config.edges[0].labels)


def test_a_last_mile_of_other_devices_is_no_fault_of_a_site() -> None:
    absorb = {"validation_share": 0.2, "last_mile": {"epochs": 1}}
    config = tiny_config(edges=[tiny_edge("north", "shapes", "a"), tiny_edge("south", "tastes")], absorb=absorb)
    for name in site_names(config):
        read_back(own_part(config, name))


def test_no_file_of_a_kit_names_another_site_or_where_its_data_are(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", edges=[tiny_edge("quebec", "shapes"), tiny_edge("zanzibar", "tastes")])
    config = load_config(run)
    kits = prepare(config, tmp_path / "sites")
    foundation = str(tmp_path / "run" / "foundation")
    for name, kit in kits.items():
        content = b"".join(file.read_bytes() for file in sorted(kit.rglob("*")) if file.is_file())
        knows = {"quebec", "zanzibar"} if name == CLOUD else {name.partition("-")[0]}
        assert {edge for edge in ("quebec", "zanzibar") if edge.encode() in content} == knows
        paths = {device.name for _, device in config.each_device() if str(device.data).encode() in content}
        assert paths == ({name} if "-" in name else set())
        assert (foundation.encode() in content) == (name == CLOUD)
        if "-" in name:
            assert {device.name for _, device in config.each_device() if device.name.encode() in content} == {name}


def test_a_part_stands_by_itself_whatever_the_network_needs_in_all() -> None:
    edges = [tiny_edge("north", "shapes", travelling="north-a"), tiny_edge("south", "tastes")]
    absorb = {"last_mile": {"epochs": 1}, "validation_share": 0.2}
    config = tiny_config(edges=edges, absorb=absorb, faults={"min_edges": 2})
    for name in site_names(config):
        assert read_back(own_part(config, name)).edges
