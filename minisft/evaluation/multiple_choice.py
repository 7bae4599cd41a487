"""Options by likelihood: how probable each of several given answers is as the model's whole next turn.

Nothing is generated, so nothing has to be parsed. An option counts with its end of turn: "card" and "card_arrival" are
then two different answers, and neither wins by being the other's prefix.

The idea to take home: options share most of the work. The prompt runs once, and options that begin alike run together
until they part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minisft.common.errors import UserError, visible
from minisft.data.chat import Encoded
from minisft.data.examples import Example, Message
from minisft.generation import read_prompts
from minisft.model import CausalLM

Encode = Callable[[Example, Sequence[Message]], Encoded]


@dataclass(frozen=True)
class Question:
    """A prompt with its options as token ids: what option k adds to the prompt, up to the end of its turn."""

    example: Example
    options: list[str]
    prompt: list[int]
    tails: list[list[int]]

    @property
    def reference(self) -> str:
        """The right option."""
        return self.example.messages[-1].content


def make_question(example: Example, labels: Sequence[str], encode: Encode) -> Question:
    """The example's ``choices`` (or else ``labels``) as options, tokenized as whole conversations.

    Args:
        example: the row, its last turn the right option.
        labels: options for rows that bring none.
        encode: makes ids of a row's messages.

    Returns:
        The question.

    Raises:
        UserError: the options are not two or more different strings with the reference among them.
    """
    options = _options(example, labels)
    texts = [(*example.messages[:-1], Message("assistant", option)) for option in options]
    encoded = [encode(example, messages) for messages in texts]
    # The prompt is what all options share, at most up to where the answer begins: a tokenizer may merge across the border.
    shared = min(e.prompt_length for e in encoded)
    first = encoded[0].input_ids
    shared = next((i for i in range(shared) if any(e.input_ids[i] != first[i] for e in encoded)), shared)
    return Question(example, options, first[:shared], [e.input_ids[shared : _answer_end(e)] for e in encoded])


def _options(example: Example, labels: Sequence[str]) -> list[str]:
    choices = example.reference.get("choices", list(labels))
    texts = [choice for choice in choices if isinstance(choice, str)] if isinstance(choices, list) else []
    right = example.messages[-1].content
    if not isinstance(choices, list) or len(texts) < max(2, len(choices)) or len(set(texts)) < len(texts) or right not in texts:
        raise UserError(
            "data/bad-choices",
            "the options of a row cannot be scored",
            where=example.place,
            found=f"choices {visible(choices, 80)}, answer {visible(right, 40)}",
            expected="two or more different strings, the answer among them",
        )
    return texts


def _answer_end(encoded: Encoded) -> int:
    """One past the last supervised token: templates may write a line break after the end of a turn."""
    return max(i for i, supervised in enumerate(encoded.supervised) if supervised) + 1


@torch.inference_mode()
def option_log_probs(model: CausalLM, questions: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """log p(option | prompt) = sum_t log p(o_t | prompt, o_<t) for every option of every (prompt, options).

    Each prompt runs once. Options are read level by level, as a tree: those that begin alike share a row of the batch
    until they part, and each level's KV cache is picked from its parents'.

    Cost: one token for each distinct proper prefix of an option, after the prompts.
    """
    cache, hidden_ND = read_prompts(model, [prompt for prompt, _ in questions], max(len(o) for _, os in questions for o in os))
    nodes: dict[tuple[int, ...], int] = {(q,): q for q in range(len(questions))}  # (question, ids so far) -> row
    paths = [[(q, *option) for option in options] for q, (_, options) in enumerate(questions)]
    totals = dict.fromkeys((path for options in paths for path in options), 0.0)
    for depth in range(1, max(map(len, totals))):
        active = [path for path in totals if len(path) > depth]
        logits_NV = model.head(hidden_ND)
        log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
        picked = log_probs_NV[[nodes[path[:depth]] for path in active], [path[depth] for path in active]]
        for path, log_prob in zip(active, picked.tolist(), strict=True):
            totals[path] += log_prob
        inner = list(dict.fromkeys(path[: depth + 1] for path in active if len(path) > depth + 1))
        if inner:
            cache = cache.select(torch.tensor([nodes[node[:-1]] for node in inner], device=hidden_ND.device))
            tokens = torch.tensor([[node[-1]] for node in inner], device=hidden_ND.device)
            hidden_ND = model.hidden(tokens, cache=cache)[:, 0]
            nodes = {node: row for row, node in enumerate(inner)}
    return [[totals[path] for path in options] for options in paths]
