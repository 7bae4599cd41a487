"""Rewards: what is paid, what is not, and what a bad reward says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from minisft.common.errors import ConfigError, DataError
from minisft.training.rewards import load_reward

RIGHT = '{"intent":"return","order":"KX-4821","name":"Ann","urgent":true}'

# Answers that look right in part, or break a careless checker. None is paid.
HOSTILE = [
    "", " ", "\x00", "nan", "NaN", "Infinity", "null", "true", "7 or 8", "The answer is 7 or 8", "not 7", "7" * 10**5, "٧",
    "７",    "7\n8", "7.", "<b>7</b>", '"7"', "[7]", "```json\n7\n```\n```json\n7\n```",
    RIGHT + RIGHT, RIGHT + "\n" + RIGHT, "Sure! " + RIGHT, f"```json\n{RIGHT}\n```\n```json\n{RIGHT}\n```", RIGHT[:-1],
    RIGHT.replace("true", "1"), RIGHT.replace("}", ',"urgent":true}'), RIGHT.replace("}", ',"more":1}'), "[" * 10**5,
    json.dumps([json.loads(RIGHT)]), json.dumps(RIGHT),
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: repr(answer[:30]))
@pytest.mark.parametrize(("spec", "reference"), [("exact_match", "7"), ("json", RIGHT), ("regex:[0-9]", "7")])
def test_no_hostile_answer_is_paid(spec: str, reference: str, answer: str) -> None:
    assert load_reward(spec).score(answer, {"reference": reference}, "rows:1") == 0.0


@pytest.mark.parametrize(
    ("spec", "answer", "reference"),
    [
        ("exact_match", " 7\n", "7"),
        ("exact_match", "cafe\u0301", "caf\u00e9"),
        ("json", json.dumps(json.loads(RIGHT), indent=2), RIGHT),
        ("json", f"```json\n{RIGHT}\n```", RIGHT),
        ("regex:[0-9]+", " 42 ", ""),
        ("regex:(?s).*42.*", "It is\n42, I think", ""),
    ],
)
def test_right_answers_are_paid(spec: str, answer: str, reference: str) -> None:
    assert load_reward(spec).score(answer, {"reference": reference}, "rows:1") == 1.0


def write(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path / 'mine.py'}:reward"


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ("0.5", 0.5),
        ("len(answer)", 3.0),
        ("row['n'] == 2", 1.0),
        ("None", math.nan),
        ("float('inf')", math.nan),
        ("float('nan')", math.nan),
    ],
)
def test_a_function_of_a_file(tmp_path: Path, returned: str, found: float) -> None:
    reward = load_reward(write(tmp_path, f"def reward(answer, row):\n    return {returned}\n"))
    value = reward.score("abc", {"n": 2}, "rows:1")
    assert value == found or (math.isnan(value) and math.isnan(found))


@pytest.mark.parametrize("returned", ["'1'", "[1]", "1 / 0", "row['absent']"])
def test_a_function_that_fails_is_an_error_with_the_answer_quoted(tmp_path: Path, returned: str) -> None:
    reward = load_reward(write(tmp_path, f"def reward(answer, row):\n    return {returned}\n"))
    with pytest.raises(DataError, match=r"data/reward.*rows:7.*the \\x1banswer"):
        reward.score("the \x1banswer", {}, "rows:7")


@pytest.mark.parametrize("spec", ["", "exact", "regex:(", "mine.py", "nowhere/mine.py:reward", "mine.txt:reward"])
def test_a_reward_that_is_not_there(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"config/bad-reward.*fix: give exact_match, json"):
        load_reward(spec)


@pytest.mark.parametrize(
    "body", ["x = 1", "def reward(answer): return 1", "reward = 3", "1 / 0", "def (", "import absent_module"]
)
def test_a_file_that_cannot_be_used(tmp_path: Path, body: str) -> None:
    with pytest.raises(ConfigError, match="config/bad-reward"):
        load_reward(write(tmp_path, body))
