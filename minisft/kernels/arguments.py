"""What the launchers are handed, and the checks that stand before every launch.

A kernel that is given a wrong size does not fail, it reads someone else's memory. So every launcher checks shape, dtype,
contiguity and device here, on the host, before it launches. No Triton is imported.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from minisft.nf4 import BLOCK_SIZES, NESTED_BLOCK_SIZE, QuantizedWeight, dynamic_map

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUP = 32  # weights in 16 bytes: the products read them together, with one scale
MATVEC_ROWS = 4  # rows of x that ``matvec`` takes
SMALL_ROWS = 128  # rows that ``matmul_small`` and ``matmul_backward`` take
MAX_ELEMENTS = 2**34  # word indices have 32 bits, and a word holds 8 elements


def scale_arguments(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The four pointers that ``decode.load_absmax`` takes: absmax, its 8-bit map, absmax2 and offset."""
    absmax_map = None if weight.absmax2 is None else dynamic_map(weight.absmax.device)
    return weight.absmax, absmax_map, weight.absmax2, weight.offset


def check_weight(weight: QuantizedWeight) -> int:
    """The number of elements of a well-formed weight.

    Raises:
        ValueError: a size, layout or address that the kernels cannot read.
        TypeError: a dtype of the wrong kind.
        RuntimeError: tensors that are not on one GPU.
    """
    n = math.prod(weight.shape)
    check_block_size(weight.block_size)
    if not 0 < n < MAX_ELEMENTS:
        raise ValueError(f"a quantized weight has 1 to {MAX_ELEMENTS - 1} elements, not {n}: shape {tuple(weight.shape)}")
    num_blocks = -(-n // weight.block_size)
    given = [tensor for tensor in (weight.absmax2, weight.offset) if tensor is not None]
    if len(given) == 1:
        raise ValueError("double quantization takes absmax2 and offset together, or none of them")
    check_vector("packed", weight.packed, torch.uint8, (n + 1) // 2)
    check_vector("absmax", weight.absmax, torch.uint8 if given else torch.float32, num_blocks)
    check_vector("levels", weight.levels, torch.float32, 16)
    for name, tensor, size in zip(("absmax2", "offset"), given, (-(-num_blocks // NESTED_BLOCK_SIZE), 1), strict=False):
        check_vector(name, tensor, torch.float32, size)
    if weight.packed.data_ptr() % 4:
        raise ValueError("packed starts at an address that is no multiple of 4 bytes: clone() it first")
    check_devices(weight.packed, weight.absmax, weight.levels, *given)
    return n


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is none of ``BLOCK_SIZES``: ``ValueError``."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    """Refuse a tensor that does not hold exactly ``size`` contiguous items of ``dtype``; it is never copied silently.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        dtype, size: what it must have.

    Raises:
        TypeError: another dtype.
        ValueError: another size, or strides.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} items, expected {size}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def check_float(name: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that the kernels do not read: ``TypeError``."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} is {dtype}, expected one of {', '.join(map(str, FLOATS))}")


def check_devices(*tensors: Tensor) -> None:
    """All on one GPU, or on the CPU under Triton's interpreter."""
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors of one launch lie on several devices: {', '.join(sorted(devices))}")
    if tensors[0].device.type != "cuda" and not interpreting():
        raise RuntimeError(f"a Triton kernel needs a GPU and got {devices.pop()} tensors: minisft.nf4 runs anywhere")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_product(name: str, rows: Tensor, weight: QuantizedWeight, axis: int, max_rows: int) -> Tensor:
    """Check both sides of a product.

    Args:
        name: of the rows, for messages.
        rows: (M, features along ``axis`` of the weight).
        weight: the matrix.
        axis: of the weight, 1 for ``x W^T`` and 0 for ``grad W``.
        max_rows: the largest M.

    Returns:
        ``rows``, contiguous: a non-contiguous one is copied, being small.

    Raises:
        ValueError: another shape, or a weight whose rows are not whole groups of 32.
        TypeError, RuntimeError: as ``check_weight``.
    """
    check_weight(weight)
    check_float(name, rows.dtype)
    check_devices(rows, weight.packed)
    if len(weight.shape) != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"a fused product needs a matrix with in_features divisible by {GROUP}, not {tuple(weight.shape)}")
    if rows.dim() != 2 or rows.shape[1] != weight.shape[axis] or not 1 <= rows.shape[0] <= max_rows:
        raise ValueError(f"{name} is {tuple(rows.shape)}, expected (1 to {max_rows}, {weight.shape[axis]})")
    return rows.contiguous()
