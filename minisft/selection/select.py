"""Pick rows: clean, score, drop copies, keep what is diverse, stop at the budget; every row that goes has a reason.

The order is fixed. What always hurts goes first and needs no score: empty answers, rows that give away a test, defects. Then
rows are scored, and of copies the best scored stays (the first of equals). Then diversity and the budget. Conflicting answers
are reported and never dropped. The same settings give the same rows, whatever the batch size.

Selection is no magic: random rows of the same budget are the baseline, and the report sets the picked rows beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.quality.contamination import find_leaks
from minisft.quality.defects import find_defects
from minisft.quality.pool import Pool
from minisft.quality.report import find_copies, near_clusters
from minisft.quality.text import Integers
from minisft.selection.diversity import Vectors, facility, greedy, k_center, nearest, prepare, threshold_for
from minisft.selection.ranking import (
    Floats,
    best_first,
    column_values,
    column_vectors,
    merit,
    random_values,
    require_spread,
    spearman,
)
from minisft.selection.scores import RowScore
from minisft.selection.settings import Settings

Log = Callable[[str], None]
DEFAULT_KEEP_RATE = 0.5
WORD_DIMENSIONS = 256
_ROWS_AT_ONCE = 8_192
CANDIDATES_PER_PICK = 3  # k-center and facility choose among so many of the best scored rows


@dataclass(frozen=True)
class Drop:
    """A row (index) that was not picked: why, and the row that stays in its stead or the test row it gives away."""

    row: int
    reason: str
    partner: str = ""


@dataclass(frozen=True)
class Sizes:
    """How long each row of the pool is: ``tokens`` for the budget, ``targets`` for the score ``length``, in ``unit``."""

    tokens: Integers
    targets: Integers
    unit: str


def _no_rows() -> Integers:
    return np.empty(0, np.int64)


@dataclass
class Selection:
    """What was picked and why.

    Attributes:
        pool: all rows.
        settings: what was asked for.
        sizes: of every row.
        picked: indices in file order.
        order: the same, in the order in which they were picked.
        drops: all other rows.
        funnel: rows left after each step.
        scored: indices that were scored, with ``values`` beside them.
        values: the score as it is named (not its merit).
        vectors: for diversity, the map and the comparison, one for each of ``scored``.
        correlation: Spearman of the score with the length.
        threshold: the cosine that ``greedy`` used.
        compared: the picked rows beside others, see ``report.comparison``, once it has been computed.
    """

    pool: Pool
    settings: Settings
    sizes: Sizes
    picked: Integers = field(default_factory=_no_rows)
    order: Integers = field(default_factory=_no_rows)
    drops: dict[int, Drop] = field(default_factory=dict)
    funnel: dict[str, int] = field(default_factory=dict)
    scored: Integers = field(default_factory=_no_rows)
    values: Floats = field(default_factory=lambda: np.empty(0))
    vectors: Vectors | None = None
    correlation: float = 0.0
    threshold: float | None = None
    compared: list[dict[str, JSON]] | None = None

    def alive(self) -> Integers:
        """Indices of the rows that are still there."""
        return np.array([i for i in range(len(self.pool.examples)) if i not in self.drops], np.int64)

    def drop(self, found: Sequence[Drop], step: str) -> None:
        """Drop rows and note how many are left.

        Raises:
            UserError: ``data/nothing-left``.
        """
        for each in found:
            self.drops.setdefault(each.row, each)
        left = len(self.pool.examples) - len(self.drops)
        self.funnel[step] = left
        if not left:
            found_text, fix = f"all dropped by: {step}", "look at the report: minisft inspect --quality"
            raise UserError("data/nothing-left", "no row is left", where=visible(self.pool.path), found=found_text, fix=fix)


def clean(pool: Pool, settings: Settings, sizes: Sizes, tests: Sequence[Pool], log: Log) -> Selection:
    """Drop what needs no score: empty answers, leaked test rows, defects.

    Args:
        pool: all rows.
        settings: which of these to do.
        sizes: of every row.
        tests: test files to look for.
        log: told each step.

    Returns:
        a selection with the drops so far.

    Raises:
        UserError: ``data/nothing-left``, ``data/same-file``, ``data/all-contaminated``.
    """
    chosen = Selection(pool, settings, sizes)
    chosen.funnel["pool"] = len(pool.examples)
    empty = [
        Drop(i, "empty answer")
        for i, example in enumerate(pool.examples)
        if not any(m.role == "assistant" and m.train and m.content.strip() for m in example.messages)
    ]
    chosen.drop(empty, "with an answer")
    for test in tests:
        log(f"test rows of {visible(test.path)}")
        chosen.drop(_leaked(pool, test), f"not in {test.path}")
    if settings.drop_defects:
        log("defects")
        chosen.drop([Drop(d.row, f"defect: {d.kind} ({d.evidence})") for d in find_defects(pool.examples)], "without a defect")
    return chosen


def _leaked(pool: Pool, test: Pool) -> list[Drop]:
    leaks = find_leaks(pool, test)
    if len(leaks) == len(pool.examples):
        what, fix = "every row is in the test file", "check --against: is it the pool in another form?"
        raise UserError("data/all-contaminated", what, where=visible(test.path), found=f"all {len(leaks)} rows", fix=fix)
    return [Drop(leak.row, f"test row: {leak.label}", f"{test.path}:{test.row(leak.test_row)}") for leak in leaks]


def pick(chosen: Selection, scores: dict[int, RowScore], log: Log) -> Selection:
    """Score, drop copies, keep what is diverse, stop at the budget; completes ``chosen``.

    Args:
        chosen: from ``clean``.
        scores: of a model, by index; for all rows that are left when the score is a model's.
        log: told each step.

    Returns:
        ``chosen``.

    Raises:
        UserError: scores or embeddings that are none, a pool smaller than the budget.
    """
    settings = chosen.settings
    if settings.needs_model:
        _drop_unscored(chosen, scores)
    chosen.scored = chosen.alive()
    chosen.values = _values(chosen, scores)
    require_spread(settings.score, chosen.values)
    lengths = chosen.sizes.targets[chosen.scored].astype(float)
    chosen.correlation = spearman(chosen.values, lengths)
    merits = merit(settings.score, chosen.values)
    if settings.dedup is not None:
        log("copies")
        _drop_copies(chosen, merits)
    positions = np.flatnonzero([row not in chosen.drops for row in chosen.scored.tolist()])
    chosen.vectors = _vectors(chosen, scores)
    order = positions[best_first(merits[positions], lengths[positions], settings.bins)]
    _fill(chosen, order, log)
    return chosen


def _drop_unscored(chosen: Selection, scores: dict[int, RowScore]) -> None:
    drops = [Drop(int(i), f"no score: {scores[int(i)].reason}") for i in chosen.alive() if scores[int(i)].reason]
    chosen.drop(drops, "with a score")
    if chosen.settings.score == "ifd":
        mismatched = [
            Drop(int(i), f"ifd {ifd:.3f} is above 1: the prompt does not help")
            for i in chosen.alive()
            if (ifd := _ifd(scores[int(i)], chosen.settings.ifd)) > 1
        ]
        chosen.drop(mismatched, "ifd at most 1")


def _ifd(score: RowScore, form: str) -> float:
    value = score.ifd if form == "ratio" else score.ppl_ifd
    return float("inf") if value is None else value


def _values(chosen: Selection, scores: dict[int, RowScore]) -> Floats:
    settings, rows = chosen.settings, chosen.scored
    examples = [chosen.pool.examples[i] for i in rows]
    if settings.score == "random":
        return random_values([example.row for example in examples], settings.seed)
    if settings.score == "length":
        return chosen.sizes.targets[rows].astype(float)
    if settings.score.startswith("column:"):
        return column_values(examples, settings.score.removeprefix("column:"), chosen.pool.path)
    if settings.score == "ifd":
        return np.array([_ifd(scores[int(i)], settings.ifd) for i in rows])
    return np.array([getattr(scores[int(i)], settings.score) for i in rows], float)


def _drop_copies(chosen: Selection, merits: Floats) -> None:
    pool, by_row = chosen.pool, dict(zip(chosen.scored.tolist(), merits.tolist(), strict=True))

    def keep_best(words: str, group: Sequence[int]) -> list[Drop]:
        rows = [row for row in group if row in by_row and row not in chosen.drops]
        best = min(rows, key=lambda row: (-by_row[row], row), default=-1)
        return [Drop(row, f"{words} row {pool.row(best)}", str(pool.row(best))) for row in rows if row != best]

    chosen.drop([drop for group in find_copies(pool) for drop in keep_best("copy of", group)], "without copies")
    if chosen.settings.dedup == "near":
        clusters = near_clusters(pool, chosen.settings.near, chosen.alive())
        near = [drop for c in clusters for drop in keep_best(f"near copy (least {c.least:.3f}) of", c.rows)]
        chosen.drop(near, "without near copies")
    if len(chosen.scored) > 1 and len(chosen.alive()) == 1:
        what, fix = "all rows are copies of one", "give more rows, or leave --dedup away"
        raise UserError("data/only-copies", what, where=visible(pool.path), found=f"{len(chosen.scored)} rows", fix=fix)


def _vectors(chosen: Selection, scores: dict[int, RowScore]) -> Vectors | None:
    """A direction for each scored row: its embedding column, the model's states, or hashed words."""
    pool, rows = chosen.pool, chosen.scored
    numbers = [pool.row(int(i)) for i in rows]
    if len(rows) < 3:
        return None
    if chosen.settings.embedding is not None:
        raw = column_vectors([pool.examples[i] for i in rows], chosen.settings.embedding, pool.path)
        return prepare(raw, numbers)
    states = [scores[int(i)].state if int(i) in scores else None for i in rows]
    if all(state is not None for state in states):
        return prepare(np.stack([state for state in states if state is not None]).astype(np.float32), numbers)
    return word_vectors(pool, rows)


