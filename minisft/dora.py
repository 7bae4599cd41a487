"""DoRA: LoRA whose rows have trained lengths; A and B give only their directions.

Ref: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from minisft.adapter import FrozenLinear
from minisft.common.shares import is_share, whole
from minisft.lora import LoRALinear
from minisft.matmul import dense_weight
from minisft.nf4 import CHUNK, QuantizedWeight
from minisft.nf4_linear import NF4Linear


class DoRALinear(LoRALinear):
    """y = g * (x W^T + scaling * x A^T B^T) + b, where g = m / |W + scaling * B A| stretches each output.

    W' = g * (W + scaling * B A): the norms are those of the rows, over the inputs, so m (out,) holds the lengths of the rows
    of W' and A and B only their directions. m is fp32 or wider and starts as the norms of W: then g is exactly 1, and a fresh
    adapter changes no bit. In backward the norms are constants (section 4.3). The scaling acts inside the norm, so scaling 0
    does not give W back once m has been trained. A row of W that is zero stays zero.

    Precision: the norms are taken in the factors' dtype; what g multiplies has the dtype of x, the product is fp32 or wider
    and rounded once more.

    Args:
        base: an ``nn.Linear`` or ``NF4Linear`` with weight (out, in); it is frozen here.
        rank, alpha, use_rslora: see ``LoRAConfig``. Dropout and embeddings are not offered.

    Cost: W + scaling * B A in every forward, some rows at a time, which is most of the time at one token: merge before
    generating much. One more tensor like y is kept for backward.

    Ref: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """

    lora_magnitude_vector: nn.Parameter  # the name that PEFT's files use

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, use_rslora: bool = False) -> None:
        super().__init__(base, rank, alpha, use_rslora=use_rslora)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A random, B zero, m the norms of W's rows."""
        super().reset_parameters(generator)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        stretch, bias = _stretch(self.lora_magnitude_vector, self.row_norms()), self.base.bias
        # g (y - b) + b, written so that y comes through whole where g is 1.
        stretched = y * stretch if bias is None else torch.addcmul((1 - stretch) * bias, y, stretch)
        return stretched.to(y.dtype)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + scaling * B A| of each row, (out,), in the factors' dtype, without a gradient."""
        base = self.base
        if not isinstance(base, NF4Linear):
            return self._norms(whole(base.weight))
        with dense_weight(_whole(base.quantized), self.lora_A.dtype) as weight:
            return self._norms(weight)

    def _norms(self, weight: Tensor) -> Tensor:
        step = max(1, CHUNK // weight.shape[1])
        chunks = (slice(begin, begin + step) for begin in range(0, weight.shape[0], step))
        return torch.cat([torch.linalg.vector_norm(self.update_rows(rows).add_(weight[rows]), dim=1) for rows in chunks])

    def delta_rows(self, weight_rows: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of (g - 1) W + g * scaling * B A, with g for these rows of W."""
        update = self.update_rows(rows)
        weight = weight_rows.to(torch.promote_types(weight_rows.dtype, update.dtype))
        norms = torch.linalg.vector_norm(weight + update, dim=1)
        stretch = _stretch(self.lora_magnitude_vector.detach()[rows], norms).unsqueeze(1)
        return (stretch - 1) * weight + stretch * update

    def delta_weight(self) -> Tensor:
        """W' - W, (out, in), in the factors' dtype, with the base's W."""
        base = self.base
        dense = base.dequantized_weight(self.lora_A.dtype) if isinstance(base, NF4Linear) else base.weight.detach()
        return self.delta_rows(dense)


def _whole(q: QuantizedWeight) -> QuantizedWeight:
    """The weight; gathered where processes share it."""
    if not is_share(q.packed):
        return q
    return replace(q, packed=whole(q.packed), absmax=whole(q.absmax), absmax2=None if q.absmax2 is None else whole(q.absmax2))


def _stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / |row|; a row without a direction is multiplied by m, and stays zero."""
    return magnitude / norms.masked_fill(norms == 0, 1.0)
