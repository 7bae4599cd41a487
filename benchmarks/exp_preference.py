"""Base -> Instruct -> Chat on one task with exact truth: a short SFT on parcel messages, then DPO and GRPO from its adapter.

    python benchmarks/exp_preference.py                       # every cell that is not done yet; stop and start it as you like
    python benchmarks/exp_preference.py --seeds 0 --cells sft dpo dpo+nll grpo
    python benchmarks/exp_preference.py --figures             # the picture, from the results file only

Each cell is one run, one JSON line in benchmarks/results/preference.jsonl, keyed by a hash of its settings. ``task``: share of
held-out messages answered with the right JSON (Wilson interval); DPO cells add the held-out pairs that are ranked rightly and
how far the chosen answers have moved. Pairs: the right JSON against a wrong answer that the SFT model sampled itself, or else
the right one with one field changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import RESULTS, provenance

from minisft.config import RunConfig
from minisft.data.answer_text import stop_ids
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import read_dataset
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.metrics import json_match, wilson
from minisft.formats import load_adapter_, load_model
from minisft.generation import sample_groups
from minisft.quickstart.parcel_task import INTENTS, parcel_rows
from minisft.training.preference import dpo, grpo
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.runlog import read_metrics
from minisft.training.train import train

MODEL = "smollm2-135m-instruct"
FILE = RESULTS / "preference.jsonl"
SFT_STEPS, SFT_ROWS, TEST_ROWS, PAIRS, HELD_OUT_PAIRS = 20, 160, 100, 300, 100
DPO_STEPS, GRPO_STEPS = 75, 30
DPO_ARMS: dict[str, dict[str, object]] = {
    "dpo": {},
    "dpo+nll": {"rpo_alpha": 1.0},
    "dpo beta 0.01": {"beta": 0.01},
    "dpo beta 0.5": {"beta": 0.5},
}
GRPO_ARMS: dict[str, dict[str, object]] = {"grpo": {}, "grpo dr_grpo": {"loss": "dr_grpo"}}
CELLS = ("sft", *DPO_ARMS, *GRPO_ARMS, "grpo random reward", "general pairs")


def run_settings(folder: Path, seed: int) -> dict[str, object]:
    return {"model": MODEL, "seed": seed, "dtype": "fp32", "validation_share": 0.0, "out": str(folder)}


# ---- what all cells of a seed share ----------------------------------------------------------------------------------


class Lab:
    """The data and the SFT adapter of one seed, made once and kept under ``root``."""

    def __init__(self, root: Path, seed: int) -> None:
        self.folder, self.seed = root / f"seed-{seed}", seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train, self.test = self._rows("train", SFT_ROWS), self._rows("test", TEST_ROWS)
        self.adapter = self.folder / "sft" / "adapter"
        if not self.adapter.exists():
            train(RunConfig(data=str(self.train), steps=SFT_STEPS, **run_settings(self.folder / "sft", seed)))

    def _rows(self, split: str, count: int) -> Path:
        path = self.folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in parcel_rows(split, count, self.seed)))
        return path

    def score(self, adapter: Path) -> dict[str, object]:
        """The task's score of an adapter on held-out messages."""
        model, tokenizer = load_model(MODEL)
        load_adapter_(model, adapter)
        examples = read_dataset(self.test, keep_duplicates=True).examples
        found = evaluate(model, tokenizer, resolve_template(tokenizer), examples, "json", max_new_tokens=64)
        return {"task": found.score, "task_interval": list(wilson(found.score, found.n)), "rows": found.n}

    def pairs(self) -> tuple[Path, Path]:
        """Training and held-out pairs; written once."""
        paths = self.folder / "pairs.jsonl", self.folder / "held_out_pairs.jsonl"
        if not paths[1].exists():
            rows = parcel_rows("train", PAIRS + HELD_OUT_PAIRS, self.seed + 1000)
            wrong = self._wrong_answers(rows)
            draws = (random.Random(f"{self.seed}/{i}") for i in range(len(rows)))
            made = [_pair(*each) for each in zip(rows, wrong, draws, strict=True)]
            for path, part in zip(paths, (made[:PAIRS], made[PAIRS:]), strict=True):
                path.write_text("".join(json.dumps(pair) + "\n" for pair in part))
        return paths

    def _wrong_answers(self, rows: list[dict]) -> list[str | None]:
        """A wrong answer that the SFT model samples to each message, None where its sample is right."""
        model, tokenizer = load_model(MODEL)
        load_adapter_(model, self.adapter)
        template, eos = resolve_template(tokenizer), None
        eos = stop_ids(tokenizer, template)
        path = self.folder / "asked.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples = read_dataset(path, keep_duplicates=True).examples
        prompts = [encode_chat(tokenizer, template, e.messages[:-1], add_generation_prompt=True).input_ids for e in examples]
        groups = sample_groups(model, prompts, 1, max_new_tokens=64, eos_ids=eos, seed=self.seed)
        texts = [tokenizer.decode([i for i in group[0].ids if i not in eos]) for group in groups]
        return [None if json_match(t, e.messages[-1].content) else t for t, e in zip(texts, examples, strict=True)]


