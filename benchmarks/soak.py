"""Keeps ``gaisnet serve`` busy with callers that come, go and break off, and looks whether anything stays behind.

    python benchmarks/soak.py runs/demo-... --minutes 30

The server is a process of its own on a free port. Each caller draws a model, chat or completion, a stream or not, a
short or a long prompt, 1 to 64 tokens and how they are sampled; breaks off a quarter of its streams; now and then asks
for what must be refused; and stays away for a while. Meanwhile the server's memory (Linux only) and its own figures
are sampled. In the end no session may be open and no byte of cache held, no request may have failed, and memory may not
have grown: after a warm-up, the first sixth of the time, the median of the last sixth is held against that of the
second. 429 is no failure. All figures are in FILE, memory and open sessions are drawn in a PNG beside it, and what the
server said is in a log there. Ctrl-C ends it early and in order. Exit status 1 if anything is wrong.
"""

import argparse
import json
import random
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median, quantiles
from typing import Any

import httpx
from matplotlib.figure import Figure
from rich.console import Console

from gaisnet.deployment.resident import end_in_order

_MAX_TOKENS = 64
_LONGEST_PROMPT = 512  # letters; halved until it fits the model
_START_S, _ANSWER_S, _SETTLE_S, _END_S = 1800.0, 180.0, 30.0, 20.0
_LOOK_S, _TELL_S = 5.0, 30.0  # between two samples, and two lines; less in a short run
_MOST_GROWTH = 1.1
_GAUGES = ("sessions", "cache_bytes", "answers")
_console = Console(highlight=False, width=140)


class Failed(Exception):
    """A request that did not end as it must."""


@dataclass(frozen=True)
class Served:
    """What can be asked of the server."""

    url: str
    models: list[str]
    chats: bool  # whether the model has a chat template
    longest: int  # letters of a prompt


