"""Steps of DPO and of GRPO on SmolLM2-135M with LoRA: minisft against TRL + PEFT, same model, rows and settings, taking turns.

    python benchmarks/bench_preference.py [--kinds dpo grpo] [--rounds 5]     # results/preference_speed.json
    python benchmarks/bench_preference.py --quick                             # one short round: does everything still run?

fp32, rank 8 on every linear but the head, both start from one adapter (so the reference is that adapter), AdamW, clipping, no
checkpointing of activations. DPO: 8 pairs a step, the reference computed before the first step by both; the first losses must
agree. Tokens are those of prompt and both answers. GRPO: 8 prompts, 8 answers each, up to 48 new tokens, sampling and update
together; TRL updates 8 answers at a time, as minisft does. Samples differ, so what must agree is the log-probability of the
answers a token (their entropy) and their length, and speed is given in answers and in sampled tokens a second.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from exp_preference import one_field_changed
from harness import Worker, out_folder, peak_rss_bytes, provenance, save, serve, spread, write_rows

from minisft.common.safe_json import JSON

RANK, ALPHA, LR, BETA, SEED = 8, 16.0, 1e-4, 0.1, 0
GROUP, NEW_TOKENS = 8, 48
OURS, PEER = "minisft", "trl+peft"
CHECKED = 3  # first steps whose losses are compared
TOLERANCE = {"dpo": 2e-3, "grpo": 0.25}  # of the loss; of the mean entropy and length of sampled answers


def pseudo_reward(answer: str) -> float:
    """Any function of the answer with many values, so that no group is constant and none is left out of the update."""
    return hashlib.sha256(answer.encode()).digest()[0] / 255


# ---- rows ----


def make_rows(folder: Path, num_rows: int) -> None:
    """The model, an adapter that is not zero, and the rows: for us as chats, for TRL as the same chats in text."""
    from minisft.config import LoRAConfig
    from minisft.data.chat import resolve_template
    from minisft.data.messages import Message
    from minisft.formats import load_model, save_adapter, save_model
    from minisft.quickstart.parcel_task import parcel_rows
    from minisft.surgery import apply_lora_, lora_modules

    model, tokenizer = load_model("smollm2-135m-instruct")
    save_model(model, tokenizer, folder / "model")
    model, tokenizer = load_model(folder / "model")  # the adapter is to know this base
    apply_lora_(model, LoRAConfig(rank=RANK, alpha=ALPHA), SEED)
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for adapter in lora_modules(model).values():
            adapter.lora_B.normal_(std=1e-3, generator=draw)
    save_adapter(model, folder / "adapter")
    template = resolve_template(tokenizer)
    ours, theirs = [], []
    for i, row in enumerate(parcel_rows("train", num_rows)):
        *prompt, answer = row["messages"]
        rejected = one_field_changed(answer["content"], random.Random(i))
        text = template.render([Message(**m) for m in prompt], add_generation_prompt=True).text
        ours.append({"prompt": prompt, "chosen": answer["content"], "rejected": rejected})
        theirs.append({"prompt": text, "chosen": answer["content"], "rejected": rejected})
    write_rows(folder / "ours.jsonl", ours)
    write_rows(folder / "theirs.jsonl", theirs)


# ---- contestants ----


class Minisft:
    """The trainer of ``minisft dpo`` or ``minisft grpo``, one step at a time, its rows in the file's order."""

    def __init__(self, kind: str, folder: Path, batch: int) -> None:
        from minisft.data.pairs import read_pairs
        from minisft.formats import load_model
        from minisft.training.dpo_run import DPOTrainer
        from minisft.training.grpo_run import GRPOTrainer
        from minisft.training.init_adapter import load_init_adapter_, with_adapter_settings
        from minisft.training.preference_config import DPOConfig, GRPOConfig
        from minisft.training.preference_data import prepare_pairs, prepare_prompts
        from minisft.training.rewards import Reward

        settings: dict[str, object] = {
            "model": str(folder / "model"), "out": str(folder / f"run-{kind}"), "init_adapter": str(folder / "adapter"),
            "dtype": "fp32", "seed": SEED, "lr": LR, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip": 1.0,
            "validation_share": 0.0, "steps": 10**6,
        }  # fmt: skip
        rows = folder / "ours.jsonl"
        if kind == "grpo":
            prompts = folder / "prompts.jsonl"
            prompts.write_text("".join(json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n" for line in rows.open()))
            run = GRPOConfig(
                data=str(prompts), reward="hash", prompts_per_step=batch, num_generations=GROUP, max_new_tokens=NEW_TOKENS,
                **settings,
            )  # fmt: skip
        else:
            assert len(read_pairs(str(rows)).pairs) == sum(1 for _ in rows.open())
            run = DPOConfig(data=str(rows), batch_size=batch, beta=BETA, **settings)
        model, tokenizer = load_model(folder / "model", dtype=torch.float32)
        run, _ = with_adapter_settings(run, model)
        load_init_adapter_(model, run)
        Path(run.out).mkdir()
        if isinstance(run, GRPOConfig):
            reward = Reward("hash", lambda answer, row: pseudo_reward(answer))
            template, data = prepare_prompts(run, reward, model.config.max_position_embeddings, tokenizer, _quiet)
            self.trainer = GRPOTrainer(run, model, tokenizer, template, data, _quiet, reward=reward)
        else:
            template, data = prepare_pairs(run, tokenizer, _quiet)
            self.trainer = DPOTrainer(run, model, tokenizer, template, data, _quiet)
        self.trainer.step_rows = lambda step: data.train[(step - 1) * batch : step * batch]
        self.trainer.prepare()

    def step(self, number: int) -> dict[str, float]:
        began = time.perf_counter()
        batches = self.trainer.batches(number)
        sampled = time.perf_counter()
        result = self.trainer.step(number, batches, LR)
        ended = time.perf_counter()
        facts = self.trainer.facts()
        found = {"seconds": ended - began, "loss": result.loss, "tokens": result.num_tokens, "sampling": sampled - began}
        if "entropy" in facts:
            found |= {"entropy": facts["entropy"], "length": facts["completions/mean_length"]}
        return found


def _quiet(text: str) -> None:
    """A trainer's notes are not of interest here."""


def trl_worker(kind: str, folder: Path, batch: int, num_steps: int) -> None:
    """TRL's own loop; a callback between two of its steps says what the last one took and waits for the next turn."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        began = 0.0

        def wait(self) -> None:
            if not sys.stdin.readline():
                sys.stdout.flush()
                os._exit(0)
            self.began = time.perf_counter()

        def on_train_begin(self, *_: object, **__: object) -> None:
            print(json.dumps({"ready": True}), flush=True)
            self.wait()

        def on_step_end(self, *_: object, **__: object) -> None:
            found = {"seconds": time.perf_counter() - self.began, "peak_bytes": peak_rss_bytes(), **facts()}
            losses.clear()
            print("\n" + json.dumps(found), flush=True)
            self.wait()

    losses: list[float] = []

    def noted(base: type) -> type:
        class Noted(base):
            def compute_loss(self, *values: object, **named: object) -> object:
                loss = super().compute_loss(*values, **named)
                losses.append(float(loss.detach()))
                return loss

            def _get_train_sampler(self, *values: object, **named: object) -> object:
                if kind == "dpo":
                    return SequentialSampler(self.train_dataset)
                return super()._get_train_sampler(*values, **named)

        return Noted

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "theirs.jsonl").open()]
    shared = {
        "output_dir": str(folder / f"trl-{kind}"), "max_steps": num_steps, "learning_rate": LR, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True, "seed": SEED, "beta": BETA,
    }  # fmt: skip
    common = {"model": model, "processing_class": tokenizer, "callbacks": [Turns()]}
    if kind == "dpo":
        settings = DPOConfig(per_device_train_batch_size=batch, precompute_ref_log_probs=True, max_length=1024, **shared)
        trainer = noted(DPOTrainer)(args=settings, train_dataset=Dataset.from_list(rows), **common)
    else:
        settings = GRPOConfig(
            **{**shared, "beta": 0.0}, per_device_train_batch_size=GROUP, gradient_accumulation_steps=batch,
            num_generations=GROUP, max_completion_length=NEW_TOKENS, temperature=1.0, scale_rewards="none", loss_type="dapo",
            shuffle_dataset=False,
        )  # fmt: skip
        trainer = noted(GRPOTrainer)(
            reward_funcs=lambda completions, **_: [pseudo_reward(text) for text in completions],
            args=settings, train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]), **common,
        )  # fmt: skip

    def facts() -> dict[str, float]:
        metrics = trainer._metrics["train"]
        last = {name: float(metrics[name][-1]) for name in ("entropy", "completions/mean_length") if metrics.get(name)}
        loss = sum(losses) / max(len(losses), 1)
        return {"loss": loss, "entropy": last.get("entropy", 0.0), "length": last.get("completions/mean_length", 0.0)}

    trainer.train()


def worker(contestant: str, kind: str, folder: str, batch: str, num_steps: str) -> None:
    if contestant == PEER:
        trl_worker(kind, Path(folder), int(batch), int(num_steps))
        return
    from minisft.common.device import tune_allocator

    tune_allocator()  # as the command line does
    trainer = Minisft(kind, Path(folder), int(batch))
    serve({"ready": True}, lambda command: {**trainer.step(command["step"]), "peak_bytes": peak_rss_bytes()})


# ---- the comparison ----


def compare(kind: str, folder: Path, batch: int, rounds: int) -> dict[str, JSON]:
    """Both contestants, step by step in turns."""
    steps = rounds + 1  # the first warms up
    workers = {
        name: Worker(Path(__file__), [name, kind, str(folder), str(batch), str(steps + 1)], {"OMP_NUM_THREADS": _threads()})
        for name in (OURS, PEER)
    }
    answers: dict[str, list[dict]] = {name: [] for name in workers}
    for step in range(1, steps + 1):
        for name, contestant in workers.items():
            answers[name].append(contestant.ask(step=step))
        print(f"  {kind} step {step}: { ({name: found[-1] for name, found in answers.items()}) }", file=sys.stderr, flush=True)
        _require_agreement(kind, step, *(found[-1] for found in answers.values()))
    for contestant in workers.values():
        contestant.close()
    work = {name: _work(kind, batch, answers[OURS], found) for name, found in answers.items()}
    units = tuple(work[OURS])
    speeds = {
        name: {unit: [work[name][unit][i] / found[i]["seconds"] for i in range(1, steps)] for unit in units}
        for name, found in answers.items()
    }
    peaks = {name: found[-1]["peak_bytes"] for name, found in answers.items()}
    return {
        "kind": kind,
        "rows_per_step": batch,
        "speed": {
            name: {f"{unit}_per_s": spread(values) for unit, values in units_.items()} for name, units_ in speeds.items()
        },
        "ratio": {
            unit: spread([ours / peer for ours, peer in zip(speeds[OURS][unit], speeds[PEER][unit], strict=True)])
            for unit in units
        },
        "sampling_share": spread([a["sampling"] / a["seconds"] for a in answers[OURS][1:]]) if kind == "grpo" else None,
        "peak_bytes": peaks,
        "memory_ratio": peaks[OURS] / peaks[PEER],
        "first_losses": {name: [answer["loss"] for answer in found[:CHECKED]] for name, found in answers.items()},
    }


def _work(kind: str, batch: int, ours: list[dict], own: list[dict]) -> dict[str, list[float]]:
    """How much each step did; the same rows are the same tokens, sampled answers are each contestant's own."""
    if kind == "dpo":
        return {"tokens": [answer["tokens"] for answer in ours]}
    answers = batch * GROUP
    return {"samples": [answers] * len(own), "sampled_tokens": [answers * answer["length"] for answer in own]}


def _require_agreement(kind: str, step: int, ours: dict, peer: dict) -> None:
    names = ("loss",) if kind == "dpo" else ("entropy", "length")
    for name in names if step <= CHECKED else ():
        assert abs(ours[name] / peer[name] - 1) < TOLERANCE[kind], f"{kind}, step {step}: {name} {ours[name]} and {peer[name]}"


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["dpo", "grpo"], choices=["dpo", "grpo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="one round, 2 rows a step; results in the temporary folder")
    arguments = parser.parse_args()
    rounds, batch = (1, 2) if arguments.quick else (arguments.rounds, 8)
    cells = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as name:
            make_rows(Path(name), (rounds + 3) * batch)
            cells.append(compare(kind, Path(name), batch, rounds))
    result = {
        **provenance(),
        "trl": importlib.metadata.version("trl"),
        "threads": int(_threads()),
        "cells": cells,
    }
    save("preference_speed", result, out_folder(arguments.out, arguments.quick))
    for cell in cells:
        ratios = {unit: f"x{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})" for unit, r in cell["ratio"].items()}
        print(f"{cell['kind']}: {ratios}, memory x{cell['memory_ratio']:.2f}, losses {cell['first_losses']}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
