"""A chat as values: messages with a role and a text, and the row that they come from.

Whatever form a file has, the rest of minisft only sees these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from minisft.common.safe_json import JSON
from minisft.data.given_tokens import GivenTokens

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        content: the text.
        train: matters for assistant turns only: False means context, not a target.
        fields: further texts by name that the chat template may read, for instance ``reasoning_content``.
    """

    role: Role
    content: str
    train: bool = True
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that the template sees."""
        return (self.content, *(text for _, text in self.fields)) if self.fields else (self.content,)


@dataclass(frozen=True)
class Example:
    """One chat.

    Attributes:
        messages: the turns.
        row: its line or item, from 1.
        reference: the row's other columns, for evaluation.
        where: file and line, for errors; empty for an example that was not read from a file.
        tokens: for a row that is token ids already; its messages then are the ids as words, to compare rows by.
    """

    messages: tuple[Message, ...]
    row: int
    reference: dict[str, JSON] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    tokens: GivenTokens | None = None

    @property
    def identity(self) -> tuple[tuple[Message, ...], str]:
        """What exact copies of a row have in common."""
        return self.messages, json.dumps(self.reference, sort_keys=True) if self.reference else ""

    @property
    def place(self) -> str:
        """What errors about this example name."""
        return self.where or f"row {self.row}"
