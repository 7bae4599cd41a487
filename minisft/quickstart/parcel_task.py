"""A small task with exact answers, made on the spot: a customer's message about a parcel -> one JSON object.

Every message is put together from parts (greeting, who writes, what happened, order and city, how urgent, goodbye), so the
answer is known by construction: nobody labelled anything, and no label is wrong. The idea to leave with: train and test
share no part. Each template, name, city, product and order number belongs to one of the two sides, so a good test score
means that the model understood messages it never saw, not that it remembers some.
"""

from __future__ import annotations

import json
import random
from typing import Literal

from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.quickstart.parcel_phrases import TEST, TRAIN, Phrasebook

Split = Literal["train", "test"]
INTENTS = ("where_is", "damaged", "wrong_address", "return")
INSTRUCTION = "Answer with one JSON object: intent, order, name, urgent."

URGENT_SHARE = 0.4
CALM_SHARE = 0.35  # of the others, with a sentence that there is no hurry; the rest leaves it open
TYPO_SHARE = 0.2
CASING_SHARE = 0.2
PHRASEBOOKS: dict[Split, Phrasebook] = {"train": TRAIN, "test": TEST}


def parcel_rows(split: Split, count: int, seed: int = 0) -> list[dict[str, JSON]]:
    """``count`` rows in the ``messages`` form; row i depends on nothing but (split, i, seed).

    The four intents take turns, so any first n rows are balanced. The system turn states the keys (and takes the place of
    the longer default one that some chat templates insert); the answer is one line of compact JSON.

    Args:
        split: whose phrases, names, cities and order numbers; the two share none.
        count: how many rows.
        seed: decides every draw.

    Returns:
        rows with one key, ``messages``: system, user, assistant.
    """
    return [_row(split, index, seed) for index in range(count)]


def _row(split: Split, index: int, seed: int) -> dict[str, JSON]:
    draw = random.Random(derive_seed(seed, f"parcel-{split}", index))
    book = PHRASEBOOKS[split]
    answer: dict[str, JSON] = {
        "intent": INTENTS[index % len(INTENTS)],
        "order": _order_number(draw, split),
        "name": draw.choice(book.names),
        "urgent": draw.random() < URGENT_SHARE,
    }
    text = _message(draw, book, answer, draw.choice(book.cities))
    turns = (("system", INSTRUCTION), ("user", text), ("assistant", json.dumps(answer, separators=(",", ":"))))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _order_number(draw: random.Random, split: Split) -> str:
    """Like ``KX-4821``. The sum of the digits is even in train and odd in test: no number can be in both."""
    letters = "".join(draw.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=2))
    digits = draw.choices(range(10), k=3)
    parity = int(split == "test")
    last = draw.choice([d for d in range(10) if (sum(digits) + d) % 2 == parity])
    return f"{letters}-{''.join(map(str, [*digits, last]))}"


def _message(draw: random.Random, book: Phrasebook, answer: dict[str, JSON], city: str) -> str:
    body = draw.choice(book.bodies[str(answer["intent"])]).format(item=draw.choice(book.items))
    middle = [_untidy(draw, body), _details(draw, book, str(answer["order"]), city)]
    draw.shuffle(middle)
    middle += _urgency(draw, book, bool(answer["urgent"]))
    opening, ending = _opening_and_ending(draw, book, str(answer["name"]))
    return " ".join([*opening, *middle, *ending])


def _details(draw: random.Random, book: Phrasebook, order: str, city: str) -> str:
    """Order and city; people leave out the dash, or put a # in front, and the answer has the tidy form."""
    written = draw.choice([order, order, "#" + order, order.replace("-", " ")])
    return draw.choice(book.details).format(order=written, city=city)


def _urgency(draw: random.Random, book: Phrasebook, urgent: bool) -> list[str]:
    if urgent:
        return [draw.choice(book.urgent)]
    return [draw.choice(book.calm)] if draw.random() < CALM_SHARE else []


def _opening_and_ending(draw: random.Random, book: Phrasebook, name: str) -> tuple[list[str], list[str]]:
    """The name stands at the start or at the end, never twice."""
    greeting = [draw.choice(book.greetings)] if draw.random() < 0.7 else []
    closing = [draw.choice(book.closings)] if draw.random() < 0.5 else []
    if draw.random() < 0.5:
        return [*greeting, draw.choice(book.intros).format(name=name)], closing
    return greeting, [draw.choice(book.signatures).format(name=name)]


def _untidy(draw: random.Random, sentence: str) -> str:
    """As people type: now and then two letters swapped, everything small, or everything LARGE."""
    if draw.random() < TYPO_SHARE:
        sentence = _swap_two_letters(draw, sentence)
    if draw.random() < CASING_SHARE:
        sentence = draw.choice([sentence.lower(), sentence.lower().rstrip(".?!"), sentence.upper()])
    return sentence


def _swap_two_letters(draw: random.Random, sentence: str) -> str:
    inner = [i for i in range(1, len(sentence) - 2) if sentence[i - 1 : i + 2].isalpha()]
    place = draw.choice(inner)
    return sentence[:place] + sentence[place + 1] + sentence[place] + sentence[place + 2 :]
