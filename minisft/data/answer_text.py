"""What a model writes for an answer: the text between generation prompt and end of turn, and the tokens that end it."""

from __future__ import annotations

from dataclasses import replace

from minisft.common.errors import TokenizerError, UserError
from minisft.data.answer_spans import render_with_answers
from minisft.data.examples import Example, Message
from minisft.data.special_tokens import SpecialTokenText
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """Ids that end an answer: every eos of the tokenizer and the special tokens that this template writes behind an answer."""
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *closing_ids(tokenizer, template)]))


def closing_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """The special tokens that this template writes behind an answer; empty where it does not take a question and an answer."""
    answer = "Hello!"
    try:
        text = template.render((Message("user", "Hello?"), Message("assistant", answer))).text
    except TokenizerError:  # then only the eos tokens are known
        return ()
    special = SpecialTokenText.of(tuple(tokenizer.special_tokens))
    closing: list[int] = []
    at = text.rfind(answer) + len(answer)
    while answer in text and (match := special.pattern.match(text, at)):
        closing.append(tokenizer.special_tokens[match[0]])
        at = match.end()
    return tuple(closing)


def answer_text(tokenizer: Tokenizer, template: ChatTemplate, example: Example) -> str:
    """What a model would have to write for the example's last turn: the text between generation prompt and end of turn.

    Rendered by the template (which may add an empty thinking block or trim the content) and passed through the tokenizer (which
    may normalize it), so that it can be compared with a generated answer.

    Args:
        tokenizer: the model's tokenizer.
        template: see ``resolve_template``.
        example: a chat whose last turn is the assistant's.

    Returns:
        The text, without end-of-turn tokens.

    Raises:
        UserError: ``tokenizer/template...``.
    """
    special = SpecialTokenText.of(tuple(tokenizer.special_tokens))
    messages = (*example.messages[:-1], replace(example.messages[-1], train=True))
    hidden = special.hide(messages)
    try:
        text, spans = render_with_answers(template, hidden.messages if hidden else messages, "last", False, special)
    except UserError as error:
        raise error.at(example.place) from None
    answer = text[slice(*spans[0])]
    while closing := next((token for token in special.tokens if answer.endswith(token)), ""):
        answer = answer.removesuffix(closing)
    return tokenizer.decode(tokenizer.encode(hidden.reveal(answer) if hidden else answer), skip_special=False)
