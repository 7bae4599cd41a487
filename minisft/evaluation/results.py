"""What an evaluation gives: a score with its rows, and the files that keep them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minisft.common.atomic_files import make_folder, write_durably
from minisft.common.safe_json import JSON

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class RowResult:
    """One row: its number in the file, what the model said, what was right, its score, and what the metric adds."""

    row: int
    prediction: str
    reference: str
    score: float
    extra: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """The mean ``score`` over ``n`` rows (for ``loss``: over tokens); ``extra`` depends on the metric."""

    score: float
    n: int
    metric: str
    extra: dict[str, JSON]
    rows: list[RowResult]

    @property
    def head(self) -> dict[str, JSON]:
        """Everything but the rows."""
        return {"score": self.score, "n": self.n, "metric": self.metric, **self.extra}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, where the metric has one."""
        bounds = self.extra.get("interval_95")
        return (float(str(bounds[0])), float(str(bounds[1]))) if isinstance(bounds, list) else None

    def __str__(self) -> str:
        shown = "" if self.interval is None else f" ({self.interval[0]:.4f} to {self.interval[1]:.4f})"
        return f"{self.score:.4f}{shown} over {self.n} rows"


@contextlib.contextmanager
def terminal_progress(title: str) -> Iterator[Progress | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="row", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def prompt_sha256(*texts: str) -> str:
    """A digest of what was asked; ``compare`` refuses two files in which a row's differ."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def write(result: EvalResult, out_path: str | Path) -> Path:
    """Write the scores to ``out_path`` (one JSON object) and every row to ``<stem>.rows.jsonl`` beside it.

    Returns:
        the path of the rows.

    Raises:
        OSError: from the disk; neither file is ever half written.
    """
    out_path = Path(out_path)
    rows_path = out_path.with_name(out_path.stem + ".rows.jsonl")
    head: dict[str, JSON] = {**result.head, "rows": rows_path.name}
    make_folder(out_path.absolute().parent)
    write_durably(rows_path, "".join(_row_line(row) for row in result.rows).encode())
    write_durably(out_path, (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode())
    return rows_path


def _row_line(row: RowResult) -> str:
    shown = {"row": row.row, "score": row.score, "prediction": row.prediction, "reference": row.reference, **row.extra}
    return json.dumps(shown, ensure_ascii=False) + "\n"
