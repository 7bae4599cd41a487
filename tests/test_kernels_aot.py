"""Every kernel, compiled ahead of time for four GPUs on this machine, which needs none, and its machine code read.

What is looked for: nothing spilled, nothing in local memory, no arithmetic in fp64, and 16-byte loads and stores where the
design promises them. The forms that are met first are compiled in every run, all the others in the slow tier.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import kernel_builds as kb

pytestmark = pytest.mark.slow

BUILDS = kb.all_builds()
NVIDIA = [target for target in kb.TARGETS if target.startswith("sm_")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def _check(name: str, target: str, folder: Path) -> None:
    compiled = BUILDS[name].compile(kb.TARGETS[target])
    used = kb.resources(compiled, folder)
    if target == "gfx942":
        assert used.pop("vgpr_count") <= 512
        assert set(used.values()) == {0}, f"{name} for {target} spills: {used}"
        return
    assert used["reg"] <= 255
    assert (used["stack"], used["local"]) == (0, 0), f"{name} for {target} spills: {used}"
    assert ".f64" not in compiled.asm["ptx"]


@pytest.mark.parametrize("target", kb.TARGETS)
@pytest.mark.parametrize("name", kb.TYPICAL)
def test_no_spills_and_no_local_memory(name: str, target: str, tmp_path: Path) -> None:
    _check(name, target, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", kb.TARGETS)
@pytest.mark.parametrize("name", sorted(set(BUILDS) - set(kb.TYPICAL)))
def test_no_spills_in_any_other_configuration(name: str, target: str, tmp_path: Path) -> None:
    _check(name, target, tmp_path)


def _accesses(ptx: str, kind: str) -> list[str]:
    """The width suffixes of all accesses to global memory of one kind: "v4.b32", "b8" and so on."""
    return re.findall(rf"{kind}\.global\S*?\.((?:v\d\.)?b\d+)\s", ptx)


@pytest.mark.parametrize(("dtype", "stores"), [("bf16", 8), ("fp16", 8), ("fp32", 16)])
def test_dequantize_moves_16_bytes_at_a_time(dtype: str, stores: int) -> None:
    """64 outputs a thread: 32 bytes of codes in two loads, 8 or 16 stores, and bytes only in the branch for the tail."""
    ptx = BUILDS[f"dequantize-nested-{dtype}-64"].compile(kb.TARGETS["sm_90"]).asm["ptx"]
    assert set(_accesses(ptx, "st")) == {"v4.b32"}
    assert len(_accesses(ptx, "st")) == stores
    assert _accesses(ptx, "ld").count("v4.b32") == 2
    assert len(re.findall(r"evict_first", ptx)) >= 2


def test_dequantize_keeps_its_two_roundings() -> None:
    """A fused multiply-add would round map * absmax2 + offset once instead of twice."""
    ptx = BUILDS["dequantize-nested-bf16-64"].compile(kb.TARGETS["sm_90"]).asm["ptx"]
    assert "fma" not in ptx
    assert len(re.findall(r"cvt\.rn\.bf16", ptx)) > 0


def test_the_products_read_whole_groups_and_use_the_tensor_cores() -> None:
    for name in ("matvec-nested-bf16-rows1-8x1024x1x4x3", "matmul_small-nested-bf16-rows64-64x128x1x4x3"):
        ptx = BUILDS[name].compile(kb.TARGETS["sm_90"]).asm["ptx"]
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global.*?0x10", ptx), name
    assert "wgmma" in ptx
    assert "mma.sync" in BUILDS["matmul_small-nested-bf16-rows16-64x128x4x4x3"].compile(kb.TARGETS["sm_80"]).asm["ptx"]


def test_quantize_divides_exactly() -> None:
    assert "div.rn.f32" in BUILDS["quantize-bf16-64"].compile(kb.TARGETS["sm_90"]).asm["ptx"]
