"""Lines 5, 12 and 13 of the scorecard: a thousand merges undone, memory of a merge from files to files, a long run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from scorecard_parts import ROOT, use_tests

MIB = 2**20


# ---- line 5: merging and undoing it -----------------------------------------------------------------------------------------


def unmerge(quick: bool) -> dict[str, object]:
    """Line 5: merge and unmerge a model of each kind of base many times; then a merge that fails in its last module."""
    use_tests()
    import torch
    from laws import BASES, adapted
    from test_put_back import state
    from tiny import LLAMA_BIASES

    from minisft.common.errors import UserError
    from minisft.config import LoRAConfig
    from minisft.merge_weights import merge_, unmerge_
    from minisft.surgery import lora_modules

    cycles, failures, changed, half_merged = 10 if quick else 1000, [], 0, 0
    for base in BASES:
        model = adapted(LLAMA_BIASES, LoRAConfig(rank=2, alpha=3.0), base)
        before = state(model)
        for _ in range(cycles):
            merge_(model)
            unmerge_(model)
        if state(model) != before:
            changed += 1
            failures.append(f"{base}: other bits after {cycles} cycles")
        last = list(lora_modules(model).values())[-1]
        with torch.no_grad():
            last.lora_B.view(-1)[-1] = float("nan")
        before = state(model)
        try:
            merge_(model)
            failures.append(f"{base}: merged a NaN")
        except UserError:
            half_merged += state(model) != before
    return {
        "bases": len(BASES), "cycles": cycles, "changed": changed, "half merged": half_merged, "failures": failures,
        "peft drift %": peft_drift(), "quick": quick,
    }  # fmt: skip


def peft_drift(cycles: int = 50) -> float | None:
    """Percent of the numbers of a bf16 layer that are others after ``cycles`` of PEFT's merging; None without it."""
    try:
        import peft
    except ImportError:
        return None
    import torch

    torch.manual_seed(0)
    tree = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
    model = peft.get_peft_model(tree, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.05)
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    for _ in range(cycles):
        layer.merge()
        layer.unmerge()
    return round(100 * float((weight != before).float().mean()), 1)


# ---- line 12: memory of a streamed merge --------------------------------------------------------------------------------

MERGING = """
import json, sys
sys.path.insert(0, sys.argv[1])
from scorecard_memory import watched
from minisft.merging.streaming import merge_folder
import torch
torch.set_num_threads(1)
with watched() as memory:
    for number in range(int(sys.argv[5])):
        merge_folder(sys.argv[2], f"{sys.argv[3]}-{number}", max_shard_bytes=int(sys.argv[4]))
print(json.dumps(memory.grown))
"""


class watched:  # noqa: N801  # a context
    """Samples RssAnon of this process every millisecond; ``grown`` is the most it was above the start, in bytes."""

    def __enter__(self) -> watched:
        self.start, self.most, self.done = rss_anon(), 0, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, rss_anon())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def grown(self) -> int:
        return max(self.most, self.start) - self.start


