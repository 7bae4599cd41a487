"""Trained rows of embedding and head in an adapter folder: PEFT's ``trainable_token_indices``, and the tokenizer beside it.

The config holds which rows, a list where the head is tied (or is not trained) and names to lists where both tables have rows
of their own; the file holds one tensor a table, ``<table>.token_adapter.trainable_tokens_delta``, which are the rows themselves
in spite of the name. Rows beyond the base's vocabulary must all be there: then the base is grown, and nothing of its new rows
is left to chance.

Ref: PEFT 0.21, ``TrainableTokensWrapper``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.tokenizer import Tokenizer
from minisft.formats.adapter_config import CONFIG_FILE, MERGE_THERE
from minisft.formats.adapter_tensors import AGAIN, PREFIX, finite_tensors
from minisft.formats.fields import read_json_object, write_json
from minisft.formats.safetensors_file import Header
from minisft.model import CausalLM
from minisft.new_rows import EMBEDDING, HEAD, grow_, require_tables, wrap_rows_
from minisft.surgery import matches
from minisft.trained_rows import own_rows, row_modules

KEY = "trainable_token_indices"
TOKENIZER_FILE = "tokenizer.json"
RowIds = Mapping[str, Sequence[int]]  # EMBEDDING, HEAD -> rows, ascending


def rows_name(path: str) -> str:
    """The name of the rows of the table at ``path``."""
    return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def indices_of(model: nn.Module) -> JSON:
    """What ``adapter_config.json`` says of the model's trained rows; None without any."""
    found: dict[str, JSON] = {path.rpartition(".")[2]: module.ids.tolist() for path, module in own_rows(model).items()}
    if not found:
        return None
    return found if HEAD in found else next(iter(found.values()))


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's trained rows by their names in the file."""
    return {rows_name(path): module.rows.detach() for path, module in own_rows(model).items()}


def read_row_ids(config_file: Path) -> dict[str, list[int]]:
    """Which rows of which table an adapter brings, in the order of its file; empty for most adapters.

    Args:
        config_file: ``adapter_config.json``.

    Raises:
        UserError: ``adapter/bad-config``, for anything but rows of embedding and head.
    """
    value = read_json_object(config_file, "adapter/bad-config").get(KEY)
    if not value:
        return {}
    found: dict[str, list[int]] = {}
    for name, ids in (
        {"embed_tokens": value} if isinstance(value, list) else value if isinstance(value, dict) else {"": None}
    ).items():
        path = next((path for path in (EMBEDDING, HEAD) if matches(path, name)), None)
        if path is None or not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            shown = visible(f"{name}: {ids}" if name else value, 100)
            raise _bad(config_file, "no rows of embed_tokens or lm_head", shown, "a list of rows, or these names to lists")
        if len(set(ids)) < len(ids):
            raise _bad(config_file, "a row stands there twice", visible(name), "each row once")
        found[path] = [int(str(i)) for i in ids]
    return found


def grown_vocabulary(ids: RowIds, vocab_size: int, tied: bool, where: Path) -> int:
    """How many rows the tables need for these.

    Args:
        ids: what ``read_row_ids`` found.
        vocab_size: rows of the base.
        tied: whether the base's head is its embedding.
        where: the adapter, for messages.

    Returns:
        ``vocab_size``, or more for new tokens.

    Raises:
        UserError: ``adapter/base-mismatch``, if a new row would have no numbers; ``adapter/unsupported``, for two lists over
            one table.
    """
    if tied and len(ids) == 2 and sorted(ids[EMBEDDING]) != sorted(ids[HEAD]):
        raise UserError(
            "adapter/unsupported", "other rows are trained in the head than in the embedding, which are one table in this base",
            where=visible(where), found=f"{len(ids[EMBEDDING])} and {len(ids[HEAD])} rows", fix=MERGE_THERE,
        )  # fmt: skip
    size = max((max(rows) + 1 for rows in ids.values()), default=0)
    for path in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        own = set(ids.get(path, ids.get(EMBEDDING, ()) if tied else ()))
        if missing := [i for i in range(vocab_size, min(size, vocab_size + 2**20)) if i not in own]:
            raise UserError(
                "adapter/base-mismatch", f"the adapter's rows lie beyond the base's vocabulary, and {path} has not all of them",
                where=visible(where), found=f"rows up to {size - 1:,}, none for {listing(map(str, missing), 3)}",
                expected=f"rows below {vocab_size:,}, and all of the new ones", fix="give the base that it was trained on",
            )  # fmt: skip
    return max(size, vocab_size)


