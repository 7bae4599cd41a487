"""The C++ against ``minisft.nf4`` to the bit, its products against fp64, and what happens where it cannot be compiled.

The tests of this file run in this process with what this CPU has; ``test_other_instructions`` runs them again, in processes of
their own, with the portable form of the C++ for 8 and for 16 lanes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minisft import effect, lora_fused, matmul, nf4
from minisft.common.errors import UserError
from minisft.kernels import cpu_build, cpu_matmul, cpu_nf4
from minisft.kernels.workspace import borrowed
from minisft.lora import LoRALinear
from minisft.matmul import Linear, dense_weight
from minisft.nf4_linear import NF4Linear

SIZES = st.one_of(st.integers(1, 300), st.integers(4000, 4200), st.just(40_000))
BLOCKS = st.sampled_from(nf4.BLOCK_SIZES)
LEVELS = st.sampled_from(["nf4", "fp4", "int4"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
FEW_FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
THREADS = st.integers(1, 2)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def needs_native() -> None:
    """Skips where there is nothing to compile with; a build that fails is a failure."""
    reason = cpu_build.load().reason
    if reason in ("no C++ compiler found", "MINISFT_NATIVE=0"):
        pytest.skip(f"needs the compiled library: {reason}")
    assert reason == ""
    assert cpu_nf4.path().startswith("native code"), cpu_nf4.path()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaNs and the sign of zero count too."""
    as_bytes = [t.contiguous().view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


# ---- the bits of the reference ---------------------------------------------------------------------------------------


@given(size=SIZES, block_size=BLOCKS, nested=st.booleans(), levels=LEVELS, dtype=DTYPES, count=THREADS, seed=st.integers(0, 99))
@example(size=1, block_size=64, nested=True, levels="nf4", dtype=torch.bfloat16, count=2, seed=0)
@example(size=4097, block_size=4096, nested=False, levels="int4", dtype=torch.float32, count=2, seed=0)
def test_dequantize(size: int, block_size: int, nested: bool, levels: str, dtype: torch.dtype, count: int, seed: int) -> None:
    needs_native()
    q = nf4.quantize(gaussian(size, seed=seed), block_size, nested, levels)
    with threads(count):
        assert same_bits(cpu_nf4.dequantize(q, dtype), nf4.dequantize(q, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_scales_of_every_kind(dtype: torch.dtype) -> None:
    """Rounding to bf16 over all exponents, overflow to infinity, subnormal and negative scales, NaN."""
    needs_native()
    scales = torch.tensor([2.0**k * 1.2345 for k in range(-149, 128)] + [3.4e38, -0.5, -0.0, 0.0, -1e-45, torch.inf, torch.nan])
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales) * 32 // 256 + 1)[: len(scales) * 32]
    shape, table = torch.Size((len(scales) * 64,)), nf4.codebook("int4")
    q = nf4.QuantizedWeight(packed, scales, None, None, table, 64, shape, dtype)
    ours, wanted = cpu_nf4.dequantize(q), nf4.dequantize(q)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert same_bits(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))


@given(size=SIZES, block_size=BLOCKS, nested=st.booleans(), levels=LEVELS, dtype=DTYPES, count=THREADS, seed=st.integers(0, 99))
def test_quantize(size: int, block_size: int, nested: bool, levels: str, dtype: torch.dtype, count: int, seed: int) -> None:
    needs_native()
    weight = gaussian(size, seed=seed, dtype=dtype)
    with threads(count):
        ours, wanted = (f(weight, block_size, nested, levels) for f in (cpu_nf4.quantize, nf4.quantize))
    assert same_bits(ours.packed, wanted.packed)
    assert same_bits(ours.absmax, wanted.absmax)
    assert (ours.shape, ours.dtype, ours.block_size) == (wanted.shape, wanted.dtype, wanted.block_size)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=130))
def test_quantize_any_bit_pattern(patterns: list[int]) -> None:
    """Subnormals, both zeros and the largest numbers; what is not finite is refused in the reference's words."""
    needs_native()
    weight = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    found = [_result_or_words(f, weight) for f in (cpu_nf4.quantize, nf4.quantize)]
    assert found[0] == found[1]


