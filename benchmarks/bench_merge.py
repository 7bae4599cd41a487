"""Latency before and after merging, and merging itself: minisft against PEFT on the same weights, in one process, taking turns.

    python benchmarks/bench_merge.py --rounds 5          # CPU: results/merge_cpu.json and .svg, about half an hour
    python benchmarks/bench_merge.py --cells 'model/fp32/*' merging/bf16          # some of it; names as it prints them
    python benchmarks/bench_merge.py --device cuda       # one GPU, launched call by call and from CUDA graphs
    python benchmarks/bench_merge.py --quick             # tiny layers, few rounds: does everything still run?

SmolLM2-135M with adapters on every linear, and two single layers, over fp32, bf16 and NF4: as base, with the adapter beside the
weights (unmerged), and merged; one token at batch 1 and 8 after 128 in the cache, a prompt of 128 and of 512, 64 tokens of
text. Outputs are compared before anything is timed. Every ratio is to the same library's base, round by round. FLOPs and bytes
are counted by formula and stand beside the times. Left out: ranks 8 and 64 but at one token, where the rank matters most; a
single layer that generates; PEFT's merged model generating, which its single tokens tell; and PEFT's prompts of 512 and its
64 tokens in bf16 on a CPU without bf16 instructions: minutes. A cell that would take more than a minute has fewer rounds.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import merge_cases
import merge_files
import torch
from harness import out_folder, provenance, save, spread
from merge_cases import BASE, BASES, MERGED, MINISFT, MODEL, PEFT, UNMERGED, Form, Sizes, Subject, Work
from nf4_cases import Case, Contestant
from nf4_cpu import measure

from minisft.matmul import compute_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    (PEFT, UNMERGED): ("PEFT, unmerged", "#8a8a8a"),
    (MINISFT, UNMERGED): ("minisft, unmerged", "#56b4e9"),
    (MINISFT, MERGED): ("minisft, merged", "#0072b2"),
}
PANELS = (("decode", "one token"), ("prefill", "reading a prompt of {tokens}"), ("generate", "writing {tokens} tokens"))
MERGED_LIMIT, OVERHEAD_LIMIT, MERGING_LIMIT = 0.02, 0.5, 2.0


# ---- which cells -----------------------------------------------------------------------------------------------------


def cell_names(sizes: Sizes) -> list[str]:
    """``subject/base/work``; merging itself is ``merging/dtype``."""
    shapes = [f"{out}x{into}" for out, into in sizes.shapes]
    works = {MODEL: sizes.works, **{shape: [w for w in sizes.works if w.kind != "generate"] for shape in shapes}}
    names = [f"{subject}/{base}/{work.name}" for subject in works for base in BASES for work in works[subject]]
    return names + [f"merging/{dtype}" for dtype in merge_files.DTYPES]


def chosen_cells(patterns: Sequence[str], sizes: Sizes) -> list[str]:
    names = cell_names(sizes)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"--cells {pattern} matches none of: {' '.join(names)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def contestants_of(subject: Subject, work: Work, sizes: Sizes) -> list[Form]:
    """Who takes part: all ranks where they matter, and no peer that would take minutes a call."""
    like = torch.empty(0, dtype=subject.activations, device=subject.device)
    too_long = compute_dtype(like) != like.dtype and (work.kind == "generate" or work.tokens > 128)
    ranks = {0, *sizes.ranks} if work.kind in sizes.every_rank else {0, sizes.main_rank}
    told_already = {Form(PEFT, MERGED)} if work.kind == "generate" else set()  # by one token and by prompts
    forms = [form for form in subject.forms if form.rank in ranks and form not in told_already]
    return [form for form in forms if not (too_long and form.library == PEFT)]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measured(subject: Subject, work: Work, sizes: Sizes, rounds: int) -> list[dict]:
    """One cell: prepare, compare, time; a row for each contestant and setting."""
    forms = contestants_of(subject, work, sizes)
    calls = {form: merge_cases.calls(subject, form, work, sizes) for form in forms}
    began = time.perf_counter()
    outputs = {form: calls[form][0]() for form in forms}
    rounds = max(1, min(rounds, int(sizes.most_s / (time.perf_counter() - began))))
    found = merge_cases.differences(outputs, subject, work, sizes.main_rank)
    costs = {form: merge_cases.cost(subject, form, work, sizes) for form in forms}
    contestants = [Contestant(f.name, calls[f], "", int(costs[f].bytes)) for f in forms]
    rows = []
    for setting, seconds in timed(contestants, subject.device, rounds, sizes.sample_s).items():
        for form in forms:
            if form.name not in seconds or Form(form.library, BASE).name not in seconds:
                continue  # it could not be captured
            mine, base = seconds[form.name], seconds[Form(form.library, BASE).name]
            time_spread = spread([s * 1e3 for s in mine])
            rows.append(
                {
                    "subject": subject.name, "base": subject.base, "work": work.name, "setting": setting, **asdict(form),
                    "ms": time_spread, "ratio": spread([m / b for m, b in zip(mine, base, strict=True)]),
                    "added_ms": spread([(m - b) * 1e3 for m, b in zip(mine, base, strict=True)]),
                    **asdict(costs[form]), "gflop_per_s": costs[form].flops / time_spread["median"] / 1e6,
                    "gb_per_s": costs[form].bytes / time_spread["median"] / 1e6,
                    "difference": asdict(found[form]) if form in found else None,
                }
            )  # fmt: skip
    return rows


def timed(contestants: list[Contestant], device: str, rounds: int, sample_s: float) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call by setting and contestant, alternating."""
    if device == "cpu":
        return {"eager": measure(Case("merge", "", contestants, ()), rounds, sample_s)}
    import nf4_cuda

    found = {}
    for setting, prepare in (("eager", nf4_cuda.as_it_is), ("CUDA graph", nf4_cuda.captured)):
        passes, refused = prepare(contestants)
        for name, reason in refused.items():
            print(f"  {name} cannot be captured: {reason}", file=sys.stderr)
        found[setting] = nf4_cuda.measure(passes, rounds, sample_s)
    return found


