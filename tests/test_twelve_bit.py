"""Weights in 12 bits: what is packed against the formula in PyTorch, what stands apart, what has no copy."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fast_decode import needs_native
from torch import Tensor

from minisft.kernels import cpu_nf4, twelve_bit
from minisft.kernels.twelve_bit import BLOCK, BLOCK_BYTES, MAX_APART, NO_BLOCK, TwelveBitWeight, pack_12_bits

pytestmark = needs_native


def unpacked(found: TwelveBitWeight) -> Tensor:
    """The numbers as 16-bit words, (out, in) int32, by the formulas of twelve_bit.py and cpu_twelve_bit.h."""
    lower, pairs = found.packed.int().split([BLOCK, BLOCK_BYTES - BLOCK], dim=-1)
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-1)
    steps, base = codes % 8, (found.base.int() % 128)[:, None, None]
    is_zero = (found.base >= 128)[:, None, None] & (steps == 0)
    words = ((codes // 8 * 128 + torch.where(is_zero, 0, base + steps)) * 256) | lower
    order = [16 * (l // 4) + 8 * (j // 2) + 2 * (l % 4) + j % 2 for j in range(4) for l in range(16)]  # noqa: E741
    blocks = words[..., order].flatten(0, 1)
    blocks[found.at[:-1]] = found.apart.view(torch.int16).int() & 0xFFFF
    return blocks.view(found.shape)


def words_of(weight: Tensor) -> Tensor:
    return weight.bfloat16().view(torch.int16).int() & 0xFFFF


def of_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 by bits: a conversion would make a signalling NaN quiet."""
    if dtype == torch.float32:
        return (words.long() << 16).to(torch.int32).view(dtype)
    return words.to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_of_bf16(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight neighbouring upper bytes in each row, so that all codes are used; and mixed: nearly all blocks stand apart."""
    monkeypatch.setattr(twelve_bit, "MAX_APART", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    eight = torch.arange(2**16).view(32, 8, 256).transpose(1, 2)
    for order in (eight, torch.randperm(2**16, generator=torch.Generator().manual_seed(1))):
        words = order.reshape(32, 2048).int()
        found = pack_12_bits(of_words(words, dtype))
        assert found is not None
        assert found.shape == words.shape
        assert torch.equal(unpacked(found), words)


numbers = st.one_of(
    st.integers(0x3C00, 0x3FFF), st.integers(0xBC00, 0xBFFF), st.integers(0, 2**16 - 1), st.sampled_from([0, 0x8000, 0x7F80])
)  # fmt: skip


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_words(data: st.DataObject, dtype: torch.dtype) -> None:
    """Rows of near and far exponents, zeros among them: whatever codes hold, and however many blocks stand apart."""
    out, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    fill = data.draw(st.lists(st.integers(0x3C00, 0x3FFF), min_size=1, max_size=5))
    words = torch.tensor(fill).repeat(out * blocks * BLOCK)[: out * blocks * BLOCK].view(out, blocks * BLOCK)
    for place, word in data.draw(st.dictionaries(st.integers(0, words.numel() - 1), numbers, max_size=12)).items():
        words.view(-1)[place] = word
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twelve_bit, "MAX_APART", 1.0)
        found = pack_12_bits(of_words(words, dtype))
    assert found is not None
    assert torch.equal(unpacked(found), words.int())
    assert torch.equal(found.first[1:].diff(prepend=found.first[:1]), torch.bincount(found.at[:-1] // blocks, minlength=out))
    assert found.at[-1] == NO_BLOCK
    assert torch.equal(found.at, found.at.unique())


@pytest.mark.parametrize(
    ("large", "small", "base", "apart"),
    [
        (1.0, 2.0**-15, 56, 0),  # e = 63: 127 // 2; the smallest that fits is 2 ** (2 * 56 - 127)
        (1.0, 2.0**-15.5, 56, 1),  # half an exponent below
        (1.99, 2.0**-15, 56, 0),
        (2.0, 2.0**-13, 57, 0),
        (2.0, 2.0**-14, 57, 1),
        (3.0e38, 2.0**-15, 56, 1),  # beside the largest numbers others decide, as beside infinities
        (float("inf"), 2.0**-15, 56, 1),
        (1.0, 0.0, 56 + 128, 0),  # zero has a code where that helps,
        (1.0, -0.0, 56 + 128, 0),
        (2.0**-120, 0.0, 0, 0),  # not where it is near
        (2.0**-120, 2.0**-133, 0, 0),
    ],
)
def test_what_a_row_holds(large: float, small: float, base: int, apart: int) -> None:
    """Of 64 blocks, the first two have the large number or the small one."""
    weight = torch.full((1, 64 * BLOCK), min(large, 1.0) * 0.75)
    weight[0, 5], weight[0, BLOCK + 3] = large, small
    weight = weight.bfloat16()
    found = pack_12_bits(weight)
    assert found is not None
    assert (found.base.tolist(), len(found.apart)) == ([base], apart)
    assert torch.equal(unpacked(found), words_of(weight))


def test_zeros_are_coded_only_where_fewer_blocks_stand_apart() -> None:
    """With a code for zero the smallest numbers that fit have none: two blocks of them, and one of a zero."""
    weight = torch.ones(2, 32 * BLOCK, dtype=torch.bfloat16)
    weight[:, [0, BLOCK]] = 2.0**-15
    weight[0, 2 * BLOCK] = 0
    weight[1, torch.arange(2, 7) * BLOCK] = 0
    found = pack_12_bits(weight)
    assert found is not None
    assert found.base.tolist() == [56, 56 + 128]
    assert found.at.tolist() == [2, 32, 33, NO_BLOCK]
    assert torch.equal(unpacked(found), words_of(weight))


def test_how_much_it_takes_of_gaussian_numbers() -> None:
    weight = tiny.randn(2000, 576).bfloat16()
    found = pack_12_bits(weight)
    assert found is not None
    share = len(found.apart) / (2000 * 9)
    assert 0.002 < share < 0.008
    assert 12 < 8 * found.nbytes / weight.numel() < 12.4


@pytest.mark.parametrize("more", [0, 1])
def test_with_too_many_blocks_apart_there_is_none(more: int) -> None:
    weight = torch.ones(4, 10 * BLOCK)
    weight.view(-1)[torch.arange(int(MAX_APART * 40) + more) * 3 * BLOCK] = 2.0**-20
    assert (pack_12_bits(weight) is None) == bool(more)


@pytest.mark.parametrize("place", [(0, 0), (2, 100), (4, 191)])
@pytest.mark.parametrize("bit", [1, 0x8000])
def test_other_numbers_in_fp32_have_none(place: tuple[int, int], bit: int) -> None:
    weight = torch.ones(5, 3 * BLOCK)
    assert pack_12_bits(weight) is not None
    weight.view(torch.int32)[place] |= bit
    assert pack_12_bits(weight) is None


def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((3, 96), (3, 63), (0, 64), (3, 0), (64,), (2, 2, 64)):
        assert pack_12_bits(torch.ones(shape)) is None
    assert pack_12_bits(torch.ones(3, 128)) is not None
    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    assert pack_12_bits(torch.ones(3, 128)) is None
