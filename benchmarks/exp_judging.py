"""What the judging tools are worth, measured: cells a, b and c.

    python benchmarks/exp_judging.py c            # peeking at an A/B test, by simulation: a minute
    python benchmarks/exp_judging.py a --adapter RUN/adapter        # which detector sees forgetting first
    python benchmarks/exp_judging.py b --tuned RUN1/adapter RUN2/adapter RUN3/model    # three-panel pages on Banking77

a and b read Banking77, MMLU questions and web texts from --data (default ../shared/data) and are skipped without them.
Adapters, or model folders of a full fine-tune, are what ``minisft train`` wrote for rows of banking77_train.jsonl with --map
prompt=text completion=label. Every measurement is kept as soon as it is made, in OUT/judging_CELL.parts.jsonl: a run that was
cut off goes on where it was. Results: benchmarks/results/judging_CELL.json, an SVG for a and c, and for b a report for each run
in judging_b/, without the prompts, which are others' text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from harness import add_cell, out_folder, provenance, read_cells, save, save_svg

from minisft.data.examples import Example, Message
from minisft.evaluation.results import EvalResult, RowResult
from minisft.judging.ab_statistics import rates_p, sequential

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


# --- a: which detector sees forgetting first


SCALES = (0.0, 0.25, 0.5, 1.0, 2.0)


class Parts:
    """Results that were made, one JSON line each, so that a run may be cut off at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[str, EvalResult]()
        for part in read_cells(path):
            rows = [RowResult(**row) for row in part["rows"]]
            self.known[part["key"]] = EvalResult(part["score"], len(rows), part["metric"], part["extra"], rows)

    def get(self, key: str, make: Callable[[], EvalResult]) -> EvalResult:
        """The result of this name, made now or before; the time it took is printed."""
        if key not in self.known:
            started = time.monotonic()
            result = make()
            self.known[key] = result
            part = {"key": key, "score": result.score, "metric": result.metric, "extra": result.extra}
            add_cell(self.path, part | {"rows": [vars(row) for row in result.rows]})
            print(f"{key}: {result.score:.4f} over {result.n} rows, {time.monotonic() - started:.0f} s", flush=True)
        return self.known[key]


def identity(path: Path | None) -> str:
    """What names an adapter or a model in the kept results: the bytes of its weights."""
    files = [] if path is None else sorted(path.glob("*.safetensors"))
    if path is not None and not files:
        raise SystemExit(f"{path} holds no weights: give RUN/adapter, or RUN/model of a full fine-tune")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else "base"


class Subject:
    """The model with an adapter, and what it is asked."""

    def __init__(self, arguments: argparse.Namespace, tuned: Path | None = None) -> None:
        import torch

        from minisft.data.chat import resolve_template
        from minisft.evaluation.general_suite import read_mmlu, read_texts
        from minisft.formats import load_adapter_, load_model

        torch.set_num_threads(arguments.threads)
        few = 6 if arguments.quick else None
        is_adapter = tuned is None or (tuned / "adapter_config.json").is_file()
        self.model, self.tokenizer = load_model(arguments.model if is_adapter else tuned)
        if tuned is not None and is_adapter:
            load_adapter_(self.model, tuned)
        self.model.eval()
        self.template = resolve_template(self.tokenizer)
        self.texts = read_texts(arguments.data / "c4_sample.jsonl", few or arguments.texts)
        self.questions = read_mmlu(arguments.data / "mmlu_val.jsonl", few or arguments.questions)

    def letters(self) -> list[Example]:
        """The same questions, answered by a letter in the chat form."""
        made = []
        for q in self.questions:
            options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", q.choices, strict=True))
            turns = (Message("user", f"{q.question}{options}\nAnswer:"), Message("assistant", "ABCD"[q.answer]))
            made.append(Example(turns, q.row, {"choices": list("ABCD")}))
        return made

    def detectors(self) -> dict[str, Callable[[], EvalResult]]:
        """What might see a loss."""
        from minisft.evaluation.evaluate import evaluate
        from minisft.evaluation.general_suite import cloze, own_questions, web_text

        m, t = self.model, self.tokenizer
        return {
            "bits per byte, web text": lambda: web_text(m, t, self.texts, "c4"),
            "MMLU, cloze": lambda: cloze(m, t, self.questions, "mmlu_val"),
            "MMLU, letters": lambda: evaluate(m, t, self.template, self.letters(), "choice"),
            "60 own questions": lambda: own_questions(m, t, self.template),
        }


