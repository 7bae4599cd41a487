"""The machine under us: which device and dtype to use, and how the C library hands out memory."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from minisft.common.errors import UserError, visible

# What the settings call a dtype.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**31 - 1


def tune_allocator() -> bool:
    """Make glibc keep freed blocks for reuse instead of returning them to the kernel.

    By default each block above 32 MiB (and many below) is a fresh mapping, whose pages the kernel clears again at every step
    of a training run. This concerns the whole process, so only the command line does it, never an import.

    Returns:
        Whether anything was changed, see ``tunes_allocator``.
    """
    if not tunes_allocator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def tunes_allocator() -> bool:
    """Whether there is something to tune: glibc on Linux, and no ``MALLOC_MMAP_THRESHOLD_`` in the environment."""
    there = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")
    return there and "MALLOC_MMAP_THRESHOLD_" not in os.environ


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one.

    Raises:
        UserError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            "config/bad-value", "unknown device", where="--device", found=visible(name), expected="cpu, cuda or auto",
            fix="auto takes a GPU where there is one",
        ) from None  # fmt: skip
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            "config/no-device", "this device is not here", where="--device", found=visible(name), fix="--device cpu"
        )
    return device
