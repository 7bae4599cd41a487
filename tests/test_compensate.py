"""Compensated merging: never worse than plain rounding, valid 4 bits, and each way against its definition by brute force."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, LLAMA_BIASES, assert_close, build, randn
from tiny_folder import CONFIG, write_model
from torch import Tensor

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.formats import load_model, save_quantized
from minisft.lora import LoRALinear
from minisft.merge_weights import merge
from minisft.merging.compensate import compensate_layer, requantize_compensated
from minisft.merging.grid_codes import DAMPING, METHODS, Grid, Method, descend, gptq, output_error, round_stochastically
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, codebook, dequantize, quantize, unpack
from minisft.nf4_linear import NF4Linear
from minisft.surgery import apply_lora_, lora_modules, nf4_modules, quantize_, weight_bytes

pytestmark = pytest.mark.slow

FITTED = ("gptq", "descent", "both")  # to text
FIELDS = ("packed", "absmax", "absmax2", "offset", "levels")
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4], [1], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
every_method = pytest.mark.parametrize("method", METHODS)


def adapted(config: ModelConfig = LLAMA, scale: float = 0.05, quant: QuantConfig | None = None) -> CausalLM:
    """A tiny model in 4 bits whose adapters were trained a little."""
    model = build(config, torch.float32)
    quantize_(model, quant or QuantConfig())
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    for i, adapter in enumerate(lora_modules(model).values()):
        adapter.lora_B.data = scale * randn(*adapter.lora_B.shape, seed=i, dtype=torch.float32)
    return model


def layer(levels: str, double_quant: bool, ratio: float, seed: int, shape: tuple[int, int] = (5, 41)) -> LoRALinear:
    """One adapted layer with |D| about ``ratio`` |W|; its blocks do not end where its rows do."""
    weight = randn(*shape, seed=seed, dtype=torch.float32)
    adapter = LoRALinear(NF4Linear(quantize(weight, 64, double_quant, levels)), rank=2, alpha=2.0)
    adapter.lora_A.data = randn(2, shape[1], seed=seed + 1, dtype=torch.float32)
    adapter.lora_B.data = ratio / 2**0.5 * randn(shape[0], 2, seed=seed + 2, dtype=torch.float32)
    return adapter


def inputs(count: int, width: int, seed: int) -> Tensor:
    """Correlated, as activations are: a few directions are much larger than the others."""
    mixing = randn(width, width, seed=seed) * torch.arange(1, width + 1).double() ** -0.7
    return (randn(count, width, seed=seed + 1) @ mixing.T).float()


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error_of(x: Tensor, q: QuantizedWeight, adapter: LoRALinear) -> float:
    """|X (W' - W - D)^T|, by its definition, in fp64."""
    D = adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    W = dequantize(adapter.base.quantized, torch.float32).double()
    return float((x.double() @ (dequantize(q, torch.float32).double() - W - D).T).detach().norm() / len(x) ** 0.5)


def same(a: QuantizedWeight, b: QuantizedWeight, fields: tuple[str, ...] = FIELDS) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


# ---- one layer -------------------------------------------------------------------------------------------------------

every_levels = st.sampled_from(["nf4", "fp4", "int4"])
ratios = st.integers(-9, 1).map(lambda exponent: 2.0**exponent)
seeds = st.integers(0, 2**20)


@given(every_levels, st.booleans(), ratios, st.sampled_from(FITTED), st.integers(2, 60), seeds)
def test_never_worse_than_rounding_each_weight_for_itself(
    levels: str, double_quant: bool, ratio: float, method: Method, count: int, seed: int
) -> None:
    adapter, x = layer(levels, double_quant, ratio, seed), inputs(count, 41, seed)
    base = adapter.base.quantized
    plain = quantize(dequantize(base) + adapter.delta_weight(), 64, double_quant, levels)
    q, report = compensate_layer("layer", adapter, plain, moments_of(x), method)
    before, after, size = error_of(x, plain, adapter), error_of(x, q, adapter), error_of(x, base, adapter)
    assert after <= min(before, size) * (1 + 1e-4)
    assert report.output_error == pytest.approx(after / size, rel=1e-3, abs=1e-4)
    assert report.plain_output_error == pytest.approx(before / size, rel=1e-3, abs=1e-4)
    assert report.moved == float((unpack(q.packed, 205) != unpack(base.packed, 205)).double().mean())


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize(("ratio", "most"), [(0.03, 0.9), (0.1, 0.6), (0.2, 0.4)])
def test_an_adapter_that_plain_rounding_loses_survives(method: Method, ratio: float, most: float) -> None:
    """Judged on inputs that were not read."""
    adapter, seen, unseen = layer("nf4", True, ratio, 3, (64, 192)), inputs(2000, 192, 5), inputs(2000, 192, 5)[1000:]
    base = adapter.base.quantized
    plain = quantize(dequantize(base) + adapter.delta_weight())
    q, _ = compensate_layer("layer", adapter, plain, moments_of(seen[:1000]), method)
    assert error_of(unseen, q, adapter) < most * error_of(unseen, base, adapter)
    assert error_of(unseen, q, adapter) < 0.8 * error_of(unseen, plain, adapter)


@given(every_levels, st.booleans(), ratios, st.sampled_from(METHODS), seeds)
def test_what_comes_out_is_valid(levels: str, double_quant: bool, ratio: float, method: Method, seed: int) -> None:
    """The base's scales and layout; and each block's scale is still its largest magnitude, as the quantizer would have it."""
    adapter = layer(levels, double_quant, ratio, seed)
    base = adapter.base.quantized
    worst = dataclasses.replace(base, packed=base.packed.flip(0))  # so bad that it is never chosen
    q, _ = compensate_layer("layer", adapter, worst, moments_of(inputs(50, 41, seed)), method)
    assert same(q, base, ("absmax", "absmax2", "offset", "levels"))
    assert (q.block_size, q.shape, q.dtype, q.packed.shape) == (base.block_size, base.shape, base.dtype, base.packed.shape)
    assert {t.data_ptr() for t in tensors(q)}.isdisjoint(t.data_ptr() for t in tensors(base))
    if not double_quant:
        again = quantize(dequantize(q, torch.float32), 64, False, levels)
        assert torch.equal(dequantize(again), dequantize(q))


@every_method
@pytest.mark.parametrize("double_quant", [False, True])
def test_no_update_gives_the_base_bit_for_bit(method: Method, double_quant: bool) -> None:
    model = adapted(scale=0.0, quant=QuantConfig(double_quant=double_quant))
    merged, report = requantize_compensated(model, ROWS, method)
    for old, new in zip(nf4_modules(model).values(), nf4_modules(merged).values(), strict=True):
        assert same(old.quantized, new.quantized)
    assert report.output_error == 0
    assert all((one.moved, one.effect.survival) == (0, 1) for one in report.layers)


def test_text_that_overflows_is_an_error() -> None:
    adapter = layer("nf4", True, 0.1, 0)
    moments = torch.full((41, 41), torch.inf)
    with pytest.raises(UserError, match=r"model\.x") as caught:
        compensate_layer("model.x", adapter, adapter.base.quantized, moments, "both")
    assert caught.value.code == "numeric/calibration-not-finite"


@pytest.mark.parametrize("method", FITTED)
def test_inputs_that_are_always_zero(method: Method) -> None:
    """Nothing can be seen of such a layer: it keeps the base's codes."""
    adapter = layer("nf4", False, 0.1, 0)
    q, report = compensate_layer("layer", adapter, adapter.base.quantized, torch.zeros(41, 41), method)
    assert same(q, adapter.base.quantized)
    assert report.output_error == report.plain_output_error == 0


# ---- the two ways, by brute force ------------------------------------------------------------------------------------


def grid_of(inputs: int, outputs: int, seed: int, levels: str = "nf4") -> tuple[Grid, Tensor, Tensor]:
    """A grid with nothing pinned, a target beside it, and H."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 15, (inputs, outputs), generator=draw, dtype=torch.uint8)
    scales = 0.5 + torch.rand(inputs, outputs, generator=draw)
    grid = Grid(codes, scales, codebook(levels), torch.zeros(inputs, outputs, dtype=torch.bool))
    target = grid.values(codes) + 0.3 * randn(inputs, outputs, seed=seed, dtype=torch.float32)
    return grid, target.clamp(-0.5, 0.5), moments_of(randn(10, inputs, seed=seed + 1, dtype=torch.float32) + 0.7)


def damped_by_hand(H: Tensor) -> Tensor:
    return H.double() + DAMPING * H.double().trace() / len(H) * torch.eye(len(H), dtype=torch.float64)


def cost(e: Tensor, H: Tensor) -> float:
    return float(e.double() @ H @ e.double())


@given(every_levels, seeds)
def test_gptq_of_two_inputs(levels: str, seed: int) -> None:
    """The input with the larger moment is rounded to the nearest; of the 16 codes of the other the best is taken."""
    grid, target, moments = grid_of(2, 3, seed, levels)
    H = damped_by_hand(moments)
    found = grid.values(gptq(grid, target, moments)) - target
    first = int(H.diag().argmax())
    other = 1 - first
    for o in range(3):
        choices = grid.levels[grid.levels.abs() <= 1] * grid.scales[:, o, None] - target[:, o, None]
        leading = choices[first].abs().min()
        assert float(found[first, o].abs()) == pytest.approx(float(leading), abs=1e-6)
        candidates = choices[other][:, None].expand(-1, 2).clone()
        errors = torch.empty_like(candidates)
        errors[:, other], errors[:, first] = choices[other], found[first, o]
        assert cost(found[:, o], H) == pytest.approx(min(cost(e, H) for e in errors), rel=1e-4, abs=1e-7)


@given(st.integers(1, 100), seeds)
def test_gptq_is_the_nearest_plane(width: int, seed: int) -> None:
    """Against the textbook: round, subtract the basis vector, go on; over more than one block of inputs."""
    grid, target, moments = grid_of(width, 2, seed)
    H = damped_by_hand(moments)
    order = H.diag().argsort(stable=True)
    R = torch.linalg.cholesky(H[order][:, order]).T
    values = (grid.levels.double() * grid.scales[..., None])[order]  # (I, O, 16)
    found = grid.values(gptq(grid, target, moments))[order].double()
    wanted = target[order].double()
    for o in range(2):
        residual = R @ wanted[:, o]
        for i in reversed(range(width)):
            best = (R[i, i] * values[i, o] - residual[i]).abs().sort().values
            got = (R[i, i] * found[i, o] - residual[i]).abs()
            assert float(got - best[0]) <= 1e-4 * float(best[1] + 1e-3)  # a tie may fall to either side in fp32
            residual = residual - R[:, i] * found[i, o]


@given(st.integers(1, 80), seeds)
def test_descent_never_climbs(width: int, seed: int) -> None:
    grid, target, moments = grid_of(width, 3, seed)
    H, codes = damped_by_hand(moments), grid.codes
    after = descend(grid, target, moments, codes)
    for o in range(3):
        before = cost((grid.values(codes) - target)[:, o], H)
        assert cost((grid.values(after) - target)[:, o], H) <= before * (1 + 1e-5) + 1e-9


@given(every_levels, seeds)
def test_descent_ends_where_no_single_code_helps(levels: str, seed: int) -> None:
    grid, target, moments = grid_of(4, 2, seed, levels)
    H, codes = damped_by_hand(moments), grid.codes
    for _ in range(4):
        codes = descend(grid, target, moments, codes)
    error = grid.values(codes) - target
    for o, i in itertools.product(range(2), range(4)):
        for level in grid.levels[grid.levels.abs() <= 1]:
            changed = error[:, o].clone()
            changed[i] = level * grid.scales[i, o] - target[i, o]
            assert cost(changed, H) >= cost(error[:, o], H) * (1 - 1e-4) - 1e-7


@given(every_levels, seeds)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(levels: str, seed: int) -> None:
    grid, target, _ = grid_of(3, 2, seed, levels)
    draw, many = torch.Generator().manual_seed(seed), 400
    drawn = torch.stack([grid.values(round_stochastically(grid, target, draw)) for _ in range(many)]).double()
    possible = (grid.levels.double() * grid.scales[..., None]).sort(-1).values
    low = possible.where(possible <= target[..., None], -9).amax(-1)
    high = possible.where(possible > target[..., None], 9).amin(-1)
    assert bool((((drawn - low).abs() < 1e-6) | ((drawn - high).abs() < 1e-6)).all())
    spread = ((high - target) * (target - low)).clamp(min=0).sqrt() / many**0.5  # of a mean of two-valued numbers
    assert bool(((drawn.mean(0) - target).abs() <= 5 * spread + 1e-5).all())


@given(st.integers(1, 6), seeds)
def test_output_error_is_the_mean_square_of_the_outputs(width: int, seed: int) -> None:
    x, e = randn(9, width, seed=seed, dtype=torch.float32), randn(width, 4, seed=seed + 1, dtype=torch.float32)
    assert torch.allclose(output_error(e, moments_of(x)), (x.double() @ e.double()).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("levels", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_grid_stands_for_its_weight(levels: str, double_quant: bool) -> None:
    weight = randn(5, 33, dtype=torch.float32)
    weight[1] = 0  # within a block
    weight.view(-1)[64:128] = 0  # and a whole one
    q = quantize(weight, 64, double_quant, levels)
    grid = Grid.of(q)
    assert torch.equal(grid.values(grid.codes).T + 0.0, dequantize(q, torch.float32))
    assert same(grid.store(q, grid.codes), q)


# ---- a model ---------------------------------------------------------------------------------------------------------


def tensors(q: QuantizedWeight) -> list[Tensor]:
    return [t for name in FIELDS if (t := getattr(q, name)) is not None]


@every_method
@pytest.mark.parametrize("config", [LLAMA, LLAMA_BIASES], ids=["plain", "biases"])
def test_errors_are_those_of_the_merged_models_own_inputs(config: ModelConfig, method: Method) -> None:
    """Run the merged model on the same text, row by row, look at what each layer is given, and compute the report anew."""
    model = adapted(config)
    merged, report = requantize_compensated(model, ROWS, method)
    given: dict[str, list[Tensor]] = {path: [] for path in nf4_modules(merged)}
    for path, linear in nf4_modules(merged).items():
        linear.register_forward_pre_hook(lambda _, args, path=path: given[path].append(args[0].reshape(-1, args[0].shape[-1])))
    for row in ROWS:
        merged(torch.tensor([row]))
    adapters = lora_modules(model)
    assert [one.effect.path for one in report.layers] == list(adapters)
    for one in report.layers:
        adapter, x = adapters[one.effect.path], torch.cat(given[one.effect.path])
        q = nf4_modules(merged)[one.effect.path].quantized
        expected = error_of(x, q, adapter) / error_of(x, adapter.base.quantized, adapter)
        assert one.output_error == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert report.num_tokens == sum(map(len, ROWS))
    assert report.output_error == max(one.output_error for one in report.layers)
    assert method == "stochastic" or report.output_error <= 1 + 1e-6


@every_method
def test_the_model_is_left_whole_and_the_result_repeats(method: Method) -> None:
    model = adapted().train()
    before = copy.deepcopy(model.state_dict())
    first, report = requantize_compensated(model, ROWS, method)
    second, again = requantize_compensated(model, ROWS, method)
    assert report == again
    pairs = zip(nf4_modules(first).values(), nf4_modules(second).values(), strict=True)
    assert all(same(a.quantized, b.quantized) for a, b in pairs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not any(module.training or module._forward_hooks for module in first.modules())
    assert not any(p.requires_grad for p in first.parameters())
    assert not {t.data_ptr() for t in first.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}


def test_rows_do_not_see_each_other() -> None:
    """The order of the rows changes nothing but the order of the sums."""
    merged, report = requantize_compensated(adapted(), ROWS)
    other, turned = requantize_compensated(adapted(), ROWS[::-1])
    assert report.output_error == pytest.approx(turned.output_error, rel=0.05)
    moved = [
        (unpack(a.packed, 100) != unpack(b.packed, 100)).double().mean()
        for a, b in zip(nf4_modules(merged).values(), nf4_modules(other).values(), strict=True)
    ]
    assert float(torch.stack(moved).mean()) < 0.05


def saved(folder: Path) -> CausalLM:
    """A compensated merge, written to ``folder / "merged"``; rows of whole blocks, as bitsandbytes wants them on a CPU."""
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=32)
    model, tokenizer = load_model(write_model(folder / "base", folder / "scratch", config), quant=QuantConfig())
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.05, generator=torch.Generator().manual_seed(1))
    merged, _ = requantize_compensated(model, ROWS)
    assert weight_bytes(merged) == weight_bytes(merge(model, "requantized")[0])
    save_quantized(merged, tokenizer, folder / "merged")
    return merged


def test_bytes_are_those_of_the_base_and_files_give_it_back(tmp_path: Path) -> None:
    merged, ids = saved(tmp_path), torch.tensor(ROWS[:1])
    again, _ = load_model(tmp_path / "merged")
    assert torch.equal(again(ids), merged(ids))


def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    merged, ids = saved(tmp_path), torch.tensor(ROWS[:1])
    # In training mode: in evaluation mode some CPUs repack the weights and round to bf16.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).train()
    with torch.no_grad():
        assert_close(theirs(ids).logits, merged(ids), 1e-5)


@pytest.mark.parametrize("rows", [[], [[]]])
def test_without_text_is_an_error(rows: list[list[int]]) -> None:
    with pytest.raises(UserError) as caught:
        requantize_compensated(adapted(), rows)
    assert caught.value.code == "data/no-calibration"


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="gptq"):
        requantize_compensated(adapted(), ROWS, "nearest")


def test_a_dense_base_is_refused() -> None:
    model = build(LLAMA, torch.float32)
    apply_lora_(model, LoRAConfig(rank=2))
    with pytest.raises(UserError) as caught:
        requantize_compensated(model, ROWS)
    assert caught.value.code == "adapter/base-not-quantized"
