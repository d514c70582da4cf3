"""Calls that a listener takes: who calls, and in which thread they are answered."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

Send = Callable[[bytes | None], None]
"""Sends a frame and waits until it is on its way; None ends the call."""


def common_name(context: grpc.ServicerContext) -> str:
    """Common name of the caller's certificate; '' where it has none, or several."""
    found: dict[str, Any] = dict(context.auth_context())
    names: list[bytes] = list(found.get("x509_common_name", ()))
    return names[0].decode(errors="replace") if len(names) == 1 else ""


class Talk:
    """A method of a server whose answers any thread may send, not only the one that iterates over them.

    gRPC names that experimental, and its own health service rests on it. Where it is not known, gRPC gives no ``send``
    and iterates over the answers, as ever.
    """

    experimental_non_blocking = True

    def __init__(self, talk: Callable[[Iterator[bytes], grpc.ServicerContext, Send | None], Iterator[bytes]]) -> None:
        self._talk = talk

    def __call__(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, send: Send | None = None
    ) -> Iterator[bytes]:
        """As gRPC has it."""
        answers = self._talk(frames, context, send)
        if send is None:
            return answers
        for frame in answers:
            send(frame)
        send(None)
        return iter(())


class ThreadPerCall(futures.ThreadPoolExecutor):
    """A thread for each call. Streams are few and stay long; the server bounds how many there are.

    The threads of the standard pool would keep a process alive that forgets to close its listener.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Run ``fn`` in a new thread."""
        done: futures.Future[Any] = futures.Future()

        def call() -> None:
            try:
                done.set_result(fn(*args, **kwargs))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=call, name="gaisnet call", daemon=True).start()
        return done
