"""A place in a body at which adapters have modules of their own, where peft has none for them."""

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from gaisnet.errors import AdapterMismatch

IN_PLACE = "in_place"
"""Name of a slot whose modules hold weights of the module that it is in: an adapter's tensors are named without it."""


def peft_name(name: str) -> str:
    """An adapter's name inside a body: unlike any module or attribute, whatever the user calls a domain."""
    return f"adapter-{name}"


class Slot(nn.ModuleDict):
    """Modules by their adapters' ``peft_name``, as peft keeps them, too; some of the adapters act."""

    acting: tuple[str, ...] = ()

    def mine(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of these adapters, plain names, that have a module here; as they are called here."""
        return tuple(inner for inner in map(peft_name, names) if inner in self)

    def check(self, names: Iterable[str]) -> None:
        """Raise ``AdapterMismatch`` if these adapters cannot act together."""

    def act(self, names: Iterable[str]) -> None:
        """Let exactly these adapters, plain names, act."""
        self.acting = self.mine(names)


class OneOf(Slot):
    """A slot at which one adapter at a time can act."""

    kind: ClassVar[str]
    """What an adapter has here, for errors."""

    def check(self, names: Iterable[str]) -> None:
        """Raise ``AdapterMismatch`` if more than one has a module here: what they say does not add up."""
        mine = self.mine(names)
        if len(mine) > 1:
            name = mine[0].removeprefix(peft_name(""))
            raise AdapterMismatch(name, f"to be the only one with {self.kind}", f"{len(mine)} that should act")
