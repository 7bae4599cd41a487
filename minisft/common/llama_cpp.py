"""An installed llama.cpp, asked in a process of its own.

The wheel ``xllamacpp`` (extra ``llamacpp``) holds llama.cpp and its server. It runs in a child, so that a file which makes it
abort ends the child alone, and what it prints goes nowhere. Two programs can be compared under its settings: fp32 cache,
no flash attention, the CPU, one request at a time. Only this module knows the wheel.

Run as ``python -m minisft.common.llama_cpp``, it reads one JSON object from its standard input and writes one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minisft.common.errors import UserError, visible
from minisft.common.extras import require_extra
from minisft.common.safe_json import JSON

MODULE = "xllamacpp"
TIMEOUT_S = 1800


def ask(model: Path, requests: Sequence[dict[str, JSON]], context: int, adapter: Path | None = None) -> list[dict[str, JSON]]:
    """What llama.cpp answers.

    Args:
        model: a GGUF file.
        requests: bodies of the completion route, or of the chat route if they hold ``messages``; answered in turn.
        context: tokens that the longest request needs.
        adapter: a GGUF adapter file to load on top.

    Returns:
        an answer for each.

    Raises:
        UserError: ``config/missing-extra``; ``model/llama-cpp`` where llama.cpp refuses the files or dies.
    """
    require_extra("llamacpp", MODULE)
    body = {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "context": context,
        "requests": [*requests],
    }
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "minisft.common.llama_cpp"]
    try:
        done = subprocess.run(
            command, input=json.dumps(body), capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError("model/llama-cpp", f"llama.cpp took longer than {TIMEOUT_S} s", where=visible(model)) from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        last = next((line for line in lines if " E " in line), lines[-1])  # its own error lines carry an E
        raise UserError("model/llama-cpp", "llama.cpp does not take the file", where=visible(model), found=visible(last, 300))
    answers: list[dict[str, JSON]] = json.loads(done.stdout)
    return answers


def _answer() -> None:
    """The child: read, load, ask, write."""
    import xllamacpp

    body = json.loads(sys.stdin.read())
    output = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print
    settings = xllamacpp.CommonParams()
    settings.model.path = body["model"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = body["context"], 1, 0
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    if body["adapter"] is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(body["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    answers = [
        (server.handle_chat_completions if "messages" in request else server.handle_completions)(request)
        for request in body["requests"]
    ]
    os.write(output, json.dumps(answers).encode())
    os._exit(0)  # its threads have nothing left to do, and may take long to end


if __name__ == "__main__":
    _answer()
