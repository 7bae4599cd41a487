"""Whole LoRA training steps of SmolLM2-135M: minisft against transformers + PEFT, on the same rows, taking turns.

    python benchmarks/bench_train.py [--dtypes fp32 bf16] [--mallocs default tuned] [--rounds 5] [--data banking77_train.jsonl]

Rank 16 on every linear but the head, batches of 8 rows, AdamW, clipping; a tenth of the tokens is supervised. Tokens are
counted without padding; a beginning that all rows share counts in every row, also where it is computed only once. All start
from the same weights and must report the same loss on the first batch before anything is timed.
Results go to benchmarks/results/train.json and train.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import Worker, peak_rss_bytes, provenance, save, serve, spread

BATCH_SIZE, RANK, ALPHA, LR = 8, 16, 32.0, 2e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = ("transformers+peft", "minisft padded", "minisft packed, each row whole", "minisft packed")
BANKING77 = Path(__file__).parents[2] / "shared" / "data" / "banking77_train.jsonl"
INSTRUCTION = (
    "You route messages for the customer service of a bank. Read the message and answer with the customer's intent as JSON."
    "\n\nMessage: "
)


# ---- rows ----


def make_rows(data: Path | None, num_rows: int, folder: Path) -> Path:
    """Encode chat rows once for all contestants."""
    from minisft.chat import encode_dataset, resolve_template
    from minisft.formats import load_model, save_model
    from minisft.messages import Example, Message
    from minisft.parcel_task import parcel_rows

    model, tokenizer = load_model("smollm2-135m-instruct")
    save_model(model, tokenizer, folder / "model")
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
    def __init__(self, model_folder: str, dtype: str, layout: str, rows: list[dict], pad_id: int) -> None:
        from minisft.chat import Encoded
        from minisft.config import RunConfig
        from minisft.formats import load_model
        from minisft.optim import MasterAdamW
        from minisft.step import prepare_method

        self.model, _ = load_model(model_folder, dtype=DTYPES[dtype])
        run = RunConfig(model=model_folder, data="", out="", rank=RANK, alpha=ALPHA)
        self.optimizer = MasterAdamW(prepare_method(self.model, run), betas=(0.9, 0.999), weight_decay=0.0)
        self.rows = [Encoded(r["input_ids"], r["supervised"], i, 0, 0) for i, r in enumerate(rows)]
        self.pad_id, self.packing, self.share_prefix = pad_id, "packed" in layout, "whole" not in layout

    def step(self, first: int) -> float:
        from minisft.batching import micro_batches
        from minisft.step import train_step

        rows = self.rows[first : first + BATCH_SIZE]
        batches = micro_batches(rows, BATCH_SIZE, self.pad_id, self.packing, 1024, self.share_prefix)
        return train_step(self.model, self.optimizer, batches, LR, clip=1.0).loss


class Peft:
    def __init__(self, model_folder: str, dtype: str, rows: list[dict], pad_id: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=DTYPES[dtype])
        self.model = get_peft_model(
            base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.rows, self.pad_id = rows, pad_id

    def step(self, first: int) -> float:
        rows = self.rows[first : first + BATCH_SIZE]
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


def worker(contestant: str, dtype: str, model_folder: str, rows_path: str, tuned: bool) -> None:
    if tuned:
        from minisft.machine import tune_allocator

        assert tune_allocator()
    data = json.loads(Path(rows_path).read_text())
    if contestant == "transformers+peft":
        trainer: Minisft | Peft = Peft(model_folder, dtype, data["rows"], data["pad_id"])
    else:
        trainer = Minisft(model_folder, dtype, contestant, data["rows"], data["pad_id"])

    def work(command: dict) -> dict:
        began = time.perf_counter()
        loss = trainer.step(command["first"])
        return {"seconds": time.perf_counter() - began, "loss": loss, "peak_bytes": peak_rss_bytes()}

    serve({"ready": True}, work)


# ---- the comparison ----


def compare(dtype: str, malloc: str, folder: Path, rows_path: Path, rounds: int) -> list[dict]:
    """All contestants in one setting, step by step in turns."""
    rows = json.loads(rows_path.read_text())["rows"]
    arguments = [dtype, str(folder / "model"), str(rows_path), malloc]
    workers = {name: Worker(Path(__file__), [name, *arguments], {}) for name in CONTESTANTS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peaks: dict[str, int] = {}
    for step in range(rounds + 1):
        first = step * BATCH_SIZE
        tokens = sum(len(r["input_ids"]) for r in rows[first : first + BATCH_SIZE])
        losses = {}
        for name, contestant in workers.items():
            answer = contestant.ask(first=first)
            losses[name], peaks[name] = answer["loss"], answer["peak_bytes"]
            if step > 0:  # the first step warms up
                seconds[name].append(answer["seconds"] / tokens)
        tolerance = 1e-4 if dtype == "fp32" else 2e-2
        if step == 0:
            reference = losses["transformers+peft"]
            assert all(abs(loss / reference - 1) < tolerance for loss in losses.values()), f"different losses: {losses}"
        print(f"  {dtype} {malloc} step {step}: {losses}", file=sys.stderr, flush=True)
    for contestant in workers.values():
        contestant.close()
    peer = "transformers+peft"
    return [
        {
            "dtype": dtype,
            "malloc": malloc,
            "contestant": name,
            "tokens_per_s": spread([1 / s for s in seconds[name]]),
            "speed_ratio": spread([p / s for p, s in zip(seconds[peer], seconds[name], strict=True)]),
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[peer],
        }
        for name in CONTESTANTS
    ]


def plot(cells: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((c["dtype"], c["malloc"]) for c in cells))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    colors = dict(zip(CONTESTANTS, ("#8a8a8a", "#a6d4f2", "#56b4e9", "#0072b2"), strict=True))
    for k, name in enumerate(CONTESTANTS):
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
    speed.set_ylabel("tokens per second,\nratio to transformers + PEFT")
    memory.set_ylabel("peak resident memory (GB)")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("One LoRA training step, SmolLM2-135M, batches of 8 rows", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--mallocs", nargs="+", default=["default", "tuned"], choices=["default", "tuned"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=BANKING77 if BANKING77.exists() else None, help="Banking77 as JSONL")
    parser.add_argument("--name", default="train", help="name of the results file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_path = make_rows(arguments.data, (arguments.rounds + 1) * BATCH_SIZE, folder)
        rows = json.loads(rows_path.read_text())["rows"]
        cells = [
            cell
            for dtype in arguments.dtypes
            for malloc in arguments.mallocs
            for cell in compare(dtype, malloc, folder, rows_path, arguments.rounds)
        ]
    lengths = [len(r["input_ids"]) for r in rows]
    result = {
        **provenance(["python", "benchmarks/bench_train.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "rows": "Banking77 as chat" if arguments.data else "generated parcel messages",
        "mean_row_tokens": sum(lengths) / len(lengths),
        "supervised_share": sum(sum(r["supervised"]) for r in rows) / sum(lengths),
        "cells": cells,
    }
    path = save(arguments.name, result)
    plot(cells, path.with_suffix(".svg"))
    for cell in cells:
        speed = cell["speed_ratio"]
        print(
            f"{cell['dtype']} {cell['malloc']:8} {cell['contestant']:31} {cell['tokens_per_s']['median']:8.1f} tokens/s  "
            f"x{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})  "
            f"{cell['peak_bytes'] / 1e9:.2f} GB  x{cell['memory_ratio']:.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        contestant, dtype, model_folder, rows_path, malloc = sys.argv[2:]
        worker(contestant, dtype, model_folder, rows_path, malloc == "tuned")
    else:
        main()
