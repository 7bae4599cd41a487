"""Data rows in the field's forms become ``Example``s: chats of plain messages.

Reads JSON lines or one JSON array in the forms ``messages``, ShareGPT (``conversations``), Alpaca and prompt/completion.
The form is detected on the first row, said aloud in ``Dataset.notes``, and every row is held to it: what does not fit is
an error with file and line, never a row that quietly trains on nothing. Rows with an empty answer and exact duplicates are
dropped and counted.

It refuses tool calls, images and anything whose content is not one string. The one idea: whatever the file looked like,
the rest of minisft only ever sees roles and texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minisft.common.errors import UserError, listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.data.json_rows import MAX_ROW_BYTES, RowFile, json_type

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
# ShareGPT's names for the speakers beside the usual ones.
SPEAKERS: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn. ``train`` matters for assistant turns only: False means context, not a target."""

    role: Role
    content: str
    train: bool = True


@dataclass(frozen=True)
class Example:
    """One chat. ``row`` counts lines or items from 1; ``reference`` holds the row's other columns, for evaluation."""

    messages: tuple[Message, ...]
    row: int
    reference: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A file's examples, what form it had, what was dropped (``counts``) and what to say about it (``notes``)."""

    examples: tuple[Example, ...]
    form: str
    path: str
    sha256: str
    counts: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """One parsed row, the columns it is read through and the place that errors name."""

    values: dict[str, JSON]
    columns: dict[str, str]
    where: str

    def has(self, name: str) -> bool:
        return self.column(name) in self.values

    def column(self, name: str) -> str:
        return self.columns.get(name, name)

    def get(self, name: str) -> JSON:
        return self.values.get(self.column(name))

    def text(self, name: str) -> str:
        """A column that must be a string."""
        return _text(self.get(name), f"{self.where}: {visible(self.column(name), 80)}")

    def optional_text(self, name: str) -> str:
        """A column that may be absent or null, which both mean the empty string."""
        return "" if self.get(name) is None else self.text(name)


def _bad(slug: str, what: str, where: str, found: str, expected: str = "", fix: str = "") -> UserError:
    return UserError(f"data/{slug}", what, where=where, found=found, expected=expected, fix=fix)


def _text(value: JSON, where: str) -> str:
    if isinstance(value, str):
        return value
    shown = "null" if value is None else f"{json_type(value)} {json.dumps(value, ensure_ascii=False)}"
    fix = (
        "join the parts into one string: minisft trains on text"
        if isinstance(value, list)
        else "give a string, or drop the row"
    )
    raise _bad("content-type", "the content is not text", where, visible(shown, 60), expected="a string", fix=fix)


# ---- the forms: each turns a row into messages ----


def _turns(value: JSON, row: _Row, role_key: str, content_key: str) -> list[Message]:
    """A list of ``{role, content}`` objects, whatever the two keys are called."""
    if not isinstance(value, list):
        raise _bad("not-a-list", "the messages are not a list", row.where, json_type(value), expected="a list of messages")
    return [_turn(item, f"{row.where}: message {i}", role_key, content_key) for i, item in enumerate(value, 1)]


