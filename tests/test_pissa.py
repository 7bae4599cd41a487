"""PiSSA: the principal part by its definition, PEFT as the oracle in both directions, an untouched base, runs that resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_step import batches, rows
from tiny_folder import CONFIG, digest, quiet, run_config, stopped_copy, write_shop
from torch import nn

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig, RunConfig
from minisft.formats import load_adapter_, load_model, save_adapter
from minisft.formats.loading import empty_model, expected_shapes
from minisft.optim import MasterAdamW
from minisft.pissa import PiSSALinear, pissa_starts
from minisft.step import train_step
from minisft.surgery import adapters_off, apply_lora_, lora_modules, quantize_
from minisft.training.memory_estimate import Shape, estimate_step
from minisft.training.train import train

PISSA = LoRAConfig(rank=2, alpha=3.0, init="pissa")
IDS = torch.arange(20)[None] % tiny.VOCAB


def layer(rank: int = 3, alpha: float = 5.0, dtype: torch.dtype = torch.float64, **settings: bool) -> PiSSALinear:
    base = nn.Linear(12, 9, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(tiny.randn(9, 12))
    return PiSSALinear(base, rank, alpha, **settings)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_start_is_the_best_approximation_of_its_rank(use_rslora: bool) -> None:
    """Eckart and Young: what is left has the norm of the other singular values, found here from W's Gram matrix."""
    pissa = layer(use_rslora=use_rslora)
    W = pissa.base.weight.detach()
    start = pissa.scaling * pissa.start_B @ pissa.start_A
    values = torch.linalg.eigvalsh(W @ W.T).flip(0)
    assert float((W - start).square().sum()) == pytest.approx(float(values[3:].sum()), rel=1e-12)
    assert float(torch.linalg.matrix_norm(W - start, 2)) == pytest.approx(math.sqrt(values[3]), rel=1e-12)
    tiny.assert_close(pissa.start_A @ pissa.start_A.T, torch.diag(values[:3].sqrt() / pissa.scaling))  # balanced factors
    tiny.assert_close(pissa.start_B.T @ pissa.start_B, torch.diag(values[:3].sqrt() / pissa.scaling))
    assert torch.equal(pissa.lora_A, pissa.start_A)
    assert torch.equal(pissa.lora_B, pissa.start_B)


def test_a_fresh_layer_is_its_base_and_a_trained_one_is_the_residual_plus_ba() -> None:
    pissa, x = layer(), tiny.randn(5, 12, seed=2)
    W, b = pissa.base.weight.detach().clone(), pissa.base.bias.detach()
    tiny.assert_close(pissa(x), x @ W.T + b)
    residual = W - pissa.scaling * pissa.lora_B.detach() @ pissa.lora_A.detach()
    with torch.no_grad():
        pissa.lora_A.add_(tiny.randn(3, 12, seed=3))
        pissa.lora_B.add_(tiny.randn(9, 3, seed=4))
    expected = residual + pissa.scaling * pissa.lora_B.detach() @ pissa.lora_A.detach()
    tiny.assert_close(pissa(x), x @ expected.T + b)
    tiny.assert_close(W + pissa.delta_weight(), expected)
    assert torch.equal(pissa.base.weight, W)


def test_gradients_are_those_of_the_paper_s_layer() -> None:
    """residual x + scaling B A x, by autograd on the formula."""
    pissa, x, g = layer(), tiny.randn(5, 12, seed=2), tiny.randn(5, 9, seed=3)
    A, B = (p.detach().clone().requires_grad_() for p in (pissa.lora_A, pissa.lora_B))
    residual = pissa.base.weight.detach() - pissa.scaling * B.detach() @ A.detach()
    ((x @ (residual + pissa.scaling * B @ A).T) * g).sum().backward()
    (pissa(x) * g).sum().backward()
    tiny.assert_close(pissa.lora_A.grad, A.grad)
    tiny.assert_close(pissa.lora_B.grad, B.grad)
    assert pissa.start_A.grad is None
    assert pissa.start_B.grad is None


