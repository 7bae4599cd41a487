"""Page 04: its sizes, spectra, pieces, choices and ratios equal the library's; alpha's law; bugs and wrong answers are seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import mutants_test, page, wrong_answers_test
from torch import nn

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig
from minisft.merging import spectrum
from minisft.model import CausalLM
from minisft.pissa import PiSSALinear
from minisft.surgery import apply_lora_, lora_plus_ratios, match_targets, num_parameters
from minisft.training import lr_grid

PAGE = page("04_rank_alpha_targets_rate")
BUILD = PAGE.build()
Namespace = Mapping[str, Any]

families = st.sampled_from(list(tiny.FAMILIES.values()))
projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
targets = st.just("all-linear") | st.lists(st.sampled_from(projections), min_size=1, unique=True).map(tuple)
seeds = st.integers(0, 999)
sides = st.integers(2, 12)


# ---- contracts -------------------------------------------------------------------------------------------------------


def agrees_adapter_size(built: Namespace, family: ModelConfig, wanted: str | tuple[str, ...], rank: int) -> None:
    model = CausalLM(family)
    counted = built["adapter_size"](model, match_targets(model, wanted), rank)
    apply_lora_(model, LoRAConfig(rank=rank, targets=wanted))
    assert counted == num_parameters(model, trainable=True)


@given(families, targets, st.integers(1, 4))
def test_adapter_size_equals_the_library(family: ModelConfig, wanted: str | tuple[str, ...], rank: int) -> None:
    agrees_adapter_size(BUILD, family, wanted, rank)


def agrees_energy_rank(built: Namespace, values: Sequence[float], wide: int, share: float, seed: int) -> None:
    """A matrix with planted singular values: what the library says of their squares is what the page finds in the matrix."""
    u = torch.linalg.qr(tiny.randn(len(values), len(values), seed=seed, dtype=torch.float64)).Q
    v = torch.linalg.qr(tiny.randn(len(values) + wide, len(values), seed=seed + 1, dtype=torch.float64)).Q
    planted = torch.tensor(values, dtype=torch.float64)
    expected = spectrum.energy_rank(planted.square(), share)
    assert built["energy_rank"](u @ torch.diag(planted) @ v.T, share) == expected


@given(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=1, max_size=9), st.integers(0, 5), seeds)
def test_energy_rank_equals_the_library(values: list[float], wide: int, seed: int) -> None:
    agrees_energy_rank(BUILD, values, wide, 0.9001, seed)  # no sum of 1, 4 and 25 is that share of another


def agrees_principal(built: Namespace, out: int, into: int, rank: int, alpha: float, seed: int) -> None:
    base = nn.Linear(into, out, bias=False, dtype=torch.float64)
    base.weight.data = tiny.randn(out, into, seed=seed, dtype=torch.float64)
    layer = PiSSALinear(base, rank, alpha)
    A, B = built["principal"](base.weight.data, rank, alpha / rank)
    assert (A.shape, B.shape) == ((rank, into), (out, rank))
    theirs_A, theirs_B = layer.start_A.double(), layer.start_B.double()
    tiny.assert_close(B @ A, theirs_B @ theirs_A, 1e-5)  # a pair of directions may change its sign
    tiny.assert_close(A.square().sum(1), theirs_A.square().sum(1), 1e-5)
    tiny.assert_close(B.square().sum(0), theirs_B.square().sum(0), 1e-5)


@given(sides, sides, st.integers(1, 6), st.sampled_from([1.0, 16.0]), seeds)
def test_principal_equals_the_library(out: int, into: int, rank: int, alpha: float, seed: int) -> None:
    agrees_principal(BUILD, out, into, min(rank, min(out, into) // 2), alpha, seed)


def chosen(choose: Callable[[Any], float], losses: Any) -> float | str:
    """The rate, or the word that a refusal has to hold."""
    try:
        return choose(losses)
    except (UserError, ValueError) as refusal:
        return "edge" if "edge" in str(refusal) else str(refusal)


def agrees_choose(built: Namespace, losses: Mapping[float, float]) -> None:
    cells = [lr_grid.Cell(lr, "", "done", loss, 1) for lr, loss in losses.items()]
    assert chosen(built["choose"], losses) == chosen(lambda grid: lr_grid.choose(grid).lr, cells)


@given(st.dictionaries(st.sampled_from([1e-5, 1e-4, 3e-4, 1e-3, 1e-2]), st.floats(0, 9), min_size=3))
def test_choose_equals_the_library(losses: dict[float, float]) -> None:
    agrees_choose(BUILD, losses)


def agrees_rate_ratios(built: Namespace, family: ModelConfig, wanted: str | tuple[str, ...], ratio: float) -> None:
    model = CausalLM(family)
    apply_lora_(model, LoRAConfig(rank=2, targets=wanted))
    assert built["rate_ratios"](model, ratio) == lora_plus_ratios(model, ratio)


@given(families, targets, st.sampled_from([0.5, 4.0, 16.0]))
def test_rate_ratios_equals_the_library(family: ModelConfig, wanted: str | tuple[str, ...], ratio: float) -> None:
    agrees_rate_ratios(BUILD, family, wanted, ratio)


# ---- bugs ------------------------------------------------------------------------------------------------------------

MUTANTS = [
    ("one side of a layer", "sum(model.get_submodule(path).weight.shape)", "model.get_submodule(path).weight.shape[0]"),
    ("sizes without the rank", "sum(rank * sum(", "sum(sum("),
    ("values instead of squares", "svdvals(delta.double()).square()", "svdvals(delta.double())"),
    ("one direction too few", "sums[-1]).sum()) + 1", "sums[-1]).sum())"),
    ("the scaling is left in", "(S[:rank] / scaling).sqrt()", "S[:rank].sqrt()"),
    ("all of a singular value in each factor", "(S[:rank] / scaling).sqrt()", "S[:rank] / scaling"),
    ("the smallest directions", "root[:, None] * Vh[:rank]", "root[:, None] * Vh[-rank:]"),
    ("only the lower edge", "(rates[0], rates[-1])", "(rates[0],)"),
    ("only the upper edge", "(rates[0], rates[-1])", "(rates[-1],)"),
    ("the largest loss", "min(rates, key=losses.get)", "max(rates, key=losses.get)"),
    ("rates in the order given", "rates = sorted(losses)", "rates = list(losses)"),
    ("A learns faster", 'endswith(".lora_B")', 'endswith(".lora_A")'),
    ("frozen weights have a rate", "if p.requires_grad]", "]"),
]


def agrees(built: Namespace) -> None:
    agrees_adapter_size(built, tiny.LLAMA, "all-linear", 3)
    agrees_energy_rank(built, [5.0, 2.0, 2.0, 1.0, 1.0, 1.0], 2, 0.9001, 0)
    agrees_principal(built, 6, 8, 2, 16.0, 0)
    agrees_choose(built, {1e-3: 2.0, 1e-2: 1.0, 1e-4: 3.0, 3e-2: 1.5})
    agrees_choose(built, {1e-3: 1.5, 1e-2: 1.0, 1e-4: 3.0})
    agrees_choose(built, {1e-3: 1.5, 1e-2: 2.0, 1e-4: 1.0})
    agrees_rate_ratios(built, tiny.LLAMA, ("q_proj", "down_proj"), 4.0)


def test_the_build_agrees_without_a_bug() -> None:
    agrees(BUILD)


test_a_bug_in_the_build_is_seen = mutants_test(PAGE, MUTANTS, agrees)


# ---- the page's law, on one matrix in fp64 ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_alpha_times_c_with_the_rate_of_b_over_c_is_the_same_model(factor: float) -> None:
    """By Adam's formula written out here, not by any optimizer of the library or of PyTorch."""

    def product(scaling: float, ratio: float) -> torch.Tensor:
        A, B = tiny.randn(2, 5, seed=1, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
        goal = tiny.randn(4, 5, seed=2, dtype=torch.float64)
        moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (A, B)]
        for step in range(1, 30):
            G = scaling * B @ A - goal  # gradient of half the squared distance
            for x, gradient, moment, lr, eps in zip(
                (A, B), (scaling * B.T @ G, scaling * G @ A.T), moments, (0.1, 0.1 * ratio), (1e-8, 1e-8 / ratio), strict=True
            ):
                moment[0] = 0.5 * moment[0] + 0.5 * gradient
                moment[1] = 0.75 * moment[1] + 0.25 * gradient.square()
                x -= lr * (moment[0] / (1 - 0.5**step)) / ((moment[1] / (1 - 0.75**step)).sqrt() + eps)
        return scaling * B @ A

    assert torch.equal(product(1.0, 1.0), product(factor, 1 / factor))
    assert not torch.equal(product(1.0, 1.0), product(factor, 1.0))


