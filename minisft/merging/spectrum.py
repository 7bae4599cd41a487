"""What an update D does to a weight W, by singular values: how many directions hold its energy, which of W + D are new.

Squares of singular values and the singular vectors come from Gram matrices in fp64, which a tall matrix (an embedding) builds
up from a few rows at a time. The energy of D needs the squares alone, so nothing is lost by that; for the vectors, directions
of W below 1e-6 of its largest singular value are left out.

The idea to take home: a high energy rank is no sign of need. Gradient noise has full rank too.

Ref: Shuttleworth et al. 2024, arXiv:2410.21228, section 3 (intruder dimensions; left singular vectors, the largest ten).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENERGY, THRESHOLD, TOP = 0.9, 0.6, 10
_SMALLEST = 1e-6  # of the largest singular value; below it a vector from a Gram matrix is noise


@dataclass(frozen=True)
class Spectrum:
    """An update beside its weight.

    Attributes:
        norm, delta_norm: Frobenius norms of W and D.
        energy_rank: singular values of D that hold the share of its energy; 0 for D = 0.
        intruders: of the largest directions of W + D, those that resemble none of W's.
    """

    norm: float
    delta_norm: float
    energy_rank: int
    intruders: int

    @property
    def relative(self) -> float:
        """|D| / |W|; infinite for W = 0."""
        return self.delta_norm / self.norm if self.norm > 0 else (float("inf") if self.delta_norm > 0 else 0.0)


def energy_rank(squares: Tensor, share: float = ENERGY) -> int:
    """The smallest k with sum_{i <= k} sigma_i^2 >= share * sum_i sigma_i^2.

    Args:
        squares: (R,) squared singular values in any order; rounding may have made some slightly negative.
        share: of the energy, in (0, 1].

    Returns:
        k; 0 if all are zero.
    """
    ordered = squares.double().clamp(min=0).sort(descending=True).values
    sums = ordered.cumsum(0)
    if sums[-1] == 0:
        return 0
    # The last sum is the total itself, so a share of 1 is reached whatever was rounded.
    return int((sums < share * sums[-1]).sum()) + 1


def count_intruders(cosines: Tensor, threshold: float = THRESHOLD) -> int:
    """How many rows have no entry of size ``threshold``: #{j: max_i |cos(y_j, x_i)| < threshold}; cosines is (top, R)."""
    return int((cosines.abs().amax(dim=1) < threshold).sum())


def spectrum_of(weight: Tensor, delta: Tensor, share: float = ENERGY, threshold: float = THRESHOLD, top: int = TOP) -> Spectrum:
    """``spectrum_of_rows`` for a matrix that is in memory.

    Args:
        weight, delta: W and D, (rows, columns).
        share: of the energy.
        threshold: cosine below which a direction is new.
        top: how many directions of W + D are looked at.

    Returns:
        the spectrum.
    """
    return spectrum_of_rows([(weight, delta)], (weight.shape[0], weight.shape[1]), share, threshold, top)


def spectrum_of_rows(
    rows: Iterable[tuple[Tensor, Tensor]],
    shape: Sequence[int],
    share: float = ENERGY,
    threshold: float = THRESHOLD,
    top: int = TOP,
) -> Spectrum:
    """The spectrum of an update that arrives a few rows at a time.

    With u_j the left singular vectors of W + D and x_i those of W, intruders are the j <= top with
    max_i |u_j . x_i| < threshold.

    Args:
        rows: pairs (W, D) of row blocks, in order. A matrix that is not tall is put together first.
        shape: (rows, columns) of the whole.
        share: of the energy.
        threshold: cosine below which a direction is new.
        top: how many directions of W + D are looked at.

    Returns:
        the spectrum; everything is computed in fp64.

    Cost: four Gram matrices of the smaller side n and three eigendecompositions of them, O(rows * columns * n).
    """
    tall = shape[0] > shape[1]
    blocks: Iterable[tuple[Tensor, Tensor]] = rows
    if not tall:  # its Gram matrix W W^T needs all columns of all rows
        parts = list(rows)
        blocks = [(torch.cat([w for w, _ in parts]).double().T, torch.cat([d for _, d in parts]).double().T)]
    n = min(shape)
    base, tuned, cross, update = (torch.zeros(n, n, dtype=torch.float64) for _ in range(4))
    for weight, delta in blocks:
        w, d = weight.double(), delta.double()
        changed = w + d
        base += w.T @ w
        update += d.T @ d
        tuned += changed.T @ changed
        cross += changed.T @ w
    norm, delta_norm = (float(gram.diagonal().sum().clamp(min=0).sqrt()) for gram in (base, update))
    if delta_norm == 0:
        return Spectrum(norm, 0.0, 0, 0)
    rank = energy_rank(torch.linalg.eigvalsh(update), share)
    return Spectrum(norm, delta_norm, rank, count_intruders(_cosines(base, tuned, cross, top, tall), threshold))


def _cosines(base: Tensor, tuned: Tensor, cross: Tensor, top: int, tall: bool) -> Tensor:
    """(top, R) cosines of the largest left singular vectors of W + D with those of W.

    A tall matrix has its right singular vectors v from the Gram matrix; the left ones are u = W v / sigma, so u_j . x_i = v_j^T
    (W + D)^T W v_i / (sigma_j sigma_i). Of one that is not tall, whose transpose was taken, they are the v themselves.
    """
    squares, vectors = torch.linalg.eigh(base)
    squares_tuned, vectors_tuned = torch.linalg.eigh(tuned)
    largest = vectors_tuned.flip(1)[:, :top]
    if not tall:
        return largest.T @ vectors
    sigma, sigma_tuned = squares.clamp(min=0).sqrt(), squares_tuned.clamp(min=0).sqrt().flip(0)[:top]
    kept, kept_tuned = sigma > _SMALLEST * sigma.max(), sigma_tuned > _SMALLEST * sigma_tuned.max()
    cosines = (largest.T @ cross @ vectors) / (sigma_tuned.clamp(min=1e-300)[:, None] * sigma.clamp(min=1e-300))
    return cosines[kept_tuned][:, kept]
