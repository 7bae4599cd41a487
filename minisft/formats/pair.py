"""Two models of one shape, such as a base and a fine-tune of it, opened together and read a piece at a time.

They may be stored in different ways (a GGUF file and a folder). What is refused: another shape, other tensors, a head that one
ties to its embedding and the other does not, settings under which the same numbers would be another function.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from minisft.common.errors import UserError, listing, visible
from minisft.formats.lazy_weights import StoredModel, open_model
from minisft.formats.loading import empty_model, expected_shapes
from minisft.formats.source import resolve

_NO_FUNCTION = ("max_position_embeddings",)  # says how far a model may be trusted, not what it computes
_NAMES = ("first", "second")


def open_pair(a: str | Path, b: str | Path) -> tuple[StoredModel, StoredModel]:
    """Open two models and check that they are of one shape.

    Args:
        a, b: folders, GGUF files, hub ids or names.

    Returns:
        both, with no weight in memory.

    Raises:
        UserError: what opening raises; ``model/tied-differs``, ``model/other-tensors``, ``model/other-shape`` or
            ``model/other-settings``.
    """
    first, second = open_model(resolve(a)), open_model(resolve(b))
    where = f"{visible(a)} and {visible(b)}"
    _check_tied(first, second, where)
    _check_tensors(first, second, where)
    for field in dataclasses.fields(first.config):
        values = getattr(first.config, field.name), getattr(second.config, field.name)
        if field.name not in _NO_FUNCTION and values[0] != values[1]:
            raise UserError(
                "model/other-settings", "the two models compute differently from the same weights", where=where,
                found=f"{field.name} {visible(values[0])} and {visible(values[1])}", fix="give a model and a fine-tune of it",
            )  # fmt: skip
    return first, second


def _check_tied(first: StoredModel, second: StoredModel, where: str) -> None:
    tied = [model.config.tie_word_embeddings for model in (first, second)]
    if tied[0] != tied[1]:
        words = ["tied" if each else "a weight of its own" for each in tied]
        raise UserError(
            "model/tied-differs", "one model ties its output head to the embedding, the other does not", where=where,
            found=" and ".join(words), fix="save both tied, or both with a head of their own",
        )  # fmt: skip


def _check_tensors(first: StoredModel, second: StoredModel, where: str) -> None:
    shapes = [expected_shapes(empty_model(model.config)) for model in (first, second)]
    only = {name: sorted(own.keys() - other.keys()) for name, own, other in zip(_NAMES, shapes, reversed(shapes), strict=True)}
    if any(only.values()):
        raise UserError(
            "model/other-tensors", "the two models do not have the same tensors", where=where,
            found="; ".join(f"only in the {name}: {listing(names, 3)}" for name, names in only.items() if names),
            fix="give a model and a fine-tune of it",
        )  # fmt: skip
    for name, shape in shapes[0].items():
        if shapes[1][name] != shape:
            raise UserError(
                "model/other-shape", f"tensor {visible(name)} has two shapes", where=where,
                found=f"{list(shape)} and {list(shapes[1][name])}", fix="give a model and a fine-tune of it",
            )  # fmt: skip
