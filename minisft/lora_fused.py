"""LoRA's forward and backward with one pass over y: the same numbers as the formula in ``lora.py``, sooner and in less memory.

Kept for backward: x (which its neighbours share) and x A^T (rank columns); never y, W, W^T or a cast copy of x. A quantized W
is decoded for each of the two products and dropped after it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.matmul import FrozenWeight, Linear, compute_dtype, frozen_linear_t, frozen_linear_with_update
from minisft.nf4_linear import NF4Linear


def adapted_linear(x: Tensor, lora_A: Tensor, lora_B: Tensor, base: nn.Linear | NF4Linear, scaling: float) -> Tensor:
    """y = x W^T + b + scaling * (x A^T) B^T, with gradients for x, A and B.

    Args:
        x: (..., in).
        lora_A: (rank, in).
        lora_B: (out, rank).
        base: the frozen layer, dense or quantized.
        scaling: the factor.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    if torch.is_grad_enabled():
        return _AdaptedLinear.apply(x, lora_A, lora_B, base, scaling)
    return _forward(x, lora_A, lora_B, base, scaling)[0]  # at one token, autograd's own work takes as long as the update


def _forward(x: Tensor, lora_A: Tensor, lora_B: Tensor, base: nn.Linear | NF4Linear, scaling: float) -> tuple[Tensor, Tensor]:
    """y, and x A^T. A plain ``nn.Linear`` multiplies as PyTorch does, so that a fresh adapter changes no bit of it."""
    native = isinstance(base, (Linear, NF4Linear))
    return frozen_linear_with_update(x, _weight(base), base.bias, lora_A, lora_B, scaling, native)


def _weight(base: nn.Linear | NF4Linear) -> FrozenWeight:
    return base.quantized if isinstance(base, NF4Linear) else base.weight


class _AdaptedContext(Context, Protocol):
    base: nn.Linear | NF4Linear
    scaling: float


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + s x A^T B^T. With G = grad_y and H = s G B: grad_x = G W + H A, grad_A = H^T x, grad_B = s G^T x A^T."""

    @staticmethod
    def forward(
        ctx: _AdaptedContext, x: Tensor, lora_A: Tensor, lora_B: Tensor, base: nn.Linear | NF4Linear, scaling: float
    ) -> Tensor:
        y, xa = _forward(x, lora_A, lora_B, base, scaling)
        ctx.save_for_backward(x, lora_A, lora_B, xa)
        ctx.base, ctx.scaling = base, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: _AdaptedContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, lora_A, lora_B, xa = ctx.saved_tensors
        dtype = compute_dtype(grad)
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)  # (M, out)
        gb = g @ lora_B.to(dtype) * ctx.scaling  # (M, rank)
        grad_A = gb.T @ x.reshape(-1, x.shape[-1]).to(dtype) if ctx.needs_input_grad[1] else None
        grad_B = (
            (xa.to(dtype).T @ g).T * ctx.scaling if ctx.needs_input_grad[2] else None
        )  # this order: g is read along its rows
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = frozen_linear_t(g, _weight(ctx.base), (gb, lora_A.to(dtype))).to(x.dtype).view(x.shape)
        # The factors are fp32: their gradients are too, also where the products ran in bf16.
        return (
            grad_x,
            None if grad_A is None else grad_A.to(lora_A.dtype),
            None if grad_B is None else grad_B.to(lora_B.dtype),
            None,
            None,
        )
