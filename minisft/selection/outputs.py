"""The files of a selection: the picked lines byte for byte, the report, all scores, the page; none is ever half there.

The picked rows come last: where they stand, everything else does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minisft.common.atomic_files import make_folder, replace_durably, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.open_rows import HubRows, open_rows
from minisft.selection.report import selection_page, to_json
from minisft.selection.score_file import to_line, write_scores
from minisft.selection.scores import RowScore
from minisft.selection.select import Selection


@dataclass(frozen=True)
class OutputFiles:
    """Where each part goes."""

    rows: Path
    report: Path
    scores: Path
    page: Path

    @property
    def partial(self) -> Path:
        """Scores of a run that has not ended yet."""
        return self.scores.with_name(self.scores.name + ".partial")

    @staticmethod
    def beside(rows: Path) -> OutputFiles:
        """All names from that of the picked rows.

        Raises:
            UserError: ``config/bad-value``, ``config/out-exists``.
        """
        if rows.suffix != ".jsonl":
            fix = "a name that ends in .jsonl"
            raise UserError("config/bad-value", "the output is JSON lines", where="--out", found=visible(rows), fix=fix)
        names = [rows.with_name(rows.stem + end) for end in (".report.json", ".scores.jsonl", ".html")]
        for path in (rows, *names):
            if path.exists():
                fix = "choose another name, or move it away"
                raise UserError("config/out-exists", "the output exists already", where="--out", found=visible(path), fix=fix)
        return OutputFiles(rows, *names)


def write_selection(files: OutputFiles, chosen: Selection, scores: Mapping[int, RowScore], name: Mapping[str, JSON]) -> None:
    """Write all files.

    Args:
        files: where.
        chosen: a completed selection.
        scores: of the model, by index; empty without one.
        name: what identifies data, model and settings.
    """
    make_folder(files.rows.absolute().parent)
    pool = chosen.pool
    lines = (to_line(scores[i], pool.row(i)) for i in sorted(scores))
    write_scores(files.scores, name, lines if scores else _plain_scores(chosen))
    write_durably(files.page, selection_page(chosen, scores).encode())
    replace_durably(files.report, _json_parts(to_json(chosen, name)))
    replace_durably(files.rows, picked_lines(Path(pool.path), {pool.row(int(i)) for i in chosen.picked}))


def _json_parts(document: Mapping[str, JSON]) -> Iterator[bytes]:
    """Indented JSON in pieces: the text of a large report is never in memory as a whole."""
    pieces = json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(document)
    while part := "".join(itertools.islice(pieces, 1 << 16)):
        yield part.encode()
    yield b"\n"


def _plain_scores(chosen: Selection) -> Iterator[bytes]:
    for i, value in zip(chosen.scored.tolist(), chosen.values.tolist(), strict=True):
        values = {"index": i, "row": chosen.pool.row(i), "score": value, "length": int(chosen.sizes.targets[i])}
        yield json.dumps(values).encode() + b"\n"


def picked_lines(path: Path, rows: set[int]) -> Iterator[bytes]:
    """The lines of a JSON lines file with these numbers, as they are; rows of another form as JSON lines."""
    source = open_rows(path)
    if isinstance(source, HubRows) or not source.has_lines:
        for number, _, values in source.rows():
            if number in rows:
                yield json.dumps(values, ensure_ascii=False).encode() + b"\n"
        return
    with source.open() as file:
        for number, line in enumerate(file, 1):
            if number in rows:
                yield line if line.endswith(b"\n") else line + b"\n"
