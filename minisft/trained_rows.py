"""A few trained rows over a frozen table: what new tokens need of the embedding and of the output head.

    W'[i] = R[k] where i = ids[k], and W[i] elsewhere

The embedding looks rows of W' up and the head multiplies by it; tied, both have the one R. R takes the place of rows instead of
being added to them (as in PEFT), so what stands in those rows of W never matters. No gradient reaches W: the old rows keep
every bit. How a model gets such rows stands in ``new_rows``.

Ref: PEFT 0.21, ``TrainableTokensLayer``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.common.fp32 import Fp32Parameters
from minisft.matmul import linear


class TrainedRows(Fp32Parameters):
    """A frozen table (V, D) with trained rows R (n, D), fp32 or wider, for ``ids`` (n,), ascending.

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

    def whole_weight(self) -> Tensor:
        """W' as a tensor of its own, (V, D) in the dtype of W, without a gradient: for a loss that multiplies by it itself."""
        weight, rows = self.base.weight.detach(), self.rows.detach()
        return weight.index_copy(0, self.ids, rows.to(weight.dtype))

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
