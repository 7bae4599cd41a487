"""Norms, SwiGLU and RoPE in one pass: fp32 and bf16 against fp64, within bounds from their roundings.

``e`` is half the distance from 1 to the next fp32 number. A sum of k terms is off by at most k e of the sum of their sizes, in
whatever order it is taken; each other operation adds one e, and e^x at most 4. In bf16 each number is computed in fp32 and
rounded to bf16 at most twice, where PyTorch's operators would store it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_nf4 import needs_native, threads
from tiny import randn
from torch import Tensor

from minisft import elementwise
from minisft.elementwise import rms_norm, rotate, swiglu
from minisft.kernels import cpu_elementwise, cpu_nf4

e = 2.0**-24
STORED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # of a number that is rounded where it is stored; fp32: in e already
DTYPES = st.sampled_from(list(STORED))
COUNTS = st.integers(1, 2)
ROWS = st.integers(1, 7)
SEEDS = st.integers(0, 99)


@pytest.fixture(autouse=True, scope="module")
def small_tensors_too():
    needs_native()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_elementwise, "MIN_NUMBERS", 1)
        yield


def fp32(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float32)


def drawn(dtype: torch.dtype, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [fp32(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]


def gradients(y: Tensor, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def assert_within(found: Tensor, exact: Tensor, sizes: Tensor, roundings: float, stored: int = 1) -> None:
    """``sizes``: of the terms; ``roundings`` in fp32, ``stored`` in the dtype of ``found``."""
    bound = (roundings * e + stored * STORED[found.dtype]) * sizes
    assert bool(((found.double() - exact).abs() <= bound * (1 + 2**-7) + 1e-37).all())


@given(ROWS, st.integers(1, 70), DTYPES, st.booleans(), COUNTS, SEEDS)
def test_rms_norm(rows: int, size: int, dtype: torch.dtype, trained: bool, count: int, seed: int) -> None:
    x, weight, upstream = drawn(dtype, seed, (rows, size), (size,), (rows, size))
    inputs = [x.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    with threads(count):
        y, grad_x, *_ = gradients(rms_norm(x, weight, 1e-5), upstream, *inputs)
    x, w, g = x.detach().double(), weight.detach().double(), upstream.double()
    r = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_within(y, w * x * r, (w * x * r).abs(), size / 2 + 8, stored=2)
    n, gw = x * r, g * w
    exact = r * (gw - n * (gw * n).mean(-1, keepdim=True))
    # rstd, which is off by (size / 2 + 4) e, comes three times, and there is one more sum
    assert_within(grad_x, exact, r * (gw.abs() + n.abs() * (gw * n).abs().mean(-1, keepdim=True)), 2.5 * size + 24)


@given(ROWS, st.integers(1, 70), DTYPES, st.sampled_from([1.0, 20.0]), COUNTS, SEEDS)
def test_swiglu(rows: int, size: int, dtype: torch.dtype, scale: float, count: int, seed: int) -> None:
    gate, up, upstream = drawn(dtype, seed, *[(rows, size)] * 3)
    gate *= scale
    with threads(count):
        y, grad_gate, grad_up = gradients(swiglu(gate.requires_grad_(), up.requires_grad_()), upstream, gate, up)
    g, u, d = gate.detach().double(), up.detach().double(), upstream.double()
    s = torch.sigmoid(g)
    assert_within(y, g * s * u, (g * s * u).abs(), 9, stored=2)
    assert_within(grad_up, d * g * s, (d * g * s).abs(), 9, stored=2)
    assert_within(grad_gate, d * u * (s + g * s * (1 - s)), (d * u).abs() * (s + (g * s).abs()), 14, stored=2)


@pytest.mark.parametrize("dtype", STORED)
def test_swiglu_of_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e38, -200.0, -89.0, -0.0, 0.0, 89.0, 3e38, float("nan")], dtype=dtype).requires_grad_()
    up = torch.ones(8, dtype=dtype)
    y, grad = gradients(swiglu(gate, up), up, gate)
    assert y[1:3].abs().max() <= 2e-36  # e^-89 and less: the exponent ends at 88
    assert (y[3:5].tolist(), y[5:7].tolist()) == ([0.0, 0.0], gate[5:7].tolist())
    assert grad[3:7].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert y[7].isnan()
    assert grad[7].isnan()
    assert torch.isfinite(y[:7]).all()


@given(ROWS, st.integers(1, 3), st.integers(1, 40), DTYPES, COUNTS, SEEDS)
def test_rotate(rows: int, heads: int, half: int, dtype: torch.dtype, count: int, seed: int) -> None:
    x, angle, upstream = drawn(dtype, seed, (rows, heads, 2 * half), (rows, 1, half), (rows, heads, 2 * half))
    cos, sin = angle.cos(), angle.sin()
    with threads(count):
        y, grad = gradients(rotate(x.requires_grad_(), cos, sin), upstream, x)
    for found, v, turn in ((y, x.detach().double(), 1), (grad, upstream.double(), -1)):
        a, b = v.chunk(2, -1)
        c, s = cos.double(), sin.double() * turn
        exact, sizes = (
            torch.cat((a * c - b * s, b * c + a * s), -1),
            torch.cat(((a * c).abs() + (b * s).abs(), (b * c).abs() + (a * s).abs()), -1),
        )
        assert_within(found, exact, sizes, 2, stored=2)


def test_bf16_is_rounded_where_pytorchs_operators_store_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bit but a few where e^x or a sum lies beside the middle of two numbers; one rounding less moves a fifth of them."""
    x, gate, up, angle, weight = drawn(torch.bfloat16, 0, (64, 3, 64), (64, 192), (64, 192), (64, 1, 32), (192,))
    functions = {
        "rms_norm": (lambda gate: rms_norm(gate, weight, 1e-5), [gate]),
        "swiglu": (swiglu, [gate, up]),
        "rotate": (lambda x: rotate(x, angle.cos(), angle.sin()), [x]),
    }
    for name, (function, inputs) in functions.items():
        found = []
        for least in (1, 2**62):
            monkeypatch.setattr(cpu_elementwise, "MIN_NUMBERS", least)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            y = function(*leaves)
            found.append(gradients(y, torch.linspace(-2, 2, y.numel()).view(y.shape).bfloat16(), *leaves))
        for ours, theirs in zip(*found, strict=True):
            assert float((ours != theirs).float().mean()) <= (0.0 if name == "rotate" else 0.001), name


