"""The files that a run learns from: ``rows.jsonl``, or several of them, each with its share of an epoch: ``a.jsonl:0.7``.

A name that is a file is that file, whatever colons it has; otherwise a number behind the last colon is a weight.
``hf:org/name`` is a data set of the hub (``hub_data``), whose configuration can be a number only with a ``#split`` behind it.
It refuses weights that are no positive number, weights for some of the files only, and a file that is named twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, listing, visible
from minisft.data.hub_data import is_hub, parse_hub

_EXAMPLE = "--data a.jsonl:0.7 b.jsonl:0.3"


@dataclass(frozen=True)
class Source:
    """A data file and its weight; None where none is given."""

    path: str
    weight: float | None = None


def parse_sources(data: str | Sequence[str]) -> tuple[Source, ...]:
    """The files of ``--data``.

    Args:
        data: one entry, or several: ``PATH`` or ``PATH:WEIGHT``.

    Returns:
        The files in order; the weights are positive, all there or all None.

    Raises:
        UserError: ``config/no-data``, ``config/bad-weight``, ``config/file-twice``.
    """
    sources = tuple(map(_parse, (data,) if isinstance(data, str) else data))
    if not sources:
        raise UserError("config/no-data", "no data file is named", where="--data", fix=f"for instance {_EXAMPLE}")
    bare = [source.path for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        what, found = "some files have a weight and others have none", f"no weight for {listing(map(visible, bare))}"
        raise UserError("config/bad-weight", what, where="--data", found=found, fix=f"weigh all or none: {_EXAMPLE}")
    real_paths: set[str] = set()
    for source in sources:
        real_path = os.path.realpath(source.path)
        if real_path in real_paths:
            found, fix = visible(source.path), "name it once, with a larger weight if it shall count more"
            raise UserError("config/file-twice", "a data file is named twice", where="--data", found=found, fix=fix)
        real_paths.add(real_path)
    return sources


def _parse(entry: str) -> Source:
    path, colon, number = entry.rpartition(":")
    if is_hub(entry):
        name, weight = (path, _number(number)) if colon and path != "hf" else (entry, None)
        parse_hub(entry if weight is None else name)
        if weight is None:
            return Source(entry)
    elif not (colon and path) or Path(entry).exists():
        return Source(entry)
    try:
        weight = float(number)
    except ValueError:
        if not Path(path).is_file():  # a name with a colon, or a drive's letter: whoever reads it says that it is not there
            return Source(entry)
        raise _bad_weight(entry, number) from None
    if not (math.isfinite(weight) and weight > 0):
        raise _bad_weight(entry, number)
    return Source(path, weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bad_weight(entry: str, number: str) -> UserError:
    return UserError(
        "config/bad-weight", "the weight of a data file is no positive number", where=f"--data {visible(entry)}",
        found=visible(number), expected="a share of the rows, above 0", fix=f"for instance {_EXAMPLE}; or leave the file out",
    )  # fmt: skip
