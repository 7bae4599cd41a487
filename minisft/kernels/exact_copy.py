"""Weights in fewer bytes and without a loss, for decoding alone: what a step reads for each token.

Most checkpoints are published in bf16. Loaded in fp32, the lower 16 bits of each number are zero:

    bf16 bits = fp32 bits >> 16,  fp32 bits = bf16 bits << 16

so 16 bits hold it exactly, whatever it is: NaN with its payload, infinities, -0 and subnormal ones too. ``twelve_bit.py``
leaves out what the exponents of a row share: a quarter less. ``cpu_decode.cpp`` widens either and multiplies in fp32: sums
have the same bits, but for AMX tiles (of 16 bits from 6 rows on, of 12 from 9 on), which add in another order than vectors do.

A weight that was dequantized from a GGUF file is read in the file's 4 to 8 bits, if they still give its numbers, see
``gguf_copy.py``. Tiles multiply those of 8 bits from 10 rows on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_nf4 import has_numbers
from minisft.kernels.eight_bit import EightBitWeight
from minisft.kernels.gguf_copy import BITS, FourBitWeight, from_blocks
from minisft.kernels.twelve_bit import BLOCK, TwelveBitWeight, pack_12_bits
from minisft.kernels.weight_copies import WeightCopies

AT_ONCE = 2**16  # numbers: what is in between stays in the cache, and a weight with others is known after the first
LOWER_HALF = 0xFFFF
NUM_TRIED = 64  # numbers that rule a copy out for most weights that have none


def exact_bf16(weight: Tensor) -> Tensor | None:
    """Copy a weight to bf16 if nothing is lost.

    Args:
        weight: fp32, contiguous, on the CPU.

    Returns:
        the same numbers in bf16, bit for bit, in memory of its own; None if one of them is no bf16 number.

    Cost: two seconds for a thousand million numbers.
    """
    words = weight.detach().view(torch.int32).flatten().numpy()
    upper = np.empty(len(words), dtype=np.int16)
    for start in range(0, len(words), AT_ONCE):
        some = words[start : start + AT_ONCE]
        if np.bitwise_or.reduce(some) & LOWER_HALF:
            return None
        upper[start : start + AT_ONCE] = some >> 16
    return torch.from_numpy(upper).view(torch.bfloat16).view(weight.shape)


@dataclass(frozen=True)
class Source:
    """Where a weight came from: the type of its blocks in a GGUF file, and what reads them; None if it cannot any more."""

    type_name: str
    read: Callable[[], Tensor | None]


ExactCopy = FourBitWeight | EightBitWeight | TwelveBitWeight | Tensor
_sources = WeakTensorKeyDictionary()  # weight -> Source


def remember_source(weight: Tensor, source: Source) -> None:
    """Let ``exact_copy_of`` a weight try the blocks that it was read from."""
    if source.type_name in BITS:
        _sources[weight] = source


def unpacks_fast() -> bool:
    """Whether fewer than 16 bits save time: with AVX2 and AVX-512 they do.

    Portable code takes twice as long for 12 bits as for 16, and two to three times as long for 8 and 4 as for fp32.
    """
    return cpu_nf4.instructions() != "portable"


def _copy(weight: Tensor) -> ExactCopy | None:
    copy = _in_file_bits(weight) or (pack_12_bits(weight) if unpacks_fast() else None)
    return exact_bf16(weight) if copy is None and weight.dtype == torch.float32 else copy


def _in_file_bits(weight: Tensor) -> FourBitWeight | EightBitWeight | None:
    source: Source | None = _sources.get(weight)
    if source is None or weight.dtype != torch.float32 or not unpacks_fast():  # loaded in fp32, it may be bf16 by now
        return None
    blocks = source.read()
    return None if blocks is None else from_blocks(source.type_name, blocks, weight.detach())


_copies = WeightCopies(_copy)


def exact_copy_of(weight: Tensor) -> ExactCopy:
    """A weight in the 4 to 8 bits of its GGUF file, else in 12, else in 16; remembered, see ``WeightCopies``.

    Args:
        weight: of a linear layer.

    Returns:
        its exact copy, kept as long as the weight lives; the weight itself if there is none, for it holds other numbers, is in
        bf16 and 12 bits do not do, or is not a contiguous tensor in fp32 or bf16 on the CPU.
    """
    if not _is_dense(weight):
        return weight
    copy = _copies.of(weight)
    return weight if copy is None else copy


def max_copy_bytes(weight: Tensor) -> int:
    """How much memory a copy of a weight takes at most; 0 if its first numbers rule one out. The whole of it is not read."""
    if not _is_dense(weight):
        return 0
    if weight.dtype == torch.bfloat16:
        return 2 * weight.numel() if unpacks_fast() and weight.shape[-1] % BLOCK == 0 else 0
    if exact_bf16(weight.detach().flatten()[:NUM_TRIED]) is not None:
        return 2 * weight.numel()
    source: Source | None = _sources.get(weight)
    return BITS[source.type_name] * weight.numel() // 8 if source is not None and unpacks_fast() else 0


def _is_dense(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.bfloat16) and has_numbers(weight)


def forget(weight: Tensor) -> None:
    """Free what ``exact_copy_of`` has kept of a weight."""
    _copies.forget(weight)
