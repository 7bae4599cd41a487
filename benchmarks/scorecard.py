"""What is promised, measured against its target: ``make scorecard``, eighteen lines, at most 15 minutes on two quiet cores.

    python benchmarks/scorecard.py                       every line that the results file lacks for this commit
    python benchmarks/scorecard.py --lines 10 14         these, measured anew
    python benchmarks/scorecard.py --quick               all at a hundredth of the size, into a temporary folder
    python benchmarks/scorecard.py --table               only write the table from the results file

Each line runs in a process of its own and is written down when it ends, so a run may be stopped at any time and go on. A line
is passed when every check of it holds; what could not be measured is a miss too, unless the line says what is absent.
The exit status is 1 when a line missed. The table in ``benchmarks/README.md`` is written from the results file alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from harness import RESULTS, out_folder, provenance, save
from scorecard_lines import LINES
from scorecard_parts import Line, Measured, in_words, verdict

README = Path(__file__).parent / "README.md"
START, END = "<!-- scorecard -->\n", "\n<!-- end of scorecard -->"
ANSWER = "SCORECARD "
LIMIT_S = 900.0  # a line that hangs ends here; one that is only slow is told by its seconds


def read_results(folder: Path) -> dict[str, dict]:
    """What the results file holds, by the number of the line."""
    path = folder / "scorecard.json"
    return json.loads(path.read_text(encoding="utf-8"))["lines"] if path.exists() else {}


def write_results(folder: Path, lines: Mapping[str, dict]) -> None:
    save("scorecard", {"lines": dict(sorted(lines.items(), key=lambda item: int(item[0])))}, folder)


# ---- one line ----------------------------------------------------------------------------------------------------------


def measure(line: Line, quick: bool) -> dict:
    """Run a line in a process of its own; what it measured, whether that is enough, and where it comes from."""
    command = [sys.executable, __file__, "--child", str(line.number), *(["--quick"] if quick else [])]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:  # fmt: skip
        try:
            printed, _ = child.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            printed = f"over {LIMIT_S:.0f} s"
        finally:
            _end_group(child.pid)
    answers = [text.removeprefix(ANSWER) for text in printed.splitlines() if text.startswith(ANSWER)]
    measured = json.loads(answers[-1]) if answers else {"error": printed[-2000:]}
    return result_of(line, measured, time.monotonic() - began, quick)


def _end_group(pid: int) -> None:
    """Whatever the child left behind."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def result_of(line: Line, measured: Measured, seconds: float, quick: bool) -> dict:
    """The entry of the results file: everything that the table needs is in it."""
    absent = measured.get("absent")
    missed = [] if absent else verdict(line, measured)
    return {
        "test": line.test,
        "target": line.target,
        "peers": in_words(line.peers, measured),
        "command_of_line": f"python benchmarks/scorecard.py --lines {line.number}",
        "found": str(absent or in_words(line.says, measured)),
        "verdict": "not run here" if absent else "missed" if missed else "met",
        "missed": missed,
        "seconds": round(seconds, 1),
        "quick": quick,
        "measured": measured,
        **provenance(),
    }


def child(number: int, quick: bool) -> None:
    """The side of the process that measures: its last line is the answer."""
    import torch

    torch.set_num_threads(1)
    (line,) = [line for line in LINES if line.number == number]
    print(ANSWER + json.dumps(line.measure(quick)), flush=True)


# ---- several lines -----------------------------------------------------------------------------------------------------


def is_current(entry: Mapping[str, object], commit: str) -> bool:
    """Measured at this commit, whole, and met: such a line is not run again unless it is asked for."""
    return entry["commit"] == commit and not entry["quick"] and entry["verdict"] == "met"


def run_lines(lines: Sequence[Line], folder: Path, quick: bool, jobs: int) -> dict[str, dict]:
    """Measure ``lines``, ``jobs`` at a time, the longest first; each is written down when it ends."""
    from tqdm import tqdm

    results = read_results(folder)
    pool = ThreadPoolExecutor(jobs)
    try:
        ordered = sorted(lines, key=lambda line: -line.seconds)
        futures = {pool.submit(measure, line, quick): line for line in ordered}
        for future in tqdm(as_completed(futures), total=len(futures), unit="line", disable=None, leave=False):
            line = futures[future]
            results[str(line.number)] = entry = future.result()
            write_results(folder, results)
            tqdm.write(told(line.number, entry))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def told(number: int, entry: Mapping[str, object]) -> str:
    """A line for people: verdict, measured against target, and what was missed."""
    head = f"{number:>2} {entry['verdict']:<7} {entry['seconds']:6.1f} s"
    text = f"{head}  {entry['test']}: {entry['found']}; target: {entry['target']}"
    missed = entry["missed"]
    assert isinstance(missed, list)
    return "\n".join([text, *(f"      missed: {what}" for what in missed)])


# ---- the table ---------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, object]]) -> str:
    """The results file as Markdown, one row a line of the scorecard, nothing from anywhere else."""
    rows = ["| | test | target | measured | peers | command |", "|---|---|---|---|---|---|"]
    for number, entry in results.items():
        found = str(entry["found"]) if entry["verdict"] == "met" else f"**{entry['verdict']}**: {entry['found']}"
        size = " (reduced size)" if entry["quick"] else ""
        cells = [number, entry["test"], entry["target"], found + size, entry["peers"], f"`--lines {number}`"]
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def write_table(results: Mapping[str, Mapping[str, object]], path: Path = README) -> None:
    """Put the table between its marks."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    path.write_text(before + START + table(results) + END + after, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", metavar="N", choices=[line.number for line in LINES])
    parser.add_argument("--quick", action="store_true", help="does everything work? a hundredth of the size")
    parser.add_argument("--jobs", type=int, default=2, help="lines at a time, one thread each (default 2)")
    parser.add_argument("--out", type=Path, help="folder of scorecard.json")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child, options.quick)
        return 0
    folder = out_folder(options.out, options.quick)
    results = read_results(folder)
    if not options.table:
        commit = provenance()["commit"]
        done = (
            {n for n, entry in results.items() if is_current(entry, commit)} if not (options.quick or options.lines) else set()
        )
        chosen = [line for line in LINES if line.number in (options.lines or range(99)) and str(line.number) not in done]
        results = run_lines(chosen, folder, options.quick, options.jobs)
        results = {n: entry for n, entry in results.items() if int(n) in {line.number for line in chosen} or n in done}
    if folder == RESULTS:
        write_table(read_results(folder))
    return 1 if any(entry["verdict"] == "missed" for entry in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
