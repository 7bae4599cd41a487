"""Rows in flat arrays are the rows that ``encode_chat`` and ``fit`` give one by one, and so is everything counted on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import byte_tokenizer

from minisft.common.errors import UserError
from minisft.data import encoding
from minisft.data.chat import Encoded, encode_chat, fit, resolve_template
from minisft.data.encoding import encode_dataset
from minisft.data.examples import Example, Message
from minisft.data.token_rows import TokenRows, TokenWriter, longest_rows
from minisft.training.identity import tokens_sha256

LIMIT = 40
TOKENIZER = byte_tokenizer()
CHATML = resolve_template(TOKENIZER, "chatml")
words = st.text("ab <|im_end|>\n\u00e9\U0001f600", max_size=12)
chats = st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=3)


@st.composite
def encoded_rows(draw: st.DrawFn) -> list[Encoded]:
    rows = []
    for number in range(1, draw(st.integers(0, 6)) + 1):
        ids = draw(st.lists(st.integers(0, 9), max_size=6))
        flags = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        first = flags.index(True) if True in flags else len(ids)
        rows.append(Encoded(ids, flags, 3 * number, number % 2, first, number % 3, draw(st.booleans())))
    return rows


def stored(rows: list[Encoded], path: Path | None = None) -> TokenRows:
    writer = TokenWriter(path)
    for row in rows:
        writer.add(row)
    return writer.finish()


def ends_open(row: Encoded, ends: set[int]) -> bool:
    followed = [*row.supervised[1:], False][: len(row.supervised)]
    return any(f and not g and i not in ends for i, f, g in zip(row.input_ids, row.supervised, followed, strict=True))


@given(encoded_rows(), st.sets(st.integers(0, 9)))
def test_a_row_comes_back_as_it_went_in(rows: list[Encoded], ends: set[int]) -> None:
    flat = stored(rows)
    assert list(flat) == rows
    assert flat[-2:] == tuple(rows[-2:])
    assert flat.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert flat.num_targets == sum(row.num_targets for row in rows)
    assert flat.open_ended(ends) == tuple(row.row for row in rows if ends_open(row, ends))
    targets = {i for row in rows for i, flag in zip(row.input_ids, row.supervised, strict=True) if flag}
    assert flat.vocabulary() == ({i for row in rows for i in row.input_ids}, targets)
    assert tokens_sha256(flat, flat[:1]) == tokens_sha256(rows, rows[:1])
    with pytest.raises(IndexError):
        flat[len(rows)]


def test_the_largest_id_and_its_flag_share_a_number() -> None:
    row = Encoded([2**24 - 1, 0, 2**24 - 1], [True, True, False], 1, 0, 0)
    assert stored([row])[0] == row


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_parts_of_any_size_are_one_set(at_once: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minisft.data.token_rows._TOKENS_AT_ONCE", at_once)
    flags = [[True, False], [True], [], [False, True, True], [True], [False]]
    rows = [Encoded(list(range(len(f))), f, i, 0, 0) for i, f in enumerate(flags, 1)]
    flat = stored(rows, tmp_path / "train.tokens")
    flat.save(tmp_path, "train")
    again = TokenRows.load(tmp_path, "train")
    assert list(flat) == list(again) == rows
    assert again.open_ended({0}) == (4,)
    assert again.open_ended(set()) == (1, 2, 4, 5)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stored([Encoded([1, 2], [False, True], 1, 0, 1)], tmp_path / "a.tokens").save(tmp_path, "a")
    (tmp_path / "a.tokens").write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match="do not fit"):
        TokenRows.load(tmp_path, "a")


@given(st.lists(chats, max_size=7), st.sampled_from(["all", "last"]), st.booleans(), st.integers(1, 4))
def test_many_at_once_are_the_rows_one_by_one(chosen: list, turns: str, control: bool, at_once: int) -> None:
    examples = []
    for number, turns_of in enumerate(chosen, 1):
        pairs = [(Message("user", q), Message("assistant", a, train)) for q, a, train in turns_of]
        examples.append(Example(tuple(m for pair in pairs for m in pair), number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "ROWS_AT_ONCE", at_once)
        data = encode_dataset(examples, TOKENIZER, CHATML, LIMIT, turns=turns, allow_control_tokens=control)
    one_by_one = [
        encode_chat(TOKENIZER, CHATML, e.messages, turns=turns, allow_control_tokens=control, row=e.row) for e in examples
    ]
    fitted = [fit(row, LIMIT) for row in one_by_one if row.num_targets]
    assert list(data.rows) == [row for row in fitted if row is not None]
    assert data.lengths == tuple(len(row.input_ids) for row in one_by_one)
    assert data.control_tokens == sum(row.control_tokens_in_text for row in one_by_one)


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_the_first_bad_row_is_the_one_that_is_named(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 3 is too long, and row 4 cannot be rendered: row 4 is rendered before row 3 has been encoded."""
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", at_once)
    chats = ["a", "b", "c" * 99, "d"]
    fields = [(), (), (), (("reasoning_content", "so"),)]
    examples = [
        Example((Message("user", "q"), Message("assistant", text, True, extra)), i)
        for i, (text, extra) in enumerate(zip(chats, fields, strict=True), 1)
    ]
    with pytest.raises(UserError, match=r"f\.jsonl:3;") as caught:
        encode_dataset(examples, TOKENIZER, CHATML, LIMIT, strict=True, path="f.jsonl")
    assert caught.value.code == "data/too-long"
    with pytest.raises(UserError, match=r"f\.jsonl:4") as caught:
        encode_dataset(examples, TOKENIZER, CHATML, LIMIT, path="f.jsonl")
    assert caught.value.code == "data/unread-field"


@given(encoded_rows(), st.integers(1, 8))
def test_the_longest_rows_are_those_of_a_sorted_list(rows: list[Encoded], count: int) -> None:
    expected = sorted(rows, key=lambda row: len(row.input_ids))[-count:]
    assert longest_rows(stored(rows), count) == expected
    assert longest_rows(rows, count) == expected


def test_no_row_but_the_longest_is_made() -> None:
    made: list[int] = []

    class Counted(TokenRows):
        def __getitem__(self, at: int | slice) -> Encoded | tuple[Encoded, ...]:  # type: ignore[override]
            made.append(at if isinstance(at, int) else -1)
            return super().__getitem__(at)

    flat = stored([Encoded([1] * n, [True] * n, n, 0, 0) for n in (3, 9, 1, 7)])
    longest_rows(Counted(flat.tokens, flat.offsets, flat.facts), 2)
    assert made == [3, 1]
