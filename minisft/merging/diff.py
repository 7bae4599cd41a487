"""What separates two models of one shape, tensor by tensor: how large the update is, its rank, and which directions are new.

``a`` is the base; ``b`` a fine-tune of it, or an adapter over it. Both are read a tensor at a time, so models of any size can
be compared. Norms and biases have no rank; they are listed with the size of their change.

The idea to take home: where training has moved a model can be read off its files, without a single prompt.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minisft.adapter import Adapter
from minisft.common.atomic_files import disk_errors, make_folder, write_durably
from minisft.common.checks import check_comparison
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.formats.adapter_config import CONFIG_FILE
from minisft.formats.lazy_weights import Pieces, read_rows
from minisft.formats.loading import empty_model, expected_shapes
from minisft.formats.pair import open_pair
from minisft.merging.base_and_adapter import open_adapted, row_ranges
from minisft.merging.spectrum import ENERGY, THRESHOLD, TOP, Spectrum, spectrum_of_rows


@dataclass(frozen=True)
class LayerDiff:
    """One tensor.

    Attributes:
        name, shape: of the tensor.
        norm, delta_norm: Frobenius norms of W and of D = W' - W.
        relative: |D| / |W|.
        energy_rank, full_rank: singular values of D that hold the share of its energy, and how many there could be; None for
            a vector.
        intruders: directions of W' that resemble none of W's; None for a vector.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    delta_norm: float
    relative: float
    energy_rank: int | None
    full_rank: int | None
    intruders: int | None

    @property
    def kind(self) -> str:
        """``q_proj`` for model.layers.0.self_attn.q_proj.weight."""
        return self.name.removesuffix(".weight").rsplit(".", 1)[-1]


@dataclass(frozen=True)
class ModelDiff:
    """Every tensor of two models, in the model's order, and the settings of the comparison."""

    a: str
    b: str
    energy: float
    threshold: float
    top: int
    layers: tuple[LayerDiff, ...]

    @property
    def changed(self) -> tuple[LayerDiff, ...]:
        """The tensors that differ."""
        return tuple(layer for layer in self.layers if layer.delta_norm > 0)

    def to_json(self) -> dict[str, JSON]:
        """Everything, and a summary by kind of layer."""
        layers: list[JSON] = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        head: dict[str, JSON] = {"a": self.a, "b": self.b, "energy": self.energy, "threshold": self.threshold, "top": self.top}
        return {**head, "summary": {kind: dict(row) for kind, row in summary(self).items()}, "layers": layers}


def diff_models(
    a: str | Path,
    b: str | Path,
    *,
    energy: float = ENERGY,
    threshold: float = THRESHOLD,
    top: int = TOP,
    callback: Callable[[int, int], None] = lambda done, total: None,
) -> ModelDiff:
    """Compare two models of one shape, or a base with an adapter over it.

    Args:
        a: the base: a folder, GGUF file, hub id or name.
        b: a fine-tune of it, named in the same ways, or an adapter's folder; then D is the adapter's update.
        energy: share of the squared singular values that the energy rank holds.
        threshold: cosine below which a direction of W' counts as new.
        top: how many of W' largest directions are looked at.
        callback: called with (tensors done, tensors in all).

    Returns:
        every tensor.

    Raises:
        UserError: what ``open_pair`` or ``open_adapted`` refuse; ``numeric/non-finite-weight``; a setting out of range.

    Cost: each weight is read once, one tensor at a time; see ``spectrum_of_rows``.
    """
    check_comparison(energy, threshold, top)
    is_adapter = (Path(b) / CONFIG_FILE).is_file()
    pairs = _adapter_pairs(str(a), Path(b)) if is_adapter else _model_pairs(a, b)
    layers = []
    for name, opened in pairs.items():
        layers.append(_compare(name, *opened(), (energy, threshold, top)))
        callback(len(layers), len(pairs))
    return ModelDiff(str(a), str(b), energy, threshold, top, tuple(layers))


Other = Pieces | Adapter | None  # what W' is: stored, W with an adapter's update, W itself


Opened = Callable[[], tuple[Pieces, Other]]  # of one tensor, when its turn has come


def _model_pairs(a: str | Path, b: str | Path) -> dict[str, Opened]:
    first, second = open_pair(a, b)

    def opened(name: str) -> tuple[Pieces, Other]:
        return first.open[name](), second.open[name]()

    return {name: partial(opened, name) for name in expected_shapes(empty_model(first.config))}


def _adapter_pairs(a: str, b: Path) -> dict[str, Opened]:
    files = open_adapted(b, a)
    if files.rows:
        raise UserError(
            "adapter/tokens", "trained tokens are no update of a layer, so there is nothing to compare them with",
            where=visible(b), found=f"trained rows in {listing(files.rows)}", expected="plain LoRA or DoRA",
            fix="compare an adapter that was trained without --add-tokens",
        )  # fmt: skip
    names = list(expected_shapes(empty_model(files.stored.config)))
    names += [f"{path}.weight" for path in files.adapters if f"{path}.weight" not in names]  # a head that is tied no longer

    def opened(name: str) -> tuple[Pieces, Other]:
        return files.trained_on(name), files.adapters.get(name.removesuffix(".weight"))

    return {name: partial(opened, name) for name in names}


