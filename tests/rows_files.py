"""Rows files as ``minisft eval`` writes them, made without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

LABELS = ("refund", "card lost", "top up", "exchange rate")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_scored(folder: Path, name: str, rows: Sequence[Mapping[str, object]], **head: object) -> Path:
    """``NAME.rows.jsonl`` and, with a head, ``NAME.json``."""
    if head:
        (folder / f"{name}.json").write_text(json.dumps(head))
    return write_jsonl(folder / f"{name}.rows.jsonl", rows)


def task_rows(scores: Sequence[float]) -> list[dict[str, object]]:
    """A right answer is the reference, a wrong one the next label."""
    made = []
    for number, score in enumerate(scores, 1):
        right = LABELS[number % 4]
        said = right if score == 1 else LABELS[(number + 1) % 4]
        made.append({"row": number, "score": score, "prediction": said, "reference": right, "stopped": True})
    return made


def task_data(count: int) -> list[dict[str, object]]:
    rng = random.Random(1)
    words = ("please", "help", "account", "why", "today", "money")
    return [
        {
            "messages": [
                {"role": "user", "content": f"{LABELS[n % 4]} {' '.join(rng.choices(words, k=3 + n % 9))}"},
                {"role": "assistant", "content": LABELS[n % 4]},
            ],
            "channel": ("app", "web")[n % 2],
        }
        for n in range(1, count + 1)
    ]
