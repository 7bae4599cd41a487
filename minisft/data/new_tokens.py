"""Tokens that a run adds to its tokenizer: the file of ``--add-tokens``, and the tokenizer that knows them.

One token a line, UTF-8; or, in a file that ends in ``.json``, a list of texts and of objects with ``content`` and ``special``.
A plain token is one id wherever its text stands, in the rows too, and is shown in answers. A special one is a control token:
one id where the chat template writes it, ordinary characters where the rows spell it out, hidden in answers, and the end of an
answer if the template closes answers with it. Refused are texts that nobody means: empty ones, control characters, white space
at an end, the same twice. Texts that are one token already are passed over and reported. The one idea: what is one token is
said by a list, never guessed.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.data.tokenizer import Tokenizer

MAX_BYTES, MAX_TOKENS, MAX_CHARACTERS = 2**24, 2**16, 200


@dataclass(frozen=True)
class NewToken:
    """The text of a token, and whether it is a control token."""

    content: str
    special: bool = False


def read_tokens(path: str | Path) -> tuple[NewToken, ...]:
    """Read the file of ``--add-tokens``.

    Args:
        path: of the file; its suffix decides its form.

    Returns:
        At least one token, in the file's order. Empty lines are passed over.

    Raises:
        UserError: ``data/tokens``, with the line (in JSON the entry, from 1).
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() == ".json":
        entries = [(i, _entry(value, path, i)) for i, value in enumerate(_list(text, path), 1)]
    else:
        lines = text.removeprefix("\ufeff").split("\n")
        entries = [(i, NewToken(line.removesuffix("\r"))) for i, line in enumerate(lines, 1) if line.removesuffix("\r")]
    first: dict[str, int] = {}
    for i, token in entries:
        _check(token.content, path, i)
        if token.content in first:
            found = f"{visible(token.content)}, as in {first[token.content]}"
            raise _error("a token stands twice in the file", path, i, found, "each token once", "take one of them out")
        first[token.content] = i
    if not 1 <= len(entries) <= MAX_TOKENS:
        fix = "write one token a line; for text of a whole domain train a tokenizer"
        raise _error("no tokens, or too many", path, None, f"{len(entries):,}", f"1 to {MAX_TOKENS:,} tokens", fix)
    return tuple(token for _, token in entries)


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[NewToken], where: str = "") -> tuple[Tokenizer, tuple[str, ...]]:
    """A tokenizer that knows these tokens too; ``tokenizer`` stays as it is.

    New ids follow the highest one, in the order of ``tokens``; old ids stay. ``new_ids`` of the result are theirs.

    Args:
        tokenizer: of the base.
        tokens: what to add.
        where: the file, for messages.

    Returns:
        The new tokenizer, and notes on what was passed over.

    Raises:
        UserError: ``tokenizer/no-new-token`` when all of them are one token already; ``tokenizer/taken`` for a text under which
            the vocabulary keeps something else.
    """
    known, new = list[NewToken](), list[NewToken]()
    for token in tokens:
        (known if len(tokenizer.encode(token.content, control=True)) == 1 else new).append(token)
    shown = listing((visible(token.content) for token in known), 6)
    if not new:
        raise UserError(
            "tokenizer/no-new-token", "every token of the file is one token already", where=where, found=shown,
            expected="a new one", fix="leave --add-tokens away; --targets with embed_tokens and lm_head trains what is there",
        )  # fmt: skip
    extended = tokenizer.extended([AddedToken(t.content, special=t.special, normalized=False) for t in new])
    if len(extended.new_ids) != len(new) or any(
        extended.encode(t.content, control=True) != [i] for t, i in zip(new, extended.new_ids, strict=True)
    ):
        raise UserError(
            "tokenizer/taken", "the vocabulary cannot take these tokens under ids of their own", where=where,
            found=listing((visible(token.content) for token in new), 6), expected="texts that no entry of the vocabulary has",
            fix="write them otherwise, with characters that plain text has",
        )  # fmt: skip
    notes = [f"{len(new)} new tokens: {listing((visible(token.content) for token in new), 6)}"]
    if known:
        notes.append(f"{len(known)} of {len(tokens)} tokens are one token already and stay as they are: {shown}")
    return extended, tuple(notes)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _error(
                "the file is too large", path, None, f"over {MAX_BYTES:,} bytes", "a list of tokens", "give a shorter list"
            )
        return raw.decode("utf-8")
    except OSError as error:
        fix = "name a file with one token a line"
        raise _error("cannot read the file of tokens", path, None, error.strerror or str(error), "", fix) from None
    except UnicodeDecodeError as error:
        raise _error("the file is not UTF-8", path, None, visible(error), "UTF-8", "save it as UTF-8") from None


def _list(text: str, path: Path) -> list[safe_json.JSON]:
    try:
        value = safe_json.loads(text)
    except ValueError as error:
        raise _error(
            "the file is not JSON", path, None, visible(error), "a list", "correct it, or write one token a line"
        ) from None
    if not isinstance(value, list):
        raise _error("the file is no list", path, None, type(value).__name__, "a list of tokens", 'write ["<a>", "<b>"]')
    return value


def _entry(value: safe_json.JSON, path: Path, i: int) -> NewToken:
    if isinstance(value, str):
        return NewToken(value)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value.keys() <= {"content", "special"}:
        special = value.get("special", False)
        if isinstance(special, bool):
            return NewToken(str(value["content"]), special)
    expected = 'a text, or {"content": text, "special": true or false}'
    raise _error("an entry is no token", path, i, visible(json.dumps(value), 100), expected, "correct it")


def _check(content: str, path: Path, i: int) -> None:
    faults = {
        "no text": not content,
        "white space at an end": content != content.strip(),
        "a control character": any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") for c in content),
        f"{len(content)} characters": len(content) > MAX_CHARACTERS,
    }
    for what, is_so in faults.items():
        if is_so:
            expected = f"1 to {MAX_CHARACTERS} printable characters, none of them white space at an end"
            raise _error(f"a token has {what}", path, i, visible(repr(content), 100), expected, "correct it, or take it out")


def _error(what: str, path: Path, i: int | None, found: str, expected: str, fix: str) -> UserError:
    place = f"--add-tokens {visible(path)}" + ("" if i is None else f":{i}")
    return UserError("data/tokens", what, where=place, found=found, expected=expected, fix=fix)
