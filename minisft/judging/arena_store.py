"""The arena's memory: prompts, answers, tickets and votes in one SQLite file.

A ticket is one showing of a prompt to one person, with the order in which the two answers stood; the browser knows the ticket
and never the order. A vote is committed with a full sync before it is acknowledged, so an acknowledged vote survives a killed
process and a power cut.
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minisft.common import safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.messages import Message
from minisft.judging.votes import Judgement

Side = Literal["a", "b"]
CHOICES = ("left", "right", "tie", "both_bad")
REPEAT_EVERY = 5  # every fifth showing repeats an earlier prompt in the other order, to see whether the vote flips
SCHEMA = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists prompts (id text primary key, kind text not null, messages_a text not null, messages_b text not null,
  answer_a text, answer_b text, place integer not null);
create table if not exists tickets (id text primary key, prompt text not null references prompts(id), rater text not null,
  first text not null, served real not null);
create table if not exists votes (ticket text primary key references tickets(id), choice text not null, thumb_a text, thumb_b
text, comment text, edited_a text, edited_b text, time real not null);
"""


@dataclass(frozen=True)
class Showing:
    """A prompt with its two conversations in the order in which they are shown; an answer that is not there yet is None."""

    ticket: str
    prompt: str
    kind: str
    messages: tuple[list[Message], list[Message]]
    answers: tuple[str | None, str | None]
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Vote:
    """What a person said of one showing, left and right as shown."""

    ticket: str
    choice: str
    thumbs: tuple[str | None, str | None] = (None, None)
    edited: tuple[str | None, str | None] = (None, None)
    comment: str | None = None


