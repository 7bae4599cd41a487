"""The learning rate against its closed form, its laws and transformers' schedules."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_folder import losses, quiet, run_config, write_shop

from minisft.schedule import Kind, learning_rate
from minisft.training.train import train

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


@given(runs(), st.data())
def test_wsd_is_the_constant_run_until_its_decay_and_the_end_of_a_linear_one(run: tuple[int, int], data: st.DataObject) -> None:
    """So a longer run has the same rates until its own decay begins: what is given more steps wastes none."""
    total, warmup = run
    decay = data.draw(st.integers(1, total - warmup))
    rates = [learning_rate(step, total, PEAK, warmup, "wsd", decay) for step in range(1, total + 1)]
    stable = total - decay
    assert rates[:stable] == [learning_rate(step, total, PEAK, warmup, "constant") for step in range(1, stable + 1)]
    assert rates[:stable] == [learning_rate(step, total + 7, PEAK, warmup, "wsd", decay) for step in range(1, stable + 1)]
    assert rates[stable:] == pytest.approx([PEAK * k / decay for k in range(decay, 0, -1)], rel=1e-12)


@pytest.mark.parametrize(("total", "warmup", "decay"), [(50, 0, 10), (50, 7, 43), (300, 9, 60), (2, 1, 1)])
def test_wsd_equals_transformers(total: int, warmup: int, decay: int) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = transformers.get_wsd_schedule(
        optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=total, decay_type="linear"
    )
    for step in range(1, total + 1):
        expected = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
        if step > warmup:
            assert learning_rate(step, total, PEAK, warmup, "wsd", decay) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0, 8, -1])
def test_a_decay_that_does_not_fit_is_refused(decay: int) -> None:
    with pytest.raises(ValueError, match="decay of"):
        learning_rate(1, 10, PEAK, 3, "wsd", decay)


@pytest.mark.slow
def test_a_run_s_decay_is_its_share_of_the_steps(tmp_path: Path) -> None:
    """10 steps, 1 of warm-up, the last 3 (0.25, rounded up) come down; the next run has the usual fifth of its steps."""
    shop = write_shop(tmp_path)
    for changes, rates in (({"steps": 10, "decay_share": 0.25}, [1, *[2] * 7, 4 / 3, 2 / 3]), ({"steps": 5}, [1, 2, 2, 2, 2])):
        run = run_config(
            shop, tmp_path / f"run-{len(rates)}", schedule="wsd", warmup=0.01, lr=2e-9, eval_every=99, save_every=99, **changes
        )
        train(run, log=quiet)
        assert [row["lr"] * 1e9 for row in losses(Path(run.out))] == pytest.approx(rates)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant or wsd"):
        learning_rate(1, 2, PEAK, 0, "exponential")  # a wrong word is the point
