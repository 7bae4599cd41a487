"""The arena's web server: a few JSON routes over ``ArenaStore``, and one static page.

It listens on this machine only, unless a token is set. Every request must name a host that we serve and, when it changes
something, come from our own page; the page may load nothing from elsewhere. Answers leave as JSON strings and are never put
into markup.
"""

from __future__ import annotations

import hmac
import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.common import safe_json
from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.data.messages import Message
from minisft.judging.arena_store import ArenaStore, Showing, Side, Vote
from minisft.judging.votes import win_rate

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).parent / "arena_page"
STATIC = {
    "/": ("arena.html", "text/html"),
    "/arena.js": ("arena.js", "text/javascript"),
    "/arena.css": ("arena.css", "text/css"),
}
MAX_BODY, MAX_TEXT, MAX_COMMENT, MAX_TURNS = 1_000_000, 200_000, 5_000, 40
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# Writes an answer piece by piece, and returns it whole.
Answer = Callable[[list[Message], Callable[[str], None]], str]


@dataclass
class Arena:
    """The store, who answers for each side (None: no model in memory), and who may ask."""

    store: ArenaStore
    answer: dict[Side, Answer] | None
    live: bool
    hosts: frozenset[str]
    token: str | None = None
    _busy: dict[str, threading.Lock] = field(default_factory=lambda: {"a": threading.Lock(), "b": threading.Lock()})

    def stream(self, showing: Showing, index: int) -> Iterator[str]:
        """An answer as it is written, one model one answer at a time; kept in the store when complete."""
        known, side = showing.answers[index], showing.sides[index]
        if known is not None or self.answer is None:
            yield known or ""
            return
        pieces: queue.Queue[str | None] = queue.Queue()
        worker = threading.Thread(target=self._write, args=(showing, index, side, pieces), daemon=True)
        worker.start()
        while (piece := pieces.get()) is not None:
            yield piece

    def _write(self, showing: Showing, index: int, side: Side, pieces: queue.Queue[str | None]) -> None:
        assert self.answer is not None
        try:
            with self._busy[side]:
                kept = self.store.showing(showing.ticket).answers[index]  # somebody may have asked for it meanwhile
                if kept is None:
                    self.store.set_answer(showing.prompt, side, self.answer[side](showing.messages[index], pieces.put))
                else:
                    pieces.put(kept)
        except UserError as error:
            self.store.set_answer(showing.prompt, side, f"(no answer: {error})")
        finally:
            pieces.put(None)


def make_app(arena: Arena) -> Starlette:
    """The application, for any ASGI server."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    def route(path: str, work: Callable[[Arena, dict[str, JSON], Request], Response], method: str = "POST") -> Route:
        async def endpoint(request: Request) -> Response:
            return await _guarded(arena, request, work)

        return Route(path, endpoint, methods=[method])

    pages = [route(path, _static, "GET") for path in STATIC]
    return Starlette(
        routes=[
            *pages,
            route("/api/next", _next),
            route("/api/answer", _answer),
            route("/api/vote", _vote),
            route("/api/chat", _chat),
            route("/api/results", _results),
        ]
    )


async def _guarded(arena: Arena, request: Request, work: Callable[[Arena, dict[str, JSON], Request], Response]) -> Response:
    """Check who asks and how much, then do the work in a thread: it waits for the disk."""
    from starlette.concurrency import run_in_threadpool

    if (refused := _refusal(arena, request)) is not None:
        return refused
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return _json({"error": "the request is too large"}, 413)
    try:
        values = safe_json.loads(body) if body else {}
        if not isinstance(values, dict):
            return _json({"error": "the request is no object"}, 400)
        return await run_in_threadpool(work, arena, values, request)
    except UserError as error:
        return _json({"error": str(error)}, 400)
    except ValueError:
        return _json({"error": "the request is not JSON"}, 400)


def _refusal(arena: Arena, request: Request) -> Response | None:
    """Why a request is not served: a host that is not ours (a rebound name), another page's script, no token."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host not in arena.hosts:
        return _json({"error": "unknown host"}, 421)
    if origin is not None and origin.partition("://")[2] != host:
        return _json({"error": "another page may not ask"}, 403)
    if request.method == "POST" and request.headers.get("content-type", "").split(";")[0] != "application/json":
        return _json({"error": "send JSON"}, 415)
    if arena.token is not None and request.url.path not in STATIC:
        given = request.headers.get("x-arena-token", "")
        if not hmac.compare_digest(given.encode(), arena.token.encode()):
            return _json({"error": "the token is missing or wrong"}, 401)
    return None


