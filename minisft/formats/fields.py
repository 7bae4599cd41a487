"""Typed reading of settings that somebody else wrote: JSON objects and GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minisft.common import safe_json
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON

MAX_JSON_BYTES = 2**23  # an adapter that trains all rows of a large vocabulary lists them


@dataclass(frozen=True)
class Fields:
    """The keys of one object, by type. A key at null counts as missing.

    Args:
        values: the object.
        where: the file, and the way to the object in it.
        family: error family, ``model`` or ``adapter``.

    Raises:
        UserError: ``family/bad-config`` for a key that is missing without a default or holds another type.
    """

    values: Mapping[str, object]
    where: str
    family: str = "model"

    def integer(self, name: str, default: int | None = None) -> int:
        """The integer under ``name``; true and false are none."""
        found = self.values.get(name)
        value = default if found is None else found
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The number under ``name``, an integer too, as a float."""
        found = self.values.get(name)
        value = default if found is None else found
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(name, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.error(name, "a number below 1e308") from None

    def flag(self, name: str, default: bool = False) -> bool:
        """The true or false under ``name``."""
        found = self.values.get(name)
        if found is not None and not isinstance(found, bool):
            raise self.error(name, "true or false")
        return default if found is None else found

    def text(self, name: str) -> str:
        """The string under ``name``."""
        found = self.values.get(name)
        if not isinstance(found, str):
            raise self.error(name, "a string")
        return found

    def inner(self, name: str) -> Fields:
        """The object under ``name``; empty when it is missing."""
        found = self.values.get(name)
        if found is not None and not isinstance(found, dict):
            raise self.error(name, "an object")
        return Fields(found or {}, f"{self.where}: {visible(name)}", self.family)

    def error(self, name: str, expected: str, slug: str = "bad-config", fix: str = "") -> UserError:
        """What to raise about the key ``name``.

        Args:
            name: the key.
            expected: what its value should have been.
            slug: ``bad-config``, or ``unsupported`` for a value that means something this library does not compute.
            fix: what to do; by default to correct the value.

        Returns:
            the error, not yet raised.
        """
        found = self.values.get(name)
        what = "missing" if found is None else "not supported" if slug == "unsupported" else "wrong"
        return UserError(
            f"{self.family}/{slug}",
            f"a setting is {what}",
            where=f"{self.where}: {visible(name)}",
            found="" if found is None else visible(repr(found)),
            expected=expected,
            fix=fix or ("" if self.family == "model" else "correct the value, or save the adapter again"),
        )


def read_json_object(path: Path, code: str, limit: int = MAX_JSON_BYTES) -> dict[str, JSON]:
    """Read a small JSON file that must hold one object.

    Args:
        path: of the file.
        code: of the error that is raised.
        limit: bytes; a larger file is refused.

    Returns:
        the object.

    Raises:
        UserError: ``code``, for a file that cannot be read, is too large, not JSON or something else than an object.
    """
    try:
        with path.open("rb") as file:
            raw = safe_json.read_at_most(file, limit)
        value = safe_json.loads(raw) if len(raw) <= limit else None
    except (OSError, ValueError) as error:
        raise UserError(
            code, "cannot read the file", where=visible(path), found=visible(error), expected="one JSON object"
        ) from None
    if not isinstance(value, dict):
        found = f"over {limit} bytes" if len(raw) > limit else type(value).__name__
        raise UserError(code, "the file is not one JSON object", where=visible(path), found=found)
    return value


def write_json(path: Path, value: dict[str, JSON]) -> None:
    """Readable JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
