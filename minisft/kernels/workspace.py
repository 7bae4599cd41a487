"""One reusable buffer for a weight made dense or packed: filled, multiplied with, and overwritten by the next layer.

A new tensor for each product would be new pages each time, which cost more than decoding. On a GPU one buffer is enough for all
layers, since kernels of one stream run one after the other: the product has read the weight before the next layer's overwrites
it. On a CPU each thread has its own, because autograd runs backward in another one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Buffers = dict[Hashable, Tensor]


class _OfThisThread(threading.local):
    def __init__(self) -> None:
        self.buffers: _Buffers = {}


_CPU = torch.device("cpu")
_on_gpus: _Buffers = {}
_on_cpu = _OfThisThread()
_lock = threading.RLock()  # two threads that fill one stream's buffer


@contextmanager
def borrowed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor that is valid until the block ends; work of a GPU that was launched inside may finish later.

    One flat buffer for each device, dtype and stream or thread, which grows to the largest weight and is kept until
    ``release``. Nothing that outlives the block may refer to the tensor, and blocks of one dtype may not be nested. Inside a
    CUDA graph's capture the buffer must already be large enough: run the largest layer once before.

    Args:
        shape, dtype, device: of the tensor.

    Yields:
        the tensor.
    """
    size = math.prod(shape)
    if device.type != "cuda":
        yield memory(size, dtype, device)[:size].view(shape)
        return
    with _lock:
        key = (device, dtype, torch.cuda.current_stream(device).cuda_stream)
        yield _grown(_on_gpus, key, size, dtype, device)[:size].view(shape)


def memory(size: int, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """This thread's buffer as it is, for who wants its address and nothing else, hundreds of times a step.

    Args:
        size: numbers, at least.
        dtype: of them.
        device: any but a GPU of CUDA.

    Returns:
        a flat tensor that is valid until somebody asks for one of this dtype again.
    """
    return _grown(_on_cpu.buffers, (device, dtype), size, dtype, device)


def _grown(buffers: _Buffers, key: Hashable, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if key not in buffers or buffers[key].numel() < size:
        buffers.pop(key, None)  # the old one is freed before the new one is allocated
        buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key]


def release() -> int:
    """Free the buffers of all GPUs and of this thread, and return how many bytes they took."""
    with _lock:
        freed = sum(buffer.nbytes for buffers in (_on_gpus, _on_cpu.buffers) for buffer in buffers.values())
        _on_gpus.clear()
        _on_cpu.buffers.clear()
    return freed
