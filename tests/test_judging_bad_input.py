"""Bad input of the judging commands through the real command line: one clear line, the right status, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rows_files import task_data, task_rows, write_jsonl, write_scored

from minisft.cli.main import main

GOOD = [float(i % 3 > 0) for i in range(40)]


class Desk:
    """A folder with good files, and the command line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.out = folder, capsys, folder / "out"
        self.a = write_scored(folder, "a", task_rows(GOOD), metric="exact_match")
        self.b = write_scored(folder, "b", task_rows(GOOD), metric="exact_match")
        self.data = write_jsonl(folder / "data.jsonl", task_data(40))

    def refused(self, status: int, code: str, *said: str, argv: list[object]) -> None:
        before = {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}
        self.capsys.readouterr()
        got = main([str(word) for word in argv])
        printed = self.capsys.readouterr().err.strip()
        assert (got, printed.partition("]")[0]) == (status, f"error[{code}"), printed
        assert len(printed.splitlines()) == 1
        assert all(c.isprintable() for c in printed)
        for part in said:
            assert part in printed, printed
        assert {p: p.read_bytes() for p in self.folder.rglob("*") if p.is_file()} == before
        assert not self.out.exists()

    def compare(self, *more: object, a: object = None, b: object = None) -> list[object]:
        return ["compare", a or self.a, b or self.b, "--out", self.out, *more]

    def units(self, *lines: str) -> Path:
        path = self.folder / "units.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def analyze(self, *lines: str, more: tuple[object, ...] = ("--design", "fixed", "--looks", 1)) -> list[object]:
        return ["ab", "analyze", "--data", self.units(*lines), "--out", self.out, *more]


@pytest.fixture
def desk(tmp_path, capsys):
    return Desk(tmp_path, capsys)


HEAD = "unit,variant,converted"
ARMS = [f"u{i},{'ab'[i % 2]},{i % 4 // 3}" for i in range(100)]


# --- compare


def test_two_files_with_different_rows_prompts_metrics_templates_or_decoding(desk):
    short = write_scored(desk.folder, "short", task_rows(GOOD[:-1]))
    desk.refused(3, "data/not-comparable", "row 40", "39 rows", argv=desk.compare(b=short))
    for key, value in (("metric", "f1"), ("form", "x/letters"), ("template_sha256", "00"), ("decoding", "sampled")):
        left = write_scored(desk.folder, "left", task_rows(GOOD), **{key: "other"})
        right = write_scored(desk.folder, "right", task_rows(GOOD), **{key: value})
        desk.refused(3, "data/not-comparable", key.split("_")[0], "fix:", argv=desk.compare(a=left, b=right))
    rows = [{**row, "tokens": i} for i, row in enumerate(task_rows(GOOD))]
    tokens = write_scored(desk.folder, "tokens", [{**row, "tokens": row["tokens"] + 1} for row in rows], metric="loss")
    loss = write_scored(desk.folder, "loss", rows, metric="loss")
    desk.refused(3, "data/not-comparable", "bits_per_byte", argv=desk.compare(a=loss, b=tokens))


@pytest.mark.slow
def test_duplicate_ids_bad_scores_and_files_that_are_none(desk):
    rows = task_rows(GOOD)
    twice = write_jsonl(desk.folder / "twice.rows.jsonl", [*rows, rows[3]])
    desk.refused(3, "data/duplicate-row", "twice.rows.jsonl:41", "row 4", argv=desk.compare(b=twice))
    for text, code in (
        ('{"row": 1, "score": NaN}', "data/bad-value"),
        ('{"row": 1, "score": "1"}', "data/no-score"),
        ('{"row": 1}', "data/no-score"),
        ('{"row": true, "score": 1}', "data/no-row-id"),
        ('{"score": 1}', "data/no-row-id"),
        ('{"row": 1, "score": 1, "prediction": 7}', "data/not-text"),
        ("", "data/no-rows"),
        ("[1]", "data/not-an-object"),
        ("{", "data/bad-json"),
    ):
        bad = desk.folder / "bad.rows.jsonl"
        bad.write_text(text + "\n" if text else "")
        desk.refused(3, code, argv=desk.compare(b=bad))
    desk.refused(3, "data/no-file", argv=desk.compare(b=desk.folder / "none.rows.jsonl"))
    (desk.folder / "a.json").write_text("[")
    desk.refused(3, "data/bad-head", argv=desk.compare())


