"""What the model will be trained on, made visible before it is trained.

Shows a few rows token by token with the targets marked, the tokens at the border between prompt and answer, how long rows
are and what was dropped. ``check`` refuses data on which training would be broken: nothing to learn, answers without an end
token, rows that are all too long. It computes nothing that training uses. The one idea: look at the tokens, not at the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError, visible
from minisft.data.chat import Encoded
from minisft.data.encoding import EncodedDataset, limit_words, longer_or_shorter
from minisft.data.messages import Dataset
from minisft.data.tokenizer import Tokenizer

GREEN, DIM, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
BAR_WIDTH = 40
NUM_BINS = 10
# Rows may be long; what is shown of one is cut in the middle of its prompt.
MAX_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class ShownToken:
    """One token: its id, its text made safe to print, and whether it is trained."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class ShownRow:
    """One example: its tokens and how many from the middle of its prompt are left out."""

    row: int
    tokens: tuple[ShownToken, ...]
    num_hidden: int
    straddling: int


@dataclass(frozen=True)
class Report:
    """All that ``render`` prints.

    Attributes:
        path: the data file.
        notes: remarks of the reader and the tokenizer (form, dropped rows, choices made).
        counts: rows read, duplicates, empty answers, and those of ``EncodedDataset.counts``.
        max_length: the limit in tokens.
        encoded: the rows, and what was cut or dropped.
        open_ended: rows with a trained turn whose last target is not an end token.
        shown: the first few rows.
    """

    path: str
    notes: tuple[str, ...]
    counts: dict[str, int]
    max_length: int
    encoded: EncodedDataset
    open_ended: tuple[int, ...]
    shown: tuple[ShownRow, ...]


def inspect_dataset(
    dataset: Dataset, encoded: EncodedDataset, tokenizer: Tokenizer, max_length: int, num_shown: int = 3
) -> Report:
    """Look at a data set before and after encoding.

    Args:
        dataset: the rows as read.
        encoded: the same rows from ``encode_dataset``, fitted to ``max_length``.
        tokenizer: to spell the tokens.
        max_length: the limit that the rows were fitted to, in tokens.
        num_shown: how many rows to show token by token.

    Returns:
        The report, for ``render``.
    """
    return Report(
        path=dataset.path,
        notes=(*dataset.notes, *tokenizer.notes),
        counts={**dataset.counts, **encoded.counts, "rows": dataset.counts["rows"]},
        max_length=max_length,
        encoded=encoded,
        open_ended=_open_ended(encoded),
        shown=tuple(_shown(row, tokenizer) for row in encoded.rows[:num_shown]),
    )


def _open_ended(encoded: EncodedDataset) -> tuple[int, ...]:
    return encoded.rows.open_ended(frozenset(encoded.stop_ids))


def _shown(row: Encoded, tokenizer: Tokenizer) -> ShownRow:
    surplus = max(0, len(row.input_ids) - MAX_SHOWN_TOKENS)
    num_hidden = min(surplus, max(0, row.prompt_length - 40))
    start = (row.prompt_length - num_hidden) // 2
    kept = [i for i in range(len(row.input_ids)) if not start <= i < start + num_hidden][:MAX_SHOWN_TOKENS]
    tokens = [ShownToken(row.input_ids[i], _spelling(row.input_ids[i], tokenizer), row.supervised[i]) for i in kept]
    return ShownRow(row.row, tuple(tokens), num_hidden, row.straddling)


def _spelling(token_id: int, tokenizer: Tokenizer) -> str:
    return visible(tokenizer.decode([token_id], skip_special=False).replace("\n", "⏎"))


def check(encoded: EncodedDataset, tokenizer: Tokenizer, max_length: int, context: int | None = None) -> None:
    """Refuse data on which training would be broken.

    Args:
        encoded: the rows from ``encode_dataset``.
        tokenizer: to spell the end tokens.
        max_length: the limit that the rows were fitted to, in tokens.
        context: the most tokens that the model is made for, if known.

    Raises:
        UserError: ``data/all-too-long``, ``data/no-target`` (no token to learn in any row), ``data/no-end-token`` (a trained
            turn that does not teach the model to stop).
    """
    where, lengths = visible(encoded.path), encoded.lengths
    if not encoded.rows and encoded.too_long:
        found = f"{len(encoded.too_long)} of {len(lengths)} rows too long, {min(lengths)} to {max(lengths)} tokens"
        expected = f"answers that fit {limit_words(max_length, context)}"
        fix = longer_or_shorter(max(lengths), max_length, context)
        raise UserError("data/all-too-long", "no row fits", where=where, found=found, expected=expected, fix=fix)
    if not encoded.rows:
        found = f"{len(lengths)} rows without a trained answer" if lengths else "no rows"
        fix = "check train and weight in the messages"
        raise UserError("data/no-target", "no token to learn", where=where, found=found, expected="a trained answer", fix=fix)
    if open_ended := _open_ended(encoded):
        found = f"{len(open_ended)} rows, the first is row {open_ended[0]}"
        ends = [visible(tokenizer.decode([i], skip_special=False)) for i in encoded.stop_ids]
        expected = f"answers closed by {' or '.join(ends) or 'an end token, but the tokenizer names none'}"
        fix = "a template that closes each answer, for instance --template plain"
        raise UserError("data/no-end-token", "no stop to learn", where=where, found=found, expected=expected, fix=fix)


