# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: "Choosing rank, alpha, targets and learning rate"
#     minutes: 2
#     needs: tiny
#     after: ["03"]
#     contract:
#       adapter_size: minisft.surgery.num_parameters
#       energy_rank: minisft.merging.spectrum.energy_rank
#       principal: minisft.pissa.PiSSALinear
#       choose: minisft.training.lr_grid.choose
#       rate_ratios: minisft.surgery.lora_plus_ratios
#     refs: [hu2021lora, kalajdzievski2023rank, hayou2024lora, meng2024pissa, biderman2024lora, shuttleworth2024lora,
#            allenzhu2024physics, schulman2025lora]
# ---

# %% [markdown]
# # 04 Choosing rank, alpha, targets and learning rate
#
# You teach a small model facts that follow from nothing, with adapters of several ranks and by full fine-tuning, each at its own
# learning rate. At the end you can choose the four knobs in an order that works, say when LoRA has to lose, and see through a
# comparison that used one rate for both methods.

# %% [markdown]
# ## You need, you get
#
# **You need** page 03 (LoRA, rank, alpha). No pretrained model, no GPU: a small model is trained in front of you.
#
# **You get** five functions, about 20 lines: `adapter_size`, `energy_rank`, `principal`, `choose` and `rate_ratios`. They equal the
# library's, which `minisft plan`, `minisft diff`, `--init pissa`, `minisft lr-find` and `--lr-b-ratio` use.

# %% tags=["setup"]
import copy
import itertools
import json
import math
import random
import statistics

import torch

import shared
from minisft import CausalLM, ModelConfig
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.lora import LoRALinear
from minisft.merging.spectrum import spectrum_of
from minisft.pissa import PiSSALinear
from minisft.surgery import apply_lora_, lora_plus_ratios, match_targets, num_parameters
from minisft.training import capacity, lr_grid

shared.start("04", seed=0)
C = shared.COLORS

# %% [markdown]
# A fact is a name of two words and an answer of one word, drawn from 64 words. Nothing helps to guess it, so each fact holds
# $\log_2 64 = 6$ bits, and we can count in bits what a model has learned: 6 a fact, less what its loss still costs. A model that
# guesses has 0. Facts cannot be generalized, so there is no test set on this page; on your data the loss on *validation* rows takes
# its place.

# %%
WORDS, BITS = 64, 6.0  # log2 of the words: what an answer holds
SIZES = ModelConfig(
    "llama", WORDS, 32, 64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, max_position_embeddings=8,
    tie_word_embeddings=False,
)  # fmt: skip
draw = random.Random(0)
names = draw.sample([(first, second) for first in range(WORDS) for second in range(WORDS)], 1024)
facts = torch.tensor([[*name, draw.randrange(WORDS)] for name in names])  # [1024, 3], no name twice
OLD, NEW, FEW = facts[:256], facts[256:], 32  # the base knows OLD; each seed learns its own part of NEW


def new_facts(seed, count=256):
    return NEW[256 * seed : 256 * seed + count]


@torch.no_grad()
def recalled(model, rows):
    """Bits that a model knows of these facts; below 0 if it is worse than a guess."""
    log_p = model(rows[:, :2])[:, 1].log_softmax(-1).gather(-1, rows[:, 2:])  # [N, 1]
    return (BITS * len(rows) + log_p.sum() / math.log(2)).item()


# %% [markdown]
# Training, the same for every arm: 120 steps of up to 128 facts, Adam without decay, a short warm-up, then down to zero.


