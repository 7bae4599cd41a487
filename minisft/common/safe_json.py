"""Strict JSON for text that somebody else wrote.

The standard reader accepts NaN, silently keeps the last of two equal keys, recurses until Python gives up and lets lone
surrogates through to fail later. Here each of these is a ``ValueError`` at the place where it happens; callers add file
and line.
"""

from __future__ import annotations

import json
import math
import os
from typing import BinaryIO

# What a JSON document can hold. (``object`` values are narrowed by the readers.)
JSON = dict[str, "JSON"] | list["JSON"] | str | int | float | bool | None

MAX_DEPTH = 64
MAX_DIGITS = 400


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """What a regular file holds; of one beyond ``limit`` bytes ``limit + 1``, which tells that it is too large.

    Reading sets aside as many bytes as it is asked for, whatever is there: so no more than the file has are asked for.
    """
    return file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)


def _no_duplicates(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None
        raise ValueError(f"duplicate key {twice!r}")
    return result


def _refuse_constant(text: str) -> JSON:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is too large")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"integer of {len(text)} digits; at most {MAX_DIGITS}")
    return int(text)


def _check_depth(text: str) -> None:
    depth = deepest = 0
    in_string = escaped = False
    for c in text:
        if in_string:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                in_string = False
        elif c == '"':
            in_string = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    if deepest > MAX_DEPTH:
        raise ValueError(f"nested {deepest} deep; at most {MAX_DEPTH}")


def loads(text: str | bytes) -> JSON:
    """Parse one JSON document.

    Raises:
        ValueError: not UTF-8, not JSON (``json.JSONDecodeError``, with line and column), NaN or infinity, a duplicate
            key, a lone surrogate, deeper than 64 levels, an integer of more than 400 digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count("[") + text.count("{") > MAX_DEPTH:  # only then can it be too deep: the walk below is slow
        _check_depth(text)
    value: JSON = json.loads(
        text,
        object_pairs_hook=_no_duplicates,
        parse_constant=_refuse_constant,
        parse_float=_finite_float,
        parse_int=_bounded_int,
    )
    if "\\u" in text or not text.isascii():
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: JSON) -> None:
    stack: list[JSON] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"lone surrogate \\u{ord(item[error.start]):04x} in a string") from None
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
