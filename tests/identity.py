"""Prints a hash of everything that a refactor must leave alone: ``python tests/identity.py > before.json``, and again after.

Twenty training steps with seed 0 (LoRA, DoRA, NF4; full; packed and padded): adapter or model, optimizer, metrics. A merge onto
each target: the weight files. ``--help`` of every command: its text. The numbers hold on one machine with one set of packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny_folder import losses, quiet, run_config, write_shop  # noqa: E402

COMMANDS = [
    "train",
    "eval",
    "generate",
    "chat",
    "inspect",
    "quantize",
    "plan",
    "merge",
    "combine",
    "sweep",
    "export",
    "verify",
    "quickstart",
]
RUNS: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "nf4": {"quant": "nf4"},
    "lora padded": {"packing": False},
    "lora bf16, dropout, micro-batches": {"dtype": "bf16", "dropout": 0.2, "micro_batch_size": 2},
    "full": {"method": "full", "lr": 1e-3},
}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def command(*words: object) -> str:
    """What ``minisft`` prints in a process of its own."""
    argv = [str(Path(sys.executable).parent / "minisft"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    run = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(argv)}: {run.returncode}\n{run.stderr}")
    return run.stdout


def runs(shop: Path) -> dict[str, object]:
    try:
        from minisft.training.train import train
    except ImportError:
        from minisft.train import train

    found: dict[str, object] = {}
    for name, changes in RUNS.items():
        out = shop / name.replace(" ", "-").replace(",", "")
        train(run_config(shop, out, **{"steps": 20, "eval_every": 5, "packing": True, **changes}), log=quiet)
        found[name] = {
            "weights": {str(f.relative_to(out)): sha(f.read_bytes()) for f in sorted(out.rglob("*.safetensors"))},
            "metrics": sha(json.dumps(losses(out), sort_keys=True).encode()),
        }
    return found


def merges(shop: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for adapter, targets in {
        "lora": ("dequantized",),
        "nf4": ("dequantized", "original", "requantized", "compensated"),
    }.items():
        for onto in targets:
            out = shop / f"merged-{adapter}-{onto}"
            words = ["--calibration", shop / "rows.jsonl"] if onto == "compensated" else []
            command(
                "merge", "--adapter", shop / adapter / "adapter", "--model", shop / "model", "--out", out, "--onto", onto,
                "--force", "--no-check", *words,
            )  # fmt: skip
            found[f"{adapter} {onto}"] = {f.name: sha(f.read_bytes()) for f in sorted(out.glob("*.safetensors"))}
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        shop = write_shop(Path(scratch))
        found = {
            "help": {name: sha(command(*name.split(), "--help").encode()) for name in ["", *COMMANDS]},
            "runs": runs(shop),
            "merges": merges(shop),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
