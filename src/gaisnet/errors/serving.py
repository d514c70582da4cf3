"""Errors of generation and of its services."""

from collections.abc import Iterable

from gaisnet.errors.runs import GaisnetError


class ServingError(GaisnetError):
    """A body cannot serve what a session asks for; the others are not disturbed."""


class ServiceFull(ServingError):
    """A session, or more of one, does not fit into the memory that the service may use. Nothing was changed."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; try again when other sessions have ended, or raise the service's limits")


class QuotaReached(ServiceFull):
    """A peer holds as much of a service as one peer may. Nothing was changed, and the others are served."""

    def __init__(self, peer: str, asked: str, found: str) -> None:
        super().__init__(f"{asked} of '{peer}'", f"{found} (service.max_share_per_peer)")


class ContextFull(ServingError):
    """More positions than the model was made for."""

    def __init__(self, wanted: int, limit: int) -> None:
        super().__init__(f"a session of {wanted} tokens: the model takes {limit}; shorten the prompt or the answer")


class SessionClosed(ServingError):
    """A session is not open here: it never was, or it has ended."""

    def __init__(self, session: str) -> None:
        super().__init__(f"session '{session}': it is not open here; open a new one")


class SessionRefused(ServingError):
    """The request is invalid for this session."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"{asked}: {found}; {do}")


class BodyUnreachable(ServingError):
    """The body that a session needs is at a site that is away. What the session had goes on."""

    def __init__(self, body: str, found: str) -> None:
        super().__init__(f"a session of {body}: {found}; go on with another body, or try again when it is back")


class UnknownModel(ServingError):
    """A caller names a model, or a domain, that is not served."""

    def __init__(self, model: str, known: Iterable[str]) -> None:
        super().__init__(f"model '{model}': it is not served here; served are: {', '.join(sorted(known))}")


class ServerRefused(GaisnetError):
    """A server of answers cannot be reached, or does not give what it is asked for."""

    def __init__(self, url: str, found: str) -> None:
        super().__init__(f"asking {url}: {found}; see 'gaisnet serve --help'")
