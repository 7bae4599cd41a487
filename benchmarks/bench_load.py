"""Loading SmolLM2-135M from start to end of a process, against reading the bytes of the same files, and against transformers.

    python benchmarks/bench_load.py [--rounds 7] [--cases q4_1 q8_0 fp32 bf16]
    python benchmarks/bench_load.py --quick      # one round of one case: does everything still run?

Each sample is a process of its own: "read" imports what minisft imports and reads the files into memory, "minisft" imports the
same and calls ``load_model`` (fp32), "transformers" imports itself and loads model and tokenizer of a folder (fp32; a GGUF file
takes it half a minute). They take turns; the files are in the page cache. The ratio of interest is minisft over read: 1.0 would
be loading for nothing. CPU seconds are user + system of the whole process; on a machine with other work read those, and set
OMP_NUM_THREADS=1. Before a folder is timed, minisft and transformers must hold the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import QUIET, note, out_folder, provenance, save, spread

CASES = ("q4_1", "q8_0", "fp32", "bf16")
CONTESTANTS = ("read", "minisft", "transformers")


def files_of(path: Path) -> list[Path]:
    """What a loader has to read."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def child(contestant: str, path: Path, check: bool) -> None:
    """One sample; with ``check`` it prints the sums of two weights."""
    if contestant == "transformers":
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        AutoTokenizer.from_pretrained(path)
    else:
        from minisft.formats import load_model

        if contestant == "read":
            kept = [file.read_bytes() for file in files_of(path)]
            assert kept
            return
        model = load_model(path)[0]
    if check:
        weights = model.model.embed_tokens.weight, model.model.layers[3].self_attn.k_proj.weight
        print(json.dumps([weight.double().abs().sum(1)[:64].tolist() for weight in weights]))


def sample(contestant: str, path: Path, check: bool = False) -> tuple[dict[str, float], str]:
    """Wall and CPU seconds of a process, and what it printed."""
    command = [sys.executable, __file__, "--child", contestant, str(path), str(int(check))]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **QUIET}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, f"{contestant} failed on {path}"
    return {"wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}, printed


def make_files(cases: list[str], folder: Path) -> dict[str, Path]:
    import torch

    from minisft import export_gguf, load_model, save_model
    from minisft.formats.source import SMOLLM2, resolve

    made: dict[str, Path] = {}
    for case in cases:
        made[case] = resolve(SMOLLM2).path if case == "q4_1" else folder / (f"{case}.gguf" if case == "q8_0" else case)
        if case == "q8_0":
            export_gguf(made[case], SMOLLM2, outtype="q8_0", compare=False)
        elif case != "q4_1":
            save_model(*load_model(SMOLLM2, torch.float32 if case == "fp32" else torch.bfloat16), made[case])
    return made


def measure(case: str, path: Path, rounds: int) -> dict:
    """One cell: all contestants in turns, forwards and backwards; the first turn checks and warms up."""
    contestants = CONTESTANTS if path.is_dir() else CONTESTANTS[:2]
    sums = [json.loads(sample(contestant, path, check=True)[1]) for contestant in contestants[1:]]
    assert sums[0] == sums[-1], f"{case}: different weights"
    sample("read", path)
    found: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in contestants}
    for turn in range(rounds):
        for contestant in contestants[:: 1 if turn % 2 else -1]:
            found[contestant].append(sample(contestant, path)[0])
            note(f"{case} {contestant} {found[contestant][-1]}")

    def ratios(over: str, under: str) -> dict[str, dict[str, float]]:
        pairs = list(zip(found[over], found[under], strict=True))
        return {what: spread([a[what] / b[what] for a, b in pairs]) for what in ("wall_s", "cpu_s")}

    peer = {"transformers_over_minisft": ratios("transformers", "minisft")} if path.is_dir() else {}

    return {
        "case": case,
        "file_bytes": sum(file.stat().st_size for file in files_of(path)),
        **{what: {c: spread([f[what] for f in each]) for c, each in found.items()} for what in ("wall_s", "cpu_s")},
        "minisft_over_read": ratios("minisft", "read"),
        **peer,
    }


def describe(cell: dict) -> str:
    ours = {what: cell[what]["minisft"]["median"] for what in ("wall_s", "cpu_s")}
    to_read, to_peer = cell["minisft_over_read"], cell.get("transformers_over_minisft")
    said = f"{cell['case']:5} minisft {ours['wall_s']:.2f} s, CPU {ours['cpu_s']:.2f}; "
    said += f"over reading the bytes {to_read['wall_s']['median']:.2f}, CPU {to_read['cpu_s']['median']:.2f}"
    if to_peer:
        said += f"; transformers takes {to_peer['wall_s']['median']:.2f} times as long, CPU {to_peer['cpu_s']['median']:.2f}"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--quick", action="store_true", help="one round of the first case; results in the temporary folder")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    arguments = parser.parse_args()
    cases, rounds = (arguments.cases[:1], 1) if arguments.quick else (arguments.cases, arguments.rounds)
    facts = {**provenance(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "default")}
    cells: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        for case, path in make_files(cases, Path(name)).items():
            cells.append(measure(case, path, rounds))
            result = {**facts, "load_average_after": os.getloadavg()[0], "cells": cells}
            save("load", result, out_folder(arguments.out, arguments.quick))
            print(describe(cells[-1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "1")
    else:
        main()
