"""The learning rate against its closed form, its laws and transformers' schedules."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisft.schedule import Kind, learning_rate

KINDS: tuple[Kind, ...] = ("cosine", "linear", "constant")
PEAK = 2e-4


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int]:
    total = draw(st.integers(1, 400))
    return total, draw(st.integers(0, total - 1))


@given(runs(), st.sampled_from(KINDS))
def test_every_step_learns_and_none_exceeds_the_peak(run: tuple[int, int], kind: Kind) -> None:
    total, warmup = run
    rates = [learning_rate(step, total, PEAK, warmup, kind) for step in range(1, total + 1)]
    assert all(0 < rate <= PEAK for rate in rates)
    assert max(rates) == rates[warmup] == PEAK  # step warmup + 1


@given(runs(), st.sampled_from(KINDS))
def test_up_then_down(run: tuple[int, int], kind: Kind) -> None:
    total, warmup = run
    rates = [learning_rate(step, total, PEAK, warmup, kind) for step in range(1, total + 1)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@given(runs())
def test_linear_is_the_polygon_through_zero_peak_zero(run: tuple[int, int]) -> None:
    total, warmup = run
    for step in range(1, total + 1):
        up, down = Fraction(step, warmup + 1), Fraction(total + 1 - step, total - warmup)
        assert learning_rate(step, total, 1.0, warmup, "linear") == pytest.approx(float(min(up, down)), rel=1e-12)


@given(runs())
def test_cosine_is_a_half_wave_and_point_symmetric(run: tuple[int, int]) -> None:
    total, warmup = run
    decay = total - warmup
    for k in range(1, decay + 1):
        rate = learning_rate(warmup + k, total, 1.0, warmup, "cosine")
        assert rate == pytest.approx(math.cos(math.pi * (k - 1) / (2 * decay)) ** 2, rel=1e-9)
    for k in range(2, decay + 1):  # the value k after the peak and the one k before the end sum to the peak
        first, second = (learning_rate(warmup + j, total, 1.0, warmup, "cosine") for j in (k, decay + 2 - k))
        assert first + second == pytest.approx(1.0, rel=1e-12)


def test_documented_last_steps() -> None:
    assert learning_rate(100, 100, 1.0, 10, "linear") == pytest.approx(1 / 90)
    assert learning_rate(100, 100, 1.0, 10, "cosine") == pytest.approx(math.sin(math.pi / 180) ** 2)
    assert learning_rate(1, 1, 1.0, 0, "cosine") == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(50, 0), (50, 7), (300, 9), (2, 1)])
def test_decay_equals_transformers(kind: Kind, total: int, warmup: int) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(1, total + 1):
        expected = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
        if step > warmup:
            assert learning_rate(step, total, PEAK, warmup, kind) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "total", "warmup"), [(0, 10, 0), (11, 10, 0), (-1, 10, 0), (1, 10, 10), (1, 10, -1), (1, 0, 0)]
)
def test_impossible_runs_are_refused(step: int, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=r"step|warm-up"):
        learning_rate(step, total, PEAK, warmup, "cosine")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        learning_rate(1, 2, PEAK, 0, "exponential")  # a wrong word is the point
