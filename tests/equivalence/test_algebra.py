"""What no arithmetic may change: a zero update, powers of two, the order of rows, columns and adapters, the inner basis."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from laws import BASES, DENSE, IN_FP64, KINDS, LAYERS, LORA, Case, assert_within, cases, exact, fits, merged_copy, weight_of
from tiny import randn
from torch import Tensor, nn

from minisft.merge_weights import merge_, merged_weight

seeds = st.integers(0, 2**20)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with their signs: -0.0 is not +0.0."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


# ---- nothing added ---------------------------------------------------------------------------------------------------


def nothing_added(layer: tuple[str, str], zero: str) -> nn.Sequential:
    """A trained layer, one of whose factors or whose scaling has then become zero; zeros of both signs count as zero."""
    patterns = ("mostly zeros of both signs", *["gaussian"] * 3)
    case = Case(*layer, 33, 17, rank=3, alpha=0.0 if zero == "scaling" else -2.5, patterns=patterns)
    model = case.model()
    if zero != "scaling":
        factor = getattr(model[0], zero)
        factor.data = torch.where(randn(*factor.shape) > 0, 0.0, -0.0).to(factor.dtype)
    if case.kind == "dora":  # nothing is added if the lengths are those of W, too
        model[0].lora_magnitude_vector.data = model[0].row_norms()
    return model


every_zero = pytest.mark.parametrize("zero", ["lora_A", "lora_B", "scaling"])
every_layer = pytest.mark.parametrize("layer", LAYERS, ids="-".join)


@every_layer
@every_zero
def test_a_zero_update_is_the_identity_bit_for_bit(layer: tuple[str, str], zero: str) -> None:
    """L7, with -0.0 among the weights: -0.0 + 0.0 would be +0.0."""
    model = nothing_added(layer, zero)
    before = weight_of(model[0]).to(BASES[layer[1]].dtype)
    assert bool(before.signbit().logical_and(before == 0).any()) == (layer[1] in DENSE)
    merge_(model)
    assert same_bits(weight_of(model[0]), before)


@every_layer
@every_zero
def test_a_zero_update_has_nothing_to_lose(layer: tuple[str, str], zero: str) -> None:
    report = merge_(nothing_added(layer, zero))
    assert report.layers[0].survival == 1
    assert report.fraction_lost == report.layers[0].delta_ratio == 0


@pytest.mark.slow
@given(seed=seeds, rows=st.integers(0, 16))
def test_rows_that_get_no_update_keep_their_bits(seed: int, rows: int) -> None:
    """L7 within one layer: a row of zeros in B leaves a row of W."""
    case = Case("linear", "bf16", 33, 17, rank=3, seed=seed, patterns=("mostly zeros of both signs", *["gaussian"] * 3))
    model = case.model()
    with torch.no_grad():
        model[0].lora_B[:rows] = 0.0
    before = weight_of(model[0])
    merge_(model)
    assert same_bits(weight_of(model[0])[:rows], before[:rows])


# ---- scaling ---------------------------------------------------------------------------------------------------------


@given(case=cases(hostile=False, kinds=LORA), exponent=st.integers(-8, 8))
def test_powers_of_two_in_alpha_are_exact_in_delta(case: Case, exponent: int) -> None:
    """L6. Twice the alpha is twice D, to the last bit; and the opposite alpha the opposite D."""
    once = case.model()[0].delta_weight()
    scaled = dataclasses.replace(case, alpha=case.alpha * 2.0**exponent).model()[0].delta_weight()
    assert torch.equal(scaled, once * 2.0**exponent)
    assert torch.equal(dataclasses.replace(case, alpha=-case.alpha).model()[0].delta_weight(), -once)


@given(case=cases(*IN_FP64, hostile=False, kinds=LORA), first=st.floats(-3, 3), second=st.floats(-3, 3))
def test_delta_is_linear_in_alpha(case: Case, first: float, second: float) -> None:
    """L6: D(a) + D(b) = D(a + b)."""
    deltas = [dataclasses.replace(case, alpha=alpha).model()[0].delta_weight() for alpha in (first, second, first + second)]
    allowed = 1e-12 * (deltas[0].abs() + deltas[1].abs()) + 1e-300
    assert_within(deltas[0] + deltas[1], deltas[2], allowed, "D(a) + D(b)")


# ---- order -----------------------------------------------------------------------------------------------------------


@given(case=cases(*IN_FP64, hostile=False, kinds=LORA))
def test_permuting_rows_and_columns_commutes_with_merging(case: Case) -> None:
    """L8. Rows of W, B and b move together, columns of W and A too; the merged weight and the output follow."""
    model = case.model()
    e = exact(case, model, case.input())
    draw = torch.Generator().manual_seed(case.seed)
    rows, columns = (torch.randperm(n, generator=draw) for n in (case.outputs, case.inputs))
    straight = merged_weight(e.W, e.s * e.B @ e.A)
    permuted = merged_weight(e.W[rows][:, columns], e.s * e.B[rows] @ e.A[:, columns])
    allowed = 1e-12 * (e.W.abs() + abs(e.s) * e.B.abs() @ e.A.abs())
    assert_within(permuted, straight[rows][:, columns], allowed[rows][:, columns], "W'")
    assert_within(e.x[:, columns] @ permuted.T + e.b[rows], e.y[:, rows], 1e-12 * e.magnitude[:, rows], "y")


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
def test_permuting_the_layer_itself_permutes_its_merge(kind: str, seed: int) -> None:
    """L8 on the modules: permute an adapted layer's outputs before merging, or the merged layer's after it."""
    case = Case(kind, "fp64", 17, 15, rank=4, seed=seed)
    rows = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    model, x = case.model(), case.input()
    with torch.no_grad():
        base, adapter = model[0].base, model[0]
        adapter.lora_B.copy_(adapter.lora_B[rows])
        base.weight.copy_(base.weight[:, rows] if kind == "embedding" else base.weight[rows])
        if kind == "dora":
            adapter.lora_magnitude_vector.copy_(adapter.lora_magnitude_vector[rows])
        if kind in ("linear", "dora"):
            base.bias.copy_(base.bias[rows])
    merge_(model)
    straight = merged_copy(case)(x)
    torch.testing.assert_close(model(x), straight[..., rows], rtol=1e-12, atol=1e-12)


@given(seed=seeds, count=st.integers(2, 4))
def test_adapters_merge_in_any_order_and_all_at_once(seed: int, count: int) -> None:
    """L5. W + D1 + D2 is W + D2 + D1 is W + (D1 + D2)."""
    W = randn(17, 15, seed=seed)
    deltas = [(-1.5) ** i * randn(17, 3, seed=seed + 2 * i + 1) @ randn(3, 15, seed=seed + 2 * i + 2) for i in range(count)]
    forwards, backwards = W, W
    for delta in deltas:
        forwards = merged_weight(forwards, delta)
    for delta in reversed(deltas):
        backwards = merged_weight(backwards, delta)
    allowed = 1e-12 * (W.abs() + sum(delta.abs() for delta in deltas))
    assert_within(forwards, backwards, allowed, "order")
    assert_within(forwards, merged_weight(W, sum(deltas, torch.zeros_like(W))), allowed, "all at once")


@given(case=cases(*IN_FP64, hostile=False))
def test_the_basis_between_the_factors_does_not_matter(case: Case) -> None:
    """L9. A -> M A and B -> B M^-1 is the same function, unmerged and merged. M is a rotation times scales from 0.5 to 2."""
    model, x = case.model(), case.input()
    e = exact(case, model, x)
    assume(fits(e, case.dtype))
    rotation = torch.linalg.qr(randn(case.rank, case.rank, seed=case.seed + 9)).Q
    scales = torch.linspace(0.5, 2.0, case.rank, dtype=torch.float64)
    turned = case.model()
    _turn_(turned, scales[:, None] * rotation, rotation.T / scales)
    allowed = 1e-12 * (exact(case, turned, x).magnitude + e.magnitude)
    assert_within(turned(x), e.y, allowed, "unmerged")
    merge_(turned)
    assert_within(turned(x), e.y, allowed, "merged")


def _turn_(model: nn.Sequential, M: Tensor, inverse: Tensor) -> None:
    with torch.no_grad():
        model[0].lora_A.copy_(M @ model[0].lora_A)
        model[0].lora_B.copy_(model[0].lora_B @ inverse)
