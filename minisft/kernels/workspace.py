"""Both products for any number of rows: the dense weight written once into a reused buffer, then the vendor's matmul.

With hundreds of rows a tile of weights would be decoded again for every row tile, and a tuned dense product is hard to beat:
decode once, multiply at full speed, and keep no dense weight. One buffer serves all layers, since kernels of one stream run
one after the other: the product has read the weight before the next layer's overwrites it. That is the idea to leave with.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minisft.nf4 import QuantizedWeight

_buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
_lock = threading.RLock()  # autograd runs backward in a thread of its own, on the same stream


@contextmanager
def borrowed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor that is valid until the block ends; the work launched inside may finish later.

    One flat buffer for each device, dtype and stream, which grows to the largest weight and is kept until ``release``.
    Nothing that outlives the block may refer to the tensor. Inside a CUDA graph's capture the buffer must already be large
    enough: run the largest layer once before.
    """
    size = math.prod(shape)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, dtype, stream)
    with _lock:
        if key not in _buffers or _buffers[key].numel() < size:
            _buffers.pop(key, None)  # the old one is freed before the new one is allocated
            _buffers[key] = torch.empty(size, dtype=dtype, device=device)
        yield _buffers[key][:size].view(shape)


def release() -> int:
    """Frees all buffers and returns how many bytes they held."""
    with _lock:
        freed = sum(buffer.numel() * buffer.element_size() for buffer in _buffers.values())
        _buffers.clear()
    return freed


def matmul_dense(x_MI: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x W^T``: (M, in_features) to (M, out_features), W rounded to x's dtype. Twin: ``nf4.dequantize`` and ``linear``."""
    from minisft.kernels.dequantize import dequantize

    with borrowed(weight.shape, x_MI.dtype, x_MI.device) as dense_OI:
        return x_MI @ dequantize(weight, x_MI.dtype, out=dense_OI).T


def matmul_backward_dense(grad_MO: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad W``: (M, out_features) to (M, in_features), W rounded to the dtype of ``grad_MO``. Twin: the same in PyTorch."""
    from minisft.kernels.dequantize import dequantize

    with borrowed(weight.shape, grad_MO.dtype, grad_MO.device) as dense_OI:
        return grad_MO @ dequantize(weight, grad_MO.dtype, out=dense_OI)
