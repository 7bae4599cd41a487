"""``benchmarks/peft_full_advice.py``: no figure without its cells, and figures that follow from them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import exp_peft_full  # noqa: E402
import peft_full_figures  # noqa: E402
from peft_full_advice import LINES, MEANING, NOT_RUN, advice, missing, section, written  # noqa: E402
from peft_full_figures import Results, claims  # noqa: E402


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
    """Full is 0.5 below rank 16 in every row of every seed; one line has its two rates, one 300 of 500 bits."""
    monkeypatch.setattr(peft_full_figures, "bootstrap", lambda table, statistic: (statistic(table),) * 3)  # 4 000 draws less
    found = results(
        tmp_path,
        *(run("P2", arm, seed, [2.0 + up, 3.0 + up]) for arm, up in (("full", 0.0), ("r16", 0.5)) for seed in range(3)),
        *({"experiment": "P3", "kind": "tune", "arm": arm, "seed": 0, "lr": lr, "bracket": [lr / 3, lr * 3], "curve": [],
           "steps": 10} for arm, lr in (("r16", 3e-3), ("full", 1e-4))),
        *({"experiment": "P1", "kind": "facts", "arm": arm, "seed": 0, "trained": trained, "entropy": 500.0, "bits": bits,
           "facts": 32, "inside": True}
          for arm, trained, bits in (("r1, x; 32", 200, 300.0), ("r1, y; 32", 900, 400.0), ("r1, z; 32", 1100, 500.0),
                                     ("full; 32", 9000, 500.0))),
    )  # fmt: skip
    by_line = dict(zip([what for what, _, _ in LINES], advice(found).splitlines()[2:], strict=True))
    far = next(line for what, line in by_line.items() if what.startswith("far data"))
    assert "-0.500 (-0.500 to -0.500) " in far
    assert any("bank messages: 0.003 for r 16, 0.0001 for full; one seed" in line for line in by_line.values())
    assert any(
        "under 0.5 bits a parameter +0% (+0% to +0%), 1 run; over 1 bit a parameter -40% (-40% to -40%), 1 run" in line
        for line in by_line.values()
    )
    assert sum(NOT_RUN in line for line in by_line.values()) == len(LINES) - 4
    text = section(found, tmp_path)
    assert "full learns more than LoRA r 16: cipher text, far | held |" in text
    assert "Without figures so far: " in text


def test_readme_says_what_its_figures_mean() -> None:
    assert MEANING in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("end", "gap"), [([1.1, 1.3], "+0.000"), ([1.0, 1.2], "-0.100")])
def test_forgetting_is_compared_at_equal_learning(tmp_path: Path, end: list[float], gap: str) -> None:
    """Replay that only learns less lies on the same curve: it has saved nothing, though it ends with less forgotten."""

    def points(*curve: tuple[float, list[float]]) -> list[dict[str, object]]:
        return [{"scale": i / 2, "test": {"loss": loss, "rows": [loss]}, "web": web} for i, (loss, web) in enumerate(curve)]

    base = (6.0, [1.0, 1.0])
    arms = {
        "r16": points(base, (5.0, [1.1, 1.3]), (4.0, [1.5, 1.7])),
        "r16, replay": points(base, (5.5, [1.05, 1.15]), (5.0, end)),
    }
    common = {"experiment": "P5", "kind": "forgetting", "of": "P2", "seed": 0}
    found = results(tmp_path, *({**common, "arm": arm, "points": curve} for arm, curve in arms.items()))
    (line,) = (line for line in advice(found).splitlines() if "replay" in line)
    assert f"r 16 with replay less without {gap} (" in line


def verdicts(found: Results) -> dict[str, tuple[str, str]]:
    """Claim -> verdict and figures."""
    return {claim: (word, figures) for claim, word, figures in claims(found)}


@pytest.mark.slow
def test_a_share_of_a_gain_needs_a_gain(tmp_path: Path) -> None:
    """Rank 16 loses 2 nats against the base and full loses 1: their ratio is 2, and says nothing."""
    arms = (("full", 10.0), ("r16", 11.0))
    found = results(tmp_path, *(run("P2", arm, seed, [loss, loss]) for arm, loss in arms for seed in range(3)))
    word, figures = verdicts(found)["LoRA r 16 reaches 95 % of full: P2"]
    assert word == "not shown here"
    assert "does not surely beat the base" in figures
    arms = (("full", 8.0), ("r16", 8.01))
    found = results(tmp_path, *(run("P2", arm, seed, [loss, loss]) for arm, loss in arms for seed in range(3)))
    word, figures = verdicts(found)["LoRA r 16 reaches 95 % of full: P2"]
    assert (word, figures[:5]) == ("held", "99.0%")


@pytest.mark.parametrize(
    ("full", "word"),
    [((40, 50, 60), "held"), ((4, 5, 6), "did not hold"), ((40, 5, 60), "not shown here"), ((40, 50), "not shown here")],
)
def test_what_has_no_interval_is_judged_by_every_seed_of_three(tmp_path: Path, full: tuple[int, ...], word: str) -> None:
    """Spectra: rank 2 of LoRA's updates against full's, and 9 new directions against one more or fewer than that."""
    common = {"experiment": "P6", "kind": "spectrum", "of": "P2"}
    found = results(
        tmp_path,
        *({**common, "arm": "r16", "seed": seed, "ranks": [2, 2], "intruders": [4, 5]} for seed in range(3)),
        *({**common, "arm": "full", "seed": seed, "ranks": [ranks], "intruders": [8 if ranks > 9 else 10]}
          for seed, ranks in enumerate(full)),
    )  # fmt: skip
    said = verdicts(found)
    assert said["full's update has 10 to 100 times LoRA's rank: P2"][0] == word
    assert said["LoRA r 16 brings in more new large directions than full: P2"][0] == word


@pytest.mark.parametrize(
    ("bits", "inside", "word"),
    [((200, 200, 250), True, "held"), ((50, 60, 70), True, "did not hold"), ((200, 60, 200), True, "not shown here"),
     ((200, 200, 250), False, "not shown here"), ((200, 200), True, "not shown here")],
)  # fmt: skip
def test_a_capacity_needs_three_seeds_and_rates_with_an_optimum(
    tmp_path: Path, bits: tuple[int, ...], inside: bool, word: str
) -> None:
    """200 parameters hold 0.5 to 2 bits each if 100 to 400 bits are recalled."""
    common = {"experiment": "P1", "kind": "facts", "arm": "r1, x; 32", "trained": 200, "entropy": 531.5, "facts": 32}
    rows = ({**common, "seed": seed, "bits": each, "inside": inside} for seed, each in enumerate(bits))
    said = verdicts(results(tmp_path, *rows))
    assert said["an adapter holds 0.5 to 2 bits a parameter: random facts, own small model"][0] == word


def test_one_seed_of_rates_is_no_verdict(tmp_path: Path) -> None:
    common = {"experiment": "P2", "kind": "tune", "seed": 0, "curve": [], "steps": 10}
    rates = (("r1", 1e-3), ("r16", 1e-3), ("full", 1e-4))
    said = verdicts(results(tmp_path, *({**common, "arm": arm, "lr": lr, "bracket": [lr / 3, lr * 3]} for arm, lr in rates)))
    word, figures = said["LoRA's best rate is about ten times that of full: P2"]
    assert word == "not shown here"
    assert figures.startswith("10 (the grids leave 1.1 to 90 open)")
    assert said["LoRA's best rate hardly depends on the rank: P2"][0] == "not shown here"


@pytest.mark.parametrize(
    ("best", "extra", "asked", "inside"),
    [(3e-3, 5, [1e-3, 3e-3, 1e-2], True), (1e-1, 5, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], True),
     (1e-4, 5, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], True), (1e-1, 1, [1e-3, 3e-3, 1e-2, 3e-2], False)],
)  # fmt: skip
def test_the_rates_of_the_facts_go_on_until_the_best_one_lies_inside(
    best: float, extra: int, asked: list[float], inside: bool
) -> None:
    """Bits fall with the number of rates of 1, 3, 10, ... between a rate and the best one."""

    def ask(lr: float) -> dict[str, float]:
        return {"lr": lr, "bits": 100 - abs(math.log10(lr / best))}

    found = exp_peft_full.most_bits((1e-3, 3e-3, 1e-2), ask, extra, entropy=1000.0)
    assert [each["lr"] for each in found] == asked
    assert exp_peft_full.inside(found, 1000.0) is inside
    assert len(exp_peft_full.most_bits((1e-3, 3e-3), ask, 5, entropy=90.0)) == 2  # all is recalled: nothing to look for


def test_the_part_of_the_readme_is_replaced_and_nothing_else() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    changed = written(readme, r"new \1 text")
    assert r"new \1 text" in changed
    assert written(changed, "x") == written(readme, "x")
    with pytest.raises(ValueError, match="marks"):
        written("no marks", "x")
