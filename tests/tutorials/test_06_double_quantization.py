"""Page 06 builds the library's double quantization to the bit, and counts on living tensors the bytes an estimate plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from torch import Tensor

from minisft import nf4
from minisft.batching import Batch
from minisft.config import ModelConfig, RunConfig
from minisft.formats.loading import empty_model, expected_shapes, nf4_bytes
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.step import batch_loss_sum, prepare_method, train_step
from minisft.surgery import quantization_targets, quantize_
from minisft.training.memory_estimate import DTYPES, Shape, estimate_step

PAGE = page("06_double_quantization")
BUILD = PAGE.build()
CPU = torch.device("cpu")
Namespace = Mapping[str, Any]
scales = st.builds(
    lambda length, log_scale, spread, seed: made_scales(length, 10.0**log_scale, spread, seed),
    length=st.integers(1, 1500),
    log_scale=st.integers(-4, 2),
    spread=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)


def made_scales(length: int, scale: float, spread: float, seed: int) -> Tensor:
    """Positive numbers; all alike at ``spread`` 0."""
    return scale * (1 + spread * (torch.rand(length, generator=torch.Generator().manual_seed(seed)) - 0.5))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# ---- contracts: the scales -------------------------------------------------------------------------------------------


def agrees_dynamic_map(built: Namespace) -> None:
    assert torch.equal(bits(built["dynamic_map"]()), bits(nf4.dynamic_map(CPU)))


def agrees_quantize_absmax(built: Namespace, absmax: Tensor) -> None:
    codes, absmax2, offset = built["quantize_absmax"](absmax)
    expected_codes, expected_absmax2, expected_offset = nf4.quantize_absmax(absmax)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(bits(absmax2), bits(expected_absmax2))
    assert torch.equal(bits(offset), bits(expected_offset))


def agrees_decode_absmax(built: Namespace, absmax: Tensor) -> None:
    codes, absmax2, offset = nf4.quantize_absmax(absmax)
    q = nf4.QuantizedWeight(
        torch.empty(0, dtype=torch.uint8), codes, absmax2, offset, nf4.codebook("nf4"), 64, torch.Size(), torch.float32
    )
    assert torch.equal(built["decode_absmax"](codes, absmax2, offset), nf4.decode_absmax(q))


def test_dynamic_map_equals_the_library() -> None:
    agrees_dynamic_map(BUILD)


@given(scales)
def test_quantize_absmax_equals_the_library(absmax: Tensor) -> None:
    agrees_quantize_absmax(BUILD, absmax)


@given(scales)
def test_decode_absmax_equals_the_library(absmax: Tensor) -> None:
    agrees_decode_absmax(BUILD, absmax)


# ---- contracts: the bill ---------------------------------------------------------------------------------------------

runs = st.builds(
    lambda method, dtype, rank, rows, tokens: run_of(
        dtype=dtype, batch_size=rows, max_length=tokens, **METHODS[method], **({} if method == "full" else {"rank": rank})
    ),
    method=st.sampled_from(["full", "lora", "qlora"]),
    dtype=st.sampled_from(["bf16", "fp32"]),
    rank=st.integers(1, 5),
    rows=st.integers(1, 3),
    tokens=st.integers(8, 40),
)
METHODS: dict[str, dict[str, str]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "lora", "quant": "nf4"},
}


def run_of(**changes: Any) -> RunConfig:
    return RunConfig(**{"model": "", "data": "", "out": "", "device": "cpu", "dtype": "bf16", **changes})


def model_of(num_layers: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        "llama", 96, 32, 48, num_layers=num_layers, num_heads=4, num_kv_heads=2, head_dim=8, tie_word_embeddings=tied
    )  # fmt: skip


def agrees_bill(built: Namespace, config: ModelConfig, run: RunConfig) -> None:
    """Every line to the byte. Among the activations an estimate also counts the loss, up to two integers a token and three a
    row, which are alive when backward begins and not needed by it."""
    counted, expected = measured(built, config, run), planned(config, run)
    assert counted.keys() == expected.keys()
    alive = 2 * 8 * run.batch_size * run.max_length + 3 * 8 * run.batch_size + 4
    for line, num_bytes in expected.items():
        not_counted = num_bytes - counted[line]
        assert 0 <= not_counted <= (alive if line == "activations" else 0), f"{line}: {counted[line]}, planned {num_bytes}"


def measured(built: Namespace, config: ModelConfig, run: RunConfig) -> dict[str, int]:
    model = CausalLM(config).to(DTYPES[run.dtype])
    if run.quantization is not None:
        quantize_(model, run.quantization)
    optimizer = MasterAdamW(prepare_method(model, run), betas=(0.9, 0.999), weight_decay=0.0)
    ids = torch.randint(0, config.vocab_size, (run.batch_size, run.max_length), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, torch.ones_like(ids), ids.numel(), ids.numel(), ())
    train_step(model, optimizer, [batch], lr=1e-4)
    return built["bill"](model, optimizer, lambda: batch_loss_sum(model, batch))


def planned(config: ModelConfig, run: RunConfig) -> dict[str, float]:
    model = empty_model(config)
    shapes, quant = expected_shapes(model), run.quantization
    packed = {} if quant is None else {f"{path}.weight": quant for path in quantization_targets(model, quant)}
    numbers = [math.prod(shapes[name]) for name in packed]
    codes = sum(numbers) // 2
    step = estimate_step(run, Shape(config, shapes, packed), CPU).whole
    kinds = ("adapters", "weights", "gradients", "optimizer", "activations")
    return {"codes": codes, "scales": sum(nf4_bytes(n, quant) for n in numbers) - codes, **{kind: step[kind] for kind in kinds}}


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(1, 4), st.booleans(), runs)
def test_bill_equals_the_library(num_layers: int, tied: bool, run: RunConfig) -> None:
    agrees_bill(BUILD, model_of(num_layers, tied), run)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    agrees_dynamic_map(built)
    for absmax in (made_scales(700, 0.05, 0.5, 0), made_scales(1, 0.05, 0.0, 0)):
        agrees_quantize_absmax(built, absmax)
        agrees_decode_absmax(built, absmax)
    for method in ("full", "qlora"):
        agrees_bill(built, model_of(2, tied=True), run_of(batch_size=2, max_length=32, **METHODS[method]))


MUTANTS = [
    ("one decade fewer", "range(7)", "range(6)"),
    ("decades from 0 instead of a tenth", "torch.linspace(0.1, 1.0, 2**i + 1)", "torch.linspace(0.0, 1.0, 2**i + 1)"),
    ("edges for middles", "((edges[:-1] + edges[1:]) / 2)", "edges[1:]"),
    ("the mean is not taken off", "pad(absmax - offset,", "pad(absmax,"),
    ("the mean is not put back", "codes.int()] * scales + offset", "codes.int()] * scales"),
    ("the median for the mean", "absmax.mean()", "absmax.median()"),
    ("no guard for scales that are all alike", "1 / absmax2.clamp(min=nf4.TINY)", "1 / absmax2"),
    ("rounded down instead of to the nearest", "(levels[:-1] + levels[1:]) / 2)", "levels[1:])"),
    ("scales of scales in the wrong order", "absmax2.repeat_interleave(256)", "absmax2.repeat(256)"),
    ("weights kept for backward are paid twice", " if place not in seen)", ")"),
    ("views of a block are paid each", "t.untyped_storage().data_ptr(): t", "id(t): t"),
    ("only one moment of two", "optimizer.state().values()", "[s['exp_avg'] for s in optimizer.adamw.state.values()]"),
    ("no gradients, but weights", "master.grad for master in optimizer.master_weights", "p for p in optimizer.parameters"),
]  # fmt: skip


@pytest.mark.slow
def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------


def _nearest_of_nan(block: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(block / block.abs().max(), (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _zero_gets_code_0(block: Tensor, levels: Tensor) -> Tensor:
    return _nearest_of_nan(block, levels) if block.any() else torch.zeros(len(block), dtype=torch.uint8)


def _rounded_down(block: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(block / block.abs().max().clamp(min=1e-38), levels[1:]).to(torch.uint8)


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "bits_per_weight": [
        (lambda block_size: 4 + 8 / block_size, "second level is missing"),
        (lambda block_size: 4 + 32 / block_size, "without double quantization"),
        (lambda block_size: 4 + 8 / block_size + 32 / 256, "the tensors say"),
    ],
    "block_codes": [
        (_nearest_of_nan, "0 / 0 is NaN and took code 15"),
        (_zero_gets_code_0, "took code 0"),
        (_rounded_down, "other codes than page 05"),
        (lambda block, levels: _nearest_of_nan(block, levels).int(), "torch.uint8"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


def test_the_codes_by_hand_follow_from_the_rule() -> None:
    """Closed form: the part of the largest decade that a number lies in, counted from the place of zero."""

    def code(d: float) -> int:
        if abs(d) < 0.1:
            raise ValueError("only the largest decade")
        return 127 + 1 + 63 + int((abs(d) - 0.1) / 0.9 * 64)

    codes = BUILD["quantize_absmax"](torch.tensor([20.0, 24, 22, 18, 21, 19, 20, 16, 20, 23, 17, 20]))[0].tolist()
    assert codes == [
        127,
        255,
        code(0.5),
        254 - code(0.5),
        code(0.25),
        254 - code(0.25),
        127,
        0,
        127,
        code(0.75),
        254 - code(0.75),
        127,
    ]
