"""What an adapter costs at one token: steps with it, with it off and of the merged model, in one process, in turns.

A worker of ``bench_generate.py``: ``decode_adapter.py --worker '{"weights": "fp32", "compressed": false}' MODEL PROMPTS``. All
steps read the same token after the same prompt. Turns of whole answers are too long for it: what a machine's memory gives
changes from second to second by more than an adapter costs. The merged model has memory of its own, which is read up to a tenth
faster or slower than that of the other two; so the models can exchange theirs, and half of the turns are measured so.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from decode_contestants import DTYPES, compressed_
from harness import serve
from torch import Tensor

from minisft import LoRAConfig, QuantConfig
from minisft.formats import load_model
from minisft.generation import read_prompts
from minisft.merge_weights import merge
from minisft.model import CausalLM
from minisft.native.decoder import decode_path, next_logits_of
from minisft.surgery import adapters_off, apply_lora_, lora_modules, weight_bytes

BESIDE, OFF, MERGED = "beside", "off", "merged"
NOW = {"wall": time.perf_counter, "cpu": time.process_time}
RANK, STD_OF_B = 16, 0.01  # an adapter whose B is not zero, so that merging moves every weight
TOKEN = 42  # any


def loaded(folder: str, weights: str) -> CausalLM:
    model = load_model(folder, dtype=DTYPES[weights], quant=QuantConfig() if weights == "nf4" else None)[0].eval()
    assert isinstance(model, CausalLM)
    return model


def adapt_(model: CausalLM) -> int:
    """An adapter of rank 16 on every linear but the head; its bytes."""
    apply_lora_(model, LoRAConfig(rank=RANK))
    adapters, draw = lora_modules(model).values(), torch.Generator().manual_seed(0)
    for adapter in adapters:
        adapter.lora_B.data.normal_(std=STD_OF_B, generator=draw)
    model.eval()
    return sum(adapter.lora_A.nbytes + adapter.lora_B.nbytes for adapter in adapters)


def merged(model: CausalLM, compressed: bool) -> CausalLM:
    """The adapter in the weights, which are dense; where copies are read rounded to bf16, since merged fp32 has no copies."""
    found = merge(model)[0]
    if compressed:
        for parameter in found.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        compressed_(found)
    return found


def step_of(model: CausalLM, prompt: list[int]) -> Callable[[], Tensor]:
    """What gives the logits (1, V) after one more token, as often as it is called; the model is taken as it is now."""
    with torch.inference_mode():
        cache, _ = read_prompts(model, [prompt], 1)
        next_logits, lengths, token = next_logits_of(model, cache), cache.lengths, torch.tensor([TOKEN])
    assert decode_path(model).startswith("native code"), decode_path(model)

    def step() -> Tensor:
        cache.lengths = lengths
        with torch.inference_mode():
            return next_logits(token, cache)

    return step


def exchange_memory(model: CausalLM, other: CausalLM) -> None:
    """Let the merged model's dense weights lie where the model's base lay, and the base where they lay."""
    own = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    for name, theirs in other.named_parameters():
        ours = own[name]
        spare = ours.data.clone()
        ours.data.copy_(theirs.data)
        theirs.data.copy_(spare)
        ours.data, theirs.data = theirs.data, ours.data


def check(base: Tensor, logits: dict[str, Tensor]) -> None:
    """An adapter that is off gives the bits of none, and the merged model has it; bf16 rounds half of it away."""
    assert torch.equal(base, logits[OFF]), "an adapter that is off changes the logits"
    moved, apart = ((logits[BESIDE] - logits[name]).abs().mean().item() for name in (OFF, MERGED))
    assert apart < 0.8 * moved, f"merging is {apart:.1e} off, the adapter moves logits by {moved:.1e}"


def worker(weights: str, compressed: bool, folder: str, prompts: str) -> None:
    prompt = json.loads(Path(prompts).read_text())[-1]  # that of one stream
    model = loaded(folder, weights)
    num_bytes = weight_bytes(model) - (compressed_(model) if compressed else 0)
    base = step_of(model, prompt)()
    adapter_bytes = adapt_(model)
    of_its_own = merged(model, compressed)
    steps: dict[str, Callable[[], Tensor]] = {}

    def take_steps() -> None:
        """Of the models as they lie now."""
        for name, without in ((BESIDE, nullcontext()), (OFF, adapters_off(model))):
            with without:
                steps[name] = step_of(model, prompt)
        steps[MERGED] = step_of(of_its_own, prompt)
        check(base, {name: step() for name, step in steps.items()})

    take_steps()

    def work(command: dict) -> dict:
        """Seconds of each step by each clock; the step before it is the same one, as in an answer: caches hold what it left."""
        if command["exchange"]:
            exchange_memory(model, of_its_own)
            take_steps()
        seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in NOW} for name in steps}
        for turn in range(command["turns"]):
            for name, step in list(steps.items())[:: -1 if turn % 2 else 1]:
                step()
                began = {clock: now() for clock, now in NOW.items()}
                step()
                for clock, now in NOW.items():
                    seconds[name][clock].append(now() - began[clock])
        return seconds

    serve({"weight_bytes": num_bytes, "adapter_bytes": adapter_bytes}, work)


if __name__ == "__main__":
    _, about, *paths = sys.argv[1:]
    worker(**json.loads(about), folder=paths[0], prompts=paths[1])
