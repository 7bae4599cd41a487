"""NF4 to the bit: against bitsandbytes on a CPU, against plain NumPy, and against the laws that any rounding must keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minisft import nf4
from minisft.common.errors import UserError
from minisft.kernels import cpu_nf4
from minisft.nf4 import BLOCK_SIZES, QuantizedWeight, codebook, decode_absmax, dequantize, dynamic_map, pack, quantize, unpack

PUBLISHED_NF4 = [  # QLoRA, appendix E, with the digits of its fp32 constants
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDOFF = {torch.float64: 2.0**-24, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 1e-38, torch.float32: 1e-38, torch.float16: 2.0**-25, torch.bfloat16: 1e-38}
# bitsandbytes' AVX-512 loop misplaces scales in ragged rows, and for large blocks or odd rows it compiles another path.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
laws = settings(max_examples=max(200, settings().max_examples))  # 2000 with MINISFT_HYPOTHESIS=thorough


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def codes_of(q: QuantizedWeight) -> Tensor:
    return unpack(q.packed, q.shape.numel())


def gaussian(length: int, dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> Tensor:
    return (torch.randn(length, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def all_finite_patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit format."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_nf4_levels_are_the_published_constants_to_the_bit() -> None:
    assert torch.equal(bits(codebook("nf4")), bits(torch.tensor(PUBLISHED_NF4)))


def test_levels_do_not_depend_on_pytorch_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert codebook("nf4").tolist() == PUBLISHED_NF4
            assert dynamic_map.__wrapped__(torch.device("cpu"))[-2].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_tables_equal_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook("fp4"), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


def test_dynamic_map_by_its_rule() -> None:
    """Closed form in exact decimal steps: decade i has 2^i magnitudes, centred in equal parts of [0.1, 1] * 10^(i-6)."""
    magnitudes = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)]
    expected = sorted([0.0, 1.0, *magnitudes, *(-m for m in magnitudes)])
    table = dynamic_map(torch.device("cpu"))
    assert len(expected) == 256
    assert bool((table[1:] > table[:-1]).all())
    np.testing.assert_allclose(table.double().numpy(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("levels", [list(range(15)), [1.0] * 16, torch.linspace(1, -1, 16)])
def test_a_codebook_of_ones_own_must_rise(levels: list[float] | Tensor) -> None:
    with pytest.raises(ValueError, match="16 rising numbers"):
        codebook(levels)


def test_an_unknown_codebook_names_the_choices() -> None:
    with pytest.raises(UserError, match="nf4, fp4, int4"):
        codebook("nf5")


# ---- bits: bitsandbytes ----------------------------------------------------------------------------------------------


def check_against_bitsandbytes(weight: Tensor, block_size: int, levels: str = "nf4") -> None:
    """Codes, scales and dequantized values, without double quantization.

    One exception: in a short last block bitsandbytes divides by the scale where it multiplies by the reciprocal elsewhere.
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=levels)
    q = quantize(weight, block_size, double_quant=False, levels=levels)
    whole = weight.numel() - weight.numel() % block_size
    ours, theirs = codes_of(q), unpack(packed.flatten(), weight.numel())
    assert torch.equal(ours[:whole], theirs[:whole])
    assert torch.equal(bits(q.absmax), bits(state.absmax))
    if whole < weight.numel() and levels == "nf4":
        tail, table = weight[whole:].float(), codebook(levels)
        midpoints = (table[1:] + table[:-1]) / 2
        assert torch.equal(theirs[whole:].int(), torch.bucketize(tail / q.absmax[-1], midpoints, out_int32=True))
        assert torch.equal(ours[whole:].int(), torch.bucketize(tail * (1 / q.absmax[-1]), midpoints, out_int32=True))
    flat_formula = codebook(levels)[ours.int()] * q.absmax.repeat_interleave(block_size)[: weight.numel()]
    assert torch.equal(dequantize(q), flat_formula.to(weight.dtype))
    if weight.numel() % 2 == 0 and not (AVX512 and (block_size >= 2048 or whole < weight.numel())):
        found, expected = dequantize(q), bnb.dequantize_4bit(q.packed[:, None], quant_state=state).flatten()
        # By a CPU's bf16 instructions bitsandbytes stores zero for what is below the smallest normal number.
        by_instruction = weight.dtype == torch.bfloat16 and bnb.has_avx512bf16()
        flushed = (expected == 0) & (found.float().abs() < 2.0**-126) & by_instruction
        assert torch.equal(bits(found[~flushed]), bits(expected[~flushed]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bits_equal_bitsandbytes(dtype: torch.dtype, block_size: int) -> None:
    for seed, tail in enumerate((0, 1, 2, block_size - 2, block_size // 2 + 1)):
        check_against_bitsandbytes(gaussian(block_size + 4096 + tail, dtype, seed), block_size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bits_equal_bitsandbytes_on_ten_million_weights(dtype: torch.dtype, block_size: int) -> None:
    check_against_bitsandbytes(gaussian(10_000_002, dtype, block_size), block_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_bits_equal_bitsandbytes_for_every_16_bit_number(dtype: torch.dtype, shuffled: bool, levels: str) -> None:
    weight = all_finite_patterns(dtype)
    if shuffled:
        weight = weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(7))]
    assert len(weight) == {torch.float16: 63488, torch.bfloat16: 65280}[dtype]
    check_against_bitsandbytes(weight, 64, levels)


def their_cpu_codes(absmax: Tensor) -> Tensor:
    """Scales in 8 bits as bitsandbytes codes them on a CPU: the nearest code of the nearest of 65 536 grid points.

    A block of zeros gets code 0. ``absmax`` (N,) fp32, from which the mean has been taken off.
    """
    grid = -1.0 + torch.arange(2**16, dtype=torch.float32) * 2.0 / (2**16 - 1)
    table = dynamic_map(torch.device("cpu"))
    of_point = torch.bucketize(grid, (table[1:] + table[:-1]) / 2)
    found = []
    for block in absmax.split(256):
        scaled = block * (1.0 / block.abs().max())
        point = ((scaled.clamp(-1.0, 1.0) + 1.0) * 0.5 * (2**16 - 1) + 0.5).int()
        found.append(torch.zeros_like(point) if not bool(block.any()) else of_point[point])
    return torch.cat(found).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 256])
def test_nested_scales_equal_bitsandbytes_with_its_cpu_table(dtype: torch.dtype, block_size: int) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    for seed, blocks in enumerate((1, 255, 256, 257, 1500)):
        weight = gaussian(blocks * block_size, dtype, seed)
        packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
        flat, nearest = quantize(weight, block_size, double_quant=False), quantize(weight, block_size)
        assert nearest.offset is not None
        q = dataclasses.replace(nearest, absmax=their_cpu_codes(flat.absmax - nearest.offset))
        assert q.absmax2 is not None
        assert torch.equal(q.packed, packed.flatten())
        assert torch.equal(q.absmax, state.absmax)
        assert torch.equal(bits(q.absmax2), bits(state.state2.absmax))
        assert q.offset == state.offset
        assert torch.equal(dequantize(q).flatten(), bnb.dequantize_4bit(packed, quant_state=state).flatten())


@pytest.mark.slow
def test_exact_nearest_scales_differ_rarely_from_bitsandbytes_and_are_never_worse() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(2**21, torch.float32, 3)
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    exact = quantize(weight, double_quant=False).absmax
    q = quantize(weight)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    differ = q.absmax != state.absmax
    assert 0 < differ.double().mean().item() < 0.003
    worse = (decode_absmax(q) - exact).abs().double() - (theirs - exact).abs().double()
    assert worse.max().item() <= 2.0**-22 * exact.max().item()  # two roundings of the rebuilt scale


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantizer", [quantize, cpu_nf4.quantize], ids=["PyTorch", "C++"])
def test_a_block_of_zeros_stays_zero_where_the_cpu_flushes_subnormal_numbers(
    quantizer: Callable[..., QuantizedWeight], double_quant: bool
) -> None:
    """A smallest scale that is itself subnormal becomes 0, its reciprocal infinite, and 0 times that a NaN."""
    weight = gaussian(4 * 64, torch.float32)
    weight[64:128] = 0.0
    normal = quantizer(weight, 64, double_quant)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        flushed = quantizer(weight, 64, double_quant)
        assert torch.equal(dequantize(flushed)[64:128], torch.zeros(64))
    finally:
        torch.set_flush_denormal(False)
    assert torch.finfo(torch.float32).tiny <= nf4.TINY
    assert torch.equal(flushed.packed, normal.packed)
    assert torch.equal(bits(flushed.absmax.float()), bits(normal.absmax.float()))


# ---- bits: NumPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 777, 4097])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_is_the_flat_formula(length: int, double_quant: bool, dtype: torch.dtype) -> None:
    """Element i: levels[nibble i] * scale of block i // G, one fp32 product; decoded here byte by byte."""
    q = quantize(gaussian(length, torch.float32, length), 32, double_quant)
    data, levels = q.packed.numpy(), q.levels.numpy()
    nibbles = [(data[i // 2] >> 4) if i % 2 == 0 else (data[i // 2] & 15) for i in range(length)]
    if q.absmax2 is None or q.offset is None:
        scales = q.absmax.numpy()
    else:
        map8 = dynamic_map(torch.device("cpu")).numpy()
        scales = [map8[c] * q.absmax2.numpy()[b // 256] + q.offset.numpy() for b, c in enumerate(q.absmax.numpy())]
    expected = np.array([np.float32(levels[n]) * np.float32(scales[i // 32]) for i, n in enumerate(nibbles)], dtype=np.float32)
    assert np.array_equal(dequantize(q, dtype).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_result_is_rounded_once(dtype: torch.dtype) -> None:
    q = quantize(gaussian(2**14, torch.float32))
    assert torch.equal(bits(dequantize(q, dtype)), bits(dequantize(q, torch.float32).to(dtype)))


@pytest.mark.parametrize("levels", ["nf4", "fp4", "int4", [round(-1 + k / 7.5, 3) for k in range(16)]])
def test_codes_are_the_nearest_level(levels: str | list[float]) -> None:
    """Brute force in fp64: no other level is closer by more than fp32's rounding of the scaled weight."""
    weight, table = gaussian(8192, torch.float32, 5), codebook(levels).double()
    q = quantize(weight, 64, double_quant=False, levels=levels)
    scaled = weight.double() / q.absmax.double().repeat_interleave(64)
    distance = (scaled[:, None] - table).abs()
    chosen = distance.gather(1, codes_of(q).long()[:, None])[:, 0]
    assert bool((chosen <= distance.min(dim=1).values + 2.0**-23).all())


def test_a_midpoint_takes_the_lower_code() -> None:
    table = codebook("nf4")
    midpoints = (table[1:] + table[:-1]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    weight = torch.cat([torch.ones(1), midpoints, above])  # 31 numbers, scale 1
    assert codes_of(quantize(weight, 32)).tolist() == [15, *range(15), *range(1, 16)]


def test_the_scale_is_inverted_then_multiplied() -> None:
    """Weights where x / a and x * (1 / a) fall on different sides of a midpoint follow the product."""
    table = codebook("nf4")
    midpoint = ((table[1:] + table[:-1]) / 2)[11]
    scale = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 1.0
    weight = scale * midpoint
    disputed = (weight / scale > midpoint) != (weight * (1 / scale) > midpoint)
    assert int(disputed.sum()) > 100
    scale, weight = scale[disputed], weight[disputed]
    rows = torch.stack([scale, weight], dim=1)
    rows = torch.nn.functional.pad(rows, (0, 30))
    expected = torch.where(weight * (1 / scale) > midpoint, 12, 11)
    assert torch.equal(codes_of(quantize(rows, 32)).view(-1, 32)[:, 1].int(), expected.int())


# ---- slabs and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8191, 8192, 8193, 8194, 12288 + 33])
@pytest.mark.parametrize("double_quant", [False, True])
def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch, length: int, double_quant: bool) -> None:
    weight = gaussian(length, torch.float32, length)
    whole = quantize(weight, 64, double_quant)
    dense = dequantize(whole)
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    pieces = quantize(weight, 64, double_quant)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.absmax, whole.absmax)
    assert torch.equal(dequantize(pieces), dense)


class _Allocations(TorchDispatchMode):
    """Bytes of every tensor that an operator returns, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # as upstream
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.sizes.append(out.numel() * out.element_size())
        return out


def test_scratch_memory_is_bounded_by_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    weight = gaussian(2**18, torch.bfloat16)
    with _Allocations() as seen:
        q = quantize(weight)
        dense = dequantize(q)
    results = {q.packed.nbytes, dense.nbytes, 4 * q.absmax.numel()}
    assert max(size for size in seen.sizes if size not in results) <= 8 * 4096
    assert q.packed.nbytes in seen.sizes  # the counter sees what it should


def test_layout_does_not_matter_only_row_major_order_does() -> None:
    weight = gaussian(96 * 40, torch.float32).view(96, 40)
    for other in (weight.t().contiguous().t(), torch.stack([weight, weight])[1], weight[:, None].expand(96, 1, 40)):
        q = quantize(other, 32)
        assert torch.equal(q.packed, quantize(weight, 32).packed)
        assert dequantize(q).shape == other.shape


def test_fp64_weights_are_rounded_to_fp32_first() -> None:
    weight = torch.randn(640, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q = quantize(weight)
    assert torch.equal(q.packed, quantize(weight.float()).packed)
    assert q.dtype == dequantize(q).dtype == torch.float64
    table = codebook("nf4")
    midpoint = ((table[1:] + table[:-1]) / 2)[9].double()
    barely_above = torch.stack([torch.ones((), dtype=torch.float64), midpoint + 1e-12])  # in fp32 it is the midpoint
    assert codes_of(quantize(barely_above)).tolist() == [15, 9]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bits_per_parameter(block_size: int, double_quant: bool) -> None:
    length = 4096 * 256 * 2
    q = quantize(torch.zeros(length), block_size, double_quant)
    per_weight = 4 + (8 / block_size + 32 / (block_size * 256) if double_quant else 32 / block_size)
    constant = 16 * 32 + (32 if double_quant else 0)  # the levels and the offset, once a tensor
    assert q.nbytes * 8 == per_weight * length + constant


# ---- laws ------------------------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (*DTYPES, torch.float64)) -> Tensor:
    """One to some hundred numbers: raw bit patterns, Gaussians of any size, or either with zeros and one outlier."""
    dtype = draw(st.sampled_from(dtypes))
    length = draw(st.integers(1, 200))
    if draw(st.booleans()):
        width = 16 if dtype is torch.float16 else 32
        floats = st.floats(width=width, allow_nan=False, allow_infinity=False)
        values = torch.tensor(draw(st.lists(floats, min_size=length, max_size=length)), dtype=torch.float64).to(dtype)
        values = values.nan_to_num(0.0, 0.0, 0.0)  # bf16's largest number is below fp32's
    else:
        size = 10.0 ** draw(st.integers(-4, 4) if dtype is torch.float16 else st.integers(-36, 36))
        values = gaussian(length, torch.float64, draw(st.integers(0, 2**20)), size).to(dtype)
    if draw(st.booleans()):
        values[draw(st.integers(0, length - 1))] *= 100 if values.abs().max() < 100 else 1
        values[draw(st.integers(0, length - 1)) :: draw(st.integers(1, 40))] = draw(st.sampled_from([0.0, -0.0]))
    return values


block_sizes = st.sampled_from((32, 64, 128))


def test_pack_and_unpack_are_inverse_on_all_bytes_and_know_first_from_second() -> None:  # L10
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack(unpack(every, 512)), every)
    assert pack(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [0x12]
    assert unpack(torch.tensor([0x12, 0xAB], dtype=torch.uint8), 4).tolist() == [1, 2, 10, 11]


@laws
@given(st.lists(st.integers(0, 15), max_size=65))
def test_pack_unpack_of_any_length(codes: list[int]) -> None:  # L10
    packed = pack(torch.tensor(codes, dtype=torch.uint8))
    assert packed.tolist() == [16 * a + b for a, b in zip(codes[::2], [*codes, 0][1::2], strict=True)]
    assert unpack(packed, len(codes)).tolist() == codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_rise_with_the_weight_for_every_16_bit_number(dtype: torch.dtype) -> None:  # L11
    values = all_finite_patterns(dtype)
    values = values[values.abs() <= 1].sort().values
    rows = torch.nn.functional.pad(values, (0, -len(values) % 63), value=1.0).view(-1, 63)
    rows = torch.nn.functional.pad(rows, (1, 0), value=1.0)  # a one in every block: its scale is 1
    codes = codes_of(quantize(rows)).view(-1, 64)[:, 1:].flatten()[: len(values)].int()
    assert bool((codes[1:] >= codes[:-1]).all())
    assert codes.unique().tolist() == list(range(16))


@laws
@given(weights(), block_sizes, st.booleans())
@example(torch.tensor([1.0, -0.84810]), 32, False)  # the middle of the widest gap
@example(torch.tensor([1e-39, 0.9e-39]), 32, False)  # below fp32's normal range
def test_error_is_at_most_half_the_widest_gap(weight: Tensor, block_size: int, double_quant: bool) -> None:  # L12
    """|w - dq| <= 0.151904 absmax + |absmax - rebuilt absmax| + one rounding of the result."""
    absmax = quantize(weight, block_size, double_quant=False).absmax.double()
    assume(not double_quant or absmax.max() < 1e37)  # so that their sum stays in fp32
    q = quantize(weight, block_size, double_quant)
    off = (absmax - decode_absmax(q).double()).abs() if double_quant else torch.zeros_like(absmax)
    scale, off = (t.repeat_interleave(block_size)[: weight.numel()] for t in (absmax, off))
    dense = dequantize(q).double()
    bound = 0.151904 * scale + off + ROUNDOFF[q.dtype] * (scale + off) + SMALLEST[q.dtype]
    assume(bool((scale + off).max() < torch.finfo(q.dtype).max))
    assert bool(((weight.double() - dense).abs() <= bound).all())


@laws
@given(weights((torch.float32, torch.bfloat16)), block_sizes)
def test_quantizing_twice_changes_nothing(weight: Tensor, block_size: int) -> None:  # L13
    """Every block has a code 0 or 15, so its dequantized form has the same scale."""
    q = quantize(weight, block_size, double_quant=False)
    assume(bool(((q.absmax == 0) | (q.absmax > 1e-30)).all()))
    again = quantize(dequantize(q), block_size, double_quant=False)
    assert torch.equal(again.packed, q.packed)
    assert torch.equal(again.absmax, q.absmax)
    nested = quantize(weight, block_size) if q.absmax.max() < 1e37 else q
    assert torch.equal(nested.packed, q.packed)  # double quantization does not touch the codes


@laws
@given(weights((torch.float32,)), st.integers(-40, 40))
def test_a_power_of_two_scales_only_the_scale(weight: Tensor, exponent: int) -> None:  # L14
    q = quantize(weight, 32, double_quant=False)
    assume(bool(((weight == 0) | ((weight.abs() > 1e-20) & (weight.abs() < 1e20))).all()))
    scaled = quantize(weight * 2.0**exponent, 32, double_quant=False)
    assert torch.equal(scaled.packed, q.packed)
    assert torch.equal(scaled.absmax, q.absmax * 2.0**exponent)


@laws
@given(weights(), st.randoms(use_true_random=False))
def test_blocks_are_independent(weight: Tensor, random: object) -> None:  # L15
    blocks = torch.nn.functional.pad(weight, (0, -weight.numel() % 32)).view(-1, 32)
    order = list(range(len(blocks)))
    random.shuffle(order)
    q, permuted = (quantize(w, 32, double_quant=False) for w in (blocks, blocks[order]))
    assert torch.equal(permuted.packed.view(-1, 16), q.packed.view(-1, 16)[order])
    assert torch.equal(permuted.absmax, q.absmax[order])


def test_negation_does_not_mirror_the_codes() -> None:  # L16: seven levels below zero, eight above
    """The levels themselves get codes 0 to 15; negated, each goes to the nearest level of the other side, found by hand."""
    weight = torch.tensor(PUBLISHED_NF4)
    assert codes_of(quantize(weight, 32)).tolist() == list(range(16))
    mirrored = codes_of(quantize(-weight, 32)).tolist()
    assert mirrored == [15, 14, 13, 12, 10, 9, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0]
    assert mirrored != list(range(16))[::-1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("levels", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_zero_block_is_plus_zero(dtype: torch.dtype, levels: str, double_quant: bool) -> None:  # L17
    weight = torch.cat([torch.zeros(64), -torch.zeros(64), gaussian(640, torch.float32)]).to(dtype)
    dense = dequantize(quantize(weight, 64, double_quant, levels))[:128]
    assert not bool(dense.any())
    assert not bool(dense.signbit().any())


def test_a_zero_block_is_plus_zero_when_its_scale_comes_back_negative() -> None:  # L17
    weight = torch.cat([torch.zeros(64), torch.full((64,), 4.1), gaussian(64 * 60, torch.float32, 0, 0.4)])
    found = 0
    for seed in range(40):
        weight[128:] = gaussian(64 * 60, torch.float32, seed, 0.3 + seed / 100)
        q = quantize(weight)
        found += bool(decode_absmax(q)[0] < 0)
        assert not bool(dequantize(q)[:64].signbit().any())
    assert found > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_weight_that_is_not_finite_is_an_error_that_finds_it(bad: float, dtype: torch.dtype) -> None:  # L18
    weight = torch.zeros(30, 40, dtype=dtype)
    weight[17, 3] = weight[29, 39] = bad
    with pytest.raises(UserError) as error:
        quantize(weight, name="model.layers.3.mlp.up_proj.weight")
    assert error.value.code == "model/non-finite-weight"
    assert "model.layers.3.mlp.up_proj.weight[17, 3]" in str(error.value)
    assert f"found {bad}, the first of 2 such in 1200 weights" in str(error.value)


def test_an_fp64_weight_beyond_fp32_is_an_error() -> None:
    with pytest.raises(UserError, match="found 1e\\+300"):
        quantize(torch.tensor([1.0, 1e300], dtype=torch.float64))


def test_a_mean_scale_beyond_fp32_is_an_error_and_not_a_nan() -> None:
    weight = torch.full((256,), 3e38)
    with pytest.raises(UserError, match="without double quantization"):
        quantize(weight)
    assert torch.equal(dequantize(quantize(weight, double_quant=False)), weight)


@pytest.mark.parametrize("block_size", [0, -64, 1, 16, 48, 8192])
def test_an_impossible_block_size_names_the_choices(block_size: int) -> None:
    with pytest.raises(UserError, match="expected 32, 64"):
        quantize(torch.ones(64), block_size)


@pytest.mark.parametrize("weight", [torch.ones(64, dtype=torch.int32), torch.ones(0), torch.ones(3, 0)])
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="non-empty floating-point"):
        quantize(weight)