class Tally:
    """What became of all requests; told by many threads."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.seconds: list[float] = []  # of answers that were whole
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def add(self, outcome: str, model: str, seconds: float, failure: str | None = None) -> None:
        """Count a request."""
        with self._lock:
            self.outcomes[outcome] += 1
            self.models[model] += 1
            if outcome == "answered":
                self.seconds.append(seconds)
            if failure is not None:
                self.failures.append(failure)


class Caller(threading.Thread):
    """Asks one thing after the other until it is told to stop; each time it comes, over connections of its own."""

    def __init__(self, served: Served, tally: Tally, stop: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self._served, self._tally, self._stopping = served, tally, stop
        self._rng = random.Random(seed)

    def run(self) -> None:
        """Come, ask a few times, go, and come again."""
        while not self._stopping.is_set():
            with new_client(self._served.url) as client:
                for _ in range(self._rng.randint(1, 12)):
                    if not self._stopping.is_set():
                        self._ask(client)
            self._stopping.wait(self._rng.choice((0.0, 0.1, 3.0)))

    def _ask(self, client: httpx.Client) -> None:
        path, asked = request(self._served, self._rng)
        began = time.monotonic()
        ask = self._wrongly if self._rng.random() < 0.05 else self._stream if asked["stream"] else self._whole
        outcome, failure = "failed", None
        try:
            outcome = ask(client, path, asked)
        except Exception as error:  # whatever it is, it is counted, and the caller goes on
            failure = f"{time.strftime('%H:%M:%S')} {path} {asked['model']}: {type(error).__name__}: {error}"
        self._tally.add(outcome, asked["model"], time.monotonic() - began, failure)
        if outcome == "too many" or self._rng.random() < 0.2:
            self._stopping.wait(self._rng.uniform(0.0, 2.0))

    def _whole(self, client: httpx.Client, path: str, asked: dict[str, Any]) -> str:
        response = client.post(path, json=asked)
        if response.status_code == 429:
            return "too many"
        expect(response, 200)
        written = response.json()["usage"]["completion_tokens"]
        if not 1 <= written <= asked["max_tokens"]:
            raise Failed(f"{written} tokens of {asked['max_tokens']}")
        return "answered"

    def _stream(self, client: httpx.Client, path: str, asked: dict[str, Any]) -> str:
        breaks_off = self._rng.randint(0, asked["max_tokens"]) if self._rng.random() < 0.25 else None
        event = ""
        with client.stream("POST", path, json=asked) as response:
            if response.status_code == 429:
                return "too many"
            if response.status_code != 200:
                response.read()
            expect(response, 200)
            for number, event in enumerate(filter(None, response.iter_lines())):
                if number == breaks_off:
                    return "broken off"  # leaving the block closes the connection
                if event.startswith('data: {"error"'):
                    raise Failed(event)
        if event != "data: [DONE]":
            raise Failed(f"a stream that ends with {event!r}")
        return "answered"

    def _wrongly(self, client: httpx.Client, path: str, asked: dict[str, Any]) -> str:
        match self._rng.randrange(3):
            case 0:
                response, status = client.post(path, json={**asked, "model": "nobody"}), 404
            case 1:
                response, status = client.post(path, content=json.dumps(asked)[:-1]), 400
            case _:
                response, status = client.post("/v1/completions", json=too_long(self._served, asked)), 400
        if response.status_code == 429:
            return "too many"
        expect(response, status)
        return "refused"


def request(served: Served, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Where to send it, and what."""
    length = rng.randint(1, 24) if rng.random() < 0.7 else rng.randint(served.longest // 2, served.longest)
    sampling = rng.choice(({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}, {"seed": rng.randrange(1000)}, {}))
    asked = {"model": rng.choice(served.models), "max_tokens": rng.randint(1, _MAX_TOKENS), **sampling}
    if asked["model"] in ("auto", "foundation", "merged"):
        asked["speculate"] = rng.random() < 0.2
    asked["stream"] = rng.random() < 0.6
    text = "".join(rng.choices(f"{string.ascii_letters}   ", k=length - 1)) + ":"
    if served.chats and rng.random() < 0.5:
        return "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**asked, "prompt": text}


def too_long(served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    """With more tokens than the model takes, or, where it takes very many, than the server does."""
    num_tokens = 5000 if served.longest == _LONGEST_PROMPT else 4096
    return {"model": asked["model"], "prompt": [65] * num_tokens, "max_tokens": _MAX_TOKENS, "stream": asked["stream"]}


def expect(response: httpx.Response, status: int) -> None:
    """Raise ``Failed`` if it has another one."""
    if response.status_code != status:
        raise Failed(f"{response.status_code} in place of {status}: {response.text[:300]}")


def main() -> None:
    """Parse the command line, load the server, judge; leave with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load; default 30")
    parser.add_argument("--clients", type=int, default=16, help="callers at once; default 16, the server takes 32")
    parser.add_argument("--seed", type=int, default=0, help="of all that callers draw")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default RUN/soak.json")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="as gaisnet serve takes it")
    given = parser.parse_args()
    end_in_order()
    out = given.out or given.run / "soak.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with server(given.run, given.set, out.with_suffix(".log")) as (url, process):
        figures = soak(look_at(url), process, given.minutes * 60, given.clients, given.seed)
    out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(figures, out.with_suffix(".png"))
    _console.print_json(data={name: value for name, value in figures.items() if name != "samples"})
    _console.print(f"{'well' if not figures['wrong'] else 'NOT WELL'}; all figures are in {out}")
    sys.exit(bool(figures["wrong"]))


@contextmanager
def server(run: Path, overrides: Sequence[str], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Inside, a process serves the run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gaisnet.cli", "serve", str(run), "--port", str(port)]
    command += [word for override in overrides for word in ("--set", override)]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _console.print(f"starting {' '.join(command[2:])}; if the run is new, it calibrates first")
            wait_until_up(url, process, log)
            yield url, process
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Leave if the server does."""
    end = time.monotonic() + _START_S
    with new_client(url) as client:
        while time.monotonic() < end and process.poll() is None:
            with suppress(httpx.TransportError):
                client.get("/health")
                return
            time.sleep(0.2)
    sys.exit(f"the server did not come up; it said:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def look_at(url: str) -> Served:
    """Ask what there is, and how long prompts may be."""
    with new_client(url) as client:
        models = [model["id"] for model in client.get("/v1/models").json()["data"]]
        asked: dict[str, Any] = {"model": models[-1], "max_tokens": _MAX_TOKENS}
        hello = {"messages": [{"role": "user", "content": "a"}]}
        chats = client.post("/v1/chat/completions", json={**asked, **hello}).status_code == 200
        longest = _LONGEST_PROMPT
        while longest > 1:
            text = ("aZ" * longest)[:longest]
            said = {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
            path = "/v1/chat/completions" if chats else "/v1/completions"
            if client.post(path, json={**asked, **said}).status_code == 200:
                break
            longest //= 2
    _console.print(f"{', '.join(models)}; {'chats too' if chats else 'no chats'}; prompts up to {longest} letters")
    return Served(url, models, chats, longest)


def soak(served: Served, process: subprocess.Popen[bytes], seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """All figures; ``wrong`` says what is."""
    tally, stop, samples = Tally(), threading.Event(), list[dict[str, float]]()
    callers = [Caller(served, tally, stop, 1000 * seed + number) for number in range(clients)]
    for caller in callers:
        caller.start()
    try:
        watch(served.url, process, seconds, tally, samples)
    except KeyboardInterrupt:
        _console.print("ending early")
    stop.set()
    end = time.monotonic() + _ANSWER_S
    for caller in callers:
        caller.join(max(0.0, end - time.monotonic()))
    num_stuck = sum(caller.is_alive() for caller in callers)
    left, statuses = settled(served.url)
    memory = judged(samples)
    figures: dict[str, Any] = {
        "seconds": samples[-1]["second"] if samples else 0.0,
        "clients": clients,
        "seed": seed,
        "requests": dict(tally.outcomes),
        "by_model": dict(tally.models),
        "by_status_at_the_server": statuses,
        "answer_seconds": spread(tally.seconds),
        "failures": tally.failures[:50],
        "callers_stuck": num_stuck,
        "left_at_the_server": left,
        "memory": memory,
    }
    return {**figures, "wrong": wrongs(figures), "samples": samples}


def watch(
    url: str, process: subprocess.Popen[bytes], seconds: float, tally: Tally, samples: list[dict[str, float]]
) -> None:
    """Sample and tell until time is up, or the server is gone."""
    began, told = time.monotonic(), 0.0
    look_s, tell_s = min(_LOOK_S, seconds / 60), min(_TELL_S, seconds / 6)
    with new_client(url) as client:
        while (now := time.monotonic() - began) < seconds and process.poll() is None:
            with suppress(httpx.HTTPError):  # callers tell
                gauges, _ = told_by(client)
                samples.append({"second": round(now, 1), "memory_mib": resident_mib(process.pid), **gauges})
            if samples and now - told >= tell_s:
                told = now
                shown = ", ".join(f"{value:.0f} {name}" for name, value in samples[-1].items() if name != "second")
                _console.print(f"{now:6.0f} s: {dict(tally.outcomes)}; {shown}")
            time.sleep(look_s)


def told_by(client: httpx.Client) -> tuple[dict[str, float], dict[str, float]]:
    """The server's own figures: gauges, and how many requests ended with which status."""
    text = client.get("/metrics").text
    gauges = {name: float(re.findall(rf"^gaisnet_{name} (\S+)$", text, re.M)[0]) for name in _GAUGES}
    statuses: Counter[str] = Counter()
    for status, number in re.findall(r'^gaisnet_requests_total{.*status="(\d+)"} (\S+)$', text, re.M):
        statuses[status] += int(float(number))
    return gauges, dict(statuses)


def settled(url: str) -> tuple[dict[str, float], dict[str, float]]:
    """What is still held when nothing should be any more, and the statuses of all requests; empty if it is gone."""
    end = time.monotonic() + _SETTLE_S
    with suppress(httpx.HTTPError), new_client(url) as client:
        while any((told := told_by(client))[0].values()) and time.monotonic() < end:
            time.sleep(0.2)
        return told
    return {}, {}


def resident_mib(pid: int) -> float:
    """Memory of a process; nan where there is no /proc."""
    with suppress(OSError, IndexError):
        kib = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.M)[0]
        return float(kib) / 1024
    return float("nan")


def judged(samples: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """How memory went after the warm-up; None where it is not known."""
    known = [(s["second"], s["memory_mib"]) for s in samples if s["memory_mib"] == s["memory_mib"]]
    if len(known) < 12:
        return None
    sixth = known[-1][0] / 6
    parts = [[mib for at, mib in known if k * sixth <= at <= (k + 1) * sixth] for k in (1, 5)]
    if not all(parts):  # the server did not say how it was for so long
        return None
    second, last = map(median, parts)
    slope = linear_regression(*zip(*[one for one in known if one[0] >= sixth], strict=True)).slope
    return {"mib_per_hour": 3600 * slope, "second_sixth_mib": second, "last_sixth_mib": last, "growth": last / second}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and tail."""
    if len(seconds) < 2:
        return {}
    hundredths = quantiles(seconds, n=100, method="inclusive")
    return {"median": hundredths[49], "p99": hundredths[98], "most": max(seconds)}


def wrongs(figures: dict[str, Any]) -> list[str]:
    """All that should not be so."""
    requests, left, memory = figures["requests"], figures["left_at_the_server"], figures["memory"]
    failed_there = sum(number for status, number in figures["by_status_at_the_server"].items() if status >= "500")
    found = {
        f"{requests.get('failed', 0)} requests failed": requests.get("failed", 0),
        "no request was answered": not requests.get("answered", 0),
        f"{figures['callers_stuck']} callers wait for ever": figures["callers_stuck"],
        "the server is gone": not left,
        f"still held at the server: {left}": any(left.values()),
        f"{failed_there} requests failed at the server": failed_there,
        "memory is not known: too few samples, or not Linux": memory is None,
        f"memory grew by more than a factor of {_MOST_GROWTH}": memory is not None and memory["growth"] > _MOST_GROWTH,
    }
    return [what for what, is_so in found.items() if is_so]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Memory and open sessions over time."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    minutes = [sample["second"] / 60 for sample in figures["samples"]]
    above.plot(minutes, [sample["memory_mib"] for sample in figures["samples"]])
    above.set_ylabel("resident memory, MiB")
    below.plot(minutes, [sample["sessions"] for sample in figures["samples"]])
    below.set(xlabel="minutes", ylabel="open sessions")
    figure.savefig(path, dpi=120)


def new_client(url: str) -> httpx.Client:
    """Of this machine only: proxies are not asked."""
    return httpx.Client(base_url=url, timeout=_ANSWER_S, trust_env=False)


if __name__ == "__main__":
    main()
