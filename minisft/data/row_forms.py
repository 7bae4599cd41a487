"""The forms that a data row can have, each read into messages.

``messages``, ShareGPT (``conversations``), Alpaca and prompt/completion. Whatever carries content reaches the template or is an
error that names its key: a row is never read without a part of its prompt. Refused are tool calls, tool definitions, images
and everything else that is not one string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError, listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.data.examples import ROLES, Example, Message, Role
from minisft.data.given_tokens import GivenTokens, read_tokens
from minisft.data.json_rows import json_type

# ShareGPT's names for the speakers beside the usual ones.
SPEAKERS: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Texts inside a message that a template may read beside the content. Reasoning is content: it has to be read.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TEXT_FIELDS = (*REASONING_FIELDS, "name")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# What a prompt can consist of, and minisft does not render.
_UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "tools", "functions", "refusal", *_MEDIA)
_UNSUPPORTED_COLUMNS = ("tools", "functions", *_MEDIA)
_EMPTY: tuple[JSON, ...] = (None, "", [], {})
_TRAINED = ("train", "weight")  # whether an assistant message is a target
TOKENS = "tokens"  # the form of rows that are token ids already
# What people call the two keys of a message.
_ROLE_KEYS = ("role", "from", "speaker", "who", "author")
_CONTENT_KEYS = ("content", "value", "text", "message", "says")


@dataclass(frozen=True)
class Row:
    """One parsed row, the columns it is read through and the position that errors name."""

    values: dict[str, JSON]
    columns: dict[str, str]
    where: str

    def has(self, name: str) -> bool:
        """Whether the row has the column for this field."""
        return self.column(name) in self.values

    def column(self, name: str) -> str:
        """The column for this field."""
        return self.columns.get(name, name)

    def get(self, name: str) -> JSON:
        """The field's value, or None."""
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


# ---- messages ----


def _turns(value: JSON, row: Row, role_key: str, content_key: str) -> list[Message]:
    """A list of ``{role, content}`` objects, whatever the two keys are called."""
    if not isinstance(value, list):
        raise _bad("not-a-list", "the messages are not a list", row.where, json_type(value), expected="a list of messages")
    return [_turn(item, f"{row.where}: message {i}", role_key, content_key) for i, item in enumerate(value, 1)]


