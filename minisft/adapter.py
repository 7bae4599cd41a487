"""What every adapter shares: a frozen base, two thin factors and their scaling.

The factors are fp32 whatever the dtype of the base, and the base never gets a gradient; it may be dense or quantized (QLoRA).
Every adapter gives D = W' - W, also for a few rows at a time (``delta_rows``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.common.fp32 import Fp32Parameters
from minisft.common.seeds import generator
from minisft.nf4_linear import NF4Linear

FrozenLinear = nn.Linear | NF4Linear


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """What an adapter's product is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Args:
        rank: rows of ``lora_A``.
        alpha: as a run is configured.
        use_rslora: whether the scaling keeps its size as the rank grows.

    Returns:
        the factor.

    Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
    """
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_rank(rank: int, shape: tuple[int, ...], where: str = "") -> None:
    """Refuse a rank below 1 or above the smaller side of the weight.

    Args:
        rank: of the adapter.
        shape: of the weight.
        where: the layer, for the message.

    Raises:
        UserError: ``config/bad-rank``.
    """
    if not 1 <= rank <= min(shape):
        raise UserError(
            "config/bad-rank",
            "the rank does not fit the layer",
            where=where,
            found=f"rank {rank}",
            expected=f"1 to {min(shape)} for a weight of shape {' x '.join(map(str, shape))}",
            fix="choose a smaller --rank or fewer --targets",
        )


@dataclass(frozen=True)
class RowDraws:
    """Where the masks of one layer come from: a step's seed, the layer's number, and (begin, end, data row) of flat tokens."""

    seed: int
    layer: int
    pieces: Sequence[tuple[int, int, int]]


class RowDropout(nn.Dropout):
    """Dropout whose masks belong to data rows while ``draws`` is set; otherwise it draws as ``nn.Dropout`` does.

    mask(row) ~ Bernoulli(1 - p) / (1 - p), a function of (seed, row, layer) alone. So a row loses the same numbers padded or
    packed, in whichever micro-batch it lies and whoever computes it. A row that a step holds twice has one mask.
    """

    draws: RowDraws | None = None  # set and taken back by ``step.accumulate_gradients``

    def forward(self, input: Tensor) -> Tensor:
        if self.draws is None or not self.training or self.p == 0:
            return super().forward(input)
        return input * self._mask(input, self.draws)

    def _mask(self, x: Tensor, draws: RowDraws) -> Tensor:
        """(N, in) of 0 and 1 / (1 - p) for N flat tokens; padding, which nobody looks at, gets 0."""
        keep = torch.zeros_like(x)
        for begin, end, row in draws.pieces:
            draw = generator(draws.seed, "row", row, draws.layer, device=x.device)
            keep[begin:end].bernoulli_(1 - self.p, generator=draw)
        return keep.div_(1 - self.p)


class Adapter(Fp32Parameters):
    """A frozen layer and its update; ``LoRALinear``, ``DoRALinear``, ``PiSSALinear`` and ``LoRAEmbedding`` are its kinds.

    Args:
        base: the layer; it is frozen here.
        shape: (rows, columns) of B A.
        rank, alpha, dropout, use_rslora: see ``LoRAConfig``.

    Raises:
        UserError: rank below 1 or above the smaller side of the base.
    """

    def __init__(
        self,
        base: FrozenLinear | nn.Embedding,
        shape: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
    ) -> None:
        super().__init__()
        check_rank(rank, shape)
        rows, columns = shape
        self.base: FrozenLinear | nn.Embedding = base.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = scaling_of(rank, alpha, use_rslora)
        self.dropout = RowDropout(dropout)
        dtype, device = _dtype_and_device(base)
        master = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
        self.lora_A = nn.Parameter(torch.zeros(rank, columns, dtype=master, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=master, device=device))
        self.enabled = True  # surgery.adapters_off turns it off for a while

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the layer multiplies by them and as they are saved: the update is scaling * B A."""
        return self.lora_A, self.lora_B

    @property
    def saved_rank(self) -> int:
        """The rank of ``factors``."""
        return self.factors()[0].shape[0]

    @property
    def saved_alpha(self) -> float:
        """The alpha with which ``factors``, as an adapter of their own rank, have this one's scaling."""
        times = self.saved_rank / self.rank
        return self.alpha * (math.sqrt(times) if self.use_rslora else times)

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """Rows of scaling * B A, laid out as the base's weight, in the factors' dtype."""
        raise NotImplementedError  # a linear lays them out (out, in), an embedding (num_embeddings, dim)

    def delta_rows(self, weight_rows: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of D = W' - W, given these rows of W, which need not be the base's; a plain LoRA's do not depend on W."""
        return self.update_rows(rows)

    def delta_weight(self) -> Tensor:
        """D = W' - W of the whole layer, shaped as the base's weight, in the factors' dtype."""
        return self.update_rows()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


def _dtype_and_device(base: FrozenLinear | nn.Embedding) -> tuple[torch.dtype, torch.device]:
    """Those of the base's weight; for a quantized one the dtype it was made from."""
    if isinstance(base, NF4Linear):
        return base.weight_dtype, base.packed.device
    return base.weight.dtype, base.weight.device
