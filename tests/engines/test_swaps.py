"""Many answers across many releases: none fails, and none has a token of another version than it began with."""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from gaisnet.compute_lock import PartitionedCores
from gaisnet.engines.body_hosting import BodyPublisher
from gaisnet.engines.local_serving import ServedNetwork
from gaisnet.serving.generation.decoding import Tokens, generate
from gaisnet.serving.generation.routing import Place, Target
from gaisnet.serving.generation.text import Sampling
from tests.engines.test_local_serving import Versions, built, cycle, served_config, target
from tests.serving.models import prompt
from tests.tiny import tiny_edge

pytestmark = pytest.mark.integration

BODIES: tuple[Place, ...] = ("edge", "cloud")
NUM_THREADS = 4
NUM_TOKENS = 12
BEFORE = 3  # tokens that a witness has when its version is replaced
LEARNING = {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.05, "anchor_weight": 0.0}


@dataclass
class Asked:
    """A request, the version that it began with, and its answer so far."""

    to: Target
    ids: list[int]
    version: str
    rest: Tokens
    tokens: list[int]

    def take(self, num_tokens: int | None = None) -> "Asked":
        """Some tokens more; None for all, and then its session is closed."""
        self.tokens += itertools.islice(self.rest, num_tokens)
        return self


def begin(served: ServedNetwork, body: Place, ids: list[int]) -> Asked:
    to, parts = target(body, "shapes"), served.parts("north-a")
    session = served.open_session(to, parts.first, parts.stop, len(ids) + NUM_TOKENS)
    (version,) = session.versions
    return Asked(to, ids, version, generate(parts, session, ids, Sampling(max_tokens=NUM_TOKENS)), [])


class Askers:
    """Threads that ask one thing after the other, as many together as they may; ``failed`` has what went wrong."""

    def __init__(self, served: ServedNetwork, num_requests: int) -> None:
        self.answered: list[Asked] = []
        self.failed: list[Exception] = []
        self._served = served
        self._left = iter(range(num_requests))
        self._allowed = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(NUM_THREADS)]

    @contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        yield
        self.allow(NUM_THREADS)  # to find that nothing is left
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads)

    def allow(self, num_requests: int) -> None:
        self._allowed.release(num_requests)

    def wait_for(self, num_answers: int) -> None:
        while len(self.answered) < num_answers and not self.failed:
            time.sleep(0.001)

    def _ask(self) -> None:
        try:
            while (number := self._next()) is not None:
                ids = prompt(5 + number % 4, seed=number)
                self.answered.append(begin(self._served, BODIES[number % 2], ids).take())
        except Exception as error:
            self.failed.append(error)

    def _next(self) -> int | None:
        self._allowed.acquire()
        return next(self._left, None)


@pytest.mark.parametrize(("num_requests", "num_swaps"), [(100, 5), pytest.param(1000, 20, marks=pytest.mark.slow)])
def test_no_answer_fails_or_mixes_versions(monkeypatch: pytest.MonkeyPatch, num_requests: int, num_swaps: int) -> None:
    """Releases come as learning makes them, over the network's own way to its bodies.

    Across every one goes a witness on each body: it has some tokens of the old version before, and must get the rest
    of that version behind it.
    """
    versions = Versions(monkeypatch)
    config = served_config(edges=[tiny_edge("north", "shapes")], fine_tune=LEARNING)
    served = built(config, PartitionedCores(0.5, 2, lambda _: None))
    served.network.install()
    served.parts("north-a")
    askers, witnesses = Askers(served, num_requests), list[tuple[Asked, str]]()
    share = num_requests // num_swaps
    with askers.asking():
        for number in range(num_swaps):
            askers.allow(share)
            askers.wait_for(number * share + share // 2)  # the others go on while learning does
            witnesses += across_a_swap(served, number)
            assert all(len(held(served, body)) <= NUM_THREADS + 1 for body in BODIES)
    assert not askers.failed
    assert len(askers.answered) == num_requests
    seen = {asked.version for asked in askers.answered}
    assert seen >= {f"{name}@{number}" for name in ("domain", "shapes") for number in range(num_swaps)}
    check(served, versions, [*askers.answered, *(asked for asked, _ in witnesses)])
    check_that_versions_differ(served, versions, witnesses)
    for body, name in zip(BODIES, ("domain", "shapes"), strict=True):
        outlet_of(served, body).service.step()
        assert [one for one in held(served, body) if one.startswith(name)] == [f"{name}@{num_swaps}"]
    assert (served.num_sessions, served.used_bytes) == (0, 0)
    served.close()


def across_a_swap(served: ServedNetwork, number: int) -> list[tuple[Asked, str]]:
    """An answer on each body that was begun before the swap and ended after it, and the version that came."""
    began = [begin(served, body, prompt(9)).take(BEFORE) for body in BODIES]
    cycle(served)
    found = []
    for old in began:
        assert old.version in held(served, old.to.body)
        new = begin(served, old.to.body, prompt(9)).take()
        name, _, version = new.version.partition("@")
        assert (old.version, int(version)) == (f"{name}@{number}", number + 1)
        found.append((old.take(), new.version))
    return found


def check(served: ServedNetwork, versions: Versions, answers: list[Asked]) -> None:
    """Every token is the one that the version in one piece writes there."""
    alike = defaultdict[tuple[Place, str, int], list[Asked]](list)
    for asked in answers:
        assert len(asked.tokens) == NUM_TOKENS
        alike[asked.to.body, asked.version, len(asked.ids)].append(asked)
    for (body, version, _), some in alike.items():
        expected = likeliest(versions.model(outlet_of(served, body), version), some)
        assert [asked.tokens for asked in some] == expected, (body, version)


def check_that_versions_differ(served: ServedNetwork, versions: Versions, witnesses: list[tuple[Asked, str]]) -> None:
    """Of a witness that had gone over to the new version, ``check`` would have told, but for a few by chance."""
    told = 0
    for asked, came in witnesses:
        expected = likeliest(versions.model(outlet_of(served, asked.to.body), came), [asked])[0]
        told += expected[BEFORE:] != asked.tokens[BEFORE:]
    assert told >= 0.9 * len(witnesses)


def likeliest(model: PreTrainedModel, answers: list[Asked]) -> list[list[int]]:
    """What a model in one piece would write at each place of answers to prompts of one length."""
    logits_BTV = model(torch.tensor([asked.ids + asked.tokens[:-1] for asked in answers])).logits
    choices: list[list[int]] = logits_BTV[:, -NUM_TOKENS:].argmax(dim=-1).tolist()
    return choices


def outlet_of(served: ServedNetwork, body: Place) -> BodyPublisher:
    return served._publishers.cloud() if body == "cloud" else served._publishers.edge("shapes")


def held(served: ServedNetwork, body: Place) -> list[str]:
    """Versions of all adapters that a body has in memory."""
    return outlet_of(served, body).service._adapters.versions
