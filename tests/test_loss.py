"""The loss as a sum over supervised positions: equal to cross-entropy of full logits, in value and in every gradient."""

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, assert_close, assert_same, gradients, randn, shared_with_lora
from torch import Tensor, nn

from minisft import loss, matmul
from minisft.lora import LoRALinear
from minisft.loss import IGNORE_INDEX, cross_entropy_sum, head_loss_sum, token_log_probs
from minisft.matmul import Linear

VOCAB, D = 13, 5
seeds = st.integers(0, 2**31)
chunk_elements = st.sampled_from([1, 2 * VOCAB, 3 * 2**16, 2**23])  # from one row at a time to all at once
targets = st.lists(st.just(IGNORE_INDEX) | st.integers(0, VOCAB - 1), max_size=12)


def make_head(kind: str) -> nn.Module:
    """``plain`` takes the fused path, everything else is recomputed chunk by chunk."""
    linear = Linear(D, VOCAB, bias=kind == "bias", dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(linear.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=20 + i))
    if kind == "lora":
        linear = LoRALinear(linear, 2, 3.0)
        with torch.no_grad():
            linear.lora_B.copy_(randn(VOCAB, 2, seed=3))
    return linear


def by_hand(logits: Tensor, target_ids: Tensor) -> Tensor:
    """sum of logsumexp - logit, a row at a time."""
    total = logits.sum() * 0
    for row, target in zip(logits, target_ids.tolist(), strict=True):
        if target != IGNORE_INDEX:
            total = total + row.exp().sum().log() - row[target]
    return total


@given(target=targets, seed=seeds)
def test_cross_entropy_sum(target, seed):
    target_ids = torch.tensor(target, dtype=torch.int64)
    ours, theirs = (randn(len(target), VOCAB, seed=seed).requires_grad_() for _ in range(2))
    actual, expected = cross_entropy_sum(ours, target_ids), by_hand(theirs, target_ids)
    assert_close(actual, expected)
    (found,), (wanted,) = torch.autograd.grad(actual, [ours]), torch.autograd.grad(expected, [theirs])
    assert_close(found, wanted)
    assert not found[target_ids == IGNORE_INDEX].any()  # exactly zero


@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
@given(target=targets, columns=st.integers(1, 3), size=chunk_elements, seed=seeds)
def test_head_loss_equals_full_logits(kind, target, columns, size, seed):
    """Value, hidden states and everything in the head that is trained, whatever the chunk size."""
    target_ids = torch.tensor(target[: len(target) // columns * columns], dtype=torch.int64).view(-1, columns)
    head = make_head(kind)
    hidden = randn(*target_ids.shape, D, seed=seed).requires_grad_()
    expected = by_hand(head(hidden).flatten(0, -2), target_ids.flatten()) * 0.7
    expected.backward()
    wanted, hidden_wanted, hidden.grad = gradients(head), hidden.grad, None
    with mock.patch.object(loss, "CHUNK_ELEMENTS", size):
        actual = head_loss_sum(hidden, head, target_ids) * 0.7
        actual.backward()
    assert_close(actual, expected)
    assert_close(hidden.grad, hidden_wanted)
    assert_same(gradients(head), wanted)
    assert not hidden.grad[target_ids == IGNORE_INDEX].any()  # a prompt token's hidden state gets exactly zero


@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
def test_no_supervised_token(kind):
    """A loss and gradients of exactly zero, and no error."""
    head, hidden = make_head(kind), randn(2, 3, D).requires_grad_()
    total = head_loss_sum(hidden, head, torch.full((2, 3), IGNORE_INDEX))
    total.backward()
    assert total.item() == 0.0
    assert not hidden.grad.any()
    assert not any(gradient.any() for gradient in gradients(head).values())


@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
def test_gradcheck(kind):
    head = make_head(kind)
    names = [name for name, p in head.named_parameters() if p.requires_grad]
    target_ids = torch.tensor([3, IGNORE_INDEX, 0, 12])

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            return head_loss_sum(hidden, self.head, target_ids)

    wrapped = Wrapped()
    inputs = [
        randn(4, D).requires_grad_(),
        *(p.detach().clone().requires_grad_() for n, p in head.named_parameters() if n in names),
    ]

    def run(hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(wrapped, dict(zip((f"head.{n}" for n in names), values, strict=True)), hidden)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_model_equals_full_logits(family):
    """Down to the adapters: prompt, padding and packing as they come, and prompt logits get a gradient of exactly zero."""
    model = shared_with_lora(FAMILIES[family])
    ids, segment_ids = torch.arange(16).view(2, 8), torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8])
    target_ids = torch.tensor(
        [[IGNORE_INDEX, 4, IGNORE_INDEX, 8, 9, 1, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX] * 5 + [3, 2, 1]]
    )
    logits = model(ids, segment_ids=segment_ids)
    logits.retain_grad()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction="sum")
    expected.backward()
    assert not logits.grad[target_ids == IGNORE_INDEX].any()
    wanted = gradients(model)
    actual = head_loss_sum(model.hidden(ids, segment_ids=segment_ids), model.lm_head, target_ids)
    actual.backward()
    assert_close(actual, expected)
    assert_same(gradients(model), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("fast_bf16", [False, True])
def test_bf16_is_summed_in_fp32(fast_bf16):
    """A sum of 3000 terms near 2.5: bf16 could not count that far."""
    head = make_head("plain").bfloat16()
    hidden = randn(3000, D, dtype=torch.bfloat16).requires_grad_()
    target_ids = torch.arange(3000) % VOCAB
    exact = hidden.detach().double().requires_grad_()
    expected = by_hand(exact @ head.weight.double().T, target_ids)
    expected.backward()
    weight_wanted, head.weight.grad = head.weight.grad, None
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16):
        actual = head_loss_sum(hidden, head, target_ids)
    actual.backward()
    assert actual.dtype == torch.float32
    assert_close(actual, expected, 2e-3 if fast_bf16 else 1e-5)
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    assert_close(hidden.grad, exact.grad, 0.01)
    assert_close(head.weight.grad, weight_wanted, 0.01)


