"""fp32 weights that are bf16 numbers, in 16 bits, for decoding alone: what a step reads for each token, in half of the bytes.

bf16 is the upper half of fp32. Of a checkpoint that was published in bf16 and loaded in fp32, the lower 16 bits are zero:

    bf16 bits = fp32 bits >> 16,  fp32 bits = bf16 bits << 16

so such a copy is exact, whatever the number: NaN with its payload, infinities, -0 and subnormal ones too. ``cpu_decode.cpp``
widens it and multiplies in fp32: sums have the same bits, but for AMX tiles (from 6 rows on), which add in another order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minisft.kernels.cpu_nf4 import has_numbers
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


_copies = WeightCopies(exact_bf16)


def sixteen_bits_of(weight: Tensor) -> Tensor:
    """``exact_bf16``, remembered, see ``WeightCopies``.

    Args:
        weight: of a linear layer.

    Returns:
        its exact copy in bf16, kept as long as the weight lives; the weight itself if there is none, for it holds other numbers
        or is not a contiguous fp32 tensor on the CPU.
    """
    if not _is_fp32(weight):
        return weight
    copy = _copies.of(weight)
    return weight if copy is None else copy


def may_have_copy(weight: Tensor) -> bool:
    """Whether the first numbers of a weight allow a copy; the whole of it is not read."""
    return _is_fp32(weight) and exact_bf16(weight.detach().flatten()[:NUM_TRIED]) is not None


def _is_fp32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and has_numbers(weight)


def forget(weight: Tensor) -> None:
    """Free what ``sixteen_bits_of`` has kept of a weight."""
    _copies.forget(weight)
