"""The report on a pool: planted faults are found, clean rows are left alone, leaks are shown with the words they share."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import planted
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.messages import Dataset, Example, Message, split
from minisft.quality.contamination import find_leaks
from minisft.quality.defects import PoolHabits, answer_defects, find_defects
from minisft.quality.page import quality_page
from minisft.quality.pool import Pool, make_pool, read_pool
from minisft.quality.report import QualityReport, inspect_quality, near_groups, span_text, to_json
from minisft.quality.text import character_span, words

# Fixed before the rules were run on these rows. Wrong answers that read well (``swapped``) are a model's task.
RECALL = {
    "empty": 0.95, "looping": 0.95, "prompt echoed": 0.95, "mojibake": 0.95, "HTML": 0.95, "copy": 0.95, "test row": 0.95,
    "wrong label": 0.95, "refusal": 0.95, "near copy": 0.9, "test row, numbers changed": 0.9, "truncated": 0.7,
    "wrong language": 0.9,
}  # fmt: skip
PRECISION = 0.95


def pool_of(rows: list[dict[str, str]], name: str = "pool") -> Pool:
    examples = tuple(
        Example((Message("user", row["prompt"]), Message("assistant", row["completion"])), i) for i, row in enumerate(rows, 1)
    )
    return make_pool(Dataset(examples, "prompt/completion", f"{name}.jsonl", name, {"rows": len(rows)}, ()))


def report_on(rows: list[dict[str, str]], *tests: list[dict[str, str]], near: float = 0.8) -> QualityReport:
    return inspect_quality(pool_of(rows), [pool_of(t, f"test{i}") for i, t in enumerate(tests)], near, lambda text: None)


def flagged(report: QualityReport) -> dict[str, set[int]]:
    """Row indices by the kind of ``planted.KINDS`` that the report puts them under."""
    found: dict[str, set[int]] = defaultdict(set)
    for defect in report.defects:
        found[defect.kind].add(defect.row)
    found["copy"] = {row for group in report.copies for row in group}
    found["near copy"] = {row for cluster in report.clusters for row in cluster.rows}
    found["wrong label"] = {row for conflict in report.conflicts for row in conflict.rows}
    for leak in report.leaks["test0.jsonl"]:
        found["test row" if leak.share == 1 and leak.kind == "exact prompt" else "test row, numbers changed"].add(leak.row)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_faults_are_found_and_clean_rows_are_left_alone(seed: int) -> None:
    rows, kinds, tests = planted.labelled(seed=seed)
    found = flagged(report_on(rows, tests))
    for kind, least in RECALL.items():
        planted_rows = {i for i, each in enumerate(kinds) if each == kind}
        assert len(planted_rows & found[kind]) >= least * len(planted_rows), kind
    clean = {i for i, kind in enumerate(kinds) if kind == "clean"}
    # A clean row is listed with its copy, near copy or conflicting answer, as it should be.
    partners = found.pop("copy") | found.pop("near copy") | found.pop("wrong label")
    wrongly = clean & set().union(*found.values())
    assert len(wrongly) <= (1 - PRECISION) * len(clean)
    assert len(clean & partners) <= 0.2 * len(clean)


@pytest.mark.slow
def test_clean_rows_alone_have_no_fault() -> None:
    grammar = planted.Grammar(9)
    report = report_on([grammar.row() for _ in range(300)], [grammar.row() for _ in range(100)])
    assert not report.copies
    assert not report.clusters
    assert not report.conflicts
    assert not report.defects
    assert not any(report.leaks.values())


@pytest.mark.slow
@given(st.permutations(range(30)))
def test_the_order_of_the_rows_changes_no_group(order: list[int]) -> None:
    grammar = planted.Grammar(4)
    rows = [grammar.row() for _ in range(12)]
    rows += [planted.near_copy(row, grammar.draw) for row in rows[:9]] + [dict(row) for row in rows[3:12]]
    names = dict(enumerate(order))
    before, after = report_on(rows), report_on([rows[i] for i in order])

    def named(groups: list[tuple[int, ...]]) -> set[frozenset[int]]:
        return {frozenset(names[row] for row in group) for group in groups}

    assert {frozenset(g) for g in before.copies} == named(list(after.copies))
    # Copies are counted by their first row, so a cluster may name another one of them.
    first = {row: group[0] for group in before.copies for row in group}
    old = {frozenset(first.get(row, row) for row in c.rows) for c in before.clusters}
    new = {frozenset(first.get(names[row], names[row]) for row in c.rows) for c in after.clusters}
    assert old == new
    assert len(old) == 9


# ---- contamination ----


def test_a_pool_contaminates_itself_wholly() -> None:
    grammar = planted.Grammar(6)
    rows = [grammar.row() for _ in range(50)]
    leaks = find_leaks(pool_of(rows), pool_of(rows, "other"))
    assert [(leak.row, leak.test_row, leak.kind, leak.share) for leak in leaks] == [
        (i, i, "exact prompt", 1.0) for i in range(50)
    ]


def test_each_way_of_giving_a_test_row_away() -> None:
    grammar = planted.Grammar(7)
    long, ask = " ".join(grammar.clause() for _ in range(4)), f"Tell me why {grammar.clause()} and why {grammar.clause()}?"
    tests = [
        {"prompt": ask, "completion": grammar.sentence()},
        {"prompt": "Go on.", "completion": long},
        {"prompt": "Ann sold 48 clips to her kind friends and 12 to her uncle, how many are left then?", "completion": "4"},
        {"prompt": grammar.clause(), "completion": f"{grammar.sentence()} {grammar.sentence()}"},
    ]
    run = " ".join(words(tests[3]["completion"])[:14])
    rows = [
        {"prompt": ask.upper(), "completion": "Nobody knows."},
        {"prompt": "Say more.", "completion": long},
        {"prompt": tests[2]["prompt"].replace("48", "52").replace("12", "9"), "completion": "7"},
        {"prompt": grammar.clause(), "completion": f"I read that {run} and so on."},
        {"prompt": f"Please help. {ask} Thanks a lot for it.", "completion": "Nobody knows."},
        grammar.row(),
    ]
    pool, test = pool_of(rows), pool_of(tests, "test")
    leaks = find_leaks(pool, test)
    assert [(leak.row, leak.test_row, leak.kind, leak.masked) for leak in leaks] == [
        (0, 0, "exact prompt", False),
        (1, 1, "exact answer", False),
        (2, 2, "exact prompt", True),
        (3, 3, "13-gram", False),
        (4, 0, "13-gram", False),
    ]
    assert span_text(pool, 3, leaks[3].start, leaks[3].length) == run
    assert span_text(pool, 4, leaks[4].start, leaks[4].length) == " ".join(words(ask))


def test_a_short_test_prompt_must_be_there_whole() -> None:
    test = pool_of([{"prompt": "How do I close my old account?", "completion": "yes"}], "test")
    rows = ["Hello, how do I close my old account please", "Why must I close my old account?", "How do I open it?"]
    assert [leak.row for leak in find_leaks(pool_of([{"prompt": p, "completion": "no"} for p in rows]), test)] == [0]


def test_what_everybody_writes_is_no_evidence() -> None:
    grammar, instruction = (
        planted.Grammar(8),
        "Read the following message with care and answer in one short and friendly sentence",
    )
    rows = [{"prompt": f"{instruction}: {grammar.clause()}", "completion": "Fine."} for _ in range(100)]
    tests = [{"prompt": f"{instruction}: {grammar.clause()}", "completion": "Fine."} for _ in range(50)]
    assert not find_leaks(pool_of(rows), pool_of(tests, "test"))


def test_the_same_file_on_both_sides_is_an_error() -> None:
    rows = pool_of([planted.Grammar(1).row()])
    with pytest.raises(UserError, match="data/same-file"):
        find_leaks(rows, rows)


# ---- single rules ----

USUAL = PoolHabits(0.99, ("country", "country", "information"), "English")
ANSWER = "The river carries the boats to the harbour and nobody in the village remembers when this began."


@pytest.mark.parametrize(
    ("prompt", "answer", "kinds"),
    [
        ("Why?", ANSWER, []),
        ("Why?", "42", []),
        ("List them.", "- one apple\n- two of the pears\n- three more things that we have here", []),
        ("Write HTML for a page.", "<p>Here you are, this is the page that you have asked me for.</p>", []),
        ("Show code.", "Use this:\n```html\n<p>one</p>\n```\nand you are done with all of it.", []),
        ("Translate it to German.", "Das ist nicht der Weg, den wir mit dem Auto für die Reise nehmen.", []),
        ("JSON please.", '{"a": [1, 2, {"b": "}"}]}', []),
        ("JSON please.", '{"a": [1, 2, {"b": "c', ["truncated"]),
        ("JSON please.", '{"a": "x}]}", "b": [1, 2', ["truncated"]),
        ("Why?", "All of the people who live in this informat", ["truncated"]),
        ("Why?", "All of the people who live in this valley know the", ["truncated"]),
        ("Show code.", "Use this:\n```python\nprint(1)\n", ["truncated"]),
        ("Why?", "I’m sorry, but I can’t help with that request at all today.", ["refusal"]),
        ("Why?", "It costs â‚¬5 and the cafÃ© is closed on every day of the week.", ["mojibake"]),
        ("Why?", "The word Âme is a name and the river carries it to the harbour of the town.", []),
        ("Why?", "no no no no\x00", ["control characters"]),
    ],
)  # fmt: skip
def test_one_answer(prompt: str, answer: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in answer_defects(prompt, answer, USUAL)] == kinds


def test_context_turns_are_not_judged() -> None:
    turns = (Message("user", "a"), Message("assistant", "", train=False), Message("user", "b"), Message("assistant", "Fine."))
    assert not find_defects([Example(turns, 1)])


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_the_rules_or_the_words(prompt: str, answer: str) -> None:
    answer_defects(prompt, answer, USUAL)
    spans = character_span(answer, 0, len(words(answer)))
    assert 0 <= spans[0] <= spans[1] <= len(answer)


def test_signs_that_change_a_sum_keep_rows_apart() -> None:
    rows = [{"prompt": f"What is 2 {sign} 2.5?", "completion": "See."} for sign in "+-*/"]
    assert not report_on(rows).copies
    same = [{"prompt": text, "completion": "See."} for text in ("What IS 2 + 2.5", "what is “2 + 2.5”?!")]
    assert [len(group) for group in report_on(same).copies] == [2]


# ---- files ----


def test_the_command_writes_a_report_and_an_offline_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _, tests = planted.labelled(60, 4)
    pool, test = planted.write(tmp_path / "pool.jsonl", rows), planted.write(tmp_path / "test.jsonl", tests)
    before = pool.read_bytes()
    out = tmp_path / "out"
    assert main(["inspect", "--data", str(pool), "--quality", "--against", str(test), "--out", str(out)]) == 0
    assert "contaminated" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["empty"] == 4
    assert report["counts"]["contaminated"] == len(report["contamination"][str(test)]) == 8
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert pool.read_bytes() == before


def test_nothing_from_the_data_is_markup_on_the_page() -> None:
    prompt = "<script>alert(1)</script>\x1b[2J\u202e"
    rows = [{"prompt": prompt, "completion": f"<img src=x onerror=alert({i % 2})>"} for i in range(4)]
    report = report_on(rows, [rows[0]])
    page = quality_page(report)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    json.dumps(to_json(report))


def test_a_report_on_empty_answers_and_copies_keeps_every_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}]
    pool = read_pool(str(planted.write(tmp_path / "pool.jsonl", rows)))
    assert [example.row for example in pool.examples] == [1, 2, 3]
    assert pool == replace(pool)


@pytest.mark.slow
@given(st.integers(0, 30), st.floats(0.05, 0.6))
def test_a_split_never_parts_near_copies(seed: int, share: float) -> None:
    grammar = planted.Grammar(12)
    rows = [grammar.row() for _ in range(20)]
    rows += [planted.near_copy(row, grammar.draw) for row in rows[:15]] + [dict(row) for row in rows[10:20]]
    pool = pool_of(rows)
    groups = near_groups(pool.dataset)
    assert len(groups) >= 38  # 15 near copies and what they were made from, 10 copies and the rest of theirs
    train, validation = split(pool.examples, share, seed, groups)
    assert sorted(e.row for e in (*train, *validation)) == list(range(1, len(rows) + 1))
    assert train
    assert validation
    sides = [{groups.get(e.row, e.row) for e in side} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(validation) <= share * len(rows) + 6


def test_a_split_of_near_copies_alone_keeps_all_for_training() -> None:
    grammar = planted.Grammar(13)
    row = grammar.row()
    pool = pool_of([row] + [planted.near_copy(row, grammar.draw) for _ in range(6)])
    train, validation = split(pool.examples, 0.2, 0, near_groups(pool.dataset))
    assert (len(train), len(validation)) == (7, 0)
