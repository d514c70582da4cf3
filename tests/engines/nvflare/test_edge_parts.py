import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from gaisnet.engines.nvflare.edge_parts import NarrowedJobLauncher, OwnJobOnly
from gaisnet.engines.nvflare.job_files import CLIENT_FILE, write_job

Change = Callable[[Path], object]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_job(tmp_path, ["edge1"]) / "app"


def test_an_edge_takes_the_job_that_the_cloud_writes_signed_or_not(app: Path) -> None:
    assert OwnJobOnly().validate(str(app)) == ("", {})
    for folder in (app, app / "config"):
        for name in (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE):
            (folder / name).touch()
    assert OwnJobOnly().validate(str(app)) == ("", {})


def with_settings(**changes: object) -> Change:
    def change(app: Path) -> None:
        settings = json.loads((app / CLIENT_FILE).read_text())
        (app / CLIENT_FILE).write_text(json.dumps({**settings, **changes}))

    return change


CHANGES: dict[str, Change] = {
    "custom code": lambda app: (app / "custom").mkdir(),
    "code elsewhere": lambda app: (app / "evil.py").touch(),
    "code beside the settings": lambda app: (app / "config" / "evil.py").touch(),
    "settings in another form": lambda app: (app / "config" / "config_fed_client.conf").touch(),
    "another class": with_settings(executors=[{"tasks": ["*"], "executor": {"path": "gaisnet.evil.Evil"}}]),
    "one class more": with_settings(components=[{"id": "more", "path": "os.system", "args": {"command": "true"}}]),
    "a filter": with_settings(task_data_filters=[{"tasks": ["*"], "filters": [{"path": "gaisnet.evil.Evil"}]}]),
    "no settings": lambda app: (app / CLIENT_FILE).unlink(),
    "broken settings": lambda app: (app / CLIENT_FILE).write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_edge_takes_no_other_job(app: Path, change: Change) -> None:
    change(app)
    error, _ = OwnJobOnly().validate(str(app))
    assert error.startswith("this edge runs GaisNet's own job only")


def test_a_job_process_is_as_narrow_as_the_client() -> None:
    context = FLContext()
    arguments = {JobProcessArgs.EXE_MODULE: ("-m", "nvflare.worker"), JobProcessArgs.JOB_ID: ("-n", "7")}
    context.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments, private=True, sticky=False)
    words = NarrowedJobLauncher().get_command({}, context).split()
    assert words == [sys.executable, "-m", "gaisnet.engines.nvflare.narrowed", "nvflare.worker", "-n", "7"]


def test_a_narrowed_process_has_the_commands_of_a_job_only_and_runs_what_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import sys\n"
        "from nvflare.private.fed.client.admin_commands import AdminCommands\n"
        "from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors\n"
        "topics = [topic for one in ClientRequestProcessors.request_processors for topic in one.get_topics()]\n"
        "commands = [command.get_command_name() for command in AdminCommands.commands]\n"
        "sys.stdout.write(repr((__name__, sys.argv[1:], sorted(topics), sorted(commands))))\n"
    )
    command = [sys.executable, "-m", "gaisnet.engines.nvflare.narrowed", "told", "-m", "kit"]
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    topics = [
        "scheduler.cancel_resource",
        "scheduler.check_resource",
        "train.abort",
        "train.deploy",
        "train.notify_job_status",
        "train.start_job",
    ]
    assert ran.stdout == repr(("__main__", ["-m", "kit"], topics, ["abort", "check_status"]))
