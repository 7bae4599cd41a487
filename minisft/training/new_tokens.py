"""The tokenizer of a run: its base's, with the tokens that the run adds or that its adapter brings, and rows for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

from minisft.common.errors import listing, visible
from minisft.common.safe_json import JSON
from minisft.config import ModelConfig, RunConfig
from minisft.data.chat import Encoded
from minisft.data.new_tokens import add_tokens, read_tokens
from minisft.data.token_rows import TokenRows
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_tokenizer
from minisft.formats.adapter_config import config_path
from minisft.formats.adapter_rows import grown_vocabulary, read_row_ids, saved_tokenizer
from minisft.model import CausalLM
from minisft.new_rows import grow_
from minisft.training.reporters import Log


def tokenizer_of_run(run: RunConfig, base: Tokenizer | None = None) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer that a run encodes its rows with, and notes on the tokens that were added.

    Args:
        run: the settings.
        base: the tokenizer of ``run.model``; by default it is loaded.

    Raises:
        UserError: what ``read_tokens``, ``add_tokens`` and ``saved_tokenizer`` refuse.
    """
    base = load_tokenizer(run.model) if base is None else base
    if run.add_tokens is not None:
        return add_tokens(base, read_tokens(run.add_tokens), visible(run.add_tokens))
    return saved_tokenizer(run.init_adapter, base), ()


def rows_of_run(run: RunConfig, config: ModelConfig) -> tuple[int, Sequence[int]]:
    """How many rows the tables of a run's model have, and which of them are trained beside its adapters.

    Args:
        run: the settings.
        config: of the base.

    Returns:
        The vocabulary's size, and ids.

    Raises:
        UserError: as ``tokenizer_of_run``.
    """
    size = config.vocab_size
    if run.add_tokens is not None:
        tokenizer, _ = tokenizer_of_run(run)
        size = max(size, tokenizer.vocab_size)
        return size, () if run.method == "full" else range(size) if run.train_tokens == "all" else tokenizer.new_ids
    if run.init_adapter is None:
        return size, ()
    folder = Path(run.init_adapter)
    ids = read_row_ids(config_path(folder))
    size = grown_vocabulary(ids, size, config.tie_word_embeddings, folder)
    return size, max(ids.values(), key=len, default=())


def with_new_tokens_(run: RunConfig, model: CausalLM, tokenizer: Tokenizer, log: Log) -> Tokenizer:
    """The run's tokenizer; the tables of ``model`` get a row for each of its tokens.

    Args:
        run: the settings.
        model: the base, changed in place.
        tokenizer: the base's.
        log: is told what was added.

    Returns:
        ``tokenizer``, or another one that knows more tokens.

    Raises:
        UserError: as ``tokenizer_of_run``; ``config/new-tokens`` for a model that cannot have new rows.
    """
    tokenizer, notes = tokenizer_of_run(run, tokenizer)
    if run.add_tokens is not None:
        old = model.config.vocab_size
        grow_(model, max(old, tokenizer.vocab_size))
        for note in notes:
            log(note)
        log(_size_words(run, model, len(tokenizer.new_ids), old))
    return tokenizer


def _size_words(run: RunConfig, model: CausalLM, count: int, old: int) -> str:
    """How large the tables are now, and what is saved of them."""
    new, tables = model.config.vocab_size, 1 if model.config.tie_word_embeddings else 2
    words = f"embedding and head: {old:,} rows before, {new:,} now"
    if run.method == "full":
        return words
    saved = (new if run.train_tokens == "all" else count) * tables
    return f"{words}; {saved:,} of them are trained, {saved * model.config.hidden_size * 4:,} bytes of the adapter"


def tokens_identity(run: RunConfig) -> dict[str, JSON]:
    """What identifies the tokens that a run adds; empty without any, as in runs that knew of none."""
    if run.add_tokens is None:
        return {}
    text = json.dumps([astuple(token) for token in read_tokens(run.add_tokens)])
    return {"add_tokens": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "train_tokens": run.train_tokens}}


def unused_tokens(tokenizer: Tokenizer, sets: Iterable[Iterable[Encoded]]) -> tuple[str, ...]:
    """One note if new tokens stand in no row, or nothing: such a row of the embedding stays where it started."""
    used: set[int] = set()
    for rows in sets if tokenizer.new_ids else ():
        ids = rows.vocabulary()[0] if isinstance(rows, TokenRows) else {i for row in rows for i in row.input_ids}
        used |= {int(i) for i in ids}
    unused = [tokenizer.decode([i], skip_special=False) for i in tokenizer.new_ids if i not in used]
    if not unused:
        return ()
    shown = listing((visible(token) for token in unused), 6)
    return (f"{len(unused)} of {len(tokenizer.new_ids)} new tokens stand in no row and learn nothing of their use: {shown}",)
