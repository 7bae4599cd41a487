"""Merging back into 4 bits, in memory: the codes of a block depend on all of its weights, and fitted codes on the whole model.

``requantized`` rounds every weight for itself and is refused where it lost the adapter. ``compensated`` reads text and chooses
codes that keep what the layers answer (``compensate``); it is judged by what the merged model says, not by its weights. Both
write the folder that transformers loads with bitsandbytes. The text goes the way of training data: same template, same ids.

The idea to take home: calibrate on rows like those that the model will be asked, and hold others back to judge it by.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minisft.common.errors import UserError, visible
from minisft.data.encoding import encode_dataset
from minisft.data.messages import read_dataset
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.effect import SURVIVAL_FLOOR, MergeReport
from minisft.formats import save_quantized
from minisft.formats.lazy_weights import read_rows
from minisft.merge_weights import merge
from minisft.merging.base_and_adapter import AdaptedFiles, held_in_4_bits, load_unmerged, template_of
from minisft.merging.compensate import CompensationReport, requantize_compensated
from minisft.model import CausalLM

MAX_CALIBRATION_TOKENS = 2**15  # about 21 for each input of SmolLM2's widest layer, 2 for each of an 8B Llama's


def write_requantized(
    files: AdaptedFiles, folder: Path, dtype: torch.dtype, force: bool
) -> tuple[MergeReport, tuple[str, ...]]:
    """Write the merge with every weight rounded for itself.

    Args:
        dtype: of what stays dense.
        force: write what ``SURVIVAL_FLOOR`` refuses.
        files: the base and its adapter.
        folder: exists and is empty.

    Returns:
        the report, and what was not kept of the base's settings.

    Raises:
        UserError: too little of the adapter is left in a layer; what ``merge.merge`` refuses.
    """
    model, tokenizer = load_unmerged(files, dtype)
    merged, report = merge(model, "requantized")
    worst = min(report.layers, key=lambda layer: layer.survival)
    if worst.survival < SURVIVAL_FLOOR and not force:
        raise UserError(
            "numeric/adapter-lost",
            "merged back to 4 bits, too little of the adapter is left",
            where=visible(worst.path),
            found=f"{worst.survival:.1%} of the update",
            expected=f"at least {SURVIVAL_FLOOR:.0%} in every layer",
            fix="--onto compensated, which stays in 4 bits; without --onto all of it is kept in 16 bits; or --force",
        )
    saved = save_quantized(merged, tokenizer, folder, settings=files.stored.source.path)
    return report, saved.not_kept


def write_compensated(
    files: AdaptedFiles, folder: Path, dtype: torch.dtype, calibration: str | Path
) -> tuple[CompensationReport, tuple[str, ...]]:
    """Write the merge with codes fitted to the rows of ``calibration``.

    Args:
        dtype: of what stays dense.
        files: the base and its adapter.
        folder: exists and is empty.
        calibration: rows as for training.

    Returns:
        the report, and what was not kept of the base's settings.

    Raises:
        UserError: what ``merge_compensated`` refuses; a disk that is full.
    """
    merged, tokenizer, report = merge_compensated(files, calibration)
    saved = save_quantized(merged, tokenizer, folder, dtype, settings=files.stored.source.path)
    return report, saved.not_kept


def merge_compensated(files: AdaptedFiles, calibration: str | Path) -> tuple[CausalLM, Tokenizer, CompensationReport]:
    """The merged model in memory, computed in fp32.

    A base that was dense in training is quantized first, as QLoRA does; the codes then make up for that as well.

    Raises:
        UserError: rows that cannot be read; what ``requantize_compensated`` refuses.
    """
    held = held_in_4_bits(files)
    model, tokenizer = load_unmerged(held)
    rows = calibration_rows(calibration, tokenizer, template_of(files, tokenizer), model.config.max_position_embeddings)
    merged, report = requantize_compensated(model, rows, original=None if held is files else partial(_whole, files))
    return merged, tokenizer, report


def _whole(files: AdaptedFiles, name: str) -> Tensor:
    weight = files.stored_weight(name)
    return read_rows(weight, 0, weight.shape[0])


def calibration_rows(path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, max_length: int) -> list[list[int]]:
    """Token ids of the first rows, ``MAX_CALIBRATION_TOKENS`` of them at most: prompts and answers, rendered as in training.

    Args:
        path: rows as for training.
        tokenizer, template: of the model.
        max_length: in tokens; a longer row is cut.

    Returns:
        token ids, a list each row.

    Raises:
        UserError: what ``read_dataset`` and ``encode_dataset`` refuse.
    """
    encoded = encode_dataset(read_dataset(path).examples, tokenizer, template, max_length, path=str(path))
    rows, left = [], MAX_CALIBRATION_TOKENS
    for row in encoded.rows:
        rows.append(row.input_ids[:left])
        left -= len(rows[-1])
        if left == 0:
            break
    return rows
