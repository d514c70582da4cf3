"""An adapter's own classifier, in place of a body's: new for every task, trained and moved with the adapter.

peft knows the idea as ``modules_to_save``. Shape legend: N rows, D hidden size, C classes.
"""

from typing import ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from transformers import PretrainedConfig

from gaisnet.adapters.slot import OneOf, peft_name
from gaisnet.errors import AdapterMismatch

_SPREAD = 0.02  # standard deviation of new weights, transformers' default
_OWN = "own"  # unlike any ``peft_name``


@runtime_checkable
class Classifying(Protocol):
    """A body that ends in a classifier, or in a place for one."""

    config: PretrainedConfig
    classifier: nn.Module | None

    def classify(self, rows_ND: Tensor) -> Tensor:
        """Return logits [N, C]."""


class Classifiers(OneOf):
    """Classifiers of several adapters, and the body's own, which is active if none of theirs is.

    Args:
        own: [N, D] -> [N, C]; None if the body has none.
    """

    kind: ClassVar[str] = "a classifier"

    def __init__(self, own: nn.Module | None) -> None:
        super().__init__({} if own is None else {_OWN: own})

    def forward(self, rows_ND: Tensor) -> Tensor:
        """Return logits [N, C] of the active classifier. Raises ``AdapterMismatch`` if there is none."""
        name = self.acting[0] if self.acting else _OWN
        if name not in self:
            raise AdapterMismatch("of a classifier", "one that acts", "none that does")
        linear = cast(nn.Linear, self[name])
        return cast(Tensor, linear(rows_ND.to(linear.weight.dtype)))


def check_classifying(body: nn.Module, name: str) -> None:
    """Raise ``AdapterMismatch`` unless ``body`` ends in a place for a classifier."""
    if not isinstance(body, Classifying):
        raise AdapterMismatch(name, "the body of an encoder, for it has a classifier", "one that does not classify")


def add_classifier(body: nn.Module, name: str, num_classes: int) -> None:
    """Put a random classifier at the end of a checked ``body``."""
    whole, device = cast(Classifying, body), next(body.parameters()).device
    if not isinstance(whole.classifier, Classifiers):
        whole.classifier = Classifiers(whole.classifier)
    linear = nn.Linear(whole.config.hidden_size, num_classes)
    nn.init.normal_(linear.weight, std=_SPREAD)
    nn.init.zeros_(linear.bias)
    whole.classifier[peft_name(name)] = linear.to(device)
