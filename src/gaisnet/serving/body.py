"""A body as a service: sessions come, send rows, get rows and go at any time; a step runs what waits as one batch.

Continuous batching as in Orca (Yu et al., OSDI 2022), long prompts in chunks as in Sarathi (arXiv 2308.16369).

Shape legend: T rows (new positions) of one session, W rows that are wanted back, D hidden size.
"""

import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaisnet.adapters.mixing import ServedAdapters, Stack
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import ServiceSettings
from gaisnet.errors import ContextFull, CutError, ServiceFull, SessionClosed, SessionRefused, WireFormatError
from gaisnet.models.parts import Body
from gaisnet.serving.cache import SessionCache, bytes_per_position, in_blocks
from gaisnet.serving.rows import SessionLayers, Share

_MIB = 2**20


@dataclass
class _Waiting:
    """Rows that a session has sent, and what has come of them so far."""

    rows_TD: Tensor
    want: int
    arrival: int
    answer: "Future[Tensor]" = field(default_factory=Future)
    done: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    def take(self, rows_TD: Tensor) -> None:
        """Keep of the next outputs what is wanted: the last ``want`` rows of all."""
        surplus = max(0, len(self.rows_TD) - self.want - self.done)
        self.done += len(rows_TD)
        self.outputs.append(rows_TD[surplus:])

    @property
    def left(self) -> int:
        """Rows that have not run."""
        return len(self.rows_TD) - self.done


@dataclass
class _Session:
    """One sequence, on some layers."""

    name: str
    first: int
    stop: int
    adapters: Stack
    position_bytes: int
    reserved: int  # positions that memory is held for
    cache: SessionCache = field(default_factory=SessionCache)
    queue: deque[_Waiting] = field(default_factory=deque)
    running: bool = False
    closed: bool = False

    @property
    def length(self) -> int:
        """Positions that have run or wait to."""
        return self.cache.length + sum(waiting.left for waiting in self.queue)


@dataclass(frozen=True)
class _Turn:
    """What a session runs in this step."""

    session: _Session
    waiting: _Waiting
    rows_TD: Tensor

    def share(self) -> Share:
        """The same for a forward."""
        s = self.session
        return Share(self.rows_TD, s.cache, s.first, s.stop, s.adapters)


