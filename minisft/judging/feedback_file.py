"""Feedback as it was collected: thumbs from a JSON lines file, or the votes of an arena, one entry for each answer shown."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.examples import ROLES
from minisft.data.json_rows import MAX_ROW_BYTES, RowFile, json_type
from minisft.judging.arena_store import ArenaStore
from minisft.judging.votes import Judgement

Talk = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """One answer that somebody saw; ``thumb`` is None when he did not vote."""

    id: str
    talk: Talk
    response: str
    thumb: str | None
    comment: str
    edited: str
    model: str
    week: str
    user: str
    showing: str = ""  # the prompt's id in an arena, and which of the two models answered
    side: str = ""

    @property
    def prompt_hash(self) -> str:
        """sha256 of the turns before the answer."""
        return prompt_hash(self.talk)


def prompt_hash(talk: Iterable[tuple[str, str]]) -> str:
    """sha256 of (role, text) turns, white space at the ends left out; system turns do not count."""
    turns = [[role, text.strip()] for role, text in talk if role != "system"]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Feedback:
    """What was read: every shown answer, and the votes between two answers where there are any."""

    shown: list[Shown]
    judgements: list[Judgement]
    names: dict[str, str]


def read_feedback(path: str | Path) -> Feedback:
    """Read an arena's ``votes.sqlite`` or JSON lines of thumbs.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_sqlite = file.read(16).startswith(b"SQLite format 3")
    except OSError as error:
        what, found = "cannot read the feedback", visible(error.strerror)
        raise UserError("data/no-file", what, where=visible(path), found=found) from None
    if not is_sqlite:
        return Feedback([_shown(row, where) for _, where, row in RowFile(path, MAX_ROW_BYTES).rows()], [], {})
    store = ArenaStore(path)
    try:
        rows = [_shown(row, f"{visible(path)}: {row['id']}") for row in store.feedback_rows()]
        return Feedback(rows, store.judgements(), store.meta())
    finally:
        store.close()


def _shown(row: dict[str, JSON], where: str) -> Shown:
    thumb = row.get("thumb")
    if thumb not in (None, "up", "down"):
        raise UserError("data/bad-thumb", "no such thumb", where=where, found=visible(thumb, 40), expected="up, down or null")
    texts = {name: _text(row.get(name), f"{where}: {name}") for name in ("response", "comment", "edited", "model", "user")}
    if not texts["response"]:
        raise UserError("data/no-response", "a row has no answer", where=where, expected="response: a text")
    number = visible(row.get("id", where), 100)
    week, edited = _week(row.get("time"), where), texts["edited"] if texts["edited"] != texts["response"] else ""
    return Shown(
        number, _talk(row, where), texts["response"], None if thumb is None else str(thumb), texts["comment"], edited,
        texts["model"] or "unnamed", week, texts["user"], str(row.get("prompt_id", "")), str(row.get("side", "")),
    )  # fmt: skip


def _text(value: JSON, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError("data/content-type", "a text is none", where=where, found=json_type(value), expected="a string or null")
    return value or ""


def _talk(row: dict[str, JSON], where: str) -> Talk:
    """The turns before the answer, from ``messages`` or ``prompt``."""
    turns = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    made = []
    for turn in turns if isinstance(turns, list) else []:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            expected = '"messages" with role and content, or "prompt"'
            what, found = "a row's prompt cannot be read", visible(turn, 60)
            raise UserError("data/bad-prompt", what, where=where, found=found, expected=expected)
        made.append((str(role), content))
    if not any(role == "user" and text.strip() for role, text in made):
        raise UserError("data/no-prompt", "a row asks nothing", where=where, expected="a user turn")
    return tuple(made)


def _week(time: JSON, where: str) -> str:
    """``2026-W09`` from seconds since 1970 or an ISO date; "unknown" without a time."""
    if time is None:
        return "unknown"
    try:
        if isinstance(time, (int, float)) and not isinstance(time, bool) and math.isfinite(time):
            moment = datetime.fromtimestamp(time, UTC)
        else:
            moment = datetime.fromisoformat(str(time))
    except (ValueError, OverflowError, OSError):
        expected = "seconds since 1970 or a date as 2026-03-01"
        what, found = "a time cannot be read", visible(time, 40)
        raise UserError("data/bad-time", what, where=where, found=found, expected=expected) from None
    year, week, _ = moment.isocalendar()
    return f"{year}-W{week:02}"
