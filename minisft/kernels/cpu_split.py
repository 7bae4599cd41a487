"""Products of many rows in fp32 on a CPU with AMX, sooner than by the BLAS and as exact; by ``cpu_split.cpp``.

AMX multiplies bf16 alone, about ten times as fast as vectors multiply fp32. An fp32 number is a sum of three numbers of bf16,
x = x_1 + x_2 + x_3 and W = W_1 + W_2 + W_3, each about 2^-8 of the one before, so

    x W^T = sum over i + j <= 4 of x_i W_j^T, but for a part below 2^-22 |x| |W|^T

is six products of bf16, which are summed in fp32. Weights of fewer bits take fewer: three if they are bf16 numbers, as those
of a checkpoint in bf16 are (W_2 = W_3 = 0), five if they have 16 bits, as numbers of fp16 and of SmolLM2's file of 4 bits.
Frozen weights stay such numbers while adapters train. The call that multiplies looks at every weight, so nothing is
remembered and nothing can be out of date. ``matmul.py`` decides when this code is asked.

Ref: products of fp32 by parts in bf16: Henry, Tang, Heinecke 2019, arXiv:1904.06376, sections II and III.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.kernels.workspace import memory

MIN_ROWS = 17  # below, and below so many multiply-adds, packing takes what the product wins
MIN_SPLIT_ROWS = 96  # the same for weights that are no bf16 numbers
MIN_WORK = 2**23
UNIT = 32  # numbers in a row of a tile


class _Product(ctypes.Structure):
    """``Product`` in cpu_split.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "memory")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "columns")),
        *((name, ctypes.c_int32) for name in ("transposed", "onto", "threads")),
    )


def can_split(x: Tensor, weight: Tensor, transposed: bool) -> bool:
    """Whether ``split_product`` tries; only the weight's numbers are not looked at.

    Args:
        x: (..., inner).
        weight: (columns, inner) where ``transposed``, else (inner, columns).
        transposed: whether the product is with W^T.

    Returns:
        whether x and the weight are plain fp32 on a CPU with AMX, fit each other and are large enough, the weight's sizes
        multiples of 32.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_cpu or weight.ndim != 2:
        return False
    columns, inner = weight.shape if transposed else weight.shape[::-1]
    if x.shape[-1:] != (inner,) or not x.numel() or any(size % UNIT for size in weight.shape):
        return False
    if x.numel() < MIN_ROWS * inner or x.numel() * columns < MIN_WORK or type(x) not in cpu_nf4.TENSORS:
        return False
    plain = cpu_nf4.has_numbers(weight) and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return plain and cpu_nf4.tile_floats() > 0


def split_product(x: Tensor, weight: Tensor, transposed: bool, onto: Tensor | None = None) -> Tensor | None:
    """x W^T, or x W, without a gradient.

    Args:
        x: (..., inner) fp32. Numbers below 2^-126 count as zero: parts of x and W, products, sums. Infinities give NaN.
        weight: (columns, inner) where ``transposed``, else (inner, columns); fp32. What rounds to 2^128 in bf16 gives NaN.
        transposed: whether the product is with W^T.
        onto: (..., columns) fp32 without gaps, to which the product is added in place; or None.

    Returns:
        (..., columns) fp32, ``onto`` where it is given; None where the caller has to multiply: fewer than 96 rows by weights of
        which the first ones of rows are no bf16 numbers, and where ``can_split`` refuses.
    """
    if not can_split(x, weight, transposed):
        return None
    library = cpu_nf4.library()
    assert library is not None
    library.split_product_bytes.restype = ctypes.c_int64
    *outer, inner = x.shape
    shape = (*outer, weight.shape[0 if transposed else 1])
    sizes = (x.numel() // inner, inner, shape[-1], transposed, onto is not None, torch.get_num_threads())
    product = _Product(None, weight.data_ptr(), None, None, *sizes)
    if not (num_bytes := library.split_product_bytes(ctypes.byref(product), ctypes.c_int64(MIN_SPLIT_ROWS))):
        return None
    x, y = x.contiguous(), x.new_empty(shape) if onto is None else onto
    assert cpu_nf4.has_numbers(y), y.stride()
    assert (y.dtype, *y.shape) == (x.dtype, *shape), (y.dtype, y.shape)
    product.x, product.y, product.memory = x.data_ptr(), y.data_ptr(), memory(num_bytes, torch.uint8).data_ptr()
    library.split_product(ctypes.byref(product))
    return y
