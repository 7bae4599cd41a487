"""A chat becomes token ids, each flagged as a target to learn or as context.

One function, ``encode_chat``, serves training, evaluation and generation, so that what is trained is what is later asked.
The flags come from the rendering: the character spans that the assistant writes, read from the template's
``{% generation %}`` blocks or from rendering ever longer parts of the chat. The whole text is encoded at once and the spans
are laid over the tokens' offsets, so no answer is glued on in a way the model would never see.

The border rule: a token is a target when it covers at least one character of the answer. With SmolLM2, ``"Answer: "`` +
``"yes"`` makes the single token ``" yes"``, which straddles the border and is trained; otherwise the answer would lose its
first word.

Text in the data never becomes a control token. It refuses templates whose parts do not fit together, by name. The one idea:
the assistant's end-of-turn token is a target like any other; a model that is not taught to stop does not stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.data.messages import Example, Message
from minisft.data.special_tokens import ControlText, Span
from minisft.data.template import CHATML, PLAIN, ChatTemplate, render_with_answers
from minisft.data.template import Turns as Turns
from minisft.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """One chat as tokens.

    Attributes:
        input_ids: the token ids.
        supervised: True where the token is a target to learn.
        row: the row of the data file, from 1.
        control_tokens_in_text: control tokens that the messages spell out, encoded as plain text.
        prompt_length: number of tokens before the first supervised one; all of them when there is none.
        straddling: targets that also cover characters outside the answer.
    """

    input_ids: list[int]
    supervised: list[bool]
    row: int
    control_tokens_in_text: int
    prompt_length: int
    straddling: int = 0

    @property
    def num_targets(self) -> int:
        return sum(self.supervised)


def resolve_template(tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
    """The chat template to use: the model's own, ``chatml``, ``plain`` (for base models), or a ``.jinja`` file.

    Raises:
        UserError: ``tokenizer/no-template`` when the model has none and none is chosen; ``tokenizer/no-eos`` for ``plain``
            without an end token; ``tokenizer/template`` for one that fails.
    """
    special = tokenizer.special_names
    if choice == "chatml":
        return ChatTemplate(CHATML, special, trusted=True)
    if choice == "plain":
        if "eos_token" not in special:
            fix = "take a tokenizer whose config names its eos_token"
            raise UserError("tokenizer/no-eos", "plain needs an end token to close the answers", found="no eos_token", fix=fix)
        bos = "{{ bos_token }}" if tokenizer.adds_bos and "bos_token" in special else ""
        return ChatTemplate(bos + PLAIN, special, trusted=True)
    if choice is not None:
        return ChatTemplate(_read_template(Path(choice)), special)
    if tokenizer.chat_template is None:
        expected = "a chat template in the model folder"
        fix = "--template plain for a base model, --template chatml, or a .jinja file"
        raise UserError("tokenizer/no-template", "the model has no chat template", expected=expected, fix=fix)
    return ChatTemplate(tokenizer.chat_template, special)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else visible(error)
        expected = "chatml, plain or a .jinja file"
        raise UserError(
            "config/bad-template", "cannot read the template", where=visible(path), found=found, expected=expected
        ) from None


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """Ids that end an answer: every eos of the tokenizer and the control token that this template closes a turn with."""
    encoded = encode_chat(tokenizer, template, (Message("user", "Hello?"), Message("assistant", "Hello!")))
    last = max((i for i, flag in enumerate(encoded.supervised) if flag), default=None)
    closing = [encoded.input_ids[last]] if last is not None and encoded.input_ids[last] in tokenizer.control_ids else []
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *closing]))


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    turns: Turns = "all",
    add_generation_prompt: bool = False,
    allow_control_tokens: bool = False,
    row: int = 0,
) -> Encoded:
    """Render a chat, encode it, and flag the assistant's tokens.

    Args:
        tokenizer: the model's tokenizer.
        template: see ``resolve_template``.
        messages: the chat. Assistant messages with ``train`` False are context.
        turns: flag every assistant turn, or only the last.
        add_generation_prompt: end where the assistant would begin to write. Nothing is flagged then.
        allow_control_tokens: let control tokens spelt out in the messages act as such.
        row: copied to the result.

    Raises:
        UserError: ``tokenizer/template...``: the template fails, or its parts do not show where the answers lie.
    """
    control = ControlText.of(tuple(tokenizer.special_tokens))

    def rendering(chat: Sequence[Message]) -> tuple[str, list[Span]]:
        return render_with_answers(template, chat, turns, add_generation_prompt, control)

    text, spans = rendering(messages)
    hidden = None if allow_control_tokens else control.hide(messages)
    forged = 0
    if hidden is not None:
        masked, masked_spans = rendering(hidden.messages)
        own, all_seen = control.spans(masked), control.spans(text)
        if own != all_seen or hidden.reveal(masked) != text:
            ids, offsets = _encode_by_chunks(tokenizer, own, hidden.reveal(masked))
            return _flag(ids, offsets, masked_spans, row, max(0, len(all_seen) - len(own)))
    ids, offsets = tokenizer.encode_with_offsets(text, control=True)
    if not allow_control_tokens and sum(map(tokenizer.control_ids.__contains__, ids)) != len(own := control.spans(text)):
        # A normaliser made a control token out of other characters: cut the text ourselves.
        ids, offsets = _encode_by_chunks(tokenizer, own, text)
    return _flag(ids, offsets, spans, row, forged)


def _encode_by_chunks(tokenizer: Tokenizer, own: list[Span], text: str) -> tuple[list[int], list[Span]]:
    """Encode ``text`` where only the spans ``own`` are control tokens.

    The library itself cuts text at control tokens before it encodes the pieces, so this gives the ids that it would give if
    the forged ones were ordinary characters. (A SentencePiece tokenizer may put its leading space before each piece.)
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


