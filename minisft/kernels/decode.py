"""Device functions that every kernel shares: the scale of a block, the values of the codes, a tile of the weight.

These run inside a program, never from the host. A stored weight is ``levels[code] * absmax[block]``; with double quantization
``absmax[block]`` is itself stored in 8 bits and rebuilt here in two roundings, so that every kernel sees the same fp32 scale.

There are two ways to look a level up. A load from the table is an access to half a line of the L1 cache: right where nothing
else happens, in ``dequantize`` and ``matvec``. Inside a loop with matrix products the compiler takes such loads for tiles to
fetch ahead, and stages every single one through shared memory; there ``gather_levels`` keeps the table on chip instead.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from minisft import nf4

NESTED_BLOCK_SIZE = tl.constexpr(nf4.NESTED_BLOCK_SIZE)


@triton.jit
def load_absmax(block, mask, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr):
    """fp32 scales of the flat blocks ``block``; 0 where ``mask`` is false.

    Args:
        block, mask: indices, and whether each is inside.
        absmax_ptr, map_ptr, absmax2_ptr, offset_ptr: what ``arguments.scale_arguments`` gives.

    ``absmax_ptr`` holds fp32 scales, or, when ``map_ptr`` is given, 8-bit codes into the 256-entry map. The product
    ``map[code] * absmax2[block // 256]`` is rounded and then the sum with ``offset``: launch with ``enable_fp_fusion=False``,
    because one fused multiply-add would round only once. Reference: ``minisft.nf4.decode_absmax``.
    """
    stored = tl.load(absmax_ptr + block, mask=mask, other=0)
    if map_ptr is None:
        absmax = stored
    else:
        step = tl.load(absmax2_ptr + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        absmax = tl.where(mask, tl.load(map_ptr + stored.to(tl.int32)) * step + tl.load(offset_ptr), 0.0)
    return absmax


@triton.jit
def word_shifts():
    """Where element k = 0..7 sits in a little-endian int32 word, the first of two in the high nibble of their byte.

    4, 0, 12, 8, 20, 16, 28, 24.
    """
    k = tl.arange(0, 8)
    return (k // 2) * 8 + (1 - k % 2) * 4


@triton.jit
def load_groups(
    packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, row, group, inside,
    num_groups, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Bytes and scales of the groups of 32 weights at (``row``, ``group``) of a matrix with ``num_groups`` groups a row.

    Args:
        packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr: the weight.
        row, group, inside: which groups, and whether each is inside the matrix.
        num_groups: in a row.
        BLOCK_SIZE: numbers that share a scale.

    A group is 16 bytes and lies in one row and in one block, so that it needs one load of each. Returns int32 bytes
    (..., R, C, 16) and fp32 scales (..., R, C) for ``row`` (..., R, 1) and ``group`` (C,); outside ``inside`` the scale is 0.
    """
    flat = row.to(tl.int64) * num_groups + group
    place = tl.expand_dims(flat, -1) * 16 + tl.arange(0, 16)
    pair = tl.load(packed_ptr + place, mask=tl.expand_dims(inside, -1), other=0, eviction_policy="evict_first")
    absmax = load_absmax(flat * 32 // BLOCK_SIZE, inside, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr)
    return pair.to(tl.int32), absmax


@triton.jit
def gather_levels(levels, code):
    """levels[code] for (16,) ``levels`` and int32 ``code`` of any shape; ``tl.gather`` wants equal ranks, hence flattened."""
    return tl.reshape(tl.gather(levels, tl.ravel(code), 0), code.shape)


@triton.jit
def decode_tile(pair, absmax, levels, ROWS: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr):
    """The weights at even and at odd columns, (ROWS, PAIRS) each, rounded to ``dtype`` exactly as ``dequantize`` rounds.

    Args:
        pair, absmax: from ``load_groups``.
        levels: (16,) fp32.
        ROWS, PAIRS: of the tile.
        dtype: of the weights.
    """
    first = gather_levels(levels, pair >> 4) * absmax[:, :, None]
    second = gather_levels(levels, pair & 15) * absmax[:, :, None]
    return tl.reshape(first.to(dtype), (ROWS, PAIRS)), tl.reshape(second.to(dtype), (ROWS, PAIRS))
