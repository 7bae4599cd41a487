"""Rows that are token ids already: ``input_ids`` and ``labels``, as other programs write them.

A label is the token's own id, or -100 where it is context; the shift by one happens in ``batching``. It refuses labels that are
shifted already, padding, and ids that are none.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.data.json_rows import json_type

CONTEXT = -100  # the label of a token that is no target


@dataclass(frozen=True)
class GivenTokens:
    """A row's ids, and which of them are targets; the first never is, since nothing predicts it."""

    input_ids: tuple[int, ...]
    supervised: tuple[bool, ...]

    def check_vocabulary(self, size: int, where: str) -> None:
        """Every id has a token.

        Raises:
            UserError: ``data/token-range``.
        """
        bad = next((i for i, token in enumerate(self.input_ids) if token >= size), None)
        if bad is not None:
            raise UserError(
                "data/token-range", "there is no such token", where=where, found=f"input_ids[{bad}] = {self.input_ids[bad]}",
                expected=f"ids below {size}", fix="the ids belong to another tokenizer: give the model that they were made for",
            )  # fmt: skip


def read_tokens(input_ids: JSON, labels: JSON, attention_mask: JSON, where: str) -> GivenTokens:
    """The row's lists, checked against each other.

    Args:
        input_ids: ids.
        labels: of each, the id again or -100.
        attention_mask: None, or 1 for each.
        where: file and line, for errors.

    Returns:
        The tokens.

    Raises:
        UserError: ``data/bad-tokens``.
    """
    ids, targets = _integers(input_ids, "input_ids", where), _integers(labels, "labels", where)
    if len(ids) != len(targets) or not ids:
        raise _bad("the lists do not fit", where, f"{len(ids)} ids, {len(targets)} labels", "as many labels as ids, and some")
    if negative := [token for token in ids if token < 0]:
        raise _bad("an id is negative", where, f"input_ids holds {negative[0]}", "ids from 0 on; -100 stands in labels alone")
    if attention_mask is not None and _integers(attention_mask, "attention_mask", where) != [1] * len(ids):
        raise _bad(
            "the row is padded, or another mask is meant", where, "an attention_mask that is not all 1", "rows as they are"
        )
    wrong = [i for i, (token, target) in enumerate(zip(ids, targets, strict=True)) if target not in (CONTEXT, token)]
    if wrong:
        first = wrong[0]
        shifted = all(i + 1 < len(ids) and targets[i] == ids[i + 1] for i in wrong)
        raise _bad(
            "a label is another token than the one at its place", where,
            f"labels[{first}] = {targets[first]}, input_ids[{first}] = {ids[first]}", f"{ids[first]} or {CONTEXT}",
            "the labels look shifted by one: write them unshifted, the shift happens in training" if shifted else "",
        )  # fmt: skip
    return GivenTokens(tuple(ids), (False, *(target != CONTEXT for target in targets[1:])))


def _integers(value: JSON, name: str, where: str) -> list[int]:
    if not isinstance(value, list):
        raise _bad(f"{name} is no list", where, json_type(value), "a list of integers")
    found: list[int] = []
    for i, item in enumerate(value):
        if not isinstance(item, int) or isinstance(item, bool):
            raise _bad(f"{name} holds what is no integer", where, f"{name}[{i}] = {visible(item, 40)}", "integers")
        found.append(item)
    return found


def _bad(what: str, where: str, found: str, expected: str, fix: str = "") -> UserError:
    return UserError(
        "data/bad-tokens", what, where=where, found=found, expected=expected, fix=fix or "correct the row, or drop it"
    )
