"""Safetensors files written in pieces: the header first, then each tensor's bytes as they are computed.

Names, shapes and dtypes are known before the first number is, so nothing has to be held: the memory is that of one piece,
whatever the model's size. The bytes are those of the ``safetensors`` library: same order, same header, same padding. What
this module refuses: pieces that do not add up to what the header has promised. The idea to take home: a file format that
says sizes first can be written like a tape.

Ref: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.common.atomic_files import FileRecord, create_durably
from minisft.common.safe_json import JSON
from minisft.formats.fields import write_json
from minisft.formats.hf import INDEX, SINGLE
from minisft.formats.safetensors_file import DTYPES

MAX_SHARD_BYTES = 4 * 10**9
# The library puts larger dtypes first, so that every tensor begins at a multiple of its item's size; then names rise.
_WIDEST_FIRST = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


Pieces = Callable[[str], Iterable[Tensor]]  # name -> flat pieces of that tensor, in order, in the dtype of its spec


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    pieces: Pieces,
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, FileRecord]:
    """Write ``model.safetensors``, or several shards and their index.

    Args:
        folder: exists, and holds no such files.
        specs: every tensor, in the model's order, which decides the shard; one tensor is never split.
        pieces: asked once for each name, in the order in which the tensors stand in the files.
        metadata: strings for the header of every file, beside ``format: pt``, which transformers asks for.
        max_shard_bytes: weights beyond this go into another file.

    Returns:
        size and sha256 of each file, computed from the bytes handed in.

    Raises:
        OSError: from the disk.
    """
    shards = plan_shards({name: spec.num_bytes for name, spec in specs.items()}, max_shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    records = {}
    for file, names in zip(files, shards, strict=True):
        chosen = {name: specs[name] for name in _file_order(specs, names)}
        records[file] = create_durably(folder / file, _file_bytes(chosen, pieces, metadata))
    if count > 1:
        total: JSON = {"total_size": sum(spec.num_bytes for spec in specs.values())}
        weight_map: JSON = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    return records


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in the given order, in as many groups of at most ``limit`` bytes as that takes; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _file_order(specs: Mapping[str, TensorSpec], names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_WIDEST_FIRST.index(specs[name].dtype), name))


def file_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Everything before the first tensor: 8 bytes of length, then JSON filled up with spaces to a multiple of 8."""
    header: dict[str, JSON] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, spec in specs.items():
        end = position + spec.num_bytes
        header[name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _file_bytes(specs: Mapping[str, TensorSpec], pieces: Pieces, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield file_header(specs, metadata)
    for name, spec in specs.items():
        written = 0
        for piece in pieces(name):
            if piece.dtype != spec.dtype:
                raise ValueError(f"{name} was announced as {spec.dtype}, and a piece is {piece.dtype}")
            raw = piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            written += len(raw)
            yield raw
        if written != spec.num_bytes:
            raise ValueError(f"{name} was announced with {spec.num_bytes} bytes and has {written}")
