"""Matrix products: which code multiplies, and in which dtype.

Tensors keep their dtype in memory, and ``compute_dtype`` says in which dtype they are multiplied. A CPU without bfloat16
instructions multiplies bf16 matrices about eight times slower than fp32 ones, although converting the operands costs next to
nothing. Sums are then taken in fp32, so the result is never less exact.

``frozen_linear`` is the one place that decides who multiplies; its docstring is the table. Two things go past it: generation's
step of one token, where ``native.decoder`` takes whole models and multiplies in its own C++, and an adapter's own products in
backward, ``lora_fused``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minisft import nf4
from minisft.common.autograd import Context
from minisft.kernels import cpu_nf4
from minisft.kernels.arguments import FLOATS, GROUP, MATVEC_ROWS, SMALL_ROWS
from minisft.kernels.cpu_matmul import Update, add_update_, can_use_native, native_matmul
from minisft.kernels.cpu_split import can_split, split_product
from minisft.kernels.workspace import borrowed
from minisft.nf4 import QuantizedWeight

FrozenWeight = Tensor | QuantizedWeight


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16, AMX or Arm BF16)."""
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor`` takes part in a matrix product on its device."""
    dtype = tensor.dtype
    if not tensor.is_cpu or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype == torch.bfloat16 and _cpu_multiplies_bf16() else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` without asking PyTorch where that changes nothing: a layer does it some ten times a step."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# ---- with a frozen weight, on tensors without gradients --------------------------------------------------------------


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None, native: bool = True) -> Tensor:
    """y = x W^T + b without a gradient, by the first line of this table that fits.

    | device | rows of x | W | who multiplies |
    |---|---|---|---|
    | any, while compiled | any | 4 bits | one opaque operator of the graph, which comes back here |
    | GPU, not fp64 | 1 to 4 | 4 bits | Triton: ``kernels.matvec`` |
    | GPU, not fp64 | 5 to 128 | 4 bits | Triton: ``kernels.matmul_small``, backward ``kernels.matmul_backward`` (1 to 128) |
    | GPU, not fp64 | any | 4 bits | decoded by Triton into a reused buffer, then cuBLAS |
    | CPU, not fp64 | 1 to 32 | 4 bits | C++: ``kernels.cpu_matmul`` |
    | CPU, not fp64 | 1 to 8 | fp32, 2^16 numbers or more | the same |
    | CPU, not fp64 | 1 to 16 | bf16, 2^16 numbers or more | the same |
    | CPU with AMX, x in fp32 | 17 or more | fp32, bf16 numbers; 2^23 multiply-adds | C++: ``kernels.cpu_split`` |
    | the same | 96 or more | fp32; 2^23 multiply-adds | the same |
    | any | any | 4 bits | decoded into a reused buffer, then as a dense one in ``compute_dtype(x)`` |
    | any | any | dense | PyTorch in ``compute_dtype(x)`` |

    The Triton products and ``cpu_split`` need rows of W in whole groups of 32, the other C++ in groups of 16 and an x in fp32
    or W's dtype, or in any half precision beside 4 bits. No gradient mode changes the choice, so a layer gives one answer in
    training and after it.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), dense in the dtype of ``x`` or one that is converted to it, or quantized.
        bias: (out,) or None.
        native: whether the C++ may multiply by a dense weight.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    if isinstance(weight, QuantizedWeight):
        return _quantized_linear(x, weight, bias)
    if native and can_use_native(x, weight):
        return native_matmul(x, weight, bias)
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    if native and (split := _split_linear(x, weight, bias)) is not None:
        return split
    if dtype == x.dtype:
        return F.linear(x, weight.to(dtype), bias)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    y = rows @ weight.to(dtype).T if bias is None else torch.addmm(bias, rows, weight.to(dtype).T)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def frozen_linear_with_update(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    native: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + scaling * (x A^T) B^T without a gradient; one product is added onto the other (``addmm_``).

    A few rows on a CPU are one call of the C++, which costs as much as the update itself. Elsewhere the base's product is
    that of ``frozen_linear``. A zero update leaves every bit of it in place.

    Args:
        x: (..., in).
        weight: (out, in), dense or quantized.
        bias: (out,) or None.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: the factor.
        native: see ``frozen_linear``.

    Returns:
        y, (..., out) in the dtype of ``x``, and x A^T, (M, rank) in fp32 or ``compute_dtype(x)``, which backward needs.
    """
    dtype = compute_dtype(x)
    in_one_call = (native or isinstance(weight, QuantizedWeight)) and can_use_native(x, weight)
    if (in_one_call or dtype == torch.float32) and can_use_native(x, None, (lora_A, lora_B)):
        down = torch.empty(x.numel() // x.shape[-1], lora_A.shape[0], dtype=torch.float32)
        update = Update(lora_A, lora_B, scaling, down)
        if in_one_call:
            return native_matmul(x, weight, bias, update), down
        rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        y = add_update_(frozen_linear(rows, weight, bias, native), rows, update)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1]), down
    rows = as_dtype(x.reshape(-1, x.shape[-1]), dtype)  # (M, in)
    xa, up = rows @ as_dtype(lora_A, dtype).T, as_dtype(lora_B, dtype).T  # (M, rank), (rank, out)
    y = _add_to_linear(rows, weight, bias, xa, up, scaling, native)
    return as_dtype(y, x.dtype).view(*x.shape[:-1], y.shape[1]), xa


def _split_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    y = split_product(x, weight, True)
    return y if y is None or bias is None else y.add_(bias)


def _add_to_linear(
    rows: Tensor, weight: FrozenWeight, bias: Tensor | None, xa: Tensor, up: Tensor, scaling: float, native: bool
) -> Tensor:
    """rows W^T + b + scaling xa up: (M, in), (M, rank), (rank, out) -> (M, out)."""
    if isinstance(weight, QuantizedWeight) or (native and can_use_native(rows, weight)):
        return frozen_linear(rows, weight, bias, native).addmm_(xa, up, alpha=scaling)
    if native and (split := _split_linear(rows, weight, bias)) is not None:
        return split.addmm_(xa, up, alpha=scaling)
    # Bias first, as nn.Linear does it: a zero update then leaves every bit in place, whatever the order of the sums below.
    y = xa * scaling @ up if bias is None else torch.addmm(bias.to(rows.dtype), xa, up, alpha=scaling)
    return y.addmm_(rows, weight.to(rows.dtype).T)


def frozen_linear_t(grad: Tensor, weight: FrozenWeight, onto: Tensor | None = None) -> Tensor:
    """grad W, what backward needs, without a gradient; or, where it is given, ``onto`` += grad W, in place.

    Args:
        grad: (..., out); (M, out) in its compute dtype where it is added onto something.
        weight: (out, in), dense or quantized.
        onto: (M, in) in the dtype of ``grad``.

    Returns:
        (..., in) in the dtype of ``grad``; who multiplies is in the table of ``frozen_linear``.
    """
    if isinstance(weight, QuantizedWeight):
        return _quantized_linear_t(grad, weight, onto)
    dtype = compute_dtype(grad)
    rows, weight = as_dtype(grad.reshape(-1, grad.shape[-1]), dtype), as_dtype(weight, dtype)
    if onto is None:
        return as_dtype(times(rows, weight), grad.dtype).view(*grad.shape[:-1], weight.shape[1])
    return onto.addmm_(rows, weight) if split_product(rows, weight, False, onto) is None else onto


def times_transposed(rows: Tensor, weight: Tensor) -> Tensor:
    """x W^T without a gradient: (M, in), (out, in) -> (M, out), all in one dtype."""
    y = split_product(rows, weight, True)
    return rows @ weight.T if y is None else y


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """x W without a gradient: (M, out), (out, in) -> (M, in), all in one dtype."""
    y = split_product(rows, weight, False)
    return rows @ weight if y is None else y


# ---- a weight in 4 bits ----------------------------------------------------------------------------------------------


@contextmanager
def dense_weight(q: QuantizedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """W of ``q.shape`` in ``dtype``, until the block ends: the next weight may overwrite it. Cost: the largest so far, kept."""
    device = q.packed.device
    if dtype not in FLOATS or device.type not in ("cpu", "cuda") or (device.type == "cpu" and not cpu_nf4.can_decode(q)):
        yield nf4.dequantize(q, dtype)
        return
    with borrowed(q.shape, dtype, device) as buffer:
        yield _decode_into(q, dtype, buffer)


def _decode_into(q: QuantizedWeight, dtype: torch.dtype, out: Tensor) -> Tensor:
    if out.is_cuda:
        from minisft.kernels.dequantize import dequantize

        return dequantize(q, dtype, out)
    return cpu_nf4.dequantize(q, dtype, out)


def _quantized_linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.minisft.nf4_matmul(x, bias, *_fields_of(q))
    with torch.no_grad():  # autograd must not remember a weight that the next layer overwrites
        if x.is_cuda and x.dtype != torch.float64:
            y = triton_matmul(x, q)
            return y if bias is None else y + bias.to(y.dtype)
        if can_use_native(x, q):
            return native_matmul(x, q, bias)
        dtype = compute_dtype(x)
        with dense_weight(q, dtype) as dense:
            return frozen_linear(x, dense, bias)


def _quantized_linear_t(grad: Tensor, q: QuantizedWeight, onto: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        assert onto is None, "layers are not joined while they are compiled"
        return torch.ops.minisft.nf4_matmul_t(grad, *_fields_of(q))
    with torch.no_grad():
        if grad.is_cuda and grad.dtype != torch.float64:
            y = triton_matmul_t(grad, q)
            return y if onto is None else onto.add_(y)
        dtype = compute_dtype(grad)
        with dense_weight(q, dtype) as dense:
            return frozen_linear_t(grad, dense, onto)


def triton_matmul(x: Tensor, q: QuantizedWeight) -> Tensor:
    """x W^T by the Triton kernels; (..., in) to (..., out) in the dtype of ``x`` (fp32, bf16, fp16), any number of rows."""
    rows = x.reshape(-1, q.shape[1])
    if not 0 < len(rows) <= SMALL_ROWS or q.shape[1] % GROUP:
        with dense_weight(q, rows.dtype) as dense:
            y = rows @ dense.T
    elif len(rows) <= MATVEC_ROWS:
        from minisft.kernels.matvec import matvec

        y = matvec(rows, q)
    else:
        from minisft.kernels.matmul_small import matmul_small

        y = matmul_small(rows, q)
    return y.view(*x.shape[:-1], q.shape[0])


def triton_matmul_t(grad: Tensor, q: QuantizedWeight) -> Tensor:
    """grad W by the Triton kernels; (..., out) to (..., in) in the dtype of ``grad``, for any number of rows."""
    rows = grad.reshape(-1, q.shape[0])
    if not 0 < len(rows) <= SMALL_ROWS or q.shape[1] % GROUP:
        with dense_weight(q, rows.dtype) as dense:
            y = rows @ dense
    else:
        from minisft.kernels.matmul_backward import matmul_backward

        y = matmul_backward(rows, q)
    return y.view(*grad.shape[:-1], q.shape[1])


# ---- a weight that may train -----------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """y = x W^T + b through ``frozen_linear``; a frozen weight keeps no activation alive."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return frozen_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dtype = compute_dtype(grad)
        rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = frozen_linear_t(grad, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).to(dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b; a product that is ours has a first derivative, no second one, and no rule for ``torch.func``.

    Args:
        x: (..., in).
        weight: (out, in), same dtype as ``x``.
        bias: (out,) or None.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    if not torch.is_grad_enabled():
        return frozen_linear(x, weight, bias)
    is_native = can_use_native(x, weight) or can_split(x, weight, True)
    if compute_dtype(x) == x.dtype and not is_native:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(torch.nn.Linear):
    """``nn.Linear`` whose product runs through ``linear``."""

    def reset_parameters(self) -> None:
        """Draw the numbers; on the meta device there are none, and asking for them takes longer than making the layer."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


# ---- products in 4 bits as opaque operators, for torch.compile -------------------------------------------------------

_Fields = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int, list[int]]


def _fields_of(q: QuantizedWeight) -> _Fields:
    return q.packed, q.absmax, q.absmax2, q.offset, q.levels, q.block_size, list(q.shape)


@torch.library.custom_op("minisft::nf4_matmul", mutates_args=())
def _nf4_matmul_op(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    shape: Sequence[int],
) -> Tensor:
    q = QuantizedWeight(packed, absmax, absmax2, offset, levels, block_size, torch.Size(shape), x.dtype)
    return frozen_linear(x, q, bias)


@torch.library.custom_op("minisft::nf4_matmul_t", mutates_args=())
def _nf4_matmul_t_op(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    shape: Sequence[int],
) -> Tensor:
    q = QuantizedWeight(packed, absmax, absmax2, offset, levels, block_size, torch.Size(shape), grad.dtype)
    return frozen_linear_t(grad, q)


@_nf4_matmul_op.register_fake
def _(x: Tensor, bias: Tensor | None, *fields: *_Fields) -> Tensor:
    out_features, _ = fields[-1]
    return x.new_empty(*x.shape[:-1], out_features)


@_nf4_matmul_t_op.register_fake
def _(grad: Tensor, *fields: *_Fields) -> Tensor:
    _, in_features = fields[-1]
    return grad.new_empty(*grad.shape[:-1], in_features)