def latencies(model: str, names: list[str], sizes: Sizes, device: str, rounds: int) -> list[dict]:
    """Subject by subject, so that only one is in memory."""
    builders: dict[str, Callable[[str, Path], Subject]] = {
        MODEL: lambda base, folder: merge_cases.model_subject(folder, base, sizes, device)
    }
    for shape in sizes.shapes:
        builders[f"{shape[0]}x{shape[1]}"] = lambda base, _, shape=shape: merge_cases.layer_subject(shape, base, sizes, device)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for subject_name, build in builders.items():
            for base in BASES:
                works = [w for w in sizes.works if f"{subject_name}/{base}/{w.name}" in names]
                if not works:
                    continue
                folder = Path(scratch) / base
                if subject_name == MODEL:
                    write_model(model, folder, merge_cases.activations(base, device))
                subject = build(base, folder)
                for work in works:
                    cell = measured(subject, work, sizes, rounds)
                    print("\n".join(map(line, cell)), flush=True)
                    rows += cell
                del subject
                gc.collect()  # models and their hooks form circles
    return rows


def write_model(model: str, folder: Path, dtype: torch.dtype) -> None:
    """As a Hugging Face folder, in the dtype that both libraries will hold it in."""
    from minisft.formats import load_model, save_model

    save_model(*load_model(model, dtype=dtype), folder)


def merging(model: str, names: list[str], rank: int, rounds: int) -> list[dict]:
    wanted = [dtype for dtype in merge_files.DTYPES if f"merging/{dtype}" in names]
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in wanted:
            base, adapter = merge_files.prepare(model, rank, dtype, Path(scratch))
            cells.append(merge_files.compare(base, adapter, dtype, rounds, Path(scratch)))
            print(merge_files.line(cells[-1]), flush=True)
    return cells


# ---- for people ------------------------------------------------------------------------------------------------------


def line(row: dict) -> str:
    """One contestant of a cell."""
    form = Form(row["library"], row["kind"], row["rank"])
    ratio, off = row["ratio"], row["difference"]
    apart = "" if off is None else f"  {off['value']:.1e} from {off['to']}"
    return (
        f"{row['subject']}/{row['base']}/{row['work']} {row['setting']}: {form.name:21} {row['ms']['median']:9.3f} ms  "
        f"x{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})  {row['flops'] / 1e9:.3f} GFLOP, "
        f"{row['bytes'] / 1e6:.1f} MB, {row['products']} products: {row['gflop_per_s']:.1f} GFLOP/s, "
        f"{row['gb_per_s']:.1f} GB/s{apart}"
    )


def targets(rows: list[dict], merges: list[dict], main_rank: int) -> list[dict]:
    """What was hoped for, and whether it came true."""
    found = []
    for row in (r for r in rows if r["library"] == MINISFT):
        where = f"{row['subject']}/{row['base']}/{row['work']} {row['setting']}"
        if row["kind"] == MERGED and row["base"] != "nf4":  # merged, that one is dense: a base of another size
            value = row["ratio"]["median"]
            met = abs(value - 1) <= MERGED_LIMIT
            found.append(_target(f"{where}: merged / base", f"{value:.3f}", f"1.00 within {MERGED_LIMIT}", met))
        if row["rank"] == main_rank and row["work"] == "decode-1":
            peer = next((r for r in rows if r["library"] == PEFT and all(r[k] == row[k] for k in _CELL)), None)
            found += [] if peer is None else _overhead(where, row, peer)
    for cell in merges:
        where, speed, memory = f"merging to {cell['dtype']}", cell["speed_ratio"]["median"], cell["memory_ratio"]["median"]
        found.append(
            _target(f"{where}: PEFT's time / ours", f"{speed:.2f}", f"{MERGING_LIMIT} or more", speed >= MERGING_LIMIT)
        )
        found.append(_target(f"{where}: our peak memory / PEFT's", f"{memory:.2f}", "less than 1", memory < 1))
    return found


