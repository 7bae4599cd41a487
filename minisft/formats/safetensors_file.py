"""Safetensors files: checked before they are believed.

The header is JSON that somebody else wrote. ``read_header`` checks everything in it against the size
of the file with plain Python integers, before a byte of the data is read. What is refused: duplicate keys,
holes, overlaps, unknown dtypes, sizes that do not follow from the shape. The one idea: nothing is allocated and no tensor
is touched until the header has been found true.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from minisft.common import safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.formats.file_bytes import read_bytes

MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8

# The format's words, the ones torch can hold. (The 4- and 6-bit floats of newer files are not read.)
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header declares it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors in it and the file's own remarks. Offsets of tensors count from ``data_begin``."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int


def read_header(path: Path, family: str = "model") -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
        family: error family, ``model`` or ``adapter``.

    Raises:
        UserError: ``family/safetensors``, for everything that is not exactly as the format says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _HeaderError(
                    "the length of the header is impossible",
                    f"{length} bytes in a file of {size}",
                    f"2 to {min(MAX_HEADER_BYTES, max(size - 8, 0))}",
                )
            entries, metadata = _parse(file.read(length))
        _check_layout(entries, size - 8 - length)
    except _HeaderError as bad:
        raise UserError(
            f"{family}/safetensors", bad.what, where=visible(path), found=bad.found, expected=bad.expected
        ) from None
    except OSError as error:
        raise UserError(
            f"{family}/safetensors", "cannot read the file", where=visible(path), found=error.strerror or "an I/O error"
        ) from None
    return Header(path, entries, metadata, 8 + length)


class _HeaderError(Exception):
    """What is wrong with a header; ``read_header`` adds the file."""

    def __init__(self, what: str, found: object, expected: str) -> None:
        super().__init__(what)
        self.what, self.found, self.expected = what, visible(found), expected


def _parse(raw: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    if raw[:1] != b"{":
        raise _HeaderError("the header is not a JSON object", raw[:8], "{")
    try:
        header = safe_json.loads(raw)
    except ValueError as error:
        raise _HeaderError("the header is not valid JSON", error, "one JSON object") from None
    if not isinstance(header, dict):
        raise _HeaderError("the header is not a JSON object", type(header).__name__, "an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("the metadata is not a table of strings", metadata, "strings only")
    return {name: _entry(name, value) for name, value in header.items()}, {key: str(value) for key, value in metadata.items()}


def _entry(name: str, value: JSON) -> Entry:
    if not name or not name.isprintable():
        raise _HeaderError("a tensor's name is not printable", name, "printable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"tensor {visible(name)} is described wrongly", value, "dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], _naturals(value["shape"]), _naturals(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _HeaderError(f"tensor {visible(name)} has an unknown dtype", dtype, ", ".join(DTYPES))
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise _HeaderError(
            f"tensor {visible(name)} has an impossible shape", value["shape"], f"at most {MAX_DIMENSIONS} sizes, none negative"
        )
    if offsets is None or len(offsets) != 2:
        raise _HeaderError(f"tensor {visible(name)} has impossible offsets", value["data_offsets"], "[begin, end]")
    needed, given = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise _HeaderError(
            f"tensor {visible(name)} has the wrong size", f"{given} bytes", f"{needed} bytes for {dtype} {list(shape)}"
        )
    return Entry(dtype, shape, offsets[0], offsets[1])


def _naturals(value: JSON) -> tuple[int, ...] | None:
    """A JSON list of integers from 0 to 2^63 - 1, or None."""
    if not isinstance(value, list):
        return None
    numbers = tuple(n for n in value if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63)
    return numbers if len(numbers) == len(value) else None


def _check_layout(entries: Mapping[str, Entry], data_bytes: int) -> None:
    """The tensors must fill the data from the first byte to the last, without hole or overlap."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps its neighbour" if entry.begin < position else "leaves a hole before it"
            raise _HeaderError(f"tensor {visible(name)} {kind}", f"it begins at byte {entry.begin}", f"byte {position}")
        position = entry.end
    if position > data_bytes:
        raise _HeaderError("the file is truncated", f"{data_bytes} bytes of data", f"{position} bytes")
    if position < data_bytes:
        raise _HeaderError("the file is too long for its header", f"{data_bytes} bytes of data", f"{position} bytes")


def read_tensors(header: Header, names: list[str] | None = None, family: str = "model") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) one at a time, each in memory of its own.

    Args:
        header: of the file, checked.
        names: the tensors, each in the file.
        family: of the errors.

    Returns:
        an iterator of names and tensors.

    Raises:
        UserError: the file has become shorter, or cannot be read.
    """
    for name in header.entries if names is None else names:
        entry = header.entries[name]
        raw = read_bytes(header.path, header.data_begin + entry.begin, entry.end - entry.begin, family)
        yield name, raw.view(DTYPES[entry.dtype]).view(entry.shape)


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one new file: sorted names, the metadata transformers and PEFT expect, the mode the umask gives.

    Call it inside ``durable.staged_folder``, which syncs the file and renames its folder.
    """
    path.open("xb").close()
    mode = path.stat().st_mode & 0o777
    whole = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(whole, str(path), metadata={"format": "pt"})
    path.chmod(mode)  # the library replaces the file by its own and leaves that 0600, whatever the umask
