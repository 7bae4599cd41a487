"""Runs the tutorial pages and writes their notebooks: ``python tutorials/build.py [PAGE ...] [--check-only]``.

A page has one source, ``NN_slug.py`` in the percent format. jupytext reads it, nbclient runs it from top to bottom without a
network, and ``NN_slug.ipynb`` beside it becomes what a reader opens: the same cells with their outputs, the solutions folded,
a cell that Google Colab needs, and the time the page took. A page that fails, takes too long, warns or shows a path of this
machine is not written, and the exit status is 1. The notebooks are the record: the site and the tests read them and run
nothing. The table of pages in ``README.md`` is written with them.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from minisft.common.atomic_files import write_durably
from minisft.common.errors import UserError
from minisft.formats.source import SMOLLM2, SMOLLM2_COMMAND, resolve

FOLDER = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/OWNER/minisft"  # where Colab gets the project; nothing else reads it
THREADS = 2  # as shared.start
PAGE_LIMIT_S = 150.0  # this and the next hold where pages are written: readers are promised these times
TOTAL_LIMIT_S = 900.0
CHECKED_CELL_LIMIT_S = 900.0  # --check-only runs on slow machines too; only a cell that hangs may fail there

COLAB = f'''# On Google Colab this cell fetches minisft; anywhere else it does nothing.
import os, subprocess, sys

if "google.colab" in sys.modules and not os.path.exists("shared.py"):
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{REPOSITORY}", "minisft"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./minisft"], check=True)
    subprocess.run([sys.executable, "-m", *"{SMOLLM2_COMMAND}".split()], check=True)
    os.chdir("minisft/tutorials")'''

RAN = re.compile(r"\*This page ran in (\d+) s on (\d+) cores? \(\d{4}-\d\d-\d\d, torch [\w.]+\)\.\*")
# A path that begins at the root, and no part of an address, a fraction or a picture's base64.
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:+=)])/(?:home|root|tmp|usr|var|opt|mnt|work|workspace|content|Users)/[\w./-]*")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
DRAWING = "drawing"  # the tag of a cell that draws or keeps books: its output is the lesson, not its code
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}  # JupyterLab and Colab; the site folds by a tag
WORDS_A_MINUTE, CODE_LINES_A_MINUTE, EXERCISE_MINUTES = 160, 15, 5
TABLE = re.compile(r"(<!-- pages -->\n).*?(<!-- end of pages -->)", re.DOTALL)


class PageError(Exception):
    """A page cannot be built; the message names the page."""


@dataclass(frozen=True)
class Source:
    """A page as its author wrote it: ``front`` is the front matter's ``minisft`` part."""

    path: Path
    front: dict[str, Any]
    cells: list[NotebookNode]

    @property
    def limit_s(self) -> float:
        return min(2 * 60 * float(self.front["minutes"]), PAGE_LIMIT_S)


def read_source(path: Path) -> Source:
    notebook = jupytext.read(path, fmt="py:percent")
    front = notebook.metadata.get("minisft")
    if not front or not {"title", "minutes", "needs"} <= front.keys():
        raise PageError(f"{path.stem}: its front matter lacks title, minutes or needs")
    return Source(path, front, notebook.cells)


def reading_minutes(source: Source) -> int:
    """About how long a page takes to read and work through, in steps of five minutes.

    Prose at 160 words a minute, code that is not folded at 15 lines a minute, five minutes an exercise.
    """
    words = sum(len(cell.source.split()) for cell in source.cells if cell.cell_type == "markdown")
    shown = [cell for cell in source.cells if cell.cell_type == "code" and not {DRAWING, "solution"} & set(tags_of(cell))]
    lines = sum(bool(line.strip()) for cell in shown for line in cell.source.splitlines())
    exercises = sum("exercise" in tags_of(cell) for cell in source.cells)
    minutes = words / WORDS_A_MINUTE + lines / CODE_LINES_A_MINUTE + exercises * EXERCISE_MINUTES
    return max(5, 5 * round(minutes / 5))


def tags_of(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


# ---- run -------------------------------------------------------------------------------------------------------------


def run(source: Source, write: bool) -> tuple[list[NotebookNode], float]:
    """Run all cells of a page in the folder of the tutorials: the cells with their outputs, and the seconds it took.

    Raises:
        PageError: a cell fails, hangs or prints what a page must not show; or a page to write takes longer than it may.
    """
    notebook = nbformat.v4.new_notebook(cells=[NotebookNode(cell) for cell in source.cells])
    clock = _Clock(source)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=2 * PAGE_LIMIT_S if write else CHECKED_CELL_LIMIT_S, startup_timeout=180,
        extra_arguments=["--log-level=ERROR"], record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
        on_cell_start=clock.begin, on_cell_executed=clock.end,
    )  # fmt: skip
    try:
        client.execute(env=_environment())
    except CellTimeoutError:
        raise PageError(f"{clock.where}, did not end within {client.timeout:.0f} s") from None
    except CellExecutionError as error:
        raise PageError(f"{clock.where}, failed{_failed_line(error)}\n  {error.ename}: {ANSI.sub('', error.evalue)}") from None
    seconds = clock.seconds
    for number, cell in enumerate(notebook.cells, 1):
        _refuse_unfit_outputs(source, number, cell)
    if write and seconds > source.limit_s:
        promised = f"{source.front['minutes']} min are promised"
        raise PageError(f"{source.path.stem}: took {seconds:.0f} s, and may take {source.limit_s:.0f} s ({promised})")
    return notebook.cells, seconds


