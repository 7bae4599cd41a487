"""The list of known bugs fits the code. ``mutants.py`` plants them, which takes minutes; this looks at the list alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import mutants
import pytest
from forking import OTHER_PACKAGE
from mutants import ROOT, Mutant, Runners

MUTANTS = {mutant.name: mutant for mutant in mutants.read_mutants()}
FOUR_BITS = ("minisft/nf4", "minisft/kernels/")


@cache
def cases_of(path: Path) -> dict[str, bool]:
    """The test functions and classes of a file, and whether each has parameters, of its own or by a name given to them."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    named = {
        ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign) and "parametrize" in ast.unparse(node)
    }
    return {
        node.name: any("parametrize" in (text := ast.unparse(each)) or text in named for each in node.decorator_list)
        for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fits_the_code_and_names_a_test(mutant: Mutant) -> None:
    found = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    assert found == 1, f"{mutant.file} holds {mutant.old!r} {found} times: change tests/mutants.toml with it"
    assert mutant.new != mutant.old
    file, _, test = mutant.test.partition("::")
    name, parameters, _ = test.partition("[")
    has_parameters = cases_of(ROOT / file)[name]
    assert has_parameters or not parameters


def test_no_bug_is_listed_twice_and_at_least_fifteen_are_about_four_bits() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS.values()}) == len(MUTANTS)
    assert sum(mutant.file.startswith(FOUR_BITS) for mutant in MUTANTS.values()) >= 15


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (1, "FAILED tests/test_x.py::test_y[a - b] - assert 1 == 2\n1 failed in 0.1s\n", "killed"),
        (None, "", "hung"),
        (0, "1 passed in 0.1s\n", "SURVIVED"),
        (1, "ERROR tests/test_x.py::test_y - a fixture\n1 error in 0.1s\n", "BROKEN"),
        (2, "ERROR tests/test_x.py\n1 error in 0.1s\n", "BROKEN"),
        (4, "ERROR: not found: tests/test_x.py::test_z\n", "BROKEN"),
        (5, "no tests ran in 0.1s\n", "BROKEN"),
        (OTHER_PACKAGE, "", "BROKEN"),
        (-11, "", "BROKEN"),
    ],
)
def test_only_a_test_that_ran_and_failed_kills(status: int | None, output: str, verdict: str) -> None:
    assert mutants.judge(status, output)[0] == verdict


def test_a_text_that_is_not_there_or_there_twice_is_not_planted(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("one = 1\ntwo = 1 + 1\n")
    mutant = Mutant("m", "code.py", "two = 1", "two = 2", "t", "w")
    for old in ("three", "1"):
        with pytest.raises(ValueError, match=r"code\.py"):
            replace(mutant, old=old).plant(tmp_path)
    mutant.plant(tmp_path)
    assert (tmp_path / "code.py").read_text() == "one = 1\ntwo = 2 + 1\n"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no-such-bug"):
        mutants.chosen_mutants(["no-such-bug"])


@pytest.fixture(scope="module")
def runners() -> Iterator[Runners]:
    with Runners(1, ["torch"]) as started:
        yield started


@pytest.fixture(scope="module")
def clean() -> Iterator[Path]:
    with mutants.compiled_copy() as copy:
        yield copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "limit_s", "verdict"),
    [
        ("return peak * (step - 1) / warmup_steps", 60.0, "killed"),
        ("return peak * step / (1 + warmup_steps)", 60.0, "SURVIVED"),
        ("return peak * step / (warmup_steps + 1) + 0 * sum(1 for _ in iter(int, 1))", 4.0, "hung"),
        ("return peak * step / (warmup_steps - 1)", 60.0, "killed"),  # after one that hung, too
    ],
)
def test_a_planted_bug_gets_its_verdict(
    monkeypatch: pytest.MonkeyPatch, runners: Runners, clean: Path, new: str, limit_s: float, verdict: str
) -> None:
    monkeypatch.setattr(mutants, "MUTANT_LIMIT_S", limit_s)
    mutant = MUTANTS["schedule-first-step-at-zero"]
    outcome = mutants.try_mutant(replace(mutant, new=new), clean, runners)
    assert outcome.verdict == verdict, outcome.reason
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1  # the working tree is never touched


@pytest.mark.slow
def test_a_child_that_would_import_another_package_is_refused(tmp_path: Path, runners: Runners) -> None:
    status, _ = runners.run(tmp_path, ["tests/test_schedule.py"], 60.0)
    assert status == OTHER_PACKAGE
