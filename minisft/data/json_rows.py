"""The rows of a JSON lines file or a JSON array, streamed, each with the position that errors name.

Whatever is wrong with the bytes (missing file, gzip under a .jsonl name, bad UTF-8, bad JSON, a row of gigabytes) is a
``UserError`` with file and line here, so that the modules above only ever see objects.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.tables import DELIMITERS, csv_rows, open_compressed, parquet_rows

MAX_ROW_BYTES = 16 * 2**20
# A JSON array is held in memory as a whole, unlike lines.
MAX_ARRAY_BYTES = 512 * 2**20
# First bytes of what is sometimes named .jsonl.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"ARROW1": "arrow",
    b"SQLite": "SQLite",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
COMPRESSED = ("gzip", "zstandard")
BOM = b"\xef\xbb\xbf"


class RowFile:
    """The rows of one file, streamed; ``sha256`` and ``notes`` are complete once the rows are exhausted."""

    def __init__(self, path: Path, max_row_bytes: int) -> None:
        self.path = path
        self.max_row_bytes = max_row_bytes
        self.notes: list[str] = []
        self._digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                self._head = file.read(4096)
        except OSError as error:
            raise _unreadable(path, error) from None

    @property
    def sha256(self) -> str:
        """Of the bytes read so far, in hexadecimal digits."""
        return self._digest.hexdigest()

    @property
    def kind(self) -> str | None:
        """What the first bytes show, if it is no text."""
        return next((kind for magic, kind in MAGIC.items() if self._head.startswith(magic)), None)

    @property
    def is_csv(self) -> bool:
        """Whether the file is a table of text."""
        return self.kind is None and self.path.suffix.lower() in DELIMITERS

    @property
    def has_lines(self) -> bool:
        """Whether each row is a line of JSON, plain or compressed."""
        return not self.is_array and not self.is_csv and self.kind != "parquet"

    def open(self) -> IO[bytes]:
        """The lines' bytes, unpacked."""
        return open_compressed(self.path, self.kind) if self.kind in COMPRESSED else self.path.open("rb")

    @property
    def is_array(self) -> bool:
        """Whether the file is one JSON array; else it has one object a line."""
        return self._head.removeprefix(BOM).lstrip()[:1] == b"[" and self.path.suffix.lower() != ".jsonl"

    def rows(self) -> Iterator[tuple[int, str, dict[str, JSON]]]:
        """(number from 1, file and line for errors, object) of each row."""
        if self.kind == "parquet" or self.is_csv:
            self._digest.update(self.path.read_bytes())
            yield from parquet_rows(self.path) if self.kind == "parquet" else csv_rows(self.path, self.max_row_bytes)
            return
        if self.kind is not None and self.kind not in COMPRESSED:
            fix = "unpack or convert it to JSON lines in UTF-8 first"
            raise UserError(
                "data/not-text",
                "the data is not JSON text",
                where=visible(self.path),
                found=self.kind,
                expected="JSON lines, CSV, TSV or Parquet",
                fix=fix,
            )
        if self._head.startswith(BOM):
            self.notes.append("the file starts with a byte order mark, skipped")
        for number, where, value in self._items() if self.is_array else self._lines():
            if not isinstance(value, dict):
                raise UserError(
                    "data/not-an-object", "the row is not an object", where=where, found=json_type(value), expected="{...}"
                )
            yield number, where, value

    def _lines(self) -> Iterator[tuple[int, str, JSON]]:
        offset = 0
        with self.open() as file, _unpacking(self.path):
            for number, raw in enumerate(iter(lambda: file.readline(self.max_row_bytes + 1), b""), 1):
                where = f"{visible(self.path)}:{number}"
                if len(raw) > self.max_row_bytes:
                    expected = f"at most {self.max_row_bytes} bytes"
                    raise UserError(
                        "data/row-too-large",
                        "the row is too large",
                        where=where,
                        found=f"over {self.max_row_bytes} bytes",
                        expected=expected,
                    )
                self._digest.update(raw)
                if raw.strip():
                    yield number, where, _parse(raw, where, offset)
                offset += len(raw)

    def _items(self) -> Iterator[tuple[int, str, JSON]]:
        if self.path.stat().st_size > MAX_ARRAY_BYTES:
            fix = "write one object a line (.jsonl): lines are streamed"
            raise UserError(
                "data/array-too-large",
                "the JSON array is too large",
                where=visible(self.path),
                expected=f"at most {MAX_ARRAY_BYTES} bytes",
                fix=fix,
            )
        raw = self.path.read_bytes()
        self._digest.update(raw)
        items = _parse(raw, visible(self.path), 0)
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            yield number, f"{visible(self.path)}: item {number}", item


@contextlib.contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """What is wrong with a compressed file, as the user's error."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        what, fix = "the file cannot be unpacked", "copy or pack it again"
        raise UserError("data/unreadable", what, where=visible(path), found=visible(error), fix=fix) from None


def _parse(raw: bytes, where: str, offset: int) -> JSON:
    try:
        text = raw.decode("utf-8-sig")
        return safe_json.loads(text)
    except UnicodeDecodeError as error:
        # error.start does not count a byte order mark that the codec took off.
        at = offset + error.start + len(raw) - len(error.object)
        raise UserError(
            "data/bad-utf8",
            "the text is not UTF-8",
            where=f"{where}: byte {at}",
            found=visible(raw[error.start : error.start + 8]),
            fix="save the file as UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        place = f"{where}: line {error.lineno} column {error.colno}" if error.lineno > 1 else f"{where}: column {error.colno}"
        around = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
        raise UserError(
            "data/bad-json",
            "the row is not JSON",
            where=place,
            found=f"{error.msg} near {visible(around)!r}",
            expected="one JSON object a line",
        ) from None
    except ValueError as error:
        raise UserError("data/bad-value", "the row is not strict JSON", where=where, found=visible(error)) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.4)
        fix = f"did you mean {listing(near)}?" if near else ""
        return UserError("data/no-file", "no such data file", where=visible(path), fix=fix)
    return UserError(
        "data/unreadable", "cannot read the data", where=visible(path), found=error.strerror or type(error).__name__
    )


def json_type(value: JSON) -> str:
    """JSON's own word for a parsed value."""
    names = {dict: "object", list: "list", bool: "boolean", int: "number", float: "number", str: "string"}
    return names.get(type(value), "null")
