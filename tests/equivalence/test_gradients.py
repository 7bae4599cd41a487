"""L19: what an adapter learns from is the gradient of the dense formula, and its frozen base learns nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from laws import IN_FP64, LAYERS, Case, Exact, assert_within, cases, exact, fits, merged_copy, worst_case
from tiny import assert_close, randn
from torch import Tensor


def dense_gradients(e: Exact, upstream: Tensor) -> dict[str, Tensor]:
    """Of A, B, b, x and m, by plain autograd of y = x (W + s B A)^T + b, or of DoRA's, whose norms are constants."""
    given = {name: getattr(e, name) for name in ("A", "B", "b", "x", "m")}
    leaves = {name: value.clone().requires_grad_() for name, value in given.items() if value is not None}
    A, B, b, x = (leaves[name] for name in ("A", "B", "b", "x"))
    stretch = e.g if e.m is None else leaves["m"] / e.norms
    y = x @ (stretch[:, None] * (e.W + e.s * (B @ A))).T + b
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True))


@pytest.mark.parametrize("train_bias", [False, True])
@given(case=cases(*IN_FP64, hostile=False))
def test_gradients_are_those_of_the_formula(case: Case, train_bias: bool) -> None:
    """Of both factors and the input, and of the bias if somebody lets it train; in fp64 to 1e-12, whatever the layout."""
    model, x = case.model(), case.input()
    e = exact(case, model, x)
    upstream = randn(*e.y.shape, seed=case.seed + 5)
    expected = dense_gradients(e, upstream)
    bias = getattr(model[0].base, "bias", None)
    if bias is not None:
        bias.requires_grad_(train_bias)
    if case.kind != "embedding":
        x.requires_grad_()
    model(x).backward(upstream.view(*case.batch, case.outputs))
    assert_close(model[0].lora_A.grad, expected["A"])
    assert_close(model[0].lora_B.grad, expected["B"])
    if case.kind == "dora":
        assert_close(model[0].lora_magnitude_vector.grad, expected["m"])
    if case.kind != "embedding":
        assert_close(x.grad.reshape(e.x.shape), expected["x"])
    if bias is not None and train_bias:
        assert_close(bias.grad, expected["b"])
    elif bias is not None:
        assert bias.grad is None


@pytest.mark.parametrize("layer", LAYERS, ids="-".join)
def test_the_base_weight_gets_no_gradient(layer: tuple[str, str]) -> None:
    case = Case(*layer, 17, 15, rank=3)
    model = case.model()
    model(case.input()).float().square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"0.lora_A", "0.lora_B"} | ({"0.lora_magnitude_vector"} if case.kind == "dora" else set())
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@given(case=cases(hostile=False, kinds=("linear", "linear-no-bias")))
def test_the_merged_layer_sends_back_the_same_gradient(case: Case) -> None:
    """grad_x = grad_y (W + D) on both roads: the worst case of the transposed layer, whose factors change places."""
    model, merged = case.model(), merged_copy(case)
    e = exact(case, model, case.input())
    upstream = randn(*case.batch, case.outputs, seed=case.seed + 5).to(case.dtype)
    g = upstream.reshape(-1, case.outputs).double()
    back = Exact(e.W.T, e.B.T, e.A.T, e.s, torch.zeros(case.inputs, dtype=torch.float64), g)
    assume(fits(back, case.dtype))
    for form, name in ((model, "unmerged"), (merged, "merged")):
        x = case.input().detach().requires_grad_()
        (found,) = torch.autograd.grad(form(x), x, upstream)
        assert_within(found, back.y, worst_case(back, case.dtype), name)


@pytest.mark.parametrize(("kind", "base"), [("linear", "fp64"), ("linear-no-bias", "fp64"), ("linear", "nf4-of-fp64")])
def test_gradcheck(kind: str, base: str) -> None:
    """Finite differences know nothing of formulas."""
    case = Case(kind, base, 5, 4, rank=2, batch=(2, 3))
    model = case.model()
    names = ["0.lora_A", "0.lora_B"]

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, (A, B), strict=True)), x)

    leaves = [case.input(), *(model.get_parameter(name).detach().clone() for name in names)]
    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])
