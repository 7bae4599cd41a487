"""Is this folder that base with that adapter merged in? Asked of any folder, whoever wrote it.

Tensor by tensor, a few rows at a time, the folder's W' is held against W + D. Two questions to each adapted layer: could one
merge's rounding explain every entry, and is the adapter's effect there at its full size? The first finds a wrong base and
changed weights, the second an adapter too small to show against the rounding. Of every other tensor only the first is asked.
Layers whose 4-bit codes were fitted to text (``compensated``) have no answer to either: there the codes are chosen anew from
that text, if it is given, and the models' answers decide (``certificate.compare_models``).

The idea to take home: an unmerged copy is within rounding of a merge with a small adapter. Only the effect tells them apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.adapter import Adapter
from minisft.common.checks import check_calibration
from minisft.common.errors import UserError, listing, visible
from minisft.dora import DoRALinear
from minisft.effect import SURVIVAL_FLOOR, Effect, LayerReport, Target
from minisft.formats import load_model
from minisft.formats.lazy_weights import Packed, Pieces, StoredModel, open_model, read_rows
from minisft.formats.loading import EMBEDDING, HEAD, empty_model, expected_shapes
from minisft.formats.source import resolve
from minisft.lora import LoRAEmbedding
from minisft.merge_weights import merged_weight, splits_tie
from minisft.merging.base_and_adapter import AdaptedFiles, check_onto, held_in_4_bits, open_adapted, row_ranges
from minisft.merging.four_bits import merge_compensated
from minisft.nf4 import unpack
from minisft.surgery import nf4_modules

# From one rounding of W (a base loaded in the merged dtype) to three (D and the sum as well, as PEFT does it), in units u.
SLACK = 1.05
CODES_FLOOR = 0.9  # of the fitted codes; another machine's sums choose a few otherwise, another text many


@dataclass(frozen=True)
class LayerCheck:
    """One tensor of the folder.

    Attributes:
        name: of the tensor.
        report: the effect of an adapted layer, measured against D; None for other tensors.
        outside: share of entries that rounding does not explain; None where numbers share scales (4 bits).
        fitted: whether its codes were fitted to answers, so that the effect says nothing.
    """

    name: str
    report: LayerReport | None
    outside: float | None
    fitted: bool = False

    @property
    def fault(self) -> str:
        """What is wrong, in words; empty if nothing is."""
        if self.fitted:
            return ""
        if self.report is not None and not SURVIVAL_FLOOR <= self.report.survival <= 2 - SURVIVAL_FLOOR:
            return f"holds {self.report.survival:.3g} times the adapter's update"
        if self.outside:
            return f"{self.outside:.1%} of the entries differ by more than rounding"
        if self.outside is None and self.report is not None and self.report.effect_error > SURVIVAL_FLOOR:
            return f"the update is off by {self.report.effect_error:.0%} of its size"
        return ""


@dataclass(frozen=True)
class Verification:
    """What ``verify`` has found: every tensor in the model's order.

    Attributes:
        same_codes: of the codes that fitting moves, the share that the folder has; None if they were not chosen anew.
    """

    merged: str
    files: AdaptedFiles
    onto: Target
    layers: tuple[LayerCheck, ...]
    same_codes: float | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        adapted = self.adapted
        head = f"{visible(self.merged)}: {len(self.layers)} tensors compared, {len(adapted)} of them adapted"
        if self.onto == "compensated":
            chosen = "not chosen anew" if self.same_codes is None else f"chosen anew, {self.same_codes:.1%} of them the same"
            return f"{head}, with codes fitted to text: {chosen}"
        survival = [report.survival for report in adapted]
        worst = max(report.effect_error for report in adapted)
        return f"{head}; survival {min(survival):.4f} to {max(survival):.4f}, effect error at most {worst:.3g}"

    @property
    def faults(self) -> tuple[LayerCheck, ...]:
        """The tensors that are not as they should be."""
        return tuple(layer for layer in self.layers if layer.fault)

    @property
    def adapted(self) -> tuple[LayerReport, ...]:
        """The effects of the adapted layers."""
        return tuple(layer.report for layer in self.layers if layer.report is not None)

    def require(self) -> None:
        """Raises:
        UserError: ``numeric/not-this-merge``, naming the tensors that are not as they should be.
        """
        if self.same_codes is not None and self.same_codes < CODES_FLOOR:
            raise UserError(
                "numeric/not-this-merge",
                "the folder's codes are not those that this text gives",
                where=visible(self.merged),
                found=f"{self.same_codes:.1%} of the codes that fitting moves",
                expected=f"at least {CODES_FLOOR:.0%}",
                fix="check --calibration, --adapter and --scale, or merge again",
            )
        if not self.faults:
            return
        first, more = self.faults[0], [layer.name for layer in self.faults[1:]]
        raise UserError(
            "numeric/not-this-merge",
            f"the folder is not this merge: {len(self.faults)} of {len(self.layers)} tensors are wrong",
            where=f"{visible(self.merged)}: {visible(first.name)}",
            found=first.fault + (f"; also wrong: {listing(more, 6)}" if more else ""),
            expected="base + adapter, up to rounding",
            fix="check --model, --adapter, --scale and --onto, or merge again",
        )


def verify(
    merged: str | Path,
    adapter: str | Path,
    model: str | None = None,
    onto: Target = "dequantized",
    scale: float = 1.0,
    calibration: str | Path | None = None,
) -> Verification:
    """Compare a merged folder with its base and adapter.

    Args:
        merged: the folder (or GGUF file) to check.
        adapter, model, onto, scale: as for ``streaming.merge_folder``.
        calibration: for ``compensated``; without it nothing is said of the codes of adapted layers.

    Returns:
        what was found, tensor by tensor; ``require`` raises if it is another model.

    Raises:
        UserError: files that cannot be read or do not belong together; another shape of model.

    Cost: 64 MiB beside the adapter; with ``calibration`` that of the merge.
    """
    if calibration is not None:
        check_calibration(onto, calibration)
    files, result = open_adapted(adapter, model, scale), open_model(resolve(merged))
    check_onto(files, onto)
    _check_config(files.stored, result)
    held = held_in_4_bits(files) if onto == "compensated" else files
    checks = tuple(_check(name, held, result, onto) for name in _names(held, result))
    same_codes = None if calibration is None else _same_codes(files, merged, calibration)
    return Verification(str(merged), files, onto, checks, same_codes)


def _same_codes(files: AdaptedFiles, merged: str | Path, calibration: str | Path) -> float:
    """1 - codes that differ / codes that fitting moves away from the base's; 0 for a folder that holds the base's."""
    ours, _, report = merge_compensated(files, calibration)
    found, expected = (nf4_modules(model) for model in (load_model(merged)[0], ours))
    moved = differing = 0.0
    for layer in report.layers:
        numel = expected[layer.effect.path].quantized.shape.numel()
        theirs, codes = (unpack(modules[layer.effect.path].packed, numel) for modules in (found, expected))
        moved += layer.moved * numel
        differing += int((theirs != codes).sum())
    return max(0.0, 1 - differing / moved) if moved else float(differing == 0)


def _check_config(base: StoredModel, merged: StoredModel) -> None:
    """The same model but for the tie of the head, which a merge may cut."""
    same = dataclasses.replace(merged.config, tie_word_embeddings=base.config.tie_word_embeddings)
    differing = [
        field.name for field in dataclasses.fields(same) if getattr(same, field.name) != getattr(base.config, field.name)
    ]
    if differing:
        name = differing[0]
        raise UserError(
            "model/other-shape",
            "the merged model has another configuration than its base",
            where=f"{visible(merged.source.name)}: {name}",
            found=visible(getattr(same, name)),
            expected=visible(getattr(base.config, name)),
            fix="check --model",
        )


def _names(files: AdaptedFiles, merged: StoredModel) -> list[str]:
    """All tensors, in the model's order; both sides of a head that is tied no longer, or should not be."""
    tied = HEAD not in {*files.stored.open, *merged.open} and not splits_tie(files.adapters)
    config = dataclasses.replace(files.stored.config, tie_word_embeddings=tied)
    return list(expected_shapes(empty_model(config)))


