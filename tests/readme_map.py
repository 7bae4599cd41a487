"""What README.md and CONTRIBUTING.md say lies where, and README's results and advice: written from the files themselves.

    python tests/readme_map.py            # say which parts are out of date
    python tests/readme_map.py --write    # bring them up to date

A new flat file, or a new folder, needs an entry in ``WHAT``. Numbers of lines are rounded, and the test that compares
(``test_readme.py``) lets them be off by a tenth, so that a small edit of a module does not ask for one of README. Every number
of the results and of the advice is read from ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from test_architecture import FLAT, FRONT, LEVELS, PACKAGE, ROOT

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(RESULTS.parent))

# What happens in each flat file and in each folder, in a few words.
WHAT = {
    "config": "settings: typed, frozen, checked when they are made",
    "model": "the decoder: Llama, Mistral, Qwen, SmolLM, Granite, OLMo 2, Gemma 3",
    "attention": "attention, packed rows, the KV cache's side of it",
    "elementwise": "norms and rotations",
    "matmul": "matrix products; which code computes them",
    "generation": "writing text, many prompts at once",
    "lora": "the adapter: W x + scaling * B A x",
    "adapter": "what every adapter shares: base, factors, scaling",
    "lora_fused": "LoRA's forward and backward with one pass over y",
    "dora": "LoRA with trained row lengths",
    "pissa": "LoRA started from the principal part of the weight",
    "trained_rows": "a few trained rows over a frozen table: new tokens",
    "new_rows": "new rows of embedding and head: where they start, which are trained",
    "surgery": "putting adapters and 4-bit layers into a model",
    "nf4": "4-bit numbers: the reference",
    "nf4_linear": "a frozen linear layer in 4 bits, and its gradient",
    "batching": "rows to batches: padded, or packed with shared prefixes; where the shift and the mask happen",
    "loss": "cross-entropy as a sum over supervised tokens",
    "preference": "the losses of DPO and GRPO",
    "optim": "AdamW with fp32 master weights",
    "adam_8bit": "AdamW with moments of 8 bits",
    "schedule": "the learning rate of each step",
    "step": "one optimizer step: the sum divided once",
    "merge_weights": "adapters into weights, and back, bit for bit",
    "effect": "how much of an update survives rounding",
    "__init__": "the public names, loaded when they are first used",
    "api": "the Python calls: one for each command",
    "__main__": "`python -m minisft`",
    "cli": "the command line",
    "common": "errors, checks of settings, strict JSON, seeds, durable files, the device",
    "data": "rows to chats to token ids, each a target or context",
    "kernels": "the same 4-bit numbers fast: Triton for GPUs, C++ for CPUs",
    "native": "one token for each row in one native call",
    "formats": "other programs' files, read as untrusted: Hugging Face, GGUF, bitsandbytes, PEFT",
    "training": "a run (SFT, DPO, GRPO): its loop, checkpoints, log, and its memory before it starts",
    "parallel": "one run on several processes: who adds what up, who writes, a model in shares",
    "quality": "what is wrong with a pool of rows: copies, near copies, defects, leaked test rows",
    "selection": "which rows to train on: scores, diversity, budgets, every reason",
    "evaluation": "scores with intervals, paired tests, multiple choice, general ability, scale sweeps",
    "judging": "two models compared by rows, by people's votes, by A/B tests; feedback to rows",
    "merging": "merges and exports from files to files, their certificate, combining, checking",
    "serving": "a model and its adapters behind OpenAI's HTTP interface",
    "quickstart": "the quickstart and its generated task",
}
MORE = {
    "tests/": "what is claimed, proven: [tests/README.md](tests/README.md)",
    "benchmarks/": "what is fast, and what is not: [benchmarks/README.md](benchmarks/README.md)",
    "tutorials/": "pages that build the library, `make tutorials`, `make site`: [tutorials/README.md](tutorials/README.md)",
}


# ---- counting lines --------------------------------------------------------------------------------------------------


def num_lines(path: Path) -> int:
    """Lines of a file, or of all Python and C++ in a folder."""
    files = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.cpp")]
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def rounded(number: int) -> str:
    """To tens below a thousand, to hundreds above."""
    unit = 10 if number < 1000 else 100
    return f"{max(round(number / unit), 1) * unit:,}"


# ---- the parts -------------------------------------------------------------------------------------------------------


def reading_list() -> str:
    """The flat files in reading order."""
    flat = [PACKAGE / f"{name}.py" for name in FLAT]
    rows = [f"| [{path.name}](minisft/{path.name}) | {rounded(num_lines(path))} | {WHAT[path.stem]} |" for path in flat]
    total = rounded(sum(map(num_lines, flat)))
    return "\n".join(["| file | lines | |", "|---|---|---|", *rows, f"| all of it | {total} | |"])


def folders() -> list[str]:
    """The package's folders, by level from below."""
    there = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    return [place for level in LEVELS for place in level.split() if place in there]


def tree() -> str:
    """What lies beside those files: the package's folders, its front files, and what stands beside the package."""
    rows = [f"| [`minisft/{n}/`](minisft/{n}) | {rounded(num_lines(PACKAGE / n))} | {WHAT[n]} |" for n in folders()]
    front = [PACKAGE / f"{name}.py" for name in FRONT]
    files = " ".join(f"[`{path.name}`](minisft/{path.name})" for path in front)
    rows += [f"| {files} | {rounded(sum(map(num_lines, front)))} | {'; '.join(WHAT[path.stem] for path in front)} |"]
    rows += [f"| [`{name}`]({name}) | {rounded(num_lines(ROOT / name))} | {what} |" for name, what in MORE.items()]
    return "\n".join(["| place | lines | |", "|---|---|---|", *rows])


