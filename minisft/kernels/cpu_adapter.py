"""What backward of adapters needs beside G W, on a CPU, by ``cpu_adapter.cpp``: each G is read once, and x once for all layers.

``lora_fused.py`` holds the same as three products of PyTorch for each layer, and asks ``can_use_native`` who computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.kernels.workspace import memory

MIN_ROWS = 128  # below, and for other ranks, PyTorch's products are as fast
RANKS = (8, 16)


class _Layer(ctypes.Structure):
    """``Layer`` in cpu_adapter.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "lora_B", "low", "low_grad", "grad_A", "grad_B")),
        ("out", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


class _Gradients(ctypes.Structure):
    """``Gradients`` in cpu_adapter.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "x", "memory")),
        *((name, ctypes.c_int64) for name in ("num_layers", "rows", "in", "ranks")),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def can_use_native(x: Tensor, grads: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> bool:
    """Whether ``adapter_gradients`` takes these tensors; decided by dtypes, layout and sizes alone.

    Args:
        x: (M, in).
        grads: one (M, out) a layer.
        lora_Bs: one (out, rank) a layer.

    Returns:
        whether x and the gradients are all fp32, or all bf16, the factors are fp32, all of it lies on the CPU without gaps, and
        it is worth the call: 128 rows or more, ranks of 8 or 16, vectors of AVX2 or AVX-512.
    """
    if len(x) < MIN_ROWS or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    plain = all(cpu_nf4.has_numbers(t) and t.dtype == x.dtype for t in (x, *grads))
    plain = plain and all(cpu_nf4.has_numbers(B) and B.dtype == torch.float32 and B.shape[1] in RANKS for B in lora_Bs)
    return plain and cpu_nf4.library() is not None and cpu_nf4.instructions() != "portable"


def adapter_gradients(
    x: Tensor, grads: Sequence[Tensor], lora_Bs: Sequence[Tensor], lows: Sequence[Tensor], scalings: Sequence[float]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """For each layer with G = grad: H = s G B, grad_A = H^T x and grad_B = s G^T (x A^T); sums in fp32.

    Args:
        x: (M, in), what all layers read; asked about with ``can_use_native``, as are ``grads`` and ``lora_Bs``.
        grads: (M, out) of each layer.
        lora_Bs: (out, rank) of each.
        lows: (M, rank) of each: x A^T.
        scalings: s of each.

    Returns:
        H of all layers beside each other, (M, sum of ranks), and grad_A (rank, in) and grad_B (out, rank) of each; in fp32. The
        last bits depend on the number of threads.
    """
    library = cpu_nf4.library()
    assert library is not None, "ask can_use_native first"
    library.adapter_gradients_floats.restype = ctypes.c_int64
    rows, columns = x.shape
    ranks = sum(B.shape[1] for B in lora_Bs)
    H = x.new_empty(rows, ranks, dtype=torch.float32)
    at = H.data_ptr()
    found, layers = [], (_Layer * len(grads))()
    lows = [low.to(torch.float32).contiguous() for low in lows]
    for i, (grad, B, low, scaling) in enumerate(zip(grads, lora_Bs, lows, scalings, strict=True)):
        out, rank = B.shape
        assert (*grad.shape, *low.shape) == (rows, out, rows, rank), (grad.shape, low.shape, x.shape, B.shape)
        gradients = (H.new_empty(rank, columns), H.new_empty(out, rank))
        found.append(gradients)
        pointers = (*(t.data_ptr() for t in (grad, B, low)), at, *(t.data_ptr() for t in gradients))
        layers[i] = _Layer(*pointers, out, rank, scaling)
        at += rank * H.itemsize
    sizes = (len(found), rows, columns, ranks, x.dtype == torch.bfloat16, torch.get_num_threads())
    ask = _Gradients(ctypes.addressof(layers), x.data_ptr(), None, *sizes)
    ask.memory = memory(library.adapter_gradients_floats(ctypes.byref(ask)), torch.float32).data_ptr()
    library.adapter_gradients(ctypes.byref(ask))
    return H, found
