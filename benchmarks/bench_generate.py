"""Greedy decoding with SmolLM2-135M: one stream and eight, against transformers and llama.cpp, in turns.

    python benchmarks/bench_generate.py [--rounds 5] [--weights fp32,nf4,bf16,file] [--before CHECKOUT]
    python benchmarks/bench_generate.py --adapters # what an adapter costs, for the results file that is there
    python benchmarks/bench_generate.py --quick    # 4 tokens, one round: does everything still run?
    python benchmarks/bench_generate.py --table    # the results file's numbers as a table in Markdown

Prompts of different lengths, 64 new tokens each, no end token, so that all do the same work. In fp32 the tokens of transformers
must be ours before anything is timed; how many of llama.cpp's are is counted, up to our first end token, which it may not say.
llama.cpp comes with the wheel xllamacpp (extra ``llamacpp``; without it these cells are left out), built by its makers without
AVX-512: its own defaults (fp16 cache, flash attention), eight slots for eight streams, all prompts in one request; exports of
ours in fp32 and bf16, and beside NF4 the model's own Q4_1 file, whose head has 8 bits (Q8_0); our head stays in the dtype of
the rest, fp32 or ("rest bf16") bf16. "readable" is minisft without its native decoding (and with its native products), in one
stream; "compressed" reads exact copies of dense weights in fewer bits (``decode_compressed_``), as commands do by themselves;
for that the pretrained model, whose own file has 4 bits, is first rounded to bf16, as models are published, for everybody but
llama.cpp beside NF4. In the cells "file" it is not: there all have the numbers of the Q4_1 file, in fp32 but for llama.cpp
and for "compressed", which reads them in the file's bits. "fast decode" reads dense weights in 8 bits (``--fast-decode``), and
its drift from the exact one is measured in its answers to the same prompts. NF4 has no contestant in transformers on a CPU that
multiplies without decoding the weight first. "before" is minisft in another checkout, the last without native decoding
(``git worktree add CHECKOUT c014459``). An adapter has rank 16, on every linear but the head; what it costs is measured by
``decode_adapter.py``: single steps with it, with it off and of the merged model in turns, ``--rounds`` processes a cell.

A step is (time of 64 tokens - time of 1) / 63 for everybody, so reading the prompts is left out of it; llama.cpp's own count
(``predicted_ms`` over 63) stands beside it. The memory limit is the bytes of a contestant's weights over the speed at which
a buffer of 512 MiB is read in the same turn (the faster of a sum and a product with itself). Every turn has wall and CPU time
of all threads. With OMP_NUM_THREADS=1 the tables take CPU time, which other work on the machine cannot stretch by much; with
more threads wall time, since threads that wait may spin. Results go to benchmarks/results/generate.json and .svg.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import decode_adapter
import decode_contestants
import decode_llama_cpp
import torch
from decode_adapter import BESIDE, MERGED, NOW, OFF
from decode_contestants import (
    BEFORE,
    COMPRESSED,
    FAST,
    FP32,
    HALF,
    LLAMA_CPP,
    MINISFT,
    READABLE,
    TRANSFORMERS,
    Contestant,
)
from harness import Worker, note, out_folder, provenance, save, save_svg, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEW_TOKENS = 64
STREAMS = (1, 8)
WEIGHTS = ("fp32", "nf4", "bf16", "file")
MODEL = "smollm2-135m-instruct"
READ_NUMBERS = 2**27  # fp32: more bytes than any cache holds
CLOCKS = tuple(NOW)
QUESTIONS = (
    "Name three rivers.",
    "What is a good way to learn the names of the stars?",
    "Write two sentences about a lighthouse keeper and his dog.",
    "Explain in simple words why the sky is blue and why it turns red in the evening.",
    "My parcel was supposed to come on Monday. It is Thursday now. Whom do I ask, and what should I have at hand?",
    "List what I need for an omelette.",
    "Give me a short poem about rain on a tin roof, in which every line begins with another letter.",
    "How many minutes are there in a day, and how many in a week? Show how you get there.",
)
NAMES = {"fp32": "fp32", "bf16": "bf16", "nf4": "NF4", "file": "Q4_1 file"}
ADAPTED = (("fp32", False), ("bf16", False), ("nf4", False), ("fp32", True))  # weights, and whether read compressed
ADAPTER_TURNS = 100  # steps of each kind in a process
COLOURS = {
    TRANSFORMERS: "#8a8a8a", READABLE: "#a6d4f2", MINISFT: "#0072b2", COMPRESSED: "#cc79a7", HALF: "#56b4e9", FAST: "#009e73",
    LLAMA_CPP: "#d55e00",
}  # fmt: skip


# ---- measuring -------------------------------------------------------------------------------------------------------


def read_bytes_per_s(numbers: torch.Tensor) -> dict[str, float]:
    """How fast this machine reads by as many threads as the contestants have, by each clock: the best of six passes."""
    best = dict.fromkeys(CLOCKS, 0.0)
    for way in (lambda: numbers.sum(), lambda: torch.dot(numbers, numbers)):
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            best = {clock: max(best[clock], numbers.nbytes / seconds) for clock, seconds in taken.items()}
    return best


def same_beginning(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = zip(tokens, others, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(tokens))


def agreement(tokens: dict[str, list[list[int]]], ends: set[int]) -> dict[str, dict[str, list[int]]]:
    """Of each contestant, prompt by prompt: tokens equal to minisft's, of so many before an end token of minisft's."""
    found = {}
    for name, theirs in tokens.items():
        of = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in tokens[MINISFT]]
        same = [min(same_beginning(a, b), n) for a, b, n in zip(tokens[MINISFT], theirs, of, strict=True)]
        found[name] = {"same_tokens": same, "of": of}
    return found


def compete(
    weights: str, streams: int, workers: dict[Contestant, Worker], rounds: int, new_tokens: int, ends: set[int]
) -> dict:
    """One cell: all contestants in turns, the first turn to warm up."""
    numbers = torch.ones(READ_NUMBERS)
    found: dict[str, list[dict]] = {who.name: [] for who in workers}
    reads, same = [], {}
    for turn in range(rounds + 1):
        order = list(workers.items())[:: -1 if turn % 2 else 1]  # nobody is always the last
        answers = {who.name: process.ask(streams=streams, new_tokens=new_tokens) for who, process in order}
        tokens = {name: answer.pop("tokens") for name, answer in answers.items()}
        speed = read_bytes_per_s(numbers)
        if turn == 0:
            same = agreement(tokens, ends)
            names = (TRANSFORMERS, READABLE, BEFORE) if weights in ("fp32", "file") else ()
            exact = [tokens[name] for name in (*names, COMPRESSED) if name in tokens]
            assert all(other == tokens[MINISFT] for other in exact), "different tokens"
        else:
            reads.append(speed)
            for name, answer in answers.items():
                found[name].append(answer)
        note(f"{weights}, {streams} streams, turn {turn}")
    said = {who.name: process.ready for who, process in workers.items()}
    drifts = {name: {"drift": ready["drift"]} for name, ready in said.items() if "drift" in ready}
    rows = [
        row(who, found, reads, said[who.name]["weight_bytes"], streams) | same[who.name] | drifts.get(who.name, {})
        for who in workers
    ]
    python = spread([1e3 * (answer["step_s"] - answer["native_s"]) for answer in found[MINISFT]])
    speeds = {clock: spread([speed[clock] for speed in reads]) for clock in CLOCKS}
    return {
        "weights": weights, "streams": streams, "read_bytes_per_s": speeds, "python_ms_a_step": python, "contestants": rows,
    }  # fmt: skip


def row(who: Contestant, found: dict[str, list[dict]], reads: list[dict], num_bytes: int, streams: int) -> dict:
    """One contestant of a cell. ``ratio`` is its step over ours: above 1, minisft is faster."""
    mine = found[who.name]
    steps = {clock: seconds_of(mine, "step_s", clock) for clock in CLOCKS}
    our_steps = {clock: seconds_of(found[MINISFT], "step_s", clock) for clock in CLOCKS}
    limit = {clock: [num_bytes / speed[clock] for speed in reads] for clock in CLOCKS}
    own = {"own_step_ms": spread([1e3 * a["own_step_s"] for a in mine])} if who.program == LLAMA_CPP else {}
    return {
        **asdict(who),
        "weight_bytes": num_bytes,
        "peak_bytes": mine[-1]["peak_bytes"],
        "step_ms": {clock: spread([1e3 * s for s in steps[clock]]) for clock in CLOCKS},
        "tokens_per_s": {clock: spread([streams / s for s in steps[clock]]) for clock in CLOCKS},
        "ratio": {clock: ratio(steps[clock], our_steps[clock]) for clock in CLOCKS},
        "memory_share": {clock: ratio(limit[clock], steps[clock]) for clock in CLOCKS},
        "steps": steps,
        "seconds": {clock: seconds_of(mine, "seconds", clock) for clock in CLOCKS},
        **own,
    }


def seconds_of(answers: list[dict], what: str, clock: str) -> list[float]:
    return [answer[what if clock == "wall" else f"cpu_{what}"] for answer in answers]


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Turn by turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def cells(folder: Path, chosen: list[str], rounds: int, new_tokens: int, ends: set[int], before: Path | None) -> Iterator[dict]:
    """Each with processes of its own, so that peak memory is the cell's."""
    llama_cpp = has_llama_cpp()
    ggufs = {weights: gguf_of(weights, folder) if llama_cpp else None for weights in chosen}
    for streams in STREAMS:
        for weights in chosen:
            everybody = decode_contestants.contestants_of(weights, streams, llama_cpp, before is not None)
            workers = {who: started(who, streams, folder, ggufs[weights], before) for who in everybody}
            yield compete(weights, streams, workers, rounds, new_tokens, ends)
            for process in workers.values():
                process.close()


