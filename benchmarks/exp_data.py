"""What quality, quantity, diversity, selection and contamination do to a small model: five experiments, every arm, three seeds.

    python benchmarks/exp_data.py --threads 1           # hours on one core; stop and start it as you like
    python benchmarks/exp_data.py --cells E1 --seeds 0  # some of them
    python benchmarks/exp_data.py --figures             # pictures and the table, from the results so far
    python benchmarks/exp_data.py --tiny --out DIR      # two steps a cell: whether everything works

SmolLM2-135M-Instruct, LoRA of rank 16, on Banking77 (../shared/data by default). All arms of an experiment take the same steps
of eight rows, which are of nearly one length; each line records the tokens. E2 is one run a seed at a constant rate, scored
whenever the number of rows has doubled. The seed moves the subset, the order and the adapter's start. The metric is the loss
per supervised token, averaged over test rows that no arm has seen (but E5's leaked ones).

Training drops exact copies, so E5's copies of a test row differ by a greeting and a word of thanks, as leaked rows do.
One JSON line a cell in benchmarks/results/exp_data.jsonl; a cell that stands there is not run again. The order is whole
experiments, seed by seed: what a stopped run leaves out is the last arms, not one side of a comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, add_cell, bootstrap, note, provenance, read_cells, save_svg
from harness import write_rows as write_lines

from minisft.config import RunConfig
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import read_dataset
from minisft.evaluation.evaluate import evaluate
from minisft.formats import load_adapter_, load_model
from minisft.quality.contamination import find_leaks
from minisft.quality.pool import read_pool
from minisft.selection.model_scores import ModelSettings
from minisft.selection.run import select_rows
from minisft.selection.settings import Settings
from minisft.training.train import train

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parents[2] / "shared" / "data"
SYSTEM = "Name the intent."  # short: the model's own system message is half of a row's tokens
BATCH, LR, RANK = 8, 5e-4, 16
STEPS = {"E1": 60, "E2": 128, "E3": 45, "E4": 38, "E5": 50}
SEEDS = (0, 1, 2)
TEST_PER_INTENT, DEEP_PER_INTENT, LEAKED = 2, 10, 20
SMALL, LARGE = 300, 1200  # E1
PASS_SIZES = (32, 64, 128, 256, 512, 1024)  # E2: rows of one pass
PICK, POOL = 300, 1200  # E4
COLORS = ("#0072B2", "#D55E00", "#009E73")
GREETINGS, THANKS = ("", "Hi. ", "Hello, ", "Good morning. "), ("", " Thanks.", " Please help.", " Thank you!")
Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """One training run: experiment, arm and seed."""

    experiment: str
    arm: str
    seed: int


def cells(seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """Every cell, those of one experiment together, seed by seed so that a partial run compares whole sets of arms."""
    arms = {
        "E1": (f"clean {SMALL}", f"clean {LARGE}", f"{SMALL} + {LARGE - SMALL} wrong",
               f"{LARGE}, 50 % uniform", f"{LARGE}, 50 % near"),
        "E3": ("6 x 50", "75 x 4", "random 300"),
        "E5": ("leaked 0 times", "leaked 4 times", "leaked 16 times"),
        "E2": ("one pass",),
        "E4": ("dirty, random", "dirty, longest", "dirty, ifd", "dirty, cleaned", "dirty, cleaned + ifd",
               "clean, random", "clean, ifd"),
    }  # fmt: skip
    for experiment, names in arms.items():
        for seed in seeds:
            yield from (Cell(experiment, arm, seed) for arm in names)


class Banking:
    """Train and test rows, by intent, in an order that depends on the seed only."""

    def __init__(self, folder: Path) -> None:
        self.train = read_lines(folder / "banking77_train.jsonl")
        test = read_lines(folder / "banking77_test.jsonl")
        by_intent: dict[str, list[Row]] = {}
        for row in test:
            by_intent.setdefault(row["label"], []).append(row)
        self.intents = sorted(by_intent)
        self.test = [row for rows in by_intent.values() for row in rows[:TEST_PER_INTENT]]
        self.deep = {intent: rows[TEST_PER_INTENT : TEST_PER_INTENT + DEEP_PER_INTENT] for intent, rows in by_intent.items()}
        chosen = random.Random(0).sample(self.intents, LEAKED)
        self.leaked = [by_intent[intent][-1] for intent in chosen]
        self.fresh = [by_intent[intent][-2] for intent in chosen]  # the same intents, other words
        self.near = nearest_intents(self.train, self.intents)

    def draw(self, seed: int, count: int) -> list[Row]:
        return random.Random(seed).sample(self.train, count)

    def wrong(self, rows: Sequence[Row], draw: random.Random, near: bool) -> list[Row]:
        """The rows with a wrong intent: any other, or the one whose words are nearest."""
        pick = self.near.__getitem__ if near else lambda own: draw.choice([i for i in self.intents if i != own])
        return [{**row, "label": pick(row["label"])} for row in rows]


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def nearest_intents(rows: Sequence[Row], intents: Sequence[str]) -> dict[str, str]:
    """For each intent the other one with the nearest mean of words."""
    words = sorted({word for row in rows for word in row["text"].lower().split()})
    at = {word: i for i, word in enumerate(words)}
    table = np.zeros((len(intents), len(words)))
    number = {intent: i for i, intent in enumerate(intents)}
    for row in rows:
        for word in set(row["text"].lower().split()):
            table[number[row["label"]], at[word]] += 1
    table *= np.log(len(intents) / np.count_nonzero(table, axis=0))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    cosine = table @ table.T - 2 * np.eye(len(intents))
    return {intent: intents[int(cosine[i].argmax())] for intent, i in number.items()}


# ---- what an arm trains on ----


def rows_of(cell: Cell, banking: Banking, scratch: Path) -> list[Row]:
    """The training rows of a cell."""
    return {"E1": quality, "E2": quantity, "E3": diversity, "E4": selected, "E5": contaminated}[cell.experiment](
        cell, banking, scratch
    )


def quality(cell: Cell, banking: Banking, _: Path) -> list[Row]:
    draw, rows = random.Random(cell.seed + 100), banking.draw(cell.seed, LARGE)
    if cell.arm.startswith("clean"):
        return rows[: int(cell.arm.split()[1])]
    if "+" in cell.arm:
        return rows[:SMALL] + banking.wrong(rows[SMALL:], draw, near=False)
    return banking.wrong(rows[: LARGE // 2], draw, cell.arm.endswith("near")) + rows[LARGE // 2 :]


def quantity(cell: Cell, banking: Banking, _: Path) -> list[Row]:
    return banking.draw(cell.seed, PASS_SIZES[-1])


def diversity(cell: Cell, banking: Banking, _: Path) -> list[Row]:
    draw = random.Random(cell.seed)
    if cell.arm.startswith("random"):
        return banking.draw(cell.seed, int(cell.arm.split()[1]))
    num_intents, each = (int(part) for part in cell.arm.split(" x "))
    chosen = few_intents(banking, cell.seed) if num_intents == 6 else draw.sample(banking.intents, num_intents)
    return [row for intent in chosen for row in draw.sample([r for r in banking.train if r["label"] == intent], each)]


def few_intents(banking: Banking, seed: int) -> list[str]:
    """The six intents of E3's arm with few of them; all its arms are tested on these too."""
    sizes = Counter(row["label"] for row in banking.train)
    return random.Random(seed).sample([intent for intent in banking.intents if sizes[intent] >= 50], 6)


