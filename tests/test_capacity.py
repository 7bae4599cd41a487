"""Bits that a run can hold beside the bits that its rows bring: counted on real models and files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import tiny_folder

from minisft.cli.main import main
from minisft.config import RunConfig
from minisft.formats import load_model
from minisft.step import prepare_method
from minisft.surgery import num_parameters
from minisft.training.capacity import Capacity, advice, capacity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.write_shop(tmp_path_factory.mktemp("shop"))


def run_of(shop: Path, **changes: object) -> RunConfig:
    return RunConfig(**({"model": str(shop / "model"), "data": "", "out": ""} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"rank": 1}, {"rank": 3, "use_dora": True}, {"rank": 2, "targets": ("embed_tokens", "q_proj")}, {"method": "full"},
     {"method": "full", "targets": ("all-linear",)}],
)  # fmt: skip
def test_trained_parameters_are_those_of_the_run(shop: Path, settings: dict[str, object]) -> None:
    run = run_of(shop, **settings)
    found = capacity(run)
    model, _ = load_model(run.model)
    prepare_method(model, run)
    assert found.parameters == num_parameters(model, trainable=True)
    assert found.bits == 2 * found.parameters
    assert found.is_enough is None
    assert "give --data" in advice(found)


def write_answers(path: Path, answers: list[str]) -> Path:
    rows = [{"prompt": f"question {i} {i * 7919 % 1000}", "completion": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_there_is_to_learn_is_bounded_by_the_compressed_answers(shop: Path, tmp_path: Path) -> None:
    """Random digits need log2(10) bits each; two labels a bit a row, however the file is sorted; one label next to none."""
    draw, count = random.Random(3), 600
    digits = ["".join(draw.choices("0123456789", k=12)) for _ in range(count)]
    labels = [draw.choice(("yes please", "not today")) for _ in range(count)]
    files = {"digits": digits, "labels": labels, "sorted": sorted(labels), "one": ["yes please"] * count}
    found = {}
    for name, answers in files.items():
        path = write_answers(tmp_path / f"{name}.jsonl", answers)
        found[name] = capacity(run_of(shop, data=str(path), validation_share=0.0))
    for each in found.values():
        assert each.rows == count
        assert each.supervised_tokens is not None
        assert each.token_bits == pytest.approx(each.supervised_tokens * math.log2(258))
    entropy = count * 12 * math.log2(10)
    assert entropy < (found["digits"].text_bits or 0) < 1.35 * entropy
    assert count < (found["labels"].text_bits or 0) < 4 * count
    assert (found["sorted"].text_bits or 0) > count  # sorting a file by its labels teaches a model nothing
    assert (found["one"].text_bits or 0) < 0.25 * (found["labels"].text_bits or 0)


def test_the_sentence_says_whether_rank_is_the_limit(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(5)
    path = write_answers(tmp_path / "d.jsonl", ["".join(draw.choices("0123456789", k=40)) for _ in range(40)])
    bits = 40 * 0.95 * 40 * math.log2(10)  # of the rows that are not held out
    for targets, limited in ((("layers.0.self_attn.v_proj",), True), (("all-linear",), False)):
        found = capacity(run_of(shop, data=str(path), max_length=128, rank=8, targets=targets))
        assert (found.needed or 0) > bits
        assert found.is_enough is not limited
        assert ("may be your limit" in advice(found)) is limited
    words = ["plan", "--model", str(shop / "model"), "--max-length", "128", "--device", "cpu", "--rank", "8"]
    assert main([*words, "--data", str(tmp_path / "none.jsonl")]) == 3
    capsys.readouterr()
    assert main([*words, "--data", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "a rule of thumb" in printed
    assert "an upper bound" in printed
    assert printed.strip().endswith("of capacity.")
    assert "may be your limit" in advice(Capacity("lora", 10, 20.0, 1, 9, 80.0, 70.0))
    assert "Rank is not" in advice(Capacity("lora", 10, 20.0, 1, 9, 80.0, 19.0))
