"""Cutting the sum of a product into pieces, and adding the pieces up.

With few rows a product has too few output tiles to fill a GPU. So several programs share one tile, each sums a part of the
inner dimension, and a second launch adds their fp32 partial sums in a fixed order: the same bits on every run, which
atomic additions would not give.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _sum_partials_kernel(partials_ptr, out_ptr, size, PARTS: tl.constexpr, TILE: tl.constexpr):
    """out[i] = round(partials[0, i] + partials[1, i] + ...), summed in fp32 from left to right.

    One program owns TILE outputs. Grid: ceil(size / TILE). Mask: outputs past the end.
    Bytes: 4 * PARTS * size read, mostly from the L2 cache, where they were just written. Limit: the launch.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.load(partials_ptr + place, mask=place < size, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partials_ptr + part * size + place, mask=place < size, other=0.0)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=place < size)


def product_buffer(rows: int, columns: int, parts: int, like: Tensor) -> Tensor:
    """Where a kernel puts its sums.

    Args:
        rows, columns: of the product.
        parts: how many programs share a sum.
        like: gives the device, and the dtype where there is one part.

    Returns:
        an uninitialised (parts, rows, columns), fp32 if there is more than one part.
    """
    return torch.empty((parts, rows, columns), dtype=torch.float32 if parts > 1 else like.dtype, device=like.device)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, M, N) to (M, N) in ``dtype``; a single part is already rounded. Reference: ``partials.sum(0).to(dtype)``."""
    parts, *shape = partials.shape
    if parts == 1:
        return partials[0]
    out = torch.empty(shape, dtype=dtype, device=partials.device)
    grid = (triton.cdiv(out.numel(), TILE),)
    _sum_partials_kernel[grid](partials, out, out.numel(), PARTS=parts, TILE=TILE, num_warps=4)
    return out
