"""A slot in a body for modules of adapters that peft does not provide."""

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from gaisnet.errors import AdapterMismatch

IN_PLACE = "in_place"
"""Name of a slot with weights of the module that it is in: an adapter's tensors are named without it."""


def peft_name(name: str) -> str:
    """Return an adapter's name inside a body: unlike any module or attribute, whatever the user calls a domain."""
    return f"adapter-{name}"


class Slot(nn.ModuleDict):
    """Modules by their adapters' ``peft_name``, as in peft; some of the adapters are active."""

    acting: tuple[str, ...] = ()

    def mine(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of these adapters (plain names) that have a module here, by their names in the slot."""
        return tuple(inner for inner in map(peft_name, names) if inner in self)

    def check(self, names: Iterable[str]) -> None:
        """Raise ``AdapterMismatch`` if these adapters cannot be active together."""

    def act(self, names: Iterable[str]) -> None:
        """Activate exactly these adapters (plain names)."""
        self.acting = self.mine(names)


class OneOf(Slot):
    """A slot at which one adapter at a time can be active."""

    kind: ClassVar[str]
    """Kind of module, for errors."""

    def check(self, names: Iterable[str]) -> None:
        """Raise ``AdapterMismatch`` if more than one has a module here: their outputs do not add up."""
        mine = self.mine(names)
        if len(mine) > 1:
            name = mine[0].removeprefix(peft_name(""))
            raise AdapterMismatch(name, f"to be the only one with {self.kind}", f"{len(mine)} that should act")
