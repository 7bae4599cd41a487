"""Page 03 builds the library's adapter: same start, outputs, gradients, names and counts; a build with a bug does not pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from tiny import LLAMA, QWEN3, VOCAB, assert_close, assert_same, build, gradients, randn
from torch import Tensor, nn

from minisft.config import LoRAConfig
from minisft.lora import LoRALinear
from minisft.surgery import apply_lora_, lora_modules, num_parameters

PAGE = page("03_lora_from_one_matrix")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
sizes = st.integers(1, 40)
names = st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=4, unique=True)
seeds = st.integers(0, 2**16)


# ---- contracts -------------------------------------------------------------------------------------------------------


def pair(
    built: Namespace, shape: tuple[int, int], rank: int, alpha: float, bias: bool, dtype: torch.dtype, seed: int
) -> tuple[nn.Module, LoRALinear]:
    """The page's layer and the library's over equal bases, each started from the same seed."""
    layers = []
    for kind in (built["LoRALinear"], LoRALinear):
        base = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
        for i, parameter in enumerate(base.parameters()):
            parameter.data = randn(*parameter.shape, seed=seed + i, dtype=dtype)
        torch.manual_seed(seed)
        layers.append(kind(base, rank, alpha))
    return layers[0], layers[1]


def agrees_LoRALinear(  # noqa: N802  # the contract's name
    built: Namespace, shape: tuple[int, int], rank: int, alpha: float, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    mine, theirs = pair(built, shape, rank, alpha, bias, dtype, seed)
    x = randn(2, 3, shape[1], seed=seed + 5, dtype=dtype)
    assert torch.equal(mine.lora_A, theirs.lora_A)
    assert torch.equal(mine(x), mine.base(x)), "a fresh adapter changes a bit"
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for layer, leaf in zip((mine, theirs), leaves, strict=True):
        layer.lora_B.data = randn(shape[0], rank, seed=seed + 6, dtype=dtype)
        (layer(leaf) * randn(2, 3, shape[0], seed=seed + 7, dtype=dtype)).sum().backward()
    tolerance = TOLERANCE[dtype]
    assert_close(mine(x), theirs(x), tolerance)
    assert_close(mine.delta_weight(), theirs.delta_weight(), tolerance)
    assert_close(leaves[0].grad, leaves[1].grad, tolerance)
    assert_same(gradients(mine), gradients(theirs), tolerance)
    assert all(parameter.grad is None for parameter in mine.base.parameters())


def agrees_add_lora_(built: Namespace, config: Any, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    mine, theirs = build(config, seed=seed), build(config, seed=seed)
    paths = built["add_lora_"](mine, list(targets), rank, alpha)
    assert paths == apply_lora_(theirs, LoRAConfig(rank=rank, alpha=alpha, targets=tuple(targets)))
    for i, (path, layer) in enumerate(lora_modules(theirs).items()):
        for name in ("lora_A", "lora_B"):
            value = 0.3 * randn(*getattr(layer, name).shape, seed=seed + i)
            for model in (mine, theirs):
                getattr(model.get_submodule(path), name).data = value.clone()
    ids = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(seed))
    for model in (mine, theirs):
        model(ids).square().sum().backward()
    assert_close(mine(ids), theirs(ids), 1e-10)
    assert_same(gradients(mine), gradients(theirs), 1e-9)


def agrees_trainable(built: Namespace, frozen: Sequence[bool], seed: int) -> None:
    model = build(LLAMA, seed=seed)
    for parameter, freeze in zip(model.parameters(), frozen, strict=False):
        parameter.requires_grad_(not freeze)
    found = built["trainable"](model)
    assert sum(found.values()) == num_parameters(model, trainable=True)
    model(torch.arange(5)[None]).sum().backward()
    assert list(found) == [name for name, p in model.named_parameters() if p.grad is not None]


@given(
    sizes, sizes, st.integers(1, 9), st.floats(0.25, 64), st.booleans(), st.sampled_from(list(TOLERANCE)), seeds
)  # fmt: skip
def test_LoRALinear_equals_the_library(  # noqa: N802
    rows: int, columns: int, rank: int, alpha: float, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    agrees_LoRALinear(BUILD, (rows, columns), min(rank, rows, columns), alpha, bias, dtype, seed)


@pytest.mark.slow
@given(st.sampled_from([LLAMA, QWEN3]), names, st.integers(1, 6), st.floats(0.5, 16), seeds)
def test_add_lora__equals_the_library(config: Any, targets: list[str], rank: int, alpha: float, seed: int) -> None:
    agrees_add_lora_(BUILD, config, targets, rank, alpha, seed)


@given(st.lists(st.booleans(), max_size=19), seeds)
def test_trainable_equals_the_library(frozen: list[bool], seed: int) -> None:
    agrees_trainable(BUILD, frozen, seed)


def test_only_the_named_adapters_are_trained() -> None:
    model = build(LLAMA)
    BUILD["add_lora_"](model, ["v_proj"], 2, 4.0)
    stem = "model.layers.{}.self_attn.v_proj.lora_{}"
    expected = {stem.format(layer, factor): 24 for layer in (0, 1) for factor in "AB"}  # 2 x 12 and 12 x 2
    assert BUILD["trainable"](model) == expected


def test_a_name_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="no linear is called"):
        BUILD["add_lora_"](build(LLAMA), ["proj"], 2, 4.0)


# ---- bugs that a contract must see -----------------------------------------------------------------------------------


def agrees(built: Namespace) -> None:
    """Every contract, on inputs where each bug below shows."""
    agrees_LoRALinear(built, (5, 7), 3, 2.0, True, torch.float64, 0)
    agrees_add_lora_(built, LLAMA, ["q_proj", "down_proj"], 2, 3.0, 0)
    agrees_trainable(built, [True, False, True], 0)


MUTANTS = [
    ("alpha alone for the scale", "self.scaling = alpha / rank", "self.scaling = alpha"),
    ("alpha over the root of the rank", "self.scaling = alpha / rank", "self.scaling = alpha / math.sqrt(rank)"),
    ("A standard normal", "nn.init.uniform_(self.lora_A, -bound, bound)", "nn.init.normal_(self.lora_A)"),
    ("A's bound from the rank", "math.sqrt(self.base.in_features)", "math.sqrt(self.lora_A.shape[0])"),
    ("B random too", "nn.init.zeros_(self.lora_B)", "nn.init.uniform_(self.lora_B, -bound, bound)"),
    ("the scale forgotten in forward", "self.scaling * up", "up"),
    ("the scale forgotten in the update", "self.scaling * (self.lora_B @ self.lora_A)", "self.lora_B @ self.lora_A"),
    ("the wrapped layer not frozen", "base.requires_grad_(False)", "base"),
    ("the rest not frozen", "model.requires_grad_(False)", "pass"),
    ("only the first layer wrapped", "return found", "return found[:1]"),
    ("frozen numbers counted", "if p.requires_grad}", "}"),
]


def test_the_build_passes_for_the_library() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- exercises -------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[tuple[Callable[..., Tensor], str]]] = {
    "embedding_update": [
        (lambda ids, A, B, s: s * nn.functional.embedding(ids, B) @ A, "swapped"),
        (lambda ids, A, B, s: A.T[ids] @ B.T, "scaling"),
        (lambda ids, A, B, s: s * (A.T @ B.T), "shape"),
        (lambda ids, A, B, s: s * A.T[ids.flip(-1)] @ B.T, "each id picks one column"),
    ],
    "merged_change": [
        (lambda G, A, B, s, lr: -lr * s**2 * B @ B.T @ G, "not through A"),
        (lambda G, A, B, s, lr: -lr * G, "full fine-tuning"),
        (lambda G, A, B, s, lr: -lr * s * G @ A.T @ A, "counts twice"),
        (lambda G, A, B, s, lr: -lr * s**2 * G @ A.T @ A, "A moves too"),
        (lambda G, A, B, s, lr: lr * s**2 * G @ A.T @ A, "not yet"),
    ],
}
test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)


@given(st.floats(0.1, 4), st.floats(1e-3, 1), seeds)
def test_the_first_step_goes_through_b_alone(scaling: float, lr: float, seed: int) -> None:
    """The solution against the closed form -lr s^2 G A^T A at B = 0, and with the term of second order otherwise."""
    solution = next(exercise.solution for exercise in PAGE.exercises() if exercise.name == "merged_change")
    G, A, B = randn(4, 6, seed=seed), randn(2, 6, seed=seed + 1), randn(4, 2, seed=seed + 2)
    first = -lr * scaling**2 * G @ A.T @ A
    assert_close(solution(G, A, torch.zeros_like(B), scaling, lr), first)
    second = -lr * scaling**2 * B @ B.T @ G + lr**2 * scaling**3 * G @ A.T @ B.T @ G
    assert_close(solution(G, A, B, scaling, lr), first + second, 1e-11)


def test_the_start_of_a_has_the_variance_that_the_page_claims() -> None:
    layer = BUILD["LoRALinear"](nn.Linear(576, 8, bias=False), 8, 16.0)
    assert math.isclose(layer.lora_A.std().item(), 1 / math.sqrt(3 * 576), rel_tol=0.05)
