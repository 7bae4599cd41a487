"""The quickstart's task: a pure function of the seed, exact answers, and nothing shared between train and test."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.quickstart.parcel_phrases import TEST, TRAIN, Phrasebook
from minisft.quickstart.parcel_task import INSTRUCTION, INTENTS, PHRASEBOOKS, parcel_rows


def parts(book: Phrasebook) -> dict[str, list[str]]:
    """Every phrase list of one side; the bodies of all intents in one list."""
    lists = {f.name: list(getattr(book, f.name)) for f in dataclasses.fields(book) if f.name != "bodies"}
    return lists | {"bodies": [body for bodies in book.bodies.values() for body in bodies]}


def user_and_answer(row) -> tuple[str, dict]:
    system, user, assistant = row["messages"]
    assert system == {"role": "system", "content": INSTRUCTION}
    return user["content"], json.loads(assistant["content"])


def test_train_and_test_share_no_part():
    train, test = parts(TRAIN), parts(TEST)
    for name in train:
        shared = {p.casefold() for p in train[name]} & {p.casefold() for p in test[name]}
        assert not shared, f"{name}: {shared}"


def test_no_phrase_stands_twice_and_every_intent_is_varied():
    for book, least in ((TRAIN, 12), (TEST, 4)):
        for name, phrases in parts(book).items():
            assert len(phrases) == len(set(phrases)), name
        assert set(book.bodies) == set(INTENTS)
        assert min(len(b) for b in book.bodies.values()) >= least


def test_no_city_is_also_a_name():
    """``York`` inside ``New York`` is fine, a person called like a city is not: the answer would be a matter of taste."""
    words = [set(book.names) | set(book.items) for book in PHRASEBOOKS.values()]
    cities = [set(book.cities) for book in PHRASEBOOKS.values()]
    assert not (words[0] | words[1]) & (cities[0] | cities[1])


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_rows_depend_on_split_index_and_seed_only(seed, count):
    longer = parcel_rows("train", count + 7, seed)
    assert parcel_rows("train", count, seed) == longer[:count]


def test_the_seed_and_the_side_matter():
    assert parcel_rows("train", 12, 0) != parcel_rows("train", 12, 1)
    assert parcel_rows("train", 12, 0) != parcel_rows("test", 12, 0)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_can_be_read_off_the_message(split):
    book = PHRASEBOOKS[split]
    for row in parcel_rows(split, 600, seed=3):
        text, answer = user_and_answer(row)
        assert list(answer) == ["intent", "order", "name", "urgent"]
        assert re.fullmatch(r"[A-Z]{2}-\d{4}", answer["order"])
        assert answer["order"] in text or answer["order"].replace("-", " ") in text
        named = {n for n in book.names if re.search(rf"\b{n}\b", text)}
        assert named == {answer["name"]}
        assert any(phrase in text for phrase in book.urgent) == answer["urgent"]


@pytest.mark.slow
def test_orders_never_meet():
    orders = [{user_and_answer(r)[1]["order"] for r in parcel_rows(s, 3000, seed=s == "test")} for s in ("train", "test")]
    assert len(orders[0]) > 2900
    assert not orders[0] & orders[1]


def test_rows_are_balanced_and_short():
    answers = [user_and_answer(r)[1] for r in parcel_rows("train", 600)]
    assert all(sum(a["intent"] == i for a in answers) == 150 for i in INTENTS)
    assert 0.3 < sum(a["urgent"] for a in answers) / 600 < 0.5
    texts = [user_and_answer(r)[0] for r in parcel_rows("train", 600)]
    assert len(set(texts)) == 600
    assert max(map(len, texts)) < 260


def test_words_and_letters_are_untidy_but_entities_are_not():
    texts = [user_and_answer(r)[0] for r in parcel_rows("train", 300)]
    bodies = {b.split("{item}")[0] for bs in TRAIN.bodies.values() for b in bs if not b.startswith("{item}")}
    untouched = sum(any(b in t for b in bodies) for t in texts)
    assert 100 < untouched < 280, "a third or more of the messages should carry a typo or odd casing"