def _check(name: str, files: AdaptedFiles, merged: StoredModel, onto: Target) -> LayerCheck:
    path = name.removesuffix(".weight")
    adapter = files.adapters.get(path)
    trained = files.trained_on(name)
    base = files.stored_weight(name) if onto == "original" else trained
    found = merged.open[name if name in merged.open else EMBEDDING]()
    effect, outside = Effect(), 0
    for weight, delta, spread, stored in _compared_rows(adapter, base, trained, found):
        if adapter is not None:
            effect.add(weight, delta, stored)
        if found.dtype is not None:
            outside += _num_outside(weight, delta, spread, stored, found.dtype)
        elif adapter is None and isinstance(found, Packed):  # nothing was rounded here
            outside += int((stored != weight).sum())
    known = found.dtype is not None or (adapter is None and isinstance(found, Packed))
    share = outside / math.prod(found.shape) if known else None
    fitted = onto == "compensated" and adapter is not None
    if fitted and not isinstance(found, Packed):
        raise UserError(
            "model/not-quantized",
            "a layer whose codes should be fitted is not in 4 bits",
            where=f"{visible(merged.source.name)}: {visible(name)}",
            fix="check --onto",
        )
    return LayerCheck(name, effect.report(path) if adapter is not None else None, share, fitted)


