"""Which modules the settings of an adapter select, by PEFT's rules: targets, less excluded modules, in some layers only.

Which modules really carry factors only the tensors show (``adapter``). Patterns that
come from a file run in a child process first, as they can take for ever.

Ref: PEFT 0.21, ``check_target_module_exists``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.common.sandbox import failure
from minisft.formats.fields import Fields
from minisft.surgery import match_targets, matches

T = TypeVar("T")
_FIRST_NUMBER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # of the outermost list: model.layers.3.experts.0 is in layer 3


@dataclass(frozen=True)
class Narrowing:
    """Settings that take modules out of those that ``target_modules`` names.

    Args:
        excluded: names, each a path or its last parts; or a regular expression that the whole path must match.
        layers: numbers of the layers that stay; None for all.
        lists: regular expressions for the list whose numbers count; empty for the outermost.
    """

    excluded: str | tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    lists: tuple[str, ...] = ()

    @property
    def has_patterns(self) -> bool:
        """Whether using it runs regular expressions from a file."""
        return isinstance(self.excluded, str) or bool(self.lists)

    def keeps(self, path: str, targets: str | tuple[str, ...]) -> bool:
        """Whether the module at ``path`` stays; one that ``targets`` names by its whole path is in every layer (as in PEFT)."""
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, path):
                return False
        elif any(matches(path, name) for name in self.excluded):
            return False
        return self.layers is None or path in targets or self._layer(path) in self.layers

    def _layer(self, path: str) -> int | None:
        for pattern in [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.lists] or [_FIRST_NUMBER]:
            if match := re.match(pattern, path):
                return int(match["idx"])
        return None


def read_narrowing(fields: Fields) -> Narrowing | None:
    """``exclude_modules``, ``layers_to_transform`` and ``layers_pattern``; None where none of them is set.

    Raises:
        UserError: ``adapter/bad-config``, for a value of another type or layers of targets that are a pattern.
    """
    excluded, lists = _names(fields, "exclude_modules"), _names(fields, "layers_pattern")
    found = fields.values.get("layers_to_transform")
    numbers = found if isinstance(found, list) else [] if found is None or found is False else [found]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise fields.error("layers_to_transform", "a layer's number or a list of them")
    if isinstance(fields.values.get("target_modules"), str) and numbers:
        raise fields.error("layers_to_transform", "nothing beside target_modules that are a pattern, as in PEFT")
    if not excluded and not numbers:
        return None
    layers = frozenset(int(str(number)) for number in numbers) or None
    return Narrowing(excluded, layers, (lists,) if isinstance(lists, str) else lists)


def _names(fields: Fields, key: str) -> str | tuple[str, ...]:
    """One pattern, or names; empty where the key is null, false or empty."""
    found = fields.values.get(key) or ()
    if isinstance(found, str):
        return found
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) and name for name in found):
        raise fields.error(key, "a list of names or a regular expression")
    return tuple(str(name) for name in found)


def selected(model: nn.Module, targets: str | tuple[str, ...], narrowing: Narrowing, where: str) -> list[str]:
    """The paths of the modules of ``model`` that ``targets`` names and ``narrowing`` keeps, in the model's order.

    Args:
        model: a base without adapters.
        targets: as in ``LoRAConfig``.
        narrowing: what is taken out.
        where: the file, for messages.

    Returns:
        paths; empty if nothing is left.

    Raises:
        UserError: targets that the model does not have; ``adapter/bad-config`` for patterns that do not work.
    """

    def paths() -> list[str]:
        return [path for path in match_targets(model, targets) if narrowing.keeps(path, targets)]

    return run_patterns(paths, where, narrowing.has_patterns or isinstance(targets, str))


def run_patterns(task: Callable[[], T], where: str, untrusted: bool = True) -> T:
    """What ``task`` returns; where it runs patterns of a file, it runs in a child process first.

    Args:
        task: matches names against patterns.
        where: the file, for messages.
        untrusted: whether the patterns come from a file.

    Returns:
        the result of ``task``.

    Raises:
        UserError: ``adapter/bad-config``, for patterns that fail or take longer than the child may.
    """
    if untrusted and (problem := failure(task)):
        raise UserError(
            "adapter/bad-config",
            "the adapter's patterns do not work on these modules",
            where=where,
            found=visible(problem, 500),
            fix="write the modules' names into target_modules, exclude_modules, rank_pattern and alpha_pattern",
        )
    return task()


def target_names(model: nn.Module, selected: Collection[str]) -> list[JSON] | str:
    """Sorted names that select exactly these modules: last names where they are enough, else whole paths.

    A path can be the end of another one that is not selected; then no list says it, and a regular expression does.
    """
    inside = tuple(f"{path}." for path in selected)
    paths = [path for path, _ in model.named_modules() if not path.startswith(inside)]
    names: set[str] = set()
    for path in selected:
        leaf = path.rsplit(".", 1)[-1]
        names.add(leaf if all(other in selected for other in paths if matches(other, leaf)) else path)
    if {path for path in paths if any(matches(path, name) for name in names)} == set(selected):
        return [*sorted(names)]
    return "|".join(re.escape(path) for path in sorted(selected))