def _result_or_words(quantize: Callable[..., nf4.QuantizedWeight], weight: Tensor) -> tuple[list[int], list[int]] | str:
    try:
        q = quantize(weight, double_quant=False)
    except UserError as error:
        return str(error)
    return q.packed.tolist(), q.absmax.view(torch.int32).tolist()


@pytest.mark.parametrize("levels", ["nf4", "fp4", "int4"])
def test_quantize_on_and_beside_the_midpoints(levels: str) -> None:
    needs_native()
    midpoints, _ = nf4.midpoints_of(nf4.codebook(levels))
    beside = [torch.nextafter(midpoints, torch.full_like(midpoints, side)) for side in (-2.0, 2.0)]
    weight = torch.cat([torch.ones(1), midpoints, *beside])
    ours, wanted = (f(weight, 64, False, levels) for f in (cpu_nf4.quantize, nf4.quantize))
    assert same_bits(ours.packed, wanted.packed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 70, 71])
def test_a_weight_that_is_not_finite_is_named(bad: float, at: int) -> None:
    weight = torch.ones(72)
    weight[at] = bad
    with pytest.raises(UserError, match=rf"layers\.0\[{at}\]"):
        cpu_nf4.quantize(weight, name="layers.0")


def test_more_than_one_slab() -> None:
    needs_native()
    weight = gaussian(2 * nf4.CHUNK + 101, dtype=torch.bfloat16)
    ours, wanted = cpu_nf4.quantize(weight), nf4.quantize(weight)
    assert same_bits(ours.packed, wanted.packed)
    assert same_bits(cpu_nf4.dequantize(ours), nf4.dequantize(wanted))


def test_a_weight_that_is_not_contiguous() -> None:
    needs_native()
    base = gaussian(48, 100)
    for view in (base.T, base[:, 3:90:2], base[1:2].expand(5, 100)):
        ours, wanted = cpu_nf4.quantize(view), nf4.quantize(view)
        assert same_bits(ours.packed, wanted.packed)
        assert same_bits(cpu_nf4.dequantize(ours), nf4.dequantize(wanted))


def test_out_is_filled_or_refused() -> None:
    q = nf4.quantize(gaussian(6, 50))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        out = torch.full((6, 50), torch.nan, dtype=dtype)
        assert cpu_nf4.dequantize(q, dtype, out) is out
        assert same_bits(out, nf4.dequantize(q, dtype))
    for bad in (torch.empty(50, 6), torch.empty(50, 6).T, torch.empty(6, 50, dtype=torch.float64)):
        with pytest.raises(ValueError, match="out must be"):
            cpu_nf4.dequantize(q, torch.float32, bad)


# ---- nothing is read that is not there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda q: replace(q, packed=q.packed[:-1]),
        lambda q: replace(q, packed=q.packed.int()),
        lambda q: replace(q, absmax=q.absmax[:-1]),
        lambda q: replace(q, absmax=q.absmax.float()),
        lambda q: replace(q, absmax2=q.absmax2.double()),
        lambda q: replace(q, absmax2=None),
        lambda q: replace(q, offset=None),
        lambda q: replace(q, levels=q.levels[:8]),
        lambda q: replace(q, block_size=48),
        lambda q: replace(q, packed=q.packed.repeat_interleave(2)[::2]),
        lambda q: replace(q, packed=q.packed.to("meta")),
    ],
)
def test_a_weight_laid_out_otherwise_is_left_to_the_reference(
    change: Callable[[nf4.QuantizedWeight], nf4.QuantizedWeight],
) -> None:
    q = nf4.quantize(gaussian(5, 96))
    assert cpu_nf4.is_plain(q)
    assert not cpu_nf4.is_plain(change(q))
    assert not cpu_matmul.can_use_native(torch.zeros(1, 96), change(q))


# ---- products --------------------------------------------------------------------------------------------------------


