"""Feedback: rates with who voted, and rows that can be trained on, compared or labelled, but never on both sides."""

from __future__ import annotations

import json

import pytest
from rows_files import write_jsonl

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.messages import read_dataset
from minisft.evaluation.statistics import wilson_interval
from minisft.judging.arena_store import Vote
from minisft.judging.feedback import eval_hashes, make_feedback_rows, read_guard, report, write_feedback
from minisft.judging.feedback_file import prompt_hash, read_feedback


def row(number, thumb=None, **more):
    return {"id": number, "prompt": f"question {number}", "response": f"answer {number}", "thumb": thumb, "model": "m", **more}


def made_of(tmp_path, rows, **known):
    feedback = read_feedback(write_jsonl(tmp_path / "thumbs.jsonl", rows))
    return feedback, make_feedback_rows(feedback, **known)


def test_up_trains_down_is_a_bad_case_and_edited_is_a_pair(tmp_path):
    rows = [
        row(1, "up"),
        row(2, "down", comment="wrong"),
        row(3, None, edited="a better answer"),
        row(4),
        row(5, "up", edited=""),
    ]
    feedback, made = made_of(tmp_path, rows)
    assert [(r["messages"][-1]["content"], r["source"]) for r in made.sft] == [
        ("answer 1", "thumb up"),
        ("a better answer", "edited"),
        ("answer 5", "thumb up"),
    ]
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made.pairs] == [("a better answer", "answer 3")]
    assert [(r["response"], r["comment"], r["eval_candidate"]) for r in made.bad] == [("answer 2", "wrong", True)]
    found = report(feedback, made)
    assert (found["shown"], found["voted"]) == (5, 3)
    assert found["by_model"]["m"]["up_among_votes"] == wilson_interval(2, 3).to_json()
    assert found["by_model"]["m"]["up_among_shown"] == wilson_interval(2, 5).to_json()
    assert "3 of 5" in found["selection_bias"]


def test_thumbs_on_one_prompt_make_a_pair_of_two_models_only(tmp_path):
    same = {"prompt": "one question"}
    rows = [row(1, "up", **same), row(2, "down", **same), row(3, "down", model="n", **same), row(4, "down", model="n")]
    _, made = made_of(tmp_path, rows)
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made.pairs] == [("answer 1", "answer 3")]


def test_a_trained_prompt_is_never_an_evaluation_row(tmp_path):
    rows = [
        row(1, "up", prompt="asked"),
        row(2, "down", prompt=" asked\n", model="n"),
        row(3, "down"),
        row(4, "down"),
        row(5, "up"),
    ]
    _, made = made_of(
        tmp_path, rows, trained=[prompt_hash([("user", "question 4")])], evaluated=[prompt_hash([("user", "question 5")])]
    )
    assert [(r["response"], r["eval_candidate"]) for r in made.bad] == [
        ("answer 2", False),
        ("answer 3", True),
        ("answer 4", False),
    ]
    assert [r["messages"][-1]["content"] for r in made.sft] == ["answer 1"]
    assert made.left_out["training rows left out: their prompt is an evaluation row"] == 1
    assert made.left_out["bad cases kept out of evaluation: their prompt is training data"] == 2
    assert {r["prompt_sha256"] for r in (*made.sft, *made.pairs)} <= made.trained


def test_a_system_turn_does_not_make_another_prompt():
    assert prompt_hash([("system", "s"), ("user", "q")]) == prompt_hash([("user", "q ")])
    assert prompt_hash([("user", "q")]) != prompt_hash([("user", "Q")])


def test_duplicates_and_addresses_are_counted(tmp_path):
    rows = [
        row(1, "up"),
        row(2, "up", prompt="question 1", response="answer 1"),
        row(3, "up", response="mail me at a.b@example.org"),
    ]
    feedback, made = made_of(tmp_path, rows)
    assert len(made.sft) == 2
    assert made.left_out["exact duplicates"] == 1
    assert made.sft[1]["pii"] == ["email"]
    assert report(feedback, made)["pii_rows"] == 1
    phones = [
        row(i, "up", response=text)
        for i, text in enumerate(("call +49 (0)30 1234567", "4111 1111 1111 1111", "12.5 and 2024-01-02"))
    ]
    assert [r["pii"] for r in made_of(tmp_path, phones)[1].sft][1:] == [["card number"], []]