class ArenaStore:
    """One SQLite file; may be used from several threads."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock, self._lock = Path(path), clock, threading.RLock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            found, fix = visible(error), "give another --out, or move this file away"
            raise UserError("data/bad-votes", "the votes cannot be opened", where=visible(path), found=found, fix=fix) from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- what is asked

    def begin(self, meta: dict[str, str]) -> None:
        """Note the two models and the prompts' hash, or refuse to mix votes on other ones.

        Raises:
            UserError: the file belongs to another arena.
        """
        with self._lock:
            known = self.meta()
            for key, value in meta.items():
                if known.get(key, value) != value:
                    found, fix = f"{visible(known[key], 60)}, not {visible(value, 60)}", "give a new --out"
                    raise UserError("config/other-arena", f"the votes there are about another {key}", found=found, fix=fix)
                self._db.execute("insert or ignore into meta values (?, ?)", (key, value))

    def meta(self) -> dict[str, str]:
        """What ``begin`` noted."""
        return dict(self._db.execute("select key, value from meta").fetchall())

    def add_prompt(self, prompt: str, messages: tuple[Sequence[Message], Sequence[Message]], kind: str = "prepared") -> None:
        """Add a prompt, unless it is there.

        Args:
            prompt: its id.
            messages: the conversation with each of the two models, up to what is asked.
            kind: prepared, or chat.
        """
        texts = [json.dumps([[m.role, m.content] for m in side], ensure_ascii=False) for side in messages]
        with self._lock:
            place = self._db.execute("select count(*) from prompts").fetchone()[0]
            self._db.execute(
                "insert or ignore into prompts (id, kind, messages_a, messages_b, place) values (?, ?, ?, ?, ?)",
                (prompt, kind, *texts, place),
            )

    def set_answer(self, prompt: str, side: Side, text: str) -> None:
        """Keep an answer; the first one stays.

        Args:
            prompt: its id.
            side: of the model that gave it.
            text: the answer.
        """
        column = {"a": "answer_a", "b": "answer_b"}[side]
        with self._lock:
            self._db.execute(f"update prompts set {column} = coalesce({column}, ?) where id = ?", (text, prompt))

    def unanswered(self, side: Side) -> list[tuple[str, list[Message]]]:
        """(id, conversation) of prepared prompts that this model has yet to answer."""
        column, messages = {"a": ("answer_a", "messages_a"), "b": ("answer_b", "messages_b")}[side]
        query = f"select id, {messages} from prompts where {column} is null and kind = 'prepared' order by place"
        return [(prompt, _messages(text)) for prompt, text in self._db.execute(query)]

    # --- showing and voting

    def next_showing(self, rater: str, live: bool = False) -> Showing | None:
        """The next prompt for this person, in an order of his own; None when all were seen.

        Every fifth showing repeats a prompt that this person has judged, the other way round.
        """
        with self._lock:
            judged = self._judged(rater)
            chosen = self._repeat(judged) or self._fresh(rater, {prompt for prompt, _ in judged}, live)
            return None if chosen is None else self.show(*chosen, rater)

    def _judged(self, rater: str) -> list[tuple[str, Side]]:
        query = "select t.prompt, t.first from votes v join tickets t on t.id = v.ticket join prompts p on p.id = t.prompt "
        return self._db.execute(
            query + "where t.rater = ? and p.kind = 'prepared' order by v.time, v.rowid", (rater,)
        ).fetchall()

    def _repeat(self, judged: Sequence[tuple[str, Side]]) -> tuple[str, Side] | None:
        if not judged or (len(judged) + 1) % REPEAT_EVERY:
            return None
        orders: dict[str, set[Side]] = {}
        for prompt, first in judged:
            orders.setdefault(prompt, set()).add(first)
        once = next((prompt for prompt, _ in judged if len(orders[prompt]) == 1), None)
        return None if once is None else (once, "b" if "a" in orders[once] else "a")

    def _fresh(self, rater: str, seen: set[str], live: bool) -> tuple[str, Side] | None:
        ready = "" if live else " and answer_a is not null and answer_b is not null"
        rows = self._db.execute(f"select id from prompts where kind = 'prepared'{ready} order by place").fetchall()
        left = sorted(prompt for (prompt,) in rows if prompt not in seen)
        random.Random(f"{rater} {len(seen)}").shuffle(left)
        return (left[0], "ab"[secrets.randbelow(2)]) if left else None  # type: ignore[return-value]  # one letter of "ab"

    def show(self, prompt: str, first: Side, rater: str) -> Showing:
        """A new ticket for a prompt.

        Args:
            prompt: its id.
            first: which model's answer stands first.
            rater: who sees it.

        Returns:
            what is shown.
        """
        ticket = secrets.token_urlsafe(12)
        with self._lock:
            self._db.execute("insert into tickets values (?, ?, ?, ?, ?)", (ticket, prompt, rater, first, self._clock()))
        return self.showing(ticket)

    def showing(self, ticket: str) -> Showing:
        """What a ticket shows.

        Raises:
            UserError: no such ticket.
        """
        query = (
            "select p.id, p.kind, p.messages_a, p.messages_b, p.answer_a, p.answer_b, t.first "
            "from tickets t join prompts p on p.id = t.prompt where t.id = ?"
        )
        row = self._db.execute(query, (ticket,)).fetchone()
        if row is None:
            raise UserError("data/no-ticket", "there is no such ticket", found=visible(ticket, 40))
        prompt, kind, messages_a, messages_b, answer_a, answer_b, first = row
        messages, answers, sides = (_messages(messages_a), _messages(messages_b)), (answer_a, answer_b), ("a", "b")
        if first == "b":
            messages, answers, sides = messages[::-1], answers[::-1], sides[::-1]
        return Showing(ticket, prompt, kind, messages, answers, sides)  # type: ignore[arg-type]  # sides are a and b

    def vote(self, vote: Vote) -> None:
        """Keep a vote; when this returns it is on the disk. The same ticket again changes nothing.

        Raises:
            UserError: an unknown ticket or choice, or answers that were not there yet.
        """
        showing = self.showing(vote.ticket)
        if vote.choice not in CHOICES:
            raise UserError("data/bad-vote", "no such choice", found=visible(vote.choice, 40), expected=" or ".join(CHOICES))
        if None in showing.answers:
            raise UserError("data/bad-vote", "the answers are not complete", found=visible(vote.ticket, 40))
        order = 1 if showing.sides[0] == "a" else -1
        values = (*vote.thumbs[::order], vote.comment, *vote.edited[::order], self._clock())
        with self._lock:
            self._db.execute("insert or ignore into votes values (?, ?, ?, ?, ?, ?, ?, ?)", (vote.ticket, vote.choice, *values))

    # --- what came out

    def judgements(self) -> list[Judgement]:
        """Every vote on prepared prompts and chats, in the order in which they came."""
        query = "select t.prompt, v.choice, t.first, t.rater from votes v join tickets t on t.id = v.ticket "
        query += "order by v.time, v.rowid"
        made = []
        for prompt, choice, first, rater in self._db.execute(query):
            other = "b" if first == "a" else "a"
            winner = {"left": first, "right": other}.get(choice, choice)
            made.append(Judgement(prompt, "a", "b", winner, first, rater))
        return made

    def progress(self, rater: str) -> dict[str, JSON]:
        """How many prompts there are and how many this person has judged."""
        total = self._db.execute("select count(*) from prompts where kind = 'prepared'").fetchone()[0]
        return {"prompts": total, "judged": len({prompt for prompt, _ in self._judged(rater)})}

    def feedback_rows(self) -> list[dict[str, JSON]]:
        """One row for each answer of each vote: what ``minisft feedback`` reads."""
        query = (
            "select p.id, p.messages_a, p.messages_b, p.answer_a, p.answer_b, v.choice, v.thumb_a, v.thumb_b, v.comment, "
            "v.edited_a, v.edited_b, v.time, t.rater, t.first, v.ticket from votes v join tickets t on t.id = v.ticket "
            "join prompts p on p.id = t.prompt order by v.time, v.rowid"
        )
        names, rows = self.meta(), list[dict[str, JSON]]()
        for r in self._db.execute(query):
            for i, side in enumerate("ab"):
                messages: list[JSON] = [{"role": m.role, "content": m.content} for m in _messages(r[1 + i])]
                rows.append(
                    {"id": f"{r[14]}-{side}", "prompt_id": r[0], "side": side, "messages": messages, "response": r[3 + i],
                     "thumb": r[6 + i], "comment": r[8], "edited": r[9 + i], "model": names.get(side, side), "time": r[11],
                     "user": r[12], "choice": r[5], "shown_first": r[13] == side}
                )  # fmt: skip
        return rows


def _messages(text: str) -> list[Message]:
    turns = safe_json.loads(text)
    assert isinstance(turns, list)
    return [Message(turn[0], turn[1]) for turn in turns if isinstance(turn, list)]  # type: ignore[arg-type]  # our own rows
