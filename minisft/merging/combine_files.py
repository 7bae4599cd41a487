"""Adapter folders without their base: read, combined into a new folder.

Only the adapter's files are read; the base is opened only where a file repeats weights of it, which must be the base's own.
What is refused: DoRA, whose norms take in W, so that its updates do not add; adapters of different bases. The arithmetic is
in ``combine.py``.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

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
from minisft.merging.combine import Combined, Update, combine
from minisft.surgery import pattern_value


@dataclass(frozen=True)
class StoredAdapter:
    """A plain LoRA as its folder holds it, without its base."""

    folder: Path
    config: LoRAConfig
    updates: Mapping[str, Update]


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
