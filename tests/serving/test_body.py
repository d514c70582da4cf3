"""The service: who runs when, what it holds, and what happens when sessions come, go and ask for too much."""

import random
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.state import take_out
from gaisnet.adapters.tuning import activate, active_adapters, add_adapter, trainable
from gaisnet.config import ServiceSettings
from gaisnet.errors import (
    ContextFull,
    CutError,
    ServiceFull,
    SessionClosed,
    SessionRefused,
    UnknownAdapter,
    WireFormatError,
)
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.serving.engine import body as body_module
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.rows import BLOCK
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import DOMAIN, adapter, generated, lively_model, prompt, served, session, with_adapters
from tests.tiny import NUM_LAYERS

POSITION_BYTES = 2 * NUM_LAYERS * 2 * 8 * 4


def rows(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 32, generator=torch.Generator().manual_seed(seed))


def new_service(**settings: int) -> tuple[BodyService, Body]:
    body = cut_decoder(Decoder(lively_model(max_position_embeddings=4096)), CutLayers(0))[1]
    return BodyService(body, range(NUM_LAYERS), ServiceSettings.model_validate(settings)), body


def opened(service: BodyService, num_positions: int = 0) -> str:
    return service.open_session(0, NUM_LAYERS, num_positions=num_positions)


def run_all(service: BodyService) -> list[int]:
    """Rows of each step until nothing waits."""
    steps = []
    while num := service.step():
        steps.append(num)
    return steps


def same(answer: "Future[Tensor]", expected: Tensor) -> None:
    torch.testing.assert_close(answer.result(timeout=0), expected, atol=2e-4, rtol=1e-3)


def test_a_step_takes_a_token_of_some_and_a_chunk_of_others() -> None:
    service, body = new_service(chunk=4)
    names = [opened(service) for _ in range(3)]
    answers = [
        service.extend_session(name, rows(num, num), want)
        for name, num, want in zip(names, (1, 10, 6), (1, 3, 0), strict=True)
    ]
    assert run_all(service) == [1 + 4 + 4, 4 + 2, 2]
    same(answers[0], body(rows(1, 1)[None])[0])
    same(answers[1], body(rows(10, 10)[None])[0, -3:])
    assert answers[2].result(timeout=0).shape == (0, 32)


def test_nobody_starves() -> None:
    service, _ = new_service(chunk=4, step_rows=5)
    long = service.extend_session(opened(service), rows(12))
    short = opened(service)
    for _ in range(3):
        token = service.extend_session(short, rows(1))
        assert service.step() == 5
        assert token.done()
    assert long.done()


def test_short_ones_go_before_long_ones_that_came_later() -> None:
    service, _ = new_service(chunk=8, step_rows=8)
    first, long, short = (service.extend_session(opened(service), rows(n)) for n in (4, 8, 3))
    service.step()
    assert (first.done(), long.done(), short.done()) == (True, False, True)


def test_rows_of_one_session_queue_up() -> None:
    service, body = new_service()
    name = opened(service)
    first, second = service.extend_session(name, rows(6)[:4]), service.extend_session(name, rows(6)[4:])
    assert run_all(service) == [4, 2]
    same(first, body(rows(6)[None])[0, :4])
    same(second, body(rows(6)[None])[0, 4:])


def test_cropping_goes_back() -> None:
    service, body = new_service()
    name = opened(service)
    service.extend_session(name, rows(6))
    with pytest.raises(SessionRefused, match="rows of it wait"):
        service.crop_session(name, 2)
    run_all(service)
    service.crop_session(name, 3)
    again = service.extend_session(name, rows(8, 5))
    run_all(service)
    same(again, body(torch.cat([rows(6)[:3], rows(8, 5)])[None])[0, 3:])
    with pytest.raises(SessionRefused, match="it has 11"):
        service.crop_session(name, 12)


def test_rows_that_are_kept_are_those_of_the_session() -> None:
    service, _ = new_service()
    name, plain = service.open_session(0, NUM_LAYERS, keep_rows=True), opened(service)
    assert service.received_rows(name).shape == (0, 32)
    service.extend_session(name, rows(4, 1))
    with pytest.raises(SessionRefused, match="rows of it wait"):
        service.received_rows(name)
    run_all(service)
    service.extend_session(name, rows(70, 2))
    run_all(service)
    service.crop_session(name, 5)
    service.extend_session(name, rows(2, 3))
    run_all(service)
    assert torch.equal(service.received_rows(name), torch.cat([rows(4, 1), rows(70, 2)[:1], rows(2, 3)]))
    service.crop_session(name, 0)
    assert service.received_rows(name).shape == (0, 32)
    with pytest.raises(SessionRefused, match="does not keep them"):
        service.received_rows(plain)


