"""y = x W^T for up to 128 rows of x, straight from the 4-bit bytes, on the tensor cores.

With few rows, writing the dense weight to memory and reading it back costs more than the product itself. Here each tile of
the weight is decoded into registers and multiplied at once. One byte holds an even and an odd column, so the product is
taken as two: x at even columns with the first codes, x at odd columns with the second. The weight is then never interleaved;
only x, which is small, is taken apart. That is the idea to leave with.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisft.kernels.arguments import SMALL_ROWS, check_product, scale_arguments
from minisft.kernels.decode import decode_tile, load_groups
from minisft.kernels.split_k import product_buffer, sum_partials
from minisft.kernels.tuning import Config, fastest
from minisft.nf4 import QuantizedWeight

CONFIGS = (
    Config(columns=64, inner=128, parts=1),
    Config(columns=64, inner=128, parts=4),
    Config(columns=64, inner=128, parts=8),
    Config(columns=128, inner=64, parts=4, num_stages=4),
)
FP32_CONFIGS = (Config(columns=32, inner=64, parts=4),)  # full fp32 has no tensor cores here: a tile that fits the registers


@triton.jit
def _matmul_small_kernel(
    x_ptr, packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr,
    num_rows, num_columns, num_groups,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[part, m, o] = sum over this part's k of x[m, k] W[o, k], W rounded to x's dtype as ``dequantize`` rounds it.

    One program owns ROWS x COLUMNS outputs and each PARTS-th tile of the inner dimension.
    Grid: (ceil(num_columns / COLUMNS), ceil(num_rows / ROWS), PARTS). Tile: x [ROWS, 32 * GROUPS] against
    W [COLUMNS, 32 * GROUPS]. Mask: rows, columns and groups past the end; a masked group has scale 0.

    Bytes: 0.516 a weight (nested, blocks of 64), once for every ROWS rows. Limit: the weight's bytes up to 16 rows or so, then
    the decoding, which the programs of several row tiles repeat.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * GROUPS, num_groups, PARTS * GROUPS):
        group = start + tl.arange(0, GROUPS)
        k = start * 32 + tl.arange(0, GROUPS * 32)
        x_mask = (row[:, None] < num_rows) & (k[None, :] < num_groups * 32)
        x = tl.load(x_ptr + row[:, None] * (num_groups * 32) + k[None, :], mask=x_mask, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (ROWS, GROUPS * 16, 2)))
        inside = (column[:, None] < num_columns) & (group[None, :] < num_groups)
        pair, absmax = load_groups(
            packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, column[:, None], group, inside,
            num_groups, BLOCK_SIZE,
        )  # fmt: skip
        even, odd = decode_tile(pair, absmax, levels, COLUMNS, GROUPS * 16, x.dtype)
        total = tl.dot(x_even, tl.trans(even), total, input_precision="ieee")
        total = tl.dot(x_odd, tl.trans(odd), total, input_precision="ieee")
    place = (part * num_rows + row[:, None]) * num_columns + column[None, :]
    mask = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def matmul_small(x_MI: Tensor, weight: QuantizedWeight, config: Config | None = None) -> Tensor:
    """``x W^T`` with fp32 sums, rounded once to the dtype of x.

    Args:
        x_MI: (1 to 128, in_features) float32 (multiplied in full fp32), float16 or bfloat16; a non-contiguous one is copied.
        weight: shape (out_features, in_features), in_features divisible by 32.
        config: a fixed configuration; None measures ``CONFIGS`` once for each shape.

    Returns:
        (M, out_features) in the dtype of x. Reference: ``torch.nn.functional.linear`` over ``nf4.dequantize`` in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: see ``check_product``.
    """
    x = check_product("x", x_MI, weight, 1, SMALL_ROWS)
    row_tile = tile_rows(len(x), x.dtype)
    key = ("matmul_small", x.device, x.dtype, row_tile, len(x) > row_tile, weight.shape, weight.block_size)

    def launch(config: Config) -> Tensor:
        return _launch(x, weight, row_tile, config)

    configs = FP32_CONFIGS if x.dtype == torch.float32 else CONFIGS
    with torch.cuda.device_of(x):
        return launch(config or fastest(key, configs, launch))


def tile_rows(num_rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile: 16, the least that a tensor core multiplies, 32 or 64; in fp32 always 16, to fit the registers."""
    return 16 if dtype == torch.float32 else min(64, max(16, triton.next_power_of_2(num_rows)))


def _launch(x: Tensor, weight: QuantizedWeight, row_tile: int, config: Config) -> Tensor:
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    sums = product_buffer(num_rows, out_features, config.parts, x)
    grid = (triton.cdiv(out_features, config.columns), triton.cdiv(num_rows, row_tile), config.parts)
    _matmul_small_kernel[grid](
        x, weight.packed, *scale_arguments(weight), weight.levels, sums, num_rows, out_features, in_features // 32,
        BLOCK_SIZE=weight.block_size, ROWS=row_tile, COLUMNS=config.columns, GROUPS=config.inner // 32, PARTS=config.parts,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return sum_partials(sums, x.dtype)
