"""A whole network that answers, and learns meanwhile: what it writes is what models in one piece write."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import ComputeLock, PartitionedCores
from gaisnet.config import Config, DevicePrecision
from gaisnet.engines.body_hosting import BodyPublisher
from gaisnet.engines.local import build_network
from gaisnet.engines.local_serving import ServedNetwork, build_served_network
from gaisnet.errors import SessionRefused, UnknownAdapter
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import Foundation
from gaisnet.serving.generation.decoding import CachedHead, CachedTail, generate
from gaisnet.serving.generation.routing import Place, Target
from gaisnet.serving.generation.speculation import generate_speculatively
from gaisnet.serving.generation.text import Sampling
from gaisnet.transport.ledger import Traffic
from tests.serving.models import generated, lively_model, prompt, with_adapters
from tests.tiny import round_weights, tiny_config, tiny_data, tiny_edge, tiny_tokenizer

pytestmark = pytest.mark.integration

EXACT = dict.fromkeys(("smashed", "session", "body_output", "gradient", "anchor", "adapter"), "float32")
PUBLIC_TEXT = "All animals are equal, but some animals are more equal than others. It was a bright cold day in April."
NUM_TOKENS = 12
SAMPLING = Sampling(max_tokens=NUM_TOKENS, stop_ids=frozenset({257}))  # as the reference stops
Served = dict[str, tuple[LoraSpec, Mapping[str, Tensor]]]


def served_config(**changes: Any) -> Config:
    """The DM is the FM, and so every body can be compared with a model in one piece; learning changes much."""
    raw: dict[str, Any] = {
        "domain": {"precision": "float32"},
        "relay": {"enabled": False},
        "absorb": {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 1e9},
        "fine_tune": {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.3, "anchor_weight": 0.0},
        "wire": EXACT,
    }
    return tiny_config(**{**raw, **changes})


def built(config: Config, compute_lock: ComputeLock | None = None) -> ServedNetwork:
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    foundation = Foundation("tiny", lively_model(), tiny_tokenizer())
    return build_served_network(config, foundation, shapes, tiny_data(config), PUBLIC_TEXT, compute_lock=compute_lock)


@pytest.fixture(scope="module")
def learned() -> Iterator[ServedNetwork]:
    """One that has gone through a cycle, for all who only ask."""
    served = built(served_config())
    cycle(served)
    yield served
    served.close()


def cycle(served: ServedNetwork) -> None:
    served.network.install()
    served.network.release()
    served.network.fine_tune()
    served.network.absorb()
    served.network.install()


def target(body: Place, domain: str) -> Target:
    return Target(body, ("domain",) if body == "edge" else (domain,), domain)


def answer(served: ServedNetwork, to: Target, ids: list[int]) -> tuple[tuple[str, ...], list[int]]:
    """The versions that acted, and the tokens."""
    parts = served.parts(served.device(to.domain))
    session = served.open_session(to, parts.first, parts.stop, len(ids) + NUM_TOKENS)
    return session.versions, list(generate(parts, session, ids, SAMPLING))


def whole(served: ServedNetwork, name: str) -> PreTrainedModel:
    """The FM in one piece, with an adapter as the cloud holds it."""
    spec, tensors = served.network.cloud.adapter(name)
    assert isinstance(spec, LoraSpec)
    return with_adapters(lively_model(), it=(spec, tensors))


@pytest.mark.parametrize("body", ["edge", "cloud"])
@pytest.mark.parametrize("domain", ["shapes", "tastes"])
def test_an_answer_is_that_of_a_model_in_one_piece(learned: ServedNetwork, body: Place, domain: str) -> None:
    """The adapter of an edge, learned there, is the one that the cloud has taken in."""
    ids = prompt(9)
    versions, found = answer(learned, target(body, domain), ids)
    assert versions == (("domain@1",) if body == "edge" else (f"{domain}@1",))
    assert found == generated(whole(learned, domain), ids, NUM_TOKENS)
    assert found != generated(lively_model(), ids, NUM_TOKENS)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_answer_of_a_device_in_few_bits_is_that_of_the_model_so_rounded(precision: DevicePrecision) -> None:
    served, ids = built(served_config(device_precision=precision)), prompt(9)
    served.network.install()
    model = round_weights(lively_model(), range(1), precision)
    for body in ("edge", "cloud"):
        _, found = answer(served, Target(body, (), "shapes"), ids)
        assert found == generated(model, ids, NUM_TOKENS)
    served.close()


def test_the_merged_adapter_is_served_and_an_unknown_one_refused(learned: ServedNetwork) -> None:
    versions, found = answer(learned, Target("cloud", ("merged",), "shapes"), prompt(9))
    assert versions == ("merged@1",)
    assert found == generated(whole(learned, "merged"), prompt(9), NUM_TOKENS)
    assert learned.adapters("cloud", "shapes") == ["merged", "shapes", "tastes"]
    assert learned.adapters("edge", "shapes") == ["domain"]
    with pytest.raises(UnknownAdapter):
        answer(learned, Target("edge", ("shapes",), "shapes"), prompt(9))
    with pytest.raises(SessionRefused, match="the run has north-a"):
        learned.parts("nobody")
    with pytest.raises(SessionRefused, match="edges for shapes, tastes"):
        learned.open_session(Target("edge", (), "sounds"), 1, 2, 0)


def test_an_answer_that_is_handed_over_goes_on_as_the_fms(learned: ServedNetwork) -> None:
    parts, ids = learned.parts("north-a"), prompt(9)
    session = learned.open_escalating_session(Target("edge", (), "shapes"), parts.first, parts.stop, 40)
    head, tail = CachedHead(parts), CachedTail(parts, session)
    tail.compute_logits(head.smash(ids), want=0)
    logits_V = parts.tail.logits(session.escalate(("tastes",), 1))[0]
    found: list[int] = []
    while len(found) < NUM_TOKENS:
        found.append(int(logits_V.argmax()))
        logits_V = tail.compute_logits(head.smash(found[-1:]))[0]
    session.close()
    assert found == likeliest(whole(learned, "tastes"), ids, found)


def test_both_bodies_at_once(learned: ServedNetwork) -> None:
    parts, ids = learned.parts("north-a"), prompt(9)
    drafter, checker = (
        learned.open_session(target(body, "shapes"), parts.first, parts.stop, 40) for body in ("edge", "cloud")
    )
    found = list(generate_speculatively(parts, drafter, checker, ids, SAMPLING))
    assert found == generated(whole(learned, "shapes"), ids, NUM_TOKENS)


def test_its_bytes_are_counted_apart_from_those_of_learning() -> None:
    served = built(served_config(edges=[tiny_edge("north", "shapes")], cycles=1))
    served.network.install()
    before = served.network.traffic()
    answer(served, target("edge", "shapes"), prompt(9))
    assert served.ledger.traffic("device_edge").bytes_up > 20 * 32 * 4 // 2
    assert served.ledger.traffic("edge_cloud") == Traffic()
    answer(served, target("cloud", "shapes"), prompt(9))
    assert served.ledger.traffic("edge_cloud").bytes_up > 20 * 32 * 4 // 2
    after = served.network.traffic()
    assert after["edge_cloud"].bytes_up - before["edge_cloud"].bytes_up < 1000  # what asking for it takes
    served.close()


class Versions:
    """Every version of every adapter that was ever served, and under which name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[tuple[int, str], tuple[LoraSpec, Mapping[str, Tensor]]] = {}
        self._models: dict[tuple[int, str], PreTrainedModel] = {}
        put = BodyPublisher.publish_adapter

        def record(
            publisher: BodyPublisher, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]
        ) -> None:
            put(publisher, name, version, spec, tensors)
            self.of[id(publisher), publisher.service._adapters._newest[name]] = spec, tensors

        monkeypatch.setattr(BodyPublisher, "publish_adapter", record)

    def model(self, publisher: BodyPublisher, served: str) -> PreTrainedModel:
        key = id(publisher), served
        if key not in self._models:
            spec, tensors = self.of[key]
            self._models[key] = with_adapters(lively_model(), it=(spec, dict(tensors)))
        return self._models[key]


