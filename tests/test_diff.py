"""What two models' files say about the update between them, against numpy's SVD and updates that were planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_folder
import torch

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.evaluation.interpolate import interpolated
from minisft.formats import load_model, save_adapter, save_model
from minisft.merge_weights import merge
from minisft.merging.diff import diff_models
from minisft.merging.spectrum import count_intruders, energy_rank, spectrum_of, spectrum_of_rows
from minisft.surgery import apply_lora_, lora_modules

SHAPES = [(12, 12), (9, 20), (20, 9), (40, 7)]


def by_numpy(w: torch.Tensor, d: torch.Tensor, share: float, threshold: float, top: int) -> tuple[int, int]:
    """Energy rank and intruders by full SVDs."""
    values = np.linalg.svd(d.numpy(), compute_uv=False) ** 2
    rank = int(np.searchsorted(np.cumsum(values) / values.sum(), share - 1e-12) + 1)
    before, after = (np.linalg.svd(m.numpy(), full_matrices=False)[0] for m in (w, w + d))
    cosines = np.abs(after[:, :top].T @ before)
    return rank, int((cosines.max(axis=1) < threshold).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_the_spectrum_is_that_of_full_svds(shape: tuple[int, int], seed: int) -> None:
    w, d = tiny.randn(*shape, seed=seed), (0.1 + seed) * tiny.randn(*shape, seed=seed + 100)
    for share, threshold, top in ((0.9, 0.6, 10), (0.5, 0.8, 3), (1.0, 1.0, 100)):
        found = spectrum_of(w, d, share, threshold, top)
        assert (found.energy_rank, found.intruders) == by_numpy(w, d, share, threshold, top)
        assert found.relative == pytest.approx(float(d.norm() / w.norm()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_may_come_in_pieces(shape: tuple[int, int]) -> None:
    w, d = tiny.randn(*shape, seed=1), tiny.randn(*shape, seed=2)
    pieces = [(w[i : i + 4], d[i : i + 4]) for i in range(0, shape[0], 4)]
    whole, streamed = spectrum_of(w, d), spectrum_of_rows(pieces, shape)
    assert (streamed.energy_rank, streamed.intruders) == (whole.energy_rank, whole.intruders)
    assert streamed.delta_norm == pytest.approx(whole.delta_norm, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_planted_rank_is_found_below_noise_and_new_directions_are_counted(rank: int) -> None:
    """With noise of 1e-3 beside it, 99 % of the energy has the planted rank; large directions that are orthogonal to all of W's
    left singular vectors are new, small ones are not seen."""
    draw = torch.Generator().manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(40, 20, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(15, 15, generator=draw, dtype=torch.float64)).Q
    w = basis[:, :8] @ torch.diag(torch.arange(8, 0, -1).double()) @ v[:, :8].T
    noise = 1e-3 * torch.randn(40, 15, generator=draw, dtype=torch.float64)
    update = basis[:, 8 : 8 + rank] @ v[:, 8 : 8 + rank].T
    assert spectrum_of(w, 50 * update + noise, share=0.99).energy_rank == rank
    assert spectrum_of(w, 50 * update).intruders == rank
    assert spectrum_of(w, 0.5 * update, top=8).intruders == 0
    assert spectrum_of(w, 0.1 * w).intruders == 0  # the same directions, longer


def test_nothing_changed_is_rank_0() -> None:
    found = spectrum_of(tiny.randn(5, 8), torch.zeros(5, 8))
    assert (found.energy_rank, found.intruders, found.relative) == (0, 0, 0.0)
    assert energy_rank(torch.tensor([3.0, 1.0, 0.0]), 1.0) == 2
    assert energy_rank(torch.tensor([1.0, 3.0]), 0.75) == 1
    assert count_intruders(torch.tensor([[0.1, -0.7], [0.5, 0.2]])) == 1


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``; ``tuned``, of which two matrices and a norm differ; ``adapter`` over the base and ``merged`` with it."""
    folder = tmp_path_factory.mktemp("diff")
    tiny_folder.write_model(folder / "base", folder / "scratch")
    model, tokenizer = load_model(folder / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1 * tiny.randn(258, 16, dtype=torch.float32))
        model.model.layers[1].mlp.down_proj.weight.add_(0.1 * tiny.randn(16, 24, seed=1, dtype=torch.float32))
        model.model.norm.weight.mul_(1.5)
    save_model(model, tokenizer, folder / "tuned")
    model, tokenizer = load_model(folder / "base")
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    for i, layer in enumerate(lora_modules(model).values()):
        layer.lora_B.data = 0.1 * tiny.randn(*layer.lora_B.shape, seed=i, dtype=torch.float32)
    save_adapter(model, folder / "adapter")
    save_model(merge(model)[0], tokenizer, folder / "merged")
    return folder