def dirty(rows: list[Row], draw: random.Random, banking: Banking) -> list[Row]:
    """Three rows in ten spoiled: 10 % wrong intents, 5 % copies, 5 % near copies, 2 % each of five broken answers."""
    size = len(rows)
    bad, good = rows[: size * 3 // 10], rows[size * 3 // 10 :]
    spoiled: list[Row] = []
    for i, row in enumerate(bad):
        kind = i * 15 // len(bad)
        other = draw.choice(good)
        spoiled.append(
            {**row, "label": draw.choice([x for x in banking.intents if x != row["label"]])} if kind < 5
            else dict(other) if kind < 7
            else {**other, "text": other["text"] + draw.choice((" please", " thanks", " now"))} if kind < 10
            else {**row, "label": row["label"][: len(row["label"]) // 2]} if kind == 10
            else {**row, "label": f"<p>{row['label']}</p>"} if kind == 11
            else {**row, "label": "I'm sorry, but I can't help with that."} if kind == 12
            else {**row, "label": " ".join([row["label"]] * 30)} if kind == 13
            else {**row, "label": row["text"]}
        )  # fmt: skip
    mixed = spoiled + good
    draw.shuffle(mixed)
    return mixed


def selected(cell: Cell, banking: Banking, scratch: Path) -> list[Row]:
    kind, how = cell.arm.split(", ")
    folder = scratch / f"pool-{kind}"  # the pool and its scores are the same for all seeds and arms
    folder.mkdir(exist_ok=True)
    pool = folder / "pool.jsonl"
    if not pool.exists():
        rows = banking.draw(77, POOL)
        write_rows(pool, dirty(rows, random.Random(7), banking) if kind == "dirty" else rows)
    cleaned = {"drop_defects": True, "dedup": "near"} if "cleaned" in how else {}
    score = "length" if how == "longest" else "ifd" if "ifd" in how else "random"
    settings = Settings(score=score, rows=PICK, seed=cell.seed, **cleaned)
    needs_model = settings.needs_model
    out = folder / f"{how.replace(' ', '-')}-{cell.seed}.jsonl"
    kept = folder / f"{score}.scores.jsonl"  # of all rows, if the uncleaned arm came first
    if not out.exists():
        reuse = kept if kept.exists() else None
        select_rows(pool, out, settings, ModelSettings(MODEL) if needs_model else None, reuse=reuse, log=note)
        if needs_model and reuse is None:
            kept.write_bytes(out.with_name(out.stem + ".scores.jsonl").read_bytes())
    return [
        {"text": messages[1]["content"], "label": messages[2]["content"]}
        for messages in map(itemgetter("messages"), read_lines(out))
    ]


def contaminated(cell: Cell, banking: Banking, _: Path) -> list[Row]:
    times = int(cell.arm.split()[1])
    forms = [(hello, thanks) for hello in GREETINGS for thanks in THANKS][:times]
    copies = [{**row, "text": hello + row["text"] + thanks} for hello, thanks in forms for row in banking.leaked]
    return banking.draw(cell.seed, STEPS["E5"] * BATCH - len(copies)) + copies


# ---- one cell ----


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    said = [(("system", SYSTEM), ("user", row["text"]), ("assistant", row["label"])) for row in rows]
    lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in said]
    return write_lines(path, lines)


def tests_of(cell: Cell, banking: Banking) -> dict[str, list[Row]]:
    """The rows that score a cell: those of all cells, and the experiment's own."""
    tests = {"test": banking.test}
    if cell.experiment == "E3":
        tests |= {"six": [row for intent in few_intents(banking, cell.seed) for row in banking.deep[intent]]}
    if cell.experiment == "E5":
        tests |= {"leaked": banking.leaked, "fresh": banking.fresh}
    return tests


def score(adapter: Path, tests: dict[str, list[Row]], folder: Path, limit: int | None) -> dict[str, dict]:
    """The loss of each test row."""
    model, tokenizer = load_model(MODEL, torch.float32)
    load_adapter_(model, adapter)
    model.eval()
    losses = {}
    for key, part in tests.items():
        examples = read_dataset(write_rows(folder / f"{key}.jsonl", part), keep_duplicates=True).examples[:limit]
        scored = evaluate(model, tokenizer, resolve_template(tokenizer), examples, "loss")
        rows = [round(row.score, 4) for row in scored.rows]
        losses[key] = {"loss": round(sum(rows) / len(rows), 5), "n": scored.n, "rows": rows}
    return losses


def tokens_of(data: Path, limit: int | None = None) -> dict[str, int]:
    """How many tokens a file of rows has, and how many of them are trained on."""
    tokenizer = load_model(MODEL, torch.float32)[1]
    template = resolve_template(tokenizer)
    encoded = [encode_chat(tokenizer, template, e.messages) for e in read_dataset(data).examples[:limit]]
    return {"tokens": sum(len(e.input_ids) for e in encoded), "supervised": sum(sum(e.supervised) for e in encoded)}


def run(cell: Cell, banking: Banking, scratch: Path, tiny: bool) -> dict:
    """Train one cell and score it."""
    began, limit = time.time(), 8 if tiny else None
    rows = rows_of(cell, banking, scratch)
    tests = tests_of(cell, banking)
    curve = cell.experiment == "E2"
    stops = [size // BATCH for size in PASS_SIZES] if curve else [STEPS[cell.experiment]]
    stops = [1, 2][: len(stops)] if tiny else stops
    points = []
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        data = write_rows(folder / "train.jsonl", rows)
        for number, steps in enumerate(stops):
            settings = RunConfig(
                model=MODEL, data=str(data), out=str(folder / "run"), steps=steps, batch_size=BATCH, lr=LR, rank=RANK,
                schedule="constant" if curve else "cosine", warmup=0.0 if curve else 0.03,
                dtype="fp32", packing=True, validation_share=0.0, seed=cell.seed,
            )  # fmt: skip
            train(settings, resume=number > 0, log=lambda _: None)
            losses = score(folder / "run" / "adapter", tests, folder, limit)
            points.append({"rows": steps * BATCH, "steps": steps, "loss": losses["test"]["loss"]})
        tokens = tokens_of(data)
        found = {}
        if cell.experiment == "E5":
            leaks = find_leaks(read_pool(str(data)), read_pool(str(folder / "leaked.jsonl")))
            found = {"test_rows_found": len({leak.test_row for leak in leaks}), "test_rows": len(banking.leaked)}
    if cell.experiment == "E3":
        seen = {row["label"] for row in rows}
        pairs = zip(banking.test, losses["test"]["rows"], strict=False)  # a tiny run scores fewer
        unseen = [loss for row, loss in pairs if row["label"] not in seen]
        if unseen:
            losses["unseen"] = {"loss": round(sum(unseen) / len(unseen), 5), "n": len(unseen), "rows": unseen}
    return {
        **asdict(cell),
        "rows": len(rows),
        "steps": stops[-1],
        "pool_tokens": tokens,
        "trained_tokens": {key: round(n * stops[-1] * BATCH / len(rows)) for key, n in tokens.items()},
        "losses": losses,
        **({"curve": points} if curve else {}),
        **found,
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - began, 1),
    }


def done_cells(path: Path) -> list[dict]:
    """Finished cells; the file's first line is its provenance."""
    return [cell for cell in read_cells(path) if "arm" in cell]


# ---- figures ----


def by_arm(results: Sequence[dict], experiment: str, key: str = "test") -> dict[str, list[float]]:
    arms: dict[str, list[float]] = {}
    for cell in results:
        if cell["experiment"] == experiment and key in cell["losses"]:
            arms.setdefault(cell["arm"], []).append(cell["losses"][key]["loss"])
    return arms


def fitted(sizes: Sequence[int], losses: Sequence[float]) -> tuple[float, float, float]:
    """a, b, c of a + b n^-c by least squares: c on a grid, a and b in closed form."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for c in np.linspace(0.05, 3, 296):
        basis = np.stack([np.ones(len(sizes)), np.array(sizes, float) ** -c], axis=1)
        coefficients = np.linalg.lstsq(basis, np.array(losses), rcond=None)[0]
        error = float(((basis @ coefficients - losses) ** 2).sum())
        best = min(best, (error, float(coefficients[0]), float(coefficients[1]), float(c)))
    return best[1:]


def interval(cells_a: Sequence[dict], cells_b: Sequence[dict], key: str) -> tuple[float, float, float]:
    """Mean difference a - b and its 95 % interval: paired bootstrap over test rows and seeds."""
    pairs = {cell["seed"]: cell for cell in cells_b}
    gaps = np.array(
        [np.subtract(a["losses"][key]["rows"], pairs[a["seed"]]["losses"][key]["rows"]) for a in cells_a if a["seed"] in pairs]
    )
    if not gaps.size:
        return math.nan, math.nan, math.nan
    return bootstrap(gaps, lambda table: float(table.mean()))


def figures(results: Sequence[dict], folder: Path) -> None:
    """One picture an experiment, and the table as Markdown on standard output."""
    from matplotlib.figure import Figure

    for experiment in ("E1", "E3", "E4", "E5"):
        if not by_arm(results, experiment):
            continue
        keys = {"E3": ("six", "test"), "E5": ("leaked", "fresh", "test")}.get(experiment, ("test",))
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for shift, key in enumerate(keys):
            arms = by_arm(results, experiment, key)
            for at, (_, losses) in enumerate(arms.items()):
                axes.plot(losses, [-at - 0.18 * shift] * len(losses), "o", color=COLORS[shift], alpha=0.7,
                          label=key if at == 0 else None)  # fmt: skip
            axes.set_yticks([-i for i in range(len(arms))], list(arms))
        axes.set_xlabel("loss per supervised token on test rows; one point a seed")
        if len(keys) > 1:
            axes.legend(frameon=False)
        save_svg(figure, folder / f"exp_data_{experiment.lower()}.svg")
    quantity_figure(results, folder)
    table(results)
    (folder / "exp_data_claims.json").write_text(json.dumps(verdicts(results), indent=1) + "\n")


def quantity_figure(results: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    curves = [cell["curve"] for cell in results if cell["experiment"] == "E2"]
    if not curves:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = [point["rows"] for point in curves[0]]
    for curve in curves:
        axes.plot(sizes, [point["loss"] for point in curve], "o", color="#0072B2", alpha=0.6)
    means = [float(np.mean([curve[i]["loss"] for curve in curves])) for i in range(len(sizes))]
    a, b, c = fitted(sizes[:-2], means[:-2])
    line = np.geomspace(sizes[0], sizes[-1])
    axes.plot(line, a + b * line**-c, color="#555555", linewidth=0.8, label=f"fitted to the first {len(sizes) - 2} sizes")
    for n, mean in zip(sizes[-2:], means[-2:], strict=True):
        print(f"E2: {n} rows predicted {a + b * n**-c:.3f}, measured {mean:.3f} (fit {a:.3f} + {b:.2f} n^-{c:.2f})")
    axes.set(xscale="log", xlabel="training rows, each seen once", ylabel="loss per supervised token on test rows")
    axes.legend(frameon=False)
    save_svg(figure, folder / "exp_data_e2.svg")


@dataclass(frozen=True)
class Claim:
    """A sentence that the field holds true: ``arm`` minus ``other`` on test rows ``key`` has the sign ``sign``."""

    experiment: str
    claim: str
    arm: str
    other: str
    sign: int
    key: str = "test"


WRONG_ADDED, HALF = f"{SMALL} + {LARGE - SMALL} wrong", f"{LARGE}, 50 %"
CLAIMS = (
    Claim("E1", f"{LARGE} clean rows beat {SMALL}, at equal steps", f"clean {LARGE}", f"clean {SMALL}", -1),
    Claim("E1", f"{LARGE - SMALL} wrong rows beside {SMALL} clean ones hurt", WRONG_ADDED, f"clean {SMALL}", 1),
    Claim(
        "E1", f"{LARGE} rows of which half are wrong are worse than {SMALL} clean ones", f"{HALF} uniform", f"clean {SMALL}", 1
    ),
    Claim("E1", "labels exchanged with the nearest intent hurt more than with any", f"{HALF} near", f"{HALF} uniform", 1),
    Claim("E3", "300 rows of 6 intents are worse than of 75", "6 x 50", "75 x 4", 1),
    Claim("E3", "6 intents with 50 rows each are learned better than with 4", "6 x 50", "75 x 4", -1, "six"),
    Claim("E3", "an even choice over intents beats a random one", "75 x 4", "random 300", -1),
    Claim("E4", "dirty pool: cleaning beats random", "dirty, cleaned", "dirty, random", -1),
    Claim("E4", "dirty pool: highest IFD beats random", "dirty, ifd", "dirty, random", -1),
    Claim("E4", "dirty pool: longest beats random", "dirty, longest", "dirty, random", -1),
    Claim("E4", "dirty pool: IFD after cleaning beats cleaning", "dirty, cleaned + ifd", "dirty, cleaned", -1),
    Claim("E4", "clean pool: highest IFD beats random", "clean, ifd", "clean, random", -1),
    Claim("E5", "4 copies of a test row lower its loss", "leaked 4 times", "leaked 0 times", -1, "leaked"),
    Claim("E5", "16 copies of a test row lower its loss", "leaked 16 times", "leaked 0 times", -1, "leaked"),
    Claim("E5", "16 copies raise the loss on other test rows", "leaked 16 times", "leaked 0 times", 1),
)
FORMAT_GAP = "{:+.3f} ({:+.3f} to {:+.3f})"


def verdicts(results: Sequence[dict]) -> list[dict]:
    """What became of each claim of which both arms have been run; an interval decides, not the sign of a mean."""
    found = []
    for claim in CLAIMS:
        of = {
            arm: [c for c in results if (c["experiment"], c["arm"]) == (claim.experiment, arm)]
            for arm in (claim.arm, claim.other)
        }
        difference, low, high = interval(of[claim.arm], of[claim.other], claim.key)
        if math.isnan(difference):
            continue
        shown = low > 0 or high < 0
        verdict = "not shown at this size" if not shown else "held" if difference * claim.sign > 0 else "did not hold"
        seeds = len({c["seed"] for c in of[claim.arm]} & {c["seed"] for c in of[claim.other]})
        found.append({**asdict(claim), "seeds": seeds, "difference": difference, "low": low, "high": high, "verdict": verdict})
    return found


def table(results: Sequence[dict]) -> None:
    """Two tables for benchmarks/README.md on standard output: every arm, and every claim."""
    print("| experiment | arm | seeds | rows | steps | tokens a run | loss on test rows |\n|---|---|---|---|---|---|---|")
    for experiment in ("E1", "E2", "E3", "E4", "E5"):
        for arm, losses in by_arm(results, experiment).items():
            runs = [c for c in results if (c["experiment"], c["arm"]) == (experiment, arm)]
            tokens = round(float(np.mean([c["trained_tokens"]["tokens"] for c in runs])), -2)
            size = f"{runs[0]['rows']:,} | {runs[0]['steps']} | {tokens:,.0f}"
            print(f"| {experiment} | {arm} | {len(losses)} | {size} | {np.mean(losses):.3f} |")
    print("\n| experiment | claim | difference, 95 % interval | seeds | verdict |\n|---|---|---|---|---|")
    for v in verdicts(results):
        gap = FORMAT_GAP.format(v["difference"], v["low"], v["high"])
        print(f"| {v['experiment']} | {v['claim']} | {gap} | {v['seeds']} | {v['verdict']} |")
    for cell in results:
        if "test_rows_found" in cell and cell["seed"] == SEEDS[0]:
            print(f"E5 {cell['arm']}: the detector finds {cell['test_rows_found']} of {cell['test_rows']} leaked rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=None, metavar="E1", help="experiments to run (default: all)")
    parser.add_argument("--figures", action="store_true", help="draw from the results, run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds to run (default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--tiny", action="store_true", help="first arm and seed of each experiment, two steps, eight test rows")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with banking77_train.jsonl and banking77_test.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    path = given.out / "exp_data.jsonl"
    if given.figures:
        figures(done_cells(path), given.out)
        return
    if not (given.data / "banking77_train.jsonl").exists():
        sys.exit(f"no Banking77 in {given.data}: give its folder with --data")
    given.out.mkdir(parents=True, exist_ok=True)
    known = {(c["experiment"], c["arm"], c["seed"]) for c in done_cells(path)}
    banking = Banking(given.data)
    scratch = given.out / "exp_data.scratch"  # pools and scores of E4; may be removed when all is done
    scratch.mkdir(exist_ok=True)
    if not path.exists():
        add_cell(path, provenance() | {"model": MODEL, "steps": STEPS, "batch": BATCH, "lr": LR, "rank": RANK})
    seen: set[str] = set()
    for cell in cells(given.seeds):
        wanted = given.cells is None or cell.experiment in given.cells
        if not wanted or (cell.experiment, cell.arm, cell.seed) in known or (given.tiny and cell.experiment in seen):
            continue
        seen.add(cell.experiment)
        result = run(cell, banking, scratch, given.tiny)
        add_cell(path, result)
        note(f"{cell.experiment} {cell.arm} seed {cell.seed}: {result['losses']['test']['loss']:.4f} in {result['seconds']} s")


if __name__ == "__main__":
    main()
