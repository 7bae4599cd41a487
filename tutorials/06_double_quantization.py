# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Double quantization and the memory bill
#     minutes: 1
#     needs: tiny
#     after: ["05"]
#     contract:
#       dynamic_map: minisft.nf4.dynamic_map
#       quantize_absmax: minisft.nf4.quantize_absmax
#       decode_absmax: minisft.nf4.decode_absmax
#       bill: minisft.training.memory_estimate.estimate_step
#     refs: [dettmers2023qlora, dettmers2021eightbit, rajbhandari2019zero]
# ---

# %% [markdown]
# # 06 Double quantization and the memory bill
#
# The scales of page 05 cost half a bit a weight. On this page you store the scales themselves in 8 bits, as QLoRA does, and
# three quarters of that cost are gone. Then you count every byte of a training step, from the tensors themselves, for full
# fine-tuning, LoRA and QLoRA, and see what each of them pays for.

# %% [markdown]
# ## You need, you get
#
# **You need** page 05 (blocks, absmax, codes) and no pretrained model. It helps to know that LoRA freezes the model's
# weights and trains small matrices, the *adapters*, beside them; page 03 shows it.
#
# **You get**, in a minute of running time: the 8-bit code for scales, a function `bill()` that says where the memory of a
# training step goes, and an answer to "does it fit?" that does not come from multiplying by two bytes a weight.

# %% tags=["setup"]
import torch
from matplotlib.patches import Rectangle
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad

import shared
from minisft import nf4
from minisft.batching import Batch
from minisft.config import ModelConfig, RunConfig
from minisft.formats.loading import empty_model, expected_shapes, nf4_bytes
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.step import batch_loss_sum, prepare_method, train_step
from minisft.surgery import lora_modules, nf4_modules, quantization_targets, quantize_
from minisft.training.memory_estimate import Shape, estimate_step

shared.start("06", seed=0)

# %% [markdown]
# Here is the bill for a model of seven billion weights, one row of 512 tokens at a time. Nothing of that size is allocated:
# `minisft plan` estimates a step with tensors that have a shape and no memory. We trust it for now. Further down you count
# the bytes of a small model yourself, and compare. Adapters have rank 16 and are on all linear layers but the output head.
# A *master* is an fp32 copy of a bf16 weight, which the optimizer updates.

# %% tags=["drawing"]
METHODS = {
    "full fine-tuning": {"method": "full"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "lora", "quant": "nf4"},
}
LINES = {  # of a bill: what the bars call them, colour, opacity
    "codes": ("4-bit codes", "blue", 0.9),
    "scales": ("their scales", "black", 0.9),
    "weights": ("dense weights, bf16", "grey", 0.6),
    "adapters": ("adapters, fp32", "green", 0.9),
    "gradients": ("gradients, fp32", "orange", 0.8),
    "optimizer": ("optimizer and masters, fp32", "purple", 0.8),
    "activations": ("activations", "blue", 0.3),
}


def settings(method, rows, tokens):
    return RunConfig(
        model="", data="", out="", device="cpu", dtype="bf16", rank=16, batch_size=rows, max_length=tokens, **METHODS[method]
    )


