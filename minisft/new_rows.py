"""New rows of a model's embedding and head: growing the tables, where new rows start, and which rows are trained.

A new row starts as the mean of its table and a little noise: a token like all others, and none like another new one. Refused
are tables that have an adapter or are in 4 bits, and models that transformers computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.common.seeds import generator
from minisft.model import CausalLM
from minisft.trained_rows import EmbeddingRows, HeadRows, own_rows

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NOISE = 0.01  # of a fresh row, in standard deviations of its column: enough that no two new tokens are one to the model
_CHUNK_ROWS = 2**14  # of a table, made fp64 at a time


def grow_(model: CausalLM, num_rows: int) -> None:
    """Give the embedding and the head ``num_rows`` rows; each new row is the mean of the old ones, which stay bit for bit.

    Args:
        model: without adapters; changed in place, its configuration too.
        num_rows: of the tables; no fewer than now.

    Raises:
        UserError: ``config/new-tokens``, for tables that cannot grow.
    """
    tables = require_tables(model)
    if num_rows == model.config.vocab_size:
        return
    tied = tables[0].weight is tables[1].weight
    for table in tables[: 1 if tied else 2]:
        weight = table.weight.detach()
        more = _mean_and_spread(weight)[0].to(weight.dtype).expand(num_rows - len(weight), -1)
        table.weight = nn.Parameter(torch.cat([weight, more]), requires_grad=table.weight.requires_grad)
    embedding, head = tables
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = num_rows
    model.config = dataclasses.replace(model.config, vocab_size=num_rows)


def set_fresh_rows_(model: CausalLM, ids: Sequence[int], seed: int) -> None:
    """Write fresh rows into the tables themselves, for a run that trains all weights: mean of the table + noise.

    Args:
        model: its tables have these rows; changed in place.
        ids: which rows.
        seed: of the noise.
    """
    with torch.no_grad():
        for number, table in enumerate(_own_tables(model)):
            table.weight[torch.tensor(ids)] = _fresh_rows(table.weight, len(ids), seed, number).to(table.weight.dtype)


def train_rows_(model: CausalLM, ids: Sequence[int], fresh: Collection[int] = (), seed: int = 0) -> list[str]:
    """Train these rows of embedding and head, and freeze the others; what else is trained stays so.

    Args:
        model: changed in place.
        ids: which rows.
        fresh: those among them that start as the mean of their table + noise; the others start as they are.
        seed: of the noise: N(0, 1) times ``NOISE`` times the standard deviation of the column.

    Returns:
        The paths of embedding and head.

    Raises:
        UserError: ``config/new-tokens``, for tables that have an adapter or cannot have such rows.

    Cost: n D numbers for each table that is not tied, and in a forward pass of the head as many columns of logits more.
    """
    wrap_rows_(model, {EMBEDDING: ids, HEAD: ids})
    for number, module in enumerate(own_rows(model).values()):
        new = torch.isin(module.ids, torch.tensor([*fresh], device=module.ids.device, dtype=module.ids.dtype)).nonzero()[:, 0]
        with torch.no_grad():
            module.rows[new] = _fresh_rows(module.base.weight, len(new), seed, number).to(module.rows)
    return [EMBEDDING, HEAD]


def wrap_rows_(model: CausalLM, ids: Mapping[str, Sequence[int]]) -> None:
    """Put trained rows over the tables, copies of the tables' own; a tied head has those of the embedding.

    Args:
        model: changed in place.
        ids: ``EMBEDDING`` and ``HEAD``, or one of them, to rows.

    Raises:
        UserError: ``config/new-tokens``, for tables that have an adapter or cannot have such rows.
    """
    embedding, head = require_tables(model)
    rows_of = {path: torch.tensor(sorted(found), device=embedding.weight.device) for path, found in ids.items()}
    tied, training = head.weight is embedding.weight, model.training
    if EMBEDDING in rows_of:
        model.model.embed_tokens = rows = EmbeddingRows(embedding, rows_of[EMBEDDING]).train(training)
        if tied:
            model.lm_head = HeadRows(head, rows_of[EMBEDDING], rows.rows).train(training)  # type: ignore[assignment]  # called alike
    if HEAD in rows_of and not tied:
        model.lm_head = HeadRows(head, rows_of[HEAD]).train(training)  # type: ignore[assignment]  # called alike


def require_tables(model: CausalLM) -> tuple[nn.Embedding, nn.Linear]:
    """Embedding and head of a model whose tables can have new rows.

    Raises:
        UserError: ``config/new-tokens``: another decoder than ours, a table with an adapter or in 4 bits.
    """
    if isinstance(model, CausalLM) and type(model) is CausalLM:
        embedding, head = model.model.embed_tokens, model.lm_head
        if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight.is_floating_point():
            return embedding, head
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        fix = "leave embed_tokens and lm_head out of --targets and in a float dtype"
    else:
        found, fix = (
            type(model).__name__,
            "resize and save it with transformers (resize_token_embeddings), then train that model",
        )
    raise UserError(
        "config/new-tokens", "this model's embedding and head cannot have new rows", found=found,
        expected="a dense embedding and head without adapters, in our own decoder", fix=fix,
    )  # fmt: skip


def _own_tables(model: CausalLM) -> list[nn.Embedding | nn.Linear]:
    embedding, head = require_tables(model)
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def _mean_and_spread(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, (1, D) in fp64."""
    total = torch.zeros(1, weight.shape[1], dtype=torch.float64, device=weight.device)
    squares = torch.zeros_like(total)
    for part in weight.split(_CHUNK_ROWS):
        numbers = part.double()
        total += numbers.sum(0)
        squares += numbers.square().sum(0)
    mean = total / len(weight)
    return mean, (squares / len(weight) - mean.square()).clamp_(min=0).sqrt_()


def _fresh_rows(weight: Tensor, count: int, seed: int, number: int) -> Tensor:
    """mean + NOISE * spread * N(0, 1), (count, D) in fp64; ``number`` tells the head's draws from the embedding's."""
    mean, spread = _mean_and_spread(weight.detach())
    draw = torch.randn(count, weight.shape[1], generator=generator(seed, "new-tokens", number), dtype=torch.float64)
    return mean + NOISE * spread * draw.to(mean.device)
