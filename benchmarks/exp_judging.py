"""What the judging tools are worth, measured: cells a, b and c.

    python benchmarks/exp_judging.py c            # peeking at an A/B test, by simulation: a minute
    python benchmarks/exp_judging.py a --adapter RUN/adapter    # which detector sees forgetting first: about 25 minutes
    python benchmarks/exp_judging.py b --adapters EPOCH1/adapter EPOCH3/adapter    # three-panel pages on Banking77: 20 minutes

a and b read Banking77, MMLU questions and web texts from --data (default ../shared/data) and are skipped without them. The
adapters are those of ``minisft train`` on banking77_train.jsonl with --map prompt=text completion=label. Results:
benchmarks/results/judging_CELL.json, an SVG for a and c, and for b a report for each adapter in judging_b/.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import out_folder, provenance, save

from minisft.data.examples import Example, Message
from minisft.evaluation.results import EvalResult
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


# --- a: which detector sees forgetting first


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


class Subject:
    """The pretrained model with an adapter, and what it is asked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from minisft.data.chat import resolve_template
        from minisft.evaluation.general_suite import read_mmlu, read_texts
        from minisft.formats import load_model

        torch.set_num_threads(arguments.threads)
        few = 6 if arguments.quick else None
        self.model, self.tokenizer = load_model(arguments.model)
        self.model.eval()
        self.template = resolve_template(self.tokenizer)
        self.texts = read_texts(arguments.data / "c4_sample.jsonl", few or 300)
        self.questions = read_mmlu(arguments.data / "mmlu_val.jsonl", few or 400)

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
    from minisft.formats import load_adapter_

    subject = Subject(arguments)
    load_adapter_(subject.model, arguments.adapter)
    scales = SCALES[::3] if arguments.quick else SCALES
    cells: list[dict[str, object]] = []
    base: dict[str, EvalResult] = {}
    for scale in scales:
        with scaled(subject.model, scale):
            for name, ask in subject.detectors().items():
                result = ask()
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


def draw_a(result: dict[str, object]) -> bytes:
    """Gain against scale, in units of what each detector could have found: beyond -1 it sees a loss."""
    import matplotlib
    from matplotlib.figure import Figure

    colors = ("#D55E00", "#0072B2", "#56B4E9", "#666666")
    cells: list[dict] = result["cells"]  # type: ignore[assignment]  # JSON that this script wrote
    names = list(dict.fromkeys(cell["detector"] for cell in cells))
    with matplotlib.rc_context({"svg.hashsalt": "minisft", "svg.fonttype": "none"}):
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
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


# --- b: a report for each run on Banking77


def cell_b(arguments: argparse.Namespace) -> dict[str, object]:
    """Base against each adapter: intents by likelihood, bits per byte, cloze; a three-panel page each."""
    from minisft.data.messages import read_dataset
    from minisft.evaluation.evaluate import evaluate
    from minisft.evaluation.general_suite import web_text
    from minisft.evaluation.results import write
    from minisft.formats import load_adapter_
    from minisft.judging.compare_report import write_comparison
    from minisft.judging.comparison import compare_files

    folder = out_folder(arguments.out, arguments.quick) / "judging_b"
    examples = read_dataset(
        arguments.data / "banking77_test.jsonl", ("prompt=text", "completion=label"), keep_duplicates=True
    ).examples
    reports: dict[str, object] = {}
    for adapter in (None, *arguments.adapters):
        subject, name = Subject(arguments), "base" if adapter is None else adapter.parent.name
        if adapter is not None:
            load_adapter_(subject.model, adapter)
        limit = 20 if arguments.quick else 600
        step = max(1, len(examples) // limit)
        task = evaluate(subject.model, subject.tokenizer, subject.template, examples[::step][:limit], "choice")
        web = web_text(subject.model, subject.tokenizer, subject.texts[:150], "c4")
        for kind, result in (("task", task), ("web", web)):
            write(result, folder / f"{name}.{kind}.json")
        if adapter is not None:
            pairs = [[folder / f"{which}.{kind}.rows.jsonl" for which in ("base", name)] for kind in ("task", "web")]
            found = compare_files(*pairs[0], general=[(str(pairs[1][0]), str(pairs[1][1]))])
            write_comparison(found, folder / name)
            reports[name] = found.to_json()
            print(name, found.verdict)
    return {"reports": reports}


# --- c: peeking


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
    parser.add_argument("cell", choices=("a", "b", "c"))
    parser.add_argument("--quick", action="store_true", help="only try whether everything works")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", type=Path, default=None, help="of cell a")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], help="of cell b")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.cell != "c" and not (arguments.data / "c4_sample.jsonl").is_file():
        print(
            f"skipped: cell {arguments.cell} needs c4_sample.jsonl, mmlu_val.jsonl and banking77_test.jsonl in {arguments.data}"
        )
        return
    if (arguments.cell == "a" and arguments.adapter is None) or (arguments.cell == "b" and not arguments.adapters):
        parser.error("cell a needs --adapter, cell b --adapters")
    result = {"a": cell_a, "b": cell_b, "c": cell_c}[arguments.cell](arguments)
    folder = out_folder(arguments.out, arguments.quick)
    name = f"judging_{arguments.cell}"
    save(name, {**provenance(["python", "benchmarks/exp_judging.py", *sys.argv[1:]]), **result}, folder)
    if arguments.cell != "b":
        (folder / f"{name}.svg").write_bytes({"a": draw_a, "c": draw_c}[arguments.cell](result))
    if arguments.cell == "c":
        print(table_c(result))


if __name__ == "__main__":
    main()