def test_rows_that_failed_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = new_service(chunk=4)
    name = service.open_session(0, NUM_LAYERS, keep_rows=True)
    failing = service.extend_session(name, rows(10))
    service.step()

    def fail(_: Any) -> Any:
        raise MemoryError("too much")

    monkeypatch.setattr(service._layers, "run_sessions", fail)
    service.step()
    with pytest.raises(MemoryError):
        failing.result(timeout=0)
    assert torch.equal(service.received_rows(name), rows(10)[:4])  # the first chunk is there
    assert service.session_span(name) == (0, NUM_LAYERS, BLOCK)


def test_memory_has_a_limit_and_closing_frees_it() -> None:
    service, _ = new_service(max_cache_mib=1)
    most = 2**20 // (BLOCK * POSITION_BYTES) * BLOCK
    first = opened(service, most - BLOCK)
    assert service.used_bytes == (most - BLOCK) * POSITION_BYTES
    second = opened(service)
    service.extend_session(second, rows(BLOCK))
    with pytest.raises(ServiceFull, match="are held"):
        service.extend_session(second, rows(1))
    with pytest.raises(ServiceFull):
        opened(service, 1)
    assert service.used_bytes == most * POSITION_BYTES
    assert run_all(service) == [BLOCK]  # what was there goes on
    service.close_session(first)
    service.extend_session(second, rows(1))
    service.close_session(second)
    service.close_session(second)
    assert (service.used_bytes, service.num_sessions) == (0, 0)


def test_what_is_held_is_what_is_used() -> None:
    service, _ = new_service()
    name = opened(service)
    service.extend_session(name, rows(BLOCK + 1))
    run_all(service)
    assert service.used_bytes == service._sessions[name].cache.size_bytes


def test_sessions_have_a_limit() -> None:
    service, _ = new_service(max_sessions=2)
    opened(service), opened(service)
    with pytest.raises(ServiceFull, match="2 are open"):
        opened(service)


@pytest.mark.parametrize(
    ("wrong", "want"), [(rows(2)[:, :7], 1), (rows(2), 3), (rows(2), -1), (rows(0), 0), (rows(2)[0], 1)]
)
def test_rows_that_do_not_fit(wrong: Tensor, want: int) -> None:
    service, _ = new_service()
    name = opened(service)
    with pytest.raises(WireFormatError):
        service.extend_session(name, wrong, want)
    assert (service.step(), service.used_bytes) == (0, 0)


def test_layers_adapters_and_positions_that_the_body_lacks() -> None:
    service, _ = new_service()
    for first, stop in ((-1, 3), (0, NUM_LAYERS + 1), (3, 3)):
        with pytest.raises(CutError, match="layers 0 to 5"):
            service.open_session(first, stop)
    with pytest.raises(UnknownAdapter):
        service.open_session(0, 2, ["law"], num_positions=5)
    with pytest.raises(ContextFull, match="the model takes 4096"):
        opened(service, 4097)
    name = opened(service)
    with pytest.raises(ContextFull):
        service.extend_session(name, rows(4097))
    assert (service.used_bytes, service.num_sessions) == (0, 1)


def test_a_closed_session_answers_nothing() -> None:
    service, _ = new_service(chunk=2)
    name, other = opened(service), opened(service)
    waiting, undisturbed = service.extend_session(name, rows(5)), service.extend_session(other, rows(5))
    service.step()
    service.close_session(name)
    with pytest.raises(SessionClosed):
        waiting.result(timeout=0)
    for call in (lambda: service.extend_session(name, rows(1)), lambda: service.crop_session(name, 0)):
        with pytest.raises(SessionClosed):
            call()
    run_all(service)
    assert undisturbed.done()


def test_a_cancelled_answer_disturbs_nobody() -> None:
    service, _ = new_service()
    name = opened(service)
    assert service.extend_session(name, rows(5)).cancel()
    after = service.extend_session(name, rows(1))
    run_all(service)
    assert after.done()