@pytest.mark.parametrize("dtype", STORED)
def test_bits_depend_on_neither_threads_nor_other_rows(dtype: torch.dtype) -> None:
    x, gate, weight = drawn(dtype, 0, (700, 36), (700, 36), (36,))
    functions = {
        "rms_norm": lambda rows: rms_norm(x[rows], weight, 1e-5),
        "swiglu": lambda rows: swiglu(gate[rows], x[rows]),
    }
    for name, function in functions.items():
        with threads(1):
            whole = function(slice(None))
            assert all(torch.equal(function(slice(i, i + 1))[0], whole[i]) for i in (0, 1, 699)), name
        with threads(2):
            assert torch.equal(function(slice(None)), whole), name


@pytest.mark.parametrize("which", ["fp16", "fp64", "two dtypes", "gaps", "small", "no library"])
def test_what_is_left_to_pytorch(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_elementwise, "_call", lambda *_: pytest.fail("the C++ was called"))
    x = fp32(6, 40, seed=0)
    x = {"fp16": x.half(), "fp64": x.double(), "two dtypes": x.bfloat16(), "gaps": x[:, ::2]}.get(which, x)
    if which == "small":
        monkeypatch.setattr(cpu_elementwise, "MIN_NUMBERS", x.numel() + 1)
    if which == "no library":
        monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    weight = torch.ones(x.shape[1], dtype=torch.float32 if which == "two dtypes" else x.dtype)
    found = [rms_norm(x, weight, 1e-5), swiglu(x, x.to(weight.dtype))]
    exact = x.double()
    expected = [exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt(), exact * exact * exact.sigmoid()]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < {"two dtypes": 0.02, "fp16": 0.002}.get(which, 1e-6)


def test_a_number_less_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = cpu_elementwise._call
    monkeypatch.setattr(cpu_elementwise, "_call", lambda name, *arguments: called.append(name) or call(name, *arguments))
    monkeypatch.setattr(cpu_elementwise, "MIN_NUMBERS", 80)
    swiglu(fp32(79, seed=0), fp32(79, seed=1))
    assert called == []
    swiglu(fp32(80, seed=0), fp32(80, seed=1))
    swiglu(*drawn(torch.bfloat16, 0, (80,), (80,)))
    assert called == ["swiglu", "swiglu"]


def test_sizes_that_do_not_fit_are_pytorchs_to_refuse() -> None:
    x = fp32(6, 4, 8, seed=0)
    for function in (
        lambda: rms_norm(x, torch.ones(7), 1e-5),
        lambda: swiglu(x, x[:, :3]),
        lambda: rotate(x, torch.ones(5, 1, 4), torch.ones(5, 1, 4)),
    ):
        with pytest.raises(RuntimeError, match=r"size|shape"):
            function()


def test_a_gradient_with_gaps_is_the_same() -> None:
    gate, up = fp32(8, 12, seed=0).requires_grad_(), fp32(8, 12, seed=1).requires_grad_()
    upstream = fp32(12, 8, seed=2).T
    for function in (swiglu, lambda x, _: rms_norm(x, torch.ones(12), 1e-5)):
        y = function(gate, up)
        ours = torch.autograd.grad(y, gate, upstream, retain_graph=True)[0]
        packed = torch.autograd.grad(y, gate, upstream.contiguous())[0]
        assert float((ours - packed).abs().max()) <= 16 * e * float(packed.abs().max())
    assert elementwise.can_use_native(gate.detach())
