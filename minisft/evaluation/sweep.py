"""How much of an adapter is worth keeping: a model at several scales of its adapter, on its task and on general questions.

The model is W + s D, where D is an adapter's update or, after full fine-tuning, the difference of two models' files
(``interpolated``; there s = 0 and s = 1 give the two models bit for bit). At s = 0 it is the base (DoRA's keeps the lengths of
its rows, so there it is not quite), at s = 1 what was trained; on the way up, what the task gains and what general knowledge
loses need not go hand in hand. One model is loaded, its adapters are scaled in place and put back. ``sweep.json`` is written
after every scale, so what was measured stays, and a scale that cannot be scored is noted and passed over. This module chooses
nothing: a point is worth its interval.

The idea to take home: half of the adapter is a free experiment; no training run is as cheap.

Ref: Wortsman et al. 2022, arXiv:2109.01903 (interpolating towards the pretrained weights keeps robustness).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.common.atomic_files import disk_errors, make_folder, require_unused, write_durably
from minisft.common.colours import BLUE, GREY, ORANGE
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.evaluation.evaluate import EvalResult
from minisft.model import CausalLM
from minisft.surgery import lora_modules, require_scalable, scale_adapters_

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, PLOT = "sweep.json", "sweep.svg"

Score = Callable[[CausalLM], EvalResult]
At = Callable[[CausalLM, float], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Point:
    """What the model scored at one scale, or why it could not be scored."""

    scale: float
    task: EvalResult | None = None
    general: EvalResult | None = None
    error: str = ""

    def to_json(self) -> dict[str, JSON]:
        """Scores without their rows."""
        if self.task is None or self.general is None:
            return {"scale": self.scale, "error": self.error}
        return {"scale": self.scale, "task": self.task.head, "general": self.general.head}


@contextlib.contextmanager
def scaled(model: CausalLM, scale: float) -> Iterator[None]:
    """Within this block the adapters act ``scale`` times as strongly; afterwards their very numbers are back."""
    adapters = lora_modules(model).values()
    before = [(adapter.scaling, adapter.alpha) for adapter in adapters]
    try:
        scale_adapters_(model, scale)
        yield
    finally:
        for adapter, (scaling, alpha) in zip(adapters, before, strict=True):
            adapter.scaling, adapter.alpha = scaling, alpha


def sweep(
    model: CausalLM,
    scales: Sequence[float],
    task: Score,
    general: Score,
    out: str | Path,
    callback: Callable[[Point], None],
    at: At = scaled,
) -> list[Point]:
    """Score ``model`` at each scale.

    Args:
        model: with adapters, or as ``at`` needs it; the same afterwards.
        scales: of the update.
        task, general: what to ask of it.
        out: new, or empty; gets ``sweep.json`` after every scale and ``sweep.svg`` at the end.
        callback: called with each point.
        at: makes the model what it is at a scale: ``scaled`` for adapters, ``interpolated(base, tuned)`` for two models.

    Returns:
        one point a scale, those that failed included.

    Raises:
        UserError: a target that is in use, the disk; ``config/scaled-rows`` for trained tokens, which have no scale.
    """
    out = Path(out)
    if at is scaled:
        require_scalable(model)
    require_unused(out)
    points: list[Point] = []
    with disk_errors(out):
        make_folder(out.absolute())
        for scale in scales:
            try:
                with at(model, scale):
                    point = Point(scale, task(model), general(model))
            except UserError as error:
                point = Point(scale, error=str(error))
            points.append(point)
            write_durably(out / REPORT, (json.dumps([p.to_json() for p in points], indent=2) + "\n").encode())
            callback(point)
        if not all(point.error for point in points):
            write_durably(out / PLOT, draw(points))
    return points


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(points: Sequence[Point]) -> bytes:
    """An SVG: each score over the scale with its interval, and the one against the other. Failed points are left out."""
    import matplotlib
    from matplotlib.figure import Figure

    done = sorted((point for point in points if not point.error), key=lambda point: point.scale)
    scales = [point.scale for point in done]
    tasks, generals = [point.task for point in done if point.task], [point.general for point in done if point.general]
    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        axes = figure.subplot_mosaic([["task", "against"], ["general", "against"]])
        _draw_scores(axes["task"], scales, tasks, BLUE, f"task, {tasks[0].metric}")
        _draw_scores(axes["general"], scales, generals, ORANGE, f"general, {generals[0].metric}")
        axes["task"].sharex(axes["general"])
        axes["task"].tick_params(labelbottom=False)
        axes["general"].set_xlabel("scale of the update")
        _draw_against(axes["against"], scales, tasks, generals)
        for each in axes.values():
            each.spines[["top", "right"]].set_visible(False)
            each.grid(color=GREY, alpha=0.15, linewidth=0.6)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _draw_scores(axes: Axes, scales: Sequence[float], results: Sequence[EvalResult], color: str, label: str) -> None:
    scores = [result.score for result in results]
    axes.plot(scales, scores, "o-", color=color, linewidth=1.2, markersize=5)
    bounds = [result.interval for result in results]
    if all(bounds):
        lows, highs = zip(*[pair for pair in bounds if pair], strict=True)
        axes.fill_between(scales, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set_ylabel(label)


def _draw_against(axes: Axes, scales: Sequence[float], tasks: Sequence[EvalResult], generals: Sequence[EvalResult]) -> None:
    x, y = [result.score for result in generals], [result.score for result in tasks]
    axes.plot(x, y, "o-", color=GREY, linewidth=1.0, markersize=6)
    for i, (place, label) in enumerate(_labels(scales, x, y).items()):
        beside = (-6, 4) if i % 2 else (6, -12)  # neighbours may be close: to the left and to the right by turns
        axes.annotate(label, place, xytext=beside, textcoords="offset points", fontsize=9, ha="right" if i % 2 else "left")
    axes.set_xlabel(f"general, {generals[0].metric}")
    axes.set_ylabel(f"task, {tasks[0].metric}")
    axes.margins(0.12)


def _labels(scales: Sequence[float], x: Sequence[float], y: Sequence[float]) -> dict[tuple[float, float], str]:
    """The scales at each place; where scores are equal, points lie on each other."""
    found: dict[tuple[float, float], list[str]] = {}
    for scale, place in zip(scales, zip(x, y, strict=True), strict=True):
        found.setdefault(place, []).append(f"{scale:g}")
    return {place: ", ".join(names) for place, names in found.items()}


# ---- on the terminal ---------------------------------------------------------------------------------------------------


def line(point: Point) -> str:
    """One row of the table."""
    if point.task is None or point.general is None:
        return f"{point.scale:>6g}  not scored: {point.error}"
    return f"{point.scale:>6g}  {_cell(point.task):>32}  {_cell(point.general):>32}"


def _cell(result: EvalResult) -> str:
    bounds = result.interval
    if bounds is None:
        return f"{result.score:.4f}"
    return f"{result.score:.1%} ({bounds[0]:.1%} to {bounds[1]:.1%})"


def heading(task: str, general: str) -> str:
    """Of the table, with the names of the two metrics."""
    return f"{'scale':>6}  {f'task, {task}':>32}  {f'general, {general}':>32}"
