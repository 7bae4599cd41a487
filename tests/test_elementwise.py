"""RMSNorm, RoPE, SwiGLU and the matrix product: values and gradients equal plain autograd of their formulas."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_close, randn
from torch import Tensor

from minisft import matmul
from minisft.elementwise import geglu, rms_norm, rotate, swiglu

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=2).map(tuple)
seeds = st.integers(0, 2**31)
UNIT_BF16 = 2.0**-8  # the largest relative error of one rounding


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x**2).mean(-1, keepdim=True).add(eps).sqrt() * weight


def naive_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + E/2}) is a complex number, multiplied by e^{i angle}."""
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    return torch.cat([pairs.real, pairs.imag], -1)


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def naive_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return (
        gate / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    )  # 1 + tanh(z) = 2 / (1 + e^-2z)


def compare(ours: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    """Value and gradients of ``ours`` against ``naive``, the upstream gradient random and not contiguous."""
    one, two = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    actual, expected = ours(*one), naive(*two)
    assert_close(actual, expected, tolerance)
    upstream = randn(*reversed(expected.shape), seed=11, dtype=expected.dtype).permute(*reversed(range(expected.ndim)))
    for a, b in zip(torch.autograd.grad(actual, one, upstream), torch.autograd.grad(expected, two, upstream), strict=True):
        assert_close(a, b, tolerance)


@given(shapes, st.integers(1, 9), st.sampled_from([1e-6, 1e-2]), seeds)
def test_rms_norm(batch, size, eps, seed):
    compare(
        lambda x, w: rms_norm(x, w, eps),
        lambda x, w: naive_rms_norm(x, w, eps),
        [randn(*batch, size, seed=seed), randn(size, seed=1)],
    )


def test_rms_norm_of_zeros_is_zero():
    x = torch.zeros(3, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, 4))
    assert torch.isfinite(x.grad).all()


def test_rms_norm_squares_bf16_in_fp32():
    x = randn(5, 64, dtype=torch.bfloat16)
    weight = randn(64, seed=1, dtype=torch.bfloat16)
    exact = naive_rms_norm(x.double(), weight.double(), 1e-6)
    error = (rms_norm(x, weight, 1e-6).double() - exact).abs()
    assert bool((error <= 2.1 * UNIT_BF16 * exact.abs()).all())  # two roundings: before the weight and after it


@given(shapes, st.integers(1, 3), st.integers(1, 5), seeds)
def test_rotate(batch, heads, half, seed):
    angle = randn(*batch, 1, half, seed=seed + 1)
    compare(
        lambda x: rotate(x, angle.cos(), angle.sin()),
        lambda x: naive_rotate(x, angle.cos(), angle.sin()),
        [randn(*batch, heads, 2 * half, seed=seed)],
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), seeds)
def test_scores_depend_on_distance_alone(first, second, shift, seed):
    frequency = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    q, k = randn(1, 6, seed=seed), randn(1, 6, seed=seed + 1)

    def turned(x: Tensor, position: int) -> Tensor:
        return rotate(x, (position * frequency).cos(), (position * frequency).sin())

    here = (turned(q, first) * turned(k, second)).sum()
    there = (turned(q, first + shift) * turned(k, second + shift)).sum()
    assert_close(there, here, 1e-11)


@given(shapes, st.integers(1, 6), seeds)
def test_swiglu(batch, size, seed):
    compare(swiglu, naive_swiglu, [randn(*batch, size, seed=seed) * 4, randn(*batch, size, seed=seed + 1)])


@given(shapes, st.integers(1, 6), seeds)
def test_geglu(batch, size, seed):
    compare(geglu, naive_geglu, [randn(*batch, size, seed=seed) * 4, randn(*batch, size, seed=seed + 1)])


