"""What theory says of LoRA beside full fine-tuning, each law on the library's own adapters and optimizer, in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from minisft.batching import micro_batches
from minisft.config import LoRAConfig
from minisft.data.chat import Encoded
from minisft.lora import LoRALinear
from minisft.merging.spectrum import spectrum_of
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.step import accumulate_gradients
from minisft.surgery import apply_lora_, lora_modules, train_fully_

OUT, IN = 12, 18


def adapted(rank: int, alpha: float, seed: int = 0, orthonormal: bool = True) -> LoRALinear:
    """A zero linear with an adapter: orthonormal rows of A, B = 0."""
    base = nn.Linear(IN, OUT, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.zeros_(base.weight)
    layer = LoRALinear(base, rank, alpha).double()
    rows = tiny.randn(IN, rank, seed=seed)
    layer.lora_A.data = torch.linalg.qr(rows).Q.T.contiguous() if orthonormal else rows.T.contiguous() / math.sqrt(IN)
    nn.init.zeros_(layer.lora_B)
    return layer


def white_loss(layer: LoRALinear, target: Tensor) -> Tensor:
    """E |W x - D* x|^2 / 2 over white x is |W - D*|^2 / 2: the layer is asked for all unit vectors."""
    return (layer(torch.eye(IN, dtype=torch.float64)).T - target).square().sum() / 2


SPECTRA = {"1/i": 1 / np.arange(1, OUT + 1), "flat": np.ones(OUT), "rank 4": (np.arange(1, OUT + 1) <= 4) * 1.0}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4])
def test_gradient_descent_on_the_factors_reaches_eckart_and_youngs_bound(name: str, rank: int) -> None:
    """Law 1: no rank-r update leaves less than half of sum_{i > r} sigma_i^2, and training gets there."""
    u, v = (torch.linalg.qr(tiny.randn(n, n, seed=n)).Q for n in (OUT, IN))
    target = u @ torch.diag(torch.from_numpy(SPECTRA[name])) @ v[:, :OUT].T
    layer = adapted(rank, alpha=rank, seed=3)
    trained = {"A": layer.lora_A, "B": layer.lora_B}
    optimizer = MasterAdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(250):
        optimizer.zero_grad()
        white_loss(layer, target).backward()
        optimizer.step(0.1 * (1 + math.cos(math.pi * step / 250)) / 2)
    bound = float((SPECTRA[name][rank:] ** 2).sum()) / 2
    reached = float(white_loss(layer, target).detach())
    assert bound - 1e-9 <= reached <= bound + 0.01 * float((SPECTRA[name] ** 2).sum())


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_first_sgd_step_is_a_projection(rank: int) -> None:
    """Law 2: dW = -lr s^2 G A^T A; over random gradients that is r / d of the full step's squared length."""
    scaling, lr, shares = 2.0, 0.1, []
    for seed in range(40):
        layer, target = adapted(rank, alpha=scaling * rank, seed=seed), tiny.randn(OUT, IN, seed=1000 + seed)
        white_loss(layer, target).backward()
        gradient = -target  # of W = 0
        with torch.no_grad():
            for factor in (layer.lora_A, layer.lora_B):
                assert factor.grad is not None
                factor -= lr * factor.grad
        step = layer.delta_weight().detach()
        projected = gradient @ layer.lora_A.detach().T @ layer.lora_A.detach()
        tiny.assert_close(step, -lr * scaling**2 * projected, 1e-12)
        shares.append(float(step.square().sum() / (lr * scaling**2 * gradient).square().sum()))
    assert np.mean(shares) == pytest.approx(rank / IN, rel=0.1)


def one_step(alpha: float, lr_a: float, lr_b: float, sgd: bool) -> Tensor:
    """The update after one step from B = 0."""
    layer, target = adapted(3, alpha, orthonormal=False), tiny.randn(OUT, IN, seed=5)
    if sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [{"params": [layer.lora_A], "lr": lr_a}, {"params": [layer.lora_B], "lr": lr_b}]
        )
    else:
        groups = [{"params": [layer.lora_A], "lr": lr_a}, {"params": [layer.lora_B], "lr": lr_b}]
        optimizer = torch.optim.Adam(groups, eps=0.0)
    white_loss(layer, target).backward()
    layer.lora_A.grad = None if not sgd else layer.lora_A.grad  # Adam at B = 0: a gradient of 0 over eps 0
    optimizer.step()
    return layer.delta_weight().detach()


