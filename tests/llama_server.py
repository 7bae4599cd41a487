"""llama.cpp as an oracle: loads a GGUF file in a process of its own and posts requests to its server on loopback.

Independent of ``minisft.common.llama_cpp``. ``python llama_server.py`` reads {model, adapter, requests: [[route, body], ...]}
from its standard input and writes the answers as one line of JSON; ``asked`` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

Request = tuple[str, dict]


def asked(model: Path, requests: list[Request], adapter: Path | None = None) -> list[dict]:
    """The answers; raises CalledProcessError with what llama.cpp printed where it does not load the file."""
    body = {"model": str(model), "adapter": adapter and str(adapter), "requests": requests}
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def completion(ids: list[int], top: int) -> Request:
    """The distribution of the next token, before any sampling."""
    return "/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": top, "cache_prompt": False}


def distribution(answer: dict) -> dict[int, float]:
    """Log-probabilities by token id."""
    return {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}


def serve() -> None:
    import xllamacpp

    body, output = json.loads(sys.stdin.read()), os.dup(1)
    os.dup2(2, 1)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = body["model"], 512, 1
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if body["adapter"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(body["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    answers = []
    for route, request in body["requests"]:
        data = json.dumps(request).encode()
        asking = urllib.request.Request(server.listening_address + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asking) as reply:
                answers.append(json.loads(reply.read()))
        except urllib.error.HTTPError as error:
            answers.append({"error": error.read().decode(errors="replace")})
    os.write(output, json.dumps(answers).encode())
    os._exit(0)


if __name__ == "__main__":
    serve()