def cell_a(arguments: argparse.Namespace) -> dict[str, object]:
    """Each detector at each scale of the adapter, paired with scale 0; a loss counts as negative."""
    from minisft.evaluation.paired import compare_paired
    from minisft.evaluation.sweep import scaled

    subject, name_of = Subject(arguments, arguments.adapter), identity(arguments.adapter)
    parts = Parts(out_folder(arguments.out, arguments.quick) / "judging_a.parts.jsonl")
    scales = SCALES[::2] if arguments.quick else SCALES
    cells: list[dict[str, object]] = []
    base: dict[str, EvalResult] = {}
    for scale in scales:
        with scaled(subject.model, scale):
            for name, ask in subject.detectors().items():
                size = len(subject.texts) if name.startswith("bits") else len(subject.questions)
                result = parts.get(f"{name_of} {arguments.model}, scale {scale:g}, {name}, {size}", ask)
                base.setdefault(name, result)
                sign = -1 if result.metric == "bits_per_byte" else 1
                before, after = ([sign * row.score for row in r.rows] for r in (base[name], result))
                found = compare_paired(before, after)
                cell = {"detector": name, "scale": scale, "score": result.score, "n": result.n, "p": found.p_value}
                cells.append({**cell, "gain": found.difference.to_json(), "detectable": found.detectable})
                print(
                    f"scale {scale:g}  {name:24} {result.score:.4f}  gain {found.difference.estimate:+.4f}  p {found.p_value}"
                )
    return {"adapter": str(arguments.adapter), "scales": list(scales), "cells": cells}