class BodyService:
    """Serves one body. All methods may be called from any thread.

    Somebody has to call ``step``: a thread of its own in ``serving()``, or whoever waits for an answer.

    Args:
        body: A DM's or the FM's. Who else uses it, or switches its adapters, holds ``turn`` meanwhile.
        layers: FM layers that it stands for, those that a recipe dropped included.
        settings: Limits.
    """

    def __init__(self, body: Body, layers: range, settings: ServiceSettings) -> None:
        self._range = layers
        self._config = body.config
        self._adapters = ServedAdapters(body)
        self._layers = SessionLayers(body, self._adapters)
        self._settings = settings
        weight = next(p for p in body.parameters() if p.is_floating_point())
        self._placement = weight.device, weight.dtype
        self._sessions: dict[str, _Session] = {}
        self._left: list[Stack] = []  # adapters of sessions that have ended, to give back between two steps
        self._used_bytes = 0
        self._arrivals = 0
        self._state = threading.Condition()  # guards everything but the body; held for moments
        self.turn = threading.RLock()  # held while the body runs
        self._ending = False
        self.in_thread = False

    # -- what sessions ask -------------------------------------------------------------------------------------------

    def open(self, first: int, stop: int, adapters: Sequence[str] = (), num_positions: int = 0) -> str:
        """Begin a session of layers [first, stop); returns its name, which nobody can guess.

        Args:
            first: FM layer that takes the session's rows.
            stop: FM layer to stop before.
            adapters: What acts, besides nothing else, in the versions that are in place now.
            num_positions: Memory to hold from the beginning, so that the session is refused now or not at all.

        Raises:
            ServiceFull: No room.
            ContextFull: The model takes fewer positions.
            CutError: Layers that are not the body's.
            UnknownAdapter, AdapterMismatch: See ``ServedAdapters.take``.
        """
        self._check_range(first, stop)
        self._check_context(num_positions)
        kept = sum(first <= index < stop for index in self._layers.indices)
        position_bytes = bytes_per_position(self._config, kept, self._placement[1])
        with self.turn, self._state:
            self._settle()
            if len(self._sessions) >= self._settings.max_sessions:
                raise ServiceFull("a new session", f"{len(self._sessions)} are open and no more are allowed")
            reserved = in_blocks(num_positions)
            self._hold(reserved * position_bytes)
            try:
                stack = self._adapters.take(adapters)
            except Exception:
                self._used_bytes -= reserved * position_bytes
                raise
            session = _Session(secrets.token_hex(8), first, stop, stack, position_bytes, reserved)
            self._sessions[session.name] = session
            return session.name

    def extend(
        self, name: str, rows_TD: Tensor, want: int | None = None, position: int | None = None
    ) -> "Future[Tensor]":
        """Run new positions behind a session's past.

        Args:
            name: From ``open``.
            rows_TD: What layer ``first`` of the session takes.
            want: How many of the last output rows the answer has [W, D]; None for all.
            position: Where the rows must stand, for a sender that may have lost count; None for where it is.

        Raises:
            ServiceFull, ContextFull, SessionClosed, SessionRefused, WireFormatError: Nothing was changed.
            SessionClosed: Out of the answer, if the session is closed before it is there.
        """
        want = len(rows_TD) if want is None else want
        if rows_TD.ndim != 2 or rows_TD.shape[1] != self._config.hidden_size or not 0 <= want <= len(rows_TD):
            raise WireFormatError(f"rows {tuple(rows_TD.shape)}, of which {want} wanted, for width {self._width}")
        if not len(rows_TD):
            raise WireFormatError("no rows to run")
        with self._state:
            session = self._session(name)
            if position not in (None, session.length):
                found = f"the session has {session.length}"
                raise SessionRefused(f"rows for position {position}", found, "crop it, or send what lies between")
            length = session.length + len(rows_TD)
            self._check_context(length)
            more = max(0, in_blocks(length) - session.reserved)
            self._hold(more * session.position_bytes)
            session.reserved += more
            self._arrivals += 1
            waiting = _Waiting(rows_TD.detach().to(*self._placement), want, self._arrivals)
            session.queue.append(waiting)
            self._state.notify_all()
            return waiting.answer

    def crop(self, name: str, length: int) -> None:
        """Forget a session's positions from ``length`` on. Raises ``SessionRefused`` while rows of it wait."""
        with self._state:
            session = self._session(name)
            if session.queue:
                raise SessionRefused(f"cropping session '{name}'", "rows of it wait", "take their answer first")
            if not 0 <= length <= session.cache.length:
                raise SessionRefused(
                    f"cropping session '{name}' to {length}", f"it has {session.cache.length}", "crop to fewer"
                )
            session.cache.crop(length)

    def close(self, name: str) -> None:
        """End a session, whatever it waits for, and free its memory; nothing happens if it has ended before."""
        with self._state:
            session = self._sessions.pop(name, None)
            if session is None:
                return
            session.closed = True
            waiting = list(session.queue)
            session.queue.clear()
            if not session.running:  # else the step frees it
                self._free(session)
        for rows in waiting:
            _answer(rows, SessionClosed(name))

    def put_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve a version of an adapter to sessions that open from now on. Raises ``AdapterMismatch``."""
        with self.turn, self._state:
            self._settle()
            self._adapters.put(name, version, spec, tensors)

    # -- the work ----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Run what waits, as one batch; returns the number of rows that ran. Prompts come a chunk at a time."""
        with self.turn:
            with self._state:
                self._settle()
                turns = self._plan()
                for turn in turns:
                    turn.session.running = True
            if not turns:
                return 0
            outcomes = self._run(turns)
            with self._state:
                answers = [self._deliver(turn, outcome) for turn, outcome in zip(turns, outcomes, strict=True)]
        for waiting, outcome in zip(
            answers, outcomes, strict=True
        ):  # without locks: whoever waits may ask again at once
            for rows in waiting:
                _answer(rows, outcome)
        return sum(len(turn.rows_TD) for turn in turns)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, a thread steps whenever something waits; at the end all sessions are closed."""
        thread = threading.Thread(target=self._work, name="body-service", daemon=True)
        self._ending, self.in_thread = False, True
        thread.start()
        try:
            yield
        finally:
            with self._state:
                self._ending = True
                self._state.notify_all()
            thread.join()
            self.in_thread = False

    @property
    def used_bytes(self) -> int:
        """Memory that is held for sessions."""
        return self._used_bytes

    @property
    def num_sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    def _work(self) -> None:
        try:
            while self._wait_for_rows():
                self.step()
        finally:
            for name in list(self._sessions):  # nobody steps for them any more
                self.close(name)

    def _wait_for_rows(self) -> bool:
        """False when there will be no more."""
        with self._state:
            self._state.wait_for(lambda: self._ending or any(s.queue for s in self._sessions.values()))
            return not self._ending

    def _plan(self) -> list[_Turn]:
        """Who runs, and what. Whoever waits longest comes first, so that nobody starves; then the short ones."""
        ready = sorted((s for s in self._sessions.values() if s.queue), key=lambda s: s.queue[0].arrival)
        ready[1:] = sorted(ready[1:], key=lambda s: s.queue[0].left)
        budget, turns = self._settings.step_rows, []
        for session in ready:
            waiting = session.queue[0]
            num_rows = min(waiting.left, self._settings.chunk, budget)
            if num_rows:
                turns.append(_Turn(session, waiting, waiting.rows_TD[waiting.done : waiting.done + num_rows]))
            budget -= num_rows
        return turns

    def _run(self, turns: Sequence[_Turn]) -> Sequence[Tensor | Exception]:
        """Outputs, or what went wrong: if the batch fails, each runs alone, and only the culprit fails."""
        try:
            return self._layers.run([turn.share() for turn in turns])
        except Exception as error:
            if len(turns) == 1:
                return [error]
            return [outcome for turn in turns for outcome in self._run([turn])]

    def _deliver(self, turn: _Turn, outcome: Tensor | Exception) -> list[_Waiting]:
        """Keep outputs; returns what is answered by them, or fails."""
        session, waiting = turn.session, turn.waiting
        session.running = False
        if session.closed:
            self._free(session)
            return []  # closing has answered them
        if isinstance(outcome, Exception):
            failed = list(session.queue)  # what stands behind them in the sequence cannot run either
            session.queue.clear()
            return failed
        waiting.take(outcome)
        if waiting.left:
            return []
        return [session.queue.popleft()]

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return int(self._config.hidden_size)

    def _session(self, name: str) -> _Session:
        if name not in self._sessions:
            raise SessionClosed(name)
        return self._sessions[name]

    def _hold(self, size_bytes: int) -> None:
        limit = self._settings.max_cache_mib * _MIB
        if self._used_bytes + size_bytes > limit:
            found = f"{self._used_bytes} of {limit} bytes are held, and {size_bytes} more are needed"
            raise ServiceFull("memory for a session", found)
        self._used_bytes += size_bytes

    def _free(self, session: _Session) -> None:
        self._used_bytes -= session.reserved * session.position_bytes
        session.cache = SessionCache()
        self._left.append(session.adapters)

    def _settle(self) -> None:
        """Give back adapters of sessions that have ended; the body is not running."""
        for stack in self._left:
            self._adapters.give_back(stack)
        self._left.clear()

    def _check_range(self, first: int, stop: int) -> None:
        lowest, highest = self._range.start, self._range.stop
        if not lowest <= first < stop <= highest:
            found = f"the body has layers {lowest} to {highest - 1}"
            raise CutError("a session's layers", f"{first} to {stop - 1}", found, "ask for some of those")

    def _check_context(self, num_positions: int) -> None:
        limit = int(self._config.max_position_embeddings)
        if num_positions > limit:
            raise ContextFull(num_positions, limit)


def _answer(waiting: _Waiting, outcome: Tensor | Exception) -> None:
    if not waiting.answer.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        waiting.answer.set_exception(outcome)
    else:
        waiting.answer.set_result(torch.cat(waiting.outputs))