def test_dropout_leaves_a_fresh_layer_alone() -> None:
    """It acts on what was learned; dropping inputs of the principal part itself would be another model."""
    base = layer().base
    pissa, x = PiSSALinear(base, 3, 5.0, dropout=0.5).train(), tiny.randn(5, 12, seed=2)
    tiny.assert_close(pissa(x), base(x))


def test_the_rest_of_the_library_sees_a_base_and_an_update() -> None:
    model, plain = tiny.build(tiny.QWEN2), tiny.build(tiny.QWEN2)
    apply_lora_(model, PISSA)
    for adapter in lora_modules(model).values():
        adapter.lora_B.data.add_(tiny.randn(*adapter.lora_B.shape, seed=5) * 0.3)
    assert not torch.allclose(model(IDS), plain(IDS), atol=1e-3)
    with adapters_off(model):
        assert torch.equal(model(IDS), plain(IDS))
    assert model.to(torch.bfloat16).model.layers[0].mlp.up_proj.start_A.dtype == torch.float64  # what is fp32 or wider stays so
    assert len(pissa_starts(model)) == 2 * len(lora_modules(model))


# ---- PEFT ----


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, vocab_size=64, **shape)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_trains_the_same_model_and_exchanges_adapters(use_rslora: bool, tmp_path: Path) -> None:
    """Three AdamW steps in both; then ours in PEFT on the original base, and PEFT's, converted, in ours."""
    peft = pytest.importorskip("peft")
    targets, settings = ["q_proj", "down_proj"], {"use_rslora": use_rslora}
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights="pissa", **settings
        ),
    )  # fmt: skip
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, before the start is saved
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    ours, ids = llama(), torch.tensor([[1, 5, 9, 3, 60, 2, 7]])
    original = ours(ids).logits.detach()
    apply_lora_(ours, LoRAConfig(rank=4, alpha=6.0, targets=tuple(targets), init="pissa", **settings))
    torch.testing.assert_close(ours(ids).logits, original, rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0.0, eps=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    expected = theirs(ids).logits.detach()
    assert (expected - original).abs().max() > 0.1
    torch.testing.assert_close(ours(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    save_adapter(ours, tmp_path / "ours", base_name="tiny")
    settings_saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (settings_saved["r"], settings_saved["init_lora_weights"]) == (8, True)
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(again(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = llama()
    load_adapter_(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)


# ---- refused ----


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quant": "nf4"}, "--quant with --init pissa; found nf4; expected none; fix: what is left of each weight would be"),
        ({"method": "full"}, "--init with --method full; found pissa; expected default; fix: leave --init away"),
        ({"init_adapter": "a"}, "--init with --init-adapter; found pissa; expected default; fix: leave --init away"),
        ({"use_dora": True}, "init pissa with use_dora; found True; expected plain LoRA"),
        ({"alpha": 0.0}, "init pissa with alpha; found 0.0; expected a positive alpha; fix: take alpha = rank"),
        ({"init": "olora"}, "--init; found olora; expected default or pissa"),
    ],
)
def test_settings_that_do_not_go_with_pissa_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig("m", "d", "o", **{"init": "pissa", **values})
    assert said in str(caught.value)


def test_layers_that_cannot_are_refused_before_any_is_wrapped() -> None:
    model = tiny.build(tiny.LLAMA, torch.float32)
    with pytest.raises(UserError, match=r"config/pissa-layer.*embed_tokens.*an embedding.*--init default"):
        apply_lora_(model, replace(PISSA, targets=("q_proj", "embed_tokens")))
    with pytest.raises(UserError, match=r"config/bad-rank.*twice the rank; found rank 14; expected 1 to 12"):
        apply_lora_(model, replace(PISSA, rank=7))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"model/non-finite-weight"):
        apply_lora_(model, PISSA)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 0.0
    quantize_(model, QuantConfig(targets=("v_proj",)))
    with pytest.raises(UserError, match=r"config/pissa-layer.*layers\.0\.self_attn\.v_proj.*4 bits"):
        apply_lora_(model, PISSA)
    assert not lora_modules(model)


# ---- runs ----


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("pissa"))


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits_and_saves_an_adapter_of_the_original_base(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of singular vectors and their last bits differ between machines: a resumed run keeps its first start."""
    run = run_config(shop, tmp_path / "run", init="pissa", steps=4, save_every=2, eval_every=4, lr=1e-3)
    train(run, log=quiet)
    again = replace(run, out=stopped_copy(tmp_path / "run", tmp_path / "again", 2))
    with pytest.raises(UserError, match=r"checkpoint/changed.*config\.init: \"pissa\" before, \"default\" now"):
        train(replace(again, init="default"), resume=True, log=quiet)
    svd = torch.linalg.svd

    def another(weight: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U, S, Vh = svd(weight, full_matrices=full_matrices)
        return -U, S * (1 + 1e-6), -Vh

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", another)
        train(again, resume=True, log=quiet)
    assert digest(tmp_path / "again") == digest(tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {4}  # twice the rank
    starts = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "start.safetensors")
    facts = json.loads((tmp_path / "run" / "adapter" / "minisft.json").read_text())
    assert facts["init"].startswith("pissa")
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(saved[f"base_model.model.{path}.lora_A.weight"][2:], starts[f"{path}.start_A"])
    assert torch.equal(saved[f"base_model.model.{path}.lora_B.weight"][:, 2:], -starts[f"{path}.start_B"])
    model, _ = load_model(shop / "model")
    load_adapter_(model, tmp_path / "run" / "adapter")  # the base is the original one, by its fingerprint
    trained, _ = load_model(shop / "model")
    apply_lora_(trained, LoRAConfig(rank=2, alpha=3.0, init="pissa"))
    masters = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if f"{name}/master" in masters:
                parameter.copy_(masters[f"{name}/master"])
    tiny.assert_close(model(IDS), trained(IDS), 1e-5)


def test_a_bf16_base_is_kept_bit_for_bit_where_the_paper_s_residual_would_be_rounded() -> None:
    """The function at step 0 is nearer to the base than that of W - B A rounded to bf16."""
    exact = layer(dtype=torch.float64)
    W = exact.base.weight.detach().bfloat16()
    base = nn.Linear(12, 9, dtype=torch.bfloat16)
    base.weight.data, base.bias.data = W.clone(), torch.zeros(9, dtype=torch.bfloat16)
    pissa = PiSSALinear(base, 3, 5.0)
    assert torch.equal(base.weight, W)
    ours = W.double() + pissa.delta_weight().double()
    start = pissa.scaling * (pissa.start_B @ pissa.start_A)
    paper = (W.float() - start).bfloat16().double() + start.double()
    assert (ours - W.double()).abs().max() < 1e-6
    assert (paper - W.double()).abs().max() > 1e-4


@pytest.mark.slow
def test_plan_counts_the_start() -> None:
    shape = Shape(CONFIG, expected_shapes(empty_model(CONFIG)), {})

    def adapters(**settings: object) -> float:
        run = RunConfig("", "", "", dtype="fp32", max_length=32, rank=2, **settings)
        return estimate_step(run, shape, torch.device("cpu")).whole["adapters"]

    assert adapters(init="pissa") == 2 * adapters() > 0


def test_training_moves_the_loss_down() -> None:
    model = tiny.build(tiny.LLAMA, torch.float32)
    apply_lora_(model, replace(PISSA, alpha=2.0))
    optimizer = MasterAdamW({n: p for n, p in model.named_parameters() if p.requires_grad}, betas=(0.9, 0.99), weight_decay=0.0)
    data = batches(rows([9, 7, 12, 5], 4), 4)
    found = [train_step(model, optimizer, data, lr=0.01).loss for _ in range(6)]
    assert found[-1] < found[0] - 0.3
