"""What a run is held against: measured once, kept with the run, each what its name says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gaisnet.cli.app import app
from gaisnet.cli.baselines import Kind
from gaisnet.config import Config
from gaisnet.config.file import load_config
from gaisnet.data.devices import DomainData, load_domains
from gaisnet.data.examples import Tokens
from gaisnet.errors import ConfigError, NothingToResume
from gaisnet.models.foundation import load_tokenizer
from gaisnet.network import Network
from gaisnet.research.bench import baselines
from gaisnet.research.bench.baselines import measure_baselines
from gaisnet.research.bench.contenders.task import Task
from gaisnet.runs.run import Run, read_summary, resume_experiment, run_experiment
from tests.tiny import tiny_edge, tiny_newcomer, write_tiny_run

OPEN_GATE = {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 100.0}
DOMAINS = {"shapes", "tastes"}


def finished(folder: Path) -> Config:
    """A tiny run of one cycle in ``folder / "out"``."""
    config = load_config(write_tiny_run(folder, cycles=1, absorb=OPEN_GATE))
    run_experiment(config, folder / "out")
    return config


@pytest.mark.integration
def test_all_are_measured_on_every_domain_and_kept_with_the_run(tmp_path: Path) -> None:
    finished(tmp_path)
    told: list[tuple[int, int]] = []
    summary = measure_baselines(tmp_path / "out", lambda stage, done, total, _: told.append((done, total)))
    assert told[0] == (0, 10) and told[-1] == (10, 10)
    assert summary == read_summary(tmp_path / "out")
    assert summary.baselines is not None and summary.gap_closed is not None
    for kind in baselines.KINDS:
        found = getattr(summary.baselines, kind)
        assert found.keys() == DOMAINS
        assert all(0.0 <= share <= 1.0 for share in found.values())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Against what you might do instead" in page and "gap closed, DM" in page

    longer = resume_experiment(tmp_path / "out", ["cycles=2"])
    assert longer.baselines == summary.baselines and longer.gap_closed is None  # they learned in one cycle only
    again = measure_baselines(tmp_path / "out")
    assert again.baselines is not None and again.baselines.cycles == 2 and again.gap_closed is not None


@pytest.mark.integration
def test_one_that_is_stopped_goes_on_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    measured: list[str] = []

    def one(kind: str) -> Callable[[Config, DomainData, int, int], float]:
        def measure(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
            if kind == "pooled" and not resumed:
                raise KeyboardInterrupt
            measured.append(kind)
            return 0.5

        return measure

    resumed = False
    monkeypatch.setattr(baselines, "_ONES", {kind: one(kind) for kind in baselines._ONES})
    monkeypatch.setattr(baselines, "without_relay", lambda config, domains, *_: dict.fromkeys(domains, 0.25))
    with pytest.raises(KeyboardInterrupt):
        measure_baselines(tmp_path / "out")
    kept = read_summary(tmp_path / "out").baselines
    assert kept is not None and kept.zero_shot == kept.few_shot == dict.fromkeys(("shapes", "tastes"), 0.5)
    assert kept.no_relay == dict.fromkeys(("shapes", "tastes"), 0.25)
    assert measured == ["zero_shot"] * 2 + ["few_shot"] * 2
    resumed = True
    assert measure_baselines(tmp_path / "out").baselines == kept.model_copy(
        update={kind: dict.fromkeys(("shapes", "tastes"), 0.5) for kind in ("pooled", "scratch")}
    )
    assert measured[4:] == ["pooled"] * 2 + ["scratch"] * 2


def one_domain(tmp_path: Path) -> tuple[Config, DomainData]:
    config = load_config(write_tiny_run(tmp_path))
    return config, load_domains(config)["shapes"]


def test_as_many_passes_as_the_network_made(tmp_path: Path) -> None:
    config, data = one_domain(tmp_path)
    tune = config.fine_tune.model_copy(update={"edge_rounds": 2, "local_epochs": 3})
    at_once = baselines._with_all_passes(config.model_copy(update={"fine_tune": tune}), data, cycles=4)
    assert baselines._task(at_once, data).epochs == 24


@pytest.mark.parametrize(("travelling", "passes"), [("", 8), ("b", 8), ("abc", 9)])
def test_the_last_mile_counts_by_the_share_of_examples_that_it_sees(
    tmp_path: Path, travelling: str, passes: int
) -> None:
    edges = [tiny_edge("north", "shapes", travelling), tiny_edge("south", "tastes", "a")]
    fine_tune = {"local_epochs": 2, "batch_size": 4}
    config = load_config(
        write_tiny_run(tmp_path, edges=edges, absorb={"last_mile": {"epochs": 1}}, fine_tune=fine_tune)
    )
    data = load_domains(config)["shapes"]
    assert baselines._task(baselines._with_all_passes(config, data, cycles=4), data).epochs == passes


def test_a_model_from_scratch_has_the_layers_of_a_domain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = one_domain(tmp_path)
    seen: dict[str, Any] = {}

    def train(model: torch.nn.Module, task: Task, seed: int, schedule: str, collate: object) -> object:
        seen.update(model=model, learning_rate=task.config.fine_tune.learning_rate)
        raise InterruptedError

    monkeypatch.setattr(baselines, "train", train)
    with pytest.raises(InterruptedError):
        baselines.from_scratch(config, data, 4, seed=0)
    model = seen["model"]
    assert len(model.get_decoder().layers) == 4
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert seen["learning_rate"] == baselines._SCRATCH_LEARNING_RATE


def test_asked_with_examples_it_sees_them_and_only_the_answer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = one_domain(tmp_path)
    seen: list[list[str]] = []
    tokenizer = load_tokenizer(config.model)

    def look(model: object, asked: list[Tokens], shown: list[int]) -> float:
        seen.append([str(tokenizer.decode([*shown, *tokens.input_ids, tokens.label_ids[-1]])) for tokens in asked])
        assert all(tokens.input_ids[-1] != 257 for tokens in asked)
        return 0.0

    monkeypatch.setattr(baselines, "accuracy", look)
    baselines.zero_shot(config, data, 5, seed=0)
    baselines.few_shot(config, data, 5, seed=0)
    examples = [example for mine in data.devices.values() for example in mine.test]
    assert seen[0] == [e.prompt + e.completion for e in examples]
    train = {e.prompt + e.completion for mine in data.devices.values() for e in mine.train}
    for text, example in zip(seen[1], examples, strict=True):
        *shots, question = text.split("\n\n")
        assert question == example.prompt + example.completion
        assert len(set(shots)) == baselines.SHOTS and train.issuperset(shots)


@pytest.mark.integration
def test_only_those_that_were_asked_for_are_measured(tmp_path: Path) -> None:
    finished(tmp_path)
    result = CliRunner().invoke(app, ["baselines", str(tmp_path / "out"), "--only", "few_shot", "--only", "zero_shot"])
    assert result.exit_code == 0, result.output
    found = read_summary(tmp_path / "out").baselines
    assert found is not None
    assert found.zero_shot.keys() == found.few_shot.keys() == DOMAINS
    assert found.no_relay == found.pooled == found.scratch == {}
    refused = CliRunner().invoke(app, ["baselines", str(tmp_path / "out"), "--only", "half_shot"])
    assert refused.exit_code == 2
    assert {kind.value for kind in Kind} == set(baselines.KINDS)


@pytest.mark.integration
def test_a_run_without_a_cycle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "cycle", stop)
    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path)
    with pytest.raises(ConfigError, match="has not finished a cycle"):
        measure_baselines(tmp_path / "out")


def test_a_prompt_is_asked_as_long_as_everybody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = one_domain(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"context": 20})})
    lengths: list[int] = []

    def look(model: object, asked: list[Tokens], shown: list[int]) -> float:
        lengths.extend(len(shown) + len(tokens.input_ids) for tokens in asked)
        return 0.0

    monkeypatch.setattr(baselines, "accuracy", look)
    baselines.zero_shot(config, data, 5, seed=0)
    assert set(lengths) == {19}  # the last token is only ever predicted
    lengths.clear()
    baselines.few_shot(config, data, 5, seed=0)
    assert set(lengths) == {19 + baselines.SHOTS * (20 + 2)}


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(NothingToResume):
        measure_baselines(tmp_path)
    result = CliRunner().invoke(app, ["baselines", str(tmp_path)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_without_a_relay_edges_learn_for_as_many_cycles_and_newcomers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = [tiny_edge("north", "shapes"), tiny_newcomer("west", "forms", "shapes")]
    config = load_config(write_tiny_run(tmp_path, edges=edges))
    cycles: list[int] = []
    fine_tune = Network.fine_tune

    def counted(network: Network) -> object:
        cycles.append(network.cycle)
        return fine_tune(network)

    monkeypatch.setattr(Network, "fine_tune", counted)
    found = baselines.without_relay(config, load_domains(config), 3)
    assert cycles == [0, 1, 2]
    assert found.keys() == {"shapes"}
