"""Four-bit weights: 16 levels, one scale a block, two codes in a byte. The readable reference.

A weight is cut into blocks of 64 numbers, flat in row-major order. Each block is divided by its largest magnitude, so
that it lies in [-1, 1], and each number becomes the index of the nearest of 16 levels. NF4 puts its levels at quantiles
of the normal distribution, because trained weights are nearly normal: they are dense where weights are dense. Double
quantization stores the scales themselves in 8 bits. 4 bits + 8/64 + 32/(64 * 256) = 4.127 bits a weight.

Precision, everywhere in this file: scales, codes and products are computed in fp32, also for fp64 weights (the format
has no wider scale), and the result is rounded once, to the dtype that was asked for. The bits are those of bitsandbytes.
A block whose largest magnitude is below 1e-38, the edge of fp32's normal range, is coded as if it were 1e-38 there.

This file refuses weights that are not finite. It trains nothing and matches no kernel for speed: `minisft.kernels` does
that and is judged against it. A newcomer leaves with one idea: ``weight = levels[code] * absmax[block]``, nothing more.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3; Dettmers et al. 2022, arXiv:2110.02861 (the dynamic map).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.common.errors import UserError, visible
from minisft.config import QUANT_BLOCK_SIZES

# The constants of the format stand here alone; the C++ and the Triton kernels are handed them.
BLOCK_SIZES = QUANT_BLOCK_SIZES
NESTED_BLOCK_SIZE = 256  # scales that share one second-level scale
# 1 / 1e-38 in fp32: what bitsandbytes multiplies blocks of smaller scales by. 1e-38 itself is subnormal, and a CPU that flushes
# such numbers to 0 would divide by it; a bound on the reciprocal gives the same bits and is safe there too.
MAX_RECIPROCAL = 1.0000000694406173e38
TINY = 1.2e-38  # scales below this normal fp32 number may be flushed to 0
CHUNK = 2**18  # elements handled at a time: whole blocks, whole bytes; 8 MB of scratch at most, which stay in the cache
Coder = Callable[[Tensor, int, Tensor, Tensor, Tensor], None]  # what ``code_blocks`` does, perhaps in another way


# ---- the 16 levels ---------------------------------------------------------------------------------------------------


def codebook(levels: str | Sequence[float] | Tensor) -> Tensor:
    """The 16 values that codes 0 to 15 stand for: ``nf4``, ``fp4``, ``int4`` or 16 numbers of your own.

    Own levels are sorted, lie in [-1, 1] and should contain 0 exactly, or zeros are not kept. ``fp4`` is in
    bitsandbytes' order, which is that of the bit patterns (sign, two bits of exponent, one of fraction) and not sorted.
    ``int4`` is k / 7 for k = -8..7; -8 / 7 is out of reach, as in any symmetric 4-bit integer format.

    Returns: (16,) fp32 on the CPU.
    """
    if isinstance(levels, str):
        if levels not in _BUILT_IN:
            choices = ", ".join(_BUILT_IN)
            raise UserError(
                "config/bad-value",
                "no such codebook",
                where="levels",
                found=visible(levels),
                expected=choices,
                fix="name one of these or give 16 numbers",
            )
        return torch.tensor(_BUILT_IN[levels](), dtype=torch.float32, device="cpu")
    values = torch.as_tensor(levels, dtype=torch.float32, device="cpu").flatten()
    if values.numel() != 16 or not bool((values[1:] > values[:-1]).all()):
        raise ValueError(f"levels must be 16 rising numbers, not {values.tolist()}")
    return values


def _nf4_levels() -> list[float]:
    """Eight positive and seven negative quantiles of N(0, 1) and 0, divided by the largest. Ref: QLoRA, section 3."""
    outermost = 0.9677083  # midway between 1 - 1/32 and 1 - 1/30, to the seven digits that bitsandbytes wrote down
    positive = [NormalDist().inv_cdf(p) for p in _linspace(outermost, 0.5, 9)[:-1].tolist()]
    negative = [-NormalDist().inv_cdf(p) for p in _linspace(outermost, 0.5, 8)[:-1].tolist()]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32, device="cpu")
    return (values / values.max()).tolist()  # an fp32 division: the published constants are fp32 to the bit


def _fp4_levels() -> list[float]:
    magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    return [sign * m / 12.0 + 0.0 for sign in (1, -1) for m in magnitudes]  # + 0.0: both zeros are +0


def _int4_levels() -> list[float]:
    return [k / 7.0 for k in range(-8, 8)]


def _linspace(start: float, stop: float, count: int) -> Tensor:
    """fp32 on the CPU whatever PyTorch's defaults are: the tables are constants, to the bit."""
    return torch.linspace(start, stop, count, dtype=torch.float32, device="cpu")


