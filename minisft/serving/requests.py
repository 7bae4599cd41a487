"""What a client may ask for: a JSON body becomes one checked value, or an error that names the field.

A field that would change the answer and that we do not have is refused, unless it has the value that changes nothing. So are
unknown fields: a misspelt ``max_token`` must not pass in silence. ``null`` is the same as leaving a field away.

Ref: OpenAI's API reference, chat completions and completions.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from minisft.common.errors import listing, nearest, visible
from minisft.common.safe_json import JSON
from minisft.data.examples import Message, Role
from minisft.generation import Sampling

T = TypeVar("T", int, float)

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_STOP_LENGTH = 16, 4, 20, 1000
GREEDY_BELOW = 1e-4  # temperatures under which dividing by them would leave fp32

# Have no influence on the text.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Not supported: only with the values that change nothing, as JSON.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "frequency_penalty": ("0", "0.0"), "presence_penalty": ("0", "0.0"), "logit_bias": ("{}",), "tools": ("[]",),
    "tool_choice": ('"none"', '"auto"'), "functions": ("[]",), "function_call": ('"none"', '"auto"'),
    "response_format": ('{"type": "text"}',), "modalities": ('["text"]',), "audio": (), "prediction": (), "moderation": (),
    "reasoning_effort": ('"none"',), "verbosity": ('"medium"',), "web_search_options": (), "best_of": ("1",),
    "echo": ("false",), "suffix": ('""',),
}  # fmt: skip
COMMON = {"model", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "logprobs"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION = COMMON | {"prompt"}
# Of a message, beside role and content; any other field must be null.
MESSAGE_FIELDS = {"name"}


class ApiError(Exception):
    """An answer with a status of 400 or more, in OpenAI's form.

    Args:
        status: of HTTP.
        message: what is wrong, for people.
        code: what is wrong, for programs.
        param: the field of the request.
        headers: further ones of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers or {})

    def body(self) -> dict[str, JSON]:
        """The JSON object that clients read."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


@dataclass(frozen=True)
class Asked:
    """A request, checked.

    Attributes:
        model: the id that was named.
        chat: whether it came to the chat route.
        messages: of a chat.
        prompt: of a completion, text or token ids.
        num_choices: answers to give.
        max_tokens: the most tokens of each; None: as the server is set.
        sampling: how tokens are chosen; choice i draws as prompt i of ``minisft.generation.generate`` does.
        stops: texts that end an answer and are no part of it.
        top_logprobs: None without log-probabilities; else how many alternatives to list for each token.
        stream: whether the answer comes in pieces.
        include_usage: whether a stream ends with the token counts.
    """

    model: str
    chat: bool
    num_choices: int
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    messages: tuple[Message, ...] = ()
    prompt: str | Sequence[int] = field(default="")


def bad(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field.

    Args:
        message: what is wrong.
        param: the field.
        code: for programs.

    Returns:
        the error, to be raised.
    """
    return ApiError(400, message, code, param)


