"""``minisft serve`` under load: requests a second and tokens a second with one client and with eight.

    python benchmarks/bench_serve.py [--model M] [--requests 16] [--max-tokens 32] [--quick]

The server is a process of its own, started as the command starts it; the clients are threads here, each sending its next
request when the last one is answered. Greedy answers are compared with what ``minisft.generate`` gives, and those that differ
are counted. There is no peer here: what a batch gains over one request at a time is the question.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import harness

PROMPTS = [
    "Where is my parcel?", "Write one sentence about rain.", "Name three colours.", "What is the capital of France?",
    "How do I boil an egg?", "Give me a word that rhymes with moon.", "What is 2 + 2?", "Say hello in German.",
]  # fmt: skip
CLIENTS = (1, 8)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``minisft serve`` in a process of its own."""

    def __init__(self, model: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "minisft", "serve", "--model", model, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        with urllib.request.urlopen(f"{self.address}/models", timeout=60) as answer:
            self.model = json.loads(answer.read())["data"][0]["id"]

    def ask(self, prompt: str, max_tokens: int) -> dict:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        kind = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.address}/chat/completions", json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def right_answers(model: str, max_tokens: int) -> list[str]:
    import minisft

    loaded = minisft.load_model(model)
    return [minisft.generate(*loaded, prompt, max_new_tokens=max_tokens) for prompt in PROMPTS]


def load(server: Server, num_clients: int, num_requests: int, max_tokens: int, right: list[str]) -> dict:
    """Seconds, tokens and wrong answers of ``num_requests`` requests by so many clients."""
    todo, answers, lock = list(range(num_requests)), [], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not todo:
                    return
                i = todo.pop() % len(PROMPTS)
            start = time.perf_counter()
            answer = server.ask(PROMPTS[i], max_tokens)
            text = answer["choices"][0]["message"]["content"]
            answers.append((answer["usage"]["completion_tokens"], text == right[i], time.perf_counter() - start))

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, tokens = time.perf_counter() - start, sum(count for count, _, _ in answers)
    return {
        "clients": num_clients, "requests": len(answers), "seconds": seconds, "requests_per_s": len(answers) / seconds,
        "tokens_per_s": tokens / seconds, "latency_s": harness.spread([latency for _, _, latency in answers]),
        "other_answers": sum(not same for _, same, _ in answers),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=16, help="for each number of clients")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="see that it works; the result goes to a temporary folder")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    num_requests = 4 if arguments.quick else arguments.requests
    right = right_answers(arguments.model, arguments.max_tokens)
    server = Server(arguments.model)
    try:
        server.ask(PROMPTS[0], 2)  # the first request loads the compiled code
        cells = [load(server, clients, num_requests, arguments.max_tokens, right) for clients in CLIENTS]
    finally:
        server.close()
    result = {"what": "minisft serve, greedy chat completions", "model": arguments.model, "max_tokens": arguments.max_tokens}
    for cell in cells:
        print(
            f"{cell['clients']} clients: {cell['requests_per_s']:.2f} requests/s, {cell['tokens_per_s']:.1f} tokens/s, "
            f"{cell['other_answers']} of {cell['requests']} answers differ from generate's"
        )
    place = harness.out_folder(arguments.out, arguments.quick)
    print(harness.save("serve", result | {"cells": cells, **harness.provenance()}, place))


if __name__ == "__main__":
    main()
