"""The arena: what the store keeps, what the server refuses, and two people in real browsers."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from arena_server import PROMPTS, answer_a, answer_b, write_prompts
from machine import free_port

from minisft.common.errors import UserError
from minisft.data.messages import Message
from minisft.judging.arena import make_arena, open_arena, prepare, read_prompts, split_name, write_result
from minisft.judging.arena_store import ArenaStore, Vote

TESTS = Path(__file__).parent


@pytest.fixture
def store(tmp_path):
    made = open_arena(tmp_path, ("model one", "model two"), write_prompts(tmp_path))
    prepare(made, {"a": answer_a, "b": answer_b}, None)
    yield made
    made.close()


# --- the store


def judge(store, rater, pick):
    """Vote on everything; ``pick`` gets a showing and gives a choice."""
    count = 0
    while (showing := store.next_showing(rater)) is not None:
        store.vote(Vote(showing.ticket, pick(showing)))
        count += 1
    return count


def test_everybody_sees_every_prompt_and_some_the_other_way_round(store):
    shown = []

    def pick(showing):
        shown.append((showing.prompt, showing.sides[0]))
        return "left" if showing.sides[0] == "a" else "right"

    assert judge(store, "anna", pick) == len(PROMPTS) + 1  # the fifth showing repeats one
    assert {prompt for prompt, _ in shown} == {f"row-{i}" for i in range(1, 7)}
    twice = [prompt for prompt, _ in shown if [p for p, _ in shown].count(prompt) == 2]
    assert len({side for prompt, side in shown if prompt in twice}) == 2
    assert all(vote.winner == "a" for vote in store.judgements())
    assert store.progress("anna") == {"prompts": 6, "judged": 6}
    assert store.progress("bert") == {"prompts": 6, "judged": 0}


def test_the_order_is_random_and_another_one_for_everybody(store):
    seen = [store.next_showing(f"rater {i}") for i in range(60)]
    assert {s.sides[0] for s in seen} == {"a", "b"}
    assert len({s.prompt for s in seen}) > 3
    for s in seen:
        assert s.answers[s.sides.index("a")] == PROMPTS[int(s.prompt[4:]) - 1].upper()


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_vote_is_about_the_model_and_not_about_the_side(store, first):
    showing = store.show("row-1", first, "anna")
    store.vote(Vote(showing.ticket, "left", ("up", "down"), ("better", None), "why"))
    assert [v.winner for v in store.judgements()] == [first]
    rows = {row["model"]: row for row in store.feedback_rows()}
    left, right = ("model one", "model two") if first == "a" else ("model two", "model one")
    assert (rows[left]["thumb"], rows[left]["edited"], rows[left]["shown_first"]) == ("up", "better", True)
    assert (rows[right]["thumb"], rows[right]["edited"], rows[right]["comment"]) == ("down", None, "why")


def test_a_ticket_is_good_for_one_vote(store):
    showing = store.show("row-1", "a", "anna")
    store.vote(Vote(showing.ticket, "left"))
    store.vote(Vote(showing.ticket, "right"))
    assert [v.winner for v in store.judgements()] == ["a"]
    with pytest.raises(UserError, match="data/no-ticket"):
        store.vote(Vote("forged", "left"))
    with pytest.raises(UserError, match="data/bad-vote"):
        store.vote(Vote(showing.ticket, "best"))


def test_the_file_is_in_wal_mode_and_fully_synchronous(store):
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    assert store._db.execute("pragma synchronous").fetchone() == (2,)


def test_an_arena_is_gone_on_with_but_not_mixed_with_another(store, tmp_path):
    store.vote(Vote(store.next_showing("anna").ticket, "tie"))
    again = open_arena(tmp_path, ("model one", "model two"), tmp_path / "prompts.jsonl")
    assert len(again.judgements()) == 1
    assert again.unanswered("a") == []
    again.close()
    with pytest.raises(UserError, match="config/other-arena"):
        open_arena(tmp_path, ("model one", "model three"), tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(UserError, match="config/other-arena"):
        open_arena(tmp_path, ("model one", "model two"), tmp_path / "prompts.jsonl")


def test_the_result_is_the_win_rate(store, tmp_path):
    assert write_result(store, tmp_path) is None
    judge(store, "anna", lambda s: "left" if s.sides[0] == "b" else "right")
    result = write_result(store, tmp_path)
    assert result["win_rate_b"]["estimate"] == 1.0
    assert json.loads((tmp_path / "arena.json").read_text()) == result
    assert result["headline"]["estimate"] == 0.5
    assert result["headline"]["enough"] is False  # six pairs


def test_prompts_are_what_stands_before_the_last_answer(tmp_path):
    rows = [{"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert read_prompts(tmp_path / "rows.jsonl") == [[Message("system", "s"), Message("user", "u")]]


def test_a_contestant_is_a_model_with_or_without_an_adapter(tmp_path):
    (tmp_path / "c++").mkdir()
    assert split_name("model+runs/a/adapter") == ("model", "runs/a/adapter")
    assert split_name(str(tmp_path / "c++")) == (str(tmp_path / "c++"), None)
    for bad in ("+adapter", "model+"):
        with pytest.raises(UserError, match="config/bad-model"):
            split_name(bad)


# --- the server, asked without a network


def ask(app, path, values=None, method="POST", headers=None, host="127.0.0.1:8765"):
    """(status, headers, body) of one request, straight to the application."""
    body = values if isinstance(values, bytes) else json.dumps(values or {}).encode()
    sent = {"host": host, "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
        "headers": [(k.encode(), v.encode()) for k, v in sent.items()], "server": ("127.0.0.1", 8765), "client": ("x", 1),
        "http_version": "1.1", "asgi": {"version": "3.0"}, "root_path": "",
    }  # fmt: skip
    messages, waiting = [], [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if waiting:
            return waiting.pop(0)
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    start = messages[0]
    text = b"".join(m.get("body", b"") for m in messages[1:])
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, text


@pytest.fixture
def app(store):
    pytest.importorskip("starlette")
    from minisft.judging.arena_app import make_app

    answers = {"a": answer_a, "b": answer_b}
    return make_app(make_arena(store, answers, live=False, host="127.0.0.1", port=8765, token=None))


def test_the_server_never_tells_which_model_stands_where(app):
    status, headers, body = ask(app, "/api/next", {"rater": "anna"})
    assert status == 200
    shown = json.loads(body)
    assert set(shown) == {"progress", "chat", "ticket", "talks", "answers", "kind"}
    assert "model one" not in body.decode()
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(app, "/api/vote", {"ticket": shown["ticket"], "choice": "tie"})[0] == 200


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1:9999"}, 421),
        ({"headers": {"origin": "http://evil.example"}}, 403),
        ({"headers": {"content-type": "text/plain"}}, 415),
        ({"values": b"{"}, 400),
        ({"values": b"[1]"}, 400),
        ({"values": b'{"rater": NaN}'}, 400),
        ({"values": {"rater": ""}}, 400),
        ({"values": {"rater": 7}}, 400),
        ({"values": b" " * 1_000_001}, 413),
        ({"method": "GET"}, 405),
        ({"path": "/../votes.sqlite"}, 404),
    ],
)
def test_bad_requests_are_refused(app, change, status):
    asked = {"path": "/api/next", "values": {"rater": "anna"}, **change}
    assert ask(app, **asked)[0] == status
    assert ask(app, "/api/next", {"rater": "anna"})[0] == 200


@pytest.mark.parametrize(
    "values",
    [
        {"ticket": "none", "choice": "left"},
        {"choice": "left"},
        {"ticket": "T", "choice": "first"},
        {"ticket": "T", "choice": "left", "thumbs": ["sideways", None]},
        {"ticket": "T", "choice": "left", "thumbs": "up"},
        {"ticket": "T", "choice": "left", "edited": ["x" * 200_001, None]},
        {"ticket": "T", "choice": "left", "comment": "x" * 5_001},
    ],
)
def test_bad_votes_are_refused_and_leave_nothing(app, store, values):
    ticket = store.show("row-1", "a", "anna").ticket
    status, _, body = ask(app, "/api/vote", {k: ticket if v == "T" else v for k, v in values.items()})
    assert status == 400
    assert json.loads(body)["error"]
    assert store.judgements() == []


def test_another_address_needs_a_token(store):
    pytest.importorskip("starlette")
    from minisft.judging.arena_app import make_app

    with pytest.raises(UserError, match="config/no-token"):
        make_arena(store, None, live=False, host="0.0.0.0", port=1, token=None)
    with pytest.raises(UserError, match="config/short-token"):
        make_arena(store, None, live=False, host="0.0.0.0", port=1, token="short")
    token = "a token of sixteen"
    app = make_app(make_arena(store, None, live=False, host="10.0.0.5", port=8765, token=token))
    for given, status in ((None, 401), ("wrong", 401), (token, 200)):
        headers = {} if given is None else {"x-arena-token": given}
        assert ask(app, "/api/next", {"rater": "anna"}, headers=headers, host="10.0.0.5:8765")[0] == status
    assert ask(app, "/", method="GET", host="10.0.0.5:8765")[0] == 200  # the page itself holds nothing


def test_a_chat_keeps_its_sides_and_can_be_voted_on(app, store):
    first = json.loads(ask(app, "/api/chat", {"rater": "anna", "text": "hello there", "ticket": ""})[2])
    said = [ask(app, "/api/answer", {"ticket": first["ticket"], "index": i})[2].decode() for i in (0, 1)]
    assert set(said) == {"HELLO THERE", "there hello"}
    second = json.loads(ask(app, "/api/chat", {"rater": "anna", "text": "and now", "ticket": first["ticket"]})[2])
    for i in (0, 1):
        assert [m["content"] for m in second["talks"][i]] == ["hello there", said[i], "and now"]
    again = [ask(app, "/api/answer", {"ticket": second["ticket"], "index": i})[2].decode() for i in (0, 1)]
    assert again == (["AND NOW", "now and"] if said[0] == "HELLO THERE" else ["now and", "AND NOW"])
    assert ask(app, "/api/vote", {"ticket": second["ticket"], "choice": "left"})[0] == 200
    assert [v.winner for v in store.judgements()] == ["a" if said[0] == "HELLO THERE" else "b"]


# --- a real server


class Server:
    """The test arena in a process of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.port = folder, free_port()
        command = [sys.executable, str(TESTS / "arena_server.py"), str(folder), str(self.port), *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()  # said once the server listens

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("uvicorn")
    made = Server(tmp_path / "arena")
    yield made
    made.kill()


CLIENT = """
import json, sys, urllib.request
def post(path, values):
    address, kind = sys.argv[1].rstrip("/") + path, {"content-type": "application/json"}
    request = urllib.request.Request(address, json.dumps(values).encode(), kind)
    return json.loads(urllib.request.urlopen(request, timeout=20).read())
for _ in range(3):
    shown = post("/api/next", {"rater": "carla"})
    assert post("/api/vote", {"ticket": shown["ticket"], "choice": "left"}) == {"saved": True}
    print(shown["ticket"], flush=True)
"""


@pytest.mark.slow
def test_an_acknowledged_vote_survives_a_killed_server(server):
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, server.address], capture_output=True, text=True, timeout=60, check=True
    )
    server.kill()
    tickets = client.stdout.split()
    assert len(tickets) == 3
    with sqlite3.connect(server.folder / "votes.sqlite") as db:
        assert [row[0] for row in db.execute("select ticket from votes order by rowid")] == tickets
    again = ArenaStore(server.folder / "votes.sqlite")
    assert len(again.judgements()) == 3
    again.close()