def parse(body: JSON, chat: bool) -> Asked:
    """Check a request.

    Args:
        body: what the client sent, parsed.
        chat: for ``/v1/chat/completions``, else ``/v1/completions``.

    Returns:
        the request; nothing of it is looked up yet.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(body, dict):
        raise bad("The request must be a JSON object.", None, "invalid_json")
    values = {key: value for key, value in body.items() if value is not None}
    _check_names(values, CHAT if chat else COMPLETION)
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise bad("Give the name of a model; GET /v1/models lists them.", "model", "missing_required_parameter")
    stream = _boolean(values, "stream")
    return Asked(
        model=model,
        chat=chat,
        num_choices=_integer(values, "n", 1, MAX_CHOICES) or 1,
        max_tokens=_max_tokens(values),
        sampling=_sampling(values),
        stops=_stops(values.get("stop")),
        top_logprobs=_top_logprobs(values, chat),
        stream=stream,
        include_usage=_include_usage(values.get("stream_options"), stream),
        messages=_messages(values.get("messages")) if chat else (),
        prompt="" if chat else _prompt(values.get("prompt")),
    )


def _check_names(values: Mapping[str, JSON], known: set[str]) -> None:
    for name, value in values.items():
        if name in NEUTRAL:
            if json.dumps(value) not in NEUTRAL[name]:
                raise bad(f"{name} is not supported by this server.", name, "unsupported_parameter")
        elif name not in known and name not in IGNORED:
            hint = nearest(name, known | set(NEUTRAL))
            raise bad(f"Unknown parameter: {visible(name, 60)}. {hint}".strip(), visible(name, 60), "unknown_parameter")


def _boolean(values: Mapping[str, JSON], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise bad(f"{name} must be true or false.", name, "invalid_type")
    return value


def _integer(values: Mapping[str, JSON], name: str, low: int, high: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad(f"{name} must be an integer.", name, "invalid_type")
    return _within(value, name, low, high)


def _number(values: Mapping[str, JSON], name: str, default: float, high: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad(f"{name} must be a number.", name, "invalid_type")
    return float(_within(value, name, 0, high))


def _within(value: T, name: str, low: float, high: float) -> T:
    if not low <= value <= high or not math.isfinite(value):
        raise bad(f"{name} must lie between {low} and {high}; found {visible(value, 40)}.", name)
    return value


def _max_tokens(values: Mapping[str, JSON]) -> int | None:
    """``max_completion_tokens`` is the newer name of the same."""
    given = {name: _integer(values, name, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")}
    found = {value for value in given.values() if value is not None}
    if len(found) > 1:
        raise bad("max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")
    return found.pop() if found else None


def _sampling(values: Mapping[str, JSON]) -> Sampling:
    """As in the interface, the temperature is 1 unless it is given; without a seed every request draws anew."""
    temperature, top_p = _number(values, "temperature", 1.0, 2.0), _number(values, "top_p", 1.0, 1.0)
    if top_p == 0:
        raise bad("top_p must be above 0.", "top_p")
    seed = _integer(values, "seed", -(2**63), 2**63 - 1)
    return Sampling(
        0.0 if temperature < GREEDY_BELOW else temperature,
        top_p,
        _integer(values, "top_k", 0, 2**31) or 0,
        secrets.randbits(62) if seed is None else seed,
    )


def _stops(value: JSON) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > MAX_STOPS:
        raise bad(f"stop must be a text or a list of at most {MAX_STOPS}.", "stop", "invalid_type")
    texts = tuple(text for text in given if isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH)
    if len(texts) < len(given):
        raise bad(f"Each stop must be a text of 1 to {MAX_STOP_LENGTH} characters.", "stop")
    return texts


def _top_logprobs(values: Mapping[str, JSON], chat: bool) -> int | None:
    if not chat:
        if "logprobs" in values:
            raise bad("logprobs is supported by /v1/chat/completions only.", "logprobs", "unsupported_parameter")
        return None
    top = _integer(values, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not _boolean(values, "logprobs"):
        if top is not None:
            raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
        return None
    return top or 0


def _include_usage(options: JSON, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise bad("stream_options is an object, and only for stream: true.", "stream_options")
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        raise bad(f"Unknown stream option: {listing(sorted(unknown))}.", "stream_options", "unknown_parameter")
    return _boolean({key: value for key, value in options.items() if value is not None}, "include_usage")


def _messages(value: JSON) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise bad("messages must be a list of at least one message.", "messages", "missing_required_parameter")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(item: JSON, where: str) -> Message:
    if not isinstance(item, dict):
        raise bad(f"{where} must be an object with role and content.", where, "invalid_type")
    given = item.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        found = "" if given is None else f"; found {visible(json.dumps(given), 60)}"
        raise bad(f"The role must be one of {listing(ROLES)}{found}.", f"{where}.role")
    for name, value in item.items():
        if name not in {"role", "content"} | MESSAGE_FIELDS and value not in (None, []):
            raise bad(f"{visible(name, 60)} in a message is not supported.", f"{where}", "unsupported_parameter")
    return Message(role, _content(item.get("content"), f"{where}.content"))


def _content(value: JSON, where: str) -> str:
    """A text, or parts that are all texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad("content must be a text, or a list of text parts.", where, "invalid_type")
    texts = [part["text"] for part in value if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    whole = [text for text in texts if isinstance(text, str)]
    if len(whole) < len(value):
        raise bad('Every part of content must be {"type": "text", "text": ...}.', where, "unsupported_parameter")
    return "".join(whole)


def _prompt(value: JSON) -> str | Sequence[int]:
    """One prompt; a list of one prompt is that prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        ids = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
        if len(ids) == len(value):
            return ids
    raise bad("prompt must be one text or one list of token ids, and not empty.", "prompt", "invalid_type")
