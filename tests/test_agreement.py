"""Agreement of raters: Krippendorff's own examples, his definition by brute force, and what bounds it."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.cli.main import main
from minisft.data.messages import Message
from minisft.judging.agreement import rater_agreement
from minisft.judging.arena_store import ArenaStore, Vote
from minisft.judging.votes import Judgement

VERDICTS = ("a", "b", "tie", "both_bad")


def votes(table):
    """Judgements from a list of pairs, each a string with a verdict's number for each rater, "." for none."""
    return [
        Judgement(str(i), "m", "n", VERDICTS[int(code)], "a", f"r{rater}")
        for i, row in enumerate(table)
        for rater, code in enumerate(row)
        if code != "."
    ]


def test_krippendorffs_binary_example():
    """Two observers, ten units, from section A of "Computing Krippendorff's Alpha-Reliability": 0.095."""
    found = rater_agreement(votes(["01", "11", "01", "00", "00", "01", "00", "00", "10", "00"]))
    assert found.alpha.estimate == pytest.approx(0.095, abs=5e-4)
    assert found.share == pytest.approx(0.6)
    assert (found.num_pairs, found.num_raters) == (10, 2)


@given(st.lists(st.text("0123.", min_size=3, max_size=3), min_size=1, max_size=12))
def test_alpha_is_its_definition(table):
    """By brute force over ordered twos of verdicts, those of a pair weighed by 1 / (judges - 1)."""
    found = rater_agreement(votes(table), draws=20)
    units = [[code for code in row if code != "."] for row in table]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        assert found is None
        return
    every = [code for unit in units for code in unit]
    observed = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units) / len(every)
    expected = sum(a != b for a, b in itertools.permutations(every, 2)) / (len(every) * (len(every) - 1))
    assert found.share == pytest.approx(1 - observed)
    if expected == 0:
        assert found.alpha is None
    else:
        assert found.alpha.estimate == pytest.approx(1 - observed / expected)


def test_raters_that_flip_coins_agree_by_chance_and_equal_ones_wholly():
    rng = random.Random(0)
    chance = rater_agreement(votes([f"{rng.randrange(2)}{rng.randrange(2)}" for _ in range(400)]), draws=500)
    assert chance.alpha.low < 0 < chance.alpha.high
    assert chance.alpha.high - chance.alpha.low < 0.25
    same = rater_agreement(votes(["00", "11"] * 10), draws=200)
    assert (same.share, same.alpha.estimate, same.alpha.low) == (1.0, 1.0, 1.0)
    assert rater_agreement(votes(["0.", ".1"])) is None


def test_one_person_in_both_orders_is_one_verdict():
    twice = [Judgement("1", "m", "n", "b", first, "r") for first in ("a", "b")]
    assert rater_agreement(twice) is None
    assert rater_agreement([*twice, Judgement("1", "m", "n", "b", "a", "s")]).share == 1.0


def test_feedback_reports_how_far_raters_agree(tmp_path, capsys):
    store = ArenaStore(tmp_path / "votes.sqlite")
    store.begin({"a": "base", "b": "tuned"})
    for i in range(4):
        store.add_prompt(f"p{i}", ([Message("user", f"q{i}")], [Message("user", f"q{i}")]))
        for side in ("a", "b"):
            store.set_answer(f"p{i}", side, f"{side}{i}")
        for rater in ("x", "y"):
            store.vote(Vote(store.show(f"p{i}", "a", rater).ticket, "left" if i or rater == "x" else "right"))
    store.close()
    assert main(["feedback", "--in", str(tmp_path / "votes.sqlite"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "feedback.json").read_text())["rater_agreement"]
    assert (found["pairs"], found["raters"], found["share_of_equal_verdicts"]) == (4, 2, 0.75)
    assert "2 people judged 4 pairs" in capsys.readouterr().out
