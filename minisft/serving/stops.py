"""Stop strings: where an answer ends, and which text is certain not to be part of one.

The answer ends at the stop string that is complete first, character by character, so it does not matter how the text is cut
into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class TextUntilStop:
    """Pieces of text in, text out that no stop string can take back.

    Args:
        stops: the stop strings, none empty.

    Attributes:
        stopped: one of them has come; nothing more is handed out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # the end of the text so far: a proper prefix of some stop string
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that has become certain with ``piece``."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is still held back: the text ended within what could have become a stop string."""
        held, self._held = self._held, ""
        return "" if self.stopped else held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` a stop string could start with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
