"""Greedy generation with SmolLM2-135M: one stream and eight, fp32, bf16 and NF4, against transformers, taking turns.

    python benchmarks/bench_generate.py [--rounds 5] [--weights fp32,bf16,nf4]
    python benchmarks/bench_generate.py --quick    # 4 tokens, one round: does everything still run?

Prompts of different lengths, 64 new tokens each, no end token, so that all do the same work. In fp32 the tokens must be equal
before anything is timed. "readable" is minisft without its native decoding (and with its native products); Python's share of
a native step is what does not pass inside the C++. A step is (time of 64 tokens - time of 1) / 63, so reading the prompt is
left out of it; the first row, eight prompts in fp32 from start to end, includes it. CPU time is that of all threads: on a
machine with other work, read that and set OMP_NUM_THREADS=1. NF4 has no contestant in transformers on a CPU that multiplies
without decoding the weight first. Results go to benchmarks/results/generate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Worker, out_folder, peak_rss_bytes, provenance, save, serve, spread

NEW_TOKENS = 64
STREAMS = (1, 8)
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}
CONTESTANTS = ("transformers", "readable", "minisft")
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


Answer = Callable[[list[list[int]], int], list[list[int]]]


def ours(folder: str, weights: str, native: bool) -> tuple[Answer, Callable[[], float]]:
    """What continues prompts, and what tells how many seconds passed inside the native step since it was last asked."""
    from minisft import QuantConfig, generation
    from minisft.formats import load_model
    from minisft.kernels import cpu_nf4
    from minisft.native.decoder import decode_path

    model = load_model(folder, dtype=WEIGHTS[weights], quant=QuantConfig() if weights == "nf4" else None)[0].eval()
    inside = [0.0]
    if native:
        assert decode_path(model, max(STREAMS)).startswith("native code"), decode_path(model, max(STREAMS))
        library = cpu_nf4.library()
        step = library.decode_step

        def timed(fields: object) -> None:
            began = time.perf_counter()
            step(fields)
            inside[0] += time.perf_counter() - began

        library.decode_step = timed
    else:
        generation.next_logits_of = lambda model, _: (
            lambda ids, cache: model.head(model.hidden(ids[:, None], cache=cache)[:, 0])
        )

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generation.generate(model, prompts, max_new_tokens=new_tokens, eos_ids=())

    def taken() -> float:
        seconds, inside[0] = inside[0], 0.0
        return seconds

    return answer, taken


def theirs(folder: str, weights: str) -> Answer:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=WEIGHTS[weights]).eval()

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, longest:].tolist()

    return answer


def measured(answer: Answer, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
    """The tokens, seconds, and CPU seconds of all threads: those, other work on the machine cannot stretch by much."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = answer(prompts, new_tokens)
    return tokens, time.perf_counter() - began, time.process_time() - cpu


def worker(contestant: str, weights: str, folder: str, prompts_path: str) -> None:
    prompts = json.loads(Path(prompts_path).read_text())
    if contestant == "transformers":
        answer, taken = theirs(folder, weights), lambda: 0.0
    else:
        answer, taken = ours(folder, weights, contestant == "minisft")

    def work(command: dict) -> dict:
        """The time of one token and of all of them, on as many streams as were asked for."""
        chosen, num_tokens = prompts[-command["streams"] :], command["new_tokens"]
        _, first, first_cpu = measured(answer, chosen, 1)
        taken()
        tokens, seconds, cpu = measured(answer, chosen, num_tokens)
        steps = num_tokens - 1
        return {
            "seconds": seconds, "step_s": (seconds - first) / steps, "cpu_step_s": (cpu - first_cpu) / steps,
            "native_s": taken() / steps, "tokens": tokens, "peak_bytes": peak_rss_bytes(),
        }  # fmt: skip

    serve({"ready": True}, work)


