"""Matrix products in the dtype that the machine multiplies fast.

A CPU without bfloat16 instructions multiplies bf16 matrices about eight times slower than fp32 ones, although widening
the operands costs next to nothing. So storage and arithmetic are told apart: tensors keep their dtype in memory, and
``product_dtype`` says in which dtype they are multiplied. Sums are then taken in fp32, so the result is never less exact.
A product of a few rows is bound by reading the weight, so there the weight is read as it is stored, by our own code.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.kernels.cpu_nf4 import dense_matmul, serves_dense


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16, AMX or Arm BF16)."""
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor`` takes part in a matrix product on its device."""
    dtype = tensor.dtype
    if not tensor.is_cpu or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype == torch.bfloat16 and _cpu_multiplies_bf16() else torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient: (..., in) -> (..., out) in the dtype of ``x``. How it is done depends on no grad mode."""
    if serves_dense(x, weight):
        return dense_matmul(x, weight, bias)
    wide = product_dtype(x)
    if wide == x.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).to(wide)
    y = rows @ weight.to(wide).T if bias is None else torch.addmm(bias.to(wide), rows, weight.to(wide).T)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """y = x W^T + b through ``product``; a frozen weight keeps no activation alive."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = product_dtype(grad)
        rows = grad.reshape(-1, grad.shape[-1]).to(wide)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(wide)).to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).to(wide)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b.

    Args:
        x: (..., in).
        weight: (out, in), same dtype as ``x``.
        bias: (out,) or None.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    if product_dtype(x) == x.dtype and not serves_dense(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(torch.nn.Linear):
    """``nn.Linear`` whose product runs through ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
