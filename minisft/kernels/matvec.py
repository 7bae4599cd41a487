"""y = x W^T for one to four rows of x, straight from the 4-bit bytes: what generating a token needs.

At one row every weight is used once, so the time is that of reading its 4 bits, and the arithmetic has to hide behind it.
The saving idea: 32 weights in 16 bytes share one scale, so they are multiplied with x as bare levels and summed, and the
scale enters once. Sums are fp32, nothing is rounded before the last step, so the result is closer to the exact product
than dequantizing first.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisft.kernels.arguments import MATVEC_ROWS, check_product, scale_arguments
from minisft.kernels.decode import load_groups
from minisft.kernels.split_k import product_buffer, sum_partials
from minisft.kernels.tuning import Config, fastest
from minisft.nf4 import QuantizedWeight

CONFIGS = (
    Config(columns=8, inner=1024, parts=1),
    Config(columns=4, inner=1024, parts=1),
    Config(columns=8, inner=1024, parts=4),
    Config(columns=8, inner=2048, parts=2, num_warps=8),
)


@triton.jit
def _matvec_kernel(
    x_ptr, packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr,
    num_rows, num_columns, num_groups,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[part, m, o] = sum over this part's k of x[m, k] W[o, k].

    One program owns COLUMNS outputs of every row, and each PARTS-th tile of the inner dimension.
    Grid: (ceil(num_columns / COLUMNS), PARTS). Tile: ROWS x COLUMNS x GROUPS groups of 16 bytes, 32 weights each; the fp32
    accumulator keeps one sum a group and is reduced once, after the loop. Mask: rows, columns and groups past the end.

    The order of the loads matters to the compiler: the layout of the last one, the table's, wins, so that the weights stay in
    the registers they were decoded into and only x, which is small, moves between threads.

    Bytes: 0.516 a weight (nested, blocks of 64), read once; x again for every program, from the L2 cache.
    Limit: memory bandwidth; then, for each weight, one table lookup and two floating-point instructions a row.
    """
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS, GROUPS), tl.float32)
    for start in range(part * GROUPS, num_groups, PARTS * GROUPS):
        group = start + tl.arange(0, GROUPS)
        k = start * 32 + tl.arange(0, GROUPS * 32)
        x_mask = (row[:, None] < num_rows) & (k[None, :] < num_groups * 32)
        x = tl.load(x_ptr + row[:, None] * (num_groups * 32) + k[None, :], mask=x_mask, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (ROWS, 1, GROUPS, 16, 2)))
        inside = (column[None, :, None] < num_columns) & (group < num_groups)
        pair, absmax = load_groups(
            packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, column[None, :, None], group, inside,
            num_groups, BLOCK_SIZE,
        )  # fmt: skip
        x_even, x_odd = x_even.to(tl.float32), x_odd.to(tl.float32)
        first = tl.load(levels_ptr + (pair >> 4))
        second = tl.load(levels_ptr + (pair & 15))
        both = tl.fma(first, x_even, second * x_odd)
        total = tl.fma(tl.sum(both, axis=3), absmax, total)
    y = tl.sum(total, axis=2)
    y_mask = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    place = (part * num_rows + row[:, None]) * num_columns + column[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=y_mask)


def matvec(x_MI: Tensor, weight: QuantizedWeight, config: Config | None = None) -> Tensor:
    """``x W^T``, summed in fp32 and rounded once to the dtype of x.

    Args:
        x_MI: (1 to 4, in_features) float32, float16 or bfloat16; a non-contiguous one is copied.
        weight: shape (out_features, in_features), in_features divisible by 32.
        config: a fixed configuration; None measures ``CONFIGS`` once for each shape.

    Returns:
        (M, out_features) in the dtype of x. Reference: ``torch.nn.functional.linear`` over ``nf4.dequantize`` in fp32.

    Raises:
        ValueError, TypeError, RuntimeError: see ``check_product``.
    """
    x = check_product("x", x_MI, weight, 1, MATVEC_ROWS)
    key = ("matvec", x.device, x.dtype, len(x), weight.shape, weight.block_size)

    def launch(config: Config) -> Tensor:
        return _launch(x, weight, config)

    with torch.cuda.device_of(x):
        return launch(config or fastest(key, CONFIGS, launch))


def _launch(x: Tensor, weight: QuantizedWeight, config: Config) -> Tensor:
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    sums = product_buffer(num_rows, out_features, config.parts, x)
    _matvec_kernel[triton.cdiv(out_features, config.columns), config.parts](
        x, weight.packed, *scale_arguments(weight), weight.levels, sums, num_rows, out_features, in_features // 32,
        BLOCK_SIZE=weight.block_size, ROWS=triton.next_power_of_2(num_rows), COLUMNS=config.columns,
        GROUPS=config.inner // 32, PARTS=config.parts, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_partials(sums, x.dtype)