@pytest.mark.slow
def test_gates_data_and_outputs_of_compare(desk):
    desk.refused(2, "config/bad-gate", "did you mean 'task'", argv=desk.compare("--gate", "tsk>=0.1"))
    desk.refused(2, "config/bad-gate", argv=desk.compare("--gate", "task>=ten"))
    desk.refused(2, "config/gate-without-data", "--general", argv=desk.compare("--gate", "general>=-0.02"))
    desk.refused(2, "config/usage", argv=desk.compare("--margin", "-1"))
    desk.refused(2, "config/no-column", argv=desk.compare("--cluster", "document"))
    other = write_jsonl(desk.folder / "other.jsonl", task_data(39))
    desk.refused(3, "data/other-data", "row 40", argv=desk.compare("--data", other))
    wrong = task_data(40)
    wrong[4]["messages"][1]["content"] = "changed\x1b[2J"
    desk.refused(3, "data/other-data", "row 5", argv=desk.compare("--data", write_jsonl(other, wrong)))
    (desk.folder / "biz.json").write_text('{"headline": {"estimate": 1}}')
    desk.refused(3, "data/bad-business", argv=desk.compare("--business", desk.folder / "biz.json"))


def test_a_report_is_never_written_over(desk):
    desk.out.mkdir()
    (desk.out / "mine.txt").write_text("mine")
    assert main([str(w) for w in desk.compare()]) == 2
    assert "config/out-exists" in desk.capsys.readouterr().err
    assert [p.name for p in desk.out.iterdir()] == ["mine.txt"]


# --- ab


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        ([HEAD], "data/no-rows", "0 rows"),
        ([HEAD, *(f"{i},a,0" for i in range(9))], "data/variants", "1: a"),
        ([HEAD, *(f"{i},v{i % 11},0" for i in range(99))], "data/variants", "11"),
        ([HEAD, *ARMS, "u0,b,1"], "data/unit-in-two-arms", "u0: a, b"),
        ([HEAD, *ARMS, "x,a,2"], "data/not-converted", "units.csv:102"),
        ([HEAD, *ARMS, "x,a,"], "data/not-converted", "0 or 1"),
        ([HEAD, *ARMS, "x,,1"], "data/empty-cell", "variant"),
        ([HEAD, *ARMS, "x,a"], "data/ragged-row", "2 cells"),
        (["user,variant,converted", *ARMS], "data/no-column", "unit"),
        (["unit,variant,convert", *ARMS], "data/no-column", "did you mean 'convert'"),
        ([f"{HEAD},value", *(f"{line},nan" for line in ARMS)], "data/not-a-number", "value"),
        ([f"{HEAD},value", *(f"{line},=cmd|'/C calc'!A0" for line in ARMS)], "data/not-a-number", "=cmd"),
        ([HEAD, *ARMS, f"{'x' * 10_001},a,1"], "data/large-cell", "10001 characters"),
        ([HEAD, *ARMS, f"{'x' * 200_000},a,1"], "data/bad-csv", "field larger"),
        ([HEAD, *ARMS, '"x,a,1'], "data/bad-csv", "units.csv"),
        ([HEAD, *(f"{i},{'a' if i % 10 else 'b'},0" for i in range(500))], "data/sample-ratio-mismatch", "a 450, b 50"),
        ([HEAD, "1,a,0", "2,a,0", "3,a,0", "4,b,0"], "data/empty-arm", "at least 2"),
        ([HEAD, *ARMS, "\x1b[2J,\x07,1"], "data/no-such", ""),
    ],
)
def test_units_that_cannot_be_judged(desk, lines, code, said):
    if code == "data/no-such":  # a third variant with a control character: three arms, shown harmlessly
        desk.refused(3, "data/sample-ratio-mismatch", "\\x07", argv=desk.analyze(*lines))
        return
    desk.refused(3, code, said, argv=desk.analyze(*lines))


@pytest.mark.slow
def test_designs_that_are_refused(desk):
    timed = [f"{line},{i}" for i, line in enumerate(ARMS)]
    sequential = ("--design", "sequential", "--tau", 0.1)
    backwards = [*timed, "late,a,1,5"]
    desk.refused(3, "data/out-of-order", "5 after 99", argv=desk.analyze(f"{HEAD},time", *backwards, more=sequential))
    desk.refused(3, "data/no-time", argv=desk.analyze(HEAD, *ARMS, more=sequential))
    desk.refused(2, "config/peeked", "20 looks", argv=desk.analyze(HEAD, *ARMS, more=("--design", "fixed", "--looks", 20)))
    desk.refused(2, "config/no-looks", argv=desk.analyze(HEAD, *ARMS, more=("--design", "fixed")))
    desk.refused(2, "config/no-design", argv=desk.analyze(HEAD, *ARMS, more=()))
    desk.refused(2, "config/no-tau", argv=desk.analyze(f"{HEAD},time", *timed, more=("--design", "sequential")))
    desk.refused(2, "config/usage", argv=desk.analyze(HEAD, *ARMS, more=("--design", "sequential", "--tau", "0")))
    desk.refused(
        2, "config/no-variant", argv=desk.analyze(HEAD, *ARMS, more=("--design", "fixed", "--looks", 1, "--control", "c"))
    )
    rail = ("--design", "fixed", "--looks", 1, "--guardrail")
    desk.refused(3, "data/no-column", "latency", argv=desk.analyze(HEAD, *ARMS, more=(*rail, "latency<=1")))
    desk.refused(2, "config/bad-guardrail", argv=desk.analyze(HEAD, *ARMS, more=(*rail, "latency<1")))
    desk.refused(2, "config/no-column", "value", argv=desk.analyze(HEAD, *ARMS, more=(*rail, "value<=1")))


