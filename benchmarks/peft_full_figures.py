"""Pictures, a table and claims of ``exp_peft_full``, from its results file alone.

A claim "held" or "did not hold" where an interval or every seed says so, and is "not shown here" where they do not, where fewer
than three seeds were run, or where nothing of this size could show it. Intervals: 95 %, bootstrap over test rows (or texts) and
seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import bootstrap, read_cells, save_svg

MIN_SEEDS = 3
COLORS = {
    "r1": "#56B4E9", "r16": "#0072B2", "r64": "#004C78", "attention r16": "#009E73",
    "full-linears": "#E69F00", "full": "#D55E00",
}  # fmt: skip
ADAPTER_COLORS = ("#56B4E9", "#0072B2", "#009E73", "#D55E00")
Result = dict[str, Any]


class Results:
    """The lines of a results file."""

    def __init__(self, path: Path) -> None:
        self.rows: list[Result] = list({row["key"]: row for row in read_cells(path)}.values())

    def of(self, experiment: str, kind: str, arm: str | None = None, of: str = "") -> list[Result]:
        """Cells, by seed."""
        found = [
            row for row in self.rows if (row["experiment"], row["kind"], row["of"]) == (experiment, kind, of)
            and (arm is None or row["arm"] == arm)
        ]  # fmt: skip
        return sorted(found, key=lambda row: (row["arm"], row["seed"]))

    def losses(self, experiment: str, arm: str) -> dict[int, np.ndarray]:
        """Seed -> loss of each test row."""
        return {row["seed"]: np.array(row["test"]["rows"]) for row in self.of(experiment, "run", arm)}

    def base(self, experiment: str) -> np.ndarray | None:
        """The base's loss of each test row."""
        runs = self.of(experiment, "run")
        return np.array(runs[0]["base"]["rows"]) if runs else None


