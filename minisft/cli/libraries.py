"""Loads PyTorch for a command, once everything has been checked that can be checked without it.

PyTorch takes seconds to import, and a mistyped flag needs none of it. What concerns the whole process is set here, because it
is set for the command line only: nothing of it happens on ``import minisft``.
"""

from __future__ import annotations

import gc
import os
import sys


def load_libraries() -> None:
    """Import PyTorch and set up the process for it; in a process that has PyTorch already, only the allocator is set.

    ``OMP_WAIT_POLICY=passive``, unless the user set it: a thread of PyTorch that waits for the others sleeps instead of
    spinning, so beside another busy program training keeps its share of the CPU (``benchmarks/bench_wait_policy.py``). OpenMP
    reads it when PyTorch is loaded, never later.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch  # noqa: F401

        gc.freeze()  # the libraries stay until the end: no collection need walk through them, nor the last one, at exit
    from minisft.common.device import tune_allocator

    tune_allocator()