@pytest.mark.parametrize(
    "compute_lock", [ComputeLock(), PartitionedCores(0.5, 2, lambda _: None)], ids=["one at a time", "side by side"]
)
@pytest.mark.parametrize("edge_rounds", [1, 2])
def test_it_answers_while_it_learns(
    monkeypatch: pytest.MonkeyPatch, edge_rounds: int, compute_lock: ComputeLock
) -> None:
    """No answer fails or mixes versions, and what is learned is what a network learns that nobody asks for anything."""
    rounds = {
        "local_epochs": 1,
        "batch_size": 4,
        "learning_rate": 0.3,
        "anchor_weight": 0.5,
        "edge_rounds": edge_rounds,
    }
    config = served_config(fine_tune=rounds)
    versions = Versions(monkeypatch)
    served = built(config, compute_lock)
    served.network.install()
    for device in ("north-a", "south-a"):
        served.parts(device)
    found: list[tuple[Target, list[int], tuple[str, ...], list[int]]] = []
    failed: list[Exception] = []
    over = threading.Event()

    def ask(number: int) -> None:
        bodies: tuple[Place, ...] = ("edge", "cloud")
        try:
            while not over.is_set():
                to, ids = target(bodies[number % 2], ("shapes", "tastes")[number // 2]), prompt(5 + number, len(found))
                found.append((to, ids, *answer(served, to, ids)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        cycle(served)
    over.set()
    for thread in threads:
        thread.join(60)
    assert not failed and len({versions for _, _, versions, _ in found}) > 3
    served.close()
    for to, ids, (name,), tokens in found:
        publisher = served._publishers.cloud() if to.body == "cloud" else served._publishers.edge(to.domain)
        assert tokens == likeliest(versions.model(publisher, name), ids, tokens), (to, name)
    assert_learned_alike(config, served)


def likeliest(model: PreTrainedModel, ids: list[int], tokens: list[int]) -> list[int]:
    """What a model in one piece would write at each place of an answer."""
    logits_TV = model(torch.tensor([ids + tokens[:-1]])).logits[0]
    choices: list[int] = logits_TV[len(ids) - 1 :].argmax(dim=-1).tolist()
    return choices


def assert_learned_alike(config: Config, served: ServedNetwork) -> None:
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    foundation = Foundation("tiny", lively_model(), tiny_tokenizer())
    alone = build_network(config, foundation, shapes, tiny_data(config), PUBLIC_TEXT)
    for _ in range(2):
        alone.install()
        alone.release()
        alone.fine_tune()
        alone.absorb()
    for name in ("shapes", "tastes", "merged"):
        (_, expected), (_, tensors) = alone.cloud.adapter(name), served.network.cloud.adapter(name)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key])
