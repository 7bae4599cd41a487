"""Weights that are bf16 numbers, in 12 bits each and without a loss, for decoding alone: what a step reads for each token.

The upper byte of a bf16 number is its sign and the upper seven bits of its exponent, e; the lower one is kept as it is. Within
a row e takes few values, for weights lie within some powers of two of each other. So a row has a base, the largest e of it
less 7 (0 at least), and 4 bits stand for an upper byte:

    code = 8 * sign + (e - base),  0 <= e - base <= 7: numbers from 2^-14 of the row's largest on, at least

An e of 127 (infinities, NaN, numbers from 2^127 on) does not count for the base. Where that saves blocks, a row gives the
code 0 to e = 0 instead: to zeros and numbers below 2^-125. A block of 64 neighbours with one number outside of all this (some
4 in 1000 of a Gaussian weight's) stands apart, in 16 bits each.
``cpu_twelve_bit.h`` says how the bits lie.

Ref: exponents of trained weights need three bits of eight: Zhang et al. 2025, arXiv:2504.11651, section 2. Their Huffman codes
reach 11 bits a weight, but are read one after the other; codes of one length are looked up 64 at a time.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4

BLOCK, BLOCK_BYTES = 64, 96
MAX_APART = 1 / 8  # of the blocks: with more of them 16 bits are read faster
NO_BLOCK = 2**63 - 1


@dataclass(frozen=True, eq=False)
class TwelveBitWeight:
    """A weight (out, in) in 12 bits.

    Attributes:
        packed: (out, in / 64, 96) uint8.
        base: (out,) uint8; with 128 added where code 0 stands for e = 0.
        first: (out + 1,) int32, how many blocks stand apart before each row.
        at: which ones do, counted through all rows, int64, and at the end ``NO_BLOCK``.
        apart: (len(at) - 1, 64) bf16, their numbers.
    """

    packed: Tensor
    base: Tensor
    first: Tensor
    at: Tensor
    apart: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self.packed.shape[0], self.packed.shape[1] * BLOCK))

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(tensor.nbytes for tensor in vars(self).values())


def pack_12_bits(weight: Tensor) -> TwelveBitWeight | None:
    """Copy a weight to 12 bits if nothing is lost.

    Args:
        weight: (out, in) fp32 or bf16, contiguous, on the CPU.

    Returns:
        the same numbers, bit for bit, in memory of their own; None if there is no compiled code, in is no multiple of 64, a
        number is no bf16 number, or more than an eighth of the blocks would stand apart.

    Cost: reads the weight twice.
    """
    library = cpu_nf4.library()
    if library is None or weight.ndim != 2 or not weight.numel() or weight.shape[1] % BLOCK:
        return None
    (out, features), threads = weight.shape, torch.get_num_threads()
    base, counts = torch.empty(out, dtype=torch.uint8), torch.empty(out, dtype=torch.int32)
    source = (
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int32(weight.dtype == torch.float32),
        ctypes.c_int64(out),
        ctypes.c_int64(features),
    )
    if not library.look_at_12_bits(*source, *_pointers(base, counts), ctypes.c_int32(threads)):
        return None
    num_apart, num_blocks = int(counts.sum()), out * (features // BLOCK)
    if num_apart > MAX_APART * num_blocks:
        return None
    first = torch.zeros(out + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=first[1:])
    packed = torch.empty(out, features // BLOCK, BLOCK_BYTES, dtype=torch.uint8)
    at, apart = torch.full((num_apart + 1,), NO_BLOCK), torch.empty(num_apart, BLOCK, dtype=torch.bfloat16)
    library.write_12_bits(*source, *_pointers(base, first, packed, at, apart), ctypes.c_int32(threads))
    return TwelveBitWeight(packed, base, first, at, apart)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
