"""Calls of a listener: their callers, and the threads that answer them."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

Send = Callable[[bytes | None], None]
"""Sends a frame and waits until it is on its way; None ends the call."""


def common_name(context: grpc.ServicerContext) -> str:
    """Return the common name of the caller's certificate; '' if it has none, or several."""
    found: dict[str, Any] = dict(context.auth_context())
    names: list[bytes] = list(found.get("x509_common_name", ()))
    return names[0].decode(errors="replace") if len(names) == 1 else ""


class Talk:
    """A server method whose replies any thread may send, not only the one that iterates over them.

    gRPC calls that experimental, and its own health service relies on it. Where it is missing, gRPC gives no ``send``
    and iterates over the replies.
    """

    experimental_non_blocking = True

    def __init__(self, talk: Callable[[Iterator[bytes], grpc.ServicerContext, Send | None], Iterator[bytes]]) -> None:
        self._talk = talk

    def __call__(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, send: Send | None = None
    ) -> Iterator[bytes]:
        """Call as gRPC does."""
        answers = self._talk(frames, context, send)
        if send is None:
            return answers
        for frame in answers:
            send(frame)
        send(None)
        return iter(())


class ThreadPerCall(futures.ThreadPoolExecutor):
    """A thread per call. Streams are few and long-lived; the server limits their number.

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