def _turn(item: JSON, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(item, dict):
        raise _bad("not-a-message", "a message is not an object", where, json_type(item), expected="{role, content}")
    missing = [key for key in (role_key, content_key) if key not in item]
    if missing and not item.get("tool_calls"):
        raise _bad("message-keys", "a message lacks a key", where, listing(item), expected=" and ".join(missing))
    if item.get("tool_calls"):
        fix = "write the call as text in the content"
        raise _bad("tool-calls", "tool calls are not supported", where, "tool_calls", expected="text", fix=fix)
    role = item[role_key]
    if not isinstance(role, str) or role not in SPEAKERS:
        fix = nearest(str(role), SPEAKERS)
        raise _bad("unknown-role", "unknown role", where, visible(repr(role), 60), expected=" or ".join(SPEAKERS), fix=fix)
    return Message(SPEAKERS[role], _text(item[content_key], where), _is_trained(item, where))


def _is_trained(item: dict[str, JSON], where: str) -> bool:
    for key in ("train", "weight"):
        value = item.get(key)
        if value is not None:
            if value not in (0, 1):  # False and True are 0 and 1
                raise _bad("bad-train-flag", f"bad {key!r}", where, visible(value), expected="true, false, 1 or 0")
            return bool(value)
    return True


def _from_messages(row: _Row) -> list[Message]:
    return _turns(row.get("messages"), row, row.column("role"), row.column("content"))


def _from_sharegpt(row: _Row) -> list[Message]:
    role_key, content_key = row.columns.get("role", "from"), row.columns.get("content", "value")
    return _system(row) + _turns(row.get("conversations"), row, role_key, content_key)


def _from_alpaca(row: _Row) -> list[Message]:
    question = "\n".join(part for part in (row.text("instruction"), row.optional_text("input")) if part)
    return [*_system(row), *_history(row), Message("user", question), Message("assistant", row.text("output"))]


def _history(row: _Row) -> list[Message]:
    rounds = row.get("history")
    if rounds is None:
        return []
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise _bad("bad-history", "history is not a list of pairs", row.where, json_type(rounds), "[[question, answer], ...]")
    where = f"{row.where}: history"
    texts = [_text(part, where) for pair in rounds if isinstance(pair, list) for part in pair]
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def _from_prompt(row: _Row) -> list[Message]:
    return _system(row) + (_side(row, "prompt", "user") if row.has("prompt") else []) + _side(row, "completion", "assistant")


def _side(row: _Row, name: str, role: Role) -> list[Message]:
    value = row.get(name)
    if isinstance(value, list):
        return _turns(value, row, row.column("role"), row.column("content"))
    return [Message(role, row.text(name))]


def _system(row: _Row) -> list[Message]:
    text = row.optional_text("system")
    return [Message("system", text)] if text else []


@dataclass(frozen=True)
class _Form:
    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[_Row], list[Message]]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


