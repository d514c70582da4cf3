"""Frames as bytes and back: see frame.proto. Nothing of a frame is used before its sizes are checked."""

from enum import IntEnum
from typing import NamedTuple

from google.protobuf.message import DecodeError

from gaisnet.errors import WireFormatError
from gaisnet.transport import frame_pb2
from gaisnet.transport.stream import Limits

LIFE_BYTES = 16
HEADER_BYTES = 256  # the length byte and the longest header that it can announce
FAILURE_BYTES = 2**14
_FAILURE_CHARACTERS = 3000  # these and those of the class fit into FAILURE_BYTES, at up to four bytes each
_KIND_CHARACTERS = 200


class Kind(IntEnum):
    """Purpose of a frame."""

    HELLO = frame_pb2.Header.HELLO
    WELCOME = frame_pb2.Header.WELCOME
    REQUEST = frame_pb2.Header.REQUEST
    ANSWER = frame_pb2.Header.ANSWER
    FAILURE = frame_pb2.Header.FAILURE
    ACK = frame_pb2.Header.ACK


_KINDS = {int(kind): kind for kind in Kind}
_WITHOUT_PAYLOAD = frozenset({Kind.HELLO, Kind.WELCOME, Kind.ACK})


class Frame(NamedTuple):
    """One frame; frame.proto describes the fields."""

    session: bytes
    kind: Kind
    step: int = 0
    part: int = 0
    total_bytes: int = 0
    acknowledged: int = 0
    payload: bytes | memoryview = b""


def encode_frame(frame: Frame) -> bytes:
    """Encode ``frame``; the payload is copied once."""
    session, kind, step, part, total_bytes, acknowledged, payload = frame
    header = frame_pb2.Header(
        session=session,
        kind=kind.value,
        step=step,
        part=part,
        total_bytes=total_bytes,
        acknowledged=acknowledged,
    ).SerializeToString()
    return b"".join((bytes((len(header),)), header, payload))


def decode_frame(data: bytes, limits: Limits) -> Frame:
    """Decode ``data``; the payload may be a view of it. Raises ``WireFormatError``."""
    stop = data[0] + 1 if data else 1
    here = len(data) - stop
    if not 0 <= here <= limits.part_bytes:
        raise WireFormatError(
            f"{len(data)} bytes, of which {stop} are a header; a part has at most {limits.part_bytes}"
        )
    try:
        header = frame_pb2.Header.FromString(data[1:stop])
    except DecodeError as error:
        raise WireFormatError(f"no header in {len(data)} bytes") from error
    kind = _KINDS.get(header.kind)
    if kind is None:
        raise WireFormatError(f"a frame of the unknown kind {header.kind}")
    session, step, part, total_bytes = header.session, header.step, header.part, header.total_bytes
    if len(session) != LIFE_BYTES:
        raise WireFormatError(f"a session id of {len(session)} bytes")
    if kind in _WITHOUT_PAYLOAD:
        if step or part or total_bytes or here:
            raise WireFormatError(f"a {kind.name} with a step, a part or a payload")
    else:
        _check_part(kind, step, total_bytes, here, limits)
    payload = data[stop:] if here == total_bytes else memoryview(data)[stop:]
    return Frame(session, kind, step, part, total_bytes, header.acknowledged, payload)


def _check_part(kind: Kind, step: int, total_bytes: int, here: int, limits: Limits) -> None:
    """Raise ``WireFormatError`` if sizes do not fit each other or the limits."""
    limit = FAILURE_BYTES if kind is Kind.FAILURE else limits.max_message_bytes
    if total_bytes > limit:
        raise WireFormatError(f"a payload of {total_bytes} bytes, the limit is {limit}")
    if here > total_bytes or (total_bytes and not here):
        raise WireFormatError(f"a part of {here} bytes in a payload of {total_bytes}")
    if not step:
        raise WireFormatError(f"a {kind.name} without a step")


def encode_failure(kind: str, text: str) -> bytes:
    """Encode the payload of a ``FAILURE``; a long text loses its end."""
    clean = text[:_FAILURE_CHARACTERS].encode(errors="replace").decode()
    return frame_pb2.Failure(kind=kind[:_KIND_CHARACTERS], text=clean).SerializeToString()


def decode_failure(payload: bytes) -> tuple[str, str]:
    """Decode class and text of the other end's error. Raises ``WireFormatError``."""
    try:
        failure = frame_pb2.Failure.FromString(payload)
    except DecodeError as error:
        raise WireFormatError("a FAILURE that does not say what failed") from error
    return failure.kind, failure.text