def _pair(row: dict, wrong: str | None, draw: random.Random) -> dict[str, object]:
    right = row["messages"][-1]["content"]
    return {"prompt": row["messages"][:-1], "chosen": right, "rejected": wrong or _one_field_changed(right, draw)}


def _one_field_changed(right: str, draw: random.Random) -> str:
    answer = json.loads(right)
    field = draw.choice(sorted(answer))
    changes = {
        "intent": lambda: draw.choice([i for i in INTENTS if i != answer["intent"]]),
        "order": lambda: answer["order"][:-1] + str((int(answer["order"][-1]) + draw.randint(1, 9)) % 10),
        "name": lambda: answer["name"][::-1].capitalize(),
        "urgent": lambda: not answer["urgent"],
    }
    answer[field] = changes[field]()
    return json.dumps(answer, separators=(",", ":"))


# ---- the cells -------------------------------------------------------------------------------------------------------


def run_cell(cell: str, lab: Lab) -> dict[str, object]:
    began = time.monotonic()
    out = lab.folder / cell.replace(" ", "-").replace("+", "-")
    if cell == "sft":
        found = lab.score(lab.adapter)
    elif cell in DPO_ARMS:
        found = _dpo(cell, lab, out, *lab.pairs(), init_adapter=str(lab.adapter), **DPO_ARMS[cell])
        found |= lab.score(out / "adapter")
    elif cell == "general pairs":
        data = Path(__file__).resolve().parents[2] / "shared" / "data" / "dpo_en.json"
        if not data.is_file():
            return {"skipped": f"needs {data.name}"}
        found = _dpo(cell, lab, out, data, None, validation_share=0.2, max_length=768, epochs=1.0)
    else:
        found = _grpo(cell, lab, out)
        found |= lab.score(out / "adapter")
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _dpo(cell: str, lab: Lab, out: Path, pairs: Path, held_out: Path | None, **settings: object) -> dict[str, object]:
    if "epochs" not in settings:
        settings["steps"] = DPO_STEPS
    values = {**run_settings(out, lab.seed), "batch_size": 4, "eval_every": 25, "lr": 2e-5, **settings}
    values["eval_data"] = None if held_out is None else str(held_out)
    result = dpo(DPOConfig(data=str(pairs), **values))
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval_loss" in row]
    right = rows[-1]["eval_rewards/accuracies"]
    n = HELD_OUT_PAIRS if held_out else round(300 * 0.2)
    return {
        "pairs_right": right,
        "pairs_interval": list(wilson(right, n)),
        "chosen_change": rows[-1]["eval_logps/chosen_change"],
        "margin_nats": rows[-1]["eval_rewards/margins"] / values.get("beta", 0.1),
        "steps": result.steps,
    }


