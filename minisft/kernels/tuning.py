"""Choosing among a few launch configurations by measuring them once.

The best tile depends on the GPU and on the shape, so each shape is timed on first use and the winner is kept for the life
of the process. Different configurations add in different orders, so two processes may choose differently and then differ in
the last bits: who needs the same bits everywhere passes a ``config`` to the launcher, and nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton.testing
from triton.runtime import OutOfResources

from minisft.kernels.arguments import interpreting


class Config(NamedTuple):
    """Output columns and inner elements of a tile, how many programs share a sum, and the compiler's two main choices."""

    columns: int
    inner: int
    parts: int
    num_warps: int = 4
    num_stages: int = 3


_chosen: dict[Hashable, Config] = {}


def fastest(key: Hashable, configs: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The configuration for which ``run`` takes the least time, remembered under ``key``.

    The first one is returned unmeasured, and not remembered, where measuring is impossible: inside the capture of a CUDA
    graph and in the interpreter. Run each shape once before capturing it.

    Args:
        key: what the choice depends on: kernel, device, dtype, shape.
        configs: to choose from.
        run: launches the kernel with one of them.

    Returns:
        the configuration.
    """
    if key in _chosen:
        return _chosen[key]
    if interpreting() or torch.cuda.is_current_stream_capturing():
        return configs[0]
    _chosen[key] = min(configs, key=lambda config: _milliseconds(config, run))
    return _chosen[key]


def _milliseconds(config: Config, run: Callable[[Config], object]) -> float:
    """Median time; infinite for a configuration that needs more shared memory than this GPU has."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")
