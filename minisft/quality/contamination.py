"""Rows of a pool that give away rows of a test file, each with its partner and the words they share.

Four ways to be found, the strictest first: the same prompt (or the same long answer) word for word; 13 consecutive words in
common, anywhere in prompt and answer; most of a test prompt's shingles inside the row; and, for what is still unfound, the same
three after all numbers are masked, which catches ``48 clips`` turned into ``52 clips``. What over 5 % of the pool's or the
test's rows share (instructions, template words) is no evidence and is left out first. A near copy by Jaccard similarity J
contains at least J of the test row, so containment finds it.

It only reports. Test rows are never changed; who removes training rows is the caller. Paraphrases and translations escape.

Ref: 13-grams: Brown et al. 2020, arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minisft.common.errors import UserError, visible
from minisft.quality.pool import Pool
from minisft.quality.text import (
    Hashes,
    Integers,
    Runs,
    common_values,
    distinct,
    even_sample,
    is_plain,
    mask_numbers,
    ngram_starts,
    ngrams,
    without,
)

NGRAM = 13
MIN_CONTAINMENT = 0.8
MIN_PROMPT_WORDS = 5  # shorter prompts are compared as a whole only
MIN_ANSWER_WORDS = 8  # equal shorter answers mean nothing: "yes", a label
MIN_MASKED_SHARE = 0.5  # of the test row in the span, once numbers are masked: sentences of a genre look alike then
MIN_PARTIAL_SHINGLES = 10
MIN_PLAIN_WORDS = 8  # words beside numbers and signs
COMMON_SHARE = 0.05
SHINGLE = 3  # words
PHRASE = 5  # words, of instructions and templates
MIN_SHINGLES = 3
_SAMPLE_ROWS = 4_000
_ROWS_AT_ONCE = 4_096
_TABLE_BITS = 24

Kind = Literal["exact prompt", "exact answer", "13-gram", "containment"]
KINDS: tuple[Kind, ...] = ("exact prompt", "exact answer", "13-gram", "containment")


@dataclass(frozen=True)
class Leak:
    """One row of the pool that gives away a test row.

    Attributes:
        row: index in the pool.
        test_row: index in the test file's pool.
        kind: how it was found.
        masked: only after numbers were masked.
        share: of the test row's words or shingles in the row; 1 for exact.
        start, length: the matching span, in the row's words.
    """

    row: int
    test_row: int
    kind: Kind
    masked: bool
    share: float
    start: int
    length: int

    @property
    def label(self) -> str:
        """The kind in words."""
        return f"{self.kind}{', numbers changed' if self.masked else ''}"


def find_leaks(pool: Pool, test: Pool) -> list[Leak]:
    """At most one leak a row of the pool, the strictest kind found, in row order.

    Raises:
        UserError: ``data/same-file`` when pool and test are the same rows.
    """
    if pool.dataset.sha256 == test.dataset.sha256:
        fix = "give the test file, not the pool itself"
        found = "the same bytes: every row would be contaminated"
        raise UserError("data/same-file", "pool and test file are the same", where=visible(test.path), found=found, fix=fix)
    leaks: dict[int, Leak] = {}
    for masked in (False, True):
        for leak in _found(pool, test, masked):
            leaks.setdefault(leak.row, leak)
    return [leaks[row] for row in sorted(leaks)]


def _found(pool: Pool, test: Pool, masked: bool) -> list[Leak]:
    rows, tests = pool.words, test.words.masked() if masked else test.words
    return [
        *_exact(pool, test, rows, tests, masked),
        *_shared_ngrams(rows, tests, masked),
        *_contained(test, rows, tests, masked),
    ]


# ---- exact ----


def _exact(pool: Pool, test: Pool, rows: Runs, tests: Runs, masked: bool) -> list[Leak]:
    """Rows whose prompt, or whose long answer, is a test row's word for word. System messages are not compared."""
    prompts = _first_rows(tests, np.zeros(len(tests), np.int64), test.prompt_lengths, MIN_PLAIN_WORDS if masked else 1, masked)
    least = MIN_PLAIN_WORDS if masked else MIN_ANSWER_WORDS
    answers = _first_rows(tests, test.prompt_lengths, tests.lengths, least, masked)
    leaks = []
    for i, (cut, end) in enumerate(zip(pool.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True)):
        own = mask_numbers(rows[i]) if masked else rows[i]
        if (partner := prompts.get(own[:cut].tobytes())) is not None:
            leaks.append(Leak(i, partner, "exact prompt", masked, 1.0, 0, cut))
        elif (partner := answers.get(own[cut:].tobytes())) is not None:
            leaks.append(Leak(i, partner, "exact answer", masked, 1.0, cut, end - cut))
    return leaks