def _environment() -> dict[str, str]:
    """Ours, without network and GPU: a page shows the same on every machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "MPL"))}
    # passive: threads that wait would otherwise take the other core from whatever else runs on this machine.
    kept.setdefault("OMP_WAIT_POLICY", "passive")
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


class _Clock:
    """Which cell is running, and how long it has been since the first began; the start of the kernel does not count."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.times: list[float] = []
        self.index = 0

    def begin(self, cell: NotebookNode, cell_index: int) -> None:
        self.times.append(time.monotonic())
        self.index = cell_index
        if sys.stdout.isatty():
            print(f"\r{self.source.path.stem}: cell {cell_index + 1} of {len(self.source.cells)} ", end="", flush=True)

    def end(self, cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        self.times.append(time.monotonic())

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]

    @property
    def where(self) -> str:
        first_line = self.source.cells[self.index].source.partition("\n")[0]
        return f"{self.source.path.stem}: cell {self.index + 1}, which begins {first_line!r}"


def _failed_line(error: CellExecutionError) -> str:
    """The line of the cell that the traceback's first arrow points at."""
    arrow = re.search(r"^-+> \d+ (.*)$", ANSI.sub("", error.traceback), re.MULTILINE)
    return f"\n  at {arrow[1].strip()}" if arrow else ""


def _refuse_unfit_outputs(source: Source, number: int, cell: NotebookNode) -> None:
    where = f"{source.path.stem}: cell {number}"
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr":
            raise PageError(f"{where} warns, or draws a progress bar: {output.text.strip()[:300]}")
        shown = [output["text"]] if "text" in output else list(output.get("data", {}).values())
        for text in shown:
            if found := ABSOLUTE_PATH.search(str(text)):
                raise PageError(f"{where} shows a path of this machine: {found[0]}")
        if any("widget" in kind for kind in output.get("data", {})):
            raise PageError(f"{where} shows a widget, which no reader but Jupyter can draw")


# ---- write -----------------------------------------------------------------------------------------------------------


def notebook_of(source: Source, cells: Sequence[NotebookNode], ran: str) -> NotebookNode:
    """The notebook that readers open, from the page's cells (with outputs or without) and the line ``ran``."""
    folded = [_folded(cell) for cell in cells]
    read = reading_minutes(source)
    minutes = new_markdown_cell(
        f"*Run {source.front['minutes']} min, read {read} min, exercises included.*", metadata={"tags": ["minutes"]}
    )
    colab = new_code_cell(COLAB, metadata={"tags": ["colab", "remove-cell"]})
    last = new_markdown_cell(ran, metadata={"tags": ["time"]})
    notebook = nbformat.v4.new_notebook(cells=[folded[0], minutes, colab, *folded[1:], last])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "minisft": {**source.front, "read_minutes": read},
    }
    _number(notebook.cells)
    return notebook


def _folded(cell: NotebookNode) -> NotebookNode:
    metadata = {"tags": list(tags_of(cell))} if tags_of(cell) else {}
    if "solution" in tags_of(cell):
        fold = f"<details>\n<summary>Solution</summary>\n\n```python\n{cell.source}\n```\n\n</details>"
        return new_markdown_cell(fold, metadata=metadata)
    if DRAWING in tags_of(cell):
        metadata = {**FOLDED, "tags": [DRAWING, "hide-input"]}
    if cell.cell_type == "code":
        return new_code_cell(cell.source, metadata=metadata, outputs=cell.outputs)
    return new_markdown_cell(cell.source, metadata=metadata)


def _number(cells: Sequence[NotebookNode]) -> None:
    """Ids that follow from a cell's content, so that an edit changes one of them; the numbers that Jupyter shows, 1 to n."""
    seen: Counter[str] = Counter()
    executed = 0
    for cell in cells:
        content = "time" if tags_of(cell) == ["time"] else f"{cell.cell_type}\n{cell.source}"
        seen[content] += 1
        cell.id = hashlib.sha256(f"{seen[content]}\n{content}".encode()).hexdigest()[:8]
        if cell.cell_type == "code" and "colab" not in tags_of(cell):
            executed += 1
            cell.execution_count = executed
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = executed


def ran_line(seconds: float) -> str:
    cores = int(os.environ.get("OMP_NUM_THREADS", min(THREADS, os.cpu_count() or 1)))
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    unit = "core" if cores == 1 else "cores"
    return f"*This page ran in {seconds:.0f} s on {cores} {unit} ({datetime.date.today()}, torch {torch_version}).*"