def adapter_costs(folder: Path, chosen: list[str], rounds: int, turns: int) -> Iterator[dict]:
    """What a step with an adapter takes of one with it off, and of one of the merged model: ``rounds`` processes.

    Of a process the median of its turns counts, paired by turn. A dense model counts twice: before and after it exchanged
    memory with the merged one.
    """
    for weights, compressed in ADAPTED:
        if weights not in chosen:
            continue
        cell, found = {"weights": weights, "compressed": compressed}, []
        for number in range(rounds):
            arguments = [json.dumps(cell), str(folder / "model"), str(folder / "prompts.json")]
            process = Worker(Path(decode_adapter.__file__), arguments, {})
            exchanges = (False,) if weights == "nf4" or compressed else (False, True)
            found += [process.ask(turns=turns, exchange=exchange) for exchange in exchanges]
            process.close()
            note(f"{kind_of(cell)}, an adapter, process {number + 1}")
        yield {**cell, **process.ready, **adapter_row(found)}


def adapter_row(found: list[dict]) -> dict:
    """Of seconds by kind of step and clock, a table a process: ms of each kind, and the adapter's over the others."""
    ms, over = {}, {}
    for kind in (BESIDE, OFF, MERGED):
        ms[kind] = {clock: spread([1e3 * spread(times[kind][clock])["median"] for times in found]) for clock in CLOCKS}
    for kind in (OFF, MERGED):
        pairs = {clock: [ratio(times[BESIDE][clock], times[kind][clock])["median"] for times in found] for clock in CLOCKS}
        over[f"over_{kind}"] = {clock: spread(ratios) for clock, ratios in pairs.items()}
    return {"step_ms": ms, **over}


