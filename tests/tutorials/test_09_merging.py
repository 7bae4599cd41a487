"""Page 09: its merging, its way back and its measures against the library's; its counter of marks against all of bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import page, wrong_answers_test
from torch import Tensor, nn

from minisft import merge_weights
from minisft.lora import LoRALinear

pytestmark = pytest.mark.slow

PAGE = "09_merging"
Namespace = dict[str, Any]
Adapter = tuple[Tensor, Tensor, float]

SIZES = st.integers(2, 40)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 99)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted(dtype: torch.dtype, shape: tuple[int, int], rank: int, alpha: float, seed: int) -> nn.Sequential:
    """A layer with a bias, one that nobody adapted, and one without a bias."""
    outputs, inputs = shape
    tree = nn.Sequential(
        LoRALinear(nn.Linear(inputs, outputs, dtype=dtype), rank, alpha),
        nn.Linear(outputs, inputs, dtype=dtype),
        nn.ModuleDict({"inner": LoRALinear(nn.Linear(inputs, outputs, bias=False, dtype=dtype), rank, alpha)}),
    )
    with torch.no_grad():
        for index, parameter in enumerate(tree.parameters()):
            parameter.copy_(random(seed + index, *parameter.shape))
    return tree


def same_bits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in state.items()
    )


# ---- what the page builds equals the library's -----------------------------------------------------------------------


def agrees_merged_weight(namespace: Namespace, weight: Tensor, delta: Tensor) -> None:
    """Bit for bit, in the same wide dtype."""
    ours, theirs = namespace["merged_weight"](weight, delta), merge_weights.merged_weight(weight, delta)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, DTYPES, st.sampled_from([torch.float32, torch.float64]), SEEDS)
def test_merged_weight_equals_the_library(outputs: int, inputs: int, dtype: torch.dtype, wide: torch.dtype, seed: int) -> None:
    delta = random(seed + 1, outputs, inputs, dtype=wide) * (random(seed + 2, outputs, inputs) > 0)  # and zeros in it
    agrees_merged_weight(page(PAGE).build(), random(seed, outputs, inputs, dtype=dtype), delta)


def agrees_merge_(namespace: Namespace, model: nn.Sequential, dtype: torch.dtype | None) -> None:
    """The same weights and biases, bit for bit; what is not adapted stays what it was."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    untouched = ours[1]
    kept = namespace["merge_"](ours, dtype)
    merge_weights.merge_(theirs, dtype)
    assert same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert list(kept) == ["0", "2.inner"]
    assert ours[1] is untouched
    assert not any(isinstance(layer, LoRALinear) for layer in ours.modules())


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 2), st.floats(-4, 16), DTYPES, st.none() | DTYPES, SEEDS)
def test_merge__equals_the_library(
    outputs: int, inputs: int, rank: int, alpha: float, base: torch.dtype, dtype: torch.dtype | None, seed: int
) -> None:
    agrees_merge_(page(PAGE).build(), adapted(base, (outputs, inputs), rank, alpha, seed), dtype)


