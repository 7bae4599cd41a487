"""What every tutorial page has to be, whatever it teaches: the contract between the pages, their tests, their notebooks and the
library. What one page teaches is tested in ``test_NN_slug.py``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pages
import pytest
import torch
from pages import NUMBERS, TUTORIALS, Page, builder, function_names, sources

HERE = Path(__file__).parent
HEADINGS = (
    "You need, you get", "The idea", "The formula", "By hand: 3 x 4", "Build it", "Run it", "The same as the library",
    "What usually goes wrong", "Exercises", "What was not shown", "Summary", "References",
)  # fmt: skip
MOST_BUILD_LINES = 50
MOST_VISIBLE_LINES = 25
MOST_MINUTES = 2.5
LARGEST_NOTEBOOK = 1_500_000  # bytes; GitHub stops showing notebooks that are much larger
FORBIDDEN_IMPORTS = {"transformers", "peft", "bitsandbytes", "pickle", "requests", "urllib", "ipywidgets", "tqdm"}
SAMPLE = """# ---
# jupyter:
#   minisft: {title: A sample}
# ---

# %% [markdown]
# # 98 A sample

# %% tags=["setup"]
import os

import torch
import shared

shared.start("98", seed=5)
os.environ["SAMPLE"] = "set"

# %%
ordinary = 1

# %% tags=["build"]
def double(x):
    return 2 * x

# %% tags=["exercise"]
def half(x):
    raise NotImplementedError("your turn")

# %% tags=["check"]
def check_half(answer):
    assert answer(6) == 3

shared.grade(check_half, half)

# %% tags=["solution"]
def half(x):
    return x // 2

shared.grade(check_half, half)
"""
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")

ALL = [pages.page(path.stem) for path in sources()]
PLAIN = [page for page in ALL if page.front.get("needs") == "tiny"]
every_page = pytest.mark.parametrize("page", ALL, ids=repr)


def run_marks(page: Page) -> list[pytest.MarkDecorator]:
    """Where cells are run: the setup of a page may load the model, and a Triton page gets a process of its own."""
    marks = [pytest.mark.smollm2] if page.front.get("needs") == "smollm2" else []
    return [*marks, pytest.mark.slow] if page.uses_triton else marks


every_page_run = pytest.mark.parametrize("page", [pytest.param(page, marks=run_marks(page)) for page in ALL], ids=repr)


@cache
def references() -> dict[str, dict[str, Any]]:
    return tomllib.loads((TUTORIALS / "refs.toml").read_text(encoding="utf-8"))


@cache
def notebook_of(page: Page) -> nbformat.NotebookNode:
    path = page.path.with_suffix(".ipynb")
    assert path.exists(), f"there is no {path.name}: run `make tutorials`, or python tutorials/build.py {page.number}"
    return nbformat.read(path, as_version=4)


def sections(page: Page) -> dict[str, list[pages.Cell]]:
    """The cells under each ``##`` heading; a Markdown cell may hold several headings, and is cut at them."""
    found: dict[str, list[pages.Cell]] = {"": []}
    heading = ""
    for cell in page.cells:
        if cell.kind == "code":
            found[heading].append(cell)
            continue
        for number, part in enumerate(re.split(r"^## +(.+)$", cell.source, flags=re.MULTILINE)):
            if number % 2:
                heading = part.strip()
                found.setdefault(heading, [])
            else:
                found[heading].append(pages.Cell("markdown", part, cell.tags))
    return found


def trees(page: Page) -> Iterator[ast.AST]:
    for cell in page.cells:
        if cell.kind == "code":
            yield from ast.walk(ast.parse(cell.source))


