"""Every experiment of ``gaisnet paper``. To add one, write a module like the others and a line here."""

from collections.abc import Sequence

from gaisnet.research.paper import clusters, hybrid, inference, kinds, pretraining, skew
from gaisnet.research.paper.experiment import Experiment

EXPERIMENTS: Sequence[Experiment] = (
    pretraining.EXPERIMENT,
    kinds.EXPERIMENT,
    hybrid.EXPERIMENT,
    skew.EXPERIMENT,
    clusters.EXPERIMENT,
    inference.EXPERIMENT,
)
"""Experiments in the order in which they run."""
