"""AdamW on masters: the textbook update in fp64, bf16 parameters that remember, a state that continues bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_close, randn
from torch import Tensor, nn

from minisft.optim import MasterAdamW


class ByHand:
    """Loshchilov & Hutter 2017, algorithm 2, line by line, one tensor."""

    def __init__(self, value: Tensor, betas: tuple[float, float], decay: float, eps: float = 1e-8) -> None:
        self.value, self.betas, self.decay, self.eps = value.double().clone(), betas, decay, eps
        self.m, self.v, self.t = torch.zeros_like(self.value), torch.zeros_like(self.value), 0

    def step(self, gradient: Tensor, lr: float) -> None:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.value = self.value - lr * (m_hat / (v_hat.sqrt() + self.eps) + self.decay * self.value)


def make(dtype: torch.dtype = torch.float64, decay: float = 0.1) -> tuple[dict[str, nn.Parameter], MasterAdamW]:
    shapes = {"matrix": (3, 4), "bias": (4,), "factor": (2, 3, 2)}
    parameters = {name: nn.Parameter(randn(*shape, seed=len(name), dtype=dtype)) for name, shape in shapes.items()}
    return parameters, MasterAdamW(parameters, betas=(0.8, 0.95), weight_decay=decay)


def backward(parameters: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Send each parameter a known gradient through autograd; returns what was sent."""
    sent = {name: (randn(*p.shape, seed=seed + i) * scale).to(p.dtype) for i, (name, p) in enumerate(parameters.items())}
    sum((p * sent[name]).sum() for name, p in parameters.items()).backward()
    return sent


@given(
    lrs=st.lists(st.sampled_from([0.0, 1e-3, 0.1]), min_size=1, max_size=6),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 999),
)
def test_equals_the_textbook(lrs, decay, seed):
    """Several steps at changing rates in fp64; only matrices decay."""
    parameters, optimizer = make(decay=decay)
    by_hand = {name: ByHand(p.detach(), (0.8, 0.95), decay if p.ndim >= 2 else 0.0) for name, p in parameters.items()}
    for step, lr in enumerate(lrs):
        sent = backward(parameters, seed + 10 * step)
        optimizer.step(lr)
        optimizer.zero_grad()
        for name, reference in by_hand.items():
            reference.step(sent[name], lr)
            assert_close(parameters[name], reference.value)


def test_clipping_scales_every_gradient():
    (one, first), (two, second) = make(), make()
    backward(one, 3)
    first.step(0.1, grad_scale=0.25)
    backward(two, 3, scale=0.25)
    second.step(0.1)
    for name in one:
        assert_close(one[name], two[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grad_norm_is_over_everything(dtype):
    parameters, optimizer = make(dtype)
    assert optimizer.grad_norm() == 0.0
    sent = backward(parameters, 3)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in sent.values()))
    assert abs(optimizer.grad_norm() - expected) < 1e-5 * expected
    parameters["bias"].grad = None
    (parameters["bias"] * torch.inf).sum().backward()
    assert not math.isfinite(optimizer.grad_norm())
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0.0


@pytest.mark.parametrize(("shape", "rel"), [((2**14, 2**10), 1e-5), ((2**18, 2**6), 1e-6), ((2**8, 2**8), 5e-5)])
def test_the_norm_of_a_large_table_is_exact(shape, rel):
    """As large as an embedding: one fp32 sum of squares on a CPU is about 1e-3 low. A small gradient's norm is such a sum."""
    table, bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(16))
    optimizer = MasterAdamW({"table": table, "bias": bias}, betas=(0.9, 0.95), weight_decay=0.0)
    length = 0.3 * math.sqrt(table.numel())
    table.grad, bias.grad = torch.full(shape, 0.3), torch.full((16,), length / 4)  # both of one length
    assert optimizer.grad_norm() == pytest.approx(math.sqrt(2) * length, rel=rel)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_masters_remember_what_the_copy_cannot_hold(narrow):
    """Each of 200 steps is far below the last bit of the copy; together they move it, exactly as in fp32."""
    start = torch.full((2, 2), 1.0)
    copy = nn.Parameter(start.to(narrow))
    exact = nn.Parameter(start.clone())
    small, wide = (MasterAdamW({"p": p}, betas=(0.9, 0.999), weight_decay=0.0) for p in (copy, exact))
    lr = 1e-4
    assert (start - lr).to(narrow).equal(start.to(narrow))
    for step in range(200):
        for p, optimizer in ((copy, small), (exact, wide)):
            p.sum().backward()
            optimizer.step(lr)
            optimizer.zero_grad()
        assert copy.dtype == narrow
        assert torch.equal(copy, exact.to(narrow)), f"step {step}"
    assert copy.detach()[0, 0] < 0.985


def test_micro_batches_add_up_in_fp32():
    """256 + 255 times 1: bf16 would stay at 256, since 257 is not a bf16 number."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": p}, betas=(0.9, 0.999), weight_decay=0.0)
    for value in [256.0] + [1.0] * 255:
        (p * value).sum().backward()
        assert p.grad is None  # collected, so the narrow copy takes no memory
    assert optimizer.master_weights["p"].grad.dtype == torch.float32
    assert torch.equal(optimizer.master_weights["p"].grad, torch.full((2, 2), 511.0))
    optimizer.zero_grad()
    assert optimizer.master_weights["p"].grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_parameters_are_their_own_masters(dtype):
    parameters, optimizer = make(dtype)
    assert all(optimizer.master_weights[name] is p for name, p in parameters.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(before=st.integers(0, 3), after=st.integers(1, 3), seed=st.integers(0, 999))
def test_state_continues_bit_for_bit(dtype, before, after, seed):
    """Saved after any step, into a fresh optimizer or one that went astray since: the next steps are the same."""
    parameters, optimizer = make(dtype)

    def run(target: dict[str, nn.Parameter], on: MasterAdamW, first: int, count: int) -> None:
        for step in range(first, first + count):
            backward(target, seed + 10 * step)
            on.step(0.01)
            on.zero_grad()

    run(parameters, optimizer, 0, before)
    saved = {name: value.clone() for name, value in optimizer.state().items()}
    run(parameters, optimizer, before, after)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    fresh_parameters, fresh = make(dtype)
    for value in fresh_parameters.values():
        value.data.fill_(9.0)
    for target, on in ((fresh_parameters, fresh), (parameters, optimizer)):
        on.load_state(saved)
        run(target, on, before, after)
        for name, value in expected.items():
            assert torch.equal(target[name], value)
    for name, value in optimizer.state().items():
        assert torch.equal(value, fresh.state()[name])


def test_loading_copies():
    parameters, optimizer = make()
    backward(parameters, 1)
    optimizer.step(0.1)
    saved = {name: value.clone() for name, value in optimizer.state().items()}
    optimizer.load_state(saved)
    kept = {name: value.clone() for name, value in saved.items()}
    backward(parameters, 2)
    optimizer.step(0.1)
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())


def test_state_names_everything():
    parameters, optimizer = make()
    assert set(optimizer.state()) == {f"{name}/master" for name in parameters}
    backward(parameters, 1)
    optimizer.step(0.1)
    parts = ("master", "step", "exp_avg", "exp_avg_sq")
    assert set(optimizer.state()) == {f"{name}/{part}" for name in parameters for part in parts}
