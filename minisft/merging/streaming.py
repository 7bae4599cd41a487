"""Merging from files to files: a model of any size, in the memory of a few rows.

For each weight: a few rows of W are read, the same rows of D = scaling * B A are computed in fp32, the sum is rounded once
and written. W is the weight that the adapter was trained on; if that was quantized, the rows are quantized and
dequantized on the way, exactly as training did. The numbers are those of ``merge.merge`` on the loaded model. What is
refused: a base that is not the adapter's, merging the same adapter twice, and a merge back to 4 bits that lost the adapter.

The idea to take home: a merge needs no model. Every row of W' depends on that row of W, that row of B, and A.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.adapter import Adapter
from minisft.common.atomic_files import FileRecord, disk_errors, require_space, staged_folder
from minisft.common.checks import check_calibration
from minisft.common.errors import visible
from minisft.effect import Effect, LayerReport, MergeReport, Target
from minisft.formats.adapter import TEMPLATE_FILE
from minisft.formats.base_settings import folder_of, kept_config, not_kept, replace_template
from minisft.formats.hf_config import write_config
from minisft.formats.hf_write import write_settings
from minisft.formats.lazy_weights import Pieces, StoredModel, read_flat, read_rows
from minisft.formats.loading import HEAD, empty_model, expected_shapes
from minisft.formats.shard_writer import MAX_SHARD_BYTES, TensorSpec, write_shards
from minisft.formats.source import regular_file
from minisft.merge_weights import merged_weight, rounded, splits_tie
from minisft.merging.base_and_adapter import MARK, AdaptedFiles, check_onto, open_adapted, row_ranges, tokenizer_of
from minisft.merging.compensate import CompensationReport
from minisft.merging.four_bits import write_compensated, write_requantized

SWALLOWED_LIMIT = 0.05  # share of an update's entries; beyond it a wider dtype is worth its bytes
NOISE_LIMIT = 0.5  # effect error; a W that is off the dtype's grid (from 4 bits) is moved, where one on it is lost


def merged_rows(
    path: str,
    adapter: Adapter,
    base: Pieces,
    dtype: torch.dtype,
    effect: Effect,
    trained: Pieces | None = None,
) -> Iterator[Tensor]:
    """W' of one layer in flat pieces, measured by ``effect`` on the way.

    Args:
        base: W.
        trained: the weight that the adapter was trained on, if that is not W.
        path: of the layer.
        adapter: over that layer.
        dtype: of W'.
        effect: measures the rounding.

    Returns:
        an iterator of flat pieces of W', in ``dtype``.
    """
    for begin, end in row_ranges(base.shape):
        weight = read_rows(base, begin, end)
        before = None if trained is None else read_rows(trained, begin, end)
        delta = adapter.delta_rows(weight if before is None else before, slice(begin, end))
        stored = rounded(path, merged_weight(weight, delta), dtype)
        effect.add(weight, delta, stored, before)
        yield stored.reshape(-1)


# ---- the whole model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What ``merge_folder`` has written, for its certificate.

    Args:
        report: layer by layer.
        records: size and sha256 of the weight files, as computed, not as read back; none for a merge in 4 bits.
        compensation: how codes were fitted, and to which file; only for ``compensated``.
        not_kept: of the base's settings: files, and keys as ``file: key``.
    """

    files: AdaptedFiles
    out: Path
    report: MergeReport
    dtype: torch.dtype
    records: Mapping[str, FileRecord]
    compensation: CompensationReport | None = None
    calibration: str | None = None
    not_kept: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        """``float32``, without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def onto_words(self) -> str:
        """The target by the name that a reader understands: over a dense base, there is only the base."""
        return "base" if self.report.onto == "dequantized" and self.files.held == "dense" else self.report.onto

    @property
    def summary(self) -> str:
        """One line for people."""
        found = self.compensation
        if found is None:
            kept = f"survival at least {self.report.survival:.4f}, lost at most {self.report.fraction_lost:.2%}"
        else:
            plain = max(layer.plain_output_error for layer in found.layers)
            kept = (
                f"4 bits with codes fitted to {found.num_tokens:,} tokens of {visible(self.calibration)}; "
                f"output error at most {found.output_error:.3f}, rounded plainly {plain:.3f} (4-bit base without adapter: 1)"
            )
        head = f"{visible(self.out)}: {len(self.report.layers)} layers merged onto {self.onto_words}, {self.dtype_name}"
        return f"{head}; {kept}{not_kept(self.not_kept)}"


def merge_folder(
    adapter: str | Path,
    out: str | Path,
    model: str | None = None,
    onto: Target = "dequantized",
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    force: bool = False,
    calibration: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Merged:
    """Write the merged model as a folder that transformers and this library load; it appears whole or not at all.

    Args:
        out: new, or empty.
        model: the base; by default the one that the adapter's files name.
        onto: see ``merge.merge``; ``compensated`` is 4 bits with codes fitted to text. For an adapter that was trained on
            dense weights there are ``dequantized``, which is the base, and ``compensated``, which quantizes it.
        dtype: of the written weights; by default what most dense weights of the base are stored in, bf16 for GGUF's own.
        scale: a further factor on every update.
        force: write what ``SURVIVAL_FLOOR`` refuses.
        calibration: rows as for training, for ``compensated``.
        adapter: PEFT's layout, ours or theirs.
        max_shard_bytes: weights beyond this go into several files.

    Returns:
        what was written, for ``certificate.certify``.

    Raises:
        UserError: what ``open_adapted`` refuses; an ``onto`` that this base cannot have; a sum that is not finite; an
            adapter that a merge back to 4 bits would lose; a target that is in use, a disk that is full.

    Cost: 64 MiB beside the adapter and the tokenizer; ``requantized`` and ``compensated`` take the model in 4 bits twice, and
    the latter the activations of the calibration text.
    """
    check_calibration(onto, calibration)
    files, out = open_adapted(adapter, model, scale), Path(out)
    check_onto(files, onto)
    dtype = dtype or _default_dtype(files.stored)
    dense = onto in ("dequantized", "original")
    specs = _specs(files, dtype) if dense else {}
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    records: dict[str, FileRecord] = {}
    compensation = None
    with disk_errors(out, num_bytes), staged_folder(out) as staging:
        if calibration is not None:
            compensation, lost = write_compensated(files, staging, dtype, calibration)
            report = MergeReport(onto, tuple(layer.effect for layer in compensation.layers))
        elif onto == "requantized":
            report, lost = write_requantized(files, staging, dtype, force)
        else:
            require_space(staging, num_bytes)
            report, records, lost = _write_dense(files, staging, onto, specs, max_shard_bytes)
        lost += _keep_template(files.folder, staging)
    text = None if calibration is None else str(calibration)
    merged = Merged(files, out, report, dtype, records, compensation, text, lost)
    if dtype != torch.float32 and dense and (loss := _rounding_loss(report)):
        warnings.warn(f"rounding to {merged.dtype_name} {loss}; --dtype fp32 keeps it", stacklevel=2)
    return merged


def _rounding_loss(report: MergeReport) -> str:
    """What rounding did to the worst layer, in words; empty if it is little."""
    most = max(report.layers, key=lambda layer: layer.fraction_lost)
    if most.fraction_lost > SWALLOWED_LIMIT:
        return f"lost {most.fraction_lost:.1%} of the update in {visible(most.path)}"
    worst = max(report.layers, key=lambda layer: layer.effect_error)
    if worst.effect_error > NOISE_LIMIT:
        return f"moved {visible(worst.path)} by {worst.effect_error:.0%} of its update"
    return ""


def _default_dtype(stored: StoredModel) -> torch.dtype:
    return torch.float32 if stored.dense_dtype == torch.float64 else stored.dense_dtype


def _specs(files: AdaptedFiles, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Every weight of the merged model. If one side of a tied head is adapted, both are written."""
    config = files.stored.config
    tied = config.tie_word_embeddings and not splits_tie(files.adapters)
    shapes = expected_shapes(empty_model(dataclasses.replace(config, tie_word_embeddings=tied)))
    return {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}


