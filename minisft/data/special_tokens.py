"""Special tokens in data: spelt out by a message, found and hidden while a template renders.

A message may contain ``<|im_end|>``, or halves of it that meet only after rendering. Here one character of each such position
is replaced by a private stand-in before the template runs; what still reads as a special token in the rendered text was
written by the template itself. It decides nothing about tokens and ids. The one idea: mark provenance before the two are
mixed, because afterwards they look the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minisft.data.examples import Message

Span = tuple[int, int]
# Supplementary private use area A: no standard gives these characters a meaning.
_FIRST_STAND_IN = 0xF0000


@dataclass(frozen=True)
class Hidden:
    """Messages with stand-ins, and the way back."""

    messages: tuple[Message, ...]
    originals: dict[int, str]

    def reveal(self, text: str) -> str:
        """``text`` with the original characters; its length stays."""
        return text.translate(self.originals)


class SpecialTokenText:
    """What a tokenizer's special tokens look like as text."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self.tokens = tuple(sorted(tokens, key=len, reverse=True))  # the longest wins, as in the tokenizer
        alternatives = "|".join(map(re.escape, self.tokens)) or r"(?!)"
        self.pattern = re.compile(alternatives)
        self._anywhere = re.compile(f"(?={alternatives})")  # overlapping ones too
        self._heads = frozenset(token[:i] for token in tokens for i in range(1, len(token)))
        self._tails = frozenset(token[i:] for token in tokens for i in range(1, len(token)))
        # Cheap tests that settle most messages; white space inside a token would otherwise be missed.
        self._tail_characters = {c for tail in self._tails for c in tail.lstrip()[:1]}
        self._head_characters = {c for head in self._heads for c in head.rstrip()[-1:]}
        self._longest = max(map(len, tokens), default=0)

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(tokens: tuple[str, ...]) -> SpecialTokenText:
        """The (cached) object for these tokens."""
        return SpecialTokenText(tokens)

    def spans(self, text: str) -> list[Span]:
        """Where special tokens stand in ``text``, leftmost and longest first."""
        return [match.span() for match in self.pattern.finditer(text)]

    def hide(self, messages: Sequence[Message]) -> Hidden | None:
        """Replace one character of each special token, or part of one at an edge, by a stand-in; None if there is none."""
        texts = list(dict.fromkeys(text for m in messages for text in m.texts))
        positions = {text: found for text in texts if (found := self._positions(text))}
        if not positions:
            return None
        originals = {text[at] for text, found in positions.items() for at in found}
        used = set().union(*texts)
        free = (c for c in map(chr, range(_FIRST_STAND_IN, _FIRST_STAND_IN + 0xFFFE)) if c not in used)
        stand_in = dict(zip(sorted(originals), free, strict=False))
        hidden = {text: _replaced(text, found, stand_in) for text, found in positions.items()}
        return Hidden(
            tuple(_with_texts(m, hidden) for m in messages), {ord(free): original for original, free in stand_in.items()}
        )

    def _positions(self, content: str) -> set[int]:
        """Indices whose replacement leaves no special token inside ``content``, and none that could form across its edges."""
        has_any = self.pattern.search(content)  # skips to the first letters of tokens; a lookahead tries every place
        positions = {match.start() for match in self._anywhere.finditer(content)} if has_any else set()
        inner = content.strip()
        if not inner:
            return positions
        first = len(content) - len(content.lstrip())
        last = len(content.rstrip()) - 1
        edges = {inner, content}  # templates may trim a message or not
        if inner[0] in self._tail_characters and any(c[:k] in self._tails for c in edges for k in range(1, self._longest)):
            positions.add(first)
        if inner[-1] in self._head_characters and any(c[-k:] in self._heads for c in edges for k in range(1, self._longest)):
            positions.add(last)
        if len(inner) < self._longest and any(inner in token for token in self.tokens):
            positions.add(first)
        return positions


def _replaced(text: str, positions: set[int], stand_in: dict[str, str]) -> str:
    return "".join(stand_in[c] if i in positions else c for i, c in enumerate(text))


def _with_texts(message: Message, hidden: dict[str, str]) -> Message:
    if not any(text in hidden for text in message.texts):
        return message
    fields = tuple((key, hidden.get(text, text)) for key, text in message.fields)
    return replace(message, content=hidden.get(message.content, message.content), fields=fields)
