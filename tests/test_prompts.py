"""Prompts: four forms read alike, the answer apart, and what asks nothing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisft.common.errors import ConfigError, DataError
from minisft.data.messages import Message
from minisft.data.prompts import read_prompts

FORMS = {
    "messages": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "prompt": {"prompt": "2+2?", "completion": "4"},
    "prompt as messages": {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "4"}],
    },
    "alpaca": {"instruction": "2+2?", "output": "4"},
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompt(tmp_path: Path, form: str) -> None:
    (found,) = read_prompts(write(tmp_path / "p.jsonl", {**FORMS[form], "id": 7}), needs_answer=True).prompts
    assert (found.messages, found.answer, found.columns["id"]) == ((Message("user", "2+2?"),), "4", 7)


def test_a_prompt_may_have_no_answer_and_a_system_message(tmp_path: Path) -> None:
    (found,) = read_prompts(write(tmp_path / "p.jsonl", {"q": "hi", "system": "Be short."}), ["prompt=q"]).prompts
    assert found.answer is None
    assert found.messages == (Message("system", "Be short."), Message("user", "hi"))


def test_equal_prompts_are_asked_once(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}))
    assert [prompt.row for prompt in found.prompts] == [1, 3]
    assert "1 repeated prompts are asked once" in found.notes


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "unknown-form.*:1.*--map prompt"),
        ({"prompt": 3}, "content-type.*:1: prompt"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "no-prompt.*:1"),
        ({"messages": []}, "no-prompt.*:1"),
        ({"prompt": "x"}, "no-answer.*:1"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, row: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_prompts(write(tmp_path / "p.jsonl", row), needs_answer=True)


def test_empty_files_and_bad_maps(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-rows"):
        read_prompts(write(tmp_path / "p.jsonl"))
    with pytest.raises(ConfigError, match=r"bad-map.*fix: for instance"):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a"}), ["answer=x"])
