"""Prompts for sampling: what the model is asked, the row's own answer where it has one, and all columns for the reward.

Rows are ``messages`` or ShareGPT's ``conversations`` (a last assistant turn is the answer), ``prompt`` with or without
``completion``, or Alpaca's ``instruction`` with or without ``output``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.columns import parse_mapping, require_text
from minisft.data.examples import Message
from minisft.data.open_rows import open_rows
from minisft.data.row_forms import turns_of

EXPECTED = "messages, conversations, prompt or instruction"
FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask.

    Attributes:
        messages: the chat up to where the assistant answers.
        answer: the row's own answer, or None.
        columns: the whole row, for rewards that read it.
        row: lines or items from 1.
        where: file and line, for errors.
    """

    messages: tuple[Message, ...]
    answer: str | None
    columns: dict[str, JSON]
    row: int
    where: str


@dataclass(frozen=True)
class PromptDataset:
    """A file's prompts, its hash, and what to report about it."""

    prompts: tuple[Prompt, ...]
    path: str
    sha256: str
    notes: tuple[str, ...]


def read_prompts(path: str | Path, mapping: Sequence[str] = (), needs_answer: bool = False) -> PromptDataset:
    """Read prompts; equal ones are asked once.

    Args:
        path: ``.jsonl`` or a JSON array of objects.
        mapping: ``FIELD=COLUMN`` pairs, for instance ``prompt=question completion=answer``.
        needs_answer: the reward compares with the row's answer, so each row must have one.

    Returns:
        The prompts in the order of the file.

    Raises:
        UserError: ``data/...`` with file and line; ``config/bad-map``.
    """
    source, columns = open_rows(path), parse_mapping(mapping, FIELDS, "prompt=question completion=answer")
    found: dict[tuple[tuple[Message, ...], str | None], Prompt] = {}
    rows = 0
    for number, where, values in source.rows():
        rows += 1
        messages, answer = _read({name: values[c] for name, c in columns.items() if c in values}, values, where)
        if needs_answer and answer is None:
            raise UserError(
                "data/no-answer", "the reward compares with the row's answer, and the row has none", where=where,
                found=f"the keys {listing(values)}", expected="a last assistant turn, completion or output",
                fix="add the answer, map its column (--map completion=COLUMN), or choose another --reward",
            )  # fmt: skip
        found.setdefault((messages, answer), Prompt(messages, answer, values, number, where))
    if not found:
        raise UserError(
            "data/no-rows", "no usable row", where=visible(source.path), found="an empty file", expected="a prompt a line"
        )
    repeated = rows - len(found)
    notes = [f"{rows} prompts", *source.notes, *([f"{repeated} repeated prompts are asked once"] if repeated else [])]
    return PromptDataset(tuple(found.values()), str(path), source.sha256, tuple(notes))


def _read(row: dict[str, JSON], values: dict[str, JSON], where: str) -> tuple[tuple[Message, ...], str | None]:
    """The prompt's messages and the row's answer."""
    answer: str | None = None
    if chat := next((name for name in ("messages", "conversations") if name in row), None):
        turns = turns_of(row[chat], where)
        if turns and turns[-1].role == "assistant":
            answer = turns.pop().content
    elif isinstance(row.get("prompt"), list):
        turns, answer = turns_of(row["prompt"], where), _optional(row, "completion", where)
    elif "prompt" in row:
        turns, answer = [Message("user", require_text(row["prompt"], f"{where}: prompt"))], _optional(row, "completion", where)
    elif "instruction" in row:
        parts = (require_text(row["instruction"], f"{where}: instruction"), _optional(row, "input", where) or "")
        turns, answer = [Message("user", "\n".join(filter(None, parts)))], _optional(row, "output", where)
    else:
        raise UserError(
            "data/unknown-form", "the row has no prompt", where=where, found=f"the keys {listing(values)}", expected=EXPECTED,
            fix="name your column: --map prompt=COLUMN",
        )  # fmt: skip
    if system := _optional(row, "system", where):
        turns = [Message("system", system), *turns]
    if not turns or turns[-1].role == "assistant":
        raise UserError(
            "data/no-prompt", "the row asks nothing", where=where, found=f"{len(turns)} messages before the answer",
            expected="a chat that the assistant is to answer", fix="add the prompt, or drop the row",
        )  # fmt: skip
    return tuple(turns), answer


def _optional(row: dict[str, JSON], name: str, where: str) -> str | None:
    """A text column that may be absent or null; a completion may be a list with one assistant turn."""
    value = row.get(name)
    if isinstance(value, list):
        return "".join(turn.content for turn in turns_of(value, where))
    return None if value is None else require_text(value, f"{where}: {name}")
