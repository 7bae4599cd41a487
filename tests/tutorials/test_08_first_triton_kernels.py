"""Page 08: its kernels against the library's and against PyTorch, in Triton's interpreter.

Whether Triton interprets or compiles is settled when it is first imported, for the whole process, and other tests compile. So
this file runs once more in a process of its own; here, each test looks up how it fared there.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minisft import nf4

pytest.importorskip("triton")

import triton
import triton.language as tl
from pages import page

PAGE = "08_first_triton_kernels"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 4096
Namespace = dict[str, Any]
pytestmark = pytest.mark.slow


@functools.cache
def report_of_the_child() -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", __file__, "-rA", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    folder = Path(__file__).parent
    child = subprocess.run(
        command, env={**kept, "TRITON_INTERPRET": "1"}, cwd=folder, capture_output=True, text=True, timeout=1800
    )
    return child.stdout + child.stderr


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """``test`` itself where Triton interprets; elsewhere, how it fared in the process that interprets."""
    if INTERPRETING:
        return test

    def in_the_child() -> None:
        report = report_of_the_child()
        verdicts = re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED) \S+::{test.__name__}\b", report, re.MULTILINE)
        assert verdicts, report[-6000:]
        assert set(verdicts) == {"PASSED"}, report[-6000:]

    in_the_child.__name__ = test.__name__
    return in_the_child


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    """Tells -0 from +0, as ``torch.equal`` does not."""
    return tensor.contiguous().view(torch.int32)


def by_hand(q: nf4.QuantizedWeight) -> Tensor:
    """The dense weight in fp64, where the product of two fp32 numbers is exact."""
    codes = torch.stack((q.packed // 16, q.packed % 16), dim=1).flatten()[: q.shape.numel()]
    scales = nf4.decode_absmax(q).double().repeat_interleave(q.block_size)[: len(codes)]
    return (q.levels.double()[codes.long()] * scales).view(q.shape)


def with_zeros(outputs: int, inputs: int, seed: int) -> Tensor:
    """A random weight whose first quarter is zero."""
    weight = random(seed, outputs, inputs)
    weight.view(-1)[: weight.numel() // 4] = 0.0
    return weight


# ---- what the page builds equals the library's -----------------------------------------------------------------------


def agrees_dequantize(namespace: Namespace, q: nf4.QuantizedWeight, tile: int = 1024) -> None:
    """Bit for bit the library's kernel, which is that of PyTorch; and nothing is written outside."""
    from minisft.kernels.dequantize import dequantize as library_dequantize

    n = q.shape.numel()
    buffer, out = namespace["guarded"](n)
    arguments = (q.packed, nf4.decode_absmax(q), q.levels, out, n)
    namespace["dequantize_kernel"][(-(-n // tile),)](*arguments, BLOCK_SIZE=q.block_size, TILE=tile)
    assert int((~buffer.isnan()).sum()) == n
    dense = namespace["dequantize"](q, tile)
    assert dense.shape == q.shape
    assert torch.equal(bits(dense), bits(library_dequantize(q, torch.float32)))
    assert torch.equal(bits(dense), bits(by_hand(q).float() + 0.0))
    assert torch.equal(bits(dense).flatten(), bits(out))


SIZES = st.integers(1, 40)  # up to 1 600 numbers: many blocks and tiles, in a slow interpreter
BLOCK_SIZES = st.sampled_from(nf4.BLOCK_SIZES[:4])
TILES = st.sampled_from([16, 64, 1024])


@interpreted
@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, BLOCK_SIZES, st.booleans(), TILES, st.integers(0, 99))
def test_dequantize_equals_the_library(
    outputs: int, inputs: int, block_size: int, double_quant: bool, tile: int, seed: int
) -> None:
    q = nf4.quantize(with_zeros(outputs, inputs, seed), block_size, double_quant)
    agrees_dequantize(page(PAGE).build(), q, tile)


def agrees_matvec(namespace: Namespace, x: Tensor, q: nf4.QuantizedWeight, tile: int = 256) -> None:
    """Within the rounding of fp32 sums of the exact product, and so is the library's where it serves the shape."""
    from minisft.kernels.matvec import matvec as library_matvec

    dense = by_hand(q)
    bound = 2 * q.shape[1] * 2.0**-24 * (dense.abs() @ x.abs().double()) + 2.0**-30
    y = namespace["matvec"](x, q, tile)
    assert y.shape == (q.shape[0],)
    assert bool(((y.double() - dense @ x.double()).abs() <= bound).all())
    if q.shape[1] % 32 == 0:
        theirs = library_matvec(x[None], q)[0]
        assert bool(((y.double() - theirs.double()).abs() <= 2 * bound).all())


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 12), st.one_of(st.integers(1, 200), st.sampled_from([32, 96, 160])), BLOCK_SIZES, TILES, st.integers(0, 99)
)
def test_matvec_equals_the_library(outputs: int, inputs: int, block_size: int, tile: int, seed: int) -> None:
    q = nf4.quantize(random(seed, outputs, inputs), block_size, double_quant=seed % 2 == 0)
    agrees_matvec(page(PAGE).build(), random(seed + 1, inputs), q, tile)


def agrees_add(namespace: Namespace, n: int, tile: int = 1024) -> None:
    buffer, out = namespace["guarded"](n)
    x, y = random(1, n), random(2, n)
    namespace["add"](x, y, out, tile)
    assert torch.equal(out, x + y)
    assert int((~buffer.isnan()).sum()) == n