def _json(value: dict[str, JSON], status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(value), status, HEADERS, "application/json")


def _static(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    from starlette.responses import Response

    name, kind = STATIC[request.url.path]
    return Response((PAGE / name).read_bytes(), 200, HEADERS, kind)


# --- routes


def _next(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    rater = _text(values, "rater", 100)
    showing = arena.store.next_showing(rater, arena.live and arena.answer is not None)
    shown: dict[str, JSON] = {"progress": arena.store.progress(rater), "chat": arena.answer is not None}
    return _json(shown | ({"done": True} if showing is None else _shown(showing)))


def _shown(showing: Showing) -> dict[str, JSON]:
    """What the browser may know: never which model stands where."""
    talks: list[JSON] = [[{"role": m.role, "content": m.content} for m in talk] for talk in showing.messages]
    return {"ticket": showing.ticket, "talks": talks, "answers": list(showing.answers), "kind": showing.kind}


def _answer(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    """The answer on one side, streamed as plain text."""
    from starlette.responses import StreamingResponse

    index = values.get("index")
    if index not in (0, 1):
        raise UserError("data/bad-request", "no such side", expected="0 or 1")
    showing = arena.store.showing(_text(values, "ticket", 100))
    return StreamingResponse(arena.stream(showing, int(str(index))), 200, HEADERS, "text/plain")


def _vote(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    thumbs = _pair(values, "thumbs", 10)
    if not set(thumbs) <= {None, "up", "down"}:
        raise UserError("data/bad-vote", "no such thumb", expected="up or down")
    comment = _text(values, "comment", MAX_COMMENT) if values.get("comment") else None
    edited = _pair(values, "edited", MAX_TEXT)
    arena.store.vote(Vote(_text(values, "ticket", 100), _text(values, "choice", 20), thumbs, edited, comment))
    return _json({"saved": True})


def _chat(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    """One more user turn in a conversation with both models; ``ticket`` is that of the turn before, if there is one."""
    if arena.answer is None:
        raise UserError("data/bad-request", "no model is in memory to chat with")
    rater, text = _text(values, "rater", 100), _text(values, "text", 20_000)
    talks: tuple[list[Message], list[Message]] = ([], [])
    first: Side | None = None
    if values.get("ticket"):
        before = arena.store.showing(_text(values, "ticket", 100))
        if None in before.answers or before.kind != "chat" or len(before.messages[0]) > MAX_TURNS:
            raise UserError("data/bad-request", "the conversation cannot go on")
        for talk, messages, answer in zip(talks, before.messages, before.answers, strict=True):
            talk.extend([*messages, Message("assistant", str(answer))])
        first = before.sides[0]
    for talk in talks:
        talk.append(Message("user", text))
    return _json(_shown(_start_chat(arena.store, talks, rater, first)))


def _start_chat(store: ArenaStore, talks: tuple[list[Message], list[Message]], rater: str, first: Side | None) -> Showing:
    """The sides of a conversation stay where they are from its first turn on."""
    import secrets

    side: Side = first or ("a" if secrets.randbelow(2) else "b")
    prompt = f"chat-{secrets.token_hex(8)}"
    store.add_prompt(prompt, talks if side == "a" else (talks[1], talks[0]), "chat")
    return store.show(prompt, side, rater)


def _results(arena: Arena, values: dict[str, JSON], request: Request) -> Response:
    votes = arena.store.judgements()
    return _json({"votes": len(votes), **({} if not votes else win_rate(votes).to_json()), "models": dict(arena.store.meta())})


def _text(values: dict[str, JSON], name: str, limit: int) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip() or len(value) > limit:
        raise UserError("data/bad-request", f"{name} is missing, empty or too long", expected=f"at most {limit} characters")
    return value


def _pair(values: dict[str, JSON], name: str, limit: int) -> tuple[str | None, str | None]:
    """Left and right; an empty text counts as none."""
    given = values.get(name) or [None, None]
    if not isinstance(given, list) or len(given) != 2:
        raise UserError("data/bad-request", f"{name} is no pair")
    texts = [value if isinstance(value, str) and value.strip() else None for value in given]
    if any(text is not None and len(text) > limit for text in texts):
        raise UserError("data/bad-request", f"{name} is too long", expected=f"at most {limit} characters")
    return texts[0], texts[1]
