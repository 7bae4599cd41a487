"""Settings as dataclasses: a field is a flag of a command, a key of a TOML file and an argument in Python, checked alike.

A field says its help and which numbers it may have (``flag``); its type is its annotation. Values from outside are loose:
``config_of`` checks names and types, ``check_fields`` the values, whoever makes the settings. Nothing is converted but an
integer to a float, and an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minisft.common.checks import require
from minisft.common.errors import UserError, listing, nearest, visible


class _Dataclass(typing.Protocol):
    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[typing.Any]]]


Config = typing.TypeVar("Config", bound=_Dataclass)


@dataclass(frozen=True)
class Allowed:
    """Which numbers a setting may have, and these in words."""

    holds: Callable[[float], bool]
    expected: str


AT_LEAST_1 = Allowed(lambda value: value >= 1, "at least 1")
POSITIVE = Allowed(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Allowed(lambda value: 0 <= value < math.inf, "zero or more")
BELOW_1 = Allowed(lambda value: 0 <= value < 1, "a share in [0, 1)")


def flag(
    help_text: str,
    default: object = dataclasses.MISSING,
    metavar: str | None = None,
    allowed: Allowed | None = None,
    fix: str = "",
) -> typing.Any:
    """A field of a run's settings that is a flag of its command too.

    Args:
        help_text: what ``--help`` prints.
        default: its default; without one the flag must be given.
        metavar: what stands for the value in ``--help``.
        allowed: which numbers it may have; None (the value) is always allowed.
        fix: what to do about another number.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "allowed": allowed, "fix": fix})


def check_fields(config: _Dataclass) -> None:
    """Refuse a choice that is none, and a number that its field does not allow.

    A field that a subclass defines again is held to both: it can narrow what is allowed, never widen it.

    Raises:
        UserError: ``config/bad-value``.
    """
    for kind in filter(dataclasses.is_dataclass, reversed(type(config).__mro__)):
        for name, choices in _choices(kind).items():
            require(getattr(config, name) in choices, flag_name(name), getattr(config, name), " or ".join(choices))
        for each in dataclasses.fields(kind):
            value, allowed = getattr(config, each.name), each.metadata.get("allowed")
            if allowed is not None and value is not None:
                require(allowed.holds(value), flag_name(each.name), value, allowed.expected, each.metadata["fix"])


def flag_name(field_name: str) -> str:
    """The command-line flag of a field: ``--micro-batch-size`` for ``micro_batch_size``."""
    return "--" + field_name.replace("_", "-")


@functools.cache
def _hints(kind: typing.Any) -> dict[str, typing.Any]:
    return typing.get_type_hints(kind)


def _choices(kind: typing.Any) -> dict[str, tuple[str, ...]]:
    return {name: typing.get_args(hint) for name, hint in _hints(kind).items() if typing.get_origin(hint) is Literal}


def field_type(name: str, of: typing.Any) -> tuple[type, bool, tuple[str, ...]]:
    """What a field of a run's settings holds: (element type, is it a tuple, its choices)."""
    hint = _hints(of)[name]
    if typing.get_origin(hint) is Literal:
        return str, False, typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        hint = next((part for part in parts if typing.get_origin(part) is tuple), parts[0])  # one or several: several
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, ()
    return hint, False, ()


def config_of(kind: type[Config], values: dict[str, object], where: str = "settings") -> Config:
    """Build a run's settings from loose values (TOML, JSON, flags), checking names and types.

    Args:
        kind: ``RunConfig``, or the settings of another kind of run.
        values: field -> value; a field may be written with dashes.
        where: where the values come from, for errors.

    Returns:
        The settings.

    Raises:
        UserError: unknown key (names the nearest), missing key, wrong type or value.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    checked: dict[str, typing.Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(
                "config/unknown-key",
                "unknown setting",
                where=f"{where}: {visible(key)}",
                fix=nearest(name, known) or f"known: {listing(known, 60)}",
            )
        checked[name] = _typed(name, value, where, kind)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in checked]
    if missing:
        raise UserError(
            "config/missing",
            "a required setting is missing",
            where=where,
            expected=", ".join(map(flag_name, missing)),
            fix="give it as a flag, or as a key of --config",
        )
    return kind(**checked)


def _typed(name: str, value: object, where: str, of: typing.Any) -> object:
    kind, is_tuple, _ = field_type(name, of)
    if value is None and types.NoneType in typing.get_args(_hints(of)[name]):
        return None
    hint = _hints(of)[name]
    if is_tuple and isinstance(hint, types.UnionType) and kind in typing.get_args(hint) and isinstance(value, kind):
        return value  # one, where several may stand
    if is_tuple and isinstance(value, (list, tuple)) and all(isinstance(v, kind) for v in value):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    if not is_tuple and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = f"a list of {kind.__name__}" if is_tuple else kind.__name__
    raise UserError(
        "config/bad-type",
        "a setting has the wrong type",
        where=f"{where}: {name}",
        found=visible(repr(value)),
        expected=expected,
        fix=f"minisft train --help explains {flag_name(name)}",
    )


def read_toml(path: Path) -> dict[str, object]:
    """The flat ``key = value`` table of a ``--config`` file."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "config/no-file",
            "cannot read the settings",
            where=visible(path),
            found=error.strerror or str(error),
            fix="name a TOML file that can be read",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: nested a thousand deep
        raise UserError(
            "config/bad-toml",
            "the settings are not TOML",
            where=visible(path),
            found=visible(error),
            fix="write one key = value a line",
        ) from None
    for key, value in document.items():
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            found, fix = f"U+0000 in {visible(key)}", "take the character out"
            raise UserError("config/bad-toml", "no setting holds this character", where=visible(path), found=found, fix=fix)
    return document
