"""When LoRA loses to full fine-tuning, and what is forgotten: P0 to P6, learning rates tuned for each method.

    python benchmarks/exp_peft_full.py --list                      # every cell, and whether it is done
    python benchmarks/exp_peft_full.py --cells P0 P2 P3            # some experiments, or cells by their whole names
    python benchmarks/exp_peft_full.py --seeds 0 --threads 1       # stop and start it as you like
    python benchmarks/exp_peft_full.py --figures                   # pictures, table and claims, from the results file only
    python benchmarks/exp_peft_full.py --tiny --out DIR            # a random model, a few steps: whether everything works

P0 closed forms; P1 random facts against the adapter's capacity (a small model of our own); P2 cipher text (far from what
SmolLM2-135M-Instruct knows); P3 Banking77, also with one rate for both methods; P4 web text (near); P5 what the runs of P2
and P3 forgot, at equal learning, with cures; P6 the spectra of their updates. Rates are chosen on validation rows at a quarter
of the steps, one seed; runs are judged on test rows. Data: ../shared/data by default (C4 sample, Banking77, MMLU).

One JSON line a cell in benchmarks/results/peft_full.jsonl, keyed by the hash of its settings. Runs are kept under --root.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import RESULTS, add_cell, note, provenance, read_cells, settings_hash, write_rows
from peft_full_data import (
    BITS_A_FACT,
    TINY,
    Sizes,
    Source,
    encode_facts,
    facts,
    learn,
    make_own_model,
    recalled_bits,
)
from peft_full_theory import closed_forms

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, RunConfig
from minisft.data.chat import resolve_template
from minisft.data.messages import read_dataset
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.general_suite import cloze
from minisft.evaluation.interpolate import interpolated
from minisft.evaluation.plain_text import bits_per_byte, kl_per_token
from minisft.evaluation.sweep import scaled
from minisft.formats import load_adapter_, load_model
from minisft.merging.diff import diff_models, summary
from minisft.model import CausalLM
from minisft.surgery import apply_lora_, num_parameters
from minisft.training.lr_find import lr_find
from minisft.training.train import train

SMOLLM2 = "smollm2-135m-instruct"
DATA = Path(__file__).parents[2] / "shared" / "data"
SEEDS = (0, 1, 2)
LORA_RATES, FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 1e-4, 3e-4, 1e-3)
TINY_RATES = (3e-3, 1e-2, 3e-2)
METHODS: dict[str, dict[str, object]] = {
    "r1": {"rank": 1},
    "r16": {"rank": 16},
    "r64": {"rank": 64},
    "attention r16": {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "full-linears": {"method": "full", "targets": ("all-linear",)},
    "full": {"method": "full"},
}
USED = {"P2": ("r1", "r16", "full-linears", "full"), "P3": ("r1", "r16", "full"), "P4": ("r16", "full")}
KIND = {"P2": "cipher", "P3": "banking", "P4": "web"}
BATCH = {"P2": 2, "P3": 4, "P4": 2}
ONE_RATE = 2e-4  # the classic mistake: LoRA's usual rate for both
SCALES, OTHER_SCALES = (0.25, 0.5, 0.75, 1.0), (0.5, 1.0)  # of seed 0, and of the others
ADAPTERS: dict[str, dict[str, object] | None] = {
    "r1, one down_proj": {"rank": 1, "targets": ("layers.1.mlp.down_proj",)},
    "r1, one layer": {"rank": 1, "targets": r"model\.layers\.1\..*_proj"},
    "r1, all linears": {"rank": 1},
    "full": None,
}
FACT_COUNTS, FACT_RATES = (32, 128, 512), {"lora": (1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)}
MOST_EXTRA_RATES = 5  # for a grid whose best rate is at an edge

Asked = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One result. ``kind``: theory, facts, tune, run, forgetting or spectrum; ``arm`` is the method, with what is changed."""

    experiment: str
    kind: str
    arm: str
    seed: int = 0
    of: str = ""  # the experiment whose run is looked at

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.experiment, self.of, self.kind, self.arm, str(self.seed))))