# ---- exercises -------------------------------------------------------------------------------------------------------


def rank_in_halves(megabytes: float, shapes: Sequence[tuple[int, int]]) -> int:
    return int(megabytes * 1e6 / (2 * sum(map(sum, shapes))))


def rank_of_one_layer(megabytes: float, shapes: Sequence[tuple[int, int]]) -> int:
    return int(megabytes * 1e6 / (4 * sum(shapes[0])) + 1e-9)


def rank_without_end(megabytes: float, shapes: Sequence[tuple[int, int]]) -> int:
    return int(megabytes * 1e6 / (4 * sum(map(sum, shapes))) + 1e-9)


def rank_rounded_up(megabytes: float, shapes: Sequence[tuple[int, int]]) -> int:
    return math.ceil(megabytes * 1e6 / (4 * sum(map(sum, shapes))) - 1e-9)


Table = Mapping[str, Mapping[float, float | None]]


def ends(losses: Sequence[float | None]) -> bool:
    known = [loss for loss in losses if loss is not None]
    return bool(known) and min(known) in (losses[0], losses[-1])


def untuned_unsorted(table: Table) -> list[str]:
    return sorted(method for method, losses in table.items() if ends(list(losses.values())))


def untuned_above_only(table: Table) -> list[str]:
    def at_top(losses: Mapping[float, float | None]) -> bool:
        return losses[max(losses)] == min(loss for loss in losses.values() if loss is not None)

    return sorted(method for method, losses in table.items() if at_top(losses))


def untuned_forgets_diverged(table: Table) -> list[str]:
    kept = {m: {lr: loss for lr, loss in losses.items() if loss is not None} for m, losses in table.items()}
    return sorted(m for m, losses in kept.items() if ends([losses[lr] for lr in sorted(losses)]))


def untuned_calls_diverged_tuned(table: Table) -> list[str]:
    return sorted(m for m, losses in table.items() if ends([losses[lr] for lr in sorted(losses)]))


WRONG: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "rank_for": [
        (rank_in_halves, "4 bytes each"),
        (rank_of_one_layer, "all layers share"),
        (rank_rounded_up, "round down"),
        (rank_without_end, "min\\(out, in\\)"),
    ],
    "untuned": [
        (untuned_unsorted, "sort the rates"),
        (untuned_above_only, "may be below"),
        (untuned_forgets_diverged, "is a neighbour"),
        (untuned_calls_diverged_tuned, "if all diverged"),
    ],
}

test_a_wrong_answer_gets_its_hint = wrong_answers_test(PAGE, WRONG)
