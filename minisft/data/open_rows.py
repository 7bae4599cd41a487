"""The rows that a name stands for: those of one file, or of the files of a data set on the hub, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from minisft.common.safe_json import JSON
from minisft.data.hub_data import hub_files, is_hub
from minisft.data.json_rows import MAX_ROW_BYTES, RowFile


class HubRows:
    """The rows of several files as ``RowFile`` gives those of one; numbers go on from file to file."""

    def __init__(self, entry: str, max_row_bytes: int) -> None:
        files, chosen = hub_files(entry)
        self.path, self.notes = Path(entry), [chosen]
        self._files = [RowFile(path, max_row_bytes) for path in files]

    @property
    def sha256(self) -> str:
        """Of the bytes read so far: of one file its own, of several that of theirs, a line each."""
        found = [file.sha256 for file in self._files]
        return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()

    def rows(self) -> Iterator[tuple[int, str, dict[str, JSON]]]:
        """(number from 1, file and line for errors, object) of each row."""
        before = 0
        for file in self._files:
            last = 0
            for last, where, values in file.rows():
                yield before + last, where, values
            before += last
            self.notes += file.notes


def open_rows(name: str | Path, max_row_bytes: int = MAX_ROW_BYTES) -> RowFile | HubRows:
    """The rows that ``name`` stands for.

    Args:
        name: a file, or ``hf:org/name...``.
        max_row_bytes: longest line accepted.

    Returns:
        Their reader.

    Raises:
        UserError: ``data/...``.
    """
    return HubRows(str(name), max_row_bytes) if is_hub(str(name)) else RowFile(Path(name), max_row_bytes)
