"""Ollama's ``Modelfile`` for an exported file: where the weights are, how a chat is written, where an answer ends.

Ollama writes chats with a template of its own kind (Go's), not with the model's. One is written here only where it is proved on
probe chats to write what the model's template writes; otherwise the reason is given and no template is written, since one
that nearly fits makes a model that nearly works. A ``stop`` is written for every token that ends an answer.

Ref: Ollama, ``docs/modelfile.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError
from minisft.data.examples import Message
from minisft.data.template import ChatTemplate


@dataclass(frozen=True)
class Family:
    """A form of chat that both kinds of templates can write.

    Args:
        name: for people.
        go: the template for Ollama.
        turn: a message's role and content -> its text.
        before, prompt: what stands before the first turn, and what opens an answer.
    """

    name: str
    go: str
    turn: Callable[[str, str], str]
    before: str
    prompt: str


FAMILIES = (
    Family(
        "ChatML",
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        lambda role, content: f"<|im_start|>{role}\n{content}<|im_end|>\n",
        "",
        "<|im_start|>assistant\n",
    ),
    Family(
        "Llama 3",
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        lambda role, content: f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|begin_of_text|>",  # Ollama puts the model's bos before the prompt itself
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)
_QUESTION, _SYSTEM = Message("user", "Where is it?"), Message("system", "Be brief.")
PROBES = (
    (_QUESTION,),
    (_SYSTEM, _QUESTION),
    (_QUESTION, Message("assistant", "Here."), Message("user", "And\nnow?")),
    (_SYSTEM, _QUESTION, Message("assistant", "Here."), Message("user", "Why?")),
)


def proved_family(template: ChatTemplate) -> tuple[Family | None, str]:
    """The family that writes what the template writes on every probe, and in words why there is none."""
    reason = "its form is neither " + " nor ".join(family.name for family in FAMILIES)
    for family in FAMILIES:
        differing = next((chat for chat in PROBES if not _agrees(family, template, chat)), None)
        if differing is None:
            return family, ""
        if differing is not PROBES[0]:
            return None, f"it is like {family.name}, but writes a chat of {len(differing)} turns in another way"
        if _agrees(family, template, PROBES[1]):
            return None, f"it is like {family.name}, but adds something of its own where there is no system turn"
    return None, reason


def _agrees(family: Family, template: ChatTemplate, chat: Sequence[Message]) -> bool:
    expected = family.before + "".join(family.turn(message.role, message.content) for message in chat) + family.prompt
    try:
        return template.render(chat, add_generation_prompt=True).text == expected
    except UserError:
        return False


def modelfile(file: str, template: ChatTemplate | None, stops: Sequence[str], base: str | None = None) -> tuple[str, str]:
    """The text of a ``Modelfile``.

    Args:
        file: name of the GGUF file beside it.
        template: the model's; None for a base model.
        stops: texts that end an answer.
        base: for an adapter file, what it goes on top of.

    Returns:
        the text, and in words why it holds no template; empty if it does.
    """
    lines = [f"FROM ./{file}"] if base is None else [f"FROM {base}", f"ADAPTER ./{file}"]
    family, why = (None, "the model has none") if template is None else proved_family(template)
    if family is not None:
        lines.append(f'TEMPLATE """{family.go}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n", why
