"""The quickstart's questions, its files and its table. (The whole tour runs in the slow test.)"""

import importlib.resources
import json
import shlex
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from minisft.common.errors import UserError
from minisft.data.messages import read_dataset
from minisft.evaluation.evaluate import EvalResult, evaluate
from minisft.kernels import cpu_nf4
from minisft.native.decoder import in_compressed
from minisft.quickstart import run
from minisft.quickstart.parcel_task import parcel_rows
from minisft.quickstart.run import QuickstartResult, Scores, general_rows, next_commands, report, run_quickstart, write_data
from minisft.training.train import TrainResult


def questions() -> list[dict]:
    return json.loads((importlib.resources.files("minisft.quickstart") / "general_questions.json").read_text())


def test_the_questions_have_one_shape():
    for question in questions():
        assert list(question) == ["question", "choices", "answer"]
        assert len(question["choices"]) == len(set(question["choices"])) == 4
        assert all(choice.strip() == choice != "" for choice in question["choices"])
        assert question["question"].isascii()
        assert question["question"].endswith("?")


def test_the_questions_are_unique_and_their_answers_balanced():
    assert len(questions()) == 60
    assert len({q["question"].casefold() for q in questions()}) == 60
    assert Counter(q["answer"] for q in questions()) == dict.fromkeys(range(4), 15)


def test_the_right_answer_is_not_known_by_its_length():
    """Somebody who always takes the longest (or the shortest) option must not do much better than chance."""
    for pick in (max, min):
        hits = sum(len(q["choices"][q["answer"]]) == pick(map(len, q["choices"])) for q in questions())
        ties = sum(Counter(map(len, q["choices"]))[pick(map(len, q["choices"]))] / 4 for q in questions())
        assert hits < ties + 12, f"{pick.__name__}: {hits} of 60, {ties:.0f} expected"


def test_every_file_can_be_read_by_the_other_commands(tmp_path):
    write_data(tmp_path / "data", 0, 12, 6)
    sets = {name: read_dataset(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "test", "general")}
    assert [len(s.examples) for s in sets.values()] == [12, 6, 60]
    assert {s.form for s in sets.values()} == {"messages"}
    for example, row in zip(sets["general"].examples, general_rows(), strict=True):
        assert example.reference["choices"] == row["choices"]
        assert example.messages[-1].content in row["choices"]


def test_a_folder_in_use_is_refused_before_anything_happens(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="config/out-exists"):
        run_quickstart(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def result(score: float, n: int) -> EvalResult:
    return EvalResult(score, n, "json", {}, [])


def test_the_table_says_what_was_measured():
    training = TrainResult(Path("q/run"), Path("q/run/adapter"), 57, 57, 0.01, 57, 50, 1000, 125.0)
    scores = Scores(result(0.0, 72), result(0.5, 60)), Scores(result(0.9, 72), result(0.45, 60))
    text = report(QuickstartResult(*scores, training, 250.0), Path("q"))
    lines = text.splitlines()
    assert len({len(line) for line in lines[1:4]}) == 1, "the columns are aligned"
    assert lines[2].split()[-6:] == ["0.0%", "90.0%", "80.9%", "to", "95.0%", "72"]
    assert "50 of 1,000 parameters (5.0%) in 2 min 05 s, 4 min 10 s" in text
    assert max(map(len, lines)) < 150
    assert all(command in text for command in next_commands(Path("q")))


def test_the_model_is_talked_to_as_it_was_trained():
    """Without the instruction of its rows the adapter writes JSON that nobody asked for."""
    chat = shlex.split(next_commands(Path("q"))[0])
    system = parcel_rows("train", 1, seed=0)[0]["messages"][0]
    assert chat[chat.index("--system") + 1] == system["content"]
    assert system["role"] == "system"


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_whole_tour(tmp_path, smollm2_path, monkeypatch):
    monkeypatch.setattr("minisft.quickstart.run.general_rows", lambda: general_rows()[:4])  # of 60: each is read twice
    said: list[str] = []
    with mock.patch.object(run, "evaluate", wraps=evaluate) as scored:
        tour = run_quickstart(tmp_path / "q", train_rows=8, test_rows=2, log=said.append)
    if cpu_nf4.library() is not None:
        assert [call.args[0] in in_compressed for call in scored.call_args_list] == [True] * 4
    assert tour.training.steps == 2
    assert tour.before.task.score == 0
    assert (tmp_path / "q/run/adapter/adapter_model.safetensors").is_file()
    assert sorted(p.name for p in (tmp_path / "q/eval").glob("*.json")) == [
        f"{test}_{when}.json" for test in ("general", "test") for when in ("after", "before")
    ]
    assert "general questions" in said[-1]
