"""``--replay``: rows of another file in every step, so that what the model knew is not forgotten while it learns.

A file of rows in any form that training reads, or of plain text (a column ``text``, every token of it learned, as in
pretraining). They are never validated on. The one idea: the share counts rows, exactly and in every stretch of the run: after
step t floor(t * batch * share) of the rows were replayed ones, whatever was stopped and resumed. Tokens and supervised tokens
have other shares, which are reported.

Ref: Scialom et al. 2022, arXiv:2205.12393 (continual learning with a small share of earlier data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from minisft.batching import Share, step_rows
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.common.seeds import derive_seed
from minisft.config import RunConfig
from minisft.data.chat import Encoded
from minisft.data.encoding import encode_dataset
from minisft.data.messages import read_dataset
from minisft.data.open_rows import open_rows
from minisft.data.template import ChatTemplate
from minisft.data.token_rows import TokenRows
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.plain_text import windows
from minisft.training.identity import tokens_sha256

TEXT = "text"  # the column of plain text


@dataclass(frozen=True)
class Replay:
    """Encoded rows to replay, numbered below 0 (row 3 of the file is -3), their share, and what identifies them."""

    rows: tuple[Encoded, ...]
    share: Fraction
    identity: dict[str, JSON]
    facts: dict[str, JSON]


def read_replay(run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate, data_sha256: Sequence[str]) -> Replay | None:
    """Read and encode the rows of ``--replay``; None without it.

    Args:
        run: the settings.
        tokenizer: the model's.
        template: the run's chat template.
        data_sha256: of the files that are trained and validated on, which nobody means to replay.

    Returns:
        The rows, or None.

    Raises:
        UserError: ``data/...`` as for the training rows; ``config/replay-is-data``; ``data/no-rows``.
    """
    if run.replay is None:
        return None
    is_text = _is_text(run.replay)
    rows, sha256, form = _texts(run, tokenizer) if is_text else _chats(run, tokenizer, template)
    if sha256 in data_sha256:
        raise UserError(
            "config/replay-is-data", "the rows to replay are those of the run itself", where="--replay",
            found=visible(run.replay), expected="another file than --data and --eval-data",
            fix="give rows of what the model should not forget",
        )  # fmt: skip
    if not rows:
        raise UserError(
            "data/no-rows",
            "no usable row to replay",
            where=visible(run.replay),
            expected="at least one row with tokens to learn",
        )
    share = Fraction(str(run.replay_share_or_default))
    facts: dict[str, JSON] = {
        "path": run.replay, "sha256": sha256, "form": form, "rows": len(rows), "share_of_rows": float(share),
        "tokens": sum(len(row.input_ids) for row in rows), "supervised_tokens": sum(row.num_targets for row in rows),
    }  # fmt: skip
    return Replay(rows, share, {"sha256": sha256, "tokens": tokens_sha256(rows)}, facts)


def replay_words(replay: Replay, own: TokenRows) -> str:
    """What is replayed, in a sentence, and what share of the supervised tokens that is on average."""
    theirs, ours = sum(row.num_targets for row in replay.rows) / len(replay.rows), own.num_targets / len(own)
    tokens = replay.share * Fraction(theirs) / (replay.share * Fraction(theirs) + (1 - replay.share) * Fraction(ours))
    return (
        f"replay: {len(replay.rows)} rows ({replay.facts['form']}) of {visible(replay.facts['path'])}, "
        f"{float(replay.share):.1%} of the rows and {float(tokens):.1%} of the supervised tokens"
    )


def validated_too(replay: Replay, validation: Sequence[Encoded]) -> str:
    """A warning about rows that are replayed and validated on, token for token; empty if there are none."""
    held_out = {tuple(row.input_ids) for row in validation}
    both = sum(tuple(row.input_ids) in held_out for row in replay.rows)
    return f"warning: {both} rows to replay are validated on too: the validation loss is too good" if both else ""


def _is_text(path: str | Path) -> bool:
    """Whether the file's first row is plain text: a column ``text`` and none that a chat would have."""
    first = next(iter(open_rows(path).rows()), None)
    chats = ("messages", "conversations", "instruction", "prompt", "completion")
    return first is not None and TEXT in first[2] and not any(name in first[2] for name in chats)