def planned(config, run):
    """The library's bill, in bytes by line, from shapes alone."""
    model = empty_model(config)  # shapes and no memory
    shapes, quant = expected_shapes(model), run.quantization
    packed = {} if quant is None else {f"{path}.weight": quant for path in quantization_targets(model, quant)}
    numbers = [torch.Size(shapes[name]).numel() for name in packed]
    codes, all_4_bit = sum(n // 2 for n in numbers), sum(nf4_bytes(n, quant) for n in numbers)
    step = estimate_step(run, Shape(config, shapes, packed), torch.device("cpu"))
    return {"codes": codes, "scales": all_4_bit - codes} | {line: step.whole[line] for line in list(LINES)[2:]}


def draw(ax, bills, unit, unit_name):
    """A stacked bar for each bill."""
    for y, lines in enumerate(reversed(bills.values())):
        left = 0.0
        for line, (_, colour, alpha) in LINES.items():
            ax.barh(y, lines[line] / unit, left=left, color=shared.COLORS[colour], alpha=alpha, height=0.6)
            left += lines[line] / unit
        ax.text(left, y, f"  {left:,.1f} {unit_name}", va="center", fontsize=9)
    ax.set_yticks(range(len(bills)), list(reversed(bills)))
    ax.set(xlabel=f"memory, {unit_name}", xlim=(0, 1.18 * max(sum(lines.values()) for lines in bills.values()) / unit))
    ax.grid(visible=False, axis="y")


def explain(ax):
    """The colours, where the bars leave room."""
    patches = [Rectangle((0, 0), 1, 1, color=shared.COLORS[colour], alpha=alpha) for _, colour, alpha in LINES.values()]
    ax.legend(patches, [name for name, _, _ in LINES.values()], loc="lower right", fontsize=8, ncols=2)


SEVEN_BILLION = ModelConfig("llama", 32000, 4096, 11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128)
large = {method: planned(SEVEN_BILLION, settings(method, 1, 512)) for method in METHODS}

# %% tags=["drawing"]
fig, axes = shared.figure(height=4.6, rows=2)
draw(axes[0], large, 1e9, "GB")
axes[0].set_title("seven billion weights")
explain(axes[0])
draw(axes[1], {method: large[method] for method in ("LoRA", "QLoRA")}, 1e9, "GB")
axes[1].set_title("the lower two, enlarged")
shared.show(
    fig,
    "seven_billion",
    "Full fine-tuning pays for the optimizer, LoRA for the weights, QLoRA for 4-bit weights and activations.",
)

# %% [markdown]
# Three bars, three different problems. In full fine-tuning the weights themselves are a minor part; most is what training
# adds to each of them. LoRA removes that, and the frozen weights remain. QLoRA makes those smaller, and the activations
# become a large part. No quantization of weights makes them smaller, and they grow with the length of the rows.

# %% [markdown]
# ## The idea
#
# **Double quantization.** One fp32 scale for 64 weights is half a bit a weight. Smaller scales, then: treat the scales as if
# *they* were weights. Take 256 of them as a block, divide by their largest magnitude, round each to the nearest of 256 levels,
# keep the 8-bit code. One fp32 number for 256 scales, that is for 16,384 weights, is nearly nothing. The weights' own codes are
# chosen first, with the exact scales of page 05; only then are the scales rounded.
#
# Two details make it work.
#
# - **The mean comes off first.** Scales are all positive, and much alike. Without their mean, what is left is on both sides
#   of zero and is small, so the same 256 levels resolve it more finely. The mean is one number for the whole matrix.
# - **The levels are a *dynamic map*.** It has levels for numbers near one and for numbers near a millionth, like a
#   floating-point format: seven decades, and each larger decade twice as many levels.
#
# **The bill.** While a model trains, six kinds of tensors are alive: weights, adapters (if any), gradients, the optimizer's
# state, activations, and short-lived temporaries, which we leave out. The optimizer's state is what Adam remembers: two
# running means for each trained weight, and an fp32 *master* copy where the weight itself is bf16. Activations are what the
# forward pass keeps for the backward pass. The bill is a list of tensors. No formula.

# %% [markdown]
# ## The formula
#
# For scales $s_1, \dots, s_N$ with mean $\bar s$, one block of 256 of them at a time, and levels $m_0, \dots, m_{255}$:
#
# $$d_i = s_i - \bar s \qquad t = \max_i |d_i| \qquad q_i = \mathrm{argmin}_q \left| m_q - \frac{d_i}{t} \right|$$
#
# $$\hat s_i = m_{q_i} \cdot t + \bar s$$
#
# So a weight costs 4 bits for its own code, 8 bits shared by 64, and 32 bits shared by 64 times 256:
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256}$$
#
# instead of $4 + \frac{32}{64}$.
#
# The dynamic map: decade $i = 0, \dots, 6$ reaches from $10^{i-7}$ to $10^{i-6}$, so that the last one, decade 6, ends at 1.
# Cut it into $2^i$ equal parts; the middle of each part is a level, and so is its negative. That is 127 positive levels and 127
# negative ones. Zero and one are added: 256. Minus one is not among them.

