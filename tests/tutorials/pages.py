"""Tutorial pages as tests see them: front matter, cells, the definitions that a page builds, its exercises.

    lora = page("03_lora")
    namespace = lora.build()                                     # setup, build and check cells, nothing else of the page
    wrong = lora.build(mutate=("alpha / rank", "alpha"))         # the same with a bug in it
    for exercise in lora.exercises(): ...                        # .name .check .stub .solution

Nothing that a page sets for its process (threads, environment, the style of its pictures) outlasts the call.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import itertools
import linecache
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
NUMBERS = ("01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13")

sys.path.insert(0, str(TUTORIALS))  # where the pages find `shared`


def _load_builder() -> types.ModuleType:
    """``tutorials/build.py``, under a name that no other ``build`` has."""
    spec = importlib.util.spec_from_file_location("tutorials_build", TUTORIALS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = _load_builder()


@dataclass(frozen=True)
class Cell:
    """One cell: ``kind`` is ``code`` or ``markdown``; ``line`` counts from 1 in the page's file (0 for Markdown)."""

    kind: str
    source: str
    tags: tuple[str, ...]
    line: int = 0


@dataclass(frozen=True)
class Exercise:
    """``check(answer)`` raises AssertionError with a hint unless ``answer`` is right; ``stub`` is what the reader finds."""

    name: str
    check: Callable[[Callable[..., Any]], None]
    stub: Callable[..., Any]
    solution: Callable[..., Any]


class Page:
    """A page ``tutorials/NN_slug.py``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = path.stem[:2]
        self.text = path.read_text(encoding="utf-8")
        notebook = jupytext.reads(self.text, fmt="py:percent")
        self.front: dict[str, Any] = notebook.metadata.get("minisft", {})
        self.cells = self._cells(notebook.cells)

    def __repr__(self) -> str:
        return self.path.stem

    def _cells(self, cells: Sequence[Any]) -> list[Cell]:
        found, position = [], 0
        for cell in cells:
            tags = tuple(cell.metadata.get("tags", ()))
            line = 0
            if cell.cell_type == "code" and cell.source:
                # Markdown stands behind "# ", so the first whole-line match behind the previous cell is this cell.
                position = self.text.index("\n" + cell.source + "\n", position) + 1
                line = self.text.count("\n", 0, position) + 1
                position += len(cell.source)
            found.append(Cell(cell.cell_type, cell.source, tags, line))
        return found

    def tagged(self, *tags: str) -> list[Cell]:
        """The cells that carry one of ``tags``, in the order of the page."""
        return [cell for cell in self.cells if set(tags) & set(cell.tags)]

    @property
    def markdown(self) -> str:
        """All prose of the page."""
        return "\n\n".join(cell.source for cell in self.cells if cell.kind == "markdown")

    @property
    def uses_triton(self) -> bool:
        return any("triton=True" in cell.source for cell in self.tagged("setup"))

    def build(self, mutate: tuple[str, str] | None = None) -> dict[str, Any]:
        """What the setup, build and check cells define. Answers are not graded.

        Args:
            mutate: ``(old, new)``, a change of the build cells' source.

        Raises:
            ValueError: ``old`` does not stand in the build cells exactly once.
        """
        cells = self.tagged("setup", "build", "check")
        if mutate is not None:
            cells = self._mutated(cells, *mutate)
        name = str(self.path) if mutate is None else f"{self.path.stem} with {mutate[1]!r} ({next(_counter)}).py"
        with process_kept():
            return self._run(cells, name)

    def _mutated(self, cells: list[Cell], old: str, new: str) -> list[Cell]:
        count = sum(cell.source.count(old) for cell in cells if "build" in cell.tags)
        if count != 1:
            raise ValueError(f"{self.path.name}: the build cells hold {old!r} {count} times, not once")
        return [replace(cell, source=cell.source.replace(old, new)) if "build" in cell.tags else cell for cell in cells]

    def _run(self, cells: list[Cell], filename: str) -> dict[str, Any]:
        """Run cells in a module of their own, on the lines they have in the file: tracebacks and Triton look them up there."""
        module = types.ModuleType(f"tutorial_{self.path.stem}")
        sys.modules[module.__name__] = module  # dataclasses look their module up
        text = _laid_out(cells)
        if filename != str(self.path):
            linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        exec(compile(text, filename, "exec"), vars(module))
        return vars(module)

    def exercises(self) -> list[Exercise]:
        """Every exercise of the page: the cells setup, build, exercise, check and solution run in order, and nothing else."""
        return self._exercises_and_output[0]

    @property
    def exercise_output(self) -> str:
        """What those cells print: the verdicts on stubs and solutions."""
        return self._exercises_and_output[1]

    @cached_property
    def _exercises_and_output(self) -> tuple[list[Exercise], str]:
        defined = [name for cell in self.tagged("exercise") for name in function_names(cell.source)]
        printed = io.StringIO()
        with process_kept(), contextlib.redirect_stdout(printed):
            stubs = self._run(self.tagged("setup", "build", "exercise"), str(self.path))
            solved = self._run(self.tagged("setup", "build", "exercise", "check", "solution"), str(self.path))
        names = [name for name in defined if f"check_{name}" in solved]
        return [Exercise(name, solved[f"check_{name}"], stubs[name], solved[name]) for name in names], printed.getvalue()


_counter = itertools.count()


def _laid_out(cells: Sequence[Cell]) -> str:
    """The source of ``cells`` on their own lines of the page, the lines between them empty. Check cells lose ``shared.grade``
    where no exercise stands among the cells: there is nothing to grade."""
    graded = any("exercise" in cell.tags for cell in cells)
    text = ""
    for cell in cells:
        source = cell.source if graded or "check" not in cell.tags else _without_grading(cell.source)
        text += "\n" * (cell.line - 1 - text.count("\n")) + source + "\n"
    return text


def _without_grading(source: str) -> str:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("shared.grade("):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Undo what ``shared.start`` does to the process."""
    environment, threads, random_state = dict(os.environ), torch.get_num_threads(), torch.get_rng_state()
    with matplotlib.rc_context():
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)
            torch.set_rng_state(random_state)


