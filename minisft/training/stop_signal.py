"""A stop that waits for the step in progress: SIGTERM and SIGINT are remembered, and a second one acts at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopSignal:
    """Remembers the first SIGTERM or SIGINT while ``listening``.

    Attributes:
        received: the signal's number; None until there is one.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this block the first signal is only remembered; elsewhere than in the main thread nothing is changed."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            before = {number: signal.signal(number, self._remember) for number in numbers}
        except ValueError:  # not the main thread: whoever owns it handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.received = number
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
