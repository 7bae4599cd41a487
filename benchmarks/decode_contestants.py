"""Who takes part in ``bench_generate.py``: one contestant a process, asked in turns to continue the same prompts greedily.

Run as a worker: ``decode_contestants.py --worker '{"program": "minisft", ...}' MODEL PROMPTS``. llama.cpp has a worker
of its own, ``decode_llama_cpp.py``, which does not import PyTorch, so that its memory is its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import peak_rss_bytes, serve
from torch import nn

NONE, BESIDE, MERGED = "none", "beside", "merged"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32, "nf4, rest bf16": torch.bfloat16}
DTYPES |= {"file": torch.float32}  # what a GGUF file of 4 bits stands for
RANK, STD_OF_B = 16, 0.01  # an adapter whose B is not zero, so that merging moves every weight
MOST_ROWS = 8


@dataclass(frozen=True)
class Contestant:
    """``program``: transformers, readable (minisft without its native step), minisft or llama.cpp.

    ``fast``: --fast-decode. ``compressed``: weights read from exact copies, as the command line does.
    """

    name: str
    program: str
    weights: str
    adapter: str = NONE
    fast: bool = False
    compressed: bool = False


TRANSFORMERS, READABLE, MINISFT, LLAMA_CPP = "transformers", "readable", "minisft", "llama.cpp"
ADAPTED, PLAIN, FP32, HALF = "minisft, adapter", "minisft, merged", "minisft, fp32", "minisft, rest bf16"
FAST, COMPRESSED = "minisft, fast decode", "minisft, compressed"


def contestants_of(weights: str, streams: int, llama_cpp: bool) -> list[Contestant]:
    """All of a cell, in the order of their turns."""
    programs = ([TRANSFORMERS] if weights != "nf4" else []) + ([READABLE] if streams == 1 else [])
    programs += [MINISFT] + ([LLAMA_CPP] if llama_cpp else [])
    found = [Contestant(program, program, weights) for program in programs]
    found.append(Contestant(COMPRESSED, MINISFT, weights, compressed=True))
    if weights != "file":
        found.append(Contestant(FAST, MINISFT, weights, fast=True))
    if weights == "nf4":
        found.append(Contestant(HALF, MINISFT, "nf4, rest bf16"))
    if weights == "nf4" and streams == 1:
        found.append(Contestant(FP32, MINISFT, "fp32"))
    if weights in ("fp32", "nf4") and streams == 1:
        found.append(Contestant(ADAPTED, MINISFT, weights, BESIDE))
    if weights == "fp32" and streams == 1:
        found.append(Contestant(PLAIN, MINISFT, weights, MERGED))
    return found


Answer = Callable[[list[list[int]], int], list[list[int]]]


def adapt_(model: nn.Module, merged: bool) -> None:
    """An adapter of rank 16 on every linear but the head, beside the weights or in them."""
    from minisft import LoRAConfig
    from minisft.merge_weights import merge_
    from minisft.surgery import apply_lora_, lora_modules

    apply_lora_(model, LoRAConfig(rank=RANK))
    draw = torch.Generator().manual_seed(0)
    for adapter in lora_modules(model).values():
        adapter.lora_B.data.normal_(std=STD_OF_B, generator=draw)
    if merged:
        merge_(model)


def dense_bytes(model: nn.Module) -> int:
    """Of all weights of dense linears, a shared one counted once."""
    return sum({m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)}.values())


def eight_bits_(model: nn.Module, prompts: list[list[int]]) -> tuple[int, dict]:
    """Switch fast decoding on: by how many bytes a step reads less, and the drift in the model's answers to these prompts."""
    from minisft import fast_decode_

    drift = fast_decode_(model, prompts)
    return dense_bytes(model) - drift.num_bytes, {"drift": asdict(drift)}


def compressed_(model: nn.Module) -> int:
    """Switch exact copies on: by how many bytes a step reads less."""
    from minisft import decode_compressed_
    from minisft.native.decoder import decode_path

    found = decode_compressed_(model)
    assert found.num_weights == sum(isinstance(module, nn.Linear) for module in model.modules()), decode_path(model)
    return dense_bytes(model) - found.num_bytes


def ours(folder: str, contestant: Contestant, prompts: list[list[int]]) -> tuple[Answer, Callable[[], float], int, dict]:
    """What continues prompts, what tells how long the native step ran since it was last asked, bytes of weights; the drift."""
    from minisft import QuantConfig, generation
    from minisft.formats import load_model
    from minisft.kernels import cpu_nf4
    from minisft.native.decoder import decode_path
    from minisft.surgery import weight_bytes

    quant = QuantConfig() if contestant.weights.startswith("nf4") else None
    model = load_model(folder, dtype=DTYPES[contestant.weights], quant=quant)[0]
    if contestant.adapter != NONE:
        adapt_(model, contestant.adapter == MERGED)
    model.eval()
    less, drift = eight_bits_(model, prompts) if contestant.fast else (0, {})
    less += compressed_(model) if contestant.compressed else 0
    inside = [0.0]
    if contestant.program == MINISFT:
        assert decode_path(model, MOST_ROWS).startswith("native code"), decode_path(model, MOST_ROWS)
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

    return answer, taken, weight_bytes(model) - less, drift


def theirs(folder: str, weights: str) -> tuple[Answer, int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[weights]).eval()

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

    return answer, sum(p.numel() * p.element_size() for p in model.parameters())


def measured(answer: Answer, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
    """The tokens, seconds, and CPU seconds of all threads: those, other work on the machine cannot stretch by much."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = answer(prompts, new_tokens)
    return tokens, time.perf_counter() - began, time.process_time() - cpu


def worker(contestant: Contestant, folder: str, prompts_path: str) -> None:
    prompts = json.loads(Path(prompts_path).read_text())
    if contestant.program == TRANSFORMERS:
        (answer, num_bytes), taken, more = theirs(folder, contestant.weights), lambda: 0.0, {}
    else:
        answer, taken, num_bytes, more = ours(folder, contestant, prompts)

    def work(command: dict) -> dict:
        """The time of one token and of all of them, on as many streams as were asked for."""
        chosen, num_tokens = prompts[-command["streams"] :], command["new_tokens"]
        _, first, first_cpu = measured(answer, chosen, 1)
        taken()
        tokens, seconds, cpu = measured(answer, chosen, num_tokens)
        steps = num_tokens - 1
        return {
            "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "step_s": (seconds - first) / steps,
            "cpu_step_s": (cpu - first_cpu) / steps, "native_s": taken() / steps, "peak_bytes": peak_rss_bytes(),
        }  # fmt: skip

    serve({"weight_bytes": num_bytes, **more}, work)


def command_of(contestant: Contestant, folder: Path, prompts: Path) -> list[str]:
    """The arguments of a worker."""
    return [json.dumps(asdict(contestant)), str(folder), str(prompts)]


if __name__ == "__main__":
    _, about, *paths = sys.argv[1:]
    worker(Contestant(**json.loads(about)), *paths)
