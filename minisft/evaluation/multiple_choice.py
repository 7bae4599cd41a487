"""Options by likelihood: how probable each of several given answers is as the model's whole next turn.

Nothing is generated, so nothing has to be parsed. An option counts with its end of turn: "card" and "card_arrival" are
then two different answers, and neither wins by being the other's prefix.

The idea to take home: options share most of the work. What all prompts begin with runs once, then each prompt; its options lie
one behind the other after it, and none sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minisft.common.errors import UserError, visible
from minisft.data.chat import Encoded
from minisft.data.examples import Example, Message
from minisft.evaluation.plain_text import Continuation, log_probs
from minisft.evaluation.results import Progress
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


def option_log_probs(
    model: CausalLM,
    questions: Sequence[tuple[list[int], list[list[int]]]],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[list[float]]:
    """log p(option | prompt) = sum_t log p(o_t | prompt, o_<t) for every option of every (prompt, options).

    Args:
        model: any.
        questions: token ids of each prompt, at least one, and of its options.
        batch_size: the most options at once, but all of a question; None for no limit (questions of unlike length lie apart).
        progress: called with (options done, options in all).

    Returns:
        natural logarithms, in the order of the options.

    Cost: what all prompts begin with once, the rest of each prompt once, and every option's tokens.
    """
    parts = [Continuation(prompt, option) for prompt, options in questions for option in options]
    size = len(parts) if batch_size is None else max([batch_size, *(len(options) for _, options in questions)])
    scores = iter(log_probs(model, parts, pad_id=0, batch_size=size, progress=progress))
    return [[next(scores) for _ in options] for _, options in questions]
