"""Page 01 builds the library's greedy decoding and its scores of answers; a build with a bug in it does not pass for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from torch import Tensor

from minisft.config import ModelConfig
from minisft.evaluation.multiple_choice import option_log_probs
from minisft.formats import load_model
from minisft.generation import Sampling, generate
from minisft.model import CausalLM

PAGE = page("01_what_sft_changes")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]

families = st.sampled_from(list(tiny.FAMILIES.values()))
token_ids = st.integers(0, tiny.VOCAB - 1)
texts = st.lists(token_ids, min_size=1, max_size=12)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_greedy(built: Namespace, model: CausalLM, prompt: list[int], limit: int, end_ids: set[int]) -> None:
    theirs = generate(model, [prompt], max_new_tokens=limit, eos_ids=end_ids)
    assert built["greedy"](model, prompt, limit, end_ids) == theirs[0]


def agrees_log_probs(built: Namespace, model: CausalLM, prompt: list[int], answer: list[int]) -> None:
    found = built["log_probs"](model, prompt, answer)
    assert found.shape == (len(answer),)
    ((theirs,),) = option_log_probs(model, [(prompt, [answer])])
    torch.testing.assert_close(found.sum().item(), theirs, rtol=1e-9, atol=1e-9)  # fp64; the library adds in another order


@pytest.mark.slow
@given(families, texts, st.integers(1, 14), st.sets(token_ids, max_size=9))
def test_greedy_equals_the_library(family: ModelConfig, prompt: list[int], limit: int, end_ids: set[int]) -> None:
    agrees_greedy(BUILD, tiny.shared(family), prompt, limit, end_ids)


@given(families, texts, texts)
def test_log_probs_equals_the_library(family: ModelConfig, prompt: list[int], answer: list[int]) -> None:
    agrees_log_probs(BUILD, tiny.shared(family), prompt, answer)


@pytest.mark.slow
@given(families, texts)
def test_the_probabilities_of_all_answers_of_one_token_add_up_to_one(family: ModelConfig, prompt: list[int]) -> None:
    total = sum(BUILD["log_probs"](tiny.shared(family), prompt, [token]).exp().item() for token in range(tiny.VOCAB))
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.smollm2
def test_the_pretrained_model_says_the_same_in_both(smollm2_path: Path) -> None:
    model, tokenizer = load_model(smollm2_path)
    prompt = tokenizer.encode("<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n", control=True)
    agrees_greedy(BUILD, model, prompt, 6, set(tokenizer.eos_ids))


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    model, prompt = tiny.shared(tiny.LLAMA), [3, 1, 4, 1, 5]
    (reply,) = generate(model, [prompt], max_new_tokens=8, eos_ids=set())
    agrees_greedy(built, model, prompt, 8, set())
    agrees_greedy(built, model, prompt, 8, {reply[2]})
    agrees_log_probs(built, model, prompt, [9, 2, 6])


MUTANTS = [
    ("the first place instead of the last", "logits[-1].argmax()", "logits[0].argmax()"),
    ("the least likely token", "logits[-1].argmax()", "logits[-1].argmin()"),
    ("never stops by itself", "if ids[-1] in end_ids:", "if False:"),
    ("stops before the end has been said", "if ids[-1] in end_ids:", "if ids[-1] in end_ids and ids.pop() >= 0:"),
    ("one token too few", "range(max_new_tokens)", "range(max_new_tokens - 1)"),
    ("the prompt comes back as well", "return ids[len(prompt) :]", "return ids"),
    ("rows not shifted", "logits[len(prompt) - 1 : -1]", "logits[len(prompt) :]"),
    ("no softmax", "rows.log_softmax(-1)", "rows"),
    ("probabilities instead of their logarithms", "rows.log_softmax(-1)", "rows.softmax(-1)"),
    ("the softmax over places", "rows.log_softmax(-1)", "rows.log_softmax(0)"),
]


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _top_p(probabilities: Tensor, top_p: float, *, descending: bool = True, cross: bool = True, divide: bool = True) -> Tensor:
    p, order = probabilities.sort(descending=descending)
    before = p.cumsum(0) - p if cross else p.cumsum(0)
    kept = torch.zeros_like(p)
    kept[order] = torch.where(before < top_p, p, 0.0)
    return kept / kept.sum() if divide else kept


def _totals(options: list[Tensor]) -> Tensor:
    return torch.stack([option.sum() for option in options])


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "keep_top_p": [
        (lambda p, top_p: _top_p(p, top_p, descending=False), "from the likeliest to the least likely"),
        (lambda p, top_p: _top_p(p, top_p, cross=False), "the token that crosses the line stays"),
        (lambda p, top_p: _top_p(p, top_p, divide=False), "divide by what is left"),
        (lambda p, top_p: p, "all others are zero"),
        (lambda p, top_p: p.sort(descending=True).values[:2] / 0.75, "one probability for each token"),
    ],
    "choose": [
        (lambda options: (int(_totals(options).argmax()),) * 2, "forget the length"),
        (lambda options: (int(_totals(options).argmax()), int((_totals(options) / 6).argmax())), "forget the length"),
        (lambda options: (1, 2), "closest to zero"),
        (lambda options: (2, 0), "by its own length"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=20, unique=True), st.floats(0.01, 1)
)  # unique: no order among equals
def test_the_solution_of_top_p_is_what_the_library_samples_from(tenths: list[int], top_p: float) -> None:
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "keep_top_p")
    row = torch.tensor(tenths, dtype=torch.float64) / 10
    probabilities, ids = Sampling(temperature=1.0, top_p=top_p).distribution(row[None])
    theirs = torch.zeros_like(row).scatter(0, ids[0], probabilities[0])
    torch.testing.assert_close(solution(row.softmax(0), top_p), theirs)