def _first_rows(tests: Runs, starts: Integers, ends: Integers, least: int, masked: bool) -> dict[bytes, int]:
    """The first row with each run of words, of those that are long enough to mean something."""
    found: dict[bytes, int] = {}
    for i in range(len(tests)):
        run = tests[i][int(starts[i]) : int(ends[i])]
        if (_plain_words(run) if masked else len(run)) >= least:
            found.setdefault(run.tobytes(), i)
    return found


def _plain_words(hashes: Hashes) -> int:
    """How many of the words are neither numbers nor signs."""
    return int(np.count_nonzero(is_plain(hashes)))


# ---- n-grams ----


def _shared_ngrams(rows: Runs, tests: Runs, masked: bool) -> list[Leak]:
    """Rows that have ``NGRAM`` consecutive words of a test row, enough of them plain words: sums look alike."""
    grams = ngrams(tests, NGRAM)
    owner = np.repeat(np.arange(len(tests)), grams.lengths)
    values, first = np.unique(grams.values, return_index=True)
    values, first = _with_enough_words(_sampled(rows, masked), tests, values, first)
    leaks = []
    starts = ngram_starts(tests, NGRAM)
    for row, position, hit in _first_hits(rows, values, masked):
        partner = int(owner[first[hit]])
        at = int(starts[first[hit]] - tests.offsets[partner])
        own = mask_numbers(rows[row]) if masked else rows[row]
        start, length = _longest_common(own, tests[partner], position, at)
        share = length / max(1, int(tests.lengths[partner]))
        if share >= (MIN_MASKED_SHARE if masked else 0.0):
            leaks.append(Leak(row, partner, "13-gram", masked, share, start, length))
    return leaks


def _with_enough_words(sample: Runs, tests: Runs, values: Hashes, first: Integers) -> tuple[Hashes, Integers]:
    """The n-grams with enough plain words that do not belong to what many rows share."""
    counted = is_plain(tests.values) & ~_shared_words(sample, tests)
    sums = np.concatenate(([0], np.cumsum(counted)))
    starts = ngram_starts(tests, NGRAM)[first]
    enough = sums[starts + NGRAM] - sums[starts] >= MIN_PLAIN_WORDS
    return values[enough], first[enough]


def _shared_words(sample: Runs, tests: Runs) -> NDArray[np.bool_]:
    """Which of the test rows' words lie in a phrase that many rows of pool or test have."""
    phrases = ngrams(tests, PHRASE)
    hits = ngram_starts(tests, PHRASE)[np.isin(phrases.values, _common_to(sample, tests, PHRASE))]
    covered = np.zeros(len(tests.values) + 1, np.int64)
    np.add.at(covered, hits, 1)
    np.subtract.at(covered, np.minimum(hits + PHRASE, len(tests.values)), 1)
    return np.cumsum(covered)[:-1] > 0


def _common_to(sample: Runs, tests: Runs, n: int) -> Hashes:
    return np.union1d(*(common_values(distinct(ngrams(rows, n)), COMMON_SHARE) for rows in (tests, sample)))


def _sampled(rows: Runs, masked: bool) -> Runs:
    """An even sample of the pool."""
    sample = rows.select(even_sample(len(rows), _SAMPLE_ROWS))
    return sample.masked() if masked else sample


