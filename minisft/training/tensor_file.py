"""The tensors of a checkpoint as a safetensors file: written a piece at a time, read whole or by rows.

Ref: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from minisft.common.safe_json import JSON
from minisft.common.shares import Later, made
from minisft.formats.safetensors_file import DTYPES

Rows = Callable[[int], tuple[int, int]]  # of so many rows of a tensor, those from the first number to the second
_CHUNK_BYTES = 2**20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def num_bytes(tensor: Tensor | Later) -> int:
    """Bytes of a tensor in the file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def file_pieces(tensors: Mapping[str, Tensor | Later]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file: header length (8 bytes, little-endian), JSON header, tensors back to back.

    Wider elements come first, so that every tensor starts at a multiple of its element size. Written here rather than by the
    library because its writer neither streams nor syncs, and gives every file mode 0600.

    Args:
        tensors: by name; those that are made later are made one at a time, in the order of the file.

    Yields:
        Bytes.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, JSON] = {}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be saved")
        start, end = end, end + num_bytes(tensor)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        data = made(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


def read_tensors(path: Path, rows: Rows | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name, in memory of their own: a mapped file would keep its disk space after it was removed.

    Args:
        path: the file.
        rows: which rows of each tensor are read; by default all. Tensors without rows are read whole.

    Returns:
        On the CPU.
    """
    if rows is None:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        shapes = {name: part.get_shape() for name, part in slices.items()}
        return {
            name: (part[slice(*rows(shapes[name][0]))] if shapes[name] else file.get_tensor(name)).clone()
            for name, part in slices.items()
        }
