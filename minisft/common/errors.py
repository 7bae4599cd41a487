"""One shape for every message that a user's own input can cause.

An error says what is wrong, where, what was found, what was expected and how to fix it, in that order, on one line. Its
code is ``family/slug``; the family decides the exception's class and the exit status of the command line:
``UserError("data/...")`` is a ``DataError``. Nothing here prints or exits.
"""

from __future__ import annotations

import difflib
import functools
import unicodedata
from collections.abc import Callable, Iterable

_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(ValueError):
    """Bad input from outside: a file, a flag, a model. ``str(error)`` is the whole message.

    Calling this class makes an exception of the family's own class, so that a caller can catch one family or all.

    Args:
        code: ``family/slug``, for instance ``data/bad-json``; the family is a key of ``FAMILIES``.
        what: what is wrong, in a few words.
        where: file and line, byte, tensor or flag.
        found: the offending value.
        expected: what would have been right.
        fix: what to do, a command where there is one.
    """

    exit_code = 1
    reported: bool | None = None  # in a run of several processes: another one prints it (True), this one does (False)

    def __new__(cls, code: str, *_: object, **__: object) -> UserError:
        """An exception of the class that the code's family has."""
        return super().__new__(FAMILIES[code.split("/", 1)[0]], code)

    def __init__(self, code: str, what: str, *, where: str = "", found: str = "", expected: str = "", fix: str = "") -> None:
        self.code = code
        self._call = functools.partial(UserError, code, what, where=where, found=found, expected=expected, fix=fix)
        head = f"error[{code}] {what}" + (f": {where}" if where else "")
        labelled = [f"{label} {text}" for label, text in (("found", found), ("expected", expected)) if text]
        if fix:
            labelled.append(f"fix: {fix}")
        super().__init__("; ".join([head, *labelled]))

    def at(self, where: str) -> UserError:
        """The same error with ``where`` (a file and line) before the position that it names already."""
        given = self._call.keywords
        return UserError(*self._call.args, **{**given, "where": ": ".join(filter(None, (where, given["where"])))})

    def parts(self) -> dict[str, str]:
        """What the error is made of: ``UserError(**parts)`` is the same one in another process."""
        code, what = self._call.args
        return {"code": code, "what": what, **self._call.keywords}

    def __reduce__(self) -> tuple[Callable[[], UserError], tuple[()]]:
        """How a copy is made, in this process or in another one."""
        return self._call, ()


class ConfigError(UserError):
    """A flag, a setting or a combination of them: ``config/...``, exit status 2."""

    exit_code = 2


class DataError(UserError):
    """Rows: ``data/...``, exit status 3."""

    exit_code = 3


class ModelError(UserError):
    """A model's files: ``model/...``, exit status 4."""

    exit_code = 4


class AdapterError(UserError):
    """An adapter's files: ``adapter/...``, exit status 4."""

    exit_code = 4


class TokenizerError(UserError):
    """A tokenizer or chat template: ``tokenizer/...``, exit status 4."""

    exit_code = 4


class CheckpointError(UserError):
    """A run's folder: ``checkpoint/...``, exit status 5."""

    exit_code = 5


class NumericError(UserError):
    """Numbers that are not finite, or not what they are said to be: ``numeric/...``, exit status 6."""

    exit_code = 6


class ResourceError(UserError):
    """Full memory, a full disk, a process that is gone: ``memory/...``, ``disk/...``, ``process/...``, exit status 7."""

    exit_code = 7


FAMILIES: dict[str, type[UserError]] = {
    "config": ConfigError,
    "data": DataError,
    "model": ModelError,
    "adapter": AdapterError,
    "tokenizer": TokenizerError,
    "checkpoint": CheckpointError,
    "numeric": NumericError,
    "memory": ResourceError,
    "disk": ResourceError,
    "process": ResourceError,
}


def visible(text: object, limit: int = 200) -> str:
    r"""``text`` made safe for a terminal: control, escape and bidirectional characters become ``\xNN`` or ``\uNNNN``.

    Every string that comes from a file (data, tensor names, paths) passes through here before it is shown.
    """
    shown = str(text)
    if len(shown) > limit:
        shown = shown[:limit] + "…"
    return "".join(_visible_character(c) for c in shown)


def _visible_character(character: str) -> str:
    if character not in _BIDI_CONTROLS and unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    point = ord(character)
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"


def listing(names: Iterable[str], limit: int = 12) -> str:
    """A readable list of names, cut after ``limit``."""
    shown = [visible(name, 80) for name in names]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "") if shown else "none"


def nearest(word: str, options: Iterable[str]) -> str:
    """``did you mean X?`` for the closest option, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
