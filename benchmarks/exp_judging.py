"""What the judging tools are worth, measured: cells a, b and c.

    python benchmarks/exp_judging.py c            # peeking at an A/B test, by simulation: a minute
    python benchmarks/exp_judging.py a --adapter RUN/adapter --data ../shared/data    # which detector sees forgetting first
    python benchmarks/exp_judging.py b --runs RUN1 RUN3 FULL --data ../shared/data    # three-panel page on Banking77

Results: benchmarks/results/judging_CELL.json, and judging_CELL.svg for a and c.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from harness import out_folder, provenance, save

from minisft.judging.ab_statistics import rates_p, sequential

LOOKS, UNITS, RATE, EFFECT, ALPHA = 20, 2_000, 0.10, 0.13, 0.05
TAUS = (0.01, 0.02, 0.03, 0.05)


def simulate(rate_b: float, runs: int, seed: int) -> dict[str, list[float]]:
    """For each test, the share of runs that it has called an effect by each look."""
    rng, step = np.random.default_rng(seed), UNITS // LOOKS
    found = {name: np.zeros(LOOKS) for name in ("fixed, every look", *(f"always valid, tau {tau:g}" for tau in TAUS))}
    for _ in range(runs):
        a, b = (np.split((rng.random(UNITS) < rate).astype(float), LOOKS) for rate in (RATE, rate_b))
        sums = np.cumsum([x.sum() for x in a]), np.cumsum([x.sum() for x in b])
        p_values = [rates_p(int(x), step * k, int(y), step * k)[0] for k, (x, y) in enumerate(zip(*sums, strict=True), 1)]
        found["fixed, every look"] += np.minimum.accumulate(p_values) < ALPHA
        for tau in TAUS:
            looks = [look.p_value for look in sequential(a, b, tau)]
            found[f"always valid, tau {tau:g}"] += np.array([1.0] * (LOOKS - len(looks)) + looks) <= ALPHA
        found.setdefault("fixed, one look", np.zeros(LOOKS))[-1] += p_values[-1] < ALPHA
    return {name: (hits / runs).tolist() for name, hits in found.items()}


def cell_c(arguments: argparse.Namespace) -> dict[str, object]:
    """Peeking: false alarms without an effect, findings with one."""
    runs = 100 if arguments.quick else 4_000
    result = {"runs": runs, "units_per_arm": UNITS, "looks": LOOKS, "rate": RATE, "rate_with_effect": EFFECT}
    return result | {"no_effect": simulate(RATE, runs, 0), "effect": simulate(EFFECT, runs, 1)}


def draw_c(result: dict[str, dict[str, list[float]]]) -> bytes:
    """False alarms and findings over the looks."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, key, title in zip(
            figure.subplots(1, 2, sharex=True),
            ("no_effect", "effect"),
            ("no effect: false alarms", "10 % to 13 %: findings"),
            strict=True,
        ):
            for (name, shares), color in zip(
                ((n, s) for n, s in result[key].items() if n != "fixed, one look"),
                ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#666666"),
                strict=True,
            ):
                axes.plot(range(1, LOOKS + 1), shares, color=color, label=name, linewidth=1.6)
            axes.plot(LOOKS, result[key]["fixed, one look"][-1], "kD", markersize=6, label="fixed, one look at the end")
            axes.set(title=title, xlabel="look", ylim=(0, None), xticks=range(0, LOOKS + 1, 5))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#666666", alpha=0.15, linewidth=0.6)
        figure.axes[0].axhline(ALPHA, color="#666666", linestyle=":", linewidth=1)
        figure.axes[0].set_ylabel("share of simulated tests")
        figure.axes[0].legend(frameon=False, fontsize=9, loc="upper left")
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def table_c(result: dict[str, dict[str, list[float]]]) -> str:
    """The last look, line by line."""
    names = result["no_effect"]
    lines = [f"{'test':28} {'false alarms':>12} {'findings':>9}"]
    return "\n".join([*lines, *(f"{n:28} {result['no_effect'][n][-1]:12.1%} {result['effect'][n][-1]:9.1%}" for n in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", choices=("c",))
    parser.add_argument("--quick", action="store_true", help="only try whether everything works")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    result = cell_c(arguments)
    folder = out_folder(arguments.out, arguments.quick)
    save("judging_c", {**provenance(["python", "benchmarks/exp_judging.py", *sys.argv[1:]]), **result}, folder)
    (folder / "judging_c.svg").write_bytes(draw_c(result))
    print(table_c(result))


if __name__ == "__main__":
    main()
