"""Preference rows become pairs: one prompt, a chosen and a rejected answer.

Four forms are read: ``prompt`` with ``chosen`` and ``rejected`` as texts, the same as lists of messages, ``chosen`` and
``rejected`` as whole chats, and ShareGPT's ``conversations`` with two single turns. The form is detected on the first row,
reported, and every row is held to it. Rows whose sides are equal or empty are dropped and counted. Rows that contradict each
other are counted and kept, because only the user can know which of them is right.
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

FIELDS = ("prompt", "chosen", "rejected", "conversations", "system")
EXPECTED = "prompt + chosen + rejected, chosen + rejected as whole chats, or conversations + chosen + rejected"


@dataclass(frozen=True)
class Pair:
    """One prompt and two answers; ``row`` counts lines or items from 1.

    Attributes:
        prompt: the messages that both answers follow.
        chosen, rejected: the text of the last turn.
        row: the row of the data file.
    """

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    row: int


@dataclass(frozen=True)
class PairDataset:
    """A file's pairs, what form it had, what was dropped (``counts``) and what to report about it (``notes``)."""

    pairs: tuple[Pair, ...]
    form: str
    path: str
    sha256: str
    counts: dict[str, int]
    notes: tuple[str, ...]


Chat = list[Message]


def read_pairs(path: str | Path, mapping: Sequence[str] = ()) -> PairDataset:
    """Read preference rows; they keep their order.

    Args:
        path: ``.jsonl`` (one object a line) or a JSON array of objects.
        mapping: ``FIELD=COLUMN`` pairs, for instance ``chosen=better``.

    Returns:
        The pairs that can be trained on.

    Raises:
        UserError: ``data/...`` with file and line; ``config/bad-map``.
    """
    source, columns = open_rows(path), parse_mapping(mapping, FIELDS, "chosen=better rejected=worse")
    form: str | None = None
    pairs: list[Pair] = []
    seen: set[tuple[object, ...]] = set()
    counts = {"rows": 0, "kept": 0, "equal": 0, "empty": 0, "duplicates": 0}
    for number, where, values in source.rows():
        row = {name: values[column] for name, column in columns.items() if column in values}
        form = form or _detect(row, values, where)
        pair = _pair(*_read(form, row, values, where), number, where)
        counts["rows"] += 1
        reason = _unusable(pair)
        identity = (pair.prompt, pair.chosen, pair.rejected)
        reason = "duplicates" if reason is None and identity in seen else reason
        seen.add(identity)
        if reason is None:
            pairs.append(pair)
        else:
            counts[reason] += 1
    counts["kept"] = len(pairs)
    if form is None or not pairs:
        raise _nothing_left(source.path, counts)
    notes = (f"form: {form}", *source.notes, *_drop_notes(counts), *_contradictions(pairs))
    return PairDataset(tuple(pairs), form, str(path), source.sha256, counts, notes)


# ---- the forms -------------------------------------------------------------------------------------------------------

TEXTS, LISTS, CHATS, SHAREGPT = (
    "prompt, chosen, rejected (texts)", "prompt, chosen, rejected (messages)", "chosen, rejected (whole chats)",
    "conversations, chosen, rejected (ShareGPT)",
)  # fmt: skip


def _detect(row: dict[str, JSON], values: dict[str, JSON], where: str) -> str:
    if "completions" in values and "chosen" not in row:
        raise UserError(
            "data/unknown-form", "scored completions are no pairs", where=where, found=f"the keys {listing(values)}",
            expected=EXPECTED, fix="write the best and the worst scored completion of each row as chosen and rejected",
        )  # fmt: skip
    if {"chosen", "rejected"} <= row.keys():
        if "conversations" in row:
            return SHAREGPT
        if "prompt" in row:
            return TEXTS if isinstance(row["prompt"], str) else LISTS
        return CHATS
    raise UserError(
        "data/unknown-form", "the row is no pair", where=where, found=f"the keys {listing(values)}", expected=EXPECTED,
        fix="name your columns: --map prompt=COLUMN chosen=COLUMN rejected=COLUMN",
    )  # fmt: skip