def compete(weights: str, streams: int, workers: dict[str, Worker], rounds: int, new_tokens: int) -> dict:
    """One cell: all contestants in turns, the first turn to warm up."""
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for turn in range(rounds + 1):
        answers = {name: process.ask(streams=streams, new_tokens=new_tokens) for name, process in workers.items()}
        tokens = [answer.pop("tokens") for answer in answers.values()]
        assert weights != "fp32" or all(other == tokens[0] for other in tokens), "different tokens"
        if turn > 0:
            for name, answer in answers.items():
                found[name].append(answer)
        print(f"  {weights}, {streams} streams, turn {turn}", file=sys.stderr, flush=True)
    steps = {name: [answer["step_s"] for answer in answers] for name, answers in found.items()}
    return {
        "weights": weights,
        "streams": streams,
        "tokens_per_s": {name: spread([streams / s for s in seconds]) for name, seconds in steps.items()},
        "step_ratio": {
            name: spread([other / mine for other, mine in zip(seconds, steps["minisft"], strict=True)])
            for name, seconds in steps.items()
            if name != "minisft"
        },
        "cpu_ms_a_step": {name: spread([1e3 * answer["cpu_step_s"] for answer in each]) for name, each in found.items()},
        "python_ms_a_step": spread([1e3 * (a["step_s"] - a["native_s"]) for a in found["minisft"]]),
        "seconds": {name: [answer["seconds"] for answer in answers] for name, answers in found.items()},
        "peak_bytes": {name: answers[-1]["peak_bytes"] for name, answers in found.items()},
    }


def cells(folder: Path, chosen: list[str], rounds: int, new_tokens: int) -> list[dict]:
    found = []
    for weights in chosen:
        names = [name for name in CONTESTANTS if weights != "nf4" or name != "transformers"]
        given = [weights, str(folder / "model"), str(folder / "prompts.json")]
        workers = {name: Worker(Path(__file__), [name, *given], {}) for name in names}
        found += [compete(weights, streams, workers, rounds, new_tokens) for streams in STREAMS]
        for process in workers.values():
            process.close()
    return found


def describe(cell: dict) -> str:
    speeds = ", ".join(f"{name} {found['median']:.1f}" for name, found in cell["tokens_per_s"].items())
    ratios = ", ".join(
        f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f}) times {name}"
        for name, found in cell["step_ratio"].items()
    )
    cpu = ", ".join(f"{name} {found['median']:.1f}" for name, found in cell["cpu_ms_a_step"].items())
    python = cell["python_ms_a_step"]["median"]
    head = f"{cell['weights']}, {cell['streams']} streams, tokens/s: {speeds}; {ratios}"
    return f"{head}; CPU ms a step: {cpu}; Python {python:.2f} ms a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="which cells")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from minisft.data.chat import encode_chat, resolve_template
    from minisft.data.messages import Message
    from minisft.formats import load_model, save_model

    rounds, new_tokens = (1, 4) if arguments.quick else (arguments.rounds, NEW_TOKENS)
    model, tokenizer = load_model("smollm2-135m-instruct")
    template = resolve_template(tokenizer)
    prompts = [encode_chat(tokenizer, template, (Message("user", q),), add_generation_prompt=True).input_ids for q in QUESTIONS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, tokenizer, folder / "model")
        del model
        (folder / "prompts.json").write_text(json.dumps(prompts))
        found = cells(folder, arguments.weights.split(","), rounds, new_tokens)
    result = {
        **provenance(),
        "threads": torch.get_num_threads(),
        "prompt_tokens": [len(p) for p in prompts],
        "new_tokens": new_tokens,
        "decoding": found,
    }
    for cell in found:
        if (cell["weights"], cell["streams"]) == ("fp32", len(QUESTIONS)):  # from start to end, for the README
            whole = {name: cell["seconds"][name] for name in ("transformers", "minisft")}
            result["tokens_per_s"] = {c: spread([new_tokens * len(QUESTIONS) / s for s in whole[c]]) for c in whole}
            result["speed_ratio"] = spread([a / b for a, b in zip(*whole.values(), strict=True)])
        print(describe(cell))
    save("generate", result, out_folder(arguments.out, arguments.quick))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
