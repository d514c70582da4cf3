"""``gaisnet paper``: runs experiments one after another, keeps each row at once, and writes one report."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gaisnet.checkpoint import make_room_for, write_text
from gaisnet.errors import ConfigError
from gaisnet.research.paper.experiment import Experiment, Row, Setup
from gaisnet.research.paper.page import render_page
from gaisnet.research.paper.results import Machine, Result, method_of, read_result, write_result
from gaisnet.runs.output import claimed

REPORT = "report.html"


def run_paper(
    experiments: Sequence[Experiment], out: Path, setup: Setup, only: Sequence[str] = ()
) -> dict[str, Result]:
    """Measure the rows that ``out`` lacks, and write ``report.html`` after each experiment; return results by name.

    A killed run resumes after its last row. Experiments outside ``only`` appear in the report if they were measured
    before.

    Raises:
        ConfigError: ``only`` names an unknown experiment, or ``out`` holds results of another kind of run.
        OutputInUse: Another process measures into ``out``.
        OutputNotWritable: ``out`` cannot be written.
        MissingPackage: Images of an experiment are missing; raised before anything is measured.
        GaisnetError: An experiment cannot be measured.
    """
    known = {experiment.name: experiment for experiment in experiments}
    for name in only:
        if name not in known:
            raise ConfigError(f"experiment '{name}'", "there is no such experiment", f"use one of: {', '.join(known)}")
    make_room_for(out / REPORT)
    with claimed(out):
        return _run(known, out, setup, only)


def _run(known: Mapping[str, Experiment], out: Path, setup: Setup, only: Sequence[str]) -> dict[str, Result]:
    found = {name: read_result(out, experiment, setup.quick) for name, experiment in known.items()}
    results = {name: result for name, result in found.items() if result is not None}
    wanted = [known[name] for name in only or known]
    for name in {name: None for experiment in wanted for name in experiment.data}:
        setup.images(name)
    for experiment in wanted:
        name = experiment.name
        start = results.get(name) or Result(
            experiment=name, quick=setup.quick, method=method_of(experiment), machine=Machine.present()
        )
        results[name] = _measure(experiment, start, out, setup)
        write_text(out / REPORT, render_page(list(known.values()), results, setup.quick))
    return results


def _measure(experiment: Experiment, result: Result, out: Path, setup: Setup) -> Result:
    done = {row.key for row in result.rows}
    every = experiment.units(setup.quick)
    for number, (key, (condition, seed)) in enumerate(every.items()):
        setup.progress(f"paper: {experiment.title}", number, len(every), {})
        if key in done:
            continue
        started = time.perf_counter()
        measured = experiment.measure(condition, seed, setup)
        seconds = time.perf_counter() - started
        row = Row(condition=condition, seed=seed, seconds=seconds, **measured.model_dump())
        result = result.with_row(row)
        write_result(out, result)
    setup.progress(f"paper: {experiment.title}", len(every), len(every), {})
    return result