_BUILT_IN = {"nf4": _nf4_levels, "fp4": _fp4_levels, "int4": _int4_levels}


@lru_cache(maxsize=16)
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit dynamic data type that scales are stored in: sorted, from -0.993 through 0 to 1.

    Decade 10^(i-6), i = 0..6, holds 2^i evenly spaced magnitudes, so small numbers keep few digits and large ones many.
    Returns: (256,) fp32. Ref: arXiv:2110.02861, section 2.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        magnitudes = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*magnitudes, *(-m for m in magnitudes)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


# ---- what a quantized weight is --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight in 4 bits, N numbers in blocks of G.

    Args:
        packed: (ceil(N/2),) uint8, ``code[2i] << 4 | code[2i+1]``: the first element sits in the high nibble.
        absmax: (ceil(N/G),) fp32 scales; or, with double quantization, their uint8 codes in the dynamic map.
        absmax2: (ceil(N/G/256),) fp32 scales of the scales, or None.
        offset: () fp32, the mean that was taken off the scales before they were coded, or None.
        levels: (16,) fp32, see ``codebook``.
        block_size: G.
        shape: the shape of the dense weight.
        dtype: the dtype it had.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    levels: Tensor
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors really occupy."""
        tensors = (self.packed, self.absmax, self.absmax2, self.offset, self.levels)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ---- quantize --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(
    weight: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    levels: str | Sequence[float] | Tensor = "nf4",
    *,
    name: str = "weight",
    coder: Coder | None = None,
) -> QuantizedWeight:
    """Round each weight to the nearest level of its block: ``code = nearest(levels, weight * (1 / absmax))``.

    The scale is inverted and then multiplied, and a number midway between two levels takes the lower one.

    Args:
        weight: any shape and float dtype, on any device; a non-contiguous one is copied whole.
        block_size: one of ``BLOCK_SIZES``; blocks run over the flat tensor and the last one may be short.
        double_quant: store the scales in 8 bits. Their mean is torch's, whose last bit may depend on the thread count.
        levels: see ``codebook``.
        name: what to call the tensor in an error.
        coder: a faster ``code_blocks`` with the same bits, for ``minisft.kernels.cpu_nf4``.

    Returns:
        the quantized weight, on the device of ``weight``.

    Raises:
        UserError: ``model/non-finite-weight`` for a NaN or an infinity; ``config/bad-value`` for the block size or levels.

    Cost: the result, 4 bytes a block, and at most 8 MB of scratch.
    """
    _check_request(weight, block_size)
    table = codebook(levels).to(weight.device)
    flat, length = weight.reshape(-1), weight.numel()
    packed = torch.empty((length + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-length // block_size), dtype=torch.float32, device=weight.device)
    (coder or code_blocks)(flat, block_size, table, packed, absmax)
    if not bool(absmax.isfinite().all()):  # the largest magnitude of a block with a NaN is NaN
        raise _non_finite(weight, name)
    absmax2 = offset = None
    if double_quant:
        absmax, absmax2, offset = quantize_absmax(absmax)
    return QuantizedWeight(packed, absmax, absmax2, offset, table, block_size, weight.shape, weight.dtype)


def code_blocks(flat: Tensor, block_size: int, table: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """Fill the codes and the scales of a weight, see ``QuantizedWeight``.

    Args:
        flat: (N,), any float dtype.
        block_size: numbers that share a scale.
        table: (16,) fp32, the levels.
        packed, absmax: (ceil(N/2),) uint8 and (ceil(N/block_size),) fp32, written to.
    """
    for codes, packed_out in zip(_code(flat, block_size, table, absmax), packed.split(CHUNK // 2), strict=True):
        packed_out.copy_(pack(codes)[: len(packed_out)])


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the high nibble; an odd last code gets a zero beside it.

    Args: codes: (N,) uint8, 0 to 15. Returns: (ceil(N/2),) uint8. ``unpack`` is the inverse.
    """
    first, second = _blocks(codes, 2).unbind(dim=1)
    return first << 4 | second


def _blocks(flat: Tensor, block_size: int) -> Tensor:
    """(N,) as rows of ``block_size``, the last row filled up with zeros, which change no row's largest magnitude."""
    missing = -flat.numel() % block_size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, block_size)


