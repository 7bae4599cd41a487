"""Floats to four bits: the largest magnitude of each block, then the nearest of 16 levels for each number.

A thread owns eight neighbouring inputs, whose codes are exactly one 32-bit word, so that packing is a sum inside the
thread. The nearest level is found without a search: the code is the number of midpoints below the value, 15 comparisons.
The kernel does not raise for a NaN or an infinity: their block gets a NaN for a scale, and the caller looks at the scales once.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisft import nf4
from minisft.kernels.arguments import MAX_ELEMENTS, check_block_size, check_devices, check_float, check_vector
from minisft.kernels.decode import word_shifts

ELEMENTS = 4096  # inputs a program: one block of the largest size, 128 of the smallest
MAX_RECIPROCAL = tl.constexpr(nf4.MAX_RECIPROCAL)


@triton.jit
def _quantize_kernel(
    weight_ptr, midpoints_ptr, order_ptr, packed_ptr, absmax_ptr, n,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """code = order[number of midpoints strictly below weight * (1 / absmax)], so that a tie takes the lower level.

    One program owns BLOCKS blocks. Grid: ceil(n / (BLOCKS * BLOCK_SIZE)). Tile: [BLOCKS, BLOCK_SIZE / 8 words, 8].
    Mask: inputs past the end count as zeros; words past the last whole one are stored byte by byte.
    The reciprocal is rounded to nearest, because the approximate one moves codes at midpoints.

    Bytes: n * itemsize read, n/2 + 4 * n / BLOCK_SIZE written. Limit: memory bandwidth; about 70 instructions a weight.
    """
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    left = n - start
    block = tl.arange(0, BLOCKS)
    word = block[:, None] * (BLOCK_SIZE // 8) + tl.arange(0, BLOCK_SIZE // 8)[None, :]
    element = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    value = tl.load(weight_ptr + start + element, mask=element < left, other=0.0).to(tl.float32)
    magnitude = tl.abs(value)
    absmax = tl.max(tl.max(magnitude, axis=2), axis=1)
    finite = tl.min(tl.min((magnitude < float("inf")).to(tl.int32), axis=2), axis=1)
    absmax = tl.where(finite == 1, absmax, float("nan"))
    tl.store(absmax_ptr + start // BLOCK_SIZE + block, absmax, mask=block * BLOCK_SIZE < left)

    reciprocal = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), absmax)
    scaled = value * tl.minimum(reciprocal, MAX_RECIPROCAL)[:, None, None]
    code = tl.zeros((BLOCKS, BLOCK_SIZE // 8, 8), tl.int32)
    for i in tl.static_range(15):
        code += (scaled > tl.load(midpoints_ptr + i)).to(tl.int32)
    code = tl.load(order_ptr + code).to(tl.int32)
    bits = tl.sum(code << word_shifts()[None, None, :], axis=2)  # disjoint bits: the sum is their union
    packed_ptr += start // 2
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    whole = left // 32 * 4
    tl.store(words_ptr + word, bits, mask=word < whole)
    if whole < BLOCKS * BLOCK_SIZE // 8:
        first_word, end = whole.to(tl.int32), ((left + 1) // 2).to(tl.int32)  # less than a tile is left: 32 bits do
        for byte in tl.static_range(4):
            place = word * 4 + byte
            tl.store(packed_ptr + place, (bits >> (8 * byte)).to(tl.uint8), mask=(word >= first_word) & (place < end))


def quantize(weight: Tensor, levels: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Packed codes and fp32 scales, bit for bit those of the reference ``minisft.nf4.quantize`` without double quantization.

    Args:
        weight: contiguous, float32, float16 or bfloat16, any shape; refused when not contiguous.
        levels: (16,) fp32 in any order, on the weight's device.
        block_size: 32 to 4096.

    Returns:
        (ceil(n/2),) uint8 and (ceil(n/block_size),) fp32. A block with a NaN or an infinity has a NaN for a scale.

    Raises:
        ValueError, TypeError, RuntimeError: sizes, dtypes or devices that the kernel cannot read.
    """
    n = weight.numel()
    check_block_size(block_size)
    check_float("weight", weight.dtype)
    check_vector("weight", weight, weight.dtype, n)
    check_vector("levels", levels, torch.float32, 16)
    check_devices(weight, levels)
    if not 0 < n < MAX_ELEMENTS:
        raise ValueError(f"a weight to quantize has 1 to {MAX_ELEMENTS - 1} elements, not {n}")
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=weight.device)
    ascending, order = levels.sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    with torch.cuda.device_of(weight):
        _quantize_kernel[(triton.cdiv(n, ELEMENTS),)](
            weight, midpoints, order.to(torch.uint8), packed, absmax, n,
            BLOCK_SIZE=block_size, BLOCKS=ELEMENTS // block_size, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax
