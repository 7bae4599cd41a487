"""``--eval-metric``: the number is that of ``minisft eval``, the best step is kept by it, and a resumed run finds the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from tiny_folder import digest, losses, quiet, rows, run_config, stopped_copy, write_model

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import RunConfig
from minisft.data.tokenizer import Tokenizer
from minisft.model import CausalLM
from minisft.native import decoder
from minisft.native.decoder import decode_path
from minisft.parallel.world import World
from minisft.training.preference_config import DPOConfig
from minisft.training.run_data import prepare_data
from minisft.training.sft import SFTTrainer
from minisft.training.task_metric import TaskMetric
from minisft.training.train import run_training, train
from minisft.training.trainer import Log

pytestmark = pytest.mark.slow


def task(count: int) -> list[dict[str, object]]:
    """One letter for each prompt: learned within a few steps."""
    made = rows(count)
    for i, row in enumerate(made):
        row["messages"][1]["content"] = "AB"[i % 2]
    return made


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_model(folder / "model", folder / "scratch")
    for name, count in (("rows", 24), ("held", 9)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task(count)))
    return folder


def judged(shop: Path, out: Path, **changes: object) -> RunConfig:
    values = {
        "eval_data": str(shop / "held.jsonl"), "eval_metric": "f1", "eval_rows": 7, "eval_new_tokens": 4, "steps": 4,
        "eval_every": 1, "save_every": 1, "keep_last": 9, "lr": 0.1, "rank": 8, "alpha": 16.0,
    }  # fmt: skip
    return run_config(shop, out, **(values | changes))


def evals(out: Path, key: str) -> dict[int, float]:
    return {int(row["step"]): float(row[key]) for row in losses(out) if key in row}


@pytest.fixture(scope="module")
def run(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(judged(shop, out, dropout=0.1, best_by="metric"), log=quiet)
    return out


@pytest.mark.parametrize("metric", ["f1", "choice", "bits_per_byte"])
def test_the_number_is_what_minisft_eval_gives_for_the_checkpoint(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    out = tmp_path / "run"
    train(judged(shop, out, eval_metric=metric, steps=3), log=quiet)
    logged = evals(out, f"eval_{metric}")
    assert list(logged) == [1, 2, 3]
    for step in (1, 3):
        words = [
            "eval", "--model", str(shop / "model"), "--adapter", str(out / "checkpoints" / f"step-{step}" / "adapter"),
            "--data", str(shop / "held.jsonl"), "--metric", metric, "--limit", "7", "--max-new-tokens", "4",
            "--out", str(tmp_path / "score.json"), "--dtype", "fp32",
        ]  # fmt: skip
        assert main(words) == 0
        assert json.loads((tmp_path / "score.json").read_text())["score"] == pytest.approx(logged[step], abs=1e-6)
    assert metric == "choice" or len({round(value, 6) for value in logged.values()}) > 1  # so that the step matters


def test_a_resumed_run_ends_in_the_same_bits_and_numbers(shop: Path, run: Path, tmp_path: Path) -> None:
    again = judged(shop, tmp_path / "again", dropout=0.1, best_by="metric")
    stopped_copy(run, tmp_path / "again", 2)
    shutil.copytree(run / "checkpoints" / "step-1", tmp_path / "again" / "checkpoints" / "step-1")  # the best one stays
    for changed in ({"best_by": "loss"}, {"eval_metric": "label"}, {"eval_rows": 3}):
        with pytest.raises(UserError, match=rf"checkpoint/changed.*config\.{next(iter(changed))}"):
            train(replace(again, **changed), resume=True, log=quiet)
    train(again, resume=True, log=quiet)
    assert digest(tmp_path / "again") == digest(run)
    assert losses(tmp_path / "again") == losses(run)


def test_asking_for_it_moves_no_bit_of_what_is_learned(shop: Path, run: Path, tmp_path: Path) -> None:
    """Greedy answers between two steps draw nothing and leave nothing behind."""
    plain = judged(shop, tmp_path / "plain", dropout=0.1, eval_metric=None, eval_rows=None, eval_new_tokens=None)
    train(plain, log=quiet)
    a, b = (sorted((out / "checkpoints" / "step-4").rglob("*.safetensors")) for out in (tmp_path / "plain", run))
    assert [f.read_bytes() for f in a] == [f.read_bytes() for f in b]


def test_two_processes_keep_the_step_and_the_scores_of_one(shop: Path, run: Path, tmp_path: Path) -> None:
    """The second process's scores are turned round here: were they to count, another step would be kept."""
    asked = judged(shop, tmp_path / "two", dropout=0.1, best_by="metric")

    def prepare(run: RunConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime | None) -> object:
        return prepare_data(run, tokenizer, log, began, model.config.max_position_embeddings)

    def kept(world: World) -> tuple[int | None, float | None]:
        whole = TaskMetric.score
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskMetric, "score", lambda self, model: whole(self, model) * (-1 if world.rank else 1))
            result = run_training(asked, prepare, SFTTrainer, False, quiet, world=world)
        return result.best_step, result.score

    alone = evals(run, "eval_f1")
    best = max(alone, key=lambda step: (alone[step], -evals(run, "eval_loss")[step]))
    assert len(set(alone.values())) > 1
    assert on_ranks(2, kept) == [(best, alone[best])] * 2
    assert evals(tmp_path / "two", "eval_f1") == alone
    written, saved = (tmp_path / "two" / part for part in ("adapter", f"checkpoints/step-{best}/adapter"))
    assert (written / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()


def test_processes_that_share_the_base_score_the_answers_of_the_first(shop: Path, tmp_path: Path) -> None:
    """The second process's own logits are noise here: were it to go by them, its answers would be others."""
    asked = judged(shop, tmp_path / "two", dropout=0.1, best_by="metric", parallel="shard")

    def prepare(run: RunConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime | None) -> object:
        return prepare_data(run, tokenizer, log, began, model.config.max_position_embeddings)

    def scored(world: World) -> tuple[list[float], int | None, set[str]]:
        paths: set[str] = set()
        scores: list[float] = []
        whole_score, whole_head = TaskMetric.score, CausalLM.head

        def score(self: TaskMetric, model: CausalLM) -> float:
            scores.append(whole_score(self, model))
            paths.add(decode_path(model))
            return scores[-1]

        def noise(self: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(whole_head(self, hidden))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskMetric, "score", score)
            if not world.is_first:
                patch.setattr(CausalLM, "head", noise)
            result = run_training(asked, prepare, SFTTrainer, False, quiet, world=world)
        return scores, result.best_step, paths

    with pytest.MonkeyPatch.context() as patch:  # whoever else writes, it is PyTorch here too
        patch.setattr(decoder, "_no_library", lambda: "switched off")
        patch.setattr(decoder.cpu_nf4, "library", lambda: None)
        train(judged(shop, tmp_path / "one", dropout=0.1, best_by="metric"), log=quiet)
    alone = evals(tmp_path / "one", "eval_f1")
    assert len(set(alone.values())) > 1
    first, second = on_ranks(2, scored)
    assert first == second
    assert first[0] == pytest.approx(list(alone.values()), abs=1e-9)
    assert evals(tmp_path / "two", "eval_f1") == alone
    assert first[2] == {"PyTorch (processes share the model)"}  # the native step would read shares for weights


SCORES = {"f1": [0.2, 0.6, 0.6, 0.6], "bits_per_byte": [0.8, 0.4, 0.4, 0.4]}  # best at steps 2, 3, 4, which are equal
LOSSES = [0.5, 1.0, 0.9, 0.95]  # best at step 1; of the equal ones at step 3


@pytest.mark.parametrize(
    ("metric", "best_by", "kept"), [("f1", "metric", 3), ("bits_per_byte", "metric", 3), ("f1", "loss", 1)]
)
def test_the_best_is_kept_by_the_score_or_by_the_loss(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, best_by: str, kept: int
) -> None:
    """Scores and losses are given here, so the step is known by hand."""
    scores, given = iter(SCORES[metric]), iter(LOSSES)
    monkeypatch.setattr(TaskMetric, "score", lambda self, model: next(scores))
    monkeypatch.setattr("minisft.training.sft.validation_sums", lambda *_: (next(given), 1))
    said: list[str] = []
    out = tmp_path / "run"
    result = train(judged(shop, out, eval_metric=metric, best_by=best_by), log=said.append)
    score = SCORES[metric][kept - 1]
    assert (result.best_step, result.score, result.eval_loss) == (kept, score, LOSSES[kept - 1])
    assert f"{metric} {score:.4f} on 7 rows at step {kept}" in said[-1]
    weights = [
        folder / "adapter_model.safetensors" for folder in (out / "adapter", out / "checkpoints" / f"step-{kept}" / "adapter")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [row[f"eval_{metric}"] for row in losses(out) if "eval_loss" in row] == SCORES[metric]


def test_patience_counts_validations_without_a_better_score(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(TaskMetric, "score", lambda self, model: next(given))
    falling = iter([7.0, 6.0, 5.0, 4.0])
    monkeypatch.setattr("minisft.training.sft.validation_sums", lambda *_: (next(falling), 1))
    result = train(judged(shop, tmp_path / "run", best_by="metric", patience=2), log=quiet)
    assert (result.steps, result.best_step) == (3, 1)


def test_nothing_is_computed_before_bad_rows_are_refused(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTTrainer, "step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match="data/reference-not-json"):
        train(judged(shop, tmp_path / "a", eval_metric="json"), log=quiet)
    (tmp_path / "choices.jsonl").write_text(json.dumps({**task(1)[0], "choices": ["x", "y"]}) + "\n")
    with pytest.raises(UserError, match=r"data/bad-choices"):
        train(judged(shop, tmp_path / "b", eval_metric="choice", eval_data=str(tmp_path / "choices.jsonl")), log=quiet)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match=r"data/no-reference.*fix: give rows with answers"):
        train(judged(shop, tmp_path / "c", eval_data=str(tmp_path / "open.jsonl")), log=quiet)
    with pytest.raises(UserError, match=r"config/no-validation.*--eval-metric; found 0 rows"):
        train(judged(shop, tmp_path / "d", eval_data=None, validation_share=0.0), log=quiet)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_metric": "exactmatch"}, r"--eval-metric; found exactmatch; expected exact_match or .*fix: .*exact_match"),
        ({"eval_rows": 9}, r"--eval-rows; found no metric; expected --eval-metric M with it"),
        ({"eval_new_tokens": 9}, r"--eval-new-tokens; found no metric"),
        ({"best_by": "metric"}, r"--best-by metric; found no metric"),
        ({"eval_metric": "f1", "eval_rows": 0}, r"--eval-rows; found 0; expected at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RunConfig("m", "d", "o", **settings)


def test_dpo_has_no_use_for_it() -> None:
    with pytest.raises(UserError, match=r"--eval-metric; found f1; expected nothing: dpo has no use for it"):
        DPOConfig("m", "d", "o", eval_metric="f1")


def test_a_row_that_the_metric_needs_is_read_from_any_file_of_a_mixture(shop: Path, tmp_path: Path) -> None:
    """Held out from two files, numbered on; the row's own text is found again."""
    data = (str(shop / "held.jsonl"), str(shop / "rows.jsonl"))
    seen: list[TaskMetric] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskMetric, "score", lambda self, model: seen.append(self) or 0.0)
        train(judged(shop, tmp_path / "run", data=data, eval_data=None, eval_rows=None, steps=1, eval_every=1), log=quiet)
    (found,) = seen
    texts = {row["messages"][0]["content"] for row in task(24)}
    assert found.examples
    assert {example.messages[0].content for example in found.examples} <= texts