def _read(form: str, row: dict[str, JSON], values: dict[str, JSON], where: str) -> tuple[Chat, Chat]:
    """The two whole chats of a row."""
    needed = {CHATS: (), SHAREGPT: ("conversations",)}.get(form, ("prompt",))
    if missing := [name for name in (*needed, "chosen", "rejected") if name not in row]:
        raise UserError(
            "data/missing-column", "the row is not like the first", where=where, found=f"the keys {listing(values)}",
            expected=listing(missing), fix="bring all rows to one form",
        )  # fmt: skip
    system = [] if not row.get("system") else [Message("system", require_text(row["system"], f"{where}: system"))]
    if form == CHATS:
        return _chat(system, row["chosen"], f"{where}: chosen"), _chat(system, row["rejected"], f"{where}: rejected")
    if form == SHAREGPT:
        prompt = _chat(system, row["conversations"], f"{where}: conversations")
    elif form == TEXTS:
        prompt = [*system, Message("user", require_text(row["prompt"], f"{where}: prompt"))]
    else:
        prompt = _chat(system, row["prompt"], f"{where}: prompt")
    chosen, rejected = ([*prompt, *_answer(row[side], f"{where}: {side}")] for side in ("chosen", "rejected"))
    return chosen, rejected


def _chat(system: Chat, value: JSON, where: str) -> Chat:
    turns = turns_of(value, where)
    if system and turns and turns[0].role == "system":
        raise UserError(
            "data/two-systems", "the row has two system messages", where=where, found="a system column and a system turn",
            expected="one of them", fix="drop the column or the turn",
        )  # fmt: skip
    return [*system, *turns]


def _answer(value: JSON, where: str) -> Chat:
    """One answer: a text, one turn, or a list of turns."""
    if isinstance(value, str):
        return [Message("assistant", value)]
    return turns_of(value if isinstance(value, list) else [value], where)


# ---- a pair ----------------------------------------------------------------------------------------------------------


def _pair(chosen: Chat, rejected: Chat, number: int, where: str) -> Pair:
    """The pair of two chats that differ in their last turn only."""
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if not chat or chat[-1].role != "assistant":
            raise UserError(
                "data/no-assistant", f"the {name} side does not end with the assistant", where=where,
                found=listing(m.role for m in chat) or "no message", expected="an assistant turn at the end",
                fix="drop the row or add the answer",
            )  # fmt: skip
    if chosen[:-1] != rejected[:-1]:
        at = next((i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), 1) if a != b), None)
        found = f"message {at} differs" if at else f"{len(chosen)} and {len(rejected)} messages"
        raise UserError(
            "data/different-prompts", "the two sides do not answer the same prompt", where=where, found=found,
            expected="chats that differ in the last turn only", fix="drop the row, or give both answers one prompt",
        )  # fmt: skip
    if len(chosen) == 1:
        raise UserError(
            "data/no-prompt", "the pair has no prompt", where=where, expected="at least one message before the answers",
            fix="add the prompt, or drop the row",
        )  # fmt: skip
    return Pair(tuple(chosen[:-1]), chosen[-1], rejected[-1], number)


def _unusable(pair: Pair) -> str | None:
    if not (pair.chosen.content.strip() and pair.rejected.content.strip()):
        return "empty"
    return "equal" if pair.chosen == pair.rejected else None


def _drop_notes(counts: dict[str, int]) -> list[str]:
    reasons = {"equal": "chosen and rejected are equal", "empty": "an answer is empty", "duplicates": "exact duplicates"}
    return [f"dropped {counts[key]} of {counts['rows']} rows: {why}" for key, why in reasons.items() if counts[key]]


def _contradictions(pairs: Sequence[Pair]) -> list[str]:
    """A note on pairs that another row has the other way round."""
    by_key = {(pair.prompt, pair.chosen, pair.rejected): pair.row for pair in pairs}
    rows = sorted(pair.row for pair in pairs if (pair.prompt, pair.rejected, pair.chosen) in by_key)
    if not rows:
        return []
    return [f"{len(rows)} rows contradict another row (same answers, the other one chosen): {listing(map(str, rows))}"]


def _nothing_left(path: Path, counts: dict[str, int]) -> UserError:
    dropped = ", ".join(f"{counts[key]} {key}" for key in ("equal", "empty") if counts[key])
    return UserError(
        "data/no-rows", "no usable pair", where=visible(path),
        found=f"{counts['rows']} rows" + (f", {dropped}" if dropped else ""),
        expected="at least one pair of different answers", fix="look at how the file was made",
    )  # fmt: skip
