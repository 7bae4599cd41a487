"""Columns of a row: which of the user's columns is which field, and text that must be text."""

from __future__ import annotations

from collections.abc import Sequence

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.json_rows import json_type


def parse_mapping(mapping: Sequence[str], fields: Sequence[str], example: str) -> dict[str, str]:
    """Field -> column, each field's own name unless ``--map FIELD=COLUMN`` says otherwise.

    Args:
        mapping: ``FIELD=COLUMN`` entries.
        fields: the fields there are.
        example: a mapping that makes sense here, for the error's fix.

    Returns:
        A column for each of ``fields``.

    Raises:
        UserError: ``config/bad-map``.
    """
    columns = {name: name for name in fields}
    for entry in mapping:
        name, separator, column = entry.partition("=")
        if not (separator and column and name in fields):
            raise UserError(
                "config/bad-map", "--map needs FIELD=COLUMN", found=visible(entry), expected=f"FIELD one of {listing(fields)}",
                fix=f"for instance --map {example}",
            )  # fmt: skip
        columns[name] = column
    return columns


def require_text(value: JSON, where: str) -> str:
    """``value`` if it is a string.

    Raises:
        UserError: ``data/content-type``.
    """
    if not isinstance(value, str):
        raise UserError(
            "data/content-type", "the content is not text", where=where, found=json_type(value), expected="a string",
            fix="give a string, or drop the row",
        )  # fmt: skip
    return value