def _flag(ids: list[int], offsets: list[Span], spans: list[Span], row: int, forged: int) -> Encoded:
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
    return Encoded(ids, supervised, row, forged, prompt_length, straddling)


# ---- length ----


def fit(encoded: Encoded, max_length: int) -> Encoded | None:
    """The chat in at most ``max_length`` tokens, or None when its answers alone do not fit.

    What goes first are the tokens behind the last target, then the beginning of the prompt; at least one token stays before
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
    """Encoded rows that fit, and what became of the others.

    Attributes:
        rows: the rows to use, in file order.
        lengths: tokens of every row before ``fit``.
        truncated: row numbers whose prompt lost its beginning.
        too_long: row numbers dropped because their answers do not fit.
        untrained: row numbers dropped because they have no target (every answer is marked as context).
        control_tokens: control tokens spelt out in the data and encoded as text.
        stop_ids: ids that end an answer, see ``stop_ids``.
        path: the data file.
    """

    rows: tuple[Encoded, ...]
    lengths: tuple[int, ...]
    truncated: tuple[int, ...]
    too_long: tuple[int, ...]
    untrained: tuple[int, ...]
    control_tokens: int
    stop_ids: tuple[int, ...]
    path: str

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
) -> EncodedDataset:
    """Encode and fit every example.

    Args:
        strict: a row that is too long is an error instead of being counted.
        path: the data file, for errors.

    Raises:
        UserError: ``data/too-long`` with ``strict``; ``tokenizer/template...``.
    """
    rows: list[Encoded] = []
    lengths: list[int] = []
    truncated, too_long, untrained = [], [], []
    control_tokens = 0
    for example in examples:
        encoded = encode_chat(
            tokenizer, template, example.messages, turns=turns, allow_control_tokens=allow_control_tokens, row=example.row
        )
        length = len(encoded.input_ids)
        lengths.append(length)
        control_tokens += encoded.control_tokens_in_text
        if strict and length > max_length:
            raise _too_long(f"{visible(path)}:{example.row}", length, max_length)
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
    )


def _too_long(where: str, found: int, limit: int) -> UserError:
    fix = f"--max-length {found}, or leave --strict away to count and drop such rows"
    return UserError(
        "data/too-long", "the row is too long", where=where, found=f"{found} tokens", expected=f"at most {limit}", fix=fix
    )