def read_rows_of(ids: RowIds, hidden_size: int, tied: bool, header: Header) -> dict[str, Tensor]:
    """The rows of each table from the file, put in ascending order: finite.

    Args:
        ids: what ``read_row_ids`` found.
        hidden_size: D.
        tied: a tied head has no tensor of its own.
        header: of ``adapter_model.safetensors``, whose names have been checked.

    Returns:
        EMBEDDING, HEAD -> rows, (n, D) in the dtype of the file.

    Raises:
        UserError: ``adapter/shape``, ``adapter/dtype``, ``adapter/non-finite``.
    """
    names = {path: rows_name(path) for path in tables_in_file(ids, tied)}
    for path, name in names.items():
        entry = header.entries[name]
        if entry.shape != (len(ids[path]), hidden_size) or not entry.dtype.startswith(("F", "BF")):
            raise UserError(
                "adapter/shape", f"the rows of {path} are not as the config says", where=visible(header.path),
                found=f"{entry.dtype} {list(entry.shape)}", expected=f"floats {[len(ids[path]), hidden_size]}", fix=AGAIN,
            )  # fmt: skip
    tensors = finite_tensors([*names.values()], header)
    return {path: tensors[name][torch.tensor(ids[path]).argsort()] for path, name in names.items()}


def tables_in_file(ids: RowIds, tied: bool) -> list[str]:
    """The tables that have a tensor in the file."""
    return [path for path in ids if not (tied and path == HEAD and EMBEDDING in ids)]


class RowsInFile:
    """The trained rows of an adapter's files on their way into a model: checked, read, put over its tables.

    Args:
        model: the base; nothing is changed here.
        config_file: ``adapter_config.json``.
        targets: paths of the layers that get an adapter.

    Raises:
        UserError: what ``read_row_ids`` and ``grown_vocabulary`` refuse; ``adapter/unsupported`` for a table that has an
            adapter as well, and for a model of another decoder.
    """

    def __init__(self, model: nn.Module, config_file: Path, targets: Sequence[str]) -> None:
        self.ids, self.names = read_row_ids(config_file), list[str]()
        if not self.ids:
            return
        if both := [path for path in (EMBEDDING, HEAD) if path in targets]:
            what = "a table has an adapter and trained rows"
            raise UserError("adapter/unsupported", what, where=visible(config_file), found=listing(both), fix=MERGE_THERE)
        if not isinstance(model, CausalLM) or type(model) is not CausalLM:
            what, found = f"{KEY} needs a model of our own decoder", type(model).__name__
            raise UserError("adapter/unsupported", what, where=visible(config_file), found=found, fix=MERGE_THERE)
        require_tables(model)
        self.model, self.tied = model, model.config.tie_word_embeddings
        self.num_rows = grown_vocabulary(self.ids, model.config.vocab_size, self.tied, config_file.parent)
        self.names = [rows_name(path) for path in tables_in_file(self.ids, self.tied)]

    def read(self, header: Header) -> dict[str, Tensor]:
        """See ``read_rows_of``."""
        return read_rows_of(self.ids, self.model.config.hidden_size, self.tied, header) if self.ids else {}

    def grow_(self) -> None:
        """Give the model's tables the rows that new tokens need."""
        if self.ids:
            grow_(self.model, self.num_rows)

    @torch.no_grad()
    def put_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the rows that ``read`` has read over the tables."""
        if self.ids:
            wrap_rows_(self.model, {path: self.ids[path] for path in tensors})
        for path, numbers in tensors.items():
            row_modules(self.model)[path].rows.copy_(numbers)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer of an adapter with new tokens, as transformers and ``load_tokenizer`` read it."""
    tokenizer.save(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [*tokenizer.eos_ids]})


def saved_tokenizer(folder: str | Path | None, base: Tokenizer) -> Tokenizer:
    """The tokenizer that an adapter is used with: its own if it brings trained rows and one, else the base's.

    Args:
        folder: of the adapter; None for no adapter.
        base: the tokenizer of its base.

    Raises:
        UserError: ``adapter/tokenizer``, if it is not the base's with more tokens; what reading it raises.
    """
    config_file = None if folder is None else Path(folder) / CONFIG_FILE
    if config_file is None or not config_file.is_file() or not (config_file.parent / TOKENIZER_FILE).is_file():
        return base
    if not read_row_ids(config_file):
        return base
    own = Tokenizer.from_folder(config_file.parent)
    if not own.extends(base):
        what, found = "the adapter's tokenizer is not its base's with more tokens", f"{own.vocab_size:,} tokens"
        raise UserError(
            "adapter/tokenizer", what, where=visible(config_file.parent), found=found,
            expected=f"the {base.vocab_size:,} of the base, and more", fix="load the base that the adapter was trained on",
        )  # fmt: skip
    return own


def _bad(config_file: Path, what: str, found: str, expected: str) -> UserError:
    where, fix = f"{visible(config_file)}: {KEY}", "correct the value, or save the adapter again"
    return UserError("adapter/bad-config", f"a setting is wrong: {what}", where=where, found=found, expected=expected, fix=fix)