# %%
def groups_of(model, ratios, eps):
    """One group for each factor of the rate; eps as the gradients of that group need it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {"params": [p for name, p in named.items() if ratios.get(name, 1.0) == r], "ratio": r, "eps": eps(r)}
        for r in sorted({ratios.get(name, 1.0) for name in named})
    ]


def learn_(model, rows, lr, seed=0, steps=120, ratios=None, eps=lambda ratio: 1e-8):
    """Train what is trainable; `ratios` multiplies the rate of some parameters."""
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups_of(model, ratios or {}, eps), lr=lr, weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["ratio"] * lr * min(1, (step + 1) / 10) * (1 - step / steps)
        ids = rows[torch.randperm(len(rows), generator=shuffle)[:128]]  # [128, 3]
        targets = torch.where(torch.arange(3) < 2, -100, ids)  # only the answer counts
        shared.step_(model, optimizer, ids, targets)
    return model


torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
base = CausalLM(SIZES)
for parameter in base.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.15)
learn_(base, OLD, 1e-2, steps=250)
print(f"the base knows {recalled(base, OLD) / (BITS * len(OLD)):.0%} of the old facts, and of the new ones nothing")

# %% [markdown]
# An *arm* is a way to train. `tuned` makes one run of it; `alpha` is 16 unless we say otherwise.

# %%
ALL, ATTENTION, MLP = "all-linear", ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def fresh(rank, seed=0, alpha=16.0, targets=ALL, init="default"):
    """The base with a fresh adapter; without a rank all weights are trained."""
    model = copy.deepcopy(base)
    if rank:
        apply_lora_(model, LoRAConfig(rank=rank, alpha=alpha, targets=targets, init=init), seed)
    return model


def tuned(rank, lr, seed=0, count=256, **more):
    """The model after one run, and the bits that it recalls of what it was taught."""
    rows = new_facts(seed, count)
    model = learn_(fresh(rank, seed, **more), rows, lr, seed)
    return model, recalled(model, rows)


DOWN = "model.layers.0.mlp.down_proj"  # one matrix, to look at
full_model, full_bits = tuned(None, 1e-2)
delta = (full_model.get_submodule(DOWN).weight - base.get_submodule(DOWN).weight).detach()  # [32, 64]

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.2, columns=4)
U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
for ax, rank in zip(axes, (None, 1, 4, 16), strict=True):
    piece = delta if rank is None else (U[:, :rank] * S[:rank]) @ Vh[:rank]
    ax.imshow(piece, cmap="PuOr", vmin=-delta.abs().max(), vmax=delta.abs().max(), aspect="auto")
    share = 1.0 if rank is None else (S[:rank].square().sum() / S.square().sum()).item()
    ax.set_title("full update" if rank is None else f"rank {rank}: {share:.0%}", fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
shared.show(
    fig,
    "pieces",
    "What full fine-tuning did to one matrix, and its best pieces of rank 1, 4 and 16 with their share of its energy.",
)

# %% [markdown]
# ## The idea
#
# Four knobs, and what each of them really sets:
#
# - **Rank** sets how much an adapter can *hold*. What there is to learn has a size in bits, and so has the adapter. If it fits, more
#   rank buys nothing; if it does not, no learning rate helps.
# - **Targets** set *where* the adapter sits. Compare them at equal numbers of parameters.
# - **Alpha** is a learning rate in disguise, that of $B$. Fix it once.
# - **The learning rate** is the knob that decides most comparisons. Each method has its own best one, so two methods are compared at
#   their own best rates, or not at all.
#
# Hence an order: targets first (all linears), alpha fixed, rank by the bits, and then a *search* for the rate. Repeat the
# search when you change the method. `minisft lr-find` runs it on a quarter of the steps.

# %% [markdown]
# ## The formula
#
# The update of a layer of shape (out, in) is $\Delta W = s B A$ with $s = \alpha / r$. It has $r \cdot (\mathrm{in} + \mathrm{out})$
# parameters.
#
# **Capacity.** Allen-Zhu and Li (2024) report that language models store about two bits a parameter, of facts they have seen often
# enough. So with $n$ facts of $b$ bits ask whether $n \cdot b \le 2 \cdot \mathrm{parameters}$. It is a rule of thumb.
#
# **The best piece of rank r** of a matrix $D$ with singular values $\sigma_1 \ge \sigma_2 \ge \dots$ keeps the first $r$ of them. Eckart and
# Young: no other matrix of that rank is nearer, and what is left is $\sum_{i > r} \sigma_i^2$. The **energy rank** is the smallest $k$
# whose first $k$ squares hold 90 of 100 parts of the sum. **PiSSA** (Meng et al. 2024) starts $B A$ as the best piece of $W$, and
# subtracts that start from $W$, so that the model is unchanged.
#
# **Alpha under Adam.** Double $s$ and halve $B$: the product stays. The gradient of $B$ doubles, Adam divides it by its own size, so
# the step of $B$ stays as it was, and has to be halved by the rate. The gradient of $A$ does not change at all:
#
# $$(\alpha, \eta_A, \eta_B) \quad \text{and} \quad (c \, \alpha, \eta_A, \eta_B / c) \quad \text{are the same model.}$$
#
# So **LoRA+** (Hayou et al. 2024), which gives $B$ a rate $\lambda$ times that of $A$, is alpha multiplied by $\lambda$.
#
# **rsLoRA** (Kalajdzievski 2023) takes $s = \alpha / \sqrt{r}$. Adam's first step makes $B = - \eta \, \mathrm{sign}(G A^T)$, where $G$ is
# the gradient of $W$. The loss falls at first by $\langle G, s \eta \, \mathrm{sign}(G A^T) A \rangle = s \eta \sum |G A^T|$, a sum
# over $r$ columns: with $\alpha / r$ it is the same for all ranks, with $\alpha / \sqrt{r}$ it grows with $\sqrt{r}$.

# %% [markdown]
# ## By hand: 3 x 4
#
# The rows of this update are at right angles, so their lengths are the singular values:
#
# | row of $D$ | length $\sigma$ | $\sigma^2$ | kept at rank 1 | at rank 2 |
# |---|---|---|---|---|
# | 2, 2, 2, 2 | 4 | 16 | 16 | 16 |
# | 1, -1, 1, -1 | 2 | 4 | | 4 |
# | 1/2, 1/2, -1/2, -1/2 | 1 | 1 | | |
# | sum | | 21 | 16 of 21 | 20 of 21 |
#
# Rank 1 keeps 76 %, rank 2 keeps 95 %: the energy rank is 2. Rank 1 has 3 + 4 = 7 parameters, rank 2 has 14, more than the matrix,
# which has 12. On matrices as small as this, "parameter-efficient" is only rank 1.

# %%
D = torch.tensor([[2.0, 2, 2, 2], [1, -1, 1, -1], [0.5, 0.5, -0.5, -0.5]])  # [3, 4]
squares = torch.linalg.svdvals(D).square()  # [3]
print(
    "squares", [round(x) for x in squares.tolist()], " kept", [f"{x:.0%}" for x in (squares.cumsum(0) / squares.sum()).tolist()]
)

# %% [markdown]
# ## Build it
#
# The size of an adapter; the energy rank of an update; the two factors of the best piece, with the scaling taken out of them.


# %% tags=["build"]
def adapter_size(model, paths, rank):
    """How many numbers adapters of this rank train on the layers at `paths`."""
    return sum(rank * sum(model.get_submodule(path).weight.shape) for path in paths)  # rank * (out + in) each


def energy_rank(delta, share=0.9):
    """The fewest singular values of delta [out, in] whose squares hold a share of the sum."""
    sums = torch.linalg.svdvals(delta.double()).square().cumsum(0)  # [min(out, in)]
    return int((sums < share * sums[-1]).sum()) + 1


def principal(weight, rank, scaling):
    """A [rank, in] and B [out, rank] with scaling * B A the best piece of the weight [out, in]."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()  # [rank]: each factor gets one half of a singular value
    return root[:, None] * Vh[:rank], U[:, :rank] * root


