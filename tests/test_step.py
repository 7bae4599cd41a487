"""The arithmetic of one step, in fp64 where a law is exact."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minisft import lora_fused
from minisft.adapter import RowDraws, RowDropout
from minisft.batching import Batch, micro_batches, step_rows
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig, RunConfig
from minisft.data.chat import Encoded
from minisft.loss import cross_entropy_sum
from minisft.model import MLP, CausalLM, Layer
from minisft.optim import MasterAdamW
from minisft.step import (
    accumulate_gradients,
    batch_loss_sum,
    check_gradients,
    prepare_method,
    set_checkpointing,
    train_step,
    validation_loss,
)
from minisft.surgery import apply_lora_, lora_modules, quantize_
from minisft.training.memory_estimate import MemoryTracker

LORA = LoRAConfig(rank=2, alpha=3.0)
few = settings(max_examples=max(5, settings().max_examples // 6))  # of a law whose drawn number is only a seed


def rows(lengths: list[int], seed: int = 0) -> list[Encoded]:
    """Rows of random tokens; the last third of each, and at least its last token, is supervised."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths, 1):
        ids = torch.randint(0, tiny.VOCAB, (length,), generator=draw).tolist()
        first = min(length - 1, length - length // 3)
        made.append(Encoded(ids, [i >= first for i in range(length)], row, 0, first))
    return made


def batches(data: list[Encoded], size: int, packing: bool = False, share_prefix: bool = True):
    return micro_batches(data, size, pad_id=0, packing=packing, capacity=64, share_prefix=share_prefix)


def lora_model(dtype: torch.dtype = torch.float64, **changes: object) -> CausalLM:
    return tiny.build_with_lora(replace(tiny.LLAMA, **changes), LORA, dtype)


def gradients_of(
    model: CausalLM, data: list[Encoded], size: int, packing: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = accumulate_gradients(model, batches(data, size, packing))
    return loss, tiny.gradients(model)


@given(st.lists(st.integers(2, 14), min_size=8, max_size=8), st.sampled_from([1, 2, 3, 5]), st.booleans())
def test_any_cut_of_a_step_gives_the_same_gradient(lengths: list[int], size: int, packing: bool) -> None:
    model, data = lora_model(), rows(lengths)
    loss, whole = gradients_of(model, data, 8)
    cut_loss, cut = gradients_of(model, data, size, packing)
    assert abs(loss - cut_loss) <= 1e-12 * abs(loss)
    tiny.assert_same(cut, whole)


def test_the_mean_of_means_is_another_number() -> None:
    """The law above could not fail if every micro-batch had as many targets as the next."""
    model, data = lora_model(), rows([3, 14, 4, 13])
    parts = batches(data, 1)
    means = [float(batch_loss_sum(model, b).detach() / b.num_targets) for b in parts]
    loss, _ = gradients_of(model, data, 1)
    assert abs(loss - sum(means) / 4) > 1e-3


def test_loss_is_the_mean_over_supervised_tokens_by_hand() -> None:
    model, data = lora_model(), rows([7, 5])
    loss, _ = gradients_of(model, data, 2)
    total, count = 0.0, 0
    for row in data:
        log_probs = model(torch.tensor([row.input_ids]))[0].log_softmax(-1)
        for t, (token, flag) in enumerate(zip(row.input_ids, row.supervised, strict=True)):
            if flag and t > 0:
                total, count = total - float(log_probs[t - 1, token].detach()), count + 1
    assert loss == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_gradient(kind: str) -> None:
    data = rows([9, 6, 4])
    _, kept = gradients_of(lora_model(), data, 3)
    model = lora_model()
    set_checkpointing(model, kind)
    _, recomputed = gradients_of(model, data, 3)
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize(("kind", "share"), [("selective", 0.9), ("full", 0.75)])
def test_recomputation_saves_memory(kind: str, share: float) -> None:
    def kept_bytes(checkpointing: str) -> int:
        model = lora_model()
        set_checkpointing(model, checkpointing)
        (batch,) = batches(rows([12] * 6), 6)
        with MemoryTracker() as tracker:
            loss = batch_loss_sum(model, batch)
        assert loss.grad_fn is not None
        return sum(num_bytes for _, num_bytes in tracker.events)

    assert kept_bytes(kind) < share * kept_bytes("none")


def test_norms_and_products_are_computed_again_for_backward() -> None:
    """Two norms and a product of gate and up, a layer, are not kept; the gradients have the same bits."""

    def kept(keeps_all: bool) -> tuple[int, dict[str, Tensor]]:
        model = lora_model()
        for block in model.modules():
            if isinstance(block, (Layer, MLP)):
                block.keeps_all = keeps_all
        (batch,) = batches(data, 3)
        with MemoryTracker() as tracker:
            loss = batch_loss_sum(model, batch)
        num_bytes = sum(n for _, n in tracker.events)
        loss.backward()
        return num_bytes, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    data = rows([9, 6, 4])
    (more, expected), (less, found) = kept(True), kept(False)
    config, num_tokens = lora_model().config, batches(data, 3)[0].input_ids.numel()
    # The last layer computes little more than the targets.
    assert more - less >= (config.num_layers - 1) * num_tokens * (2 * config.hidden_size + config.intermediate_size) * 8
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_what_stays_for_backward_may_not_change() -> None:
    """Under the hooks that compute again, autograd does not look; we do."""
    model = tiny.build(tiny.LLAMA)
    (batch,) = batches(rows([5]), 1)
    loss = batch_loss_sum(model, batch)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_computed_again_for_what_has_no_gradient() -> None:
    """An adapter on down_proj alone, in the first layer: gate and up are kept by nobody, so their product is."""

    def kept(keeps_all: bool) -> int:
        model = tiny.build(replace(tiny.LLAMA, num_layers=1))
        apply_lora_(model, replace(LORA, targets=("down_proj",)))
        for block in model.modules():
            if isinstance(block, (Layer, MLP)):
                block.keeps_all = keeps_all
        (batch,) = batches(rows([9, 6, 4]), 3)
        with MemoryTracker() as tracker:
            loss = batch_loss_sum(model, batch)
        assert loss.requires_grad
        return sum(n for _, n in tracker.events)

    assert kept(False) == kept(True)


# ---- only what is needed ----


def ready_for(kind: str, config: ModelConfig) -> CausalLM:
    """A random model in fp64, made ready for a method; adapters are random in both factors."""
    model = tiny.build(config)
    if kind == "nf4":
        quantize_(model, QuantConfig(block_size=32))
    if kind == "full":
        return model
    apply_lora_(model, replace(LORA, use_dora=kind == "dora"))
    for path, layer in lora_modules(model).items():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = tiny.randn(*factor.shape, seed=len(path), dtype=factor.dtype) * 0.4
    return model


def by_the_plain_path(model: CausalLM, batch: Batch) -> torch.Tensor:
    hidden = model.hidden(batch.input_ids, segment_ids=batch.segment_ids, prefix_length=batch.prefix_length)
    return cross_entropy_sum(model.head(hidden).flatten(0, 1), batch.target_ids.flatten())


EVERY_FAMILY = {**tiny.FAMILIES, **tiny.SWITCHED_FAMILIES}


@pytest.mark.parametrize(
    ("kind", "family"),
    [("lora", name) for name in EVERY_FAMILY]
    + [(kind, name) for kind in ("dora", "nf4", "full") for name in ("qwen3", "gemma3")],
)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_last_layer_computes_targets_alone_and_no_gradient_changes(kind: str, family: str, layout: str) -> None:
    model, data = ready_for(kind, EVERY_FAMILY[family]), rows([9, 2, 6, 7, 5])
    data[2] = replace(data[2], supervised=[False, True, False, True, False, False])  # targets with gaps, none at the end
    if layout == "shared":
        data = [replace(row, input_ids=[1, 2, 3, *row.input_ids], supervised=[False] * 3 + row.supervised) for row in data]
    (batch,) = batches(data, 5, layout != "padded", layout == "shared")
    assert bool(batch.prefix_length) == (layout == "shared")
    plain = by_the_plain_path(model, batch)
    plain.backward()
    expected = tiny.gradients(model)
    seen: list[int] = []
    last = model.model.layers[-1]
    for block in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp):
        block.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    for checkpointing in ("none", "selective", "full"):
        set_checkpointing(model, checkpointing)
        loss = batch_loss_sum(model, batch)
        assert seen == [batch.num_targets] * 3
        loss.backward()
        tiny.assert_close(loss, plain)
        tiny.assert_same(tiny.gradients(model), expected)
        seen.clear()


def test_the_last_layer_computes_all_rows_while_an_adapter_drops_out() -> None:
    model = tiny.build_with_lora(tiny.LLAMA, replace(LORA, dropout=0.5), torch.float64)
    (batch,) = batches(rows([9, 4]), 2)
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    batch_loss_sum(model, batch)
    batch_loss_sum(model.eval(), batch)
    assert seen == [18, batch.num_targets]


@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_no_gradient_goes_below_the_first_adapter(kind: str) -> None:
    """What enters the first layer's q, k and v depends on nothing that is trained: no product with their weights is made."""
    model, inputs = ready_for(kind, replace(tiny.LLAMA, num_layers=1)), {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name.rpartition(".")[2]: args[0]}))
        for name, layer in lora_modules(model).items()
    ]
    needed = {"o_proj", "gate_proj", "up_proj", "down_proj"}
    for _ in range(2):  # each layer watched, so called by itself; then k with v, and gate with up
        with mock.patch.object(lora_fused, "frozen_linear_t", wraps=lora_fused.frozen_linear_t) as product:
            batch_loss_sum(model, batches(rows([6, 5]), 2)[0]).backward()
        assert product.call_count == len(needed)
        for handle in handles:
            handle.remove()
    assert {name for name, x in inputs.items() if x.requires_grad} == needed


