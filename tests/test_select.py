"""``select`` through the real command line: what is picked, what is written, and every bad input with its one clear error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planted
import pytest
from tiny_folder import write_model

from minisft.cli.main import main

Json = dict[str, object]


class Desk:
    """A folder with a pool, a test file and a tiny model, and the command to run on them."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.pool, self.out = folder / "pool.jsonl", folder / "out" / "picked.jsonl"

    def write(self, rows: list[Json], name: str = "pool.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def run(self, *more: object) -> int:
        argv = ["select", "--data", self.pool, "--out", self.out, *more]
        return main([str(word) for word in argv])

    def select(self, *more: object) -> tuple[list[int], Json]:
        """The numbers of the picked rows, checked to be the pool's own lines in order, and the report."""
        assert self.run(*more) == 0
        lines, picked = self.pool.read_bytes().splitlines(keepends=True), self.out.read_bytes().splitlines(keepends=True)
        report = json.loads(self.out.with_name("picked.report.json").read_text())
        assert [lines[row - 1] for row in report["picked"]] == picked
        assert sorted([*report["picked"], *(drop["row"] for drop in report["dropped"])]) == list(range(1, len(lines) + 1))
        assert all(drop["reason"] for drop in report["dropped"])
        self.clear()
        return report["picked"], report

    def clear(self) -> None:
        for path in self.out.parent.iterdir():
            path.unlink()

    def refused(self, code: str, *said: str, argv: tuple[object, ...] = ()) -> None:
        """One line on standard error, the exit status of the family, and no file."""
        before = sorted(self.folder.rglob("*"))
        self.capsys.readouterr()
        status = self.run(*argv)
        printed = self.capsys.readouterr().err.strip().splitlines()[-1]
        assert printed.startswith(f"error[{code}]"), printed
        assert status == {"config": 2, "data": 3}[code.partition("/")[0]]
        assert "fix: " in printed
        for part in said:
            assert part in printed, printed
        assert [path for path in sorted(self.folder.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "model", folder / "scratch")


@pytest.fixture
def desk(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, model, capsys)


def rows(num_rows: int = 30, seed: int = 1) -> list[Json]:
    grammar = planted.Grammar(seed)
    return [{**grammar.row(), "quality": i % 7, "embedding": [float(i % 5), float(i % 3), float(i)]} for i in range(num_rows)]


# ---- what is picked ----


@pytest.mark.slow
def test_cleaning_drops_each_planted_fault_with_its_reason_and_partner(desk: Desk) -> None:
    pool, kinds, tests = planted.labelled(120, 6)
    desk.write(list(pool))
    against = desk.write(list(tests), "test.jsonl")
    flags = ("--drop-defects", "--dedup", "near", "--against", against)
    picked, report = desk.select(*flags)
    reasons = {drop["row"]: drop for drop in report["dropped"]}
    left = {kind: sum(kinds[row - 1] == kind for row in picked) for kind in planted.KINDS}
    assert left.pop("swapped") == left.pop("wrong label") == 6  # conflicts are never dropped
    assert left.pop("truncated") <= 1
    copies = ("copy", "near copy")  # either the copy or what it was made from is left
    assert not any(number for kind, number in left.items() if kind not in copies)
    assert sum("copy" in drop["reason"] for drop in reasons.values()) >= 11
    assert all(drop["partner"] for drop in reasons.values() if "copy" in drop["reason"])
    leaks = [drop for drop in reasons.values() if drop["reason"].startswith("test row")]
    assert len(leaks) == 12
    assert all(drop["partner"].startswith(str(against)) for drop in leaks)
    clean = [i for i, kind in enumerate(kinds, 1) if kind == "clean"]
    assert len(set(clean) - set(picked)) <= 0.05 * len(clean) + 12


@pytest.mark.slow
def test_what_is_picked_has_no_copy_left(desk: Desk) -> None:
    pool, _, _ = planted.labelled(80, 5)
    desk.write(list(pool))
    picked, _ = desk.select("--dedup", "near")
    desk.write([pool[row - 1] for row in picked])
    again, _ = desk.select("--dedup", "near")
    assert again == list(range(1, len(picked) + 1))


def test_the_best_scored_copy_stays(desk: Desk) -> None:
    grammar = planted.Grammar(3)
    a, b = grammar.row(), grammar.row()
    desk.write([{**a, "quality": 1}, {**b, "quality": 3}, {**a, "quality": 2}, {**b, "quality": 3}])
    picked, report = desk.select("--dedup", "exact", "--score", "column:quality")
    assert picked == [2, 3]
    assert [(drop["row"], drop["partner"]) for drop in report["dropped"]] == [(1, "3"), (4, "2")]


def test_the_highest_column_and_the_longest_answers(desk: Desk) -> None:
    desk.write(rows())
    picked, _ = desk.select("--score", "column:quality", "--rows", 8)
    assert picked == [6, 7, 13, 14, 20, 21, 27, 28]  # quality 6 four times, then the first four of quality 5
    lengths = [len(str(row["completion"]).split()) for row in rows()]
    picked, report = desk.select("--score", "length", "--rows", 10)
    assert sorted(lengths)[-10:] == sorted(lengths[row - 1] for row in picked)
    assert report["spearman_with_length"] == 1.0


def test_a_budget_of_tokens_is_kept(desk: Desk) -> None:
    desk.write(rows())
    picked, report = desk.select("--tokens", 400)
    sizes = {row["set"]: row for row in report["comparison"]}
    assert sizes["picked"]["tokens"] <= 400 < sizes["picked"]["tokens"] + 150
    assert len(picked) == sizes["picked"]["rows"] > 3
    assert {"picked", "random", "longest"} == set(sizes)


def test_a_seed_decides_the_random_rows(desk: Desk) -> None:
    desk.write(rows(60))
    draws = [desk.select("--rows", 20, "--seed", seed)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_row_keeps_its_random_score_when_others_go(desk: Desk) -> None:
    desk.write(rows(40))
    _, before = desk.select()
    desk.write(rows(40)[:25])
    _, after = desk.select()
    assert all(before["scores"][row] == score for row, score in after["scores"].items())


@pytest.mark.parametrize("way", ["greedy", "kcenter", "facility"])
def test_diverse_rows_cover_more_than_the_best_scored(desk: Desk, way: str) -> None:
    grammar = planted.Grammar(2)
    crowd = [{**grammar.row(), "quality": 9, "embedding": [1.0, 0.01 * i, 0.0, 0.0]} for i in range(20)]
    far = 9 * np.random.default_rng(0).normal(size=(20, 4))
    others = [{**grammar.row(), "quality": 1, "embedding": row.tolist()} for row in far]
    desk.write(crowd + others)
    flags = ["--score", "column:quality", "--rows", 8, "--embedding", "embedding", "--diverse", way]
    picked, report = desk.select(*flags)
    assert len(picked) == 8
    assert sum(row > 20 for row in picked) >= 2
    if way == "greedy":
        assert all(drop["partner"] for drop in report["dropped"] if drop["reason"].startswith("too near"))
        assert list(report["cosine_quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]


def test_equal_shares_of_short_and_long(desk: Desk) -> None:
    desk.write(rows(60))
    lengths = [len(str(row["completion"]).split()) for row in rows(60)]
    order = sorted(range(60), key=lambda i: lengths[i])
    picked, _ = desk.select("--score", "length", "--rows", 30, "--within-length-bins", 3)
    thirds = [sum(row - 1 in order[k : k + 20] for row in picked) for k in (0, 20, 40)]
    assert max(thirds) - min(thirds) <= 4  # rows of equal length at a border may lie on either side


def test_the_last_line_without_a_line_break(desk: Desk) -> None:
    desk.write(rows(3))
    desk.pool.write_bytes(desk.pool.read_bytes().rstrip(b"\n"))
    assert desk.run() == 0
    assert desk.out.read_bytes() == desk.pool.read_bytes() + b"\n"


def test_an_array_becomes_lines(desk: Desk) -> None:
    desk.pool = desk.folder / "pool.json"
    desk.pool.write_text(json.dumps(rows(5), indent=1))
    assert desk.run("--score", "column:quality", "--rows", 2) == 0
    assert [json.loads(line) for line in desk.out.read_text().splitlines()] == rows(5)[3:]


# ---- with a model ----


@pytest.mark.slow
def test_a_model_ranks_rows_and_its_scores_are_kept(desk: Desk) -> None:
    desk.write(rows(20))
    flags = ["--model", desk.model, "--score", "pmi", "--rows", 6]
    assert desk.run(*flags) == 0
    scores = desk.out.with_name("picked.scores.jsonl")
    table = {line["row"]: line for line in map(json.loads, scores.read_text().splitlines()[1:])}
    picked = json.loads(desk.out.with_name("picked.report.json").read_text())["picked"]
    best = sorted(table, key=lambda row: -table[row]["pmi"])[:6]
    assert sorted(best) == picked
    assert not list(desk.out.parent.glob("*.partial"))
    kept = scores.rename(desk.folder / "kept.jsonl")
    desk.clear()
    again, _ = desk.select(*flags, "--scores", kept)
    assert again == picked


@pytest.mark.slow
@pytest.mark.parametrize("score", ["ifd", "pmi", "loss"])
def test_the_batch_size_changes_no_pick(desk: Desk, score: str) -> None:
    desk.write(rows(24))
    flags = ["--model", desk.model, "--score", score, "--rows", 5, "--diverse", "greedy", "--keep-rate", 0.8]
    assert desk.select(*flags, "--batch-size", 1)[0] == desk.select(*flags, "--batch-size", 7)[0]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisft.selection import model_scores

    desk.write(rows(12))
    flags = ["--model", desk.model, "--score", "loss", "--rows", 4, "--batch-size", 2]
    whole, _ = desk.select(*flags)
    real, asked = model_scores.score_rows, []

    def stop_after_three(judge: object, examples: object, wanted: list[int]) -> object:
        for number, part in enumerate(real(judge, examples, wanted)):  # type: ignore[arg-type]
            if number == 4:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(model_scores, "score_rows", stop_after_three)
    assert desk.run(*flags) == 130
    assert [path.name for path in desk.out.parent.iterdir()] == ["picked.scores.jsonl.partial"]

    def remember(judge: object, examples: object, wanted: list[int]) -> object:
        asked.extend(wanted)
        return real(judge, examples, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(model_scores, "score_rows", remember)
    again, _ = desk.select(*flags)
    assert again == whole
    assert len(asked) == 6  # three batches of two were there


# ---- bad input ----


def spoiled(change: Callable[[list[Json]], object]) -> list[Json]:
    pool = rows(10)
    change(pool)
    return pool


BAD_ROWS = {
    "score column missing in some rows": (
        spoiled(lambda p: p[4].pop("quality")), ["--score", "column:quality"],
        "data/bad-score-column", [":5", "no such column"],
    ),
    "score column is a boolean": (
        spoiled(lambda p: p[2].update(quality=True)), ["--score", "column:quality"], "data/bad-score-column", [":3", "True"],
    ),
    "all scores are equal": (
        spoiled(lambda p: [row.update(quality=2) for row in p]), ["--score", "column:quality"], "data/flat-score", ["all 2"],
    ),
    "embeddings of mixed width": (
        spoiled(lambda p: p[6].update(embedding=[1.0])), ["--embedding", "embedding", "--diverse", "greedy"],
        "data/bad-embedding", [":7", "1 entries", "3 numbers"],
    ),
    "embeddings without a direction": (
        spoiled(lambda p: [row.update(embedding=[1.0, 2.0]) for row in p]), ["--embedding", "embedding", "--diverse", "greedy"],
        "data/zero-embedding", ["10 rows"],
    ),
    "the pool is smaller than the budget": (rows(10), ["--rows", 11], "data/pool-too-small", ["10 rows left"]),
    "fewer tokens than the budget": (rows(10), ["--tokens", 10**6], "data/pool-too-small", ["words left"]),
    "only copies": ([rows(1)[0]] * 5, ["--dedup", "exact"], "data/only-copies", ["5 rows"]),
    "only empty answers": ([{"prompt": "a", "completion": " "}] * 2, [], "data/nothing-left", ["with an answer"]),
    "only defects": (
        [{"prompt": f"a{i}", "completion": "I'm sorry, but I can't help."} for i in range(3)], ["--drop-defects"],
        "data/nothing-left", ["without a defect"],
    ),
    "a lone surrogate": ([{"prompt": "a", "completion": "b"}], ["--lone"], "data/bad-value", ["surrogate"]),
    "no model for a model's score": (rows(4), ["--score", "ifd"], "config/usage", ["--score ifd", "--model"]),
    "an unknown score": (rows(4), ["--score", "quality"], "config/bad-value", ["column:NAME"]),
    "a negative budget": (rows(4), ["--rows", 0], "config/bad-value", ["--rows"]),
    "an impossible similarity": (rows(4), ["--near", 1.5, "--dedup", "near"], "config/bad-value", ["--near"]),
    "a rate without greedy": (rows(4), ["--keep-rate", 0.5], "config/usage", ["--diverse greedy"]),
    "k-center without a budget": (rows(4), ["--diverse", "kcenter"], "config/usage", ["--rows N"]),
    "scores that are not there": (
        rows(4), ["--score", "loss", "--scores", "nowhere.jsonl", "--model"], "data/no-file", ["nowhere.jsonl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_input(desk: Desk, name: str) -> None:
    pool, flags, code, said = BAD_ROWS[name]
    desk.write(pool)
    if flags == ["--lone"]:
        desk.pool.write_text('{"prompt": "a", "completion": "\\ud800"}\n')
        desk.capsys.readouterr()
        assert desk.run() == 3
        assert "surrogate" in desk.capsys.readouterr().err
        return
    flags = [*flags, desk.model] if flags[-1:] == ["--model"] else flags
    desk.refused(code, *said, argv=tuple(flags))


def test_test_files_that_are_none(desk: Desk) -> None:
    desk.write(rows(6))
    desk.refused("data/same-file", "pool.jsonl", argv=("--against", desk.pool))
    again = desk.write(random.Random(0).sample(rows(6), 6), "test.jsonl")
    desk.refused("data/all-contaminated", "all 6 rows", argv=("--against", again))
    (desk.folder / "empty.jsonl").write_text("")
    desk.capsys.readouterr()
    assert desk.run("--against", desk.folder / "empty.jsonl") == 3
    assert "error[data/no-rows]" in desk.capsys.readouterr().err
    other = desk.write([{"text": "a", "label": "b"}], "form.jsonl")
    assert desk.run("--against", other) == 3
    assert "error[data/unknown-form]" in desk.capsys.readouterr().err
    assert not desk.out.exists()


def test_an_output_that_is_there_is_kept(desk: Desk) -> None:
    desk.write(rows(4))
    desk.out.parent.mkdir()
    for name in ("picked.jsonl", "picked.report.json", "picked.scores.jsonl", "picked.html"):
        desk.clear()
        (desk.out.parent / name).write_text("mine")
        desk.refused("config/out-exists", name)
        assert (desk.out.parent / name).read_text() == "mine"
    desk.clear()
    desk.out = desk.out.with_suffix(".json")
    desk.refused("config/bad-value", ".jsonl")


@pytest.mark.slow
def test_rows_that_are_too_long_or_have_nothing_to_learn_get_no_score(desk: Desk) -> None:
    pool = rows(5)
    pool[1]["completion"] = "word " * 300
    desk.write(pool)
    picked, report = desk.select("--model", desk.model, "--score", "loss")
    assert picked == [1, 3, 4, 5]
    (drop,) = report["dropped"]
    assert drop["reason"].startswith("no score: too long")


@pytest.mark.slow
def test_a_row_of_a_million_words_and_one_of_nul_bytes(desk: Desk) -> None:
    pool = rows(5)
    pool[0]["completion"] = " ".join(random.Random(0).choices(planted.NOUNS + [str(i) for i in range(999)], k=10**6))
    pool[1]["completion"] = "null \0 byte"
    desk.write(pool)
    picked, report = desk.select("--dedup", "near", "--drop-defects")
    assert picked == [1, 3, 4, 5]
    assert "control characters (U+0000)" in report["dropped"][0]["reason"]


@pytest.mark.parametrize("argv", [["--against", "t.jsonl"], ["--out", "d"], []])
def test_flags_of_the_quality_report_alone(desk: Desk, argv: list[str]) -> None:
    desk.write(rows(3))
    desk.capsys.readouterr()
    assert main(["inspect", "--data", str(desk.pool), *argv]) == 2
    assert "--quality" in desk.capsys.readouterr().err
