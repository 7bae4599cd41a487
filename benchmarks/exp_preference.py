"""Base -> Instruct -> Chat on one task with exact truth: a short SFT on parcel messages, then DPO and GRPO from its adapter.

    python benchmarks/exp_preference.py --threads 1           # every cell that is not done yet; stop and start it as you like
    python benchmarks/exp_preference.py --seeds 0 --cells sft dpo dpo+nll grpo
    python benchmarks/exp_preference.py --tiny                # two steps a cell, results beside the runs: does it all work?
    python benchmarks/exp_preference.py --figures             # the picture, from the results file only

Each cell is one run, one JSON line in benchmarks/results/preference.jsonl, keyed by a hash of its settings; a cell that was
stopped goes on from its last checkpoint. ``task``: share of held-out messages answered with the right JSON (Wilson interval);
``reward after ...``: mean reward of answers drawn to the same messages. DPO cells add the held-out pairs that are ranked
rightly and how far the chosen answers have moved. Pairs: the right JSON against a wrong answer that the SFT model sampled
itself, or else the right one with one field changed. All DPO arms of a seed share one reference, which is checked by its hash.
The cells that the claims rest on come first, for all seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import RESULTS, add_cell, provenance, read_cells, save_svg, settings_hash, write_rows

from minisft.config import RunConfig
from minisft.data.answer_text import stop_ids
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import read_dataset
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.metrics import json_match, wilson
from minisft.evaluation.statistics import bootstrap_mean
from minisft.formats import load_adapter_, load_model
from minisft.generation import sample_groups
from minisft.quickstart.parcel_task import INTENTS, parcel_rows
from minisft.training.preference import dpo, grpo
from minisft.training.preference_config import DPOConfig, GRPOConfig
from minisft.training.runlog import read_metrics
from minisft.training.train import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL = "smollm2-135m-instruct"
FILE = RESULTS / "preference.jsonl"
GENERAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "dpo_en.json"
DPO_ARMS: dict[str, dict[str, object]] = {
    "dpo": {},
    "dpo+nll": {"rpo_alpha": 1.0},
    "dpo beta 0.01": {"beta": 0.01},
    "dpo beta 0.5": {"beta": 0.5},
}
GRPO_ARMS: dict[str, dict[str, object]] = {
    "grpo 8 prompts, 2e-4": {"prompts_per_step": 8, "lr": 2e-4},
    "grpo random reward": {},
    "grpo 8 prompts": {"prompts_per_step": 8, "lr": 1e-4},
    "grpo 8 prompts, 5e-4": {"prompts_per_step": 8, "lr": 5e-4},
    "grpo 60 steps, 2e-4": {"prompts_per_step": 8, "lr": 2e-4, "steps": 60},
    "grpo": {},
    "grpo dr_grpo": {"loss": "dr_grpo"},
}
FIRST = ("sft", "dpo", "dpo+nll", "grpo 8 prompts, 2e-4", "grpo random reward")  # what the claims rest on
ARMS = tuple(dict.fromkeys((*FIRST, *DPO_ARMS, *GRPO_ARMS, "general pairs")))
AFTER = "reward after "  # what GRPO is after: the mean reward of answers drawn at temperature 1, on held-out messages
CELLS = (*ARMS, *(AFTER + arm for arm in ARMS if arm == "sft" or arm.startswith("grpo")))
ANSWERS = 4  # drawn to each of the held-out messages


@dataclass(frozen=True)
class Sizes:
    """How much of everything; one core does the cells of ``FIRST`` in about 35 minutes a seed."""

    sft_steps: int = 32  # of 4 rows: about 70 % right
    test_rows: int = 100
    pairs: int = 160
    held_out_pairs: int = 80
    dpo_steps: int = 40  # of 4 pairs
    prompts: int = 200
    held_out_prompts: int = 8
    grpo_steps: int = 30  # of 4 or 8 prompts with 8 answers each
    control_steps: int = 10
    general_pairs: int = 60
    general_held_out: int = 60


TINY = Sizes(
    sft_steps=2, test_rows=4, pairs=8, held_out_pairs=4, dpo_steps=2, prompts=12, held_out_prompts=2, grpo_steps=2,
    control_steps=2, general_pairs=4, general_held_out=4,
)  # fmt: skip
SFT = {"batch_size": 4, "lr": 8e-4, "packing": True}
DPO = {"batch_size": 4, "lr": 5e-4}
GRPO = {"prompts_per_step": 4, "num_generations": 8, "max_new_tokens": 40, "lr": 2e-4}


# ---- what all cells of a seed share ----------------------------------------------------------------------------------


class Lab:
    """The data and the SFT adapter of one seed, made once and kept under ``root``."""

    def __init__(self, root: Path, seed: int, sizes: Sizes) -> None:
        self.sizes, self.seed = sizes, seed
        self.folder = root / f"{settings_hash((asdict(sizes), SFT, DPO, GRPO))}-seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def settings(self, out: Path) -> dict[str, object]:
        return {"model": MODEL, "seed": self.seed, "dtype": "fp32", "validation_share": 0.0, "out": str(out)}

    @cached_property
    def adapter(self) -> Path:
        """After SFT: what every other run starts from."""
        out, steps = self.folder / "sft", self.sizes.sft_steps
        if not (out / "adapter").exists():
            rows = write_rows(self.folder / "train.jsonl", parcel_rows("train", 4 * steps, self.seed))
            train(RunConfig(data=str(rows), steps=steps, **SFT, **self.settings(out)), resume=out.exists())
        return out / "adapter"

    def score(self, adapter: Path) -> dict[str, object]:
        """The task's score of an adapter on held-out messages."""
        model, tokenizer = load_model(MODEL)
        load_adapter_(model, adapter)
        rows = write_rows(self.folder / "test.jsonl", parcel_rows("test", self.sizes.test_rows, self.seed))
        examples = read_dataset(rows, keep_duplicates=True).examples
        found = evaluate(model, tokenizer, resolve_template(tokenizer), examples, "json", max_new_tokens=48)
        return {"task": found.score, "task_interval": list(wilson(found.score, found.n)), "rows": found.n}

    def drawn(self, adapter: Path) -> dict[str, object]:
        """The mean reward of sampled answers to the held-out messages, and by message."""
        rows = parcel_rows("test", self.sizes.test_rows, self.seed)
        rewards = [
            sum(json_match(text, row["messages"][-1]["content"]) for text in texts) / len(texts)
            for row, texts in zip(rows, self._answers(rows, ANSWERS, adapter), strict=True)
        ]
        return {"reward": sum(rewards) / len(rewards), "rewards": rewards, "answers": ANSWERS}

    def pairs(self) -> tuple[Path, Path]:
        """Training and held-out pairs; written once."""
        paths, n = (self.folder / "pairs.jsonl", self.folder / "held_out_pairs.jsonl"), self.sizes.pairs
        if not paths[1].exists():
            rows = parcel_rows("train", n + self.sizes.held_out_pairs, self.seed + 1000)
            wrong = self._wrong_answers(rows)
            print(f"pairs: {sum(w is not None for w in wrong)} of {len(rows)} rejected answers are the model's own", flush=True)
            draws = (random.Random(f"{self.seed}/{i}") for i in range(len(rows)))
            made = [_pair(*each) for each in zip(rows, wrong, draws, strict=True)]
            for path, part in zip(paths, (made[:n], made[n:]), strict=True):
                write_rows(path, part)
        return paths

    def _wrong_answers(self, rows: list[dict]) -> list[str | None]:
        """A wrong answer that the SFT model samples to each message, None where its sample is right."""
        answers = self._answers(rows, 1, self.adapter)
        return [
            None if json_match(text, row["messages"][-1]["content"]) else text
            for [text], row in zip(answers, rows, strict=True)
        ]

    def _answers(self, rows: list[dict], each: int, adapter: Path) -> list[list[str]]:
        """What a model with its adapter says to each message, drawn at temperature 1."""
        model, tokenizer = load_model(MODEL)
        load_adapter_(model, adapter)
        template = resolve_template(tokenizer)
        eos = stop_ids(tokenizer, template)
        examples = read_dataset(write_rows(self.folder / "asked.jsonl", rows), keep_duplicates=True).examples
        prompts = [encode_chat(tokenizer, template, e.messages[:-1], add_generation_prompt=True).input_ids for e in examples]
        groups = sample_groups(model, prompts, each, max_new_tokens=48, eos_ids=eos, seed=self.seed)
        return [[tokenizer.decode([i for i in answer.ids if i not in eos]) for answer in group] for group in groups]

    def general_pairs(self) -> tuple[Path, Path]:
        """The shortest pairs of the general collection, copies once, dealt by the seed: to train on, and held out."""
        sizes, texts = self.sizes, {json.dumps(row) for row in json.loads(GENERAL.read_text())}
        short = sorted(texts, key=lambda text: (len(text), text))[: sizes.general_pairs + sizes.general_held_out]
        random.Random(self.seed).shuffle(short)
        held_out, rest = short[: sizes.general_held_out], short[sizes.general_held_out :]
        return (
            write_rows(self.folder / "general.jsonl", map(json.loads, rest)),
            write_rows(self.folder / "general_held_out.jsonl", map(json.loads, held_out)),
        )


