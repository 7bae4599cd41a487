"""``--method full --targets``: chosen layers trained in full, everything else bit for bit as it was; bf16 with fp32 masters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_step import rows
from tiny_folder import CONFIG, losses, quiet, run_config, stopped_copy, write_shop
from torch import nn

from minisft.batching import collate
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig, RunConfig
from minisft.formats import load_model
from minisft.formats.loading import empty_model, expected_shapes
from minisft.step import accumulate_gradients, prepare_method
from minisft.surgery import apply_lora_, lora_modules, quantize_, train_fully_
from minisft.training.memory_estimate import Shape, estimate_step
from minisft.training.train import train

BIASES = tiny.FAMILIES["llama-biases"]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), r".*layers\.1\.mlp\..*", ("embed_tokens",)])
def test_full_and_lora_choose_the_same_layers(targets: str | tuple[str, ...]) -> None:
    adapted = apply_lora_(tiny.build(BIASES), LoRAConfig(rank=1, targets=targets))
    model = tiny.build(BIASES)
    assert train_fully_(model, targets) == adapted
    chosen = {id(p) for path in adapted for p in model.get_submodule(path).parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == chosen
    assert len(chosen) == len(adapted) * (1 if targets == ("embed_tokens",) else 2)  # weights, and biases where there are some


def test_a_shared_weight_is_trained_under_either_name() -> None:
    model = tiny.build(tiny.LLAMA)  # tied
    train_fully_(model, ("lm_head",))
    assert model.model.embed_tokens.weight.requires_grad


def test_without_targets_everything_is_trained() -> None:
    run = RunConfig("m", "d", "o", method="full")
    assert run.targets is None
    trained = prepare_method(tiny.build(tiny.LLAMA).requires_grad_(False), run)
    assert trained.keys() == dict(tiny.build(tiny.LLAMA).named_parameters()).keys()


def test_four_bits_and_unknown_layers_are_refused_before_anything_is_frozen() -> None:
    model = tiny.build(tiny.LLAMA, torch.float32)
    with pytest.raises(UserError, match=r"config/no-such-target.*'q_porj'.*did you mean 'q_proj'"):
        train_fully_(model, ("q_porj",))
    assert all(p.requires_grad for p in model.parameters())
    quantize_(model, QuantConfig(targets=("q_proj",)))
    with pytest.raises(UserError, match=r"model/not-quantizable.*layers\.0\.self_attn\.q_proj.*use --method lora"):
        train_fully_(model, ("q_proj",))


def test_lora_of_full_rank_with_a_frozen_identity_is_full_training_step_by_step() -> None:
    """W + B I with s = 1: under plain gradient descent B moves as W would, so the losses are the same (fp64)."""
    square = replace(tiny.MISTRAL, hidden_size=36, intermediate_size=36, num_kv_heads=6)
    targets = ("q_proj", "v_proj", "up_proj", "down_proj")
    batches = [collate(rows([5, 9, 7], 3), 0)]

    def descend(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
        found = []
        for _ in range(6):
            found.append(accumulate_gradients(model, batches))
            with torch.no_grad():
                for p in parameters:
                    p -= 0.3 * p.grad
            model.zero_grad(set_to_none=True)
        return found

    full, lora = tiny.build(square), tiny.build(square)
    train_fully_(full, targets)
    apply_lora_(lora, LoRAConfig(rank=36, alpha=36.0, targets=targets))
    for adapter in lora_modules(lora).values():
        adapter.lora_A.data = torch.eye(36, dtype=torch.float64)
        adapter.lora_A.requires_grad_(False)
    expected = descend(full, [p for p in full.parameters() if p.requires_grad])
    found = descend(lora, [a.lora_B for a in lora_modules(lora).values()])
    assert expected[0] - expected[-1] > 0.1  # something was learned
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_plan_counts_the_moments_of_the_chosen_layers() -> None:
    shape = Shape(CONFIG, expected_shapes(empty_model(CONFIG)), {})
    run = RunConfig("", "", "", dtype="fp32", max_length=32, method="full", targets=("q_proj", "up_proj"))
    chosen = [math.prod(size) for name, size in shape.tensors.items() if "q_proj" in name or "up_proj" in name]
    found = estimate_step(run, shape, torch.device("cpu")).whole
    assert found["optimizer"] == sum(2 * 4 * n + 4 for n in chosen)  # two moments in fp32, and a step count
    assert found["gradients"] == sum(4 * n for n in chosen)


# ---- whole runs ----


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("full"))


def full(shop: Path, out: Path, **changes: object) -> RunConfig:
    return run_config(shop, out, **{"method": "full", "steps": 4, "save_every": 2, "eval_every": 4, "lr": 1e-3, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_only_the_chosen_layers_of_the_saved_model_differ(shop: Path, tmp_path: Path) -> None:
    run = full(shop, tmp_path / "run", targets=("q_proj", "down_proj"))
    result = train(run, log=quiet)
    before, after = weights(shop / "model"), weights(tmp_path / "run" / "model")
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    assert result.trainable == sum(before[name].numel() for name in changed)
    load_model(tmp_path / "run" / "model")  # a whole model
    again = replace(run, out=stopped_copy(tmp_path / "run", tmp_path / "again", 2))
    train(again, resume=True, log=quiet)
    for name, value in weights(tmp_path / "again" / "model").items():
        assert torch.equal(value, after[name]), name
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.targets"):
        train(replace(again, targets=("q_proj",)), resume=True, log=quiet)


@pytest.mark.slow
def test_updates_below_the_last_bit_of_bf16_add_up(shop: Path, tmp_path: Path) -> None:
    """40 steps of at most lr each are 1/50 of the spacing of bf16 near 0.25: without masters every one of them is lost."""
    lr, steps = 2e-5, 40
    train(full(shop, tmp_path / "run", targets=("q_proj",), dtype="bf16", lr=lr, steps=steps, schedule="constant", warmup=0.0,
               eval_every=steps, save_every=steps), log=quiet)  # fmt: skip
    before, after = weights(shop / "model"), weights(tmp_path / "run" / "model")
    masters = load_file(tmp_path / "run" / "checkpoints" / f"step-{steps}" / "optimizer.safetensors")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "bf16"
    for name in (name for name in before if "q_proj" in name):
        start, master = before[name].bfloat16(), masters[f"{name}/master"]
        assert master.dtype == torch.float32
        moved, step_of_bf16 = (master - start.float()).abs(), start.float().abs() * 2**-8
        assert moved.max() > 5 * lr  # many steps are in it
        lost = (step_of_bf16 / 2 > lr) & (moved > step_of_bf16)  # each step alone rounds to nothing, all of them do not
        assert lost.sum() > 3
        stored = after[name].float()
        assert torch.equal(stored, master.bfloat16().float())
        assert (stored[lost] != start.float()[lost]).all()
        naive = start.clone()
        for _ in range(steps):  # the same way in steps of equal length, rounded to bf16 each time
            naive = (naive.float() + (master - start.float()) / steps).bfloat16()
        assert torch.equal(naive[lost], start[lost])