def levels() -> str:
    """Which place may import which: its own level and those below."""
    there = set(folders())
    rows = []
    for number, level in enumerate(LEVELS):
        places = level.split()
        names = " ".join(f"`{place}/`" if place in there else f"`{place}`" for place in places)
        rows.append(f"| {number} | {names} | {'; '.join(WHAT[place].split(':')[0] for place in places)} |")
    return "\n".join(["| level | place | what happens there |", "|---|---|---|", *rows])


# ---- results ---------------------------------------------------------------------------------------------------------


def _load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _cell(name: str, **wanted: str) -> dict:
    (cell,) = (c for c in _load(name)["cells"] if all(c.get(key) == value for key, value in wanted.items()))
    return cell


def _link(name: str) -> str:
    return f"[{name}](benchmarks/results/{name}.json)"


def _times(spread: dict) -> str:
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def _faster(measured: dict, memory: float | None = None) -> str:
    return f"{_times(measured['speed_ratio'])} times as fast" + (f", {memory:.2f} of the memory" if memory else "")


def results() -> str:
    """Six rows: each number from a results file, which names its command, commit, versions and machine."""
    lora = _cell("train_fp32", malloc="tuned", contestant="minisft packed")
    qlora = _cell("train_nf4_fp32", malloc="tuned", contestant="minisft packed")
    product = {"group": "decode product", "setting": "tuned malloc"}
    large = _cell("nf4_cpu", **product, case="4096 x 4096, M = 1, fp32", peer="bitsandbytes")
    errors = f"error {large['ours_error']:.0e} against {large['peer_error']:.0e}"
    small = _cell("nf4_cpu", **product, case="576 x 1536, M = 1, bf16", peer="dense bf16")["ratio"]
    merging = next(m for m in _load("merge_cpu")["merging"] if m["dtype"] == "fp32")
    memory = merging["memory_ratio"]["median"]
    texts, against = _load("generate"), "file, compressed, one stream: times as fast as llama.cpp"
    file = next(found["value"] for found in texts["targets"] if found["target"] == against)
    right = {onto: f"{100 * found['exact_match']:.0f} %" for onto, found in _load("merge_targets")["nf4"].items()}
    merged = f"{right['unmerged']}; merged as trained {right['dequantized']}; in 4 bits again {right['requantized']}: refused"
    rows = [
        ("a LoRA step, fp32, packed", "transformers + PEFT", _faster(lora, lora["memory_ratio"]), "train_fp32"),
        ("a QLoRA step, packed", "the same + bitsandbytes", _faster(qlora, qlora["memory_ratio"]), "train_nf4_fp32"),
        ("generation, 8 prompts; one, a Q4_1 file", "transformers; llama.cpp", f"{_faster(texts)}; {_times(file)}", "generate"),
        (
            "one token, 4-bit layer",
            "bitsandbytes; dense bf16",
            f"4096 x 4096, fp32: {_times(large['ratio'])} times as fast, {errors}; 576 x 1536: {_times(small)}",
            "nf4_cpu",
        ),
        ("merging files, fp32", "PEFT", f"{_faster(merging, memory)}, the same bits", "merge_cpu"),
        ("right answers of a QLoRA adapter", "not merged", merged, "merge_targets"),
    ]
    lines = [f"| {what} | {against} | {found} | {_link(name)} |" for what, against, found, name in rows]
    return "\n".join(["| what | against | result | from |", "|---|---|---|---|", *lines])


def advice() -> str:
    """What the runs of ``exp_peft_full`` say on rank, targets and rate: at most eight rows."""
    from peft_full_advice import advice as table
    from peft_full_figures import Results

    return table(Results(RESULTS / "peft_full.jsonl"))


# ---- writing and comparing -------------------------------------------------------------------------------------------

PARTS = {
    README: {"reading list": reading_list, "tree": tree, "results": results, "advice": advice},
    CONTRIBUTING: {"levels": levels},
}


def pattern(name: str) -> re.Pattern[str]:
    """Matches a part with its two marks; group 2 is what stands between them."""
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- end of {name} -->)", re.S)


def current(path: Path, name: str) -> str:
    """What a document says now."""
    (found,) = pattern(name).finditer(path.read_text(encoding="utf-8"))
    return found[2]


def _numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\| ([\d,]+) \|", text)]


def agrees(said: str, true: str) -> bool:
    """Whether two versions of a part are the same but for numbers of lines that are off by a tenth, or by 20."""
    shape = [re.sub(r"\| [\d,]+ \|", "| N |", text) for text in (said, true)]
    pairs = zip(_numbers(said), _numbers(true), strict=False)
    return shape[0] == shape[1] and all(abs(a - b) <= max(20, b // 10) for a, b in pairs)


def out_of_date() -> list[str]:
    """The parts that do not agree with the files."""
    return [name for path, parts in PARTS.items() for name, make in parts.items() if not agrees(current(path, name), make())]


def write() -> None:
    """Bring every part up to date."""
    for path, parts in PARTS.items():
        text = path.read_text(encoding="utf-8")
        for name, make in parts.items():
            text = pattern(name).sub(lambda found, make=make: found[1] + make() + found[3], text)
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring the documents up to date")
    if parser.parse_args().write:
        write()
    stale = out_of_date()
    print(f"out of date: {', '.join(stale)}; python tests/readme_map.py --write" if stale else "up to date")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