@pytest.mark.slow
def test_two_folders_tensor_by_tensor(models: Path) -> None:
    diff = diff_models(models / "base", models / "tuned")
    base, tuned = (dict(load_model(models / name, torch.float64)[0].named_parameters()) for name in ("base", "tuned"))
    assert {layer.name for layer in diff.layers} == set(base)
    assert [layer.name for layer in diff.changed] == [
        "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    for layer in diff.changed:
        w, d = base[layer.name].detach(), (tuned[layer.name] - base[layer.name]).detach()
        assert layer.relative == pytest.approx(float(d.norm() / w.norm()), rel=1e-9)
        expected = by_numpy(w, d, 0.9, 0.6, 10) if w.ndim == 2 else (None, None)
        assert (layer.energy_rank, layer.intruders) == expected


def test_an_adapter_is_what_its_merge_is(models: Path) -> None:
    over, merged = (diff_models(models / "base", models / name) for name in ("adapter", "merged"))
    assert [layer.name for layer in over.changed] == [layer.name for layer in merged.changed]
    for one, other in zip(over.changed, merged.changed, strict=True):
        assert one.relative == pytest.approx(other.relative, rel=1e-5)
        assert one.energy_rank == other.energy_rank <= 2
        assert one.intruders == other.intruders


def test_the_command_prints_and_writes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "diff.json"
    assert main(["diff", "--a", str(models / "base"), "--b", str(models / "tuned"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "model.layers.1.mlp.down_proj.weight" in printed.out
    assert "tensors are the same" in printed.out
    assert printed.err == ""
    written = json.loads(out.read_text())
    assert written["summary"]["down_proj"]["changed"] == 1
    assert len(written["layers"]) == len(diff_models(models / "base", models / "base").layers)
    assert main(["diff", "--a", str(models / "base"), "--b", str(models / "base")]) == 0
    assert "the same numbers in all" in capsys.readouterr().out


OTHERS = {
    "model/tied-differs": replace(tiny_folder.CONFIG, tie_word_embeddings=False),
    "model/other-shape": replace(tiny_folder.CONFIG, intermediate_size=32),
    "model/other-tensors": replace(tiny_folder.CONFIG, num_layers=1),
    "model/other-settings": replace(tiny_folder.CONFIG, rope_theta=500.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("code", OTHERS)
def test_models_that_do_not_belong_together_are_one_line(
    code: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder.write_model(tmp_path / "other", tmp_path / "scratch", OTHERS[code])
    with pytest.raises(UserError) as error:
        diff_models(models / "base", tmp_path / "other")
    assert error.value.code == code
    with pytest.raises(UserError, match=code):
        interpolated(models / "base", tmp_path / "other")
    assert main(["diff", "--a", str(models / "base"), "--b", str(tmp_path / "other")]) == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error[{code}]")


def test_settings_out_of_range_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--energy", "0"), ("--threshold", "1.5"), ("--top", "0"), ("--energy", "nan")):
        assert main(["diff", "--a", "a", "--b", "b", flag, value]) == 2
        assert capsys.readouterr().err.startswith("error[config/bad-value]")
