"""Whole LoRA training steps of SmolLM2-135M: minisft against transformers + PEFT, on the same rows, taking turns.

    python benchmarks/bench_train.py [--dtypes fp32 bf16] [--mallocs default tuned] [--rounds 5] [--data banking77_train.jsonl]
    python benchmarks/bench_train.py --dtypes bf16-in-fp32            # computed in fp32: the numbers of a checkpoint in bf16
    python benchmarks/bench_train.py --quant nf4 --dtypes fp32        # QLoRA: results/train_nf4_fp32.json and .svg
    python benchmarks/bench_train.py --quant nf4 --dtypes bf16        # the peer is then transformers + PEFT + bitsandbytes
    python benchmarks/bench_train.py --quick [--quant nf4]            # one short step of 2 rows: does everything still run?

Rank 16 on every linear but the head, batches of 8 rows, AdamW, clipping; a tenth of the tokens is supervised. Tokens are
counted without padding; a beginning that all rows share counts in every row, also where it is computed only once. All start
from the same weights and must report the same loss on the first batch before anything is timed.
After that each says how much of a step its matrix products need at the machine's own rate (``gemm_share.py``).
Results go to benchmarks/results: train_fp32.json and .svg, train_nf4_bf16.json and .svg, or train.json for two dtypes at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import gemm_share
import torch
from harness import Worker, out_folder, peak_rss_bytes, provenance, save, serve, spread

BATCH_SIZE, RANK, ALPHA, LR = 8, 16, 32.0, 2e-4
SHARE_ROUNDS = 3  # of the share for each timed step: single ones differ more
NARROW = 3 * RANK  # products of adapters have no larger side: q, k and v have one for what they want of x
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-in-fp32": torch.bfloat16}
DTYPES = STORED | {"bf16-in-fp32": torch.float32}  # in which the model is loaded
OURS = ("minisft padded", "minisft packed, each row whole", "minisft packed")
PEERS = {"none": "transformers+peft", "nf4": "transformers+peft+bitsandbytes"}
# How far apart the first losses may be. In 4 bits the codes are equal, but on a CPU bitsandbytes rounds its 8-bit scales
# through a table that is not exactly nearest: in SmolLM2 1 scale in 400 is the neighbouring number, and the weights differ by
# 3.4e-4 of their size (root mean square), where quantizing moved them by 9.4e-2; the loss then differed by 6e-4. And after
# PEFT's usual preparation a bf16 base runs between fp32 norms, so that its activations are rounded elsewhere than ours.
LOSS_TOLERANCE = {("none", "fp32"): 1e-4, ("none", "bf16"): 2e-2, ("nf4", "fp32"): 2e-3, ("nf4", "bf16"): 2e-2}
LOSS_TOLERANCE |= {(quant, "bf16-in-fp32"): LOSS_TOLERANCE[quant, "fp32"] for quant in ("none", "nf4")}
BANKING77 = Path(__file__).parents[2] / "shared" / "data" / "banking77_train.jsonl"
INSTRUCTION = (
    "You route messages for the customer service of a bank. Read the message and answer with the customer's intent as JSON."
    "\n\nMessage: "
)


# ---- rows ----


def make_rows(data: Path | None, num_rows: int, dtypes: list[str], folder: Path) -> Path:
    """Encode chat rows once for all contestants; save the model in each dtype, so that all of them read the same numbers."""
    from minisft.data.chat import resolve_template
    from minisft.data.encoding import encode_dataset
    from minisft.data.messages import Example, Message
    from minisft.formats import load_model, save_model
    from minisft.quickstart.parcel_task import parcel_rows

    for dtype in dtypes:
        model, tokenizer = load_model("smollm2-135m-instruct", dtype=STORED[dtype])
        save_model(model, tokenizer, folder / dtype)
    del model
    if data is not None:
        pairs = [
            (INSTRUCTION + r["text"], json.dumps({"intent": r["label"]}))
            for r in map(json.loads, data.read_text().splitlines()[:num_rows])
        ]
        examples = [Example((Message("user", q), Message("assistant", a)), i) for i, (q, a) in enumerate(pairs, 1)]
    else:
        chats = [row["messages"] for row in parcel_rows("train", num_rows)]
        examples = [Example(tuple(Message(**m) for m in chat), i) for i, chat in enumerate(chats, 1)]
    encoded = encode_dataset(examples, tokenizer, resolve_template(tokenizer), 1024)
    rows = [{"input_ids": r.input_ids, "supervised": r.supervised} for r in encoded.rows]
    path = folder / "rows.json"
    path.write_text(json.dumps({"rows": rows, "pad_id": tokenizer.pad_id}))
    return path


# ---- contestants ----


class Minisft:
    def __init__(self, model_folder: str, dtype: str, quant: str, layout: str, rows: list[dict], pad_id: int) -> None:
        from minisft.config import RunConfig
        from minisft.data.chat import Encoded
        from minisft.formats import load_model
        from minisft.optim import MasterAdamW
        from minisft.step import prepare_method

        run = RunConfig(model=model_folder, data="", out="", rank=RANK, alpha=ALPHA, quant=quant)
        self.model, _ = load_model(model_folder, dtype=DTYPES[dtype], quant=run.quantization)
        self.optimizer = MasterAdamW(prepare_method(self.model, run), betas=(0.9, 0.999), weight_decay=0.0)
        self.rows = [Encoded(r["input_ids"], r["supervised"], i, 0, 0) for i, r in enumerate(rows)]
        self.pad_id, self.packing, self.share_prefix = pad_id, "packed" in layout, "whole" not in layout

    def step(self, first: int, count: int) -> float:
        from minisft.batching import micro_batches
        from minisft.step import train_step

        rows = self.rows[first : first + count]
        batches = micro_batches(rows, count, self.pad_id, self.packing, 1024, self.share_prefix)
        return train_step(self.model, self.optimizer, batches, LR, clip=1.0).loss


class Peft:
    def __init__(self, model_folder: str, dtype: str, quant: str, rows: list[dict], pad_id: int) -> None:
        from peft import LoraConfig, get_peft_model

        base = _base(model_folder, DTYPES[dtype]) if quant == "none" else _base_in_4_bits(model_folder, DTYPES[dtype])
        self.model = get_peft_model(
            base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.rows, self.pad_id = rows, pad_id

    def step(self, first: int, count: int) -> float:
        rows = self.rows[first : first + count]
        T = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), T), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for b, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[b, :n] = torch.tensor(row["input_ids"])
            mask[b, :n] = 1
            labels[b, :n] = torch.where(torch.tensor(row["supervised"]), ids[b, :n], -100)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _base(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _base_in_4_bits(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """Prepared as PEFT's guide says, but for checkpointing, which minisft does without here too."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings, device_map="cpu")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def worker(contestant: str, dtype: str, quant: str, model_folder: str, rows_path: str, tuned: bool) -> None:
    if tuned:
        from minisft.common.device import tune_allocator

        assert tune_allocator()
    data = json.loads(Path(rows_path).read_text())
    if contestant == PEERS[quant]:
        trainer: Minisft | Peft = Peft(model_folder, dtype, quant, data["rows"], data["pad_id"])
    else:
        trainer = Minisft(model_folder, dtype, quant, contestant, data["rows"], data["pad_id"])

    def work(command: dict) -> dict:
        if "share_rounds" in command:
            step = functools.partial(trainer.step, command["first"], command["count"])
            return gemm_share.measure(step, command["share_rounds"], narrow=NARROW)
        began = time.perf_counter()
        loss = trainer.step(command["first"], command["count"])
        return {"seconds": time.perf_counter() - began, "loss": loss, "peak_bytes": peak_rss_bytes()}

    serve({"ready": True}, work)


