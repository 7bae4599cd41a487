"""Several adapters of one base as one adapter: their updates are added in weight space.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]. Stacking the factors is exact and the ranks add up;
an SVD brings them down again and says what that lost. It is computed from the thin factors (QR first), never from the dense
sum. Only the adapter's files are read, no base model. What is refused: DoRA, whose norms take in W, so that its updates
do not add; adapters of different bases.

The idea to take home: add products, never factors. (B_1 + B_2)(A_1 + A_2) has cross terms that nobody trained.
"""

from __future__ import annotations

import math
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.adapter import scaling_of
from minisft.common.atomic_files import disk_errors, staged_folder
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.config import LoRAConfig
from minisft.formats.adapter import (
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    named_base,
    recorded_base,
    recorded_base_name,
    write_adapter_files,
)
from minisft.formats.adapter_config import CONFIG_FILE, config_of_modules, config_path, read_adapter_config
from minisft.formats.adapter_rows import read_row_ids
from minisft.formats.adapter_selection import run_patterns
from minisft.formats.adapter_tensors import (
    Factors,
    changed_weight,
    read_factors,
    repeated_weights,
    same_weight,
    stored_factors,
    tensor_names,
)
from minisft.formats.lazy_weights import PIECE, Pieces, open_model, read_flat
from minisft.formats.loading import EMBEDDING, HEAD
from minisft.formats.safetensors_file import Header, read_header, read_tensors
from minisft.formats.source import file_sha256, regular_file, resolve
from minisft.surgery import pattern_value

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
class StoredAdapter:
    """A plain LoRA as its folder holds it, without its base."""

    folder: Path
    config: LoRAConfig
    updates: Mapping[str, Update]


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


# ---- folders ---------------------------------------------------------------------------------------------------------


def read_stored(folder: str | Path) -> StoredAdapter:
    """Read an adapter folder without its base.

    Raises:
        UserError: what ``load_adapter_`` refuses about the files themselves; DoRA.
    """
    folder = Path(folder)
    if rows := read_row_ids(config_path(folder)):
        raise UserError(
            "adapter/tokens", "an adapter with trained tokens is no sum of updates", where=visible(folder),
            found=f"trained rows in {listing(rows)}", expected="plain LoRA",
            fix="merge it into its base (minisft merge) and use the merged model",
        )  # fmt: skip
    if read_adapter_config(folder).use_dora:
        raise UserError(
            "adapter/dora",
            "the updates of DoRA adapters do not add",
            where=visible(folder),
            expected="plain LoRA: a DoRA update contains its base's row lengths",
            fix="merge it into its base instead",
        )
    header = read_header(regular_file(folder, WEIGHTS_FILE, "adapter/no-weights"), "adapter")
    factors = stored_factors(header)
    config = read_adapter_config(folder, stored=factors)
    where, has_patterns = visible(folder / CONFIG_FILE), bool(config.rank_pattern or config.alpha_pattern)
    alphas = run_patterns(lambda: _alphas(config, factors, folder), where, has_patterns)
    _require_own_weights(folder, header)
    tensors = read_factors(factors, header)
    updates = {}
    for path, factor in factors.items():
        A, B = (tensors[name] for name in factor.names)
        updates[path] = Update(A, B, alphas[path], config.use_rslora, factor.is_embedding)
    return StoredAdapter(folder, config, updates)


def _require_own_weights(folder: Path, header: Header) -> None:
    """Weights of the base that the file repeats must be the base's own; it is opened only if there are any."""
    repeated = repeated_weights(header)
    if not repeated:
        return
    try:
        base = open_model(resolve(recorded_base_name(folder)))
    except UserError as error:
        raise UserError(
            "adapter/unexpected-tensor",
            "the adapter repeats weights of its base, which is not there to compare them with",
            where=visible(header.path),
            found=f"{listing(repeated, 6)}; {visible(error, 300)}",
            fix="put the base where adapter_config.json names it, or save the adapter with save_embedding_layers=False",
        ) from None
    for name, stored in read_tensors(header, list(repeated), "adapter"):
        weight = EMBEDDING if repeated[name] == HEAD and HEAD not in base.open else repeated[name]
        if weight not in base.open or not _is_weight(base.open[weight](), stored):
            raise changed_weight(name, header)


def _is_weight(ours: Pieces, stored: Tensor) -> bool:
    """``same_weight``, a piece at a time."""
    flat = stored.flatten().split(PIECE)
    return ours.shape == stored.shape and all(map(same_weight, read_flat(ours), flat))


