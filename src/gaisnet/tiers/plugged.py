"""The foundation model's body as the cloud runs it: adapters are plugged in, of which one at a time acts.

Shape legend: B sequences, T positions, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import AdapterSpec, activate, add_adapter
from gaisnet.errors import WireFormatError
from gaisnet.messages import SmashedData
from gaisnet.models.parts import Body
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.domain_model import PREFIX_BATCH, body_output_rows
from gaisnet.tiers.layout import Layout
from gaisnet.turn import Turn


class PluggedBody:
    """A body whose weights stay as they are.

    Args:
        body: The FM's.
        layout: Whose layers are whose.
        turn: Held while the body runs or its adapters are switched, for others may serve it.
    """

    def __init__(self, body: Body, layout: Layout, turn: Turn) -> None:
        self._body = body
        self._layout = layout
        self._turn = turn
        self._causal = not layout.family.is_encoder
        weight = next(body.parameters())
        self.device = weight.device
        self._dtype = weight.dtype

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add(self, name: str, spec: AdapterSpec, seed: int) -> None:
        """A new adapter: a LoRA does nothing yet, prompts and classifiers are random."""
        with self._turn.learning():
            add_adapter(self._body, name, spec, seed)

    def adapter(self, name: str) -> AdapterTensors:
        """Copies of an adapter's tensors."""
        with self._turn.learning():
            return take_out(self._body, name)

    def put(self, name: str, tensors: AdapterTensors) -> None:
        """Overwrite an adapter. Raises ``AdapterMismatch``."""
        with self._turn.learning():
            put_in(self._body, name, tensors)

    @contextmanager
    def plugged_in(self, name: str | None) -> Iterator[None]:
        """Inside, this adapter acts and no other; nobody else uses the model meanwhile, except to serve."""
        with self._turn.learning():
            activate(self._body, () if name is None else (name,))
            try:
                yield
            finally:
                activate(self._body, ())

    # -- running it ----------------------------------------------------------------------------------------------------

    def suffix(self, hidden_BTD: Tensor) -> Tensor:
        """The layers that adapters act on."""
        return self._run(hidden_BTD, self._layout.first_adapted)

    def prefix(self, smashed: SmashedData) -> Activations:
        """Finish the frozen layers from where a device stopped. Raises ``WireFormatError`` if that cannot be."""
        first_cut, first = self._layout.first_cut, self._layout.first_adapted
        width, found = self._body.config.hidden_size, smashed.hidden_ND.shape[1]
        if not self._causal and not bool((smashed.num_labels_E == 1).all()):
            raise WireFormatError(f"examples of '{smashed.owner}' with more than the one label that a classifier takes")
        if not first_cut <= smashed.next_layer <= first or found != width:
            raise WireFormatError(
                f"rows of width {found} for layer {smashed.next_layer}, the model has width "
                f"{width} and takes layers {first_cut} to {first}"
            )
        inputs = Activations.of(smashed, self.device, self._dtype)
        return inputs.through(lambda h: self._run(h, smashed.next_layer, first), first, PREFIX_BATCH, self._causal)

    def output_rows(self, inputs: Activations, adapter: str | None) -> Tensor:
        """What goes to the owner of examples, of all in order, without gradients."""
        with self.plugged_in(adapter), torch.no_grad():
            return self._body.for_owners(body_output_rows(self.suffix, inputs, self._layout.wanted, self._causal))

    def _run(self, hidden_BTD: Tensor, start: int, stop: int | None = None) -> Tensor:
        with self._turn.learning():
            return self._body.run(hidden_BTD, start, stop)
