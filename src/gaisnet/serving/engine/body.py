"""A body as a service: sessions come and go, and a step runs all waiting rows as one batch.

Continuous batching as in Orca (Yu et al., OSDI 2022), long prompts in chunks as in Sarathi (arXiv 2308.16369).

Shape legend: T rows (new positions) of one session, W wanted output rows, D hidden size.
"""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from gaisnet.adapters.mixing import ServedAdapters, Stack
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import ComputeLock
from gaisnet.config import ServiceSettings
from gaisnet.errors import ContextFull, CutError, ServiceFull, SessionClosed, SessionRefused, WireFormatError
from gaisnet.models.parts import Body
from gaisnet.serving.engine.rows import BatchedLayers, bytes_per_position, in_blocks
from gaisnet.serving.engine.scheduler import NO_QUOTA, PendingRows, Quota, ScheduledRows, ServedSession, schedule

_MIB = 2**20
_ROW_DTYPE = torch.float32  # dtype of kept rows
_LINGER = 1.0  # share of a step's time that the next step waits for the sessions of the last one


class BodyService:
    """Serves one body. All methods may be called from any thread.

    ``step`` must be called: by a thread in ``serving()``, or by a caller that waits for an answer.

    Args:
        body: A DM's or the FM's. Any other user of it, or of its adapters, holds ``compute_lock.learning()``.
        layers: FM layers that it stands for, including those that a recipe dropped.
        settings: Limits.
        compute_lock: The lock of the body's machine; None for a new one.
    """

    def __init__(
        self, body: Body, layers: range, settings: ServiceSettings, compute_lock: ComputeLock | None = None
    ) -> None:
        self.body = body
        self._range = layers
        self._config = body.config
        self._adapters = ServedAdapters(body)
        self._layers = BatchedLayers(body, self._adapters)
        self._settings = settings
        weight = next(p for p in body.parameters() if p.is_floating_point())
        self._placement = weight.device, weight.dtype
        self._sessions: dict[str, ServedSession] = {}
        self._left: list[Stack] = []  # adapters of closed sessions, to give back between two steps
        self._used_bytes = 0
        self._used_by: Counter[str] = Counter()  # the same, by peer
        self._arrivals = 0
        self._answered: Sequence[ServedSession] = ()  # by the last step; those that go on send rows soon
        self._lingers_until = 0.0
        self._state = threading.Condition()  # guards everything but the body; held for moments
        self.compute_lock = compute_lock or ComputeLock(settings.fine_tune_share)  # held while the body runs
        self._ending = False
        self.in_thread = False

    # -- what sessions ask -------------------------------------------------------------------------------------------

    def open_session(
        self,
        first: int,
        stop: int,
        adapters: Sequence[str] = (),
        num_positions: int = 0,
        keep_rows: bool = False,
        quota: Quota = NO_QUOTA,
    ) -> str:
        """Open a session of layers [first, stop); return its unguessable name.

        Args:
            first: FM layer that takes the session's rows.
            stop: FM layer to stop before.
            adapters: Adapters to activate; versions are fixed when the session opens.
            num_positions: Positions to reserve memory for, so that the session is refused now or not at all.
            keep_rows: Keep received rows, for ``received_rows``; they count as memory in use.
            quota: The session's peer, and its limits.

        Raises:
            ServiceFull: No room.
            QuotaReached: The peer's quota is used up.
            ContextFull: The model takes fewer positions.
            CutError: Layers that the body does not have.
            UnknownAdapter, AdapterMismatch: See ``ServedAdapters.acquire``.
        """
        self._check_range(first, stop)
        self._check_context(num_positions)
        kept = sum(first <= index < stop for index in self._layers.indices)
        position_bytes = bytes_per_position(self._config, kept, self._placement[1])
        position_bytes += self._width * _ROW_DTYPE.itemsize if keep_rows else 0
        with self.compute_lock.serving(), self._state:
            self._settle()
            self._check_room(quota)
            reserved = in_blocks(num_positions)
            self._hold(reserved * position_bytes, quota)
            try:
                stack = self._adapters.acquire(adapters)
            except Exception:
                self._let_go(reserved * position_bytes, quota.peer)
                raise
            name = secrets.token_hex(8)
            session = ServedSession(name, quota, first, stop, stack, position_bytes, reserved)
            session.kept = [] if keep_rows else None
            self._sessions[session.name] = session
            return session.name

    def extend_session(
        self, name: str, rows_TD: Tensor, want: int | None = None, position: int | None = None
    ) -> "Future[Tensor]":
        """Run new positions after a session's earlier ones.

        Args:
            name: The name from ``open_session``.
            rows_TD: Input rows of the session's first layer.
            want: Number of last output rows to return [W, D]; None for all.
            position: Expected position of the rows, for a sender that may have lost count; None for the current one.

        Raises:
            ServiceFull, QuotaReached, ContextFull, SessionClosed, SessionRefused, WireFormatError: Nothing has changed.
            SessionClosed: From the future, if the session closes first.
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
            self._hold(more * session.position_bytes, session.quota)
            session.reserved += more
            self._arrivals += 1
            waiting = PendingRows(rows_TD.detach().to(*self._placement), want, self._arrivals)
            session.queue.append(waiting)
            if session.kept is not None:
                session.kept.append(rows_TD.detach().to("cpu", _ROW_DTYPE))
            self._state.notify_all()
            return waiting.answer

    def crop_session(self, name: str, length: int) -> None:
        """Drop a session's positions from ``length`` on. Raises ``SessionRefused`` while rows of it wait."""
        with self._state:
            session = self._at_rest(name, "cropping")
            if not 0 <= length <= session.length:
                found = f"it has {session.length}"
                raise SessionRefused(f"cropping session '{name}' to {length}", found, "crop to fewer")
            session.crop(length)

    def received_rows(self, name: str) -> Tensor:
        """Return all rows [T, D] that a session received and has not cropped, float32 on the CPU.

        Raises ``SessionRefused`` while rows of it wait, or if it does not keep them.
        """
        with self._state:
            session = self._at_rest(name, "the rows of")
            if session.kept is None:
                raise SessionRefused(f"the rows of session '{name}'", "it does not keep them", "open one that does")
            return torch.cat(session.kept) if session.kept else torch.zeros(0, self._width, dtype=_ROW_DTYPE)

    def session_span(self, name: str) -> tuple[int, int, int]:
        """Return first layer, layer to stop before, and reserved positions. Raises ``SessionClosed``."""
        with self._state:
            session = self._session(name)
            return session.first, session.stop, session.reserved

    def adapter_versions(self, name: str) -> Stack:
        """Return a session's active adapters, each as ``name@version``. Raises ``SessionClosed``."""
        with self._state:
            return self._session(name).adapters

    def close_session(self, name: str) -> None:
        """Close a session at once and free its memory; does nothing if it is closed."""
        with self._state:
            session = self._sessions.pop(name, None)
            if session is None:
                return
            session.closed = True
            waiting = list(session.queue)
            session.queue.clear()
            if not session.running:  # else the step frees it
                self._free(session)
            self._state.notify_all()  # a step may wait for it
        for rows in waiting:
            rows.settle(SessionClosed(name))

    def install_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve a version of an adapter to sessions that open from now on. Raises ``AdapterMismatch``."""
        with self.compute_lock.serving(), self._state:
            self._settle()
            self._adapters.install(name, version, spec, tensors)

    # -- the work ----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Run all waiting rows as one batch, prompts one chunk at a time; return the number of rows."""
        with self.compute_lock.serving():
            with self._state:
                self._settle()
                pieces = schedule(self._sessions.values(), self._settings)
                for piece in pieces:
                    piece.session.running = True
            if not pieces:
                return 0
            started = time.monotonic()
            outcomes = self._run(pieces)
            with self._state:
                ended = time.monotonic()
                self._answered, self._lingers_until = [p.session for p in pieces], ended + _LINGER * (ended - started)
                answers = [self._deliver(piece, outcome) for piece, outcome in zip(pieces, outcomes, strict=True)]
        for answered, outcome in zip(
            answers, outcomes, strict=True
        ):  # without locks: waiting callers may send again at once
            for waiting in answered:
                waiting.settle(outcome)
        return sum(len(piece.rows_TD) for piece in pieces)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Run steps in a thread inside the context; at its end all sessions are closed."""
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
        """Memory in use by sessions."""
        return self._used_bytes

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    @property
    def adapters(self) -> list[str]:
        """Adapters that sessions may ask for."""
        return self._adapters.names

    def _work(self) -> None:
        try:
            while self._wait_for_rows():
                self.step()
        finally:
            for name in list(self._sessions):  # no step will run for them any more
                self.close_session(name)

    def _wait_for_rows(self) -> bool:
        """Wait for rows; return False when there will be no more.

        Answered sessions send their next rows a moment later. A step that starts with the first of them would run it
        alone, and all others after it. So it waits for the others, at most the time of a step, but not for those
        that were late last time.
        """
        with self._state:
            self._state.wait_for(lambda: self._ending or any(s.queue for s in self._sessions.values()))
            left_s = self._lingers_until - time.monotonic()
            self._state.wait_for(lambda: self._ending or self._full() or self._all_back(), timeout=max(0.0, left_s))
            for session in self._answered:
                session.late = not session.queue
            return not self._ending

    def _all_back(self) -> bool:
        """Return whether all punctual sessions of the last step wait again, or are closed."""
        return all(session.queue or session.closed or session.late for session in self._answered)

    def _full(self) -> bool:
        """Return whether a step could take no more."""
        chunk, waiting = self._settings.chunk, (s.queue[0].left for s in self._sessions.values() if s.queue)
        return sum(min(num_rows, chunk) for num_rows in waiting) >= self._settings.step_rows

    def _run(self, pieces: Sequence[ScheduledRows]) -> Sequence[Tensor | Exception]:
        """Run a batch; if it fails, run each session alone, so that only the culprit fails."""
        try:
            return self._layers.run_sessions([piece.share() for piece in pieces])
        except Exception as error:
            if len(pieces) == 1:
                return [error]
            return [outcome for piece in pieces for outcome in self._run([piece])]

    def _deliver(self, piece: ScheduledRows, outcome: Tensor | Exception) -> list[PendingRows]:
        """Store outputs; return the requests that they answer or fail."""
        session, waiting = piece.session, piece.waiting
        session.running = False
        if session.closed:
            self._free(session)
            return []  # closing has answered them
        if isinstance(outcome, Exception):
            failed = list(session.queue)  # later rows of the sequence cannot run either
            session.queue.clear()
            session.crop(session.length)  # nor are they kept
            return failed
        waiting.add_outputs(outcome)
        if waiting.left:
            return []
        return [session.queue.popleft()]

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return int(self._config.hidden_size)

    def _session(self, name: str) -> ServedSession:
        if name not in self._sessions:
            raise SessionClosed(name)
        return self._sessions[name]

    def _at_rest(self, name: str, asked: str) -> ServedSession:
        session = self._session(name)
        if session.queue:
            raise SessionRefused(f"{asked} session '{name}'", "rows of it wait", "take their answer first")
        return session

    def _check_room(self, quota: Quota) -> None:
        """Raise if there is no room for a session, or the peer's quota is used up."""
        limit = self._settings.max_sessions
        quota.check_sessions(sum(s.quota.peer == quota.peer for s in self._sessions.values()), limit)
        if len(self._sessions) >= limit:
            raise ServiceFull("a new session", f"{len(self._sessions)} are open and no more are allowed")

    def _hold(self, size_bytes: int, quota: Quota) -> None:
        limit = self._settings.max_cache_mib * _MIB
        quota.check_bytes(self._used_by[quota.peer], size_bytes, limit)
        if self._used_bytes + size_bytes > limit:
            found = f"{self._used_bytes} of {limit} bytes are held, and {size_bytes} more are needed"
            raise ServiceFull("memory for a session", found)
        self._used_bytes += size_bytes
        self._used_by[quota.peer] += size_bytes

    def _let_go(self, size_bytes: int, peer: str) -> None:
        self._used_bytes -= size_bytes
        self._used_by[peer] -= size_bytes

    def _free(self, session: ServedSession) -> None:
        self._let_go(session.held_bytes, session.quota.peer)
        session.forget()
        self._left.append(session.adapters)

    def _settle(self) -> None:
        """Give back adapters of closed sessions, while the body is not running."""
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
