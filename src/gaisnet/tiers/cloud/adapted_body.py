"""The foundation model's body in the cloud, with adapters of which one at a time is active.

Shape legend: B sequences, T positions, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from gaisnet.adapters.tuning import AdapterSpec, activate, add_adapter
from gaisnet.compute_lock import ComputeLock
from gaisnet.errors import UnexpectedMessage, WireFormatError
from gaisnet.messages import SmashedData
from gaisnet.models.parts import Body
from gaisnet.models.ragged import Ragged
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH, TrainableBody

MERGED = "merged"
"""Name of the merged adapter."""


class AdaptedBody(TrainableBody):
    """The FM's body; its weights do not change.

    Args:
        body: The FM's body.
        layout: Layers of each party.
        compute_lock: Held while the body runs or adapters are switched, since it may be served, too.
    """

    def __init__(self, body: Body, layout: Layout, compute_lock: ComputeLock) -> None:
        super().__init__(body, layout, compute_lock, MERGED)
        self._is_learning = False

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(self, name: str, spec: AdapterSpec, seed: int) -> None:
        """Add an adapter: a LoRA does nothing yet, prompts and classifiers are random."""
        with self._compute_lock.learning():
            add_adapter(self._body, name, spec, seed)

    @contextmanager
    def active_adapter(self, name: str | None) -> Iterator[None]:
        """Activate one adapter inside the context; only services use the model meanwhile.

        Raises ``UnexpectedMessage`` while an adapter is trained: it would be deactivated.
        """
        with self._compute_lock.learning():
            if self._is_learning:
                asked = "request to run with another"
                raise UnexpectedMessage("the foundation model, on which an adapter learns,", asked)
            activate(self._body, () if name is None else (name,))
            try:
                yield
            finally:
                activate(self._body, ())

    # -- running it ----------------------------------------------------------------------------------------------------

    def prefix(self, smashed: SmashedData) -> Activations:
        """Finish the frozen layers after a device's head. Raises ``WireFormatError`` if the data do not fit."""
        first_cut, first = self._layout.first_cut, self._layout.first_adapted
        width, found = self._body.config.hidden_size, smashed.hidden_ND.shape[1]
        if not self._causal and not bool((smashed.num_labels_E == 1).all()):
            raise WireFormatError(f"examples of '{smashed.owner}' with more than the one label that a classifier takes")
        if not first_cut <= smashed.next_layer <= first or found != width:
            raise WireFormatError(
                f"rows of width {found} for layer {smashed.next_layer}, the model has width "
                f"{width} and takes layers {first_cut} to {first}"
            )
        return self.run_prefix(Activations.from_smashed(smashed, self.device, self.dtype))

    def output_rows(self, inputs: Activations, adapter: str | None) -> Tensor:
        """Return the rows for the owner of examples, in order, without gradients."""
        with self.active_adapter(adapter):
            return self.compute_output_rows(inputs)

    # -- learning ------------------------------------------------------------------------------------------------------

    def hold_to(self, inputs: Ragged) -> None:
        """Pull training toward the suffix's output on these inputs without adapters."""
        with self.active_adapter(None):
            self._anchor = inputs, inputs.map_batches(self.run_suffix, PREFIX_BATCH)

    @contextmanager
    def _training(self) -> Iterator[list[nn.Parameter]]:
        """Also activate the merged adapter inside the context."""
        with self._compute_lock.learning():
            activate(self._body, (self._trained_adapter,))
            self._is_learning = True
        try:
            with super()._training() as parameters:
                yield parameters
        finally:
            with self._compute_lock.learning():
                self._is_learning = False
                activate(self._body, ())
