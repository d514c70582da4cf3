from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper

DESCRIPTOR: _descriptor.FileDescriptor

class Header(_message.Message):
    __slots__ = ("session", "kind", "step", "part", "total_bytes", "acknowledged")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NONE: _ClassVar[Header.Kind]
        HELLO: _ClassVar[Header.Kind]
        WELCOME: _ClassVar[Header.Kind]
        REQUEST: _ClassVar[Header.Kind]
        ANSWER: _ClassVar[Header.Kind]
        FAILURE: _ClassVar[Header.Kind]
        ACK: _ClassVar[Header.Kind]
    NONE: Header.Kind
    HELLO: Header.Kind
    WELCOME: Header.Kind
    REQUEST: Header.Kind
    ANSWER: Header.Kind
    FAILURE: Header.Kind
    ACK: Header.Kind
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    kind: Header.Kind
    step: int
    part: int
    total_bytes: int
    acknowledged: int
    def __init__(self, session: bytes | None = ..., kind: Header.Kind | str | None = ..., step: int | None = ..., part: int | None = ..., total_bytes: int | None = ..., acknowledged: int | None = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    def __init__(self, kind: str | None = ..., text: str | None = ...) -> None: ...