_CELL = ("subject", "base", "work", "setting", "kind", "rank")


def _overhead(where: str, row: dict, peer: dict) -> list[dict]:
    """What the adapter adds, as a share of the library's own base and in milliseconds: a slow base hides an adapter.

    Less than nothing is noise, and counts as nothing.
    """
    wanted = f"at most {OVERHEAD_LIMIT} of PEFT's"
    share, theirs = row["ratio"]["median"] - 1, peer["ratio"]["median"] - 1
    added, their_added = row["added_ms"]["median"], peer["added_ms"]["median"]
    return [
        _target(f"{where}: added share", f"{share:.1%}, PEFT {theirs:.1%}", wanted, share <= OVERHEAD_LIMIT * max(theirs, 0)),
        _target(
            f"{where}: added ms", f"{added:.3f}, PEFT {their_added:.3f}", wanted, added <= OVERHEAD_LIMIT * max(their_added, 0)
        ),
    ]


def _target(what: str, value: str, wanted: str, met: bool) -> dict:
    return {"target": what, "value": value, "wanted": wanted, "met": met}


def plot(rows: list[dict], main_rank: int, path: Path) -> None:
    """The model, one row of text at a time: a panel for each kind of work, time as a multiple of the base's."""
    from matplotlib.figure import Figure

    chosen = [r for r in rows if r["subject"] == MODEL and r["rank"] in (0, main_rank) and r["setting"] == "eager"]
    panels = []
    for kind, title in PANELS:
        works = [r["work"] for r in chosen if r["work"].startswith(kind)]
        if works:
            panels.append((works[0], title.format(tokens=works[0].split("-")[1])))
    if not panels:
        return
    figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.6), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (work, title) in zip(every, panels, strict=True):
        _draw(axes, [r for r in chosen if r["work"] == work], title)
    every[0].set_ylabel("time, as a multiple of the base's")
    handles = [every[0].bar([0], [0], color=color, label=label) for label, color in LABELS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = f"What an adapter costs (rank {main_rank}), and what it costs once merged; median and quartiles"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def _draw(axes: Axes, rows: list[dict], title: str) -> None:
    bases = [base for base in BASES if any(r["base"] == base for r in rows)]
    for k, ((library, kind), (_, color)) in enumerate(LABELS.items()):
        for x, base in enumerate(bases):
            row = next((r for r in rows if (r["library"], r["kind"], r["base"]) == (library, kind, base)), None)
            at = x + (k - 1) * 0.28
            if row is None:
                axes.text(at, 0.05, "not timed", ha="center", va="bottom", rotation=90, fontsize=8, color=color)
                continue
            ratio = row["ratio"]
            spans = [[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]]
            axes.bar(at, ratio["median"], 0.26, yerr=spans, color=color, capsize=2)
            axes.text(at, ratio["q3"] + 0.03, f"{ratio['median']:.2f}", ha="center", va="bottom", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(bases)), [{"nf4": "NF4\n(merged: dense)"}.get(base, base) for base in bases])
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="model/fp32/decode-1, 4096x4096/*, merging/*")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contestant (default %(default)s)")
    parser.add_argument("--merging-rounds", type=int, default=3, help="of merging itself (default %(default)s)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as everywhere (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny layers, short texts; results go to the temporary folder")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure the cells that were asked for, save, plot and print."""
    sizes = merge_cases.QUICK if arguments.quick else Sizes()
    names = chosen_cells(arguments.cells, sizes)
    began, facts = time.perf_counter(), provenance()
    rows = latencies(arguments.model, names, sizes, arguments.device, arguments.rounds)
    merges = merging(arguments.model, names, sizes.main_rank, arguments.merging_rounds)
    verdicts = targets(rows, merges, sizes.main_rank)
    result = {
        **facts,
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "model": arguments.model,
        "sizes": asdict(replace(sizes, works=())) | {"works": [work.name for work in sizes.works]},
        "run_s": time.perf_counter() - began,
        "load_average_after": os.getloadavg()[0],
        "cells": rows,
        "merging": merges,
        "targets": verdicts,
    }
    path = save(f"merge_{arguments.device}", result, out_folder(arguments.out, arguments.quick))
    plot(rows, sizes.main_rank, path.with_suffix(".svg"))
    for verdict in verdicts:
        word = "met   " if verdict["met"] else "MISSED"
        print(f"{word} {verdict['target']}: {verdict['value']}; wanted {verdict['wanted']}")
    print(f"results: {path} and .svg, {result['run_s']:.0f} s")


if __name__ == "__main__":
    main()