# %% tags=["drawing"]
fig, ax = shared.figure(height=2.9)
for i in range(7):
    edges = torch.linspace(0.1, 1.0, 2**i + 1) * 10.0 ** (i - 6)
    middles = (edges[:-1] + edges[1:]) / 2
    ax.plot(middles, torch.full_like(middles, i), "|", ms=12, color=shared.COLORS["blue"])
    ax.text(1.6 * 10.0 ** (i - 6), i, f"{2**i}", va="center", color=shared.COLORS["grey"], fontsize=9)
ax.set(
    xscale="log", xlabel="positive levels of the dynamic map (log scale)", ylabel="decade i", yticks=range(7), xlim=(5e-8, 4)
)
shared.show(
    fig,
    "dynamic_map",
    "The dynamic map has twice as many levels in each larger decade: one near a millionth, 64 below one.",
)

# %% [markdown]
# ## By hand: 3 x 4
#
# Twelve scales, one block, numbers chosen for a pencil. Their mean is 20 and the largest deviation is 4.
#
# | scales | minus the mean | divided by 4 | codes |
# |---|---|---|---|
# | 20, 24, 22, 18 | 0, 4, 2, -2 | 0, 1, 0.5, -0.5 | 127, 255, 219, 35 |
# | 21, 19, 20, 16 | 1, -1, 0, -4 | 0.25, -0.25, 0, -1 | 201, 53, 127, 0 |
# | 20, 23, 17, 20 | 0, 3, -3, 0 | 0, 0.75, -0.75, 0 | 127, 237, 17, 127 |
#
# Take 0.5. The largest decade runs from 0.1 to 1 in 64 parts, and 0.5 is $(0.5 - 0.1) / 0.9 \cdot 64 = 28.4$ parts in,
# so inside part 28 (counted from 0). The middle of that part is $0.1 + 0.9 \cdot 28.5 / 64 = 0.50078$. On the way back it
# becomes $0.50078 \cdot 4 + 20 = 22.003$ instead of 22.
#
# Its code is its place in the sorted map. Zero has place 127. Above it come the decades with 1, 2, 4, 8, 16, 32 levels,
# together 63, and then the 64 of the largest: $127 + 1 + 63 + 28 = 219$. The negative side is the mirror image, so -0.5
# has code $254 - 219 = 35$. The 1 that was added is the last, code 255. And -1, which the map does not have, takes the lowest
# level: code 0, which is $-0.9930$.

# %% [markdown]
# ## Build it
#
# The map, then quantize and decode. You will recognize page 05: blocks, the largest magnitude, reciprocal, midpoints.


# %% tags=["build"]
def dynamic_map():
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()  # 2^i of them; decade 6 ends at 1
        values += [*middles, *(-m for m in middles)]
    return torch.tensor(sorted(values))  # [256]


def quantize_absmax(absmax):
    offset = absmax.mean()  # []
    blocks = pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)  # [N] -> [M, 256]
    absmax2 = blocks.abs().amax(dim=1)  # [M]
    scaled = blocks * (1 / absmax2.clamp(min=nf4.TINY))[:, None]  # [M, 256]
    levels = dynamic_map()
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)  # [M, 256]
    return codes.flatten()[: len(absmax)].to(torch.uint8), absmax2, offset


def decode_absmax(codes, absmax2, offset):
    scales = absmax2.repeat_interleave(256)[: len(codes)]  # [M] -> [N]
    # The scale of a block of zeros may come back a little below zero, and its zeros as -0: hence the library's + 0.0.
    return dynamic_map()[codes.int()] * scales + offset


# %% [markdown]
# Now the bill: a list of tensors for each line. PyTorch tells us two things about a tensor: how large the block of memory
# behind it is, and its address. Two views of one block, or tied weights, have the same address and are paid once.
# `saved_tensors_hooks` tells which tensors the forward pass puts aside for the backward pass. A block belongs to the first
# line that claims it, so an activation that is really a weight is not paid again.
#
# The optimizer is the library's: it keeps an fp32 *master* of each bf16 weight that is trained, collects the gradients there,
# and remembers two running means. Adapters are fp32 already and are their own masters.