def agrees_unmerge_(namespace: Namespace, model: nn.Sequential) -> None:
    """Every bit of both is back, and the modules are the ones that stood there."""
    before, modules = copy.deepcopy(dict(model.state_dict())), dict(model.named_modules())
    theirs = copy.deepcopy(model)
    for _ in range(3):
        namespace["unmerge_"](model, namespace["merge_"](model))
        merge_weights.merge_(theirs)
        merge_weights.unmerge_(theirs)
    assert same_bits(dict(model.state_dict()), before)
    assert same_bits(dict(theirs.state_dict()), before)
    assert dict(model.named_modules()) == modules


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, DTYPES, SEEDS)
def test_unmerge__equals_the_library(outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> None:
    agrees_unmerge_(page(PAGE).build(), adapted(dtype, (outputs, inputs), 2, 3.0, seed))


def agrees_effect_of(namespace: Namespace, base: Tensor, delta: Tensor, stored: Tensor) -> None:
    """Up to the order of sums in fp64."""
    measure = merge_weights.Effect()
    measure.add(base, delta, stored)
    report = measure.report("")
    wanted = report.delta_ratio, report.fraction_lost, report.effect_error, report.survival
    torch.testing.assert_close(namespace["effect_of"](base, delta, stored), wanted, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, DTYPES, st.integers(-14, 1), SEEDS)
def test_effect_of_equals_the_library(outputs: int, inputs: int, dtype: torch.dtype, size: int, seed: int) -> None:
    base = random(seed, outputs, inputs, dtype=dtype)
    delta = 2.0**size * random(seed + 1, outputs, inputs)
    delta[0] = 0  # a row that asks for nothing
    agrees_effect_of(page(PAGE).build(), base, delta, merge_weights.merged_weight(base, delta).to(dtype))


# ---- and what no library object says ---------------------------------------------------------------------------------


def agrees_ulps(namespace: Namespace) -> None:
    """All finite numbers of bf16 in order are one mark apart each; in fp32 ``nextafter`` walks the marks."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = bits[bits.float().isfinite()].float().unique().bfloat16()  # sorted; -0.0 and 0.0 are one number
    assert namespace["ulps"](numbers[1:], numbers[:-1]).unique().tolist() == [1]
    assert namespace["ulps"](numbers, numbers).unique().tolist() == [0]
    start = random(3, 50) * 1e-3
    walked = start.clone()
    for _ in range(5):
        walked = torch.nextafter(walked, torch.tensor(-1.0))
    assert namespace["ulps"](start, walked).unique().tolist() == [5]
    assert namespace["ulps"](torch.tensor([-0.0]), torch.tensor([0.0])).tolist() == [0]


def test_the_counter_counts_marks() -> None:
    agrees_ulps(page(PAGE).build())


# ---- bugs that must not pass -----------------------------------------------------------------------------------------

MUTANTS = [
    ("added in the narrow dtype", "torch.promote_types(weight.dtype, delta.dtype)", "weight.dtype"),
    ("D is rounded before it is added", "delta.to(wide)", "delta.to(weight.dtype).to(wide)"),
    ("subtracted", "weight.to(wide) + delta.to(wide)", "weight.to(wide) - delta.to(wide)"),
    ("the scaling is forgotten", "layer.scaling * (layer.lora_B @ layer.lora_A)", "layer.lora_B @ layer.lora_A"),
    ("alpha instead of alpha / rank", "layer.scaling *", "layer.alpha *"),
    ("the bias is dropped", "requires_grad=False), base.bias", "requires_grad=False), None"),
    ("the dtype is not asked", "dtype or base.weight.dtype", "base.weight.dtype"),
    ("the base is overwritten", "base = layer.base\n", "base = layer.base; base.weight += 1\n"),
    ("only the top of the tree", "model.named_modules()", "model.named_children()"),
    ("nothing is put back", "model.set_submodule(path, layer)", "pass"),
    ("lost counts what asked for nothing", "E[D != 0]", "E"),
    ("the error is a share of W", "(E - D).norm() / D.norm()", "(E - D).norm() / W.norm()"),
    ("survival is a share of what arrived", "(E * D).sum() / (D * D).sum()", "(E * D).sum() / (E * E).sum()"),
    ("measured on what is stored", "E = after - W", "E = after - W - D"),
    ("negative numbers count backwards", "torch.where(m < 0, lowest - m, m)", "m"),
]


def agrees(namespace: Namespace) -> None:
    base, delta = random(1, 24, 17, dtype=torch.bfloat16), 2.0**-7 * random(2, 24, 17)
    delta[3] = 0
    agrees_merged_weight(namespace, base, delta)
    agrees_merge_(namespace, adapted(torch.bfloat16, (9, 14), 2, 5.0, 4), None)
    agrees_merge_(namespace, adapted(torch.float32, (9, 14), 2, 5.0, 4), torch.float16)
    agrees_unmerge_(namespace, adapted(torch.float32, (9, 14), 2, 5.0, 4))
    agrees_effect_of(namespace, base, delta, merge_weights.merged_weight(base, delta).bfloat16())
    agrees_ulps(namespace)


@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutated_page_disagrees(old: str, new: str) -> None:
    agrees(page(PAGE).build())
    with pytest.raises(AssertionError):
        agrees(page(PAGE).build(mutate=(old, new)))


# ---- answers that must not pass --------------------------------------------------------------------------------------


def _swallowed(W: Tensor, D: Tensor, dtype: torch.dtype) -> float:
    stored = merge_weights.merged_weight(W, D).to(dtype)
    return float((stored.double() == W.double())[D != 0].double().mean())


def search(scale: Callable[[Tensor, Tensor, float], Tensor], sizes: list[float], limit: float = 0.05) -> Callable[..., float]:
    return lambda W, D, dtype: next((s for s in sizes if _swallowed(W, scale(W, D, s), dtype) <= limit), 1.0)


def _to_size(W: Tensor, D: Tensor, size: float) -> Tensor:
    return D * (size * W.float().norm() / D.norm())


RISING, FALLING = [2.0**-k for k in range(14, -1, -1)], [2.0**-k for k in range(15)]


def _exponent(W: Tensor, D: Tensor, dtype: torch.dtype) -> float:
    return -7


def _one_scaling(W: Tensor, first: Adapter, second: Adapter, dtype: torch.dtype) -> Tensor:
    return merge_weights.merged_weight(W, first[2] * (first[1] @ first[0] + second[1] @ second[0])).to(dtype)


def _both_scalings(W: Tensor, first: Adapter, second: Adapter, dtype: torch.dtype) -> Tensor:
    return merge_weights.merged_weight(W, first[2] * second[2] * (first[1] @ first[0] + second[1] @ second[0])).to(dtype)


def _one_after_the_other(W: Tensor, first: Adapter, second: Adapter, dtype: torch.dtype) -> Tensor:
    for lora_A, lora_B, scaling in (first, second):
        W = merge_weights.merged_weight(W, scaling * lora_B @ lora_A).to(dtype)
    return W


def _only_the_first(W: Tensor, first: Adapter, second: Adapter, dtype: torch.dtype) -> Tensor:
    return merge_weights.merged_weight(W, first[2] * first[1] @ first[0]).to(dtype)


def _not_rounded(W: Tensor, first: Adapter, second: Adapter, dtype: torch.dtype) -> Tensor:
    return merge_weights.merged_weight(W, first[2] * first[1] @ first[0] + second[2] * second[1] @ second[0])


WRONG = {
    "smallest_size": [
        (search(lambda W, D, s: D * s, RISING), "Is D scaled|look for the smallest"),
        (search(_to_size, FALLING), "look for the smallest"),
        (search(_to_size, RISING, limit=0.5), "lost"),
        (_exponent, "power of two itself"),
    ],
    "merge_two": [
        (_one_scaling, "each adapter has its own scaling"),
        (_both_scalings, "multiplied with each other"),
        (_one_after_the_other, "round once"),
        (_only_the_first, "not W"),
        (_not_rounded, "not the dtype"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(page(PAGE), WRONG)
