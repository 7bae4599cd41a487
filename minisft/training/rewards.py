"""Rewards that a program can check: an answer and its row go in, one number comes out.

``exact_match`` and ``json`` compare with the row's own answer, ``regex:PATTERN`` looks at the answer alone, and
``FILE.py:function`` runs the user's function. A file is run only because the command line names it, never because a data or
model folder does. The whole answer is judged, never a part of it that the model could choose: training finds every answer that
is wrong and paid all the same.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.evaluation.metrics import exact_match, json_match
from minisft.formats.source import file_sha256

RewardFunction = Callable[[str, Mapping[str, JSON]], float | None]
REFERENCE = "reference"  # the key of a row under which its own answer stands
EXPECTED = "exact_match, json, regex:PATTERN or FILE.py:function"


@dataclass(frozen=True)
class Reward:
    """A named reward: ``function(answer, row)`` gives a number, or None for no opinion.

    ``needs_reference`` says that it reads the row's own answer, ``reads_row`` that it may look at the row at all, ``identity``
    what it is whatever its file is called; None for its name.
    """

    name: str
    function: RewardFunction
    needs_reference: bool = False
    reads_row: bool = True
    identity: str | None = None

    def score(self, answer: str, row: Mapping[str, JSON], where: str) -> float:
        """The reward of one answer; nan where there is none (None, or a number that is not finite).

        Args:
            answer: the model's text, without the end token.
            row: the row's columns, and its own answer as ``reference``.
            where: file and line of the row, for errors.

        Returns:
            A finite number or nan.

        Raises:
            UserError: ``data/reward`` when the function fails or returns something else; the answer is quoted.
        """
        try:
            value = self.function(answer, row)
        except (Exception, SystemExit) as error:  # whatever the user's function raises is their error, and the answer shows why
            raise self._bad(where, f"{type(error).__name__}: {error}", answer) from error
        if value is None:
            return math.nan
        if not isinstance(value, (int, float)):  # True and False are 1 and 0
            raise self._bad(where, f"{type(value).__name__} {value!r}", answer)
        try:
            number = float(value)
        except OverflowError:
            raise self._bad(where, "an integer beyond the range of floats", answer) from None
        return number if math.isfinite(number) else math.nan

    def _bad(self, where: str, found: str, answer: str) -> UserError:
        return UserError(
            "data/reward",
            f"the reward {visible(self.name, 80)} failed",
            where=where,
            found=f"{visible(found, 200)} for the answer {visible(repr(answer), 200)}",
            expected="a number, or None for no opinion",
            fix="make the function answer every text, or leave the row out",
        )


def load_reward(spec: str) -> Reward:
    """The reward that ``--reward`` names.

    Raises:
        UserError: ``config/bad-reward``: an unknown name, a bad pattern, a file or function that cannot be used.
    """
    if spec == "exact_match":
        return Reward(spec, _exact, needs_reference=True)
    if spec == "json":
        return Reward(spec, _json, needs_reference=True)
    if spec.startswith("regex:"):
        return Reward(spec, _matcher(spec.removeprefix("regex:")), reads_row=False)
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        function = _from_file(Path(path), name)
        return Reward(spec, function, identity=f"{visible(name)} of a file with sha256 {file_sha256(Path(path))}")
    raise _bad_reward("there is no such reward", spec, EXPECTED)


def _bad_reward(what: str, found: str, expected: str) -> UserError:
    return UserError(
        "config/bad-reward", what, where="--reward", found=visible(found), expected=expected, fix=f"give {EXPECTED}"
    )


def _exact(answer: str, row: Mapping[str, JSON]) -> float:
    """1.0 if the whole answer is the reference, spaces around it and Unicode composition aside."""
    return exact_match(unicodedata.normalize("NFC", answer), unicodedata.normalize("NFC", str(row[REFERENCE])))


def _json(answer: str, row: Mapping[str, JSON]) -> float:
    """1.0 if the whole answer is one JSON document (a single code fence around it is allowed) of the reference's value."""
    return json_match(answer, str(row[REFERENCE]))


def _matcher(pattern: str) -> RewardFunction:
    """1.0 if ``pattern`` matches the whole answer, spaces around it aside; ``(?s).*`` around it looks anywhere."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise _bad_reward("the pattern is no regular expression", f"{pattern}: {error}", "a Python pattern") from None
    return lambda answer, row: float(compiled.fullmatch(answer.strip()) is not None)


def _from_file(path: Path, name: str) -> RewardFunction:
    where = f"{path}:{name}"
    spec = importlib.util.spec_from_file_location("minisft_reward", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise _bad_reward("the reward's file cannot be read", where, "a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise _bad_reward("the reward's file fails", f"{path}: {type(error).__name__}: {error}", "a file that runs") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise _bad_reward("the file has no such function", where, "def reward(answer: str, row: dict) -> float")
    try:
        inspect.signature(function).bind("", {})
    except (TypeError, ValueError):
        raise _bad_reward("the function takes other arguments", where, "def reward(answer: str, row: dict) -> float") from None
    return function
