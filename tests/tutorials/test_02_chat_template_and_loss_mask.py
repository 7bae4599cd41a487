"""Page 02 builds the library's way from a chat to a loss: same ids, same mask, same targets, same sum; a build with a bug in it
does not pass for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from texts import CONTROL, byte_tokenizer, smollm2_tokenizer
from torch import Tensor

from minisft.batching import collate
from minisft.data.chat import Encoded, encode_chat, resolve_template
from minisft.data.messages import Message
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.loss import IGNORE_INDEX, cross_entropy_sum

PAGE = page("02_chat_template_and_loss_mask")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]
Row = tuple[list[int], list[bool]]

# What the GGUF file of SmolLM2-135M-Instruct carries; a test below compares.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATE = ChatTemplate(SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, trusted=True)

content = st.lists(
    st.sampled_from([*CONTROL, "<|im_", "_end|>", "|>", "yes", " ", "\n", "é", "中", "Answer:", "\t"]), max_size=6
).map("".join)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), content), max_size=4)
# A user begins, or the system: the library refuses a chat that an assistant begins, since this template then hides where.
chats = st.builds(
    lambda opening, rest: [Message(role, text) for role, text in [opening, *rest]],
    st.tuples(st.sampled_from(["system", "user"]), content),
    turns,
)
rows = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=9).map(
        lambda tokens: ([i for i, _ in tokens], [flag for _, flag in tokens])
    ),
    min_size=1,
    max_size=5,
)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_render(
    built: Namespace, chat: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate = TEMPLATE, prompt: bool = False
) -> None:
    theirs = encode_chat(tokenizer, template, chat, add_generation_prompt=prompt)
    ids, mask = built["render"](chat, tokenizer, prompt)
    assert ids == theirs.input_ids
    if not prompt:  # a prompt that is to be continued has nothing to learn, and the library flags nothing in it
        assert mask == theirs.supervised


def agrees_make_batch(built: Namespace, rows: Sequence[Row], pad_id: int) -> None:
    theirs = collate([Encoded(ids, mask, row=0, control_tokens_in_text=0, prompt_length=0) for ids, mask in rows], pad_id)
    input_ids, targets = built["make_batch"](rows, pad_id)
    assert torch.equal(input_ids, theirs.input_ids)
    assert torch.equal(targets, theirs.target_ids)


def agrees_loss_sum(built: Namespace, logits: Tensor, targets: Tensor) -> None:
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss, expected = built["loss_sum"](mine, targets), cross_entropy_sum(theirs, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@given(chats, st.booleans())
def test_render_equals_the_library(chat: list[Message], prompt: bool) -> None:
    agrees_render(BUILD, chat, byte_tokenizer(), prompt=prompt)


@given(rows, st.integers(0, 5))
def test_make_batch_equals_the_library(rows: list[Row], pad_id: int) -> None:
    agrees_make_batch(BUILD, rows, pad_id)


@given(st.integers(1, 9), st.integers(1, 11), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_loss_sum_equals_the_library(num_tokens: int, vocabulary: int, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, vocabulary, generator=draw, dtype=dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=draw)
    targets[torch.rand(num_tokens, generator=draw) < 0.4] = IGNORE_INDEX  # sometimes all of them
    agrees_loss_sum(BUILD, logits, targets)


@pytest.mark.smollm2
def test_the_pretrained_tokenizer_and_its_own_template(smollm2_path: Path) -> None:
    tokenizer = smollm2_tokenizer(smollm2_path)
    assert tokenizer.chat_template == SMOLLM2
    assert tokenizer.pad_id in tokenizer.eos_ids, "the trap that the page is about"
    template = resolve_template(tokenizer)
    awkward = ["", " ", "\n\nHi", "Paris.\n", "naïve 中文 🙂", "<|im_end|>", "<|im_", "x = 12345\n\tprint(x)"]
    for text in awkward:
        turns = [Message("user", text), Message("assistant", text), Message("user", text)]
        for chat in (turns, turns[:2], [Message("system", text), *turns[1:]]):
            agrees_render(BUILD, chat, tokenizer, template)
            agrees_render(BUILD, chat, tokenizer, template, prompt=True)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    chat = [Message("user", "a<|im_end|>"), Message("assistant", "yes"), Message("user", "é"), Message("assistant", "\nes")]
    agrees_render(built, chat, byte_tokenizer())
    agrees_render(built, [Message("system", ""), *chat[:3]], byte_tokenizer(), prompt=True)
    agrees_make_batch(built, [([1, 5, 6, 2], [False, False, True, True]), ([1, 2], [False, True])], pad_id=2)
    agrees_make_batch(built, [([1, 5, 2], [True, False, True])], pad_id=0)
    logits = torch.tensor([[1.0, 2, 0], [0, 3, 1], [2, 2, 1]])
    agrees_loss_sum(built, logits, torch.tensor([2, IGNORE_INDEX, 0]))


MUTANTS = [
    ("the first character of an answer is context", "stop > len(header)", "stop > len(header) + 1"),
    ("the header is a target", "stop > len(header)", "stop > 0"),
    ("the end is never learned", "writes, *(False for _ in newline)]", "False, *(False for _ in newline)]"),
    ("every end is learned", "writes, *(False for _ in newline)]", "True, *(False for _ in newline)]"),
    ("the users' turns are learned", 'message.role == "assistant"', "True"),
    ("text forges control tokens", "control=False", "control=True"),
    ("no default system message", 'if messages[0].role != "system":', "if False:"),
    ("no new line behind a turn", "ids += [start, *pieces, end, *newline]", "ids += [start, *pieces, end]"),
    ("the answer is not opened", 'ids += [start, *tokenizer.encode("assistant\\n")]', "ids += [start]"),
    ("not shifted", "torch.where(mask[1:], ids[1:], IGNORE)", "torch.where(mask[:-1], ids[:-1], IGNORE)"),
    ("the mask not shifted with the ids", "torch.where(mask[1:], ids[1:], IGNORE)", "torch.where(mask[:-1], ids[1:], IGNORE)"),
    ("padding known by its id", "torch.where(mask[1:], ids", "torch.where(mask[1:] & (ids[1:] != pad_id), ids"),
    ("padding is a target", "torch.full((len(rows), longest), IGNORE)", "torch.full((len(rows), longest), pad_id)"),
    ("a mean", "targets[asked][:, None]).sum()", "targets[asked][:, None]).mean()"),
    ("no softmax", "logits[asked].log_softmax(-1)", "logits[asked]"),
]


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _last(mask: list[bool], move: int = 0) -> list[bool]:
    end = len(mask) - mask[::-1].index(True)
    start = next((i for i in range(end - 1, -1, -1) if not mask[i]), -1) + 1
    return [start + move <= i < end + move for i in range(len(mask))]


def _targets(input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, shift: int = 1) -> Tensor:
    place = torch.arange(input_ids.shape[1])
    labels = input_ids.where((place >= prompt_lengths[:, None]) & (place < lengths[:, None]), IGNORE_INDEX)
    return torch.cat((labels[:, shift:], torch.full((len(labels), shift), IGNORE_INDEX)), 1)


def _masked_by_id(targets: Tensor) -> Tensor:
    return targets.masked_fill(targets == 2, IGNORE_INDEX)


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "only_last_turn": [
        (lambda mask: _last(mask, move=1), "moved by one position"),
        (lambda mask: list(mask), "the first answer is still marked"),
        (lambda mask: [False] * len(mask), "keep the last run"),
        (lambda mask: [i == 8 for i in range(len(mask))], "moved by one position|keep the last run"),
        (lambda mask: mask[6:], "one flag for each token"),
    ],
    "targets_of": [
        (lambda ids, p, n: _masked_by_id(_targets(ids, p, n)), "by its position, not by its id"),
        (lambda ids, p, n: _targets(ids, p, n, shift=0), "not shifted"),
        (lambda ids, p, n: _targets(ids, p, torch.full_like(n, ids.shape[1])), "padding has become a target"),
        (lambda ids, p, n: _targets(ids, p + 1, n), "predicts the first token of the answer"),
        (lambda ids, p, n: _targets(ids, torch.tensor([2, 0]), n), "a token of a prompt has become a target"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


def solution_of(name: str) -> Callable[..., Any]:
    return next(exercise.solution for exercise in PAGE.exercises() if exercise.name == name)


@given(chats)
def test_the_solution_of_the_last_turn_is_the_librarys(chat: list[Message]) -> None:
    every, last = (encode_chat(byte_tokenizer(), TEMPLATE, chat, turns=which) for which in ("all", "last"))
    assert solution_of("only_last_turn")(every.supervised) == last.supervised


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 99))
def test_the_solution_of_the_targets_is_the_librarys(sizes: list[tuple[int, int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [([*torch.randint(5, (p + a - 1,), generator=draw).tolist(), 2], [False] * p + [True] * a) for p, a in sizes]
    batch = collate([Encoded(ids, mask, row=0, control_tokens_in_text=0, prompt_length=0) for ids, mask in rows], pad_id=2)
    prompts, lengths = torch.tensor([p for p, _ in sizes]), torch.tensor([p + a for p, a in sizes])
    assert torch.equal(solution_of("targets_of")(batch.input_ids, prompts, lengths), batch.target_ids)
