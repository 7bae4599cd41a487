"""The picture of a run: loss above, learning rate below, drawn from ``metrics.jsonl`` alone.

matplotlib is imported only when a picture is made, and its global state (backend, current figure) is left alone. The same
log gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.common.atomic_files import disk_errors, write_durably
from minisft.common.colours import BLUE, GREEN, GREY, ORANGE
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.training.runlog import NONFINITE_SUFFIX, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHING_SHARE = 40  # the average reaches one part in 40 of the run to either side
_LARGEST_RADIUS = 100
_FEW_POINTS = 40  # below this, single steps are marked


@dataclass(frozen=True)
class _Series:
    """Steps and values of one column; ``nonfinite`` are the steps at which it was NaN or infinite."""

    steps: list[int]
    values: list[float]
    nonfinite: list[int]


def plot_loss(metrics_path: str | Path, png_path: str | Path, title: str) -> None:
    """Draw training loss (each step and smoothed), validation loss and learning rate of one run into a PNG.

    Args:
        metrics_path: ``metrics.jsonl``; its columns ``step``, ``loss``, ``lr`` and ``eval_loss`` are read; the last
            may stand in rows of its own.
        png_path: the picture, written whole or not at all.
        title: above the picture.

    Raises:
        UserError: the log cannot be read or holds no loss; the picture cannot be written.
    """
    rows = read_metrics(metrics_path)
    training = _column(rows, "loss")
    if not training.values:
        raise UserError("checkpoint/bad-log", "the run log holds no loss to draw", where=visible(metrics_path))
    with disk_errors(Path(png_path)):
        write_durably(png_path, _draw(training, _column(rows, "eval_loss"), _column(rows, "lr"), title))


def _column(rows: Iterable[Mapping[str, JSON]], name: str) -> _Series:
    series = _Series([], [], [])
    for row in rows:
        step, value = row.get("step"), row.get(name)
        if not isinstance(step, int):
            continue
        if isinstance(value, int | float):
            series.steps.append(step)
            series.values.append(float(value))
        elif name + NONFINITE_SUFFIX in row:
            series.nonfinite.append(step)
    return series


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Centred moving average: mean of x[i-radius..i+radius] for each i that has so many neighbours on both sides.

    Unlike a running average it does not lag behind a falling curve: a straight line stays where it is.
    """
    sums = list(accumulate(values, initial=0.0))
    width = 2 * radius + 1
    return [(sums[end] - sums[end - width]) / width for end in range(width, len(sums))]


def _draw(training: _Series, validation: _Series, rates: _Series, title: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(upper, training, validation)
    upper.set_title(visible(title), loc="left", fontsize=12, parse_math=False)
    upper.set_ylabel("loss (nats per trained token)")
    upper.legend(frameon=False)
    _draw_rates(lower, rates)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GREY, alpha=0.15, linewidth=0.6)
        axes.margins(x=0.015)
    figure.align_ylabels()
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})  # no library version: the bytes follow from the log
    return png.getvalue()


def _draw_losses(axes: Axes, training: _Series, validation: _Series) -> None:
    radius = min(_LARGEST_RADIUS, len(training.values) // _SMOOTHING_SHARE)
    marker = "." if len(training.values) < _FEW_POINTS else ""
    axes.plot(
        training.steps, training.values, color=BLUE, alpha=0.35, linewidth=0.8, marker=marker, label="training, each step"
    )
    if radius:
        label = f"training, mean of {2 * radius + 1} steps"
        axes.plot(training.steps[radius:-radius], smooth(training.values, radius), color=BLUE, linewidth=2, label=label)
    if validation.values:
        best = min(range(len(validation.values)), key=validation.values.__getitem__)
        label = f"validation (best {validation.values[best]:.3f} at step {validation.steps[best]:,})"
        axes.plot(validation.steps, validation.values, "o-", color=ORANGE, markersize=5, markeredgecolor="white", label=label)
    if training.nonfinite:
        edge = axes.get_xaxis_transform()  # x in steps, y as a share of the panel
        label = f"not finite, at {len(training.nonfinite)} step(s)"
        axes.plot(training.nonfinite, [0.97] * len(training.nonfinite), "x", color="black", transform=edge, label=label)


def _draw_rates(axes: Axes, rates: _Series) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.plot(rates.steps, rates.values, color=GREEN, linewidth=1.5)
    axes.set_ylim(0, 1.1 * max(rates.values, default=1.0))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("learning rate")
    axes.set_xlabel("optimizer step")
