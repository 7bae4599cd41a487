"""From numbers to an order of rows: what a score's direction is, equal shares of length, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minisft.common.errors import UserError, visible
from minisft.common.seeds import derive_seed
from minisft.data.messages import Example
from minisft.quality.text import Integers

Floats = NDArray[np.float64]
MAX_CORRELATION = 0.5


def ranks(values: Floats) -> Floats:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation, ties averaged; 0 where one of the two does not vary."""
    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    norm = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm else 0.0


def merit(name: str, values: Floats) -> Floats:
    """Higher is better: as it is, but for ``loss``, where the middle is best (low is trivial or memorised, high is noise)."""
    return -np.abs(values - np.median(values)) if name == "loss" else values


def random_values(rows: Sequence[int], seed: int) -> Floats:
    """One number in [0, 1) for each row, which depends on the seed and the row's number only."""
    return np.array([derive_seed(seed, "select", row) / 2**63 for row in rows])


def best_first(merits: Floats, lengths: Floats, num_bins: int = 1) -> Integers:
    """Positions, the best first, equal merits in order of rows.

    With ``num_bins`` above 1, rows are cut into that many bins of equal size by length, and the order takes the same share of
    each: by rank within the bin, divided by the bin's size.

    Args:
        merits: higher is better.
        lengths: of the rows.
        num_bins: 1 for none.

    Returns:
        (N,) a permutation.
    """
    if num_bins <= 1:
        return np.lexsort((np.arange(len(merits)), -merits))
    by_length = np.lexsort((np.arange(len(lengths)), lengths))
    share = np.empty(len(merits))
    for members in np.array_split(by_length, num_bins):
        order = members[np.lexsort((members, -merits[members]))]
        share[order] = (np.arange(len(order)) + 0.5) / max(1, len(order))
    return np.lexsort((np.arange(len(merits)), -merits, share))


def require_spread(name: str, values: Floats) -> None:
    """A score that is the same for all rows is refused.

    Raises:
        UserError: ``data/flat-score``.
    """
    if len(values) > 1 and values.min() == values.max():
        found, fix = f"{len(values)} rows, all {values[0]:g}", "--score random, or another score"
        raise UserError("data/flat-score", "all scores are equal", where=f"--score {visible(name)}", found=found, fix=fix)


def column_values(examples: Sequence[Example], column: str, path: str) -> Floats:
    """A column of numbers.

    Args:
        examples: the rows.
        column: its name.
        path: the file, for messages.

    Returns:
        (N,) float64.

    Raises:
        UserError: ``data/bad-score-column``: a row without it, or with something else in it.
    """
    values = []
    for example in examples:
        value = example.reference.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "no such column" if column not in example.reference else visible(repr(value), 60)
            where, fix = f"{visible(path)}:{example.row}", "score every row, or take the others out"
            what = f"the score column {visible(column, 60)!r} is not a number"
            raise UserError("data/bad-score-column", what, where=where, found=found, expected="a number in every row", fix=fix)
        values.append(float(value))
    return np.array(values)


def column_vectors(examples: Sequence[Example], column: str, path: str) -> NDArray[np.float32]:
    """A column of embeddings.

    Args:
        examples: the rows.
        column: its name.
        path: the file, for messages.

    Returns:
        (N, D) float32.

    Raises:
        UserError: ``data/bad-embedding``: no list of numbers, or another width than the first row's.
    """
    rows: list[list[float]] = []
    for example in examples:
        value = example.reference.get(column)
        numbers = (
            [float(x) for x in value if isinstance(x, int | float) and not isinstance(x, bool)]
            if isinstance(value, list)
            else []
        )
        width = len(rows[0]) if rows else len(numbers)
        if not isinstance(value, list) or len(numbers) != len(value) or len(numbers) != width or not numbers:
            found = f"{len(value)} entries" if isinstance(value, list) else visible(repr(value), 40)
            expected = f"{width} numbers, as in the first row" if width else "a list of numbers"
            what, fix = f"the column {visible(column, 60)!r} is no embedding", "embed every row with one model"
            raise UserError(
                "data/bad-embedding", what, where=f"{visible(path)}:{example.row}", found=found, expected=expected, fix=fix
            )
        rows.append(numbers)
    return np.array(rows, np.float32)
