"""Networks of devices with images: measured for real, on a tiny foundation model and images that nobody confuses."""

from pathlib import Path

import pytest
import torch

from gaisnet.data.images import ImageData, Images
from gaisnet.research.paper.clusters import clusters_of
from gaisnet.research.paper.course import COLUMNS, learn, measure
from gaisnet.research.paper.experiment import Setup
from gaisnet.research.paper.fleet import KINDS, NUM_DEVICES, Kind, Site, dealt, sites
from gaisnet.research.paper.flops import Work, flops_per_example
from gaisnet.research.paper.foundation import pretrained
from tests.research.paper.test_pretraining import TINY, bright_or_dark

pytestmark = pytest.mark.integration

LABELS = ("dark", "bright")
SIX = TINY.model_copy(update={"layers": 6})
PARAMETERS = {
    "prompts": 3 * 10 * 16 + 2 * 16 + 2,
    "lora": 3 * 8 * (4 * (16 + 16) + 2 * (16 + 64)) + 2 * 16 + 2,
    "full": 3 * (4 * (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16 + 4 * 16) + 2 * 16 + 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAISNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        return pretrained(SIX, bright_or_dark(20))


def held(turned: bool = False, num: int = 12) -> ImageData:
    """Dark and bright images; ``turned`` calls each by the other's name."""
    images = bright_or_dark(num)
    return ImageData("fashion", LABELS, *[Images(images.grey_NHW, images.labels_N ^ int(turned))] * 2)


def test_a_network_learns_and_its_course_is_what_crossed(folder: Path) -> None:
    split, local = (learn(folder, [[Site(held(), mode)] * 2], "lora", 3, seed=0) for mode in ("split", "local"))
    for course in (split, local):
        assert len(course.accuracy) == len(course.device_bytes) == len(course.device_flops) == 3
        assert list(course.device_bytes) == sorted(course.device_bytes)
        assert course.accuracy[-1] == 1.0
    adapter = 4 * PARAMETERS["lora"]
    (_, second, third) = local.device_bytes
    assert 2 * adapter < third - second < 2 * adapter + 20_000  # there and back, with headers
    assert split.device_bytes[0] < local.device_bytes[0]
    assert split.device_bytes[2] - split.device_bytes[1] < 0.5 * adapter
    assert len(set(split.device_flops)) == 1 and local.device_flops[0] < local.device_flops[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns_of_each_kind(folder: Path, kind: Kind) -> None:
    assert learn(folder, [[Site(held(), "split")]], kind, 1, seed=0).parameters == PARAMETERS[kind]


def test_every_cluster_has_a_model_of_its_own(folder: Path) -> None:
    """Devices that call the same things by each other's names cannot share one."""
    one, other = Site(held(), "split"), Site(held(turned=True), "split")
    together = learn(folder, [[one, other]], "lora", 3, seed=0)
    apart = learn(folder, [[one], [other]], "lora", 3, seed=0)
    assert together.accuracy[-1] <= 0.75 and apart.accuracy[-1] == 1.0


def test_the_same_seed_gives_the_same_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setup, "foundation", lambda self: folder)
    clusters = [sites("hybrid", [held(), held(num=8)])]
    first, again = (measure(Setup(quick=True), clusters, "lora", 1) for _ in range(2))
    assert first == again and first.figures.keys() >= COLUMNS.keys()
    assert first.figures["accuracy"] == first.curves["accuracy"][-1] and len(first.curves["round"]) == 4
    whole = first.figures["once_bytes"] + 4 * first.figures["round_bytes"]
    assert whole == pytest.approx(first.figures["device_bytes"])


def test_devices_are_dealt_all_images_and_take_their_modes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageData("fashion", LABELS, bright_or_dark(80), bright_or_dark(1000))
    monkeypatch.setattr(Setup, "images", lambda self, name: data)
    devices = dealt(Setup(), alpha=10, seed=0)
    assert (len(devices), sum(len(each.train) for each in devices)) == (NUM_DEVICES, 40)
    assert sum(len(each.test) for each in devices) == 1000
    modes = {
        network: [site.mode for site in sites(network, devices)[:3]] for network in ("hybrid", "federated", "split")
    }
    assert modes == {"hybrid": ["split", "local", "split"], "federated": ["local"] * 3, "split": ["split"] * 3}


def test_clusters_are_of_devices_whose_images_look_alike_whatever_their_labels(folder: Path) -> None:
    def only(label: int, turned: bool) -> ImageData:
        data = held(turned)
        mine = data.train.select(torch.arange(label, 12, 2).numpy())
        return ImageData("fashion", LABELS, mine, mine)

    devices = [only(label, turned) for label in (0, 1) for turned in (False, True)]
    found = clusters_of(folder, [devices[i] for i in (0, 2, 1, 3)], 2, seed=0)
    assert sorted([{id(each) for each in mine} for mine in found], key=lambda ids: id(devices[0]) not in ids) == [
        {id(devices[0]), id(devices[1])},
        {id(devices[2]), id(devices[3])},
    ]
    assert [len(mine) for mine in clusters_of(folder, devices[::3], 1, seed=0)] == [2]


def test_operations_by_hand(folder: Path) -> None:
    embeddings = 2 * 4 * 16 * 14 * 14  # four patches
    products = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 64)
    layer = products + 2 * 2 * 5 * 5 * 16
    assert flops_per_example(folder, Work(once=1)) == embeddings + layer
    assert flops_per_example(folder, Work(3, 3, passes=4)) == embeddings + 3 * layer + 4 * 3 * 2 * layer
    assert flops_per_example(folder, Work(3, 3, 1, all_learn=True)) == embeddings + 9 * layer + 3 * products
