"""Parts of the rows (long prompts, one label, one value of a column) with their own scores, those that lost most first.

Slices are many, so their p-values are adjusted by Holm, and what they show is a hypothesis for new rows, not a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minisft.data.messages import Example
from minisft.evaluation.paired import compare_paired
from minisft.evaluation.statistics import Interval, holm, wilson_interval
from minisft.judging.bad_cases import prompt_of
from minisft.judging.rows_file import RowId, RowsFile, ScoredRow

MIN_ROWS, MAX_VALUES, DRAWS = 5, 60, 2_000


@dataclass(frozen=True)
class Slice:
    """The rows with one value: both means, B - A with its interval, the adjusted p-value (None under 20 rows)."""

    name: str
    n: int
    mean_a: float
    mean_b: float
    difference: Interval
    error_rate: Interval | None
    p_holm: float | None


def find_slices(a: RowsFile, b: RowsFile, examples: Mapping[RowId, Example] | None) -> list[Slice]:
    """Every slice of at least five rows, the one that lost most first.

    Args:
        a: base, comparable with ``b``.
        b: tuned.
        examples: prompts and columns by row; without them there are slices by reference only.

    Returns:
        slices by length of prompt or reference, by reference, and by each column of few values.
    """
    rows = list(b.rows.values())
    made = []
    for name, value in _keys(rows, examples).items():
        groups: dict[str, list[ScoredRow]] = {}
        for row in rows:
            groups.setdefault(value(row), []).append(row)
        if 2 <= len(groups) <= MAX_VALUES:
            made += [_slice(f"{name} = {key}", group, a, b) for key, group in groups.items() if len(group) >= MIN_ROWS]
    tested = [i for i, each in enumerate(made) if each[1] is not None]
    adjusted = dict(zip(tested, holm([p for _, p in made if p is not None]), strict=True))
    slices = [
        Slice(s.name, s.n, s.mean_a, s.mean_b, s.difference, s.error_rate, adjusted.get(i)) for i, (s, _) in enumerate(made)
    ]
    return sorted(slices, key=lambda s: (s.difference.estimate, s.name))


def _slice(name: str, rows: Sequence[ScoredRow], a: RowsFile, b: RowsFile) -> tuple[Slice, float | None]:
    before, after = [b.sign * a.rows[row.row].score for row in rows], [b.sign * row.score for row in rows]
    result = compare_paired(before, after, draws=DRAWS)
    errors = None if result.table is None else wilson_interval(len(rows) - sum(after), len(rows))
    return Slice(name, len(rows), result.mean_a, result.mean_b, result.difference, errors, None), result.p_value


def _keys(rows: Sequence[ScoredRow], examples: Mapping[RowId, Example] | None) -> dict[str, Callable[[ScoredRow], str]]:
    """What to slice by: a name, and each row's value."""
    keys: dict[str, Callable[[ScoredRow], str]] = {"reference": lambda row: row.reference.strip()[:60]}
    if examples is None:
        return keys | {"reference length": _third([len(row.reference) for row in rows], lambda row: len(row.reference))}
    columns = {name for row in rows for name in examples[row.row].reference}
    for name in sorted(columns):
        keys[name] = _column(name, examples)

    def length(row: ScoredRow) -> int:
        return len(prompt_of(examples[row.row]))

    return {"prompt length": _third([length(row) for row in rows], length), **keys}


def _column(name: str, examples: Mapping[RowId, Example]) -> Callable[[ScoredRow], str]:
    return lambda row: str(examples[row.row].reference.get(name))[:60]


def _third(lengths: Sequence[int], length: Callable[[ScoredRow], int]) -> Callable[[ScoredRow], str]:
    """The third of the rows that a row's length lies in."""
    ordered = sorted(lengths)
    low, high = ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]

    def name(row: ScoredRow) -> str:
        size = length(row)
        return f"under {low}" if size < low else f"{low} to {high}" if size <= high else f"over {high}"

    return name
