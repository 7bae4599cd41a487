"""P0 of ``exp_peft_full``: what LoRA can and cannot reach on one matrix, beside what linear algebra says.

Linear regression with white inputs and target W + D*: the loss that is left after training B A is |D* - B A|^2 / |D*|^2. By
Eckart and Young it is at best sum_{i > r} sigma_i^2 / sum_i sigma_i^2.
"""

from __future__ import annotations

import math

import torch

OUT, IN = 64, 96
RANKS = (1, 2, 4, 8, 16, 32, 64)


def spectra() -> dict[str, torch.Tensor]:
    """Singular values of D*: falling as 1/i, all equal, and four."""
    i = torch.arange(1, OUT + 1, dtype=torch.float64)
    return {"1/i": 1 / i, "flat": torch.ones_like(i), "rank 4": (i <= 4).double()}


def target(values: torch.Tensor, seed: int) -> torch.Tensor:
    """(OUT, IN) with these singular values and random directions."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(OUT, OUT, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(IN, OUT, generator=draw, dtype=torch.float64)).Q
    return u @ torch.diag(values) @ v.T


def trained_gap(wanted: torch.Tensor, rank: int, steps: int, seed: int) -> float:
    """Relative loss after gradient descent (Adam, cosine) on A and B, from A random and B = 0."""
    draw = torch.Generator().manual_seed(seed)
    a = (torch.randn(rank, IN, generator=draw, dtype=torch.float64) / math.sqrt(IN)).requires_grad_(True)
    b = torch.zeros(OUT, rank, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (wanted - b @ a).square().sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((wanted - b @ a).square().sum() / wanted.square().sum())


def first_step_share(rank: int, seed: int) -> float:
    """|G A^T A|^2 / |G|^2 for orthonormal rows of A: the share of a full step that LoRA's first SGD step takes."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(IN, rank, generator=draw, dtype=torch.float64)).Q.T
    gradient = torch.randn(OUT, IN, generator=draw, dtype=torch.float64)
    return float((gradient @ rows.T @ rows).square().sum() / gradient.square().sum())


def closed_forms(seed: int, steps: int = 1500) -> dict[str, object]:
    """All of it: for each spectrum and rank what training reached and the bound; and the first step's share beside r / d."""
    found: dict[str, object] = {}
    for name, values in spectra().items():
        wanted, squares = target(values, seed), values.square()
        bound = [float(squares[rank:].sum() / squares.sum()) for rank in RANKS]
        found[name] = {"reached": [trained_gap(wanted, rank, steps, seed) for rank in RANKS], "bound": bound}
    shares = [sum(first_step_share(rank, 100 * seed + k) for k in range(8)) / 8 for rank in RANKS]
    return {"ranks": list(RANKS), "gaps": found, "first_step": {"measured": shares, "r/d": [rank / IN for rank in RANKS]}}
