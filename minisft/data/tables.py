"""Rows of tables: CSV, TSV and Parquet become the objects that a line of JSON would hold.

A cell of CSV is a string, whatever it looks like; a cell of Parquet keeps its type as far as JSON has it. Compressed JSON lines
are opened here too. It refuses a record with more or fewer cells than the header, names that stand twice, and values that JSON
has no form for; nothing is guessed or filled in. Parquet and zstandard need pyarrow (extra ``data``), loaded when it is needed.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INSTALL = 'pip install "minisft[data]"'


def open_compressed(path: Path, kind: str) -> IO[bytes]:
    """The bytes inside a ``gzip`` or ``zstandard`` file.

    Raises:
        UserError: ``data/needs-pyarrow``.
    """
    if kind == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise _needs_pyarrow(path, "zstandard") from None
    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


def _needs_pyarrow(path: Path, kind: str) -> UserError:
    return UserError("data/needs-pyarrow", f"{kind} is read through pyarrow", where=visible(path), fix=_INSTALL)


def csv_rows(path: Path, max_row_bytes: int) -> Iterator[tuple[int, str, dict[str, JSON]]]:
    """(record number from 1, file and line, object) of each record under the header.

    Raises:
        UserError: ``data/bad-utf8``, ``data/bad-csv``, ``data/csv-cells``, ``data/csv-header``.
    """
    before = csv.field_size_limit(max_row_bytes)  # of the whole process, hence put back
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _records(path, csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True))
    except UnicodeDecodeError as error:
        fix = "save the file as UTF-8"
        raise UserError("data/bad-utf8", "the text is not UTF-8", where=visible(path), found=visible(error), fix=fix) from None
    finally:
        csv.field_size_limit(before)


def _records(path: Path, reader: Reader) -> Iterator[tuple[int, str, dict[str, JSON]]]:
    try:
        header = next(reader, [])
        _check_header(path, header)
        number = 0
        for cells in reader:
            where = f"{visible(path)}:{reader.line_num}"
            if not cells:
                continue  # an empty line
            number += 1
            if len(cells) != len(header):
                what, fix = "the record has another number of cells than the header", "quote cells that hold a delimiter"
                found, expected = f"{len(cells)} cells", f"{len(header)}: {listing(header)}"
                raise UserError("data/csv-cells", what, where=where, found=found, expected=expected, fix=fix)
            yield number, where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{visible(path)}:{reader.line_num}"
        raise UserError("data/bad-csv", "the table cannot be read", where=where, found=visible(error)) from None


def _check_header(path: Path, header: list[str]) -> None:
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if header and (twice or "" in header):
        found = f"{listing(twice)} twice" if twice else "a column without a name"
        fix = "give every column a name of its own"
        raise UserError("data/csv-header", "the header names no columns", where=f"{visible(path)}:1", found=found, fix=fix)


def parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, JSON]]]:
    """(number from 1, file and row, object) of each row.

    Raises:
        UserError: ``data/needs-pyarrow``, ``data/bad-parquet``, ``data/bad-value``.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise _needs_pyarrow(path, "Parquet") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(str(path)) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    where = f"{visible(path)}: row {number}"
                    yield number, where, {str(name): _json(value, where, str(name)) for name, value in values.items()}
    except (pyarrow.ArrowException, OSError) as error:
        what = "the Parquet file cannot be read"
        raise UserError("data/bad-parquet", what, where=visible(path), found=visible(error)) from None


def _json(value: object, where: str, column: str) -> JSON:
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [_json(item, where, column) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(item, where, column) for key, item in value.items()}
    found = visible(f"{type(value).__name__} in the column {column}", 80)
    fix = "store it as a string or a number"
    raise UserError("data/bad-value", "the cell is nothing that JSON has", where=where, found=found, fix=fix)