def _pair(row: dict, wrong: str | None, draw: random.Random) -> dict[str, object]:
    right = row["messages"][-1]["content"]
    return {"prompt": row["messages"][:-1], "chosen": right, "rejected": wrong or one_field_changed(right, draw)}


def one_field_changed(right: str, draw: random.Random) -> str:
    answer = json.loads(right)
    field = draw.choice(sorted(answer))
    changes = {
        "intent": lambda: draw.choice([i for i in INTENTS if i != answer["intent"]]),
        "order": lambda: answer["order"][:-1] + str((int(answer["order"][-1]) + draw.randint(1, 9)) % 10),
        "name": lambda: answer["name"][1:].capitalize(),
        "urgent": lambda: not answer["urgent"],
    }
    answer[field] = changes[field]()
    return json.dumps(answer, separators=(",", ":"))


# ---- the cells -------------------------------------------------------------------------------------------------------


def run_cell(cell: str, lab: Lab) -> dict[str, object]:
    began = time.monotonic()
    out = lab.folder / cell.removeprefix(AFTER).translate(str.maketrans(" +", "--", ","))
    if cell.startswith(AFTER):
        adapter = lab.adapter if cell == AFTER + "sft" else out / "adapter"
        if not adapter.exists():
            return {"skipped": f"needs the run {cell.removeprefix(AFTER)}"}
        found = lab.drawn(adapter)
    elif cell == "sft":
        found = lab.score(lab.adapter)
    elif cell in DPO_ARMS:
        found = _dpo(lab, out, lab.pairs(), lab.sizes.dpo_steps, init_adapter=str(lab.adapter), **DPO_ARMS[cell])
        found |= lab.score(out / "adapter")
    elif cell == "general pairs":
        if not GENERAL.is_file():
            return {"skipped": f"needs {GENERAL.name}"}
        found = _dpo(lab, out, lab.general_pairs(), max(lab.sizes.general_pairs // 4, 1))
    else:
        found = _grpo(cell, lab, out)
        found |= lab.score(out / "adapter")
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _dpo(lab: Lab, out: Path, pairs: tuple[Path, Path], steps: int, **arm: object) -> dict[str, object]:
    """One DPO run over the pairs, validated at its end."""
    run = DPOConfig(
        data=str(pairs[0]), eval_data=str(pairs[1]), steps=steps, eval_every=steps, save_every=10,
        **DPO, **lab.settings(out), **arm,
    )  # fmt: skip
    kept = lab.folder / "reference.safetensors"
    if run.init_adapter and kept.exists() and not out.exists():  # another arm's: same pairs, same start
        out.mkdir()
        shutil.copy(kept, out)
    result = dpo(run, resume=out.exists())
    if run.init_adapter:
        shutil.copy(out / kept.name, kept)
    rows = read_metrics(out / "metrics.jsonl")
    last = next(row for row in reversed(rows) if "eval_loss" in row)
    right, n = last["eval_rewards/accuracies"], json.loads((out / "data.json").read_text())["validation"]["pairs"]
    return {
        "pairs_right": right,
        "pairs_interval": list(wilson(right, n)),
        "held_out_pairs": n,
        "chosen_change": last["eval_logps/chosen_change"],
        "margin_nats": last["eval_rewards/margins"] / run.beta,
        "train_chosen_change": [row["logps/chosen_change"] for row in rows],
        "train_margin_nats": [row["rewards/margins"] / run.beta for row in rows],
        "steps": result.steps,
        "run_seconds": round(result.seconds, 1),
    }


def _by_hash(answer: str, row: object) -> float:
    """The control's reward: it says nothing about the answer."""
    return float(hashlib.sha256(answer.encode()).digest()[0] % 2)


def _grpo(cell: str, lab: Lab, out: Path) -> dict[str, object]:
    rows = parcel_rows("train", lab.sizes.prompts + lab.sizes.held_out_prompts, lab.seed + 2000)
    prompts = write_rows(lab.folder / "prompts.jsonl", rows[: lab.sizes.prompts])
    held_out = write_rows(lab.folder / "held_out_prompts.jsonl", rows[lab.sizes.prompts :])
    is_control = cell == "grpo random reward"
    steps = lab.sizes.control_steps if is_control else lab.sizes.grpo_steps
    run = GRPOConfig(
        data=str(prompts), eval_data=str(held_out), init_adapter=str(lab.adapter), eval_every=10, save_every=5,
        reward="hash" if is_control else "json", **(GRPO | {"steps": steps} | GRPO_ARMS[cell]), **lab.settings(out),
    )  # fmt: skip
    result = grpo(run, reward=_by_hash if is_control else None, resume=out.exists())
    log = read_metrics(out / "metrics.jsonl")
    return {
        "reward": [row["reward"] for row in log],
        "zero_std": [row["frac_reward_zero_std"] for row in log],
        "length": [row["completions/mean_length"] for row in log],
        "eval_reward": [row["eval_reward"] for row in log if "eval_reward" in row],
        "steps": result.steps,
        "run_seconds": round(result.seconds, 1),
    }


# ---- the results file ------------------------------------------------------------------------------------------------


def key_of(cell: str, seed: int, sizes: Sizes) -> str:
    if cell.startswith(AFTER):
        return settings_hash((cell, key_of(cell.removeprefix(AFTER), seed, sizes), ANSWERS))
    return settings_hash((cell, seed, asdict(sizes), SFT, DPO, GRPO, DPO_ARMS.get(cell) or GRPO_ARMS.get(cell)))


def done(path: Path) -> dict[str, dict]:
    return {row["key"]: row for row in read_cells(path)}


def in_order(names: list[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    """What the claims rest on for all seeds, then the rest."""
    for part in (FIRST, [cell for cell in CELLS if cell not in FIRST]):
        yield from ((cell, seed) for seed in seeds for cell in part if cell in names)


def figures(path: Path) -> None:
    """Task score by arm with intervals; pairs right and chosen change beside it."""
    from matplotlib.figure import Figure

    rows = sorted(done(path).values(), key=lambda row: row["seed"])
    names = [cell for cell in CELLS if any(r["cell"] == cell and "task" in r for r in rows)]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, right, drawn = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    for y, name in enumerate(names):
        for k, row in enumerate(r for r in rows if r["cell"] == name):
            low, high = row["task_interval"]
            left.plot([low, high], [y + 0.15 * k] * 2, color="tab:gray")
            left.plot([row["task"]], [y + 0.15 * k], "o", color="tab:blue")
    left.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="right JSON on held-out messages, 95 % intervals")
    left.invert_yaxis()
    for name in (*DPO_ARMS, "general pairs"):
        if points := [(r["chosen_change"], r["pairs_right"]) for r in rows if r["cell"] == name]:
            right.plot(*zip(*points, strict=True), "o", label=name)
    right.legend(loc="lower right")
    right.margins(x=0.15)
    right.set(xlabel="change of the chosen answer, nats a token", ylabel="held-out pairs ranked rightly", ylim=(0, 1.05))
    _rewards(drawn, rows)
    save_svg(figure, path.with_suffix(".svg"))


def _rewards(axes: Axes, rows: list[dict]) -> None:
    """From the SFT model to each run of GRPO that started from it: mean reward of drawn answers; the gains are printed."""
    found = {(r["cell"].removeprefix(AFTER), r["seed"]): r for r in rows if r["cell"].startswith(AFTER)}
    arms = [arm for arm in ARMS if arm != "sft" and any(arm == name for name, _ in found)]
    for y, arm in enumerate(arms):
        for k, seed in enumerate(seed for name, seed in found if name == arm and ("sft", seed) in found):
            before, after = found["sft", seed], found[arm, seed]
            place = [y + 0.15 * k] * 2
            axes.plot([before["reward"], after["reward"]], place, color="tab:gray")
            axes.plot([before["reward"]], place[:1], "o", color="white", markeredgecolor="tab:blue")
            axes.plot([after["reward"]], place[:1], "o", color="tab:blue")
            gain = bootstrap_mean([b - a for a, b in zip(before["rewards"], after["rewards"], strict=True)])
            print(f"{arm}, seed {seed}: reward {gain.estimate:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), paired by message")
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlim=(0, 1))
    axes.set_xlabel("mean reward of drawn answers\nopen: after SFT; full: after GRPO")
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument(
        "--root", type=Path, default=Path(tempfile.gettempdir()) / "minisft-preference", help="runs are kept here"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch; all cores without it")
    parser.add_argument("--tiny", action="store_true", help="two steps a cell, results beside the runs: does everything run?")
    parser.add_argument("--figures", action="store_true", help="draw from the results file and stop")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else Sizes()
    path = arguments.root / "tiny.jsonl" if arguments.tiny else FILE
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for cell, seed in [] if arguments.figures else in_order(arguments.cells, arguments.seeds):
        key = key_of(cell, seed, sizes)
        if key in done(path):
            continue
        print(f"---- {cell}, seed {seed}, {time.strftime('%H:%M:%S')}", flush=True)
        found = run_cell(cell, Lab(arguments.root, seed, sizes))
        if "skipped" in found:  # not kept: another machine may have what it needs
            print(f"skipped: {found['skipped']}", flush=True)
            continue
        row = {"key": key, "cell": cell, "seed": seed, **found, "threads": torch.get_num_threads()}
        add_cell(path, row | {"provenance": provenance()})
        print(json.dumps(row), flush=True)
    figures(path)


if __name__ == "__main__":
    main()