# %% tags=["build"]
def bill(model, optimizer, compute_loss):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute_loss()
    loss.backward()
    lines = {
        "codes": [layer.packed for layer in nf4_modules(model).values()],
        "scales": model.buffers(),  # what is left of the 4-bit layers
        "adapters": [factor for layer in lora_modules(model).values() for factor in (layer.lora_A, layer.lora_B)],
        "weights": model.parameters(),  # those that are no adapters
        "gradients": [master.grad for master in optimizer.master_weights.values()],
        "optimizer": optimizer.state().values(),
        "activations": kept,
    }
    paid, seen = {}, set()
    for line, tensors in lines.items():
        blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        paid[line] = sum(num_bytes for place, num_bytes in blocks.items() if place not in seen)
        seen |= blocks.keys()
    return paid


# %% [markdown]
# Your pencil first:

# %%
by_hand = torch.tensor([[20.0, 24, 22, 18], [21, 19, 20, 16], [20, 23, 17, 20]])  # [3, 4]
codes, absmax2, offset = quantize_absmax(by_hand.flatten())
assert codes.view(3, 4).tolist() == [[127, 255, 219, 35], [201, 53, 127, 0], [127, 237, 17, 127]]
assert (absmax2.tolist(), float(offset)) == ([4.0], 20.0)
print(decode_absmax(codes, absmax2, offset).view(3, 4))

# %% [markdown]
# ## Run it
#
# ### The scales of a matrix
#
# A matrix of normal numbers has been cut into blocks of 64. Left, its scales divided by the largest, over the 256 levels of the
# map. Right, the same after the mean has come off. Each tick is a level.

# %%
weight = 0.02 * torch.randn(2048, 1024)
absmax = nf4.quantize(weight, double_quant=False).absmax  # [32768]
levels = dynamic_map()

# %% tags=["drawing"]
fig, axes = shared.figure(height=3.0, columns=2)
for ax, values, title in ((axes[0], absmax, "scales as they are"), (axes[1], absmax - absmax.mean(), "without their mean")):
    heights, edges = torch.histogram(values / values.abs().max(), bins=80, range=(-1.0, 1.0), density=True)
    ax.stairs(heights, edges, fill=True, color=shared.COLORS["blue"], alpha=0.45)
    ax.vlines(levels, -0.09 * heights.max(), 0, color=shared.COLORS["orange"], linewidth=0.6)
    ax.set(title=title, xlabel="scale / largest magnitude", xlim=(-1.05, 1.05), yticks=[])
axes[0].set_ylabel("density")
shared.show(
    fig,
    "offset",
    "Without their mean (right) the scales are where the levels are dense; with it (left) half of the levels are never used.",
)

# %% [markdown]
# Left, half of the levels are where no scale can ever be. Right, both halves are used, most scales are near zero, and there
# the levels are dense. What is the mean worth?


# %%
def absmax_error(rebuilt):
    return float(((rebuilt - absmax).abs() / absmax).mean())


def without_mean(absmax):
    blocks = absmax.view(-1, 256)  # [M, 256]
    absmax2 = blocks.amax(dim=1, keepdim=True)  # [M, 1]
    codes = torch.bucketize(blocks / absmax2, (levels[:-1] + levels[1:]) / 2)
    return (levels[codes] * absmax2).flatten()  # [N]


rebuilt = decode_absmax(*quantize_absmax(absmax))
with_mean_error, plain_error = absmax_error(rebuilt), absmax_error(without_mean(absmax))


def weight_error(double_quant):
    restored = nf4.dequantize(nf4.quantize(weight, double_quant=double_quant))
    return float((restored - weight).norm() / weight.norm())


shared.say(
    f"A scale comes back within {with_mean_error:.2%} on average; without the mean it would be {plain_error:.2%}. Both are "
    f"small beside what 4 bits do to a weight anyway: the restored matrix is off by {weight_error(False):.3%} with fp32 scales "
    f"and by {weight_error(True):.3%} with scales in 8 bits."
)

# %% [markdown]
# ### The bill of a small model
#
# Now bytes that really exist. A random model of four layers makes one real training step, so that the optimizer has something
# to remember, and then `bill` watches a second one. Three times: in full, with adapters, with adapters on 4-bit weights.

# %%
SMALL = ModelConfig("llama", 2048, 256, 704, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64)


