"""Training and serving on one body: other work runs at every pause, without an effect on either.

The compute lock of these tests runs in the training thread, at each pause, the work of other threads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.compute_lock import ComputeLock
from gaisnet.config import ServiceSettings
from gaisnet.messages import BodyOutput
from gaisnet.models.release import ReleasedModel
from gaisnet.progress import silent
from gaisnet.serving.engine.body import BodyService
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Outcome
from gaisnet.tiers.split.trainable_body import TrainingResult
from tests.serving.models import DOMAIN, adapter
from tests.tiers.cohort import Cohort, cohort_config, random_adapter
from tests.tiny import NUM_LAYERS

pytestmark = pytest.mark.numeric

FIRST = 1


class Busy(ComputeLock):
    """A compute lock that calls a function at every pause of training."""

    def __init__(self) -> None:
        super().__init__()
        self.do: Callable[[], object] = lambda: None
        self.num_pauses = 0
        self._inside = False

    def pause(self) -> None:
        if self._kind == "learning" and self._holder is not None and not self._inside:
            self._inside = True
            self.num_pauses += 1
            self.do()
            self._inside = False


def rows(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cohort() -> Cohort:
    settings = {"local_epochs": 2, "batch_size": 2, "learning_rate": 0.05, "anchor_weight": 0.0}
    return Cohort(cohort_config([1, 2], fine_tune=settings))


def new_model(cohort: Cohort, compute_lock: ComputeLock) -> DomainModel:
    body = ReleasedModel(cohort.release).body(cohort.layout.first_cut, cohort.layout.tail_start)
    domain = DomainModel(body, cohort.layout, compute_lock)
    domain.set_adapter("domain", random_adapter(domain.copy_adapter("domain"), seed=5))
    return domain


def learn(cohort: Cohort, domain: DomainModel, labels: Any = None) -> tuple[TrainingResult, AdapterTensors]:
    settings = cohort.config.fine_tune
    learned = domain.train_adapter(
        cohort.members(), labels or cohort.labels, TrainingSchedule(settings, 3, "here"), silent
    )
    return learned, domain.copy_adapter("domain")


class Visitor:
    """A service that opens sessions, runs rows, closes them and swaps adapters, all within pauses."""

    def __init__(self, service: BodyService) -> None:
        self.service = service
        self.found: list[tuple[int, Tensor]] = []
        self._number = 0

    def __call__(self) -> None:
        number, self._number = self._number, self._number + 1
        if number % 5 == 0:
            self.service.install_adapter("law", number, DOMAIN, adapter(DOMAIN, number % 3))
            self._version = number % 3
            self._name = self.service.open_session(FIRST, NUM_LAYERS, ["law"])
        answer = self.service.extend_session(self._name, rows(2, number))
        self.service.step()
        self.found.append((self._version, answer.result(timeout=0)))
        if number % 5 == 4:
            self.service.close_session(self._name)


def test_neither_learning_nor_answers_notice_each_other(cohort: Cohort) -> None:
    alone_learned, alone_adapter = learn(cohort, new_model(cohort, ComputeLock()))
    compute_lock = Busy()
    domain = new_model(cohort, compute_lock)
    visitor = Visitor(BodyService(domain.own_body, domain.layers, ServiceSettings(), compute_lock))
    compute_lock.do = visitor
    learned, tensors = learn(cohort, domain)
    compute_lock.do = lambda: None
    assert learned == alone_learned
    assert all(torch.equal(tensor, alone_adapter[key]) for key, tensor in tensors.items())
    assert compute_lock.num_pauses > 200
    quiet = new_model(cohort, ComputeLock())
    service = BodyService(quiet.own_body, quiet.layers, ServiceSettings())
    for first in range(0, 100, 5):
        service.install_adapter("law", first, DOMAIN, adapter(DOMAIN, first % 3))
        name = service.open_session(FIRST, NUM_LAYERS, ["law"])
        for number in range(first, first + 5):
            answer = service.extend_session(name, rows(2, number))
            service.step()
            torch.testing.assert_close(visitor.found[number][1], answer.result(timeout=0))
        service.close_session(name)


def test_all_of_a_step_can_be_paused_but_asking_for_labels_holds_nothing(cohort: Cohort) -> None:
    compute_lock = Busy()
    domain = new_model(cohort, compute_lock)
    held: list[bool] = []

    def labels(outputs: Mapping[str, BodyOutput]) -> Mapping[str, Outcome]:
        held.append(compute_lock._holder is not None)
        return cohort.labels(outputs)

    learn(cohort, domain, labels)
    assert len(held) > 2 and not any(held)
    assert compute_lock._holder is None
