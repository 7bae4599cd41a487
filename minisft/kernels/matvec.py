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

from minisft.kernels.arguments import PackedWeight, check_devices, check_product
from minisft.kernels.decode import load_groups
from minisft.kernels.split_k import product_buffer, sum_partials
from minisft.kernels.tuning import Config, fastest

MOST_ROWS = 4
CONFIGS = (
    Config(columns=8, inner=1024, parts=1),
    Config(columns=4, inner=1024, parts=1),
    Config(columns=8, inner=1024, parts=4),
    Config(columns=8, inner=2048, parts=2, num_warps=8),
)


@triton.jit
def _matvec_kernel(
    x_ptr, packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr,
    xa_ptr, lora_B_ptr, scaling, num_rows, num_columns, num_groups, rank,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[part, m, o] = sum over this part's k of x[m, k] W[o, k]; part 0 also adds scaling * sum_r xa[m, r] B[o, r].

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
    if lora_B_ptr is not None:  # noqa: SIM102  (settled by the compiler; the inner condition by each program)
        if part == 0:
            y += scaling * _lora(xa_ptr, lora_B_ptr, row, column, num_rows, num_columns, rank, RANK)
    place = (part * num_rows + row[:, None]) * num_columns + column[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _lora(xa_ptr, lora_B_ptr, row, column, num_rows, num_columns, rank, RANK: tl.constexpr):
    """sum_r xa[m, r] lora_B[o, r] in fp32, (ROWS, COLUMNS): 2 * rank more bytes a column, 1.6 % at rank 16 and 4096 inputs."""
    r = tl.arange(0, RANK)
    xa_mask = (row[:, None] < num_rows) & (r[None, :] < rank)
    xa = tl.load(xa_ptr + row[:, None] * rank + r[None, :], mask=xa_mask, other=0.0).to(tl.float32)
    b_mask = (column[:, None] < num_columns) & (r[None, :] < rank)
    b = tl.load(lora_B_ptr + column[:, None] * rank + r[None, :], mask=b_mask, other=0.0).to(tl.float32)
    return tl.sum(xa[:, None, :] * b[None, :, :], axis=2)


def matvec(
    x_MI: Tensor,
    weight: PackedWeight,
    lora: tuple[Tensor, Tensor, float] | None = None,
    config: Config | None = None,
) -> Tensor:
    """``x W^T``, or ``x W^T + scaling * xa lora_B^T``, summed in fp32 and rounded once to the dtype of x.

    Args:
        x_MI: (1 to 4, in_features) float32, float16 or bfloat16; a non-contiguous one is copied.
        weight: shape (out_features, in_features), in_features divisible by 32.
        lora: ``xa`` (M, rank) = x lora_A^T, ``lora_B`` (out_features, rank) and ``scaling``; both of x's dtype or fp32.
        config: a fixed configuration; None measures ``CONFIGS`` once for each shape.

    Returns: (M, out_features) in the dtype of x. Twin: ``torch.nn.functional.linear`` over ``nf4.dequantize`` in fp32.
    Raises: ValueError, TypeError or RuntimeError, see ``check_product``.
    """
    x = check_product("x", x_MI, weight, 1, MOST_ROWS)
    xa, lora_B, scaling = _checked_lora(x, weight, lora)
    key = ("matvec", x.device, x.dtype, len(x), weight.shape, weight.block_size, lora is not None)

    def launch(config: Config) -> Tensor:
        return _launch(x, weight, xa, lora_B, scaling, config)

    with torch.cuda.device_of(x):
        return launch(config or fastest(key, CONFIGS, launch))


def _checked_lora(
    x: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor | None, Tensor | None, float]:
    if lora is None:
        return None, None, 0.0
    xa, lora_B, scaling = lora
    rank = xa.shape[-1]
    if tuple(xa.shape) != (len(x), rank) or tuple(lora_B.shape) != (weight.shape[0], rank):
        raise ValueError(
            f"xa is {tuple(xa.shape)} and lora_B {tuple(lora_B.shape)}, expected ({len(x)}, rank) and ({weight.shape[0]}, rank)"
        )
    check_devices(x, xa, lora_B)
    return xa.contiguous(), lora_B.contiguous(), scaling


def _launch(
    x: Tensor, weight: PackedWeight, xa: Tensor | None, lora_B: Tensor | None, scaling: float, config: Config
) -> Tensor:
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    rank = 0 if xa is None else xa.shape[1]
    sums = product_buffer(num_rows, out_features, config.parts, x)
    _matvec_kernel[triton.cdiv(out_features, config.columns), config.parts](
        x, weight.packed, *weight.scale_arguments(), weight.levels, sums,
        xa, lora_B, scaling, num_rows, out_features, in_features // 32, rank,
        BLOCK_SIZE=weight.block_size, ROWS=triton.next_power_of_2(num_rows), COLUMNS=config.columns,
        GROUPS=config.inner // 32, PARTS=config.parts, RANK=triton.next_power_of_2(max(rank, 1)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sum_partials(sums, x.dtype)
