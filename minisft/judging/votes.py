"""Pairwise judgements by people: which of two answers is better, and how sure one may be.

Every pair should be seen in both orders. Who prefers whatever stands first contradicts himself when the order changes: such a
pair counts as a tie, and the flip rate is reported beside the win rate. Elo is not offered: it depends on the order of the
games.

Ref: Zheng et al. 2023, arXiv:2306.05685 (position bias); Bradley and Terry 1952, Biometrika 39.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minisft.common.errors import UserError, listing
from minisft.common.safe_json import JSON
from minisft.evaluation.distributions import fair_coin_cdf
from minisft.evaluation.statistics import MIN_TEST_ROWS, Interval, bootstrap_mean, wilson_interval
from minisft.judging.ab_statistics import always_valid_interval

Winner = Literal["a", "b", "tie", "both_bad"]
VOTE_TAU = 0.1  # of the always-valid interval: win rates of 0.4 to 0.6 are what one expects
_NEWTON_STEPS, _BT_TOLERANCE = 100, 1e-10


@dataclass(frozen=True)
class Judgement:
    """One vote: models ``a`` and ``b``, which of them stood first, and who won."""

    prompt: str
    a: str
    b: str
    winner: Winner
    first: Literal["a", "b"]
    rater: str = ""


@dataclass(frozen=True)
class WinRate:
    """How often B is better, ties as half: on ``n`` pairs, of which ``decided`` have a winner.

    ``interval`` is Wilson's with as many observations as decided pairs, for one look at the end; ``always_valid`` holds while
    votes come in; ``by_prompt`` resamples prompts, for votes of several people on the same ones.
    """

    n: int
    decided: int
    wins_b: int
    interval: Interval
    always_valid: Interval
    by_prompt: Interval
    sign_p: float | None
    flip_rate: float | None
    num_both_orders: int

    def to_json(self) -> dict[str, JSON]:
        """Every number by name."""
        return {
            "pairs": self.n, "decided": self.decided, "wins_b": self.wins_b, "win_rate_b": dict(self.interval.to_json()),
            "always_valid": dict(self.always_valid.to_json()), "by_prompt": dict(self.by_prompt.to_json()),
            "sign_test_p": self.sign_p, "flip_rate": self.flip_rate, "pairs_in_both_orders": self.num_both_orders,
        }  # fmt: skip


def resolve_orders(judgements: Sequence[Judgement]) -> tuple[list[Judgement], int, int]:
    """One judgement for each rater and prompt: (them, pairs seen in both orders, pairs that flipped).

    Votes in both orders that name different winners count as a tie; one of them a tie decides for the other.
    """
    seen: dict[tuple[str, str, str, str], dict[str, Judgement]] = {}
    for vote in judgements:
        seen.setdefault((vote.rater, vote.prompt, vote.a, vote.b), {})[vote.first] = vote
    resolved, both, flipped = [], 0, 0
    for orders in seen.values():
        votes = list(orders.values())
        winners = {vote.winner for vote in votes} & {"a", "b"}
        both += len(votes) == 2
        flipped += len(winners) == 2
        resolved.append(votes[0] if len(votes) == 1 else _settled(votes, winners))
    return resolved, both, flipped


def _settled(votes: Sequence[Judgement], winners: Collection[Winner]) -> Judgement:
    if len(winners) == 1:
        return next(vote for vote in votes if vote.winner in winners)
    vote = votes[0]
    bad = all(v.winner == "both_bad" for v in votes)
    return Judgement(vote.prompt, vote.a, vote.b, "both_bad" if bad else "tie", vote.first, vote.rater)


def win_rate(judgements: Sequence[Judgement]) -> WinRate:
    """How often B beats A, over judgements of one pair of models, in the order in which they came.

    Raises:
        UserError: no judgements.
    """
    if not judgements:
        raise UserError("data/no-votes", "there are no votes", found="0 votes", expected="at least one")
    resolved, both, flipped = resolve_orders(judgements)
    scores = np.array([{"a": 0.0, "b": 1.0}.get(vote.winner, 0.5) for vote in resolved])
    n, decided, wins = len(scores), int((scores != 0.5).sum()), int((scores == 1.0).sum())
    rate, size = float(scores.mean()), max(1, decided)
    return WinRate(
        n,
        decided,
        wins,
        wilson_interval(rate * size, size),
        # A vote lies in [0, 1], so its variance is at most 1/4 whatever the true rate is: the interval needs no estimate of it.
        always_valid_interval(rate, 0.25 / n, VOTE_TAU).clipped(0.0, 1.0),
        bootstrap_mean(scores, [vote.prompt for vote in resolved]),
        min(1.0, 2 * fair_coin_cdf(min(wins, decided - wins), decided)) if decided >= MIN_TEST_ROWS else None,
        flipped / both if both else None,
        both,
    )


def headline(rate: WinRate, name_a: str, name_b: str) -> dict[str, JSON]:
    """The win rate less one half, as ``compare --business`` reads it.

    Args:
        rate: of B.
        name_a, name_b: of the models.

    Returns:
        name, estimate, bounds, and whether there are enough votes.
    """
    i = rate.always_valid
    name = f"votes: win rate of {name_b} over {name_a}, less 1/2 ({rate.n} pairs)"
    numbers: dict[str, JSON] = {key: value - 0.5 for key, value in i.to_json().items()}
    return {"name": name, **numbers, "enough": rate.n >= MIN_TEST_ROWS}


# --- more than two models


def bradley_terry(judgements: Sequence[Judgement], ridge: float = 0.0) -> dict[str, float]:
    """Skills t with P(i beats j) = sigmoid(t_i - t_j), by Newton's method; a tie is half a win for each; sum t = 0.

    Args:
        judgements: of any pairs of models.
        ridge: of a penalty ridge / 2 sum t^2, for models that never lost or were never compared.

    Returns:
        a skill for each model.

    Raises:
        UserError: without a ridge, when the skills are not finite: some models never lost to the others, or never met them.

    Ref: Hunter 2004, Ann. Stat. 32(1) (existence: every model can be reached from every other by wins).
    """
    names = sorted({name for vote in judgements for name in (vote.a, vote.b)})
    index = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for vote in judgements:
        i, j, share = index[vote.a], index[vote.b], {"a": 1.0, "b": 0.0}.get(vote.winner, 0.5)
        wins[i, j] += share
        wins[j, i] += 1 - share
    if ridge == 0:
        _require_connected(wins, names)
    skills = _newton(wins, ridge)
    return dict(zip(names, skills.tolist(), strict=True))


def _newton(wins: np.ndarray, ridge: float) -> np.ndarray:
    skills, games = np.zeros(len(wins)), wins + wins.T
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(skills[None, :] - skills[:, None]))
        gradient = (wins - games * chance).sum(1) - ridge * skills
        weight = games * chance * (1 - chance)
        hessian = np.diag(weight.sum(1) + ridge) - weight
        step = np.linalg.pinv(hessian, hermitian=True) @ gradient
        step *= min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))  # no step of more than 2: far away the curve is flat
        skills += step
        if np.abs(step).max() < _BT_TOLERANCE:
            break
    centred: np.ndarray = skills - skills.mean()
    return centred


def _require_connected(wins: np.ndarray, names: Sequence[str]) -> None:
    """Every model must reach every other along wins."""
    reach = (wins > 0) | np.eye(len(names), dtype=bool)
    for k in range(len(names)):
        reach |= reach[:, [k]] & reach[[k], :]
    if not reach.all():
        i = int((~reach).any(1).argmax())
        apart = [names[j] for j in np.flatnonzero(~reach[i]).tolist()]
        what, found = "the skills are not finite", f"{names[i]} never won against {listing(apart, 4)}, however indirectly"
        fix = "collect votes between them, or allow a ridge"
        raise UserError("data/disconnected-votes", what, found=found, fix=fix)


def bootstrap_skills(
    judgements: Sequence[Judgement], *, draws: int = 200, seed: int = 0, ridge: float = 0.01
) -> Mapping[str, Interval]:
    """Bradley-Terry skills with intervals, resampling prompts.

    Args:
        judgements: of any pairs of models.
        draws: resampled sets of prompts.
        seed: decides them.
        ridge: keeps a resample finite in which some model never lost.

    Returns:
        an interval for each model.
    """
    prompts: dict[str, list[Judgement]] = {}
    for vote in judgements:
        prompts.setdefault(vote.prompt, []).append(vote)
    groups, rng, skills = list(prompts.values()), np.random.default_rng(seed), bradley_terry(judgements, ridge)
    drawn: dict[str, list[float]] = {name: [] for name in skills}
    for _ in range(draws):
        votes = [vote for i in rng.integers(0, len(groups), len(groups)) for vote in groups[i]]
        for name, skill in bradley_terry(votes, ridge).items():
            drawn[name].append(skill)
    bounds = {name: np.quantile(values or [math.nan], [0.025, 0.975]).tolist() for name, values in drawn.items()}
    return {name: Interval(skills[name], *bounds[name]) for name in skills}