# ---- the rules, as functions of text ---------------------------------------------------------------------------------


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, no blank lines, no docstrings."""
    documented = (ast.FunctionDef, ast.ClassDef, ast.Module)
    strings = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, documented) and ast.get_docstring(node)]
    left_out = {line for string in strings for line in range(string.lineno, string.end_lineno + 1)}
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in nothing]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - left_out)


def bare_numbers(markdown: str) -> list[str]:
    """Decimals and percentages that stand in prose: outside code, maths and the targets of links."""
    for shielded in (r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$]*\$", r"\]\([^)]*\)", r"https?://\S+"):
        markdown = re.sub(shielded, " ", markdown, flags=re.DOTALL)
    return re.findall(r"\d+\.\d+|\d+ ?%|\d+ percent", markdown)


def links(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", markdown) + re.findall(r'(?:href|src)="([^"]+)"', markdown)


def broken_links(markdown: str, folder: Path) -> list[str]:
    """Relative links to files that do not exist (a page's notebook may stand for its source), and links that are not https."""
    found = []
    for link in links(markdown):
        target = folder / link.partition("#")[0]
        exists = target.exists() or (target.suffix == ".ipynb" and target.with_suffix(".py").exists())
        if not (link.startswith("https://") or link.startswith("#") or ("://" not in link and exists)):
            found.append(link)
    return found


def resolve(dotted: str) -> Any:
    """The library object that a contract names: a module's attribute, however deep."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise LookupError(f"{dotted} is nothing that can be imported")


def test_code_lines_leave_out_what_is_no_code() -> None:
    documented = '"""Says\nwhat."""\n\n# why\ndef f(x):  # [n]\n    """Twice."""\n    return (\n        x + x\n    )\n'
    assert code_lines(documented) == 4
    assert code_lines('name = """a\nb"""\n') == 2


@pytest.mark.parametrize(
    ("markdown", "found"),
    [
        ("It is 3.5 times, or 20 % more, or 7%.", ["3.5", "20 %", "7%"]),
        ("`0.5` and $0.5$ and $$x = 1.5$$ and ```\n2.5\n```", []),
        ("See [Hu](https://arxiv.org/abs/2106.09685) with 4 bits in 16 levels.", []),
    ],
)
def test_bare_numbers_are_found(markdown: str, found: list[str]) -> None:
    assert bare_numbers(markdown) == found


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "03_lora.py").touch()
    markdown = '[a](03_lora.ipynb#x) [b](04_gone.ipynb) [c](http://a.org) [d](https://a.org) [e](#here) <img src="no.png">'
    assert broken_links(markdown, tmp_path) == ["04_gone.ipynb", "http://a.org", "no.png"]


@pytest.fixture
def some_page(tmp_path: Path) -> Page:
    """A page that sets the process up as pages do, with one build cell and one check."""
    path = tmp_path / "98_sample.py"
    path.write_text(SAMPLE)
    return Page(path)


def test_a_mutation_changes_the_build_cells_in_one_place(some_page: Page) -> None:
    assert some_page.build()["double"](5) == 10
    assert some_page.build(mutate=("2 *", "3 *"))["double"](5) == 15
    for text, count in [("import", 0), ("x", 2)]:  # only the build cells count
        with pytest.raises(ValueError, match=f"{count} times"):
            some_page.build(mutate=(text, "y"))


def test_a_build_runs_no_other_cell_and_grades_nothing(some_page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = some_page.build()
    assert namespace.keys() >= {"torch", "double", "check_half"}
    assert not namespace.keys() & {"half", "ordinary"}
    assert capsys.readouterr().out == ""


def test_exercises_are_read_from_a_page(some_page: Page) -> None:
    (half,) = some_page.exercises()
    assert (half.name, half.solution(4)) == ("half", 2)
    with pytest.raises(NotImplementedError, match="your turn"):
        half.stub(4)
    assert some_page.exercise_output == "half: not solved yet: your turn\nhalf: right\n"


def test_a_build_leaves_the_process_as_it_was(some_page: Page) -> None:
    before = dict(os.environ), torch.get_num_threads(), dict(matplotlib.rcParams)
    state = torch.get_rng_state()
    some_page.build()
    assert (dict(os.environ), torch.get_num_threads(), dict(matplotlib.rcParams)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_source_lines_are_those_of_the_file(some_page: Page) -> None:
    """So that tracebacks, and Triton when it reads a kernel, find the right text; also in a mutated page."""
    for namespace in (some_page.build(), some_page.build(mutate=("2 *", "3 *"))):
        lines, first = inspect.getsourcelines(namespace["double"])
        assert lines[0] == "def double(x):\n"
        assert some_page.text.splitlines()[first - 1] == "def double(x):"


# ---- front matter, headings, size ------------------------------------------------------------------------------------


@every_page
def test_the_front_matter_is_complete(page: Page) -> None:
    front = page.front
    assert set(front) == {"title", "minutes", "needs", "after", "contract", "refs"}
    assert page.cells[0].source.splitlines()[0] == f"# {page.number} {front['title']}", "the first line is `# NN title`"
    assert 0 < front["minutes"] <= MOST_MINUTES
    assert front["needs"] in ("tiny", "smollm2")
    assert all(number in NUMBERS and number < page.number for number in front["after"]), "quoted numbers of earlier pages"
    assert front["contract"], "a page builds something that the library has too"


@every_page
def test_needs_says_whether_the_pretrained_model_is_read(page: Page) -> None:
    used = any("shared.smollm2(" in cell.source for cell in page.cells)
    assert used == (page.front["needs"] == "smollm2")


@every_page
def test_the_headings_stand_in_the_fixed_order(page: Page) -> None:
    found = [heading for heading in sections(page) if heading]
    assert found == list(HEADINGS), "these are the sections of every page, in this order; use ### inside them"


@every_page
def test_a_picture_comes_before_the_idea(page: Page) -> None:
    parts = sections(page)
    early = parts[""] + parts[HEADINGS[0]]
    assert any("shared.show(" in cell.source for cell in early), "draw the page's picture before `## The idea`"


@every_page
def test_something_is_run_and_drawn(page: Page) -> None:
    assert any("shared.show(" in cell.source for cell in sections(page)["Run it"])


@every_page
def test_the_page_asserts_that_it_equals_the_library(page: Page) -> None:
    code = "\n".join(cell.source for cell in sections(page)["The same as the library"] if cell.kind == "code")
    assert re.search(r"^\s*assert |assert_close\(|assert_equal\(", code, re.MULTILINE), "no visible assertion"


@every_page
def test_what_the_reader_builds_is_short(page: Page) -> None:
    lines = sum(code_lines(cell.source) for cell in page.tagged("build"))
    assert 0 < lines <= MOST_BUILD_LINES, f"the build cells hold {lines} lines of code"


@every_page
def test_long_code_that_is_not_the_lesson_is_folded(page: Page) -> None:
    """Tag a cell ``drawing`` if it only draws or keeps books; cut it in two if a reader should see it."""
    hidden = {"build", "drawing", "solution"}
    cells = [cell for cell in page.cells if cell.kind == "code" and not hidden & set(cell.tags)]
    long = {f"line {cell.line}": count for cell in cells if (count := code_lines(cell.source)) > MOST_VISIBLE_LINES}
    assert not long, f"more than {MOST_VISIBLE_LINES} lines of code in view: {long}"


@every_page
def test_pictures_are_drawn_in_folded_cells(page: Page) -> None:
    drawn = [cell for cell in page.cells if cell.kind == "code" and "shared.show(" in cell.source]
    assert [cell.line for cell in drawn if "drawing" not in cell.tags] == []


@every_page
def test_a_page_ends_in_five_lines_and_two_questions(page: Page) -> None:
    text = "\n".join(cell.source for cell in sections(page)["Summary"])
    box = re.findall(r"^> - (.+)$", text, re.MULTILINE)
    assert len(box) == 5, "five lines, each `> - ...`"
    questions = re.findall(r"<details>\n<summary>([^\n]+\?)</summary>\n\n(.+?)\n\n</details>", text, re.DOTALL)
    assert len(questions) == 2, "two questions whose answers fold"
    assert "You can now" in text
    assert all(len(answer.split()) >= 8 for _, answer in questions)


@every_page
def test_the_setup_starts_this_page(page: Page) -> None:
    setup = "\n".join(cell.source for cell in page.tagged("setup"))
    assert f'shared.start("{page.number}"' in setup


@every_page
def test_every_cell_is_tagged_from_the_list(page: Page) -> None:
    known = {"setup", "build", "drawing", "exercise", "check", "solution"}
    assert {tag for cell in page.cells for tag in cell.tags} <= known
    assert all(len(cell.tags) <= 1 for cell in page.cells)


@every_page
def test_pages_import_nothing_that_only_tests_may(page: Page) -> None:
    imported = {alias.name.split(".")[0] for node in trees(page) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in trees(page) if isinstance(node, ast.ImportFrom)}
    assert not imported & FORBIDDEN_IMPORTS
    calls = {ast.unparse(node.func) for node in trees(page) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "eval", "exec", "open_url"}


# ---- contracts -------------------------------------------------------------------------------------------------------


def page_tests(page: Page) -> ast.Module:
    path = HERE / f"test_{page.path.stem}.py"
    assert path.exists(), f"the page has no tests: {path.name}"
    return ast.parse(path.read_text(encoding="utf-8"))


def assigned(module: ast.Module, name: str) -> ast.expr:
    """The value that a test file gives to ``name`` at its top level."""
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert node.value is not None
            return node.value
    raise AssertionError(f"the tests of the page have no {name}")


@every_page
def test_the_contract_names_what_the_page_builds_and_the_library_has(page: Page) -> None:
    built = {name for cell in page.tagged("build") for name in names_bound(cell.source)}
    for local, dotted in page.front["contract"].items():
        assert local in built, f"no build cell defines {local}"
        assert dotted.startswith("minisft.")
        assert resolve(dotted) is not None


def names_bound(source: str) -> set[str]:
    targets = [target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets]
    return {*function_names(source), *(target.id for target in targets if isinstance(target, ast.Name))}


@every_page
def test_every_contract_has_its_test(page: Page) -> None:
    defined = {node.name for node in page_tests(page).body if isinstance(node, ast.FunctionDef)}
    for local in page.front["contract"]:
        assert {f"test_{local}_equals_the_library", f"agrees_{local}"} <= defined, f"{local} is not compared with the library"


@every_page
def test_every_page_is_tested_with_bugs_in_it(page: Page) -> None:
    mutants = assigned(page_tests(page), "MUTANTS")
    assert isinstance(mutants, ast.List), "MUTANTS is a list of (what, old, new)"
    assert len(mutants.elts) >= 4


# ---- exercises -------------------------------------------------------------------------------------------------------


@every_page
def test_exercises_are_triples(page: Page) -> None:
    cells = [cell for cell in page.cells if set(cell.tags) & {"exercise", "check", "solution"}]
    assert [cell.tags[0] for cell in cells] == ["exercise", "check", "solution"] * 2, "two exercises: stub, check, solution"
    for stub, check, solution in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
        names = [name for name in function_names(stub.source) if f"check_{name}" in function_names(check.source)]
        assert len(names) == 1, "the check of `name` is called `check_name`"
        assert names[0] in function_names(solution.source)
        graded = f"shared.grade(check_{names[0]}, {names[0]})"
        assert graded in check.source, f"the check cell ends with {graded}"
        assert graded in solution.source, f"the solution cell ends with {graded}"


@every_page_run
def test_solutions_pass_and_stubs_do_not(page: Page) -> None:
    if needs_interpreter(page):
        run_in_interpreter("test_solutions_pass_and_stubs_do_not", page)
        return
    exercises = page.exercises()
    for exercise in exercises:
        exercise.check(exercise.solution)
        with pytest.raises((AssertionError, NotImplementedError)):
            exercise.check(exercise.stub)
    said = [line for line in page.exercise_output.splitlines() if line.startswith(tuple(f"{e.name}: " for e in exercises))]
    verdicts = [line.split(": ")[1] for line in said]
    assert verdicts == ["not solved yet", "right"] * len(exercises)


@every_page
def test_every_exercise_has_a_wrong_answer(page: Page) -> None:
    wrong = assigned(page_tests(page), "WRONG")
    assert isinstance(wrong, ast.Dict), "WRONG maps the name of an exercise to [(wrong function, word of the hint)]"
    named = {key.value: value for key, value in zip(wrong.keys, wrong.values, strict=True) if isinstance(key, ast.Constant)}
    stubs = [name for cell in page.tagged("exercise") for name in function_names(cell.source)]
    checks = [name for cell in page.tagged("check") for name in function_names(cell.source)]
    for name in stubs:
        if f"check_{name}" in checks:
            assert name in named, f"no wrong answer of {name} is tested"
            assert isinstance(named[name], ast.List)
            assert named[name].elts


def needs_interpreter(page: Page) -> bool:
    return page.uses_triton and os.environ.get("TRITON_INTERPRET") != "1"


def run_in_interpreter(test: str, page: Page) -> None:
    """Whether Triton interprets or compiles is settled for a whole process: this page's test gets its own."""
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", f"{__file__}::{test}[{page!r}]", "-p", "no:cacheprovider", "-p", "no:xdist"]
    child = subprocess.run(
        command, env={**kept, "TRITON_INTERPRET": "1"}, cwd=HERE, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert "1 passed" in child.stdout


# ---- prose, numbers, references --------------------------------------------------------------------------------------


@every_page
def test_no_measured_number_stands_in_prose(page: Page) -> None:
    for heading, cells in sections(page).items():
        if heading in ("By hand: 3 x 4", "References"):
            continue
        prose = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
        found = bare_numbers(prose)
        assert not found, f"under {heading!r}: {found}; let a cell say it with shared.say, or write it as code or maths"


@every_page
def test_references_are_known_and_listed(page: Page) -> None:
    listed = "\n".join(cell.source for cell in sections(page)["References"])
    assert page.front["refs"], "a page leans on somebody's work"
    for key in page.front["refs"]:
        assert key in references(), f"refs.toml has no {key}"
        arxiv = references()[key].get("arxiv", references()[key].get("url"))
        assert arxiv in listed, f"{key} ({arxiv}) is not listed under References"
    known = {references()[key].get("arxiv") for key in page.front["refs"]}
    assert set(ARXIV.findall(page.markdown)) <= known, "an arXiv id of the page is not among its refs"


@every_page
def test_figures_of_papers_come_from_refs(page: Page) -> None:
    for node in trees(page):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "shared.paper":
            key, name = (ast.literal_eval(argument) for argument in node.args)
            assert key in page.front["refs"], f"{key} is quoted but not among the refs"
            assert name in references()[key]["figures"], f"refs.toml has no figure {name} of {key}"


def test_refs_are_well_formed() -> None:
    for key, reference in references().items():
        assert {"title", "authors", "year", "verified"} <= reference.keys(), key
        assert reference.keys() <= {"title", "authors", "year", "arxiv", "url", "verified", "figures"}, key
        assert isinstance(reference["year"], int), key
        assert str(reference["year"]) in key, f"{key} carries another year than {reference['year']}"
        assert ARXIV.fullmatch(reference["arxiv"]) if "arxiv" in reference else reference["url"].startswith("https://"), key
        for name, figure in reference.get("figures", {}).items():
            assert figure.keys() == {"value", "where"}, f"{key}.{name}"


@every_page
def test_links_resolve(page: Page) -> None:
    assert broken_links(page.markdown, TUTORIALS) == []


# ---- notebooks -------------------------------------------------------------------------------------------------------


@every_page
def test_the_notebook_is_what_the_source_gives(page: Page) -> None:
    found = builder.differences(notebook_of(page), builder.read_source(page.path))
    assert not found, f"{page.path.stem}.ipynb is out of date, run make tutorials: {found}"


@every_page
def test_the_notebook_says_how_long_the_page_took(page: Page) -> None:
    seconds = builder.seconds_of(notebook_of(page))
    assert seconds is not None
    assert seconds <= builder.read_source(page.path).limit_s


def test_all_pages_together_are_quick() -> None:
    taken = [builder.seconds_of(notebook_of(page)) or 0 for page in ALL]
    assert sum(taken) <= builder.TOTAL_LIMIT_S


@every_page
def test_the_notebook_can_be_shown_everywhere(page: Page) -> None:
    notebook = notebook_of(page)
    nbformat.validate(notebook)
    assert page.path.with_suffix(".ipynb").stat().st_size < LARGEST_NOTEBOOK
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert "execution" not in cell.metadata, "no time stamps"
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not builder.ABSOLUTE_PATH.search(str(output.get("text", "")) + str(output.get("data", "")))


@every_page
def test_every_picture_has_a_caption_and_words_for_who_cannot_see_it(page: Page) -> None:
    outputs = [output for cell in notebook_of(page).cells for output in cell.get("outputs", [])]
    html = [text for output in outputs if "<img" in (text := output.get("data", {}).get("text/html", ""))]
    assert len(html) >= 2, "a page has a picture early and a plot of its run"
    for text in html:
        words = re.search(r'alt="([^"]+)"', text)
        assert words is not None
        assert len(words[1].split()) >= 6, f"say what the picture shows: {words[1]!r}"
        assert f"<figcaption>{words[1]}</figcaption>" in text
    assert not [output for output in outputs if "image/png" in output.get("data", {})], "show pictures with shared.show"


# ---- plain runs ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive  # .ci/run and make tutorials run every page as well
@pytest.mark.parametrize("page", PLAIN, ids=repr)
def test_pages_without_a_pretrained_model_run_as_scripts(page: Page, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "MPL"))}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(page.path)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stderr == ""
    assert not builder.ABSOLUTE_PATH.search(run.stdout)
    assert run.stdout.count(": not solved yet: ") == run.stdout.count(": right\n") == 2
    drawn = re.findall(r"^figure (tutorials/figures/\S+): ", run.stdout, re.MULTILINE)
    assert len(set(drawn)) == len(drawn) >= 2, "every picture of a page has a name of its own"
    assert all((pages.ROOT / name).stat().st_size > 1000 for name in drawn)
    assert not list(tmp_path.iterdir()), "a page leaves nothing in the folder it is run from"


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme_lists_the_pages() -> None:
    readme = (TUTORIALS / "README.md").read_text(encoding="utf-8")
    assert builder.table(TUTORIALS) in readme, "run python tutorials/build.py: it writes the table"
    assert broken_links(readme, TUTORIALS) == []


def test_these_pages_exist() -> None:
    assert tuple(path.stem[:2] for path in sources()) == NUMBERS