def cells(seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """Every cell, in an order in which each finds what it needs."""
    yield from (Cell("P0", "theory", "closed forms", seed) for seed in seeds)
    for count in FACT_COUNTS:
        yield from (Cell("P1", "facts", f"{arm}; {count}", seed) for arm in ADAPTERS for seed in seeds)
    for experiment in ("P2", "P3"):
        yield from (Cell(experiment, "tune", method) for method in USED[experiment])
        yield from (Cell(experiment, "run", method, seed) for seed in seeds for method in USED[experiment])
    yield from (Cell("P3", "run", f"{method}, one rate", seed) for seed in seeds for method in ("r16", "full"))
    yield Cell("P2", "tune", "attention r16")
    yield from (Cell("P2", "run", "attention r16", seed) for seed in seeds)
    yield from (Cell("P4", "tune", method) for method in USED["P4"])
    yield from (Cell("P4", "run", method, seed) for seed in seeds for method in USED["P4"])
    yield from (Cell("P2", "run", arm, 0) for arm in ("full, lower rate", "r16, replay", "full, replay"))
    for of in ("P2", "P3"):
        yield from (Cell("P5", "forgetting", method, seed, of) for seed in seeds for method in USED[of])
    yield from (Cell("P5", "forgetting", arm, 0, "P2") for arm in ("full, lower rate", "r16, replay", "full, replay"))
    for of in ("P2", "P3"):
        yield from (Cell("P6", "spectrum", method, seed, of) for seed in seeds for method in ("r16", "full"))


class Lab:
    """Where everything lies, and what is done."""

    def __init__(self, root: Path, out: Path, data: Path, tiny: bool) -> None:
        self.root, self.file, self.tiny = root, out / "peft_full.jsonl", tiny
        self.sizes = TINY if tiny else Sizes()
        self.source = Source(data, self.sizes, tiny)
        self.steps = (20, 40) if tiny else (1500, 500)  # of the own model, and on facts
        self.base_points: dict[str, dict[str, object]] = {}

    @property
    def model(self) -> str:
        return str(self.own) if self.tiny else SMOLLM2

    @property
    def own(self) -> Path:
        return make_own_model(self.root / f"own-model-{self.steps[0]}", self.tiny, 256, self.steps[0])

    def settings(self, cell: Cell) -> dict[str, object]:
        """All that decides a cell's numbers, as far as this script knows it."""
        method, _, change = cell.arm.partition(", ")
        rates = FULL_RATES if "full" in method else LORA_RATES
        return {
            **asdict(cell), "sizes": asdict(self.sizes), "tiny": self.tiny, "steps": self.steps, "batch": BATCH, "rates": rates,
            "method": METHODS.get(method), "change": change, "scales": [SCALES, OTHER_SCALES],
            "fact rates": [FACT_RATES, MOST_EXTRA_RATES],
            "adapter": ADAPTERS.get(cell.arm.partition("; ")[0]),
        }  # fmt: skip

    def key(self, cell: Cell) -> str:
        return settings_hash(self.settings(cell))

    def done(self) -> dict[str, dict]:
        """Finished cells by key."""
        return {row["key"]: row for row in read_cells(self.file)}

    def result(self, cell: Cell) -> dict:
        """A cell's line; computed first, if it is not there."""
        key = self.key(cell)
        if (row := self.done().get(key)) is not None:
            return row
        began = time.monotonic()
        found = {"theory": theory, "facts": recall, "tune": tune, "run": run, "forgetting": forgetting, "spectrum": spectrum}[
            cell.kind
        ](self, cell)
        model = {"P0": "none", "P1": "own, 0.2 M"}.get(cell.experiment, "own, tiny" if self.tiny else SMOLLM2)
        row = {"key": key, "cell": cell.name, **asdict(cell), "model": model, **found}
        row |= {"seconds": round(time.monotonic() - began, 1), "threads": torch.get_num_threads()}
        add_cell(self.file, row | {"provenance": provenance()})
        print(f"{cell.name}: {row['seconds']} s", file=sys.stderr, flush=True)
        return row

    # ---- runs ----

    def run_config(self, experiment: str, arm: str, seed: int, **more: object) -> RunConfig:
        """The settings of a run; its rows are written when they are first needed."""
        kind, (method, _, change) = KIND[experiment], arm.partition(", ")
        folder = self.root / kind
        paths = {
            split: folder / f"{split}-{seed if split == 'train' else 0}.jsonl" for split in ("train", "validation", "test")
        }
        for split, path in paths.items():
            write_rows(path, self.source.rows(kind, split, seed))
        batch = BATCH[experiment]
        rows = self.sizes.banking_rows if kind == "banking" else self.sizes.cipher_rows
        values: dict[str, object] = {
            "model": self.model, "data": str(paths["train"]), "eval_data": str(paths["validation"]), "seed": seed,
            "out": str(self.run_folder(experiment, arm, seed)), "batch_size": batch, "steps": max(2, rows // batch),
            "dtype": "fp32", "eval_every": 10**6, "max_length": 512, **METHODS[method], **more,
        }  # fmt: skip
        if change == "replay":
            replay = self.root / "replay.jsonl"
            write_rows(replay, self.source.rows("web", "train", 77))
            values |= {"replay": str(replay), "replay_share": 0.25 if self.tiny else 0.1}
        return RunConfig(**values)

    def run_folder(self, experiment: str, arm: str, seed: int) -> Path:
        key = self.key(Cell(experiment, "run", arm, seed))
        return self.root / experiment / f"{arm}-{seed}-{key}".replace(" ", "-").replace(",", "")

    def weights(self, experiment: str, arm: str, seed: int) -> Path:
        """The adapter or model of a run, which is trained again if its folder is gone."""
        folder = self.run_folder(experiment, arm, seed)
        target = folder / ("model" if "full" in arm else "adapter")
        if not target.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            train(self.run_config(experiment, arm, seed, lr=self.rate(experiment, arm)), log=note)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 1.6 GB of moments and weights
        return target

    def base_point(self, of: str, ask: Callable[[], dict[str, object]]) -> dict[str, object]:
        """What the base itself answers: the same for every run of an experiment."""
        if of not in self.base_points:
            self.base_points[of] = ask()
        return self.base_points[of]

    def rate(self, experiment: str, arm: str) -> float:
        """The tuned rate of a method, or what an arm has instead."""
        method, _, change = arm.partition(", ")
        if change == "one rate":
            return ONE_RATE
        tuned = float(self.result(Cell(experiment, "tune", method))["lr"])
        return tuned / 3 if change == "lower rate" else tuned


# ---- the cells -------------------------------------------------------------------------------------------------------


def theory(lab: Lab, cell: Cell) -> dict[str, object]:
    """P0."""
    return closed_forms(cell.seed, 20 if lab.tiny else 1500)


def recall(lab: Lab, cell: Cell) -> dict[str, object]:
    """P1: the most bits that an adapter was seen to hold, over the rates, the best of which is inside of them."""
    arm, _, count = cell.arm.partition("; ")
    settings, base = ADAPTERS[arm], lab.own
    known = facts(256 + int(count), 1000 + cell.seed)[256:]  # another seed than the base's facts
    entropy = int(count) * BITS_A_FACT

    def ask(lr: float) -> Asked:
        model, tokenizer = load_model(base)
        rows = encode_facts(tokenizer, known)
        before = recalled_bits(model, rows, tokenizer.pad_id)
        if settings is not None:
            apply_lora_(model, LoRAConfig(alpha=32.0, **settings), cell.seed)
        trained = num_parameters(model, trainable=True)
        learn(model, rows, lab.steps[1], 64, lr, cell.seed, tokenizer.pad_id)
        return {"lr": lr, "bits": recalled_bits(model, rows, tokenizer.pad_id), "trained": trained, "before": before}

    asked = most_bits(FACT_RATES["full" if settings is None else "lora"], ask, 0 if lab.tiny else MOST_EXTRA_RATES, entropy)
    best = max(asked, key=lambda each: each["bits"])
    return {
        "facts": int(count), "entropy": entropy, "trained": best["trained"], "before": best["before"],
        "rates": [{"lr": each["lr"], "bits": each["bits"]} for each in asked], "lr": best["lr"], "bits": best["bits"],
        "inside": inside(asked, entropy),
    }  # fmt: skip


def most_bits(rates: Iterable[float], ask: Callable[[float], Asked], extra: int, entropy: float) -> list[Asked]:
    """What each rate recalls, by rate; rates are added at the end where the best one is, at most ``extra``."""
    found = [ask(lr) for lr in sorted(rates)]
    for _ in range(extra):
        if inside(found, entropy):
            break
        at_start = found[0]["bits"] > found[-1]["bits"]
        found.insert(0 if at_start else len(found), ask(half_decade(found[0 if at_start else -1]["lr"], -1 if at_start else 1)))
    return found


def inside(found: Sequence[Asked], entropy: float) -> bool:
    """Whether another rate beyond the ends cannot be expected to recall more: a better one lies between, or all is recalled."""
    most = max(each["bits"] for each in found)
    return most > 0.99 * entropy or most > max(found[0]["bits"], found[-1]["bits"])


def tune(lab: Lab, cell: Cell) -> dict[str, object]:
    """The best rate at a quarter of the steps; a grid whose best rate is at an edge is extended, at most five times."""
    rates = list(TINY_RATES if lab.tiny else FULL_RATES if "full" in cell.arm else LORA_RATES)
    run = lab.run_config(cell.experiment, cell.arm, 0)
    out = lab.root / cell.experiment / f"lr-{cell.arm}-{lab.key(cell)}".replace(" ", "-")
    for _ in range(1 + MOST_EXTRA_RATES):
        try:
            found = lr_find(
                run, rates, 1.0 if lab.tiny else 0.25, out, log=note, callback=lambda c: note(f"{c.lr:g}: {c.loss}")
            )
        except UserError as error:
            if error.code != "numeric/lr-at-edge":
                raise
            rates.sort()
            best = min(json.loads((out / "lr.json").read_text())["cells"], key=lambda c: c["loss"] or float("inf"))["lr"]
            if lab.tiny:  # noise has no optimum
                return {"lr": best, "bracket": [best, best], "curve": [], "steps": 0}
            rates.append(half_decade(best, -1 if best == rates[0] else 1))
            note(f"the best rate {best:g} is at the edge: adding {rates[-1]:g}")
            continue
        if found.signal is not None or found.choice is None:
            sys.exit(128 + (found.signal or 0))
        curve = [[each.lr, each.loss] for each in found.cells]
        choice = found.choice
        return {"lr": choice.lr, "bracket": list(choice.bracket), "curve": curve, "steps": found.steps}
    raise SystemExit(f"{cell.name}: no optimum inside {rates}")


def half_decade(rate: float, by: int) -> float:
    """The next rate of 1, 3, 10, 30, ..."""
    digit, exponent = f"{rate:e}".split("e")
    power = int(exponent)
    one = round(float(digit)) == 1
    return float(
        f"{3 if one else 1}e{power + (0 if one else 1)}" if by > 0 else f"{3 if one else 1}e{power - (1 if one else 0)}"
    )


def run(lab: Lab, cell: Cell) -> dict[str, object]:
    """One run at its rate, judged on test rows; beside it the base on the same rows."""
    weights = lab.weights(cell.experiment, cell.arm, cell.seed)
    model, tokenizer = load_tuned(lab, weights)
    path = Path(lab.run_config(cell.experiment, cell.arm, cell.seed).data).with_name("test-0.jsonl")
    metrics = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
    base = lab.base_point(f"{cell.experiment} run", lambda: test_loss(load_model(lab.model)[0], tokenizer, path))
    return {
        "lr": lab.rate(cell.experiment, cell.arm), "test": test_loss(model, tokenizer, path), "base": base,
        "train": [round(row["loss"], 4) for row in metrics], "tokens": sum(row["tokens"] for row in metrics),
    }  # fmt: skip


def load_tuned(lab: Lab, weights: Path) -> tuple[CausalLM, Tokenizer]:
    if weights.name == "model":
        return load_model(weights)
    model, tokenizer = load_model(lab.model)
    load_adapter_(model, weights)
    return model, tokenizer


def test_loss(model: CausalLM, tokenizer: Tokenizer, path: Path) -> dict[str, object]:
    """Nats a supervised token, and by row."""
    examples = read_dataset(path, keep_duplicates=True).examples
    found = evaluate(model.eval(), tokenizer, resolve_template(tokenizer), examples, "loss", batch_size=4)
    return {"loss": found.score, "rows": [round(row.score, 5) for row in found.rows]}


def forgetting(lab: Lab, cell: Cell) -> dict[str, object]:
    """P5: learning and forgetting at several scales of one run's update."""
    weights = lab.weights(cell.of, cell.arm, cell.seed)
    path = Path(lab.run_config(cell.of, cell.arm, cell.seed).data).with_name("test-0.jsonl")
    base, tokenizer = load_model(lab.model)
    at, model = scaled, base
    if weights.name == "model":
        at, model = interpolated(lab.model, weights), load_model(lab.model)[0]
    else:
        model, _ = load_tuned(lab, weights)
    points = [{"scale": 0.0, **lab.base_point(cell.of, lambda: asked(lab, base, base, tokenizer, path))}]
    for scale in SCALES if cell.seed == 0 else OTHER_SCALES:
        with at(model, scale):
            points.append({"scale": scale, **asked(lab, base, model, tokenizer, path)})
    return {"points": points}


@torch.inference_mode()
def asked(lab: Lab, base: CausalLM, model: CausalLM, tokenizer: Tokenizer, path: Path) -> dict[str, object]:
    """Learning: the loss on test rows. Forgetting: bits a byte of web texts, cloze margin, KL from the base."""
    model.eval(), base.eval()
    web = lab.source.web
    bits = [text.per_byte for text in bits_per_byte(model, tokenizer, web, batch_size=4)]
    questions = cloze(model, tokenizer, lab.source.questions, "mmlu")
    margins = [float(str(row.extra["log_prob_reference"])) - float(str(row.extra["log_prob"])) for row in questions.rows]
    kl = [0.0] if model is base else kl_per_token(base, model, tokenizer, web[: lab.sizes.kl_texts], 128)
    return {
        "test": test_loss(model, tokenizer, path), "web": [round(b, 5) for b in bits], "cloze": questions.score,
        "margin": [round(m, 4) for m in margins], "kl": [round(k, 6) for k in kl],
    }  # fmt: skip


def spectrum(lab: Lab, cell: Cell) -> dict[str, object]:
    """P6."""
    diff = diff_models(lab.model, lab.weights(cell.of, cell.arm, cell.seed))
    matrices = [layer for layer in diff.changed if layer.energy_rank is not None and layer.kind.endswith("_proj")]
    return {
        "summary": summary(diff),
        "ranks": [layer.energy_rank for layer in matrices], "intruders": [layer.intruders for layer in matrices],
        "relative": [round(layer.relative, 6) for layer in matrices],
    }  # fmt: skip


# ---- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=None, metavar="P2", help="experiments, or the beginnings of cells' names")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch")
    parser.add_argument(
        "--tiny", action="store_true", help="a small random model and a few rows; give --out and --root as well"
    )
    parser.add_argument("--list", action="store_true", help="say what there is to do and what is done")
    parser.add_argument(
        "--figures", action="store_true", help="draw from the results file, print table and claims, run nothing"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with c4_sample, banking77_train and mmlu_val (JSONL)")
    parser.add_argument(
        "--root", type=Path, default=Path(tempfile.gettempdir()) / "minisft-peft-full", help="runs are kept here"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.figures:
        from peft_full_figures import report

        report(given.out / "peft_full.jsonl", given.out)
        return
    if not given.tiny and not (given.data / "c4_sample.jsonl").is_file():
        sys.exit(f"no c4_sample.jsonl in {given.data}: give its folder with --data")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    lab = Lab(given.root, given.out, given.data, given.tiny)
    known = lab.done()
    for cell in cells(tuple(given.seeds)):
        if given.cells is not None and not any(cell.name == name or cell.name.startswith(f"{name}/") for name in given.cells):
            continue
        if given.list:
            print(f"{'done' if lab.key(cell) in known else '    '}  {cell.name}")
        else:
            lab.result(cell)


if __name__ == "__main__":
    main()
