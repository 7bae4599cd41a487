"""Preference rows: four forms read alike, and every row that is no pair is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_folder import CONTROL, quiet, write_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from minisft.common.errors import ConfigError, DataError
from minisft.data.chat import Encoded
from minisft.data.messages import Message
from minisft.data.pairs import Pair, read_pairs
from minisft.data.tokenizer import Tokenizer
from minisft.training.dpo import EncodedPair
from minisft.training.preference_config import DPOConfig
from minisft.training.preference_data import prepare_pairs

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "s"}
WANTED = Pair((Message("user", "2+2?"),), Message("assistant", "4"), Message("assistant", "5"), 1)
FORMS = {
    "texts": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "mixed": {"prompt": [USER], "chosen": "4", "rejected": "5"},
    "chats": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(tmp_path: Path, form: str) -> None:
    found = read_pairs(write(tmp_path / "p.jsonl", FORMS[form]))
    assert found.pairs == (WANTED,)
    assert found.notes[0].startswith("form: ")


@pytest.mark.parametrize("form", FORMS)
def test_a_system_column_comes_first(tmp_path: Path, form: str) -> None:
    row = {**FORMS[form], "system": "Be short."}
    (pair,) = read_pairs(write(tmp_path / "p.jsonl", row)).pairs
    assert pair.prompt == (Message("system", "Be short."), *WANTED.prompt)


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "2+2?", "better": "4", "worse": "5"})
    assert read_pairs(path, ["prompt=question", "chosen=better", "rejected=worse"]).pairs == (WANTED,)
    for bad in ("prompt", "answer=x", "chosen="):
        with pytest.raises(ConfigError, match=r"config/bad-map.*fix: for instance"):
            read_pairs(path, [bad])


def test_what_is_dropped_is_counted_and_said(tmp_path: Path) -> None:
    flipped = {"prompt": "2+2?", "chosen": "5", "rejected": "4"}
    equal, empty = {"prompt": "a", "chosen": "x", "rejected": "x"}, {"prompt": "a", "chosen": "x", "rejected": " "}
    found = read_pairs(write(tmp_path / "p.jsonl", FORMS["texts"], equal, empty, FORMS["texts"], flipped))
    assert [pair.row for pair in found.pairs] == [1, 5]
    assert found.counts == {"rows": 5, "kept": 2, "equal": 1, "empty": 1, "duplicates": 1}
    assert "dropped 1 of 5 rows: chosen and rejected are equal" in found.notes
    assert "dropped 1 of 5 rows: an answer is empty" in found.notes
    assert any("2 rows contradict another row" in note and "1, 5" in note for note in found.notes)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "unknown-form.*:2.*--map"),
        ({"instruction": "x", "completions": [{"response": "a", "overall_score": 3}]}, "unknown-form.*best and the worst"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3+3?"}, BAD]}, "different-prompts.*:2.*message 1 differs"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "system", "content": "s"}, USER, BAD]},
            "different-prompts.*2 and 3|message 1",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "no-assistant.*rejected.*:2"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no-prompt.*:2"),
        ({"prompt": "a", "chosen": 4, "rejected": "5"}, "not-a-message.*:2: chosen"),
        ({"prompt": 3, "chosen": "4", "rejected": "5"}, "not-a-list.*:2: prompt"),
        ({"prompt": "a", "chosen": "4", "rejected": "5", "system": 3}, "content-type.*:2: system"),
        (
            {"prompt": [SYSTEM, USER], "system": "t", "chosen": "4", "rejected": "5"},
            "two-systems.*:2",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, row: dict[str, object], words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        read_pairs(path)


def test_later_rows_are_held_to_the_form(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", FORMS["texts"], FORMS["chats"])
    with pytest.raises(DataError, match=r"missing-column.*:2.*expected prompt"):
        read_pairs(path)


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., tuple[EncodedPair, ...]]:
    """Pairs as a run encodes them, with the tokenizer of bytes and ChatML."""
    write_tokenizer(tmp_path)

    def encoded(*rows: object, max_length: int = 1024) -> tuple[EncodedPair, ...]:
        run = DPOConfig("m", str(write(tmp_path / "p.jsonl", *rows)), "out", validation_share=0.0, max_length=max_length)
        return prepare_pairs(run, Tokenizer.from_folder(tmp_path), quiet)[1].train

    return encoded


def spell(side: Encoded, scored: bool) -> str:
    """The text of a side's tokens: all of them, or those that are scored. 256 bytes, then the two control tokens."""
    alphabet = dict(enumerate(sorted(ByteLevel.alphabet()))) | dict(enumerate(CONTROL, 256))
    ids = [i for i, flag in zip(side.input_ids, side.supervised, strict=True) if flag or not scored]
    return "".join(alphabet[i] for i in ids).replace("\u010a", "\n").replace("\u0120", " ")


def test_both_sides_are_scored_up_to_their_end_token(encode: Callable[..., tuple[EncodedPair, ...]]) -> None:
    (one,) = encode(FORMS["texts"])
    assert spell(one.chosen, scored=True) == "4<|im_end|>"
    assert spell(one.rejected, scored=True) == "5<|im_end|>"
    assert spell(one.chosen, scored=False) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"


@pytest.mark.slow
@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_both_sides_lose_the_same_start_of_the_prompt(encode: Callable[..., tuple[EncodedPair, ...]], longer: str) -> None:
    """Whichever side is too long by 7 tokens: 7 go from the start of either prompt, and no answer loses a token."""
    answers = {"chosen": "no", "rejected": "ok", longer: "x" * 30}
    row = {"prompt": "abcdefghijklmnopqrstuvwxyz" * 2, **answers}
    (whole,) = encode(row)
    longest = max(len(side.input_ids) for side in (whole.chosen, whole.rejected)) - 1  # the new line behind the end token
    (cut,) = encode(row, max_length=longest - 7)
    for name in ("chosen", "rejected"):
        before, after = getattr(whole, name), getattr(cut, name)
        assert after.input_ids == before.input_ids[7:-1]
        assert spell(after, scored=True) == f"{answers[name]}<|im_end|>"
    assert encode({**row, longer: "x" * 300}, FORMS["texts"], max_length=80)[0].row == 2  # an answer that does not fit


def test_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-rows.*2 rows, 2 equal"):
        read_pairs(write(tmp_path / "p.jsonl", *[{"prompt": str(i), "chosen": "x", "rejected": "x"} for i in range(2)]))
