"""Page 10 builds the library's step: same bins, tensors, attention, rates and weights; a build with a bug does not pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from tiny import LLAMA, VOCAB, assert_close, build, build_with_lora, randn
from torch.nn.functional import scaled_dot_product_attention

from minisft.attention import Segments, attend
from minisft.batching import collate, micro_batches, pack
from minisft.config import LoRAConfig
from minisft.data.chat import Encoded
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.schedule import learning_rate
from minisft.step import train_step

PAGE = page("10_training_loop_batching_packing")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]
BETAS = (0.9, 0.95)
seeds = st.integers(0, 2**16)
lengths_of_rows = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def encoded(lengths: Sequence[int], seed: int) -> list[Encoded]:
    """Rows of random tokens and flags; at least one token of the longest row is a target."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for n, length in enumerate(lengths):
        ids = torch.randint(1, VOCAB, (length,), generator=draw).tolist()
        flags = (torch.rand(length, generator=draw) < 0.6).tolist()
        rows.append(Encoded(ids, [*flags[:-1], True], row=n, control_tokens_in_text=0, prompt_length=0))
    return rows


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_pack(built: Namespace, lengths: Sequence[int], capacity: int) -> None:
    assert built["pack"](list(lengths), capacity) == pack(lengths, capacity)


def agrees_collate(built: Namespace, rows: Sequence[Encoded], bins: Sequence[Sequence[int]]) -> None:
    library = collate(rows, built["PAD"], bins)
    for mine, theirs in zip(
        built["collate"](rows, bins), (library.input_ids, library.target_ids, library.segment_ids), strict=True
    ):
        assert torch.equal(mine, theirs)


def agrees_block_mask(built: Namespace, lengths: Sequence[int], capacity: int, seed: int) -> None:
    segments = collate(encoded(lengths, seed), 0, pack(lengths, capacity)).segment_ids
    B, T = segments.shape
    q, k, v = (randn(B, T, 2, 4, seed=seed + i) for i in range(3))
    mask = built["block_mask"](segments)[:, None]
    mine = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    theirs = attend(*(x.flatten(0, 1) for x in (q, k, v)), Segments.of(segments)).view(B, T, 2, 4)
    assert_close(mine[segments > 0], theirs[segments > 0])


def agrees_learning_rate(built: Namespace, total: int, peak: float, warmup: int) -> None:
    for step in range(1, total + 1):
        assert built["learning_rate"](step, total, peak, warmup) == learning_rate(step, total, peak, warmup, "cosine")


def agrees_train_step(built: Namespace, model: CausalLM, rows: Sequence[Encoded], cut: int, clip: float, packing: bool) -> None:
    """Three steps of the page's, cut in `cut` rows, against three of the library's in one piece or packed."""
    mine, theirs = model, copy.deepcopy(model)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    library = MasterAdamW(trained, betas=BETAS, weight_decay=0.0)
    adamw = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=0.5, betas=BETAS, weight_decay=0.0)
    for lr in (0.02, 0.01, 0.03):
        parts = [rows[i : i + cut] for i in range(0, len(rows), cut)]
        batches = [built["collate"](part, [[i] for i in range(len(part))]) for part in parts]
        loss, norm = built["train_step"](mine, adamw, batches, lr, clip)
        result = train_step(theirs, library, micro_batches(rows, len(rows), 0, packing, 32), lr, clip)
        assert loss == pytest.approx(result.loss, rel=1e-8)
        assert norm == pytest.approx(result.grad_norm, rel=1e-7)
    for name, parameter in mine.named_parameters():
        # A row of two tokens has one target, which sees one key: the gradients of q and k are rounding alone, some 1e-14, and
        # AdamW divides them by its eps of 1e-8 and multiplies by rates of 0.06 in sum.
        assert_close(parameter, theirs.get_parameter(name), 1e-6 if "q_proj" in name or "k_proj" in name else 1e-7, name)


@given(st.lists(st.integers(0, 14), max_size=30), st.integers(1, 12))
def test_pack_equals_the_library(lengths: list[int], capacity: int) -> None:
    agrees_pack(BUILD, lengths, capacity)


@given(lengths_of_rows, st.integers(1, 20), seeds)
def test_collate_equals_the_library(lengths: list[int], capacity: int, seed: int) -> None:
    agrees_collate(BUILD, encoded(lengths, seed), pack(lengths, capacity))


@given(lengths_of_rows, st.integers(1, 20), seeds)
def test_block_mask_equals_the_library(lengths: list[int], capacity: int, seed: int) -> None:
    agrees_block_mask(BUILD, lengths, capacity, seed)


@given(st.data(), st.integers(1, 60), st.floats(1e-6, 1.0))
def test_learning_rate_equals_the_library(data: st.DataObject, total: int, peak: float) -> None:
    agrees_learning_rate(BUILD, total, peak, data.draw(st.integers(0, total - 1)))


