"""Stored weights read a piece at a time, so that a model can be gone through without being loaded.

A piece is a range of the flat tensor, in the order and with the numbers that ``load_model`` would give. Three sources
(safetensors, 4 bits as bitsandbytes stores them, GGUF), and one on top of them: a weight as it would be quantized.
Files are read by ``pread``, never mapped: mapped pages count as this process's memory. The idea to take home: formats with
blocks can be entered anywhere, if one begins at the border of a block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.common.errors import UserError, visible
from minisft.config import ModelConfig, QuantConfig
from minisft.formats.bnb import StoredWeight, read_tables
from minisft.formats.file_bytes import read_bytes
from minisft.formats.gguf_file import check_gguf, file_dtype, interleaved_heads, our_order, read_tensor
from minisft.formats.gguf_header import GGUF, TensorInfo, read_gguf
from minisft.formats.hf import CheckedFolder, check_folder
from minisft.formats.safetensors_file import DTYPES
from minisft.formats.source import Source
from minisft.kernels import cpu_nf4
from minisft.nf4 import QuantizedWeight, codebook, decode_absmax, quantize_absmax
from minisft.trained_rows import TrainedRows

PIECE = 2**18  # numbers held at a time: 1 MiB in fp32, so that a dozen temporaries of that size stay small


class Pieces(Protocol):
    """A weight that can be read from any place: ``read(begin, end)`` is that range of the flat tensor, 1-D.

    ``dtype`` is what each number is stored as; None where blocks of numbers share a scale.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """What each number is stored as; None where blocks share a scale."""
        ...

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        ...


