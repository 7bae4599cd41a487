"""The same laws beside installed PEFT: equal weights where both are right, and what happens to each law where PEFT is not.

Every test asserts the law for minisft. What PEFT does is asserted only to show that the law can be broken in good faith; if a
newer PEFT keeps it, the test is skipped and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from laws import Case, assert_within, bits, exact, roundoff, underflow, weight_of
from torch import Tensor, nn

from minisft.errors import UserError
from minisft.merge import merge_, unmerge_

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def beside(case: Case, base: nn.Module | None = None, **options: object) -> nn.Module:
    """PEFT's layer with the base and the factors of ``case``."""
    ours = case.model()[0]
    tree = nn.Sequential(base or ours.base)
    tree.is_loaded_in_4bit = base is not None  # how PEFT tells bitsandbytes' layers from others
    config = peft.LoraConfig(r=case.rank, lora_alpha=case.alpha, use_rslora=case.use_rslora, target_modules=["0"], **options)
    theirs = peft.get_peft_model(tree, config).base_model.model[0]
    with torch.no_grad():
        if case.kind == "embedding":
            theirs.lora_embedding_A["default"].copy_(ours.lora_A)
            theirs.lora_embedding_B["default"].copy_(ours.lora_B)
        else:
            theirs.lora_A["default"].weight.copy_(ours.lora_A)
            theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return theirs.eval()


def only_if(broken: bool, law: str) -> None:
    """Skip what is left of a test when PEFT keeps the law."""
    if not broken:
        pytest.skip(f"PEFT {peft.__version__} keeps this law: {law}")


# ---- where both are right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "embedding"])
def test_both_merge_to_the_same_weights(kind: str, base: str, use_rslora: bool) -> None:
    """Within one rounding each, and one more of D, which PEFT may round before it is added."""
    case = Case(kind, base, 33, 31, rank=4, use_rslora=use_rslora)
    ours = case.model()
    e = exact(case, ours, case.input())
    merge_(ours)
    theirs = beside(case)
    theirs.merge()
    u, total = roundoff(case.dtype), e.W.abs() + abs(e.s) * e.B.abs() @ e.A.abs()
    allowed = u * (2 * (e.W + e.D).abs() + e.D.abs()) + 2 * (case.rank + 4) * min(u, 2**-24) * total + 4 * underflow(case.dtype)
    allowed, after = (allowed.T, weight_of(ours[0])) if kind == "embedding" else (allowed, weight_of(ours[0]))
    assert_within(after, theirs.get_base_layer().weight, allowed, "W'")


# ---- where PEFT breaks a law -----------------------------------------------------------------------------------------


def test_one_rounding() -> None:
    """W' is W + D rounded once. PEFT's safe merge rounds D first, which moves one weight in ten."""
    case = Case("linear", "bf16", 129, 127, rank=4)
    ours, theirs = case.model(), beside(case)
    e = exact(case, ours, case.input())
    correct = (e.W + e.D).to(torch.bfloat16)
    merge_(ours)
    assert float((ours[0].weight != correct).double().mean()) < 1e-3  # D in fp32 lies on the other side of a border
    theirs.merge(safe_merge=True)
    wrong = float((theirs.get_base_layer().weight != correct).double().mean())
    only_if(wrong > 0.01, "one rounding")
    assert wrong > 0.05


def test_unmerging_restores_every_bit() -> None:
    """PEFT subtracts what it added: after ten rounds in bf16 most weights are others, by more than they are large."""
    case = Case("linear", "bf16", 65, 63, rank=4)
    ours, theirs = case.model(), beside(case)
    before = weight_of(ours[0]).clone()
    for _ in range(10):
        merge_(ours)
        unmerge_(ours)
        theirs.merge()
        theirs.unmerge()
    assert bits(weight_of(ours[0])) == bits(before)
    changed = theirs.get_base_layer().weight != before
    only_if(bool(changed.any()), "unmerging restores every bit")
    assert float(changed.double().mean()) > 0.2


def test_a_failed_merge_changes_nothing() -> None:
    """PEFT's safe merge checks layer by layer, so the layers before a broken one are merged already."""
    cases = [Case("linear", "fp32", 17, 17, rank=3, seed=seed) for seed in (1, 2)]
    ours = nn.Sequential(*(case.model()[0] for case in cases))
    theirs = [beside(case) for case in cases]
    before = [bits(weight_of(layer)) for layer in ours]
    ours[1].lora_B.data[0, 0] = theirs[1].lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError):
        merge_(ours)
    assert [bits(weight_of(layer)) for layer in ours] == before
    together = nn.ModuleList(theirs)
    with pytest.raises(ValueError, match="NaN"):
        together.apply(lambda module: module.merge(safe_merge=True) if module in theirs else None)
    only_if(theirs[0].merged, "a failed merge changes nothing")
    assert bits(theirs[0].get_base_layer().weight) != before[0]


def in_bitsandbytes(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The weight in bitsandbytes' NF4, on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def test_unmerging_restores_the_codes() -> None:
    """Over 4 bits PEFT requantizes W + D, and then W + D - D: most codes are others."""
    case = Case("linear", "nf4", 64, 64, rank=4)
    ours = case.model()
    base = in_bitsandbytes(weight_of(ours[0]), None)
    theirs = beside(case, base)
    before = ours[0].base.packed.clone()
    merge_(ours)
    unmerge_(ours)
    assert torch.equal(ours[0].base.packed, before)
    codes = base.weight.data.clone()
    theirs.merge()
    theirs.unmerge()
    kept = float((theirs.get_base_layer().weight.data == codes).double().mean())
    only_if(kept < 1, "unmerging restores the codes")
    assert kept < 0.5


def test_merging_moves_the_bias_as_the_layer_adds_it() -> None:
    """PEFT's ``lora_bias`` is scaled in its forward and not in its 4-bit merge: off by (scaling - 1) times the bias.

    minisft has no such bias (an adapter with one is refused), and its merge leaves the layer's own alone.
    """
    case = Case("linear", "nf4", 64, 32, rank=4, alpha=12.0)
    ours = case.model()
    bias = ours[0].base.bias.detach().clone()
    base = in_bitsandbytes(weight_of(ours[0]), bias)
    theirs = beside(case, base, lora_bias=True)
    merge_(ours)
    assert bits(ours[0].bias) == bits(bias)
    trained = torch.linspace(-1, 1, 32)
    theirs.lora_B["default"].bias.data.copy_(trained)
    theirs.merge()
    moved = theirs.get_base_layer().bias.detach() - bias
    only_if(not torch.allclose(moved, 3.0 * trained, atol=1e-4), "merging moves the bias as the layer adds it")
    torch.testing.assert_close(moved, trained, rtol=1e-4, atol=1e-4)