def person(browser, address, problems, width=1280, dark=False):
    """A browser of its own, with a memory of its own."""
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light").new_page()
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((address, "data:")) else None)
    page.goto(address)
    until(page, "ready")  # both answers are there whole; the buttons are enabled before the first prompt is, too
    return page


def until(page, expression):
    """Wait until the page finds this true; its own content policy forbids what Playwright would wait with."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


def shown_prompt(page):
    return page.locator("#prompt .turn").first.inner_text().split("\n", 1)[-1]


@pytest.mark.slow
def test_two_people_vote_at_once_and_markup_stays_text(server, browser):
    problems: list[str] = []
    pages = [person(browser, server.address, problems, 1280), person(browser, server.address, problems, 375, dark=True)]
    keys = {0: ["1", "2", "3", "4", "ArrowLeft", "ArrowRight", "1"], 1: ["4"] * 7}
    for turn in range(7):
        for i, page in enumerate(pages):
            until(page, "ready")
            if "attack" in shown_prompt(page):
                shown = page.locator(".answer").all_inner_texts()
                assert any("<img src=x onerror=" in text for text in shown)
                assert page.locator(".answer img, .answer script").count() == 0
                assert page.title() == "minisft arena"
            narrow = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert narrow, f"too large for {page.viewport_size}"
            ticket = page.evaluate("current.ticket")
            page.keyboard.press(keys[i][turn])
            until(page, f"current === null || current.ticket !== {json.dumps(ticket)}")
    for page in pages:
        assert "judged all 6 prompts" in page.locator("#progress").inner_text()
    assert problems == []
    store = ArenaStore(server.folder / "votes.sqlite")
    votes = store.judgements()
    store.close()
    assert len(votes) == 14
    assert len({vote.rater for vote in votes}) == 2


@pytest.mark.slow
def test_a_person_leaves_a_thumb_an_edit_and_a_comment_then_chats(server, browser):
    problems: list[str] = []
    page = person(browser, server.address, problems)
    left = page.locator('[data-side="0"]')
    left.get_by_label("thumb up").click()
    left.get_by_role("button", name="Edit").click()
    left.get_by_label("Better answer").fill("a better answer")
    page.locator("#comment").fill("because 1 2 3 4")  # digits in a text field are no votes
    page.locator('[data-side="1"]').get_by_label("thumb down").click()
    ticket = page.evaluate("current.ticket")
    page.get_by_role("button", name="Left is better").click()
    until(page, f"current !== null && current.ticket !== {json.dumps(ticket)} && ready")
    page.get_by_role("button", name="Chat with both").click()
    page.locator("#text").fill("good morning")
    page.get_by_role("button", name="Send").click()
    said = "[...document.querySelectorAll('.answer')].map(a => a.innerText.trim()).sort().join()"
    until(page, f"{said} === 'GOOD MORNING,morning good' && ready")
    page.get_by_role("button", name="Both bad").click()
    until(page, "document.querySelector('#progress').textContent.startsWith('Saved')")
    assert problems == []
    store = ArenaStore(server.folder / "votes.sqlite")
    rows, votes = store.feedback_rows(), store.judgements()
    store.close()
    assert [v.winner for v in votes[1:]] == ["both_bad"]
    first = next(row for row in rows if row["shown_first"])
    assert (first["thumb"], first["edited"], first["comment"]) == ("up", "a better answer", "because 1 2 3 4")
    assert sum(row["thumb"] == "down" for row in rows) == 1


@pytest.mark.slow
def test_live_answers_arrive_as_they_are_written(tmp_path, browser):
    pytest.importorskip("uvicorn")
    server, problems = Server(tmp_path / "arena", "live"), []
    try:
        page = person(browser, server.address, problems)
        assert shown_prompt(page) in PROMPTS
        assert all(text.strip() for text in page.locator(".answer").all_inner_texts())
        page.keyboard.press("2")
        until(page, "document.querySelector('#progress').textContent.startsWith('1 of')")
        assert problems == []
    finally:
        server.kill()


def test_threads_share_the_store(store):
    def work(rater):
        judge(store, rater, lambda s: "tie")

    threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.judgements()) == 4 * (len(PROMPTS) + 1)


@pytest.mark.slow
def test_the_command_from_two_models_to_preference_pairs(tmp_path, capsys):
    """``minisft arena`` with a model and its adapter, voted on by a script, stopped by SIGTERM; ``feedback`` makes pairs."""
    pytest.importorskip("uvicorn")
    import torch
    from tiny_folder import write_model

    from minisft.cli.main import main
    from minisft.config import LoRAConfig
    from minisft.formats import load_model, save_adapter
    from minisft.surgery import apply_lora_

    write_model(tmp_path / "model", tmp_path / "scratch")
    model, _ = load_model(tmp_path / "model")
    apply_lora_(model, LoRAConfig(rank=2))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=draw)
    save_adapter(model, tmp_path / "adapter")
    contestants = [str(tmp_path / "model"), f"{tmp_path / 'model'}+{tmp_path / 'adapter'}"]
    port, out = free_port(), tmp_path / "votes"
    command = [sys.executable, "-m", "minisft", "arena", "--a", contestants[0], "--b", contestants[1], "--port", str(port)]
    more = ["--prompts", str(write_prompts(tmp_path)), "--out", str(out), "--max-new-tokens", "5"]
    process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address == f"http://127.0.0.1:{port}/"
    subprocess.run([sys.executable, "-c", CLIENT, address], capture_output=True, text=True, timeout=60, check=True)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    result = json.loads((out / "arena.json").read_text())
    assert result["pairs"] == 3
    assert "valid at any time" in printed
    assert main(["feedback", "--in", str(out / "votes.sqlite"), "--out", str(tmp_path / "rows")]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "rows" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 3
    assert {pair["model"] for pair in pairs} <= set(contestants)
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
