"""Whatever bytes come in, they are a frame that may come now or a ``WireFormatError``, and they take no more room than
they have.

The long loops are plain and seeded: a failure names the seed. ``GAISNET_FUZZ_INPUTS`` changes how many inputs they try.
"""

import os
import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gaisnet.config import WireSettings
from gaisnet.errors import WireFormatError
from gaisnet.transport.codec import Codec
from gaisnet.transport.frames import Frame, Kind, decode_frame, encode_failure, encode_frame
from gaisnet.transport.session import Asked, Session
from gaisnet.transport.stream import Limits
from tests.transport.test_codec import SAMPLES

LIMITS = Limits(part_bytes=64, max_message_bytes=512, max_requests=4)
PEER, HERE = b"p" * 16, b"h" * 16
INPUTS = int(os.environ.get("GAISNET_FUZZ_INPUTS", "1000000"))
MIB = 2**20

number = st.one_of(st.integers(0, 6), st.sampled_from([63, 64, 65, 511, 512, 513, 2**31, 2**32 - 1]))
frame = st.builds(
    Frame,
    session=st.sampled_from([PEER, PEER, PEER, HERE, b"", bytes(17)]),
    kind=st.sampled_from(Kind),
    step=number,
    part=number,
    total_bytes=number,
    acknowledged=st.integers(0, 3),
    payload=st.binary(max_size=80),
)


class Victim:
    """A session under fire, which answers and asks now and then, and what its attacker has seen of it."""

    def __init__(self, dials: bool) -> None:
        self.session = Session(HERE, LIMITS, dials)
        self.arrived_bytes = 0
        self.step = 0  # of the attacker's last request
        self._dials = dials
        self.reconnect()

    def reconnect(self) -> None:
        self.session.end()
        self.session.begin()
        if self._dials:
            self.session.next_frame()
        self.session.receive(Frame(PEER, Kind.WELCOME if self._dials else Kind.HELLO))
        self.answers = 0  # sent on this connection
        self.asked: list[int] = []

    def receive(self, data: bytes) -> bool:
        """Whether the bytes were taken; the connection begins anew where they were not."""
        self.arrived_bytes += len(data)
        try:
            for event in self.session.receive(decode_frame(data, LIMITS)):
                if isinstance(event, Asked) and event.job.step % 8:
                    self.session.answer(event.job, Kind.ANSWER, event.job.payload)
        except WireFormatError:
            self.reconnect()
            return False
        finally:
            assert self.session.buffered_bytes <= min(self.arrived_bytes, 3 * LIMITS.max_message_bytes)
        return True

    def speak(self, asks: bool) -> None:
        """Send what there is to send."""
        if asks and self.session.request(b"?" * 70) % 5 == 0:
            self.session.abandon(self.session.request(b"given up"))
        while (sent := self.session.next_frame()) is not None:
            if sent.kind is Kind.REQUEST and sent.part:
                self.asked.append(sent.step)
            self.answers += (
                sent.kind is Kind.ANSWER and sent.part == (max(sent.total_bytes, 1) - 1) // LIMITS.part_bytes
            )


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 256)
def test_random_bytes(data: bytes) -> None:
    try:
        decode_frame(data, LIMITS)
    except WireFormatError:
        pass


@settings(max_examples=1000, deadline=None)
@given(frame)
def test_frames_come_back_or_are_refused(sent: Frame) -> None:
    try:
        found = decode_frame(encode_frame(sent), LIMITS)
    except WireFormatError:
        return
    assert found == sent


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.lists(st.one_of(frame.map(encode_frame), st.binary(max_size=40), st.none()), max_size=25))
def test_random_sequences(dials: bool, sequence: list[bytes | None]) -> None:
    victim = Victim(dials)
    for data in sequence:
        if data is None:
            victim.speak(asks=True)
        else:
            victim.receive(data)


# -- long loops --------------------------------------------------------------------------------------------------------


