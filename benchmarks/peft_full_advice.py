"""What ``exp_peft_full`` advises: at most eight lines, each with the figure that it rests on and the cells that it comes from.

A line whose cells are missing says so; no figure stands here that is not in the results file.

    python benchmarks/peft_full_advice.py                 # the table, in Markdown
    python benchmarks/peft_full_advice.py --write         # and claims and runs into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from harness import RESULTS
from peft_full_figures import MIN_SEEDS, Results, difference, forgotten_more, recall_gaps, tables

FILE = "benchmarks/results/peft_full.jsonl"
PAGE = "tutorials/04_rank_alpha_targets_rate.ipynb"
NOT_RUN = "not run yet"
TEXTS = {"P2": "cipher text", "P3": "bank messages"}
MEANING = (
    "Differences of test loss in nats a token where nothing else is said, below 0 the first is better, 95 % intervals, three "
    "seeds. r 16: LoRA of rank 16 on all linears; full: all weights; linears: the same layers in full."
)
MARKS = re.compile(r"(<!-- peft_full -->\n)(.*?)(\n<!-- end of peft_full -->)", re.DOTALL)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _said(gap: float, low: float, high: float, seeds: int) -> str:
    few = "" if seeds >= MIN_SEEDS else f", {_counted(seeds, 'seed')}"
    return f"{gap:+.3f} ({low:+.3f} to {high:+.3f}){few}{', no difference shown' if low <= 0 <= high else ''}"


def _joined(named: Iterable[tuple[str, tuple[float, float, float, int]]]) -> str | None:
    return "; ".join(f"{name} {_said(*found)}" for name, found in named if found[-1]) or None


def _losses(results: Results, *asked: tuple[str, str, str, str]) -> str | None:
    """For each of (what it is called, experiment, arm, arm): how much lower the first arm's loss is."""
    return _joined((name, difference(results, *arms)) for name, *arms in asked)


def _rates(results: Results) -> str | None:
    found = []
    for experiment, text in TEXTS.items():
        tuned = {row["arm"]: row["lr"] for row in results.of(experiment, "tune")}
        if {"r16", "full"} <= tuned.keys():
            found.append(f"{text}: {tuned['r16']:g} for r 16, {tuned['full']:g} for full")
    return "; ".join(found) + "; one seed" if found else None


def _bits(results: Results) -> str | None:
    """Where facts hold less than half a bit for each parameter of the adapter, and where they hold more than one."""
    said = []
    for where, least, most in (("under 0.5 bits", 0.0, 0.5), ("over 1 bit", 1.0, math.inf)):
        every = [gap for found in recall_gaps(results, least, most).values() for gap in found]
        if every:
            mean, low, high = (round(gap, 2) + 0.0 for gap in (statistics.mean(every), min(every), max(every)))  # + 0: no -0 %
            spread = f"{mean:+.0%} ({low:+.0%} to {high:+.0%})"
            said.append(f"{where} a parameter {spread}, {_counted(len(every), 'run')}")
    return "facts recalled by a model of 0.2 M, adapter less full: " + "; ".join(said) if said else None


LINES: tuple[tuple[str, str, Callable[[Results], str | None]], ...] = (
    (
        "targets: all linears",
        "P2/run",
        lambda r: _losses(r, ("all less attention alone:", "P2", "r16", "attention r16")),
    ),
    ("alpha: leave it at 32; it is B's rate", "page 04", lambda r: "a law under Adam, asserted bit for bit"),
    ("rate: search for each method, `minisft lr-find`", "P2/tune, P3/tune", _rates),
    ("rank: by bits to learn, not by rows, `minisft plan`", "P1/facts", _bits),
    ("near data: LoRA, which is cheaper", "P4/run", lambda r: _losses(r, ("web text, full less r 16:", "P4", "full", "r16"))),
    (
        "far data, new labels: full may win",
        "P2/run, P3/run",
        lambda r: _losses(
            r, ("full less r 16: cipher text", "P2", "full", "r16"), ("bank messages", "P3", "full", "r16"),
            ("linears less r 16: cipher text", "P2", "full-linears", "r16"),
        ),
    ),
    (
        "forgetting: compare at equal learning",
        "P5",
        lambda r: _joined(
            (name, forgotten_more(r, of, "r16", "full"))
            for name, of in (("bits a byte of web text, r 16 less full: cipher text", "P2"), ("bank messages", "P3"))
        ),
    ),
    (
        "forgetting: replay 10 % of general text",
        "P5/P2",
        lambda r: _joined(
            (f"{name} with replay less without", forgotten_more(r, "P2", f"{arm}, replay", arm))
            for name, arm in (("bits a byte of web text at equal learning, r 16", "r16"), ("full", "full"))
        ),
    ),
)  # fmt: skip


def advice(results: Results) -> str:
    """The table in Markdown; every line links to the results file and names its cells."""
    rows = [
        f"| {what} | {figure(results) or NOT_RUN} | [{cells}]({PAGE if cells == 'page 04' else FILE}) |"
        for what, cells, figure in LINES
    ]
    return "\n".join(["| choose | what these runs say | from |", "|---|---|---|", *rows])


def missing(results: Results) -> list[str]:
    """The lines that have no figure yet."""
    return [what for what, _, figure in LINES if figure(results) is None]


def section(results: Results, folder: Path) -> str:
    """The part of ``benchmarks/README.md``: claims, runs, and the pictures that there are."""
    if not results.rows:
        return "Not run yet: there is no `results/peft_full.jsonl`."
    names = sorted(path.name for path in folder.glob("peft_full_*.svg"))
    cells = f"[{len(results.rows)} cells](results/peft_full.jsonl)"
    pictures = "\n".join(f"![{name.removesuffix('.svg')}](results/{name})" for name in names)
    waiting = missing(results)
    rest = f"Without figures so far: {'; '.join(waiting)}.\n\n" if waiting else ""
    said = advice(results).replace("](benchmarks/", "](").replace("](tutorials/", "](../tutorials/")
    began = f"{cells}, tables by `peft_full_advice.py --write`. {MEANING}"
    return f"{began}\n\n{said}\n\n{tables(results)}\n{rest}{pictures}".rstrip()


def written(readme: str, part: str) -> str:
    """The README with its part replaced.

    Raises:
        ValueError: its two marks are not there once.
    """
    if len(MARKS.findall(readme)) != 1:
        raise ValueError("benchmarks/README.md: the marks of the part peft_full are not there once")
    return MARKS.sub(lambda found: f"{found[1]}{part}{found[3]}", readme)


def main() -> None:
    """Print the advice of a results file; bring the part of ``benchmarks/README.md`` up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of peft_full.jsonl")
    parser.add_argument("--write", action="store_true", help="also write claims and runs into benchmarks/README.md")
    given = parser.parse_args()
    results = Results(given.out / "peft_full.jsonl")
    print(advice(results))
    if given.write:
        readme = Path(__file__).with_name("README.md")
        readme.write_text(written(readme.read_text(encoding="utf-8"), section(results, given.out)), encoding="utf-8")


if __name__ == "__main__":
    main()