# %% [markdown]
# The choice of a rate, and LoRA+. `choose` is the whole of `lr-find` but for the training: it refuses an optimum at the edge of
# the grid, because the true one may lie anywhere beyond it. A run that diverged has the loss infinity.


# %% tags=["build"]
def choose(losses):
    """The rate with the smallest loss, from {rate: loss}; an optimum at the edge is refused."""
    rates = sorted(losses)
    best = min(rates, key=losses.get)
    if best in (rates[0], rates[-1]):
        raise ValueError(f"the best rate {best:g} is at the edge of the grid: extend it there")
    return best


def rate_ratios(model, ratio):
    """LoRA+: what the rate of each trained parameter is multiplied by."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: ratio if name.endswith(".lora_B") else 1.0 for name in trained}


# %% [markdown]
# ## Run it
#
# ### A rate for each method
#
# Predict first: which of rank 1, 4, 16 and full fine-tuning knows most of 256 facts, and at which rates? Every arm gets a grid of
# rates in steps of about three.

# %%
GRIDS = {"full": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "LoRA": (3e-3, 1e-2, 3e-2, 1e-1)}
RANKS = {"r 1": 1, "r 4": 4, "r 16": 16, "full": None}
ENTROPY = BITS * 256
runs = {  # (model, bits)
    arm: {lr: tuned(rank, lr) for lr in GRIDS["LoRA" if rank else "full"]} for arm, rank in RANKS.items()
}


def lost(arm_runs):
    """What `choose` looks at: the bits a fact that are not recalled, which is the loss in bits."""
    return {lr: (ENTROPY - bits) / 256 for lr, (_, bits) in arm_runs.items()}


best = {arm: choose(lost(arm_runs)) for arm, arm_runs in runs.items()}
SHADES = {"r 1": C["green"], "r 4": C["blue"], "r 16": C["purple"], "full": C["orange"]}

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.6, height=3.6)
for arm, arm_runs in runs.items():
    curve = lost(arm_runs)
    ax.plot(list(curve), list(curve.values()), "o-", color=SHADES[arm], label=arm)
    ax.plot([best[arm]], [curve[best[arm]]], "o", color=SHADES[arm], markersize=12, alpha=0.35)
ax.axhline(BITS, color=C["grey"], linewidth=0.8, linestyle="--")
ax.set(xscale="log", xlabel="peak learning rate", ylabel="loss, bits a fact", ylim=(-0.3, 9.0))
ax.legend(ncols=4, fontsize=9, loc="upper left")
shared.show(
    fig, "rates", "Each method has its own best rate (large dots), and far from it loses to any other. Dashed: a guess."
)

# %% [markdown]
# The refusal, on the same runs: show `choose` only the small rates of full fine-tuning.

# %%
try:
    choose({lr: loss for lr, loss in lost(runs["full"]).items() if lr <= best["full"]})
    refused = ""
except ValueError as error:
    refused = str(error)
print(refused)
assert "edge" in refused

# %% tags=["drawing"]
shared_rates = sorted(set(GRIDS["LoRA"]) & set(GRIDS["full"]))
reached = {lr: runs["r 16"][lr][1] / runs["full"][lr][1] for lr in shared_rates}
reached_tuned = runs["r 16"][best["r 16"]][1] / runs["full"][best["full"]][1]
table = "\n".join(
    f"| {lr:g} | " + " | ".join(f"{lost(runs[arm])[lr]:.2f}" for arm in RANKS) + f" | {reached[lr]:.0%} |"
    for lr in shared_rates
)
own = " | ".join(f"**{lost(runs[arm])[best[arm]]:.2f}** at {best[arm]:g}" for arm in RANKS)
shared.say(
    "**The classic mistake** is one rate for all, which is one row of this table (loss in bits a fact):\n\n"
    f"| rate | {' | '.join(RANKS)} | r 16 of full |\n|---|---|---|---|---|---|\n{table}\n| its own | {own} | "
    f"**{reached_tuned:.0%}** |\n\n"
    "Every row names another distance between the methods, and only the last one compares them. In this toy, at alpha 16, full "
    f"fine-tuning's best rate is {best['full']:g} and that of rank 16 is {best['r 16']:g}. On large models LoRA's is about ten "
    "times that of full (Schulman et al. 2025, alpha 32). That factor is a measurement, and depends on alpha, as you will see below: "
    "search, rather than multiply."
)
assert 1 - reached[3e-3] > 3 * (1 - reached_tuned), "at one rate for both, LoRA seems to lose far more than it does"

# %% [markdown]
# ### What rank buys: bits
#
# The same at the chosen rates for three sets of facts, and a second task that is eight times smaller: 32 facts.

# %%
SEEDS = (0, 1, 2)
bits = {arm: [runs[arm][best[arm]][1], *(tuned(RANKS[arm], best[arm], seed)[1] for seed in SEEDS[1:])] for arm in RANKS}
few = {arm: [tuned(RANKS[arm], best[arm], seed, FEW)[1] for seed in SEEDS] for arm in ("r 1", "full")}
size = {arm: num_parameters(fresh(rank), trainable=True) for arm, rank in RANKS.items()}
paths = match_targets(base, ALL)
assert all(size[arm] == adapter_size(base, paths, rank) for arm, rank in RANKS.items() if rank)

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.6, height=3.6)
for found, color, count in ((bits, C["blue"], 256), (few, C["orange"], FEW)):
    for arm, values in found.items():
        ax.plot([size[arm]] * 3, values, "o", color=color, alpha=0.7)
    ax.axhline(BITS * count, color=color, linewidth=0.8, linestyle="--")
    ax.text(max(size.values()), BITS * count * 1.12, f"all of {count} facts", color=color, ha="right", fontsize=9)
ends = [300, 1100]
ax.plot(ends, [2 * x for x in ends], color=C["grey"], linewidth=1)
ax.text(1000, 1050, "2 bits a parameter", color=C["grey"], fontsize=9)
for arm, x in size.items():
    ax.text(x, 110, arm, ha="center", fontsize=9)
ax.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="bits recalled", ylim=(90, 2600), xlim=(280, 20000))
shared.show(fig, "bits", "Rank 1 holds the small set as well as full fine-tuning does, and cannot hold the large one.")

# %%
mean_bits, mean_few = ({arm: statistics.mean(values) for arm, values in found.items()} for found in (bits, few))
assert mean_few["r 1"] > 0.9 * mean_few["full"], "what fits is learned by every rank"
assert max(bits["r 1"]) < 0.6 * min(bits["full"]), "what does not fit is lost, whatever the seed"
assert min(bits["r 16"]) > 0.9 * max(bits["full"])
assert max(bits["r 1"]) < 2 * size["r 1"]
shared.say(
    f"Rank 1 has {size['r 1']} parameters here and recalls {mean_bits['r 1']:,.0f} of {ENTROPY:,.0f} bits, "
    f"{mean_bits['r 1'] / size['r 1']:.1f} bits a parameter; rank 4 recalls {mean_bits['r 4']:,.0f}, rank 16 "
    f"{mean_bits['r 16']:,.0f} and full {mean_bits['full']:,.0f}. Of the small set, rank 1 recalls {mean_few['r 1']:.0f} of "
    f"{BITS * FEW:.0f} bits and full {mean_few['full']:.0f}. So LoRA loses where the bits do not fit, not where the rows are many."
)

# %% [markdown]
# `minisft plan` counts the same way before it trains anything: the parameters, and the answers of your rows, compressed. These are
# its sentences for rank 1 and for rank 16 on the large set.

# %%
for arm in ("r 1", "r 16"):
    counted = capacity.Capacity("lora", size[arm], capacity.BITS_A_PARAMETER * size[arm], 256, 256, ENTROPY, ENTROPY)
    print(f"{arm}: {capacity.advice(counted)}")
assert capacity.BITS_A_PARAMETER == 2.0

# %% [markdown]
# ### Alpha is a rate
#
# Rank 4 with three values of alpha, each over the grid. On the right the same points over rate times alpha.

# %%
ALPHAS = {4.0: (1e-2, 3e-2, 1e-1), 64.0: (3e-3, 1e-2, 3e-2)}
by_alpha = {alpha: {lr: tuned(4, lr, alpha=alpha) for lr in rates} for alpha, rates in ALPHAS.items()} | {16.0: runs["r 4"]}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=3.2, columns=2)
for alpha, color in ((4.0, C["green"]), (16.0, C["blue"]), (64.0, C["orange"])):
    curve = lost(by_alpha[alpha])
    axes[0].plot(list(curve), list(curve.values()), "o-", color=color, label=f"alpha {alpha:g}")
    axes[1].plot([lr * alpha for lr in curve], list(curve.values()), "o-", color=color)
axes[0].set(xscale="log", xlabel="peak learning rate", ylabel="loss, bits a fact", ylim=(0, 8))
axes[1].set(xscale="log", xlabel="rate times alpha", ylim=(0, 8))
axes[0].legend(fontsize=9, loc="upper left")
shared.show(fig, "alpha", "Another alpha moves the curve along the rate and hardly changes its lowest point.")

# %%
lowest = {alpha: choose(lost(by_alpha[alpha])) for alpha in sorted(by_alpha)}
assert lowest[4.0] >= lowest[16.0] >= lowest[64.0], "a larger alpha wants a smaller rate, never a larger one"
ends = [min(lost(by_alpha[alpha]).values()) for alpha in lowest]
shared.say(
    "Best rates: "
    + ", ".join(f"{lr:g} at alpha {alpha:g}" for alpha, lr in lowest.items())
    + f". The lowest losses are {', '.join(f'{end:.2f}' for end in ends)} bits a fact. The shift is less than alpha's factor, because "
    "alpha scales the rate of $B$ only, and the rate moves $A$ as well. So *alpha = 2 r* is no law: it is one rate of $B$ among others. "
    "And alpha 64 at ratio 1 is alpha 16 with LoRA+ at ratio 4: the orange curve is that of LoRA+ too."
)

# %% [markdown]
# ### Alpha over r, or over its root
#
# The formula above, on the gradient of our base: how far does the loss fall in Adam's first step, seen along the gradient? And how
# large is that step?

# %%
probe = copy.deepcopy(base)
probe(new_facts(0)[:, :2])[:, 1].log_softmax(-1).gather(-1, new_facts(0)[:, 2:]).mean().neg().backward()
G = probe.get_submodule(DOWN).weight.grad  # [32, 64]
steps = {}
for rank in (1, 2, 4, 8, 16, 32):
    drawn = [(torch.rand(rank, 64) * 2 - 1) / 8 for _ in range(50)]  # A as LoRA starts it
    moves = [torch.sign(G @ A.T) @ A for A in drawn]  # [32, 64]: the step of W for s = rate = 1
    steps[rank] = statistics.mean((G * move).sum().item() for move in moves)
over_r = [16 / rank * fall for rank, fall in steps.items()]
over_root = [16 / math.sqrt(rank) * fall for rank, fall in steps.items()]
assert max(over_r) < 1.3 * min(over_r)
assert all(0.75 < b / a / math.sqrt(2) < 1.3 for a, b in itertools.pairwise(over_root))

# %% tags=["drawing"]
fig, ax = shared.figure(width=5.6, height=2.9)
for values, color, label in ((over_r, C["blue"], "alpha / r"), (over_root, C["orange"], "alpha / sqrt(r)")):
    ax.plot(list(steps), [value / over_r[0] for value in values], "o-", color=color, label=label)
ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="fall of the loss, rank 1 = 1")
ax.set_xticks(list(steps), list(steps))
ax.set_yticks([1, 2, 4], [1, 2, 4])
ax.minorticks_off()
ax.legend(fontsize=9)
shared.show(fig, "first_step", "With alpha / r the first step helps equally at every rank; with alpha over the root it grows.")

# %% [markdown]
# That is why one rate serves many ranks with `alpha / r` and a fixed alpha. With `--use-rslora` the step grows with the rank, which
# is meant to keep large ranks learning late in training; then search for the rate again. What fails is alpha = 2r
# *and* a rate kept: that is the same as raising the rate with the rank.
#
# ### Targets, at equal parameters
#
# Rank 4 on all linears, or a higher rank on attention alone, or on the MLP alone, each with its own rate.

# %%
budget = size["r 4"]
places = {
    name: (budget // adapter_size(base, match_targets(base, t), 1) + 1, t)  # the rank: rounded up, in favour of the part
    for name, t in (("attention", ATTENTION), ("MLP", MLP))
}
on = {name: {lr: tuned(rank, lr, targets=t, alpha=4.0 * rank) for lr in GRIDS["LoRA"]} for name, (rank, t) in places.items()}
on["all linears"] = runs["r 4"]
at = {name: choose(lost(on[name])) for name in on}
spread = {"all linears": bits["r 4"]}
for name, (rank, t) in places.items():
    more = [tuned(rank, at[name], seed, targets=t, alpha=4.0 * rank)[1] for seed in SEEDS[1:]]
    spread[name] = [on[name][at[name]][1], *more]

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.4, height=2.2)
label = {
    "all linears": f"all linears, r 4, {budget:,}",
    **{n: f"{n}, r {r}, {adapter_size(base, match_targets(base, t), r):,}" for n, (r, t) in places.items()},
}
for y, name in enumerate(spread):
    ax.plot(spread[name], [y] * 3, "o", color=(C["blue"], C["orange"], C["green"])[y], alpha=0.7)
ax.axvline(ENTROPY, color=C["grey"], linestyle="--", linewidth=0.8)
ax.set_yticks(range(3), [label[name] for name in spread])
ax.set(xlabel="bits recalled (dashed: all)", ylim=(2.5, -0.5))
shared.show(fig, "targets", "The same number of parameters in three places, three seeds: attention alone recalls least.")

# %%
assert max(spread["attention"]) < min(spread["all linears"]), "attention alone recalls less, in every seed"
shared.say(
    "Recalled, means of three seeds: "
    + ", ".join(f"{name} {statistics.mean(values):,.0f}" for name, values in spread.items())
    + f" of {ENTROPY:,.0f} bits. Attention alone recalls least although it got more parameters than all linears. That agrees with "
    "what Schulman et al. (2025) report for large models. This model has one layer and learns facts only, so take the "
    "direction, not the size."
)

# %% [markdown]
# ### PiSSA: another start
#
# The same rank, the same grid, but the factors start as the best piece of each weight.

# %%
pissa = {lr: tuned(4, lr, init="pissa", alpha=4.0) for lr in (1e-2, 3e-2, 1e-1)}
pissa_best = choose(lost(pissa))
shared.say(
    f"Best PiSSA run: {pissa[pissa_best][1]:,.0f} bits at rate {pissa_best:g} with scaling 1; plain LoRA: "
    f"{runs['r 4'][best['r 4']][1]:,.0f} at {best['r 4']:g} with scaling 4. One seed: read it as *another rate, about the same "
    "capacity*. A start cannot add parameters. The authors report faster convergence on large models."
)
assert abs(pissa[pissa_best][1] - runs["r 4"][best["r 4"]][1]) < 0.35 * ENTROPY

# %% [markdown]
# ### What is forgotten
#
# Every run above was also asked for the *old* facts, which nothing reminded it of. A dot is a run of the first grid; what it learned
# is on the x axis, and how many of the old facts it still answers right is on the y axis.


# %%
@torch.no_grad()
def right(model, rows):
    """How many of these facts have the right word as the likeliest one."""
    return (model(rows[:, :2])[:, 1].argmax(-1) == rows[:, 2]).sum().item()


kept = {arm: [(each_bits, right(model, OLD)) for model, each_bits in arm_runs.values()] for arm, arm_runs in runs.items()}

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.4, height=3.2)
for arm, points in kept.items():
    ax.plot(*zip(*points, strict=True), "o-", color=SHADES[arm], label=arm, alpha=0.8, linewidth=0.8)
ax.axvline(ENTROPY, color=C["grey"], linewidth=0.8, linestyle="--")
ax.set(xlabel="bits of the new facts (dashed: all)", ylabel="old facts still right", ylim=(-8, len(OLD)))
ax.legend(fontsize=9, loc="upper left")
shared.show(
    fig, "kept", "Learned against kept, a dot for each run, lines along the rate: full keeps more where both learned well."
)

# %%
enough = 0.8 * ENTROPY
keeps = {arm: max((y for x, y in points if x >= enough), default=None) for arm, points in kept.items()}
words = ", ".join(f"{arm} {value}" for arm, value in keeps.items() if value is not None)
assert keeps["full"] > keeps["r 16"] + 16, "on this toy, at equal learning, LoRA did not keep more"
shared.say(
    f"Among the runs that recall four fifths of the new facts, the best of each method still answers, of {len(OLD)} old ones: "
    f"{words}. So here *LoRA forgets less* is false at equal learning: an adapter reaches the same facts by moving further in fewer "
    "directions, and full fine-tuning can take a small rate. Full trains the embedding and the head as well, which LoRA leaves alone, "
    "so the methods differ in more than rank. Biderman et al. (2024) found that LoRA forgets less on large models and "
    "text, and learned less too. Neither is a law; draw this picture for your own model (`minisft sweep` gives the curve, and "
    "`--replay` is the cheap cure)."
)

# %% [markdown]
# ### The same questions on a pretrained model
#
# `benchmarks/exp_peft_full.py` asks them of SmolLM2-135M: text in a cipher, which is far from what the model knows (P2), and bank
# messages in plain English with labels it has never seen (P3); rates tuned for each method. What stands here is read from its
# results file; cells that were not run are named.

# %% tags=["drawing"]
RESULTS = shared.FOLDER.parent / "benchmarks" / "results" / "peft_full.jsonl"
lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
cells = [
    cell
    for cell in map(json.loads, (line for line in lines if line.endswith("}")))
    if cell.get("kind") in ("tune", "run", "forgetting")
]
far = {"P2": "P2, text in a cipher", "P3": "P3, labels of bank messages"}
have = {name: [cell for cell in cells if cell["experiment"] == name] for name in far}
panels = [name for name in far if any(cell["kind"] == "tune" and cell["curve"] for cell in have[name])]
INK = {"r1": C["green"], "r16": C["blue"], "attention r16": C["purple"], "full-linears": C["grey"], "full": C["orange"]}
if panels:
    fig, axes = shared.figure(width=7.4, height=3.2, columns=len(panels))
    for ax, name in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        for cell in (cell for cell in have[name] if cell["kind"] == "tune"):
            curve = sorted((lr, loss) for lr, loss in cell["curve"] if loss is not None)
            ax.plot(*zip(*curve, strict=True), "o-", color=INK.get(cell["arm"], C["black"]), label=cell["arm"], markersize=4)
        ax.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss", title=far[name])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    shared.show(fig, "pretrained", "Rates on SmolLM2-135M at a quarter of the steps, one seed: each method has its own.")
rows = []
for name in far:
    for arm in dict.fromkeys(cell["arm"] for cell in have[name] if cell["kind"] == "run"):
        found = [cell for cell in have[name] if cell["kind"] == "run" and cell["arm"] == arm]
        losses = [cell["test"]["loss"] for cell in found]
        rows.append(
            f"| {name} | {arm} | {found[0]['lr']:g} | {len(found)} | {statistics.mean(losses):.3f} ({min(losses):.3f} to "
            f"{max(losses):.3f}) | {found[0]['base']['loss']:.3f} |"
        )
if rows:
    shared.say(
        "| | method | rate | seeds | test loss | base |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nA model of 135 million parameters; nothing here says anything about larger ones."
    )
forgot = {name: [cell for cell in cells if cell["kind"] == "forgetting" and cell["of"] == name] for name in far}
panels = [name for name in far if forgot[name]]
if panels:
    fig, axes = shared.figure(width=7.4, height=3.4, columns=len(panels))
    for ax, name in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        for arm in ("r16", "full"):
            for cell in (cell for cell in forgot[name] if cell["arm"] == arm):
                curve = [(point["test"]["loss"], statistics.mean(point["web"])) for point in cell["points"]]
                ax.plot(*zip(*curve, strict=True), "o-", color=INK[arm], label=None if cell["seed"] else arm, markersize=4)
        ax.set(xlabel="loss on test rows", ylabel="bits a byte of web text", title=far[name])
        ax.invert_xaxis()
        ax.legend(fontsize=8)
    shared.show(
        fig,
        "forgotten",
        "Further right: more learned. Further up: more forgotten. Each run's update at scales from 0 to 1.",
    )
missing = [far[name] for name in far if not (forgot[name] and any(cell["kind"] == "run" for cell in have[name]))]
if missing:
    shared.say(f"*Not run yet: {'; '.join(missing)}. `python benchmarks/exp_peft_full.py` runs it.*")

# %% [markdown]
# ## The same as the library
#
# Five facts, asserted. The last is the formula for alpha: two adapters, one with alpha doubled and $B$'s rate halved, trained for 60
# steps, and **the same bits** come out of both. Powers of two only move exponents, so nothing is rounded differently. Adam's `eps`
# is added to the size of a gradient that has doubled for $B$: it is doubled for $B$ too. Decay has to be off, and so has clipping,
# which looks at all gradients together.

# %%
model = fresh(4)
assert adapter_size(base, paths, 4) == num_parameters(model, trainable=True)
assert rate_ratios(model, 16.0) == lora_plus_ratios(model, 16.0)
weight = base.get_submodule(DOWN).weight.detach()
assert energy_rank(delta) == spectrum_of(weight, delta).energy_rank

layer = torch.nn.Linear(64, 32, bias=False)
layer.weight.data.copy_(weight)
A, B = principal(weight, 4, scaling=2.0)
torch.testing.assert_close(2.0 * B @ A, 2.0 * (PiSSALinear(layer, 4, 8.0).start_B @ PiSSALinear(layer, 4, 8.0).start_A))
left = torch.linalg.svdvals(weight)[4:].square().sum()  # Eckart and Young
torch.testing.assert_close((weight - 2.0 * B @ A).square().sum(), left)

for arm_runs in runs.values():
    cells = [lr_grid.Cell(lr, "", "done", loss, 120) for lr, loss in lost(arm_runs).items()]
    assert choose(lost(arm_runs)) == lr_grid.choose(cells).lr
try:
    lr_grid.choose(cells[: 1 + sorted(lost(arm_runs)).index(best["full"])])
    code = "accepted"
except UserError as error:
    code = error.code
assert code == "numeric/lr-at-edge"


# %%
def after_60(alpha, ratio):
    """The answers of rank 4 with this alpha, B at `ratio` times A's rate: logits on the new facts."""
    model = fresh(4, alpha=alpha)
    learn_(model, new_facts(0), 1e-2, steps=60, ratios=rate_ratios(model, ratio), eps=lambda r: 1e-8 / r)
    with torch.no_grad():
        return model(new_facts(0)[:, :2]), model


