"""PiSSA: LoRA that starts from the principal part of the weight instead of zero.

The paper puts the largest singular values of W into B A, and what is left of W becomes the frozen base. Here the base stays as
it is on disk, bit for bit, and the start is subtracted beside it: W + scaling * (B A - B0 A0) is the same function, whatever
the dtype of W, and no second base has to be kept. It is also what is saved: a plain LoRA of twice the rank that fits the
original base, as PEFT writes when it converts such an adapter. Bases in 4 bits are refused: the paper quantizes what is left.

Ref: Meng et al. 2024, arXiv:2404.02948.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minisft.adapter import check_rank
from minisft.common.errors import UserError
from minisft.common.shares import whole
from minisft.lora import LoRALinear


class PiSSALinear(LoRALinear):
    """y = x W^T + b + scaling * dropout(x) (B A - B0 A0)^T.

    With W = U diag(S) V^T and R the rank, ``lora_B`` = U[:, :R] sqrt(S[:R] / scaling) and ``lora_A`` = sqrt(S[:R] / scaling)
    V^T[:R] at the start, so that scaling * B A is the best approximation of W of that rank. ``start_A`` (rank, in) and
    ``start_B`` (out, rank) keep these values and are never trained. Dropout acts on what was learned, not on the base.

    Args:
        base: a dense ``nn.Linear`` with weight (out, in); it is frozen here and never changed.
        rank: at most half of the smaller side of the weight, because twice of it is saved.
        alpha: positive.
        dropout, use_rslora: see ``LoRAConfig``.

    Raises:
        UserError: a rank that does not fit; weights that are not finite.

    Ref: Meng et al. 2024, arXiv:2404.02948, section 3. Cost: one SVD of W at the start; twice the rank in every product.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
        check_rank(2 * rank, (base.out_features, base.in_features), "PiSSA saves twice the rank")
        super().__init__(base, rank, alpha, dropout, use_rslora)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The principal part of W in A and B, and as the start; nothing is random."""
        assert isinstance(self.base, nn.Linear)
        weight = whole(self.base.weight.detach()).to(self.lora_A.dtype)
        try:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in the stubs; a finite matrix converges
            what = "a weight is not finite, and has no singular vectors"
            raise UserError("model/non-finite-weight", what, fix="load a model whose weights are numbers") from None
        root = (S[: self.rank] / self.scaling).sqrt()
        A, B = root[:, None] * Vh[: self.rank], U[:, : self.rank] * root
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        self.start_A = nn.Parameter(A.clone(), requires_grad=False)
        self.start_B = nn.Parameter(B.clone(), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A0] (2 rank, in) and [B, -B0] (out, 2 rank): their product is B A - B0 A0."""
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)


def pissa_starts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors that the PiSSA layers of a model started from, by name; empty without such layers."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PiSSALinear)}
    return {f"{path}.{name}": getattr(m, name) for path, m in layers.items() for name in ("start_A", "start_B")}
