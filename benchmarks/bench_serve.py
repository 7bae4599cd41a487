"""``minisft serve`` under load: requests and tokens a second of one client and of eight; a chat whose turns are kept or not.

    python benchmarks/bench_serve.py [--model M] [--requests 16] [--max-tokens 32] [--rounds 5] [--quick]

The server is a process of its own, started as the command starts it; the clients are threads here, each sending its next
request when the last one is answered. Greedy answers are compared with what ``minisft.generate`` gives, and those that differ
are counted. There is no peer here: what a batch gains over one request at a time is the question.

The chat has a system message of 150 words and five turns, each answer 16 tokens. Two servers take turns, chat by chat: one
keeps what it has read (``--prefix-cache-mb``, on by default), the other nothing. Each chat begins with a line of its own, so
that only its own turns are known. Seconds are those from sending a turn to the whole answer.
"""

from __future__ import annotations

import argparse
import contextlib
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
HOUSE_RULES = (
    "You answer for the parcel desk of a small town. Parcels that come before noon are given out the same day, others on "
    "the next. Nobody gets a parcel without a card or the number on the slip. Parcels wait for ten days and then go back. "
    "Heavy ones are brought to the door on Tuesdays and Fridays. What is broken is written down, with the name of the "
    "finder and the hour. Letters for people who have moved are sent on for a year if they asked for it, and go back if "
    "they did not. The desk is open from eight to twelve and from two to six, on Saturdays until noon. Stamps are sold, "
    "money is not changed. Be short and kind, never promise a day that you do not know, and send those who shout to the "
    "head of the office, who is in on Mondays. "
)
TURNS = (
    "Good morning.",
    "When can I get my parcel?",
    "It came at ten.",
    "And if I have no card?",
    "Thank you, and until when?",
)
TURN_TOKENS = 16
KEEPING = {"kept": 512, "nothing kept": 0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``minisft serve`` in a process of its own."""

    def __init__(self, model: str, *flags: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "minisft", "serve", "--model", model, "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        with urllib.request.urlopen(f"{self.address}/models", timeout=60) as answer:
            self.model = json.loads(answer.read())["data"][0]["id"]

    def ask(self, prompt: str, max_tokens: int) -> dict:
        return self.say([{"role": "user", "content": prompt}], max_tokens)

    def say(self, messages: list[dict], max_tokens: int) -> dict:
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


def talk(server: Server, name: str) -> tuple[list[float], list[str], list[int]]:
    """Seconds of each turn, the answers, and tokens of the last prompt: all, and those that were known."""
    messages, seconds, usage = [{"role": "system", "content": f"{name}. {HOUSE_RULES}"}], [], {}
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        start = time.perf_counter()
        answer = server.say(messages, TURN_TOKENS)
        seconds.append(time.perf_counter() - start)
        messages.append(answer["choices"][0]["message"])
        usage = answer["usage"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return seconds, answers, [usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]]


def talks(model: str, rounds: int) -> dict:
    """Chats of two servers in turns, the first chat to warm up."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in KEEPING}
    same, prompts = 0, {}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(contextlib.closing(Server(model, "--prefix-cache-mb", str(size))))
            for name, size in KEEPING.items()
        }
        for round_ in range(rounds + 1):
            order = list(servers.items())[:: -1 if round_ % 2 else 1]
            found = {name: talk(server, f"Chat {round_}") for name, server in order}
            same += all(answers == found["kept"][1] for _, answers, _ in found.values())
            for name, (times, _, prompts[name]) in found.items():
                seconds[name] += [times] if round_ else []
    ratios = [sum(b[1:]) / sum(a[1:]) for a, b in zip(seconds["kept"], seconds["nothing kept"], strict=True)]
    return {
        "turn_s": {name: [harness.spread(list(turn)) for turn in zip(*times, strict=True)] for name, times in seconds.items()},
        "later_turns_ratio": harness.spread(ratios), "same_chats": same, "chats": rounds + 1,
        "last_prompt_tokens_and_known": prompts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=16, help="for each number of clients")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="chats of each server")
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
    chat = talks(arguments.model, 1 if arguments.quick else arguments.rounds)
    for name, turns in chat["turn_s"].items():
        print(f"chat, {name}: {', '.join(format(turn['median'], '.2f') for turn in turns)} s a turn")
    faster = chat["later_turns_ratio"]["median"]
    print(f"later turns {faster:.2f} times as fast; {chat['same_chats']} of {chat['chats']} chats the same")
    place = harness.out_folder(arguments.out, arguments.quick)
    print(harness.save("serve", result | {"cells": cells, "chat": chat, **harness.provenance()}, place))


if __name__ == "__main__":
    main()
