"""The scorecard's machinery: a target can be missed, what is not measured is a miss, the table is the results file."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import mutants
import scorecard
import scorecard_fuzz
import scorecard_lines
import scorecard_mutants
import scorecard_parts
from scorecard_lines import MUTANTS, bad_inputs_of
from scorecard_parts import Check, Line, in_words, run_tests, verdict

from minisft.common.errors import UserError

GOOD = {"lost": 0, "kills": 1000}
LINE = Line(
    3,
    "kills",
    "0 lost",
    ("lost == 0",),
    "{kills} kills, {lost} lost, {spread:.2f} s",
    lambda quick: {},
    1.0,
    sizes=("kills >= 1000",),
)


def test_there_are_eighteen_lines_and_every_target_is_a_comparison() -> None:
    assert [line.number for line in scorecard.LINES] == list(range(1, 19))
    for line in scorecard.LINES:
        checks = [Check.of(text) for text in (*line.checks, *line.sizes)]
        assert checks, line.number
        assert len(verdict(line, {})) == len(checks)  # nothing measured: every one of them is missed
        nothing = {check.name: 0 for check in checks}  # no test ran, no file was read: nothing went wrong either
        assert verdict(line, nothing), line.number
        assert verdict(line, nothing | {"quick": True}), line.number


@pytest.mark.parametrize(
    ("text", "holds", "fails"),
    [
        ("lost == 0", 0, 1),
        ("grown MiB <= 64", 64, 64.1),
        ("control % >= 30", 30, 29.9),
        ("off <= 1e-12", 1e-12, 2e-12),
        ("a >= -1", -1, -2),
    ],
)
def test_a_comparison(text: str, holds: float, fails: float) -> None:
    check = Check.of(text)
    assert check.problem({check.name: holds}) is None
    for wrong in (fails, None, "0", float("nan"), True):
        assert check.problem({check.name: wrong})
    assert check.problem({})


@pytest.mark.parametrize("text", ["lost", "lost = 0", "== 0", "lost == none", ""])
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no comparison"):
        Check.of(text)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, 0),
        ({"lost": 1}, 1),
        ({"kills": 999}, 1),
        ({"kills": 10, "quick": True}, 0),
        ({"lost": 2, "quick": True}, 1),
        ({"failures": ["a test", "another"]}, 2),
        ({"error": "Traceback"}, 1),
    ],
)
def test_a_planted_failure_makes_a_line_red(change: dict[str, object], missed: int) -> None:
    entry = scorecard.result_of(LINE, {**GOOD, **change}, 1.0, quick=bool(change.get("quick")))
    assert len(entry["missed"]) == missed
    assert entry["verdict"] == ("missed" if missed else "met")
    said = scorecard.told(3, entry)
    assert ("missed: " in said) == bool(missed)
    assert said.splitlines()[0].endswith("target: 0 lost")
    assert entry["commit"]
    assert entry["versions"]["torch"]


def test_what_is_absent_is_said_and_is_neither_met_nor_missed() -> None:
    entry = scorecard.result_of(LINE, {"absent": "no GPU"}, 1.0, quick=False)
    assert (entry["verdict"], entry["found"], entry["missed"]) == ("not run here", "no GPU", [])
    assert in_words(LINE.says, {"kills": 1000}) == "1,000 kills, ? lost, ? s"


def test_an_absent_library_hides_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = scorecard_parts.Tests(1, 0, 1, 0, {}, (), (), ())
    failed = scorecard_parts.Tests(0, 1, 0, 0, {}, (), (), ("other ids",))
    monkeypatch.setattr(scorecard_lines, "run_tests", lambda files, keyword: skipped)
    assert "absent" in scorecard_lines.cross_tools(quick=False)
    monkeypatch.setattr(scorecard_lines, "run_tests", lambda files, keyword: failed if files == ["test_chat.py"] else skipped)
    assert scorecard_lines.cross_tools(quick=False)["failures"] == ["other ids"]


def test_every_keyword_chooses_tests_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def run(files: list[str], keyword: str = "", *_: object, **__: object) -> scorecard_parts.Tests:
        asked.append((files, keyword))
        return scorecard_parts.Tests(1, 0, 0, 0, {}, (), (), ())

    monkeypatch.setattr(scorecard_lines, "run_tests", run)
    for line in scorecard.LINES:
        if line.measure.__module__ == "scorecard_lines" and line.measure is not scorecard_lines.seeded_bugs:
            line.measure(False)
    assert len(asked) > 10
    for files, keyword in asked:
        texts = [(Path(__file__).parent / file.partition("::")[0]).read_text() for file in files]
        names = [name for text in texts for name in re.findall(r"def (test_\w+)", text)]
        assert all(name in names for name in (file.partition("::")[2] for file in files) if name)
        for word in (word.partition(" and not ")[0].strip() for word in keyword.split(" or ")):
            assert any(word in name for name in names), f"{files}: {word}"


def _measured_in_a_child(monkeypatch: pytest.MonkeyPatch, code: str) -> dict:
    real = subprocess.Popen
    monkeypatch.setattr(scorecard.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options))
    return scorecard.measure(LINE, quick=False)


@pytest.mark.slow
def test_the_last_answer_of_a_process_counts_and_a_death_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = f"print('step 1'); print('SCORECARD ' + {json.dumps(GOOD)!r})"
    assert _measured_in_a_child(monkeypatch, answer)["verdict"] == "met"
    monkeypatch.undo()
    died = _measured_in_a_child(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert died["verdict"] == "missed"
    assert "without an answer" in died["missed"][0]


def test_lines_are_kept_one_by_one_and_only_asked_for_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def measure(line: Line, quick: bool) -> dict:
        ran.append(line.number)
        return scorecard.result_of(line, {**GOOD, "lost": int(line.number == 2)}, 1.0, quick)

    monkeypatch.setattr(scorecard, "measure", measure)
    monkeypatch.setattr(scorecard, "LINES", tuple(replace(LINE, number=number) for number in (1, 2, 3)))
    out = ["--out", str(tmp_path)]
    assert scorecard.main([*out, "--lines", "1"]) == 0
    assert scorecard.main(out) == 1  # the first is there already; the second is missed
    assert sorted(ran) == [1, 2, 3]
    assert scorecard.main(out) == 1  # what was missed is tried again
    assert sorted(ran) == [1, 2, 2, 3]
    assert list(scorecard.read_results(tmp_path)) == ["1", "2", "3"]


def test_the_table_is_written_from_the_file_alone(tmp_path: Path) -> None:
    entry = scorecard.result_of(LINE, {**GOOD, "lost": 1, "spread": 2}, 1.0, quick=False) | {"found": "a | b"}
    scorecard.write_results(tmp_path, {"10": entry, "3": entry | {"verdict": "met", "quick": True}})
    page = tmp_path / "README.md"
    page.write_text(f"before\n{scorecard.START}old{scorecard.END}\nafter\n")
    scorecard.write_table(scorecard.read_results(tmp_path), page)
    rows = page.read_text().splitlines()
    assert rows[0] == "before"
    assert rows[-1] == "after"
    assert rows[4] == "| 3 | kills | 0 lost | a \\| b (reduced size) | not measured | `--lines 3` |"
    assert rows[5] == "| 10 | kills | 0 lost | **missed**: a \\| b | not measured | `--lines 10` |"


def test_the_published_table_is_that_of_the_published_file() -> None:
    text = scorecard.README.read_text(encoding="utf-8")
    _, _, rest = text.partition(scorecard.START)
    assert rest.partition(scorecard.END)[0] == scorecard.table(scorecard.read_results(scorecard.RESULTS))


def test_seeded_bugs_of_the_scorecard_are_forty_of_ours() -> None:
    assert len(set(MUTANTS)) == 40
    assert set(MUTANTS) <= {mutant.name for mutant in mutants.read_mutants()}


def test_bad_inputs_are_counted_by_the_names_of_their_tests() -> None:
    assert bad_inputs_of(("a::test_18_to_26_x[a]", "a::test_01_y", "b::test_4_bit", "b::test_99_z", "b::test_56_full")) == {
        1, *range(18, 27), 56,
    }  # fmt: skip


# ---- hostile files -----------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Callable[[random.Random, Path], None]:
    def read(draw: random.Random, into: Path) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("data/bad-json", "what"), "refused"),
        (UserError("data/bad-json", "a\x1b[2J"), "fault"),
        (KeyError("a"), "fault"),
        (RecursionError(), "fault"),
        (MemoryError(), "fault"),
        (type("PanicException", (BaseException,), {})("rust"), "fault"),
    ],
    ids=repr,
)
def test_only_a_coded_error_of_one_line_is_a_refusal(error: BaseException, kind: str, tmp_path: Path) -> None:
    assert scorecard_fuzz.judge(_raise(error), random.Random(0), tmp_path)[0] == kind
    assert scorecard_fuzz.judge(lambda draw, into: None, random.Random(0), tmp_path) == ("read", "")


@pytest.mark.slow
def test_a_reader_that_dies_hangs_or_takes_memory_is_a_fault_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmap
    import os
    import time

    def read(draw: random.Random, into: Path) -> None:
        what = draw.random()
        numbered = [random.Random(f"x/{n}").random() for n in range(6)]
        if what == numbered[1]:
            os._exit(3)
        if what == numbered[3]:
            time.sleep(60)
        if what == numbered[4]:
            mmap.mmap(-1, 2 * scorecard_fuzz.MEMORY_BYTES)  # new pages: malloc may hold freed ones of earlier tests

    monkeypatch.setattr(scorecard_fuzz, "HANG_S", 5.0)
    found = list(scorecard_fuzz.results("x", read, 6, tmp_path))
    assert [number for number, *_ in found] == list(range(6))
    assert [kind for _, kind, *_ in found] == ["read", "fault", "read", "fault", "fault", "read"]
    assert "Cannot allocate memory" in found[4][2]


def test_a_mutant_is_the_same_whenever_it_is_made_and_seldom_the_same_as_another() -> None:
    seeds = scorecard_fuzz.SEED_ROWS
    made = [scorecard_mutants.rows(random.Random(f"jsonl/{n}"), seeds) for n in range(200)]
    assert made == [scorecard_mutants.rows(random.Random(f"jsonl/{n}"), seeds) for n in range(200)]
    assert len(set(made)) > 150


# ---- tests as measurements -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_examples_failures_and_notes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conftest.py").write_text(
        "import os\nfrom hypothesis import settings\n"
        "settings.register_profile('counted', max_examples=int(os.environ['MINISFT_EXAMPLES']), derandomize=True,"
        " database=None)\n"
        "settings.load_profile(os.environ['MINISFT_HYPOTHESIS'])\n"
    )
    (tmp_path / "test_a.py").write_text(
        "import pytest\nfrom hypothesis import given, strategies as st\n"
        "@given(st.integers(0, 10**9))\ndef test_law(x): assert x >= 0\n"
        "def test_note(record_property): record_property('kills', 3)\n"
        "def test_more(record_property): record_property('kills', 4)\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_absent(): pytest.importorskip('no_such_library')\n"
    )
    monkeypatch.setattr("scorecard_parts.TESTS", tmp_path)
    found = run_tests(["test_a.py"], examples=37)
    assert (found.passed, found.failed, found.skipped, found.examples) == (3, 1, 1, 37)
    assert found.numbers(False)["kills"] == 7
    assert found.most("kills") == 4
    assert found.failures[0].startswith("test_a::test_wrong: ")
