"""The rows that ``minisft eval`` wrote for one model, and whether two such files may be compared.

A file ``x.rows.jsonl`` has one object a row: ``row``, ``score`` and, where there are any, ``prediction`` and ``reference``.
What applies to all of them (metric, form of the prompt, decoding) stands in ``x.json`` beside it. Two files are comparable when
everything but the model is the same; the first difference is the error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.json_rows import MAX_ROW_BYTES, RowFile, json_type
from minisft.data.messages import Example, read_dataset

SUFFIX = ".rows.jsonl"
LOWER_IS_BETTER = ("loss", "bits_per_byte", "kl")
# What must be equal in two heads, and why the scores would not be comparable otherwise.
SAME = ("metric", "form", "template_sha256", "decoding", "normalize", "end_of_turn", "data_sha256")
RowId = int | str


@dataclass(frozen=True)
class ScoredRow:
    """One row as it was scored; ``extra`` holds the metric's own columns."""

    row: RowId
    score: float
    prediction: str
    reference: str
    extra: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsFile:
    """A model's rows by their id, in the file's order, and what stands in the file beside them."""

    path: str
    rows: dict[RowId, ScoredRow]
    head: dict[str, JSON]

    @property
    def metric(self) -> str:
        """The metric's name, ``score`` when no file names it."""
        return str(self.head.get("metric", "score"))

    @property
    def sign(self) -> int:
        """1, or -1 for a metric of which less is better."""
        return -1 if self.metric in LOWER_IS_BETTER else 1


def read_rows(path: str | Path) -> RowsFile:
    """Read a rows file and the head beside it.

    Raises:
        UserError: ``data/...`` with file and line: no such file, a row without id or score, an id twice, no rows.
    """
    path, rows = Path(path), dict[RowId, ScoredRow]()
    for _, where, values in RowFile(path, MAX_ROW_BYTES).rows():
        row = _scored_row(values, where)
        if row.row in rows:
            raise UserError(
                "data/duplicate-row", "a row stands twice in the file", where=where, found=f"row {visible(row.row)}"
            )
        rows[row.row] = row
    if not rows:
        raise UserError("data/no-rows", "there is nothing to compare", where=visible(path), found="0 rows")
    return RowsFile(str(path), rows, _head(path))


def _scored_row(values: dict[str, JSON], where: str) -> ScoredRow:
    number, score = values.get("row"), values.get("score")
    if not isinstance(number, (int, str)) or isinstance(number, bool):
        found = f"the keys {listing(values)}" if number is None else json_type(number)
        fix = "give the file that minisft eval wrote: NAME.rows.jsonl"
        raise UserError("data/no-row-id", "a row has no id", where=where, found=found, expected='"row": a number', fix=fix)
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise UserError(
            "data/no-score", "a row has no score", where=where, found=visible(score, 40), expected="a finite number"
        )
    texts = {name: _text(values.get(name, ""), f"{where}: {name}") for name in ("prediction", "reference")}
    extra = {name: value for name, value in values.items() if name not in ("row", "score", *texts)}
    return ScoredRow(number, float(score), texts["prediction"], texts["reference"], extra)


def _text(value: JSON, where: str) -> str:
    if not isinstance(value, str):
        raise UserError("data/not-text", "a text is none", where=where, found=json_type(value), expected="a string")
    return value


def _head(path: Path) -> dict[str, JSON]:
    """The object in ``x.json`` beside ``x.rows.jsonl``; empty when there is none."""
    beside = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
    if not path.name.endswith(SUFFIX) or not beside.is_file():
        return {}
    try:
        head = safe_json.loads(beside.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(
            "data/bad-head", "the result beside the rows cannot be read", where=visible(beside), found=visible(error)
        ) from None
    if not isinstance(head, dict):
        raise UserError(
            "data/bad-head", "the result beside the rows is no object", where=visible(beside), found=json_type(head)
        )
    return head


# --- two files


def require_comparable(a: RowsFile, b: RowsFile) -> None:
    """Refuse two files that differ in more than the model.

    Raises:
        UserError: ``data/not-comparable`` with the first difference.
    """
    for name in SAME:
        if name in a.head and name in b.head and a.head[name] != b.head[name]:
            _differ(a, b, f"their {name.replace('_', ' ')}", a.head[name], b.head[name])
    for number in [*a.rows, *b.rows]:
        if number not in a.rows or number not in b.rows:
            lacking, having = (b, a) if number in a.rows else (a, b)
            found = f"row {visible(number)} is in {visible(having.path)} ({len(having.rows)} rows)"
            found += f", not in {visible(lacking.path)} ({len(lacking.rows)} rows)"
            raise _refusal("the two files do not hold the same rows", found)
    for number, row in a.rows.items():
        other = b.rows[number]
        for name in ("prompt_sha256", "tokens"):
            if name in row.extra and name in other.extra and row.extra[name] != other.extra[name]:
                what = f"the {name.removesuffix('_sha256')} of row {number}"
                _differ(a, b, what, row.extra.get(name), other.extra.get(name))
        if row.reference != other.reference:
            _differ(a, b, f"the reference of row {number}", row.reference, other.reference)


def _differ(a: RowsFile, b: RowsFile, what: str, in_a: JSON, in_b: JSON) -> None:
    found = f"{visible(_short(in_a), 60)} in {visible(a.path)}, {visible(_short(in_b), 60)} in {visible(b.path)}"
    raise _refusal(f"the two files differ in {visible(what, 80)}", found)


def _short(value: JSON) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refusal(what: str, found: str) -> UserError:
    fix = "score both models with the same minisft eval command; tokens differ between tokenizers: use bits_per_byte there"
    return UserError("data/not-comparable", what, found=found, fix=fix)


# --- the prompts


def read_prompts(path: str | Path, rows: Iterable[ScoredRow]) -> dict[RowId, Example]:
    """The examples that were scored, by row.

    Args:
        path: the data file that ``minisft eval`` was given.
        rows: scored rows.

    Returns:
        an example for each row.

    Raises:
        UserError: the file lacks a row, or its answer is not the row's reference.
    """
    examples: dict[RowId, Example] = {example.row: example for example in read_dataset(path, keep_duplicates=True).examples}
    for row in rows:
        example = examples.get(row.row)
        if example is None or (row.reference and example.messages[-1].content != row.reference):
            found = "no such row" if example is None else f"another answer, {visible(example.messages[-1].content, 40)}"
            what, fix = "the data is not what was scored", "give --data the file that minisft eval was given"
            raise UserError("data/other-data", what, where=f"{visible(path)}: row {visible(row.row)}", found=found, fix=fix)
    return examples