def test_weeks_and_loud_users(tmp_path):
    rows = [row(i, "up", user="loud" if i % 2 else f"u{i}", time=1_772_323_200 + i) for i in range(60)]
    rows.append(row(99, "down", time="2026-03-09T10:00:00"))
    found = report(*made_of(tmp_path, rows))
    assert list(found["by_week"]) == ["2026-W09", "2026-W11"]
    assert [u["user"] for u in found["loud_users"]] == ["loud"]


def test_an_arenas_votes_become_pairs_unless_they_flip(tmp_path):
    from test_arena import answer_a, answer_b, open_arena, prepare, write_prompts

    store = open_arena(tmp_path, ("one", "two"), write_prompts(tmp_path))
    prepare(store, {"a": answer_a, "b": answer_b}, None)
    for prompt, first, choice in (("row-1", "a", "left"), ("row-2", "b", "left"), ("row-4", "a", "tie")):
        store.vote(Vote(store.show(prompt, first, "anna").ticket, choice))
    for first in ("a", "b"):  # the first answer, whichever it is
        store.vote(Vote(store.show("row-5", first, "anna").ticket, "left"))
    store.close()
    feedback = read_feedback(tmp_path / "votes.sqlite")
    made = make_feedback_rows(feedback)
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made.pairs] == [
        ("FIRST QUESTION", "question first"),
        ("question second", "SECOND QUESTION"),
    ]
    assert made.pairs[0]["prompt"] == [{"role": "user", "content": "first question"}]
    found = report(feedback, made)
    assert found["votes"]["flip_rate"] == 1.0
    assert found["headline"]["estimate"] == 0.0


def test_the_files_can_be_read_back(tmp_path):
    rows = [row(1, "up"), row(2, "down"), row(3, "down", edited="better")]
    feedback, made = made_of(tmp_path, rows)
    write_feedback(feedback, made, tmp_path / "out")
    assert len(read_dataset(tmp_path / "out" / "sft_candidates.jsonl").examples) == 2
    assert len(read_dataset(tmp_path / "out" / "bad_cases.jsonl").examples) == 2
    assert read_guard(tmp_path / "out" / "trained_prompts.sha256") == made.trained
    assert eval_hashes(tmp_path / "out" / "sft_candidates.jsonl") == made.trained
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert set(pairs[0]) >= {"prompt", "chosen", "rejected"}


def test_the_command(tmp_path, capsys):
    path = write_jsonl(tmp_path / "thumbs.jsonl", [row(1, "up"), row(2, "down"), row(3, None, edited="x y")])
    assert main(["feedback", "--in", str(path), "--out", str(tmp_path / "first")]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 shown answers have a thumb" in printed
    assert "1 preference pairs" in printed
    guard, data = tmp_path / "first" / "trained_prompts.sha256", tmp_path / "first" / "sft_candidates.jsonl"
    words = ["feedback", "--in", str(path), "--out", str(tmp_path / "second"), "--trained", str(guard), "--eval", str(data)]
    assert main(words) == 0
    assert (tmp_path / "second" / "sft_candidates.jsonl").read_text() == ""
    assert "training rows left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (row(1, "sideways"), "data/bad-thumb"),
        (row(1, "up", response=None), "data/no-response"),
        (row(1, "up", response=7), "data/content-type"),
        (row(1, "up", prompt=None), "data/bad-prompt"),
        (row(1, "up", prompt="  "), "data/no-prompt"),
        (row(1, "up", messages=[{"role": "judge", "content": "x"}]), "data/bad-prompt"),
        (row(1, "up", time="yesterday"), "data/bad-time"),
        (row(1, "up", time=1e300), "data/bad-time"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, code):
    with pytest.raises(UserError, match=code) as caught:
        read_feedback(write_jsonl(tmp_path / "t.jsonl", [row(0, "up"), bad]))
    assert "t.jsonl:2" in str(caught.value)


def test_dpo_reads_the_pairs(tmp_path):
    from minisft.data.pairs import read_pairs

    same = {"prompt": "one question"}
    rows = [row(1, "up", **same), row(2, "down", model="n", **same), row(3, None, edited="a better answer")]
    feedback, made = made_of(tmp_path, rows)
    write_feedback(feedback, made, tmp_path / "out")
    pairs = read_pairs(tmp_path / "out" / "pairs.jsonl").pairs
    read = [([m.content for m in p.prompt], p.chosen.content, p.rejected.content) for p in pairs]
    assert read == [(["question 3"], "a better answer", "answer 3"), (["one question"], "answer 1", "answer 2")]