def read_rows(weight: Pieces, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of a matrix.

    Args:
        weight: (rows, columns).
        begin, end: range of rows.

    Returns:
        (end - begin, columns), in the dtype of its pieces.
    """
    columns = weight.shape[1]
    return weight.read(begin * columns, end * columns).view(end - begin, columns)


def read_flat(weight: Pieces, size: int = PIECE) -> Iterator[Tensor]:
    """All of a weight in flat pieces."""
    length = math.prod(weight.shape)
    for begin in range(0, length, size):
        yield weight.read(begin, min(begin + size, length))


def _around(begin: int, end: int, length: int, step: int) -> tuple[int, int]:
    """The smallest range of whole blocks of ``step`` that holds [begin, end); the last block may be short."""
    return begin // step * step, min(length, -(-end // step) * step)


# ---- three sources ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """A tensor in a safetensors file; pieces have the stored dtype."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        size = self.dtype.itemsize
        return read_bytes(self.path, self.begin + begin * size, (end - begin) * size).view(self.dtype)


@dataclass(frozen=True)
class Packed:
    """A weight in 4 bits in a safetensors file; pieces are what its codes stand for, in fp32.

    Args:
        begin: of the packed codes in the file.
        form: the weight without its codes; its scales are in memory: 1 or 4 bytes a block.
    """

    path: Path
    begin: int
    form: QuantizedWeight

    dtype = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.form.shape)

    @cached_property
    def scales(self) -> Tensor:
        """(blocks,) fp32, decoded once."""
        return decode_absmax(self.form)

    def codes(self, begin: int, end: int) -> Tensor:
        """The bytes [begin, end) of the packed codes, as they are stored."""
        return read_bytes(self.path, self.begin + begin, end - begin)

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        first, last = _around(begin, end, self.form.shape.numel(), self.form.block_size)
        codes = read_bytes(self.path, self.begin + first // 2, -(-last // 2) - first // 2)
        piece = _blocks(self.form, codes, self.scales, first, last)
        return cpu_nf4.dequantize(piece, torch.float32)[begin - first : end - first]


def _blocks(form: QuantizedWeight, codes: Tensor, scales: Tensor, first: int, last: int) -> QuantizedWeight:
    """The blocks of [first, last) as a weight of their own, with plain scales."""
    size = form.block_size
    own = scales[first // size : -(-last // size)]
    return dataclasses.replace(form, packed=codes, absmax=own, absmax2=None, offset=None, shape=torch.Size((last - first,)))


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file; pieces are dequantized to fp32.

    Args:
        heads: of q and k in files of the llama architecture, whose rows are put back in order; None otherwise.
    """

    path: Path
    name: str
    info: TensorInfo
    heads: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype | None:
        """What each number is stored as; None where blocks share a scale."""
        return DTYPES.get(self.info.type_name)

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        head_rows = 1 if self.heads is None else rows // self.heads
        step = head_rows if len(self.shape) > 1 else rows  # a vector is small, and may be one block
        first, last = _around(begin, end, rows * columns, step * columns)
        num_rows = (last - first) // columns
        place = self.info.begin + first // columns * (self.info.num_bytes // rows)
        num_bytes = self.info.num_bytes * num_rows // rows
        info = TensorInfo(self.info.type_name, (num_rows, *self.shape[1:]), place, num_bytes)
        with self.path.open("rb") as file:
            piece = read_tensor(file, info, self.name)
        heads = None if self.heads is None else num_rows // head_rows
        return our_order(piece, heads).view(-1)[begin - first : end - first]


# ---- and what 4 bits make of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class In4Bits:
    """A dense weight as ``load_model(quant=...)`` would hold it; pieces are what its codes would stand for, in fp32.

    Read twice: the scales of all blocks come first, since double quantization takes their mean.
    """

    name: str
    dense: Pieces
    quant: QuantConfig

    dtype = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.dense.shape

    @cached_property
    def scales(self) -> Tensor:
        """(blocks,) fp32, decoded once."""
        absmax = torch.cat([self._absmax(piece) for piece in read_flat(self.dense)])
        if not absmax.isfinite().all():
            what = "a weight is not a finite fp32 number"
            raise UserError("model/non-finite-weight", what, where=visible(self.name), expected="finite numbers only")
        if not self.quant.double_quant:
            return absmax
        codes, absmax2, offset = quantize_absmax(absmax)
        nothing = torch.empty(0, dtype=torch.uint8)
        shape = torch.Size((absmax.numel() * self.quant.block_size,))
        size, levels = self.quant.block_size, codebook(self.quant.levels)
        return decode_absmax(QuantizedWeight(nothing, codes, absmax2, offset, levels, size, shape, torch.float32))

    def _absmax(self, piece: Tensor) -> Tensor:
        size = self.quant.block_size
        return F.pad(piece.float(), (0, -piece.numel() % size)).view(-1, size).abs().amax(1)

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        size = self.quant.block_size
        first, last = _around(begin, end, math.prod(self.shape), size)
        q = cpu_nf4.quantize(self.dense.read(first, last), size, False, self.quant.levels, name=self.name)
        piece = _blocks(q, q.packed, self.scales, first, last)
        return cpu_nf4.dequantize(piece, torch.float32)[begin - first : end - first]


@dataclass(frozen=True)
class WithRows:
    """A table of ``shape[0]`` rows, some of them from an adapter, the others as the file holds them.

    Args:
        table: (V, D), as stored; rows beyond it are all from the adapter.
        rows: its rows; pieces have the wider dtype of both.
        shape: (V or more, D).
    """

    table: Pieces
    rows: TrainedRows
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """What each number of the table is stored as."""
        return self.table.dtype

    def read(self, begin: int, end: int) -> Tensor:
        """The range [begin, end) of the flat tensor."""
        columns = self.shape[1]
        first, last = _around(begin, end, math.prod(self.shape), columns)
        length = math.prod(self.table.shape)
        stored = self.table.read(min(first, length), min(last, length)) if first < length else torch.empty(0, dtype=self.dtype)
        numbers = F.pad(stored, (0, last - first - len(stored))).view(-1, columns)
        return self.rows.merged_rows(numbers, first // columns).view(-1)[begin - first : end - first]


# ---- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredModel:
    """A model in its files, checked as ``load_model`` checks it, with no weight in memory.

    Args:
        open: what opens each weight, by name, as the files hold it; a tied head is not among them. What a weight needs
            beside its pieces (scales) lives as long as what was opened.
        in_4_bits: the form of those that the files hold in 4 bits.
        file_dtype: how most weights are stored, as ``Origin`` says it.
        dense_dtype: how most dense weights are stored; bf16 for GGUF's own types.
        metadata: of the safetensors headers.
    """

    source: Source
    config: ModelConfig
    open: Mapping[str, Callable[[], Pieces]]
    in_4_bits: Mapping[str, QuantConfig]
    file_dtype: str
    dense_dtype: torch.dtype
    metadata: Mapping[str, str]


def open_model(source: Source) -> StoredModel:
    """Check the files of a model; weights are read when they are asked for.

    Raises:
        UserError: what ``load_model`` raises before it reads a weight.
    """
    return _open_gguf(source) if source.kind == "gguf" else _open_folder(source)


def _open_gguf(source: Source) -> StoredModel:
    gguf: GGUF = read_gguf(source.path)
    config, names = check_gguf(gguf)
    heads = interleaved_heads(gguf, config)
    ways = {
        ours: partial(GGUFTensor, gguf.path, theirs, gguf.tensors[theirs], heads.get(theirs)) for theirs, ours in names.items()
    }
    stored = file_dtype(gguf)
    return StoredModel(source, config, ways, {}, stored, DTYPES.get(stored, torch.bfloat16), {})


def _open_folder(source: Source) -> StoredModel:
    folder = check_folder(source.path)
    ways: dict[str, Callable[[], Pieces]] = {}
    for header in folder.headers:
        begin = header.data_begin
        for name, entry in header.entries.items():
            if name in folder.dense:
                ways[name] = partial(Dense, header.path, begin + entry.begin, entry.shape, DTYPES[entry.dtype])
            elif name in folder.in_4_bits:
                ways[name] = partial(_open_packed, header.path, begin + entry.begin, folder, folder.in_4_bits[name])
    forms = {name: weight.form for name, weight in folder.in_4_bits.items()}
    metadata = {key: value for header in folder.headers for key, value in header.metadata.items()}
    return StoredModel(source, folder.config, ways, forms, folder.stored_as, DTYPES[folder.dense_dtype], metadata)


def _open_packed(path: Path, begin: int, folder: CheckedFolder, stored: StoredWeight) -> Packed:
    return Packed(path, begin, read_tables(folder.headers, stored, path.parent))