def _compare(name: str, weight: Pieces, other: Other, settings: tuple[float, float, int]) -> LayerDiff:
    shape = tuple(weight.shape)
    found = _vector(name, weight, other) if len(shape) == 1 else spectrum_of_rows(_rows(name, weight, other), shape, *settings)
    is_matrix = len(shape) == 2
    return LayerDiff(
        name, shape, found.norm, found.delta_norm, found.relative, found.energy_rank if is_matrix else None,
        min(shape) if is_matrix else None, found.intruders if is_matrix else None,
    )  # fmt: skip


def _vector(name: str, weight: Pieces, other: Other) -> Spectrum:
    w = _finite(name, weight.read(0, weight.shape[0]).double())
    d = torch.zeros_like(w)
    if other is not None and not isinstance(other, Adapter):
        d = _finite(name, other.read(0, weight.shape[0]).double()) - w
    return Spectrum(float(w.norm()), float(d.norm()), 0, 0)


def _rows(name: str, weight: Pieces, other: Other) -> Iterator[tuple[Tensor, Tensor]]:
    """W and D in fp64, a few rows at a time."""
    for begin, end in row_ranges(tuple(weight.shape)):
        w = _finite(name, read_rows(weight, begin, end))
        if other is None:
            d = torch.zeros(w.shape, dtype=torch.float64)
        elif isinstance(other, Adapter):
            d = _finite(name, other.delta_rows(w.float(), slice(begin, end)).double())
        else:
            d = _finite(name, read_rows(other, begin, end)).double() - w.double()
        yield w.double(), d


def _finite(name: str, numbers: Tensor) -> Tensor:
    if not numbers.isfinite().all():
        what = "a weight is not a finite number"
        raise UserError("numeric/non-finite-weight", what, where=visible(name), expected="finite numbers only")
    return numbers


# ---- what people read ------------------------------------------------------------------------------------------------


def summary(diff: ModelDiff) -> dict[str, dict[str, float]]:
    """By kind of layer: how many changed, medians of |D|/|W| and of the energy rank, and all intruders."""
    kinds: dict[str, list[LayerDiff]] = {}
    for layer in diff.changed:
        kinds.setdefault(layer.kind, []).append(layer)
    found = {}
    for kind, layers in kinds.items():
        ranks = [layer.energy_rank for layer in layers if layer.energy_rank is not None]
        found[kind] = {"changed": len(layers), "relative": statistics.median(layer.relative for layer in layers)}
        if ranks:
            found[kind] |= {
                "energy_rank": statistics.median(ranks), "full_rank": max(layer.full_rank or 0 for layer in layers),
                "intruders": sum(layer.intruders or 0 for layer in layers),
            }  # fmt: skip
    return found


def render(diff: ModelDiff) -> str:
    """A table of all tensors that differ, and one by kind."""
    if not diff.changed:
        return f"the same numbers in all {len(diff.layers)} tensors"
    width = max(len(layer.name) for layer in diff.changed)
    lines = [f"{'':{width}}  {'|D|/|W|':>9}  {f'rank {diff.energy:.0%}':>9}  {'of':>5}  {'new':>4}"]
    for layer in diff.changed:
        cells = [("" if value is None else str(value)) for value in (layer.energy_rank, layer.full_rank, layer.intruders)]
        lines.append(f"{visible(layer.name):{width}}  {layer.relative:>9.2e}  {cells[0]:>9}  {cells[1]:>5}  {cells[2]:>4}")
    lines += ["", f"{'median by kind':{width}}  {'|D|/|W|':>9}  {f'rank {diff.energy:.0%}':>9}  {'of':>5}  {'new':>4}"]
    for kind, row in summary(diff).items():
        cells = [f"{row[key]:g}" if key in row else "" for key in ("energy_rank", "full_rank", "intruders")]
        label = f"{visible(kind)} ({row['changed']:g})"
        lines.append(f"{label:{width}}  {row['relative']:>9.2e}  {cells[0]:>9}  {cells[1]:>5}  {cells[2]:>4}")
    same = len(diff.layers) - len(diff.changed)
    new = f"new: of the {diff.top} largest directions of W', those whose cosine to all of W's is below {diff.threshold:g}"
    return "\n".join([*lines, "", new, *([f"{same} tensors are the same"] if same else [])])


def write_diff(diff: ModelDiff, out: str | Path) -> None:
    """Write everything as JSON, whole or not at all."""
    out = Path(out)
    with disk_errors(out):
        make_folder(out.absolute().parent)
        write_durably(out, (json.dumps(diff.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
