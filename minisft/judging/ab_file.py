"""The units of an A/B test from a CSV or JSON lines file: ``unit, variant, converted[, value, time, segment, guardrails]``.

One unit is one observation, whatever the number of its rows: rows of a unit are added up, and a unit in two arms is an error,
because then nobody knows which arm caused what.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minisft.common.errors import UserError, listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.data.json_rows import MAGIC, MAX_ROW_BYTES, RowFile

MAX_VARIANTS, MAX_CELL, MAX_BYTES = 10, 10_000, 512 * 2**20
REQUIRED = ("unit", "variant", "converted")


@dataclass
class Unit:
    """What is known of one unit: conversions count once, numbers add up, the time is that of its first row."""

    unit: str
    variant: str
    converted: int
    time: str = ""
    segment: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """The units in the file's order, the variants in order of name, and what has to be said about the file."""

    units: list[Unit]
    variants: list[str]
    numeric: list[str]
    sha256: str
    notes: list[str]

    def of(self, variant: str) -> list[Unit]:
        """The units of one arm."""
        return [unit for unit in self.units if unit.variant == variant]


def read_trial(path: str | Path, numeric: Sequence[str] = ()) -> Trial:
    """Read the file.

    Args:
        path: .csv with a header, or .jsonl.
        numeric: columns of numbers beside ``value``, for guardrails and a covariate.

    Returns:
        one entry a unit.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    path = Path(path)
    units: dict[str, Unit] = {}
    repeated, rows, known = 0, 0, list[str]()
    for where, row in _rows(path):
        rows += 1
        known = known or _check_columns(row, where, numeric)
        unit = _unit(row, where, known)
        before = units.setdefault(unit.unit, unit)
        if before is not unit:
            repeated += 1
            _add(before, unit, where)
    if not units:
        raise UserError("data/no-rows", "there is nobody in the test", where=visible(path), found="0 rows")
    variants = sorted({unit.variant for unit in units.values()})
    if not 2 <= len(variants) <= MAX_VARIANTS:
        expected = f"2 to {MAX_VARIANTS} variants"
        found = f"{len(variants)}: {listing(variants, 4)}"
        raise UserError("data/variants", "the variants cannot be compared", where=visible(path), found=found, expected=expected)
    notes = [f"{repeated} of {rows} rows belong to a unit that stood before; they were added up"] if repeated else []
    return Trial(list(units.values()), variants, known, hashlib.sha256(path.read_bytes()).hexdigest(), notes)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, JSON]]]:
    if path.suffix.lower() in (".jsonl", ".json"):
        for _, where, row in RowFile(path, MAX_ROW_BYTES).rows():
            yield where, row
        return
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            where = f"{visible(path)}:{reader.line_num}"
            if len(cells) != len(header):
                found, expected = f"{len(cells)} cells", f"{len(header)}, as in the header"
                what = "a row has another number of cells"
                raise UserError("data/ragged-row", what, where=where, found=found, expected=expected)
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{visible(path)}:{reader.line_num}"
        raise UserError("data/bad-csv", "the row is not CSV", where=where, found=visible(error)) from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                "data/too-large", "the file is too large", where=visible(path), expected=f"at most {MAX_BYTES} bytes"
            )
        raw = path.read_bytes()
        kind = next((kind for magic, kind in MAGIC.items() if raw.startswith(magic)), None)
        if kind is not None:
            raise UserError("data/not-text", "the data is not text", where=visible(path), found=kind, expected="CSV in UTF-8")
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("data/no-file", "no such data file", where=visible(path)) from None
    except UnicodeDecodeError as error:
        raise UserError("data/bad-utf8", "the text is not UTF-8", where=f"{visible(path)}: byte {error.start}") from None
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise UserError("data/unreadable", "cannot read the data", where=visible(path), found=found) from None


def _check_columns(row: dict[str, JSON], where: str, numeric: Sequence[str]) -> list[str]:
    """The columns of numbers that the file has; an error if one that is needed is missing."""
    for name in (*REQUIRED, *numeric):
        if name not in row:
            fix = nearest(name, row) or "name the columns unit, variant, converted"
            raise UserError("data/no-column", "a column is missing", where=where, found=listing(row), expected=name, fix=fix)
    return [*(["value"] if "value" in row else []), *numeric]


def _unit(row: dict[str, JSON], where: str, numeric: Sequence[str]) -> Unit:
    texts = {name: _cell(row.get(name), f"{where}: {name}") for name in ("unit", "variant", "time", "segment")}
    for name in ("unit", "variant"):
        if not texts[name]:
            raise UserError("data/empty-cell", "a cell is empty", where=f"{where}: {name}", expected="a name")
    numbers = {name: _number(row.get(name), f"{where}: {name}") for name in numeric}
    return Unit(texts["unit"], texts["variant"], _converted(row["converted"], where), texts["time"], texts["segment"], numbers)


def _cell(value: JSON, where: str) -> str:
    text = "" if value is None else str(value)
    if len(text) > MAX_CELL:
        found = f"{len(text)} characters"
        raise UserError("data/large-cell", "a cell is too large", where=where, found=found, expected=f"at most {MAX_CELL}")
    return text


def _converted(value: JSON, where: str) -> int:
    text = str(value).strip().lower()
    if text not in ("0", "1", "true", "false", "0.0", "1.0"):
        what, found = "a conversion is neither 0 nor 1", visible(value, 40)
        raise UserError("data/not-converted", what, where=f"{where}: converted", found=found, expected="0 or 1")
    return int(text in ("1", "true", "1.0"))


def _number(value: JSON, where: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        found = visible(value, 40)
        raise UserError("data/not-a-number", "a number is none", where=where, found=found, expected="a finite number")
    return number


def _add(before: Unit, unit: Unit, where: str) -> None:
    if before.variant != unit.variant:
        what = "a unit is in two arms"
        found = f"{visible(unit.unit, 60)}: {visible(before.variant, 40)}, {visible(unit.variant, 40)}"
        fix = "find out how it was assigned twice; then leave it out of both arms"
        raise UserError("data/unit-in-two-arms", what, where=where, found=found, expected="one variant a unit", fix=fix)
    before.converted = max(before.converted, unit.converted)
    before.numbers = {name: before.numbers[name] + number for name, number in unit.numbers.items()}


def require_ordered(trial: Trial) -> None:
    """Refuse units out of order: a sequential test looks at them in the order in which they came.

    Raises:
        UserError: no times, or one earlier than the one before it.
    """
    last = ""
    for unit in trial.units:
        if not unit.time:
            fix = "give a column time that sorts as text, as 2026-03-01T12:00 does"
            raise UserError(
                "data/no-time", "a sequential analysis needs times", where=f"unit {visible(unit.unit, 60)}", fix=fix
            )
        if time_key(unit.time) < time_key(last):
            where, found = f"unit {visible(unit.unit, 60)}", f"{visible(unit.time, 40)} after {visible(last, 40)}"
            fix = "sort the file by time"
            raise UserError("data/out-of-order", "the times are out of order", where=where, found=found, fix=fix)
        last = unit.time


def time_key(time: str) -> tuple[int, float, str]:
    """What times sort by: numbers as numbers, anything else as text, no time before all."""
    try:
        return (0, float(time), "") if time else (-1, 0.0, "")
    except ValueError:
        return (1, 0.0, time)