def test_closed_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = new_service()
    name, other = opened(service), opened(service)
    waiting, undisturbed = service.extend_session(name, rows(5)), service.extend_session(other, rows(5))
    run = service._layers.run_sessions

    def close_and_run(shares: Any) -> Any:
        service.close_session(name)
        assert service.used_bytes == 2 * BLOCK * POSITION_BYTES  # it is still in use
        return run(shares)

    monkeypatch.setattr(service._layers, "run_sessions", close_and_run)
    service.step()
    assert service.used_bytes == BLOCK * POSITION_BYTES
    assert undisturbed.done()
    with pytest.raises(SessionClosed):
        waiting.result(timeout=0)


def test_a_session_that_breaks_the_batch_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service, body = new_service()
    bad, good = opened(service), opened(service)
    failing, behind, answer = (
        service.extend_session(bad, rows(5)),
        service.extend_session(bad, rows(1)),
        service.extend_session(good, rows(4)),
    )
    run, culprit = service._layers.run_sessions, service._sessions[bad].cache

    def fail(shares: Any) -> Any:
        if any(share.cache is culprit for share in shares):
            raise MemoryError("too much")
        return run(shares)

    monkeypatch.setattr(service._layers, "run_sessions", fail)
    service.step()
    same(answer, body(rows(4)[None])[0])
    for future in (failing, behind):
        with pytest.raises(MemoryError):
            future.result(timeout=0)
    assert service.step() == 0


def test_a_swap_between_two_tokens() -> None:
    """Sessions under way end on the version they began with; those that begin later have the new one."""
    parts, service = served(lively_model(), CutLayers(1))
    old, new, sampling = adapter(DOMAIN, 1), adapter(DOMAIN, 2), Sampling(max_tokens=16)
    service.install_adapter("law", 0, DOMAIN, old)
    began = generate(parts, session(parts, service, ("law",)), prompt(7), sampling)
    found_old = [next(began) for _ in range(5)]
    service.install_adapter("law", 1, DOMAIN, new)
    later = generate(parts, session(parts, service, ("law",)), prompt(7), sampling)
    found_new = []
    for _ in range(11):  # side by side
        found_old.append(next(began))
        found_new.append(next(later))
    found_new += later
    assert found_old == generated(with_adapters(lively_model(), law=(DOMAIN, old)), prompt(7), 16)
    assert found_new == generated(with_adapters(lively_model(), law=(DOMAIN, new)), prompt(7), 16)
    assert found_old != found_new


def test_the_end_of_the_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = new_service()
    with service.serving():
        first = service.extend_session(opened(service), rows(3))
        assert first.result(timeout=30).shape == (3, 32)
        monkeypatch.setattr(service, "step", lambda: 0)
        waiting = service.extend_session(opened(service), rows(3))
    with pytest.raises(SessionClosed):
        waiting.result(timeout=0)
    assert (service.num_sessions, service.used_bytes) == (0, 0)


def test_rows_must_stand_where_the_sender_thinks() -> None:
    service, _ = new_service()
    name = opened(service)
    service.extend_session(name, rows(3), position=0)
    service.extend_session(name, rows(2), position=3)
    with pytest.raises(SessionRefused, match="position 4.*has 5"):
        service.extend_session(name, rows(1), position=4)


