"""Small tokenizers and templates for the tests of the data modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from tokenizers import pre_tokenizers

from minisft.data.tokenizer import Tokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' + message['role'] + '<|endoftext|>\n\n' + message['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
GENERATION = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def byte_metadata(pre: str = "smollm", **changes: object) -> dict[str, object]:
    """GGUF metadata of a byte-level BPE with two merges; control ids 0 to 2, pad equal to eos as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *alphabet, "Ġy", "es", "Ġyes"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "tokenizer.ggml.merges": ["Ġ y", "e s", "Ġy es"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": GENERATION,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


@functools.cache
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(byte_metadata())


@functools.cache
def smollm2_metadata(path: Path) -> Mapping[str, object]:
    """Read by the official reader, not by ours."""
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("tokenizer.")}


@functools.cache
def smollm2_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata(path))
