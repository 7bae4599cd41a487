"""AdamW with 8-bit moments: bitsandbytes' levels and codes, the update in fp64, bounds on what rounding costs, and runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import randn as exact_randn
from tiny_folder import digest, losses, quiet, run_config, stopped_copy, write_shop
from torch import Tensor, nn

from minisft import adam_8bit
from minisft.adam_8bit import BLOCK, Moments, adamw_8bit_, decode, encode, levels
from minisft.common.errors import UserError
from minisft.optim import MasterAdamW
from minisft.step import optimizer_of
from minisft.training.checkpoint import load_step
from minisft.training.plan import plan
from minisft.training.train import train

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.1


def randn(*shape: int, seed: int) -> Tensor:
    return exact_randn(*shape, seed=seed, dtype=torch.float32)


def spread(n: int, seed: int, signed: bool) -> Tensor:
    """Numbers over twelve powers of ten, zeros among them."""
    x = randn(n, seed=seed) * 10.0 ** (6 * randn(n, seed=seed + 1)).clamp(-9, 3)
    x[::7] = 0.0
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.allclose(levels(signed), functional.create_dynamic_map(signed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = spread(5 * BLOCK, 3, signed)
    theirs, state = functional.quantize_blockwise(x, code=functional.create_dynamic_map(signed), blocksize=BLOCK)
    codes, absmax = encode(x, signed)
    assert torch.equal(absmax, state.absmax)
    share, table = (x.view(-1, BLOCK) / absmax[:, None]).view(-1), levels(signed)
    ours, other = ((share - table[c.long()]).abs() for c in (codes, theirs))
    far = share.abs() > 0.01
    assert (codes == theirs)[far].float().mean() > 0.95
    assert float((ours - other)[far].abs().max()) < 5e-5  # the rest lies halfway between two levels
    lifted = (codes == 1) & (not signed)  # a second moment that the nearest level, 0, would have lost
    assert bool(((ours <= other * (1 + 1e-5) + 1e-12) | lifted).all())
    assert bool((ours < other).any())  # near 0 their CPU code takes the level of a coarse table, up to 2e-5 off


@given(n=st.integers(1, 3 * BLOCK), seed=st.integers(0, 99), signed=st.booleans())
def test_each_number_gets_the_nearest_level(n: int, seed: int, signed: bool) -> None:
    """In fp64, by looking at all 256; but no second moment becomes 0."""
    x = spread(n, seed, signed)
    codes, absmax = encode(x, signed)
    for b in range(-(-n // BLOCK)):
        here = slice(b * BLOCK, (b + 1) * BLOCK)
        largest = x[here].abs().max()
        assert absmax[b] == largest
        share = x[here].double() / (largest.double() or 1.0)
        distances = (share[:, None] - levels(signed).double()[None]).abs()
        chosen = distances.gather(1, codes[here].long()[:, None])[:, 0]
        best = distances.min(dim=1).values
        lifted = (not signed) & (x[here] > 0) & (codes[here] == 1)
        assert bool(((chosen <= best * (1 + 1e-5) + 1e-12) | lifted).all())
    back = decode(codes, absmax, signed)
    assert torch.equal(back[x == 0], torch.zeros(int((x == 0).sum())))
    assert signed or bool((back[x > 0] > 0).all())


class ByHand:
    """The update in fp64 on moments that are rounded by looking for the nearest of all levels."""

    def __init__(self, w: Tensor) -> None:
        self.w, self.m, self.v, self.t = w.double(), torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(w).double(), 0

    def step(self, g: Tensor, lr: float) -> None:
        g, self.t, (b1, b2) = g.double(), self.t + 1, BETAS
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.w = self.w - lr * (m_hat / (v_hat.sqrt() + EPS) + DECAY * self.w)
        self.m, self.v = self._rounded(self.m, True), self._rounded(self.v, False)

    def _rounded(self, x: Tensor, signed: bool) -> Tensor:
        out = torch.zeros_like(x)
        for start in range(0, len(x), BLOCK):
            block = x[start : start + BLOCK]
            scale, table = block.abs().max().float().double(), levels(signed).double()
            nearest = (block[:, None] / scale - table[None]).abs().argmin(dim=1)
            out[start : start + BLOCK] = scale * table[nearest if signed else nearest.clamp_min(1)]
        return out


@pytest.mark.parametrize("piece", [2**20, BLOCK])
def test_equals_the_update_in_fp64(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The last block is not full, and pieces of one block change nothing."""
    monkeypatch.setattr(adam_8bit, "PIECE", piece)
    w = randn(3 * BLOCK - 17, seed=1)
    by_hand, moments = ByHand(w.clone()), Moments.zeros(w)
    for t in range(6):
        g, lr = randn(len(w), seed=10 + t) * 10.0 ** (t % 3 - 1), 0.01 / (1 + t)
        adamw_8bit_(w, g, moments, lr, BETAS, EPS, DECAY)
        by_hand.step(g, lr)
    # A number that fp32 puts on the other side of a border is one level off from then on; there are few of them.
    off = (w.double() - by_hand.w).abs()
    assert float(off.quantile(0.98)) < 1e-6
    assert float(off.max()) < 1e-3


