"""Frozen linear layers in int8: a quarter of the bytes and, on CPU, about twice the speed of float32.

Weights are quantized once, with one scale per output row. Activations are quantized at every call, with one scale per
token, so that a token's result does not depend on the others in its batch. Large input channels are shrunk first and
the weights grown by as much (SmoothQuant, Xiao et al., arXiv 2211.10438, alpha 0.5), where a calibration has shown
which are large.

On CPU in float32 the product runs in torch's own int8 kernel (oneDNN); elsewhere the weights are widened and
multiplied. Activations have 7 bits, not 8: without VNNI instructions a CPU adds pairs of 8-bit products in
16 bits, which overflow (docs/decisions/0002-int8-that-transfers.md has the figures).
"""

from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from gaisnet.models.frozen import replace_linears

_WEIGHT_LEVELS = 127
_INPUT_LEVELS = 63
_INPUT_ZERO = 64
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Linear):
    """A frozen ``nn.Linear`` in int8. It passes gradients through to its input but has none of its own.

    A subclass of ``nn.Linear`` so that peft can put an adapter beside it.
    """

    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.register_buffer("input_scale", torch.ones(in_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._packed: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_peak: Tensor | None = None) -> Self:
        """Quantize the weights of ``linear``; the error of a (scaled) weight is at most half of its row's scale.

        Args:
            linear: Any floating dtype.
            input_peak: Largest magnitude of each input channel on calibration text, float32 [in]; None for no scaling.
        """
        rounded = cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.device)
        weight = linear.weight.detach().float()
        if input_peak is not None:
            rounded.input_scale = _smoothing(weight, input_peak)
        weight = weight * rounded.input_scale
        scale = weight.abs().amax(dim=1).clamp(min=_TINY) / _WEIGHT_LEVELS
        codes = (weight / scale[:, None]).round().to(torch.int8)
        rounded.register_buffer("weight", codes.contiguous())  # the kernel packs it in this memory order
        rounded.weight_scale = scale
        if linear.bias is not None:
            rounded.register_buffer("bias", linear.bias.detach().float())
        return rounded

    def widened(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [out, in] for the unscaled input, in a floating ``dtype``."""
        weight: Tensor = self.weight * self.weight_scale[:, None] / self.input_scale
        return weight.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., out] of activations [..., in]."""
        result: Tensor = _Int8Product.apply(input, self)
        return result

    def _multiply(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" and rows.dtype == torch.float32:
            product = self._kernel(rows)
        else:
            product = rows @ self.widened(rows.dtype).t()
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _kernel(self, rows: Tensor) -> Tensor:
        """Multiply float32 [N, in] -> [N, out] with the int8 kernel."""
        scaled = rows / self.input_scale
        scale = scaled.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / _INPUT_LEVELS
        codes = scaled.div_(scale).add_(_INPUT_ZERO).round_().to(torch.uint8)
        zeros = torch.zeros(self.out_features, dtype=torch.int32)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, _INPUT_ZERO, self._packed_weight(), self.weight_scale, zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product.mul_(scale)

    def _packed_weight(self) -> Tensor:
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        return self._packed

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._packed = None  # a move invalidates the packed copy
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_scale = self.weight_scale.float()  # .to(float16) must not cost accuracy here
        self.input_scale = self.input_scale.float()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copy.deepcopy, which cannot copy a packed weight."""
        return {**self.__dict__, "_packed": None}


class _Int8Product(torch.autograd.Function):
    """Forward: the int8 product. Backward: the gradient of the input by the same weights, widened."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        rows = input.reshape(-1, input.shape[-1])
        return layer._multiply(rows).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad @ ctx.layer.widened(grad.dtype), None


def _smoothing(weight: Tensor, input_peak: Tensor) -> Tensor:
    """Return a scale per input channel that shares the range evenly between input and weights, float32 [in]."""
    scale = (input_peak.clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
    return scale / scale.mean()


def _is_wide(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and not isinstance(module, Int8Linear)


def to_int8(module: nn.Module, input_peaks: dict[str, Tensor], prefix: str = "") -> None:
    """Replace every ``nn.Linear`` inside ``module`` by its int8 twin, in place; peaks by dotted name."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_wide(child):
            setattr(module, name, Int8Linear.from_linear(child, input_peaks.get(path)))
        else:
            to_int8(child, input_peaks, f"{path}.")


def to_empty_int8(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` inside ``module`` by a zero int8 twin, in place, to load tensors into."""
    replace_linears(module, lambda wide: Int8Linear(wide.in_features, wide.out_features, wide.bias is not None))


def input_peaks(module: nn.Module, run: Any) -> dict[str, Tensor]:
    """Return the largest magnitude of each input channel of every ``nn.Linear`` in ``module`` during ``run()``."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Linear) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peak = inputs[0].detach().float().abs().flatten(0, -2).amax(dim=0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return linear.register_forward_pre_hook(note)

    hooks = [watch(name, child) for name, child in module.named_modules() if _is_wide(child)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return peaks
