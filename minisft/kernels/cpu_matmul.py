"""Products of a few rows on a CPU, by ``cpu_nf4.cpp``: the weight is read as it is stored, an adapter added in the same call.

A product of a few rows is limited by reading the weight, and 4 bits are an eighth of fp32, so reading them directly is faster
than any dense product. Everything is multiplied and summed in fp32 and rounded once, to the dtype of x. ``matmul.py`` decides
when this code runs, by ``can_use_native``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.nf4 import QuantizedWeight

MAX_ROWS = 32  # of a 4-bit weight; at 48, decoding it once and the dense product are as fast (``benchmarks/LOG.md``)
MAX_UPDATE_ROWS = 16  # of an update, alone or added to a product; above, the BLAS has it
# Of an fp32 weight, more rows are as fast in the BLAS; half the bytes win for longer (measured: ``benchmarks/LOG.md``).
MAX_DENSE_ROWS = {torch.float32: 8, torch.bfloat16: 16}
MIN_DENSE_SIZE = 2**16  # weights: a smaller layer pays more for the call than it wins
COLUMNS = 16  # a row of weights is read in groups of 16
_Function = Callable[..., object]  # one of the library's


class Update(NamedTuple):
    """What an adapter adds to a product of a few rows: scaling * (x A^T) B^T.

    Args:
        lora_A: (rank, in) fp32.
        lora_B: (out, rank) fp32.
        scaling: the factor.
        down: (M, rank), fp32; holds x A^T afterwards.
    """

    lora_A: Tensor  # noqa: N815  # the names that everybody gives them
    lora_B: Tensor  # noqa: N815
    scaling: float
    down: Tensor


class _Product(ctypes.Structure):
    """``Product`` in cpu_nf4.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y", "weight", "A", "B", "down", "fp32", "halves")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "rank")),
        ("scaling", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def can_use_native(
    x: Tensor, weight: Tensor | QuantizedWeight | None = None, factors: tuple[Tensor, Tensor] | None = None
) -> bool:
    """Whether the C++ multiplies these rows, and is the fastest way to do it; decided by shapes, dtypes and layout alone.

    Args:
        x: (..., in).
        weight: (out, in), dense or quantized; None asks for the update alone.
        factors: lora_A (rank, in) and lora_B (out, rank) of an update to add; None for no update.

    Returns:
        whether ``native_matmul`` takes x with the weight and the update, or ``add_update_`` the update alone.
    """
    matrix = weight if weight is not None or factors is None else factors[0]
    in_features = 0 if matrix is None else matrix.shape[1]
    if in_features < 1 or in_features % COLUMNS or x.shape[-1:] != (in_features,) or x.dtype not in cpu_nf4.FLOATS:
        return False
    num_rows = x.numel() // in_features
    most = MAX_UPDATE_ROWS if weight is None else MAX_ROWS
    if not 0 < num_rows <= most or not x.is_cpu or type(x) not in cpu_nf4.TENSORS or torch.compiler.is_compiling():
        return False
    if cpu_nf4.library() is None or (factors is not None and not _are_plain(*factors)):
        return False
    if isinstance(weight, QuantizedWeight):
        return cpu_nf4.is_plain(weight)
    return weight is None or _is_fast_dense(x.dtype, num_rows, weight)


def _is_fast_dense(dtype: torch.dtype, num_rows: int, weight: Tensor) -> bool:
    most = MAX_DENSE_ROWS.get(weight.dtype, 0)
    large = weight.numel() >= MIN_DENSE_SIZE
    return num_rows <= most and large and cpu_nf4.has_numbers(weight) and dtype in (torch.float32, weight.dtype)


def _are_plain(lora_A: Tensor, lora_B: Tensor) -> bool:
    plain = cpu_nf4.has_numbers(lora_A) and cpu_nf4.has_numbers(lora_B)
    return plain and lora_A.dtype == lora_B.dtype == torch.float32 and lora_B.shape[1] == lora_A.shape[0]


def native_matmul(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None, update: Update | None = None
) -> Tensor:
    """x W^T + b + scaling * (x A^T) B^T, for what ``can_use_native`` accepts: fp32 weights and sums, one rounding.

    Args:
        x: (..., in), fp32, bf16 or fp16.
        weight: (out, in); quantized, or dense in fp32 or bf16.
        bias: (out,) or None.
        update: the adapter, whose ``down`` is filled; or None.

    Returns:
        (..., out) in the dtype of ``x``, without a gradient.
    """
    library = cpu_nf4.library()
    assert library is not None, "ask can_use_native first"
    if isinstance(weight, QuantizedWeight):
        pointers = cpu_nf4.pointers_to(weight)  # alive until the call has returned
        return _matmul(library.nf4_matmul, ctypes.addressof(pointers), x, weight.shape[0], bias, update)
    function = library.fp32_matmul if weight.dtype == torch.float32 else library.bf16_matmul
    return _matmul(function, weight.data_ptr(), x, weight.shape[0], bias, update)


def add_update_(y: Tensor, rows: Tensor, update: Update) -> Tensor:
    """y += scaling * (x A^T) B^T in one call without a gradient.

    Args:
        y: (M, out) fp32, contiguous; changed in place.
        rows: x, (M, in) fp32, contiguous.
        update: the adapter, with factors that ``can_use_native`` accepts.

    Returns:
        ``y``.
    """
    library = cpu_nf4.library()
    assert library is not None, "ask can_use_native first"
    _call(library.lora_update, None, rows, y, None, update)
    return y


def _matmul(
    function: _Function, weight: int, x: Tensor, out_features: int, bias: Tensor | None, update: Update | None
) -> Tensor:
    bias = None if bias is None else _plain_fp32(bias)
    if x.dtype == torch.bfloat16 and x.is_contiguous():
        y = torch.empty((*x.shape[:-1], out_features), dtype=torch.bfloat16)
        _call(function, weight, x, y, bias, update, torch.empty(2 * x.numel() + y.numel(), dtype=torch.float32))
        return y
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    _call(function, weight, _plain_fp32(x), y, bias, update, torch.empty(x.numel(), dtype=torch.float32))
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _plain_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().to(torch.float32).contiguous()


def _call(
    function: _Function,
    weight: int | None,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    update: Update | None,
    memory: Tensor | None = None,
) -> None:
    """At one token this takes as long as a small product: nothing here is asked twice. The caller keeps ``weight`` alive.

    ``memory`` is fp32: as many numbers as x has, for its other layout, then for bf16 those of x and y.
    """
    in_features = x.shape[-1]
    A = B = down = None
    rank, scaling = 0, 0.0
    if update is not None:
        A, B, down = update.lora_A.data_ptr(), update.lora_B.data_ptr(), update.down.data_ptr()
        rank, scaling = update.lora_A.shape[0], update.scaling
    halves = None if memory is None else memory.data_ptr()
    fp32 = halves + 4 * x.numel() if halves is not None and x.dtype == torch.bfloat16 else None
    bias_ptr = None if bias is None else bias.data_ptr()
    pointers = (x.data_ptr(), bias_ptr, y.data_ptr(), weight, A, B, down, fp32, halves)
    sizes = (x.numel() // in_features, in_features, y.shape[-1], rank)
    function(ctypes.byref(_Product(*pointers, *sizes, scaling, torch.get_num_threads())))
