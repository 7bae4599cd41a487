"""Learning rates side by side: one cell a rate, the rate with the smallest validation loss, and what a grid cannot decide.

A grid knows the best rate only up to its neighbours. If the best rate is the smallest or the largest of the grid, the optimum
may lie anywhere beyond it: that is refused, not reported. A rate whose loss is no longer finite is a result, "diverged", and
counts as worse than every number. Nothing here trains or needs PyTorch.

The idea to take home: a rate at the edge of a grid is not an optimum.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from minisft.common.checks import require
from minisft.common.colours import BLUE, GREY, ORANGE
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_RATES = 3  # of two rates each lies at an edge
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Cell:
    """What one learning rate gave.

    Attributes:
        lr: peak learning rate.
        key: hash of everything that decides the cell's numbers.
        status: ``done``, or ``diverged`` where a loss was not finite.
        loss: validation loss after the last step, nats a supervised token; None if diverged.
        steps: optimizer steps done.
        curve, train: (step, validation loss) and (step, training loss), as far as they are finite.
    """

    lr: float
    key: str
    status: Literal["done", "diverged"]
    loss: float | None
    steps: int
    curve: Curve = ()
    train: Curve = ()

    def to_json(self) -> dict[str, JSON]:
        """All fields."""
        values = asdict(self)
        return values | {name: [list(point) for point in values[name]] for name in ("curve", "train")}


@dataclass(frozen=True)
class Choice:
    """The best rate of a grid.

    Attributes:
        lr: the rate.
        loss: its validation loss.
        bracket: the rates on both sides; the optimum lies between them if there is only one.
    """

    lr: float
    loss: float
    bracket: tuple[float, float]

    @property
    def resolution(self) -> float:
        """By what factor the rate may be off: the larger of the two steps to its neighbours."""
        return max(self.lr / self.bracket[0], self.bracket[1] / self.lr)


def check_rates(lrs: Sequence[float], share: float) -> None:
    """Refuse a grid that cannot have an optimum inside, and a share that is no part of a budget: ``config/bad-value``."""
    for lr in lrs:
        fix = "write positive numbers, for instance --lrs 1e-4 3e-4 1e-3"
        require(math.isfinite(lr) and lr > 0, "--lrs", lr, "a positive learning rate", fix)
    repeated = sorted({lr for lr in lrs if list(lrs).count(lr) > 1})
    require(not repeated, "--lrs", ", ".join(f"{lr:g}" for lr in repeated), "each rate once", "leave the repeated rate away")
    fix = "add rates on both sides, a factor of about 3 apart"
    require(len(lrs) >= MIN_RATES, "--lrs", f"{len(lrs)} rate(s)", f"at least {MIN_RATES}: the best must have neighbours", fix)
    require(math.isfinite(share) and 0 < share <= 1, "--share", share, "a share in (0, 1]", "0.25 is a quarter of the steps")


def check_search(run: RunConfig, lrs: Sequence[float], share: float) -> None:
    """Everything that can be refused before PyTorch is loaded.

    Args:
        run: the settings.
        lrs: the grid.
        share: of the steps.

    Raises:
        UserError: what ``check_rates`` refuses; ``config/no-validation`` for a run that holds no row out.
    """
    check_rates(lrs, share)
    if run.eval_data is None and run.validation_share == 0:
        raise no_validation("neither --eval-data nor a --validation-share")


def no_validation(found: str) -> UserError:
    """A run without validation rows."""
    return UserError(
        "config/no-validation", "a rate is chosen by its validation loss, and no row is held out", where="lr-find", found=found,
        fix="give --eval-data F, or a --validation-share above 0",
    )  # fmt: skip


def choose(cells: Sequence[Cell]) -> Choice:
    """The rate with the smallest validation loss.

    Args:
        cells: one a rate, in any order.

    Raises:
        UserError: ``numeric/all-diverged``; ``numeric/lr-at-edge`` when the best rate has a neighbour on one side only.
    """
    ordered = sorted(cells, key=lambda cell: cell.lr)
    losses = [math.inf if cell.loss is None else cell.loss for cell in ordered]
    best = min(range(len(ordered)), key=losses.__getitem__)
    if losses[best] == math.inf:
        raise UserError(
            "numeric/all-diverged", "every learning rate of the grid diverged", where="--lrs",
            found=_rates(ordered), fix=f"try smaller rates: {ordered[0].lr / 30:.2g} {ordered[0].lr / 10:.2g}",
        )  # fmt: skip
    if best in (0, len(ordered) - 1):
        raise _at_edge(ordered, best)
    bracket = ordered[best - 1].lr, ordered[best + 1].lr
    return Choice(ordered[best].lr, losses[best], bracket)


def _at_edge(ordered: Sequence[Cell], best: int) -> UserError:
    """Which side to extend, by the factor that the grid has there."""
    low = best == 0
    lr, neighbour = ordered[best].lr, ordered[1 if low else -2].lr
    more = lr * lr / neighbour
    side, name = ("below", "smallest") if low else ("above", "largest")
    return UserError(
        "numeric/lr-at-edge", f"the best learning rate is the {name} of the grid: the optimum may lie {side} it", where="--lrs",
        found=f"{lr:g} in {_rates(ordered)}", expected="a better rate than both of its neighbours",
        fix=f"extend the grid {side} it: add {more:.2g} to --lrs; what is done is kept",
    )  # fmt: skip


def _rates(cells: Sequence[Cell]) -> str:
    return " ".join(f"{cell.lr:g}" for cell in cells)


def line(cell: Cell) -> str:
    """One row of the table."""
    shown = "diverged" if cell.loss is None else f"{cell.loss:.4f}"
    return f"{cell.lr:>10.3g}  {shown:>15}  {cell.steps:>6}"


def heading() -> str:
    """Of the table."""
    return f"{'rate':>10}  {'validation loss':>15}  {'steps':>6}"


def draw(cells: Sequence[Cell], choice: Choice | None, title: str) -> bytes:
    """An SVG: validation loss over the rate, and each rate's curve over the steps.

    Args:
        cells: of the grid.
        choice: the best, marked; None if there is none.
        title: above the picture.

    Returns:
        the file; the same cells give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ordered = sorted(cells, key=lambda cell: cell.lr)
    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_losses(left, ordered, choice)
        _draw_curves(right, ordered)
        figure.suptitle(visible(title), x=0.01, ha="left", fontsize=11, parse_math=False)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=GREY, alpha=0.15, linewidth=0.6)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _draw_losses(axes: Axes, ordered: Sequence[Cell], choice: Choice | None) -> None:
    done = [(cell.lr, cell.loss) for cell in ordered if cell.loss is not None]
    axes.set_xscale("log")
    axes.plot([lr for lr, _ in done], [loss for _, loss in done], "o-", color=BLUE, linewidth=1.4)
    diverged = [cell.lr for cell in ordered if cell.loss is None]
    if diverged:
        axes.plot(diverged, [0.97] * len(diverged), "x", color="black", transform=axes.get_xaxis_transform(), label="diverged")
    if choice is not None:
        axes.plot([choice.lr], [choice.loss], "o", color=ORANGE, markersize=9, label=f"chosen: {choice.lr:g}")
        axes.axvspan(*choice.bracket, color=ORANGE, alpha=0.08, linewidth=0)
    if diverged or choice is not None:
        axes.legend(frameon=False)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats per trained token)")


def _draw_curves(axes: Axes, ordered: Sequence[Cell]) -> None:
    for i, cell in enumerate(ordered):
        if cell.curve:
            shade = 0.25 + 0.75 * (i + 1) / len(ordered)
            steps, losses = zip(*cell.curve, strict=True)
            axes.plot(steps, losses, ".-", color=BLUE, alpha=shade, linewidth=1.2)
            axes.annotate(f"{cell.lr:g}", (steps[-1], losses[-1]), xytext=(4, 0), textcoords="offset points", fontsize=8)
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.12)
