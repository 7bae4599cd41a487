"""Rows of token ids: trained exactly as the rows of text that they come from, and refused where their text is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_folder import losses, quiet, rows, run_config, write_shop

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.encoding import encode_dataset
from minisft.data.messages import read_dataset
from minisft.data.tokenizer import Tokenizer
from minisft.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def tokenizer(shop: Path) -> Tokenizer:
    return Tokenizer.from_folder(shop / "model")


def as_tokens(source: Path, target: Path, tokenizer: Tokenizer) -> Path:
    """What transformers' users keep: ids, and -100 where nothing is learned."""
    template = resolve_template(tokenizer, None)
    with target.open("w") as file:
        for example in read_dataset(source).examples:
            encoded = encode_chat(tokenizer, template, example.messages)
            labels = [i if on else -100 for i, on in zip(encoded.input_ids, encoded.supervised, strict=True)]
            mask = [1] * len(labels)
            file.write(json.dumps({"input_ids": encoded.input_ids, "labels": labels, "attention_mask": mask}) + "\n")
    return target


def test_a_run_on_ids_is_the_run_on_their_text(shop: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows(5)))
    data, ids, held_ids = shop / "rows.jsonl", tmp_path / "ids.jsonl", tmp_path / "held_ids.jsonl"
    as_tokens(data, ids, tokenizer), as_tokens(held, held_ids, tokenizer)
    runs = {"text": (data, held), "ids": (ids, held_ids)}
    for name, (train_file, eval_file) in runs.items():
        out = tmp_path / name
        train(run_config(shop, out, data=str(train_file), eval_data=str(eval_file), steps=3, eval_every=3), log=quiet)
    assert losses(tmp_path / "ids") == losses(tmp_path / "text")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]


def test_exact_copies_are_dropped_and_the_others_are_split(shop: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = as_tokens(shop / "rows.jsonl", tmp_path / "ids.jsonl", tokenizer)
    ids.write_text(ids.read_text() + ids.read_text().splitlines()[0] + "\n")
    said: list[str] = []
    train(run_config(shop, tmp_path / "run", data=str(ids), steps=1), log=said.append)
    assert any("1 of 31 rows: exact duplicates" in text for text in said)
    (counts,) = [
        re.fullmatch(r"(\d+) rows to train on, (\d+) to validate on", text) for text in said if "to validate on" in text
    ]
    assert counts is not None
    trained, validated = map(int, counts.groups())
    assert trained + validated == 30
    assert validated > 0


def write(path: Path, **row: object) -> Path:
    path.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], **row}) + "\n")
    return path


def test_the_first_token_is_never_a_target_and_labels_are_flags(tmp_path: Path) -> None:
    (example,) = read_dataset(write(tmp_path / "a.jsonl", labels=[5, -100, 7]), allow_tokens=True).examples
    assert example.tokens is not None
    assert example.tokens.input_ids == (5, 6, 7)
    assert example.tokens.supervised == (False, False, True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": [-100, 6]}, r"found 3 ids, 2 labels"),
        ({"input_ids": [], "labels": []}, r"found 0 ids"),
        ({"labels": [6, 7, -100]}, r"found labels\[0\] = 6, input_ids\[0\] = 5.*fix: the labels look shifted by one"),
        ({"labels": [-100, 9, 7]}, r"found labels\[1\] = 9, input_ids\[1\] = 6.*fix: correct the row"),
        ({"attention_mask": [1, 1, 0]}, r"the row is padded"),
        ({"input_ids": [5, -6, 7], "labels": [-100, -100, 7]}, r"an id is negative"),
        ({"input_ids": [5, True, 7]}, r"input_ids\[1\] = True"),
        ({"labels": "none"}, r"labels is no list"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, row: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=rf"data/bad-tokens.*a\.jsonl:1.*{said}|data/bad-tokens.*{said}"):
        read_dataset(write(tmp_path / "a.jsonl", **row), allow_tokens=True)


def test_ids_of_another_tokenizer_are_refused_with_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", input_ids=[5, 6, 258], labels=[-100, -100, 258])
    examples = read_dataset(path, allow_tokens=True).examples
    with pytest.raises(UserError, match=r"data/token-range.*a\.jsonl:1; found input_ids\[2\] = 258; expected ids below 258"):
        encode_dataset(examples, tokenizer, resolve_template(tokenizer, None), 64)


def test_what_needs_text_refuses_and_inspect_shows_the_ids(
    shop: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = as_tokens(shop / "rows.jsonl", tmp_path / "ids.jsonl", tokenizer)
    model = str(shop / "model")
    assert main(["eval", "--model", model, "--data", str(ids), "--metric", "f1", "--out", str(tmp_path / "o.json")]) == 3
    assert main(["select", "--data", str(ids), "--out", str(tmp_path / "s.jsonl"), "--dedup", "exact"]) == 3
    assert capsys.readouterr().err.count("data/no-text") == 2
    with pytest.raises(UserError, match="data/no-text"):
        train(run_config(shop, tmp_path / "run", data=str(ids), eval_metric="f1"), log=quiet)
    assert main(["inspect", "--model", model, "--data", str(ids)]) == 0
    out = capsys.readouterr().out
    assert "form: tokens (input_ids, labels, attention_mask)" in out
    assert "30 of 30" in out
