"""Reading data: every form, every bad input with its place, duplicates, the split."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.data.messages import Dataset, Example, Message, read_dataset, split

Write = Callable[..., Path]
ANSWER = {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "completion": "a"}
CHAT = (Message("user", "q"), Message("assistant", "a"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return _write


def only(dataset: Dataset) -> tuple[Message, ...]:
    assert len(dataset.examples) == 1
    return dataset.examples[0].messages


def talk(role_key: str, content_key: str, *turns: tuple[str, str]) -> list[dict[str, object]]:
    return [{role_key: role, content_key: content} for role, content in turns]


MESSAGES = talk("role", "content", ("system", "s"), ("user", "q"), ("assistant", "a"), ("assistant", "b"))
MESSAGES[2]["weight"], MESSAGES[3]["train"] = 0, True
SHAREGPT = talk("from", "value", ("human", "q"), ("gpt", "a"), ("observation", "o"), ("function_call", "f"))
SYSTEM = Message("system", "s")
FORMS = [
    ("messages", {"messages": talk("role", "content", ("user", "q"), ("assistant", "a"))}, CHAT),
    (
        "messages",
        {"messages": MESSAGES},
        (SYSTEM, Message("user", "q"), Message("assistant", "a", train=False), Message("assistant", "b")),
    ),
    (
        "sharegpt",
        {"system": "s", "conversations": SHAREGPT},
        (SYSTEM, *CHAT, Message("tool", "o"), Message("assistant", "f")),
    ),
    ("alpaca", {"instruction": "q", "output": "a"}, CHAT),
    (
        "alpaca",
        {"instruction": "r", "input": "i", "output": "b", "system": "s", "history": [["q", "a"]]},
        (SYSTEM, *CHAT, Message("user", "r\ni"), Message("assistant", "b")),
    ),
    ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": None}, CHAT),
    ("prompt/completion", PAIR, CHAT),
    (
        "prompt/completion",
        {"prompt": talk("role", "content", ("user", "q")), "completion": talk("role", "content", ("assistant", "a"))},
        CHAT,
    ),
]


@pytest.mark.parametrize(("form", "row", "expected"), FORMS)
def test_each_form_gives_the_same_kind_of_messages(
    write: Write, form: str, row: dict[str, object], expected: tuple[Message, ...]
) -> None:
    dataset = read_dataset(write(row))
    assert (dataset.form, only(dataset)) == (form, expected)
    assert dataset.notes[0].startswith(f"form: {form} (")


def test_a_system_column_beside_messages_is_the_first_message(write: Write) -> None:
    assert only(read_dataset(write({**chat_row(), "system": "s"}))) == (SYSTEM, *CHAT)
    assert only(read_dataset(write({**chat_row(), "instructions": "s"}), ("system=instructions",))) == (SYSTEM, *CHAT)


def test_further_texts_of_a_message_are_kept(write: Write) -> None:
    row = chat_row(reasoning_content="r", name="n", id=7)
    fields = (("reasoning_content", "r"), ("name", "n"))
    assert only(read_dataset(write(row))) == (CHAT[0], Message("assistant", "a", fields=fields))


def test_what_is_null_or_empty_is_not_there(write: Write) -> None:
    nothing: list[object] = [None, "", [], {}]
    for empty in nothing:
        names = ("tools", "images", "functions", "source")
        row = {**chat_row(reasoning_content=empty, thinking=empty, tool_calls=empty, function_call=empty), "tools": empty}
        dataset = read_dataset(write(row | dict.fromkeys(names, empty)))
        assert only(dataset) == CHAT
        assert len(dataset.notes) == 1
    assert only(read_dataset(write({**chat_row(), "tools": "[]"}))) == CHAT


def test_columns_that_nothing_reads_are_listed_once(write: Write) -> None:
    rows = [{**PAIR, "id": 1, "choices": ["a", "b"]}, {"prompt": "r", "completion": "b", "source": "x", "empty": None}]
    assert [note for note in read_dataset(write(*rows)).notes if "not used" in note] == ["columns not used: id, source"]


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": [{"role": "user", "content": "q", "id": 1}, {**ANSWER, "thought": "t"}]}, "id, thought"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "content": "c"}]}, "content"),
        ({"prompt": "q", "completion": [{**ANSWER, "train": True, "thought": "t"}]}, "thought"),
        ({"messages": [{"role": "user", "content": "q", "id": None}, {**ANSWER, "weight": 1}]}, ""),
    ],
)  # fmt: skip
def test_keys_of_messages_that_nothing_reads_are_listed(write: Write, row: dict[str, object], unused: str) -> None:
    notes = [note for note in read_dataset(write(row)).notes if "keys of messages" in note]
    assert notes == ([f"keys of messages not used: {unused}"] if unused else [])


def test_mapping_names_other_columns(write: Write) -> None:
    row = {"text": "q", "label": "a", "options": ["a", "b"]}
    dataset = read_dataset(write(row), ("prompt=text", "completion=label"))
    assert only(dataset) == CHAT
    assert dataset.examples[0].reference == {"options": ["a", "b"]}
    assert "prompt = text" in dataset.notes[0]
    assert only(read_dataset(write({"text": "a"}), ("completion=text",))) == (Message("assistant", "a"),)
    chat = {"dialogue": [{"who": "user", "says": "q"}, {"who": "gpt", "says": "a"}]}
    assert only(read_dataset(write(chat), ("messages=dialogue", "role=who", "content=says"))) == CHAT


def test_a_json_array_equals_its_lines(write: Write) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]
    array = read_dataset(write(json.dumps(rows, indent=1).encode(), name="data.json"))
    assert array.examples == read_dataset(write(*rows)).examples


def test_duplicates_and_empty_answers_are_dropped_counted_and_said(write: Write) -> None:
    rows = [PAIR, PAIR, {"prompt": "q", "completion": " \n"}, {**PAIR, "extra": 1}]
    dataset = read_dataset(write(*rows))
    assert dataset.counts == {"rows": 4, "kept": 2, "duplicates": 1, "empty": 1}
    assert [e.row for e in dataset.examples] == [1, 4]
    assert any("1 of 4 rows: empty answer" in note for note in dataset.notes)
    kept = read_dataset(write(*rows), keep_duplicates=True)
    assert [e.row for e in kept.examples] == [1, 2, 4]


def test_sha256_is_that_of_the_bytes_and_blank_lines_are_skipped(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), b"", {"prompt": "é", "completion": "b"})
    dataset = read_dataset(path)
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [e.row for e in dataset.examples] == [1, 3]
    assert any("byte order mark" in note for note in dataset.notes)


def chat_row(**message: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | message]}


BAD_ROWS = [
    (b'{"prompt": "q", "completion": }', "data/bad-json", ":2: column 31"),
    (b"[1, 2]", "data/not-an-object", ":2"),
    ({"question": "q"}, "data/missing-column", "question"),
    (chat_row(role="asistant"), "data/unknown-role", "assistant"),
    (chat_row(content=None), "data/content-type", "null"),
    (chat_row(content=3), "data/content-type", "number 3"),
    (chat_row(content=[{"type": "text"}]), "data/content-type", "join the parts"),
    (chat_row(train="no"), "data/bad-train-flag", "message 2"),
    (chat_row(tool_calls=[1]), "data/tool-calls", "message 2"),
    (chat_row(function_call={"name": "f"}), "data/function-call", "message 2: function_call"),
    (chat_row(images=["a.png"]), "data/images", "message 2: images"),
    (chat_row(reasoning_content=3), "data/content-type", "message 2: reasoning_content"),
    ({**chat_row(), "tools": [{"name": "f"}]}, "data/tools", ":2: tools"),
    ({**chat_row(), "tools": '[{"name": "f"}]'}, "data/tools", ":2: tools"),
    ({**chat_row(), "image": "a.png"}, "data/image", ":2: image"),
    ({"messages": talk("role", "content", ("system", "s"), ("gpt", "a")), "system": "t"}, "data/two-systems", ":2: system"),
    ({"messages": [{"from": "user", "value": "q"}]}, "data/message-keys", "--map role=from content=value"),
    ({"messages": [{"role": "user", "content": "q"}]}, "data/no-assistant", "nothing to train on"),
    ({"messages": "q"}, "data/not-a-list", "string"),
    ({"messages": [{"role": "user", "text": "q"}]}, "data/message-keys", "--map role=role content=text"),
    (b'{"messages": "\xff"}', "data/bad-utf8", "byte"),
    (b'{"messages": "\\ud800"}', "data/bad-value", "surrogate"),
    (b'{"messages": 1, "messages": 2}', "data/bad-value", "duplicate key"),
    (b'{"messages": NaN}', "data/bad-value", "NaN"),
    (b"[" * 100, "data/bad-value", "nested"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "code", "says"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(write: Write, row: object, code: str, says: str) -> None:
    first = PAIR if code == "data/bad-json" else chat_row()
    with pytest.raises(UserError) as caught:
        read_dataset(write(first, row))
    assert caught.value.code == code
    assert caught.value.exit_code == 3
    assert "data.jsonl:2" in str(caught.value)
    assert says in str(caught.value)


def test_bad_utf8_is_placed_by_its_byte_in_the_file(write: Write) -> None:
    path = write(PAIR, b'{"prompt": "q\xff", "completion": "a"}')
    offset = path.read_bytes().index(b"\xff")
    with pytest.raises(UserError, match=f"byte {offset}"):
        read_dataset(path)


def test_bad_files_are_named(write: Write, tmp_path: Path) -> None:
    write(PAIR, name="train.jsonl")
    cases = [
        (tmp_path / "trian.jsonl", "data/no-file", "train.jsonl"),
        (tmp_path, "data/unreadable", "directory"),
        (write(gzip.compress(b"{}", mtime=0), name="z.jsonl"), "data/unreadable", "unpacked"),
        (write(b"PK\x03\x04xxxx", name="p.jsonl"), "data/not-text", "zip"),
        (write(b"", name="empty.jsonl"), "data/no-rows", "empty"),
        (write({"prompt": "q", "completion": ""}, name="blank.jsonl"), "data/no-rows", "1 dropped"),
        (write({"question": "q", "answer": "a"}, name="odd.jsonl"), "data/unknown-form", "question, answer"),
        (write(b'[{"prompt": "q", "completion": "a"}, 3]', name="a.json"), "data/not-an-object", "item 2"),
    ]
    for path, code, says in cases:
        with pytest.raises(UserError) as caught:
            read_dataset(path)
        assert caught.value.code == code
        assert says in str(caught.value)


def test_a_row_over_the_limit_is_refused_before_it_is_parsed(write: Write) -> None:
    with pytest.raises(UserError, match="data/row-too-large"):
        read_dataset(write({"prompt": "q" * 100, "completion": "a"}), max_row_bytes=64)


@pytest.mark.parametrize(
    ("mapping", "code", "says"),
    [
        ("prompt", "config/bad-map", "FIELD=COLUMN"),
        ("promt=text", "config/bad-map", "did you mean 'prompt'"),
        ("prompt=txt", "data/no-column", "did you mean 'text'"),
    ],
)
def test_a_bad_mapping_is_refused(write: Write, mapping: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_dataset(write({"text": "q", "completion": "a"}), (mapping,))
    assert caught.value.code == code
    assert says in str(caught.value)


def test_terminal_escapes_from_the_file_are_made_visible(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        read_dataset(write({"\x1b[31mred": 1}))
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[31mred" in str(caught.value)


examples = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30).map(
    lambda words: tuple(Example((Message("assistant", w),), i) for i, w in enumerate(words, 1))
)


@given(examples, st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_split_is_a_partition_that_never_parts_duplicates(rows: tuple[Example, ...], share: float, seed: int) -> None:
    train, validation = split(rows, share, seed)
    assert sorted([*train, *validation], key=lambda e: e.row) == list(rows)
    assert train
    assert not {e.messages for e in train} & {e.messages for e in validation}
    assert (train, validation) == split(rows, share, seed)
    distinct = len({e.messages for e in rows})
    assert bool(validation) == (share > 0 and distinct > 1)
    assert abs(len({e.messages for e in validation}) - share * distinct) <= 1


def test_the_seed_decides_the_split() -> None:
    rows = tuple(Example((Message("assistant", str(i)),), i) for i in range(40))
    held_out = {tuple(e.row for e in split(rows, 0.25, seed)[1]) for seed in range(5)}
    assert len(held_out) == 5
    assert all(len(part) == 10 for part in held_out)
