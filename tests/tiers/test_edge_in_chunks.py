"""An edge whose model arrives in chunks continues after a restart, and keeps nothing twice."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from gaisnet.checkpoint import FolderStore
from gaisnet.config import Config
from gaisnet.errors import LinkLost, OutputNotWritable
from gaisnet.messages import (
    AnchorRelease,
    AnchorRequest,
    ChunkRequest,
    Install,
    Installed,
    Message,
    ModelRelease,
    ModelRequest,
)
from gaisnet.models.recipe import Recipe
from gaisnet.tiers.edge.edge import Edge
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, coded
from gaisnet.transport.ledger import Ledger
from tests.tiers.cohort import model_release
from tests.tiny import tiny_config

CONFIG = tiny_config(wire={"max_message_bytes": 2**16}, relay={"enabled": False})
RELEASE = model_release(CONFIG, Recipe(tuple(range(6)), ()))


class Cloud:
    """A cloud behind a link that breaks at a chunk."""

    peer = "life"

    def __init__(self, breaks_at: int | None = None) -> None:
        self._answer = coded(self, Codec(CONFIG.wire))
        self._breaks_at = breaks_at
        self.chunks: list[int] = []
        self.others: list[type[Message]] = []

    def handle(self, message: Message) -> Message:
        self.others.append(type(message))
        if isinstance(message, ModelRequest):
            return RELEASE
        assert isinstance(message, AnchorRequest)
        return AnchorRelease(torch.tensor([3, 4], dtype=torch.int32), torch.zeros(7, 32))

    def send(self, frame: bytes) -> Future[bytes]:
        answer: Future[bytes] = Future()
        message = Codec(CONFIG.wire).decode(frame)
        if isinstance(message, ChunkRequest):
            self.chunks.append(message.index)
            if message.index == self._breaks_at:
                answer.set_exception(LinkLost("cloud", "the process was killed"))
                return answer
        found = self._answer("north", frame)
        assert isinstance(found, bytes)
        answer.set_result(found)
        return answer


def edge(cloud: Cloud, store: FolderStore, config: Config = CONFIG) -> Edge:
    ledger = Ledger()
    link = CodedLink(cloud, Codec(config.wire), ledger, "edge_cloud", "up", "cloud", store.arrivals)
    return Edge(config.edges[0], config, link, {}, ledger, store)


def num_chunks() -> int:
    codec = Codec(CONFIG.wire)
    return -(-codec.pack(RELEASE).size_bytes // codec.chunk_bytes)


def held(one: Edge) -> dict[str, torch.Tensor]:
    assert one._state is not None
    return dict(one._state.release.tensors)


def same(one: Edge) -> bool:
    tensors = held(one)
    return tensors.keys() == RELEASE.tensors.keys() and all(
        torch.equal(tensors[name], tensor) for name, tensor in RELEASE.tensors.items()
    )


def test_an_edge_that_was_killed_while_its_model_came_asks_for_the_rest_only(tmp_path: Path) -> None:
    killed, order = Cloud(breaks_at=2), Install("run", "digest")
    with pytest.raises(LinkLost):
        edge(killed, FolderStore(tmp_path)).handle(order)
    assert killed.chunks == [0, 1, 2]
    assert FolderStore(tmp_path).load("model") is None
    cloud = Cloud()
    again = edge(cloud, FolderStore(tmp_path))
    assert again.handle(order) == Installed(0, -1)
    assert cloud.chunks == list(range(2, num_chunks())) and num_chunks() > 3
    assert same(again)


def test_an_edge_that_was_killed_before_it_kept_its_model_asks_for_no_chunk_again(tmp_path: Path) -> None:
    first = Cloud()
    one, store = edge(first, FolderStore(tmp_path)), FolderStore(tmp_path)
    one._ask_cloud(ModelRequest(), ModelRelease)  # and then it is killed
    assert first.chunks == list(range(num_chunks())) and store.arrivals.is_dir()
    cloud = Cloud()
    again = edge(cloud, store)
    again.handle(Install("run", "digest"))
    assert cloud.chunks == [] and same(again)


def test_what_came_in_chunks_is_on_the_shelf_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    one = edge(Cloud(), store)
    one.handle(Install("run", "digest"))
    assert not store.arrivals.exists() and (tmp_path / "model.safetensors").is_file()
    assert same(one)  # with no file behind it any more
    store.arrivals.mkdir()
    (store.arrivals / "stale.part").write_bytes(b"of a life before")
    kept = store.load("model")
    assert kept is not None and all(torch.equal(kept[1][name], t) for name, t in RELEASE.tensors.items())


def test_a_model_that_could_not_be_kept_is_installed_by_the_next_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, order = FolderStore(tmp_path), Install("run", "digest")
    one = edge(Cloud(), store)

    def full(*_: object) -> None:
        raise OutputNotWritable(tmp_path, "no space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(store, "save", full)
        with pytest.raises(OutputNotWritable):
            one.handle(order)
    assert one.handle(order) == Installed(0, -1)
    assert same(one) and store.load("model") is not None
    assert one._activations._hidden_size == 32  # so that devices' activations are held against this model


def test_another_model_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    edge(Cloud(), store).handle(Install("run", "digest"))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(LinkLost):
        edge(Cloud(breaks_at=3), store).handle(Install("run", "another digest"))
    assert (tmp_path / "model.safetensors").read_bytes() == before
