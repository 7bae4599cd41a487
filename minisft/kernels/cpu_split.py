"""Products in fp32 with weights that are bf16 numbers, at twice the BLAS's speed on a CPU with AMX; by ``cpu_split.cpp``.

Checkpoints are published in bf16, and a model that computes in fp32 holds the same numbers: the lower 16 bits of each weight
are zero. With x = x_1 + x_2 + x_3 in bf16, which is all of an fp32 number,

    x W^T = x_1 W^T + x_2 W^T + x_3 W^T

are three products of bf16 that AMX sums in fp32. Frozen weights stay such numbers while adapters train. The call that
multiplies looks at every weight, so nothing is remembered and nothing can be out of date; where a weight is another number,
as after training or merging, the BLAS multiplies. ``matmul.py`` decides when this code is asked.

Ref: parts of an fp32 number in bf16: Henry, Tang, Heinecke 2019, arXiv:1904.06376, section II.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.kernels.workspace import borrowed

MIN_ROWS = 17  # below, and below so many multiply-adds, packing takes what the product wins
MIN_WORK = 2**23
UNIT = 32  # numbers in a row of a tile


class _Product(ctypes.Structure):
    """``Product`` in cpu_split.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "memory")),
        *((name, ctypes.c_int64) for name in ("rows", "inner", "columns")),
        ("transposed", ctypes.c_int32),
        ("threads", ctypes.c_int32),
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


def split_product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor | None:
    """x W^T, or x W, without a gradient.

    Args:
        x: (M, inner) fp32. Numbers below 2^-126, and parts of x that are, count as zero; infinities give NaN.
        weight: (columns, inner) where ``transposed``, else (inner, columns); fp32.
        transposed: whether the product is with W^T.

    Returns:
        (M, columns) fp32; None where the caller has to multiply: by a weight that is no bf16 number, and where ``can_split``
        refuses.
    """
    if not can_split(x, weight, transposed):
        return None
    library = cpu_nf4.library()
    assert library is not None
    library.split_product_bytes.restype = ctypes.c_int64
    sizes = (*x.shape, weight.shape[0 if transposed else 1], transposed, torch.get_num_threads())
    ask = _Product(None, weight.data_ptr(), None, None, *sizes)
    if not (num_bytes := library.split_product_bytes(ctypes.byref(ask))):
        return None
    x, y = x.contiguous(), x.new_empty(len(x), sizes[2])
    with borrowed((num_bytes,), torch.uint8, x.device) as memory:
        product = _Product(x.data_ptr(), weight.data_ptr(), y.data_ptr(), memory.data_ptr(), *sizes)
        return y if library.split_product(ctypes.byref(product)) else None
