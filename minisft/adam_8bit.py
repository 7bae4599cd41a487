"""AdamW whose two moments are kept in 8 bits a number: 2.03 bytes of state instead of 8.

Numbers of a block of 256 share a scale, their largest magnitude. What is left, in [-1, 1] or [0, 1], is the nearest of 256
levels that lie close together near 0 and further apart near 1, over seven powers of ten (dynamic quantization). A step decodes
a piece of the moments, updates them in fp32, takes the step with these exact values, and encodes them again: rounding reaches
the next step only. The second moment of a number that has had a gradient never rounds to 0: the step divides by its root, and
a first moment that had not been rounded away would be divided by epsilon alone.

Ref: Dettmers et al. 2021, arXiv:2110.02861, sections 2.1 to 2.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
PIECE = 2**20  # numbers that are decoded at once, a multiple of BLOCK
DECADES = 7  # powers of ten that the levels span
PARTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
MIN_NUMBERS = 4096  # smaller tensors keep fp32 moments: they save nothing, and norms and biases are what suffers most


@functools.cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending: for each decade 10^(i-6) the middles of equal parts of [0.1, 1], and 0 and 1.

    Decade i of 0 to 6 has 2^i parts a sign, or 2^(i+1) where there is no sign.

    Args:
        signed: for the first moment, in [-1, 1]; else for the second, in [0, 1].

    Returns:
        (256,) fp32.
    """
    found = [0.0, 1.0]
    for i in range(DECADES):
        parts = 2 ** (i if signed else i + 1)
        middles = [10.0 ** (i - DECADES + 1) * (0.1 + 0.9 * (j + 0.5) / parts) for j in range(parts)]
        found += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(found), dtype=torch.float32)


@functools.cache
def _borders(signed: bool) -> Tensor:
    """Between each level and the next, (255,): from here on a number belongs to the upper one."""
    exact = levels(signed).double()
    return ((exact[1:] + exact[:-1]) / 2).float()


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest levels of ``x`` by blocks.

    Args:
        x: (N,) fp32, finite; not negative unless ``signed``.
        signed: which levels.

    Returns:
        codes (N,) uint8, and the scales (ceil(N / 256),) fp32. Without a sign only 0 gets the code of 0.
    """
    blocks = _in_blocks(x)
    absmax = blocks.abs().amax(dim=1)
    share = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(share, _borders(signed).to(x.device), right=True)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp_min(1), codes)
    return codes.to(torch.uint8).view(-1)[: x.numel()], absmax


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The numbers that ``encode`` kept.

    Args:
        codes: (N,) uint8.
        absmax: (ceil(N / 256),) fp32.
        signed: which levels.

    Returns:
        (N,) fp32.
    """
    return levels(signed).to(codes.device)[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def _in_blocks(x: Tensor) -> Tensor:
    missing = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, missing)).view(-1, BLOCK)


@dataclass
class Moments:
    """The state of one parameter: codes and scales of both moments, and how many steps they have seen."""

    exp_avg: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor
    step: int = 0

    @classmethod
    def zeros(cls, parameter: Tensor) -> Moments:
        """Of a parameter that has not been stepped."""
        n, device = parameter.numel(), parameter.device
        nothing = encode(torch.zeros(1), True)[0].item(), encode(torch.zeros(1), False)[0].item()
        codes = [torch.full((n,), int(code), dtype=torch.uint8, device=device) for code in nothing]
        scales = [torch.zeros(-(-n // BLOCK), device=device) for _ in range(2)]
        return cls(codes[0], scales[0], codes[1], scales[1])

    def state(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in PARTS}
        return {**tensors, "step": torch.tensor(float(self.step))}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Moments:
        """What ``state`` returned, on ``device``."""
        m, m_absmax, v, v_absmax = (tensors[name].to(device, copy=True) for name in PARTS)
        return cls(m, m_absmax, v, v_absmax, int(tensors["step"]))


@torch.no_grad()
def adamw_8bit_(
    parameter: Tensor, gradient: Tensor, moments: Moments, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """One step of AdamW in place, the moments in 8 bits.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        parameter: fp32, contiguous; changed.
        gradient: of the same shape.
        moments: changed.
        lr, betas, eps, decay: as for AdamW.

    Ref: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.
    """
    moments.step += 1
    b1, b2 = betas
    rate, root = lr / (1 - b1**moments.step), math.sqrt(1 - b2**moments.step)
    flat_w, flat_g = parameter.view(-1), gradient.reshape(-1)
    for start in range(0, flat_w.numel(), PIECE):
        here, blocks = slice(start, start + PIECE), slice(start // BLOCK, (start + PIECE) // BLOCK)
        w, g = flat_w[here], flat_g[here].float()
        m = decode(moments.exp_avg[here], moments.exp_avg_absmax[blocks], True).lerp_(g, 1 - b1)
        v = decode(moments.exp_avg_sq[here], moments.exp_avg_sq_absmax[blocks], False).mul_(b2).addcmul_(g, g, value=1 - b2)
        w.mul_(1 - lr * decay).addcdiv_(m, (v.sqrt() / root).add_(eps), value=-rate)
        moments.exp_avg[here], moments.exp_avg_absmax[blocks] = encode(m, True)
        moments.exp_avg_sq[here], moments.exp_avg_sq_absmax[blocks] = encode(v, False)
