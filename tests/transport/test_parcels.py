"""Messages longer than a frame: in chunks that fit, within a tensor too, each checked, none sent twice."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gaisnet.config import WireSettings
from gaisnet.errors import (
    ChunkDamaged,
    GaisnetError,
    LinkLost,
    MessageTooLarge,
    OutputNotWritable,
    ParcelRefused,
    ParcelUnknown,
    PeerError,
    WireFormatError,
)
from gaisnet.messages import (
    BodyOutput,
    BodyOutputGrad,
    Chunk,
    ChunkRequest,
    Done,
    Message,
    ModelRelease,
    ModelRequest,
    Parcel,
    ParcelSent,
    ParcelTaken,
    Wanted,
)
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, coded
from gaisnet.transport.courier import Depots
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink
from tests.frames import Frames

SMALL = WireSettings(max_message_bytes=2**16, body_output="float32", gradient="float32")
CODEC = Codec(SMALL)
CHUNK = CODEC.chunk_bytes


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def output(num_rows: int = 12_000) -> BodyOutput:
    """192,000 bytes of rows, 240,000 with the numbers of their examples."""
    return BodyOutput("train", 7, num_rows, torch.arange(num_rows, dtype=torch.int32), numbers(num_rows, 4))


def release(num_rows: int = 7_500) -> ModelRelease:
    tensors = {"embed_tokens.weight": numbers(num_rows, 8), "layers.0.codes": torch.ones(300, 3, dtype=torch.int8)}
    return ModelRelease("{}", (0,), (), tensors)


class Site:
    """Gives rows back as a gradient, or the model."""

    def __init__(self, model: ModelRelease | None = None) -> None:
        self.taken: list[Message] = []
        self.model = model or release()

    def handle(self, message: Message) -> Message:
        self.taken.append(message)
        if isinstance(message, ModelRequest):
            return self.model
        assert isinstance(message, BodyOutput)
        return BodyOutputGrad(message.step, 0.5, message.rows_ND)


class Wire:
    """A link for bytes to a site; ``change`` sees every message on its way, by direction."""

    peer = "life"

    def __init__(self, site: Site, codec: Codec = CODEC) -> None:
        self._codec = codec
        self._answer = coded(site, codec)
        self.change: Callable[[Message], Message] = lambda message: message
        self.asked: list[Message] = []

    def send(self, payload: bytes) -> Future[bytes]:
        answer: Future[bytes] = Future()
        self.asked.append(self._codec.decode(payload))
        try:
            there = self.change(self.asked[-1])
            back = self._answer("asker", payload if there is self.asked[-1] else self._codec.encode(there))
            assert isinstance(back, bytes)
            reply = self._codec.decode(back)
            changed = self.change(reply)
            answer.set_result(back if changed is reply else self._codec.encode(changed))
        except GaisnetError as error:  # as a link does
            lost = isinstance(error, LinkLost)
            answer.set_exception(error if lost else PeerError("site", type(error).__name__, str(error)))
        return answer

    def restart(self, site: Site) -> None:
        """Another life of the site, which knows nothing of this one."""
        self._answer = coded(site, self._codec)

    def chunks(self) -> list[int]:
        """Which were pulled or pushed, in turn."""
        return [m.index for m in self.asked if isinstance(m, Chunk | ChunkRequest)]


def link(wire: Wire, folder: Path | None = None, codec: Codec = CODEC, ledger: Ledger | None = None) -> CodedLink:
    return CodedLink(wire, codec, ledger or Ledger(), "edge_cloud", "up", "cloud", folder)


def same_model(found: Message, expected: ModelRelease) -> bool:
    assert isinstance(found, ModelRelease) and found.tensors.keys() == expected.tensors.keys()
    return replace(found, tensors={}) == replace(expected, tensors={}) and all(
        torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items()
    )


# -- what fits, and what does not --------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [True, False])
def test_a_long_request_and_its_long_answer_cross_in_frames_that_fit(local: bool) -> None:
    site, ledger, sent = Site(), Frames(), output()
    wire = Wire(site)
    one = LocalLink(site, CODEC, ledger, "edge_cloud", "up") if local else link(wire, ledger=ledger)
    answer = one.send(sent).result(timeout=30)
    (taken,) = site.taken
    assert isinstance(taken, BodyOutput) and isinstance(answer, BodyOutputGrad)
    assert torch.equal(taken.rows_ND, sent.rows_ND) and torch.equal(taken.examples_E, sent.examples_E)
    assert torch.equal(answer.grad_ND, sent.rows_ND)
    sizes = [len(frame) for _, _, frame in ledger.frames]
    assert max(sizes) <= 2**16
    kinds = [type(message) for _, _, message in ledger.messages()]
    pushed = [Parcel, Wanted, *[Chunk, Done] * 4, ParcelSent]
    assert kinds == [*pushed, Parcel, *[ChunkRequest, Chunk] * 3, ParcelTaken, Done]
    traffic = ledger.traffic("edge_cloud")
    assert traffic.bytes_up + traffic.bytes_down == sum(sizes)
    whole = len(CODEC.encode(sent)) + len(CODEC.encode(answer))
    assert sum(sizes) - whole < 9_000  # headers of chunks, and what asks for them


def test_what_goes_out_in_chunks_is_not_overtaken() -> None:
    """A device gets its model, and then what is put into it."""
    site = Site()
    one, shorter = link(Wire(site)), output(3)
    answers = [one.send(message) for message in (output(), shorter, output(11_000), ModelRequest(), shorter)]
    for answer in answers:
        answer.result(timeout=30)
    taken = [len(m.rows_ND) if isinstance(m, BodyOutput) else 0 for m in site.taken]
    assert taken == [12_000, 3, 11_000, 0, 3]


def test_a_message_that_fits_is_one_frame_as_before() -> None:
    ledger, sent = Frames(), output(3_000)
    answer = LocalLink(Site(), CODEC, ledger, "edge_cloud", "up").send(sent).result()
    assert [len(frame) for _, _, frame in ledger.frames] == [len(CODEC.encode(sent)), len(CODEC.encode(answer))]


def test_a_model_larger_than_64_mib_crosses_and_so_does_a_tensor_of_it_that_alone_is_larger() -> None:
    codec = Codec(WireSettings(max_message_bytes=2**26))
    embeddings = torch.zeros(2**15, 576)  # 72 MiB
    embeddings[::1000] = numbers(33, 576)
    model = ModelRelease("{}", (0,), (), {"embed_tokens.weight": embeddings, "norm.weight": numbers(2**20)})
    ledger = Frames()
    found = LocalLink(Site(model), codec, ledger, "edge_cloud", "up").send(ModelRequest()).result()
    assert same_model(found, model)
    sizes = [len(frame) for _, _, frame in ledger.frames]
    assert max(sizes) <= 2**26 and sum(size > 2**20 for size in sizes) == 2


def test_a_message_over_the_limit_of_transfers_is_refused_where_it_is_sent() -> None:
    codec = Codec(SMALL.model_copy(update={"max_transfer_bytes": 2**17}))
    with pytest.raises(MessageTooLarge, match=r"a message to 'cloud': 24\d{4} bytes, .* raise wire.max_transfer_bytes"):
        link(Wire(Site(), codec), codec=codec).send(output()).result(timeout=30)
    with pytest.raises(PeerError, match="raise wire.max_transfer_bytes"):
        link(Wire(Site(), codec), codec=codec).send(ModelRequest()).result(timeout=30)


# -- what breaks on the way --------------------------------------------------------------------------------------------


def damaged(chunk: Message, times: list[int]) -> Message:
    """The chunk of a number that ``times`` names, with a wrong byte; once for every time that it is named."""
    if not isinstance(chunk, Chunk) or chunk.index not in times:
        return chunk
    times.remove(chunk.index)
    data_B = chunk.data_B.clone()
    data_B[5] ^= 1
    return replace(chunk, data_B=data_B)


def test_a_damaged_chunk_is_sent_again_and_no_other_one() -> None:
    wire, times = Wire(Site()), [1, 1]
    wire.change = lambda message: damaged(message, times)
    assert same_model(link(wire).send(ModelRequest()).result(timeout=30), release())
    assert wire.chunks() == [0, 1, 1, 1, 2, 3]
    wire, times = Wire(Site()), [2]
    wire.change = lambda message: damaged(message, times)
    answer = link(wire).send(output()).result(timeout=30)
    assert isinstance(answer, BodyOutputGrad) and torch.equal(answer.grad_ND, output().rows_ND)
    assert wire.chunks()[:5] == [0, 1, 2, 2, 3]


def test_a_chunk_that_is_damaged_every_time_fails_and_is_named() -> None:
    wire = Wire(Site())
    wire.change = lambda message: damaged(message, [1])
    with pytest.raises(ChunkDamaged, match="a ModelRelease from 'cloud': chunk 1 of 4 has another digest"):
        link(wire).send(ModelRequest()).result(timeout=30)
    assert wire.chunks() == [0, 1, 1, 1]
    with pytest.raises(PeerError, match="a BodyOutput from 'asker': chunk 1 of 4"):
        link(wire).send(output()).result(timeout=30)


def lost_at(index: int) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        if isinstance(message, Chunk) and message.index == index:
            raise LinkLost("cloud", "the link was closed")
        return message

    return change


def test_what_has_come_before_a_link_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    wire = Wire(Site())
    wire.change = lost_at(2)
    with pytest.raises(LinkLost):
        link(wire, tmp_path).send(ModelRequest()).result(timeout=30)
    wire.change = lambda message: message
    wire.restart(Site())  # both ends have another life; the model is the same
    assert same_model(link(wire, tmp_path).send(ModelRequest()).result(timeout=30), release())
    assert wire.chunks() == [0, 1, 2, 2, 3]
    assert same_model(link(wire, tmp_path).send(ModelRequest()).result(timeout=30), release())  # nobody has cleared it
    assert wire.chunks() == [0, 1, 2, 2, 3]


def test_of_a_file_with_a_wrong_byte_only_what_is_before_it_is_used(tmp_path: Path) -> None:
    wire = Wire(Site())
    wire.change = lost_at(3)
    with pytest.raises(LinkLost):
        link(wire, tmp_path).send(ModelRequest()).result(timeout=30)
    (part,) = tmp_path.glob("*.part")
    content = bytearray(part.read_bytes())
    content[CHUNK + 9] ^= 1
    part.write_bytes(content + b"half a chunk")
    wire.change = lambda message: message
    assert same_model(link(wire, tmp_path).send(ModelRequest()).result(timeout=30), release())
    assert wire.chunks() == [0, 1, 2, 3, 1, 2, 3]


def test_another_model_takes_the_place_of_one_that_was_half_there(tmp_path: Path) -> None:
    wire = Wire(Site())
    wire.change = lost_at(3)
    with pytest.raises(LinkLost):
        link(wire, tmp_path).send(ModelRequest()).result(timeout=30)
    other = release(5_000)
    wire = Wire(Site(other))
    assert same_model(link(wire, tmp_path).send(ModelRequest()).result(timeout=30), other)
    assert len(list(tmp_path.glob("*.part"))) == 1


def test_an_end_that_restarts_in_the_middle_loses_the_request() -> None:
    wire = Wire(Site())

    def restart(message: Message) -> Message:
        if isinstance(message, Chunk) and message.index == 1:
            wire.restart(Site())
        return message

    wire.change = restart
    with pytest.raises(LinkLost, match="a request to 'cloud' is lost: it does not know the parcel any more"):
        link(wire).send(output()).result(timeout=30)


def test_a_disk_without_room_is_known_before_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(Site())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputNotWritable, match="bytes are to come, and 1000 are free"):
        link(wire, tmp_path).send(ModelRequest()).result(timeout=30)
    assert wire.chunks() == []


def test_a_request_that_nobody_waits_for_any_longer_is_not_sent_to_its_end() -> None:
    wire = Wire(Site())
    waits: Future[bytes] = Future()
    wire.send = lambda payload: waits  # type: ignore[method-assign]
    sent = link(wire).send(output())
    assert sent.cancel()
    for _ in range(100):
        if waits.cancelled():
            break
        sent_again = Future[None]()
        with pytest.raises(TimeoutError):
            sent_again.result(timeout=0.05)
    assert waits.cancelled()


# -- ends that lie -----------------------------------------------------------------------------------------------------


def offers(**changes: object) -> Callable[[Message], Message]:
    return lambda message: replace(message, **changes) if isinstance(message, Parcel) else message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"size_bytes": 2**36 + 1}, "68719476737 bytes, the limit is 68719476736"),
        ({"size_bytes": 2**62}, "4611686018427387904 bytes"),
        ({"chunk_bytes": 1}, f"chunks of 1 bytes, here {CHUNK}"),
        ({"chunk_bytes": 2**40}, "chunks of 1099511627776 bytes"),
    ],
)
def test_a_parcel_out_of_bounds_is_refused_before_any_of_it_comes(lie: dict[str, int], found: str) -> None:
    wire = Wire(Site())
    wire.change = offers(**lie)
    with pytest.raises(ParcelRefused, match=f"a ModelRelease from 'cloud': it is announced with {found}"):
        link(wire).send(ModelRequest()).result(timeout=30)
    with pytest.raises(PeerError, match=f"a BodyOutput from 'asker': it is announced with {found}"):
        link(wire).send(output()).result(timeout=30)
    assert wire.chunks() == []


def test_a_parcel_that_is_announced_larger_than_it_is_takes_no_memory_and_is_refused() -> None:
    wire = Wire(Site())
    wire.change = offers(size_bytes=2**24)
    with pytest.raises(WireFormatError, match=f"chunk 3 of .* where chunk 3 of {CHUNK} is due, .* from 'cloud'"):
        link(wire).send(ModelRequest()).result(timeout=30)


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"digest": "0" * 64}, "does not know the parcel"),
        ({"message": "Done"}, "a ModelRelease that was announced as a Done"),
        ({"message": "../../etc"}, "a ModelRelease that was announced as"),
    ],
)
def test_a_parcel_that_is_not_the_one_announced_is_refused(lie: dict[str, str], found: str) -> None:
    wire = Wire(Site())
    wire.change = offers(**lie)
    with pytest.raises(GaisnetError, match=found):
        link(wire).send(ModelRequest()).result(timeout=30)


def test_chunks_that_fit_their_digests_but_not_the_parcel_are_refused_and_forgotten(tmp_path: Path) -> None:
    wire, other = Wire(Site()), Wire(Site(release(7_499)))
    offered = other._codec.decode(other.send(CODEC.encode(ModelRequest())).result())
    assert isinstance(offered, Parcel)
    lie = offered.digest

    def swap(message: Message) -> Message:
        if isinstance(message, Parcel):
            return replace(message, digest=lie)
        if isinstance(message, ChunkRequest):
            return replace(message, digest=true)
        return replace(message, digest=lie) if isinstance(message, Chunk) else message

    real = wire._codec.decode(wire.send(CODEC.encode(ModelRequest())).result())
    assert isinstance(real, Parcel)
    true = real.digest
    wire.change = swap
    with pytest.raises(WireFormatError, match="a ModelRelease from 'cloud' that is not the one announced"):
        link(wire, tmp_path).send(ModelRequest()).result(timeout=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stray", [ChunkRequest("0f" * 32, 0), ParcelSent("0f" * 32), Chunk.from_bytes("0f" * 32, 0, "", bytearray(3))]
)
def test_a_stray_piece_of_a_parcel_is_refused(stray: Message) -> None:
    with pytest.raises(ParcelUnknown, match="parcel 0f0f0f0f0f0f: it is not here"):
        coded(Site(), CODEC)("asker", CODEC.encode(stray))


def test_a_chunk_that_is_not_due_is_refused_and_what_is_there_stays() -> None:
    site = Site()
    answer = coded(site, CODEC)
    ledger = Frames()
    LocalLink(site, CODEC, ledger, "edge_cloud", "up").send(output()).result()
    pushed = [frame for _, direction, frame in ledger.frames if direction == "up"][:6]
    offer, *chunks, act = pushed
    answer("asker", offer)
    with pytest.raises(WireFormatError, match="chunk 2 of .* bytes where chunk 0 of .* is due, in a BodyOutput"):
        answer("asker", chunks[2])
    for chunk in chunks[:3]:
        answer("asker", chunk)
    with pytest.raises(WireFormatError, match="a BodyOutput of which chunk 3 has not come"):
        answer("asker", act)
    with pytest.raises(ParcelUnknown):
        answer("another", chunks[3])
    assert CODEC.decode(answer("asker", offer)) == Wanted(3)  # type: ignore[arg-type]
    answer("asker", chunks[3])
    assert isinstance(CODEC.decode(answer("asker", act)), Parcel)  # type: ignore[arg-type]


def test_an_asker_holds_so_many_parcels_at_most() -> None:
    answer = coded(Site(), CODEC)
    offers = [Parcel("BodyOutput", f"{number:064x}", 2**20, CHUNK) for number in range(40)]
    for offer in offers:
        assert CODEC.decode(answer("asker", CODEC.encode(offer))) == Wanted(0)  # type: ignore[arg-type]
    chunk = Chunk.from_bytes(offers[0].digest, 0, "", bytearray(CHUNK))
    with pytest.raises(ParcelUnknown):
        answer("asker", CODEC.encode(chunk))
    with pytest.raises(ChunkDamaged):  # of the last one
        answer("asker", CODEC.encode(replace(chunk, digest=offers[-1].digest)))


def test_an_asker_may_be_given_less_to_ask_with_than_others() -> None:
    depots = Depots(CODEC, {"device": 2**18}.get)
    for size, asker in ((2**18, "device"), (2**20, "edge")):
        offer = CODEC.encode(Parcel("ExtendSession", f"{size:064x}", size, CHUNK))
        assert CODEC.decode(depots.depot_for(asker).answer(offer, Site().handle)) == Wanted(0)  # type: ignore[arg-type]
    with pytest.raises(ParcelRefused, match="from 'device': it is announced with 262145 bytes, the limit is 262144"):
        depots.depot_for("device").answer(
            CODEC.encode(Parcel("ExtendSession", "0f" * 32, 2**18 + 1, CHUNK)), Site().handle
        )


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_model_is_hashed_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[int] = []
    from gaisnet.transport.packed import Packed

    whole = Packed.cut

    def counted(self: Packed, start: int, stop: int) -> Any:
        cuts.append(start)
        return whole(self, start, stop)

    monkeypatch.setattr(Packed, "cut", counted)
    answer = coded(Site(), CODEC)
    for asker in ("north", "south", "west"):
        assert isinstance(CODEC.decode(answer(asker, CODEC.encode(ModelRequest()))), Parcel)  # type: ignore[arg-type]
    assert len(cuts) == 4


def test_a_parcel_that_was_taken_is_not_kept() -> None:
    wire = Wire(Site())
    link(wire).send(ModelRequest()).result(timeout=30)
    (offer,) = {m.digest for m in wire.asked if isinstance(m, ChunkRequest)}
    with pytest.raises(PeerError, match="ParcelUnknown"):
        wire.send(CODEC.encode(ChunkRequest(offer, 0))).result()


def test_numbers_that_change_meanwhile_cross_as_they_were() -> None:
    """Adapters go on learning; only what is frozen is read while it is sent."""
    site, rows_ND = Site(), numbers(12_000, 4)
    wire = Wire(site)

    def learn(message: Message) -> Message:
        if isinstance(message, Chunk):
            rows_ND.zero_()
        return message

    wire.change = learn
    sent = BodyOutput("train", 7, 12_000, torch.arange(12_000, dtype=torch.int32), rows_ND)
    answer = link(wire).send(sent).result(timeout=30)
    assert isinstance(answer, BodyOutputGrad) and torch.equal(answer.grad_ND, numbers(12_000, 4))


def test_a_frame_of_a_chunk_fits_whatever_its_number() -> None:
    for limit in (2**16, 2**20, 2**26, 2**31):
        codec = Codec(WireSettings(max_message_bytes=limit))
        chunk = Chunk.from_bytes("f" * 64, 2**40, "f" * 64, bytearray(min(codec.chunk_bytes, 2**20)))
        assert len(codec.encode(chunk)) - len(chunk.data) <= codec.frame_bytes - codec.chunk_bytes
        assert codec.frame_bytes <= min(limit, 2**26)