def word_vectors(pool: Pool, rows: Integers) -> Vectors:
    """Words hashed to 256 signed dimensions, rare words heavier (log of the inverse row frequency), unit length.

    A row whose words cancel out keeps a zero vector, which is near to nothing.
    """
    table = np.empty((len(rows), WORD_DIMENSIONS), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        words = pool.words.select(rows[start : start + _ROWS_AT_ONCE])
        at = np.repeat(np.arange(len(words)), words.lengths) * WORD_DIMENSIONS
        at += (words.values >> np.uint64(48)).astype(np.int64) % WORD_DIMENSIONS
        sign = np.where(words.values & np.uint64(1 << 20), 1.0, -1.0)
        table[start : start + len(words)] = np.bincount(at, sign, len(words) * WORD_DIMENSIONS).reshape(len(words), -1)
    table *= np.log(len(rows) / np.maximum(1, np.count_nonzero(table, axis=0)) + 1).astype(np.float32)
    table -= table.mean(axis=0)
    for start in range(0, len(rows), _ROWS_AT_ONCE):  # a part at a time: the norm squares all that it is given
        part = table[start : start + _ROWS_AT_ONCE]
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        np.divide(part, norms, out=part, where=norms > 0)
    return table


def _fill(chosen: Selection, order: Integers, log: Log) -> None:
    """Take positions of ``order`` (the best first) until the budget is full."""
    settings = chosen.settings
    _require_enough(chosen, order)
    if settings.diverse != "none":
        log(f"diversity: {settings.diverse}")
        order = _spread(chosen, order)
    tokens = np.cumsum(chosen.sizes.tokens[chosen.scored[order]])
    count = min(settings.rows or len(order), len(order))
    if settings.tokens is not None:
        count = max(1, int(np.searchsorted(tokens, settings.tokens, side="right")))
    chosen.order = chosen.scored[order[:count]]
    chosen.picked = np.sort(chosen.order)
    kept = set(chosen.picked.tolist())
    chosen.drop([Drop(int(i), "beyond the budget") for i in chosen.alive() if int(i) not in kept], "picked")


def _spread(chosen: Selection, order: Integers) -> Integers:
    settings, vectors = chosen.settings, chosen.vectors
    if vectors is None:
        return order
    if settings.diverse == "greedy":
        return _far_apart(chosen, vectors, order)
    mean = max(1.0, float(chosen.sizes.tokens[chosen.scored[order]].mean()))
    count = settings.rows or min(len(order), 2 * int(np.ceil((settings.tokens or 0) / mean)))
    if settings.score != "random":  # otherwise distance alone would decide, and outliers are often bad rows
        order = order[: CANDIDATES_PER_PICK * count]
    return (k_center if settings.diverse == "kcenter" else facility)(vectors, order, count)


def _far_apart(chosen: Selection, vectors: Vectors, order: Integers) -> Integers:
    chosen.threshold = threshold_for(vectors, order, chosen.settings.keep_rate or DEFAULT_KEEP_RATE)
    kept = greedy(vectors, order, chosen.threshold)
    near = np.setdiff1d(order, kept)
    if len(near):
        partners = chosen.scored[kept[nearest(vectors[near], vectors[kept])]]
        numbers = [str(chosen.pool.row(int(j))) for j in partners]
        above = f"(cosine above {chosen.threshold:.4f})"
        drops = [Drop(int(i), f"too near to row {n} {above}", n) for i, n in zip(chosen.scored[near], numbers, strict=True)]
        chosen.drop(drops, "far enough apart")
    _require_enough(chosen, kept)
    return kept


def _require_enough(chosen: Selection, order: Integers) -> None:
    settings = chosen.settings
    there = {"rows": len(order), "tokens": int(chosen.sizes.tokens[chosen.scored[order]].sum())}
    for flag, wanted in (("rows", settings.rows), ("tokens", settings.tokens)):
        if wanted is not None and wanted > there[flag]:
            lost = Counter(drop.reason.partition(":")[0].partition(" row ")[0] for drop in chosen.drops.values())
            gone = ", ".join(f"{number} {visible(reason, 40)}" for reason, number in lost.most_common(4)) or "none dropped"
            unit = chosen.sizes.unit if flag == "tokens" else flag
            found = f"{there[flag]} {unit} left of {len(chosen.pool.examples)} rows ({gone})"
            what, fix = "the pool is smaller than the budget", f"--{flag} {there[flag]} or less, or more data"
            raise UserError("data/pool-too-small", what, where=f"--{flag} {wanted}", found=found, fix=fix)
