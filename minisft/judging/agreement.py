"""How far people agree who judged the same pairs: a vote that others would not repeat says little about two models.

Agreement by chance depends on how common each verdict is, so Krippendorff's alpha stands beside the share of equal verdicts: 1
is agreement, 0 what chance gives, below 0 contradiction. Any number of people may have judged a pair; pairs that one person has
judged do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisft.common.safe_json import JSON
from minisft.evaluation.statistics import Interval
from minisft.judging.votes import Judgement, resolve_orders

DRAWS = 2_000
_VERDICTS = ("a", "b", "tie", "both_bad")


@dataclass(frozen=True)
class Agreement:
    """Over ``num_pairs`` that two people or more have judged, ``num_raters`` in all: alpha, and the share of equal verdicts.

    ``share`` is the chance that two judges of one pair give the same verdict, each pair weighed by its number of verdicts.
    """

    num_pairs: int
    num_raters: int
    share: float
    alpha: Interval | None

    def to_json(self) -> dict[str, JSON]:
        """Every number by name."""
        return {
            "pairs": self.num_pairs, "raters": self.num_raters, "share_of_equal_verdicts": self.share,
            "krippendorff_alpha": None if self.alpha is None else dict(self.alpha.to_json()),
        }  # fmt: skip


def rater_agreement(judgements: Sequence[Judgement], *, draws: int = DRAWS, seed: int = 0) -> Agreement | None:
    """Agreement on a, b, tie and both bad, as names without an order; the two orders that one person saw are one verdict.

    alpha = 1 - D_o / D_e, D_o the share of unequal verdicts among two of one pair, D_e among any two of all that count.

    Args:
        judgements: of one pair of models.
        draws: resampled sets of pairs.
        seed: decides them.

    Returns:
        the agreement, its interval by resampling pairs; alpha is None when all verdicts are the same; None when nobody judged
        what another had judged.

    Ref: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C.
    """
    judged: dict[str, Counter[str]] = {}
    raters: dict[str, set[str]] = {}
    for vote in resolve_orders(judgements)[0]:
        judged.setdefault(vote.prompt, Counter())[vote.winner] += 1
        raters.setdefault(vote.prompt, set()).add(vote.rater)
    several = [prompt for prompt, votes in judged.items() if votes.total() > 1]
    if not several:
        return None
    counts = np.array([[judged[prompt][verdict] for verdict in _VERDICTS] for prompt in several], float)
    unequal, expected = _disagreement(counts, np.ones((1, len(counts))))
    alpha = None
    if expected[0] > 0:
        picked = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
        weights = np.stack([np.bincount(row, minlength=len(counts)) for row in picked]).astype(float)
        drawn_unequal, drawn_expected = _disagreement(counts, weights)
        drawn = 1 - drawn_unequal / np.where(drawn_expected > 0, drawn_expected, np.inf)  # all the same: agreement, as it were
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        alpha = Interval(1 - float(unequal[0] / expected[0]), low, high)
    return Agreement(len(several), len({name for p in several for name in raters[p]}), 1 - float(unequal[0]), alpha)


def _disagreement(
    counts_PC: npt.NDArray[np.float64], weights_DP: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(observed, expected) disagreement of each weighting of the pairs: (D,) each."""
    sizes_P = counts_PC.sum(1)
    within_P = (sizes_P**2 - (counts_PC**2).sum(1)) / (sizes_P - 1)  # unequal ordered twos, each verdict counted once
    total_D, verdicts_DC = weights_DP @ sizes_P, weights_DP @ counts_PC
    across_D = (total_D**2 - (verdicts_DC**2).sum(1)) / (total_D * (total_D - 1))
    return weights_DP @ within_P / total_D, across_D
