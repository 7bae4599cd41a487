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
from tiny import randn
from torch import nn

from minisft.common.errors import UserError
from minisft.merge_weights import merge_, unmerge_
from minisft.merging.combine import Update, add_updates

peft = pytest.importorskip("peft")
in_peft = pytest.importorskip("in_peft", exc_type=ModuleNotFoundError)  # and bitsandbytes, which it imports
beside, in_bitsandbytes = in_peft.beside, in_peft.in_bitsandbytes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
def test_an_adapter_combined_alone_is_itself(options: dict[str, bool]) -> None:
    """PEFT scales what it combines by alpha / rank, after rsLoRA too, and drops the lengths of DoRA.

    minisft combines rsLoRA exactly; DoRA it refuses, as lengths do not add.
    """
    update = Update(randn(4, 16, seed=1).float(), randn(12, 4, seed=2).float(), 6.0, use_rslora=True)
    halves = add_updates([(0.5, update), (0.5, update)])
    torch.testing.assert_close(halves.scaling * halves.B @ halves.A, 3.0 * update.B @ update.A)
    tree = nn.Sequential(nn.Linear(16, 12))
    theirs = peft.get_peft_model(tree, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options))
    layer, x = theirs.base_model.model[0], randn(5, 16).float()
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(update.B)
        for lengths in layer.lora_magnitude_vector.values():
            lengths.weight.mul_(1.3)
    before = theirs(x)
    theirs.add_weighted_adapter(["default"], [1.0], "alone", combination_type="cat")
    theirs.set_adapter("alone")
    only_if(not torch.allclose(theirs(x), before, rtol=1e-3), "an adapter combined alone is itself")
    assert float((theirs(x) - before).abs().max()) > 0.01 * float(before.abs().max())
