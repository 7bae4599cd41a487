"""The two texts that are compared: the right answer as the model would write it, and what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisft.data.answer_text import answer_text
from minisft.data.examples import Example
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.metrics import END_THINK, THINK, split_thinking


@dataclass(frozen=True)
class Reference:
    """The right answer without thinking block (``text``), and what the template itself writes before it (``added``)."""

    text: str
    added: str


def rendered_reference(tokenizer: Tokenizer, template: ChatTemplate, example: Example) -> Reference:
    """The last turn as template and tokenizer make it.

    Args:
        tokenizer: the model's tokenizer, which may normalize the text.
        template: the chat template, which may add to the text.
        example: a chat whose last turn is the assistant's.

    Returns:
        The reference; its ``added`` has to be taken off a prediction, too.
    """
    text = split_thinking(answer_text(tokenizer, template, example))[1]
    content = tokenizer.decode(tokenizer.encode(example.messages[-1].content), skip_special=False)
    own = split_thinking(content)[1].strip()
    at = text.rfind(own) if own and text.rstrip().endswith(own) else 0
    return Reference(text[at:], text[:at]) if text[:at].strip() else Reference(text, "")


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer; the marks of thinking are kept where they are special tokens, too."""
    marks = [tokenizer.special_tokens.get(mark) for mark in (THINK, END_THINK)]
    cut = max((i + 1 for i, token in enumerate(ids) if token in marks), default=0)
    return tokenizer.decode(ids[:cut], skip_special=False) + tokenizer.decode(ids[cut:]) if cut else tokenizer.decode(ids)