@interpreted
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 700), TILES)
def test_add_equals_pytorch(n: int, tile: int) -> None:
    agrees_add(page(PAGE).build(), n, tile)


# ---- bugs that must not pass -----------------------------------------------------------------------------------------

MUTANTS = [
    ("add without a mask", "tl.store(out_ptr + i, x + y, mask=inside)", "tl.store(out_ptr + i, x + y)"),
    ("one program too few", "add_kernel[(triton.cdiv(n, tile),)]", "add_kernel[(max(n // tile, 1),)]"),
    ("dequantize without a mask", "tl.store(out_ptr + i, weights, mask=i < n)", "tl.store(out_ptr + i, weights)"),
    ("the mask ends too early", "tl.store(out_ptr + i, weights, mask=i < n)", "tl.store(out_ptr + i, weights, mask=i < n - 1)"),
    ("the halves swapped", "4 * (1 - i % 2)", "4 * (i % 2)"),
    ("the wrong byte", "packed_ptr + i // 2", "packed_ptr + i // 4"),
    ("a bit of the code lost", ") & 15", ") & 7"),
    ("the block size taken for granted", "absmax_ptr + i // BLOCK_SIZE", "absmax_ptr + i // 128"),
    ("a negative zero", "* absmax + 0.0", "* absmax"),
    ("only the first tile of a row", "range(0, COLUMNS, TILE)", "range(0, TILE, TILE)"),
    ("always the first row", "row * COLUMNS + column", "column"),
    ("the last tile wins", "total += weights", "total = weights"),
]


def agrees(namespace: Namespace) -> None:
    for n in (16, 45):
        agrees_add(namespace, n, tile=16)
    for shape, double_quant in (((5, 27), False), ((16, 40), True)):
        agrees_dequantize(namespace, nf4.quantize(with_zeros(*shape, seed=1), 32, double_quant), tile=64)
    # With double quantization the scale of a zero block can come back slightly negative, and 0 times that is -0.
    q = nf4.quantize(with_zeros(5, 27, seed=2), 32, double_quant=False)
    agrees_dequantize(namespace, replace(q, absmax=-q.absmax), tile=64)
    agrees_matvec(namespace, random(3, 41), nf4.quantize(random(4, 3, 41), 32), tile=16)


@interpreted
def test_the_page_as_it_is_agrees() -> None:
    agrees(page(PAGE).build())


@interpreted
@pytest.mark.parametrize(("old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutated_page_disagrees(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        agrees(page(PAGE).build(mutate=(old, new)))


# ---- answers that must not pass --------------------------------------------------------------------------------------


@triton.jit
def _transpose_kernel(in_ptr, out_ptr, rows, columns, TILE: tl.constexpr, BUG: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < rows) & (column < columns)
    values = tl.load(in_ptr + row * columns + column, mask=inside, other=0.0)
    if BUG == "no mask":
        tl.store(out_ptr + column * rows + row, values)
    elif BUG == "rows only":
        tl.store(out_ptr + column * rows + row, values, mask=row < rows)
    elif BUG == "not transposed":
        tl.store(out_ptr + row * columns + column, values, mask=inside)
    else:
        tl.store(out_ptr + column * rows + row, values, mask=inside)


def transposing(bug: str) -> Callable[[Tensor, Tensor], None]:
    def answer(matrix: Tensor, out: Tensor) -> None:
        rows, columns = matrix.shape
        grid = (-(-rows // 16), -(-columns // 16))
        if bug == "small grid":
            grid = (max(rows // 16, 1), max(columns // 16, 1))
        _transpose_kernel[grid](matrix, out, rows, columns, TILE=16, BUG=bug)

    return answer


@triton.jit
def _blocks_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, block_size, TILE: tl.constexpr, BUG: tl.constexpr):
    block, lane = tl.program_id(0), tl.arange(0, TILE)
    if BUG == "tile for block":
        i = block * TILE + lane
    else:
        i = block * block_size + lane
    if BUG == "no lane mask":
        inside = i < n
    elif BUG == "no end":
        inside = lane < block_size
    else:
        inside = (lane < block_size) & (i < n)
    byte = tl.load(packed_ptr + i // 2, mask=i < n, other=0).to(tl.int32)
    code = (byte >> 4 * (1 - i % 2)) & 15
    tl.store(out_ptr + i, tl.load(levels_ptr + code) * tl.load(absmax_ptr + block), mask=inside)


def in_blocks(bug: str) -> Callable[..., None]:
    def answer(packed: Tensor, absmax: Tensor, levels: Tensor, out: Tensor, block_size: int, programs: int) -> None:
        tile = triton.next_power_of_2(block_size)
        _blocks_kernel[(programs,)](packed, absmax, levels, out, out.numel(), block_size, TILE=tile, BUG=bug)

    return answer


WRONG = {
    "transpose": [
        (transposing("no mask"), "outside of out"),
        (transposing("rows only"), "outside of out"),
        (transposing("not transposed"), "wrong places"),
        (transposing("small grid"), "grid large enough"),
    ],
    "dequantize_blocks": [
        (in_blocks("no lane mask"), "the two race"),
        (in_blocks("no end"), "last block is short"),
        (in_blocks("tile for block"), "Block p begins"),
    ],
}
RIGHT = {"transpose": transposing("none"), "dequantize_blocks": in_blocks("none")}


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_get_their_own_hint(name: str) -> None:
    exercise = next(exercise for exercise in page(PAGE).exercises() if exercise.name == name)
    exercise.check(RIGHT[name])
    for answer, hint in WRONG[name]:
        with pytest.raises(AssertionError, match=hint):
            exercise.check(answer)
