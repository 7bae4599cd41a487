"""llama.cpp's worker in ``bench_generate.py``: the server of the wheel ``xllamacpp`` in this process, asked on loopback.

A slot for each stream and all prompts in one request, so that they are decoded together; as many threads as the others have.
All else is its default: an fp16 cache and flash attention were faster for eight streams than an fp32 cache without (83 to
100 ms of CPU a step against 120, by hand). Nothing is kept between requests, and greedy choice is the only sampler. It cannot
go on after an end token: ``ignore_eos`` forbids such tokens instead, so texts part there. PyTorch is not imported: peak
memory is llama.cpp's and Python's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from harness import peak_rss_bytes, serve

if TYPE_CHECKING:
    import xllamacpp

CONTEXT = 256  # tokens of a slot: what llama.cpp rounds up to anyway, twice what is needed
GREEDY = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "ignore_eos": True, "return_tokens": True}


def start(file: str, slots: int, threads: int) -> xllamacpp.Server:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = CONTEXT * slots, slots, 0
    settings.fit_params, settings.verbosity = False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(settings)


def worker(file: str, prompts_path: str, slots: int, threads: int) -> None:
    prompts = json.loads(Path(prompts_path).read_text())[-slots:]
    server = start(file, slots, threads)

    def answers(new_tokens: int) -> tuple[list[dict], float, float]:
        body = json.dumps({**GREEDY, "prompt": prompts, "n_predict": new_tokens}).encode()
        began, cpu = time.perf_counter(), time.process_time()
        request = urllib.request.Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            found = json.loads(reply.read())
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found = sorted(found if isinstance(found, list) else [found], key=lambda answer: answer["index"])
        assert [a["timings"]["prompt_n"] for a in found] == [len(p) for p in prompts], "a prompt was not read whole"
        assert all(len(a["tokens"]) == new_tokens for a in found), "another number of tokens"
        return found, seconds, cpu

    def work(command: dict) -> dict:
        assert command["streams"] == slots
        _, first, first_cpu = answers(1)
        found, seconds, cpu = answers(command["new_tokens"])
        steps = command["new_tokens"] - 1
        own = [answer["timings"]["predicted_ms"] / 1e3 / steps for answer in found]  # it starts at the first new token
        return {
            "tokens": [answer["tokens"] for answer in found], "seconds": seconds, "cpu_seconds": cpu,
            "step_s": (seconds - first) / steps, "cpu_step_s": (cpu - first_cpu) / steps, "own_step_s": mean(own),
            "native_s": 0.0, "peak_bytes": peak_rss_bytes(),
        }  # fmt: skip

    serve({"ready": True}, work)


if __name__ == "__main__":
    output = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print
    sys.stdout = os.fdopen(output, "w")
    _, file, prompts, slots, threads = sys.argv[1:]
    worker(file, prompts, int(slots), int(threads))
    sys.stdout.flush()
    os._exit(0)  # its threads have nothing left to do, and may take long to end
