"""Votes between two models or more: both orders, win rates, Bradley-Terry skills."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.judging.ab_statistics import always_valid_interval
from minisft.judging.votes import VOTE_TAU, Judgement, bootstrap_skills, bradley_terry, resolve_orders, win_rate


def vote(prompt, winner, first="a", a="m", b="n", rater="r"):
    return Judgement(str(prompt), a, b, winner, first, rater)


def test_who_always_takes_the_first_answer_prefers_nobody():
    votes = [vote(i, first, first) for i in range(40) for first in ("a", "b")]
    rate = win_rate(votes)
    assert rate.interval.estimate == 0.5
    assert rate.flip_rate == 1.0
    assert rate.decided == 0
    assert rate.num_both_orders == rate.n == 40


def test_votes_in_both_orders_are_one_judgement():
    votes = [vote(1, "b", "a"), vote(1, "b", "b"), vote(2, "tie", "a"), vote(2, "a", "b"), vote(3, "a", "a"), vote(3, "b", "b")]
    resolved, both, flipped = resolve_orders(votes)
    assert [(v.prompt, v.winner) for v in resolved] == [("1", "b"), ("2", "a"), ("3", "tie")]
    assert (both, flipped) == (3, 1)
    assert resolve_orders([vote(1, "both_bad", "a"), vote(1, "both_bad", "b")])[0][0].winner == "both_bad"


@given(st.lists(st.sampled_from(["a", "b", "tie", "both_bad"]), min_size=1, max_size=60))
def test_exchanging_the_models_mirrors_the_win_rate(winners):
    mirror = {"a": "b", "b": "a"}
    one = win_rate([vote(i, w) for i, w in enumerate(winners)])
    other = win_rate([vote(i, mirror.get(w, w), "b") for i, w in enumerate(winners)])
    for name in ("interval", "always_valid", "by_prompt"):
        x, y = getattr(one, name), getattr(other, name)
        # The bootstrap's ends are means of n votes, so a draw at the border moves them by half a vote.
        step = 0.5 / len(winners) if name == "by_prompt" else 0.0
        assert (x.estimate, x.low, x.high) == pytest.approx((1 - y.estimate, 1 - y.high, 1 - y.low), abs=0.02 + step)
    assert one.sign_p == other.sign_p


def test_ties_are_half_a_win_and_carry_no_certainty():
    few = win_rate([vote(i, "b") for i in range(6)] + [vote(i + 6, "tie") for i in range(94)])
    assert few.interval.estimate == pytest.approx(0.53)
    assert few.decided == 6
    assert few.interval.low < 0.25
    assert few.sign_p is None


@pytest.mark.slow
def test_the_interval_that_is_valid_at_any_time_covers_at_every_vote():
    scores = np.random.default_rng(0).choice([0.0, 1.0, 0.5], (400, 200), p=[0.3, 0.5, 0.2])
    means = scores.cumsum(1) / np.arange(1, 201)
    intervals = [[always_valid_interval(m, 0.25 / n, VOTE_TAU) for n, m in enumerate(row.tolist(), 1)] for row in means]
    missed = [any(not i.low <= 0.6 <= i.high for i in row) for row in intervals]
    assert np.mean(missed) <= 0.05
    votes = [vote(i, {0.0: "a", 1.0: "b"}.get(s, "tie")) for i, s in enumerate(scores[0])]
    ours, last = win_rate(votes).always_valid, intervals[0][-1]
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((last.estimate, last.low, last.high))


# --- Bradley-Terry


def games(skills, count, seed=0):
    rng, names, made = np.random.default_rng(seed), sorted(skills), []
    for i in range(count):
        x, y = rng.choice(len(names), 2, replace=False)
        p = 1 / (1 + math.exp(skills[names[y]] - skills[names[x]]))
        made.append(vote(i, "a" if rng.random() < p else "b", a=names[x], b=names[y]))
    return made


def test_two_models_have_the_logit_of_the_win_rate():
    votes = [vote(i, "b" if i < 30 else "a") for i in range(40)]
    skills = bradley_terry(votes)
    assert skills["n"] - skills["m"] == pytest.approx(math.log(3))
    assert sum(skills.values()) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_planted_skills_are_recovered_and_names_do_not_matter():
    truth = {"w": -1.0, "x": -0.2, "y": 0.4, "z": 0.8}
    votes = games(truth, 8000)
    found = bradley_terry(votes)
    assert [found[n] for n in sorted(truth)] == pytest.approx([truth[n] for n in sorted(truth)], abs=0.1)
    names = {"w": "q", "x": "b", "y": "zz", "z": "a"}
    renamed = bradley_terry([vote(v.prompt, v.winner, a=names[v.a], b=names[v.b]) for v in votes])
    assert [renamed[names[n]] for n in sorted(truth)] == pytest.approx([found[n] for n in sorted(truth)])


def test_skills_solve_the_likelihood_equation():
    """The observed wins of each model are the expected ones."""
    votes = games({"w": -1.0, "x": 0.0, "y": 1.0}, 300)
    skills = bradley_terry(votes)
    for name in skills:
        expected = sum(
            1 / (1 + math.exp(skills[v.b] - skills[v.a])) if v.a == name else 1 / (1 + math.exp(skills[v.a] - skills[v.b]))
            for v in votes
            if name in (v.a, v.b)
        )
        won = sum((v.a if v.winner == "a" else v.b) == name for v in votes)
        assert expected == pytest.approx(won, abs=1e-6)


@pytest.mark.parametrize(
    "votes",
    [
        [vote(1, "a", a="m", b="n"), vote(2, "b", a="m", b="n"), vote(3, "a", a="o", b="p"), vote(4, "b", a="o", b="p")],
        [vote(i, "a", a="m", b="n") for i in range(5)],
    ],
)
def test_skills_that_are_infinite_are_an_error_or_take_a_ridge(votes):
    with pytest.raises(UserError, match="data/disconnected-votes"):
        bradley_terry(votes)
    assert all(map(math.isfinite, bradley_terry(votes, ridge=0.1).values()))


def test_skills_have_intervals_over_prompts():
    found = bootstrap_skills(games({"x": 0.0, "y": 1.0}, 200), draws=60)
    assert found["y"].low > 0 > found["x"].high
    assert found["y"].low < found["y"].estimate < found["y"].high


def test_no_votes():
    with pytest.raises(UserError, match="data/no-votes"):
        win_rate([])
