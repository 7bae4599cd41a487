"""Which characters of a rendered chat are the assistant's answers.

A template that marks them with ``{% generation %}`` blocks is taken at its word. With any other, an answer lies behind the
rendering of what precedes it with the generation prompt, and reaches to the end of the rendering up to it. Where the former is
no prefix of the whole (a generation prompt that opens a thinking block; a chat that the assistant opens, since many templates
cannot render an empty chat), the answer's text is exchanged for a marker: the words between the turn before and the marker hold
the generation prompt, or the part of it that the template writes for a past turn, and the answer begins behind that.

It refuses templates that render an answer differently once the chat goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minisft.common.errors import TokenizerError, UserError
from minisft.data.examples import Message
from minisft.data.row_forms import REASONING_FIELDS
from minisft.data.special_tokens import Span, SpecialTokenText
from minisft.data.template import ChatTemplate, Rendered, Turns

# Stands for a message's text. Supplementary private use area B: no standard gives these characters a meaning.
_MARKER = "\U0010f5f7\U0010f5f8\U0010f5f9"
_BLOCKS = "--template FILE.jinja with {% generation %} blocks around the answers"


def render_with_answers(
    template: ChatTemplate, messages: Sequence[Message], turns: Turns, add_generation_prompt: bool, special: SpecialTokenText
) -> tuple[str, list[Span]]:
    """The chat's text and the character spans of the answers to train.

    Args:
        template: the chat template.
        messages: the chat.
        turns: every assistant turn, or only the last; those with ``train`` False are left out.
        add_generation_prompt: end where the assistant would start to write; there are no answers then.
        special: the tokenizer's special tokens: an answer ends with the one that closes it.

    Returns:
        The text, and (start, end) of each answer in order, its end-of-turn token included.

    Raises:
        UserError: ``tokenizer/template-spans``, ``tokenizer/template-prefix``: the rendering does not show where answers lie;
            ``data/unread-field``: the template does not read a field that carries content.
    """
    _check_fields(template, messages)
    rendered = template.render(messages, add_generation_prompt)
    wanted = [] if add_generation_prompt else _wanted_turns(messages, turns)
    if not wanted:
        return rendered.text, []
    if template.has_generation_blocks:
        spans = _block_spans(rendered, messages, wanted, special)
    else:
        spans = [_rendered_span(template, messages, i, rendered.text) for i in wanted]
    return rendered.text, [_without_trailing_space(rendered.text, span, special) for span in spans]


def _check_fields(template: ChatTemplate, messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages, 1):
        for key, _ in message.fields:
            if key in REASONING_FIELDS and not template.reads(key):
                raise UserError(
                    "data/unread-field",
                    "the chat template does not read a field that carries content, so it would be lost",
                    where=f"message {i}: {key}",
                    expected="a template that reads it",
                    fix=f"put its text into the content, drop the field, or --template FILE.jinja with message.{key}",
                )


def _wanted_turns(messages: Sequence[Message], turns: Turns) -> list[int]:
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return [i for i in (answers[-1:] if turns == "last" else answers) if messages[i].train]


def loses_reasoning(messages: Sequence[Message], turns: Turns, text: str) -> bool:
    """Whether the rendering leaves out what a trained answer's content says up to ``</think>``.

    Args:
        messages: the chat.
        turns: every assistant turn, or only the last.
        text: its rendering.

    Returns:
        True only where the reasoning's words stand nowhere in ``text``; the same words elsewhere in the chat hide a loss.
    """
    for i in _wanted_turns(messages, turns):
        before, end, _ = messages[i].content.partition("</think>")
        if end and before.rpartition("<think>")[2].strip() not in text:
            return True
    return False


def _block_spans(rendered: Rendered, messages: Sequence[Message], wanted: list[int], special: SpecialTokenText) -> list[Span]:
    """The generation blocks of the wanted turns; a special token right behind a block closes the turn and belongs to it."""
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    blocks = rendered.generation_spans
    if len(blocks) != len(answers):
        found, expected = f"{len(blocks)} generation blocks", f"{len(answers)}, one for each assistant turn"
        fix = "a template with a generation block around each answer, or --turns last with one that has none"
        raise UserError(
            "tokenizer/template-spans", "the chat template does not mark every answer", found=found, expected=expected, fix=fix
        )
    spans = []
    for start, end in (blocks[answers.index(i)] for i in wanted):
        closing = special.pattern.match(rendered.text, end)
        is_closed = rendered.text[start:end].rstrip().endswith(special.tokens)
        spans.append((start, closing.end() if closing and not is_closed else end))
    return spans


def _rendered_span(template: ChatTemplate, messages: Sequence[Message], i: int, text: str) -> Span:
    """Turn i begins behind the generation prompt and ends where the rendering up to it ends."""
    until = text if i == len(messages) - 1 else template.render(messages[: i + 1]).text
    where = f"message {i + 1} of {len(messages)}"
    if not text.startswith(until):
        raise UserError(
            "tokenizer/template-prefix",
            "the chat template renders an answer differently once the chat goes on, so it cannot be trained in the middle",
            where=where,
            expected="the chat up to this answer to be a prefix of the whole",
            fix=f"--turns last, or {_BLOCKS}",
        )
    start = _start(template, messages[: i + 1], until)
    if start is None:
        what = "the chat template does not show where an answer starts"
        expected = "the prompt to be a prefix of the whole, and the answer's text to stand in it once"
        raise UserError("tokenizer/template-prefix", what, where=where, expected=expected, fix=_BLOCKS)
    return start, len(until)


def _start(template: ChatTemplate, messages: Sequence[Message], text: str) -> int | None:
    """Where the last message's answer starts in ``text``, the rendering of ``messages``; None where that cannot be told."""
    try:
        before = template.render(messages[:-1], add_generation_prompt=True).text
    except TokenizerError:  # a template that cannot render an empty chat, for one
        before = None
    if before is not None and text.startswith(before):
        return len(before)
    content = _content_span(template, messages, len(messages) - 1, text)
    previous = _content_span(template, messages, len(messages) - 2, text) if len(messages) > 1 else (0, 0)
    if content is None or previous is None:
        return None
    between = text[previous[1] : content[0]]
    prompt = template.generation_prompt
    shared = next((n for n in range(len(prompt), -1, -1) if prompt[:n] in between), 0)
    # Without any word of a generation prompt the answer is its text alone.
    return previous[1] + between.rindex(prompt[:shared]) + shared if shared else content[0]


def _content_span(template: ChatTemplate, messages: Sequence[Message], i: int, text: str) -> Span | None:
    """Where message i's text stands in ``text``: what a marker in its stead replaces. None unless it stands there once."""
    marked = [replace(m, content=_MARKER) if at == i else m for at, m in enumerate(messages)]
    try:
        before, *after = template.render(marked).text.split(_MARKER)
    except TokenizerError:
        return None
    if len(after) != 1 or not (text.startswith(before) and text.endswith(after[0])):
        return None
    start, end = len(before), len(text) - len(after[0])
    return (start, end) if start <= end else None


def _without_trailing_space(text: str, span: Span, special: SpecialTokenText) -> Span:
    """Cut what follows the end-of-turn token: the newline before the next turn is not the assistant's."""
    start, end = span
    visible_end = start + len(text[start:end].rstrip())
    return (start, visible_end) if text.endswith(special.tokens, start, visible_end) else span
