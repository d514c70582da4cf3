"""Every error that GaisNet raises on purpose.

Each class owns its message and takes values. A message has three parts: what was asked, what was found, what to do.
"""

from collections.abc import Iterable
from pathlib import Path


class GaisnetError(Exception):
    """Root of the tree: catch this to catch everything that GaisNet raises on purpose."""


class ConfigError(GaisnetError):
    """The configuration, or something it names, cannot be used. Raised before any work starts."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"{asked}: {found}; {do}")


class UnknownKey(ConfigError):
    """A configuration key that no model declares; names the nearest key that exists."""

    def __init__(self, key: str, nearest: str | None, known: Iterable[str]) -> None:
        do = f"did you mean '{nearest}'?" if nearest else f"use one of: {', '.join(sorted(known))}"
        super().__init__(f"configuration key '{key}'", "is not known", do)


class DataError(ConfigError):
    """A device's examples or a domain's data set cannot be used."""


class MissingPackage(DataError):
    """A data set or model needs a package that is not installed."""

    def __init__(self, wanted: str, package: str, pip_line: str) -> None:
        super().__init__(wanted, f"the package '{package}' is not installed", f"run: {pip_line}")


class OutputInUse(ConfigError):
    """The output folder belongs to a run that is under way or to one that has finished."""

    def __init__(self, folder: Path, found: str) -> None:
        super().__init__(f"output folder '{folder}'", found, "choose another with --out, or remove it")


class OutputNotWritable(GaisnetError):
    """A file or folder of a run cannot be written: a full disk, missing rights, a folder that went away."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"writing '{path}': {found}; free some space or choose a writable folder with --out")


class ModelError(GaisnetError):
    """A foundation model cannot be found, read, or is of a family that GaisNet cannot cut."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"foundation model '{asked}': {found}; {do}")


class CutError(GaisnetError):
    """A cut, a recipe's layer or the first adapter layer is out of range."""

    def __init__(self, setting: str, value: object, found: str, do: str) -> None:
        super().__init__(f"{setting} is {value} but {found}; {do}")


class NotFinite(GaisnetError):
    """A loss became NaN or infinite: the step is named and the run stops."""

    def __init__(self, what: str, step: str, value: float) -> None:
        super().__init__(
            f"{what} at {step} is {value}; what was finished before it is on disk; "
            "lower the learning rate, or look for broken examples"
        )


class AdapterError(GaisnetError):
    """An adapter cannot be used."""


class AdapterMismatch(AdapterError):
    """An adapter does not fit the body it should be put into."""

    def __init__(self, adapter: str, expected: str, found: str) -> None:
        super().__init__(
            f"adapter '{adapter}': expected {expected}, found {found}; train and use it on the same layers"
        )


class LinkError(GaisnetError):
    """A message could not cross a link."""


class WireFormatError(LinkError):
    """Bytes from a link that are not a message: nothing of them is used."""

    def __init__(self, found: str) -> None:
        super().__init__(f"a frame from the link cannot be read: {found}; the frame is dropped")


class UnexpectedMessage(LinkError):
    """A well-formed message that the receiver does not take at this point."""

    def __init__(self, receiver: str, message: str) -> None:
        super().__init__(f"{receiver} does not take a {message} here; check that both ends run the same version")
