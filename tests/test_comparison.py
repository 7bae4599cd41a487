"""Two models by their rows: symmetry, verdicts, bad cases, slices, and a report that nothing in the answers can break."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_files import task_data, task_rows, write_jsonl, write_scored

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.messages import read_dataset
from minisft.evaluation.statistics import Interval
from minisft.judging.bad_cases import confusions, error_class, find_bad_cases
from minisft.judging.compare_page import escaped, page
from minisft.judging.compare_report import write_comparison
from minisft.judging.comparison import compare_files, measure
from minisft.judging.gates import Gate, judge_gates, parse_gate, verdict_of
from minisft.judging.rows_file import RowsFile, ScoredRow, read_rows, require_comparable
from minisft.judging.slices import find_slices
from minisft.judging.words import WordVectors, clusters_of, nearest, over_represented, words_of


def as_file(scores, metric="exact_match", start=1):
    rows = {n: ScoredRow(n, s, "", "") for n, s in enumerate(scores, start)}
    return RowsFile("f", rows, {"metric": metric})


# --- symmetry


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=60), st.sampled_from(["exact_match", "loss"]))
def test_exchanging_the_files_mirrors_the_gain_and_row_order_is_irrelevant(pairs, metric):
    a, b = as_file([float(x) for x, _ in pairs], metric), as_file([float(y) for _, y in pairs], metric)
    shuffled = RowsFile("g", dict(random.Random(0).sample(list(b.rows.items()), len(b.rows))), b.head)
    one, other, again = (measure("task", *files, draws=200).result for files in ((a, b), (b, a), (a, shuffled)))
    assert one.difference.estimate == pytest.approx(-other.difference.estimate)
    assert (one.difference.low, one.difference.high) == pytest.approx((-other.difference.high, -other.difference.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert one == again


@pytest.mark.parametrize("metric", ["loss", "bits_per_byte", "kl"])
def test_less_is_better_for_a_loss(metric):
    before, after = as_file([2.0] * 30, metric), as_file([1.5] * 30, metric)
    measured = measure("general", before, after)
    assert measured.result.difference.estimate == pytest.approx(0.5)
    assert measured.to_json()["base"] == 2.0
    assert measured.to_json()["tuned"] == 1.5
    assert measured.result.table is None
    zero_one = measure("general", as_file([0.0, 1.0] * 10, "loss"), as_file([0.0] * 20, "loss")).result
    assert zero_one.table is None  # a loss of 0 or 1 is neither right nor wrong
    assert zero_one.mcnemar is None


def test_a_model_against_itself_is_not_shown_to_be_better_and_has_no_regressions(tmp_path):
    rows = task_rows([float(i % 3 > 0) for i in range(60)])
    path = write_scored(tmp_path, "a", rows, metric="exact_match")
    found = compare_files(path, path)
    assert found.measured[0].result.p_value == 1.0
    assert not [case for case in found.cases if case.kind == "regression"]
    assert found.verdict == "NOT SHOWN"
    assert all(s.difference.estimate == 0 for s in found.slices)


# --- gates


@pytest.mark.parametrize(
    ("low", "high", "enough", "status"),
    [(0.05, 0.2, True, "met"), (0.049, 0.2, True, "not shown"), (-0.1, 0.0499, True, "failed"), (0.1, 0.2, False, "not shown")],
)
def test_a_gate_is_held_against_the_whole_interval(low, high, enough, status):
    results = judge_gates([Gate("task", 0.05)], {"task.f1": (Interval((low + high) / 2, low, high), enough)})
    assert [r.status for r in results] == [status]
    assert verdict_of(results) == {"met": "SHIP", "failed": "HOLD", "not shown": "NOT SHOWN"}[status]


def test_one_failed_gate_holds_whatever_the_others_are():
    measured = {
        "task.f1": (Interval(0.2, 0.1, 0.3), True),
        "general.acc": (Interval(0, -0.1, 0.1), True),
        "general.bits_per_byte": (Interval(-0.1, -0.12, -0.08), True),
    }
    results = judge_gates([Gate("task", 0), Gate("general", -0.02)], measured)
    assert [r.status for r in results] == ["met", "not shown", "failed"]
    assert verdict_of(results) == "HOLD"
    assert verdict_of(results[:2]) == "NOT SHOWN"
    named = judge_gates([Gate("general.bits_per_byte", -0.15)], measured)
    assert [(r.measured, r.status) for r in named] == [("general.bits_per_byte", "met")]


@pytest.mark.parametrize("text", ["task>+0.05", "task>=", "tast>=0.1", "task", "task>=0,1", "=cmd>=1"])
def test_a_gate_that_cannot_be_read(text):
    with pytest.raises(UserError, match="config/bad-gate"):
        parse_gate(text)
    assert parse_gate("task>=+0.05") == Gate("task", 0.05)
    assert parse_gate(" general.acc_norm >= -.02") == Gate("general.acc_norm", -0.02)


# --- what is wrong with an answer


@pytest.mark.parametrize(
    ("prediction", "reference", "kind"),
    [
        ("", "x", "empty"),
        ("  \n", "x", "empty"),
        ("yes yes sir yes yes sir yes yes sir", "no", "loop"),
        ("ha" * 40, "no", "loop"),
        ('{"a": 1', '{"a": 1}', "invalid JSON"),
        ('{"a": 2, "b": 1}', '{"a": 1, "b": 1}', "field a wrong"),
        ('{"a": 2, "b": 3}', '{"a": 1, "b": 1}', "field a wrong and 1 more"),
        ('{"a": true}', '{"a": 1}', "field a wrong"),
        ('{"b": 1}', '{"a": 1, "b": 1}', "field a missing"),
        ('{"a": 1, "c": 0}', '{"a": 1}', "extra field c"),
        ("[1]", '{"a": 1}', "other JSON"),
        ("I'm sorry, I cannot do that.", "Berlin", "refusal"),
        ("Where is my parcel, it left Berlin", "transit", "copied prompt"),
        ("柏林是首都", "Berlin is it", "other language"),
        ("It costs 12.50 euros", "It costs 13.00 euros", "number wrong, text right"),
        ("card lost", "refund", "label refund -> card lost"),
        ("a long answer that is nothing like a label at all", "another answer that is long as well, too", "other text"),
    ],
)
def test_the_kind_of_an_error(prediction, reference, kind):
    assert error_class(prediction, reference, "Where is my parcel, it left Berlin on Monday?") == kind


def test_an_answer_that_did_not_stop():
    assert error_class("some words", "some words and more", extra={"stopped": False}) == "not stopped"


def test_regressions_come_first_and_those_that_lost_most_before_others():
    a = RowsFile("a", {n: ScoredRow(n, s, "p", "r") for n, s in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0))}, {})
    margins = {1: -9.0, 2: -1.0, 3: -5.0}
    extra = {n: {"log_prob": -1.0, "log_prob_reference": -1.0 + margins.get(n, 0.0)} for n in range(1, 5)}
    b = RowsFile("b", {n: ScoredRow(n, float(n == 4), "q", "r", extra[n]) for n in range(1, 5)}, {})
    assert [(c.row, c.kind, c.loss) for c in find_bad_cases(a, b)] == [
        (3, "regression", 5.0),
        (2, "regression", 1.0),
        (1, "shared", 9.0),
    ]


def test_confusions_are_ranked_by_how_unexpected_they_are():
    def wrong(reference, prediction, times):
        return [ScoredRow(0, 0.0, prediction, reference)] * times

    rows = [*wrong("a", "x", 20), *wrong("b", "x", 20), *wrong("c", "z", 4), *wrong("a", "z", 1)]
    found = confusions(rows)
    assert [(f["reference"], f["prediction"], f["count"]) for f in found[:2]] == [("c", "z", 4), ("b", "x", 20)]
    assert found[0]["expected"] == pytest.approx(4 * 5 / 45)


# --- words


def test_words_of_any_script():
    assert words_of("Où est, mon_colis? 12 柏林") == ["où", "est", "mon", "colis", "12", "柏林"]


def test_nearest_is_the_brute_force_by_cosine():
    texts = ["red car", "blue car fast", "green tree", "tree leaf green", "car car red"]
    made = WordVectors(texts)
    assert np.allclose(np.linalg.norm(made.vectors, axis=1), 1)
    cosines = made.vectors @ made.of(["a red red car"])[0]
    assert nearest(made.of(["a red red car"]), made.vectors, 2) == [sorted(range(5), key=lambda i: (-cosines[i], i))[:2]]
    assert set(nearest(made.of(["red car"]), made.vectors, 2)[0]) == {0, 4}


def test_planted_groups_are_found_and_named():
    rng = random.Random(0)
    topics = {"parcel": ["parcel", "courier", "door"], "card": ["card", "bank", "pin"], "rate": ["rate", "currency", "euro"]}
    texts, truth = [], []
    for i in range(90):
        name = list(topics)[i % 3]
        texts.append(" ".join(rng.choices(topics[name], k=4) + rng.choices(["the", "my", "is"], k=3)))
        truth.append(name)
    numbers = clusters_of(WordVectors(texts).vectors, 3)
    assert len({(n, t) for n, t in zip(numbers, truth, strict=True)}) == 3
    for k in range(3):
        inside = [t for t, n in zip(texts, numbers, strict=True) if n == k]
        outside = [t for t, n in zip(texts, numbers, strict=True) if n != k]
        words = [word for word, _ in over_represented(inside, outside)]
        assert set(words) == set(topics[truth[numbers.index(k)]])


def test_a_word_that_is_as_frequent_on_both_sides_is_not_over_represented():
    assert over_represented(["same words here"] * 9, ["same words here"] * 9) == []


# --- slices


def test_a_planted_slice_comes_first_and_its_p_is_adjusted():
    n = 200
    data = dict(enumerate(_examples(n), 1))
    a = as_file([1.0] * n)
    b = as_file([float(i % 2 == 0) for i in range(1, n + 1)])  # every row of the channel "web" broke
    found = find_slices(a, b, data)
    assert found[0].name == "channel = web"
    assert found[0].difference.estimate == -1.0
    assert found[0].n == 100
    assert found[0].error_rate.low > 0.95
    by_name = {s.name: s for s in found}
    assert by_name["channel = app"].difference.estimate == 0.0
    tested = [s.p_holm for s in found if s.p_holm is not None]
    assert found[0].p_holm == pytest.approx(len(tested) * 2 / 2**100)


def _examples(count):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return read_dataset(write_jsonl(Path(folder) / "d.jsonl", task_data(count)), keep_duplicates=True).examples


# --- files that may not be compared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows, head: rows.pop(), "not hold the same rows"),
        (lambda rows, head: rows[4].update(reference="other"), "reference of row 5"),
        (lambda rows, head: rows[4].update(prompt_sha256="ff"), "prompt of row 5"),
        (lambda rows, head: rows[4].update(tokens=7), "tokens of row 5"),
        (lambda rows, head: head.update(metric="f1"), "their metric"),
        (lambda rows, head: head.update(form="mmlu_val/letters/chat/0-shot"), "their form"),
        (lambda rows, head: head.update(template_sha256="00"), "their template"),
        (lambda rows, head: head.update(decoding="sampled"), "their decoding"),
    ],
)
def test_files_that_differ_in_more_than_the_model_are_refused(tmp_path, change, said):
    head = {"metric": "exact_match", "form": "a/b", "template_sha256": "11", "decoding": "greedy"}
    rows = [{**row, "prompt_sha256": "aa", "tokens": 3} for row in task_rows([1.0] * 10)]
    a = read_rows(write_scored(tmp_path, "a", rows, **head))
    other, other_head = [dict(row) for row in rows], dict(head)
    change(other, other_head)
    b = read_rows(write_scored(tmp_path, "b", other, **other_head))
    for first, second in ((a, b), (b, a)):
        with pytest.raises(UserError, match=said):
            require_comparable(first, second)


def test_files_of_before_prompts_were_noted_may_be_compared(tmp_path):
    rows = task_rows([1.0] * 10)
    old = read_rows(write_scored(tmp_path, "old", rows, metric="exact_match"))
    new = read_rows(write_scored(tmp_path, "new", [{**row, "prompt_sha256": "aa"} for row in rows], metric="exact_match"))
    require_comparable(old, new)
    require_comparable(new, old)


def test_embeddings_decide_which_training_rows_are_near(tmp_path):
    """Words would name the row with the same words; the column names another."""
    rows = [{**row, "e": [1.0, float(i)]} for i, row in enumerate(task_data(30))]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    train = write_jsonl(tmp_path / "train.jsonl", [{**row, "e": [1.0, 29.0 - i]} for i, row in enumerate(task_data(30))])
    a = write_scored(tmp_path, "a", task_rows([1.0] * 30), metric="exact_match")
    b = write_scored(tmp_path, "b", task_rows([0.0] * 30), metric="exact_match")
    found = compare_files(a, b, data=data, train=train, embedding="e")
    for case in found.cases:
        assert case.near[0].startswith(f"row {31 - case.row}:")
    assert any(
        not case.near[0].startswith(f"row {31 - case.row}:") for case in compare_files(a, b, data=data, train=train).cases
    )
    short = write_jsonl(tmp_path / "short.jsonl", [{**row, "e": [1.0]} for row in task_data(30)])
    with pytest.raises(UserError, match="embeddings of data and training differ"):
        compare_files(a, b, data=data, train=short, embedding="e")
    with pytest.raises(UserError, match="bad-embedding"):
        compare_files(a, b, data=data, train=train, embedding="channel")


# --- the report


HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</div></body></html><h1>x",
    "\x1b[2J\x07\u202e" + "javascript:alert(1)",
    "&lt;b&gt;",
    "=cmd|' /C calc'!A0",
    "x" * 1_000_000,
)


@pytest.fixture
def compared(tmp_path):
    """A comparison with regressions, gains, groups, slices and hostile answers; and its folder."""
    rng = random.Random(3)
    n = 160
    before = [float(rng.random() < 0.5) for _ in range(n)]
    after = [float(rng.random() < 0.75) for _ in range(n)]
    base, tuned = task_rows(before), task_rows(after)
    for i, text in enumerate(HOSTILE):
        base[i] |= {"score": 1.0, "prediction": base[i]["reference"]}
        tuned[i] |= {"score": 0.0, "prediction": text}
    data = write_jsonl(tmp_path / "data.jsonl", task_data(n))
    a = write_scored(tmp_path, "base", base, metric="exact_match", form="task/chat")
    b = write_scored(tmp_path, "tuned", tuned, metric="exact_match", form="task/chat")
    found = compare_files(a, b, data=data, train=data, gates=[parse_gate("task>=+0.05")])
    return found, write_comparison(found, tmp_path / "report")


def test_the_report_holds_every_number(compared):
    found, folder = compared
    report = json.loads((folder / "compare.json").read_text())
    assert set(report) >= {"verdict", "gates", "measured", "errors", "clusters", "slices_exploratory", "confusions"}
    counts = report["measured"][0]["table"]
    assert counts["broken"] == report["regressions"] == sum(case.kind == "regression" for case in found.cases)
    assert sum(counts.values()) == report["measured"][0]["n"] == 160
    assert sum(c["size"] for c in report["clusters"]) == report["bad_cases"] == len(found.cases)
    assert sum(e["tuned"] for e in report["errors"].values()) == report["bad_cases"]
    assert report["verdict"] == found.verdict


@pytest.mark.slow
def test_bad_cases_are_rows_that_can_be_labelled_and_trained_on(compared):
    found, folder = compared
    again = read_dataset(folder / "bad_cases.jsonl", keep_duplicates=True)
    assert len(again.examples) == len(found.cases)
    kinds = [example.reference["kind"] for example in again.examples]
    assert kinds == sorted(kinds)  # regressions first
    for example, case in zip(again.examples, found.cases, strict=True):
        assert example.messages[-1].content == case.reference == example.reference["reference"]
        assert example.reference["prediction"] == case.after
    assert all(len(case.near) == 3 for case in found.cases)


@pytest.mark.slow
def test_nothing_that_a_model_wrote_is_markup(compared):
    text = (compared[1] / "report.html").read_text()
    assert "<script" not in text.lower()
    assert "<img" not in text.lower()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;" in text
    assert "&amp;lt;b&amp;gt;" in text
    assert len(text) < 400_000  # a megabyte of answer is cut
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text


@given(st.text(max_size=60))
def test_text_for_the_page_has_no_markup_and_no_control_characters(text):
    shown = escaped(text)
    assert not set(shown) & set("<>\"'")
    assert all(c == "\n" or c.isprintable() or ord(c) > 0x9F for c in shown)


def test_the_page_shows_three_panels_and_the_verdict(compared):
    shown = page(compared[0])
    for part in ("<h3>Task</h3>", "<h3>General ability</h3>", "<h3>Business effect</h3>", "no data: give --general"):
        assert part in shown
    assert f">{compared[0].verdict}</p>" in shown


# --- the command


def run(capsys, *words):
    status = main(["compare", *map(str, words)])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("gate", "status", "word"), [("task>=0.05", 0, "SHIP"), ("task>=0.5", 8, "HOLD"), ("task>=0.3", 9, "NOT")]
)
def test_the_exit_status_is_the_verdicts(tmp_path, capsys, gate, status, word):
    a = write_scored(tmp_path, "a", task_rows([float(i % 10 < 5) for i in range(200)]))
    b = write_scored(tmp_path, "b", task_rows([float(i % 10 < 8) for i in range(200)]))
    code, printed = run(capsys, a, b, "--gate", gate, "--out", tmp_path / "out")
    assert code == status
    lines = printed.out.splitlines()
    assert "would be found with 80 %" in lines[0]  # before any result
    assert any(line.startswith(word) for line in lines)
    assert (tmp_path / "out" / "report.html").is_file()


def test_business_and_general_take_part(tmp_path, capsys):
    a = write_scored(tmp_path, "a", task_rows([float(i % 2) for i in range(100)]))
    b = write_scored(tmp_path, "b", task_rows([1.0] * 100))
    (tmp_path / "ab.json").write_text(json.dumps({"headline": {"name": "rate", "estimate": 0.1, "low": -0.1, "high": 0.3}}))
    words = [a, b, "--general", b, a, "--business", tmp_path / "ab.json", "--gate", "task>=0", "business>=0"]
    code, _ = run(capsys, *words, "--out", tmp_path / "o1")
    assert code == 9  # the business interval straddles its gate
    code, printed = run(capsys, *words, "general>=-0.02", "--out", tmp_path / "o2")
    assert code == 8
    assert "general.score" in printed.out


def test_without_gates_the_task_must_not_fall_and_general_ability_stays_within_the_margin(tmp_path, capsys):
    a = write_scored(tmp_path, "a", task_rows([float(i % 2) for i in range(100)]))
    b = write_scored(tmp_path, "b", task_rows([1.0] * 100))
    assert run(capsys, a, b, "--out", tmp_path / "o1")[0] == 0
    assert run(capsys, a, b, "--general", b, a, "--out", tmp_path / "o2")[0] == 8


def test_a_clustered_comparison_takes_its_column(tmp_path, capsys):
    rows = [{**row, "doc": row["row"] % 50} for row in task_rows([float(i % 2) for i in range(200)])]
    better = [{**row, "score": 1.0, "prediction": row["reference"]} for row in rows]
    a, b = write_scored(tmp_path, "a", rows), write_scored(tmp_path, "b", better)
    assert run(capsys, a, b, "--cluster", "doc", "--out", tmp_path / "o")[0] == 0
    report = json.loads((tmp_path / "o" / "compare.json").read_text())["measured"][0]
    assert (report["n"], report["clusters"]) == (200, 50)
    assert report["p_value"] == report["permutation_p"]
    code, printed = run(capsys, a, b, "--cluster", "nowhere", "--out", tmp_path / "p")
    assert code == 2
    assert "config/no-column" in printed.err