def _write_dense(
    files: AdaptedFiles, folder: Path, onto: Target, specs: Mapping[str, TensorSpec], max_shard_bytes: int
) -> tuple[MergeReport, dict[str, FileRecord], tuple[str, ...]]:
    dtype = next(iter(specs.values())).dtype
    config = dataclasses.replace(files.stored.config, tie_word_embeddings=HEAD not in specs)
    tokenizer = tokenizer_of(files)
    tokenizer.check_embedding(config.vocab_size)
    base = folder_of(files.stored.source.path)
    ids = tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id
    lost = write_settings(folder, tokenizer, write_config(config, dtype, *ids, kept_config(base)), base)
    del tokenizer
    reports: dict[str, LayerReport] = {}
    pieces = _merged_pieces(files, onto, dtype, reports)
    records = write_shards(folder, specs, pieces, {MARK: files.digest}, max_shard_bytes)
    return MergeReport(onto, tuple(reports[path] for path in files.adapters)), records, lost


def _merged_pieces(
    files: AdaptedFiles, onto: Target, dtype: torch.dtype, reports: dict[str, LayerReport]
) -> Callable[[str], Iterator[Tensor]]:
    """What ``write_shards`` asks for each name; a layer's report is entered when its last piece is out."""

    def pieces(name: str) -> Iterator[Tensor]:
        path = name.removesuffix(".weight")
        base = files.stored_weight(name) if onto == "original" else files.trained_on(name)
        if path not in files.adapters:
            yield from (rounded(name, piece, dtype) for piece in read_flat(base))
            return
        effect = Effect()
        trained = files.trained_on(name) if onto == "original" and name in files.in_4_bits else None
        yield from merged_rows(path, files.adapters[path], base, dtype, effect, trained)
        reports[path] = effect.report(path)

    return pieces


def _keep_template(adapter: Path, folder: Path) -> tuple[str, ...]:
    """A merged model is used with the template that its adapter was trained with, as the adapter was."""
    if not (adapter / TEMPLATE_FILE).is_file():
        return ()
    template = regular_file(adapter, TEMPLATE_FILE, "adapter/bad-file").read_bytes()
    return replace_template(folder, template, TEMPLATE_FILE)
