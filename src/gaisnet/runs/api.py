"""The Python interface: run, resume and open a run, and watch it cycle by cycle."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from gaisnet.config import Config
from gaisnet.config.file import load_config, parse_config, with_absolute_paths
from gaisnet.config.infrastructure import RoutingSettings
from gaisnet.data.devices import IN_MEMORY, load_domains
from gaisnet.data.examples import DeviceData
from gaisnet.data.jsonl import examples_from_rows
from gaisnet.errors import ConfigError, DataError
from gaisnet.models.tokenization import prompt_ids
from gaisnet.progress import Progress, silent
from gaisnet.runs.answering_device import open_device
from gaisnet.runs.output import RunFolder
from gaisnet.runs.run import Run, kept_config, local_build, majorities, read_summary
from gaisnet.runs.summary import Cycle, Summary
from gaisnet.serving.generation.answering import Answering, GenerationRequest
from gaisnet.serving.generation.device import calibrated
from gaisnet.serving.generation.text import Sampling
from gaisnet.transport.ledger import Ledger

Rows = Iterable[Any]
"""Mappings with the keys of a JSONL line (a Hugging Face dataset, for one), or pairs of prompt and completion."""
Data = str | PathLike[str] | Mapping[str, Rows]
"""A device's data: a folder, or rows under ``train`` and ``test``."""


class RunningRun:
    """A run that is carried out while it is iterated over.

    Each item is the record of a finished cycle; the first one, cycle 0, is measured before training. Leaving the loop
    stops the run, and ``resume`` continues it after the last finished cycle. Iterate once.

    Attributes:
        out: The output folder.
    """

    def __init__(self, out: Path, cycles: Iterator[Cycle]) -> None:
        self.out = out
        self._cycles = cycles

    def __iter__(self) -> Iterator[Cycle]:
        """Yield the record of each cycle when it is finished. Raises ``GaisnetError``."""
        return self._cycles

    def finish(self) -> "FinishedRun":
        """Carry out the remaining cycles, and open the run. Raises ``GaisnetError``."""
        for _ in self._cycles:
            pass
        return FinishedRun(self.out)


