"""LoRA: a frozen layer plus a trained product of two thin matrices, W' = W + scaling * B A.

B starts at zero, so a fresh adapter changes nothing, bit for bit. Several adapters at once, and merging inside ``forward``,
``train`` or ``eval``, are left out on purpose.

Ref: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minisft.adapter import Adapter, FrozenLinear
from minisft.lora_fused import Adapted, adapted_linears
from minisft.matmul import linear


class LoRALinear(Adapter):
    """y = x W^T + b + scaling * dropout(x) A^T B^T.

    Args:
        base: an ``nn.Linear`` or ``NF4Linear`` with weight (out, in); it is frozen here.
        rank, alpha, dropout, use_rslora: see ``LoRAConfig``.

    ``lora_A`` is (rank, in), uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as the reference code); ``lora_B`` is
    (out, rank), zero.

    Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023, arXiv:2305.14314, equation 5.
    """

    base: FrozenLinear

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
        super().__init__(base, (base.out_features, base.in_features), rank, alpha, dropout, use_rslora)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        A, B = self.factors()
        if self.needs_autograd:  # the formula as it stands in the paper
            return self.base(x) + self.scaling * linear(linear(self.dropout(x), A.to(x.dtype)), B.to(x.dtype))
        return adapted_linears(x, [Adapted(self.base, A, B, self.scaling)])[0]  # without a pass of its own over y

    @property
    def needs_autograd(self) -> bool:
        """Whether there is dropout to draw, or something of the base to train."""
        if self.training and self.dropout.p > 0:
            return True
        parameters = self.base.parameters(recurse=bool(self.base._modules))  # a plain layer has none inside
        return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)

    @property
    def together(self) -> Callable[[Tensor, Sequence[LoRALinear]], Sequence[Tensor]] | None:
        """What computes several layers of one x with one backward; None where it would be noticed that they are not called."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.enabled or self.needs_autograd:
            return None
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        watched = any(hooks) or nn.modules.module._has_any_global_hook()
        own = type(self) is LoRALinear and "forward" not in self.__dict__
        return _together if own and not watched else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A random, B zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """scaling * B A, (out, in) or some rows of it, in the factors' dtype."""
        A, B = self.factors()
        return self.scaling * (B.detach()[rows] @ A.detach())


def _together(x: Tensor, layers: Sequence[LoRALinear]) -> Sequence[Tensor]:
    return adapted_linears(x, [Adapted(layer.base, *layer.factors(), layer.scaling) for layer in layers])


class LoRAEmbedding(Adapter):
    """y = W[ids] + scaling * A^T[ids] B^T.

    ``lora_A`` is (rank, num_embeddings), zero; ``lora_B`` is (dim, rank), standard normal: the layout and start of PEFT.

    Args:
        base: the embedding; it is frozen here.
        rank, alpha, dropout, use_rslora: see ``LoRAConfig``.
    """

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
        super().__init__(base, (base.embedding_dim, base.num_embeddings), rank, alpha, dropout, use_rslora)
        self.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if not self.enabled:
            return y
        rows = nn.functional.embedding(ids, self.lora_A.T)  # (..., rank)
        return y + (self.scaling * (rows @ self.lora_B.T)).to(y.dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A zero, B random."""
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.normal_(generator=generator)

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """scaling * (B A)^T, (num_embeddings, dim) or some rows of it, in the factors' dtype."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach()[:, rows]).T
