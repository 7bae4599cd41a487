"""Scores on the disk: written as they are computed, so that a killed run goes on where it stopped.

A first line names what the scores belong to: the data's sha256, the model's fingerprint, the template and the settings. Scores
under any other name are never mixed in. While rows are still missing the file has another name, ``….partial``.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from minisft.common import safe_json
from minisft.common.atomic_files import make_folder, replace_durably
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.selection.scores import RowScore


def to_line(score: RowScore, row: int) -> bytes:
    """One score as a JSON line; ``row`` is its number in the file."""
    values: dict[str, JSON] = {
        "index": score.row, "row": row, "tokens": score.tokens, "targets": score.targets, "loss": score.loss,
        "loss_alone": score.loss_alone, "ifd_ratio": _short(score.ifd), "ifd_ppl": _short(score.ppl_ifd),
        "pmi": _short(score.pmi),
    }  # fmt: skip
    if score.reason:
        values["reason"] = score.reason
    if score.state is not None:
        values["state"] = base64.b64encode(score.state.tobytes()).decode()
    return json.dumps(values).encode() + b"\n"


def _short(value: float | None) -> float | None:
    return round(value, 6) if value is not None and math.isfinite(value) else None


def write_scores(path: Path, name: Mapping[str, JSON], lines: Iterator[bytes]) -> None:
    """Write the finished file, in one step.

    Args:
        path: where.
        name: what the scores belong to.
        lines: one for each row.
    """
    replace_durably(path, itertools.chain([json.dumps(dict(name)).encode() + b"\n"], lines))


def read_scores(path: Path, name: Mapping[str, JSON], strict: bool) -> dict[int, RowScore]:
    """The scores by row index.

    Args:
        path: a finished or a partial file.
        name: what the scores must belong to.
        strict: a file of another name is an error (it was asked for); otherwise it counts as none.

    Returns:
        empty where there is no such file.

    Raises:
        UserError: ``data/other-scores``, ``data/bad-scores``.
    """
    if not path.is_file():
        if strict:
            raise UserError("data/no-file", "no such file of scores", where=visible(path), fix="leave --scores away")
        return {}
    scores: dict[int, RowScore] = {}
    with path.open("rb") as file:
        first = _parse(file.readline())
        if first is None or any(first.get(key) != value for key, value in name.items()):
            if strict:
                raise _other(path, first, name)
            return {}
        for number, line in enumerate(file, 2):
            values = _parse(line)
            if not line.endswith(b"\n") or values is None:  # the last line of a killed run
                if strict:
                    what, fix = "the scores cannot be read", "leave --scores away to compute them again"
                    raise UserError("data/bad-scores", what, where=f"{visible(path)}:{number}", fix=fix)
                break
            score = _from_line(values)
            scores[score.row] = score
    return scores


def _parse(line: bytes) -> dict[str, JSON] | None:
    try:
        value = safe_json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _other(path: Path, first: dict[str, JSON] | None, name: Mapping[str, JSON]) -> UserError:
    differ = [key for key, value in name.items() if (first or {}).get(key) != value]
    found = f"another {', '.join(differ)}"
    fix = "leave --scores away to compute them again"
    return UserError("data/other-scores", "the scores belong to another run", where=visible(path), found=found, fix=fix)


def _from_line(values: dict[str, JSON]) -> RowScore:
    state = values.get("state")
    decoded = np.frombuffer(base64.b64decode(state), np.float16) if isinstance(state, str) else None
    return RowScore(
        row=int(str(values["index"])),
        tokens=int(str(values["tokens"])),
        targets=int(str(values["targets"])),
        loss=_number(values["loss"]),
        loss_alone=_number(values["loss_alone"]),
        reason=str(values.get("reason", "")),
        state=decoded,
    )


def _number(value: JSON) -> float | None:
    return float(value) if isinstance(value, int | float) else None


class ScoreLog:
    """A file that scores are added to as they come; opened again, it goes on."""

    def __init__(self, path: Path, name: Mapping[str, JSON]) -> None:
        self.path = path
        self.done = read_scores(path, name, strict=False)
        head = json.dumps(dict(name)).encode() + b"\n"
        make_folder(path.absolute().parent)
        # Written anew: a broken last line must not stay in the middle.
        replace_durably(path, [head, *(to_line(score, 0) for score in self.done.values())])
        self._file = path.open("ab")

    def add(self, scores: list[RowScore]) -> None:
        """Append scores, and hand them to the operating system."""
        self.done.update((score.row, score) for score in scores)
        self._file.write(b"".join(to_line(score, 0) for score in scores))
        self._file.flush()

    def close(self) -> None:
        """Keep the file for the next time."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete it: the finished file is there."""
        self.close()
        self.path.unlink()
