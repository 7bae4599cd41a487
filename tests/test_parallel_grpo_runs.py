"""Whole GRPO runs of two real processes: the files of one, resumed by another number, stopped, and with rewards that fail."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from test_parallel_faults import LIMIT_S, start
from tiny_folder import digest, losses, stopped_copy, write_shop

from minisft.cli.main import main
from minisft.parallel import launch
from minisft.training.checkpoint import load_latest
from minisft.training.grpo_run import SAMPLES

pytestmark = pytest.mark.slow

REWARDS = """
import math, os, signal, time

calls = 0

def pays(answer, row):
    global calls
    calls += 1
    return sum(ord(c) < 128 for c in answer) / 6

def on_rank_1(answer, row, fault):
    value = pays(answer, row)
    return fault() if os.environ.get("RANK") == "1" and calls > 30 else value

def raises(answer, row):
    return on_rank_1(answer, row, lambda: [][0])

def dies(answer, row):
    return on_rank_1(answer, row, lambda: os.kill(os.getpid(), signal.SIGKILL))

def sleeps(answer, row):
    return on_rank_1(answer, row, lambda: time.sleep(100))

def mute(answer, row):
    return on_rank_1(answer, row, lambda: math.nan)

def always_one(answer, row):
    return 1.0
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shop(tmp_path_factory.mktemp("shop"))
    rows = [{"prompt": f"say {chr(97 + i) * (1 + i % 4)}", "completion": chr(97 + i)} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARDS)
    return folder


def flags(shop: Path, out: Path, *more: object, reward: str = "pays") -> list[object]:
    return [
        "grpo", "--model", shop / "model", "--data", shop / "prompts.jsonl", "--out", out, "--reward",
        f"{shop / 'reward.py'}:{reward}", "--prompts-per-step", 3, "--num-generations", 4, "--max-new-tokens", 6,
        "--lr", "2e-2", "--dtype", "fp32", "--rank", 2, "--alpha", 3, "--validation-share", 0.25, "--device", "cpu", *more,
    ]  # fmt: skip


