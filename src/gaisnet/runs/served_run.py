"""A finished or stopped run that serves answers with its last models, while it may go on training."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from gaisnet.config import Config
from gaisnet.data.devices import LoadedData, load_available
from gaisnet.data.examples import DeviceData
from gaisnet.engines.local_serving import ServedNetwork, build_served_network
from gaisnet.errors import ConfigError, DataError
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import Foundation
from gaisnet.network import Network
from gaisnet.progress import Progress, silent
from gaisnet.runs.output import RunFolder
from gaisnet.runs.run import Run, data_key, kept_config


class _Stopped(BaseException):
    """Training was stopped in the middle of a step; not an ``Exception``, so that nobody takes it for a fault."""


class ServedRun:
    """A run whose bodies are served, from ``serve_run``.

    Attributes:
        config: The run's configuration.
        data: Private examples, by device; they stay in this process, like the devices.
        absent: Devices whose examples are missing, and why; the run cannot train then.
        foundation: Its foundation model, for the tokenizer.
        bodies: The bodies for devices' sessions.
    """

    def __init__(
        self, config: Config, at_hand: LoadedData, run: Run, foundation: Foundation, bodies: ServedNetwork
    ) -> None:
        self.config = config
        self.data = _by_device(at_hand)
        self.absent = at_hand.absent
        self.foundation = foundation
        self.bodies = bodies
        self._run = run
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def num_cycles(self) -> int:
        """Number of finished cycles."""
        return len(self._run.summary.cycles) - 1

    def learn(self, cycles: int) -> Future[None]:
        """Train for some cycles in a thread, while the bodies answer.

        Everything is written after each cycle, as in a run that serves nobody. The future gets the end, or the error
        of the training; answers go on. Call it again only after that. Raises ``DataError`` if examples are
        missing.
        """
        for name, found in self.absent.items():
            do = f"say where they are, with --set {data_key(self.config, name)}=FOLDER"
            raise DataError(f"learning with the examples of device '{name}'", f"they are not there ({found})", do)
        end: Future[None] = Future()
        self._thread = threading.Thread(target=self._learn, args=(cycles, end), name="learning", daemon=True)
        self._thread.start()
        return end

    def stop_training(self) -> None:
        """Stop training, in the middle of a cycle if need be; finished cycles stay."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def break_off(self) -> None:
        """End training between two steps if it must stop."""
        if self._stopping.is_set() and threading.current_thread() is self._thread:
            raise _Stopped

    def _learn(self, cycles: int, end: Future[None]) -> None:
        try:
            with suppress(_Stopped):
                for _ in range(cycles):
                    self.break_off()
                    self._run.cycle()
        except Exception as error:
            end.set_exception(error)
        else:
            end.set_result(None)


@contextmanager
def serve_run(out: Path, overrides: Sequence[str] = (), progress: Progress = silent) -> Iterator[ServedRun]:
    """Serve the bodies of the run in ``out``, as of its last finished cycle.

    Examples may be missing; the foundation model may not.

    Args:
        out: A run's output folder; it is claimed meanwhile, since the run may go on.
        overrides: As for ``kept_config``.
        progress: Told while it loads, and while it trains.

    Raises:
        GaisnetError: There is no run, another process runs it, or its checkpoint cannot be used.
    """
    with RunFolder.resume(out) as folder:
        config = kept_config(folder, overrides)
        with _loaded(config, folder, progress) as served:
            yield served


@contextmanager
def _loaded(config: Config, folder: RunFolder, progress: Progress) -> Iterator[ServedRun]:
    at_hand = load_available(config)
    shapes = {name: TaskTemplate(domain.template, domain.labels) for name, domain in at_hand.domains.items()}
    made: list[tuple[Foundation, ServedNetwork]] = []
    served: list[ServedRun] = []

    def build(foundation: Foundation, text: str, note: Progress) -> Network:
        if foundation.family.is_encoder:
            found = "its foundation model is an encoder, which tells classes apart and writes no text"
            raise ConfigError(f"answers of the run in '{folder.path}'", found, "serve a run of a decoder")
        bodies = build_served_network(
            config, foundation, shapes, _by_device(at_hand), text, note, absent=at_hand.absent
        )
        made.append((foundation, bodies))
        return bodies.network

    def told(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(stage, done, total, figures)
        for one in served:
            one.break_off()

    try:
        run = Run(config, folder, told, build, {})  # majorities are in the summary already
        served.append(ServedRun(config, at_hand, run, *made[0]))
        yield served[0]
    finally:
        for one in served:
            one.stop_training()
        for _, bodies in made:
            bodies.close()


def _by_device(at_hand: LoadedData) -> dict[str, DeviceData]:
    return {name: data for domain in at_hand.domains.values() for name, data in domain.devices.items()}
