"""Encoded rows in flat arrays: 4 bytes a token instead of a list of Python numbers, and each row made when it is asked for.

A token is one int32: its id, with the sign bit set where it is a target. All rows lie end to end, in memory or in a mapped
file, so a large data set costs the memory of the rows that are in use. ``TokenWriter`` lays them down as they are encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

from minisft.data.chat import Encoded

Tokens = NDArray[np.int32]
_ID = np.int32(0x7FFF_FFFF)
_TARGET = np.int32(-0x8000_0000)
_TOKENS_AT_ONCE = 1 << 20
# The columns of ``facts``: what an ``Encoded`` knows beside its tokens, and how many of them are targets.
_ROW, _CONTROL, _PROMPT, _STRADDLING, _LOSES, _TARGETS = range(6)
_NUM_FACTS = 6


class TokenRows(Sequence[Encoded]):
    """A sequence of ``Encoded`` over flat arrays.

    Args:
        tokens: (N,) int32, see above.
        offsets: (rows + 1,) int64: row i is ``tokens[offsets[i] : offsets[i + 1]]``.
        facts: (rows, 6) int32: row number, control tokens, prompt length, straddling targets, lost reasoning, targets.
    """

    def __init__(self, tokens: Tokens, offsets: NDArray[np.int64], facts: NDArray[np.int32]) -> None:
        self.tokens, self.offsets, self.facts = tokens, offsets, facts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Encoded, ...]: ...
    def __getitem__(self, at: int | slice) -> Encoded | tuple[Encoded, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        values, facts = self.tokens[self.offsets[at] : self.offsets[at + 1]], self.facts[at].tolist()
        return Encoded(
            input_ids=(values & _ID).tolist(),
            supervised=(values < 0).tolist(),
            row=facts[_ROW],
            control_tokens_in_text=facts[_CONTROL],
            prompt_length=facts[_PROMPT],
            straddling=facts[_STRADDLING],
            loses_reasoning=bool(facts[_LOSES]),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of each row."""
        return np.diff(self.offsets)

    @property
    def numbers(self) -> NDArray[np.int32]:
        """(rows,) the row of the data file that each was, from 1."""
        return self.facts[:, _ROW]

    @property
    def num_targets(self) -> int:
        """Targets of all rows."""
        return int(self.facts[:, _TARGETS].sum(dtype=np.int64))

    def arrays(self) -> Iterator[tuple[Tokens, NDArray[np.bool_]]]:
        """(token ids, targets) of each row, as arrays."""
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            values = self.tokens[start:end]
            yield values & _ID, values < 0

    def vocabulary(self) -> tuple[frozenset[int], frozenset[int]]:
        """The ids that stand in the rows, and those that are targets."""
        used: set[int] = set()
        learned: set[int] = set()
        for start in range(0, len(self.tokens), _TOKENS_AT_ONCE):
            values = self.tokens[start : start + _TOKENS_AT_ONCE]
            used.update(np.flatnonzero(np.bincount(values & _ID)).tolist())
            learned.update(np.flatnonzero(np.bincount(values[values < 0] & _ID)).tolist())
        return frozenset(used), frozenset(learned)

    def open_ended(self, ends: Set[int]) -> tuple[int, ...]:
        """Row numbers of rows in which a run of targets ends on another token than one of ``ends``."""
        found: list[NDArray[np.int64]] = []
        closing = np.array(sorted(ends), np.int32)
        start = 0
        while start < len(self):
            limit = int(self.offsets[start]) + _TOKENS_AT_ONCE
            end = max(start + 1, int(np.searchsorted(self.offsets, limit, side="right")) - 1)
            values = self.tokens[self.offsets[start] : self.offsets[end]]
            last = values < 0  # the last target of a run
            last[:-1] &= values[1:] >= 0
            heads = self.offsets[start + 1 : end + 1] - self.offsets[start] - 1
            heads = heads[heads >= 0]
            last[heads] = values[heads] < 0  # whatever the next row begins with
            open_at = np.flatnonzero(last & ~np.isin(values & _ID, closing)) + self.offsets[start]
            found.append(np.searchsorted(self.offsets, open_at, side="right") - 1)
            start = end
        rows = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
        return tuple(self.numbers[rows].tolist())

    def save(self, folder: Path, name: str) -> None:
        """Write ``NAME.offsets`` and ``NAME.facts``; the tokens are ``NAME.tokens`` already, see ``TokenWriter``."""
        (folder / f"{name}.offsets").write_bytes(self.offsets.astype("<i8").tobytes())
        (folder / f"{name}.facts").write_bytes(self.facts.astype("<i4").tobytes())

    @staticmethod
    def load(folder: Path, name: str) -> TokenRows:
        """Rows that ``save`` and a ``TokenWriter`` left in a folder; the tokens stay there and are mapped.

        Raises:
            ValueError: the files do not fit each other.
            OSError: a file cannot be read.
        """
        offsets = np.fromfile(folder / f"{name}.offsets", "<i8").astype(np.int64)
        facts = np.fromfile(folder / f"{name}.facts", "<i4").astype(np.int32).reshape(-1, _NUM_FACTS)
        tokens = _mapped(folder / f"{name}.tokens")
        if len(offsets) != len(facts) + 1 or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
            raise ValueError(f"the files of {name} do not fit each other")
        return TokenRows(tokens, offsets, facts)


def _mapped(path: Path) -> Tokens:
    if not path.stat().st_size:  # nothing can be mapped
        return np.empty(0, np.int32)
    return np.memmap(path, "<i4", mode="r")


def longest_rows(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """The rows with most tokens; of ``TokenRows`` no other row is made.

    Args:
        rows: in any form.
        count: how many, at least 1.

    Returns:
        ``count`` rows, or all if there are fewer; the longest last, rows of one length in their order.
    """
    lengths = rows.lengths if isinstance(rows, TokenRows) else np.array([len(row.input_ids) for row in rows], np.int64)
    return [rows[i] for i in np.argsort(lengths, kind="stable")[-count:].tolist()]


class TokenWriter:
    """Lays encoded rows end to end, in memory or in a file.

    Args:
        path: a new file for the tokens; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None if path is None else path.open("xb")
        self._rows: list[Tokens] = []
        self._lengths: list[int] = []
        self._facts: list[tuple[int, ...]] = []
        self._waiting = 0

    def add(self, row: Encoded) -> None:
        """Append a row."""
        values = np.array(row.input_ids, np.int32)
        targets = np.array(row.supervised, bool)
        values[targets] |= _TARGET
        self._rows.append(values)
        self._lengths.append(len(values))
        facts = (row.row, row.control_tokens_in_text, row.prompt_length, row.straddling, row.loses_reasoning)
        self._facts.append((*map(int, facts), int(np.count_nonzero(targets))))
        self._waiting += len(values)
        if self._file is not None and self._waiting >= _TOKENS_AT_ONCE:
            self._write()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self._joined().astype("<i4").tobytes())
            self._rows, self._waiting = [], 0

    def _joined(self) -> Tokens:
        return np.concatenate(self._rows) if self._rows else np.empty(0, np.int32)

    def finish(self) -> TokenRows:
        """All rows; nothing can be added any more."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        facts = np.array(self._facts, np.int32).reshape(-1, _NUM_FACTS)
        if self._file is None or self._path is None:
            return TokenRows(self._joined(), offsets, facts)
        self._write()
        self.close()
        return TokenRows(_mapped(self._path), offsets, facts)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