def has_llama_cpp() -> bool:
    """Whether its wheel is installed; says so if it is not."""
    if importlib.util.find_spec("xllamacpp") is not None:
        return True
    note("llama.cpp is left out: pip install 'minisft[llamacpp]' (Linux)")
    return False


def started(who: Contestant, streams: int, folder: Path, gguf: Path | None, before: Path | None) -> Worker:
    if who.program != LLAMA_CPP:
        model = folder / ("file" if who.weights == "file" else "model")
        if who.weights == "file" and who.program != TRANSFORMERS:
            model = gguf_of("file", folder)
        arguments = decode_contestants.command_of(who, model, folder / "prompts.json")
        environment = {"PYTHONPATH": str(before)} if who.program == BEFORE else {}
        return Worker(Path(decode_contestants.__file__), arguments, environment)
    arguments = [str(gguf), str(folder / "prompts.json"), str(streams), str(torch.get_num_threads())]
    process = Worker(Path(decode_llama_cpp.__file__), arguments, {})
    process.ready["weight_bytes"] = gguf_bytes(Path(str(gguf)))
    return process


def gguf_of(weights: str, folder: Path) -> Path:
    """An export of the same weights; of "file", and beside NF4, the pretrained model's own file of 4 bits."""
    from minisft.formats.source import resolve
    from minisft.merging.export_gguf import export_gguf

    if weights in ("nf4", "file"):
        return resolve(MODEL).path
    return export_gguf(
        folder / f"{weights}.gguf", str(folder / "model"), outtype={"fp32": "f32", "bf16": "bf16"}[weights], compare=False
    ).out