plain, first = after_60(16.0, 1.0)  # [256, 2, 64]
doubled, second = after_60(32.0, 0.5)  # alpha doubled, B's rate halved
assert torch.equal(plain, doubled), "the same model, bit for bit"
for a, b in zip(first.modules(), second.modules(), strict=True):
    if isinstance(a, LoRALinear):
        assert torch.equal(a.lora_A, b.lora_A)
        assert torch.equal(a.lora_B, 2 * b.lora_B)
        assert torch.equal(a.update_rows(), b.update_rows())
assert not torch.equal(plain, after_60(32.0, 1.0)[0])  # alpha alone does change the model
print("alpha 16 at rate 1, alpha 32 at rate 1/2 for B:", plain.numel(), "logits, all equal")

# %% [markdown]
# ## What usually goes wrong
#
# **1. "Full fine-tuning's update has a high rank, so LoRA cannot do it."** Look at the energy rank, and then cut the update of *every*
# matrix of the full run down to its best piece:


# %%
def cut(rank):
    """The base with the best piece of that rank of every linear's full update, and all of the embedding's and head's."""
    model = copy.deepcopy(full_model)
    for path in paths:
        before, after = base.get_submodule(path).weight, model.get_submodule(path).weight
        A, B = principal((after - before).detach(), rank, 1.0)
        after.data.copy_(before + B @ A)
    return model


