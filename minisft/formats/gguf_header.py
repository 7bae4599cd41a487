"""The header of a GGUF file, read with suspicion.

Layout (little endian): magic ``GGUF``, version, number of tensors, number of metadata keys, the metadata, one description a
tensor, padding, data. Every count comes from the file, so each is held against the bytes that are left before anything
loops over it; offsets and sizes are Python integers, which do not overflow. The reader that comes with the ``gguf`` package
trusts these numbers (an array length of 2^60 keeps it busy for ever); only its tables of types are used here.

Ref: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minisft.common.errors import UserError, listing, visible
from minisft.kernels.cpu_gguf import BLOCKS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20  # metadata and descriptions; a vocabulary of 256 Ki tokens with merges takes about 15 MiB
MAX_KEYS = 2**16
MAX_TENSORS = 2**17
MAX_ITEMS = 2**22  # of one array
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
DEFAULT_ALIGNMENT = 32
WINDOW_BYTES = 2**20

STRING, ARRAY, BOOL = 8, 9, 7  # type ids of values
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # type id -> struct
_LENGTH = struct.Struct("<Q")
_SMALLEST_KEY = 8 + 4 + 1  # an empty name, a type, one byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset

# Type id -> name, numbers and bytes of a block; those of ``BLOCKS`` are what the C++ decodes.
_QUANTIZED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)} | {i: (name, *BLOCKS[name]) for i, name in _QUANTIZED.items()}

Scalar = str | int | float | bool
Metadata = dict[str, Scalar | list[Scalar]]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file and how it is stored.

    Args:
        type_name: the name in ``gguf.GGMLQuantizationType``, e.g. ``Q4_1``.
        shape: outermost dimension first, as torch has it (the file lists them the other way round).
        begin: first byte, counted from the start of the file.
    """

    type_name: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True)
class GGUF:
    """A checked header."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]


class _HeaderError(Exception):
    """What is wrong; ``read_gguf`` adds the file and the byte."""

    def __init__(self, what: str, found: object = "", expected: str = "") -> None:
        super().__init__(what)
        self.what, self.found, self.expected = visible(what), visible(found), expected


class _Walk:
    """Reads forward through the header, a window at a time, and never past the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position = file, 0
        self.size = os.fstat(file.fileno()).st_size
        self.end = min(self.size, MAX_HEADER_BYTES)
        self.window, self.window_begin = b"", 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.end - self.position:
            raise _HeaderError(f"{what} runs past the end", f"{count} bytes", f"at most {self.end - self.position}")
        begin = self.position - self.window_begin
        if begin + count > len(self.window):
            rest = self.window[begin:]
            size = min(max(count, WINDOW_BYTES), self.end - self.position)
            self.window, self.window_begin, begin = rest + self.file.read(size - len(rest)), self.position, 0
            if len(self.window) < count:
                raise _HeaderError("the file became shorter while it was read")
        self.position += count
        return self.window[begin : begin + count]

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0])

    def count(self, code: str, what: str, smallest: int, limit: int) -> int:
        """A number of things of at least ``smallest`` bytes each, checked before anybody loops over them."""
        found, fits = self.number(code, what), (self.end - self.position) // smallest
        if found > min(limit, fits):
            raise _HeaderError(f"{what} is impossible", found, f"at most {min(limit, fits)}")
        return found

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _HeaderError(f"{what} is not UTF-8", raw[:40]) from None

    def texts(self, count: int, what: str) -> list[str]:
        """``text``, ``count`` times. A vocabulary has 100 000: those that lie whole in the window are read at once."""
        found: list[str] = []
        while len(found) < count:
            self._texts_in_window(found, count)
            if len(found) < count:
                found.append(self.text(what))  # moves the window, or says what is wrong
        return found

    def _texts_in_window(self, found: list[str], count: int) -> None:
        window, begin = self.window, self.position - self.window_begin
        try:
            for _ in range(count - len(found)):
                text_begin = begin + 8
                text_end = text_begin + _LENGTH.unpack_from(window, begin)[0]
                if text_end > len(window):
                    break
                found.append(window[text_begin:text_end].decode("utf-8"))
                begin = text_end
        except (struct.error, UnicodeDecodeError):
            pass  # a length across the window's end, or no UTF-8
        self.position = self.window_begin + begin


def read_gguf(path: Path) -> GGUF:
    """Read and check the whole header.

    Raises:
        UserError: ``model/gguf``, with the byte at which it went wrong.
    """
    try:
        with path.open("rb") as file:
            walk = _Walk(file)
            try:
                return _read(walk, path)
            except _HeaderError as bad:
                where = f"{visible(path)}, byte {walk.position}"
                raise UserError("model/gguf", bad.what, where=where, found=bad.found, expected=bad.expected) from None
    except OSError as error:
        raise UserError(
            "model/gguf", "cannot read the file", where=visible(path), found=error.strerror or "an I/O error"
        ) from None