def test_many_threads_share_batches() -> None:
    """Sessions with different adapters, prompts and lengths, all at once: each has its own right answer."""
    parts, service = served(lively_model(), CutLayers(1), ServiceSettings(chunk=4, step_rows=16))
    adapters = {f"a{i}": adapter(DOMAIN, i) for i in range(3)}
    for name, tensors in adapters.items():
        service.install_adapter(name, 0, DOMAIN, tensors)
    jobs = {i: (f"a{i % 3}", prompt(5 + 3 * i, i)) for i in range(6)}
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        name, ids = jobs[number]
        found[number] = list(generate(parts, session(parts, service, (name,)), ids, Sampling(max_tokens=10)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in jobs]
    with service.serving():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for number, (name, ids) in jobs.items():
        whole = with_adapters(lively_model(), **{name: (DOMAIN, adapters[name])})
        assert found[number] == generated(whole, ids, 10)
    assert (service.num_sessions, service.used_bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_sessions_that_come_go_and_go_back(seed: int) -> None:
    """What a session is given depends on its own rows only, whatever the others do; in the end nothing is held."""
    service, body = new_service(chunk=3, step_rows=7, max_sessions=5)
    chance = random.Random(seed)
    past: dict[str, Tensor] = {}
    waiting: dict[str, Future[Tensor]] = {}
    num_checked = 0
    for number in range(120):
        action = chance.choice(["open", "extend", "extend", "extend", "crop", "close", "step", "step"])
        name = chance.choice(list(past)) if past else ""
        if action == "open" and len(past) < 5:
            past[opened(service, chance.choice([0, 70]))] = rows(0)
        elif action == "extend" and name and name not in waiting:
            new = rows(chance.choice([1, 1, 2, 8]), number)
            past[name] = torch.cat([past[name], new])
            waiting[name] = service.extend_session(name, new)
        elif action == "crop" and name and name not in waiting:
            past[name] = past[name][: chance.randint(0, len(past[name]))]
            service.crop_session(name, len(past[name]))
        elif action == "close" and name and chance.random() < 0.5:
            service.close_session(name)
            del past[name]
            waiting.pop(name, None)
        elif action == "step":
            service.step()
        for done in [name for name, answer in waiting.items() if answer.done()]:
            found = waiting.pop(done).result()
            torch.testing.assert_close(found, body(past[done][None])[0, -len(found) :], atol=2e-4, rtol=1e-3)
            num_checked += 1
    assert num_checked > 10
    for name in past:
        service.close_session(name)
    assert (service.num_sessions, service.used_bytes, service.step()) == (0, 0, 0)


def test_a_body_serves_while_it_learns() -> None:
    """Steps of an optimizer between tokens change what learns, and nothing of what is served."""
    parts, service = served(lively_model(), CutLayers(1))
    body = service._layers._layers
    add_adapter(body, "law", DOMAIN, seed=0)
    activate(body, ["law"])
    optimizer = torch.optim.SGD(trainable(body, "law"), lr=1e-4)
    service.install_adapter("law", 0, DOMAIN, adapter(DOMAIN, 1))
    before = take_out(body, "law")
    found = []
    for token in generate(parts, session(parts, service, ("law",)), prompt(7), Sampling(max_tokens=12)):
        found.append(token)
        with service.compute_lock.learning():
            body.run(rows(5)[None], 1).square().mean().backward()
            optimizer.step()
        service.install_adapter("law", len(found), DOMAIN, take_out(body, "law"))
    law = {"law": (DOMAIN, adapter(DOMAIN, 1))}
    assert found == generated(with_adapters(lively_model(), **law), prompt(7), 12)
    assert any((before[name] != tensor).any() for name, tensor in take_out(body, "law").items())
    assert active_adapters(body) == ["law"]


def lingering(monkeypatch: pytest.MonkeyPatch, steps: float, **settings: int) -> tuple[BodyService, list[int]]:
    """A service that waits for so many times a step's time, and the number of sessions in each of its steps."""
    monkeypatch.setattr(body_module, "_LINGER", steps)
    service, _ = new_service(**settings)
    run, sizes = service._layers.run_sessions, []

    def counted(shares: Any) -> Any:
        sizes.append(len(shares))
        return run(shares)

    service._layers.run_sessions = counted  # type: ignore[method-assign]
    return service, sizes


def asked(service: BodyService, *names: str, num: int = 1) -> "list[Future[Tensor]]":
    return [service.extend_session(name, rows(num)) for name in names]


def had(answers: "list[Future[Tensor]]") -> None:
    for answer in answers:
        answer.result(timeout=60)


def test_a_step_waits_for_those_of_the_last_one_that_have_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    service, sizes = lingering(monkeypatch, 1e9)
    one, two, three = (opened(service) for _ in range(3))
    first = asked(service, one, two, three)
    with service.serving():
        had(first)
        again = asked(service, one, two)
        had([*again, *asked(service, three)])
        again = asked(service, one, two)
        service.close_session(three)
        had(again)
    assert sizes == [3, 3, 2]


def test_who_comes_too_late_is_not_waited_for_until_it_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    service, sizes = lingering(monkeypatch, 0.0)
    early, late = opened(service), opened(service)
    first = asked(service, early, late)
    with service.serving():
        had(first)
        had(asked(service, early))
        monkeypatch.setattr(body_module, "_LINGER", 1e9)
        had(asked(service, early))
        waits = asked(service, late)  # for the early one, which has never been late
        had([*waits, *asked(service, early)])
        with service._state:  # both in time, however the threads are scheduled
            waits = asked(service, early, late)
        had(waits)
        waits = asked(service, early)
        had([*waits, *asked(service, late)])
    assert sizes == [2, 1, 1, 2, 2, 2]


def test_a_step_that_is_full_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    service, sizes = lingering(monkeypatch, 1e9, chunk=4, step_rows=4)
    here, there = opened(service), opened(service)
    with service.serving():
        had(asked(service, here))
        had(asked(service, there, num=4))
    assert sizes == [1, 1]
