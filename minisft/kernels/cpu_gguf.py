"""Stored blocks of a GGUF file to fp32 at the memory's speed, by ``cpu_gguf.cpp``; the ``gguf`` package gives the same bits.

The common types are decoded here. What is not (rare types, a machine without a compiler) is left to the package.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from minisft.kernels import cpu_nf4

# Numbers and bytes of a block.
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip


def can_decode(type_name: str) -> bool:
    """Whether ``decode`` knows this type on this machine."""
    return type_name in BLOCKS and cpu_nf4.library() is not None


def decode(type_name: str, stored: Tensor, out: Tensor) -> None:
    """Fill ``out`` with what the blocks stand for.

    Args:
        type_name: one that ``can_decode``.
        stored: (blocks * bytes of a block,) uint8.
        out: (blocks * numbers of a block,) fp32.

    Raises:
        ValueError: sizes that do not go together, or tensors that are not laid out plainly.

    Cost: reads the blocks once and writes ``out`` once, by as many threads as PyTorch has.
    """
    library = cpu_nf4.library()
    assert library is not None, "ask can_decode first"
    items, size = BLOCKS[type_name]
    num_blocks = stored.numel() // size
    plain = (
        cpu_nf4.has_numbers(stored) and cpu_nf4.has_numbers(out) and (stored.dtype, out.dtype) == (torch.uint8, torch.float32)
    )
    if not plain or stored.numel() != num_blocks * size or out.numel() != num_blocks * items:
        raise ValueError(f"{stored.numel()} bytes of {type_name} are not {out.numel()} plain numbers of {out.dtype}")
    addresses = (ctypes.c_void_p(stored.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    getattr(library, f"gguf_{type_name}")(*addresses, ctypes.c_int64(num_blocks), torch.get_num_threads())