def test_large_logits_do_not_overflow():
    head, hidden = make_head("plain"), (randn(4, D) * 1e4).requires_grad_()
    target_ids = torch.tensor([0, 1, 2, 3])
    actual = head_loss_sum(hidden, head, target_ids)
    actual.backward()
    expected = nn.functional.cross_entropy(head(hidden), target_ids, reduction="sum")
    assert_close(actual, expected)
    assert torch.isfinite(hidden.grad).all()


def test_logits_never_exist_all_at_once():
    """The head sees at most a chunk of supervised rows at a time, and none of the others."""
    seen: list[int] = []
    head = make_head("lora")
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    hidden, target_ids = randn(300, D), torch.where(torch.arange(300) % 2 == 0, 1, IGNORE_INDEX)
    with mock.patch.object(loss, "CHUNK_ELEMENTS", 50 * 2**16):
        head_loss_sum(hidden, head, target_ids)
    assert seen == [50, 50, 50]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_without_grad_no_gradient_is_computed(kind):
    """Evaluation of a fully trained model must not pay for the head's weight gradient."""
    head, hidden, target_ids = make_head(kind), randn(6, D), torch.arange(6)
    with torch.no_grad(), mock.patch.object(Tensor, "scatter_add_", side_effect=AssertionError("a gradient was computed")):
        total = head_loss_sum(hidden, head, target_ids)
    assert not total.requires_grad
    assert_close(total, by_hand(head(hidden), target_ids))


@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
@given(target=targets, size=chunk_elements, temperature=st.sampled_from([1.0, 0.5, 2.0]), seed=seeds)
def test_token_log_probs_equal_a_softmax_of_full_logits(kind, target, size, temperature, seed):
    """Value, hidden states and everything in the head that is trained, under any weighting of the tokens."""
    target_ids = torch.tensor(target, dtype=torch.int64)
    head = make_head(kind)
    hidden = randn(len(target), D, seed=seed).requires_grad_()
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    scored = [i for i, t in enumerate(target) if t != IGNORE_INDEX]
    weights = randn(len(scored), seed=seed + 1)
    with mock.patch.object(loss, "CHUNK_ELEMENTS", size):
        ours = token_log_probs(hidden, head, target_ids, temperature)
        found = torch.autograd.grad((ours * weights).sum(), trained, allow_unused=True)
    full = torch.log_softmax(head(hidden) / temperature, -1)
    theirs = full[scored, target_ids[scored]]
    wanted = torch.autograd.grad((theirs * weights).sum(), trained, allow_unused=True)
    assert_close(ours, theirs)
    for a, b in zip(found, wanted, strict=True):
        assert_close(torch.zeros_like(b) if a is None else a, b)


def test_the_loss_is_minus_the_sum_of_log_probs():
    head, hidden = make_head("plain"), randn(9, D, seed=4)
    target_ids = torch.tensor([1, IGNORE_INDEX, 3, 0, 12, IGNORE_INDEX, 5, 6, 7])
    assert_close(-token_log_probs(hidden, head, target_ids).sum(), head_loss_sum(hidden, head, target_ids))


def test_the_gradient_of_logits_takes_the_memory_of_the_logits():
    """The loss comes when a step holds all its activations; PyTorch's own account of memory says how much it adds."""
    head, rows = Linear(D, 2**14, bias=False), 128
    head.weight.requires_grad_(False)
    hidden = randn(rows, D, dtype=torch.float32).requires_grad_()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        head_loss_sum(hidden, head, torch.arange(rows)).backward()
    changes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    logits = 4 * rows * 2**14
    assert logits <= max(itertools.accumulate(changes)) < 1.5 * logits


def test_the_loss_of_a_sure_model_is_not_lost_beside_large_logits():
    """log(1 + e^-9) = 1.2e-4, where fp32 numbers near the logits are 1e-3 apart."""
    head = Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1e4], [1e4 - 9]])
    loss_sum = head_loss_sum(torch.ones(1, 1), head, torch.tensor([0]))
    assert loss_sum.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)


def test_log_probs_never_hold_all_logits():
    """The largest tensor that lives while the function runs has one chunk of logits."""
    rows, sizes = 64, []
    head = Linear(D, VOCAB, bias=False, dtype=torch.float64)
    hidden = randn(rows, D, seed=1).requires_grad_()
    real = torch.logsumexp

    def spy(logits, *args, **kwargs):
        sizes.append(logits.numel())
        return real(logits, *args, **kwargs)

    with mock.patch.object(loss, "CHUNK_ELEMENTS", 4 * VOCAB), mock.patch.object(torch, "logsumexp", spy):
        token_log_probs(hidden, head, torch.arange(rows) % VOCAB).sum().backward()
    assert max(sizes) == 4 * VOCAB
    assert len(sizes) == 2 * rows // 4  # once forward, once again in backward
