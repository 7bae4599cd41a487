"""Full training in shares as whole runs: what is on disk is what one process writes, whoever goes on with it."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp  # here, so that the forked processes need not import it
import torch.distributed.tensor
from ranks import on_ranks
from safetensors.torch import load_file
from test_parallel_faults import start
from tiny_folder import losses, quiet, run_config, stopped_copy, write_shop
from torch import Tensor

from minisft.common import atomic_files
from minisft.common.errors import UserError
from minisft.common.shares import Later, made
from minisft.config import RunConfig
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_model
from minisft.model import CausalLM
from minisft.parallel.world import ALONE, World
from minisft.training import saved_run, sft, tensor_file
from minisft.training.checkpoint import load_latest
from minisft.training.run_data import prepare_data
from minisft.training.sft import SFTTrainer
from minisft.training.train import run_training
from minisft.training.trainer import Log, TrainResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("full"))


def settings(shop: Path, out: Path, **changes: object) -> RunConfig:
    values = {"method": "full", "steps": 4, "eval_every": 2, "save_every": 2, "keep_last": 9, "weight_decay": 0.1} | changes
    return run_config(shop, out, **values)


def run(asked: RunConfig, world: World, resume: bool = False, log: Log = quiet) -> TrainResult:
    def prepare(run: RunConfig, model: CausalLM, tokenizer: Tokenizer, log: Log, began: datetime | None) -> object:
        return prepare_data(run, tokenizer, log, began, model.config.max_position_embeddings)

    return run_training(asked, prepare, SFTTrainer, resume, log, world=world)


def run_on(size: int, asked: RunConfig, resume: bool = False) -> None:
    if size == 1:
        run(asked, ALONE, resume)
    else:
        on_ranks(size, lambda world: run(asked, world, resume).steps)


def name_of(size: int, parallel: str) -> str:
    return f"{parallel} {size}"


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """The finished run of so many processes."""
    made: dict[str, Path] = {}

    def of(size: int, parallel: str) -> Path:
        name = name_of(size, parallel)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            run_on(size, settings(shop, made[name], parallel=parallel))
        return made[name]

    return of


def tensors(out: Path, file: str) -> dict[str, Tensor]:
    return load_file(out / file)


def test_the_files_are_those_of_one_process(whole: Callable[[int, str], Path]) -> None:
    one, shared = whole(1, "auto"), whole(2, "shard")
    names = [sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) for out in (one, shared)]
    assert names[0] == names[1]
    assert (one / "model" / "config.json").read_bytes() == (shared / "model" / "config.json").read_bytes()
    for file in ("model/model.safetensors", "checkpoints/step-2/optimizer.safetensors"):
        expected, found = tensors(one, file), tensors(shared, file)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-4), name
    for mine, theirs in zip(losses(shared), losses(one), strict=True):
        assert mine == {key: pytest.approx(value, rel=1e-4) for key, value in theirs.items()}
    model, _ = load_model(str(shared / "model"), torch.float32)
    assert model.config.tie_word_embeddings


# Who saved, and who goes on.
ONE, TWO, THREE, COPIES = (1, "auto"), (2, "shard"), (3, "shard"), (2, "replicate")
PAIRS = [(TWO, TWO), (TWO, ONE), (ONE, TWO)]
MORE = [(TWO, THREE), (THREE, TWO), (TWO, COPIES), (COPIES, THREE)]


@pytest.mark.parametrize(("saved", "resumed"), PAIRS + [pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in MORE])
def test_a_checkpoint_knows_neither_shares_nor_their_number(
    shop: Path, whole: Callable[[int, str], Path], tmp_path: Path, saved: tuple[int, str], resumed: tuple[int, str]
) -> None:
    out = tmp_path / "run"
    stopped_copy(whole(*saved), out, 2)
    run_on(resumed[0], settings(shop, out, parallel=resumed[1]), resume=True)
    file = "checkpoints/step-4/optimizer.safetensors"
    if saved == resumed:
        assert (out / file).read_bytes() == (whole(*saved) / file).read_bytes()
        assert losses(out) == losses(whole(*saved))
    for name, tensor in tensors(whole(*saved), file).items():
        assert torch.allclose(tensors(out, file)[name], tensor, rtol=1e-3, atol=1e-4), name
    for mine, theirs in zip(losses(out), losses(whole(*saved)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("unreadable", [None, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_the_result_is_the_best_step_in_every_share_or_in_none(shop: Path, tmp_path: Path, unreadable: int | None) -> None:
    """Embedding and head were gathered to validate, right before: what is written must not be that."""
    out = tmp_path / "run"
    asked = settings(shop, out, parallel="shard", lr=1.0, eval_every=1, save_every=1, steps=2, schedule="constant", warmup=0.0)

    def train(world: World) -> int | None:
        def missing(*_: object) -> None:
            raise UserError("checkpoint/unusable", "this checkpoint cannot be used")

        with pytest.MonkeyPatch.context() as patch:
            if world.rank == unreadable:
                patch.setattr(saved_run, "load_step", missing)
            return run(asked, world).best_step

    best, other = on_ranks(2, train)
    assert best == other
    assert best is not None
    assert best < 2
    saved = tensors(out, f"checkpoints/step-{best if unreadable is None else 2}/optimizer.safetensors")
    for name, tensor in tensors(out, "model/model.safetensors").items():
        assert torch.equal(tensor, saved[f"{name}/master"]), name


def test_in_bf16_the_shares_are_fp32_and_layers_are_computed_in_bf16(shop: Path, tmp_path: Path) -> None:
    for size, name in ((1, "one"), (2, "two")):
        parallel = "shard" if size > 1 else "auto"
        run_on(size, settings(shop, tmp_path / name, parallel=parallel, dtype="bf16", steps=2))
    for mine, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    for file in ("model/model.safetensors", "checkpoints/step-2/optimizer.safetensors"):
        expected, found = (tensors(tmp_path / name, file) for name in ("one", "two"))
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
        for name, tensor in expected.items():
            assert torch.allclose(found[name].float(), tensor.float(), rtol=0.05, atol=0.02), name
    rounded = {name: t.bfloat16() for name, t in tensors(tmp_path / "two", "checkpoints/step-2/optimizer.safetensors").items()}
    for name, tensor in tensors(tmp_path / "two", "model/model.safetensors").items():
        assert torch.equal(tensor, rounded[f"{name}/master"])


def test_processes_that_find_other_checkpoints_do_not_go_on(
    shop: Path, whole: Callable[[int, str], Path], tmp_path: Path
) -> None:
    for rank in (0, 1):
        stopped_copy(whole(*TWO), tmp_path / str(rank), 2 + 2 * rank)

    def resume(world: World) -> str:
        with pytest.raises(UserError) as caught:
            run(settings(shop, tmp_path / str(world.rank), parallel="shard"), world, resume=True)
        return str(caught.value)

    for error in on_ranks(2, resume):
        assert "config/other-start" in error
        assert "the newest checkpoint; found rank 1" in error


# ---- faults ------------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(shop: Path, tmp_path: Path) -> None:
    def step(world: World) -> tuple[bool, list[bool], float]:
        with pytest.MonkeyPatch.context() as patch:
            good = sft.accumulate_gradients

            def bad(model: CausalLM, batches: object, seed: int | None, num_targets: float) -> float:
                good(model, batches, seed, float("nan") if world.rank else num_targets)
                return 1.0  # the loss says nothing

            patch.setattr(sft, "accumulate_gradients", bad)
            seen: list[bool] = []
            whole_step = SFTTrainer.step

            def watched(self: SFTTrainer, *arguments: object) -> object:
                before = [m.detach().clone() for m in self.optimizer.master_weights.values()]
                result = whole_step(self, *arguments)
                same = all(map(torch.equal, before, self.optimizer.master_weights.values()))
                seen.append(result.skipped and same and math.isnan(result.grad_norm))
                return result

            patch.setattr(SFTTrainer, "step", watched)
            result = run(settings(shop, tmp_path / "run", parallel="shard", steps=1, validation_share=0.0), world)
        return result.weights is not None, seen, result.steps

    assert on_ranks(2, step) == [(True, [True], 1)] * 2


@pytest.mark.parametrize("place", [pytest.param("before", marks=pytest.mark.exhaustive), "amid"])
def test_a_full_disk_ends_all_after_three_saves(shop: Path, tmp_path: Path, place: str) -> None:
    """Amid: the others are sending their shares when the first process finds the disk full."""
    said: list[str] = []

    def full(*_: object) -> Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    def train(world: World) -> tuple[str, list[str]]:
        written: list[Tensor] = []

        def filling(tensor: Tensor | Later) -> Tensor:
            written.append(made(tensor))
            return written[-1] if len(written) % 7 else full()

        with pytest.MonkeyPatch.context() as patch:
            if world.is_first:
                patch.setattr(*((atomic_files, "require_space", full) if place == "before" else (tensor_file, "made", filling)))
            with pytest.raises(UserError) as caught:
                run(settings(shop, tmp_path / "run", parallel="shard", steps=9, save_every=1), world, log=said.append)
        return caught.value.code, sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())

    assert on_ranks(2, train) == [("disk/full", [])] * 2
    assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_while_shares_are_sent_is_named(shop: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    words = [
        "train", "--model", shop / "model", "--data", shop / "rows.jsonl", "--out", out, "--method", "full", "--batch-size", 4,
        "--dtype", "fp32", "--validation-share", 0.2, "--device", "cpu", "--parallel", "shard", "--steps", 10**5,
        "--save-every", 1,
    ]  # fmt: skip
    group = start(2, tmp_path / "printed", lambda rank: words)
    while len(list(out.glob("checkpoints/step-*"))) < 2:
        time.sleep(0.05)
    acknowledged = max(int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*"))
    os.kill(group.pids[rank], signal.SIGKILL)
    statuses = group.wait()
    assert (statuses[rank], statuses[1 - rank]) == (-signal.SIGKILL, 7)
    [error] = group.errors
    assert error.startswith(f"error[process/lost] a process of the run has ended: rank {rank}")
    saved = load_latest(out)
    assert saved is not None
    assert saved.step >= acknowledged