# %%
def measured(config, run):
    """Your bill of a model that exists and trains."""
    model = CausalLM(config).to(torch.bfloat16)
    if run.quantization is not None:
        quantize_(model, run.quantization)
    optimizer = MasterAdamW(prepare_method(model, run), betas=(0.9, 0.999), weight_decay=0.0)
    ids = torch.randint(0, config.vocab_size, (run.batch_size, run.max_length))  # [B, T]
    batch = Batch(ids, ids, torch.ones_like(ids), ids.numel(), ids.numel(), ())
    train_step(model, optimizer, [batch], lr=1e-4)
    return bill(model, optimizer, lambda: batch_loss_sum(model, batch))


runs = {method: settings(method, rows=2, tokens=128) for method in METHODS}
small = {method: measured(SMALL, run) for method, run in runs.items()}

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.2)
draw(ax, small, 1e6, "MB")
explain(ax)
shared.show(
    fig,
    "small",
    "Measured on a small model: the optimizer is the largest part of full fine-tuning and nearly gone with LoRA.",
)
full, lora, qlora = small.values()


def size(num_bytes):
    return f"{num_bytes / 1e6:,.1f} MB"


trained = size(lora["optimizer"] + lora["gradients"])
replaced = size(lora["weights"] - qlora["weights"])
kept_before, kept_after = size(lora["activations"]), size(qlora["activations"])
shared.say(
    f"Adam and its masters take {full['optimizer'] / full['weights']:.0f} times the bytes of the bf16 weights, the gradients "
    f"{full['gradients'] / full['weights']:.0f} times. LoRA brings the two down to {trained}. QLoRA replaces {replaced} of "
    f"dense weights by {size(qlora['codes'])} of codes and {size(qlora['scales'])} of scales; the embedding and the output "
    f"head stay dense. The activations are {kept_before} before and {kept_after} after: 4-bit weights do not touch them."
)

# %% [markdown]
# ### Bits a weight
#
# From the tensors, not from the formula. The library's `QuantizedWeight` also stores the 16 levels and the offset, 68
# bytes a matrix; the formula leaves those out, and so does this sum.

# %%
q = nf4.quantize(weight)
real_bits = 8 * (q.packed.nbytes + q.absmax.nbytes + q.absmax2.nbytes) / weight.numel()
assert real_bits == 4 + 8 / 64 + 32 / (64 * 256)
assert q.nbytes == real_bits * weight.numel() / 8 + 68
shared.say(f"{real_bits:.3f} bits a weight, where page 05 needed {4 + 32 / 64:.3f} and bf16 needs 16.")

# %% [markdown]
# ## The same as the library
#
# Map, codes, scales of scales, mean and rebuilt scales equal `minisft.nf4` bit for bit. And the bytes that you counted on
# living tensors equal the library's memory estimate, line by line and exactly, with one exception. Among the activations the
# estimate also counts what happens to be alive when the backward pass begins, though it is not needed there: the loss, and
# up to two integers a token that give its position, and three a row that say where it lies.

# %%
assert torch.equal(dynamic_map(), nf4.dynamic_map(torch.device("cpu")))
mine, library = quantize_absmax(absmax), nf4.quantize_absmax(absmax)
for yours, theirs in zip(mine, library, strict=True):
    assert torch.equal(yours, theirs)
assert torch.equal(mine[0], q.absmax)
assert torch.equal(decode_absmax(*mine), nf4.decode_absmax(q))

for method, run in runs.items():
    expected = planned(SMALL, run)
    alive = 8 * run.batch_size * (2 * run.max_length + 3) + 4  # two int64 a token, three a row, one fp32
    for line in LINES:
        not_counted = expected[line] - small[method][line]
        assert 0 <= not_counted <= (alive if line == "activations" else 0), (method, line)
shared.say(f"{len(runs)} bills of {len(LINES)} lines: counted and planned agree.")

# %% [markdown]
# That earns the picture at the top some trust: it is the same estimate, with more layers. For your own run the command line
# gives it before anything is loaded: `minisft plan --model ... --quant nf4`.

# %% [markdown]
# ## What usually goes wrong
#
# ### "Full fine-tuning of 7B needs 28 GB"
#
# Seven billion times four bytes: that is fp32 weights alone. To train them takes gradients and an optimizer too.

