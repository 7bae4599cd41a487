"""Chat tokens that the base never learned, found before a run trains a stop that the model cannot write.

A base model's vocabulary often holds ``<|im_end|>`` and its kin with rows in embedding and head that are zero, or all alike.
LoRA on the other layers leaves those rows as they are: a zero row of the head gives the logit 0 whatever the adapter does, and
two equal rows of the embedding are one token to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, listing
from minisft.data.chat import Encoded
from minisft.data.token_rows import TokenRows
from minisft.data.tokenizer import Tokenizer
from minisft.formats.lazy_weights import open_model, read_rows
from minisft.formats.loading import EMBEDDING, HEAD
from minisft.formats.source import resolve
from minisft.model import CausalLM
from minisft.trained_rows import TrainedRows

ReadRow = Callable[[int], Tensor]  # token id -> its row, in any dtype


def untrained_tokens(model: CausalLM, tokenizer: Tokenizer, *sets: Iterable[Encoded]) -> tuple[str, ...]:
    """Report chat tokens whose frozen rows in embedding or head are zero or equal to each other.

    Args:
        model: as it will be trained, adapters included.
        tokenizer: its tokenizer.
        sets: rows that are trained on; tokens that no row uses do not matter.

    Returns:
        One note, or nothing if all is well.
    """
    embedding, head = _frozen_rows(model.embedding), _frozen_rows(model.lm_head)
    return _note(tokenizer, sets, embedding, head)


def untrained_tokens_of(
    path: str, tokenizer: Tokenizer, rows: Iterable[Encoded], model: CausalLM | None = None
) -> tuple[str, ...]:
    """Report the same for a model in its files.

    Args:
        path: the model, as ``load_tokenizer`` takes it.
        tokenizer: its tokenizer.
        rows: what would be trained on.
        model: says what is trained, where no process has the rows to look at; by default neither embedding nor head is.

    Returns:
        One note, or nothing if all is well or the weights cannot be read.
    """
    try:
        stored = open_model(resolve(path))
    except UserError:  # a folder with a tokenizer alone can be inspected, too
        return ()
    embedding = stored.open[EMBEDDING]()
    head = stored.open[HEAD]() if HEAD in stored.open else embedding

    def row_of(weight: object, table: nn.Module | None) -> ReadRow | None:
        if table is not None and _is_trained(table):
            return None
        return lambda i: read_rows(weight, i, i + 1)[0]  # type: ignore[arg-type]  # any stored weight

    tables = (None, None) if model is None else (model.embedding, model.lm_head)
    return _note(tokenizer, [rows], row_of(embedding, tables[0]), row_of(head, tables[1]))


def _frozen_rows(module: nn.Module) -> ReadRow | None:
    """Reads rows of a matrix that the run does not train; None where it does, or where its weight is no plain matrix."""
    if isinstance(module, TrainedRows):
        return module.row
    weight = getattr(getattr(module, "base", module), "weight", None)
    if _is_trained(module) or not isinstance(weight, Tensor):
        return None
    return lambda i: weight.detach()[i]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _note(
    tokenizer: Tokenizer, sets: Iterable[Iterable[Encoded]], embedding: ReadRow | None, head: ReadRow | None
) -> tuple[str, ...]:
    found_in = [_chat_tokens(tokenizer, rows) for rows in sets]
    used, learned = (set[int]().union(*ids) for ids in zip(*found_in, strict=True))
    bad = {
        "embedding": [] if embedding is None else _zero_or_equal(sorted(used), embedding),
        "head": [] if head is None else _zero_or_equal(sorted(learned), head),
    }
    found = [f"{name}: {listing(_names(tokenizer, ids))}" for name, ids in bad.items() if ids]
    if not found:
        return ()
    fix = "use the instruct model, --template plain, or --targets with embed_tokens and lm_head"
    return (f"chat tokens in the rows were never trained, their weights are zero or equal ({'; '.join(found)}): {fix}",)


def _chat_tokens(tokenizer: Tokenizer, rows: Iterable[Encoded]) -> tuple[set[int], set[int]]:
    """Added tokens that stand in the rows, and those among them that are targets."""
    if isinstance(rows, TokenRows):
        used, learned = (set(tokenizer.added_ids & ids) for ids in rows.vocabulary())
        return used, learned
    used, learned = set(), set()
    for row in rows:
        used |= tokenizer.added_ids.intersection(row.input_ids)
        learned |= {i for i, flag in zip(row.input_ids, row.supervised, strict=True) if flag and i in tokenizer.added_ids}
    return used, learned


def _zero_or_equal(ids: Sequence[int], read: ReadRow) -> list[int]:
    rows = [read(i) for i in ids]
    return [
        i
        for i, row in zip(ids, rows, strict=True)
        if not row.any() or any(torch.equal(row, other) for j, other in zip(ids, rows, strict=True) if j != i)
    ]


def _names(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    return [tokenizer.decode([i], skip_special=False) for i in ids]
