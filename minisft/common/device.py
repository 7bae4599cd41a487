"""The machine under us: which device and dtype to use, and how the C library hands out memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

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


def pick_dtype(name: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """``auto`` is bf16 where the processor multiplies it by instructions of its own, else fp32 (bf16 would be slower there)."""
    if name != "auto":
        return name
    return "bf16" if has_bf16_instructions(device) else "fp32"


def answering_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a model is held in that is asked and not trained: ``auto`` is bf16 on a GPU and fp32 on a CPU."""
    return torch.float32 if name == "fp32" or (name == "auto" and device.type == "cpu") else torch.bfloat16


def has_bf16_instructions(device: torch.device) -> bool:
    """GPUs from compute capability 8.0 on, and CPUs with AVX512-BF16, AMX or Arm's BF16, multiply bf16 by themselves."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())


def _cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """What Linux lists under ``flags`` (x86) or ``Features`` (Arm) for the first core; nothing elsewhere."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    listed = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return set(next(listed, "").split())
