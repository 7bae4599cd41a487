"""Threads: the cores of this machine, divided among the processes on it."""

from __future__ import annotations

import os

import torch

from minisft.parallel.world import World


def num_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(world: World) -> int:
    """Give this process its share of the cores, unless the user set ``OMP_NUM_THREADS`` to more than one.

    ``torchrun`` sets that variable to 1 where the user has not (pytorch issue 22260), which would leave cores idle.

    Returns:
        Threads of this process.
    """
    if world.size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, num_cores() // world.local_size))
    return torch.get_num_threads()
