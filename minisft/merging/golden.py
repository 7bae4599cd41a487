"""Golden answers: what a model says to a few fixed prompts, kept beside an exported file so that another program can be asked.

Each prompt has its text, its ids, the likeliest first tokens with their log-probabilities, and a greedy answer. They are those
of the model before the export, computed in fp32: what an exported file lost by rounding shows up as a difference. Chats are
used where the model has a template, plain texts always. What is refused: nothing; a chat that a template does not take is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from minisft.common.errors import UserError
from minisft.common.safe_json import JSON
from minisft.data.answer_text import stop_ids
from minisft.data.chat import encode_chat
from minisft.data.examples import Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.generation import generate
from minisft.model import CausalLM

TOP = 64  # first tokens whose log-probabilities are kept
ANSWER_TOKENS = 32
CHATS = (
    (Message("user", "Where is parcel 48-117? It left Basel on Monday."),),
    (Message("system", "Answer in one short sentence."), Message("user", "What is the capital of Portugal?")),
    (
        Message("user", "Name a fruit."),
        Message("assistant", "An apple."),
        Message("user", "And one that is yellow, please."),
    ),
    (Message("user", "Schreib „Grüße aus Zürich“ und den Preis: 12,50 €."),),
)
TEXTS = (
    "The ferry leaves the old harbour at seven, and by noon the island's only lane smells of bread and",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(",
    "  1, 2, 3,  4\n\n\tzwölf Äpfel — 東京 🙂 and 100000",
)


@dataclass(frozen=True)
class Prompt:
    """A text that a model continues.

    Args:
        messages: the chat that was rendered; None for plain text.
        text: as the model reads it, control tokens spelt out.
        ids: the same in tokens.
    """

    messages: tuple[Message, ...] | None
    text: str
    ids: list[int]


def prompts(tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[Prompt]:
    """The chats that the template takes, then the plain texts."""
    for chat in CHATS if template is not None else ():
        assert template is not None
        try:
            text = template.render(chat, add_generation_prompt=True).text
            ids = encode_chat(tokenizer, template, chat, add_generation_prompt=True).input_ids
        except UserError:
            continue
        yield Prompt(chat, text, ids)
    for text in TEXTS:
        bos = [tokenizer.bos_id] if template is None and tokenizer.adds_bos and tokenizer.bos_id is not None else []
        yield Prompt(None, text, [*bos, *tokenizer.encode(text)])


@torch.inference_mode()
def golden(model: CausalLM, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[JSON]:
    """What the model answers to each prompt that fits its context.

    Args:
        model: with or without adapters; computes in its own dtype.
        tokenizer: the model's.
        template: as for ``prompts``.

    Returns:
        a JSON object a prompt: ``messages`` (or null), ``text``, ``ids``, ``first`` (``TOP`` pairs of id and
        log-probability, the likeliest first), ``answer_ids`` and ``answer``.
    """
    stops = tuple(tokenizer.eos_ids) if template is None else stop_ids(tokenizer, template)
    model.eval()
    longest = model.config.max_position_embeddings - ANSWER_TOKENS
    asked = [prompt for prompt in prompts(tokenizer, template) if len(prompt.ids) <= longest]
    answers = generate(model, [prompt.ids for prompt in asked], max_new_tokens=ANSWER_TOKENS, eos_ids=stops) if asked else []
    found: list[JSON] = []
    for prompt, new in zip(asked, answers, strict=True):
        messages: list[JSON] = [{"role": message.role, "content": message.content} for message in prompt.messages or ()]
        written = new[:-1] if new[-1] in stops else new
        found.append(
            {
                "messages": messages or None,
                "text": prompt.text,
                "ids": [*prompt.ids],
                "first": _first(model, prompt.ids),
                "answer_ids": [*new],
                "answer": tokenizer.decode(written),
            }
        )
    return found


def _first(model: CausalLM, ids: list[int]) -> list[JSON]:
    """The likeliest next tokens, each with its log-probability."""
    logits = model.head(model.hidden(torch.tensor([ids]))[0, -1:])[0]
    logs, order = logits.float().log_softmax(0).sort(descending=True, stable=True)
    return [[i, round(value, 6)] for i, value in zip(order[:TOP].tolist(), logs[:TOP].tolist(), strict=True)]
