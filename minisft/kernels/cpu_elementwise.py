"""Norms, SwiGLU and RoPE on a CPU, by ``cpu_elementwise.cpp``: one pass over memory each.

All of it is in fp32 or bf16 and without gradients. ``elementwise.py`` holds the same in PyTorch and asks ``can_use_native`` who
computes. bf16 is computed with in fp32 and rounded where PyTorch's operators round.
Sums are added in another order and e^x comes from another series, so bits may differ.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4

MIN_NUMBERS = 2**13  # of a tensor; for fewer, asking takes longer than PyTorch's SwiGLU

# The parameters of each function: pointers, sizes, a float, the number of threads.
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_PARAMETERS = {
    "rms_norm": "ppppnnft",
    "rms_norm_backward": "pppppnnt",
    "swiglu": "pppnt",
    "swiglu_backward": "pppppnt",
    "rotate": "ppppnnnft",
}


def can_use_native(first: Tensor, *others: Tensor) -> bool:
    """Whether the C++ takes these tensors; decided by their dtypes, layout and size alone.

    Args:
        first: the largest; a small one is not worth the call.
        others: what else it reads.

    Returns:
        whether all are fp32, or all bf16, on the CPU and without gaps.
    """
    if first.numel() < MIN_NUMBERS or not first.is_cpu or torch.compiler.is_compiling():
        return False
    plain = all(t.dtype == first.dtype and cpu_nf4.has_numbers(t) for t in (first, *others))
    return plain and first.dtype in _DTYPES and cpu_nf4.library() is not None


def _call(name: str, first: Tensor, *others: Tensor | int | float) -> None:
    library = cpu_nf4.library()
    assert library is not None, "ask can_use_native first"
    function = getattr(library, f"{name}_{_DTYPES[first.dtype]}")
    if function.argtypes is None:
        function.argtypes = [_TYPES[letter] for letter in _PARAMETERS[name]]
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in (first, *others)), torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = weight * (x rstd) with rstd = 1 / sqrt(mean(x^2) + eps).

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        y, (..., D), and rstd, (..., 1) in fp32.
    """
    y, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _call("rms_norm", x, weight, y, rstd, rstd.numel(), weight.numel(), eps)
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """grad_x = rstd (g - n mean(g n)) with g = grad weight and n = x rstd.

    Args:
        grad, x: (..., D).
        weight: (D,).
        rstd: (..., 1), of ``rms_norm``.

    Returns:
        (..., D).
    """
    grad_x = torch.empty_like(x)
    _call("rms_norm_backward", grad, x, weight, rstd, grad_x, rstd.numel(), weight.numel())
    return grad_x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of tensors of one shape."""
    y = torch.empty_like(gate)
    _call("swiglu", gate, up, y, gate.numel())
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``swiglu`` for gate and up: grad up silu'(gate), and grad silu(gate).

    Args:
        grad, gate, up: of one shape.

    Returns:
        Two tensors of that shape.
    """
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    _call("swiglu_backward", grad, gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, turn: float) -> Tensor:
    """RoPE: each pair (x_i, x_{i + E/2}) turned by its token's angle.

    Args:
        x: (N, heads, E).
        cos, sin: (N, 1, E/2).
        turn: 1, or -1 to turn the other way.

    Returns:
        (N, heads, E).
    """
    y = torch.empty_like(x)
    _call("rotate", x, cos, sin, y, *x.shape[:2], x.shape[2] // 2, turn)
    return y
