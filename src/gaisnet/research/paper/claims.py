"""The paper's claims, and the verdict on each after it was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAPER = "arXiv 2401.02668"
"""GaisNet: "Towards Integrated Fine-tuning and Inference when Generative AI meets Edge Intelligence"."""

Verdict = Literal["agrees", "partly", "disagrees"]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, in our words.

    Attributes:
        says: The statement.
        where: Section or figure of the paper.
    """

    says: str
    where: str = PAPER


@dataclass(frozen=True)
class Finding:
    """The verdict on a claim.

    Attributes:
        verdict: The result of the experiment's rule.
        measured: The figures behind it, in a sentence or two.
    """

    verdict: Verdict
    measured: str


def verdict_of(holds: Sequence[bool]) -> Verdict:
    """Return ``agrees`` if a claim holds in every condition, ``disagrees`` if in none, else ``partly``.

    Raises ``ValueError`` if there is no condition.
    """
    if not holds:
        raise ValueError("there is no verdict on nothing that was measured")
    if all(holds):
        return "agrees"
    return "partly" if any(holds) else "disagrees"


PRETRAINING = Claim(
    "A foundation model that was pre-trained, and is then fine-tuned, is better than a model that learns the same task "
    "from scratch: what it learned without labels makes up for the few labels that an edge's devices have."
)

INFERENCE = Claim(
    "Inference can be split between a device and its edge. Where the model is cut trades what the device must compute "
    "against what crosses the link, so the best cut depends on the link."
)

KINDS = Claim(
    "Tuning a few weights beside or before a frozen foundation model, as LoRA or prompts, learns a task about as well "
    "as tuning all weights of the same layers, and a fraction of the weights has to learn and to travel."
)
HYBRID = Claim(
    "Hybrid federated split learning, in which some devices hold the first layers only and others the whole model, "
    "learns about as well as federated learning and as split learning, and asks less of its devices than federated "
    "learning does."
)
SKEW = Claim(
    "The more the devices' data differ from one another, the worse is what they learn together: accuracy rises with "
    "the alpha of the Dirichlet distribution by which labels are dealt."
)
CLUSTERS = Claim(
    "Devices with similar data are best put together in clusters, each of which learns for itself: some number of "
    "clusters between one for all and one for each device is the best."
)