def _texts(run: RunConfig, tokenizer: Tokenizer) -> tuple[tuple[Encoded, ...], str, str]:
    source, rows = open_rows(str(run.replay)), []
    for number, where, values in source.rows():
        text = values.get(TEXT)
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                "data/no-text", "a row to replay has no text", where=where, found=visible(text, 60), expected='{"text": "..."}'
            )
        try:  # longer texts are cut, and nothing of them is lost
            parts = list(windows(tokenizer, text, run.max_length - 1))
        except UserError as error:
            raise error.at(where) from None
        for part in parts:
            flags = [False] * len(part.context) + [True] * len(part.target)
            rows.append(Encoded([*part.context, *part.target], flags, -number, 0, len(part.context)))
    return tuple(rows), source.sha256, "plain text"


def _chats(run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[tuple[Encoded, ...], str, str]:
    dataset = read_dataset(str(run.replay))
    encoded = encode_dataset(
        dataset.examples, tokenizer, template, run.max_length, turns=run.turns,
        allow_control_tokens=run.allow_control_tokens, strict=run.strict, path=str(run.replay),
    )  # fmt: skip
    return tuple(replace(row, row=-row.row) for row in encoded.rows), dataset.sha256, dataset.form


# ---- which rows a step has -----------------------------------------------------------------------------------------------


def num_replayed(step: int, batch_size: int, share: Fraction) -> int:
    """How many of the rows of the first ``step`` steps were replayed ones: floor(step * batch_size * share).

    Args:
        step: the last step that counts; 0 for none.
        batch_size: rows of a step, both kinds together.
        share: of replayed rows.

    Returns:
        The number, exact: the share is a fraction.
    """
    return math.floor(step * batch_size * share)


def steps_of_epochs(epochs: float, num_rows: int, batch_size: int, share: Fraction) -> int:
    """The least number of steps in which ``num_rows`` rows of the run's own come ``epochs`` times beside the replayed ones.

    Args:
        epochs: passes over the run's own rows.
        num_rows: how many these are.
        batch_size: rows of a step, both kinds together.
        share: of replayed rows.

    Returns:
        At least 1.
    """
    # Own rows of s steps: ceil(s * batch_size * (1 - share)), so less than one row before the end is enough.
    steps = max(1, math.floor((epochs * num_rows - 1) / (batch_size * (1 - share))))
    while steps * batch_size - num_replayed(steps, batch_size, share) < epochs * num_rows:
        steps += 1
    return steps


def mixed_rows(
    step: int, batch_size: int, num_rows: int, num_replay: int, share: Fraction, seed: int, shares: tuple[Share, ...] = ()
) -> list[tuple[bool, int]]:
    """The rows of one optimizer step: first those of the run's own stream, then those of the replayed one.

    Each stream is an endless series of shuffled epochs of its own, taken up where the step before left it.

    Args:
        step: from 1.
        batch_size: rows of a step, both kinds together.
        num_rows, num_replay: rows in the data, and in the file to replay.
        share: of replayed rows.
        seed: the run's.
        shares: what each file of a mixture gives to an epoch of the run's own stream.

    Returns:
        (is it replayed, index) of each row.
    """
    replayed = [num_replayed(s, batch_size, share) for s in (step - 1, step)]
    own = [s * batch_size - number for s, number in zip((step - 1, step), replayed, strict=True)]
    other = derive_seed(seed, "replay")
    # A step of one row is that row of the stream.
    return [
        *((False, step_rows(i + 1, 1, num_rows, seed, shares)[0]) for i in range(*own)),
        *((True, step_rows(i + 1, 1, num_replay, other)[0]) for i in range(*replayed)),
    ]
