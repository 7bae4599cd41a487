"""Several data files read as one set of rows, and the rows of an epoch that each of them gives.

Without weights the files are one after the other, as ``cat`` would join them: exact copies are dropped across files too. With
weights each file is a source of its own, copies between files stay, and a weight is a share of the ROWS of an epoch. An epoch
has as many rows as there are to train on in all files together; of these, a file with share w / sum(w) gives that share. A
file that has more rows gives others in the next epoch; one that has fewer is passed over several times.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.examples import Example
from minisft.data.messages import Dataset, read_dataset
from minisft.data.sources import Source


@dataclass(frozen=True)
class FileRows:
    """One of the files: ``last`` is the number of its last row, counted on from the files before it."""

    source: Source
    sha256: str
    last: int


def read_sources(
    sources: Sequence[Source], mapping: Sequence[str] = (), allow_tokens: bool = False
) -> tuple[Dataset, tuple[FileRows, ...]]:
    """Read all files.

    Args:
        sources: the files, in order.
        mapping: ``FIELD=COLUMN`` pairs, for all of them.
        allow_tokens: accept rows of token ids, which have no text.

    Returns:
        The rows of all as one data set, numbered on from file to file, and what is known of each file.

    Raises:
        UserError: ``data/...`` with file and line.
    """
    read = [read_dataset(source.path, mapping, allow_tokens=allow_tokens) for source in sources]
    if len(read) == 1:
        return read[0], (FileRows(sources[0], read[0].sha256, read[0].examples[-1].row),)
    examples: list[Example] = []
    files: list[FileRows] = []
    seen: set[object] = set()
    copies = base = 0
    for source, dataset in zip(sources, read, strict=True):
        for example in dataset.examples:
            identity = example.identity
            if source.weight is None and identity in seen:
                copies += 1
                continue
            seen.add(identity)
            examples.append(replace(example, row=example.row + base))
        base += dataset.examples[-1].row
        files.append(FileRows(source, dataset.sha256, base))
    counts = Counter[str]()
    for dataset in read:
        counts.update(dataset.counts)
    counts["duplicates"] += copies
    counts["kept"] = len(examples)
    notes = [f"{visible(dataset.path)}: {note}" for dataset in read for note in dataset.notes]
    notes += [f"dropped {copies} rows: exact duplicates of rows in an earlier file"] if copies else []
    return Dataset(
        examples=tuple(examples),
        form=", ".join(dict.fromkeys(dataset.form for dataset in read)),
        path=shown(sources),
        sha256=hashlib.sha256("\n".join(file.sha256 for file in files).encode()).hexdigest(),
        counts=dict(counts),
        notes=tuple(notes),
    ), tuple(files)


def shown(sources: Sequence[Source]) -> str:
    """The names of the files as one text."""
    return " + ".join(source.path for source in sources)


def shares(sources: Sequence[Source]) -> list[float] | None:
    """The part of an epoch that each file gives; None without weights, and for a single file."""
    weights = [source.weight for source in sources if source.weight is not None]
    return [weight / sum(weights) for weight in weights] if len(weights) > 1 else None


def rows_of_epoch(sources: Sequence[Source], there: Sequence[int]) -> list[int]:
    """How many rows each file gives to an epoch: its share of all rows, rounded so that they add up (largest remainder).

    Args:
        sources: the files, with weights.
        there: rows to train on in each.

    Returns:
        rows in an epoch; their sum is that of ``there``.

    Raises:
        UserError: ``data/no-rows`` for a file that has none; ``config/bad-weight`` for a share below one row.
    """
    total = sum(there)
    wanted = [share * total for share in shares(sources) or [1.0]]
    given = [int(number) for number in wanted]
    behind = sorted(range(len(wanted)), key=lambda i: (given[i] - wanted[i], i))
    for i in behind[: total - sum(given)]:
        given[i] += 1
    for source, rows, drawn in zip(sources, there, given, strict=True):
        if not rows:
            fix = "leave it out, or look at it: minisft inspect"
            raise UserError("data/no-rows", "no row of this file is left to train on", where=visible(source.path), fix=fix)
        if not drawn:
            where, found = f"--data {visible(source.path)}", f"{source.weight:g}, less than one of {total} rows"
            fix = "give it a larger weight, or leave it out"
            raise UserError("config/bad-weight", "the weight gives no row of an epoch", where=where, found=found, fix=fix)
    return given


def described(sources: Sequence[Source], there: Sequence[int], drawn: Sequence[int] | None) -> list[dict[str, JSON]]:
    """What each file gives, for ``data.json``.

    Args:
        sources: the files.
        there: rows to train on in each.
        drawn: rows in an epoch of each; None without weights, when each gives all it has.

    Returns:
        an object for each file.
    """
    facts: list[dict[str, JSON]] = []
    for i, source in enumerate(sources):
        fact: dict[str, JSON] = {"path": source.path, "rows": there[i]}
        if drawn is not None:
            fact |= {"weight": source.weight, "rows_in_an_epoch": drawn[i], "passes_in_an_epoch": round(drawn[i] / there[i], 4)}
        facts.append(fact)
    return facts
