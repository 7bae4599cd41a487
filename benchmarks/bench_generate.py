"""Greedy generation with SmolLM2-135M: minisft against transformers' ``generate``, the same prompts, taking turns.

    python benchmarks/bench_generate.py [--dtype fp32] [--rounds 5]

8 prompts of different lengths, 64 new tokens each, no end token, so that both do the same work. The tokens must be equal
before anything is timed. Results go to benchmarks/results/generate.json.
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

NEW_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = ("transformers", "minisft")
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


def worker(contestant: str, dtype: str, folder: str, prompts_path: str) -> None:
    prompts = json.loads(Path(prompts_path).read_text())
    if contestant == "minisft":
        from minisft.formats import load_model
        from minisft.generation import generate

        model = load_model(folder, dtype=DTYPES[dtype])[0].eval()

        def answer() -> list[list[int]]:
            return generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_ids=())
    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

        def answer() -> list[list[int]]:
            with torch.inference_mode():
                out = theirs.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            return out[:, longest:].tolist()

    def work(command: dict) -> dict:
        began = time.perf_counter()
        tokens = answer()
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "peak_bytes": peak_rss_bytes()}

    serve({"ready": True}, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from minisft.data.chat import encode_chat, resolve_template
    from minisft.data.messages import Message
    from minisft.formats import load_model, save_model

    model, tokenizer = load_model("smollm2-135m-instruct")
    template = resolve_template(tokenizer)
    prompts = [encode_chat(tokenizer, template, (Message("user", q),), add_generation_prompt=True).input_ids for q in QUESTIONS]
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, tokenizer, folder / "model")
        del model
        (folder / "prompts.json").write_text(json.dumps(prompts))
        given = [arguments.dtype, str(folder / "model"), str(folder / "prompts.json")]
        workers = {c: Worker(Path(__file__), [c, *given], {}) for c in CONTESTANTS}
        for turn in range(arguments.rounds + 1):
            tokens = {}
            for contestant, process in workers.items():
                answer = process.ask()
                tokens[contestant], peaks[contestant] = answer["tokens"], answer["peak_bytes"]
                if turn > 0:  # the first turn warms up
                    seconds[contestant].append(answer["seconds"])
            assert arguments.dtype != "fp32" or tokens["minisft"] == tokens["transformers"], "different tokens"
            print(f"  turn {turn}", file=sys.stderr, flush=True)
        for process in workers.values():
            process.close()
    total = NEW_TOKENS * len(QUESTIONS)
    pairs = zip(seconds["transformers"], seconds["minisft"], strict=True)
    result = {
        **provenance(["python", "benchmarks/bench_generate.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "prompts": len(QUESTIONS),
        "prompt_tokens": [len(p) for p in prompts],
        "new_tokens": NEW_TOKENS,
        "tokens_per_s": {c: spread([total / s for s in seconds[c]]) for c in CONTESTANTS},
        "speed_ratio": spread([theirs / ours for theirs, ours in pairs]),
        "peak_bytes": peaks,
    }
    save("generate" if arguments.dtype == "fp32" else f"generate_{arguments.dtype}", result)
    ratio = result["speed_ratio"]
    for contestant in CONTESTANTS:
        speed = result["tokens_per_s"][contestant]["median"]
        print(f"{contestant:13} {speed:8.1f} tokens/s  {peaks[contestant] / 1e9:.2f} GB")
    print(f"minisft / transformers: x{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