pieces = {rank: recalled(cut(rank), new_facts(0)) for rank in (1, 4, 16)}
shared.say(
    f"The energy rank of the update in the first picture is {energy_rank(delta)} of {min(delta.shape)}. Bits recalled after the cut: "
    + ", ".join(f"rank {rank} {max(0, value):,.0f}" for rank, value in pieces.items())
    + f", uncut {full_bits:,.0f}. Rank 4 *trained* recalls {mean_bits['r 4']:,.0f}. Full fine-tuning spreads over many directions "
    "because nothing stops it; what it happened to use is no measure of what is needed. Shuttleworth et al. (2024) look at which "
    "directions are *new*; `minisft diff` shows them for your model."
)
assert pieces[4] < mean_bits["r 4"]

# %% [markdown]
# **2. "50,000 rows: use full fine-tuning."** A rule of thumb that counts rows. Rows of one label out of 77 hold at most six bits and a
# bit each; rows of new text hold hundreds. Count bits, as `minisft plan --data rows.jsonl` does: it prints an upper bound from the
# compressed answers beside the capacity of your adapter.
#
# **3. "We used alpha 16 at every rank, and high ranks did not help."** With `alpha / r` the *size* of the update at the start shrinks with the
# rank, and its useful part stays (the figure above). If a high rank is worse than a low one, the rate was not searched for, or the
# rank was never the limit.
#
# **4. "LoRA is ten times cheaper."** It saves the gradients and moments of the frozen weights, which is memory. The forward pass and
# the gradient that flows back through the layers stay: about two thirds of the work of full fine-tuning.