def gguf_bytes(path: Path) -> int:
    """Bytes of the weights that a step reads: the table of embeddings only where it is the head as well."""
    from minisft.formats.gguf_header import read_gguf

    tensors = read_gguf(path).tensors
    untied = "output.weight" in tensors
    return sum(info.num_bytes for name, info in tensors.items() if not (untied and name == "token_embd.weight"))


# ---- for people ------------------------------------------------------------------------------------------------------


def contestant(found: list[dict], weights: str, streams: int, name: str) -> dict | None:
    rows = [row for cell in found if (cell["weights"], cell["streams"]) == (weights, streams) for row in cell["contestants"]]
    return next((row for row in rows if row["name"] == name), None)


def targets(found: list[dict], adapters: list[dict], clock: str) -> list[dict]:
    """What was hoped for, and whether it came true; nothing where a contestant is missing."""
    wanted = [(weights, 1, MINISFT, None, 0.7) for weights in ("fp32", "bf16")]
    peers = (READABLE, BEFORE, TRANSFORMERS)
    wanted += [(w, 1, name, peer, 3.0) for w in ("fp32", "bf16") for peer in peers for name in (MINISFT, COMPRESSED)]
    ways = (MINISFT, COMPRESSED, HALF, FAST)
    wanted += [("nf4", 1, name, peer, least) for peer, least in ((LLAMA_CPP, 0.9), (FP32, 2.5)) for name in ways]
    wanted += [("nf4", 8, name, LLAMA_CPP, 1.0) for name in (MINISFT, COMPRESSED, FAST)]
    wanted += [("fp32", 8, name, TRANSFORMERS, 3.0) for name in (MINISFT, COMPRESSED, FAST)]
    wanted += [(weights, 1, FAST, TRANSFORMERS, 3.0) for weights in ("fp32", "bf16")]
    wanted += [("file", 1, COMPRESSED, peer, least) for peer, least in ((READABLE, 3.0), (TRANSFORMERS, 3.0), (LLAMA_CPP, 0.9))]
    wanted += [("file", 8, COMPRESSED, peer, least) for peer, least in ((TRANSFORMERS, 3.0), (LLAMA_CPP, 1.0))]
    verdicts = []
    for weights, streams, name, peer, least in wanted:
        mine, other = (contestant(found, weights, streams, who or name) for who in (name, peer))
        if mine is None or other is None:
            continue
        value = mine["memory_share"][clock] if peer is None else ratio(other["steps"][clock], mine["steps"][clock])
        what = "share of what reading the weights allows" if peer is None else f"times as fast as {peer}"
        met = value["median"] >= least
        which = weights + name.removeprefix(MINISFT)
        verdicts.append(verdict(f"{which}, {plural(streams)}: {what}", value, f"{least} or more", met))
    for cell in adapters:
        for other in (OFF,) if cell["weights"] == "nf4" else (MERGED, OFF):  # merged, 4 bits are 32
            cost = cell[f"over_{other}"][clock]
            verdicts.append(verdict(f"{kind_of(cell)}: an adapter over {other}", cost, "1.05 or less", cost["median"] <= 1.05))
    return verdicts


