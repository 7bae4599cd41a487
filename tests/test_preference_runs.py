"""Whole runs of DPO and GRPO on a tiny model: what they write and learn; stopping and resuming changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import CONFIG, TIMES, digest, quiet, write_model, write_shop

from minisft.common.errors import CheckpointError, DataError
from minisft.formats import load_adapter_, load_model
from minisft.training import grpo_run
from minisft.training.preference import dpo, grpo
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.runlog import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shop(tmp_path_factory.mktemp("preference"))
    pairs = [
        {"prompt": f"say {chr(97 + i % 26)}", "chosen": chr(65 + i % 26), "rejected": chr(65 + (i + 1) % 26) * 2}
        for i in range(20)
    ]
    prompts = [{"prompt": f"say {chr(97 + i)}", "completion": chr(97 + i)} for i in range(12)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text("def reward(answer, row):\n    return sum(ord(c) < 128 for c in answer) / 6\n")
    return folder


def dpo_config(shop: Path, out: Path, **changes: object) -> DPOConfig:
    values: dict[str, object] = {
        "model": str(shop / "model"), "data": str(shop / "pairs.jsonl"), "out": str(out), "batch_size": 4, "rank": 2,
        "alpha": 3.0, "lr": 1e-2, "dtype": "fp32", "validation_share": 0.2, "steps": 6, "eval_every": 3, "save_every": 2,
    }  # fmt: skip
    return DPOConfig(**(values | changes))


def grpo_config(shop: Path, out: Path, **changes: object) -> GRPOConfig:
    values: dict[str, object] = {
        "model": str(shop / "model"), "data": str(shop / "prompts.jsonl"), "out": str(out), "prompts_per_step": 3, "rank": 2,
        "alpha": 3.0, "lr": 2e-2, "dtype": "fp32", "validation_share": 0.2, "steps": 4, "eval_every": 2, "save_every": 2,
        "reward": f"{shop / 'reward.py'}:reward", "num_generations": 4, "max_new_tokens": 6,
    }  # fmt: skip
    return GRPOConfig(**(values | changes))


def log_of(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


def test_a_dpo_run_learns_its_pairs_and_logs_them(shop: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = dpo(dpo_config(shop, tmp_path / "run", steps=30, eval_every=10, save_every=10, beta=1.0), log=said.append)
    rows = log_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)  # ln 2: the reference is the model itself
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["rewards/accuracies"] == 0  # rounding is no win
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["loss"] < 0.3
    wanted = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logps/chosen_change"}
    assert all(wanted <= row.keys() for row in rows)
    assert {"eval_rewards/accuracies", "eval_logps/chosen_change"} <= rows[9].keys()
    assert any("form: prompt, chosen, rejected (texts)" in line for line in said)
    assert result.weights == tmp_path / "run" / "adapter"


def test_the_reference_is_kept_and_never_computed_again(shop: Path, tmp_path: Path) -> None:
    run = dpo_config(shop, tmp_path / "run", steps=2)
    dpo(run, log=quiet)
    kept = (tmp_path / "run" / "reference.safetensors").read_bytes()
    dpo(replace(run, steps=4), resume=True, log=quiet)
    assert (tmp_path / "run" / "reference.safetensors").read_bytes() == kept
    for change in ({"seed": 1}, {"beta": 0.2}):
        with pytest.raises(CheckpointError, match=r"checkpoint/(changed|reference)"):
            dpo(replace(run, steps=6, **change), resume=True, log=quiet)


@pytest.mark.parametrize(("quant", "loss"), [("none", "sigmoid"), ("nf4", "ipo")])
def test_dpo_resumed_after_any_step_ends_in_the_same_bits(shop: Path, tmp_path: Path, loss: str, quant: str) -> None:
    run = dpo_config(shop, tmp_path / "whole", save_every=1, keep_last=9, loss=loss, quant=quant, rpo_alpha=0.5)
    dpo(run, log=quiet)
    for stop in range(1, 6):
        resume_after(stop, run, tmp_path, dpo)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_grpo_resumed_after_any_step_ends_in_the_same_bits_and_samples(shop: Path, tmp_path: Path, quant: str) -> None:
    run = grpo_config(shop, tmp_path / "whole", save_every=1, keep_last=9, beta=0.05, quant=quant)
    grpo(run, log=quiet)
    samples = (tmp_path / "whole" / "samples.jsonl").read_text()
    for stop in (1, 2, 3):
        out = resume_after(stop, run, tmp_path, grpo)
        assert (out / "samples.jsonl").read_text() == samples


def test_samples_cut_within_a_letter_are_drawn_again(tmp_path: Path) -> None:
    path, torn = tmp_path / "samples.jsonl", b'{"step": 1}\n{"step": 2}\n{"step": 3, "text": "\xc3'
    path.write_bytes(torn)
    assert list(grpo_run._lines_before(path, 4)) == list(grpo_run._lines_before(path, 3)) == torn.splitlines(keepends=True)[:2]
    assert list(grpo_run._lines_before(path, 2)) == [b'{"step": 1}\n']


def resume_after(stop: int, run: DPOConfig | GRPOConfig, tmp_path: Path, call: object) -> Path:
    """A run that was stopped after ``stop`` steps and went on, next to the one that was not."""
    whole, out = tmp_path / "whole", tmp_path / f"from-{stop}"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "step-*"))
    for step in range(1, stop + 1):  # the best one may be any of them
        shutil.copytree(whole / "checkpoints" / f"step-{step}", out / "checkpoints" / f"step-{step}")
    call(replace(run, out=str(out), save_every=40), resume=True, log=quiet)  # type: ignore[operator]
    assert digest(out) == digest(whole), f"resumed after step {stop}"
    assert log_of(out) == log_of(whole)
    return out


def test_dpo_goes_on_from_an_adapter_and_writes_one_whole_adapter(shop: Path, tmp_path: Path) -> None:
    first = dpo(dpo_config(shop, tmp_path / "sft", steps=8), log=quiet).weights
    run = dpo_config(shop, tmp_path / "run", steps=5, init_adapter=str(first), rank=None, alpha=None)
    dpo(run, log=quiet)
    rows = log_of(tmp_path / "run")
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the reference is the adapter, not the bare base
    model, _ = load_model(shop / "model")
    load_adapter_(model, tmp_path / "run" / "adapter")
    assert (
        load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").keys()
        == load_file(first / "adapter_model.safetensors").keys()
    )


def test_a_grpo_run_earns_more_and_keeps_every_sample(shop: Path, tmp_path: Path) -> None:
    """480 samples at either end: their means differ by more than twice the noise (0.013) only if something was learned."""
    grpo(
        grpo_config(shop, tmp_path / "run", steps=30, eval_every=10, save_every=10, num_generations=32, lr=1e-1, rank=4),
        log=quiet,
    )
    rows = log_of(tmp_path / "run")
    began = sum(row["reward"] for row in rows[:5]) / 5
    assert sum(row["reward"] for row in rows[-5:]) / 5 > began + 0.03
    assert sum(rows[step - 1]["eval_reward"] for step in (10, 20, 30)) / 3 > began  # one of them has 64 samples: noise 0.035
    assert max(row["sampling_error"] for row in rows) < 1e-3
    assert {"eval_pass_at_1", "eval_pass_at_32", "entropy", "frac_reward_zero_std", "completions/clipped_ratio"} <= rows[
        9
    ].keys()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 30 * 3 * 32
    last = [s["reward"] for s in samples if s["step"] == 30]
    assert sum(last) / len(last) == pytest.approx(rows[-1]["reward"])


def test_a_reward_that_says_nothing_about_the_answer_teaches_nothing_in_particular(shop: Path, tmp_path: Path) -> None:
    """The control: the same run with a reward drawn from a hash of the answer does not earn more of the real reward."""
    run = grpo_config(shop, tmp_path / "run", steps=20, eval_every=10, save_every=10, num_generations=8)
    grpo(run, reward=lambda answer, row: hashlib.sha256(answer.encode()).digest()[0] / 255, log=quiet)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    real = [(s["step"], sum(ord(c) < 128 for c in s["text"]) / 6) for s in samples]
    first, last = ([value for step, value in real if step in steps] for steps in (range(1, 6), range(16, 21)))
    assert abs(sum(last) / len(last) - sum(first) / len(first)) < 0.15


def test_hopeless_prompts_stop_the_run_with_advice(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/constant-rewards.*mean reward 0.*easier prompts"):
        grpo(
            grpo_config(shop, tmp_path / "run", steps=20, reward="exact_match", max_new_tokens=1),
            reward=lambda *_: 0.0,
            log=quiet,
        )


def test_hopeless_steps_are_counted_across_a_resume(shop: Path, tmp_path: Path) -> None:
    """The tenth step with constant groups alone stops the run, wherever it was stopped before."""
    run = grpo_config(shop, tmp_path / "run", steps=7, save_every=7, validation_share=0.0, max_new_tokens=1)
    grpo(run, reward=lambda *_: 0.0, log=quiet)
    with pytest.raises(DataError, match=r"data/constant-rewards.*step 10"):
        grpo(replace(run, steps=20), reward=lambda *_: 0.0, resume=True, log=quiet)


def test_equal_rewards_change_no_weight(shop: Path, tmp_path: Path) -> None:
    run = grpo_config(shop, tmp_path / "run", steps=2, validation_share=0.0)
    grpo(run, reward=lambda *_: 1.0, log=quiet)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(not bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_truncated_answers_can_be_left_out(shop: Path, tmp_path: Path) -> None:
    run = grpo_config(shop, tmp_path / "run", steps=2, mask_truncated=True, max_new_tokens=1)
    grpo(run, reward=lambda answer, row: float(len(answer)), log=quiet)
    assert torch.isfinite(torch.tensor([row["loss"] for row in log_of(tmp_path / "run")])).all()


def test_a_model_with_a_short_context_is_not_told_to_raise_max_length(shop: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "short", tmp_path / "scratch", replace(CONFIG, max_position_embeddings=16))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "say a", "chosen": "a" * 40, "rejected": "b" * 40}))
    runs = (dpo, dpo_config(shop, tmp_path / "d", data=str(long))), (grpo, grpo_config(shop, tmp_path / "g"))
    for call, run in runs:
        with pytest.raises(DataError, match=r"no-rows.*fix:.* shorter rows, or a model with a longer context$") as caught:
            call(replace(run, model=str(tmp_path / "short")), log=quiet)
        assert "raise --max-length" not in str(caught.value)
