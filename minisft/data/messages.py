"""Data files become ``Example``s: chats of plain messages.

Reads JSON lines or one JSON array. The form is detected on the first row, reported in ``Dataset.notes``, and every row is held
to it: what does not fit is an error with file and line, never a row that quietly trains on nothing. Rows with an empty answer
and exact duplicates are dropped and counted; columns and keys of messages that nothing reads are listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, listing, visible
from minisft.common.seeds import derive_seed
from minisft.data.examples import Example as Example
from minisft.data.examples import Message as Message
from minisft.data.json_rows import MAX_ROW_BYTES
from minisft.data.open_rows import open_rows
from minisft.data.row_forms import TOKENS, Form, Row, detect, parse_mapping, read_example, unread_keys

# The column that the metric ``choice`` reads.
_READ_LATER = ("choices",)


@dataclass(frozen=True)
class Dataset:
    """A file's examples and what is known of it.

    Attributes:
        examples: the rows that stay, in file order.
        form: the detected form.
        path: the file.
        sha256: of its bytes.
        counts: rows read, kept, and dropped by reason.
        notes: what to report about it.
    """

    examples: tuple[Example, ...]
    form: str
    path: str
    sha256: str
    counts: dict[str, int]
    notes: tuple[str, ...]


def read_dataset(
    path: str | Path,
    mapping: Sequence[str] = (),
    max_row_bytes: int = MAX_ROW_BYTES,
    keep_duplicates: bool = False,
    keep_empty: bool = False,
    allow_tokens: bool = False,
) -> Dataset:
    """Read a data file; the rows keep their order.

    Args:
        path: ``.jsonl`` (one object a line; blank lines are skipped), a JSON array, CSV, Parquet, or ``hf:org/name`` on the
            hub.
        mapping: ``FIELD=COLUMN`` pairs, for instance ``prompt=question``.
        max_row_bytes: longest line accepted.
        keep_duplicates: keep exact copies (evaluation scores every row of a file); they are counted in any case.
        keep_empty: keep rows with an empty answer too (a report on the data shows them).
        allow_tokens: accept rows of token ids, which have no text.

    Returns:
        The data set.

    Raises:
        UserError: ``data/...`` with file and line; ``config/bad-map``.
    """
    source = open_rows(path, max_row_bytes)
    columns = parse_mapping(mapping)
    form: Form | None = None
    examples: list[Example] = []
    seen: set[object] = set()
    unread: dict[str, None] = {}  # keys of messages, in order
    counts = {"rows": 0, "kept": 0, "duplicates": 0, "empty": 0}
    for number, where, values in source.rows():
        row = Row(values, columns, where)
        form = form or detect(row)
        if form.name == TOKENS and not allow_tokens:
            raise UserError(
                "data/no-text", "rows of token ids have no text, which is needed here", where=where, found="input_ids",
                expected="messages, prompt + completion or another form with text", fix="give the rows as text",
            )  # fmt: skip
        example = read_example(row, form, number)
        unread.update(dict.fromkeys(unread_keys(row, form)))
        identity = example.identity
        duplicate, empty = identity in seen, _has_empty_answer(example)
        seen.add(identity)
        counts["rows"] += 1
        counts["empty" if empty else "duplicates"] += int(empty or duplicate)
        if (keep_empty or not empty) and (keep_duplicates or not duplicate):
            examples.append(example)
    counts["kept"] = len(examples)
    if form is None or not examples:
        raise _nothing_left(source.path, counts)
    notes = (
        f"form: {form.name} ({', '.join(_described(form, columns))})",
        *source.notes,
        *_drop_notes(counts, keep_duplicates, keep_empty),
        *_unused_notes(examples),
        *([f"keys of messages not used: {listing(unread)}"] if unread else []),
    )
    return Dataset(tuple(examples), form.name, str(path), source.sha256, counts, notes)


def _described(form: Form, columns: dict[str, str]) -> list[str]:
    return [f"{name} = {visible(columns[name], 60)}" if name in columns else name for name in form.fields]


def _has_empty_answer(example: Example) -> bool:
    # Training on it would teach to answer nothing.
    return any(m.role == "assistant" and m.train and not m.content.strip() for m in example.messages)


def _drop_notes(counts: dict[str, int], keep_duplicates: bool, keep_empty: bool) -> list[str]:
    notes = []
    if counts["empty"]:
        verb = "kept" if keep_empty else "dropped"
        notes.append(f"{verb} {counts['empty']} of {counts['rows']} rows: empty answer")
    if counts["duplicates"]:
        verb = "kept" if keep_duplicates else "dropped"
        notes.append(f"{verb} {counts['duplicates']} of {counts['rows']} rows: exact duplicates of earlier ones")
    return notes


def _unused_notes(examples: Iterable[Example]) -> list[str]:
    unused = dict.fromkeys(
        key for example in examples for key, value in example.reference.items() if value not in (None, "", [], {})
    )
    names = [name for name in unused if name not in _READ_LATER]
    return [f"columns not used: {listing(names)}"] if names else []


def _nothing_left(path: Path, counts: dict[str, int]) -> UserError:
    found = f"{counts['rows']} rows, {counts['empty']} dropped for an empty answer" if counts["rows"] else "an empty file"
    return UserError(
        "data/no-rows", "no usable row", where=visible(path), found=found, expected="at least one row with an answer"
    )


def split(
    examples: Sequence[Example], share: float, seed: int, groups: Mapping[int, int] | None = None
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Hold out about ``share`` of the rows.

    A row's side depends on ``seed`` and row numbers only. Exact duplicates follow the first of them and a group goes to one
    side as a whole, so no copy of a training row is validated on. At least one row stays for training, and with a share above 0
    and two groups at least one is held out.

    Args:
        examples: the rows.
        share: of the different rows, from 0 to below 1.
        seed: decides which.
        groups: row number to the first row of its group of near copies; rows that are not in it stand alone.

    Returns:
        (training, validation), each in file order.
    """
    first_row: dict[tuple[Message, ...], int] = {}
    for example in examples:
        first_row.setdefault(example.messages, example.row)
    group_of = {row: (groups or {}).get(row, row) for row in first_row.values()}
    sizes = Counter(group_of.values())
    shuffled = sorted(sizes, key=lambda row: derive_seed(seed, "split", row))
    wanted = min(max(round(share * len(group_of)), 1 if share > 0 else 0), len(group_of) - 1) if group_of else 0
    held_out: set[int] = set()
    for group in shuffled:
        if sizes[group] <= wanted:
            held_out.add(group)
            wanted -= sizes[group]
    if share > 0 and not held_out and len(sizes) > 1:  # every group is larger than the share
        held_out = {min(shuffled, key=sizes.__getitem__)}
    sides = [group_of[first_row[example.messages]] in held_out for example in examples]
    validation = tuple(example for example, held in zip(examples, sides, strict=True) if held)
    return tuple(example for example, held in zip(examples, sides, strict=True) if not held), validation