def _compared_rows(
    adapter: Adapter | None, base: Pieces, trained: Pieces, found: Pieces
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """W, D, what D's own sums may be off by, and W', a few rows at a time. A vector is one row."""
    if len(base.shape) == 1:
        whole = base.read(0, base.shape[0])
        yield whole, torch.zeros(whole.shape), None, found.read(0, base.shape[0])
        return
    for begin, end in row_ranges(base.shape):
        weight, stored = read_rows(base, begin, end), read_rows(found, begin, end)
        if adapter is None:
            yield weight, torch.zeros(weight.shape), None, stored
        else:
            rows = slice(begin, end)
            before = weight if trained is base else read_rows(trained, begin, end)
            yield weight, adapter.delta_rows(before, rows), _spread(adapter, weight, rows), stored


def _spread(adapter: Adapter, weight: Tensor, rows: slice) -> Tensor:
    """By how much two fp32 computations of these rows of D may differ: (rank + 2) eps |scaling| |B| |A|.

    DoRA's norms add as many roundings of W as one row's sum, pairwise, has levels.
    """
    A, B, eps = adapter.lora_A.detach().abs(), adapter.lora_B.detach().abs(), torch.finfo(torch.float32).eps
    product = (B @ A[:, rows]).T if isinstance(adapter, LoRAEmbedding) else B[rows] @ A
    spread = product * (abs(adapter.scaling) * (adapter.rank + 2) * eps)
    return spread + 32 * eps * weight.abs() if isinstance(adapter, DoRALinear) else spread


def _num_outside(weight: Tensor, delta: Tensor, spread: Tensor | None, stored: Tensor, dtype: torch.dtype) -> int:
    """Entries with |W' - (W + D)| > u (|W| + |D| + |W + D|) + spread, u the unit roundoff of ``dtype``."""
    facts = torch.finfo(dtype)
    exact = merged_weight(weight, delta).double()
    bound = (weight.double().abs() + delta.double().abs() + exact.abs()) * (facts.eps / 2 * SLACK)
    bound += 3 * facts.tiny * facts.eps  # below the smallest normal number, roundings are absolute
    if spread is not None:
        bound += spread
    return int(((stored.double() - exact).abs() > bound).sum())