def draw_a(result: dict[str, object]) -> Figure:
    """Gain against scale, in units of what each detector could have found: beyond -1 it sees a loss."""
    from matplotlib.figure import Figure

    colors = ("#D55E00", "#0072B2", "#56B4E9", "#666666")
    cells: list[dict] = result["cells"]  # type: ignore[assignment]  # JSON that this script wrote
    names = list(dict.fromkeys(cell["detector"] for cell in cells))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(names, colors, strict=True):
        mine = [cell for cell in cells if cell["detector"] == name]
        gains = [c["gain"]["estimate"] / (c["detectable"] or 1) for c in mine]
        axes.plot([c["scale"] for c in mine], gains, "o-", color=color, label=name, linewidth=1.4, markersize=4)
    axes.axhline(-1, color="#666666", linestyle=":", linewidth=1)
    axes.set(xlabel="scale of the adapter", ylabel="gain / smallest difference found with 80 %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#666666", alpha=0.15, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    return figure


# --- b: a report for each run on Banking77


def cell_b(arguments: argparse.Namespace) -> dict[str, object]:
    """Base against each fine-tune: intents by likelihood, and bits per byte; a page each."""
    from minisft.data.messages import read_dataset
    from minisft.evaluation.evaluate import evaluate
    from minisft.evaluation.general_suite import web_text
    from minisft.evaluation.results import write
    from minisft.judging.compare_report import PAGE, write_comparison
    from minisft.judging.comparison import compare_files

    folder = out_folder(arguments.out, arguments.quick) / "judging_b"
    parts = Parts(folder.with_name("judging_b.parts.jsonl"))
    mapping = ("prompt=text", "completion=label")
    examples = read_dataset(arguments.data / "banking77_test.jsonl", mapping, keep_duplicates=True).examples
    limit = 20 if arguments.quick else arguments.rows
    chosen = [examples[i * len(examples) // limit] for i in range(limit)]
    reports: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for tuned in (None, *arguments.tuned):
            name = "base" if tuned is None else tuned.parent.name
            subject = functools.cache(functools.partial(Subject, arguments, tuned))  # a finished part needs no model
            for kind, ask in (
                ("task", lambda s: evaluate(s.model, s.tokenizer, s.template, chosen, "choice")),
                ("web", lambda s: web_text(s.model, s.tokenizer, s.texts[:150], "c4")),
            ):
                key = f"{identity(tuned)} {arguments.model}, {kind}, {limit} rows, {arguments.texts} texts"
                write(parts.get(key, functools.partial(lambda f, s: f(s()), ask, subject)), f"{scratch}/{name}.{kind}.json")
            if tuned is not None:
                files = [[f"{scratch}/{which}.{kind}.rows.jsonl" for which in ("base", name)] for kind in ("task", "web")]
                found = dataclasses.replace(
                    compare_files(*files[0], general=[(files[1][0], files[1][1])]), base="base", tuned=name
                )
                shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier run of this script
                write_comparison(found, folder / name)
                reports[name] = found.to_json()
                print(name, found.verdict, folder / name / PAGE, flush=True)
    return {"reports": reports}


# --- c: peeking


def cell_c(arguments: argparse.Namespace) -> dict[str, object]:
    """Peeking: false alarms without an effect, findings with one."""
    runs = 100 if arguments.quick else 4_000
    result = {"runs": runs, "units_per_arm": UNITS, "looks": LOOKS, "rate": RATE, "rate_with_effect": EFFECT}
    return result | {"no_effect": simulate(RATE, runs, 0), "effect": simulate(EFFECT, runs, 1)}


def draw_c(result: dict[str, dict[str, list[float]]]) -> Figure:
    """False alarms and findings over the looks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"no_effect": "no effect: false alarms", "effect": "10 % to 13 %: findings"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharex=True), titles.items(), strict=True):
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
    figure.axes[0].legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.42))
    return figure


def table_c(result: dict[str, dict[str, list[float]]]) -> str:
    """The last look, line by line."""
    names = result["no_effect"]
    lines = [f"{'test':28} {'false alarms':>12} {'findings':>9}"]
    return "\n".join([*lines, *(f"{n:28} {result['no_effect'][n][-1]:12.1%} {result['effect'][n][-1]:9.1%}" for n in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", choices=("a", "b", "c"))
    parser.add_argument("--quick", action="store_true", help="only try whether everything works")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", type=Path, default=None, help="of cell a")
    parser.add_argument("--tuned", type=Path, nargs="+", default=[], help="of cell b: RUN/adapter, or RUN/model")
    parser.add_argument("--texts", type=int, default=300, help="web texts")
    parser.add_argument("--questions", type=int, default=200, help="of cell a: MMLU questions, each in two forms")
    parser.add_argument("--rows", type=int, default=600, help="of cell b: test rows of Banking77")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.cell != "c" and not (arguments.data / "c4_sample.jsonl").is_file():
        print(
            f"skipped: cell {arguments.cell} needs c4_sample.jsonl, mmlu_val.jsonl and banking77_test.jsonl in {arguments.data}"
        )
        return
    if (arguments.cell == "a" and arguments.adapter is None) or (arguments.cell == "b" and not arguments.tuned):
        parser.error("cell a needs --adapter, cell b --tuned")
    result = {"a": cell_a, "b": cell_b, "c": cell_c}[arguments.cell](arguments)
    folder = out_folder(arguments.out, arguments.quick)
    name = f"judging_{arguments.cell}"
    save(name, {**provenance(), **result}, folder)
    if arguments.cell != "b":
        save_svg({"a": draw_a, "c": draw_c}[arguments.cell](result), folder / f"{name}.svg")
    if arguments.cell == "c":
        print(table_c(result))


if __name__ == "__main__":
    main()