def _turn(item: JSON, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(item, dict):
        raise _bad("not-a-message", "a message is not an object", where, json_type(item), expected="{role, content}")
    _refuse(item, _UNSUPPORTED_IN_MESSAGE, where)
    missing = [key for key in (role_key, content_key) if key not in item]
    if missing:
        fix = _mapping_for(item)
        raise _bad("message-keys", "a message lacks a key", where, listing(item), expected=" and ".join(missing), fix=fix)
    role = item[role_key]
    if not isinstance(role, str) or role not in SPEAKERS:
        fix = nearest(str(role), SPEAKERS)
        raise _bad("unknown-role", "unknown role", where, visible(repr(role), 60), expected=" or ".join(SPEAKERS), fix=fix)
    fields = _fields(item, where, (role_key, content_key)) if len(item) > 2 else ()
    return Message(SPEAKERS[role], _text(item[content_key], where), _is_trained(item, where), fields)


def turns_of(value: JSON, where: str) -> list[Message]:
    """A list of messages as objects, ``{role, content}`` or ``{from, value}`` each.

    Raises:
        UserError: ``data/...``, naming ``where`` and the message.
    """
    if not isinstance(value, list):
        raise _bad("not-a-list", "the messages are not a list", where, json_type(value), expected="a list of messages")
    keys = [("from", "value") if isinstance(item, dict) and "from" in item else ("role", "content") for item in value]
    return [_turn(item, f"{where}: message {i}", *pair) for i, (item, pair) in enumerate(zip(value, keys, strict=True), 1)]


def _fields(item: dict[str, JSON], where: str, taken: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """The message's further texts; those that are null or empty count as absent."""
    given = [(key, item[key]) for key in TEXT_FIELDS if key not in taken and item.get(key) not in _EMPTY]
    return tuple((key, _text(value, f"{where}: {key}")) for key, value in given)


def _mapping_for(keys: Iterable[str]) -> str:
    """The ``--map`` that fits the keys of a message, as far as they can be told."""
    known = list(keys)
    role = next((key for key in _ROLE_KEYS if key in known), "KEY")
    content = next((key for key in _CONTENT_KEYS if key in known), "KEY")
    return f"--map role={role} content={content}"


def _refuse(values: dict[str, JSON], names: Sequence[str], where: str) -> None:
    """Content that minisft would not render is an error; null and empty values are not there."""
    for name in names:
        value = values.get(name)
        if value in _EMPTY or (isinstance(value, str) and value.strip() in ("[]", "{}", "null")):
            continue
        fix = "write it as text into the content, or drop the row"
        found = visible(f"{json_type(value)} {json.dumps(value, ensure_ascii=False)}", 60)
        what = f"{name.replace('_', ' ')} cannot be rendered, but belongs to what the model reads"
        raise _bad(name.replace("_", "-"), what, f"{where}: {name}", found, expected="text, null or nothing", fix=fix)


def _is_trained(item: dict[str, JSON], where: str) -> bool:
    for key in _TRAINED:
        value = item.get(key)
        if value is not None:
            if value not in (0, 1):  # False and True are 0 and 1
                raise _bad("bad-train-flag", f"bad {key!r}", where, visible(value), expected="true, false, 1 or 0")
            return bool(value)
    return True


# ---- the forms: each turns a row into messages ----


def _from_messages(row: Row) -> list[Message]:
    return _with_system(row, _turns(row.get("messages"), row, row.column("role"), row.column("content")))


def _from_sharegpt(row: Row) -> list[Message]:
    role_key, content_key = row.columns.get("role", "from"), row.columns.get("content", "value")
    return _with_system(row, _turns(row.get("conversations"), row, role_key, content_key))


def _from_alpaca(row: Row) -> list[Message]:
    question = "\n".join(part for part in (row.text("instruction"), row.optional_text("input")) if part)
    return _with_system(row, [*_history(row), Message("user", question), Message("assistant", row.text("output"))])


def _history(row: Row) -> list[Message]:
    rounds = row.get("history")
    if rounds is None:
        return []
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise _bad("bad-history", "history is not a list of pairs", row.where, json_type(rounds), "[[question, answer], ...]")
    where = f"{row.where}: history"
    texts = [_text(part, where) for pair in rounds if isinstance(pair, list) for part in pair]
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def _from_prompt(row: Row) -> list[Message]:
    prompt = _side(row, "prompt", "user") if row.has("prompt") else []
    return _with_system(row, prompt + _side(row, "completion", "assistant"))


def _side(row: Row, name: str, role: Role) -> list[Message]:
    value = row.get(name)
    if isinstance(value, list):
        return _turns(value, row, row.column("role"), row.column("content"))
    return [Message(role, row.text(name))]


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    """The column ``system`` as the first message."""
    text = row.optional_text("system")
    if not text:
        return turns
    if any(turn.role == "system" for turn in turns):
        found, fix = "a system message and a system column", "keep one of the two"
        where = f"{row.where}: {visible(row.column('system'), 80)}"
        raise _bad("two-systems", "the row has two system texts", where, found, expected="one", fix=fix)
    return [Message("system", text), *turns]


def _tokens(row: Row) -> GivenTokens:
    return read_tokens(row.get("input_ids"), row.get("labels"), row.get("attention_mask"), row.where)


def _from_tokens(row: Row) -> list[Message]:
    """The ids as words, with those of the targets again: no text, but rows are equal or alike as their ids are."""
    tokens = _tokens(row)
    targets = [token for token, supervised in zip(tokens.input_ids, tokens.supervised, strict=True) if supervised]
    words = " ".join(map(str, tokens.input_ids)), " ".join(map(str, targets)) or "-"
    return [Message("user", words[0]), Message("assistant", words[1])]


@dataclass(frozen=True)
class Form:
    """One form: its name, the fields it needs and may have, and how a row becomes messages."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], list[Message]]

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that it reads."""
        return self.required + self.optional


# In the order of detection: a row with both messages and prompt is a messages row.
FORMS = (
    Form("messages", ("messages",), ("system",), _from_messages),
    Form("sharegpt", ("conversations",), ("system",), _from_sharegpt),
    Form("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    Form("prompt/completion", ("prompt", "completion"), ("system",), _from_prompt),
    Form(TOKENS, ("input_ids", "labels"), ("attention_mask",), _from_tokens),
    # Only reached by mapping: text without a prompt, for corpora.
    Form("completion", ("completion",), ("system",), _from_prompt),
)
# Keys inside a message, which a mapping may rename too.
_MESSAGE_KEYS = ("role", "content")


def parse_mapping(mapping: Sequence[str]) -> dict[str, str]:
    """``FIELD=COLUMN`` pairs as a dictionary.

    Raises:
        UserError: ``config/bad-map``.
    """
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


def _bad_map(what: str, found: str, expected: str, fix: str = "") -> UserError:
    fix = fix or "--map prompt=COLUMN completion=COLUMN"
    return UserError("config/bad-map", what, found=visible(found), expected=expected, fix=fix)


def detect(row: Row) -> Form:
    """The form of the first row: the one whose fields are mapped, or else the first whose columns are all there.

    Raises:
        UserError: ``data/no-column``, ``data/unknown-form``.
    """
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
    expected = "messages, conversations, instruction + output, prompt + completion, or input_ids + labels"
    fix = "name your columns: --map prompt=COLUMN completion=COLUMN"
    raise _bad("unknown-form", "the row has no known form", row.where, f"the keys {listing(keys)}", expected=expected, fix=fix)


def unread_keys(row: Row, form: Form) -> list[str]:
    """Keys with content inside the row's messages that nothing reads."""
    names = ("from", "value") if form.name == "sharegpt" else _MESSAGE_KEYS
    read = {*(row.columns.get(*pair) for pair in zip(_MESSAGE_KEYS, names, strict=True)), *TEXT_FIELDS, *_TRAINED}
    lists = [value for name in form.fields if isinstance(value := row.get(name), list)]
    messages = [item for items in lists for item in items if isinstance(item, dict)]
    return [key for item in messages if item.keys() - read for key in item if key not in read and item[key] not in _EMPTY]


def read_example(row: Row, form: Form, number: int) -> Example:
    """The row as an example.

    Args:
        row: the parsed row.
        form: the form of the file's first row, which every row has to have.
        number: its line or item, from 1.

    Returns:
        The example; columns that the form does not read are its ``reference``.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    missing = [row.column(name) for name in form.required if not row.has(name)]
    if missing:
        found = f"the keys {listing(row.values)}"
        raise _bad("missing-column", f"the row is not {form.name} like the first", row.where, found, expected=listing(missing))
    used = {row.column(name) for name in form.fields}
    rest = {key: value for key, value in row.values.items() if key not in used}
    if rest:
        _refuse(rest, _UNSUPPORTED_COLUMNS, row.where)
    messages = tuple(form.read(row))
    if not any(m.role == "assistant" for m in messages):
        found = listing(m.role for m in messages)
        fix = "drop the row or add the answer"
        raise _bad(
            "no-assistant", "no assistant turn: nothing to train on", row.where, found, expected="an assistant turn", fix=fix
        )
    return Example(messages, number, rest, row.where, _tokens(row) if form.name == TOKENS else None)