def within_bound(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """fp32 sums of k + 1 terms and one rounding to the dtype of y: u |y| + (k + 2) e (|x| |W| + |b|)."""
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    exact = x.double() @ weight.double().T + offset
    absolute = x.double().abs() @ weight.double().abs().T + offset.abs()
    unit, length = ROUNDOFF[y.dtype] if y.dtype != torch.float32 else 0.0, x.shape[-1]
    bound = unit * (1 + 2**-7) * exact.abs() + (length + 2) * 2.0**-24 * absolute * (1 + 2**-7)
    return bool(((y.double() - exact).abs() <= bound).all())


PRODUCTS = {
    "num_rows": st.integers(1, cpu_matmul.MAX_ROWS),
    "groups": st.integers(1, 12),
    "outputs": st.integers(1, 9),
    "dtype": FEW_FLOATS,
    "with_bias": st.booleans(),
    "count": THREADS,
    "seed": st.integers(0, 99),
}


@given(**PRODUCTS, block_size=BLOCKS, nested=st.booleans())
def test_few_rows(
    num_rows: int,
    groups: int,
    outputs: int,
    dtype: torch.dtype,
    with_bias: bool,
    count: int,
    seed: int,
    block_size: int,
    nested: bool,
) -> None:
    """Rows of 16 to 192 weights begin anywhere in a block."""
    needs_native()
    q = nf4.quantize(gaussian(outputs, 16 * groups, seed=seed), block_size, nested)
    x = gaussian(num_rows, 16 * groups, seed=seed + 1, dtype=dtype)
    bias = gaussian(outputs, seed=seed + 2, dtype=dtype) if with_bias else None
    assert cpu_matmul.can_use_native(x, q)
    with threads(count):
        y, last = cpu_matmul.native_matmul(x, q, bias), cpu_matmul.native_matmul(x[-1:], q, bias)
    assert (y.dtype, y.shape) == (dtype, (num_rows, outputs))
    assert within_bound(y, x, nf4.dequantize(q, torch.float64), bias)
    assert torch.equal(y[-1:], last), "a row has other bits by itself"


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@given(**PRODUCTS)
def test_few_rows_with_a_dense_weight(
    weight_dtype: torch.dtype,
    num_rows: int,
    groups: int,
    outputs: int,
    dtype: torch.dtype,
    with_bias: bool,
    count: int,
    seed: int,
) -> None:
    needs_native()
    weight = gaussian(outputs, 16 * groups, seed=seed, dtype=weight_dtype)
    x = gaussian(num_rows, 16 * groups, seed=seed + 1, dtype=dtype)
    bias = gaussian(outputs, seed=seed + 2, dtype=dtype) if with_bias else None
    with threads(count):
        y = cpu_matmul.native_matmul(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (num_rows, outputs))
    assert within_bound(y, x, weight, bias)


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (1, 1, 48)])
def test_products_keep_the_batch_shape(shape: tuple[int, ...]) -> None:
    needs_native()
    q, weight = nf4.quantize(gaussian(5, 48)), gaussian(5, 48, dtype=torch.bfloat16)
    x = gaussian(*shape, seed=3)
    assert cpu_matmul.native_matmul(x, q).shape == cpu_matmul.native_matmul(x, weight).shape == (*shape[:-1], 5)
    assert within_bound(cpu_matmul.native_matmul(x, q), x, nf4.dequantize(q), None)


def test_an_input_that_is_not_contiguous() -> None:
    needs_native()
    q, base = nf4.quantize(gaussian(7, 32)), gaussian(32, 64, seed=1)
    for x in (base[:, :5].T, base[:4, ::2], base[:1, :32].expand(6, 32), base[:3, 1:33]):
        assert torch.equal(
            cpu_matmul.native_matmul(x, q), cpu_matmul.native_matmul(x.clone(memory_format=torch.contiguous_format), q)
        )


def test_what_is_not_served() -> None:
    q, odd = nf4.quantize(gaussian(4, 32)), nf4.quantize(gaussian(4, 24))
    refused = [
        (torch.zeros(1, 32, dtype=torch.float64), q),
        (torch.zeros(cpu_matmul.MAX_ROWS + 1, 32), q),
        (torch.zeros(0, 32), q),
        (torch.zeros(2, 16), q),
        (torch.zeros(1, 32, device="meta"), q),
        (torch.zeros(1, 24), odd),
    ]
    for x, weight in refused:
        assert not cpu_matmul.can_use_native(x, weight)