# ---- the comparison ----


def compare(dtype: str, quant: str, malloc: str, folder: Path, rows_path: Path, rounds: int, count: int) -> list[dict]:
    """All contestants in one setting, step by step in turns."""
    rows = json.loads(rows_path.read_text())["rows"]
    peer, tolerance = PEERS[quant], LOSS_TOLERANCE[quant, dtype]
    arguments = [dtype, quant, str(folder / dtype), str(rows_path), malloc]
    workers = {name: Worker(Path(__file__), [name, *arguments], {}) for name in (peer, *OURS)}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    peaks: dict[str, int] = {}
    for step in range(rounds + 1):
        first = step * count
        tokens = sum(len(r["input_ids"]) for r in rows[first : first + count])
        losses = {}
        for name, contestant in workers.items():
            answer = contestant.ask(first=first, count=count)
            losses[name], peaks[name] = answer["loss"], answer["peak_bytes"]
            if step > 0:  # the first step warms up
                seconds[name].append(answer["seconds"] / tokens)
        if step == 0:
            assert all(abs(loss / losses[peer] - 1) < tolerance for loss in losses.values()), f"different losses: {losses}"
        print(f"  {dtype} {malloc} step {step}: {losses}", file=sys.stderr, flush=True)
    shares = {
        name: contestant.ask(first=0, count=count, share_rounds=SHARE_ROUNDS * rounds) for name, contestant in workers.items()
    }
    for contestant in workers.values():
        contestant.close()
    return [
        {
            "dtype": dtype,
            "quant": quant,
            "malloc": malloc,
            "contestant": name,
            "tokens_per_s": spread([1 / s for s in seconds[name]]),
            "speed_ratio": spread([p / s for p, s in zip(seconds[peer], seconds[name], strict=True)]),
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[peer],
            "gemm_share": spread(shares[name]["shares"]),
            "gemm_share_ceiling": shares[name]["ceiling"],
            "gflops": shares[name]["gflops"],
            "machine_gflops_per_s": shares[name]["gflops_per_s"],
        }
        for name in workers
    ]


