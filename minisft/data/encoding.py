"""All rows of a data set become token ids: fitted, counted, and laid down in flat arrays.

Rows are rendered one by one and encoded many at a time, in the tokenizer's own threads, while the next are rendered. The
result is that of ``encode_chat`` for each row, bit for bit, and so is the row that an error names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from minisft.common.errors import UserError, visible
from minisft.data.answer_text import stop_ids
from minisft.data.chat import Encoded, Prepared, finish, fit, prepare
from minisft.data.examples import Example
from minisft.data.given_tokens import GivenTokens
from minisft.data.template import ChatTemplate, Turns
from minisft.data.token_rows import TokenRows, TokenWriter
from minisft.data.tokenizer import Tokenized, Tokenizer

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows that fit, and which of the others were cut or dropped.

    Attributes:
        rows: the rows to use, in file order; each is made when it is asked for.
        lengths: tokens of every row before ``fit``.
        truncated: row numbers whose prompt lost its start.
        too_long: row numbers dropped because their answers do not fit.
        untrained: row numbers dropped because they have no target (every answer is marked as context).
        control_tokens: special tokens spelt out in the data and encoded as text.
        stop_ids: ids that end an answer, see ``stop_ids``.
        path: the data file.
        lost_reasoning: row numbers, see ``Encoded.loses_reasoning``.
    """

    rows: TokenRows
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
            "tokens": len(self.rows.tokens),
            "supervised_tokens": self.rows.num_targets,
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
    writer: TokenWriter | None = None,
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
        writer: where the rows go; by default into memory.

    Returns:
        The rows that fit, and counts of the others.

    Raises:
        UserError: ``data/too-long`` with ``strict``; ``tokenizer/template...``; ``data/unread-field``. All name the row.
    """
    rows = writer or TokenWriter()
    lengths: list[int] = []
    truncated, too_long, untrained, lost_reasoning = [], [], [], []
    control_tokens = 0
    chats = _encoded(examples, tokenizer, template, turns, allow_control_tokens, path)
    for example, encoded in zip(examples, chats, strict=True):
        length = len(encoded.input_ids)
        lengths.append(length)
        control_tokens += encoded.control_tokens_in_text
        if strict and length > max_length:
            raise _too_long(_place(example, path), length, max_length, context)
        if encoded.loses_reasoning:
            lost_reasoning.append(example.row)
        fitted = fit(encoded, max_length)
        if encoded.prompt_length == length:  # no target
            untrained.append(example.row)
        elif fitted is None:
            too_long.append(example.row)
        else:
            rows.add(fitted)
            if fitted.prompt_length < encoded.prompt_length:
                truncated.append(example.row)
    return EncodedDataset(
        rows=rows.finish(),
        lengths=tuple(lengths),
        truncated=tuple(truncated),
        too_long=tuple(too_long),
        untrained=tuple(untrained),
        control_tokens=control_tokens,
        stop_ids=stop_ids(tokenizer, template),
        path=path,
        lost_reasoning=tuple(lost_reasoning),
    )


def _place(example: Example, path: str) -> str:
    return example.where or f"{visible(path)}:{example.row}"


def _encoded(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    turns: Turns,
    allow_control_tokens: bool,
    path: str,
) -> Iterator[Encoded]:
    """``encode_chat`` of each example, in order; the library encodes one part while the next is rendered here."""
    left = iter(examples)
    waiting: tuple[list[Prepared], Future[list[Tokenized]]] | None = None
    failed: UserError | None = None
    with ThreadPoolExecutor(max_workers=1) as background:
        while failed is None and (part := list(islice(left, ROWS_AT_ONCE))):
            prepared: list[Prepared] = []
            try:
                for example in part:
                    if example.tokens is not None:
                        prepared.append(_given(tokenizer, example, example.tokens, path))
                        continue
                    prepared.append(
                        prepare(
                            tokenizer, template, example.messages, turns, allow_control_tokens=allow_control_tokens,
                            row=example.row, where=_place(example, path),
                        )
                    )  # fmt: skip
            except UserError as error:  # rows before this one come first, and may have an error of their own
                failed = error
            started = background.submit(tokenizer.encode_batch, [p.text for p in prepared if p.encoded is None])
            if waiting is not None:
                yield from _finished(tokenizer, *waiting)
            waiting = prepared, started
        if waiting is not None:
            yield from _finished(tokenizer, *waiting)
    if failed is not None:
        raise failed


def _given(tokenizer: Tokenizer, example: Example, tokens: GivenTokens, path: str) -> Prepared:
    """A row that is token ids already, in range."""
    where = _place(example, path)
    tokens.check_vocabulary(tokenizer.vocab_size, where)
    supervised = list(tokens.supervised)
    prompt_length = supervised.index(True) if any(supervised) else len(supervised)
    encoded = Encoded(list(tokens.input_ids), supervised, example.row, 0, prompt_length)
    return Prepared("", [], None, example.row, where, False, encoded)


def _finished(tokenizer: Tokenizer, prepared: Sequence[Prepared], started: Future[list[Tokenized]]) -> Iterator[Encoded]:
    encodings = iter(started.result())
    for each in prepared:
        if each.encoded is not None:
            yield each.encoded
        else:
            yield finish(tokenizer, each, next(encodings))


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
