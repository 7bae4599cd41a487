"""What the lines of the scorecard share: targets that can be missed, and tests run as measurements with counted examples."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
Measured = Mapping[str, object]
COMPARE: dict[str, Callable[[float, float], bool]] = {"==": operator.eq, "<=": operator.le, ">=": operator.ge}
CHECK = re.compile(r"(?P<name>[\w ()/%-]+?) (?P<sign>==|<=|>=) (?P<limit>-?[\d.]+(?:e-?\d+)?)")


def use_tests() -> None:
    """Let the tests' own helpers be imported, as pytest does."""
    for folder in (ROOT, TESTS / "equivalence", TESTS):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Check:
    """One comparison of a target: a number called ``name``, and what it has to be."""

    name: str
    sign: str
    limit: float

    @classmethod
    def of(cls, text: str) -> Check:
        """From text such as ``lost == 0``. Raises: ValueError: it is no comparison."""
        found = CHECK.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no comparison of a name with a number")
        return cls(found["name"], found["sign"], float(found["limit"]))

    def problem(self, measured: Measured) -> str | None:
        """None when it holds; a number that is not there holds nothing."""
        value = measured.get(self.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{self.name}: not measured"
        return None if COMPARE[self.sign](value, self.limit) else f"{self.name}: {value:g} is not {self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Line:
    """One line: what is tested, the target in words and as checks, what peers do, and how it is measured.

    ``measure(quick)`` returns numbers by name; ``says`` makes the table's words of them. A measurement that cannot be done on
    this machine returns ``{"absent": why}``. At reduced size only the checks that do not count examples are asked.
    """

    number: int
    test: str
    target: str
    checks: tuple[str, ...]
    says: str
    measure: Callable[[bool], dict[str, object]]
    seconds: float  # about how long it takes, to start the long ones first
    peers: str = "not measured"
    sizes: tuple[str, ...] = field(default=())  # checks that hold at full size only


def verdict(line: Line, measured: Measured) -> list[str]:
    """What the line missed; empty when it met its target."""
    if "error" in measured:
        return [f"it ended without an answer: {measured['error']}"]
    asked = line.checks if measured.get("quick") else (*line.checks, *line.sizes)
    problems = [Check.of(text).problem(measured) for text in asked]
    failures = measured.get("failures", [])
    assert isinstance(failures, list)
    return [problem for problem in problems if problem] + [str(failure) for failure in failures]


def in_words(form: str, measured: Measured) -> str:
    """The words of the table with the numbers in them; what is missing from ``measured`` shows as a question mark."""
    numbers = {name: _Count(value) if isinstance(value, int) else value for name, value in measured.items()}
    return form.format_map(_Known(numbers))


class _Count(int):
    def __format__(self, form: str) -> str:
        return format(int(self), form or ",")


class _Unknown:
    def __format__(self, form: str) -> str:
        return "?"


class _Known(dict[str, object]):
    def __missing__(self, key: str) -> object:
        return _Unknown()


# ---- tests as measurements ---------------------------------------------------------------------------------------------

EXAMPLES = re.compile(r"during generate phase.*?(\d+) passing(?: examples)?, (\d+) failing", re.S)


@dataclass(frozen=True)
class Tests:
    """What a run of pytest came to. ``properties`` are the numbers that the tests noted of themselves, summed by name."""

    passed: int
    failed: int
    skipped: int
    examples: int  # drawn by Hypothesis and passed; those that an assumption ruled out are not counted
    properties: dict[str, float]
    noted: tuple[tuple[str, float], ...]  # the same one by one
    names: tuple[str, ...]  # of the tests that passed
    failures: tuple[str, ...]

    def numbers(self, quick: bool) -> dict[str, object]:
        """As the answer of a line."""
        counts = {"tests": self.passed, "failed": self.failed, "skipped": self.skipped, "examples": self.examples}
        return {**counts, **self.properties, "failures": list(self.failures), "quick": quick}

    def most(self, name: str) -> float | None:
        """The largest of the numbers that tests noted under ``name``."""
        return max((value for noted, value in self.noted if noted == name), default=None)


def run_tests(
    selected: Sequence[str], keyword: str = "", examples: int = 50, environment: Mapping[str, str] | None = None
) -> Tests:
    """Run tests in a process of its own and count what they did.

    Args:
        selected: files or node ids, relative to ``tests``.
        keyword: pytest's ``-k``.
        examples: how many each property test draws.
        environment: variables beyond ours.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    kept |= {"PYTHONPATH": str(ROOT), "MINISFT_HYPOTHESIS": "counted", "MINISFT_EXAMPLES": str(examples)}
    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as folder:
        report = Path(folder, "junit.xml")
        command = [
            sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-o",
            "addopts=",
            "-q", "--hypothesis-show-statistics", f"--junitxml={report}", f"--basetemp={folder}/tmp",
            *(["-k", keyword] if keyword else []), *(str(TESTS / name) for name in selected),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env=kept | dict(environment or {}), capture_output=True, text=True, errors="replace", check=False
        )
        if not report.exists():
            return Tests(
                0, 1, 0, 0, {}, (), (), (f"pytest ended with {done.returncode}: {done.stdout[-1000:]}{done.stderr[-500:]}",)
            )
        return _counted(ElementTree.parse(report).getroot(), done.stdout, done.returncode)


def _counted(root: ElementTree.Element, printed: str, status: int) -> Tests:
    noted: list[tuple[str, float]] = []
    passed: list[str] = []
    failures: list[str] = []
    skipped = 0
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is not None:
            failures.append(f"{name}: {(problem.get('message') or '')[:300]}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed.append(name)
        for each in case.iter("property"):
            noted.append((each.get("name", ""), float(each.get("value", "nan"))))
    if status not in (0, 1) or not (passed or failures):
        failures.append(f"pytest ended with {status}: {printed[-500:]}")
    examples = sum(int(good) for good, _ in EXAMPLES.findall(printed))
    totals: defaultdict[str, float] = defaultdict(float)
    for name, value in noted:
        totals[name] += value
    whole = {name: int(value) if value.is_integer() else value for name, value in totals.items()}
    return Tests(len(passed), len(failures), skipped, examples, whole, tuple(noted), tuple(passed), tuple(failures))
