"""Text as words, and words as numbers: the common base of every comparison between rows.

Two texts are called the same when their words are: after NFKC, in lower case, without white space and without the punctuation
of sentences. Signs that change a meaning stay (``+``, ``-``, ``*``, the point inside ``1.5``), so ``2 + 2`` is not ``2 * 2``.
A word becomes a 64-bit hash whose two lowest bits mark a digit in it or a sign without a letter, and a row becomes a run of
such hashes in one flat array: all later work is arithmetic on arrays. Python's own, randomised ``hash`` plays no part.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]
Number = TypeVar("Number", np.uint64, np.int64)

_WORD = re.compile(r"\w+|(?<=\d)[.,:](?=\d)|[^\w\s.,;:!?…\"'“”‘’«»`´()\[\]{}]")
_DIGIT = re.compile(r"\d")
# Hashes of words are remembered up to this many; a hash is a function of its word, so forgetting them costs time only.
_MAX_MEMORY = 1_000_000
_ROWS_AT_ONCE = 4_096
MIN_COMMON_ROWS = 20  # what fewer rows share is evidence, whatever their share of the pool
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# The two lowest bits of a hash: the word has a digit; it is a sign.
_HAS_DIGIT, _IS_SIGN = 1, 2
# What every word with a digit becomes when numbers are masked.
MASKED_NUMBER = np.uint64(0xD1B54A32D192ED01)


def words(text: str) -> list[str]:
    """The words of ``text`` and the signs that matter, in lower case; a run of letters and digits is one word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def character_span(text: str, start: int, length: int) -> tuple[int, int]:
    """The characters that some words of a text cover.

    Args:
        text: any text.
        start: the first word.
        length: how many words.

    Returns:
        (start, end); the whole text where normalisation has made other words of it.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) != len(words(text)) or not length:  # normalisation made other words of it
        return 0, len(text)
    return spans[start][0], spans[start + length - 1][1]


def key(texts: Iterable[Sequence[str]]) -> bytes:
    """16 bytes that are the same for the same lists of words, and for no others."""
    joined = "\x1e".join("\x1f".join(part) for part in texts)
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class WordHashes(dict[str, int]):
    """Word to 64-bit hash, each computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_MEMORY:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        has_digit = bool(_DIGIT.search(word))
        is_sign = not has_digit and not (word[0].isalpha() or word[0] == "_")
        value = int.from_bytes(digest, "little") & ~3 | has_digit * _HAS_DIGIT | is_sign * _IS_SIGN
        self[word] = value
        return value

    def of(self, text: Sequence[str]) -> Hashes:
        """The hash of each word, (N,) uint64."""
        return np.fromiter(map(self.__getitem__, text), np.uint64, len(text))


def mask_numbers(hashes: Hashes) -> Hashes:
    """The same words with one hash for whatever has a digit: ``48 clips`` equals ``52 clips``."""
    return np.where(hashes & np.uint64(_HAS_DIGIT), MASKED_NUMBER, hashes)


def is_plain(hashes: Hashes) -> NDArray[np.bool_]:
    """Which words have letters and no digit."""
    return (hashes & np.uint64(_HAS_DIGIT | _IS_SIGN)) == 0


def mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit integers that spreads every bit over all others. Ref: splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def character_codes(text: Sequence[str]) -> Hashes:
    """The code points of the words with one space between, (N,) uint64."""
    raw = " ".join(text).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(raw, np.uint32).astype(np.uint64)


@dataclass(frozen=True)
class Runs:
    """Runs of 64-bit values, one a row, end to end.

    Attributes:
        values: (N,) all of them.
        offsets: (rows + 1,) row ``i`` is ``values[offsets[i] : offsets[i + 1]]``.
    """

    values: Hashes
    offsets: Integers

    @staticmethod
    def of(rows: Sequence[Hashes]) -> Runs:
        """Lay arrays end to end."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return Runs(np.concatenate(rows) if rows else np.empty(0, np.uint64), offsets)

    @property
    def lengths(self) -> Integers:
        """(rows,) values of each row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Hashes:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def select(self, rows: Integers) -> Runs:
        """Some of the rows, in the order of ``rows``."""
        lengths = self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Runs(self.values[np.arange(int(offsets[-1])) + shift], offsets)

    def masked(self) -> Runs:
        """The rows with every number masked."""
        return Runs(mask_numbers(self.values), self.offsets)


def ngrams(runs: Runs, n: int) -> Runs:
    """Hashes of the ``n`` consecutive values at every position of every row; none crosses from one row into the next.

    h = mix(v_1 m^(n-1) + ... + v_n) modulo 2^64, m odd. A row with fewer than ``n`` values has none.
    """
    counts = np.maximum(runs.lengths - n + 1, 0)
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    total = len(runs.values) - n + 1
    if total <= 0:
        return Runs(np.empty(0, np.uint64), offsets)
    hashes = runs.values[:total].copy()
    for k in range(1, n):
        hashes *= _MULTIPLIER
        hashes += runs.values[k : total + k]
    if offsets[-1] == total:  # one row: nothing to leave out
        return Runs(mix(hashes), offsets)
    return Runs(mix(hashes[ngram_starts(runs, n)]), offsets)


def distinct_share(runs: Runs, rows: Integers, n: int) -> float:
    """Different n-grams of some rows, divided by all of theirs; in memory for one number an n-gram.

    Args:
        runs: all rows.
        rows: which of them.
        n: values of an n-gram.

    Returns:
        the share, 0 without any.
    """
    counts = np.maximum(runs.lengths[rows] - n + 1, 0)
    grams = np.empty(int(counts.sum()), np.uint64)
    start = 0
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = ngrams(runs.select(rows[first : first + _ROWS_AT_ONCE]), n).values
        grams[start : start + len(part)] = part
        start += len(part)
    grams.sort()
    return (1 + int(np.count_nonzero(grams[1:] != grams[:-1]))) / len(grams) if len(grams) else 0.0


def ngram_starts(runs: Runs, n: int) -> Integers:
    """Where in ``runs.values`` each of ``ngrams(runs, n)`` begins."""
    counts = np.maximum(runs.lengths - n + 1, 0)
    shift = runs.offsets[:-1] - np.concatenate(([0], np.cumsum(counts)[:-1])) if len(runs) else np.empty(0, np.int64)
    return np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(shift, counts)


def distinct(runs: Runs, cap: int | None = None) -> Runs:
    """Each row's values sorted and without repeats; of more than ``cap`` the smallest ones, a fair sample of a hashed set."""
    return Runs.of([sorted_distinct(runs[i])[:cap] for i in range(len(runs))])


def common_values(sets: Runs, share: float) -> Hashes:
    """The values that more than a share of the sets have, and more than ``MIN_COMMON_ROWS`` of them, in ascending order."""
    values, counts = np.unique(sets.values, return_counts=True)
    return values[counts > max(MIN_COMMON_ROWS, share * len(sets))]


def without(sets: Runs, values: Hashes) -> Runs:
    """The sets without some values."""
    if not len(values):
        return sets
    keep = ~np.isin(sets.values, values)
    return Runs(sets.values[keep], np.concatenate(([0], np.cumsum(keep)))[sets.offsets])


def even_sample(size: int, most: int) -> Integers:
    """At most ``most`` of ``size`` positions, evenly spread from the first to the last, in order."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))


def sorted_distinct(values: NDArray[Number]) -> NDArray[Number]:
    """The different values in ascending order."""
    # np.unique goes through a hash table, which took a hundred times as long on a thousand hashes.
    ordered = np.sort(values)
    keep = np.ones(len(ordered), bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return ordered[keep]