@pytest.mark.parametrize("factor", [2.0, 0.5, 10.0])
def test_alpha_and_the_learning_rate_trade(factor: float) -> None:
    """Law 3: SGD is the same at step 1 under (alpha c, lr / c^2), Adam under (alpha c, rate of B / c)."""
    tiny.assert_close(one_step(6.0 * factor, 0.0, 0.1 / factor**2, True), one_step(6.0, 0.0, 0.1, True), 1e-12)
    tiny.assert_close(one_step(6.0 * factor, 0.0, 0.1 / factor, False), one_step(6.0, 0.0, 0.1, False), 1e-12)
    difference = one_step(6.0 * factor, 0.0, 0.1, False) - one_step(6.0, 0.0, 0.1, False)
    assert float(difference.abs().max()) > 0.01


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_an_update_has_at_most_its_rank(rank: int) -> None:
    """Law 4, first half; and law 5: all of its energy is in that many singular values."""
    layer = adapted(rank, alpha=4.0)
    layer.lora_B.data = tiny.randn(OUT, rank, seed=9)
    assert int(torch.linalg.matrix_rank(layer.delta_weight().detach())) == rank
    assert spectrum_of(tiny.randn(OUT, IN, seed=2), layer.delta_weight().detach(), share=1 - 1e-9).energy_rank == rank


# ---- LoRA at full rank is full fine-tuning -------------------------------------------------------------------------------


def rows(count: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, tiny.VOCAB, (9,), generator=draw).tolist() for _ in range(count)]
    return [Encoded(each, [False] * 3 + [True] * 6, i, 0, 3) for i, each in enumerate(ids, 1)]


def losses(model: CausalLM, trained: dict[str, nn.Parameter], steps: int, lr: float) -> list[float]:
    """Plain SGD, loss by loss."""
    found = []
    for step in range(steps):
        batches = micro_batches(rows(6)[step % 2 :: 2], 3, 0, True, 64)
        for parameter in model.parameters():
            parameter.grad = None
        found.append(accumulate_gradients(model, batches))
        with torch.no_grad():
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    return found


@pytest.mark.parametrize(("frozen", "targets"), [("A", ("q_proj", "gate_proj", "up_proj")), ("B", ("o_proj", "down_proj"))])
def test_lora_at_full_rank_with_a_frozen_identity_trains_as_full_does_step_by_step(
    frozen: str, targets: tuple[str, ...]
) -> None:
    """Law 4, second half: with A = I frozen and scaling 1, B is W's update itself, so every loss is the same to rounding.

    A rank is at most the smaller side: A is square where in <= out, and B where in >= out, which gives the mirrored law.
    """
    size = tiny.LLAMA.hidden_size
    full, lora = tiny.build(tiny.LLAMA), tiny.build(tiny.LLAMA)
    train_fully_(full, targets)
    trained_full = {name: p for name, p in full.named_parameters() if p.requires_grad}
    apply_lora_(lora, LoRAConfig(rank=size, alpha=float(size), targets=targets))
    trained_lora = {}
    for path, layer in lora_modules(lora).items():
        identity, other = (layer.lora_A, layer.lora_B) if frozen == "A" else (layer.lora_B, layer.lora_A)
        identity.data = torch.eye(size, dtype=torch.float64)
        identity.requires_grad_(False)
        other.data.zero_()
        trained_lora[path] = other
    assert len(trained_full) == len(trained_lora) == len(targets) * tiny.LLAMA.num_layers
    one, other_losses = losses(full, trained_full, 12, 0.05), losses(lora, trained_lora, 12, 0.05)
    assert one[0] - one[-1] > 0.05  # it learns something
    assert np.abs(np.subtract(one, other_losses)).max() < 1e-9