def function_names(source: str) -> list[str]:
    """The functions and classes that ``source`` defines at its top level."""
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def sources() -> list[Path]:
    """The pages that exist, in their order."""
    return sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))


@cache
def _read(path: Path, changed_ns: int) -> Page:
    return Page(path)


def page(slug: str) -> Page:
    """The page of that name: ``03_lora``, ``lora`` or ``03``.

    Raises:
        LookupError: no page, or more than one.
    """
    found = [path for path in sources() if slug in (path.stem, path.stem[:2], path.stem[3:])]
    if len(found) != 1:
        raise LookupError(
            f"{len(found)} pages are called {slug!r}; there are {', '.join(path.stem for path in sources()) or 'none'}"
        )
    return _read(found[0], found[0].stat().st_mtime_ns)


# ---- the two tests that every page has -------------------------------------------------------------------------------


def mutants_test(
    page: Page, mutants: Sequence[tuple[str, str, str]], agrees: Callable[[dict[str, Any]], None]
) -> Callable[[str, str], None]:
    """A test: each of the bugs ``(what, old, new)`` in the build cells makes ``agrees`` fail."""

    @pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in mutants], ids=[mutant[0] for mutant in mutants])
    def test_a_bug_in_the_build_is_seen(old: str, new: str) -> None:
        with pytest.raises(AssertionError):
            agrees(page.build(mutate=(old, new)))

    return test_a_bug_in_the_build_is_seen


def wrong_answers_test(
    page: Page, wrong: dict[str, list[tuple[Callable[..., Any], str]]]
) -> Callable[[str, Callable[..., Any], str], None]:
    """A test: each wrong answer to an exercise fails its check with its own hint."""
    cases = [(name, answer, hint) for name, answers in wrong.items() for answer, hint in answers]

    @pytest.mark.parametrize(("name", "answer", "hint"), cases)
    def test_a_wrong_answer_gets_its_hint(name: str, answer: Callable[..., Any], hint: str) -> None:
        check = next(exercise.check for exercise in page.exercises() if exercise.name == name)
        with pytest.raises(AssertionError, match=hint):
            check(answer)

    return test_a_wrong_answer_gets_its_hint