# ---- printing ----


def render(report: Report, color: bool) -> str:
    """The report as text.

    Args:
        color: mark targets in green (for a terminal); otherwise they stand between ⟦ and ⟧.
    """
    legend = f"{GREEN}trained{RESET}, {DIM}context{RESET}" if color else "⟦trained⟧, the rest is context"
    blocks = [
        "\n".join([visible(report.path), *(f"  {visible(note)}" for note in report.notes)]),
        "\n".join(_summary(report)),
        "\n".join(["length in tokens, all rows", *_histogram(report.encoded.lengths, report.max_length)]),
        f"examples ({legend}; ¦ between tokens, ⏎ is a line break)",
        *(_row_text(row, color) for row in report.shown),
    ]
    return "\n\n".join(blocks) + "\n"


def _summary(report: Report) -> list[str]:
    counts = report.counts
    share = 100 * counts["supervised_tokens"] / max(1, counts["tokens"])
    lines = [
        f"rows used            {counts['used']} of {counts['rows']}",
        f"tokens               {counts['tokens']}, of which trained {counts['supervised_tokens']} ({share:.1f} %)",
        f"longest allowed      {report.max_length} tokens",
        f"prompt cut           {_rows(report.encoded.truncated)} (the start of the prompt is lost)",
        f"answer too long      {_rows(report.encoded.too_long)} (dropped)",
        f"nothing trained      {_rows(report.encoded.untrained)} (dropped)",
        f"open end             {_rows(report.open_ended)} (a trained turn without an end token)",
        f"control tokens       {counts['control_tokens_in_text']} in the data, encoded as plain text",
    ]
    dropped = [
        f"{label:<21}{counts[key]}"
        for key, label in (("duplicates", "duplicates"), ("empty", "empty answers"))
        if key in counts
    ]
    if lost := report.encoded.lost_reasoning:
        dropped.append(f"reasoning lost       {_rows(lost)} (the chat template leaves out the text up to </think>)")
    return lines + dropped


def _rows(numbers: Sequence[int]) -> str:
    if not numbers:
        return "0"
    more = ", …" if len(numbers) > 5 else ""
    return f"{len(numbers)}: row {', '.join(map(str, numbers[:5]))}{more}"


def _histogram(lengths: Sequence[int], limit: int) -> list[str]:
    if not lengths:
        return ["  no rows"]
    longest = max(lengths)
    width = max(1, -(-(longest + 1) // NUM_BINS))
    bins = [0] * -(-(longest + 1) // width)
    for length in lengths:
        bins[length // width] += 1
    top = max(bins)
    lines = []
    for i, number in enumerate(bins):
        first, last = i * width, (i + 1) * width - 1
        mark = "  over the limit" if first > limit and number else ""
        lines.append(f"  {first:>6} to {last:<6} {'█' * round(BAR_WIDTH * number / top):<{BAR_WIDTH}} {number}{mark}")
    return lines


def _row_text(row: ShownRow, color: bool) -> str:
    parts: list[str] = []
    for trained, tokens in _runs(row.tokens):
        text = "¦".join(token.text for token in tokens)
        if color:
            parts.append(f"{GREEN if trained else DIM}{text}{RESET}")
        else:
            parts.append(f"⟦{text}⟧" if trained else text)
    hidden = f" ({row.num_hidden} tokens in the middle of the prompt not shown)" if row.num_hidden else ""
    straddling = f"\n  {row.straddling} trained token(s) reach over the border into the prompt" if row.straddling else ""
    return f"row {row.row}{hidden}\n  {'¦'.join(parts)}\n  {_boundary(row)}{straddling}"


def _runs(tokens: Sequence[ShownToken]) -> list[tuple[bool, list[ShownToken]]]:
    runs: list[tuple[bool, list[ShownToken]]] = []
    for token in tokens:
        if not runs or runs[-1][0] != token.supervised:
            runs.append((token.supervised, []))
        runs[-1][1].append(token)
    return runs


def _boundary(row: ShownRow) -> str:
    """The two tokens on each side of the first border, with their ids."""
    first = next((i for i, token in enumerate(row.tokens) if token.supervised), len(row.tokens))

    def spelt(tokens: Sequence[ShownToken]) -> str:
        return " ".join(f"{token.text!r}={token.id}" for token in tokens) or "nothing"

    return f"border: {spelt(row.tokens[max(0, first - 2) : first])} | {spelt(row.tokens[first : first + 2])}"