# %% [markdown]
# ## Exercises
#
# **1. The rank for a budget.** An adapter file in fp32 may have `megabytes` million bytes. `shapes` are the (out, in) of the adapted
# layers. What is the largest rank that fits, where no layer may get more rank than its smaller side?


# %% tags=["exercise"]
def rank_for(megabytes, shapes):  # a number, a list of pairs -> an integer, 0 if nothing fits
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_rank_for(answer):
    assert answer(0.0004, [(60, 40)]) == 1, "rank 1 of (60, 40) has 60 + 40 numbers of 4 bytes each"
    assert answer(0.0012, [(60, 40), (10, 40)]) == 2, "all layers share the budget: add up their sizes"
    assert answer(0.00119, [(60, 40)]) == 2, "2.975 is not 3: round down"
    assert answer(1, [(60, 40)]) == 40, "no layer has more than min(out, in) directions"
    assert answer(0.0001, [(60, 40)]) == 0, "nothing fits"


shared.grade(check_rank_for, rank_for)


# %% tags=["solution"]
def rank_for(megabytes, shapes):
    one = 4 * sum(out + into for out, into in shapes)  # bytes of rank 1
    return min(int(megabytes * 1e6 / one + 1e-9), *(min(shape) for shape in shapes))


shared.grade(check_rank_for, rank_for)

