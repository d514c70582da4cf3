from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType

from gaisnet.engines.nvflare import server_parts
from gaisnet.engines.nvflare.server_parts import Rejoin
from tests.engines.nvflare.sites import until


class Engine:
    """What ``Rejoin`` uses of NVFlare's engine; ``site`` gives no answer, so that it is asked again and again."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.job_runner = SimpleNamespace(running_jobs={"job": SimpleNamespace(job_id="job")})

    def new_context(self) -> Any:
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass

    def check_client_resources(self, job: object, wanted: dict[str, object], context: None) -> dict[str, object]:
        self.asked.extend(wanted)
        return {}


def test_only_edges_are_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_parts, "_FIRST_TRY_S", 0.01)
    engine, rejoin = Engine(), Rejoin(["edge1", "edge2"])
    for site in ("device11", "", "edge1"):
        peer = SimpleNamespace(get_identity_name=lambda name=site: name)
        context = SimpleNamespace(get_engine=lambda: engine, get_peer_context=lambda peer=peer: peer)
        rejoin.handle_event(EventType.CLIENT_REGISTER_PROCESSED, context)
    assert until(lambda: len(engine.asked) > 2, 5)
    engine.job_runner.running_jobs.clear()
    assert set(engine.asked) == {"edge1"}
