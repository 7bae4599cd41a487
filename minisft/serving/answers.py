"""Answers as clients read them: one JSON object, or the same in pieces as server-sent events.

``finish_reason`` is ``stop`` after an end token or a stop string and ``length`` at the limit of tokens; it stands in the last
piece of each choice and nowhere else. ``usage`` counts tokens, end tokens and those of a stop string included; of the prompt's,
``cached_tokens`` were known from earlier requests and not computed again.

Ref: OpenAI's API reference, the objects chat.completion, chat.completion.chunk and text_completion.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field

from minisft.common.safe_json import JSON
from minisft.data.tokenizer import Tokenizer
from minisft.generation import REPLACEMENT
from minisft.serving.batch import Job, Piece, TokenScore
from minisft.serving.requests import Asked

DONE = b"data: [DONE]\n\n"


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    scores: list[JSON] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """What has been computed of a request so far.

    Args:
        asked: the request.
        tokenizer: turns token ids of scores into text.
        job: what computes it.
    """

    def __init__(self, asked: Asked, tokenizer: Tokenizer, job: Job) -> None:
        self._asked, self._tokenizer, self._job = asked, tokenizer, job
        self._completion_tokens = 0
        self._choices = [_Choice() for _ in range(asked.num_choices)]
        self._begun: set[int] = set()
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._head: dict[str, JSON] = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._head["model"] = asked.model

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self._choices)

    def add(self, piece: Piece) -> list[bytes]:
        """Take a piece; returns the events that a stream sends for it."""
        choice = self._choices[piece.choice]
        choice.text.append(piece.text)
        choice.finish = piece.finish
        self._completion_tokens += 1
        score = None if piece.score is None else _score_json(self._tokenizer, piece.score)
        if score is not None:
            choice.scores.append(score)
        events: list[bytes] = []
        if self._asked.chat and piece.choice not in self._begun:
            self._begun.add(piece.choice)
            events.append(self._chunk(piece.choice, {"role": "assistant", "content": ""}, None, None))
        if piece.text or score is not None:
            events.append(self._chunk(piece.choice, {"content": piece.text}, score, None))
        if piece.finish is not None:
            events.append(self._chunk(piece.choice, {}, None, piece.finish))
        return events

    def _chunk(self, index: int, delta: dict[str, JSON], score: JSON, finish: str | None) -> bytes:
        choice: dict[str, JSON] = {"index": index, "finish_reason": finish, "logprobs": None}
        if score is not None:
            choice["logprobs"] = {"content": [score], "refusal": None}
        if self._asked.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        value: dict[str, JSON] = {**self._head, "object": self._object(".chunk"), "choices": [choice]}
        if self._asked.include_usage:
            value["usage"] = None
        return event(value)

    def _object(self, ending: str) -> str:
        return f"chat.completion{ending}" if self._asked.chat else "text_completion"

    def last_events(self) -> list[bytes]:
        """What ends a stream: the token counts, if asked for, and the end mark."""
        if not self._asked.include_usage:
            return [DONE]
        return [event({**self._head, "object": self._object(".chunk"), "choices": [], "usage": self._usage()}), DONE]

    def whole(self) -> dict[str, JSON]:
        """The answer as one object."""
        choices: list[JSON] = [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return {**self._head, "object": self._object(""), "choices": choices, "usage": self._usage()}

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, JSON]:
        text = "".join(choice.text)
        value: dict[str, JSON] = {"index": index, "finish_reason": choice.finish, "logprobs": None}
        if self._asked.top_logprobs is not None:
            value["logprobs"] = {"content": choice.scores, "refusal": None}
        if self._asked.chat:
            return value | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return value | {"text": text}

    def _usage(self) -> dict[str, JSON]:
        prompt, completion = len(self._job.prompt), self._completion_tokens
        details: dict[str, JSON] = {"cached_tokens": self._job.num_cached}
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**total, "prompt_tokens_details": details}


def event(value: JSON) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _score_json(tokenizer: Tokenizer, score: TokenScore) -> JSON:
    top: list[JSON] = [_token_json(tokenizer, token, log_prob) for token, log_prob in score.top]
    return {**_token_json(tokenizer, score.token, score.log_prob), "top_logprobs": top}


def _token_json(tokenizer: Tokenizer, token: int, log_prob: float) -> dict[str, JSON]:
    """``bytes`` is null for a token that is only part of a character: decoding does not show which part."""
    text = tokenizer.decode([token], skip_special=False)
    known: JSON = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": max(log_prob, -9999.0), "bytes": known}  # -inf is no JSON