# %% [markdown]
# **2. Find the untuned arms.** A paper prints the loss of each method over a grid of rates; `None` means diverged. Which methods were
# *not* tuned, because their best rate has no neighbour on one side?


# %% tags=["exercise"]
def untuned(table):  # {method: {rate: loss or None}} -> a sorted list of methods
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_untuned(answer):
    fine = {3e-4: 1.2, 1e-4: 1.5, 1e-3: 1.4}
    assert answer({"LoRA": fine}) == [], "the best rate, 3e-4, has neighbours on both sides: sort the rates first"
    assert answer({"full": {1e-4: 1.5, 3e-4: 1.2}}) == ["full"], "of two rates each lies at an edge"
    assert answer({"full": {1e-5: 1.1, 1e-4: 1.5, 1e-3: 2.0}}) == ["full"], (
        "the smallest rate is best: the optimum may be below"
    )
    assert answer({"DoRA": {1e-4: 1.5, 1e-3: 1.2, 1e-2: None}}) == [], "a run that diverged is a neighbour: worse than any loss"
    assert answer({"b": {1: 1.0}, "a": {1: None, 2: None, 3: None}}) == ["a", "b"], "if all diverged nothing was tuned; sorted"


shared.grade(check_untuned, untuned)


# %% tags=["solution"]
def untuned(table):
    def at_edge(losses):
        rates = sorted(losses)
        known = [rate for rate in rates if losses[rate] is not None]
        return not known or min(known, key=losses.get) in (rates[0], rates[-1])

    return sorted(method for method, losses in table.items() if at_edge(losses))