# %%
folklore = 28e9
full = large["full fine-tuning"]
numbers = full["weights"] / 2  # bf16
states = full["weights"] + full["gradients"] + full["optimizer"]
assert 3 * folklore < states < sum(full.values())
paper_gb = shared.paper("dettmers2023qlora", "vram_65b_full_gb")
shared.say(
    f"Weights, gradients and optimizer of this model of {numbers / 1e9:.1f} billion: {states / 1e9:.1f} GB of the "
    f"{sum(full.values()) / 1e9:.1f} GB in the first picture; the rest are activations. That is {states / numbers:.0f} bytes a "
    f"weight and {states / folklore:.1f} times the folklore."
)
shared.say(
    f"How many bytes it is depends on what is kept. The QLoRA paper's figure for 65B, more than {paper_gb} GB, is "
    f"{paper_gb / 65:.0f} bytes a weight, which leaves no room for fp32 masters. No count gives four."
)

# %% [markdown]
# ### "Double quantization saves `0.127` bits a weight"
#
# The number is right and the word is not: it is what the scales *still cost*.

# %%
before = nf4.quantize(weight, double_quant=False)
cost_before = 8 * before.absmax.nbytes / weight.numel()
cost_after = 8 * (q.absmax.nbytes + q.absmax2.nbytes) / weight.numel()
claimed = shared.paper("dettmers2023qlora", "double_quantization_saves_bits")
assert round(cost_before - cost_after, 3) == claimed
saved_65b = (cost_before - cost_after) * 65e9 / 8
shared.say(
    f"The scales cost {cost_before:.3f} bits a weight before and {cost_after:.3f} after. Saved: "
    f"{cost_before - cost_after:.3f}, as the paper says ({claimed}). For 65 billion weights that is {saved_65b / 1e9:.1f} GB."
)

# %% [markdown]
# ### "A 4-bit model is a quarter of the 16-bit one"
#
# Codes are a quarter. The scales come on top, and whatever is not a linear layer stays as it was: embedding, output head,
# norms.

# %%
rows = []
for name, bills in (("the small model", small), ("seven billion", large)):
    dense = bills["LoRA"]["weights"]
    in_4_bits = sum(bills["QLoRA"][line] for line in ("codes", "scales", "weights"))
    assert in_4_bits > dense / 4
    rows.append(f"{name}: {in_4_bits / dense:.1%}, of which dense {bills['QLoRA']['weights'] / dense:.1%}")
shared.say("Size of the QLoRA base, in percent of the bf16 one: " + "; ".join(rows) + ".")

# %% [markdown]
# The smaller the model, the larger the share of its vocabulary, and the less 4 bits help.

# %% [markdown]
# ## Exercises
#
# ### 1. Other block sizes
#
# Write `bits_per_weight(block_size)` for NF4 with double quantization, blocks of `block_size` weights, and 256 scales to
# a block of scales. What do blocks of 128 and of 512 cost?


# %% tags=["exercise"]
def bits_per_weight(block_size):
    raise NotImplementedError("your turn: three terms")


# %% tags=["check"]
def check_bits_per_weight(answer):
    for block_size in (64, 128, 512):
        q = nf4.quantize(torch.randn(256 * block_size), block_size)  # one whole block of scales
        real = 8 * (q.packed.nbytes + q.absmax.nbytes + q.absmax2.nbytes) / q.shape.numel()
        found = answer(block_size)
        assert found != 4 + 8 / block_size, "the second level is missing: 256 scales share an fp32 number"
        assert found != 4 + 32 / block_size, "that is one fp32 scale a block, without double quantization"
        assert abs(found - real) < 1e-9, f"the tensors say {real:.6f} bits for blocks of {block_size}, your formula {found:.6f}"


shared.grade(check_bits_per_weight, bits_per_weight)


# %% tags=["solution"]
def bits_per_weight(block_size):
    return 4 + 8 / block_size + 32 / (block_size * 256)


shared.grade(check_bits_per_weight, bits_per_weight)
print({block_size: bits_per_weight(block_size) for block_size in (64, 128, 512)})

# %% [markdown]
# ### 2. A block of zeros
#
# Pruned rows and padded vocabularies bring blocks that are all zero. Their scale is zero, and zero divided by zero is NaN ("not
# a number"), which compares as neither smaller nor larger than anything. Page 05 has a `clamp` for them. Write
# `block_codes(block, levels)`, page 05's coding of one block, in `torch.uint8`, and try it without the `clamp` first: the check
# tells what then becomes of the zeros.
#
# Does it matter, if the scale is zero anyway? With double quantization it does. The check shows how.


