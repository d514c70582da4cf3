"""The root of all errors, and errors of configurations, data, models, files and adapters."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self


class GaisnetError(Exception):
    """Root of the tree: catch this to catch everything that GaisNet raises on purpose."""

    @classmethod
    def quoted(cls, text: str) -> Self:
        """Rebuild an error that another site raised, from its text."""
        error = cls.__new__(cls)
        Exception.__init__(error, text)
        return error


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


class LockTaken(GaisnetError):
    """Another process has a lock, or may have it.

    Attributes:
        holder: The process in words, as far as it is known.
        lost: Whether it ran on another host, and nobody here can tell whether it still does.
    """

    def __init__(self, lock: Path, holder: object | None, lost: bool = False) -> None:
        self.holder = str(holder or "a process that has not said its name yet")
        self.lost = lost
        self.do = f"if that process has ended, remove '{lock}'" if lost else "wait until that process ends, or end it"
        super().__init__(f"lock '{lock}': {self.found}; {self.do}")

    @property
    def found(self) -> str:
        """The holder, in words."""
        if self.lost:
            return f"was taken by {self.holder}; on a network file system nobody here can tell whether it has ended"
        return f"is taken by {self.holder}"


class NoLocks(ConfigError):
    """A file system has no locks that are freed when a process dies."""

    def __init__(self, lock: Path, found: str) -> None:
        do = "use a folder on a local disk, or mount the file system with locks (for NFS, without nolock)"
        super().__init__(f"lock '{lock}'", f"its file system has no locks ({found})", do)


class OutputInUse(ConfigError):
    """The output folder belongs to a run that is under way or to one that has finished."""

    def __init__(self, folder: Path, found: str, do: str = "choose another with --out, or remove it") -> None:
        super().__init__(f"output folder '{folder}'", found, do)


class NothingToResume(ConfigError):
    """A folder holds no run that could go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"output folder '{folder}'", "no part of a run was finished in it", "start one with --out")


class OutputNotWritable(GaisnetError):
    """A file or folder of a run cannot be written: a full disk, missing rights, a folder that went away."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"writing '{path}': {found}; free some space or choose a writable folder with --out")


class CacheNotWritable(GaisnetError):
    """A model that this machine has made cannot be kept: a full disk, missing rights, no such folder."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"keeping a model in '{path}': {found}; free some space, or let GAISNET_CACHE name a folder of a disk that "
            "can be written"
        )


class NoCache(GaisnetError):
    """There is no folder for models that this machine makes."""

    def __init__(self, found: str) -> None:
        super().__init__(f"keeping a model in '~/.cache/gaisnet': {found}; let GAISNET_CACHE name a folder")


class ActivationsNotKept(GaisnetError):
    """Activations beyond the limit in memory cannot be written to a file. What was kept before is as it was."""

    def __init__(self, size_bytes: int, folder: str, found: str) -> None:
        super().__init__(
            f"keeping {size_bytes / 2**20:.0f} MiB of activations in a file of '{folder}': {found}; free some space, "
            "let TMPDIR name a folder with more, or raise service.max_activations_mib, and resume"
        )


class CheckpointError(GaisnetError):
    """A checkpoint is there but cannot be read."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"checkpoint '{path}' cannot be read: {found}; remove it to start again without it")


class CheckpointVersion(CheckpointError):
    """A checkpoint or a summary was written in another format."""

    def __init__(self, path: Path, found: str, supported: str) -> None:
        GaisnetError.__init__(
            self,
            f"'{path}' is in format {found}, and this release reads format {supported}; finish the run with the "
            "release that began it, or start a new one (docs/compatibility.md)",
        )


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


class StaleAdapter(AdapterError):
    """An adapter grew out of a release that is not the one in place."""

    def __init__(self, adapter: str, expected: int, found: int) -> None:
        super().__init__(
            f"adapter '{adapter}': expected one grown out of version {expected}, found version {found}; "
            "release the present one and learn again"
        )


class UnknownAdapter(AdapterError):
    """A session asks for an adapter that its body does not serve."""

    def __init__(self, adapter: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"adapter '{adapter}': it is not served here; served are: {names}")


class MeasureError(GaisnetError):
    """A benchmark could not measure what it was asked to."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; see what was written above, and run it again")
