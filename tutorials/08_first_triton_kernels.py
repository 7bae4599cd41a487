# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Your first Triton kernels
#     minutes: 1
#     needs: tiny
#     after: ["05"]
#     contract:
#       dequantize: minisft.kernels.dequantize.dequantize
#       matvec: minisft.kernels.matvec.matvec
#     refs: [tillet2019triton, dettmers2023qlora]
# ---

# %% [markdown]
# # 08 Your first Triton kernels
#
# A kernel is a small program that a GPU runs thousands of times at once, each time on another piece of the data. On this page
# you write four of them, from adding two vectors to multiplying with a weight that is still in 4 bits. You need no GPU for
# it: Triton has an interpreter, and its compiler will tell us what a GPU would have done.

# %% [markdown]
# ## You need, you get
#
# **You need** page 05 (codes, scales, two codes in a byte) and Triton, which minisft installs with itself on Linux. No GPU.
#
# **You get** the four words that every kernel is made of (program, tile, pointer, mask) and a dequantization kernel that
# gives the library's bits. You also get a matrix-vector product straight from 4 bits, and a first look at real machine
# code.

# %% tags=["setup"]
import torch

import shared

shared.start("08", seed=0, triton=True)  # sets TRITON_INTERPRET=1, which has to be done before Triton is imported

import triton
import triton.language as tl

from minisft import nf4

GUARD = 4096  # numbers in front of and behind a guarded buffer

# %% [markdown]
# Here is what we are going to write, drawn for a weight of 37 numbers. It is cut among three programs, one colour each. Read
# a column from top to bottom: a program has 16 lanes; each lane finds the byte in which its code lies and the scale of its
# block, and writes one number.

# %% tags=["drawing"]
from matplotlib.patches import Rectangle

COUNT, LANES, BLOCK = 37, 16, 8
PROGRAM_COLORS = [shared.COLORS[name] for name in ("blue", "orange", "purple")]


def box(ax, y, left, width, label, program):
    ax.add_patch(Rectangle((left, y), width, 0.8, facecolor=PROGRAM_COLORS[program], alpha=0.35))
    ax.add_patch(Rectangle((left, y), width, 0.8, fill=False, edgecolor=shared.COLORS["grey"], lw=0.6))
    ax.text(left + width / 2, y + 0.4, label, ha="center", va="center", fontsize=6.5)


# %% tags=["drawing"]
fig, ax = shared.figure(width=8.5, height=3.4)
for program in range(3):
    ax.text(program * LANES + 8, 4.95, f"program {program}", ha="center", color=PROGRAM_COLORS[program], fontweight="bold")
    for lane in range(LANES):
        i = program * LANES + lane
        if i < COUNT:
            box(ax, 3.9, i, 1, lane, program)
        else:
            ax.add_patch(Rectangle((i, 3.9), 1, 0.8, fill=False, hatch="////", edgecolor=shared.COLORS["grey"], lw=0.6))
