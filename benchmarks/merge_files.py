"""Merging itself, from files to files: ``minisft merge`` against PEFT's ``merge_and_unload`` and ``save_pretrained``.

Each merge is a process of its own, so that its time is what a user waits and its peak memory is its own. minisft's command
measures every layer and writes the certificate; with ``--no-check`` it does not load the models again to compare what they
say, which PEFT does not do either. Of PEFT the time without its imports is kept, too: they are much of a small merge.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from harness import spread
from merge_cases import MINISFT, PEFT, train_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(model: str, rank: int, dtype: str, folder: Path) -> tuple[Path, Path]:
    """The base as a folder in this dtype, and an adapter for it: an adapter of ours goes with the files that it was made on."""
    from minisft.config import LoRAConfig
    from minisft.formats import load_model, save_adapter, save_model
    from minisft.surgery import apply_lora_, lora_modules

    base, adapter = folder / f"base-{dtype}", folder / f"adapter-{dtype}"
    save_model(*load_model(model, dtype=DTYPES[dtype]), base)
    adapted, _ = load_model(base)
    apply_lora_(adapted, LoRAConfig(rank=rank, alpha=2.0 * rank))
    for index, each in enumerate(lora_modules(adapted).values()):
        train_(each, seed=index)
    save_adapter(adapted, adapter)
    return base, adapter


def commands(base: Path, adapter: Path, dtype: str) -> dict[str, list[str]]:
    """What each library is asked to do; the output folder comes last."""
    ours = f"-m minisft.cli.main merge --dtype {dtype} --no-check".split()
    peer = str(Path(__file__).with_name("peft_merge.py"))
    return {
        MINISFT: [sys.executable, *ours, "--model", str(base), "--adapter", str(adapter), "--out"],
        PEFT: [sys.executable, peer, str(base), str(adapter), dtype],
    }


def compare(base: Path, adapter: Path, dtype: str, rounds: int, scratch: Path) -> dict:
    """Alternating runs, the first of which warms the disk cache and has its weights compared."""
    seconds: dict[str, list[float]] = {MINISFT: [], PEFT: []}
    peaks: dict[str, list[int]] = {MINISFT: [], PEFT: []}
    without_imports: list[float] = []
    outs = {name: scratch / f"{name}-{dtype}" for name in seconds}
    error = 0.0
    for turn in range(rounds + 1):
        for name, command in commands(base, adapter, dtype).items():
            shutil.rmtree(outs[name], ignore_errors=True)
            run = measured([*command, str(outs[name])])
            if turn > 0:
                seconds[name].append(run["seconds"])
                peaks[name].append(run["peak_bytes"])
        if turn == 0:
            error = difference(outs[MINISFT], outs[PEFT])
            assert error <= {"fp32": 1e-6, "bf16": 2.0**-8}[dtype], f"the merged weights differ by {error} of their size"
        else:
            without_imports.append(json.loads((outs[PEFT] / "seconds.json").read_text())["seconds"])
    return {
        "dtype": dtype,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "peft_without_imports_s": spread(without_imports),
        "peak_bytes": {name: spread([float(p) for p in values]) for name, values in peaks.items()},
        "speed_ratio": spread([p / m for p, m in zip(seconds[PEFT], seconds[MINISFT], strict=True)]),
        "speed_ratio_without_imports": spread([p / m for p, m in zip(without_imports, seconds[MINISFT], strict=True)]),
        "memory_ratio": spread([m / p for p, m in zip(peaks[PEFT], peaks[MINISFT], strict=True)]),
        "weights_error": error,
    }


def measured(command: list[str]) -> dict:
    """Seconds and peak memory of a command."""
    launcher = [sys.executable, "-S", "-E", str(Path(__file__).with_name("measured_child.py"))]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def difference(ours: Path, theirs: Path) -> float:
    """The worst weight's root mean square difference as a share of its size."""
    mine, peer = _weights(ours), _weights(theirs)
    assert mine.keys() == peer.keys(), "different names"
    return max(float((mine[n].double() - peer[n].double()).norm() / peer[n].double().norm()) for n in mine)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def line(cell: dict) -> str:
    """One dtype for people."""
    speed, alone, memory = cell["speed_ratio"], cell["speed_ratio_without_imports"], cell["memory_ratio"]
    seconds = {name: values["median"] for name, values in cell["seconds"].items()}
    megabytes = {name: values["median"] / 1e6 for name, values in cell["peak_bytes"].items()}
    return (
        f"merging to {cell['dtype']}: minisft {seconds[MINISFT]:.1f} s, PEFT {seconds[PEFT]:.1f} s, x{speed['median']:.2f} "
        f"({speed['q1']:.2f} to {speed['q3']:.2f}), without PEFT's imports x{alone['median']:.2f}; peak memory "
        f"{megabytes[MINISFT]:.0f} MB against {megabytes[PEFT]:.0f}, x{memory['median']:.2f}"
    )
