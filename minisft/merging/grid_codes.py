"""The codes of one layer's 4 bits: GPTQ, coordinate descent, stochastic rounding, each on the grid that the scales allow.

Given are W + D, the grid of the base and H = X^T X / N of the layer's inputs; sought are codes whose e H e^T is small, e being
a row of W' - (W + D). Why that, and which of the four methods does what, stands in ``compensate``, which reads the text and
goes through a model. This module sees one matrix and knows no model.

Ref: Frantar et al. 2022, arXiv:2210.17323 (GPTQ, the same rounding in another form); Babai 1986 (the nearest plane), which
``gptq`` is; Behdin et al. 2023, arXiv:2309.01885 (coordinate descent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from minisft.nf4 import TINY, QuantizedWeight, decode_absmax, midpoints_of, pack, unpack

Method = Literal["stochastic", "gptq", "descent", "both"]
METHODS: tuple[Method, ...] = get_args(Method)
BLOCK = 64  # inputs handled between two large products
SWEEPS = 3  # of descent; in the third about one code in a thousand still changes
DAMPING = 0.01  # of the mean of H's diagonal, added to it: text is finite, and directions it never took must not run free


# ---- the grid of one layer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What the weights of a layer can be while its scales stay: one row an input, (I, O), so that a step reads one row.

    Args:
        codes: (I, O) uint8, those of the base.
        scales: (I, O) fp32, of each weight's block.
        levels: (16,) fp32.
        pinned: (I, O) bool, weights that keep their code: those at the end of the levels, without which a block's scale would
            no longer be its largest magnitude, and those in blocks of zeros.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    pinned: Tensor

    @classmethod
    def of(cls, q: QuantizedWeight) -> Grid:
        """The grid of a weight, (O, I)."""
        length = q.shape.numel()
        scales = decode_absmax(q).repeat_interleave(q.block_size)[:length].view(q.shape).T.contiguous()
        codes = unpack(q.packed, length).view(q.shape).T.contiguous()
        return cls(codes, scales, q.levels, (q.levels[codes.int()].abs() >= 1) | (scales.abs() < TINY))

    def take(self, inputs: Tensor) -> Grid:
        """The grid of some inputs, in that order."""
        return Grid(self.codes[inputs], self.scales[inputs], self.levels, self.pinned[inputs])

    def values(self, codes: Tensor) -> Tensor:
        """What codes of all inputs stand for, (I, O) fp32: the numbers that ``dequantize`` gives."""
        return self.levels[codes.int()] * self.scales

    def rounder(self) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """(input, (O,) wanted weights) -> codes of the nearest that are possible, and what these stand for."""
        midpoints, order = midpoints_of(self.levels)
        order = order.to(torch.uint8)

        def nearest(i: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
            # Beyond 1 lie levels that no scale was made for: int4's -8 / 7.
            free = order[torch.bucketize((wanted / self.scales[i]).clamp(-1, 1), midpoints)]
            codes = torch.where(self.pinned[i], self.codes[i], free)
            return codes, self.levels[codes.int()] * self.scales[i]

        return nearest

    def store(self, q: QuantizedWeight, codes: Tensor) -> QuantizedWeight:
        """``q`` with other codes, (I, O); it shares no memory with ``q``."""
        own = {name: t.clone() for name in ("absmax", "absmax2", "offset", "levels") if (t := getattr(q, name)) is not None}
        beyond = unpack(q.packed, 2 * len(q.packed))[q.shape.numel() :]  # half a byte that stands for nothing, if N is odd
        return dataclasses.replace(q, packed=pack(torch.cat((codes.T.flatten(), beyond))), **own)


def damped(moments: Tensor) -> Tensor:
    """H + c I in fp64, positive definite: (I, I). With it, an error that the text does not show still costs a little."""
    H = moments.double()
    return H + torch.eye(len(H), dtype=H.dtype, device=H.device) * (DAMPING * float(H.diag().mean()) or 1.0)


# ---- methods of choosing codes ----------------------------------------------------------------------------------------


def gptq(grid: Grid, target: Tensor, moments: Tensor) -> Tensor:
    """Round one input after the other, each time correcting for the errors made so far.

    With H = R^T R, R upper triangular, e H e^T = sum_i R_ii^2 (e_i + sum_{j>i} R_ij / R_ii e_j)^2: one square for each input,
    which depends on those after it only. So from the last to the first each e_i is made to cancel the sum as well as the
    grid allows. The input with the largest H_ii goes first, while all others can still make up for it.

    Args:
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        grid: what the weights of the layer can be.

    Returns:
        codes, (I, O) uint8.

    Cost: I^2 O / 2 multiplications in fp32, one factorization of (I, I) in fp64.
    """
    H = damped(moments)
    order = H.diag().argsort(stable=True)
    grid, target = grid.take(order), target[order]
    R = torch.linalg.cholesky(H[order][:, order], upper=True)
    leaning = (R / R.diag()[:, None]).to(target.dtype)
    nearest, codes, error = grid.rounder(), torch.empty_like(grid.codes), torch.zeros_like(target)
    for end in range(len(R), 0, -BLOCK):
        begin = max(0, end - BLOCK)
        later = leaning[begin:end, end:] @ error[end:]
        for i in reversed(range(begin, end)):
            lean = later[i - begin] + leaning[i, i + 1 : end] @ error[i + 1 : end]
            codes[i], value = nearest(i, target[i] - lean)
            error[i] = value - target[i]
    return codes[order.argsort()]


def descend(grid: Grid, target: Tensor, moments: Tensor, codes: Tensor) -> Tensor:
    """Change one input's codes at a time to the best, all others held: e_i = -(sum_{j != i} H_ij e_j) / H_ii, rounded.

    No step makes e H e^T larger. Arguments as for ``gptq``, and the codes to start from.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        codes: (I, O) uint8, to start from.

    Returns:
        codes, (I, O) uint8.

    Cost: I^2 O multiplications a sweep.
    """
    H = damped(moments).to(target.dtype)
    nearest, codes, error = grid.rounder(), codes.clone(), grid.values(codes) - target
    for begin in [*range(0, len(H), BLOCK)] * SWEEPS:
        block = H[begin : begin + BLOCK]
        slope = block @ error
        for k in range(len(block)):
            i = begin + k
            codes[i], value = nearest(i, target[i] + error[i] - slope[k] / block[k, i])
            change = value - target[i] - error[i]
            error[i] += change
            slope[k + 1 :].addr_(block[k + 1 :, i], change)
    return codes


def round_stochastically(grid: Grid, target: Tensor, draw: torch.Generator) -> Tensor:
    """One of the two nearest levels at random, so that the mean is ``target``: codes, (I, O) uint8.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        draw: the random numbers.

    Returns:
        codes, (I, O) uint8.
    """
    levels, order = grid.levels.sort(stable=True)
    scaled = (target / grid.scales).clamp(-1, 1)
    below = (torch.searchsorted(levels, scaled, right=True) - 1).clamp(0, len(levels) - 2)
    share = (scaled - levels[below]) / (levels[below + 1] - levels[below])
    up = torch.rand(share.shape, generator=draw, device=share.device) < share
    return torch.where(grid.pinned, grid.codes, order[below + up].to(torch.uint8))


def output_error(error: Tensor, moments: Tensor) -> Tensor:
    """e H e^T for each output, summed in fp64: (I, O) and (I, I) -> (O,)."""
    return (error.double() * (moments @ error)).sum(0).clamp(min=0)


def choose_codes(grid: Grid, target: Tensor, moments: Tensor, method: Method, draw: torch.Generator) -> Tensor:
    """The codes that ``method`` finds, (I, O) uint8; an output for which they are no better than the base's keeps the base's.

    With ``stochastic`` they stand as they are: to drop what came out badly would be to take sides.

    Args:
        grid: what the weights of the layer can be.
        target: (I, O), W + D transposed.
        moments: (I, I), H.
        method: see ``compensate``.
        draw: random numbers, for ``stochastic``.

    Returns:
        codes, (I, O) uint8.
    """
    if method == "stochastic":
        return round_stochastically(grid, target, draw)
    found = grid.codes if method == "descent" else gptq(grid, target, moments)
    if method != "gptq":
        found = descend(grid, target, moments, found)
    before, after = (output_error(grid.values(codes) - target, moments) for codes in (grid.codes, found))
    return torch.where(after < before, found, grid.codes)