def _parts(rows: Runs, masked: bool) -> Iterator[tuple[int, Runs]]:
    """The pool some rows at a time, each part with its first row."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows_between(rows, start, min(start + _ROWS_AT_ONCE, len(rows)))
        yield start, part.masked() if masked else part


def _first_hits(rows: Runs, values: Hashes, masked: bool) -> list[tuple[int, int, int]]:
    """(row, position in the row, index in ``values``) of the first n-gram of each row that is among ``values``."""
    hits: list[tuple[int, int, int]] = []
    table = _Table(values)
    for start, part in _parts(rows, masked):
        grams = ngrams(part, NGRAM)
        where, index = table.find(grams.values)
        owner = np.searchsorted(grams.offsets, where, side="right") - 1
        _, heads = np.unique(owner, return_index=True)
        hits += [(start + int(owner[h]), int(where[h] - grams.offsets[owner[h]]), int(index[h])) for h in heads]
    return hits


def rows_between(runs: Runs, start: int, end: int) -> Runs:
    """Some consecutive rows, without copying them.

    Args:
        runs: all rows.
        start: the first.
        end: one past the last.

    Returns:
        a view.
    """
    low, high = runs.offsets[start], runs.offsets[end]
    return Runs(runs.values[low:high], runs.offsets[start : end + 1] - low)


class _Table:
    """Which of many hashes are among a few sorted ones; a table of bits answers most of them."""

    def __init__(self, values: Hashes) -> None:
        self.values = values
        self.bits = np.zeros(1 << _TABLE_BITS, bool)
        self.bits[self._slots(values)] = True

    @staticmethod
    def _slots(values: Hashes) -> Hashes:
        return values >> np.uint64(64 - _TABLE_BITS)

    def find(self, hashes: Hashes) -> tuple[Integers, Integers]:
        """(positions in ``hashes`` that are among the values, which value each is)."""
        if not len(self.values):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        where = np.flatnonzero(self.bits[self._slots(hashes)])
        index = np.minimum(np.searchsorted(self.values, hashes[where]), len(self.values) - 1)
        same = self.values[index] == hashes[where]
        return where[same], index[same]


def _longest_common(row: Hashes, test: Hashes, position: int, at: int) -> tuple[int, int]:
    """(start in the row, length) of the common run around ``row[position] == test[at]``."""
    back = 0
    while back < min(position, at) and row[position - back - 1] == test[at - back - 1]:
        back += 1
    position, at = position - back, at - back
    most = min(len(row) - position, len(test) - at)
    differ = np.flatnonzero(row[position : position + most] != test[at : at + most])
    return position, int(differ[0]) if len(differ) else most


# ---- containment ----


def _contained(test: Pool, rows: Runs, tests: Runs, masked: bool) -> list[Leak]:
    """Rows that hold at least ``MIN_CONTAINMENT`` of a test prompt's shingles.

    A row that does holds one of the rarest m - ceil(0.8 m) + 1 of the m shingles; those alone are looked up.
    """
    prompts = Runs.of([tests[i][: int(n)] for i, n in enumerate(_question_lengths(test))])
    sample = _sampled(rows, masked)
    sets = without(distinct(ngrams(prompts, SHINGLE)), _common_to(sample, tests, SHINGLE))
    counted = _counted(sets, prompts, masked)
    index, owners = _rarest(sets, counted, sample)
    leaks: dict[int, Leak] = {}
    table = _Table(np.unique(index))
    order = np.argsort(index, kind="stable")
    index, owners = index[order], owners[order]
    for start, part in _parts(rows, masked):
        grams = ngrams(part, SHINGLE)
        where, _ = table.find(grams.values)
        row_of = np.searchsorted(grams.offsets, where, side="right") - 1
        for row, hash_ in sorted(set(zip(row_of.tolist(), grams.values[where].tolist(), strict=True))):
            low, high = np.searchsorted(index, np.uint64(hash_), "left"), np.searchsorted(index, np.uint64(hash_), "right")
            own = grams[row]
            for partner in owners[low:high].tolist():
                share = float(np.isin(sets[partner], own).mean())
                if share >= _least_share(len(sets[partner])) and share > (
                    leaks[start + row].share if start + row in leaks else 0.0
                ):
                    leaks[start + row] = _containment(start + row, partner, share, own, sets[partner], masked)
    return list(leaks.values())


def _least_share(num_shingles: int) -> float:
    """A short prompt must be there whole: one shingle less may be all that makes it another question."""
    return MIN_CONTAINMENT if num_shingles >= MIN_PARTIAL_SHINGLES else 1.0


def _question_lengths(test: Pool) -> list[int]:
    """The words of the prompt, or all of them where there is no prompt."""
    return [int(n) or int(whole) for n, whole in zip(test.prompt_lengths, test.words.lengths, strict=True)]


def _counted(sets: Runs, prompts: Runs, masked: bool) -> list[int]:
    """Test rows that are long enough to mean something."""
    least = MIN_PLAIN_WORDS if masked else MIN_PROMPT_WORDS
    sizes = [_plain_words(prompts[i]) if masked else len(prompts[i]) for i in range(len(prompts))]
    return [i for i, size in enumerate(sizes) if size >= least and sets.lengths[i] >= MIN_SHINGLES]


def _rarest(sets: Runs, counted: list[int], pool: Runs) -> tuple[Hashes, Integers]:
    """(shingle, test row) of each test row's shingles that are rarest in a sample of the pool."""
    sample = np.sort(ngrams(pool, SHINGLE).values)
    values, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for i in counted:
        own = sets[i]
        count = np.searchsorted(sample, own, "right") - np.searchsorted(sample, own, "left")
        length = len(own) - int(np.ceil(MIN_CONTAINMENT * len(own) - 1e-9)) + 1
        values.append(own[np.argsort(count, kind="stable")[:length]])
        owners.append(np.full(length, i))
    return np.concatenate(values), np.concatenate(owners)


def _containment(row: int, partner: int, share: float, own: Hashes, wanted: Hashes, masked: bool) -> Leak:
    hits = np.flatnonzero(np.isin(own, wanted))
    start, end = int(hits[0]), int(hits[-1]) + SHINGLE
    return Leak(row, partner, "containment", masked, share, start, end - start)