@pytest.mark.parametrize(
    ("function", "shapes_of_inputs"),
    [
        (lambda x, w: rms_norm(x, w, 1e-5), [(2, 3, 5), (5,)]),
        (lambda x: rotate(x, randn(3, 1, 2, seed=8).cos(), randn(3, 1, 2, seed=8).sin()), [(3, 2, 4)]),
        (swiglu, [(4, 3), (4, 3)]),
        (matmul.linear, [(2, 3), (4, 3), (4,)]),
    ],
    ids=["rms_norm", "rotate", "swiglu", "linear"],
)
def test_gradcheck(function, shapes_of_inputs):
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes_of_inputs)]
    assert torch.autograd.gradcheck(function, inputs)


def test_upstream_gradient_may_be_expanded():
    """``y.sum().backward()`` sends a gradient whose strides are all zero."""
    for function, inputs in [
        (lambda x: rotate(x, torch.zeros(3, 1, 2), torch.ones(3, 1, 2)), [randn(3, 2, 4)]),
        (swiglu, [randn(3, 4), randn(3, 4, seed=1)]),
        (lambda x, w: rms_norm(x, w, 1e-6), [randn(3, 4), randn(4)]),
    ]:
        inputs = [x.float().requires_grad_() for x in inputs]
        summed, weighted = (
            torch.autograd.grad(loss, inputs) for loss in (function(*inputs).sum(), (function(*inputs) * 1.0).sum())
        )
        for a, b in zip(summed, weighted, strict=True):
            assert torch.equal(a, b)


def test_only_inputs_are_kept_for_backward():
    kept: list[Tensor] = []
    gate, up = randn(6, 8).requires_grad_(), randn(6, 8, seed=1).requires_grad_()
    weight = randn(8, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
        rms_norm(gate, weight, 1e-6)
    inputs = {x.data_ptr() for x in (gate, up, weight)}
    assert all(x.data_ptr() in inputs or x.numel() == 6 for x in kept)  # 6: one factor a row


@pytest.mark.parametrize("fast_bf16", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@given(batch=shapes, sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=seeds)
def test_linear_in_bf16_multiplies_in_fp32_and_rounds_once(fast_bf16, bias, batch, sizes, seed):
    """On a CPU with and without bf16 products; the sum is exact in fp64, so one rounding is all the error there may be."""
    inputs = [randn(*batch, sizes[0], seed=seed), randn(sizes[1], sizes[0], seed=seed + 1)] + [randn(sizes[1], seed=2)] * bias
    inputs = [x.bfloat16() for x in inputs]
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16):
        ours = [x.clone().requires_grad_() for x in inputs]
        y = matmul.linear(*ours)
        found = [y, *torch.autograd.grad(y, ours, torch.ones_like(y))]
    exact = [x.double().requires_grad_() for x in inputs]
    y = torch.nn.functional.linear(*exact)
    for a, b in zip(found, [y, *torch.autograd.grad(y, exact, torch.ones_like(y))], strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a, b, UNIT_BF16)


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_keeps_no_activation_for_a_frozen_weight(frozen):
    kept: list[Tensor] = []
    x = randn(4, 6, dtype=torch.bfloat16).requires_grad_()
    weight = randn(3, 6, seed=1, dtype=torch.bfloat16).requires_grad_(not frozen)
    with (
        mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=False),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        matmul.linear(x, weight)
    expected = {weight.data_ptr()} if frozen else {weight.data_ptr(), x.data_ptr()}
    assert {t.data_ptr() for t in kept} == expected


def test_compute_dtype():
    half = {name: torch.zeros(1, dtype=getattr(torch, name)) for name in ("float64", "float32", "bfloat16", "float16")}
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=True):
        assert [matmul.compute_dtype(x) for x in half.values()] == [torch.float64, torch.float32, torch.bfloat16, torch.float32]
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=False):
        assert [matmul.compute_dtype(x) for x in half.values()] == [torch.float64, torch.float32, torch.float32, torch.float32]
    assert isinstance(matmul._cpu_multiplies_bf16(), bool)
