"""NF4 work, one piece at a time: minisft against bitsandbytes, PEFT and torchao, in one process, taking turns.

    python benchmarks/bench_nf4.py                    # CPU: results/nf4_cpu.json and .svg, minutes
    python benchmarks/bench_nf4.py --device cuda      # one GPU: results/nf4_cuda.json and .svg
    python benchmarks/bench_nf4.py --quick            # tiny shapes, less than a minute: does everything still run?

CPU: dequantization and quantization of 4096 x 4096 with double quantization, the QLoRA linear forward and backward, and the
product of generation, each under the C library's default memory settings and under ``tune_allocator``'s, in a process each.
GPU: the same with the Triton kernels, launched one by one and from a CUDA graph, over more weights than the L2 cache holds.
Results are checked before anything is timed. A ratio is the peer's time over ours, so below 1 we lose; such cells stay in.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import Worker, out_folder, provenance, save, serve
from nf4_cases import line, rows, torchao_nf4

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"default malloc": "#8a8a8a", "tuned malloc": "#0072b2", "eager": "#8a8a8a", "CUDA graph": "#0072b2"}


def worker(malloc: str, quick: bool) -> None:
    """All CPU cases in one process; each command asks for one of them."""
    import nf4_cpu

    if malloc == "tuned":
        from minisft.common.device import tune_allocator

        assert tune_allocator()
    sizes = nf4_cpu.QUICK if quick else nf4_cpu.Sizes()
    cases = nf4_cpu.builders(sizes)

    def work(command: dict) -> dict:
        case = cases[command["case"]]()
        seconds = nf4_cpu.measure(case, command["rounds"], sizes.sample_s)
        return {"rows": rows(case, seconds, setting=f"{malloc} malloc")}

    serve({"num_cases": len(cases), "rounds": sizes.rounds, "threads": torch.get_num_threads()}, work)


def on_cpu(quick: bool, mallocs: list[str], rounds: int | None) -> dict:
    """Case by case, so that the settings too take turns."""
    from minisft.kernels import cpu_nf4

    path = cpu_nf4.path()  # compiled here, once, for the workers too
    workers = [Worker(Path(__file__), [malloc, str(int(quick))], {}) for malloc in mallocs]
    ready, cells = workers[0].ready, []
    for case in range(ready["num_cases"]):
        for each in workers:
            for cell in each.ask(case=case, rounds=rounds or ready["rounds"])["rows"]:
                print(line(cell), flush=True)
                cells.append(cell)
    for each in workers:
        each.close()
    return {"device": "cpu", "threads": ready["threads"], "native": path, "cells": cells}


def plot(cells: list[dict], title: str, path: Path) -> None:
    """One point a cell: how many times faster ours is, with its quartiles; a panel for each group and kind of peer."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for cell in cells:
        names = panels.setdefault(_panel(cell), [])
        names += [_row_name(cell)] * (_row_name(cell) not in names)
    columns = _columns(panels)
    tallest = max(sum(len(panels[name]) + 2 for name in column) for column in columns)
    figure = Figure(figsize=(5.2 * len(columns), 1.2 + 0.21 * tallest), layout="constrained")
    subfigures = figure.subfigures(1, len(columns), squeeze=False)[0]
    for subfigure, column in zip(subfigures, columns, strict=True):
        heights = [len(panels[name]) + 2 for name in column]
        spare = tallest - sum(heights)
        grid = subfigure.add_gridspec(len(column) + (spare > 0), 1, height_ratios=[*heights, *[spare] * (spare > 0)])
        for k, name in enumerate(column):
            _draw(subfigure.add_subplot(grid[k]), name, panels[name], [c for c in cells if _panel(c) == name])
    settings = dict.fromkeys(c["setting"] for c in cells)
    marks = [subfigures[0].axes[0].plot([], [], "o", markersize=4, color=COLORS[s], label=s)[0] for s in settings]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def _panel(cell: dict) -> str:
    return cell["group"] + (", against the dense weight" if cell["peer"].startswith("dense") else "")


def _row_name(cell: dict) -> str:
    """The case, and what else tells two rows of one panel apart."""
    ours = cell["ours"].removeprefix("minisft").removeprefix(", ")
    peer = cell["peer"].removeprefix("peft + ").removeprefix("bitsandbytes").removeprefix(", ")
    peer = " ".join(peer.split()[2:]) if peer.startswith("dense") else peer  # its dtype is the case's
    return ", ".join(part for part in (cell["case"], ours, peer) if part)


def _columns(panels: dict[str, list[str]]) -> list[list[str]]:
    """Panels in order, a new column when the last one would grow longer than the longest panel."""
    longest = max(len(names) for names in panels.values()) + 2
    columns: list[list[str]] = [[]]
    for name in panels:
        if columns[-1] and sum(len(panels[n]) + 2 for n in [*columns[-1], name]) > longest:
            columns.append([])
        columns[-1].append(name)
    return columns


def _draw(axes: Axes, name: str, order: list[str], cells: list[dict]) -> None:
    settings = list(dict.fromkeys(c["setting"] for c in cells))
    for k, setting in enumerate(settings):
        mine = [c for c in cells if c["setting"] == setting]
        x = [c["ratio"]["median"] for c in mine]
        y = [order.index(_row_name(c)) + (k - (len(settings) - 1) / 2) * 0.3 for c in mine]
        spans = [
            [v - c["ratio"]["q1"] for v, c in zip(x, mine, strict=True)],
            [c["ratio"]["q3"] - v for v, c in zip(x, mine, strict=True)],
        ]
        axes.errorbar(x, y, xerr=spans, fmt="o", markersize=3.5, elinewidth=1, color=COLORS[setting])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.7), max(high, 1.5))
    low, high = axes.get_xlim()
    fine = (0.6, 0.7, 0.8, 1.2, 1.4) if high < 3 * low else ()
    ticks = sorted(t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, *fine) if low <= t <= high)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=7)
    axes.minorticks_off()
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, fontsize=9, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; results go to the temporary folder")
    parser.add_argument("--mallocs", nargs="+", default=["default", "tuned"], choices=["default", "tuned"], help="CPU only")
    parser.add_argument(
        "--rounds", type=int, help="samples of each contestant (default: 7 on the CPU, 15 on a GPU, 3 with --quick)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    arguments = parser.parse_args()
    facts = provenance()
    if arguments.device == "cpu":
        result = on_cpu(arguments.quick, arguments.mallocs, arguments.rounds)
    else:
        import nf4_cuda

        result = nf4_cuda.run(arguments.quick, arguments.rounds)
    torchao, reason = torchao_nf4()
    result = {**facts, "torchao": "measured" if torchao else reason, "load_average_after": os.getloadavg()[0], **result}
    path = save(f"nf4_{arguments.device}", result, out_folder(arguments.out, arguments.quick))
    title = "How many times faster minisft is than bitsandbytes (QLoRA: with PEFT), or than what is named; median and quartiles"
    plot(result["cells"], title, path.with_suffix(".svg"))
    print(f"results: {path} and .svg")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3] == "1")
    else:
        main()