def verdict(what: str, value: dict, wanted: str, met: bool) -> dict:
    return {"target": what, "value": value, "wanted": wanted, "met": met}


def kind_of(cell: dict) -> str:
    return f"{cell['weights']}{', compressed' * cell['compressed']}, one stream"


def plural(streams: int) -> str:
    return {1: "one stream", 8: "eight streams"}.get(streams, f"{streams} streams")


def shown(value: dict, digits: int = 2) -> str:
    return "{median:.{0}f} ({q1:.{0}f} to {q3:.{0}f})".format(digits, **value)


def line(cell: dict, row: dict, clock: str) -> str:
    step, speed = row["step_ms"][clock], row["tokens_per_s"][clock]["median"]
    text = f"{cell['weights']}, {plural(cell['streams'])}, {row['name']}: {step['median']:.1f} ms a step, {speed:.1f} tokens/s"
    text += f", {shown(row['ratio'][clock])} of minisft's time, {row['memory_share'][clock]['median']:.2f} of memory's speed"
    text += f", {row['peak_bytes'] / 1e9:.2f} GB, {sum(row['same_tokens'])} of {sum(row['of'])} tokens the same"
    if "drift" in row:
        text += f"; KL {row['drift']['mean_kl']:.1e}"
    return text + (f"; by its own clock {row['own_step_ms']['median']:.1f} ms" if "own_step_ms" in row else "")