@pytest.mark.parametrize("weight", ["fp32", "bf16", "nf4", "none"])
@pytest.mark.parametrize("rank", [1, 7, 8, 16, 19])
@pytest.mark.parametrize(("count", "width"), [(1, 48), (3, 48), (8, 48), (9, 48), (16, 48), (16, 1024)])
def test_an_update_is_added_to_a_product_or_in_place(weight: str, rank: int, count: int, width: int) -> None:
    """And x A^T is left behind. The product without it is the same one. The widest are done by several threads."""
    needs_native()
    y, rows, lora_A, lora_B, W = (
        gaussian(*shape, seed=seed)
        for seed, shape in enumerate(((count, 21), (count, width), (rank, width), (21, rank), (21, width)))
    )
    assert cpu_matmul.can_use_native(rows, None, (lora_A, lora_B))
    down = rows.double() @ lora_A.double().T
    added = 1.5 * down @ lora_B.double().T
    update = cpu_matmul.Update(lora_A, lora_B, 1.5, torch.empty(count, rank))
    nothing = update._replace(lora_B=torch.zeros_like(lora_B), down=torch.empty(count, rank))
    stored = {"nf4": nf4.quantize, "bf16": Tensor.bfloat16}.get(weight, lambda W: W)(W)
    with threads(2):
        if weight == "none":
            before, after = y.clone(), cpu_matmul.add_update_(y, rows, update)
            assert after is y
            zero = cpu_matmul.add_update_(before.clone(), rows, nothing)
            base, sizes = before.double(), before.double().abs()
        else:
            before, after, zero = (cpu_matmul.native_matmul(rows, stored, None, u) for u in (None, update, nothing))
            W = (nf4.dequantize(stored) if weight == "nf4" else stored).double().T
            base, sizes = rows.double() @ W, rows.double().abs() @ W.abs()
    assert torch.equal(zero, before), "a zero update leaves every bit"
    # Sums of width and of rank products in fp32, the factor, and both together in one sum.
    unit = 2.0**-24
    off_down = (width + 2) * unit * (rows.double().abs() @ lora_A.double().abs().T)
    sizes += 1.5 * down.abs() @ lora_B.double().abs().T
    off = 1.5 * off_down @ lora_B.double().abs().T + (width + rank + 3) * unit * sizes
    assert ((update.down.double() - down).abs() <= off_down).all()
    assert ((after.double() - base - added).abs() <= 1.01 * off).all()


