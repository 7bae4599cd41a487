"""Whole runs on a tiny model: what they write, and that stopping and resuming changes nothing."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import CONFIG, digest, losses, quiet, run_config, write_model, write_shop

from minisft.cli.main import main
from minisft.common import device
from minisft.common.errors import UserError
from minisft.config import RunConfig
from minisft.formats import load_adapter_, load_model
from minisft.kernels import cpu_nf4
from minisft.training.runlog import read_metrics
from minisft.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("train"))


def config(shop: Path, out: Path, **changes: object) -> RunConfig:
    return run_config(shop, out, **{"steps": 6, "eval_every": 3, "save_every": 2, **changes})


def test_a_run_in_bf16_names_the_code_that_computes(shop: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(config(shop, tmp_path / "run", steps=1, dtype="bf16"), log=said.append)
    assert f"arithmetic on this CPU: {cpu_nf4.path()}" in said


@pytest.mark.usefixtures("pictures")
def test_a_run_writes_what_it_promises(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said: list[str] = []
    result = train(config(shop, out), log=said.append)
    assert f"arithmetic on this CPU: {cpu_nf4.path()}" in said
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "adapter", "checkpoints", "config.json", "data.json", "env.json", "loss.png", "metrics.jsonl",
    ]  # fmt: skip
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "tokens", "supervised_tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"}
    assert all(wanted <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "loss.png").stat().st_size > 10_000  # drawn
    assert json.loads((out / "config.json").read_text())["rank"] == 2
    facts = json.loads((out / "data.json").read_text())
    assert facts["train"]["rows"] == 24
    assert facts["validation"]["rows"] == 6
    assert facts["train"]["sha256"] == hashlib.sha256((shop / "rows.jsonl").read_bytes()).hexdigest()
    assert json.loads((out / "env.json").read_text())["packages"]["torch"] == importlib.metadata.version("torch")
    assert result.steps == 6
    assert result.weights == out / "adapter"
    assert said[-1].startswith("done: 6 steps")


def test_the_exported_adapter_is_the_trained_one(shop: Path, tmp_path: Path) -> None:
    train(config(shop, tmp_path / "run", steps=3, eval_every=3), log=quiet)
    model, _ = load_model(shop / "model")
    base, _ = load_model(shop / "model")
    load_adapter_(model, tmp_path / "run" / "adapter")
    ids = torch.arange(20)[None]
    assert not torch.allclose(model(ids), base(ids), atol=1e-4)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-3" / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, saved[f"{name}/master"]), name


# 24 rows in batches of 4: an epoch is 6 steps, a validation 10; so the first and last step, and both sides of each border.
SOME = (1, 5, 6, 7, 10, 13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "dropout", "stops"),
    [(14, 0.0, SOME), (14, 0.3, (1, 7, 13)), pytest.param(40, 0.0, range(1, 40), marks=pytest.mark.exhaustive)],
    ids=["some", "dropout", "all"],
)
def test_resuming_after_any_step_ends_in_the_same_bits(
    shop: Path, tmp_path: Path, steps: int, dropout: float, stops: Sequence[int]
) -> None:
    run = config(
        shop, tmp_path / "whole", steps=steps, save_every=1, keep_last=steps, eval_every=10, dropout=dropout, micro_batch_size=2
    )
    train(run, log=quiet)
    expected, log = digest(tmp_path / "whole"), losses(tmp_path / "whole")
    for stop in stops:
        out = tmp_path / f"from-{stop}"
        shutil.copytree(tmp_path / "whole", out, ignore=shutil.ignore_patterns("adapter", "step-*"))
        shutil.copytree(tmp_path / "whole" / "checkpoints" / f"step-{stop}", out / "checkpoints" / f"step-{stop}")
        train(replace(run, out=str(out), save_every=40), resume=True, log=quiet)
        assert digest(out) == expected, f"resumed after step {stop}"
        assert losses(out) == log, f"resumed after step {stop}"
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(shop: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    out = tmp_path / "run"
    flags = ["--steps", "5000", "--batch-size", "4", "--dtype", "fp32", "--rank", "2", "--lr", "1e-2"]
    argv = [
        sys.executable,
        "-m",
        "minisft.cli.main",
        "train",
        "--model",
        shop / "model",
        "--data",
        shop / "rows.jsonl",
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*map(str, argv), *flags], stdout=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        log = out / "metrics.jsonl"
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "--resume" in output
    done = read_metrics(log)[-1]["step"]
    assert (out / "checkpoints" / f"step-{done}").is_dir()
    assert not (out / "adapter").exists()


def test_a_finished_run_that_is_resumed_stays_as_it_is(shop: Path, tmp_path: Path) -> None:
    train(config(shop, tmp_path / "run"), log=quiet)
    before = digest(tmp_path / "run"), losses(tmp_path / "run")
    result = train(config(shop, tmp_path / "run"), resume=True, log=quiet)
    assert (digest(tmp_path / "run"), losses(tmp_path / "run")) == before
    assert result.steps == 6


def test_packed_and_padded_runs_agree(shop: Path, tmp_path: Path) -> None:
    for name, packing in (("padded", False), ("packed", True)):
        train(config(shop, tmp_path / name, packing=packing, micro_batch_size=2), log=quiet)
    for padded, packed in zip(losses(tmp_path / "padded"), losses(tmp_path / "packed"), strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-4)
        assert (packed["tokens"], packed["supervised_tokens"]) == (padded["tokens"], padded["supervised_tokens"])


@pytest.fixture(scope="module")
def contrary(shop: Path) -> str:
    """Validation rows whose answers the training rows never give: the more is learned, the worse they look."""
    path = shop / "contrary.jsonl"
    rows = [{"prompt": f"say {c}", "completion": "0123456789"} for c in "abcdefgh"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_best_weights_are_kept_and_exported(shop: Path, contrary: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = config(shop, out, steps=12, eval_every=1, save_every=1, keep_last=1, lr=0.05, schedule="constant", eval_data=contrary)
    result = train(run, log=quiet)
    by_step = {row["step"]: row["eval_loss"] for row in read_metrics(out / "metrics.jsonl")}
    best = min(by_step, key=lambda step: by_step[step])
    assert result.best_step == best < 12
    assert {p.name for p in (out / "checkpoints").iterdir()} == {f"step-{best}", "step-12"}
    exported = load_file(out / "adapter" / "adapter_model.safetensors")
    kept = load_file(out / "checkpoints" / f"step-{best}" / "adapter" / "adapter_model.safetensors")
    last = load_file(out / "checkpoints" / "step-12" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(exported[k], kept[k]) for k in kept)
    assert not all(torch.equal(exported[k], last[k]) for k in kept)


def test_early_stop(shop: Path, contrary: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = config(shop, out, steps=60, eval_every=1, lr=0.05, schedule="constant", eval_data=contrary, patience=2)
    result = train(run, log=quiet)
    assert result.best_step is not None
    assert result.steps == result.best_step + 2 < 60


def test_full_fine_tuning_writes_a_model_folder(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(config(shop, out, method="full", lr=1e-3, dtype="bf16"), log=quiet)
    assert result.weights == out / "model"
    assert result.trainable == result.parameters
    tuned, _ = load_model(out / "model")
    base, _ = load_model(shop / "model")
    changed = [
        n for (n, p), (_, q) in zip(tuned.named_parameters(), base.named_parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert len(changed) == len(list(base.named_parameters()))
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["eval_loss"] < rows[2]["eval_loss"]


def test_settings_file_and_flags(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(
        f'model = "{shop / "model"}"\ndata = "{shop / "rows.jsonl"}"\nsteps = 2\nrank = 4\nbatch-size = 2\nlr = 1e-3\n'
    )
    out = tmp_path / "run"
    assert main(["train", "--config", str(settings), "--out", str(out), "--rank", "2", "--dtype", "fp32"]) == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["rank"], saved["steps"], saved["batch_size"], saved["lr"]) == (2, 2, 2, 1e-3)


def test_training_learns_the_rows(shop: Path, tmp_path: Path) -> None:
    train(config(shop, tmp_path / "run", steps=60, eval_every=60, save_every=60, lr=0.05), log=quiet)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, last = (sum(float(r["loss"]) for r in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < first - 0.5


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_what_was_trained_can_be_used(shop: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(shop, tmp_path / "run", steps=2), log=quiet)
    model = ["--model", str(shop / "model"), "--adapter", str(tmp_path / "run" / "adapter"), "--max-new-tokens", "3"]
    if command == "generate":
        assert main(["generate", *model, "--prompt", "say aa"]) == 0
        return
    result = tmp_path / "score.json"
    flags = ["--data", str(shop / "rows.jsonl"), "--limit", "5", "--out", str(result)]
    for metric in ("exact_match", "f1", "loss", "choice"):
        assert main(["eval", *model, *flags, "--metric", metric]) == 0
        score = json.loads(result.read_text())
        assert (score["n"], score["metric"]) == (5, metric)


@pytest.fixture(scope="module")
def short_sighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 48 tokens, and rows of which two exceed it: one by its prompt, one by its answer."""
    folder = tmp_path_factory.mktemp("short")
    write_model(folder / "model", folder / "scratch", replace(CONFIG, max_position_embeddings=48))
    rows = [("q", "a"), ("q" * 60, "b"), ("q", "c" * 60), ("r", "d")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


def test_the_context_limits_rows_as_max_length_does(short_sighted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop, log = short_sighted, []
    runs = {"context": {}, "flag": {"max_length": 48}}
    for name, changes in runs.items():
        train(config(shop, shop / name, validation_share=0.0, steps=2, batch_size=3, **changes), log=log.append)
    assert log.count("training: 1 prompts cut from the left to fit the model's context of 48 tokens") == 2
    assert log.count("training: 1 rows dropped: the answer does not fit the model's context of 48 tokens") == 2
    assert losses(shop / "context") == losses(shop / "flag")
    facts = json.loads((shop / "context" / "data.json").read_text())["train"]
    assert (facts["rows"], facts["longest_row"]) == (3, 48)

    words = ["--model", str(shop / "model"), "--data", str(shop / "rows.jsonl")]
    assert main(["inspect", *words]) == 0
    assert "2 rows are longer than the model's context of 48 tokens" in capsys.readouterr().out
    assert main(["eval", *words, "--metric", "loss", "--out", str(shop / "s.json")]) == 0
    assert "2 rows are longer than the model's context: 1 of them dropped" in capsys.readouterr().out
    score = json.loads((shop / "s.json").read_text())
    assert (score["n"], score["dropped_for_context"]) == (3, 1)
    assert main(["plan", "--model", str(shop / "model"), "--rank", "2"]) == 0
    assert "8 x 48 tokens at once" in capsys.readouterr().out


def test_a_max_length_beyond_the_context_that_no_row_needs_is_harmless(shop: Path, tmp_path: Path) -> None:
    log: list[str] = []
    train(config(shop, tmp_path / "run", steps=1, max_length=100_000), log=log.append)
    assert not any("context" in line for line in log)


def test_the_dtype_follows_the_processor_and_is_kept_with_the_run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, expected in (("fpu avx512_bf16", "bf16"), ("fpu avx2 avx512f", "fp32"), ("asimd bf16", "bf16")):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\n{'Features' if 'asimd' in flags else 'flags'} : {flags}\n")
        monkeypatch.setattr("minisft.common.device._cpu_flags", functools.partial(device._cpu_flags, str(info)))
        assert device.pick_dtype("auto", torch.device("cpu")) == expected
        monkeypatch.undo()
    assert [device.pick_dtype(name, torch.device("cpu")) for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert device._cpu_flags(str(tmp_path / "absent")) == set()

    monkeypatch.setattr("minisft.common.device._cpu_flags", lambda: {"amx_bf16"})
    run = config(shop, tmp_path / "run", steps=1, dtype="auto")
    log: list[str] = []
    train(run, log=log.append)
    assert any(line.endswith("bf16") for line in log)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bf16"
    monkeypatch.setattr("minisft.common.device._cpu_flags", set)  # on another machine
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.dtype: \"bf16\" before, \"fp32\" now"):
        train(run, resume=True, log=quiet)


def test_packing_is_the_default() -> None:
    assert RunConfig("m", "d", "o").packing