def plot(found: list[dict], adapters: list[dict], clock: str, path: Path) -> None:
    """Tokens a second in one stream, with what reading the weights allows, and in eight; what an adapter costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.3), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(4, 4, 1.6))
    for axes, streams in zip(panels, STREAMS, strict=False):
        order = [cell for weights in NAMES for cell in found if (cell["weights"], cell["streams"]) == (weights, streams)]
        _speeds(axes, order, clock)
        axes.set_title(plural(streams), fontsize=9)
    panels[0].set_ylabel(f"new tokens a {'CPU ' if clock == 'cpu' else ''}second")
    _adapters(panels[2], adapters, clock)
    handles = [panels[0].bar([0], [0], color=colour, label=name) for name, colour in COLOURS.items()]
    handles += panels[0].plot([], [], color="black", linewidth=1.5, label="what reading its weights allows (one stream)")
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    title = "Greedy decoding, SmolLM2-135M; llama.cpp beside NF4 reads its Q4_1 file; median and quartiles"
    figure.suptitle(title, fontsize=10)
    save_svg(figure, path)


def _speeds(axes: Axes, some: list[dict], clock: str) -> None:
    for x, cell in enumerate(some):
        rows = [row for name in COLOURS for row in cell["contestants"] if row["name"] == name]
        for k, row in enumerate(rows):
            speed, at, width = row["tokens_per_s"][clock], x + (k - (len(rows) - 1) / 2) * 0.15, 0.14
            spans = [[speed["median"] - speed["q1"]], [speed["q3"] - speed["median"]]]
            axes.bar(at, speed["median"], width, yerr=spans, color=COLOURS[row["name"]], capsize=2)
            ink = "black" if row["name"] in (READABLE, HALF) else "white"
            turned = 90 if cell["streams"] > 1 else 0  # three digits are wider than a bar
            axes.text(at, 1, f"{speed['median']:.0f}", ha="center", va="bottom", fontsize=7, color=ink, rotation=turned)
            if cell["streams"] == 1:
                limit = cell["read_bytes_per_s"][clock]["median"] / row["weight_bytes"]
                axes.plot([at - width / 2, at + width / 2], [limit, limit], color="black", linewidth=1.5)
    axes.set_xticks(range(len(some)), [NAMES[cell["weights"]] for cell in some])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _adapters(axes: Axes, adapters: list[dict], clock: str) -> None:
    """A step with it over one with it off: in 4 bits the merged one is another, it reads dense weights."""
    for x, cell in enumerate(adapters):
        value = cell["over_off"][clock]
        spans = [[value["median"] - value["q1"]], [value["q3"] - value["median"]]]
        axes.bar(x, value["median"], 0.7, yerr=spans, color=COLOURS[MINISFT], capsize=2)
        axes.text(x, 0.25, f"{value['median']:.2f}", ha="center", va="center", fontsize=8, color="white")
    axes.axhline(1.05, color="black", linewidth=0.8, linestyle="--")
    labels = ["com-\npressed" if cell["compressed"] else NAMES[cell["weights"]] for cell in adapters]
    axes.set_xticks(range(len(adapters)), labels, fontsize=7.5)
    axes.set_title("a step with adapter\nover one without", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def table(result: dict) -> Iterator[str]:
    """The rows of benchmarks/README.md: ``minisft is faster`` is the other's step over ours."""
    clock = result["clock"]
    yield "| weights, streams | | MB of weights | ms a step | tokens/s | minisft is faster | of memory | peak, GB |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in result["decoding"]:
        first = f"{NAMES[cell['weights']]}, {plural(cell['streams']).split()[0]}"
        for row in cell["contestants"]:
            share = f"{row['memory_share'][clock]['median']:.2f}" if cell["streams"] == 1 else ""
            faster = "" if row["name"] == MINISFT else shown(row["ratio"][clock])
            name, share = (f"**{text}**" if row["name"] == MINISFT and text else text for text in (row["name"], share))
            cells = [first, name, f"{row['weight_bytes'] / 1e6:.0f}", shown(row["step_ms"][clock], 1)]
            cells += [f"{row['tokens_per_s'][clock]['median']:.1f}", faster, share, f"{row['peak_bytes'] / 1e9:.2f}"]
            yield f"| {' | '.join(cells)} |"
            first = ""
    yield ""
    yield "| an adapter, one stream | MB of weights, of it | ms a step: with it, off, merged | over off | over merged |"
    yield "|---|---|---|---|---|"
    for cell in result["adapters"]:
        name = NAMES[cell["weights"]] + ", compressed" * cell["compressed"]
        ms = ", ".join(f"{cell['step_ms'][kind][clock]['median']:.1f}" for kind in (BESIDE, OFF, MERGED))
        ratios = " | ".join(shown(cell[f"over_{kind}"][clock], 3) for kind in (OFF, MERGED))
        yield f"| {name} | {cell['weight_bytes'] / 1e6:.0f}, {cell['adapter_bytes'] / 1e6:.1f} | {ms} | {ratios} |"
    yield ""
    yield from (f"- {item['target']}: {shown(item['value'])}; {item['wanted']}" for item in result["targets"])


