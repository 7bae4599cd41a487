"""README.md, CONTRIBUTING.md and docs/ say what is there: map, line counts, results, links, commands and examples."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import readme_map
from readme_map import CONTRIBUTING, PARTS, README, ROOT, WHAT
from test_architecture import FLAT, FRONT, PACKAGE
from tiny_folder import write_model, write_rows

from minisft.cli.flags import parse

MAX_LINES = 160
GUIDES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = (README, CONTRIBUTING, ROOT / "tests" / "README.md", ROOT / "benchmarks" / "README.md", *GUIDES)


def blocks(language: str) -> list[str]:
    """README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)


def test_readme_is_short() -> None:
    assert README.read_text(encoding="utf-8").count("\n") <= MAX_LINES


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, parts in PARTS.items() for name in parts])
def test_what_is_written_from_the_files_is_up_to_date(path: Path, name: str) -> None:
    said, true = readme_map.current(path, name), PARTS[path][name]()
    assert readme_map.agrees(said, true), "python tests/readme_map.py --write"


def test_the_map_is_the_tree() -> None:
    """By another road: the folders and flat files as the disk has them, and the names that README links."""
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    text = readme_map.current(README, "reading list") + readme_map.current(README, "tree")
    linked = re.findall(r"\]\(minisft/([\w.]+)\)", text)
    assert sorted(linked) == sorted(there)
    assert [name for name in linked if name.removesuffix(".py") in FLAT] == [f"{name}.py" for name in FLAT]
    assert set(WHAT) == {name.removesuffix(".py") for name in there}
    assert set(FLAT).isdisjoint(FRONT)


def test_counts_of_lines_are_the_files() -> None:
    rows = re.findall(r"\]\(minisft/(\w+\.py)\) \| ([\d,]+) \|", readme_map.current(README, "reading list"))
    for name, said in rows:
        true = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - true) <= max(20, true // 10), f"{name}: python tests/readme_map.py --write"


def test_the_comparison_can_fail() -> None:
    row = "| [a.py](minisft/a.py) | {} | {} |"
    assert readme_map.agrees(row.format(300, "x"), row.format(330, "x"))
    assert not readme_map.agrees(row.format(300, "x"), row.format(350, "x"))
    assert not readme_map.agrees(row.format(300, "x"), row.format(300, "y"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.parametrize(
    ("document", "least"), [(README, 4), *((path, 2) for path in GUIDES)], ids=lambda v: getattr(v, "name", "")
)
def test_every_command_parses(document: Path, least: int) -> None:
    """Whole lines of code, fenced or indented by four spaces, that begin with ``minisft``."""
    lines = re.findall(r"^(?: {4})?(minisft .*)$", document.read_text(encoding="utf-8"), re.M)
    assert len(lines) >= least
    for line in lines:
        parse(shlex.split(line, comments=True)[1:])


@pytest.mark.slow
def test_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block, in order, in one session, with a tiny model in the place of the pretrained one."""
    write_model(tmp_path / "model", tmp_path / "scratch")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))
    assert code.count('"smollm2-135m-instruct"') == 2
    session: dict[str, object] = {}
    exec(code.replace('"smollm2-135m-instruct"', '"model"'), session)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d: loss ([\d.]+)$", printed, re.M)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5
    assert 0.99 < float(re.search(r"survival ([\d.]+):", printed)[1]) < 1.01  # type: ignore[index]
    assert (tmp_path / "runs/a/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "merged/model.safetensors").is_file()
