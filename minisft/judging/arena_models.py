"""The two models of an arena: who answers, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minisft.data.chat import encode_chat, stop_ids
from minisft.data.messages import Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.generation import Sampling, stream_chat
from minisft.judging.arena_app import Answer
from minisft.model import CausalLM


@dataclass(frozen=True)
class Contestant:
    """A model as it was named, with what it needs to answer."""

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    template: ChatTemplate


def answerer(contestant: Contestant, max_new_tokens: int) -> Answer:
    """Greedy answers of a model, streamed."""
    stops = stop_ids(contestant.tokenizer, contestant.template)

    def answer(messages: list[Message], show: Callable[[str], None]) -> str:
        prompt = encode_chat(contestant.tokenizer, contestant.template, messages, add_generation_prompt=True)
        return stream_chat(
            contestant.model, contestant.tokenizer, prompt.input_ids, show,
            max_new_tokens=max_new_tokens, sampling=Sampling(0.0, 1.0, 0, 0), eos_ids=stops,
        )  # fmt: skip

    return answer
