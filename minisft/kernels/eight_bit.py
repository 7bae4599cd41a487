"""Dense weights in 8 bits, for decoding alone: what a step reads for each token, in a quarter of fp32's bytes.

A block of up to 64 neighbours of a row shares one scale, its largest absolute value over 127:

    code = round(w / scale),  w' = code * scale,  |w - w'| <= scale / 2

Codes are int8 from -127 to 127, scales fp32: 8.5 bits a weight in blocks of 64. ``cpu_decode.cpp`` multiplies code and scale in
fp32, so a step has the bits that the weights w' would give it; AMX tiles, from 10 rows on, multiply a block's sum by its scale.

Ref: absmax quantization with a scale for each block: Dettmers et al. 2021, arXiv:2110.02861, section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.kernels.weight_copies import WeightCopies

LARGEST_CODE = 127
MAX_BLOCK = 64
AT_ONCE = 2**20  # weights: what is in between stays in the cache


@dataclass(frozen=True, eq=False)
class EightBitWeight:
    """A weight (out, in) in 8 bits; also one of a GGUF file, whose codes and scales are then the file's, see ``gguf_copy.py``.

    Attributes:
        codes: (out, in) int8.
        scales: (out, in / block size) fp32.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def block_size(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """w' = code * scale, (out, in) fp32."""
        return (self.codes.unflatten(1, (-1, self.block_size)) * self.scales[:, :, None]).flatten(1)


@torch.no_grad()
def quantize_8bit(weight: Tensor) -> EightBitWeight:
    """Round a weight to 8 bits.

    Args:
        weight: (out, in) fp32 or bf16, on the CPU.

    Returns:
        codes and scales of their own. The block size is the largest power of two up to 64 that divides in; a block with a
        number that is not finite becomes NaN.
    """
    out, features = weight.shape
    block = math.gcd(features, MAX_BLOCK)
    codes = torch.empty(out, features, dtype=torch.int8)
    scales = torch.empty(out, features // block)
    rows = max(1, AT_ONCE // features)
    for start in range(0, out, rows):
        blocks = weight[start : start + rows].float().unflatten(1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True) / LARGEST_CODE
        # A block of zeros has the scale 0, and below the normal numbers a scale has lost digits.
        rounded = (blocks / scale.masked_fill(scale == 0, 1)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        codes[start : start + rows] = rounded.flatten(1)
        scales[start : start + rows] = scale.squeeze(-1)
    return EightBitWeight(codes, scales)


_copies = WeightCopies(quantize_8bit)


def eight_bits_of(weight: Tensor) -> EightBitWeight:
    """``quantize_8bit``, remembered; see ``WeightCopies`` for the changes that are not seen.

    Args:
        weight: as for ``quantize_8bit``.

    Returns:
        its codes and scales, kept as long as the weight lives.
    """
    return _copies.of(weight)


def is_made(weight: Tensor) -> bool:
    """Whether ``eight_bits_of`` keeps something of a weight."""
    return weight in _copies


def forget(weight: Tensor) -> None:
    """Free what ``eight_bits_of`` has kept of a weight."""
    _copies.forget(weight)
