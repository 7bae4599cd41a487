"""RMSNorm, RoPE and SwiGLU, each as one autograd function that keeps only its inputs.

Written with plain operators, autograd would keep every intermediate (the squared input, the sigmoid, the rotated half)
until backward. Each of these is cheap to compute again, so only the inputs are kept, most of which are alive anyway. Where
no gradient is wanted the function is called by itself: generation makes hundreds of these calls a token. Large tensors in
fp32 or bf16 on a CPU go to ``kernels.cpu_elementwise``, which does in one pass over memory what the operators do in several.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.kernels import cpu_elementwise
from minisft.kernels.cpu_elementwise import can_use_native


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 at least; fp64 stays fp64 so that laws can be tested in it."""
    return torch.promote_types(dtype, torch.float32)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if weight.shape == x.shape[-1:] and can_use_native(x, weight):
        return cpu_elementwise.rms_norm(x, weight, eps)
    x_sum = x.to(_sum_dtype(x.dtype))
    rstd = torch.rsqrt(x_sum.square().mean(-1, keepdim=True) + eps)
    return weight * (x_sum * rstd).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and weight.shape == x.shape[-1:] and can_use_native(x, weight, grad):
            return cpu_elementwise.rms_norm_backward(grad, x, weight, rstd), None, None
        dtype = _sum_dtype(x.dtype)
        normed = x.to(dtype) * rstd
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.to(dtype) * normed).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # d(x r)/dx with r = (mean x^2 + eps)^-1/2:  r (g - n mean(g n)),  n = x r
            g = grad.to(dtype) * weight.to(dtype)
            mean = (g * normed).mean(-1, keepdim=True)
            grad_x = normed.mul_(mean).neg_().add_(g).mul_(rstd).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension; statistics in fp32, one rounding before the weight.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (..., D) in the dtype of ``x``.

    Ref: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, turn: float = 1.0) -> Tensor:
    if x.ndim == 3 and cos.shape == sin.shape == (len(x), 1, x.shape[2] // 2) and can_use_native(x, cos, sin):
        return cpu_elementwise.rotate(x, cos, sin, turn)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-turn)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=turn)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None  # the inverse of a rotation turns the other way


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair (x_i, x_{i + E/2}) by its position's angle.

    Args:
        x: (..., heads, E).
        cos, sin: (..., 1, E/2), same dtype as ``x``.

    Returns:
        (..., heads, E) in the dtype of ``x``.

    Ref: Su et al. 2021, arXiv:2104.09864, section 3.2.2, in Hugging Face's order of the pairs.
    """
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape == up.shape and can_use_native(gate, up):
        return cpu_elementwise.swiglu(gate, up)
    return torch.nn.functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if gate.shape == up.shape and can_use_native(gate, up, grad):
            return cpu_elementwise.swiglu_backward(grad, gate, up)
        grad_up = torch.nn.functional.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    Ref: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gelu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), _gelu(gate).mul_(grad)


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise, with gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Ref: Shazeer 2020, arXiv:2002.05202, eq. 6; the tanh form: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return _GeGLU.apply(gate, up) if torch.is_grad_enabled() else _gelu(gate).mul_(up)