# In the order of detection: a row with both messages and prompt is a messages row.
FORMS = (
    _Form("messages", ("messages",), (), _from_messages),
    _Form("sharegpt", ("conversations",), ("system",), _from_sharegpt),
    _Form("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    _Form("prompt/completion", ("prompt", "completion"), ("system",), _from_prompt),
    # Only reached by mapping: text without a prompt, for corpora.
    _Form("completion", ("completion",), ("system",), _from_prompt),
)
# Keys inside a message, which a mapping may rename too.
_MESSAGE_KEYS = ("role", "content")


def _bad_map(what: str, found: str, expected: str, fix: str = "") -> UserError:
    return UserError("config/bad-map", what, found=visible(found), expected=expected, fix=fix)


def _parse_mapping(mapping: Sequence[str]) -> dict[str, str]:
    known = sorted({name for form in FORMS for name in form.fields} | set(_MESSAGE_KEYS))
    columns: dict[str, str] = {}
    for entry in mapping:
        name, separator, column = entry.partition("=")
        if not (separator and name and column):
            raise _bad_map("--map needs FIELD=COLUMN", entry, "for instance prompt=question")
        if name not in known:
            raise _bad_map("--map names an unknown field", name, ", ".join(known), nearest(name, known))
        columns[name] = column
    return columns


def _detect(row: _Row) -> _Form:
    """The form of the first row: the one whose fields are mapped, or else the first whose columns are all there."""
    mapped = set(row.columns) - set(_MESSAGE_KEYS)
    keys = list(row.values)
    for name in sorted(mapped):
        if not row.has(name):
            column = row.column(name)
            raise _bad(
                "no-column", "the mapped column is missing", row.where, listing(keys), visible(column), nearest(column, keys)
            )
    for form in FORMS:
        fits = all(row.has(name) for name in form.required) and mapped <= set(form.fields)
        if fits and (mapped or form.name != "completion"):
            return form
    expected = "messages, conversations, instruction + output, or prompt + completion"
    fix = "name your columns: --map prompt=COLUMN completion=COLUMN"
    raise _bad("unknown-form", "the row has no known form", row.where, f"the keys {listing(keys)}", expected=expected, fix=fix)


def _example(row: _Row, form: _Form, number: int) -> Example:
    missing = [row.column(name) for name in form.required if not row.has(name)]
    if missing:
        found = f"the keys {listing(row.values)}"
        raise _bad("missing-column", f"the row is not {form.name} like the first", row.where, found, expected=listing(missing))
    messages = tuple(form.read(row))
    if not any(m.role == "assistant" for m in messages):
        found = listing(m.role for m in messages)
        fix = "drop the row or add the answer"
        raise _bad(
            "no-assistant", "no assistant turn: nothing to train on", row.where, found, expected="an assistant turn", fix=fix
        )
    used = {row.column(name) for name in form.fields}
    return Example(messages, number, {key: value for key, value in row.values.items() if key not in used})


# ---- the file ----


def read_dataset(
    path: str | Path, mapping: Sequence[str] = (), max_row_bytes: int = MAX_ROW_BYTES, keep_duplicates: bool = False
) -> Dataset:
    """Read a data file; the rows keep their order.

    Args:
        path: ``.jsonl`` (one object a line; blank lines are skipped) or a JSON array of objects.
        mapping: ``FIELD=COLUMN`` pairs, for instance ``prompt=question``.
        max_row_bytes: longest line accepted.
        keep_duplicates: keep exact copies (evaluation scores every row of a file); they are counted in any case.

    Raises:
        UserError: ``data/...`` with file and line; ``config/bad-map``.
    """
    source = RowFile(Path(path), max_row_bytes)
    columns = _parse_mapping(mapping)
    form: _Form | None = None
    examples: list[Example] = []
    seen: set[tuple[tuple[Message, ...], str]] = set()
    counts = {"rows": 0, "kept": 0, "duplicates": 0, "empty": 0}
    for number, where, values in source.rows():
        row = _Row(values, columns, where)
        form = form or _detect(row)
        example = _example(row, form, number)
        identity = (example.messages, json.dumps(example.reference, sort_keys=True) if example.reference else "")
        duplicate, empty = identity in seen, _has_empty_answer(example)
        seen.add(identity)
        counts["rows"] += 1
        counts["empty" if empty else "duplicates"] += int(empty or duplicate)
        if not empty and (keep_duplicates or not duplicate):
            examples.append(example)
    counts["kept"] = len(examples)
    if form is None or not examples:
        raise _nothing_left(source.path, counts)
    notes = (
        f"form: {form.name} ({', '.join(_described(form, columns))})",
        *source.notes,
        *_drop_notes(counts, keep_duplicates),
    )
    return Dataset(tuple(examples), form.name, str(path), source.sha256, counts, notes)


def _described(form: _Form, columns: dict[str, str]) -> list[str]:
    return [f"{name} = {visible(columns[name], 60)}" if name in columns else name for name in form.fields]


def _has_empty_answer(example: Example) -> bool:
    # Training on it would teach to answer nothing.
    return any(m.role == "assistant" and m.train and not m.content.strip() for m in example.messages)


def _drop_notes(counts: dict[str, int], keep_duplicates: bool) -> list[str]:
    notes = []
    if counts["empty"]:
        notes.append(f"dropped {counts['empty']} of {counts['rows']} rows: empty answer")
    if counts["duplicates"]:
        verb = "kept" if keep_duplicates else "dropped"
        notes.append(f"{verb} {counts['duplicates']} of {counts['rows']} rows: exact duplicates of earlier ones")
    return notes


def _nothing_left(path: Path, counts: dict[str, int]) -> UserError:
    found = f"{counts['rows']} rows, {counts['empty']} dropped for an empty answer" if counts["rows"] else "an empty file"
    return UserError(
        "data/no-rows", "no usable row", where=visible(path), found=found, expected="at least one row with an answer"
    )


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Hold out about ``share`` of the rows: (training, validation), each in file order.

    A row's place depends on ``seed`` and its row number only; exact duplicates follow the first of them, so no copy of a
    training row is validated on. At least one row stays for training, and with a share above 0 and two different rows at
    least one is held out.
    """
    first_row: dict[tuple[Message, ...], int] = {}
    for example in examples:
        first_row.setdefault(example.messages, example.row)
    shuffled = sorted(first_row.values(), key=lambda row: derive_seed(seed, "split", row))
    num_held_out = min(max(round(share * len(shuffled)), 1 if share > 0 else 0), len(shuffled) - 1) if shuffled else 0
    held_out = set(shuffled[:num_held_out])
    validation = tuple(e for e in examples if first_row[e.messages] in held_out)
    return tuple(e for e in examples if first_row[e.messages] not in held_out), validation
