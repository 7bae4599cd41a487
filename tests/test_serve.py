"""``minisft serve``: the official client gets what ``generate`` writes, and nothing that a client sends ends the server."""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import functools
import json
import operator
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine import free_port
from test_arena import ask
from tiny_folder import write_model

import minisft
from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.generation import Sampling
from minisft.serving import batch
from minisft.serving.batch import Batch, Job
from minisft.serving.engine import Engine, QueueFullError
from minisft.serving.lanes import load_lanes, sharing_copy
from minisft.serving.requests import ApiError, parse
from minisft.serving.stops import TextUntilStop

pytestmark = pytest.mark.slow

pytest.importorskip("starlette", reason="needs starlette: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install -e '.[serve]'")

KEY = "a key of more than sixteen".replace(" ", "-")
ASK = [{"role": "user", "content": "one two"}]
ODD = [None, True, -1, 0, 2**70, 1.5, 1e308, "", "x", "\u202e\x00", [], {}, [[]], {"a": 1}, [None], "é" * 9, ["a"] * 9]
TALKS = [[{"role": "user", "content": text}] for text in ("a", "say something", "what then?", "x" * 60, "one two")]


# --- stop strings


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops, data):
    """By another road: read the text letter by letter and look at its end."""
    ends = [(end, stop) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    expected = text
    if ends:
        first = min(end for end, _ in ends)
        expected = text[: first - max(len(stop) for end, stop in ends if end == first)]
    reader, out, rest = TextUntilStop(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        out += reader.push(rest[:size])
        assert expected.startswith(out)  # never text that has to be taken back
        rest = rest[size:]
    assert out + reader.finish() == expected
    assert reader.stopped == bool(ends)


# --- a real server


@dataclass
class Shop:
    """A model, two adapters and an application over them, served in a thread."""

    folder: Path
    port: int
    engine: object
    service: object
    app: object

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def write_adapters(folder: Path) -> dict[str, str]:
    """Two adapters that change the answers."""
    for seed, name in enumerate(("red", "blue"), 1):
        model, _ = minisft.load_model(folder / "model")
        minisft.apply_lora_(model, minisft.LoRAConfig(rank=2, alpha=8.0))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in minisft.lora_modules(model).values():
                for factor in (layer.lora_A, layer.lora_B):
                    factor.copy_(torch.randn(factor.shape, generator=draw))
        minisft.save_adapter(model, folder / name)
    return {name: str(folder / name) for name in ("red", "blue")}


def make_shop(folder: Path, adapters: dict[str, str], **changes: int) -> Shop:
    from minisft.common.local_server import own_hosts
    from minisft.serving.app import Service, make_app

    port = free_port()
    limits = {"max_rows": 8, "max_waiting": 64, "max_cache_bytes": 10**6, **changes}
    engine = Engine(load_lanes(folder / "model", adapters), log=print, **limits)
    service = Service(engine, own_hosts("127.0.0.1", port), None, 16, print)
    return Shop(folder, port, engine, service, make_app(service))


@contextlib.contextmanager
def listening(shop: Shop):
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(shop.app, port=shop.port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    shop.engine.start()
    thread.start()
    until(lambda: server.started)
    yield shop
    server.should_exit = True
    shop.engine.end()
    thread.join(20)
    assert not thread.is_alive()


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_model(folder / "model", folder / "scratch")
    write_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def shop(folder):
    with listening(make_shop(folder, {name: str(folder / name) for name in ("red", "blue")})) as made:
        yield made


@pytest.fixture
def small(folder, monkeypatch):
    """Room for one answer, and for one request that waits; an answer of 400 tokens takes more than 40 seconds."""
    step = Batch.step

    def slowly(batch):
        time.sleep(0.1)
        step(batch)

    monkeypatch.setattr(Batch, "step", slowly)
    with listening(make_shop(folder, {}, max_rows=1, max_waiting=1)) as made:
        yield made


@pytest.fixture(autouse=True)
def _loopback(_no_network, monkeypatch):
    """This machine may be reached, no other."""

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        _socket.socket.connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def openai_client(shop):
    openai = pytest.importorskip("openai", reason="needs the official client: pip install -e '.[test]'")
    return openai.OpenAI(base_url=shop.address, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(shop):
    with openai_client(shop) as made:
        yield made


def send(shop, body, path="/chat/completions", headers=None):
    """(status, headers, JSON) of one request, without the official client."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(shop.address + path, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


@functools.cache
def alone(folder, adapter):
    """A model that nobody else uses."""
    model, tokenizer = minisft.load_model(folder / "model")
    if adapter is not None:
        minisft.load_adapter_(model, folder / adapter)
    return model, tokenizer


def expected(folder, messages, adapter=None, **settings):
    """The same by the Python call."""
    return minisft.generate(*alone(folder, adapter), messages, **settings)


def test_copies_share_the_weights_and_nothing_else(folder):
    model, _ = minisft.load_model(folder / "model")
    copy = sharing_copy(model)
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    minisft.load_adapter_(copy, folder / "red")
    assert minisft.lora_modules(copy)
    assert not minisft.lora_modules(model)


# --- the official client as oracle


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["model", "red", "blue"]
    assert client.models.retrieve("red").id == "red"


@pytest.mark.parametrize("name", ["model", "red", "blue"])
def test_greedy_answers_are_those_of_generate(client, folder, name):
    answer = client.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=12)
    text = expected(folder, ASK, None if name == "model" else name, max_new_tokens=12)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == name


def test_requests_at_once_get_what_they_get_alone(client, folder):
    """Of three models, of different lengths and limits, while others join and leave."""
    asked = [(name, talk, 3 + 5 * i) for i, talk in enumerate(TALKS) for name in ("model", "red", "blue")]
    answers: dict[int, str] = {}

    def work(i: int) -> None:
        name, talk, limit = asked[i]
        made = client.chat.completions.create(model=name, messages=talk, temperature=0, max_tokens=limit)
        answers[i] = made.choices[0].message.content

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, (name, talk, limit) in enumerate(asked):
        assert answers[i] == expected(folder, talk, None if name == "model" else name, max_new_tokens=limit), asked[i]


def test_different_models_give_different_answers(folder):
    texts = {expected(folder, ASK, name, max_new_tokens=12) for name in (None, "red", "blue")}
    assert len(texts) == 3


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_streamed_pieces_make_the_whole(client, settings):
    asked = {"model": "red", "messages": ASK, "max_tokens": 20, "n": 2, **settings}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason


def test_usage_counts_tokens_and_the_limit_ends_an_answer(client, folder):
    _, tokenizer = alone(folder, None)
    answer = client.chat.completions.create(model="model", messages=ASK, temperature=0, max_completion_tokens=5)
    rendered = "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"
    assert answer.usage.prompt_tokens == len(tokenizer.encode(rendered, control=True))
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.choices[0].finish_reason == "length"


def test_the_next_turn_of_a_chat_is_known_but_for_what_is_new(client, folder):
    talk = [{"role": "user", "content": "tell me about rain, wind, snow and the weather of all the days before"}]
    settings = {"model": "blue", "temperature": 0, "max_tokens": 8}
    first = client.chat.completions.create(messages=talk, **settings)
    assert first.usage.prompt_tokens_details.cached_tokens < first.usage.prompt_tokens / 2
    said = first.choices[0].message.content
    talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
    second = client.chat.completions.create(messages=talk, **settings)
    assert second.choices[0].message.content == expected(folder, talk, "blue", max_new_tokens=8)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_a_stop_string_at_every_position_ends_the_answer(client):
    asked = {"model": "blue", "messages": ASK, "temperature": 0, "max_tokens": 9}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert len(text) > 4
    for start in range(len(text)):
        stop = text[start : start + 2]
        answer = client.chat.completions.create(**asked, stop=["never this", stop])
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(**asked, stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.index(stop)]


def test_a_seed_decides_the_draws_as_in_generate(client, folder):
    asked = {"model": "model", "messages": ASK, "temperature": 0.8, "top_p": 0.9, "seed": 11, "max_tokens": 14}
    first, second = (client.chat.completions.create(**asked, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in second.choices] == texts
    assert len(set(texts)) == 3
    assert texts[0] == expected(folder, ASK, max_new_tokens=14, temperature=0.8, top_p=0.9, seed=11)
    model, tokenizer = alone(folder, None)
    ids = tokenizer.encode("<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n", control=True)
    from minisft.generation import generate

    rows = generate(model, [ids] * 3, max_new_tokens=14, eos_ids=tokenizer.eos_ids, temperature=0.8, top_p=0.9, seed=11)
    assert texts == [tokenizer.decode(row[:-1] if row[-1] in tokenizer.eos_ids else row) for row in rows]
    assert first.usage.completion_tokens == sum(map(len, rows))
    unseeded = {client.chat.completions.create(**{**asked, "seed": None}).choices[0].message.content for _ in range(3)}
    assert len(unseeded) > 1


def test_log_probabilities_are_the_models_own(client, folder):
    model, tokenizer = minisft.load_model(folder / "model", torch.float64)
    answer = client.chat.completions.create(
        model="model", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    ids = tokenizer.encode("<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n", control=True)
    for score in answer.choices[0].logprobs.content:
        with torch.no_grad():
            log_probs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        top = log_probs.topk(3)
        assert score.logprob == pytest.approx(float(top.values[0]), abs=1e-4)
        assert [t.logprob for t in score.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert score.token == tokenizer.decode([int(top.indices[0])], skip_special=False)
        ids.append(int(top.indices[0]))


def test_completions_continue_text_and_ids(client, folder):
    model, tokenizer = alone(folder, None)
    ids = tokenizer.encode("one two three")
    new = minisft.generate(model, tokenizer, ids, max_new_tokens=9)
    text = tokenizer.decode(new[:-1] if new[-1] in tokenizer.eos_ids else new)
    for prompt in ("one two three", ids, [ids], ["one two three"]):
        answer = client.completions.create(model="model", prompt=prompt, temperature=0, max_tokens=9)
        assert answer.choices[0].text == text
    chunks = client.completions.create(model="model", prompt=ids, temperature=0, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_the_client_gets_the_errors_that_it_knows(shop, client):
    import openai

    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="green", messages=ASK)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="red", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="red", messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded"


# --- who is refused


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400, "messages[0]"),
        ({"model": None}, 400, "model"),
        ({"model": "/etc/passwd"}, 404, "model"),
        ({"n": 9}, 400, "n"),
        ({"n": 0}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"seed": 1.5}, 400, "seed"),
        ({"stream": 1}, 400, "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"max_token": 5}, 400, "max_token"),
    ],
)
def test_bad_fields_are_named(shop, change, status, param):
    found, _, body = send(shop, {"model": "model", "messages": ASK, "max_tokens": 1, **change})
    assert found == status
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_taken(shop):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}, "user": "u"}
    assert send(shop, {"model": "model", "messages": ASK, "max_tokens": 1, "stop": None, **neutral})[0] == 200


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"headers": {"origin": "http://evil.example"}}, 403),
        ({"headers": {"content-type": "text/plain"}}, 415),
        ({"headers": {"content-length": "9" * 30}}, 413),
        ({"values": b" " * (2**20 + 1)}, 413),
        ({"values": b"{"}, 400),
        ({"values": b'{"model": NaN}'}, 400),
        ({"values": b"\xff\xfe"}, 400),
        ({"method": "GET"}, 405),
        ({"path": "/v1/../etc"}, 404),
    ],
)
def test_bad_requests_are_refused_in_openais_form(shop, change, status):
    found, headers, body = ask(shop.app, **{"path": "/v1/chat/completions", "host": f"127.0.0.1:{shop.port}", **change})
    assert found == status
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert "access-control-allow-origin" not in headers


def test_a_key_is_asked_for_everywhere_but_for_the_health(shop):
    from dataclasses import replace

    from minisft.serving.app import make_app

    app = make_app(replace(shop.service, api_key=KEY, hosts=None))
    for sent, status in ((None, 401), ("Bearer wrong", 401), (f"Basic {KEY}", 401), (f"Bearer {KEY}", 200)):
        headers = {} if sent is None else {"authorization": sent}
        assert ask(app, "/v1/models", method="GET", headers=headers)[0] == status
    assert ask(app, "/health", method="GET")[0] == 200


def test_the_answer_that_these_tests_leave_is_a_long_one(folder):
    model, tokenizer = alone(folder, None)
    ids = tokenizer.encode("<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n", control=True)
    assert len(minisft.generate(model, tokenizer, ids, max_new_tokens=400)) == 400


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_place(small):
    asked = {"model": "model", "messages": ASK, "max_tokens": 400, "stream": True, "temperature": 0}
    sockets = []
    for count in ((1, 0), (1, 1)):
        sockets.append(stream_socket(small, asked))
        until(lambda count=count: small.engine.counts() == count)
    status, headers, body = send(small, asked)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert body["error"]["code"] == "queue_full"
    sockets[1].close()
    until(lambda: small.engine.counts() == (1, 0))
    sockets[0].close()
    until(lambda: small.engine.counts() == (0, 0))
    assert send(small, {"model": "model", "messages": ASK, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("moment", ["read_prompts", "Batch._use"])  # before and after the row is in the batch
def test_rows_that_are_joining_are_counted_once(folder, monkeypatch, moment):
    """One row, one place to wait: who asks while the first request is joining waits, and the next is refused."""
    lanes = load_lanes(folder / "model", {})
    engine = Engine(lanes, 1, 1, print)
    first, second, third = (Job(lanes["model"], [3, 4], 1, 5, Sampling(), (), None, lambda _: None) for _ in range(3))
    refused = []
    real = operator.attrgetter(moment)(batch)

    def asked_meanwhile(*arguments):
        for job in (second, third):
            try:
                engine.submit(job)
            except QueueFullError:
                refused.append(job)
        return real(*arguments)

    engine.submit(first)
    with monkeypatch.context() as patch:
        patch.setattr(f"minisft.serving.batch.{moment}", asked_meanwhile)
        engine._turn()
    assert engine.counts() == (1, 1)
    assert refused == [third]


def stream_socket(shop, asked) -> socket.socket:
    """An open request whose answer nobody reads."""
    made = socket.create_connection(("127.0.0.1", shop.port))
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{shop.port}\r\ncontent-type: application/json\r\n"
    made.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return made


def test_what_fails_in_the_engine_is_a_500_and_the_next_request_is_answered(small, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("minisft.serving.batch.read_prompts", fail)
        status, _, body = send(small, {"model": "model", "messages": ASK, "max_tokens": 1})
    assert status == 500
    assert "planted" not in body["error"]["message"]
    assert send(small, {"model": "model", "messages": ASK, "max_tokens": 1})[0] == 200


def test_what_fails_in_one_model_leaves_the_others_rows(folder, capsys):
    """``red`` fails while ``model`` writes, with one answer of ``red`` on its way and one that is joining."""
    lanes, pieces = load_lanes(folder / "model", {"red": str(folder / "red")}), []
    engine = Engine(lanes, 8, 8, print)

    def job(name: str, prompt: list[int]) -> Job:
        return Job(lanes[name], prompt, 1, 5, Sampling(), (), None, lambda piece: pieces.append((name, len(prompt), piece)))

    def head(hidden):
        raise RuntimeError("planted")

    for asked in (job("model", [3, 4]), job("red", [3, 4])):
        engine.submit(asked)
    engine._turn()
    lanes["red"].model.head = head
    engine.submit(job("red", [5, 6, 7]))
    for _ in range(4):
        engine._turn()
    of_red = [(size, piece is None) for name, size, piece in pieces if name == "red"]
    assert sorted(of_red) == [(2, False), (2, True), (3, True)]
    of_model = [piece for name, _, piece in pieces if name == "model"]
    assert [piece.finish for piece in of_model] == [None, None, None, None, "length"]
    assert engine.counts() == (0, 0)
    assert capsys.readouterr().out == "requests failed: RuntimeError: planted\n"


def test_a_client_whose_loop_ends_in_the_middle_of_a_step_fails_nobody_else(folder, monkeypatch, capsys):
    """It leaves when the step has looked who is still there, and its token is not yet handed over."""
    made, gone, pieces = make_shop(folder, {}), threading.Event(), []

    async def disconnect():
        await asyncio.to_thread(gone.wait, 60)

    client = threading.Thread(target=lambda: asyncio.run(ask_and_leave(made, disconnect)))
    client.start()
    until(lambda: made.engine.counts() == (0, 1))
    made.engine.submit(Job(made.engine.lanes["model"], [3, 4], 1, 3, Sampling(), (), None, pieces.append))
    choose = Batch._choose

    def meanwhile(batch):
        gone.set()
        client.join()
        return choose(batch)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "_choose", meanwhile)
        made.engine._turn()
    for _ in range(2):
        made.engine._turn()
    assert None not in pieces  # the request has not failed
    assert [piece.finish for piece in pieces] == [None, None, "length"]
    assert made.engine.counts() == (0, 0)
    assert capsys.readouterr().out == ""


async def ask_and_leave(shop, disconnect):
    """A request, straight to the application, of a client that is gone when ``disconnect()`` returns."""
    body = json.dumps({"model": "model", "messages": ASK, "max_tokens": 400, "temperature": 0}).encode()
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if waiting:
            return waiting.pop()
        await disconnect()
        return {"type": "http.disconnect"}

    async def ignore(message):
        pass

    headers = [(b"host", f"127.0.0.1:{shop.port}".encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": headers, "scheme": "http", "server": ("127.0.0.1", 1), "client": ("x", 1), "http_version": "1.1",
        "asgi": {"version": "3.0"}, "root_path": "",
    }  # fmt: skip
    await shop.app(scope, receive, ignore)


# --- fuzzed bodies


def fuzzed(draw: random.Random) -> bytes:
    """A request with something wrong in it, most of the time."""
    fields = ["model", "messages", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"]
    fields += ["logprobs", "top_logprobs", "top_k", "tools", "prompt", "max_completion_tokens", "logit_bias", "rôle"]
    body: dict[str, object] = {"model": "red", "messages": ASK, "max_tokens": 2}
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(fields)] = draw.choice(ODD)
    if draw.random() < 0.4:
        body["messages"] = [{"role": draw.choice(["user", "system", *map(str, ODD)]), "content": draw.choice(ODD)}] * 2
    data = bytearray(json.dumps(body).encode())
    kind = draw.random()
    if kind < 0.2:
        del data[draw.randrange(len(data)) :]
    elif kind < 0.4:
        data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind < 0.45:
        data = bytearray(b"[" * draw.randrange(1, 5000))
    return bytes(data)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_no_body_ends_or_hangs_the_server(shop, count):
    draw, refused = random.Random(count), 0
    for _ in range(count):
        data = fuzzed(draw)
        path = draw.choice(["/v1/chat/completions", "/v1/completions"])
        status, headers, text = ask(shop.app, path, data, host=f"127.0.0.1:{shop.port}")
        assert status < 500, data
        if status != 200:
            refused += 1
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "code", "param"}
            assert isinstance(error["message"], str)
        else:
            assert headers["content-type"].startswith(("application/json", "text/event-stream"))
    assert count / 2 < refused < count  # some are all right, and answered
    until(lambda: shop.engine.counts() == (0, 0))


@pytest.mark.parametrize(
    "name", ["model", "messages", "stop", "n", "temperature", "seed", "prompt", "stream_options", "logprobs"]
)
def test_the_reader_of_requests_refuses_in_one_way_only(name):
    for value in ODD:
        for chat in (True, False):
            for odd in (value, [value], {"role": value, "content": value}, [{"role": "user", "content": [value]}]):
                with contextlib.suppress(ApiError):
                    parse({"model": "m", "messages": ASK, "prompt": "p", name: odd}, chat)
            with contextlib.suppress(ApiError):
                parse(value, chat)


# --- the command


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--host", "0.0.0.0"], "config/no-token"),
        (["--port", "0"], "config/bad-value"),
        (["--adapter", "red"], "config/bad-adapter"),
        (["--adapter", "red=a", "--adapter", "red=b"], "config/bad-adapter"),
        (["--adapter", "../red=a"], "config/bad-adapter"),
        (["--max-rows", "0"], "config/bad-value"),
        (["--max-waiting", "0"], "config/bad-value"),
        (["--api-key-file", "missing"], "config/bad-key"),
        (["--adapter", "red=missing"], "adapter/no-config"),
    ],
)
def test_misuse_is_one_line(folder, capsys, words, code):
    assert main(["serve", "--model", str(folder / "model"), *words]) in (2, 4)
    error = capsys.readouterr().err
    assert error.startswith(f"error[{code}]")
    assert error.count("\n") == 1


def test_a_short_key_is_refused(tmp_path):
    from minisft.serving.settings import read_api_key

    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_api_key(tmp_path / "key") == KEY
    for bad in ("short", "", "with a space in the middle", "\x00" * 20):
        (tmp_path / "key").write_text(bad)
        with pytest.raises(UserError, match="config/bad-key"):
            read_api_key(tmp_path / "key")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_ends_the_command_after_the_answer_in_progress(folder, number):
    port = free_port()
    command = [sys.executable, "-m", "minisft", "serve", "--model", str(folder / "model"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}/v1\n"
    asked = {"model": "model", "messages": ASK, "max_tokens": 400, "stream": True, "temperature": 0}
    stream = stream_socket(Shop(folder, port, None, None, None), asked)
    received = stream.recv(1000)
    process.send_signal(number)
    while part := stream.recv(2**16):
        received += part
    assert received.count(b"data: [DONE]") == 1
    assert process.wait(20) == 128 + number
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_the_asyncio_of_a_lost_client_leaves_no_task(small):
    """A client that leaves before the first token: its row goes, and nothing stays behind in the loop."""

    async def at_once() -> None:
        pass

    async def leave() -> None:
        await ask_and_leave(small, at_once)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())
    until(lambda: small.engine.counts() == (0, 0))
