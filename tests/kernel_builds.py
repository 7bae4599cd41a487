"""Every kernel in every configuration that its launcher can choose, and how to compile one without a GPU.

``triton.compile`` needs no driver when it is told the target, the type of every argument and the value of every constant.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from minisft.kernels import dequantize, matmul_backward, matmul_small, matvec, quantize, split_k

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SCALES = {
    "flat": {"absmax_ptr": "*fp32", "map_ptr": None, "absmax2_ptr": None, "offset_ptr": None},
    "nested": {"absmax_ptr": "*u8", "map_ptr": "*fp32", "absmax2_ptr": "*fp32", "offset_ptr": "*fp32"},
}
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Build:
    """One kernel, typed: ``arguments`` maps each name to a type ("*u8", "i32", "fp32") or to a constant's value."""

    name: str
    kernel: object
    arguments: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = False
    unaligned: tuple[str, ...] = field(default=())  # integers not known to be multiples of 16

    def compile(self, target: GPUTarget) -> CompiledKernel:
        names = self.kernel.arg_names
        assert set(names) == set(self.arguments), set(names) ^ set(self.arguments)
        types = {name: value if isinstance(value, str) else "constexpr" for name in names for value in [self.arguments[name]]}
        constants = {name: self.arguments[name] for name in names if types[name] == "constexpr"}
        aligned = [
            name for name in names if types[name].startswith("*") or (types[name] == "i32" and name not in self.unaligned)
        ]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}
        return triton.compile(ASTSource(self.kernel, types, constants, attributes), target=target, options=options)


def _weight(scales: str, block_size: int = 64) -> dict[str, object]:
    return {"packed_ptr": "*u8", **SCALES[scales], "levels_ptr": "*fp32", "BLOCK_SIZE": block_size}


def dequantize_builds() -> list[Build]:
    kernel, words = dequantize._dequantize_kernel, dequantize.WORDS
    cells = [(s, d, 64) for s in SCALES for d in DTYPES] + [("nested", "bf16", 32), ("nested", "bf16", 4096)]
    return [
        Build(f"dequantize-{s}-{d}-{b}", kernel, {**_weight(s, b), "out_ptr": f"*{d}", "n": "i32", "WORDS": words})
        for s, d, b in cells
    ]


