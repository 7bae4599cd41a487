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

from collections.abc import Sequence
from dataclasses import dataclass, replace

from minisft.common.errors import UserError, visible
from minisft.data.answer_spans import loses_reasoning, render_with_answers
from minisft.data.answer_text import stop_ids as stop_ids
from minisft.data.examples import Example, Message
from minisft.data.special_tokens import Span, SpecialTokenText
from minisft.data.template import ChatTemplate
from minisft.data.template import Turns as Turns
from minisft.data.template import resolve_template as resolve_template
from minisft.data.tokenizer import Tokenizer


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
    try:
        encoded, text = _encode(tokenizer, template, messages, turns, add_generation_prompt, allow_control_tokens, row)
    except UserError as error:
        raise (error.at(where) if where else error) from None
    lost = not add_generation_prompt and loses_reasoning(messages, turns, text)
    return replace(encoded, loses_reasoning=True) if lost else encoded


def _encode(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    turns: Turns,
    add_generation_prompt: bool,
    allow_control_tokens: bool,
    row: int,
) -> tuple[Encoded, str]:
    special = SpecialTokenText.of(tuple(tokenizer.special_tokens))
    text, spans = render_with_answers(template, messages, turns, add_generation_prompt, special)
    hidden = None if allow_control_tokens else special.hide(messages)
    if hidden is not None:
        masked, masked_spans = render_with_answers(template, hidden.messages, turns, add_generation_prompt, special)
        own, all_seen = special.spans(masked), special.spans(text)
        if own != all_seen or hidden.reveal(masked) != text:
            text = hidden.reveal(masked)
            ids, offsets = _encode_by_chunks(tokenizer, own, text)
            return _flag(ids, offsets, masked_spans, row, max(0, len(all_seen) - len(own))), text
    ids, offsets = tokenizer.encode_with_offsets(text, control=True)
    injected = 0
    if not allow_control_tokens:
        own, seen = special.spans(text), _num_special(tokenizer, ids)
        if seen != len(own):  # a normalizer made a special token out of other characters: cut the text ourselves
            ids, offsets = _encode_by_chunks(tokenizer, own, text)
            injected = max(0, seen - _num_special(tokenizer, ids))
    return _flag(ids, offsets, spans, row, injected), text


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


def _flag(ids: list[int], offsets: list[Span], spans: list[Span], row: int, injected: int) -> Encoded:
    supervised = [False] * len(ids)
    straddling = 0
    token = 0
    for start, end in spans:
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            supervised[token] = offsets[token][1] > start
            straddling += offsets[token][0] < start or offsets[token][1] > end
            token += 1
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


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows that fit, and which of the others were cut or dropped.

    Attributes:
        rows: the rows to use, in file order.
        lengths: tokens of every row before ``fit``.
        truncated: row numbers whose prompt lost its start.
        too_long: row numbers dropped because their answers do not fit.
        untrained: row numbers dropped because they have no target (every answer is marked as context).
        control_tokens: special tokens spelt out in the data and encoded as text.
        stop_ids: ids that end an answer, see ``stop_ids``.
        path: the data file.
        lost_reasoning: row numbers, see ``Encoded.loses_reasoning``.
    """

    rows: tuple[Encoded, ...]
    lengths: tuple[int, ...]
    truncated: tuple[int, ...]
    too_long: tuple[int, ...]
    untrained: tuple[int, ...]
    control_tokens: int
    stop_ids: tuple[int, ...]
    path: str
    lost_reasoning: tuple[int, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """All of it as numbers, for ``data.json``."""
        return {
            "rows": len(self.lengths),
            "used": len(self.rows),
            "truncated": len(self.truncated),
            "too_long": len(self.too_long),
            "untrained": len(self.untrained),
            "control_tokens_in_text": self.control_tokens,
            "tokens": sum(len(row.input_ids) for row in self.rows),
            "supervised_tokens": sum(row.num_targets for row in self.rows),
        }


def encode_dataset(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    *,
    turns: Turns = "all",
    allow_control_tokens: bool = False,
    strict: bool = False,
    path: str = "data",
    context: int | None = None,
) -> EncodedDataset:
    """Encode and fit every example.

    Args:
        examples: the rows.
        tokenizer: the model's tokenizer.
        template: see ``resolve_template``.
        max_length: longest row in tokens.
        turns: train every assistant turn, or only the last.
        allow_control_tokens: let special tokens spelt out in the messages act as such.
        strict: a row that is too long is an error instead of being counted.
        path: the data file, for errors.
        context: the most tokens that the model is made for, if known: no error then advises a longer ``max_length``.

    Returns:
        The rows that fit, and counts of the others.

    Raises:
        UserError: ``data/too-long`` with ``strict``; ``tokenizer/template...``; ``data/unread-field``. All name the row.
    """
    rows: list[Encoded] = []
    lengths: list[int] = []
    truncated, too_long, untrained, lost_reasoning = [], [], [], []
    control_tokens = 0
    for example in examples:
        encoded = encode_chat(
            tokenizer,
            template,
            example.messages,
            turns=turns,
            allow_control_tokens=allow_control_tokens,
            row=example.row,
            where=example.where or f"{visible(path)}:{example.row}",
        )
        length = len(encoded.input_ids)
        lengths.append(length)
        control_tokens += encoded.control_tokens_in_text
        if strict and length > max_length:
            raise _too_long(example.where or f"{visible(path)}:{example.row}", length, max_length, context)
        if encoded.loses_reasoning:
            lost_reasoning.append(example.row)
        fitted = fit(encoded, max_length)
        if not encoded.num_targets:
            untrained.append(example.row)
        elif fitted is None:
            too_long.append(example.row)
        else:
            rows.append(fitted)
            if fitted.prompt_length < encoded.prompt_length:
                truncated.append(example.row)
    return EncodedDataset(
        rows=tuple(rows),
        lengths=tuple(lengths),
        truncated=tuple(truncated),
        too_long=tuple(too_long),
        untrained=tuple(untrained),
        control_tokens=control_tokens,
        stop_ids=stop_ids(tokenizer, template),
        path=path,
        lost_reasoning=tuple(lost_reasoning),
    )


def _too_long(where: str, found: int, limit: int, context: int | None) -> UserError:
    expected = f"at most {limit_words(limit, context)}" if limit == context else f"at most {limit}"
    return UserError(
        "data/too-long", "the row is too long", where=where, found=f"{found} tokens", expected=expected,
        fix=f"{longer_or_shorter(found, limit, context)}, or leave --strict away to count and drop such rows",
    )  # fmt: skip


def limit_words(max_length: int, context: int | None) -> str:
    """What limits a row: the model's context where ``max_length`` reaches it, else the flag."""
    return f"the model's context of {context} tokens" if max_length == context else f"--max-length {max_length}"


def longer_or_shorter(longest: int, max_length: int, context: int | None) -> str:
    """What makes a row fit: a larger ``--max-length`` only as far as the model's context goes.

    Args:
        longest: tokens of the row.
        max_length: the limit now.
        context: the most tokens that the model is made for, if known.

    Returns:
        Words for an error's fix.
    """
    if context is None or longest <= context:
        return f"--max-length {longest}, or shorter rows"
    if max_length < context:
        return f"--max-length {context}, the model's context, and rows that fit it"
    return "shorter rows, or a model with a longer context"
