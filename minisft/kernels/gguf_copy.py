"""Weights that were dequantized from a GGUF file, in the file's own 4 to 8 bits again, for decoding alone.

What a block of the file stands for is one of two formulas, in fp32, with one scale for 32 (of Q6_K 16) neighbours:

    w = scale * code + least     Q4_0 (codes -8 to 7, no least), Q4_1, Q4_K: two codes a byte
    w = scale * code             Q5_0, Q6_K, Q8_0: int8, as the step in 8 bits reads them

The operations are those of the dequantization, so the numbers have its bits; they are compared with the weight's. Scales are
kept in fp32. Q5_1 and Q5_K, which have both a least number and 32 levels, are not read so. A byte has the codes of two numbers
that lie as far apart as a vector of the CPU is long: vectors then have numbers in their order, and sums the bits of fp32.

Ref: ggml, ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_gguf import BLOCKS
from minisft.kernels.eight_bit import EightBitWeight

BITS = {"Q4_0": 5, "Q4_1": 6, "Q4_K": 6, "Q5_0": 9, "Q8_0": 9, "Q6_K": 10}  # of a copy, a weight
GROUP = 32  # weights that share a scale in 4 bits
AT_ONCE = 2**18  # weights: what is in between stays in the cache


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A weight (out, in) in 4 bits: w = scale * level[code] + least.

    Attributes:
        packed: (out, in / 2) uint8, the earlier of two codes in the upper bits.
        scales: (out, in / 32) fp32.
        least: the same, or None.
        levels: (16,) fp32, -8 to 7 or 0 to 15.
    """

    packed: Tensor
    scales: Tensor
    least: Tensor | None
    levels: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self.packed.shape[0], 2 * self.packed.shape[1]))

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and least numbers."""
        return self.packed.nbytes + self.scales.nbytes * (1 if self.least is None else 2)


def from_blocks(type_name: str, blocks: Tensor, weight: Tensor) -> FourBitWeight | EightBitWeight | None:
    """A weight's copy in the bits of its file.

    Args:
        type_name: of ``BITS``.
        blocks: (out, bytes of a row) uint8, as in the file.
        weight: (out, in) fp32, contiguous, on the CPU: what it should be.

    Returns:
        it; None if the blocks stand for other numbers, be it one bit, or there is no compiled code to read it.

    Cost: some milliseconds for a million weights.
    """
    (out, features), (items, size) = weight.shape, BLOCKS[type_name]
    if cpu_nf4.library() is None or features % items or blocks.shape != (out, features // items * size):
        return None
    in_4_bits = BITS[type_name] < 8
    first = -8 if type_name == "Q4_0" else 0
    groups = features // (16 if type_name == "Q6_K" else GROUP)
    codes = torch.empty(out, features // 2, dtype=torch.uint8) if in_4_bits else torch.empty(out, features, dtype=torch.int8)
    scales, least = torch.empty(out, groups), torch.empty(out, groups) if type_name in ("Q4_1", "Q4_K") else None
    rows, lanes = max(1, AT_ONCE // features), cpu_nf4.vector_lanes()
    for start in range(0, out, rows):
        some = slice(start, start + rows)
        numbers, scale, offset = _DECODERS[type_name](blocks[some].unflatten(1, (-1, size)))
        numbers, scale = numbers.reshape(-1, features), scale.reshape(-1, groups)
        decoded = numbers.unflatten(1, (groups, -1)).float() * scale[..., None]
        scales[some] = scale
        if least is not None and offset is not None:
            least[some] = offset.reshape(-1, groups)
            decoded += least[some][..., None]
        if not torch.equal(decoded.view(-1, features).view(torch.int32), weight[some].view(torch.int32)):
            return None
        if in_4_bits:
            early, late = (numbers - first).to(torch.uint8).unflatten(1, (-1, 2, lanes)).unbind(2)
            codes[some] = (early << 4 | late).flatten(1)
        else:
            codes[some] = numbers
    if in_4_bits:
        return FourBitWeight(codes, scales, least, torch.arange(first, first + 16, dtype=torch.float32))
    return EightBitWeight(codes, scales)


# Of blocks (rows, blocks of a row, bytes): codes, int8 or uint8, in their order; a scale, and what is added, for each group.
_Decoded = tuple[Tensor, Tensor, Tensor | None]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _q4_0(blocks: Tensor) -> _Decoded:
    return _nibbles(blocks[..., 2:]).to(torch.int8) - 8, _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Decoded:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> _Decoded:
    fifth = blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1  # bit j of four bytes belongs to code j
    return (_nibbles(blocks[..., 6:]) | fifth.flatten(-2) << 4).to(torch.int8) - 16, _half(blocks, 0), None


def _q8_0(blocks: Tensor) -> _Decoded:
    return blocks[..., 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _q4_k(blocks: Tensor) -> _Decoded:
    low, high, both = blocks[..., 4:16].split(4, dim=-1)  # 6 bits of each: the last four groups' upper bits in the first eight
    scale = torch.cat([low & 63, both & 15 | low >> 2 & 48], dim=-1)
    least = torch.cat([high & 63, both >> 4 | high >> 2 & 48], dim=-1)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return codes.flatten(-2), _half(blocks, 0) * scale.float(), -(_half(blocks, 2) * least.float())


def _q6_k(blocks: Tensor) -> _Decoded:
    low, high = blocks[..., :128].unflatten(-1, (2, 2, 32)), blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    lower = torch.cat([low & 15, low >> 4], dim=-2)  # (..., side, part, 32)
    upper = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = (lower | upper << 4).to(torch.int8) - 32
    return codes.flatten(-3), _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8).float(), None


_DECODERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q6_K": _q6_k}