def from_start_to_end(found: list[dict], clock: str, new_tokens: int) -> dict:
    """Eight prompts in fp32, reading them included: the row of README.md."""
    peer, mine = (contestant(found, "fp32", len(QUESTIONS), name) for name in (TRANSFORMERS, MINISFT))
    if peer is None or mine is None:
        return {}
    whole = {row["name"]: row["seconds"][clock] for row in (peer, mine)}
    speeds = {name: spread([new_tokens * len(QUESTIONS) / s for s in seconds]) for name, seconds in whole.items()}
    return {"tokens_per_s": speeds, "speed_ratio": ratio(whole[TRANSFORMERS], whole[MINISFT])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="which cells")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of minisft as it was, which takes part in one stream")
    parser.add_argument(
        "--adapters", action="store_true", help="measure only what adapters cost, for the results that are there"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print what there is instead")
    arguments = parser.parse_args()
    place = out_folder(arguments.out, arguments.quick)
    if (arguments.table or arguments.adapters) and not (place / "generate.json").is_file():
        raise SystemExit(
            f"{place}: no generate.json; run this without --table and --adapters first, or name its folder by --out"
        )
    if arguments.table:
        print("\n".join(table(json.loads((place / "generate.json").read_text()))))
        return
    if arguments.before is not None and not (arguments.before / "minisft" / "__init__.py").is_file():
        raise SystemExit(f"--before: no minisft in {arguments.before}; git worktree add {arguments.before} c014459")
    if unknown := set(arguments.weights.split(",")) - set(WEIGHTS):
        raise SystemExit(f"--weights: {' '.join(sorted(unknown))} is none of {' '.join(WEIGHTS)}")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure the cells that were asked for, save after each, plot and print."""
    rounds, new_tokens, turns = (1, 4, 4) if arguments.quick else (arguments.rounds, NEW_TOKENS, ADAPTER_TURNS)
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    result = {
        **provenance("xllamacpp"), "threads": torch.get_num_threads(), "clock": clock, "new_tokens": new_tokens,
        "read_bytes": 4 * READ_NUMBERS,
    }  # fmt: skip
    found: list[dict] = []
    adapters: list[dict] = []
    place = out_folder(arguments.out, arguments.quick)
    if arguments.adapters:
        by = {name: result[name] for name in ("command", "commit", "date")}
        result = json.loads((place / "generate.json").read_text()) | {"adapters_by": by}
        found, clock = result["decoding"], result["clock"]
        adapters += [cell for cell in result["adapters"] if cell["weights"] not in arguments.weights.split(",")]
    result |= {"decoding": found, "adapters": adapters}
    with tempfile.TemporaryDirectory() as name:
        chosen, before = arguments.weights.split(","), arguments.before and arguments.before.resolve()
        result["prompt_tokens"], ends = prepare(Path(name), chosen)
        for cell in [] if arguments.adapters else cells(Path(name), chosen, rounds, new_tokens, ends, before):
            print("\n".join(line(cell, row, clock) for row in cell["contestants"]), flush=True)
            python, speed = cell["python_ms_a_step"]["median"], cell["read_bytes_per_s"][clock]["median"]
            print(f"  Python {python:.2f} ms a step of minisft; reading {speed / 1e9:.1f} GB/s", flush=True)
            found.append(cell)
            result |= from_start_to_end(found, clock, new_tokens)
            path = written(result, place)
        for cell in adapter_costs(Path(name), chosen, rounds, turns):
            adapters.append(cell)
            print(f"{kind_of(cell)}: an adapter {shown(cell['over_off'][clock])} over off", flush=True)
            path = written(result, place)
    for item in targets(found, adapters, clock):
        print(f"{'met   ' if item['met'] else 'MISSED'} {item['target']}: {shown(item['value'])}; wanted {item['wanted']}")
    print(f"results: {path} and .svg")


def written(result: dict, place: Path) -> Path:
    """After each cell, for a run that is cut off."""
    found, adapters, clock = result["decoding"], result["adapters"], result["clock"]
    path = save("generate", result | {"targets": targets(found, adapters, clock)}, place)
    plot(found, adapters, clock, path.with_suffix(".svg"))
    return path


def prepare(folder: Path, chosen: Sequence[str]) -> tuple[list[int], set[int]]:
    """Folders of the model in bf16 and, for the cells "file", of its file's numbers in fp32, and the prompts as token ids.

    Returns:
        the prompts' lengths, and the tokens that end an answer.
    """
    from minisft.data.chat import encode_chat, resolve_template
    from minisft.data.messages import Message
    from minisft.formats import load_model, save_model

    model, tokenizer = load_model(MODEL, torch.bfloat16)
    template = resolve_template(tokenizer)
    prompts = [encode_chat(tokenizer, template, (Message("user", q),), add_generation_prompt=True).input_ids for q in QUESTIONS]
    save_model(model, tokenizer, folder / "model")
    if "file" in chosen:
        save_model(load_model(MODEL, torch.float32)[0], tokenizer, folder / "file")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return [len(prompt) for prompt in prompts], set(tokenizer.eos_ids)


if __name__ == "__main__":
    main()