@pytest.mark.parametrize(
    "more",
    [
        ("--baseline", 0.1, "--effect", "10%"),
        ("--baseline", 0, "--effect", "0.1"),
        ("--baseline", 0.95, "--effect", "0.1"),
        ("--baseline", 0.1, "--effect", "0"),
        ("--baseline", 0.1, "--effect", "0.1", "--power", 1),
        ("--baseline", 0.1, "--effect", "0.1", "--traffic", 0),
        ("--baseline", "nan", "--effect", "0.1"),
    ],
)
def test_plans_that_cannot_be(desk, more):
    desk.refused(2, "config/bad-value", argv=["ab", "plan", *more, "--out", desk.out])


@pytest.mark.parametrize(
    "change",
    [
        {"baseline": "0.1"},
        {"alpha": 0},
        {"alpha": 7},
        {"alpha": True},
        {"tau": 0},
        {"units_per_arm": 0},
        {"design": "peeking"},
        {"design": ["fixed"]},
        {"analyses": {}},
        {"analyses": [1]},
        {"surplus": 1},
    ],
)
def test_a_plan_that_was_changed_by_hand(desk, change):
    plan = desk.folder / "plan.json"
    assert main(["ab", "plan", "--baseline", "0.1", "--effect", "0.4", "--out", str(plan)]) == 0
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **change}))
    desk.refused(3, "data/bad-plan", argv=desk.analyze(HEAD, *ARMS, more=("--plan", plan)))
    plan.write_text('{"baseline": 1}')
    desk.refused(3, "data/bad-plan", argv=desk.analyze(HEAD, *ARMS, more=("--plan", plan)))


# --- feedback and arena


def test_feedback_that_cannot_be_read(desk):
    row = {"id": 1, "prompt": "q", "response": "a", "thumb": "up"}
    good = write_jsonl(desk.folder / "thumbs.jsonl", [row])
    command = ["feedback", "--out", desk.out, "--in"]
    desk.refused(3, "data/no-file", argv=[*command, desk.folder / "none.jsonl"])
    desk.refused(
        3, "data/bad-thumb", "sideways", argv=[*command, write_jsonl(desk.folder / "x.jsonl", [{**row, "thumb": "sideways"}])]
    )
    (desk.folder / "guard").write_text("nothing of the kind\n")
    desk.refused(3, "data/bad-hash", argv=[*command, good, "--trained", desk.folder / "guard"])
    (desk.folder / "votes.sqlite").write_bytes(b"SQLite format 3\0" + b"broken" * 100)
    desk.refused(3, "data/bad-votes", argv=[*command, desk.folder / "votes.sqlite"])


def test_an_arena_that_cannot_start(desk):
    pytest.importorskip("starlette")
    prompts = write_jsonl(desk.folder / "prompts.jsonl", [{"prompt": "hello"}])

    def arena(*more: object, file: object = prompts, a: object = "none") -> list[object]:
        return ["arena", "--a", a, "--b", "none", "--prompts", file, "--out", desk.out, *more]

    desk.refused(3, "data/no-file", argv=arena(file=desk.folder / "no.jsonl"))
    desk.refused(3, "data/no-prompt", argv=arena(file=write_jsonl(desk.folder / "e.jsonl", [{"prompt": " "}])))
    desk.refused(2, "config/bad-value", "--port", argv=arena("--port", 0))
    desk.refused(2, "config/no-token", "--token", argv=arena("--host", "0.0.0.0"))
    desk.refused(2, "config/short-token", argv=arena("--host", "0.0.0.0", "--token", "abc"))
    desk.refused(2, "config/bad-model", argv=arena(a="+adapter"))


def test_eval_with_a_suite_and_metrics_at_once(desk):
    words = ["eval", "--model", "none", "--out", desk.folder / "r.json"]
    desk.refused(2, "config/usage", "--data", argv=words)
    desk.refused(2, "config/usage", "--metric", argv=[*words, "--data", desk.data])
    desk.refused(2, "config/usage", "--metric", argv=[*words, "--suite", "general", "--metric", "f1"])
    desk.refused(2, "config/usage", argv=[*words, "--data", desk.data, "--metric", "bluff"])
    desk.refused(3, "data/bad-question", argv=[*words, "--suite", "general", "--mmlu", desk.data])


@pytest.mark.slow
def test_the_installed_command_gives_the_verdicts_exit_status(desk):
    command = [sys.executable, "-m", "minisft", *map(str, desk.compare("--gate", "task>=0.5"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 8, result.stderr
    assert result.stdout.splitlines()[0].startswith("task.exact_match: 40 rows; a true difference")
    assert json.loads((desk.out / "compare.json").read_text())["verdict"] == "HOLD"
    shutil.rmtree(desk.out)
