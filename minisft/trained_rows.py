"""A few trained rows over a frozen table: what new tokens need of the embedding and of the output head.

    W'[i] = R[k] where i = ids[k], and W[i] elsewhere

The embedding looks rows of W' up and the head multiplies by it; tied, both have the one R. R takes the place of rows instead of
being added to them (as in PEFT), so what stands in those rows of W never matters. No gradient reaches W: the old rows keep every
bit. Refused are rows over a table that has an adapter or is in 4 bits, and models that transformers computes.

Ref: PEFT 0.21, ``TrainableTokensLayer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.adapter import Fp32Parameters
from minisft.common.errors import UserError
from minisft.common.seeds import generator
from minisft.matmul import linear
from minisft.model import CausalLM

NOISE = 0.01  # of a fresh row, in standard deviations of its column: enough that no two new tokens are one to the model
_CHUNK_ROWS = 2**14  # of a table, made fp64 at a time


class TrainedRows(Fp32Parameters):
    """A frozen table (V, D) with trained rows R (n, D), fp32 or wider, in the places ``ids`` (n,), ascending.

    Args:
        base: the table's module; it is frozen here.
        ids: which rows.
        rows: R; a table that is tied to another one has that one's. By default a copy of these rows of W.
    """

    ids: Tensor
    rows: nn.Parameter

    def __init__(self, base: nn.Embedding | nn.Linear, ids: Tensor, rows: nn.Parameter | None = None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.register_buffer("ids", ids, persistent=False)
        weight = base.weight.detach()
        self.rows = rows if rows is not None else nn.Parameter(weight[ids].to(torch.promote_types(weight.dtype, torch.float32)))
        self.enabled = True  # surgery.adapters_off turns it off for a while

    def row(self, i: int) -> Tensor:
        """W'[i], (D,)."""
        found = (self.ids == i).nonzero()
        return self.rows.detach()[int(found[0])] if len(found) else self.base.weight.detach()[i]

    def merged_rows(self, weight_rows: Tensor, begin: int = 0) -> Tensor:
        """Rows [begin, ...) of W', given these rows of W, in the wider dtype of both."""
        own = self.rows.detach()
        here = (self.ids >= begin) & (self.ids < begin + len(weight_rows))
        whole = weight_rows.to(torch.promote_types(weight_rows.dtype, own.dtype), copy=True)
        return whole.index_copy_(0, self.ids[here] - begin, own[here].to(whole.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.ids)} trained rows"


class EmbeddingRows(TrainedRows):
    """y = W'[x]."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        k = torch.searchsorted(self.ids, x).clamp_(max=len(self.ids) - 1)
        return torch.where((self.ids[k] == x)[..., None], F.embedding(k, self.rows).to(y.dtype), y)


class HeadRows(TrainedRows):
    """y = x W'^T."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        own = linear(x, self.rows.to(x.dtype))
        return own if len(self.ids) == len(self.base.weight) else self.base(x).index_copy(-1, self.ids, own)


def row_modules(model: nn.Module) -> dict[str, TrainedRows]:
    """All tables with trained rows by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedRows)}


def own_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """The same without a head that is tied: it has the embedding's rows."""
    found: dict[int, tuple[str, TrainedRows]] = {}
    for path, module in row_modules(model).items():
        found.setdefault(id(module.rows), (path, module))
    return dict(found.values())


# ---- new rows --------------------------------------------------------------------------------------------------------


def grow_(model: CausalLM, num_rows: int) -> None:
    """Give the embedding and the head ``num_rows`` rows; each new row is the mean of the old ones, which stay bit for bit.

    Args:
        model: without adapters; changed in place, its configuration too.
        num_rows: of the tables; no fewer than now.

    Raises:
        UserError: ``config/new-tokens``, for tables that cannot grow.
    """
    tables = _tables(model)
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
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
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
    embedding, head = _tables(model)
    where = torch.tensor(sorted(ids), device=embedding.weight.device)
    new = torch.isin(where, torch.tensor(sorted(fresh), device=where.device, dtype=where.dtype)).nonzero()[:, 0]
    modules: list[TrainedRows] = [EmbeddingRows(embedding, where)]
    tied = head.weight is embedding.weight
    modules.append(HeadRows(head, where, modules[0].rows if tied else None))
    with torch.no_grad():
        for number, module in enumerate(modules[: 1 if tied else 2]):
            rows = _fresh_rows(module.base.weight, len(new), seed, number)
            module.rows[new] = rows.to(module.rows)
    for module in modules:
        module.train(model.training)
    model.model.embed_tokens, model.lm_head = modules  # type: ignore[assignment]  # the same calls, over the same tables
    return ["model.embed_tokens", "lm_head"]


def _tables(model: CausalLM) -> tuple[nn.Embedding, nn.Linear]:
    """Embedding and head, plain and dense."""
    if isinstance(model, CausalLM) and type(model) is CausalLM:
        embedding, head = model.model.embed_tokens, model.lm_head
        if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight.is_floating_point():
            return embedding, head
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        fix = "leave embed_tokens and lm_head out of --targets and in a float dtype"
    else:
        found, fix = type(model).__name__, "resize and save it with transformers (resize_token_embeddings), then train that model"
    raise UserError(
        "config/new-tokens", "this model's embedding and head cannot have new rows", found=found,
        expected="a dense embedding and head without adapters, in our own decoder", fix=fix,
    )  # fmt: skip


def _own_tables(model: CausalLM) -> list[nn.Embedding | nn.Linear]:
    embedding, head = _tables(model)
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
