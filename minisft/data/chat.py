"""A chat becomes token ids, each flagged as a target to learn or as context.

Training, evaluation and generation use one function, ``encode_chat``, so that what is trained is what is later asked.
The flags come from the rendering: the character spans that the assistant writes (``answer_spans``). The whole text is encoded
at once and the spans are laid over the tokens' offsets, so no answer is glued on in a way the model would never see.

The border rule: a token is a target when it covers at least one character of the answer. With SmolLM2, ``"Answer: "`` +
``"yes"`` makes the single token ``" yes"``, which straddles the border and is trained; otherwise the answer would lose its
first word.

Text in the data never becomes a special token. The one idea: the assistant's end-of-turn token is a target like any other; a
model that is not taught to stop does not stop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import cast

from minisft.common.errors import UserError
from minisft.data.answer_spans import loses_reasoning, render_with_answers
from minisft.data.answer_text import stop_ids as stop_ids
from minisft.data.examples import Message
from minisft.data.special_tokens import Span, SpecialTokenText
from minisft.data.template import ChatTemplate
from minisft.data.template import Turns as Turns
from minisft.data.template import resolve_template as resolve_template
from minisft.data.tokenizer import Tokenized, Tokenizer


@dataclass(frozen=True)
class Encoded:
    """One chat as tokens.

    Attributes:
        input_ids: the token ids.
        supervised: True where the token is a target to learn.
        row: the row of the data file, from 1.
        control_tokens_in_text: special tokens that the messages spell out, encoded as plain text.
        prompt_length: number of tokens before the first supervised one; all of them when there is none.
        straddling: targets that also cover characters outside the answer.
        loses_reasoning: the template leaves out what an answer's content says up to ``</think>``.
    """

    input_ids: list[int]
    supervised: list[bool]
    row: int
    control_tokens_in_text: int
    prompt_length: int
    straddling: int = 0
    loses_reasoning: bool = False

    @property
    def num_targets(self) -> int:
        """How many tokens are targets."""
        return sum(self.supervised)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    turns: Turns = "all",
    add_generation_prompt: bool = False,
    allow_control_tokens: bool = False,
    row: int = 0,
    where: str = "",
) -> Encoded:
    """Render a chat, encode it, and flag the assistant's tokens.

    Args:
        tokenizer: the model's tokenizer.
        template: see ``resolve_template``.
        messages: the chat. Assistant messages with ``train`` False are context.
        turns: flag every assistant turn, or only the last.
        add_generation_prompt: end where the assistant would start to write. Nothing is flagged then.
        allow_control_tokens: let special tokens spelt out in the messages act as such.
        row: copied to the result.
        where: file and line, for errors.

    Returns:
        The tokens and their flags.

    Raises:
        UserError: ``tokenizer/template...``: the template fails, or its parts do not show where the answers lie;
            ``data/unread-field``: the template does not read a field that carries content.
    """
    prepared = prepare(
        tokenizer,
        template,
        messages,
        turns,
        add_generation_prompt,
        allow_control_tokens=allow_control_tokens,
        row=row,
        where=where,
    )
    if prepared.encoded is not None:
        return prepared.encoded
    return finish(tokenizer, prepared, tokenizer.tokenized(prepared.text))


@dataclass(frozen=True)
class Prepared:
    """A chat between rendering and encoding, which is done for many texts at once.

    Attributes:
        text: the rendered chat.
        spans: the answers in it.
        own: the special tokens that the template wrote; None where those of the messages may act as such.
        row, where, loses_reasoning: as in ``Encoded`` and ``encode_chat``.
        encoded: the result, where the text had to be cut by hand.
    """

    text: str
    spans: list[Span]
    own: list[Span] | None
    row: int
    where: str
    loses_reasoning: bool
    encoded: Encoded | None = None


def prepare(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    turns: Turns = "all",
    add_generation_prompt: bool = False,
    *,
    allow_control_tokens: bool = False,
    row: int = 0,
    where: str = "",
) -> Prepared:
    """The first half of ``encode_chat``: render a chat and find its answers.

    Args:
        tokenizer, template, messages, turns, add_generation_prompt, allow_control_tokens, row, where: see ``encode_chat``.

    Returns:
        The text to encode, or the encoded chat where messages spell special tokens.

    Raises:
        UserError: see ``encode_chat``.
    """
    with _located(where):
        special = SpecialTokenText.of(tuple(tokenizer.special_tokens))
        text, spans = render_with_answers(template, messages, turns, add_generation_prompt, special)
        hidden = None if allow_control_tokens else special.hide(messages)
        encoded = None
        own = None if allow_control_tokens else special.spans(text)
        if hidden is not None:
            masked, masked_spans = render_with_answers(template, hidden.messages, turns, add_generation_prompt, special)
            written, all_seen = special.spans(masked), special.spans(text)
            if written != all_seen or hidden.reveal(masked) != text:
                text = hidden.reveal(masked)
                ids, offsets = _encode_by_chunks(tokenizer, written, text)
                encoded = _encoded(ids, _flags(offsets, masked_spans), row, max(0, len(all_seen) - len(written)))
    lost = not add_generation_prompt and loses_reasoning(messages, turns, text)
    if encoded is not None and lost:
        encoded = replace(encoded, loses_reasoning=True)
    return Prepared(text, spans, own, row, where, lost, encoded)


def finish(tokenizer: Tokenizer, prepared: Prepared, tokenized: Tokenized) -> Encoded:
    """The second half of ``encode_chat``: flag the answers' tokens.

    Args:
        tokenizer: the model's.
        prepared: from ``prepare``.
        tokenized: its text, control tokens read as such.

    Returns:
        The chat as tokens.

    Raises:
        UserError: ``tokenizer/control-from-text``.
    """
    ids, injected, own = tokenized.ids, 0, prepared.own
    if own is not None and (seen := _num_special(tokenizer, ids)) != len(own):
        # A normalizer made a special token out of other characters: cut the text ourselves.
        with _located(prepared.where):
            ids, offsets = _encode_by_chunks(tokenizer, own, prepared.text)
        injected = max(0, seen - _num_special(tokenizer, ids))
        flags = _flags(offsets, prepared.spans)
    else:
        flags = _flags_by_lookup(tokenized, prepared.spans) or _flags(tokenized.offsets, prepared.spans)
    encoded = _encoded(ids, flags, prepared.row, injected)
    return replace(encoded, loses_reasoning=True) if prepared.loses_reasoning else encoded


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Errors that name the row."""
    try:
        yield
    except UserError as error:
        raise (error.at(where) if where else error) from None


