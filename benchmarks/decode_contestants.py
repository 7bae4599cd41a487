"""Who takes part in ``bench_generate.py``: one contestant a process, asked in turns to continue the same prompts greedily.

Run as a worker: ``decode_contestants.py --worker '{"program": "minisft", ...}' MODEL PROMPTS``. llama.cpp has a worker
of its own, ``decode_llama_cpp.py``, which does not import PyTorch, so that its memory is its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from harness import peak_rss_bytes, serve
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32, "nf4, rest bf16": torch.bfloat16}
DTYPES |= {"file": torch.float32}  # what a GGUF file of 4 bits stands for
MOST_ROWS = 8


@dataclass(frozen=True)
class Contestant:
    """``program``: transformers, readable (minisft without its native step), minisft, minisft as it was before, or llama.cpp.

    ``fast``: --fast-decode. ``compressed``: weights read from exact copies, as the command line does.
    """

    name: str
    program: str
    weights: str
    fast: bool = False
    compressed: bool = False


TRANSFORMERS, READABLE, MINISFT, LLAMA_CPP, BEFORE = "transformers", "readable", "minisft", "llama.cpp", "minisft, before"
FAST, COMPRESSED, HALF, FP32 = "minisft, fast decode", "minisft, compressed", "minisft, rest bf16", "minisft, fp32"


def contestants_of(weights: str, streams: int, llama_cpp: bool, before: bool) -> list[Contestant]:
    """All of a cell, in the order of their turns."""
    programs = ([TRANSFORMERS] if weights != "nf4" else []) + ([READABLE] if streams == 1 else [])
    programs += [BEFORE] if before and streams == 1 and weights != "file" else []
    programs += [MINISFT] + ([LLAMA_CPP] if llama_cpp else [])
    found = [Contestant(program, program, weights) for program in programs]
    found.append(Contestant(COMPRESSED, MINISFT, weights, compressed=True))
    if weights != "file":
        found.append(Contestant(FAST, MINISFT, weights, fast=True))
    if weights == "nf4":
        found.append(Contestant(HALF, MINISFT, "nf4, rest bf16"))
    if weights == "nf4" and streams == 1:
        found.append(Contestant(FP32, MINISFT, "fp32"))
    return found


Answer = Callable[[list[list[int]], int], list[list[int]]]


@dataclass
class Subject:
    """What continues prompts, bytes of its weights, seconds of native steps since last asked, fast decoding's drift."""

    answer: Answer
    weight_bytes: int
    taken: Callable[[], float] = lambda: 0.0
    more: dict = field(default_factory=dict)


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


def ours(folder: str, contestant: Contestant, prompts: list[list[int]]) -> Subject:
    """minisft, with its native step timed, without it, or as it was before there was one."""
    from minisft import QuantConfig, generation
    from minisft.formats import load_model
    from minisft.kernels import cpu_nf4
    from minisft.surgery import weight_bytes

    quant = QuantConfig() if contestant.weights.startswith("nf4") else None
    model = load_model(folder, dtype=DTYPES[contestant.weights], quant=quant)[0]
    model.eval()
    less, drift = eight_bits_(model, prompts) if contestant.fast else (0, {})
    less += compressed_(model) if contestant.compressed else 0
    inside = [0.0]
    if contestant.program == MINISFT:
        from minisft.native.decoder import decode_path

        assert decode_path(model, MOST_ROWS).startswith("native code"), decode_path(model, MOST_ROWS)
        library = cpu_nf4.library()
        step = library.decode_step

        def timed(fields: object) -> None:
            began = time.perf_counter()
            step(fields)
            inside[0] += time.perf_counter() - began

        library.decode_step = timed
    elif contestant.program == READABLE:
        generation.next_logits_of = lambda model, _: (
            lambda ids, cache: model.head(model.hidden(ids[:, None], cache=cache)[:, 0])
        )

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generation.generate(model, prompts, max_new_tokens=new_tokens, eos_ids=())

    def taken() -> float:
        seconds, inside[0] = inside[0], 0.0
        return seconds

    return Subject(answer, weight_bytes(model) - less, taken, drift)


def theirs(folder: str, weights: str) -> Subject:
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

    return Subject(answer, sum(p.numel() * p.element_size() for p in model.parameters()))


def measured(answer: Answer, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float, float]:
    """The tokens, seconds, and CPU seconds of all threads: those, other work on the machine cannot stretch by much."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = answer(prompts, new_tokens)
    return tokens, time.perf_counter() - began, time.process_time() - cpu


def worker(contestant: Contestant, folder: str, prompts_path: str) -> None:
    prompts = json.loads(Path(prompts_path).read_text())
    is_theirs = contestant.program == TRANSFORMERS
    subject = theirs(folder, contestant.weights) if is_theirs else ours(folder, contestant, prompts)

    def work(command: dict) -> dict:
        """The time of one token and of all of them, on as many streams as were asked for."""
        chosen, num_tokens = prompts[-command["streams"] :], command["new_tokens"]
        _, first, first_cpu = measured(subject.answer, chosen, 1)
        subject.taken()
        tokens, seconds, cpu = measured(subject.answer, chosen, num_tokens)
        steps = num_tokens - 1
        return {
            "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "step_s": (seconds - first) / steps,
            "cpu_step_s": (cpu - first_cpu) / steps, "native_s": subject.taken() / steps, "peak_bytes": peak_rss_bytes(),
        }  # fmt: skip

    serve({"weight_bytes": subject.weight_bytes, **subject.more}, work)


def command_of(contestant: Contestant, folder: Path, prompts: Path) -> list[str]:
    """The arguments of a worker."""
    return [json.dumps(asdict(contestant)), str(folder), str(prompts)]


if __name__ == "__main__":
    _, about, *paths = sys.argv[1:]
    worker(Contestant(**json.loads(about)), *paths)
