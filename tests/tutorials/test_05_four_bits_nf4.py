"""Page 05 builds the library's NF4: same table, same bytes, same numbers; a build with a bug in it does not pass for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from torch import Tensor

from minisft import nf4

PAGE = page("05_four_bits_nf4")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
weights = st.builds(
    lambda rows, pairs, log_scale, zero_row, dtype, seed: made_weight(rows, 2 * pairs, 10.0**log_scale, zero_row, dtype, seed),
    rows=st.integers(1, 9),
    pairs=st.integers(1, 70),
    log_scale=st.integers(-4, 3),
    zero_row=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
block_sizes = st.sampled_from(nf4.BLOCK_SIZES[:4])
tables = st.sampled_from(["nf4", "int4"])


def made_weight(rows: int, columns: int, scale: float, zero_row: bool, dtype: torch.dtype, seed: int) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    if zero_row:
        weight[0] = 0.0
    return weight.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_nf4_levels(built: Namespace) -> None:
    assert torch.equal(bits(built["nf4_levels"]()), bits(nf4.codebook("nf4")))


def agrees_pack(built: Namespace, codes: Tensor) -> None:
    assert torch.equal(built["pack"](codes), nf4.pack(codes))


def agrees_unpack(built: Namespace, packed: Tensor, length: int) -> None:
    assert torch.equal(built["unpack"](packed, length), nf4.unpack(packed, length))


def agrees_quantize(built: Namespace, weight: Tensor, block_size: int, table: str) -> None:
    packed, absmax = built["quantize"](weight, nf4.codebook(table), block_size)
    library = nf4.quantize(weight, block_size, double_quant=False, levels=table)
    assert torch.equal(packed, library.packed)
    assert torch.equal(bits(absmax), bits(library.absmax))


def agrees_dequantize(built: Namespace, weight: Tensor, block_size: int, table: str) -> None:
    q = nf4.quantize(weight, block_size, double_quant=False, levels=table)
    restored = built["dequantize"](q.packed, q.absmax, q.levels, q.shape, block_size)
    assert torch.equal(bits(restored), bits(nf4.dequantize(q, torch.float32)))


def test_nf4_levels_equals_the_library() -> None:
    agrees_nf4_levels(BUILD)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=300).filter(lambda codes: len(codes) % 2 == 0))
def test_pack_equals_the_library(codes: list[int]) -> None:
    agrees_pack(BUILD, torch.tensor(codes, dtype=torch.uint8))


@given(st.binary(min_size=1, max_size=200), st.booleans())
def test_unpack_equals_the_library(packed: bytes, odd: bool) -> None:
    agrees_unpack(BUILD, torch.tensor(list(packed), dtype=torch.uint8), 2 * len(packed) - odd)


@given(weights, block_sizes, tables)
def test_quantize_equals_the_library(weight: Tensor, block_size: int, table: str) -> None:
    agrees_quantize(BUILD, weight, block_size, table)


@given(weights, block_sizes, tables)
def test_dequantize_equals_the_library(weight: Tensor, block_size: int, table: str) -> None:
    agrees_dequantize(BUILD, weight, block_size, table)


@given(weights, block_sizes)
def test_a_second_round_trip_changes_nothing(weight: Tensor, block_size: int) -> None:
    levels = BUILD["nf4_levels"]()
    first = BUILD["quantize"](weight, levels, block_size)
    restored = BUILD["dequantize"](*first, levels, weight.shape, block_size)
    for again, once in zip(BUILD["quantize"](restored, levels, block_size), first, strict=True):
        assert torch.equal(again, once)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    agrees_nf4_levels(built)
    codes = torch.arange(16, dtype=torch.uint8)
    agrees_pack(built, codes)
    agrees_unpack(built, nf4.pack(codes), 15)
    midway = (nf4.codebook("nf4")[:-1] + nf4.codebook("nf4")[1:]) / 2
    on_the_border = torch.cat((midway, torch.ones(1)))  # in a block whose scale is 1
    for weight in (made_weight(5, 64, 0.02, True, torch.float32, 0), on_the_border):
        agrees_quantize(built, weight, 64, "nf4")
        agrees_dequantize(built, weight, 64, "nf4")


MUTANTS = [
    ("eight negative levels' steps for the seven", "torch.linspace(tail, 0.5, 8)", "torch.linspace(tail, 0.5, 9)[1:]"),
    ("not divided by the largest", "return levels / levels.max()", "return levels"),
    ("another tail", "tail=0.9677083", "tail=1 - 1 / 32"),
    ("first code in the low nibble", "codes[0::2] << 4 | codes[1::2]", "codes[1::2] << 4 | codes[0::2]"),
    ("nibbles taken apart the wrong way round", "(packed >> 4, packed & 15)", "(packed & 15, packed >> 4)"),
    ("the largest value for the largest magnitude", "blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
    ("no guard for a block of zeros", "1 / absmax.clamp(min=SMALLEST)", "1 / absmax"),
    ("a tie goes up", "torch.bucketize(scaled, midpoints)", "torch.bucketize(scaled, midpoints, right=True)"),
    ("rounded down instead of to the nearest", "(levels[:-1] + levels[1:]) / 2", "levels[1:]"),
    ("scales repeated in the wrong order", "absmax.repeat_interleave(block_size)", "absmax.repeat(block_size)"),
]


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _quantile_levels(tail: float) -> Tensor:
    steps = [(tail - 0.5) * k / 4 for k in range(4, 0, -1)], [(tail - 0.5) * k / 3 for k in range(3, 0, -1)]
    positive, negative = ([NormalDist().inv_cdf(0.5 + s) for s in side] for side in steps)
    levels = torch.tensor(sorted([*(-x for x in negative), 0.0, *positive]))
    return levels / levels.max()


def _equal_shares() -> Tensor:
    levels = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 8) for i in range(8)])
    return levels / levels.max()


WRONG: dict[str, list[tuple[Callable[..., Tensor], str]]] = {
    "nf3_levels": [
        (lambda: torch.linspace(-1, 1, 8), "exactly zero"),
        (_equal_shares, "exactly zero"),
        (lambda: -_quantile_levels(209 / 224).flip(0), "three levels are negative"),
        (lambda: _quantile_levels(0.9677083), "not that of 4 bits"),
        (lambda: nf4.codebook("nf4"), "8 levels"),
    ],
    "pack_any": [
        (lambda codes: nf4.pack(codes[: len(codes) // 2 * 2]), "the last nibble counts"),
        (lambda codes: nf4.pack(torch.cat((codes.new_zeros(len(codes) % 2), codes))), "behind the last code"),
        (lambda codes: nf4.pack(codes).int(), "torch.uint8"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


def test_the_solution_of_nf3_is_the_closed_form() -> None:
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "nf3_levels")
    torch.testing.assert_close(solution(), _quantile_levels(209 / 224), rtol=0, atol=1e-6)