def _num_special(tokenizer: Tokenizer, ids: list[int]) -> int:
    return sum(map(tokenizer.control_ids.__contains__, ids))


def _encode_by_chunks(tokenizer: Tokenizer, own: list[Span], text: str) -> tuple[list[int], list[Span]]:
    """Encode ``text`` where only the spans ``own`` are special tokens.

    The library itself cuts text at special tokens before it encodes the pieces, so this gives the ids that it would give if
    the injected ones were ordinary characters. (A SentencePiece tokenizer may put its leading space before each piece.)
    """
    ids: list[int] = []
    offsets: list[Span] = []
    position = 0
    for start, end in [*own, (len(text), len(text))]:
        chunk_ids, chunk_offsets = tokenizer.encode_with_offsets(text[position:start], control=False)
        ids += chunk_ids
        offsets += [(position + a, position + b) for a, b in chunk_offsets]
        if start < end:
            ids.append(tokenizer.special_tokens[text[start:end]])
            offsets.append((start, end))
        position = end
    return ids, offsets


def _flags(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[bool], int]:
    """Which tokens reach into one of the spans, and how many of them reach out of it too."""
    supervised = [False] * len(offsets)
    straddling = 0
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            supervised[token] = offsets[token][1] > start
            straddling += offsets[token][0] < start or offsets[token][1] > end
            token += 1
    return supervised, straddling


def _flags_by_lookup(tokenized: Tokenized, spans: Sequence[Span]) -> tuple[list[bool], int] | None:
    """``_flags`` without a list of all offsets, which takes longest: the library finds the tokens at the ends of a span.

    None where it does not: for an empty span, or a character that a normalizer took away.
    """
    count, chars = len(tokenized), cast("Callable[[int], Span]", tokenized.token_to_chars)
    supervised = [False] * count
    straddling = after = 0
    for start, end in spans:
        first = tokenized.char_to_token(start)
        last = tokenized.char_to_token(end - 1) if start < end else None
        if first is None or last is None:
            return None
        first, after = max(first, after), last + 1  # one token may lie on two borders
        while after < count and chars(after)[0] < end:  # the other bytes of the last character
            after += 1
        supervised[first:after] = [True] * (after - first)
        straddling += _num_outside(chars, range(first, after), start, end)
    return supervised, straddling


def _num_outside(chars: Callable[[int], Span], tokens: range, start: int, end: int) -> int:
    """How many of these tokens reach out of [start, end): the first and the last of them may."""
    at_start = sum(1 for _ in takewhile(lambda i: chars(i)[0] < start, tokens))
    return at_start + sum(1 for _ in takewhile(lambda i: chars(i)[1] > end, reversed(tokens[at_start:])))


def _encoded(ids: list[int], flags: tuple[list[bool], int], row: int, injected: int) -> Encoded:
    supervised, straddling = flags
    prompt_length = supervised.index(True) if True in supervised else len(ids)
    return Encoded(ids, supervised, row, injected, prompt_length, straddling)


# ---- length ----


def fit(encoded: Encoded, max_length: int) -> Encoded | None:
    """The chat in at most ``max_length`` tokens, or None when its answers alone do not fit.

    What goes first are the tokens behind the last target, then the start of the prompt; at least one token stays before
    the first target, which is predicted from it. Targets are never cut, so no answer ends where its author did not end it.
    """
    if len(encoded.input_ids) <= max_length:
        return encoded
    end = len(encoded.supervised) - encoded.supervised[::-1].index(True) if encoded.num_targets else 0
    start = max(0, end - max_length)
    if not encoded.num_targets or start > max(0, encoded.prompt_length - 1):
        return None
    prompt_length = encoded.prompt_length - start
    ids, supervised = encoded.input_ids[start:end], encoded.supervised[start:end]
    return replace(encoded, input_ids=ids, supervised=supervised, prompt_length=prompt_length)
