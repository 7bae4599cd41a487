"""Four bits back to floats in one launch, with the 8-bit scales decoded on the way.

Eight codes are one 32-bit word, and one thread that owns a word owns eight neighbouring outputs: in a 16-bit dtype they are
one 16-byte store, and nothing has to be interleaved between threads. That is the idea to leave with. The kernel refuses
nothing about sizes: any number of elements, odd ones too, in any block size of the format.
"""

# A @triton.jit function is a program of the GPU: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisft.kernels.arguments import check_devices, check_float, check_vector, check_weight, scale_arguments
from minisft.kernels.decode import load_absmax, word_shifts
from minisft.nf4 import QuantizedWeight

WORDS = 1024  # 8192 outputs a program: a multiple of every block size, so that a program starts on a block


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr, levels_ptr, out_ptr, n,
    BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out[i] = round(levels[code[i]] * absmax[i // BLOCK_SIZE] + 0).

    One program owns WORDS words, 8 * WORDS outputs. Grid: ceil(n / (8 * WORDS)). Tile: [WORDS, 8]. Mask: words inside
    whole 16-byte vectors are loaded as vectors; the last program fetches what is left byte by byte, so that nothing past
    the end of the buffer is read. Adding 0 turns -0 into +0, as the reference does.

    Bytes: n/2 + n/BLOCK_SIZE (nested) read, n * itemsize written. Limit: memory bandwidth, about 8 instructions a weight.
    """
    start = tl.program_id(0).to(tl.int64) * WORDS
    left = n - start * 8
    packed_ptr += start * 4
    word = tl.arange(0, WORDS)
    whole = left // 32 * 4
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    bits = tl.load(words_ptr + word, mask=word < whole, other=0, eviction_policy="evict_first")
    if whole < WORDS:
        for byte in tl.static_range(4):
            place = word * 4 + byte
            tail = tl.load(packed_ptr + place, mask=(word >= whole) & (place * 2 < left), other=0)
            bits |= tail.to(tl.int32) << (8 * byte)
    block = start * 8 // BLOCK_SIZE + word * 8 // BLOCK_SIZE
    absmax = load_absmax(block, word * 8 < left, absmax_ptr, map_ptr, absmax2_ptr, offset_ptr)
    code = (bits[:, None] >> word_shifts()[None, :]) & 15
    value = tl.load(levels_ptr + code) * absmax[:, None] + 0.0
    element = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + start * 8 + element, value.to(out_ptr.dtype.element_ty), mask=element < left)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense weight, bit for bit that of the reference ``minisft.nf4.dequantize``.

    Args:
        weight: see ``QuantizedWeight``.
        dtype: float32, float16 or bfloat16.
        out: contiguous, of ``weight.shape`` and ``dtype``, to be written instead of a new tensor.

    Returns:
        the dense weight, ``out`` if it was given.

    Raises:
        ValueError, TypeError, RuntimeError: see ``check_weight``.

    Cost: one launch; with double quantization in blocks of 64, 0.516 bytes a weight read, and itemsize bytes written.
    """
    n = check_weight(weight)
    check_float("dtype", dtype)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    check_vector("out", out, dtype, n)
    check_devices(out, weight.packed)
    with torch.cuda.device_of(out):
        _dequantize_kernel[(triton.cdiv(n, WORDS * 8),)](
            weight.packed, *scale_arguments(weight), weight.levels, out, n,
            BLOCK_SIZE=weight.block_size, WORDS=WORDS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out.view(weight.shape)
