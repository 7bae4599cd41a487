"""Merged, unmerged and the formula are one function: exactly in fp64, within the derived bound in every other dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from laws import (
    BASES,
    IN_FP64,
    LAYERS,
    Case,
    assert_within,
    cases,
    exact,
    fits,
    merged_copy,
    roundoff,
    statistical,
    sum_roundoff,
    underflow,
    weight_of,
    worst_case,
)

from minisft.matmul import compute_dtype

every_layer = pytest.mark.parametrize("layer", LAYERS, ids="-".join)


@given(case=cases(*IN_FP64))
def test_in_fp64_all_three_agree_to_1e_12(case: Case) -> None:
    """L1. Twelve digits of what the terms of y add up to: this tells wrong formulas from rounding."""
    model, x = case.model(), case.input()
    e = exact(case, model, x)
    assume(fits(e, case.dtype))
    allowed = 1e-12 * e.magnitude + underflow(torch.float32)
    assert_within(model(x), e.y, allowed, "unmerged")
    assert_within(merged_copy(case)(x), e.y, allowed, "merged")


@pytest.mark.parametrize("base", BASES)
@given(data=st.data())
def test_in_every_dtype_they_agree_within_the_worst_case(base: str, data: st.DataObject) -> None:
    """L2, for numbers of any size and pattern."""
    case = data.draw(cases(base))
    model, x = case.model(), case.input()
    e = exact(case, model, x)
    assume(fits(e, case.dtype))
    unmerged, merged, allowed = model(x), merged_copy(case)(x), worst_case(e, case.dtype)
    assert unmerged.dtype == merged.dtype == case.dtype
    assert unmerged.shape == merged.shape == (*case.batch, case.outputs)
    assert_within(unmerged, e.y, allowed, "unmerged")
    assert_within(merged, e.y, allowed, "merged")
    assert_within(merged.reshape(e.y.shape), unmerged.reshape(e.y.shape), allowed, "merged against unmerged")


@pytest.mark.parametrize("base", BASES)
@given(data=st.data())
def test_on_gaussian_data_they_agree_within_four_times_the_expected(base: str, data: st.DataObject) -> None:
    """L2, sharper: errors of random numbers cancel, so a bound on their spread must do."""
    case = data.draw(cases(base, hostile=False))
    model, x = case.model(), case.input()
    e = exact(case, model, x)
    assume(fits(e, case.dtype))
    allowed = 4 * statistical(e, case.dtype)
    assert_within(model(x), e.y, allowed, "unmerged")
    assert_within(merged_copy(case)(x), e.y, allowed, "merged")


@every_layer
def test_the_allowance_is_far_below_the_adapters_effect(layer: tuple[str, str]) -> None:
    """The laws above could not fail if the bound were wide: leaving the adapter out misses it by far, less in bf16."""
    case = Case(*layer, 65, 63, rank=4)
    e = exact(case, case.model(), case.input())
    base_alone = (e.x @ e.W.T + e.b - e.y).abs()
    least = 2 if compute_dtype(case.input()) == torch.bfloat16 else 5
    assert float((base_alone / (4 * statistical(e, case.dtype))).median()) > least


@pytest.mark.parametrize("base", BASES)
@given(data=st.data())
def test_a_merged_weight_is_the_exact_sum_rounded_once(base: str, data: st.DataObject) -> None:
    """|W' - (W + D)| <= u |W + D|, and the error of D itself in fp32: rounding D before the addition costs u |D| more."""
    case = data.draw(cases(base))
    model = case.model()
    e = exact(case, model, case.input())
    assume(fits(e, case.dtype))
    stored = weight_of(merged_copy(case)[0])
    stored = stored.T if case.kind == "embedding" else stored
    assert stored.dtype == case.dtype
    eps, stretch = sum_roundoff(case.dtype), e.g.abs()[:, None]
    wide = torch.promote_types(case.dtype, torch.float32)
    below = underflow(case.dtype) + (case.rank + 1) * (1 + abs(e.s)) * (1 + stretch) * underflow(wide)
    of_delta = (case.rank + 4) * eps * (e.terms if case.kind != "dora" else 2 * (1 + stretch) * e.terms)
    of_g = e.g_error(eps)[:, None] * stretch * (e.W + e.U).abs()
    allowed = 1.001 * (roundoff(case.dtype) * (e.W + e.D).abs() + of_delta + of_g) + below
    assert_within(stored, e.W + e.D, allowed, "W'")


@every_layer
def test_the_layout_in_memory_changes_nothing(layer: tuple[str, str]) -> None:
    """A view gives what its contiguous copy gives, and its own memory is left alone."""
    for layout in ("transposed", "offset", "strided"):
        case = Case(*layer, 33, 17, rank=3, batch=(4, 3), layout=layout)
        x, model = case.input(), case.model()
        before = x.clone()
        for form in (model, merged_copy(case)):
            allowed = worst_case(exact(case, model, x), case.dtype)
            assert_within(form(x).reshape(12, 17), form(x.contiguous()).reshape(12, 17), allowed, layout)
        assert torch.equal(x, before)


def test_every_kind_and_base_is_covered() -> None:
    assert {base for _, base in LAYERS} == set(BASES)
    assert len(LAYERS) == 3 * len(BASES) + 4