def test_the_first_step_is_adamw_s_and_later_ones_stay_near() -> None:
    """Moments start exact (0), so the first step has no rounding; what rounding costs later is bounded by hand."""
    ours, exact = (nn.Parameter(randn(96, 64, seed=1)) for _ in range(2))
    start = ours.detach().clone()
    a, b = (
        MasterAdamW({"w": p}, betas=BETAS, weight_decay=DECAY, in_8_bits=names) for p, names in ((ours, ["w"]), (exact, []))
    )
    for t in range(20):
        g = randn(96, 64, seed=50 + t)
        ours.grad, exact.grad = g.clone(), g.clone()
        a.step(0.01)
        b.step(0.01)
        if t == 0:
            assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-7)
    moved, off = (exact - start).detach(), (ours - exact).detach()
    assert 0 < float(off.norm() / moved.norm()) < 0.05


def test_a_gradient_that_stops_makes_no_giant_step() -> None:
    """v of the second number is 1e-10 of its block's and would round to 0; its m, a 1e-5 of its block's, would not."""
    w, moments = torch.zeros(BLOCK), Moments.zeros(torch.zeros(BLOCK))
    g = torch.zeros(BLOCK)
    g[0], g[1] = 1e3, 1e-2
    adamw_8bit_(w, g, moments, 0.01, BETAS, EPS, 0.0)
    before = w.clone()
    g[1] = 0.0
    adamw_8bit_(w, g, moments, 0.01, BETAS, EPS, 0.0)
    assert float((w - before).abs().max()) <= 0.01 * 1.01
    assert decode(moments.exp_avg, moments.exp_avg_absmax, True)[1] > 0  # so that epsilon alone would have divided it


@pytest.mark.slow
def test_state_is_two_bytes_a_number_and_embeddings_and_small_tensors_keep_fp32(shop: Path, tmp_path: Path) -> None:
    from minisft.formats import load_model
    from minisft.step import prepare_method

    run = run_config(shop, tmp_path, optim="adamw8bit", method="full")
    model, _ = load_model(str(shop / "model"), torch.float32, torch.device("cpu"), None)
    parameters = prepare_method(model, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minisft.step.MIN_NUMBERS", 300)
        optimizer = optimizer_of(model, parameters, run)
    chosen = {name for name, p in parameters.items() if p.numel() >= 300 and "embed" not in name}
    assert set(optimizer.in_8_bits) == chosen
    assert 0 < len(chosen) < len(parameters)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step(0.01)
    state = optimizer.state()
    for name, p in parameters.items():
        held = {key: t for key, t in state.items() if key.startswith(f"{name}/exp_avg")}
        num_bytes = sum(t.numel() * t.element_size() for t in held.values())
        n = p.numel()
        assert num_bytes == (2 * n + 8 * math.ceil(n / BLOCK) if name in chosen else 8 * n)


# ---- runs ----


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("adam8"))


@pytest.mark.slow
def test_a_run_learns_alike_and_resumes_bit_for_bit(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisft.step.MIN_NUMBERS", 32)
    run = run_config(shop, tmp_path / "run", optim="adamw8bit", steps=4, save_every=2, eval_every=4, lr_b_ratio=2.0)
    train(run, log=quiet)
    saved = load_step(tmp_path / "run", 4).groups["optimizer"]
    assert any(t.dtype == torch.uint8 for t in saved.values())
    again = replace(run, out=stopped_copy(tmp_path / "run", tmp_path / "again", 2))
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.optim"):
        train(replace(again, optim="adamw"), resume=True, log=quiet)
    train(again, resume=True, log=quiet)
    assert digest(tmp_path / "again") == digest(tmp_path / "run")
    train(replace(run, optim="adamw", out=str(tmp_path / "exact")), log=quiet)
    ours, exact = ([row["loss"] for row in losses(tmp_path / name)] for name in ("run", "exact"))
    assert ours[:2] == pytest.approx(exact[:2], rel=1e-5)  # the first update is exact
    assert ours == pytest.approx(exact, rel=0.02)
    assert ours != exact


@pytest.mark.slow
def test_plan_counts_the_smaller_state(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisft.step.MIN_NUMBERS", 1)
    bills = [plan(run_config(shop, Path("o"), method="full", optim=optim, max_length=32)) for optim in ("adamw", "adamw8bit")]
    plain, small = ({item.name: item.whole for item in bill.items}["optimizer: moments, fp32 master weights"] for bill in bills)
    embedding = 258 * 16
    others = plain // 8 - embedding  # numbers with 8-bit moments; each block's scales are whole
    assert 8 * embedding + 2 * others <= small <= 8 * embedding + 3 * others