def _read(walk: _Walk, path: Path) -> GGUF:
    if (magic := walk.take(4, "the magic number")) != MAGIC:
        raise _HeaderError("this is not a GGUF file", magic, str(MAGIC))
    if (version := walk.number("I", "the version")) not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise _HeaderError(
            "a big-endian file" if swapped else "an unknown version of the format", version, "2 or 3, little endian"
        )
    num_tensors = walk.count("Q", "the number of tensors", _SMALLEST_TENSOR, MAX_TENSORS)
    num_keys = walk.count("Q", "the number of metadata keys", _SMALLEST_KEY, MAX_KEYS)
    metadata: Metadata = {}
    for _ in range(num_keys):
        name = walk.text("a metadata key")
        if name in metadata:
            raise _HeaderError("a metadata key comes twice", name)
        metadata[name] = _value(walk, name)
    raw = [_description(walk) for _ in range(num_tensors)]
    alignment = _alignment(metadata)
    data_start = -(-walk.position // alignment) * alignment
    return GGUF(path, metadata, _tensors(raw, data_start, alignment, walk.size))


def _value(walk: _Walk, name: str) -> Scalar | list[Scalar]:
    kind = walk.number("I", f"the type of {name}")
    if kind != ARRAY:
        return _items(walk, kind, 1, name)[0]
    kind = walk.number("I", f"the item type of {name}")
    if kind == ARRAY:
        raise _HeaderError(f"{name} is an array of arrays", expected="an array of numbers or strings")
    smallest = 8 if kind == STRING else struct.calcsize("<" + _NUMBERS.get(kind, "B"))
    return _items(walk, kind, walk.count("Q", f"the length of {name}", smallest, MAX_ITEMS), name)


def _items(walk: _Walk, kind: int, count: int, name: str) -> list[Scalar]:
    if kind == STRING:
        return [*walk.texts(count, name)]
    if kind not in _NUMBERS:
        raise _HeaderError(f"{name} has an unknown type", kind, f"{', '.join(map(str, _NUMBERS))}, {STRING} or {ARRAY}")
    code = _NUMBERS[kind]
    numbers: list[Scalar] = list(struct.unpack(f"<{count}{code}", walk.take(count * struct.calcsize("<" + code), name)))
    if kind != BOOL:
        return numbers
    if not set(numbers) <= {0, 1}:
        raise _HeaderError(f"{name} is neither true nor false", max(numbers, key=int), "0 or 1")
    return [bool(number) for number in numbers]


def _alignment(metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and 1 <= alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not is_power:
        raise _HeaderError("general.alignment is impossible", alignment, f"a power of two up to {MAX_ALIGNMENT}")
    return alignment


_Description = tuple[str, tuple[int, ...], int, int]  # name, dimensions as in the file, type id, offset in the data


def _description(walk: _Walk) -> _Description:
    name = walk.text("a tensor's name")
    if not name or not name.isprintable():
        raise _HeaderError("a tensor's name is not printable", name)
    num_dimensions = walk.count("I", f"the number of dimensions of {name}", 8, MAX_DIMENSIONS)
    dimensions = tuple(walk.number("Q", f"a dimension of {name}") for _ in range(num_dimensions))
    return name, dimensions, walk.number("I", f"the type of {name}"), walk.number("Q", f"the offset of {name}")


def _tensors(raw: list[_Description], data_start: int, alignment: int, file_bytes: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, dimensions, type_id, offset in raw:
        if name in tensors:
            raise _HeaderError("a tensor comes twice", name)
        type_name, num_bytes = _stored_as(name, dimensions, type_id)
        if offset % alignment:
            raise _HeaderError(f"tensor {name} is not aligned", f"offset {offset}", f"a multiple of {alignment}")
        if data_start + offset + num_bytes > file_bytes:
            raise _HeaderError(
                f"tensor {name} lies beyond the end: the file is truncated",
                f"{file_bytes} bytes",
                f"{data_start + offset + num_bytes} bytes",
            )
        tensors[name] = TensorInfo(type_name, dimensions[::-1], data_start + offset, num_bytes)
    _refuse_overlap(tensors)
    return tensors


def _stored_as(name: str, dimensions: tuple[int, ...], type_id: int) -> tuple[str, int]:
    """The type's name and the bytes that a tensor of it takes."""
    type_name, block_items, block_bytes = _TYPES.get(type_id) or _rare_type(name, type_id)
    if not dimensions or 0 in dimensions or dimensions[0] % block_items:
        raise _HeaderError(
            f"tensor {name} has an impossible shape",
            list(dimensions),
            f"rows of a multiple of {block_items} items for {type_name}",
        )
    return type_name, math.prod(dimensions) // block_items * block_bytes


def _rare_type(name: str, type_id: int) -> tuple[str, int, int]:
    """Of a type that only the package knows; its import takes a while."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if type_id not in GGMLQuantizationType.__members__.values():
        raise _HeaderError(f"tensor {name} has an unknown type", type_id, listing(GGMLQuantizationType.__members__, 40))
    kind = GGMLQuantizationType(type_id)
    return (kind.name, *GGML_QUANT_SIZES[kind])


def _refuse_overlap(tensors: dict[str, TensorInfo]) -> None:
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if info.begin < end:
            raise _HeaderError(f"tensors {before} and {name} overlap", f"byte {info.begin}", f"byte {end} or later")
        end, before = info.begin + info.num_bytes, name