def rss_anon() -> int:
    """Anonymous memory that is resident, in bytes: what this process made, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def merge_memory(quick: bool) -> dict[str, object]:
    """Line 12: merge a bf16 base of 2 x 512 MiB and one of 256 MiB, each in its own process; compare every number.

    The smaller is merged four times, so that as many bytes go by while memory is sampled: a peak is short, and a sample of a
    busy machine may miss it.
    """
    use_tests()
    shard = (32 if quick else 512) * MIB
    sizes = {"large": 2 * shard, "small": shard // 2}
    found: dict[str, object] = {"failures": [], "quick": quick}
    differing = tensors = 0
    for name, size in sizes.items():
        with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as place:
            folder = Path(place)
            adapter, shards = _write_base(folder, size, shard)
            began = time.monotonic()
            command = [
                sys.executable,
                "-c",
                MERGING,
                str(Path(__file__).parent),
                str(adapter),
                str(folder / "out"),
                str(shard + 4 * MIB),
                str(sizes["large"] // size),
            ]
            child = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
            )
            if child.returncode:
                return {**found, "error": child.stderr[-1000:]}
            found[f"{name} MiB"] = round(json.loads(child.stdout.splitlines()[-1]) / MIB, 1)
            found[f"{name} s"] = round(time.monotonic() - began, 1)
            found[f"{name} shards"] = shards
            for same in _compared(folder / "base", adapter, folder / "out-0"):
                tensors += 1
                differing += not same
    most, least = float(str(found["large MiB"])), float(str(found["small MiB"]))
    return found | {
        "grown MiB": max(most, least),
        "difference MiB": round(abs(most - least), 1),
        "tensors": tensors,
        "differing": differing,
    }


def _write_base(folder: Path, size: int, shard: int) -> tuple[Path, int]:
    """A base in bf16 of about ``size`` bytes, and an adapter over all its linears; the adapter, and how many shards."""
    import tiny_folder
    import torch

    from minisft.config import LoRAConfig
    from minisft.data.tokenizer import Tokenizer
    from minisft.formats import load_model, save_adapter, save_model
    from minisft.model import CausalLM
    from minisft.surgery import apply_lora_, lora_modules

    wide = 2048 if size >= 128 * MIB else 512  # a layer of 4 (wide, wide) and 3 (4 wide, wide)
    layers = round(size / (16 * wide * wide * 2))
    shape = replace(
        tiny_folder.CONFIG, hidden_size=wide, intermediate_size=4 * wide, num_layers=layers, num_heads=wide // 64,
        num_kv_heads=wide // 64, head_dim=64,
    )  # fmt: skip
    (folder / "scratch").mkdir()
    tiny_folder.write_tokenizer(folder / "scratch")
    tokenizer = Tokenizer.from_folder(folder / "scratch")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = CausalLM(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    save_model(model, tokenizer, folder / "base", max_shard_bytes=shard + 4 * MIB)
    del model
    model, _ = load_model(folder / "base", torch.bfloat16)
    apply_lora_(model, LoRAConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        for layer in lora_modules(model).values():
            layer.lora_B.normal_(std=0.02)
    save_adapter(model, folder / "adapter")
    return folder / "adapter", len(list((folder / "base").glob("*.safetensors")))


def _compared(base: Path, adapter: Path, out: Path) -> Iterator[bool]:
    """For each tensor of the merged folder, whether it is bit for bit that of a merge of the loaded model."""
    import torch
    from safetensors import safe_open

    from minisft.formats import load_adapter_, load_model
    from minisft.merge_weights import merge_

    model, _ = load_model(base, torch.bfloat16)
    load_adapter_(model, adapter)
    merge_(model)
    expected = dict(model.named_parameters())
    seen: set[str] = set()
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                seen.add(name)
                yield torch.equal(file.get_tensor(name), expected[name])
    if seen != set(expected):
        yield False


# ---- line 13: a long run ----------------------------------------------------------------------------------------------------

WARM_UP = 200


def soak(quick: bool) -> dict[str, object]:
    """Line 13: train for 3 000 steps beyond 200 of warm-up, with saves and evaluations; what has grown since."""
    use_tests()
    from tiny_folder import quiet, run_config, write_shop

    from minisft.training.runlog import MetricsLog
    from minisft.training.train import train

    steps = 250 if quick else WARM_UP + 3000
    seen: list[tuple[int, int, int]] = []
    real = MetricsLog.append

    def append(self: MetricsLog, row: dict) -> object:
        if row["step"] == WARM_UP or row["step"] == steps:
            seen.append((rss_anon(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        return real(self, row)

    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-") as name:
        folder = Path(name)
        run = run_config(
            write_shop(folder), folder / "run", steps=steps, save_every=20, eval_every=20, keep_last=2, log_every=100
        )
        with patch.object(MetricsLog, "append", append):
            train(run, log=quiet)
    (before, files, threads), (after, more_files, more_threads) = seen
    return {
        "steps": steps - WARM_UP, "saves": (steps - WARM_UP) // 20, "grown KiB": (after - before) // 1024,
        "files": more_files - files, "threads": more_threads - threads, "quick": quick,
    }  # fmt: skip