def paired(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> np.ndarray:
    """(seeds, rows, 2) of the seeds that both have."""
    common = sorted(first.keys() & second.keys())
    return np.stack([np.stack([first[s], second[s]], axis=-1) for s in common]) if common else np.zeros((0, 0, 2))


def difference(results: Results, experiment: str, a: str, b: str) -> tuple[float, float, float, int]:
    """Mean test loss of arm a less that of arm b, its interval, and the seeds."""
    return _mean_gap(paired(results.losses(experiment, a), results.losses(experiment, b)))


def _mean_gap(table: np.ndarray) -> tuple[float, float, float, int]:
    """Of a ``paired`` table: the first less the second, its interval, and the seeds."""
    if not len(table):
        return math.nan, math.nan, math.nan, 0
    return *bootstrap(table, lambda t: float((t[..., 0] - t[..., 1]).mean())), len(table)


# ---- claims ------------------------------------------------------------------------------------------------------------


def verdict(low: float, high: float, seeds: int, holds_below: float = 0.0) -> str:
    """``held`` if the whole interval lies below, ``did not hold`` if it lies above; one seed shows nothing."""
    if seeds < MIN_SEEDS or math.isnan(low) or low <= holds_below <= high:
        return "not shown here"
    return "held" if high < holds_below else "did not hold"


def unanimous(each: Sequence[bool]) -> str:
    """The verdict where each seed says yes or no: ``held`` if all say yes, ``did not hold`` if all say no."""
    if len(each) < MIN_SEEDS or any(each) != all(each):
        return "not shown here"
    return "held" if all(each) else "did not hold"


def by_seed(rows: Iterable[Result]) -> dict[int, list[Result]]:
    """The cells of each seed, in the order of the seeds."""
    found: dict[int, list[Result]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault(row["seed"], []).append(row)
    return found


def claims(results: Results) -> list[tuple[str, str, str]]:
    """(claim, verdict, figures)."""
    return [
        *_learning(results),
        *_rates(results),
        *_capacity(results),
        *_forgetting(results),
        *_spectra(results),
        ("full fine-tuning wins with 50 000 rows and more", "not shown here",
         "no run here has so many rows; P1 says it in bits: what counts is the information in the rows, not their number"),
    ]  # fmt: skip


def _learning(results: Results) -> Iterable[tuple[str, str, str]]:
    pairs = (("P2", "cipher text, far", "full"), ("P2", "cipher text, far", "full-linears"), ("P3", "Banking77", "full"))
    for experiment, where, full in pairs:
        gap, low, high, seeds = difference(results, experiment, full, "r16")
        if seeds:
            words = f"test loss {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
            yield f"{full} learns more than LoRA r 16: {where}", verdict(low, high, seeds), words
    for experiment in ("P2", "P3"):
        base, table = results.base(experiment), paired(results.losses(experiment, "r16"), results.losses(experiment, "full"))
        if base is None or not len(table):
            continue
        with_base = np.concatenate([table, np.broadcast_to(base[None, :, None], (*table.shape[:2], 1))], axis=-1)
        share, low, high = bootstrap(with_base, _share)
        words = f"{share:.1%} ({low:.1%} to {high:.1%}) of what full gains over the base, {len(table)} seeds"
        if math.isnan(low):
            words = f"full does not surely beat the base, so there is no share of its gain, {len(table)} seeds"
        yield f"LoRA r 16 reaches 95 % of full: {experiment}", verdict(-high, -low, len(table), -0.95), words
    gap, low, high, seeds = difference(results, "P2", "r16", "attention r16")
    if seeds:
        words = f"test loss of all linears less attention only {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
        yield "adapters on attention alone learn less than on all linears (r 16)", verdict(low, high, seeds), words
    for arm in ("r16", "full"):
        gap, low, high, seeds = difference(results, "P3", arm, f"{arm}, one rate")
        if seeds:
            words = f"tuned less untuned (2e-4): {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
            yield f"one rate for both methods costs {arm} something: Banking77", verdict(low, high, seeds), words
    gap, low, high, seeds = difference(results, "P3", "full, one rate", "r16, one rate")
    if seeds:
        words = f"test loss of full less r 16 at 2e-4: {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
        yield "at one rate for both, full looks better than LoRA: Banking77 (the mistake)", verdict(low, high, seeds), words


def _share(table: np.ndarray) -> float:
    """LoRA's share of what full gains over the base; nan where full gains nothing, because two losses have a ratio as well."""
    lora, full, base = table.mean(axis=(0, 1))
    return float((base - lora) / (base - full)) if full < base else math.nan


def _rates(results: Results) -> Iterable[tuple[str, str, str]]:
    """Figures without a verdict: a rate is searched for with one seed."""
    for experiment in ("P2", "P3"):
        tuned = {row["arm"]: row for row in results.of(experiment, "tune")}
        if {"r16", "full"} <= tuned.keys():
            lora, full = tuned["r16"], tuned["full"]
            ratio = lora["lr"] / full["lr"]
            low, high = lora["bracket"][0] / full["bracket"][1], lora["bracket"][1] / full["bracket"][0]
            words = f"{ratio:.3g} (the grids leave {low:.2g} to {high:.3g} open), one seed, {lora['steps']} steps"
            yield f"LoRA's best rate is about ten times that of full: {experiment}", "not shown here", words
        if {"r1", "r16"} <= tuned.keys():
            rates = tuned["r1"]["lr"], tuned["r16"]["lr"]
            resolution = max(tuned["r16"]["bracket"][1] / rates[1], rates[1] / tuned["r16"]["bracket"][0])
            words = f"r 1: {rates[0]:g}, r 16: {rates[1]:g} (alpha 32; neighbours a factor of {resolution:.2g} apart), one seed"
            yield f"LoRA's best rate hardly depends on the rank: {experiment}", "not shown here", words


def _capacity(results: Results) -> Iterable[tuple[str, str, str]]:
    rows = results.of("P1", "facts")
    small = [row for row in rows if not row["arm"].startswith("full") and row["entropy"] > 2 * row["trained"]]
    if small:
        at_edge = sum(not row["inside"] for row in small)
        per = {seed: [row["bits"] / row["trained"] for row in found] for seed, found in by_seed(small).items()}
        every = [bits for found in per.values() for bits in found]
        spread = f"median {statistics.median(every):.2f} bits a parameter, {min(every):.2f} to {max(every):.2f}"
        words = f"{spread}, where the facts hold over 2; {at_edge} of {len(small)} best rates at an edge; {len(per)} seeds"
        word = "not shown here" if at_edge else unanimous([0.5 <= statistics.median(found) <= 2 for found in per.values()])
        yield "an adapter holds 0.5 to 2 bits a parameter: random facts, own small model", word, words
    for least, most, claim, holds in (
        (0.0, 0.5, "while the facts fit the adapter (under 0.5 bits a parameter), LoRA equals full", lambda gap: gap > -0.05),
        (
            1.0,
            math.inf,
            "asked after the runs: full recalls more where the facts hold over 1 bit a parameter of the adapter",
            lambda gap: gap < -0.05,
        ),
    ):
        gaps = recall_gaps(results, least, most)
        if gaps:
            every = [gap for found in gaps.values() for gap in found]
            spread = f"{statistics.mean(every):+.1%} of the bits ({min(every):+.1%} to {max(every):+.1%})"
            word = unanimous([holds(statistics.mean(found)) for found in gaps.values()])
            yield claim, word, f"adapter less full: {spread}, {len(gaps)} seeds"


def recall_gaps(results: Results, least: float, most: float) -> dict[int, list[float]]:
    """Seed -> what adapters recall less what full recalls, as a share, where facts hold that many bits for each parameter."""
    rows = results.of("P1", "facts")
    full = {(row["facts"], row["seed"]): row["bits"] for row in rows if row["arm"].startswith("full")}
    adapters = [
        row for row in rows
        if not row["arm"].startswith("full") and least <= row["entropy"] / row["trained"] < most
        and (row["facts"], row["seed"]) in full
    ]  # fmt: skip
    return {
        seed: [(row["bits"] - full[row["facts"], seed]) / row["entropy"] for row in found]
        for seed, found in by_seed(adapters).items()
    }


# ---- forgetting at equal learning ---------------------------------------------------------------------------------------


def at_equal_learning(points: Sequence[Result], target: float) -> np.ndarray | None:
    """Bits a byte of each web text where a run's scale curve crosses a test loss; None if it does not get there."""
    ordered = sorted(points, key=lambda point: point["scale"])
    for before, after in itertools.pairwise(ordered):
        high, low = before["test"]["loss"], after["test"]["loss"]
        if low <= target <= high and high > low:
            share = (high - target) / (high - low)
            return (1 - share) * np.array(before["web"]) + share * np.array(after["web"])
    return None


def _equal_pairs(first: Sequence[Result], second: Sequence[Result]) -> np.ndarray:
    """(seeds, texts, 2) bits a byte, each seed at the best test loss that both of its runs reach."""
    found: list[dict[int, np.ndarray]] = [{}, {}]
    others = {row["seed"]: row["points"] for row in second}
    for row in first:
        pair = row["points"], others.get(row["seed"], [])
        if not all(len(points) > 2 for points in pair):
            continue
        target = max(min(point["test"]["loss"] for point in points) for points in pair)
        web = [at_equal_learning(points, target) for points in pair]
        for each, values in zip(found, web, strict=True):
            if values is not None:
                each[row["seed"]] = values
    return paired(found[0], found[1])


def forgotten_more(results: Results, of: str, a: str, b: str) -> tuple[float, float, float, int]:
    """Bits a byte of web text that arm a has lost more than arm b at the best test loss that both reach; interval, seeds."""
    return _mean_gap(_equal_pairs(*(results.of("P5", "forgetting", arm, of) for arm in (a, b))))


def _forgetting(results: Results) -> Iterable[tuple[str, str, str]]:
    for of in ("P2", "P3"):
        runs = {arm: results.of("P5", "forgetting", arm, of) for arm in ("r16", "full")}
        if not all(runs.values()):
            continue
        last = {arm: {row["seed"]: np.array(row["points"][-1]["web"]) for row in rows} for arm, rows in runs.items()}
        gap, low, high, seeds = _mean_gap(paired(last["r16"], last["full"]))
        if seeds:
            words = f"web bits a byte, r 16 less full: {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
            yield f"LoRA r 16 forgets less than full at equal steps: {of}", verdict(low, high, seeds), words
        gap, low, high, seeds = forgotten_more(results, of, "r16", "full")
        if seeds:
            words = f"web bits a byte at the best loss both reach: {gap:+.4f} ({low:+.4f} to {high:+.4f}), {seeds} seeds"
            yield f"LoRA r 16 forgets less than full at equal learning: {of}", verdict(low, high, seeds), words
    for arm, cure in (("r16", "replay"), ("full", "replay"), ("full", "lower rate")):
        plain, cured = (results.of("P5", "forgetting", name, "P2") for name in (arm, f"{arm}, {cure}"))
        gap, low, high, seeds = forgotten_more(results, "P2", f"{arm}, {cure}", arm)
        if seeds:
            a, b = (rows[0]["points"][-1] for rows in (cured, plain))
            at_end = float(np.mean(np.array(a["web"]) - np.array(b["web"]))), a["test"]["loss"] - b["test"]["loss"]
            words = (
                f"web bits a byte at the best loss both reach: {gap:+.4f} ({low:+.4f} to {high:+.4f}, over texts); at the end "
                f"{at_end[0]:+.4f}, test loss {at_end[1]:+.4f}; one seed"
            )
            what = {"replay": "replaying 10 % web text", "lower rate": "a third of the rate"}[cure]
            yield f"{what} keeps {arm} from forgetting: P2", "not shown here", words


def _spectra(results: Results) -> Iterable[tuple[str, str, str]]:
    for of in ("P2", "P3"):
        lora, full = ({row["seed"]: row for row in results.of("P6", "spectrum", arm, of)} for arm in ("r16", "full"))
        seeds = sorted(lora.keys() & full.keys())
        if not seeds:
            continue
        ranks = [(statistics.median(full[seed]["ranks"]), statistics.median(lora[seed]["ranks"])) for seed in seeds]
        ratios = [wide / max(1, narrow) for wide, narrow in ranks]
        shown = "; ".join(f"full {wide:g}, r 16 {narrow:g}" for wide, narrow in ranks)
        words = f"rank that holds 90 % of the energy, median: {shown}: {min(ratios):.3g} to {max(ratios):.3g} times"
        word = unanimous([10 <= ratio <= 100 for ratio in ratios])
        yield f"full's update has 10 to 100 times LoRA's rank: {of}", word, f"{words}, {len(seeds)} seeds"
        new = [(sum(lora[seed]["intruders"]), sum(full[seed]["intruders"])) for seed in seeds]
        shown = "; ".join(f"r 16 {narrow}, full {wide}" for narrow, wide in new)
        words = f"among the ten largest directions of each layer: {shown}, {len(seeds)} seeds"
        word = unanimous([narrow > wide for narrow, wide in new])
        yield f"LoRA r 16 brings in more new large directions than full: {of}", word, words


# ---- output ------------------------------------------------------------------------------------------------------------


def report(path: Path, folder: Path) -> None:
    """Draw every picture that there are results for; print the table and the claims."""
    results = Results(path)
    if not results.rows:
        print(f"no results in {path}")
        return
    for name, draw in (("p0", _p0), ("p1", _p1), ("rates", _rate_curves), ("losses", _losses), ("p5", _p5), ("p6", _p6)):
        figure = draw(results)
        if figure is not None:
            save_svg(figure, folder / f"peft_full_{name}.svg")
    print(tables(results))


def tables(results: Results) -> str:
    """Claims, runs and models, in Markdown."""
    lines = ["| claim | here | figures |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in claims(results))]
    lines += ["", "| experiment | arm | rate | seeds | test loss | base |", "|---|---|---|---|---|---|"]
    for experiment in ("P2", "P3", "P4"):
        arms = dict.fromkeys(row["arm"] for row in results.of(experiment, "run"))
        for arm in arms:
            rows = results.of(experiment, "run", arm)
            losses = [row["test"]["loss"] for row in rows]
            shown = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            lines.append(
                f"| {experiment} | {arm} | {rows[0]['lr']:g} | {len(rows)} | {shown} | {rows[0]['base']['loss']:.4f} |"
            )
    models = sorted({row["model"] for row in results.rows if row["model"] != "none"})
    return "\n".join(lines) + f"\n\nModels: {', '.join(models)}. Nothing here says anything about larger ones.\n"


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="#666666", alpha=0.15, linewidth=0.6)
    return figure, axes


def _log_x(axes: Any) -> None:
    """A logarithmic axis on which only powers of ten have a label."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _caption(axes: Any, rows: Sequence[Result], text: str) -> None:
    models = ", ".join(sorted({row["model"] for row in rows}))
    axes.set_title(f"{text}\n{models}, {len({row['seed'] for row in rows})} seed(s)", loc="left", fontsize=9)


def _p0(results: Results) -> Any:
    rows = results.of("P0", "theory")
    if not rows:
        return None
    figure, axes = _figure(12, 3.4, 4)
    ranks = rows[0]["ranks"]
    for each, name in zip(axes, rows[0]["gaps"], strict=False):
        for row in rows:
            each.plot(ranks, np.maximum(row["gaps"][name]["reached"], 1e-12), "o", color="#0072B2", alpha=0.6, markersize=5)
        each.plot(
            ranks,
            np.maximum(rows[0]["gaps"][name]["bound"], 1e-12),
            "-",
            color="#D55E00",
            label="sum of the cut off $\\sigma^2$",
        )
        each.set(xscale="log", xlabel="rank", ylabel="loss left, share")
        each.set_ylim(-0.05, 1.05)
        each.set_title(f"64 x 96, spectrum {name}", loc="left", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    for row in rows:
        axes[3].plot(ranks, row["first_step"]["measured"], "o", color="#0072B2", alpha=0.6)
    axes[3].plot(ranks, rows[0]["first_step"]["r/d"], "-", color="#D55E00", label="r / d")
    axes[3].set(xscale="log", yscale="log", xlabel="rank", ylabel="share of a full step")
    axes[3].set_title("LoRA's first SGD step", loc="left", fontsize=9)
    axes[3].legend(frameon=False, fontsize=8)
    return figure


def _p1(results: Results) -> Any:
    rows = results.of("P1", "facts")
    if not rows:
        return None
    figure, axes = _figure(6.6, 4.4, 1)
    arms = dict.fromkeys(row["arm"].partition("; ")[0] for row in sorted(rows, key=lambda row: row["trained"]))
    for i, (arm, color) in enumerate(zip(arms, ADAPTER_COLORS, strict=False)):
        beside = 1.06 ** (i - 1.5)  # where all is recalled, arms would hide each other
        own = [row for row in rows if row["arm"].startswith(f"{arm};")]
        axes[0].plot(
            [beside * row["entropy"] for row in own], [max(1.0, row["bits"]) for row in own], "o", color=color, alpha=0.7,
            label=f"{arm}: {own[0]['trained']:,} parameters",
        )  # fmt: skip
        axes[0].axhline(2 * own[0]["trained"], color=color, linewidth=0.8, linestyle="--")
    ends = [min(row["entropy"] for row in rows), max(row["entropy"] for row in rows)]
    axes[0].plot(ends, ends, color="#666666", linewidth=0.8, label="all of it")
    _log_x(axes[0])
    counts = dict(sorted({row["entropy"]: row["facts"] for row in rows}.items()))
    axes[0].set_xticks(list(counts), [f"{bits:,.0f}\n{count} facts" for bits, count in counts.items()])
    axes[0].set(yscale="log", xlabel="bits in the facts", ylabel="bits recalled; at the bottom: none")
    axes[0].set_ylim(top=40 * ends[1])
    axes[0].legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    _caption(axes[0], rows, "random facts; dashed: 2 bits a parameter")
    return figure


def _rate_curves(results: Results) -> Any:
    shown = [e for e in ("P2", "P3") if results.of(e, "tune")]
    if not shown:
        return None
    figure, axes = _figure(5.4 * len(shown), 3.8, len(shown))
    for each, experiment in zip(axes, shown, strict=True):
        rows = results.of(experiment, "tune")
        for row in rows:
            curve = sorted((lr, loss) for lr, loss in row["curve"] if loss is not None)
            if curve:
                each.plot(*zip(*curve, strict=True), "o-", color=COLORS[row["arm"]], label=row["arm"], markersize=4)
                each.plot([row["lr"]], [dict(curve)[row["lr"]]], "o", color=COLORS[row["arm"]], markersize=9, alpha=0.4)
        _log_x(each)
        each.set(xlabel="peak learning rate", ylabel="validation loss")
        each.legend(frameon=False, fontsize=8)
        _caption(each, rows, f"{experiment}: rates at a quarter of the steps")
    return figure


def _losses(results: Results) -> Any:
    shown = [e for e in ("P2", "P3", "P4") if results.of(e, "run")]
    if not shown:
        return None
    figure, axes = _figure(4.6 * len(shown), 3.4, len(shown))
    for each, experiment in zip(axes, shown, strict=True):
        rows = results.of(experiment, "run")
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for at, arm in enumerate(arms):
            losses = [row["test"]["loss"] for row in rows if row["arm"] == arm]
            color = COLORS.get(arm.partition(", ")[0], "#666666")
            each.plot(losses, [at] * len(losses), "o", color=color, alpha=0.7, fillstyle="none" if ", " in arm else "full")
        each.axvline(rows[0]["base"]["loss"], color="#666666", linestyle="--", linewidth=0.8)
        each.set_yticks(range(len(arms)), arms)
        each.invert_yaxis()
        each.set_xlabel("test loss; dashed: the base")
        _caption(each, rows, experiment)
    return figure


def _p5(results: Results) -> Any:
    shown = [of for of in ("P2", "P3") if results.of("P5", "forgetting", None, of)]
    if not shown:
        return None
    figure, axes = _figure(5.6 * len(shown), 4.0, len(shown))
    for each, of in zip(axes, shown, strict=True):
        rows = results.of("P5", "forgetting", None, of)
        for row in rows:
            method, _, change = row["arm"].partition(", ")
            points = row["points"]
            x = [point["test"]["loss"] for point in points]
            y = [float(np.mean(np.array(point["web"]) - np.array(points[0]["web"]))) for point in points]
            line = "-" if len(points) > 2 else ""
            label = row["arm"] if row["seed"] == 0 else None
            marker = {"": "o", "replay": "s", "lower rate": "^"}.get(change, "o")
            each.plot(x, y, linestyle=line, marker=marker, color=COLORS[method], label=label, markersize=4, linewidth=1.1)
        each.invert_xaxis()
        each.set(xlabel="test loss (learned more to the right)", ylabel="web text, bits a byte above the base")
        each.legend(frameon=False, fontsize=8)
        _caption(each, rows, f"{of}: forgetting over learning, scales 0 to 1")
    return figure


def _p6(results: Results) -> Any:
    shown = [of for of in ("P2", "P3") if results.of("P6", "spectrum", None, of)]
    if not shown:
        return None
    figure, axes = _figure(5.0 * len(shown), 3.6, len(shown))
    for each, of in zip(axes, shown, strict=True):
        rows = results.of("P6", "spectrum", None, of)
        for row in rows:
            ranks = np.sort(row["ranks"])
            label = f"{row['arm']}, seed {row['seed']}: {sum(row['intruders'])} new directions"
            each.plot(ranks, np.arange(1, len(ranks) + 1) / len(ranks), color=COLORS[row["arm"]], label=label)
        each.set(xscale="log", xlabel="rank that holds 90 % of the update", ylabel="share of the layers")
        each.legend(frameon=False, fontsize=8)
        _caption(each, rows, f"{of}: spectra of the updates")
    return figure
