"""Feedback from users, turned into rates with intervals and into rows: candidates to train on, preference pairs, bad cases.

Votes are not a sample of all answers: most people never vote, and those who are angry vote more. So rates are shown with the
share that voted, and nothing here is called the quality of a model. A prompt that became training data can never be an
evaluation row: its hash is written down, and rows with a known hash stay out of the other side.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.atomic_files import disk_errors, staged_folder
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.messages import read_dataset
from minisft.evaluation.statistics import wilson_interval
from minisft.judging.agreement import rater_agreement
from minisft.judging.feedback_file import Feedback, Shown, prompt_hash
from minisft.judging.votes import headline, resolve_orders, win_rate

SFT, PAIRS, BAD = "sft_candidates.jsonl", "pairs.jsonl", "bad_cases.jsonl"
GUARD, REPORT = "trained_prompts.sha256", "feedback.json"
MAX_USER_SHARE = 0.05
PII = {
    "email": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),
    "card number": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "phone number": re.compile(r"(?<![\d.])\+?\d{1,3}[ (-]{1,2}\d{2,4}[ )-]{1,2}\d{3,4}[ -]?\d{2,4}\b"),
}


# --- rows


@dataclass(frozen=True)
class Made:
    """The rows that feedback gives, and what was left out."""

    sft: list[dict[str, JSON]]
    pairs: list[dict[str, JSON]]
    bad: list[dict[str, JSON]]
    trained: set[str]
    left_out: dict[str, int]


def make_feedback_rows(feedback: Feedback, trained: Iterable[str] = (), evaluated: Iterable[str] = ()) -> Made:
    """Turn feedback into rows.

    Up: a candidate for SFT. Edited: a pair with the edited answer chosen. Up and down on one prompt, or a vote between two
    answers: a pair. Down: a bad case, which is an evaluation candidate too, unless its prompt is training data.

    Args:
        feedback: what was read.
        trained: hashes of prompts that were trained on.
        evaluated: hashes of prompts that are evaluated on; they never become training rows.

    Returns:
        rows in the forms that training and ``dpo`` read.
    """
    barred, left = set(evaluated), Counter[str]()
    pairs = _distinct([*_edited_pairs(feedback.shown), *_thumb_pairs(feedback.shown), *_vote_pairs(feedback)], left)
    pairs = _without(pairs, barred, left)
    sft = _without(_distinct([_sft_row(s) for s in feedback.shown if s.edited or s.thumb == "up"], left), barred, left)
    used = set(trained) | {str(row["prompt_sha256"]) for row in (*sft, *pairs)}
    bad = []
    for row in _distinct([_bad_row(s) for s in feedback.shown if s.thumb == "down"], left):
        is_trained = row["prompt_sha256"] in used
        left["bad cases kept out of evaluation: their prompt is training data"] += is_trained
        bad.append({**row, "eval_candidate": not is_trained})
    return Made(sft, pairs, bad, used, dict(left))


def _without(rows: Sequence[dict[str, JSON]], barred: set[str], left: Counter[str]) -> list[dict[str, JSON]]:
    kept = [row for row in rows if row["prompt_sha256"] not in barred]
    left["training rows left out: their prompt is an evaluation row"] += len(rows) - len(kept)
    return kept


def _distinct(rows: Sequence[dict[str, JSON]], left: Counter[str]) -> list[dict[str, JSON]]:
    seen: dict[str, dict[str, JSON]] = {}
    for row in rows:
        seen.setdefault(json.dumps({k: v for k, v in row.items() if k not in ("id", "source")}, sort_keys=True), row)
    left["exact duplicates"] += len(rows) - len(seen)
    return list(seen.values())


def _messages(talk: Iterable[tuple[str, str]]) -> list[JSON]:
    return [{"role": role, "content": text} for role, text in talk]


def _about(s: Shown, *texts: str) -> dict[str, JSON]:
    found = sorted(name for name, pattern in PII.items() if any(pattern.search(t) for t in (*texts, *(t for _, t in s.talk))))
    return {"id": s.id, "model": s.model, "prompt_sha256": s.prompt_hash, "pii": list(found)}


def _sft_row(s: Shown) -> dict[str, JSON]:
    answer = s.edited or s.response
    source = "edited" if s.edited else "thumb up"
    return {"messages": _messages([*s.talk, ("assistant", answer)]), "source": source, **_about(s, answer)}


def _bad_row(s: Shown) -> dict[str, JSON]:
    row: dict[str, JSON] = {"messages": _messages([*s.talk, ("assistant", s.edited or s.response)]), "reference": s.edited}
    return {**row, "response": s.response, "comment": s.comment, "source": "thumb down", **_about(s, s.response)}


def _pair(s: Shown, chosen: str, rejected: str, source: str) -> dict[str, JSON]:
    sides: dict[str, JSON] = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": _messages(s.talk), **sides, "source": source, **_about(s, chosen, rejected)}


def _edited_pairs(shown: Sequence[Shown]) -> list[dict[str, JSON]]:
    return [_pair(s, s.edited, s.response, "edited") for s in shown if s.edited]


def _thumb_pairs(shown: Sequence[Shown]) -> list[dict[str, JSON]]:
    """An answer with thumb up against one with thumb down, of another model on the same prompt."""
    by_prompt: dict[str, list[Shown]] = {}
    for s in shown:
        by_prompt.setdefault(s.prompt_hash, []).append(s)
    return [
        _pair(up, up.response, down.response, "thumbs")
        for group in by_prompt.values()
        for up in group
        for down in group
        if up.thumb == "up" and down.thumb == "down" and up.model != down.model and up.response != down.response
    ]


def _vote_pairs(feedback: Feedback) -> list[dict[str, JSON]]:
    """The winner of a vote against the loser, where both were asked the same; a vote that flipped with the order names none."""
    sides: dict[tuple[str, str], dict[str, Shown]] = {}
    for s in feedback.shown:
        if s.side:
            sides.setdefault((s.showing, s.user), {})[s.side] = s
    made = []
    for vote in resolve_orders(feedback.judgements)[0]:
        pair = sides.get((vote.prompt, vote.rater), {})
        if vote.winner in ("a", "b") and len(pair) == 2:
            winner, loser = pair[vote.winner], pair["b" if vote.winner == "a" else "a"]
            if winner.talk == loser.talk and winner.response != loser.response:
                made.append(_pair(winner, winner.response, loser.response, "vote"))
    return made


# --- the report


def report(feedback: Feedback, made: Made) -> dict[str, JSON]:
    """Rates by model and week, who voted, and how many rows came out."""
    shown = feedback.shown
    voted = [s for s in shown if s.thumb is not None]
    users = Counter(s.user for s in voted if s.user)
    loud = [(user, count) for user, count in users.most_common(3) if count > MAX_USER_SHARE * len(voted)]
    result: dict[str, JSON] = {
        "shown": len(shown), "voted": len(voted), "voted_share": dict(wilson_interval(len(voted), len(shown)).to_json()),
        "selection_bias": f"{len(voted)} of {len(shown)} shown answers have a thumb; voters are no random sample of readers",
        "loud_users": [{"user": user, "votes": count} for user, count in loud],
        "by_model": _rates(shown, lambda s: s.model), "by_week": _rates(shown, lambda s: s.week),
        "rows": {"sft": len(made.sft), "pairs": len(made.pairs), "bad_cases": len(made.bad)}, "left_out": dict(made.left_out),
        "pii_rows": sum(bool(row["pii"]) for row in (*made.sft, *made.pairs, *made.bad)),
    }  # fmt: skip
    if feedback.judgements:
        rate, names = win_rate(feedback.judgements), feedback.names
        result["votes"] = rate.to_json()
        agreement = rater_agreement(feedback.judgements)
        result["rater_agreement"] = None if agreement is None else agreement.to_json()
        result["headline"] = headline(rate, names.get("a", "a"), names.get("b", "b"))
    return result


def _rates(shown: Sequence[Shown], key: Callable[[Shown], str]) -> dict[str, JSON]:
    """Thumbs up among those that voted, and who voted among those that were shown, for each group."""
    groups: dict[str, list[Shown]] = {}
    for s in shown:
        groups.setdefault(key(s), []).append(s)
    rates: dict[str, JSON] = {}
    for name, group in sorted(groups.items()):
        up, down = (sum(s.thumb == thumb for s in group) for thumb in ("up", "down"))
        rates[name] = {
            "shown": len(group), "up": up, "down": down,
            "up_among_shown": dict(wilson_interval(up, len(group)).to_json()),
            "up_among_votes": dict(wilson_interval(up, up + down).to_json()) if up + down else None,
        }  # fmt: skip
    return rates


def write_feedback(feedback: Feedback, made: Made, out: str | Path) -> dict[str, JSON]:
    """Write the rows, the hashes of trained prompts and the report into a new folder, all or nothing.

    Args:
        feedback: what was read.
        made: its rows.
        out: folder.

    Returns:
        the report.

    Raises:
        UserError: the folder is in use, the disk.
    """
    result = report(feedback, made)
    with disk_errors(Path(out).absolute().parent), staged_folder(out) as folder:
        for name, rows in ((SFT, made.sft), (PAIRS, made.pairs), (BAD, made.bad)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / GUARD).write_text("".join(f"{digest}\n" for digest in sorted(made.trained)))
        (folder / REPORT).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def read_guard(path: str | Path) -> set[str]:
    """The hashes in a ``trained_prompts.sha256``.

    Raises:
        UserError: no such file, or lines that are no hash.
    """
    try:
        lines = Path(path).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        raise UserError("data/no-file", "the hashes cannot be read", where=visible(path)) from None
    bad = next((line for line in lines if not re.fullmatch("[0-9a-f]{64}", line)), None)
    if bad is not None:
        expected = "one sha256 a line"
        raise UserError("data/bad-hash", "a line is no hash", where=visible(path), found=visible(bad, 40), expected=expected)
    return set(lines)


def eval_hashes(path: str | Path) -> set[str]:
    """Hashes of the prompts of evaluation rows."""
    examples = read_dataset(path, keep_duplicates=True).examples
    return {prompt_hash((m.role, m.content) for m in example.messages[:-1]) for example in examples}
