"""The HTTP routes: OpenAI's chat completions, completions and models, and a health check, for any ASGI server.

Every answer with a status of 400 or more is JSON in OpenAI's form. No text of a request is ever logged.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minisft.common import safe_json
from minisft.common.errors import UserError, listing, visible
from minisft.common.safe_json import JSON
from minisft.data.chat import encode_chat
from minisft.serving.answers import Answer, event
from minisft.serving.batch import Job, Piece
from minisft.serving.engine import Engine, QueueFullError, StoppingError
from minisft.serving.lanes import Lane
from minisft.serving.requests import ApiError, Asked, bad, parse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_BODY, BODY_LIMIT_S = 2**20, 30.0
RETRY_AFTER_S = 2
HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Attributes:
        engine: computes.
        hosts: what a request may call us; None for any.
        api_key: what clients have to send; None for nothing.
        max_new_tokens: the longest answer where a request names no limit.
        log: called with one line for an error of ours.
    """

    engine: Engine
    hosts: frozenset[str] | None
    api_key: str | None
    max_new_tokens: int
    log: Callable[[str], None]


def make_app(service: Service) -> Starlette:
    """The application, for any ASGI server."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    def route(path: str, work: Callable[[Service, Request], Awaitable[ASGIApp]], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> ASGIApp:
            return await _guarded(service, request, work)

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            route("/health", _health),
            route("/v1/models", _models),
            route("/v1/models/{name:path}", _model),
            route("/v1/chat/completions", _chat, "POST"),
            route("/v1/completions", _completion, "POST"),
        ],
        exception_handlers={HTTPException: _unrouted},
    )


async def _unrouted(request: Request, error: Exception) -> Response:
    """No such route, or another method."""
    status = int(getattr(error, "status_code", 404))
    message = f"{request.method} {visible(request.url.path, 100)} is not served here."
    return _refusal(ApiError(status, message, "not_found" if status == 404 else "method_not_allowed"))


async def _guarded(service: Service, request: Request, work: Callable[[Service, Request], Awaitable[ASGIApp]]) -> ASGIApp:
    try:
        _check_asker(service, request)
        return await work(service, request)
    except ApiError as error:
        return _refusal(error)
    except UserError as error:
        return _refusal(bad(str(error), None))
    except Exception as error:  # the server lives, and clients get no traceback
        service.log(f"a request failed: {type(error).__name__}: {visible(error)}")
        return _refusal(ApiError(500, "The server failed to answer.", "internal_error"))


def _check_asker(service: Service, request: Request) -> None:
    """Refuse a host that is not ours (a rebound name), another page's script, and who does not know the key."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if service.hosts is not None and host not in service.hosts:
        raise ApiError(421, "Unknown host name.", "unknown_host")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, "Pages of another origin may not ask.", "foreign_origin")
    if service.api_key is None or request.url.path == "/health":
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), service.api_key.encode()):
        raise ApiError(401, "The API key is missing or wrong.", "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _refusal(error: ApiError) -> Response:
    return _json(error.body(), error.status, error.headers)


def _json(value: JSON, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(value, ensure_ascii=False), status, {**HEADERS, **(headers or {})}, "application/json")


# --- routes


async def _health(service: Service, request: Request) -> Response:
    running, waiting = service.engine.counts()
    stopping = service.engine.stopping
    return _json({"status": "stopping" if stopping else "ok", "running": running, "waiting": waiting}, 503 if stopping else 200)


def _model_json(name: str) -> JSON:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "minisft"}


async def _models(service: Service, request: Request) -> Response:
    return _json({"object": "list", "data": [_model_json(name) for name in service.engine.lanes]})


async def _model(service: Service, request: Request) -> Response:
    return _json(_model_json(_lane(service, request.path_params["name"]).name))


def _lane(service: Service, name: str) -> Lane:
    lanes = service.engine.lanes
    if name not in lanes:
        message = f"The model {visible(name, 80)!r} does not exist; there are: {listing(lanes)}."
        raise ApiError(404, message, "model_not_found", "model")
    return lanes[name]


async def _chat(service: Service, request: Request) -> ASGIApp:
    return await _answer(service, request, chat=True)


async def _completion(service: Service, request: Request) -> ASGIApp:
    return await _answer(service, request, chat=False)


