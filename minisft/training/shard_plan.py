"""Bytes of one process of a run whose base is shared: its share, and what is gathered for a moment.

A tensor of n rows is cut after every ceil(n / W) of them, so the first process has the largest share. Embedding, final norm and
head are gathered for the whole of a step, and two decoder layers at a time: the one that is computed, and the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from minisft.nf4 import NESTED_BLOCK_SIZE
from minisft.training.memory_estimate import Shape

LAYERS_GATHERED = 2
LEVEL_BYTES, OFFSET_BYTES = 16 * 4, 4  # of each layer in 4 bits; with every process


@dataclass(frozen=True)
class ShareBytes:
    """Bytes of the first process: its share by kind, what every process has, and the most that is gathered at once."""

    dense: int
    codes: int
    scales: int
    everywhere: int
    gathered: int

    @property
    def share(self) -> int:
        """Of all that is cut."""
        return self.dense + self.codes + self.scales


def share_bytes_of(shape: Shape, dtype: torch.dtype, world_size: int) -> ShareBytes:
    """Count them from a model's headers.

    Args:
        shape: the model's tensors, and which of them are in 4 bits.
        dtype: of the dense weights.
        world_size: W.

    Returns:
        The bytes.
    """
    parts = {name: _parts(shape, name, dtype) for name in shape.tensors}
    sums = dict.fromkeys(("dense", "codes", "scales"), 0)
    for kinds in parts.values():
        for kind, (rows, row_bytes) in kinds.items():
            sums[kind.partition(" ")[0]] += -(-rows // world_size) * row_bytes
    everywhere = sum(LEVEL_BYTES + OFFSET_BYTES * form.double_quant for form in shape.in_4_bits.values())
    return ShareBytes(**sums, everywhere=everywhere, gathered=_gathered(parts, shape.config.num_layers))


def _parts(shape: Shape, name: str, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """What is cut of a weight: kind -> (rows, bytes of a row)."""
    size = shape.tensors[name]
    if name not in shape.in_4_bits:
        return {"dense": (size[0], math.prod(size[1:]) * dtype.itemsize)}
    form, length = shape.in_4_bits[name], math.prod(size)
    blocks = -(-length // form.block_size)
    codes = {"codes": (-(-length // 2), 1)}
    if not form.double_quant:
        return codes | {"scales": (blocks, 4)}
    return codes | {"scales": (blocks, 1), "scales of scales": (-(-blocks // NESTED_BLOCK_SIZE), 4)}


def _gathered(parts: Mapping[str, Mapping[str, tuple[int, int]]], num_layers: int) -> int:
    layers = [0] * num_layers
    root = 0
    for name, kinds in parts.items():
        num_bytes = sum(rows * row_bytes for rows, row_bytes in kinds.values())
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += num_bytes
        else:
            root += num_bytes
    return root + sum(sorted(layers)[-LAYERS_GATHERED:])