@pytest.mark.parametrize("weight", ["bf16", "nf4"])
@pytest.mark.parametrize("fast_bf16", [False, True])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_an_adapter_on_few_bf16_rows_is_one_call(
    weight: str, fast_bf16: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any CPU; with bf16 instructions a thin product of a few rows takes ten times as long as in fp32. Rounded once."""
    needs_native()
    monkeypatch.setattr(matmul, "_cpu_multiplies_bf16", lambda: fast_bf16)
    monkeypatch.setattr(cpu_matmul, "MIN_DENSE_SIZE", 64)
    W, A, B = gaussian(48, 64), gaussian(3, 64, seed=1), gaussian(48, 3, seed=2)
    x, upstream = gaussian(count, 64, seed=3).bfloat16().requires_grad_(), gaussian(count, 48, seed=4).bfloat16()
    base: nn.Linear | NF4Linear
    if weight == "nf4":
        base = NF4Linear(nf4.quantize(W))
        W = nf4.dequantize(base.quantized)
    else:
        base = matmul.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        base.weight.copy_(W)
        W = base.weight
    factors = [A.requires_grad_(), B.requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in (x, *factors)]
    expected = exact[0] @ W.double().T + 0.5 * exact[0] @ exact[1].T @ exact[2].T
    calls = []
    native_matmul = cpu_matmul.native_matmul
    monkeypatch.setattr(matmul, "native_matmul", lambda *arguments: calls.append(arguments) or native_matmul(*arguments))
    (y,) = lora_fused.adapted_linears(x, [lora_fused.Adapted(base, *factors, 0.5)])
    assert len(calls) == 1
    assert float(((y.detach() - expected.detach()).abs() / expected.detach().abs().clamp(min=1.0)).max()) <= 2.0**-8 + 1e-5
    gradients = torch.autograd.grad(y, (x, *factors), upstream)
    for found, exact_grad in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert float((found - exact_grad).abs().max()) <= 0.02 * float(exact_grad.abs().max())


def test_which_updates_are_served() -> None:
    needs_native()
    rows, lora_A, lora_B = torch.zeros(2, 32), torch.zeros(4, 32), torch.zeros(5, 4)
    assert cpu_matmul.can_use_native(rows, None, (lora_A, lora_B))
    refused = [
        (torch.zeros(0, 32), lora_A, lora_B),
        (torch.zeros(()), lora_A, lora_B),
        (torch.zeros(17, 32), lora_A, lora_B),
        (torch.zeros(2, 24), torch.zeros(4, 24), lora_B),  # a width that is no multiple of 16
        (rows.double(), lora_A, lora_B),
        (torch.zeros(2, 16), lora_A, lora_B),
        (rows, lora_A, torch.zeros(5, 3)),
        (rows, torch.zeros(32, 4).T, lora_B),
        (rows, lora_A, lora_B.double()),
        (rows, lora_A, torch.zeros(5, 4, device="meta")),
    ]
    with FakeTensorMode():
        refused.append((torch.zeros(2, 32), torch.zeros(4, 32), torch.zeros(5, 4)))
    assert not any(cpu_matmul.can_use_native(x, None, factors) for x, *factors in refused)


def test_which_dense_products_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    monkeypatch.setattr(cpu_matmul, "MIN_DENSE_SIZE", 64)
    for dtype, most in ((torch.float32, 8), (torch.bfloat16, 16)):
        weight = torch.zeros(4, 32, dtype=dtype)
        assert cpu_matmul.can_use_native(torch.zeros(1, 32), weight)
        assert cpu_matmul.can_use_native(torch.zeros(1, most, 32, dtype=dtype), weight)
        refused = [
            (torch.zeros(0, 32), weight),
            (torch.zeros(()), weight),
            (torch.zeros(most + 1, 32), weight),
            (torch.zeros(2, 32, dtype=torch.float64), weight),
            (torch.zeros(2, 32, dtype=torch.float16), weight),
            (torch.zeros(2, 32), weight.double()),
            (torch.zeros(2, 32), torch.zeros(32, 4, dtype=dtype).T),
            (torch.zeros(2, 24), torch.zeros(4, 24, dtype=dtype)),
            (torch.zeros(2, 32), torch.zeros(1, 32, dtype=dtype)),  # too small to be worth a call
            (torch.zeros(2, 32, device="meta"), weight),
        ]
        with FakeTensorMode(allow_non_fake_inputs=True):
            refused += [(torch.zeros(2, 32), weight), (torch.zeros(2, 32), torch.zeros(4, 32, dtype=dtype))]
        assert not any(cpu_matmul.can_use_native(x, w) for x, w in refused)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_one_answer_with_and_without_gradients(
    weight_dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served or not depends on shapes alone; a fresh adapter then changes no bit, and the gradient is the dense one."""
    needs_native()
    monkeypatch.setattr(cpu_matmul, "MIN_DENSE_SIZE", 64)
    layer = Linear(32, 6, bias=bias).to(weight_dtype).requires_grad_(False)
    x = gaussian(3, 32, dtype=weight_dtype)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(layer(x.clone().requires_grad_()), y)
    assert torch.equal(LoRALinear(layer, rank=2, alpha=3.0)(x), y)
    assert within_bound(y, x, layer.weight, layer.bias)
    asking = x.clone().requires_grad_()
    layer(asking).sum().backward()
    assert torch.allclose(asking.grad.double(), layer.weight.double().sum(0).expand(3, -1), rtol=2e-2)


# ---- what became of an update ----------------------------------------------------------------------------------------


@given(
    size=st.one_of(st.integers(0, 40), st.integers(4000, 4100)),
    scale=st.sampled_from([1e-25, 1.0, 1e12]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    begin=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_effect_sums(size: int, scale: float, dtype: torch.dtype, begin: int, seed: int) -> None:
    """Against exact sums of the definitions; the numbers need not begin at a vector's boundary."""
    needs_native()
    base, delta, noise = scale * gaussian(3, begin + size, seed=seed)[:, begin:]
    delta = torch.where(noise > 0, 1e-3 * delta, 0.0)
    stored = (base + delta).to(dtype).float()
    found = cpu_nf4.effect_sums(base, delta, stored)
    assert found is not None
    w, d, after = (t.double().tolist() for t in (base, delta, stored))
    change = [a - b for a, b in zip(after, w, strict=True)]
    pairs = list(zip(change, d, strict=True))
    expected = {
        "base": math.fsum(x * x for x in w),
        "delta": math.fsum(x * x for x in d),
        "error": math.fsum((e - x) ** 2 for e, x in pairs),
        "dot": math.fsum(e * x for e, x in pairs),
        "num_nonzero": sum(x != 0 for x in d),
        "num_changed": sum(x != 0 and e != 0 for e, x in pairs),
    }
    sums = {name: getattr(found, name) for name in expected}
    magnitude = math.fsum(abs(e * x) for e, x in pairs)
    assert sums.pop("dot") == pytest.approx(expected.pop("dot"), rel=0, abs=(size + 3) * 2.0**-52 * magnitude)
    assert sums == pytest.approx(expected, rel=(size + 3) * 2.0**-52, abs=0)


def test_effect_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same report, by PyTorch; squares of such numbers are zero in fp32."""
    needs_native()
    base, delta = 1e-25 * gaussian(2, 500)
    piece = (base, delta, (base + delta).bfloat16())
    reports = []
    for function in (cpu_nf4.effect_sums, lambda *_: None):
        monkeypatch.setattr(effect, "effect_sums", function)
        measure = effect.Effect()
        measure.add(*piece)
        reports.append(dataclasses.astuple(measure.report("a"))[1:])
    assert reports[0] == pytest.approx(reports[1], rel=1e-12)
    assert 0 < reports[0][2] < 0.01


@pytest.mark.parametrize(
    "change", [Tensor.double, Tensor.bfloat16, lambda t: t.repeat_interleave(2)[::2], lambda t: t.to("meta")]
)
def test_effect_of_other_tensors_is_left_to_the_reference(change: Callable[[Tensor], Tensor]) -> None:
    needs_native()
    plain = [gaussian(64, seed=seed) for seed in range(3)]
    assert cpu_nf4.effect_sums(*plain) is not None
    for index in range(3):
        assert cpu_nf4.effect_sums(*(change(t) if i == index else t for i, t in enumerate(plain))) is None


# ---- the buffer ------------------------------------------------------------------------------------------------------


def test_all_weights_of_a_thread_are_decoded_into_one_buffer() -> None:
    needs_native()
    large, small = nf4.quantize(gaussian(64, 96)), nf4.quantize(gaussian(8, 96, seed=1))
    with dense_weight(large, torch.float32) as first:
        address = first.data_ptr()
        assert same_bits(first, nf4.dequantize(large, torch.float32))
    with dense_weight(small, torch.float32) as second:
        assert second.data_ptr() == address
        assert same_bits(second, nf4.dequantize(small, torch.float32))


def test_each_thread_has_a_buffer_of_its_own() -> None:
    needs_native()
    q, other = nf4.quantize(gaussian(8, 96)), nf4.quantize(gaussian(8, 96, seed=1))

    def decode() -> None:
        with dense_weight(other, torch.bfloat16):
            pass

    with dense_weight(q, torch.bfloat16) as ours:
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
        assert same_bits(ours, nf4.dequantize(q, torch.bfloat16))


def test_a_buffer_is_on_the_device_that_was_asked_for() -> None:
    for name in ("cpu", "meta", "cpu"):  # of the devices that are neither a CPU nor CUDA, all have meta
        with borrowed((3, 2), torch.float32, torch.device(name)) as buffer:
            assert (buffer.device.type, *buffer.shape) == (name, 3, 2)


# ---- compiling, loading, refusing ------------------------------------------------------------------------------------


def load_anew() -> cpu_build.Native:
    return cpu_build.load.__wrapped__()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the library in it."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISFT_CACHE", str(folder))
        if (reason := load_anew().reason) == "no C++ compiler found":
            pytest.skip(f"needs the compiled library: {reason}")
        assert reason == ""
    return folder


@pytest.fixture
def cache(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which the code under test uses."""
    folder = tmp_path / "cache"
    shutil.copytree(compiled, folder)
    monkeypatch.setenv("MINISFT_CACHE", str(folder))
    return folder


@pytest.fixture
def built(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What gets compiled from here on; the compiler is replaced by a copy of its result, which takes no time."""
    made: list[Path] = []

    def build(_: list[str], path: Path) -> str:
        made.append(path)
        shutil.copy2(library_in(compiled), path)
        return ""

    monkeypatch.setattr(cpu_build, "_build", build)
    return made


def library_in(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_one_openmp_runtime() -> None:
    needs_native()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    mapped = {path for path in mapped if "scikit_learn.libs" not in path}  # an oracle of other tests brings one of its own
    assert len([path for path in mapped if re.search(r"/lib(gomp|omp|iomp5)[-.]", path)]) == 1


@pytest.mark.slow
def test_a_compiled_library_is_reused(cache: Path, built: list[Path]) -> None:
    assert load_anew().handle is not None
    assert built == []
    assert (library_in(cache).stat().st_mode & 0o777, cache.stat().st_mode & 0o022) == (0o700, 0)


@pytest.mark.slow
@pytest.mark.parametrize("is_terminal", [True, False])
def test_on_a_terminal_a_line_says_that_it_compiles(
    is_terminal: bool, cache: Path, built: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert load_anew().handle is not None
    assert capsys.readouterr().err == ""
    library_in(cache).unlink()
    assert load_anew().handle is not None
    assert len(built) == 1
    said = capsys.readouterr().err
    assert said.startswith("compiling minisft's C++") if is_terminal else said == ""


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_a_library_that_was_cut_short_is_compiled_again(cache: Path, built: list[Path], keep: int) -> None:
    path = library_in(cache)
    path.write_bytes(path.read_bytes()[:keep])
    assert load_anew().handle is not None
    assert built == [path]


@pytest.mark.slow
def test_a_whole_file_that_is_no_library_is_compiled_again(cache: Path, built: list[Path]) -> None:
    text, path = b"not a shared object", library_in(cache)
    path.write_bytes(text + hashlib.sha256(text).digest())
    assert load_anew().handle is not None
    assert built == [path]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("SOURCES", None), ("_cpu_features", lambda: "other"), ("LINK", ["-lc"])])
def test_another_source_cpu_or_command_is_another_file(
    name: str, value: object, cache: Path, built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "SOURCES":
        value = [tmp_path / "nf4.cpp"]
        value[0].write_text("int main() {}")
    monkeypatch.setattr(cpu_build, name, value)
    assert load_anew().handle is not None
    assert len(built) == 1
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_two_at_once_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    """The compiler is one that waits until both have called it, each for a folder of its own, and copies the library."""
    made = tmp_path / "made.so"
    made.write_bytes(library_in(compiled).read_bytes()[: -cpu_build.DIGEST_BYTES])
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"""#!/bin/sh
test "$1" = --version && exit
for last; do :; done
touch {tmp_path}/called.$(basename $(dirname "$last"))
tries=0
while [ $(ls {tmp_path} | grep -c called) -lt 2 ] && [ $tries -lt 1000 ]; do tries=$((tries + 1)); sleep 0.02; done
cp {made} "$last"
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "new" / "folder"))
    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(load_anew) for _ in range(2)]]
    assert [native.reason for native in found] == ["", ""]
    assert library_in(tmp_path / "new" / "folder").read_bytes() == library_in(compiled).read_bytes()
    assert len(list(tmp_path.glob("called.*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_to_is_refused(cache: Path, mode: int) -> None:
    path = library_in(cache)
    path.chmod(mode)
    assert load_anew() == (None, f"{path} is not a file that only this user can write to")
    path.chmod(0o700)
    cache.chmod(0o1000 | mode)
    assert load_anew() == (None, f"{cache} is not a folder that only this user can write to")


@pytest.mark.slow
def test_what_others_own_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert load_anew() == (None, f"{cache} is not a folder that only this user can write to")


@pytest.mark.slow
def test_a_link_is_refused(cache: Path, tmp_path: Path) -> None:
    path = library_in(cache)
    path.replace(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert load_anew() == (None, f"{path} is not a file that only this user can write to")


COMPILERS = {
    "fails": ("#!/bin/sh\nexit 3\n", "failed with status 3"),
    "silent": ("#!/bin/sh\nexit 0\n", "failed with status 0"),
    "garbage": ('#!/bin/sh\ntest "$1" = --version && exit\nfor last; do :; done\necho garbage > "$last"\n', "does not load"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_a_broken_compiler_is_a_reason_and_no_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, reason = COMPILERS[kind]
    compiler = tmp_path / "compiler"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    library, found = load_anew()
    assert library is None
    assert reason in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MINISFT_NATIVE", "0", "MINISFT_NATIVE=0"),
        ("CXX", "/nowhere/c++", "No such file"),
        ("CXX", "g++ 'open", "No closing quotation"),
        ("MINISFT_CACHE", "/dev/null/cache", "Not a directory"),
        ("MINISFT_CACHE", "/proc/cache", "No such file"),
    ],
)
def test_other_reasons(name: str, value: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    library, found = load_anew()
    assert library is None
    assert reason in found


@pytest.mark.slow
def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert load_anew() == (None, "no C++ compiler found")


def test_a_library_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler had been told to be fast and loose: here the functions do nothing at all."""
    names = ("nf4_quantize", "nf4_dequantize_float32", "nf4_dequantize_bfloat16")
    library = SimpleNamespace(**{name: lambda *_: None for name in names}, nf4_instructions=SimpleNamespace())
    monkeypatch.setattr(cpu_build, "load", lambda: cpu_build.Native(library, ""))
    monkeypatch.setattr(cpu_nf4, "_gives_our_bits", cpu_nf4._gives_our_bits.__wrapped__)
    assert cpu_nf4.path() == "PyTorch (the compiled code gave wrong bits)"
    q = cpu_nf4.quantize(gaussian(100))
    assert same_bits(cpu_nf4.dequantize(q), nf4.dequantize(nf4.quantize(gaussian(100))))
    assert not cpu_matmul.can_use_native(torch.zeros(1, 32), nf4.quantize(gaussian(4, 32)))


WITHOUT = """
import torch
from minisft import nf4
from minisft.kernels import cpu_nf4
from minisft.nf4_linear import NF4Linear
torch.manual_seed(0)
layer = NF4Linear.from_linear(torch.nn.Linear(64, 32))
x = torch.randn(3, 64, requires_grad=True)
layer(x).sum().backward()
dense = nf4.dequantize(layer.quantized)
assert torch.equal(cpu_nf4.dequantize(layer.quantized), dense) and torch.equal(x.grad, torch.ones(3, 32) @ dense)
assert torch.equal(layer(x), torch.nn.functional.linear(x, dense, layer.bias))
print(cpu_nf4.path())
"""


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MINISFT_NATIVE", "0", "PyTorch (MINISFT_NATIVE=0)"),
        ("CXX", "/nowhere/c++", "PyTorch ([Errno 2] No such file or directory: '/nowhere/c++')"),
    ],
)
@pytest.mark.slow
def test_without_it_everything_works_and_says_so(name: str, value: str, said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MINISFT_CACHE": str(tmp_path), name: value}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.stdout.strip(), run.returncode) == (said, 0), run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", ["-DNF4_PORTABLE", pytest.param("-DNF4_PORTABLE -DLANES=16", marks=pytest.mark.exhaustive)])
def test_other_instructions(options: str, tmp_path: Path) -> None:
    needs_native()
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "CXX": f"{compiler} {options}", "MINISFT_CACHE": str(tmp_path)}
    chosen = "(quantize or few_rows or slab or contiguous or effect) and not other_instructions"
    command = [sys.executable, "-m", "pytest", __file__, "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 12, run.stdout[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]
    said = subprocess.run(
        [sys.executable, "-c", "from minisft.kernels import cpu_nf4; print(cpu_nf4.path())"],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "native code (portable)"
