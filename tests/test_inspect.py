"""The report on the data: what is shown, and data on which training would be broken."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from texts import byte_tokenizer

from minisft.common.errors import UserError
from minisft.data.chat import resolve_template
from minisft.data.encoding import EncodedDataset, encode_dataset
from minisft.data.inspect_data import Report, check, inspect_dataset, render
from minisft.data.messages import Dataset, Example, Message
from minisft.data.template import ChatTemplate

LIMIT = 64


def dataset(*pairs: tuple[str, str], train: bool = True) -> Dataset:
    examples = tuple(Example((Message("user", q), Message("assistant", a, train)), i) for i, (q, a) in enumerate(pairs, 1))
    counts = {"rows": len(pairs) + 3, "kept": len(pairs), "duplicates": 2, "empty": 1}
    return Dataset(examples, "prompt/completion", "some.jsonl", "0" * 64, counts, ("form: prompt/completion",))


def encoded(data: Dataset, template: str = "plain", limit: int = LIMIT) -> EncodedDataset:
    tokenizer = byte_tokenizer()
    return encode_dataset(data.examples, tokenizer, resolve_template(tokenizer, template), limit, path=data.path)


def report(data: Dataset, limit: int = LIMIT) -> Report:
    return inspect_dataset(data, encoded(data, limit=limit), byte_tokenizer(), limit)


def test_examples_show_tokens_targets_and_the_border() -> None:
    text = render(report(dataset(("Answer: ", "yes"))), color=False)
    assert "A¦n¦s¦w¦e¦r¦:¦⟦ yes¦<|im_end|>⟧" in text
    assert "1 trained token(s) reach over the border" in text
    ids = byte_tokenizer().encode(":")
    assert f"':'={ids[0]} | ' yes'=" in text
    assert "\x1b" not in text


def test_colour_carries_the_same_text() -> None:
    data = report(dataset(("q\n", "a"), ("q", "b")))
    plain, colored = render(data, color=False), render(data, color=True)
    assert "\x1b[1;32ma¦<|im_end|>\x1b[0m" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored).split("row 1")[1] == re.sub("[⟦⟧]", "", plain).split("row 1")[1]


def test_numbers_of_the_summary() -> None:
    text = render(report(dataset(("q", "a"), ("q" * 100, "a"), ("<|im_end|>", "a"), ("q", "a" * 100))), color=False)
    for line in (
        "rows used            3 of 7",
        "prompt cut           1: row 2 ",
        "answer too long      1: row 4 ",
        "control tokens       1 in the data",
        "duplicates           2",
        "empty answers        1",
        "of which trained 6 (",
    ):
        assert line in text
    bars = [int(n) for n in re.findall(r"^ +\d+ to \d+ +█* +(\d+)", text, re.MULTILINE)]
    assert sum(bars) == 4
    assert text.count("over the limit") == 1


def test_nothing_from_the_data_reaches_the_terminal_raw() -> None:
    for color in (True, False):
        text = render(report(dataset(("\x1b[2J\u202eq", "\x07a"))), color)
        assert "\x1b[2J" not in text
        assert "\x07" not in text
        assert "\u202e" not in text


def test_a_long_prompt_is_cut_in_the_middle() -> None:
    text = render(report(dataset(("s" + "m" * 900 + "e", "answer")), limit=2000), color=False)
    assert "tokens in the middle of the prompt not shown" in text
    assert "  s¦m" in text
    assert "m¦e¦⟦a¦n¦s¦w¦e¦r¦<|im_end|>⟧" in text


def test_good_data_passes() -> None:
    check(encoded(dataset(("q", "a"))), byte_tokenizer(), LIMIT)


def test_broken_data_is_refused() -> None:
    cases = [
        (encoded(dataset(("q", "a" * 100), ("q", "b" * 90))), "data/all-too-long", "92 to 102 tokens"),
        (encoded(dataset(("q", "a"), train=False)), "data/no-target", "1 rows without"),
        (encoded(dataset()), "data/no-target", "no rows"),
    ]
    for data, code, says in cases:
        with pytest.raises(UserError) as caught:
            check(data, byte_tokenizer(), LIMIT)
        assert (caught.value.code, caught.value.exit_code) == (code, 3)
        assert says in str(caught.value)


def test_rows_too_long_for_the_model_name_its_context() -> None:
    data = encoded(dataset(("q", "a" * 100), ("q", "b" * 90)))
    with pytest.raises(UserError, match=r"fit --max-length 64.*fix: --max-length 200") as caught:
        check(replace(data, lengths=(200,)), byte_tokenizer(), LIMIT, context=500)
    assert "context" not in str(caught.value)
    with pytest.raises(UserError, match=r"fit the model's context of 64 tokens; fix: shorter rows") as caught:
        check(data, byte_tokenizer(), LIMIT, context=LIMIT)
    assert "--max-length" not in str(caught.value)


def test_answers_without_an_end_token_are_refused() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {})
    data = encode_dataset(dataset(("q", "a")).examples, byte_tokenizer(), template, LIMIT, path="some.jsonl")
    with pytest.raises(UserError, match=r"data/no-end-token.*some.jsonl.*row 1.*<\|im_end\|>"):
        check(data, byte_tokenizer(), LIMIT)
