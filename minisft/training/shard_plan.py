"""Bytes of one process of a run whose model is shared: its share, and what is gathered for a moment.

A tensor of n rows is cut after every ceil(n / W) of them, so the first process has the largest share. Embedding, final norm and
head are gathered for the whole of a step, and two decoder layers at a time: the one that is computed, and the next. Where the
model itself is trained, weights, moments and gradients of a share are fp32, and gradients are whole for a moment: those of a
layer until they have been added up, those of embedding and head until backward has ended.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of the first process where the model itself is trained.

    Attributes:
        weights, moments, gradients: of its share.
        passing: gradients that are whole for a moment, and what of them is sent.
    """

    weights: int
    moments: int
    gradients: int
    passing: int


def trained_bytes_of(shape: Shape, dtype: torch.dtype, trained: Collection[str], world_size: int) -> TrainedBytes:
    """Count them from a model's headers.

    Args:
        shape: the model's tensors, all of them dense.
        dtype: that layers are computed in.
        trained: the names of those that are trained.
        world_size: W.

    Returns:
        The bytes.
    """
    held = torch.promote_types(dtype, torch.float32)
    share = {name: -(-size[0] // world_size) * math.prod(size[1:]) * held.itemsize for name, size in shape.tensors.items()}
    own = sum(share[name] for name in trained)
    root, layers = _by_group({name: _parts(shape, name, dtype) for name in trained}, shape.config.num_layers)
    sent = held.itemsize / dtype.itemsize
    passing = root + max(root * sent, max(layers) * (1 + sent))
    return TrainedBytes(sum(share.values()), 2 * own, own, round(passing))


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
    root, layers = _by_group(parts, num_layers)
    return root + sum(sorted(layers)[-LAYERS_GATHERED:])


def _by_group(parts: Mapping[str, Mapping[str, tuple[int, int]]], num_layers: int) -> tuple[int, list[int]]:
    """Bytes of embedding, final norm and head, and of each layer."""
    layers = [0] * num_layers
    root = 0
    for name, kinds in parts.items():
        num_bytes = sum(rows * row_bytes for rows, row_bytes in kinds.values())
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += num_bytes
        else:
            root += num_bytes
    return root, layers