async def _answer(service: Service, request: Request, chat: bool) -> ASGIApp:
    from starlette.concurrency import run_in_threadpool

    body = await _body(request)
    asked, lane, prompt = await run_in_threadpool(_understood, service, body, chat)
    pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(piece: Piece | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:
            if not loop.is_closed():  # where it is, the client has gone since the step began: nobody else may fail by that
                raise

    job = Job(
        lane, prompt, asked.num_choices, asked.max_tokens or service.max_new_tokens, asked.sampling, asked.stops,
        asked.top_logprobs, emit,
    )  # fmt: skip
    try:
        service.engine.submit(job)
    except QueueFullError:
        headers = {"retry-after": str(RETRY_AFTER_S)}
        message = f"{service.engine.max_waiting} requests are waiting already; try again later."
        raise ApiError(429, message, "queue_full", headers=headers) from None
    except StoppingError:
        raise _stopping() from None
    answer = Answer(asked, lane.tokenizer, job)
    events = _pieces(service, request, job, pieces)
    return _Stream(answer, events, lambda: service.engine.cancel(job)) if asked.stream else await _whole(answer, events)


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.", "stopping")


async def _body(request: Request) -> bytes:
    """The request's body, if it is JSON by its header, not too long and not too slow."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send JSON, with content-type: application/json.", "unsupported_media_type")
    too_large = ApiError(413, f"The request is larger than {MAX_BODY} bytes.", "request_too_large")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "The request came too slowly.", "request_timeout") from None
    return bytes(body)


def _understood(service: Service, body: bytes, chat: bool) -> tuple[Asked, Lane, list[int]]:
    """The request, its model and the tokens of its prompt; runs in a thread, as templates take time."""
    try:
        values = safe_json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"The request is not JSON: {visible(error)}.", None, "invalid_json") from None
    asked = parse(values, chat)
    lane = _lane(service, asked.model)
    if asked.num_choices > service.engine.max_rows:
        raise bad(f"n is at most {service.engine.max_rows} on this server.", "n")
    prompt = _chat_ids(lane, asked) if chat else _text_ids(lane, asked)
    context = lane.model.config.max_position_embeddings
    if not 1 <= len(prompt) < context:
        message = f"The prompt has {len(prompt)} tokens; this model takes 1 to {context - 1}."
        raise bad(message, "messages" if chat else "prompt", "context_length_exceeded")
    return asked, lane, prompt


def _chat_ids(lane: Lane, asked: Asked) -> list[int]:
    if lane.template is None:
        raise bad("The model has no chat template; use /v1/completions.", "messages", "no_chat_template")
    try:
        return encode_chat(lane.tokenizer, lane.template, asked.messages, add_generation_prompt=True).input_ids
    except UserError as error:
        raise bad(str(error), "messages") from None


def _text_ids(lane: Lane, asked: Asked) -> list[int]:
    """Special tokens spelt out in a text stay text; token ids are taken as they are."""
    if isinstance(asked.prompt, str):
        bos = [lane.tokenizer.bos_id] if lane.tokenizer.adds_bos and lane.tokenizer.bos_id is not None else []
        return [*bos, *lane.tokenizer.encode(asked.prompt)]
    size = lane.model.config.vocab_size
    if not all(0 <= token < size for token in asked.prompt):
        raise bad(f"Token ids lie between 0 and {size - 1}.", "prompt")
    return list(asked.prompt)


# --- pieces from the engine's thread to the client


async def _pieces(
    service: Service, request: Request, job: Job, pieces: asyncio.Queue[Piece | None]
) -> AsyncGenerator[Piece, None]:
    """What the engine computes, until the job is done; ends early when the client has gone, and frees its rows.

    Raises:
        ApiError: the engine gave up.
    """
    gone, coming = asyncio.create_task(_disconnected(request)), asyncio.create_task(pieces.get())
    finished = 0
    try:
        while finished < job.num_choices:
            await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            piece, coming = coming.result(), asyncio.create_task(pieces.get())
            if piece is None:
                raise (
                    _stopping() if service.engine.stopping else ApiError(500, "The server failed to answer.", "internal_error")
                )
            finished += piece.finish is not None
            yield piece
    finally:
        gone.cancel()
        coming.cancel()
        if finished < job.num_choices:
            service.engine.cancel(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(answer: Answer, pieces: AsyncIterator[Piece]) -> Response:
    async for piece in pieces:
        answer.add(piece)
    if not answer.complete:  # nobody will read it
        return _refusal(ApiError(499, "The client has gone.", "client_gone"))
    return _json(answer.whole())


class _Stream:
    """An answer as server-sent events. (Starlette's own streaming would watch for a lost client a second time.)"""

    def __init__(self, answer: Answer, pieces: AsyncGenerator[Piece, None], release: Callable[[], None]) -> None:
        self._answer, self._pieces, self._release = answer, pieces, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {**HEADERS, "content-type": "text/event-stream; charset=utf-8"}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": encoded})
            async for piece in self._pieces:
                for part in self._answer.add(piece):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            last = self._answer.last_events() if self._answer.complete else []
        except ApiError as error:
            last = [event(error.body())]
        finally:
            await self._pieces.aclose()
            self._release()  # a generator that never began has released nothing
        await send({"type": "http.response.body", "body": b"".join(last), "more_body": False})