def quantize_builds() -> list[Build]:
    pointers = {"midpoints_ptr": "*fp32", "order_ptr": "*u8", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "n": "i32"}
    cells = [(d, 64) for d in DTYPES] + [("bf16", 32), ("bf16", 4096)]
    return [
        Build(
            f"quantize-{d}-{b}",
            quantize._quantize_kernel,
            {"weight_ptr": f"*{d}", **pointers, "BLOCK_SIZE": b, "BLOCKS": quantize.ELEMENTS // b},
            num_warps=8,
        )
        for d, b in cells
    ]


def matvec_builds() -> list[Build]:
    cells = [(s, d, 1, c) for s in SCALES for d in DTYPES for c in matvec.CONFIGS[:1]]
    cells += [("nested", "bf16", rows, c) for rows in (1, 2, 4) for c in matvec.CONFIGS]
    return [_matvec(*cell) for cell in dict.fromkeys(cells)]


def _matvec(scales: str, dtype: str, rows: int, config: matvec.Config) -> Build:
    arguments = {
        **_weight(scales), "x_ptr": f"*{dtype}", "out_ptr": "*fp32" if config.parts > 1 else f"*{dtype}",
        "num_rows": "i32", "num_columns": "i32", "num_groups": "i32", "ROWS": rows, "COLUMNS": config.columns,
        "GROUPS": config.inner // 32, "PARTS": config.parts,
    }  # fmt: skip
    name = f"matvec-{scales}-{dtype}-rows{rows}-{_label(config)}"
    return Build(name, matvec._matvec_kernel, arguments, config.num_warps, config.num_stages, unaligned=("num_rows",))


def matmul_builds() -> list[Build]:
    builds = []
    for module, make in ((matmul_small, _matmul_small), (matmul_backward, _matmul_backward)):
        kernel = module.__name__.rsplit(".", 1)[1]
        cells = [(s, d, 16, module.CONFIGS[0]) for s in SCALES for d in ("fp16", "bf16")]
        cells += [("nested", "bf16", rows, c) for rows in (16, 32, 64) for c in module.CONFIGS]
        cells += [(s, "fp32", 16, c) for s in SCALES for c in module.FP32_CONFIGS]
        for s, d, rows, config in dict.fromkeys(cells):
            common = {
                **_weight(s), "out_ptr": "*fp32" if config.parts > 1 else f"*{d}", "num_rows": "i32", "num_groups": "i32",
                "ROWS": rows, "PARTS": config.parts,
            }  # fmt: skip
            name = f"{kernel}-{s}-{d}-rows{rows}-{_label(config)}"
            builds.append(make(name, f"*{d}", common, config))
    return builds


def _matmul_small(name: str, pointer: str, common: dict[str, object], config: matmul_small.Config) -> Build:
    sizes = {"x_ptr": pointer, "num_columns": "i32", "COLUMNS": config.columns, "GROUPS": config.inner // 32}
    kernel = matmul_small._matmul_small_kernel
    return Build(name, kernel, {**common, **sizes}, config.num_warps, config.num_stages, unaligned=("num_rows",))


def _matmul_backward(name: str, pointer: str, common: dict[str, object], config: matmul_backward.Config) -> Build:
    sizes = {"grad_ptr": pointer, "num_inner": "i32", "INNER": config.inner, "GROUPS": config.columns // 32}
    kernel = matmul_backward._matmul_backward_kernel
    return Build(name, kernel, {**common, **sizes}, config.num_warps, config.num_stages, unaligned=("num_rows",))


def sum_builds() -> list[Build]:
    kernel = split_k._sum_partials_kernel
    cells = [(d, p) for d in DTYPES for p in (2, 4, 8)]
    arguments = {"partials_ptr": "*fp32", "size": "i32", "TILE": split_k.TILE}
    return [Build(f"sum-{d}-{p}", kernel, {**arguments, "out_ptr": f"*{d}", "PARTS": p}) for d, p in cells]


def _label(config: matvec.Config) -> str:
    return "x".join(map(str, config))


def all_builds() -> dict[str, Build]:
    builds = [*dequantize_builds(), *quantize_builds(), *matvec_builds(), *matmul_builds(), *sum_builds()]
    return {build.name: build for build in builds}


# One or two of each kernel: the forms that training and generating in bfloat16 meet first.
TYPICAL = (
    "dequantize-nested-bf16-64",
    "dequantize-flat-fp32-64",
    "quantize-bf16-64",
    "matvec-nested-bf16-rows1-8x1024x1x4x3",
    "matvec-nested-bf16-rows4-8x1024x1x4x3",
    "matmul_small-nested-bf16-rows16-64x128x4x4x3",
    "matmul_small-nested-bf16-rows64-64x128x1x4x3",
    "matmul_backward-nested-bf16-rows64-128x64x4x4x3",
    "sum-bf16-4",
)


# ---- reading the machine code ----------------------------------------------------------------------------------------


def resources(compiled: CompiledKernel, folder: Path) -> dict[str, int]:
    """What the assembler says that the machine code uses: bytes of stack and local memory, spilled and used registers."""
    if "amdgcn" in compiled.asm:
        return {
            key: int(re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"])[1])
            for key in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count", "vgpr_count")
        }
    text = _cuobjdump("--dump-resource-usage", compiled, folder)
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def sass(compiled: CompiledKernel, folder: Path) -> str:
    """The disassembled machine code of an NVIDIA target."""
    return _cuobjdump("-sass", compiled, folder)


def _cuobjdump(option: str, compiled: CompiledKernel, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
