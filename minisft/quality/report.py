"""The report on a pool: copies, near copies, conflicts, defects, lengths and leaked test rows, as values and as JSON.

Nothing is dropped here and no model is asked. The page (``page.py``) and ``select`` both read this report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.messages import Dataset
from minisft.quality.contamination import Leak, find_leaks
from minisft.quality.defects import KINDS, Defect, find_defects
from minisft.quality.near_duplicates import (
    MAX_CHARACTER_WORDS,
    MIN_BIGRAM_WORDS,
    MIN_WORDS,
    Cluster,
    Pairs,
    common_shingles,
    find_pairs,
    join,
    merged,
    shingle_sets,
    verify,
)
from minisft.quality.pool import Pool, answer_text, make_pool, prompt_text
from minisft.quality.text import Hashes, Integers, Runs, character_codes, without, words

MAX_EXCERPT = 240
MAX_LABELS_SHARE = 0.1  # of the rows: with fewer distinct answers than that, answers are labels
MAX_LEAST_ROWS = 64  # of a cluster: larger ones get the least similarity to their first row
Log = Callable[[str], None]


@dataclass(frozen=True)
class Conflict:
    """One prompt with several answers; ``rows`` are indices, ``answers`` how many different ones."""

    rows: tuple[int, ...]
    answers: int


@dataclass(frozen=True)
class QualityReport:
    """What was found in a pool. All rows are indices into ``pool.examples``.

    Attributes:
        pool: the rows.
        near: the similarity from which rows are near copies.
        copies: groups of two or more rows with the same words, in order.
        clusters: groups of near copies, exact copies counted by their first row only.
        conflicts: prompts with different answers.
        has_labels: whether the answers look like labels, so that a conflict is a wrong label.
        defects: by row.
        leaks: test path to the rows that give away its rows.
        tests: the test files, by path.
    """

    pool: Pool
    near: float
    copies: tuple[tuple[int, ...], ...]
    clusters: tuple[Cluster, ...]
    conflicts: tuple[Conflict, ...]
    has_labels: bool
    defects: tuple[Defect, ...]
    leaks: dict[str, list[Leak]]
    tests: dict[str, Pool]


def inspect_quality(pool: Pool, tests: Sequence[Pool], near: float, log: Log) -> QualityReport:
    """Look at everything.

    Args:
        pool: the rows.
        tests: pools of the test files.
        near: least Jaccard similarity of near copies, in (0, 1].
        log: told what is being looked at.

    Returns:
        the report.

    Raises:
        UserError: ``config/bad-value`` for ``near``; ``data/same-file``.
    """
    if not 0 < near <= 1:
        fix = "give a similarity, for instance 0.8"
        raise UserError("config/bad-value", "out of range", where="--near", found=str(near), expected="0 < near <= 1", fix=fix)
    leaks: dict[str, list[Leak]] = {}
    for test in tests:
        log(f"test rows of {visible(test.path)}")
        leaks[test.path] = find_leaks(pool, test)
    log("copies and conflicts")
    copies = find_copies(pool)
    conflicts = find_conflicts(pool)
    log("near copies")
    clusters = near_clusters(pool, near, representatives(pool, copies))
    log("defects")
    return QualityReport(
        pool=pool,
        near=near,
        copies=copies,
        clusters=clusters,
        conflicts=conflicts,
        has_labels=has_labels(pool),
        defects=tuple(find_defects(pool.examples)),
        leaks=leaks,
        tests={test.path: test for test in tests},
    )


def find_copies(pool: Pool) -> tuple[tuple[int, ...], ...]:
    """Groups of rows with the same words in the same turns."""
    return tuple(group for group in _groups(pool.row_keys) if len(group) > 1)


def _groups(keys: Sequence[bytes]) -> list[tuple[int, ...]]:
    members: dict[bytes, list[int]] = {}
    for i, each in enumerate(keys):
        members.setdefault(each, []).append(i)
    return [tuple(rows) for rows in members.values()]


def representatives(pool: Pool, copies: Sequence[tuple[int, ...]]) -> Integers:
    """The first row of every group of copies, and all rows without one."""
    later = {row for group in copies for row in group[1:]}
    return np.array([i for i in range(len(pool.examples)) if i not in later], np.int64)


def find_conflicts(pool: Pool) -> tuple[Conflict, ...]:
    """Prompts that are answered in different ways; a row without a prompt is in none."""
    found = []
    for group in _groups(pool.prompt_keys):
        answers = len({pool.answer_keys[i] for i in group})
        if answers > 1 and pool.prompt_lengths[group[0]]:
            found.append(Conflict(group, answers))
    return tuple(found)


def has_labels(pool: Pool) -> bool:
    """Whether the answers are few and short: classes rather than texts."""
    few = len(set(pool.answer_keys)) <= MAX_LABELS_SHARE * len(pool.answer_keys)
    return few and float(np.median(pool.answer_lengths)) <= MIN_WORDS


def near_clusters(pool: Pool, near: float, rows: Integers) -> tuple[Cluster, ...]:
    """Clusters of near copies, see ``near_duplicates``.

    Args:
        pool: all rows.
        near: least Jaccard similarity of a pair.
        rows: the indices to look at, in order.

    Returns:
        the clusters, each with its least similarity.
    """
    lengths = pool.words.lengths[rows]
    short = rows[(lengths >= MIN_WORDS) & (lengths < MAX_CHARACTER_WORDS)]
    long = rows[lengths >= MIN_BIGRAM_WORDS]
    families = (_Family(short, _characters(pool)), _Family(long, lambda of: shingle_sets(pool.words.select(of))))
    clusters = join(len(pool.examples), merged([family.pairs(near) for family in families]))
    return tuple(_with_least(cluster, families) for cluster in clusters)


def near_groups(dataset: Dataset, near: float = 0.8) -> dict[int, int]:
    """Row number to the first row of its cluster, for rows that have near or exact copies: what a split must not part."""
    pool = make_pool(dataset)
    copies = find_copies(pool)
    first = {row: group[0] for group in copies for row in group}
    for cluster in near_clusters(pool, near, representatives(pool, copies)):
        first |= dict.fromkeys(cluster.rows, cluster.rows[0])
    heads = {row: first[head] for row, head in first.items()}  # a copy follows its first row into that one's cluster
    return {pool.row(row): pool.row(head) for row, head in heads.items()}


def _characters(pool: Pool) -> Callable[[Integers], Runs]:
    """The shingles of characters of some rows."""

    def codes(row: int) -> Hashes:
        example = pool.examples[row]
        return character_codes(words(f"{prompt_text(example)}\n{answer_text(example)}"))

    return lambda rows: shingle_sets(Runs.of([]), Runs.of([codes(row) for row in rows.tolist()]))


class _Family:
    """Rows that are compared by one kind of shingle; ``rows`` are indices in the pool, sorted."""

    def __init__(self, rows: Integers, shingles: Callable[[Integers], Runs]) -> None:
        self.rows = rows
        self._shingles = shingles
        self._common = common_shingles(lambda at: shingles(rows[at]), len(rows))

    def sets(self, at: Integers) -> Runs:
        """The sets of the rows at some positions."""
        return without(self._shingles(self.rows[at]), self._common)

    def pairs(self, near: float) -> Pairs:
        found = find_pairs(self.sets, len(self.rows), near)
        return Pairs(self.rows[found.first], self.rows[found.second], found.similarity)

    def least(self, rows: Integers) -> float:
        """The least similarity of any two of ``rows``, or to the first of them when they are many; 1 if they are not here."""
        at = np.searchsorted(self.rows, rows)
        if not len(self.rows) or (self.rows[np.minimum(at, len(self.rows) - 1)] != rows).any():
            return 1.0
        heads = np.arange(len(at) if len(at) <= MAX_LEAST_ROWS else 1)
        first, second = (grid.ravel() for grid in np.meshgrid(heads, np.arange(len(at)), indexing="ij"))
        once = first < second
        return float(verify(self.sets(at), first[once], second[once], 0.0).similarity.min(initial=1.0))


def _with_least(cluster: Cluster, families: Sequence[_Family]) -> Cluster:
    rows = np.array(cluster.rows)
    return Cluster(cluster.rows, min(cluster.least, *(family.least(rows) for family in families)))


# ---- as JSON ----


def to_json(report: QualityReport) -> dict[str, JSON]:
    """The whole report; rows by their number in the file, from 1."""
    pool = report.pool
    rows: dict[str, JSON] = {
        "copies": [_numbers(pool, group) for group in report.copies],
        "near_copies": [{"rows": _numbers(pool, c.rows), "least_similarity": round(c.least, 4)} for c in report.clusters],
        "conflicts": [{"rows": _numbers(pool, c.rows), "answers": c.answers} for c in report.conflicts],
        "defects": [{"row": pool.row(d.row), "kind": d.kind, "evidence": visible(d.evidence)} for d in report.defects],
        "contamination": {visible(path): [_leak(report, path, leak) for leak in leaks] for path, leaks in report.leaks.items()},
    }
    return {
        "path": visible(pool.path),
        "sha256": pool.dataset.sha256,
        "form": pool.dataset.form,
        "near": report.near,
        "has_labels": report.has_labels,
        "counts": dict(counts(report).items()),
        "lengths": {name: quantiles(values) for name, values in lengths(pool).items()},
        **rows,
    }


def counts(report: QualityReport) -> dict[str, int]:
    """How many rows each finding concerns (copies: those beyond the first)."""
    kinds = dict.fromkeys(KINDS, 0)
    for defect in report.defects:
        kinds[defect.kind] += 1
    return {
        "rows": len(report.pool.examples),
        "copies": sum(len(group) - 1 for group in report.copies),
        "near copies": sum(len(cluster.rows) - 1 for cluster in report.clusters),
        "same prompt, different answers": sum(len(conflict.rows) for conflict in report.conflicts),
        **kinds,
        "contaminated": len({leak.row for leaks in report.leaks.values() for leak in leaks}),
    }


def lengths(pool: Pool) -> dict[str, Integers]:
    """Words of the prompts and of the answers."""
    return {"prompt words": pool.prompt_lengths, "answer words": pool.answer_lengths}


def quantiles(values: Integers) -> dict[str, JSON]:
    """Minimum, quartiles, 95 % and maximum."""
    shares = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "p95": 0.95, "max": 1.0}
    return {name: float(np.quantile(values, share)) for name, share in shares.items()}


def excerpt(text: str, limit: int = MAX_EXCERPT) -> str:
    """The head of a text on one line, safe to print."""
    return visible(" ".join(text.split()), limit)


def span_text(pool: Pool, row: int, start: int, length: int) -> str:
    """The words of a row as they are compared.

    Args:
        pool: all rows.
        row: an index.
        start: the first word, counted over prompt and answer.
        length: how many words.

    Returns:
        them with one space between.
    """
    example = pool.examples[row]
    return " ".join(words(f"{prompt_text(example)}\n{answer_text(example)}")[start : start + length])


def _numbers(pool: Pool, rows: Sequence[int]) -> list[JSON]:
    return [pool.row(row) for row in rows]


def _leak(report: QualityReport, path: str, leak: Leak) -> dict[str, JSON]:
    return {
        "row": report.pool.row(leak.row),
        "test_row": report.tests[path].row(leak.test_row),
        "kind": leak.kind,
        "numbers_changed": leak.masked,
        "share": round(leak.share, 4),
        "span": visible(span_text(report.pool, leak.row, leak.start, leak.length), 400),
    }
