"""What ``verify --gguf`` makes of two distributions of a first token, without llama.cpp: closed forms, and its sum in fp32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minisft.merging.verify_gguf import MAX_DIFFERENCE, MAX_KL, GGUFVerification, Golden, _compare, first_token

VOCABULARY, LISTED = 49152, 64


def listed(logs: np.ndarray) -> list[tuple[int, float]]:
    order = np.argsort(-logs, kind="stable")[:LISTED]
    return [(int(i), float(logs[i])) for i in order]


def logits(scale: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, VOCABULARY).astype(np.float32)


def exact(numbers: np.ndarray) -> np.ndarray:
    return torch.from_numpy(numbers).double().log_softmax(0).numpy()


def in_fp32_one_after_another(numbers: np.ndarray) -> np.ndarray:
    """log softmax as llama.cpp's server computes it: sorted, the likeliest first, one fp32 sum."""
    falling = np.sort(numbers)[::-1]
    total = np.cumsum(np.exp(falling - falling[0]), dtype=np.float32)[-1]
    return np.log(np.exp(numbers - falling[0]) / total)


@pytest.mark.parametrize("scale", [3.0, 4.0, 5.0])
def test_the_factor_of_a_sum_in_fp32_is_not_the_models(scale: float) -> None:
    numbers = logits(scale)
    ours, theirs = exact(numbers), in_fp32_one_after_another(numbers)
    assert float(np.abs(ours - theirs).max()) > 1e-5  # there is something to take out
    difference, kl = first_token(listed(ours), dict(listed(theirs)), VOCABULARY)
    assert difference < 4e-6  # two ulp of fp32 at 16, where the logits are
    assert kl < 1e-11


def test_a_confident_model_is_the_same_though_a_sum_lost_the_rest() -> None:
    """0.9999 for one token. Their sum without the rest would be a divergence of 1e-4 log(1e-4 / 1e-6) = 4.6e-4."""
    rest = [1e-4 / VOCABULARY] * (LISTED - 1)
    ours = [(i, math.log(p)) for i, p in enumerate([1 - 1e-4, *rest])]
    theirs = {i: value - math.log(1 - 1e-4) for i, value in ours}
    difference, kl = first_token(ours, theirs, VOCABULARY)
    assert difference < 1e-6
    assert kl < 1e-9


@pytest.mark.parametrize("moved", [2e-3, 0.3])
def test_one_token_moved_is_found(moved: float) -> None:
    """The likeliest token's logit, lowered; all others are then likelier by one and the same factor."""
    numbers = logits(2.0)
    ours, changed = exact(numbers), numbers.astype(np.float64)
    changed[int(ours.argmax())] -= moved
    p, P = math.exp(ours.max()), math.fsum(math.exp(value) for _, value in listed(ours))
    difference, kl = first_token(listed(ours), dict(listed(exact(changed))), VOCABULARY)
    # Over all tokens, and given the listed ones, which is as if any factor were taken out: the truth lies between.
    change, given = math.log1p(p * math.expm1(-moved)), math.log1p(p / P * math.expm1(-moved))
    off = -math.log1p(-VOCABULARY * 2.0**-24)
    assert max(moved + given, moved + change - off) - 1e-9 <= difference <= moved + change
    most = p * (moved + change) + (1 - p) * change  # KL = sum p_i (log p_i - log q_i)
    least = p * (moved + given) + (P - p) * given
    assert least - 1e-12 <= kl <= most + 1e-12
    assert difference > MAX_DIFFERENCE


def test_other_tokens_listed_is_another_model() -> None:
    """Both are sure of 64 tokens, of others: the few numbers that could be compared must not agree by being absent."""
    ours = [(i, math.log(1 / 64)) for i in range(64)]
    for first in (63, 64):
        theirs = {i: math.log(1 / 64) for i in range(first, first + 64)}
        difference, kl = first_token(ours, theirs, VOCABULARY)
        assert difference > 1
        assert kl > 1


def test_nothing_compared_is_not_good() -> None:
    """llama.cpp gives no distribution where half a character was drawn; if that is so everywhere, nothing is known."""
    usage = {"usage": {"prompt_tokens": 2}}
    answer = {"choices": [{"text": "a", "logprobs": None}], **usage}
    prompt = Golden(None, "ab", [1, 2], [(3, -0.1), (4, -3.0)], [3], "a")
    found = _compare([prompt], [answer] * 3, "F16", VOCABULARY)
    assert (found.same_tokens, found.same_answers, found.good) == (1, 1, False)


def test_fp32_is_held_to_what_its_numbers_allow() -> None:
    def found(difference: float, kl: float) -> GGUFVerification:
        return GGUFVerification(7, 7, difference, kl, 7, "F32")

    assert found(MAX_DIFFERENCE, 1e-7).good
    assert not found(2 * MAX_DIFFERENCE, 1e-7).good
    assert not found(0.0, 2e-7).good
    assert MAX_KL["F32"] < min(limit for name, limit in MAX_KL.items() if name != "F32")
