"""A frozen linear layer in 4 bits: y = x W^T + b, where W exists only while it is being used.

The layer holds the packed codes and their scales. Forward decodes the dense weight, multiplies, and drops it; backward decodes
it again for grad_x = grad_y W. Nothing dense is kept in between, and W itself never gets a gradient: that is what lets a large
frozen base fit beside its small trained adapters. The idea: recompute what is cheap to rebuild, save only what is not.

It holds plain buffers, no tensor subclass, and it refuses to let ``.to(bfloat16)`` round its scales. Scales and levels are fp32
and so is their product, rounded once to ``compute_dtype(x)``, the dtype in which this device multiplies ``x`` well; the result
has the dtype of ``x``. Under ``torch.compile`` each product is one opaque operator, see ``matmul.py``.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from minisft.kernels import cpu_nf4
from minisft.matmul import compute_dtype, frozen_linear, frozen_linear_t
from minisft.nf4 import QuantizedWeight


class _Context(FunctionCtx):
    q: QuantizedWeight
    needs_input_grad: tuple[bool, ...]


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b and grad_x = grad_y W. For backward it keeps a reference to the packed weight, and no tensor at all."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, bias: Tensor | None, q: QuantizedWeight) -> Tensor:
        ctx.q = q
        return frozen_linear(x, q, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = frozen_linear_t(grad, ctx.q) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=compute_dtype(grad))
        return grad_x, grad_bias, None


# ---- the layer -------------------------------------------------------------------------------------------------------


class NF4Linear(nn.Module):
    """``nn.Linear`` whose weight is frozen in 4 bits.

    Its state dict has plain names; in a bitsandbytes file, for a layer ``L``, they stand for:
    ``packed`` = ``L.weight`` (there of shape (bytes, 1)), ``absmax`` = ``L.weight.absmax``, ``absmax2`` =
    ``L.weight.nested_absmax``, ``levels`` = ``L.weight.quant_map``, and ``offset`` is ``nested_offset`` in the JSON there.

    Args:
        quantized: the weight, of shape (out_features, in_features); its tensors become buffers as they are.
        bias: (out_features,) or None; a parameter like any other, in the model's dtype.

    Raises:
        ValueError: the weight is not a matrix.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    levels: Tensor
    bias: nn.Parameter | None

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if len(quantized.shape) != 2:
            raise ValueError(f"a linear layer needs a matrix, not a weight of shape {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        self.block_size, self.weight_dtype = quantized.block_size, quantized.dtype
        for name in ("packed", "absmax", "absmax2", "offset", "levels"):
            self.register_buffer(name, getattr(quantized, name))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        levels: str | Sequence[float] | Tensor = "nf4",
        name: str = "weight",
    ) -> NF4Linear:
        """The layer in 4 bits, on the same device; it shares the bias.

        Args:
            linear: the dense layer.
            block_size, double_quant, levels, name: see ``nf4.quantize``, for the errors too.

        Returns:
            a new layer.
        """
        return cls(cpu_nf4.quantize(linear.weight, block_size, double_quant, levels, name=name), linear.bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as a value; its tensors are the buffers themselves."""
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedWeight(
            self.packed, self.absmax, self.absmax2, self.offset, self.levels, self.block_size, shape, self.weight_dtype
        )

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out_features, in_features), a new tensor; in the source's dtype if None."""
        return cpu_nf4.dequantize(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return frozen_linear(x, self.quantized, self.bias)
        return _FrozenLinear.apply(x, self.bias, self.quantized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Follow the model to its device, but never to its dtype: half-precision scales would be another weight."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self

    def extra_repr(self) -> str:
        shape = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{shape}, block_size={self.block_size}, double_quant={self.absmax2 is not None}"