def run(**changes: object) -> RunConfig:
    return RunConfig(model="m", data="d", out="o", rank=2, alpha=3.0, **changes)


def make_optimizer(model: CausalLM) -> MasterAdamW:
    return MasterAdamW({n: p for n, p in model.named_parameters() if p.requires_grad}, betas=(0.9, 0.999), weight_decay=0.0)


def state_of(model: CausalLM, optimizer: MasterAdamW) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optimizer.state().items()} | {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(poison: float) -> None:
    model = lora_model(torch.float32)
    optimizer = make_optimizer(model)
    assert not train_step(model, optimizer, batches(rows([6, 5]), 2), 1e-2).skipped
    with torch.no_grad():
        norm = model.model.norm.weight
        norm[0] = poison
    before = state_of(model, optimizer)
    result = train_step(model, optimizer, batches(rows([6, 5], seed=1), 2), 1e-2)
    assert result.skipped
    after = state_of(model, optimizer)
    assert all(torch.equal(after[k], before[k]) or "model.norm" in k for k in before)
    with torch.no_grad():
        norm[0] = 1.0
    assert not train_step(model, optimizer, batches(rows([6, 5]), 2), 1e-2).skipped


def test_clipping_scales_to_the_norm() -> None:
    data, clipped, free = rows([6, 5, 9]), lora_model(), lora_model()
    norms = []

    def spy(model: CausalLM, clip: float) -> dict[str, torch.Tensor]:
        optimizer = make_optimizer(model)
        seen: dict[str, torch.Tensor] = {}
        step = optimizer.adamw.step
        optimizer.adamw.step = lambda: (seen.update(tiny.gradients(model)), step())[1]
        norms.append(train_step(model, optimizer, batches(data, 3), 1e-3, clip).grad_norm)
        return seen

    small, whole = spy(clipped, 0.01), spy(free, 0.0)
    assert norms[0] == norms[1] > 0.01
    assert float(torch.cat([g.flatten() for g in small.values()]).norm()) == pytest.approx(0.01, rel=1e-3)
    tiny.assert_same({k: v * float(norms[0]) / 0.01 for k, v in small.items()}, whole, 1e-3)


def test_self_check_finds_a_silent_adapter() -> None:
    model = lora_model()
    accumulate_gradients(model, batches(rows([6, 5]), 2))
    check_gradients(model)
    model.model.layers[1].mlp.up_proj.lora_B.grad = None
    model.model.layers[1].mlp.up_proj.lora_A.grad = None
    with pytest.raises(UserError, match=r"no-gradient.*layers\.1\.mlp\.up_proj"):
        check_gradients(model)


def test_self_check_finds_a_frozen_weight_with_gradient() -> None:
    model = lora_model()
    accumulate_gradients(model, batches(rows([6, 5]), 2))
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    with pytest.raises(UserError, match=r"frozen-gradient.*model\.norm\.weight"):
        check_gradients(model)


def test_lora_trains_adapters_and_nothing_else() -> None:
    model = tiny.build(tiny.LLAMA, torch.float32)
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    trained = prepare_method(model, run())
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == 2 * 7 * tiny.LLAMA.num_layers
    optimizer = make_optimizer(model)
    for seed in range(3):
        train_step(model, optimizer, batches(rows([6, 5], seed), 2), 1e-2)
    now = {k.replace(".base.", "."): v for k, v in model.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    assert all(bool(p.any()) for p in trained.values())


def test_dropout_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    model = tiny.build_with_lora(tiny.LLAMA, replace(LORA, dropout=0.5), torch.float64)
    data = batches(rows([9, 8, 7]), 3)

    def loss(seed: int) -> float:
        model.zero_grad(set_to_none=True)
        return accumulate_gradients(model, data, seed)

    torch.manual_seed(7)
    undisturbed = torch.rand(3)
    torch.manual_seed(7)
    first, other, again = loss(1), loss(2), loss(1)
    assert first == again != other
    assert torch.equal(torch.rand(3), undisturbed)


@pytest.mark.slow
@few
@given(seed=st.integers(0, 99))
def test_dropout_masks_belong_to_rows_however_they_lie(seed: int) -> None:
    model = tiny.build_with_lora(tiny.LLAMA, replace(LORA, dropout=0.5), torch.float64)
    data = rows([9, 8, 7, 5], seed)
    layouts = [batches(data, size, packing, share_prefix=False) for size in (4, 2, 1) for packing in (False, True)]
    found = []
    for layout in [*layouts, batches(data[::-1], 4)]:
        accumulate_gradients(model, layout, seed)
        found.append(tiny.gradients(model))
    for other in found[1:]:
        tiny.assert_same(other, found[0])


def test_a_dropout_mask_hides_its_share_and_keeps_the_mean() -> None:
    layer = RowDropout(0.25)
    layer.draws = RowDraws(3, 0, [(0, 40, 1), (40, 90, 2)])
    mask = layer(torch.ones(100, 400, dtype=torch.float64))
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert not mask[90:].any()  # padding
    hidden = (mask[:90] == 0).double()
    assert abs(float(hidden.mean()) - 0.25) < 4 * (0.25 * 0.75 / hidden.numel()) ** 0.5
    assert not torch.equal(mask[:40], mask[40:80])  # rows draw for themselves
    layer.draws = replace(layer.draws, layer=1)
    assert not torch.equal(layer(torch.ones(100, 400, dtype=torch.float64)), mask)  # and so do layers


def test_validation_is_a_token_mean_without_dropout() -> None:
    model = tiny.build_with_lora(tiny.LLAMA, replace(LORA, dropout=0.5), torch.float64)
    data = rows([4, 12, 7])
    expected, _ = gradients_of(lora_model(), data, 3)
    assert validation_loss(model, batches(data, 1)) == pytest.approx(expected, rel=1e-12)
    assert model.training


def test_a_step_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="without supervised tokens"):
        accumulate_gradients(lora_model(), batches([Encoded([1, 2, 3], [False] * 3, 1, 0, 3)], 1))


# Made by this test's own loop; a refactor that changes any digit has changed the arithmetic.
GOLDEN = """
3.578460907723 3.896138117392 3.931043807188 4.686405225981 4.396472462121
5.422989111162 3.673543937834 4.895213504876 3.797171017813 2.478992280819
3.018920684292 2.842246267404 2.270610550199 2.553067886878 3.430839954007
3.469240299828 3.074680797343 2.936086645226 2.375630637437 2.338876957084
"""


def golden_trace() -> list[float]:
    model = lora_model()
    optimizer = make_optimizer(model)
    data = rows([4 + (7 * i) % 11 for i in range(24)])
    losses = []
    for step in range(1, 21):
        chosen = [data[i] for i in step_rows(step, 4, len(data), seed=5)]
        losses.append(train_step(model, optimizer, batches(chosen, 2), 0.02, clip=1.0).loss)
    return losses


def test_golden_twenty_step_trace() -> None:
    """fp64, so that one digest fits every CPU: its order of summation differs below the digits that are kept."""
    expected = [float(x) for x in GOLDEN.split()]
    assert golden_trace() == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]