def differences(notebook: NotebookNode, source: Source) -> list[str]:
    """How a committed notebook differs from what its source would give: prose, code, tags, front matter; outputs aside."""
    expected = notebook_of(source, source.cells, "")
    if notebook.metadata != expected.metadata:
        return ["its metadata is not that of the source's front matter"]
    if len(notebook.cells) != len(expected.cells):
        return [f"it has {len(notebook.cells)} cells, the source gives {len(expected.cells)}"]
    pairs = list(enumerate(zip(notebook.cells[:-1], expected.cells[:-1], strict=True), 1))
    found = [
        f"cell {number} is not the source's: {old.source[:60]!r}" for number, (old, new) in pairs if _core(old) != _core(new)
    ]
    if not RAN.fullmatch(notebook.cells[-1].source):
        found.append("its last cell does not say how long the page took")
    return found


def _core(cell: NotebookNode) -> tuple[Any, ...]:
    return cell.id, cell.cell_type, cell.source, cell.metadata


def seconds_of(notebook: NotebookNode) -> int | None:
    """How long the page took when the notebook was written."""
    said = RAN.fullmatch(notebook.cells[-1].source)
    return int(said[1]) if said else None


# ---- the table of pages ----------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """The pages of ``folder`` as a Markdown table, from their front matter and their notebooks."""
    rows = ["| page | you build | run | read | took | needs | after |", "|---|---|---|---|---|---|---|"]
    for path in all_sources(folder):
        source, notebook = read_source(path), path.with_suffix(".ipynb")
        front, read = source.front, reading_minutes(source)
        took = f"{seconds_of(nbformat.read(notebook, as_version=4))} s" if notebook.exists() else "not run yet"
        needs = "SmolLM2" if front["needs"] == "smollm2" else "-"
        built = ", ".join(f"`{name}`" for name in front.get("contract", {}))
        title = f"[{path.stem[:2]} {front['title']}]({path.stem}.ipynb)"
        after = ", ".join(front.get("after", [])) or "-"
        rows.append(f"| {title} | {built} | {front['minutes']} min | {read} min | {took} | {needs} | {after} |")
    return "\n".join(rows) + "\n"


def write_table(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    new = TABLE.sub(lambda marks: marks[1] + table(readme.parent) + marks[2], text)
    write_durably(readme, new.encode())


# ---- the command -----------------------------------------------------------------------------------------------------


def all_sources(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def find_source(name: str) -> Path:
    """The source that ``name`` means: ``03``, ``03_lora`` or a path.

    Raises:
        PageError: none.
    """
    for path in all_sources():
        if name in (path.stem, path.stem[:2]):
            return path
    if Path(name).suffix == ".py" and Path(name).is_file():
        return Path(name).resolve()
    raise PageError(f"no page is called {name}; there are {', '.join(path.stem for path in all_sources())}")


def require_model(sources: Sequence[Source]) -> None:
    """Fail before anything runs where a page needs SmolLM2 and it is not installed."""
    needing = [source.path.stem for source in sources if source.front["needs"] == "smollm2"]
    if needing:
        try:
            resolve(SMOLLM2)
        except UserError:
            raise PageError(f"{', '.join(needing)}: need the pretrained model SmolLM2: {SMOLLM2_COMMAND}") from None


def build(source: Source, write: bool) -> float:
    """Run one page and write its notebook; the seconds it took."""
    cells, seconds = run(source, write)
    if write:
        text = nbformat.writes(notebook_of(source, cells, ran_line(seconds)))
        write_durably(source.path.with_suffix(".ipynb"), (text + "\n").encode())
    return seconds


def build_all(sources: Sequence[Source], write: bool) -> list[str]:
    """Build every page, whatever becomes of the others; what went wrong."""
    problems, total = [], 0.0
    for source in sources:
        try:
            seconds = build(source, write)
        except PageError as error:
            problems.append(str(error))
            _report(f"{source.path.stem}: FAILED")
            continue
        total += seconds
        _report(f"{source.path.stem}: {seconds:.0f} s" + (f" of {source.limit_s:.0f} s" if write else ""))
    if write and total > TOTAL_LIMIT_S:
        problems.append(f"all pages together took {total:.0f} s, and may take {TOTAL_LIMIT_S:.0f} s")
    return problems


def _report(line: str) -> None:
    print(f"\r{line:60}" if sys.stdout.isatty() else line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run tutorial pages and write their notebooks.")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="03, 03_lora or a path; all pages if left out")
    parser.add_argument("--check-only", action="store_true", help="run the pages and check all but their times; write nothing")
    options = parser.parse_args(arguments)
    try:
        paths = [find_source(name) for name in options.pages] or all_sources()
        sources = [read_source(path) for path in paths]
        require_model(sources)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    problems = build_all(sources, write=not options.check_only)
    if not options.check_only and any(path.parent == FOLDER for path in paths):
        write_table(FOLDER / "README.md")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