shared.grade(check_untuned, untuned)

# %% [markdown]
# **3. Open, without a check.** Mix 32 old facts into every step of the full run (replay). Predict how many of the old bits survive, and
# whether the facts that were not replayed profit; then run it.

# %% [markdown]
# ## What was not shown
#
# - **Real text.** Random facts cannot be compressed. Text can, so its rows hold fewer bits than they have tokens, and the bound
#   of `minisft plan` is an upper one.
# - **Batch size.** LoRA is reported to tolerate large batches less well than full fine-tuning, at any rank.
# - **DoRA**, and adapters on embeddings. A tied embedding that full fine-tuning trains and LoRA does not is a confound: compare
#   with `--method full --targets all-linear`.
# - **Reinforcement learning**, where an episode brings about a bit and rank 1 is often enough (page 12).

# %% [markdown]
# ## Summary
#
# > - Rank is capacity: compare the bits to learn with two bits a parameter. Below that, more rank buys nothing.
# > - Alpha is the rate of B in disguise: fix it. LoRA+ is alpha again, under Adam bit for bit.
# > - All linears rather than attention alone, at equal parameters.
# > - Search for the rate of each method, and refuse an optimum at the edge of the grid.
# > - What is forgotten is compared at equal learning, with a curve and not with a slogan.
#
# You can now answer:
#
# <details>
# <summary>A blog trains LoRA and full fine-tuning at the same rate, and LoRA loses. What do you say?</summary>
#
# That one of them, or both, ran away from its best rate. Ask for the curve of each method over the rate with the best point inside,
# and for the bits to learn beside the adapter's capacity.
#
# </details>
#
# <details>
# <summary>You double alpha and nothing gets better. Why was that to be expected?</summary>
#
# Under Adam it is the same as doubling the rate of B. If the rate was tuned before, you have moved away from its optimum; if it was
# not, tune the rate.
#
# </details>

# %% [markdown]
# ## References
#
# - Hu et al. 2021, *LoRA*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685): section 4.1 on alpha, section 7 on rank and targets.
# - Kalajdzievski 2023, *rsLoRA*, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732): alpha over the root of the rank.
# - Hayou et al. 2024, *LoRA+*, [arXiv:2402.12354](https://arxiv.org/abs/2402.12354): a rate of its own for B.
# - Meng et al. 2024, *PiSSA*, [arXiv:2404.02948](https://arxiv.org/abs/2404.02948): the principal piece as a start.
# - Allen-Zhu and Li 2024, *Physics of Language Models 3.3*, [arXiv:2404.05405](https://arxiv.org/abs/2404.05405): two bits a parameter.
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, [arXiv:2405.09673](https://arxiv.org/abs/2405.09673).
# - Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*,
#   [arXiv:2410.21228](https://arxiv.org/abs/2410.21228): intruder dimensions.
# - Schulman et al. 2025, *LoRA Without Regret*, [thinkingmachines.ai](https://thinkingmachines.ai/blog/lora/): rates, targets, capacity.