def _code(flat: Tensor, block_size: int, table: Tensor, absmax: Tensor) -> Iterator[Tensor]:
    """Code ``flat`` a chunk at a time: fills ``absmax`` and yields each chunk's codes, its last block filled up."""
    for chunk, absmax_out in zip(flat.split(CHUNK), absmax.split(CHUNK // block_size), strict=True):
        blocks = _blocks(chunk.to(torch.float32), block_size)
        absmax_out.copy_(blocks.abs().amax(dim=1))
        reciprocal = (1.0 / absmax_out).clamp(max=MAX_RECIPROCAL)
        yield _nearest(blocks * reciprocal[:, None], table).flatten()


def _nearest(scaled: Tensor, table: Tensor) -> Tensor:
    """Codes (uint8) of the values of ``table`` nearest to ``scaled``; a tie goes to the lower value."""
    midpoints, order = midpoints_of(table)
    rank = torch.bucketize(scaled, midpoints, out_int32=True)  # right=False: a midpoint belongs to the bin below it
    return order.to(torch.uint8).index_select(0, rank.flatten()).view(scaled.shape)


def midpoints_of(table: Tensor) -> tuple[Tensor, Tensor]:
    """Where one code ends and the next begins, in rising order, and the code (int64) of each interval between them."""
    ascending, order = table.sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: 8-bit codes of ``absmax - mean`` in blocks of 256, their scales, and the mean."""
    offset = absmax.mean()
    if not bool(offset.isfinite()):
        raise UserError("model/weights-too-large", "the mean scale overflows fp32", fix="quantize without double quantization")
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    absmax2 = absmax.new_empty(-(-absmax.numel() // NESTED_BLOCK_SIZE))
    table = dynamic_map(absmax.device)
    coded = _code(absmax - offset, NESTED_BLOCK_SIZE, table, absmax2)
    for chunk, out in zip(coded, codes.split(CHUNK), strict=True):
        out.copy_(chunk[: len(out)])
    return codes, absmax2, offset


def _check_request(weight: Tensor, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(map(str, BLOCK_SIZES))
        found = visible(block_size)
        raise UserError(
            "config/bad-value",
            "no such block size",
            where="block_size",
            found=found,
            expected=choices,
            fix="choose one of these, 64 for instance",
        )
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"only a non-empty floating-point tensor can be quantized, not {weight.dtype} {tuple(weight.shape)}")


def _non_finite(weight: Tensor, name: str) -> UserError:
    bad = (~weight.to(torch.float32).isfinite()).nonzero()
    first = tuple(bad[0].tolist())
    return UserError(
        "model/non-finite-weight",
        "a weight is not a finite fp32 number",
        where=f"{visible(name)}[{', '.join(map(str, first))}]",
        found=f"{weight[first].item()}, the first of {len(bad)} such in {weight.numel()} weights",
        expected="finite numbers only",
        fix="the model file is damaged or its training diverged: fetch it again, or use an earlier checkpoint",
    )


# ---- dequantize ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dequantize(q: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight: ``levels[code] * absmax[block]``, in fp32, rounded once to ``dtype`` (the source's own if None).

    Returns: a new tensor of ``q.shape`` on the device of ``q``. Cost: the result and at most 8 MB of scratch.
    """
    length = q.shape.numel()
    flat = torch.empty(length, dtype=dtype or q.dtype, device=q.packed.device)
    absmax = decode_absmax(q)
    pieces = zip(flat.split(CHUNK), q.packed.split(CHUNK // 2), absmax.split(CHUNK // q.block_size), strict=True)
    for out, packed, scales in pieces:
        values = _unpack_levels(packed, q.levels)[: len(out)]
        products = _blocks(values, q.block_size) * scales[:, None]
        # Adding 0 turns -0 into +0: a zero block's scale can come back from 8 bits as a tiny negative number.
        out.copy_(products.add_(0.0).flatten()[: len(out)])
    return flat.view(q.shape)


def decode_absmax(q: QuantizedWeight) -> Tensor:
    """One fp32 scale a block, whichever way they are stored: ``map[code] * absmax2[block] + offset``, rounded twice."""
    if q.absmax2 is None or q.offset is None:
        return q.absmax
    values = dynamic_map(q.absmax.device)[q.absmax.int()]
    scaled = _blocks(values, NESTED_BLOCK_SIZE) * q.absmax2[:, None]
    return scaled.flatten()[: q.absmax.numel()] + q.offset


def unpack(packed: Tensor, length: int) -> Tensor:
    """The first ``length`` codes in ``packed``, (length,) uint8: the inverse of ``pack``."""
    return torch.stack((packed >> 4, packed & 0xF), dim=1).flatten()[:length]


def _unpack_levels(packed: Tensor, levels: Tensor) -> Tensor:
    """``levels[unpack(packed)]``, by a table of all 256 bytes' pairs of levels: a pair of fp32 moves as one fp64 item."""
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
    return pairs.view(torch.float64).flatten().index_select(0, packed.int()).view(torch.float32)
