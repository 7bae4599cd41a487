"""What backward of adapters needs beside G W, in C++: as exact as fp32 sums are, for any sizes, layers and threads."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_cpu_nf4 import needs_native, threads
from torch import Tensor

from minisft import lora_fused
from minisft.kernels import cpu_adapter, cpu_nf4
from minisft.kernels.cpu_adapter import adapter_gradients, can_use_native
from minisft.lora import LoRALinear
from minisft.matmul import Linear

U = 2.0**-24


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# A block has 48 rows or 24, a piece 64 columns or 32, a vector 16 numbers or 8.
SIZES = [
    (1, 1, [(1, 1)]), (23, 7, [(9, 3)]), (24, 64, [(16, 8)]), (48, 128, [(64, 16)]), (49, 130, [(129, 5), (40, 16)]),
    (96, 65, [(256, 9), (3, 1), (200, 17)]), (97, 200, [(300, 40)]), (331, 72, [(72, 16), (24, 16), (24, 16)]),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "layers"), SIZES)
def test_thin_products_against_fp64(rows: int, columns: int, layers: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Sums of K products in fp32, in any order: off by at most K + 2 roundings of all terms' sizes, and those of H in A's."""
    needs_native()
    x = normal(rows, columns, dtype=dtype)
    grads = [normal(rows, out, seed=i + 1, dtype=dtype) for i, (out, _) in enumerate(layers)]
    Bs = [normal(out, rank, seed=i + 11) for i, (out, rank) in enumerate(layers)]
    lows = [normal(rows, rank, seed=i + 21) for i, (_, rank) in enumerate(layers)]
    scalings = [0.5 + i for i in range(len(layers))]
    for count in (1, 2, 3):
        with threads(count):
            joined, found = adapter_gradients(x, grads, Bs, lows, scalings)
        Hs = joined.split([rank for _, rank in layers], 1)
        for H, (grad_A, grad_B), g, B, low, s in zip(Hs, found, grads, Bs, lows, scalings, strict=True):
            G, X, B64, low64 = g.double(), x.double(), B.double(), low.double()
            exact, size = s * G @ B64, s * G.abs() @ B64.abs()
            assert [t.shape for t in (H, grad_A, grad_B)] == [low.shape, (B.shape[1], columns), B.shape]
            assert ((H - exact).abs() <= (g.shape[1] + 2) * U * size).all()
            assert ((grad_A - exact.T @ X).abs() <= (g.shape[1] + rows + 4) * U * (size.T @ X.abs())).all()
            assert ((grad_B - s * G.T @ low64).abs() <= (rows + 2) * U * s * (G.abs().T @ low64.abs())).all()


def test_thin_products_of_an_infinite_row_reach_no_other_block() -> None:
    """What a block leaves in a thread's memory is not multiplied by the zeros of a shorter one that comes next."""
    needs_native()
    x, grad, B, low = normal(50, 32), normal(50, 32, seed=1), normal(32, 4, seed=2), normal(50, 4, seed=3)
    low[47, 0], grad[47] = torch.inf, 0.0
    grad[47, 5] = 1.0
    with threads(1):
        _, ((_, grad_B),) = adapter_gradients(x, [grad], [B], [low], [1.0])
    assert torch.isinf(grad_B[5, 0])  # not NaN
    assert torch.isfinite(grad_B[:, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thin_products_of_large_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one x ask for the C++ from 128 rows on, and their gradients are those of PyTorch's products."""
    needs_native()
    monkeypatch.setattr(cpu_nf4, "instructions", lambda: "AVX2")
    layers = [
        LoRALinear(Linear(64, out, bias=False, dtype=dtype).requires_grad_(False), rank, 16.0)
        for out, rank in ((96, 8), (32, 16))
    ]
    for i, layer in enumerate(layers):
        layer.lora_B.data.copy_(normal(*layer.lora_B.shape, seed=i + 1))
    x = normal(128, 64, seed=3, dtype=dtype).requires_grad_()
    upstream = [normal(128, out, seed=out, dtype=dtype) for out in (96, 32)]
    wanted = [x, *(factor for layer in layers for factor in layer.factors())]
    assert layers[0].together is not None
    with mock.patch.object(lora_fused, "adapter_gradients", wraps=adapter_gradients) as native:
        found = torch.autograd.grad(layers[0].together(x, layers), wanted, upstream)
        assert native.call_count == 1
        monkeypatch.setattr(cpu_adapter, "MIN_ROWS", 129)
        others = torch.autograd.grad([layer(x) for layer in layers], wanted, upstream)
        assert native.call_count == 1
    for tensor, a, b in zip(wanted, found, others, strict=True):
        assert (a.shape, a.dtype) == (tensor.shape, tensor.dtype)
        assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_which_tensors_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    monkeypatch.setattr(cpu_nf4, "instructions", lambda: "AVX2")
    x, grad, B = normal(128, 32), normal(128, 48), normal(48, 16)
    assert can_use_native(x, [grad, grad], [B, B])
    assert can_use_native(x.bfloat16(), [grad.bfloat16()], [B])
    refused = [
        (x[:127], [grad[:127]], [B]), (x.double(), [grad.double()], [B]), (x.half(), [grad.half()], [B]),
        (x, [grad.bfloat16()], [B]), (x, [grad], [B.bfloat16()]), (x, [grad], [normal(48, 12)]),
        (x, [grad], [normal(16, 48).T]),
        (x, [normal(48, 128).T], [B]), (normal(32, 128).T, [grad], [B]), (x, [grad, grad.bfloat16()], [B, B]),
    ]  # fmt: skip
    assert not any(can_use_native(*arguments) for arguments in refused)
    monkeypatch.setattr(cpu_nf4, "instructions", lambda: "portable")
    assert not can_use_native(x, [grad], [B])
    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    assert not can_use_native(x, [grad], [B])
