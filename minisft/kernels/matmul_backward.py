"""dX = G W for up to 128 rows of G, straight from the 4-bit bytes: the gradient that passes through a frozen weight.

The inner dimension is now the weight's rows, so a tile of bytes already lies the way the tensor cores want it. The even and
the odd columns of the result are two accumulators, which are woven together once, after the loop: the idea to leave with.
There is no gradient of W, because W is frozen.
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
from minisft.kernels.matmul_small import tile_rows
from minisft.kernels.split_k import product_buffer, sum_partials
from minisft.kernels.tuning import Config, fastest
from minisft.nf4 import QuantizedWeight

CONFIGS = (
    Config(columns=128, inner=64, parts=1),
    Config(columns=128, inner=64, parts=4),
    Config(columns=128, inner=64, parts=8),
    Config(columns=64, inner=128, parts=4, num_stages=2),
)
FP32_CONFIGS = (Config(columns=64, inner=32, parts=4),)  # full fp32 has no tensor cores here: a tile that fits the registers


@triton.jit
def _matmul_backward_kernel(
    grad_ptr, packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr,
    num_rows, num_inner, num_groups,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[part, m, k] = sum over this part's o of grad[m, o] W[o, k], W rounded to grad's dtype as ``dequantize`` rounds it.

    One program owns ROWS x (32 * GROUPS) outputs and each PARTS-th tile of the inner dimension, the weight's rows.
    Grid: (ceil(num_groups / GROUPS), ceil(num_rows / ROWS), PARTS). Tile: grad [ROWS, INNER] against
    W [INNER, 32 * GROUPS]. Mask: rows and groups past the end; a masked group has scale 0.

    Bytes: 0.516 a weight (nested, blocks of 64), once for every ROWS rows. Limit: as ``_matmul_small_kernel``.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    part = tl.program_id(2)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    even_total = tl.zeros((ROWS, GROUPS * 16), tl.float32)
    odd_total = tl.zeros((ROWS, GROUPS * 16), tl.float32)
    for start in range(part * INNER, num_inner, PARTS * INNER):
        inner = start + tl.arange(0, INNER)
        grad_mask = (row[:, None] < num_rows) & (inner[None, :] < num_inner)
        grad = tl.load(grad_ptr + row[:, None] * num_inner + inner[None, :], mask=grad_mask, other=0.0)
        inside = (inner[:, None] < num_inner) & (group[None, :] < num_groups)
        pair, absmax = load_groups(
            packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, inner[:, None], group, inside,
            num_groups, BLOCK_SIZE,
        )  # fmt: skip
        even, odd = decode_tile(pair, absmax, levels, INNER, GROUPS * 16, grad.dtype)
        even_total = tl.dot(grad, even, even_total, input_precision="ieee")
        odd_total = tl.dot(grad, odd, odd_total, input_precision="ieee")
    total = tl.interleave(even_total, odd_total)
    column = tl.program_id(0) * (GROUPS * 32) + tl.arange(0, GROUPS * 32)
    place = (part * num_rows + row[:, None]) * (num_groups * 32) + column[None, :]
    mask = (row[:, None] < num_rows) & (column[None, :] < num_groups * 32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def matmul_backward(grad_MO: Tensor, weight: QuantizedWeight, config: Config | None = None) -> Tensor:
    """``grad W`` with fp32 sums, rounded once to the dtype of ``grad_MO``.

    Args:
        grad_MO: (1 to 128, out_features) float32 (multiplied in full fp32), float16 or bfloat16; copied if not contiguous.
        weight: shape (out_features, in_features), in_features divisible by 32.
        config: a fixed configuration; None measures ``CONFIGS`` once for each shape.

    Returns: (M, in_features) in the dtype of ``grad_MO``. Reference: ``grad @ nf4.dequantize(weight)`` in that dtype.
    Raises: ValueError, TypeError or RuntimeError, see ``check_product``.
    """
    grad = check_product("grad", grad_MO, weight, 0, SMALL_ROWS)
    row_tile = tile_rows(len(grad), grad.dtype)
    key = ("matmul_backward", grad.device, grad.dtype, row_tile, len(grad) > row_tile, weight.shape, weight.block_size)

    def launch(config: Config) -> Tensor:
        return _launch(grad, weight, row_tile, config)

    configs = FP32_CONFIGS if grad.dtype == torch.float32 else CONFIGS
    with torch.cuda.device_of(grad):
        return launch(config or fastest(key, configs, launch))


def _launch(grad: Tensor, weight: QuantizedWeight, row_tile: int, config: Config) -> Tensor:
    num_rows, (out_features, in_features) = len(grad), weight.shape
    sums = product_buffer(num_rows, in_features, config.parts, grad)
    grid = (triton.cdiv(in_features, config.columns), triton.cdiv(num_rows, row_tile), config.parts)
    _matmul_backward_kernel[grid](
        grad, weight.packed, *scale_arguments(weight), weight.levels, sums, num_rows, out_features, in_features // 32,
        BLOCK_SIZE=weight.block_size, ROWS=row_tile, INNER=config.inner, GROUPS=config.columns // 32, PARTS=config.parts,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return sum_partials(sums, grad.dtype)