for byte in range((COUNT + 1) // 2):
    box(ax, 2.6, 2 * byte, 2, byte, 2 * byte // LANES)
for block in range(-(-COUNT // BLOCK)):
    box(ax, 1.3, block * BLOCK, BLOCK, f"scale {block}", block * BLOCK // LANES)
for i in range(COUNT):
    box(ax, 0.0, i, 1, i, i // LANES)
ax.text(2 * LANES + 10.5, 3.55, "masked lanes", ha="center", va="center", fontsize=8)
for y, name in ((4.3, "lanes"), (3.0, "bytes read"), (1.7, "scales read"), (0.4, "numbers written")):
    ax.text(-0.6, y, name, ha="right", va="center")
ax.set(xlim=(-7.5, 48.2), ylim=(-0.1, 5.5))
ax.axis("off")
shared.show(
    fig,
    "grid",
    alt="Three programs of 16 lanes share 37 numbers: each lane reads a byte and a scale and writes one number; "
    "the last 11 lanes are masked and touch nothing.",
)

# %% [markdown]
# Two things to see. Two neighbouring lanes read the *same byte* and take different halves of it. And 37 is no multiple of 16:
# the last program has more lanes than numbers. These lanes exist all the same, and must be kept from touching memory.

# %% [markdown]
# ## The idea
#
# In PyTorch you write `x + y`, and the loop is inside. In Triton you write the inside of that loop, not for one
# number but for a whole **tile** of them at once, say 1024; each place in the tile is a *lane*. The function that does this
# is the *kernel*. You then launch it on a *grid*: "run 300 copies". Each copy is a **program**, and the only thing that tells
# one from another is its number, `tl.program_id(0)`. From that number it works out which piece of the data is its own.
#
# A kernel gets no tensors. It gets **pointers**: the address in memory where a tensor begins. `x_ptr + i` is the address of
# element `i`, and if `i` is a tile of indices, it is a tile of addresses. `tl.load` fetches what lies there and `tl.store`
# puts something there. Shapes and strides do not exist here; a matrix is what you make of it by arithmetic on addresses.
#
# No address is checked. If `i` runs past the end, you read or destroy what lies behind the tensor. So every load and store
# takes a **mask**, a tile of true and false: where it is false, the lane does nothing.
#
# That is all. Program, tile, pointer, mask: the rest is arithmetic.

# %% [markdown]
# ## The formula
#
# Lane $l$ of program $p$ is responsible for number $i$. With two codes in a byte, the first in the upper half, and one scale
# for each block of $G$ numbers:
#
# $$i = p \cdot \mathrm{TILE} + l$$
#
# $$\mathrm{byte} = \mathrm{packed}\left[\lfloor i / 2 \rfloor\right] \qquad h = 4 \cdot (1 - i \bmod 2)$$
#
# $$\mathrm{code} = \lfloor \mathrm{byte} / 2^{h} \rfloor \bmod 16$$
#
# $$w_i = \mathrm{levels}[\mathrm{code}] \cdot \mathrm{absmax}\left[\lfloor i / G \rfloor\right]$$
#
# Dividing by $2^h$ and taking the remainder of a division by 16 are `>> h` and `& 15` for a computer.

# %% [markdown]
# ## By hand: 3 x 4
#
# Twelve weights in the six bytes `F7 0F 70 F7 0F 7F`, one scale for each row of four: 2, 1 and 3. Three levels are enough:
# code 0 is -1, code 7 is 0 and code 15 (`F`) is 1. With a tile of 8 there are two programs, and this is what the second one
# does:
#
# | lane | 0 | 1 | 2 | 3 | 4 to 7 |
# |---|---|---|---|---|---|
# | i = 8 + lane | 8 | 9 | 10 | 11 | 12 to 15 |
# | mask: i < 12 | yes | yes | yes | yes | no |
# | byte number i // 2 | 4 | 4 | 5 | 5 | - |
# | byte | `0F` | `0F` | `7F` | `7F` | - |
# | shift right by | 4 | 0 | 4 | 0 | - |
# | code, after `& 15` | 0 | 15 | 7 | 15 | - |
# | level | -1 | 1 | 0 | 1 | - |
# | scale number i // 4 | 2 | 2 | 2 | 2 | - |
# | weight | -3 | 3 | 0 | 3 | - |
#
# Do the first program on paper. It should give 2, 0, -2, 2 and 0, -1, 1, 0. We will ask our kernel below.

# %% [markdown]
# ## Build it
#
# **Step 0, without a mask.** Before anything else, let us see what goes wrong. We want to detect a kernel that writes where
# it must not. So we put a strip of NaN in front of and behind each result: a NaN that has changed shows a wrong write.


# %% tags=["build"]
def guarded(n):
    """A strip of NaN, n numbers, a strip of NaN: the whole buffer, and the n numbers in the middle."""
    buffer = torch.full((n + 2 * GUARD,), float("nan"))
    return buffer, buffer[GUARD : GUARD + n]


# %%
@triton.jit
def careless_add_kernel(x_ptr, y_ptr, out_ptr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


for n in (16, 13):
    buffer, out = guarded(n)
    x, y = torch.ones(16)[:n], torch.ones(16)[:n]  # 16 numbers in memory, of which n are ours
    careless_add_kernel[(2,)](x, y, out, TILE=8)  # a grid of 2 programs
    outside = int((~buffer.isnan()).sum()) - n
    print(f"n = {n}: right answer {bool((out == 2).all())}, numbers written outside: {outside}")

# %% [markdown]
# With 16 numbers and two programs of 8 everything fits. With 13 the answer is still right, and three numbers outside the
# result are gone. No error. On a GPU the neighbour may be another layer's weights.
#
# Some new words in that cell. `@triton.jit` makes a function a kernel. `[(2,)]` is the grid. `tl.arange(0, TILE)` is the tile
# of lane numbers, 0 to TILE - 1. `TILE: tl.constexpr` is a number that is known when the kernel is compiled; the size of a tile
# has to be, and it has to be a power of two. A tensor handed to a kernel arrives as its pointer. And in a script of your own,
# write `os.environ["TRITON_INTERPRET"] = "1"` before `import triton`; without it, Triton looks for a GPU.
#
# **Step 1, with a mask.** `other` is what a masked lane gets instead of a value.


# %% tags=["build"]
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, TILE: tl.constexpr):
    """out[i] = x[i] + y[i]. One program owns TILE numbers. Grid: ceil(n / TILE)."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    inside = i < n  # [TILE]
    x = tl.load(x_ptr + i, mask=inside, other=0.0)  # [TILE]
    y = tl.load(y_ptr + i, mask=inside, other=0.0)  # [TILE]
    tl.store(out_ptr + i, x + y, mask=inside)


def add(x, y, out, tile=1024):
    n = x.numel()
    add_kernel[(triton.cdiv(n, tile),)](x, y, out, n, TILE=tile)  # cdiv: divide and round up
    return out


# %%
for n in (16, 13, 1, 2500):
    buffer, out = guarded(n)
    x, y = torch.randn(n), torch.randn(n)
    add(x, y, out, tile=8 if n < 100 else 1024)
    assert torch.equal(out, x + y)
    assert int((~buffer.isnan()).sum()) == n, "something was written outside"
print("right for 16, 13, 1 and 2500 numbers, and nothing outside was touched")

# %% [markdown]
# **Step 2, four bits.** Now the formula from above, line by line. It goes into a function of its own, because two kernels
# will use it; a function under `@triton.jit` that a kernel calls becomes part of that kernel.
#
# Reading the table of levels is one more load, with the codes as indices: a *gather*. It needs no mask, since a code is never
# larger than 15.


# %% tags=["build"]
@triton.jit
def load_weights(packed_ptr, absmax_ptr, levels_ptr, i, inside, BLOCK_SIZE: tl.constexpr):
    """The weights with the flat numbers i, in fp32; 0 where `inside` is false."""
    byte = tl.load(packed_ptr + i // 2, mask=inside, other=0).to(tl.int32)  # [TILE], two neighbours read the same one
    code = (byte >> 4 * (1 - i % 2)) & 15  # [TILE], the first of two in the upper half
    absmax = tl.load(absmax_ptr + i // BLOCK_SIZE, mask=inside, other=0.0)  # [TILE]
    # After 8 bits (page 06) a scale can come back slightly negative, and 0 times that is -0: adding 0 makes it +0.
    return tl.load(levels_ptr + code) * absmax + 0.0  # [TILE]


@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """out[i] = levels[code[i]] * absmax[i // BLOCK_SIZE]. One program owns TILE numbers. Grid: ceil(n / TILE)."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    weights = load_weights(packed_ptr, absmax_ptr, levels_ptr, i, i < n, BLOCK_SIZE)  # [TILE]
    tl.store(out_ptr + i, weights, mask=i < n)


def dequantize(q, tile=1024):
    out = torch.empty(q.shape)  # [out, in], fp32
    n, absmax = out.numel(), nf4.decode_absmax(q)  # [blocks], also where the scales are stored in 8 bits
    dequantize_kernel[(triton.cdiv(n, tile),)](q.packed, absmax, q.levels, out, n, BLOCK_SIZE=q.block_size, TILE=tile)
    return out


# %%
pencil = nf4.QuantizedWeight(
    packed=torch.tensor([0xF7, 0x0F, 0x70, 0xF7, 0x0F, 0x7F], dtype=torch.uint8),
    absmax=torch.tensor([2.0, 1.0, 3.0]),
    absmax2=None,
    offset=None,
    levels=nf4.codebook("nf4"),
    block_size=4,
    shape=torch.Size((3, 4)),
    dtype=torch.float32,
)
print(dequantize(pencil, tile=8).tolist())  # two programs, as on paper

# %% [markdown]
# **Step 3, multiply at once.** When a model writes one token after another, each weight is needed for one product with one
# vector. Writing the dense weight to memory, 4 bytes a number, and reading it again, would move many times more bytes than
# the half byte that the code is. So this kernel keeps the decoded weights where they are, in the program, multiplies them
# with `x`, and only writes the result.
#
# One program owns one *row*, that is, one output. A row may be longer than a tile, so it walks along the row tile by tile.
# `total` holds one sum for each lane; only at the end are the lanes added up. Masked lanes contribute 0, which is why `other`
# matters here. `COLUMNS` is a constant of the kernel, so that the compiler knows how often the loop runs.


# %% tags=["build"]
@triton.jit
def matvec_kernel(
    x_ptr, packed_ptr, absmax_ptr, levels_ptr, y_ptr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """y[row] = sum over k of W[row, k] x[k]. One program owns one row. Grid: number of rows."""
    row, total = tl.program_id(0), tl.zeros((TILE,), tl.float32)  # [TILE]
    for start in range(0, COLUMNS, TILE):
        column = start + tl.arange(0, TILE)  # [TILE]
        inside = column < COLUMNS  # [TILE]
        i = row * COLUMNS + column  # [TILE], where the numbers lie in the flat weight
        weights = load_weights(packed_ptr, absmax_ptr, levels_ptr, i, inside, BLOCK_SIZE)  # [TILE]
        total += weights * tl.load(x_ptr + column, mask=inside, other=0.0)  # [TILE]
    tl.store(y_ptr + row, tl.sum(total, axis=0))


def matvec(x, q, tile=256):
    rows, columns = q.shape
    y, absmax = torch.empty(rows), nf4.decode_absmax(q)  # [rows], [blocks]
    matvec_kernel[(rows,)](x, q.packed, absmax, q.levels, y, COLUMNS=columns, BLOCK_SIZE=q.block_size, TILE=tile)
    return y


# %% [markdown]
# ## Run it
#
# Odd sizes are where kernels break, so that is where we look: a weight of 61 by 131, whose rows begin in the middle of a byte
# and whose blocks of 64 run across the ends of rows.

# %%
q = nf4.quantize(torch.randn(61, 131), double_quant=False)
reference = nf4.dequantize(q)  # [61, 131]
x = torch.randn(131)  # [in]
assert torch.equal(dequantize(q), reference)
error = (matvec(x, q) - reference @ x).abs().max()
shared.say(
    f"Dequantized: bit for bit PyTorch's. The product: at most {error:.1e} away from PyTorch's, which adds up in another order."
)

# %% [markdown]
# ### How fast is it?
#
# Slow. The interpreter is Python: it runs one program after the other, and each line of a program is a NumPy operation on a
# tile. It is there to be *right*, and to let you print and debug. Here it is beside PyTorch on the same CPU:

# %%
from time import perf_counter


def milliseconds(function, repeats=3):
    def once():
        start = perf_counter()
        function()
        return perf_counter() - start

    once()  # the first run pays for what is done once
    return 1000 * sorted(once() for _ in range(repeats))[repeats // 2]


size = 2**16
q = nf4.quantize(torch.randn(size), double_quant=False)
interpreted, pytorch = milliseconds(lambda: dequantize(q)), milliseconds(lambda: nf4.dequantize(q))
shared.say(
    f"To dequantize {size:,} weights the interpreter takes {interpreted:.0f} ms and PyTorch {pytorch:.1f} ms: our kernel, "
    f"interpreted, is **{interpreted / pytorch:.0f} times** as slow."
)

# %% [markdown]
# ### What a GPU would do differently
#
# A time from the interpreter says nothing about a GPU. But the *compiler* runs on any machine, GPU or not, and what it makes
# can be read. So we compile our dequantization kernel for two GPUs that we do not have: `sm_90`, NVIDIA's H100, and `gfx942`,
# AMD's MI300. Beside it, the library's kernel for the same job.
#
# This happens in a second Python process, because Triton decides once, when it is imported, whether it interprets or compiles.
# The compiler has to be told what a launch would have told it: the type of each argument, the value of each constant, and one
# thing more, which turns out to matter: which arguments are multiples of 16. (Addresses of tensors are. `n` may be or not, so
# we ask for both.) The cell is book-keeping and folded: look at its output. The words in it are explained below.

# %% tags=["drawing"]
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = "import triton\nimport triton.language as tl\n\n"
COMPILER = '''
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minisft.kernels.dequantize import WORDS, _dequantize_kernel
from ours import dequantize_kernel

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}  # 32, 64: threads in a warp
POINTERS = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "levels_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
OURS = {**POINTERS, "BLOCK_SIZE": 64, "TILE": 1024}
THEIRS = {**POINTERS, "map_ptr": None, "absmax2_ptr": None, "offset_ptr": None, "BLOCK_SIZE": 64, "WORDS": WORDS}

def build(kernel, arguments, target, odd):
    types = {name: arguments[name] if isinstance(arguments[name], str) else "constexpr" for name in kernel.arg_names}
    constants = {name: arguments[name] for name, kind in types.items() if kind == "constexpr"}
    known = [p for p, (name, kind) in enumerate(types.items()) if kind[0] == "*" or (name == "n" and not odd)]
    multiples = {(place,): [["tt.divisibility", 16]] for place in known}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, types, constants, multiples), target=TARGETS[target], options=options)

def registers_and_stack(code):
    """Per thread: registers, and bytes of memory for what did not fit into them."""
    if "amdgcn" in code.asm:
        keys, text, pattern = ("vgpr_count", "private_segment_fixed_size"), code.asm["amdgcn"], r"\\.{}:\\s+(\\d+)"
        return [int(re.search(pattern.format(key), text)[1]) for key in keys]
    Path("kernel.cubin").write_bytes(code.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{key}:(\\d+)", text)[1]) for key in ("REG", "STACK")]

jobs = [("ours, any n", dequantize_kernel, OURS, True), ("ours, n % 16 == 0", dequantize_kernel, OURS, False),
        ("library, n % 16 == 0", _dequantize_kernel, THEIRS, False)]
results = []
for target in TARGETS:
    for name, kernel, arguments, odd in jobs:
        code = build(kernel, arguments, target, odd)
        numbers = arguments.get("TILE", 8 * WORDS) / (4 * TARGETS[target].warp_size)  # of each thread; 4 warps a program
        registers, stack = registers_and_stack(code)
        text = code.asm.get("ptx") or code.asm["amdgcn"]
        used = {"registers": registers, "stack": stack}
        results.append({"target": target, "name": name, "numbers": numbers, "text": text, **used})
json.dump(results, sys.stdout)
'''


def compiled():
    """Our kernel and the library's, for two GPUs: assembler text and what it uses."""
    ours = HEAD + "\n\n".join(inspect.getsource(kernel.fn) for kernel in (load_weights, dequantize_kernel))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ours.py").write_text(ours, encoding="utf-8")
        Path(folder, "compiler.py").write_text(COMPILER, encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "compiler.py"]
        run = subprocess.run(
            command, cwd=folder, env={**environment, "TRITON_CACHE_DIR": folder}, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


builds = compiled()
for build in builds:
    print(
        f"{build['target']:7} {build['name']:21} {build['numbers']:3.0f} numbers a thread, "
        f"{build['registers']:3} registers, {build['stack']} bytes spilled"
    )

# %% [markdown]
# A GPU divides a program once more. The tile is distributed over *threads*, 32 (or 64) of which run together as a *warp*.
# We asked for 4 warps (`num_warps`), so each thread owns a few neighbouring numbers of the tile. They are in *registers*, the
# fastest memory. With too few registers, values are *spilled* to slow memory: the first thing to look for.
#
# Now the instructions that touch memory. These are the stores of our kernel for the H100, first for any `n`, then for an `n`
# that is a multiple of 16:

# %%
for build in builds[:2]:
    stores = re.findall(r"st\.global\S*.*", build["text"])
    print(f"{build['name']}: {len(stores)} stores for {build['numbers']:.0f} numbers, the first of them:")
    print("   ", " ".join(stores[0].split()))

# %% [markdown]
# The same source line, `tl.store(out_ptr + i, ...)`. When `n` is a multiple of 16, the mask `i < n` cannot change in the
# middle of four neighbours, so the compiler stores four numbers, 16 bytes, with one instruction (`v4`). When nothing is known
# about `n`, every number gets an instruction and a mask of its own. Triton compiles both versions and chooses at each launch.
#
# Counting all of them, for every 32 weights:

# %%
WIDTHS = {"b8": 1, "b16": 2, "b32": 4, "v2.b32": 8, "v4.b32": 16}
WIDTHS |= {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
NVIDIA = re.compile(r"\b(ld|st)\.global\S*?\.((?:v\d\.)?b\d+)\s")
AMD = re.compile(r"\b(?:global|buffer)_(load|store)_(\w+)\s")


def accesses(build, kind):
    """Memory instructions of one kind for 32 weights, by width in bytes."""
    pattern = NVIDIA if build["target"] == "sm_90" else AMD
    counts = dict.fromkeys((1, 2, 4, 16), 0.0)
    for verb, width in pattern.findall(build["text"]):
        # The library's one-byte loads stand in a branch that only the last program takes.
        if verb[0] == kind[0] and not (WIDTHS[width] == 1 and build["name"].startswith("library")):
            counts[WIDTHS[width]] = counts.get(WIDTHS[width], 0) + 32 / build["numbers"]
    return counts


# %% tags=["drawing"]
fig, axes = shared.figure(width=8.0, height=3.6, columns=2)
shades = {1: "orange", 2: "purple", 4: "grey", 8: "green", 16: "blue"}
for ax, kind in zip(axes, ("load", "store"), strict=True):
    for row, build in enumerate(builds):
        left = 0.0
        for width, count in accesses(build, kind).items():
            ax.barh(row, count, left=left, color=shared.COLORS[shades[width]], height=0.65)
            left += count
        ax.text(left + 1, row, f"{left:.0f}", va="center")
    ax.set(xlabel=f"{kind} instructions for 32 weights", xlim=(0, 108 if kind == "load" else 40))
    ax.set_yticks(range(len(builds)), [f"{b['target']}  {b['name']}" for b in builds] if kind == "load" else [""] * len(builds))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
for place, width in enumerate((1, 2, 4, 16)):
    word = f"■ {width} byte" + ("s" if width > 1 else "")
    axes[0].text(0.02 + 0.42 * place, 1.04, word, color=shared.COLORS[shades[width]], transform=axes[0].transAxes)
shared.show(
    fig,
    "instructions",
    alt="The library's kernel needs fewer loads than ours for 32 weights, because it fetches 16 bytes of codes at once; "
    "load and store instructions on two GPUs, by width.",
)

# %% tags=["drawing"]
by_name = {(build["target"], build["name"]): build for build in builds}
ours_loads = accesses(by_name["sm_90", "ours, n % 16 == 0"], "load")
library_loads = accesses(by_name["sm_90", "library, n % 16 == 0"], "load")
on_amd = accesses(by_name["gfx942", "ours, n % 16 == 0"], "load")
shared.say(
    f"For 32 weights on the H100 our kernel issues {ours_loads[1]:.0f} loads of one byte for the codes, and "
    f"{ours_loads[4]:.0f} of 4 bytes for levels and scales. The library issues {library_loads[16]:.0f} of 16 bytes, and "
    f"{library_loads[4]:.0f} of 4 bytes. On the MI300 the compiler makes {sum(on_amd.values()):.0f} loads of our kernel when n "
    "is a multiple of 16" + (": it sees by itself that neighbours share." if sum(on_amd.values()) < 90 else ".")
)

# %% [markdown]
# That difference is what makes a kernel fast. Both kernels need the same bytes and do the same arithmetic. Ours asks for a
# code and a scale for each weight, and the compiler has to find out that neighbours share them. The library's kernel states
# it: it gives each thread 32-bit *words*, eight codes in each, and fetches one scale for a word. What is left in both is
# one table lookup a weight.
#
# What the interpreter cannot show you, then: speed; which thread holds what; and anything that depends on programs running
# *at the same time*. The third point matters most, as you will see below.
#
# What the interpreter cannot show you, then: speed; which thread holds what; and anything that depends on programs running
# *at the same time*. The third point has teeth, as you will see below.

# %% [markdown]
# ## The same as the library
#
# `minisft.kernels.dequantize` and `minisft.kernels.matvec` run under the interpreter too. The first has to agree to the bit.
# The second adds up in another order, so we allow it the rounding of its sums.

# %%
from minisft.kernels.dequantize import dequantize as library_dequantize
from minisft.kernels.matvec import matvec as library_matvec

for shape in ((61, 131), (48, 160), (1, 1)):
    q = nf4.quantize(torch.randn(shape), double_quant=False)
    assert torch.equal(dequantize(q), library_dequantize(q, torch.float32))

q = nf4.quantize(torch.randn(48, 160), double_quant=False)
x = torch.randn(160)
theirs = library_matvec(x[None], q)[0]  # [48]
torch.testing.assert_close(matvec(x, q), theirs)
print("dequantize: the same bits as the library. matvec: the same up to the order of the sum")

# %% [markdown]
# ## What usually goes wrong
#
# **"The mask is a detail."** You have seen it in step 0. Note that the *answer* was right: a test that only looks at the
# answer does not find a missing mask. Guard strips do.
#
# **"The low half of the byte comes first."** In some formats it does. In this one, the first number sits in the *upper* half,
# so the halves swapped give a weight in which neighbours have changed places. It looks like a weight, has the right histogram
# and the right scales, and is wrong:


# %%
@triton.jit
def swapped_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    byte = tl.load(packed_ptr + i // 2, mask=i < n, other=0).to(tl.int32)  # [TILE]
    code = (byte >> 4 * (i % 2)) & 15  # [TILE], the halves swapped
    absmax = tl.load(absmax_ptr + i // BLOCK_SIZE, mask=i < n, other=0.0)  # [TILE]
    tl.store(out_ptr + i, tl.load(levels_ptr + code) * absmax, mask=i < n)


dense = torch.randn(128, 128)
q = nf4.quantize(dense, double_quant=False)
swapped = torch.empty(128, 128)
swapped_kernel[(16,)](q.packed, q.absmax, q.levels, swapped, dense.numel(), BLOCK_SIZE=64, TILE=1024)
right_error, wrong_error = ((w - dense).norm() / dense.norm() for w in (dequantize(q), swapped))
same_histogram = torch.equal(swapped.flatten().sort().values, dequantize(q).flatten().sort().values)
shared.say(
    f"Error of the right kernel {right_error:.2f}, of the swapped one {wrong_error:.2f} of the weight's length. "
    f"The same numbers in another order: {same_histogram}."
)
assert wrong_error > 5 * right_error

# %% [markdown]
# **"It works in the interpreter, so it works."** Here is a sum over a vector. Each program adds up its tile, then adds that
# to the total in memory: load, add, store.


# %%
@triton.jit
def racing_sum_kernel(x_ptr, total_ptr, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    part = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0), axis=0)
    tl.store(total_ptr, tl.load(total_ptr) + part)


x, total = torch.ones(1000), torch.zeros(1)
racing_sum_kernel[(triton.cdiv(1000, 64),)](x, total, 1000, TILE=64)
print("in the interpreter:", total.item())

# Sixteen programs at once: all load before any of them stores.
parts = [x[start : start + 64].sum() for start in range(0, 1000, 64)]
seen = [0.0] * len(parts)  # what each of them loaded
for before, part in zip(seen, parts, strict=True):
    total = before + part  # the last store wins
print("if all of them load first:", total.item())

# %% [markdown]
# The interpreter runs the programs one after the other, so each finds what the one before it stored. On a GPU they run at the
# same time, in no order: several load the same old total, and the last to store overwrites the others. The second line shows the
# worst case on the CPU. A GPU gives something in between, and something else each time.
#
# The cure is `tl.atomic_add`. Where the same bits are wanted on every run, as in the library, each program writes its part to a
# position of its own, and the parts are added up afterwards.

# %% [markdown]
# ## Exercises
#
# **1. A transposed read.** Write `transpose(matrix, out)`, which launches a kernel of yours and fills `out` ([columns, rows])
# with the transpose of `matrix` ([rows, columns]). Take a tile with two axes: `row[:, None]` and `column[None, :]` make one
# of shape [TILE, TILE], and the grid may have two axes as well, `tl.program_id(0)` and `tl.program_id(1)`. Element (row,
# column) lies at `row * columns + column`.


# %% tags=["exercise"]
def transpose(matrix, out):
    """out[c, r] = matrix[r, c]. Both are contiguous, and neither side is a multiple of anything."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_transpose(answer):
    for rows, columns in ((16, 16), (5, 7), (33, 20), (1, 40)):
        matrix = torch.randn(rows, columns)
        buffer, flat = guarded(rows * columns)
        out = flat.view(columns, rows)  # [columns, rows]
        answer(matrix, out)
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), (  # noqa: PT018
            f"for {rows} x {columns} something was written outside of out: mask the rows and the columns, in the store too"
        )
        assert not out.isnan().any(), f"for {rows} x {columns} parts of out were never written: is the grid large enough?"
        assert torch.equal(out, matrix.T), (
            f"for {rows} x {columns} numbers lie in the wrong places: out[c, r] is at c * rows + r"
        )


shared.grade(check_transpose, transpose)


# %% tags=["solution"]
@triton.jit
def transpose_kernel(in_ptr, out_ptr, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]  # [TILE, 1]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]  # [1, TILE]
    inside = (row < rows) & (column < columns)  # [TILE, TILE]
    values = tl.load(in_ptr + row * columns + column, mask=inside, other=0.0)  # [TILE, TILE]
    tl.store(out_ptr + column * rows + row, values, mask=inside)


def transpose(matrix, out):
    rows, columns = matrix.shape
    transpose_kernel[(triton.cdiv(rows, 16), triton.cdiv(columns, 16))](matrix, out, rows, columns, TILE=16)


shared.grade(check_transpose, transpose)

# %% [markdown]
# **2. One program, one block, and the block has 48 numbers.** Our kernel fetches a scale for every weight. If a program owns
# exactly one block, one scale will do. But a tile has a power of two lanes, and this block size is none: take 64 lanes for 48
# numbers. Write `dequantize_blocks(packed, absmax, levels, out, block_size, programs)`, which launches `programs` programs,
# the first of them for block 0. The last block may be short.
#
# (The check runs block 0 alone and looks what else was written. Can you say why it must, given what you have just read about
# the interpreter?)


# %% tags=["exercise"]
def dequantize_blocks(packed, absmax, levels, out, block_size, programs):
    """Program p writes block p of out ([n], fp32), which has block_size numbers, and nothing else."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_dequantize_blocks(answer):
    levels = nf4.codebook("nf4")
    for n, block_size in ((96, 48), (101, 48), (64, 32), (77, 20)):
        blocks = -(-n // block_size)
        packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
        absmax = torch.rand(blocks) + 0.5  # [blocks]
        expected = levels[nf4.unpack(packed, n).long()] * absmax.repeat_interleave(block_size)[:n]  # [n]
        _, out = guarded(n)
        answer(packed, absmax, levels, out, block_size, 1)
        assert out[block_size:].isnan().all(), (
            f"blocks of {block_size}: program 0 wrote into the next block. The interpreter hides it, since program 1 comes "
            "later and writes it again; on a GPU the two race. Mask the lanes beyond block_size"
        )
        buffer, out = guarded(n)
        answer(packed, absmax, levels, out, block_size, blocks)
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), (  # noqa: PT018
            f"{n} numbers in blocks of {block_size}: something was written behind the end. The last block is short"
        )
        assert torch.equal(out, expected), (
            f"{n} numbers in blocks of {block_size}: wrong values. Block p begins at p * block_size, whatever the tile's size"
        )


shared.grade(check_dequantize_blocks, dequantize_blocks)


# %% tags=["solution"]
@triton.jit
def dequantize_blocks_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, block_size, TILE: tl.constexpr):
    block, lane = tl.program_id(0), tl.arange(0, TILE)  # [TILE]
    i = block * block_size + lane  # [TILE]
    inside = (lane < block_size) & (i < n)  # [TILE]
    byte = tl.load(packed_ptr + i // 2, mask=inside, other=0).to(tl.int32)  # [TILE]
    code = (byte >> 4 * (1 - i % 2)) & 15  # [TILE]
    tl.store(out_ptr + i, tl.load(levels_ptr + code) * tl.load(absmax_ptr + block), mask=inside)  # one scale for all


def dequantize_blocks(packed, absmax, levels, out, block_size, programs):
    tile = triton.next_power_of_2(block_size)
    dequantize_blocks_kernel[(programs,)](packed, absmax, levels, out, out.numel(), block_size, TILE=tile)


shared.grade(check_dequantize_blocks, dequantize_blocks)

# %% [markdown]
# ## What was not shown
#
# - **A real GPU's clock.** This page ran none of its kernels on a GPU. The library's own kernels are built of the same parts,
#   and timed where there is one.
# - **Matrix times matrix.** With many rows of `x` one uses `tl.dot`, which reaches the tensor cores, and tiles with two axes.
# - **Half precision.** Our kernels write float32. Rounding to bfloat16 is one `.to(tl.bfloat16)` on a GPU; the interpreter of
#   some versions rounds it the wrong way (it cuts off), so test that part on real hardware.
# - **Large weights.** `i` has 32 bits here. Beyond two billion numbers it must have 64: `tl.program_id(0).to(tl.int64)`.
# - **The scales in 8 bits.** The library decodes them inside the same kernel. We let PyTorch do it first.

# %% [markdown]
# ## Summary
#
# > - A kernel is one program that runs many times; its number, `tl.program_id(0)`, says which piece it owns.
# > - It gets addresses instead of tensors, and a mask keeps lanes away from memory that is not theirs.
# > - A right answer does not prove a right mask. Guard strips around the result do.
# > - Multiplying while decoding avoids writing the dense weight to memory.
# > - The interpreter shows what is computed. It shows neither speed nor races between programs.
#
# You can now answer:
#
# <details>
# <summary>A kernel is right for 1,024 and 2,048 numbers and wrong for 1,000. What do you check?</summary>
#
# The masks of all loads and of the store, the value of `other` where lanes are summed, and the grid (`cdiv`, not `//`).
#
# </details>
#
# <details>
# <summary>Why does the matrix-vector kernel move fewer bytes than dequantizing first?</summary>
#
# A code is half a byte. A dense fp32 weight is 4 bytes, written once and read again. The fused kernel reads the codes and writes
# only the result.
#
# </details>

# %% [markdown]
# ## References
#
# - Tillet, Kung and Cox 2019, *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*, MAPL
#   2019, <https://doi.org/10.1145/3315508.3329973>.
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*,
#   [arXiv:2305.14314](https://arxiv.org/abs/2305.14314): the format that is decoded here.
# - The Triton authors, [tutorials](https://triton-lang.org/main/getting-started/tutorials/index.html): the next step, on a
#   GPU.
# - Rush, [Triton Puzzles](https://github.com/srush/Triton-Puzzles): more exercises, also without a GPU.
