"""What ``exp_peft_full`` advises: at most eight lines, each with the figure that it rests on and the cells that it comes from.

A line whose cells are missing says so; no figure stands here that is not in the results file.

    python benchmarks/peft_full_advice.py                 # the table, in Markdown
    python benchmarks/peft_full_advice.py --write         # and claims and runs into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from harness import RESULTS
from peft_full_figures import Results, claims, difference, tables

FILE = "benchmarks/results/peft_full.jsonl"
PAGE = "tutorials/04_rank_alpha_targets_rate.ipynb"
NOT_RUN = "not run yet"
TEXTS = {"P2": "cipher text", "P3": "bank messages"}
MARKS = re.compile(r"(<!-- peft_full -->\n)(.*?)(\n<!-- end of peft_full -->)", re.DOTALL)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _gap(results: Results, experiment: str, a: str, b: str) -> str | None:
    gap, low, high, seeds = difference(results, experiment, a, b)
    return None if math.isnan(gap) else f"{gap:+.3f} ({low:+.3f} to {high:+.3f}) nats a token, {_counted(seeds, 'seed')}"


def _full_may_win(results: Results) -> str | None:
    gaps = ((text, _gap(results, experiment, "full", "r16")) for experiment, text in TEXTS.items())
    return "; ".join(f"{text} {gap}" for text, gap in gaps if gap) or None


def _ratio(results: Results) -> str | None:
    found = []
    for experiment, text in TEXTS.items():
        tuned = {row["arm"]: row["lr"] for row in results.of(experiment, "tune")}
        if {"r16", "full"} <= tuned.keys():
            found.append(f"{text}: {tuned['r16']:g} for r 16, {tuned['full']:g} for full")
    return "; ".join(found) + "; one seed" if found else None


def _bits(results: Results) -> str | None:
    crowded = [
        row["bits"] / row["trained"]
        for row in results.of("P1", "facts")
        if not row["arm"].startswith("full") and row["entropy"] > 2 * row["trained"]
    ]
    if not crowded:
        return None
    bits, runs = f"{statistics.median(crowded):.2f} bits a parameter", _counted(len(crowded), "run")
    return f"adapters too small for their facts recalled {bits}, {runs}"


@functools.cache
def _claims(results: Results) -> list[tuple[str, str, str]]:
    """Of these results, worked out once: each needs thousands of resamples."""
    return claims(results)


def _claim(beginning: str) -> Callable[[Results], str | None]:
    """The verdict and the figures of the claim that begins so."""

    def say(results: Results) -> str | None:
        found = [f"{word}: {figures}" for claim, word, figures in _claims(results) if claim.startswith(beginning)]
        return found[0] if found else None

    return say


LINES: tuple[tuple[str, str, Callable[[Results], str | None]], ...] = (
    ("targets: all linears, not attention alone", "P2/run", lambda r: _gap(r, "P2", "r16", "attention r16")),
    ("alpha: leave it at 32; it is the rate of B", "page 04", lambda r: "a law under Adam, asserted bit for bit"),
    ("rate: search for each method, `minisft lr-find`", "P2/tune, P3/tune", _ratio),
    ("rank: by bits, not by rows, `minisft plan`", "P1/facts", _bits),
    ("near data, web text: LoRA; full less r 16", "P4/run", lambda r: _gap(r, "P4", "full", "r16")),
    ("far data, new labels: full may win; full less r 16", "P2/run, P3/run", _full_may_win),
    (
        "forgetting: compare at equal learning; LoRA forgets less",
        "P5/P2",
        _claim("LoRA r 16 forgets less than full at equal learning: P2"),
    ),
    ("forgetting: replay 10 % of general text", "P5/P2", _claim("replaying 10 % web text keeps r16")),
)


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
    return f"{cells}, tables by `peft_full_advice.py --write`:\n\n{said}\n\n{tables(results)}\n{rest}{pictures}".rstrip()


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
