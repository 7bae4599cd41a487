"""``benchmarks/peft_full_advice.py``: no figure without its cells, and figures that follow from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peft_full_figures  # noqa: E402
from peft_full_advice import LINES, NOT_RUN, advice, missing, section, written  # noqa: E402
from peft_full_figures import Results  # noqa: E402


def results(folder: Path, *rows: dict[str, object]) -> Results:
    """A results file with these cells, each with a key of its own."""
    common = {"of": "", "model": "own", "seconds": 1.0}
    lines = [json.dumps({**common, "key": f"k{i}", **row}) for i, row in enumerate(rows)]
    (folder / "peft_full.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Results(folder / "peft_full.jsonl")


def run(experiment: str, arm: str, seed: int, losses: list[float]) -> dict[str, object]:
    mean = sum(losses) / len(losses)
    test = {"loss": mean, "rows": losses}
    return {
        "experiment": experiment, "kind": "run", "arm": arm, "seed": seed, "lr": 1e-3, "test": test,
        "base": {"loss": 9.0, "rows": [9.0] * len(losses)},
    }  # fmt: skip


def test_what_was_not_run_has_no_figure(tmp_path: Path) -> None:
    empty = results(tmp_path)
    table = advice(empty).splitlines()
    assert len(LINES) <= 8
    assert len(table) == 2 + len(LINES)
    assert [NOT_RUN in line for line in table[2:]] == [what in missing(empty) for what, _, _ in LINES]
    assert missing(empty) == [what for what, cells, _ in LINES if cells != "page 04"]
    assert section(empty, tmp_path).startswith("Not run yet")


def test_figures_are_those_of_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full is 0.5 below rank 16 in every row of every seed; one line has its two rates, one 300 bits in 200 parameters."""
    monkeypatch.setattr(peft_full_figures, "bootstrap", lambda table, statistic: (statistic(table),) * 3)  # 4 000 draws less
    found = results(
        tmp_path,
        *(run("P2", arm, seed, [2.0 + up, 3.0 + up]) for arm, up in (("full", 0.0), ("r16", 0.5)) for seed in range(3)),
        *({"experiment": "P3", "kind": "tune", "arm": arm, "seed": 0, "lr": lr, "bracket": [lr / 3, lr * 3], "curve": [],
           "steps": 10} for arm, lr in (("r16", 3e-3), ("full", 1e-4))),
        {"experiment": "P1", "kind": "facts", "arm": "r1, x; 32", "seed": 0, "trained": 200, "entropy": 531.5, "bits": 300.0,
         "facts": 32},
    )  # fmt: skip
    by_line = dict(zip([what for what, _, _ in LINES], advice(found).splitlines()[2:], strict=True))
    far = next(line for what, line in by_line.items() if what.startswith("far data"))
    assert "-0.500 (-0.500 to -0.500) nats a token, 3 seed(s)" in far
    assert any("P3: 0.003 against 0.0001 (one seed)" in line for line in by_line.values())
    assert any("1.50 bits a parameter recalled, 1 run(s)" in line for line in by_line.values())
    assert sum(NOT_RUN in line for line in by_line.values()) == len(LINES) - 4
    text = section(found, tmp_path)
    assert "full learns more than LoRA r 16: cipher text, far | held |" in text
    assert "Without figures so far: " in text


def test_the_part_of_the_readme_is_replaced_and_nothing_else() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    changed = written(readme, r"new \1 text")
    assert r"new \1 text" in changed
    assert written(changed, "x") == written(readme, "x")
    with pytest.raises(ValueError, match="marks"):
        written("no marks", "x")
