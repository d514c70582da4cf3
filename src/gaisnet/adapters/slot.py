"""A place in a body at which adapters have modules of their own, where peft has none for them."""

from collections.abc import Iterable

from torch import nn


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