def plot(cells: list[dict], count: int, path: Path) -> None:
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((c["dtype"], c["malloc"]) for c in cells))
    contestants = list(dict.fromkeys(c["contestant"] for c in cells))
    peer = contestants[0].replace("+", " + ").replace("peft", "PEFT")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    colors = dict(zip(contestants, ("#8a8a8a", "#a6d4f2", "#56b4e9", "#0072b2"), strict=True))
    for k, name in enumerate(contestants):
        mine = [next(c for c in cells if (c["dtype"], c["malloc"], c["contestant"]) == (*s, name)) for s in settings]
        x = [i + (k - 1.5) * 0.21 for i in range(len(settings))]
        ratios = [c["speed_ratio"] for c in mine]
        errors = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        bars = speed.bar(x, [r["median"] for r in ratios], 0.2, yerr=errors, color=colors[name], label=name, capsize=2)
        speed.bar_label(bars, [f"{r['median']:.1f}" for r in ratios], fontsize=8, padding=2)
        bars = memory.bar(x, [c["peak_bytes"] / 1e9 for c in mine], 0.2, color=colors[name])
        memory.bar_label(bars, [f"{c['peak_bytes'] / 1e9:.1f}" for c in mine], fontsize=8, padding=2)
    for axes in (speed, memory):
        axes.set_xticks(range(len(settings)), [f"{d}\n{m} malloc" for d, m in settings])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    speed.set_ylabel(f"tokens per second, ratio to\n{peer}")
    memory.set_ylabel("peak resident memory (GB)")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    method = "LoRA" if cells[0]["quant"] == "none" else "QLoRA (NF4)"
    figure.suptitle(f"One {method} training step, SmolLM2-135M, batches of {count} rows", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", default="none", choices=list(PEERS), help="how the frozen base is stored")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--mallocs", nargs="+", default=["default", "tuned"], choices=["default", "tuned"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=BANKING77 if BANKING77.exists() else None, help="Banking77 as JSONL")
    parser.add_argument("--name", help="name of the results file")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument(
        "--quick", action="store_true", help="one dtype, malloc, round; steps of 2 rows; results in the temporary folder"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.dtypes, arguments.mallocs, arguments.rounds = arguments.dtypes[:1], arguments.mallocs[-1:], 1
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure every setting that was asked for, save, plot and print."""
    dtypes, quant, count = arguments.dtypes, arguments.quant, 2 if arguments.quick else BATCH_SIZE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_path = make_rows(arguments.data, (arguments.rounds + 1) * count, dtypes, folder)
        rows = json.loads(rows_path.read_text())["rows"]
        cells = [
            cell
            for dtype in dtypes
            for malloc in arguments.mallocs
            for cell in compare(dtype, quant, malloc, folder, rows_path, arguments.rounds, count)
        ]
    lengths = [len(r["input_ids"]) for r in rows]
    result = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "rows_per_step": count,
        "rows": "Banking77 as chat" if arguments.data else "generated parcel messages",
        "mean_row_tokens": sum(lengths) / len(lengths),
        "supervised_share": sum(sum(r["supervised"]) for r in rows) / sum(lengths),
        "cells": cells,
    }
    name = "_".join(["train", *([quant] if quant != "none" else []), *(dtypes if len(dtypes) == 1 else [])])
    path = save(arguments.name or name, result, out_folder(arguments.out, arguments.quick))
    plot(cells, count, path.with_suffix(".svg"))
    for cell in cells:
        speed = cell["speed_ratio"]
        print(
            f"{cell['dtype']} {cell['malloc']:8} {cell['contestant']:31} {cell['tokens_per_s']['median']:8.1f} tokens/s  "
            f"x{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})  "
            f"{cell['peak_bytes'] / 1e9:.2f} GB  x{cell['memory_ratio']:.2f}  "
            f"{cell['gemm_share']['median']:.0%} of {cell['machine_gflops_per_s']:.0f} GFLOP/s, "
            f"PyTorch's at most {cell['gemm_share_ceiling']:.0%}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        *strings, malloc = sys.argv[2:]
        worker(*strings, malloc == "tuned")
    else:
        main()