@pytest.mark.slow
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(1, 6), st.sampled_from([0.1, 100.0]), st.booleans(), seeds
)
def test_train_step_equals_the_library(lengths: list[int], cut: int, clip: float, packing: bool, seed: int) -> None:
    model = build_with_lora(LLAMA, LoRAConfig(rank=2, alpha=3.0))
    agrees_train_step(BUILD, model, encoded(lengths, seed), cut, clip, packing)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    lengths = [2, 9, 3, 5, 4, 7, 1]
    agrees_pack(built, [5, 7, 4, 1, 14], 10)
    agrees_collate(built, encoded(lengths, 0), pack(lengths, 10))
    agrees_block_mask(built, lengths, 10, 0)
    agrees_learning_rate(built, 12, 0.1, 3)
    for clip in (0.01, 1e6):
        agrees_train_step(built, build(LLAMA), encoded(lengths, 0), 2, clip, True)


MUTANTS = [
    ("shortest first", "key=lambda i: -lengths[i])", "key=lambda i: lengths[i])"),
    ("first fit for best fit", "bins[max(fits, key=lambda b: fill[b])]", "bins[fits[0]]"),
    ("one place too many", "fill[b] + lengths[i] <= capacity", "fill[b] + lengths[i] <= capacity + 1"),
    ("an over-long row is dropped", "            bins.append([i])", "            bins += [[i]] * (lengths[i] <= capacity)"),
    ("targets not shifted", "torch.where(learn[1:], ids[1:], IGNORE)", "torch.where(learn[:-1], ids[:-1], IGNORE)"),
    ("flags not shifted along", "torch.where(learn[1:], ids[1:], IGNORE)", "torch.where(learn[:-1], ids[1:], IGNORE)"),
    ("everything supervised", "torch.where(learn[1:], ids[1:], IGNORE)", "ids[1:]"),
    ("all rows one segment", "ids, number", "ids, 1"),
    ("no block mask", "return same.tril()", "return torch.ones_like(same).tril()"),
    ("the future is seen", "return same.tril()", "return same"),
    ("a first step without a rate", "peak * step / (warmup + 1)", "peak * (step - 1) / (warmup + 1)"),
    ("the cosine reaches zero too soon", "(step - 1 - warmup) / (total - warmup)", "(step - warmup) / (total - warmup)"),
    ("mean of means", "(loss_sum / num_targets)", "(loss_sum / int((targets != IGNORE).sum()) / len(batches))"),
    ("a sum, never divided", "(loss_sum / num_targets)", "(loss_sum)"),
    ("only the last micro-batch counts", "        logits = model(", "        optimizer.zero_grad()\n        logits = model("),
    ("no clipping", "clip_grad_norm_(parameters, clip)", "clip_grad_norm_(parameters, 1e9)"),
    ("the rate not handed over", 'group["lr"] = lr', 'group["lr"] = group["lr"]'),
]


@pytest.mark.slow
def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _mean_of_means(mean_loss: Callable, count: Callable, batches: list) -> None:
    for batch in batches:
        (mean_loss(batch) / len(batches)).backward()


def _never_weighted(mean_loss: Callable, count: Callable, batches: list) -> None:
    for batch in batches:
        mean_loss(batch).backward()


def _nothing_left_out(mean_loss: Callable, count: Callable, batches: list) -> None:
    total = sum(count(batch) for batch in batches)
    for batch in batches:
        (mean_loss(batch) * count(batch) / total).backward()


def _sums(mean_loss: Callable, count: Callable, batches: list) -> None:
    for batch in batches:
        (mean_loss(batch) * count(batch)).backward()


def _endless_buffer(buffer: list[int], capacity: int) -> list[int]:
    taken: list[int] = []
    for length in sorted(buffer, reverse=True):
        if sum(taken) + length <= capacity:
            taken.append(length)
            buffer.remove(length)
    return taken


def _drops_the_over_long(buffer: list[int], capacity: int) -> list[int]:
    buffer[:] = [length for length in buffer if length <= capacity]
    return _endless_buffer(buffer, capacity)


def _cuts_the_over_long(buffer: list[int], capacity: int) -> list[int]:
    return [min(buffer.pop(0), capacity)]


def _everything_at_once(buffer: list[int], capacity: int) -> list[int]:
    taken = list(buffer)
    buffer.clear()
    return taken


def _one_at_a_time(buffer: list[int], capacity: int) -> list[int]:
    return [buffer.pop(0)]


def _keeps_what_it_returns(buffer: list[int], capacity: int) -> list[int]:
    return _everything_at_once(list(buffer), capacity)


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "accumulate": [
        (_mean_of_means, "mean of means"),
        (_never_weighted, "too large"),
        (_nothing_left_out, "0 / 0"),
        (_sums, "over the number of all"),
        (lambda mean_loss, count, batches: None, "call backward"),
    ],
    "take": [
        (_endless_buffer, "stays there"),
        (_drops_the_over_long, "none dropped|leave the buffer"),
        (_cuts_the_over_long, "none dropped"),
        (_everything_at_once, "come alone"),
        (_one_at_a_time, "another still fitted"),
        (_keeps_what_it_returns, "leave the buffer"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 20))
def test_the_packer_of_the_solution_never_clogs(lengths: list[int], capacity: int) -> None:
    take = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "take")
    buffer, rows = list(lengths), []
    while buffer:
        assert len(rows) < len(lengths)
        rows.append(take(buffer, capacity))
    assert sorted(itertools.chain.from_iterable(rows)) == sorted(lengths)
    assert all(sum(row) <= capacity or len(row) == 1 for row in rows)
