"""NEFTune: the formula against transformers' hook, draws that know no layout, and a run that resumes to the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_step import rows
from tiny_folder import digest, losses, quiet, run_config, stopped_copy, write_shop

from minisft.batching import Batch, collate, micro_batches, with_noise
from minisft.common.errors import UserError
from minisft.common.seeds import derive_seed
from minisft.config import RunConfig
from minisft.step import batch_loss_sum
from minisft.training.preference_config import DPOConfig
from minisft.training.train import train

D = tiny.LLAMA.hidden_size
DATA = rows([9, 7, 12, 5], 4)


def noise_of(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """Data row -> its noise, wherever it lies."""
    found = {}
    for batch in batches:
        assert batch.noise is not None
        assert not batch.noise[batch.segment_ids == 0].any()
        for b, numbers in enumerate(batch.segment_rows):
            for segment, row in enumerate(numbers, start=1):
                found[row] = batch.noise[b, batch.segment_ids[b] == segment]
    return found


def test_a_row_has_the_same_noise_however_the_step_is_laid_out() -> None:
    layouts = [micro_batches(DATA, size, 0, packing, 64, share_prefix=False) for size in (1, 3, 4) for packing in (True, False)]
    first, *others = [noise_of([with_noise(batch, 5.0, D, 7, 3) for batch in layout]) for layout in layouts]
    assert {row: tuple(noise.shape) for row, noise in first.items()} == {r.row: (len(r.input_ids), D) for r in DATA}
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[row], noise) for row, noise in first.items())


def test_noise_depends_on_step_row_and_seed() -> None:
    one = rows([8])[0]
    draws = [
        with_noise(collate([replace(one, row=row)], 0), 5.0, D, seed, step).noise
        for seed, step, row in ((7, 3, 1), (7, 4, 1), (7, 3, 2), (8, 3, 1))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_noise_is_uniform_with_the_bound_of_the_paper() -> None:
    long = rows([4000])[0]
    noise = with_noise(collate([long], 0), 5.0, D, 7, 3).noise
    bound = 5.0 / math.sqrt(4000 * D)
    assert 0.999 * bound < float(noise.abs().max()) <= bound
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(noise.mean())) < 0.01 * bound


def test_equals_transformers_hook_for_a_row_by_itself() -> None:
    """The same draw from the same generator; the embeddings come from our model."""
    neftune = pytest.importorskip("transformers.integrations.neftune")
    model, row = tiny.build(tiny.LLAMA, torch.float32).train(), DATA[2]
    batch = with_noise(collate([row], 0), 5.0, D, 7, 3)
    table = model.model.embed_tokens
    table.neftune_noise_alpha = 5.0
    handle = table.register_forward_hook(
        lambda module, args, output: neftune.neftune_post_forward_hook(module, args, output[None])[0]
    )
    torch.manual_seed(derive_seed(7, "neftune", 3, row.row))
    theirs = float(batch_loss_sum(model, replace(batch, noise=None)).detach())
    handle.remove()
    ours, plain = (float(batch_loss_sum(model, b).detach()) for b in (batch, replace(batch, noise=None)))
    assert abs(ours - plain) > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, math.inf, math.nan])
def test_bad_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=r"--neftune-alpha; found .*; expected zero or more; fix: 5 to 15 is usual"):
        RunConfig("m", "d", "o", neftune_alpha=alpha)


def test_dpo_has_no_use_for_it() -> None:
    with pytest.raises(UserError, match=r"--neftune-alpha; found 5.0; expected nothing: dpo has no use for it"):
        DPOConfig("m", "d", "o", neftune_alpha=5.0)


# ---- runs ----


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("neftune"))


def noisy(shop: Path, out: Path, **changes: object) -> RunConfig:
    return run_config(shop, out, **{"neftune_alpha": 5.0, "steps": 4, "save_every": 2, "eval_every": 4, **changes})


@pytest.mark.slow
def test_runs_agree_packed_or_padded_and_resumed(shop: Path, tmp_path: Path) -> None:
    run = noisy(shop, tmp_path / "run")
    train(run, log=quiet)
    again = replace(run, out=stopped_copy(tmp_path / "run", tmp_path / "again", 2))
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.neftune_alpha"):
        train(replace(again, neftune_alpha=0.0), resume=True, log=quiet)
    train(again, resume=True, log=quiet)
    assert digest(tmp_path / "again") == digest(tmp_path / "run")
    train(noisy(shop, tmp_path / "padded", packing=False, micro_batch_size=2), log=quiet)
    padded, packed = ([row["loss"] for row in losses(tmp_path / name)] for name in ("padded", "run"))
    assert padded == pytest.approx(packed, rel=1e-4)


@pytest.mark.slow
def test_noise_moves_the_loss_and_not_the_validation(shop: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing both runs validate the same model, without noise."""
    for name, alpha in (("noisy", 5.0), ("plain", 0.0)):
        train(noisy(shop, tmp_path / name, neftune_alpha=alpha, lr=1e-30, steps=1, eval_every=1), log=quiet)
    (noisy_row,), (plain_row,) = losses(tmp_path / "noisy"), losses(tmp_path / "plain")
    assert abs(noisy_row["loss"] - plain_row["loss"]) > 1e-3
    assert noisy_row["eval_loss"] == pytest.approx(plain_row["eval_loss"], rel=1e-6)