def _by_hash(answer: str, row: object) -> float:
    """The control's reward: it says nothing about the answer."""
    return float(hashlib.sha256(answer.encode()).digest()[0] % 2)


def _grpo(cell: str, lab: Lab, out: Path) -> dict[str, object]:
    prompts = lab.folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in parcel_rows("train", 400, lab.seed + 2000)))
    arm = GRPO_ARMS.get(cell, {})
    is_control = cell == "grpo random reward"
    values = {
        **run_settings(out, lab.seed), "steps": 10 if is_control else GRPO_STEPS, "max_new_tokens": 48, "lr": 1e-4,
        "eval_every": 10, "validation_share": 0.05, "reward": "hash" if is_control else "json",
        "init_adapter": str(lab.adapter), **arm,
    }  # fmt: skip
    grpo(GRPOConfig(data=str(prompts), **values), reward=_by_hash if is_control else None)
    rows = read_metrics(out / "metrics.jsonl")
    evals = [row["eval_reward"] for row in rows if "eval_reward" in row]
    return {
        "reward": [row["reward"] for row in rows],
        "zero_std": [row["frac_reward_zero_std"] for row in rows],
        "length": [row["completions/mean_length"] for row in rows],
        "eval_reward": evals,
    }


# ---- the results file ------------------------------------------------------------------------------------------------


def key_of(cell: str, seed: int) -> str:
    settings = {
        "cell": cell, "seed": seed, "sft": [SFT_STEPS, SFT_ROWS, TEST_ROWS], "pairs": [PAIRS, HELD_OUT_PAIRS],
        "steps": [DPO_STEPS, GRPO_STEPS], "arm": {**DPO_ARMS, **GRPO_ARMS}.get(cell),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def done() -> dict[str, dict]:
    if not FILE.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, FILE.read_text().splitlines())}


def cells(names: list[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    return ((cell, seed) for seed in seeds for cell in names)


def figures() -> None:
    """Task score by arm with intervals; pairs right and chosen change beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in done().values() if "skipped" not in row]
    names = [cell for cell in CELLS if any(r["cell"] == cell and "task" in r for r in rows)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for y, name in enumerate(names):
        for k, row in enumerate(r for r in rows if r["cell"] == name):
            low, high = row["task_interval"]
            left.plot([low, high], [y + 0.15 * k] * 2, color="tab:gray")
            left.plot([row["task"]], [y + 0.15 * k], "o", color="tab:blue")
    left.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="right JSON on held-out messages, 95 % intervals")
    left.invert_yaxis()
    for row in (r for r in rows if "chosen_change" in r):
        right.plot([row["chosen_change"]], [row["pairs_right"]], "o", color="tab:blue")
        right.annotate(
            row["cell"], (row["chosen_change"], row["pairs_right"]), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    right.set(xlabel="change of the chosen answer, nats a token", ylabel="held-out pairs ranked rightly", ylim=(0, 1.05))
    figure.savefig(RESULTS / "preference.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument(
        "--root", type=Path, default=Path(tempfile.gettempdir()) / "minisft-preference", help="runs are kept here"
    )
    parser.add_argument("--figures", action="store_true", help="draw from the results file and stop")
    arguments = parser.parse_args()
    if arguments.figures:
        figures()
        return
    for cell, seed in cells(arguments.cells, arguments.seeds):
        key = key_of(cell, seed)
        if key in done():
            continue
        found = run_cell(cell, Lab(arguments.root, seed))
        row = {"key": key, "cell": cell, "seed": seed, **found, "threads": torch.get_num_threads()}
        with FILE.open("a") as file:
            file.write(json.dumps(row | {"provenance": provenance(sys.argv)}) + "\n")
        print(json.dumps(row))
    figures()


if __name__ == "__main__":
    main()
