"""What ``OMP_WAIT_POLICY=passive`` costs a training run that is alone, and what it saves beside another busy program.

    python benchmarks/bench_wait_policy.py [--rounds 7] [--busy 1] [--data banking77_train.jsonl]
    python benchmarks/bench_wait_policy.py --quick       # one short step: does everything still run?

PyTorch's threads share each step. One that is done early waits for the others: spinning, as OpenMP does by default, or asleep,
as the command line of minisft asks for unless the user set the variable. Spinning keeps a core from the program that would
let the last thread end. Packed LoRA steps of SmolLM2-135M in fp32, both policies in turns in processes of their own, first
alone, then beside ``--busy`` processes that only count. The fair share of N threads on N cores beside one such process is
N / (N + 1) of what they do alone. Results go to benchmarks/results/wait_policy.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_train import BANKING77, BATCH_SIZE, Minisft, make_rows
from harness import Worker, out_folder, provenance, save, serve, spread

POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
SETTINGS = ("alone", "beside")


def worker(model_folder: str, rows_path: str) -> None:
    data = json.loads(Path(rows_path).read_text())
    trainer = Minisft(model_folder, "fp32", "none", "minisft packed", data["rows"], data["pad_id"])

    def work(command: dict) -> dict:
        began = time.perf_counter()
        loss = trainer.step(command["first"], command["count"])
        return {"seconds": time.perf_counter() - began, "loss": loss}

    serve({"ready": True, "policy": os.environ.get("OMP_WAIT_POLICY")}, work)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(folder: Path, rows_path: Path, rounds: int, count: int, num_busy: int) -> list[dict]:
    """Both policies in both settings, step by step in turns, so that a slow minute slows both."""
    rows = json.loads(rows_path.read_text())["rows"]
    environment = {key: value for key, value in os.environ.items() if key == "OMP_WAIT_POLICY"}
    assert not environment, "unset OMP_WAIT_POLICY: the default is what is measured"
    workers = {name: Worker(Path(__file__), [str(folder / "fp32"), str(rows_path)], given) for name, given in POLICIES.items()}
    speeds: dict[tuple[str, str], list[float]] = {(s, p): [] for s in SETTINGS for p in POLICIES}
    for step in range(rounds + 1):
        first = step * count
        tokens = sum(len(r["input_ids"]) for r in rows[first : first + count])
        for setting in SETTINGS:
            with busy(num_busy if setting == "beside" else 0):
                answers = {policy: workers[policy].ask(first=first, count=count) for policy in POLICIES}
            losses = [answer["loss"] for answer in answers.values()]
            assert abs(losses[0] / losses[1] - 1) < 1e-3, f"different losses: {losses}"
            if step > 0:  # the first step warms up
                for policy, answer in answers.items():
                    speeds[setting, policy].append(tokens / answer["seconds"])
        print(f"  step {step}: {answers}", file=sys.stderr, flush=True)
    for process in workers.values():
        process.close()
    return [
        {
            "setting": setting,
            "policy": policy,
            "busy_processes": num_busy if setting == "beside" else 0,
            "tokens_per_s": spread(values),
            "to_default": spread([v / d for v, d in zip(values, speeds[setting, "default"], strict=True)]),
        }
        for (setting, policy), values in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside the training run")
    parser.add_argument("--data", type=Path, default=BANKING77 if BANKING77.exists() else None, help="Banking77 as JSONL")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="one round of 2 rows; results in the temporary folder")
    arguments = parser.parse_args()
    rounds, count = (1, 2) if arguments.quick else (arguments.rounds, BATCH_SIZE)
    with tempfile.TemporaryDirectory() as name:
        rows_path = make_rows(arguments.data, (rounds + 1) * count, ["fp32"], Path(name))
        cells = measure(Path(name), rows_path, rounds, count, arguments.busy)
    result = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "rows_per_step": count,
        "rows": "Banking77 as chat" if arguments.data else "generated parcel messages",
        "cells": cells,
    }
    save("wait_policy", result, out_folder(arguments.out, arguments.quick))
    for cell in cells:
        speed, ratio = cell["tokens_per_s"], cell["to_default"]
        print(
            f"{cell['setting']:7} {cell['policy']:8} {speed['median']:8.1f} tokens/s ({speed['q1']:.1f} to {speed['q3']:.1f})  "
            f"x{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
