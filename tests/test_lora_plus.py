"""LoRA+: B's rate is R times A's. PEFT's groups, the law of alpha against B's rate bit for bit, and a run that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_step import batches, rows
from tiny_folder import digest, losses, quiet, run_config, stopped_copy, write_shop

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, RunConfig
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.step import accumulate_gradients, train_step
from minisft.surgery import apply_lora_, lora_modules, lora_plus_ratios
from minisft.training.train import train

DATA = rows([9, 7, 12, 5], 4)


def adapted(alpha: float = 3.0, dtype: torch.dtype = torch.float32, **settings: object) -> CausalLM:
    model = tiny.build(tiny.LLAMA, dtype)
    apply_lora_(model, LoRAConfig(rank=2, alpha=alpha, **settings), seed=1)
    return model


def optimizer_of(model: CausalLM, ratio: float, eps: float = 1e-8, decay: float = 0.0) -> MasterAdamW:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return MasterAdamW(
        trained, betas=(0.9, 0.999), weight_decay=decay, eps=eps, lr_ratios=lora_plus_ratios(model, ratio)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("c", [2.0, 0.25])
def test_under_adam_alpha_times_c_with_b_s_rate_divided_by_c_is_the_same_model_bit_for_bit(c: float) -> None:
    """B is c times smaller throughout, its gradient c times larger, and Adam divides that out; c is a power of two."""
    one, two = adapted(3.0), adapted(3.0 * c)
    first, second = optimizer_of(one, 1.0, eps=1e-30), optimizer_of(two, 1 / c, eps=1e-30)
    for _ in range(4):
        a = train_step(one, first, batches(DATA, 2), lr=0.05)
        b = train_step(two, second, batches(DATA, 2), lr=0.05)
        assert a.loss == b.loss
    for mine, other in zip(lora_modules(one).values(), lora_modules(two).values(), strict=True):
        assert torch.equal(mine.lora_A, other.lora_A)
        assert torch.equal(mine.lora_B, c * other.lora_B)
        assert mine.lora_B.any()
        assert torch.equal(mine.delta_weight(), other.delta_weight())


def test_the_first_step_moves_b_by_r_times_the_rate_and_a_by_the_rate() -> None:
    """Adam's first step is sign(gradient) times the rate, whatever the gradient's size."""
    model = adapted(dtype=torch.float64)
    with torch.no_grad():
        for adapter in lora_modules(model).values():
            adapter.lora_B.copy_(tiny.randn(*adapter.lora_B.shape))  # at B = 0 nothing would reach A
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, 16.0, eps=0.0)
    accumulate_gradients(model, batches(DATA, 4))
    signs = {name: p.grad.sign() for name, p in optimizer.parameters.items()}
    optimizer.step(1e-3)
    for name, p in optimizer.parameters.items():
        rate = 16e-3 if name.endswith("lora_B") else 1e-3
        tiny.assert_close(p, before[name] - rate * signs[name], 1e-12, name)


@pytest.mark.slow
def test_the_groups_are_pefts() -> None:
    """Which parameters get which rate; PEFT's are found by name, the embedding's apart (it has a rate of its own there)."""
    pytest.importorskip("peft")
    import peft
    from peft.optimizers import create_loraplus_optimizer
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29, hidden_size=12, intermediate_size=14, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=6,
        )
    )  # fmt: skip
    model = adapted(targets=("q_proj", "down_proj"), use_dora=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    groups = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0).param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".weight", ""): rate_of[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert {name: 1e-3 * ratio for name, ratio in lora_plus_ratios(model, 16.0).items()} == expected


def test_an_embedding_s_factors_keep_the_rate() -> None:
    ratios = lora_plus_ratios(adapted(targets=("embed_tokens", "q_proj")), 16.0)
    assert {ratio for name, ratio in ratios.items() if "embed_tokens" in name} == {1.0}
    assert {ratio for name, ratio in ratios.items() if name.endswith("q_proj.lora_B")} == {16.0}


def test_decay_follows_each_parameter_s_own_rate() -> None:
    """Decoupled decay is lr * ratio * decay, as PyTorch has it for a group with that rate."""
    model = adapted(dtype=torch.float64)
    with torch.no_grad():
        for adapter in lora_modules(model).values():
            adapter.lora_B.fill_(1.0)
    optimizer = optimizer_of(model, 4.0, decay=0.5)
    for p in optimizer.parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for adapter in lora_modules(model).values():
        tiny.assert_close(adapter.lora_B, torch.full_like(adapter.lora_B, 1 - 0.4 * 0.5))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr_b_ratio": 0.0}, "--lr-b-ratio; found 0.0; expected a positive number; fix: 1 is LoRA"),
        ({"lr_b_ratio": float("inf")}, "--lr-b-ratio; found inf; expected a positive number"),
        ({"lr_b_ratio": 4.0, "method": "full"}, "--lr-b-ratio with --method full; found 4.0; expected 1; fix: leave"),
    ],
)
def test_bad_ratios_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig("m", "d", "o", **values)
    assert said in str(caught.value)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("plus"))


@pytest.mark.slow
def test_a_run_uses_the_ratio_and_resumes_to_the_same_bits(shop: Path, tmp_path: Path) -> None:
    run = run_config(shop, tmp_path / "plus", steps=4, save_every=2, eval_every=4, lr_b_ratio=8.0)
    train(run, log=quiet)
    again = replace(run, out=stopped_copy(tmp_path / "plus", tmp_path / "again", 2))
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.lr_b_ratio: 8.0 before, 2.0 now"):
        train(replace(again, lr_b_ratio=2.0), resume=True, log=quiet)
    train(again, resume=True, log=quiet)
    assert digest(tmp_path / "again") == digest(tmp_path / "plus")
    train(replace(run, out=str(tmp_path / "plain"), lr_b_ratio=1.0), log=quiet)
    assert losses(tmp_path / "plain")[0]["loss"] == losses(tmp_path / "plus")[0]["loss"]
    assert losses(tmp_path / "plain")[1]["loss"] != losses(tmp_path / "plus")[1]["loss"]