def in_order(victim: Victim, chance: random.Random) -> list[bytes]:
    """Frames that may come next, all parts of a payload."""
    kind = chance.choice([Kind.REQUEST, Kind.REQUEST, Kind.ANSWER, Kind.FAILURE, Kind.ACK])
    if kind is Kind.ACK or (kind is not Kind.REQUEST and not victim.asked):
        return [encode_frame(Frame(PEER, Kind.ACK, acknowledged=victim.answers))]
    payload = chance.randbytes(chance.choice([0, 1, 64, 65, 200]))
    if kind is Kind.FAILURE:
        payload = encode_failure("CutError", "wrong")
    if kind is Kind.REQUEST:
        victim.step += 1
    step = victim.step if kind is Kind.REQUEST else victim.asked.pop()
    cuts = range(0, max(len(payload), 1), LIMITS.part_bytes)
    pieces = [payload[cut : cut + LIMITS.part_bytes] for cut in cuts]
    return [
        encode_frame(Frame(PEER, kind, step, part, len(payload), victim.answers, piece))
        for part, piece in enumerate(pieces)
    ]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """``data`` with a few bytes changed, left out, put in, or repeated."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                changed[place : place + 1] = bytes([(changed[place] if place < len(changed) else 0) ^ 1 << place % 8])
            case 2:
                del changed[place : place + chance.randrange(1, 9)]
            case 3:
                changed[place:place] = chance.randbytes(chance.randrange(1, 9))
            case _:
                changed[place:place] = changed[place : place + chance.randrange(1, 40)]
    return bytes(changed)


def inputs(victim: Victim, chance: random.Random) -> list[bytes]:
    """What comes next: frames in order, one of them mutated, left out or repeated, or noise."""
    frames = in_order(victim, chance)
    place = chance.randrange(len(frames))
    fate = chance.random()
    if fate < 0.15:
        frames[place] = mutated(frames[place], chance)
    elif fate < 0.18:
        del frames[place]
    elif fate < 0.21:
        frames.insert(place, frames[place])
    elif fate < 0.23:
        frames.insert(place, chance.randbytes(chance.randrange(120)))
    return frames


def bombard(num_inputs: int, seed: int) -> tuple[int, int]:
    """Counts of inputs that were taken and refused."""
    chance = random.Random(seed)
    counts = Counter[bool]()
    while counts.total() < num_inputs:
        victim = Victim(dials=chance.random() < 0.5)
        for _ in range(100):
            victim.speak(asks=chance.random() < 0.3)
            counts.update(victim.receive(data) for data in inputs(victim, chance))
    return counts[True], counts[False]


@contextmanager
def memory_ceiling(more_bytes: int) -> Iterator[None]:
    """Nothing inside may take so much more address space: an allocation above it fails with ``MemoryError``."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def peak_of(data: bytes, limits: Limits) -> int:
    """Most bytes that Python held at one time to read ``data`` as a frame of a listener."""
    session = Session(HERE, limits, dials=False)
    session.begin()
    session.receive(Frame(PEER, Kind.HELLO))
    tracemalloc.start()
    try:
        session.receive(decode_frame(data, limits))
    except WireFormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_short_bombardment() -> None:
    with memory_ceiling(64 * MIB):
        taken, refused = bombard(5_000, seed=1)
    assert taken > 2_000 and refused > 500  # both kinds are tried, or the loop is worth nothing


@pytest.mark.parametrize("total", [1, 10**6, 2**31 - 1, 2**40, 2**64 - 1])
@pytest.mark.parametrize("size", [1, 1000, MIB])
def test_reading_a_frame_takes_no_more_than_it_brings(size: int, total: int) -> None:
    data = encode_frame(Frame(PEER, Kind.REQUEST, 1, 0, total, 0, bytes(size)))
    assert peak_of(data, Limits()) <= 1.2 * size + 20_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_inputs() -> None:
    with memory_ceiling(64 * MIB):
        taken, refused = bombard(INPUTS, seed=int(os.environ.get("GAISNET_FUZZ_SEED", "2")))
    assert taken > INPUTS / 3 and refused > INPUTS / 10


# -- the codec of messages ---------------------------------------------------------------------------------------------


@cache
def messages() -> list[bytes]:
    exact = WireSettings(smashed="float32", body_output="float32", gradient="float32", adapter="float32")
    small = replace_codes("int8")
    return [Codec(code).encode(message) for code in (exact, small) for kind in SAMPLES.values() for message in kind]


def replace_codes(code: str) -> WireSettings:
    return WireSettings.model_validate(dict.fromkeys(("smashed", "body_output", "gradient", "anchor", "adapter"), code))


def mutated_message(chance: random.Random) -> bytes:
    """Other numbers in a header, other bytes in a tensor, or anything."""
    data = chance.choice(messages())
    stop = 8 + int.from_bytes(data[:8], "little")
    fate = chance.random()
    if fate < 0.4:
        place = chance.choice([place for place in range(8, stop) if data[place : place + 1].isdigit()] or [stop - 1])
        return data[:place] + str(chance.randrange(10)).encode() + data[place + 1 :]
    if fate < 0.6 and stop < len(data):
        place = chance.randrange(stop, len(data))
        return data[:place] + chance.randbytes(1) + data[place + 1 :]
    return mutated(data, chance)


def decode_mutated(num_inputs: int, seed: int) -> int:
    """Count of mutated messages that still were one."""
    chance = random.Random(seed)
    codec = Codec(WireSettings())
    taken = 0
    for _ in range(num_inputs):
        data = mutated_message(chance)
        try:
            message = codec.decode(data)
        except WireFormatError:
            continue
        taken += 1
        tensors = [value for value in vars(message).values() if isinstance(value, torch.Tensor)]
        # int8 becomes float32, four times as large.
        assert sum(tensor.nbytes for tensor in tensors) <= 4 * len(data)
    return taken


def peak_of_message(data: bytes) -> int:
    tracemalloc.start()
    try:
        Codec(WireSettings()).decode(data)
    except WireFormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_few_mutated_messages() -> None:
    decode_mutated(50, seed=0)
    with memory_ceiling(128 * MIB):
        assert decode_mutated(1_000, seed=1) > 100


def test_reading_a_mutated_message_takes_little() -> None:
    chance = random.Random(3)
    decode_mutated(50, seed=0)
    for _ in range(200):
        data = mutated_message(chance)
        assert peak_of_message(data) <= 10 * len(data) + 200_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mutated_messages() -> None:
    decode_mutated(50, seed=0)
    with memory_ceiling(128 * MIB):
        assert decode_mutated(INPUTS, seed=2) > INPUTS / 10