def _alphas(config: LoRAConfig, factors: Mapping[str, Factors], folder: Path) -> dict[str, float]:
    """By path; the ranks of the config must be those of the tensors."""
    for path, factor in factors.items():
        if (rank := pattern_value(path, config.rank_pattern, config.rank)) != factor.shapes[0][0]:
            raise UserError(
                "adapter/rank", f"{visible(path)} has another rank than the config says", where=visible(folder),
                found=str(factor.shapes[0][0]), expected=f"rank {rank}", fix="correct r or rank_pattern in adapter_config.json",
            )  # fmt: skip
    return {path: pattern_value(path, config.alpha_pattern, config.alpha) for path in factors}


def combine_folders(adapters: Sequence[tuple[str | Path, float]], out: str | Path, rank: int | None = None) -> Combined:
    """Combine adapter folders into a new one, in PEFT's layout.

    Args:
        adapters: folder and weight. One alone with weight 1 gives its own tensors and settings back.
        out: new, or empty.
        rank: see ``combine``.

    Returns:
        the combined adapter, as written.

    Raises:
        UserError: what ``read_stored`` and ``combine`` refuse, adapters of different bases, a target that is in use.
    """
    if not adapters:
        raise UserError("config/missing", "nothing to combine", expected="at least one adapter", fix="give --adapter DIR")
    stored = [read_stored(folder) for folder, _ in adapters]
    weights = [weight for _, weight in adapters]
    base = _common_base(stored)
    combined = combine([(weight, adapter.updates) for weight, adapter in zip(weights, stored, strict=True)], rank)
    tensors = named_factors(combined.updates)
    facts: dict[str, JSON] = {"combined_from": _sources(stored, weights), "relative_error": combined.error}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with disk_errors(Path(out), num_bytes), staged_folder(out) as staging:
        write_adapter_files(staging, _config(stored, combined), tensors, facts, base, _template(stored))
    return combined


def named_factors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """The factors by the names that they have in an adapter's file."""
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        name_A, name_B = tensor_names(path, update.is_embedding)
        tensors |= {name_A: update.A, name_B: update.B}
    return tensors


def _sources(stored: Sequence[StoredAdapter], weights: Sequence[float]) -> list[JSON]:
    """Which adapters, and how much of each."""
    return [
        {"adapter": str(adapter.folder), "weight": weight, "sha256": file_sha256(adapter.folder / WEIGHTS_FILE)}
        for adapter, weight in zip(stored, weights, strict=True)
    ]


def _config(stored: Sequence[StoredAdapter], combined: Combined) -> dict[str, JSON]:
    first, paths = stored[0].config, sorted(combined.updates)
    same_paths = all(sorted(adapter.updates) == paths for adapter in stored)
    names = first.targets if same_paths else tuple(paths)
    use_rslora = all(adapter.config.use_rslora for adapter in stored)
    dropouts = {adapter.config.dropout for adapter in stored}
    return config_of_modules(
        {path: update.rank for path, update in combined.updates.items()},
        {path: update.alpha_for(use_rslora) for path, update in combined.updates.items()},
        names if isinstance(names, str) else [*names],
        named_base(stored[0].folder),
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        use_rslora=use_rslora,
    )


def _common_base(stored: Sequence[StoredAdapter]) -> dict[str, JSON] | None:
    """What the adapters' own files record of their base; None if none does.

    Raises:
        UserError: they were trained on different weights.
    """
    records = {a.folder: record.values for a in stored if (record := recorded_base(a.folder)) is not None}
    bases = {str(values["fingerprint"]): folder for folder, values in records.items() if values.get("fingerprint")}
    if len(bases) > 1:
        raise UserError(
            "adapter/base-mismatch",
            "the adapters were trained on different bases",
            found=", ".join(f"{visible(folder)} ({visible(fingerprint)[:16]})" for fingerprint, folder in bases.items()),
            expected="one base",
            fix="combine adapters of one base, or merge each into its own",
        )
    names = {str(named_base(adapter.folder)) for adapter in stored}
    if len(names) > 1 and not all(records.get(adapter.folder, {}).get("fingerprint") for adapter in stored):
        warnings.warn(f"the adapters name different bases: {listing(sorted(names), 4)}", stacklevel=3)
    first, *others = records.values() or [{}]
    if any(values.get("quantization") != first.get("quantization") for values in others):
        warnings.warn("the base was not held in the same bits when these adapters were trained", stacklevel=3)
    chosen = records.get(next(iter(bases.values()), Path()), first)
    return typing.cast("dict[str, JSON]", dict(chosen)) if chosen else None


def _template(stored: Sequence[StoredAdapter]) -> bytes | None:
    """The chat template that the adapters were trained with, if they agree on one."""
    found = [adapter.folder for adapter in stored if (adapter.folder / TEMPLATE_FILE).exists()]
    templates = {regular_file(place, TEMPLATE_FILE, "adapter/bad-file").read_bytes() for place in found}
    if len(templates) > 1:
        warnings.warn("the adapters were trained with different chat templates; none is kept", stacklevel=4)
    return templates.pop() if len(templates) == 1 else None
