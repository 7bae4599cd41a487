"""Several adapters of one base as one adapter: their updates are added in weight space.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]. Stacking the factors is exact and the ranks add up;
an SVD brings them down again and says what that lost. It is computed from the thin factors (QR first), never from the dense
sum. ``combine_files.py`` reads adapters from folders and writes their sum.

The idea to take home: add products, never factors. (B_1 + B_2)(A_1 + A_2) has cross terms that nobody trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.adapter import scaling_of
from minisft.common.errors import UserError, visible

# ---- one layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """The update of one layer, scaling * B A.

    Args:
        A: ``lora_A``, (rank, in).
        B: ``lora_B``, (out, rank).
        alpha, use_rslora: the scaling, as files state it.
        is_embedding: the product is laid out as an embedding's, (in, out).
    """

    A: Tensor
    B: Tensor
    alpha: float
    use_rslora: bool = False
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of ``lora_A``."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return scaling_of(self.rank, self.alpha, self.use_rslora)

    def alpha_for(self, use_rslora: bool) -> float:
        """The alpha that means the same scaling in a file with this setting."""
        return self.alpha if use_rslora == self.use_rslora else self.scaling / scaling_of(self.rank, 1.0, use_rslora)

    def square(self) -> float:
        """|scaling * B A|^2 (Frobenius), from the factors: sum of (B^T B) * (A A^T)."""
        A, B = self.A.double(), self.B.double()
        return max(0.0, self.scaling**2 * float(((B.T @ B) * (A @ A.T)).sum()))


def add_updates(parts: Sequence[tuple[float, Update]]) -> Update:
    """sum of weight * update over one layer's parts.

    A part alone keeps its factors bit for bit. Several are stacked: the rank is the sum of their ranks, the scaling 1, the
    dtype fp32 or wider; what was scaling or weight goes into B, which is rounded once.
    """
    if len(parts) == 1:
        weight, only = parts[0]
        return Update(only.A, only.B, only.alpha * weight, only.use_rslora, only.is_embedding)
    dtype = torch.float32
    for _, part in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, part.A.dtype), part.B.dtype)
    A = torch.cat([part.A.to(dtype) for _, part in parts])
    B = torch.cat([(part.B.double() * (weight * part.scaling)).to(dtype) for weight, part in parts], dim=1)
    return Update(A, B, float(A.shape[0]), is_embedding=parts[0][1].is_embedding)


def lower_rank(update: Update, rank: int) -> tuple[Update, float]:
    """The nearest update of a rank (Frobenius norm), and the square of the distance to it.

    With A^T = Q_A R_A and B = Q_B R_B the singular values of B A are those of R_B R_A^T, a matrix of rank x rank. Each
    factor takes the root of them. All in fp64, rounded once to fp32 or wider, which the distance leaves out.

    Ref: Eckart and Young 1936. Cost: O((in + out) * old rank^2).
    """
    Q_A, R_A = torch.linalg.qr(update.A.double().T)
    Q_B, R_B = torch.linalg.qr(update.B.double() * update.scaling)
    U, singular, V_T = torch.linalg.svd(R_B @ R_A.T)
    rank = min(rank, len(singular))
    root = singular[:rank].sqrt()
    A, B = root.unsqueeze(1) * (V_T[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root
    lost = float(singular[rank:].square().sum())
    dtype = torch.promote_types(update.A.dtype, torch.float32)
    return Update(A.to(dtype), B.to(dtype), float(rank), is_embedding=update.is_embedding), lost


# ---- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combined:
    """One adapter made of several.

    Attributes:
        updates: by path.
        errors: by path, the relative distance (Frobenius) to the exact sum, of the layers whose rank was lowered.
        error: the same over all layers together.
    """

    updates: Mapping[str, Update]
    errors: Mapping[str, float]
    error: float


def combine(adapters: Sequence[tuple[float, Mapping[str, Update]]], rank: int | None = None) -> Combined:
    """Add adapters, each with its weight.

    Args:
        adapters: weight, and updates by path; the paths may differ.
        rank: the largest rank of the result. Without it nothing is lost: a stack that is higher than the smaller side of its
            layer is brought down to it, which changes nothing but rounding.

    Raises:
        UserError: a weight that is not finite, a rank below 1, or two updates of a path that have different shapes.
    """
    _check_numbers([weight for weight, _ in adapters], rank)
    updates: dict[str, Update] = {}
    squares: dict[str, tuple[float, float]] = {}  # by path: of the sum, and of what was lost
    for path in sorted({path for _, stored in adapters for path in stored}):
        parts = [(weight, stored[path]) for weight, stored in adapters if path in stored]
        _check_shapes(path, [part for _, part in parts])
        updates[path] = exact = add_updates(parts)
        lost, sides = 0.0, min(exact.A.shape[1], exact.B.shape[0])
        if exact.rank > (highest := min(sides, rank or sides)):
            updates[path], lost = lower_rank(exact, highest)
        squares[path] = exact.square(), lost
    errors = {path: _ratio(lost, square) for path, (square, lost) in squares.items() if lost}
    squares_in_all, lost_in_all = (math.fsum(column) for column in zip(*squares.values(), strict=True))
    return Combined(updates, errors, _ratio(lost_in_all, squares_in_all))


def _ratio(lost: float, square: float) -> float:
    return math.sqrt(lost / square) if square else 0.0


def _check_numbers(weights: Sequence[float], rank: int | None) -> None:
    name, value, expected = "the weight of an adapter", "", "a finite number"
    if bad := [weight for weight in weights if not math.isfinite(weight)]:
        value = str(bad[0])
    elif rank is not None and rank < 1:
        name, value, expected = "--rank", str(rank), "at least 1"
    if value:
        raise UserError(
            "config/bad-value", "a setting is out of range", where=name, found=value, expected=expected, fix=f"give {expected}"
        )


def _check_shapes(path: str, parts: Sequence[Update]) -> None:
    kinds = {(part.A.shape[1], part.B.shape[0], part.is_embedding) for part in parts}
    if len(kinds) > 1:
        shapes = [f"{outputs} x {inputs}{' (embedding)' if embedding else ''}" for inputs, outputs, embedding in sorted(kinds)]
        raise UserError(
            "adapter/base-mismatch", "the adapters were trained on bases of different shapes", where=visible(path),
            found=" and ".join(shapes), expected="one shape", fix="combine adapters of one base",
        )  # fmt: skip
