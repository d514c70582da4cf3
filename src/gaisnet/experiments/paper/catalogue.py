"""All experiments of ``gaisnet paper``. A new one is a module like the others, and a line here."""

from collections.abc import Sequence

from gaisnet.experiments.paper import inference, pretraining
from gaisnet.experiments.paper.experiment import Experiment

EXPERIMENTS: Sequence[Experiment] = (pretraining.EXPERIMENT, inference.EXPERIMENT)
"""In the order in which they are measured."""