class FinishedRun:
    """The output folder of a run, finished or stopped.

    Args:
        out: The folder.

    Raises:
        NothingToResume: There is no run in it.
        CheckpointError: Its summary is damaged, or of another version.

    Attributes:
        out: The folder.
        summary: All figures.
        adapters: Folder of each adapter that peft loads, by name: the domains, and ``merged``.
    """

    def __init__(self, out: str | PathLike[str]) -> None:
        self.out = Path(out)
        self.summary: Summary = read_summary(self.out)
        folder = self.out / "adapters"
        self.adapters = {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    @contextmanager
    def answers(
        self,
        device: str | None = None,
        escalate: Literal["never", "auto", "always"] = "auto",
        threshold: float | None = None,
        overrides: Sequence[str] = (),
        progress: Progress = silent,
    ) -> Iterator["Answers"]:
        """Serve the run's models inside the context, as ``gaisnet serve`` does, without a server.

        Args:
            device: The device that writes; None for the first split one.
            escalate: For the model ``auto``: ask the foundation model never, where the domain model is unsure, always.
            threshold: Confidence below which it is unsure; None to calibrate it on test examples.
            overrides: ``key=value``, to name moved models or data.
            progress: Told while confidence is calibrated, which takes minutes, but only once.

        Raises:
            GaisnetError: Another process has the run, its model is an encoder or cannot be loaded, or the device is
                unknown.
        """
        routing = RoutingSettings(escalate=escalate, threshold=threshold)
        with open_device(self.out, device, overrides) as opened:
            known = calibrated(opened, routing, self.out, progress)
            yield Answers(opened.answering(routing, known, speculate=False), opened.tokenizer)


class Answers:
    """Generation with a run's models.

    Attributes:
        models: Names of the models: ``auto``, ``foundation``, ``merged`` and the domains.
    """

    def __init__(self, answering: Answering, tokenizer: Any) -> None:
        self.models: tuple[str, ...] = tuple(answering.models)
        self._answering = answering
        self._tokenizer = tokenizer

    def stream(
        self,
        prompt: str,
        model: str = "auto",
        max_tokens: int = 128,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the text that continues ``prompt``, piece by piece; the whole is in ``generate``.

        Raises:
            UnknownModel: ``model`` is not one of ``models``.
            GaisnetError: The prompt cannot be answered, or a body fails.
        """
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        ids = tuple(prompt_ids(self._tokenizer, prompt))
        request = GenerationRequest(model, ids, sampling, tuple(stop), continues=True)
        yield from self._answering.begin(request)

    def generate(self, prompt: str, **options: Any) -> str:
        """Return the whole text; options and errors as for ``stream``."""
        return "".join(self.stream(prompt, **options))


def run(
    config: str | PathLike[str] | Mapping[str, Any] | Config,
    out: str | PathLike[str],
    data: Mapping[str, Data] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> RunningRun:
    """Prepare a run; it is carried out when it is iterated over, or by ``finish``.

    Args:
        config: A YAML file, a dictionary of settings, or a configuration.
        out: Output folder; new or empty.
        data: Data of devices, instead of the folders in the configuration. Examples in memory are not written anywhere.
        overrides: ``key=value``, as for ``--set``.
        progress: Called with the stage, the steps done, their number, and figures.

    Raises:
        ConfigError: The configuration is wrong, or ``data`` names an unknown device.
        DataError: A row is wrong.
    """
    settings, given = _with_data(_configuration(config, overrides), data or {})
    return RunningRun(Path(out), _carry_out(Path(out), settings, given, progress))


def resume(
    out: str | PathLike[str],
    data: Mapping[str, Data] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> RunningRun:
    """Continue a stopped run, or give a finished one more cycles with the override ``cycles=N``.

    Args:
        out: Its output folder.
        data: Examples that were given in memory before, which a run does not keep; or moved folders.
        overrides: ``key=value``; only some settings may change, see ``gaisnet run --help``.
        progress: As for ``run``.
    """
    return RunningRun(Path(out), _resume(Path(out), data or {}, overrides, progress))


def open_run(out: str | PathLike[str]) -> FinishedRun:
    """Open the output folder of a run; see ``FinishedRun``."""
    return FinishedRun(out)


def _carry_out(out: Path, config: Config, given: Mapping[str, DeviceData[Any]], progress: Progress) -> Iterator[Cycle]:
    with ExitStack() as held:
        domains = load_domains(config, given)
        folder = held.enter_context(RunFolder.create(out))
        run = Run(config, folder, progress, local_build(config, domains, Ledger), majorities(domains))
        yield run.summary.cycles[-1]
        yield from run.cycles()


def _resume(out: Path, data: Mapping[str, Data], overrides: Sequence[str], progress: Progress) -> Iterator[Cycle]:
    with RunFolder.resume(out) as folder:
        config, given = _with_data(kept_config(folder, overrides), data)
        domains = load_domains(config, given)
        run = Run(config, folder, progress, local_build(config, domains, Ledger), majorities(domains))
        yield from run.cycles()


def _configuration(config: str | PathLike[str] | Mapping[str, Any] | Config, overrides: Sequence[str]) -> Config:
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides", "the configuration is a Config already", "change it with model_copy")
        return config
    if isinstance(config, Mapping):
        from gaisnet.config.overrides import with_overrides

        parsed = parse_config(with_overrides(dict(config), overrides), "the configuration", overrides=overrides)
        return with_absolute_paths(parsed, overrides, Path.cwd())
    return load_config(Path(config), overrides)


def _with_data(config: Config, data: Mapping[str, Data]) -> tuple[Config, dict[str, DeviceData[Any]]]:
    """Name the given data in the configuration, and return examples in memory by device."""
    devices = {device.name: edge for edge, device in config.each_device()}
    if unknown := sorted(data.keys() - devices.keys()):
        found = f"the configuration has no such device: {', '.join(unknown)}"
        raise ConfigError("data", found, f"name some of: {', '.join(devices)}")
    given = {
        name: _examples(name, rows, newcomer=bool(devices[name].follows))
        for name, rows in data.items()
        if isinstance(rows, Mapping)
    }
    folders = {
        name: Path(f"{IN_MEMORY}{name}") if isinstance(rows, Mapping) else Path(rows).absolute()
        for name, rows in data.items()
    }
    edges = tuple(
        edge.model_copy(
            update={
                "devices": tuple(
                    one.model_copy(update={"data": folders.get(one.name, one.data)}) for one in edge.devices
                )
            }
        )
        for edge in config.edges
    )
    return config.model_copy(update={"edges": edges}), given


def _examples(device: str, rows: Mapping[str, Rows], newcomer: bool) -> DeviceData[Any]:
    wanted = {"test"} if newcomer else {"train", "test"}
    if set(rows) != wanted:
        found = f"has rows for {sorted(rows)}"
        raise DataError(f"data of device '{device}'", found, f"give rows for {' and '.join(sorted(wanted))}")
    sets = {split: examples_from_rows(each, device, split) for split, each in rows.items()}
    return DeviceData(sets.get("train", ()), sets["test"])
