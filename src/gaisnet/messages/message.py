"""The root of all messages, and types of their fields."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict

from gaisnet.errors import UnexpectedMessage

Split = Literal["train", "validate", "test"]
"""Sets of a device's examples: training, validation (for the gate), test (for scores)."""


Scored = Literal["validate", "test"]
"""Sets that anyone may ask scores of."""


MOST = 2**31 - 1
"""Largest credible count."""


Role = Literal["relay", "domain"]


Whose = Literal["domain", "foundation"]


def wire(setting: str, short_whole: bool = False) -> Any:
    """Declare a tensor field that is written as ``config.wire.<setting>`` says.

    With ``short_whole``, rows shorter than a group of int4 are written in float32 where it says int4: they are
    logits of a few classes, whose scales would cost the bytes that are saved, and whose errors all count.
    """
    return field(metadata={"wire": setting, "short_whole": short_whole})


@dataclass(frozen=True)
class Message:
    """Root of all messages."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, strict=False, extra="forbid")


LASTING = frozenset({"ModelRelease"})
"""Names of messages whose tensors never change within a run: they may be read while they are sent, and stored in
part."""


@dataclass(frozen=True)
class Done(Message):
    """Executed, without a result."""


M = TypeVar("M", bound=Message)


def expect(reply: Message, kind: type[M], asker: str, of: str = "") -> M:
    """Return ``reply`` if it is of the kind that ``asker`` waits for, ``of`` whom. Raises ``UnexpectedMessage``."""
    if not isinstance(reply, kind):
        raise UnexpectedMessage(f"{asker}, waiting for a {kind.__name__}{of},", type(reply).__name__)
    return reply