# %% tags=["exercise"]
def block_codes(block, levels):
    raise NotImplementedError("your turn: page 05's quantize without the packing")


# %% tags=["check"]
def check_block_codes(answer):
    levels, ordinary = nf4.codebook("nf4"), 0.02 * torch.randn(64)
    codes = answer(ordinary, levels)
    assert codes.dtype == torch.uint8, "codes are torch.uint8"
    expected = nf4.unpack(nf4.quantize(ordinary, double_quant=False).packed, 64)
    assert torch.equal(codes, expected), "an ordinary block gets other codes than page 05 gives it"
    scales = torch.linspace(0, 0.08, 40)  # [40]; the first belongs to a block of zeros
    scale = decode_absmax(*quantize_absmax(scales))[0]  # after 8 bits it is not quite zero any more
    codes = answer(torch.zeros(64), levels)
    zero = float(levels[codes.int()][0] * scale)
    assert zero == 0, (
        f"0 / 0 is NaN and took code {int(codes[0])}; its scale comes back as {scale:.1e}, so its zeros as {zero:.1e}"
    )


shared.grade(check_block_codes, block_codes)


# %% tags=["solution"]
def block_codes(block, levels):
    scaled = block * (1 / block.abs().max().clamp(min=nf4.TINY))  # [64], zeros stay zeros
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


shared.grade(check_block_codes, block_codes)

# %% [markdown]
# ## What was not shown
#
# - Temporaries: the logits, a weight made dense for a moment, the working memory inside one operator. `minisft plan`
#   lists them.
# - The *peak*. Not everything on a bill is alive at the same moment: activations go as gradients come. The bars add up
#   everything.
# - Checkpointing, which keeps fewer activations and computes them again (`--checkpointing`), and paged optimizers.
# - Real weights. The scales of a trained matrix vary more than those of normal numbers, because its rows differ in size,
#   so both errors are larger there. Page 05's weights are at hand: try it.
# - Memory that PyTorch holds and does not use. The gaps between blocks are real, and no list of tensors shows them.

# %% [markdown]
# ## Summary
#
# > - Scales are numbers too: 256 of them share one fp32 number, and each keeps an 8-bit code.
# > - Their mean comes off first, so that small deviations use all of the map.
# > - NF4 with double quantization costs 4 + 8/64 + 32/(64 · 256) bits a weight, instead of 4 + 32/64.
# > - Full fine-tuning pays for gradients and optimizer, LoRA for frozen weights, QLoRA for 4-bit
# >   weights and activations.
# > - Count bytes from tensors. `minisft plan` does it before anything is loaded.
#
# You can now answer:
#
# <details>
# <summary>QLoRA runs out of memory with long texts. Does a smaller number of bits help?</summary>
#
# Hardly. Long texts enlarge activations, which 4-bit weights do not touch. Shorter rows or checkpointing help.
#
# </details>
#
# <details>
# <summary>Why can a block of zeros come back as small numbers, and what prevents it?</summary>
#
# Its scale is zero, but after 8 bits it may come back as a small number. The codes must therefore be those of zero, so zero must
# not be divided by zero: the scale is clamped to a normal number before it is inverted.
#
# </details>

# %% [markdown]
# ## References
#
# - Dettmers, Pagnoni, Holtzman, Zettlemoyer (2023), *QLoRA: Efficient Finetuning of Quantized LLMs*,
#   [arXiv:2305.14314](https://arxiv.org/abs/2305.14314). Double quantization is in section 3.
# - Dettmers, Lewis, Shleifer, Zettlemoyer (2021), *8-bit Optimizers via Block-wise Quantization*,
#   [arXiv:2110.02861](https://arxiv.org/abs/2110.02861). Dynamic tree quantization is in section 1.3, its use for
#   optimizer states in section 2.2.
# - Rajbhandari, Rasley, Ruwase, He (2019), *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*,
#   [arXiv:1910.02054](https://arxiv.org/abs/1910.02054). Counts what mixed-precision Adam keeps for each weight.
