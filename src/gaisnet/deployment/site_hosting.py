"""Hosting of a site's body for its peers."""

import threading
from collections.abc import Callable

from gaisnet.config import ServiceSettings
from gaisnet.engines.body_hosting import BodyPublisher, PeerRouter, SessionHandler
from gaisnet.engines.local_serving import compute_lock_for
from gaisnet.serving.engine.body import BodyService
from gaisnet.transport.base import Handler

_LOOK_S = 2.0


class SiteService:
    """Serves the body of a site's tier to the peers of the site.

    Args:
        settings: Limits.
        away_s: The sessions of a peer that is away for longer end.
    """

    def __init__(self, settings: ServiceSettings, away_s: float) -> None:
        self.publisher = BodyPublisher(settings, compute_lock_for(settings))
        self._away_s = away_s
        self._routers: list[PeerRouter] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch_peers, name="watches peers", daemon=True)
        self._thread.start()

    def add_router(
        self,
        tier: Handler | None,
        peer: str,
        incarnation: Callable[[], str],
        new_sessions: Callable[[BodyService], SessionHandler],
    ) -> PeerRouter:
        """Return the router of a peer; arguments as for ``PeerRouter``."""
        router = PeerRouter(tier, self.publisher, new_sessions, peer, incarnation)
        self._routers.append(router)
        return router

    def close(self) -> None:
        """End all sessions."""
        self._ending.set()
        self._thread.join()
        for router in self._routers:
            router.close()
        self.publisher.close()

    def _watch_peers(self) -> None:
        while not self._ending.wait(_LOOK_S):
            for router in list(self._routers):
                router.end_stale_sessions(self._away_s)
