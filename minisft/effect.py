"""What a merge did to an adapter: its effect W' - W as it is stored, held against D as it was trained.

An adapter that vanished in rounding leaves a W' close to W + D; only the effect shows it. The sums run in fp64, a chunk at a
time, so that a layer can be measured in pieces. Nothing here changes a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minisft.kernels.cpu_nf4 import EffectSums, effect_sums

CHUNK = 2**17  # numbers at a time: three such pieces in fp32 stay in a core's cache
# Which weight D is added to, and how the sum is stored. ``merge.merge`` knows the first three.
Onto = Literal["dequantized", "original", "requantized"]
Target = Literal["dequantized", "original", "requantized", "compensated"]
# Less than half of D along D: the merged model is nearer to its base than to what was trained.
SURVIVAL_FLOOR = 0.5


@dataclass(frozen=True)
class LayerReport:
    """What a merge did to one layer, with E = W' - W as stored and D as trained.

    Attributes:
        path: the layer.
        delta_ratio: |D| / |W|, Frobenius norms.
        fraction_lost: share of the entries of D that are not zero but changed nothing.
        effect_error: |E - D| / |D|; 0 when D is 0.
        survival: <E, D> / |D|^2, the share of D that is still there; 1 when D is 0.
        base_shift: |W - W_trained| / |D| when W is not the weight that D was trained on (``onto="original"``), else 0.
    """

    path: str
    delta_ratio: float
    fraction_lost: float
    effect_error: float
    survival: float
    base_shift: float = 0.0


class Effect:
    """The sums behind a ``LayerReport``, so that a layer can be measured in pieces. All in fp64, a chunk at a time."""

    def __init__(self) -> None:
        self.base = self.delta = self.error = self.dot = self.shift = 0.0
        self.num_changed = self.num_nonzero = 0

    def add(self, base: Tensor, delta: Tensor, stored: Tensor, trained: Tensor | None = None) -> None:
        """Take in a piece of a layer.

        Args:
            base: W, as it is stored.
            delta: D, as it was trained; what is left of it in a sum W + D may be nothing, even in fp32.
            stored: W' as it will be read back.
            trained: the weight that D was trained on, if that is not W.
        """
        for chunk in _chunks(base, delta, stored):
            sums = effect_sums(*chunk) or _sums(*(piece.double() for piece in chunk))
            self.base += sums.base
            self.delta += sums.delta
            self.error += sums.error
            self.dot += sums.dot
            self.num_nonzero += sums.num_nonzero
            self.num_changed += sums.num_changed
        if trained is not None:
            self.shift += sum(_square(w.double() - before.double()) for w, before in _chunks(base, trained))

    def report(self, path: str) -> LayerReport:
        """The finished measure; a layer whose adapter is zero has nothing to lose."""
        if self.delta == 0:
            return LayerReport(path, 0.0, 0.0, 0.0, 1.0)
        return LayerReport(
            path,
            delta_ratio=(self.delta / self.base) ** 0.5 if self.base else float("inf"),
            fraction_lost=1 - self.num_changed / self.num_nonzero,
            effect_error=(self.error / self.delta) ** 0.5,
            survival=self.dot / self.delta,
            base_shift=(self.shift / self.delta) ** 0.5,
        )


def _sums(w: Tensor, d: Tensor, after: Tensor) -> EffectSums:
    """``effect_sums`` in PyTorch, of numbers in fp64."""
    effect, nonzero = after - w, d != 0
    changed = (effect != 0).logical_and_(nonzero)
    counts = int(nonzero.count_nonzero()), int(changed.count_nonzero())
    return EffectSums(_square(w), _square(d), _square(effect - d), float(effect.dot(d)), *counts)


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Tensors of one shape, flat and in fp32 or wider, ``CHUNK`` numbers at a time."""
    for chunk in zip(*(t.reshape(-1).split(CHUNK) for t in tensors), strict=True):
        yield [piece if piece.dtype == torch.float64 else piece.float() for piece in chunk]


def _square(x: Tensor) -> float:
    return float(x.dot(x))


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: onto which weights, and layer by layer how much of each adapter is still there."""

    onto: Target
    layers: tuple[LayerReport, ...]

    @property
    def fraction_lost(self) -> float:
        """The largest share of an update's entries that rounding left without effect in a layer."""
        return max(layer.fraction_lost for layer in self.layers)

    @property
    def survival(self) -> float:
        """The smallest share of an adapter that is still there in a layer."""
        return min(layer.survival for layer in self.layers)
