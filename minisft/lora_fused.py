"""LoRA's forward and backward with one pass over y: the same numbers as the formula in ``lora.py``, sooner and in less memory.

Kept for backward: x (which its neighbours share) and x A^T (rank columns); never y, W, W^T or a cast copy of x. A quantized W
is decoded for each of the two products and dropped after it. Layers that read one x, as q, k and v do, have one backward,
which adds what each wants of x onto the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.kernels.cpu_adapter import adapter_gradients, can_use_native
from minisft.matmul import FrozenWeight, Linear, as_dtype, compute_dtype, frozen_linear_t, frozen_linear_with_update
from minisft.nf4_linear import NF4Linear


class Adapted(NamedTuple):
    """A frozen layer, dense or quantized, with A (rank, in), B (out, rank) and the factor of its update."""

    base: nn.Linear | NF4Linear
    A: Tensor
    B: Tensor
    scaling: float


def adapted_linears(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """y = x W^T + b + scaling * (x A^T) B^T of each layer, with gradients for x, A and B.

    Args:
        x: (..., in).
        layers: that read it, one or more.

    Returns:
        (..., out) of each, in the dtype of ``x``.
    """
    if torch.is_grad_enabled():
        frozen = [(layer.base, layer.scaling) for layer in layers]
        return _AdaptedLinears.apply(x, frozen, *(factor for layer in layers for factor in (layer.A, layer.B)))
    return tuple(_forward(x, layer)[0] for layer in layers)  # at one token, autograd's own work takes as long as the update


def _forward(x: Tensor, layer: Adapted) -> tuple[Tensor, Tensor]:
    """y, and x A^T. A plain ``nn.Linear`` multiplies as PyTorch does, so that a fresh adapter changes no bit of it."""
    base, A, B, scaling = layer
    native = isinstance(base, (Linear, NF4Linear))
    return frozen_linear_with_update(x, _weight(base), base.bias, A, B, scaling, native)


def _weight(base: nn.Linear | NF4Linear) -> FrozenWeight:
    return base.quantized if isinstance(base, NF4Linear) else base.weight


class _AdaptedContext(Context, Protocol):
    frozen: Sequence[tuple[nn.Linear | NF4Linear, float]]


class _AdaptedLinears(torch.autograd.Function):
    """With G = grad_y and H = s G B of a layer: grad_A = H^T x, grad_B = s G^T x A^T; grad_x is the sum of all G W + H A."""

    @staticmethod
    def forward(
        ctx: _AdaptedContext, x: Tensor, frozen: Sequence[tuple[nn.Linear | NF4Linear, float]], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        layers = [Adapted(base, A, B, s) for (base, s), A, B in zip(frozen, factors[::2], factors[1::2], strict=True)]
        ys, lows = zip(*(_forward(x, layer) for layer in layers), strict=True)
        ctx.save_for_backward(x, *factors, *lows)
        ctx.frozen = frozen
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: _AdaptedContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count, dtype, needed = len(grads), compute_dtype(grads[0]), ctx.needs_input_grad
        As, Bs, lows = saved[: 2 * count : 2], saved[1 : 2 * count : 2], saved[2 * count :]
        gs, rows = [_flat(grad) for grad in grads], _flat(x)  # (M, out), (M, in)
        of_factors: Sequence[tuple[Tensor | None, Tensor | None]]
        if all(needed[2:]) and can_use_native(rows, gs, Bs):
            H, of_factors = adapter_gradients(rows, gs, Bs, lows, [scaling for _, scaling in ctx.frozen])
            gs = [as_dtype(g, dtype) for g in gs]
        else:
            gs, rows = [as_dtype(g, dtype) for g in gs], as_dtype(rows, dtype)
            Hs = [g @ as_dtype(B, dtype) * s for g, B, (_, s) in zip(gs, Bs, ctx.frozen, strict=True)]
            layers = zip(gs, Hs, lows, ctx.frozen, needed[2::2], needed[3::2], strict=True)
            of_factors = [_of_factors(rows, g, H, low, s, *wanted) for g, H, low, (_, s), *wanted in layers]
            H = _joined(Hs, 1)
        grad_x = None
        if needed[0]:
            for g, (base, _) in zip(gs, ctx.frozen, strict=True):
                grad_x = frozen_linear_t(g, _weight(base), grad_x)
            assert grad_x is not None
            A = _joined(As, 0)  # (sum of ranks, in)
            grad_x = as_dtype(grad_x.addmm_(as_dtype(H, dtype), as_dtype(A, dtype)), x.dtype).view(x.shape)
        # The factors are fp32: their gradients are too, also where the products ran in bf16.
        each = zip([one for pair in of_factors for one in pair], saved, strict=False)
        return grad_x, None, *(None if one is None else as_dtype(one, factor.dtype) for one, factor in each)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _of_factors(
    rows: Tensor, g: Tensor, H: Tensor, low: Tensor, scaling: float, need_A: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """grad_A and grad_B of one layer."""
    grad_B = (as_dtype(low, g.dtype).T @ g).T * scaling if need_B else None  # in this order g is read along its rows
    return H.T @ rows if need_A else None, grad_B