SHORT = ("--steps", 5, "--eval-every", 2, "--save-every", 1, "--keep-last", 9)


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> the finished run; the one of one process imports here what the forked ones need."""
    importlib.import_module("torch.distributed.rendezvous")
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(word) for word in flags(shop, folder / "of-1", *SHORT)]) == 0
    group = start(2, folder / "printed", lambda rank: flags(shop, folder / "of-2", *SHORT))
    assert group.wait() == [0, 0], group.errors
    return {1: folder / "of-1", 2: folder / "of-2"}


def require_same_run(one: Path, other: Path) -> None:
    """The same samples, and numbers that differ by rounding."""
    assert (one / SAMPLES).read_text() == (other / SAMPLES).read_text()
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        assert mine == {k: v if v is None else pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in theirs.items()}
    mine, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    tiny.assert_same(mine, theirs, 1e-4)


def test_two_processes_write_the_files_of_one(whole: dict[int, Path]) -> None:
    one, two = whole[1], whole[2]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    require_same_run(two, one)
    assert len((two / SAMPLES).read_text().splitlines()) == 5 * 3 * 4
    printed = [(two.parent / "printed" / f"printed-{rank}.txt").read_text() for rank in range(2)]
    assert printed[0].count("done: 5 steps") == 1
    assert printed[1] == ""


@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.exhaustive), (2, 2)])
def test_a_checkpoint_knows_no_number_of_processes(whole: dict[int, Path], tmp_path: Path, saved: int, resumed: int) -> None:
    out = tmp_path / "run"
    stopped_copy(whole[saved], out, 2)
    group = start(resumed, tmp_path / "printed", lambda rank: ["grpo", "--out", out, "--resume"])
    assert group.wait() == [0] * resumed, group.errors
    require_same_run(out, whole[saved])
    if saved == resumed:
        assert digest(out) == digest(whole[saved])
        assert losses(out) == losses(whole[saved])


def test_a_signal_to_one_process_stops_all_after_a_saved_step(shop: Path, whole: dict[int, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, "--steps", 100_000, "--save-every", 1))
    end = time.monotonic() + LIMIT_S
    while not list(out.glob("checkpoints/step-*")):
        assert time.monotonic() < end, [path.read_text() for path in group.outputs]
        time.sleep(0.05)
    os.kill(group.pids[1], signal.SIGTERM)
    assert group.wait() == [143, 143]
    step = json.loads((out / SAMPLES).read_text().splitlines()[-1])["step"]
    assert f"stopped by signal 15 after step {step}" in group.outputs[0].read_text()
    assert (out / "checkpoints" / f"step-{step}").is_dir()
    assert not group.errors


@pytest.mark.parametrize(
    ("reward", "statuses", "words"),
    [
        ("raises", [3, 3], ("error[data/reward]", "rank 1 of 2: ", "IndexError")),
        ("dies", [7, -9], ("error[process/lost]", "rank 1 of 2")),
    ],
)
def test_a_reward_that_fails_on_one_process_ends_all_and_names_it(
    shop: Path, whole: dict[int, Path], tmp_path: Path, reward: str, statuses: list[int], words: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, *SHORT, reward=reward))
    assert group.wait() == statuses
    [error] = group.errors
    assert all(word in error for word in words)
    saved = load_latest(out)
    assert saved is not None
    assert {json.loads(line)["step"] for line in (out / SAMPLES).read_text().splitlines()} == set(range(1, saved.step + 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3])
def test_a_reward_that_does_not_return_ends_the_run(shop: Path, tmp_path: Path, size: int) -> None:
    """With three, one of the two that wait is the first to end: the other must not take it for the fault."""

    def hurry(rank: int) -> None:
        launch.TIMEOUT_S = 6.0

    out = tmp_path / "run"
    group = start(size, tmp_path / "printed", lambda rank: flags(shop, out, *SHORT, reward="sleeps"), hurry)
    waiting = [pid for rank, pid in enumerate(group.pids) if rank != 1]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in waiting]
    os.kill(group.pids[1], signal.SIGKILL)  # as torchrun does
    os.waitpid(group.pids[1], 0)
    assert statuses == [7] * len(waiting)
    [error] = group.errors
    assert error.startswith("error[process/late]")
    assert re.search(rf"rank [02] of {size}; found waited for 0.1 minutes", error)
    assert load_latest(out) is not None


@pytest.mark.exhaustive
def test_a_reward_without_a_number_on_one_process_leaves_those_answers_alone(
    shop: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, *SHORT, reward="mute"))
    assert group.wait() == [0, 0], group.errors
    silent = [line["reward"] is None for line in map(json.loads, (out / SAMPLES).read_text().splitlines())][-12:]
    groups = [silent[i : i + 4] for i in (0, 4, 8)]
    assert {(any(g), all(g)) for g in groups} == {(True, True), (False, False)}
    assert losses(out)[-1]["frac_reward_zero_std"] >= sum(map(all, groups)) / 3


def test_another_reward_on_one_process_is_refused_before_the_first_step(
    shop: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rewards = ("pays", "always_one")
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, out, *SHORT, reward=rewards[rank]))
    assert group.wait() == [2, 2]
    [error] = group.errors
    assert "config/other-start" in error
    assert "reward; found rank 1" in error
    assert not out.exists()


@pytest.mark.exhaustive
def test_hopeless_prompts_stop_all_with_one_message(shop: Path, whole: dict[int, Path], tmp_path: Path) -> None:
    more = ("--steps", 12, "--validation-share", 0)
    group = start(2, tmp_path / "printed", lambda rank: flags(shop, tmp_path / "run", *more, reward="always_one"))
    assert group.wait() == [3, 3]
    [error] = group.errors
    assert "error[data/constant-rewards]" in error
    assert "rank" not in error
