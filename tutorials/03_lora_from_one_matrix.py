# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: LoRA from one matrix
#     minutes: 1
#     needs: tiny
#     after: []
#     contract:
#       LoRALinear: minisft.lora.LoRALinear
#       add_lora_: minisft.surgery.apply_lora_
#       trainable: minisft.surgery.num_parameters
#     refs: [hu2021lora, aghajanyan2020intrinsic, li2018measuring, kalajdzievski2023rank, hayou2024impact, li2025beyond]
# ---

# %% [markdown]
# # 03 LoRA from one matrix
#
# You will build LoRA (*low-rank adaptation*): wrap one linear layer so that its weight stays frozen and two thin matrices
# learn in its place. You will see why one of the two starts at zero, what that does to the first gradient, and what `alpha`
# and the rank really change. At the end your layer, its gradients and its list of trained numbers equal those of `minisft`.
#
# The *rank* of a matrix is the number of terms that it needs when it is written as a sum of "one column times one row". A
# tall thin matrix times a wide thin one is such a sum: with 4 columns and 4 rows it has 4 terms, and the product has rank 4
# at most.

# %% [markdown]
# ## You need, you get
#
# **You need** Python, PyTorch and this folder. You should know that a linear layer computes $y = W x + b$ and that `loss.backward()` fills `.grad`;
# no other page has to come first. No pretrained model: the small network here is trained in front of you.
#
# **You get** a working LoRA layer in about 30 lines, and a feeling for its four knobs: where it sits, its rank, its scale, its start.

# %% tags=["setup"]
import copy
import math

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding

import minisft.lora
import minisft.surgery
import shared
from minisft.config import LoRAConfig

shared.start("03", seed=0)
C = shared.COLORS

# %% [markdown]
# Here is the whole idea, drawn to scale for a square weight with 64 inputs, 64 outputs and rank 4.

# %% tags=["drawing"]
from matplotlib.patches import Rectangle


def draw_block(ax, x, y, width, height, color, text, below):
    """A matrix to scale, its name inside, its shape and size below."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.85, edgecolor=C["black"], linewidth=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=12, fontweight="bold")
    ax.text(x + width / 2, y - 4, below, ha="center", va="top", fontsize=9)


side, r = 64, 4
fig, ax = shared.figure(width=7.4, height=3.0)
draw_block(ax, 0, 0, side, side, C["blue"], "W'", "what is used")
ax.text(75, 32, "=", ha="center", va="center", fontsize=20)
draw_block(ax, 86, 0, side, side, C["grey"], "W", f"[{side}, {side}]: {side * side} numbers\nfrozen")
ax.text(163, 32, r"$+\;\frac{\alpha}{r}\;\cdot$", ha="center", va="center", fontsize=17)
draw_block(ax, 178, 0, r, side, C["purple"], "", f"B  [{side}, {r}]\n{side * r} numbers")
ax.text(180, 68, "B", color=C["purple"], ha="center", fontsize=12, fontweight="bold")
ax.text(191, 32, r"$\times$", ha="center", va="center", fontsize=17)
draw_block(ax, 200, 60, side, r, C["orange"], "", f"A  [{r}, {side}]: {side * r} numbers")
ax.text(232, 68, "A", color=C["orange"], ha="center", fontsize=12, fontweight="bold")
ax.text(232, 30, "only B and A learn", ha="center", fontsize=11, style="italic")
ax.set(xlim=(-4, 270), ylim=(-20, 76), aspect="equal")
ax.axis("off")
shared.show(fig, "to_scale", "W' = W + alpha/r times B times A, drawn to scale: W is frozen, and only the thin B and A learn.")

# %% [markdown]
# ## The idea
#
# Fine-tuning a layer means finding a change $\Delta W$ to add to its weight. Full fine-tuning lets every entry of $\Delta
# W$ move. LoRA assumes that a good change needs only a few *directions*. It looks at the input along $r$ directions (the
# rows of $A$), and for each of them adds one pattern to the output (the columns of $B$). That is a matrix of rank at most
# $r$, and it takes $r \cdot (in + out)$ numbers instead of $in \cdot out$.
#
# Three decisions are left, and each is a common place to go wrong:
#
# - **The start.** A pretrained layer should behave exactly as before until something has been learned, so the product $B A$ must start at zero. One zero factor is enough.
# - **The scale.** The update is a sum of $r$ terms, and it is multiplied by $\alpha / r$, so that a larger rank does not make the sum larger by itself:
#   a learning rate that was safe at rank 8 is not too large at rank 64. (It may be too small there; see "Rank and scale" below.)
# - **The freezing.** Everything that is not $A$ or $B$ must stop learning: biases and norms too.

# %% [markdown]
# ## The formula
#
# For one input column $x$:
#
# $$y = W x + b + s \, B (A x), \qquad s = \frac{\alpha}{r}$$
#
# with $W$ of shape $[out, in]$, $A$ of shape $[r, in]$ and $B$ of shape $[out, r]$. It is the same as a layer whose weight is $W' = W + s \, B A$.
# (In code, as in `nn.Linear`, $x$ is a row and everything is transposed: `x @ A.T @ B.T`.)
# Write $G$ for the gradient that this merged weight $W'$ would get. The chain rule hands each factor its share:
#
# $$\frac{\partial L}{\partial B} = s \, G A^T, \qquad \frac{\partial L}{\partial A} = s \, B^T G$$
#
# Look at the second one. If $B = 0$, the gradient of $A$ is **exactly zero**, while $B$ gets one as long as $A$ is not zero. So in the first step only $B$ moves;
# from the second step on $B$ is no longer zero and $A$ follows. If both are zero, both gradients are zero and stay zero.
#
# The start used by the authors' code and by `minisft`: $B = 0$, and every entry of $A$ drawn evenly between $-1/\sqrt{in}$
# and $+1/\sqrt{in}$. (The paper only says "random Gaussian" for $A$ and gives no variance; see "A starts as N(0, 1)" below.)

# %% [markdown]
# ## By hand: 3 x 4
#
# Three outputs, four inputs, rank 1, $\alpha = 2$, so $s = 2$. Take a pencil:
#
# $$W = \begin{pmatrix} 1 & 0 & 0 & 1 \\ 0 & 1 & 0 & 0 \\ 0 & 0 & 1 & 0 \end{pmatrix}, \quad
# A = \begin{pmatrix} 1 & 0 & 2 & -1 \end{pmatrix}, \quad
# B = \begin{pmatrix} 0 \\ 0 \\ 0 \end{pmatrix}, \quad
# x = \begin{pmatrix} 1 \\ 2 \\ 1 \\ 1 \end{pmatrix}$$
#
# 1. $A x = 1 + 0 + 2 - 1 = 2$, but $B$ is zero, so $y = W x = (2, 2, 1)$.
# 2. The target is $t = (2, 3, 1)$, and we use $L = \frac{1}{2} |y - t|^2$. Its gradient at the output is $g = y - t = (0, -1, 0)$.
# 3. $B$ gets $s \cdot g \cdot (A x) = 2 \cdot (0, -1, 0) \cdot 2 = (0, -4, 0)$. $A$ gets $s \cdot (B^T g) \cdot x^T = 0$.
# 4. One step of size $1/16$ makes $B = (0, 1/4, 0)$.
# 5. The update is now $s \, B A$: its second row is $2 \cdot \frac{1}{4} \cdot (1, 0, 2, -1) = (0.5, 0, 1, -0.5)$. The new second output is $2 + 0.5 + 1 - 0.5 = 3$, exactly the target.
#
# One number of $B$ was moved, and with it three weights: a whole row of the update, wherever $A$ is not zero. The next cell checks every line with autograd.

# %%
W = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])  # [3, 4]
A = torch.tensor([[1.0, 0, 2, -1]], requires_grad=True)  # [1, 4]
B = torch.zeros(3, 1, requires_grad=True)  # [3, 1]
x, target, s = torch.tensor([1.0, 2, 1, 1]), torch.tensor([2.0, 3, 1]), 2.0

y = W @ x + s * (B @ (A @ x))  # [3]
(0.5 * (y - target).square().sum()).backward()
assert y.tolist() == [2, 2, 1]
assert B.grad.flatten().tolist() == [0, -4, 0]
assert A.grad.flatten().tolist() == [0, 0, 0, 0]
with torch.no_grad():
    B -= B.grad / 16
    print("B after one step: ", B.flatten().tolist())
    print("update s B A:     ", (s * B @ A).tolist())  # [3, 4]
    print("output after it:  ", (W @ x + s * (B @ (A @ x))).tolist())

# %% [markdown]
# ## Build it
#
# First the layer. `base` is any `nn.Linear`. `forward` never builds the big matrix $B A$: it computes `rank` numbers from the
# input, and the output from those.


# %% tags=["build"]
class LoRALinear(nn.Module):
    """y = x W^T + b + (alpha / rank) x A^T B^T, where W and b are frozen."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)  # W [out, in], b [out]
        self.scaling = alpha / rank
        # new_empty: of the same dtype and on the same device as the weight; filled below
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))  # [rank, in]
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, rank))  # [out, rank]
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.base.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)  # B A = 0: a fresh adapter changes nothing

    def forward(self, x):  # [..., in]
        down = x @ self.lora_A.T  # [..., rank]
        up = down @ self.lora_B.T  # [..., out]
        return self.base(x) + self.scaling * up  # [..., out]

    def delta_weight(self):
        return self.scaling * (self.lora_B @ self.lora_A)  # [out, in]


# %% [markdown]
# Then the surgery on a whole model: freeze everything, find the linears with the wanted names, put a wrapped layer in the place of each.
# And a list of what is trained, because "only the adapters" is a claim to check, not to believe.


# %% tags=["build"]
def add_lora_(model, names, rank, alpha):
    """Freeze `model`, wrap its linears with these names; returns their paths. The model is changed in place."""
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [path for path in linears if path.split(".")[-1] in names]
    if not found:
        raise ValueError(f"no linear is called {names}; there are {linears}")
    model.requires_grad_(False)  # all of it: biases and norms too
    for path in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRALinear(model.get_submodule(path), rank, alpha))
    return found


def trainable(model):
    """What learns: name -> how many numbers."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


# %% [markdown]
# ## Run it
#
# ### A network learns a task, then the task changes
#
# Instead of a pretrained model we take a small network that has learned which of two colours a point of a three-armed
# spiral has. Then the spiral is turned by half a radian (a little under 30 degrees), and most of what the network knows is
# in the wrong position. Can a thin update correct it?


# %%
def spiral(points, angle):  # [n, 2] -> [n], the colour (0 or 1) of each point
    cos, sin = math.cos(angle), math.sin(angle)
    turned = points @ torch.tensor([[cos, -sin], [sin, cos]])  # [n, 2]
    return (torch.sin(3 * torch.atan2(turned[:, 1], turned[:, 0]) + 4 * turned.norm(dim=1)) > 0).float()


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, points):  # [n, 2]
        hidden = torch.relu(self.first(points))  # [n, 64]
        hidden = torch.relu(self.norm(self.middle(hidden)))  # [n, 64]
        return self.last(hidden)[:, 0]  # [n]


# %%
def fit(model, angle, steps, lr=0.01, seed=0):
    """Train whatever is trainable on fresh random points; the rate falls to zero in a straight line."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        points = torch.rand(256, 2, generator=draw) * 2 - 1
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(points), spiral(points, angle)).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, angle):
    points = torch.rand(8000, 2, generator=torch.Generator().manual_seed(99)) * 2 - 1  # never trained on
    return ((model(points) > 0) == (spiral(points, angle) > 0)).float().mean().item()


# %%
pretrained = fit(Net(), angle=0.0, steps=1200)
before = accuracy(pretrained, 0.5)
shared.say(
    f"The network is right on **{accuracy(pretrained, 0.0):.0%}** of new points of its own spiral, "
    f"and on **{before:.0%}** once the spiral is turned; guessing gives 50%."
)

# %% [markdown]
# Now we adapt its middle layer, and nothing else, at three ranks; and for comparison we let *all* weights of the network learn.
# Every version starts from the same pretrained network and sees the same points for the same number of steps.
#
# (All draws are seeded, so your machine repeats its own numbers. Another machine, or another number of threads, adds up in another order, and training makes
# such roundings grow: there the accuracies of this page may be a few points higher or lower.)

# %%
rank_1, rank_4, rank_16, full = (copy.deepcopy(pretrained) for _ in range(4))
for model, rank in ((rank_1, 1), (rank_4, 4), (rank_16, 16)):
    # alpha = 2 * rank: the scale is 2 at every rank, so only the rank differs between these three
    add_lora_(model, ["middle"], rank=rank, alpha=2 * rank)
print("trained at rank 4:", trainable(rank_4))
arms = {"before": pretrained, "rank 1": rank_1, "rank 4": rank_4, "rank 16": rank_16, "all weights": full}
for name, model in arms.items():
    if name != "before":
        fit(model, angle=0.5, steps=400, seed=1)

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.1, columns=5)
grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 121), torch.linspace(-1, 1, 121), indexing="xy"), -1)  # [121, 121, 2]
truth = spiral(grid.reshape(-1, 2), 0.5).view(121, 121)
for ax, (name, model) in zip(axes, arms.items(), strict=True):
    with torch.no_grad():
        answer = model(grid.reshape(-1, 2)).view(121, 121) > 0
    ax.contourf(grid[..., 0], grid[..., 1], answer, levels=[-0.5, 0.5, 1.5], colors=[C["blue"], C["orange"]], alpha=0.45)
    ax.contour(grid[..., 0], grid[..., 1], truth, levels=[0.5], colors=C["black"], linewidths=0.9)
    count = 0 if name == "before" else sum(trainable(model).values())
    ax.set_title(f"{name}\n{count} trained\n{accuracy(model, 0.5):.0%} right", fontsize=9)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.grid(False)
shared.show(
    fig,
    "turned_world",
    "With rank, the network's colours follow the true borders (black) of the turned spiral: before, rank 1, 4, 16, all weights.",
)

# %% [markdown]
# Colours are what the network says, black lines the true borders of the turned spiral. Where black lines follow the edges of the colours, it is right.

# %% tags=["drawing"]
if accuracy(rank_1, 0.5) < before + 0.05:
    shared.say(
        "Rank 1 in the middle layer has changed little in 400 steps at this rate. This run does not show whether the rank or the "
        "rate is the cause, so do not conclude that rank 1 never works."
    )
both = copy.deepcopy(pretrained)
add_lora_(both, ["first", "middle"], rank=1, alpha=2)
fit(both, angle=0.5, steps=400, seed=1)
few, many = sum(trainable(both).values()), sum(trainable(rank_4).values())
better = accuracy(both, 0.5) > accuracy(rank_4, 0.5)
shared.say(
    f"**Where** it sits matters too, not only its rank. Rank 1 on the first *and* the middle layer trains {few} numbers and reaches "
    f"{accuracy(both, 0.5):.0%}: {'better' if better else 'not better'} than rank 4 on the middle layer alone ({many} numbers, {accuracy(rank_4, 0.5):.0%}). "
    f"Training all {sum(trainable(full).values())} weights reaches {accuracy(full, 0.5):.0%}; at rank 16 the middle layer alone gets to {accuracy(rank_16, 0.5):.0%}. "
    + ("A turn of the spiral is a change of what the *first* layer should read. " if better else "")
    + "In another task another layer would be the right one; one run does not weigh position against rank."
)
shared.say(
    "On a large model the saving is larger by far, because the matrices are. For GPT-3 (175 billion parameters) the LoRA paper "
    f"reports {shared.paper('hu2021lora', 'checkpoint_lora_mb')} MB to store for one fine-tuned model instead of "
    f"{shared.paper('hu2021lora', 'checkpoint_full_gb')} GB. Only A and B are stored; the frozen model is kept once, for all "
    f"adapters. Memory in training fell from {shared.paper('hu2021lora', 'vram_full_gb')} GB to "
    f"{shared.paper('hu2021lora', 'vram_lora_gb')} GB."
)

# %% [markdown]
# ### What B = 0 means for the first gradient
#
# Back to one matrix. A frozen $W$ should become $W + D$, where we know $D$; the inputs are random, the loss is the mean squared error.
# We start four adapters in four ways and watch the norm (the length) of the gradients of $A$ and $B$. Nothing else differs.
# (The inputs are fresh in every step, so the loss wobbles a little even where nothing learns.)

# %%
d = 64
W = torch.randn(d, d) / 8  # [out, in]
left, right = (torch.linalg.qr(torch.randn(d, d))[0] for _ in range(2))  # [64, 64] each, with orthonormal columns
strength = 4 / torch.arange(1, d + 1)  # [64], how much each direction of the change matters
D = left @ torch.diag(strength) @ right.T  # [out, in]: full rank, some directions matter more


# %%
def adapter(rank, alpha):
    base = nn.Linear(d, d, bias=False)
    with torch.no_grad():
        base.weight.copy_(W)
    return LoRALinear(base, rank, alpha)


def follow(layer, steps, optimizer):
    """Train towards W + D on fresh inputs; returns (loss, |grad A|, |grad B|) of every step."""
    draw = torch.Generator().manual_seed(2)
    history = []
    for _ in range(steps):
        x = torch.randn(64, d, generator=draw)  # [64, in]
        loss = (layer(x) - x @ (W + D).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        history.append((loss.item(), layer.lora_A.grad.norm().item(), layer.lora_B.grad.norm().item()))
        optimizer.step()
    return history


# %%
starts = {
    "A random, B zero": (True, False),
    "A zero, B random": (False, True),
    "both zero": (False, False),
    "both random": (True, True),
}
traces = {}
for name, flags in starts.items():
    layer = adapter(rank=4, alpha=8)
    for factor, random in zip((layer.lora_A, layer.lora_B), flags, strict=True):
        nn.init.uniform_(factor, -1 / 8, 1 / 8) if random else nn.init.zeros_(factor)
    traces[name] = follow(layer, 20, torch.optim.SGD(layer.parameters(), lr=1.0))

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.7, columns=4)
top = 1.1 * max(max(a, b) for trace in traces.values() for _, a, b in trace)
for ax, (name, trace) in zip(axes, traces.items(), strict=True):
    losses, norms_of_a, norms_of_b = zip(*trace, strict=True)
    ax.plot(range(1, 21), norms_of_a, color=C["orange"], marker="o", markersize=3, label="A")
    ax.plot(range(1, 21), norms_of_b, color=C["blue"], marker="s", markersize=3, label="B")
    ax.set_title(f"{name}\nloss {losses[0]:.2f} → {losses[-1]:.2f}", fontsize=9)
    ax.legend(fontsize=8, loc="upper left", ncols=2)
    ax.set(xlabel="step", ylim=(-0.04 * top, 1.25 * top), xticks=[1, 10, 20])
axes[0].set_ylabel("gradient norm")
axes[0].annotate(
    "A: exactly 0", (1, 0), (5, 0.04 * top), color=C["orange"], fontsize=9, arrowprops={"arrowstyle": "-", "color": C["orange"]}
)
axes[2].text(10, 0.06 * top, "A and B stay 0", ha="center", fontsize=9)
shared.show(
    fig,
    "first_gradients",
    "The factor that starts at zero moves first, the other follows; with both at zero nothing ever moves. Gradient norms, 20 steps.",
)

# %%
first = {name: trace[0] for name, trace in traces.items()}
untouched = first["both zero"][0]  # B A = 0: the loss of the frozen layer alone
assert first["A random, B zero"][1] == 0.0 < first["A random, B zero"][2]
assert first["A zero, B random"][2] == 0.0 < first["A zero, B random"][1]
assert all(a == b == 0.0 for _, a, b in traces["both zero"])
lower = min(("A random, B zero", "A zero, B random"), key=lambda name: traces[name][-1][0])
shared.say(
    f"With one zero factor the adapter starts at the frozen layer's loss, {untouched:.3f}, and the *other* factor's gradient comes second. "
    f"With both zero nothing ever moves. With both random both learn at once, but the first loss is {first['both random'][0]:.3f}: "
    f"step 0 is no longer the pretrained layer, and the loss has changed by {first['both random'][0] / untouched - 1:+.1%} before anything was learned."
)
ends = {name: trace[-1][0] for name, trace in traces.items()}
rank_of_both = sorted(ends, key=ends.get).index("both random") + 1
shared.say(
    f"Both random is no bad start for all that: after 20 steps it is number {rank_of_both} of 4 here ({ends['both random']:.3f}). "
    "Li et al. (2025) report that a nonzero start hardly hurts large models, and makes them less sensitive to learning rates that "
    "are too small. What you lose is the guarantee that an untrained adapter changes nothing."
)
shared.say(
    f'Which of the two should be zero? After these 20 steps "{lower}" is ahead ({traces[lower][-1][0]:.3f}). One small run decides nothing: '
    "Hayou et al. argue that a random A with B at zero allows a larger learning rate, and that is the usual start for linear layers."
)

# %% [markdown]
# ### Rank and scale
#
# **The conclusion first**: choose one convention for the scale, keep `alpha` fixed, and tune the learning rate. "alpha
# should be twice the rank" is a habit, no law. Here is why.
#
# How good can rank $r$ be? Here we know: the best piece of $D$ of rank $r$ keeps its $r$ strongest directions (a theorem by
# Eckart and Young). The error left over is the sum of the squares of the other strengths, divided by the 64 outputs,
# because our loss is a mean over them. That floor is the black line below.
#
# We train every rank with three scales that are in use: `alpha` alone, `alpha / r`, and `alpha / sqrt(r)` (called rsLoRA),
# all with `alpha = 8`, under three optimizer settings.

# %%
SCALES = {"alpha": lambda r: 8.0, "alpha / r": lambda r: 8 / r, "alpha / sqrt(r)": lambda r: 8 / math.sqrt(r)}
SETTINGS = {
    "Adam, rate 0.001": (torch.optim.Adam, 0.001),
    "Adam, rate 0.1": (torch.optim.Adam, 0.1),
    "SGD, rate 1": (torch.optim.SGD, 1.0),
}
ranks = [1, 2, 4, 8, 16, 32, 64]
floor = [strength[r:].square().sum().item() / d for r in ranks]


def final_error(rank, scale, optimizer, lr):
    layer = adapter(rank, alpha=scale * rank)  # our layer divides by the rank; undo it to try other scales
    follow(layer, 100, optimizer([layer.lora_A, layer.lora_B], lr=lr))
    return (layer.delta_weight() - D).square().sum().item() / d  # the expected loss on new inputs


errors = {
    (setting, scale): [final_error(r, scale_of(r), *how) for r in ranks]
    for setting, how in SETTINGS.items()
    for scale, scale_of in SCALES.items()
}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=3.0, columns=3)
looks = {"alpha": (C["orange"], "o", ":"), "alpha / r": (C["blue"], "s", "-"), "alpha / sqrt(r)": (C["green"], "^", "--")}
for ax, setting in zip(axes, SETTINGS, strict=True):
    ax.plot(ranks[:-1], floor[:-1], color=C["black"], linewidth=1.2, label="best possible")
    for scale, (color, marker, line) in looks.items():
        ax.plot(ranks, errors[setting, scale], color=color, marker=marker, linestyle=line, markersize=4, label=scale)
    ax.set(xscale="log", yscale="log", ylim=(3e-4, 1.0), xlabel="rank", xticks=ranks, xticklabels=ranks)
    ax.minorticks_off()
    ax.set_title(setting, fontsize=10)
axes[0].set_ylabel("expected loss after 100 steps")
for ax in axes:
    ax.legend(fontsize=7.5, loc="lower left")
shared.show(
    fig,
    "rank_and_scale",
    "No scale is best under all three optimizer settings: expected loss against rank; the black line is the best possible.",
)

# %%
for setting in SETTINGS:
    by_scale = {scale: errors[setting, scale][-2] for scale in SCALES}  # at rank 32
    finite = {scale: error for scale, error in by_scale.items() if math.isfinite(error)}
    blown = [f"`{scale}`" for scale in by_scale if scale not in finite]
    best, worst = min(finite, key=finite.get), max(finite, key=finite.get)
    shared.say(
        f"- **{setting}**, rank 32: best `{best}` ({finite[best]:.4f}), worst `{worst}` ({finite[worst]:.4f}, {finite[worst] / finite[best]:.0f} times as much)"
        + (f"; {' and '.join(blown)} blew up to NaN." if blown else ".")
    )

# %% [markdown]
# (A curve that stops has blown up to NaN; at rank 64 the best possible loss is zero, below the picture.)
#
# - A scale is not good or bad by itself: it multiplies how fast the layer moves, as the learning rate does.
# - A large scale can rescue a rate that is too small, and ruins one that is large. With plain SGD it enters squared (exercise 2
#   shows why).
# - `alpha / r` makes a rate that suits one rank *safe* at another. The price: high ranks may learn slowly, with Adam at a small
#   rate (left), and with plain SGD even at a rate that is too large for `alpha` (right).
# - The author of rsLoRA points out that last effect and corrects it with `alpha / sqrt(r)`.

# %% [markdown]
# ## The same as the library
#
# `minisft.lora.LoRALinear` fuses the two matmuls and keeps less memory for backward. The numbers must be the same: the same draw of $A$, the same output, the same gradients,
# the same names, and a fresh adapter that changes not a single bit.

# %%
base = nn.Linear(48, 32, dtype=torch.float64)  # double precision: only a real difference could show
torch.manual_seed(3)
mine = LoRALinear(copy.deepcopy(base), rank=4, alpha=8)
torch.manual_seed(3)
theirs = minisft.lora.LoRALinear(copy.deepcopy(base), rank=4, alpha=8)
x = torch.randn(5, 7, 48, dtype=torch.float64)  # [batch, time, in]

assert torch.equal(mine.lora_A, theirs.lora_A)
assert torch.equal(mine(x), base(x))  # untouched at step 0, bit for bit
assert torch.equal(theirs(x), base(x))

with torch.no_grad():
    for layer in (mine, theirs):  # as after some training
        layer.lora_B.copy_(torch.randn(32, 4, generator=torch.Generator().manual_seed(4)))
inputs = [x.clone().requires_grad_() for _ in range(2)]
torch.testing.assert_close(mine(inputs[0]), theirs(inputs[1]))
for layer, leaf in zip((mine, theirs), inputs, strict=True):
    layer(leaf).square().sum().backward()
torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
torch.testing.assert_close(mine.lora_A.grad, theirs.lora_A.grad)
torch.testing.assert_close(mine.lora_B.grad, theirs.lora_B.grad)
assert all(p.grad is None for p in mine.base.parameters())

# %%
library = copy.deepcopy(pretrained)
minisft.surgery.apply_lora_(library, LoRAConfig(rank=4, alpha=8, targets=("middle",)))
assert list(trainable(rank_4)) == list(trainable(library)) == ["middle.lora_A", "middle.lora_B"]
assert sum(trainable(rank_4).values()) == minisft.surgery.num_parameters(library, trainable=True)
print("outputs, gradients, names and counts equal the library's")

# %% [markdown]
# ## What usually goes wrong
#
# ### "The scale is alpha"
#
# Several programs forgot to divide by the rank. Training still works after a fashion, as you saw above, so nobody notices; until an adapter trained by a correct program is
# loaded. Here is our rank-16 adapter of the turned spiral, read as such a program would.

# %% tags=["drawing"]
misread = copy.deepcopy(rank_16)
misread.middle.scaling = 32.0  # alpha, not divided by the rank
strong = misread.middle.delta_weight().norm() / rank_16.middle.delta_weight().norm()
shared.say(
    f"The update is {strong:.0f} times too strong. Accuracy on the turned spiral: **{accuracy(rank_16, 0.5):.0%}** with the right scale, "
    f"**{accuracy(misread, 0.5):.0%}** with the wrong one. No error, no warning."
)

# %% [markdown]
# ### "A starts as N(0, 1)"
#
# The LoRA paper says that $A$ is drawn from a "random Gaussian" and gives no variance; its code draws from a narrow uniform
# distribution. Many notebooks follow the text and draw $A$ from a standard normal distribution. $B$ is zero, so the first
# forward pass looks perfect. But $A$ enters twice: the gradient of $B$ is proportional to $A$, and what a step of $B$
# changes in the layer is multiplied by $A$ again. An $A$ that is ten times too large makes the first step a hundred times
# too large.

# %%
runs, with_adam = {}, {}
for name, lr in (("uniform", 1.0), ("N(0, 1)", 1.0), ("N(0, 1), rate / 100", 0.01)):
    layer = adapter(rank=8, alpha=16)
    if name != "uniform":
        nn.init.normal_(layer.lora_A)
    ratio = layer.lora_A.std().item() * math.sqrt(3 * d)  # against a uniform draw's 1 / sqrt(3 in)
    if lr == 1.0:
        other = copy.deepcopy(layer)
        with_adam[name] = follow(other, 60, torch.optim.Adam([other.lora_A, other.lora_B], lr=0.01))[-1][0]
    runs[name] = [loss for loss, _, _ in follow(layer, 60, torch.optim.SGD([layer.lora_A, layer.lora_B], lr=lr))]

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.4, height=2.8)
for (name, losses), color, line in zip(runs.items(), (C["blue"], C["orange"], C["purple"]), ("-", "--", ":"), strict=True):
    shown = [loss for loss in losses if loss < 1e4]
    ax.plot(range(1, len(shown) + 1), shown, color=color, linestyle=line)
    ax.annotate(name, (len(shown), shown[-1]), xytext=(5, 3), textcoords="offset points", color=color, fontsize=9)
ax.set(yscale="log", ylim=(0.02, 1e4), xlim=(0, 82), xticks=range(0, 61, 10), xlabel="step (SGD)", ylabel="loss")
shared.show(
    fig,
    "normal_start",
    "At the same rate the uniform start learns smoothly and the standard normal start blows up within a few steps.",
)
blew_up = not max(runs["N(0, 1)"]) < 1e3
fate = "it blows up" if blew_up else f"it ends at {runs['N(0, 1)'][-1]:.3f}"
saved = f"{runs['N(0, 1), rate / 100'][-1]:.3f} against {runs['uniform'][-1]:.3f}"
shared.say(
    f"With {d} inputs the standard normal start is {ratio:.0f} times as large as the right one; with 576 inputs, as in SmolLM2-135M, "
    f"it would be {math.sqrt(3 * 576):.0f} times. At the rate that suits the right start {fate}. "
    f'A rate a hundred times smaller keeps it alive, at a loss of {saved} after as many steps: the bug hides behind "LoRA needs a tiny learning rate". '
    f"Adam, which divides each gradient by its size, hides it better: at rate 0.01 the two starts end at {with_adam['N(0, 1)']:.3f} and {with_adam['uniform']:.3f}."
)

# %% [markdown]
# ### "Only A and B are trained"
#
# They are if you froze the rest. A wrapper that freezes just the weight it wraps leaves norms, biases and other layers to an optimizer that was given `model.parameters()`. Ask the model:

# %%
careless = copy.deepcopy(pretrained)
careless.middle = LoRALinear(careless.middle, rank=4, alpha=8)  # no freezing of the rest
shared.say(f"Meant to train: `{trainable(rank_4)}`")
shared.say(f"Really trained: `{trainable(careless)}`")
assert "norm.weight" in trainable(careless)
assert "norm.weight" not in trainable(rank_4)

# %% [markdown]
# Such an adapter file, which holds only $A$ and $B$, does not give back the model that was trained. Compare the list with what you meant, in a test.

# %% [markdown]
# ## Exercises
#
# ### 1. LoRA on an embedding
#
# An embedding is a matrix too: `W` of shape `[num_embeddings, dim]`, and `W[ids]` looks rows up. By convention the factors keep the places that they have for a linear layer that
# maps *from* ids *to* vectors: `lora_A` is `[rank, num_embeddings]` and `lora_B` is `[dim, rank]`. Return what the adapter adds for some ids, without ever building a matrix of the size of `W`.


# %% tags=["exercise"]
def embedding_update(ids, lora_A, lora_B, scaling):
    """ids [...] -> what is added to W[ids], [..., dim]."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_embedding_update(answer):
    draw = torch.Generator().manual_seed(0)
    ids = torch.tensor([[2, 0, 5], [5, 5, 1]])  # [2, 3]
    for num, dim in ((6, 6), (6, 4)):  # a square one first: there mixed-up factors still fit
        layer = minisft.lora.LoRAEmbedding(nn.Embedding(num, dim), rank=3, alpha=6)  # scaling 2
        A, B = torch.randn(3, num, generator=draw), torch.randn(dim, 3, generator=draw)
        layer.lora_A.data, layer.lora_B.data = A, B
        expected = (layer(ids) - layer.base(ids)).detach()  # [2, 3, dim]
        got = answer(ids, A, B, 2.0)
        assert got.shape == expected.shape, f"the shape should be {tuple(expected.shape)}, yours is {tuple(got.shape)}"
        if num == dim:
            assert not torch.allclose(got, 2 * embedding(ids, B) @ A), "A and B are swapped: the columns of A belong to the ids"
        assert not torch.allclose(got, expected / 2), "remember the scaling"
        assert torch.allclose(got, expected, atol=1e-5), (
            "each id picks one column of A; B turns its rank numbers into dim numbers"
        )


shared.grade(check_embedding_update, embedding_update)


# %% tags=["solution"]
def embedding_update(ids, lora_A, lora_B, scaling):
    rows = lora_A.T[ids]  # [..., rank]
    return scaling * (rows @ lora_B.T)  # [..., dim]


shared.grade(check_embedding_update, embedding_update)

# %% [markdown]
# (For an embedding it is $A$ that starts at zero, and $B$ that is random. That is a convention: any one zero factor makes a fresh adapter harmless, and PEFT chose this one.)
#
# ### 2. What one step does to the merged weight
#
# You have $G$, the gradient with respect to the merged weight $W' = W + s B A$. Take **one plain SGD step** of size `lr` on both factors and return how much $W'$ changes, `[out, in]`.
# Work it out on paper first for $B = 0$: which factor moves, and how often does $s$ appear?


# %% tags=["exercise"]
def merged_change(G, A, B, scaling, lr):
    """G [out, in], A [rank, in], B [out, rank] -> the change of W + scaling * B A after one step, [out, in]."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_merged_change(answer):
    draw = torch.Generator().manual_seed(1)
    G, A = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (5, 2))
    for B in (torch.zeros(5, 2, dtype=torch.float64), torch.randn(5, 2, generator=draw, dtype=torch.float64)):
        got = answer(G, A, B, 3.0, 0.1)
        fresh = not B.any()
        if fresh:
            assert got.any(), "at B = 0 the gradient of A is zero: the first step goes through B, not through A"
            assert not torch.allclose(got, -0.1 * G), "that is full fine-tuning; here G is seen only through A"
            assert not torch.allclose(got, -0.1 * 3 * G @ A.T @ A), (
                "the scaling counts twice: in B's gradient, and in the product"
            )
        layer = LoRALinear(nn.Linear(6, 5, bias=False, dtype=torch.float64), rank=2, alpha=6)  # scaling 3
        layer.lora_A.data, layer.lora_B.data = A.clone(), B.clone()
        before = layer.delta_weight().detach()
        (layer(torch.eye(6, dtype=torch.float64)) * G.T).sum().backward()  # a loss whose gradient at W' is G
        torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1).step()
        expected = (layer.delta_weight() - before).detach()
        assert torch.allclose(got, expected), (
            "right at B = 0, but once B is not zero A moves too" if not fresh else "not yet: move B by -lr * s * G A^T"
        )


shared.grade(check_merged_change, merged_change)


# %% tags=["solution"]
def merged_change(G, A, B, scaling, lr):
    new_A = A - lr * scaling * B.T @ G  # [rank, in]; the same A if B is zero
    new_B = B - lr * scaling * G @ A.T  # [out, rank]
    return scaling * (new_B @ new_A - B @ A)  # [out, in]; -lr s^2 G A^T A at B = 0


shared.grade(check_merged_change, merged_change)

# %% [markdown]
# So the first step changes the weight by $- lr \cdot s^2 \, G A^T A$: the gradient, seen through the few random directions that $A$ happens to look at, times the square of the scale. That square is why a wrong
# scale hurts plain SGD most.

# %% [markdown]
# ## What was not shown
#
# - **That real updates are low-rank.** In our one-matrix runs the change $D$ was made by us, so its spectrum proves nothing. Aghajanyan et al. (2020) and Li et al. (2018) measure how few dimensions suffice for real tasks;
#   a later page takes a real full fine-tuning apart.
# - **Time and memory.** LoRA saves the gradients and optimizer state of the frozen weights, and the matmul that would make their gradient, one of the two of each layer's backward. It does not save the frozen weights themselves, the activations, or the forward pass, so do not expect
#   a step several times faster.
# - **A second data set.** Accuracy was measured on points never trained on, but we chose ranks and rates while looking at it. In real work keep a validation set for choosing and a test set for the end.
# - **Dropout on the adapter's input**, which `minisft` offers: a fresh mask for every token. Zeroing columns of $A$ once per batch is not the same thing, because all tokens then lose the same inputs.
# - **Low precision.** Our factors have the dtype of the base. `minisft` keeps them in fp32 (32 bits a number) over a base in bf16 (16 bits) or 4 bits, because small steps vanish in bf16 (pages 05 to 07).
# - **Merging**: adding $s B A$ to $W$ for good is exact on paper for any rank; page 09 shows where rounding makes it less so.

# %% [markdown]
# ## Summary
#
# > - LoRA adds (alpha / r) B A to a frozen weight; only the thin factors A and B learn.
# > - One factor starts at zero, so a fresh adapter changes nothing. The zero factor moves first.
# > - The scale multiplies how fast the layer moves. Fix the convention and alpha, then tune the rate.
# > - Where the adapter is placed can matter as much as its rank.
# > - Print what is trainable. Nothing else tells you that only A and B learn.
#
# You can now answer:
#
# <details>
# <summary>Both A and B were set to zero by mistake. What does the training curve look like?</summary>
#
# Flat. Each factor's gradient is multiplied by the other factor, so both gradients are zero at every step.
#
# </details>
#
# <details>
# <summary>Why does the loss at step 0 tell you whether an adapter was wrapped correctly?</summary>
#
# With one factor at zero the adapter adds exactly nothing, so the loss must equal that of the frozen model, bit for bit.
#
# </details>

# %% [markdown]
# ## References
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685): the method, section 4.
# - Aghajanyan et al. 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*, [arXiv:2012.13255](https://arxiv.org/abs/2012.13255).
# - Li et al. 2018, *Measuring the Intrinsic Dimension of Objective Landscapes*, [arXiv:1804.08838](https://arxiv.org/abs/1804.08838).
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732): `alpha / sqrt(r)`.
# - Hayou et al. 2024, *The Impact of Initialization on LoRA Finetuning Dynamics*, [arXiv:2406.08447](https://arxiv.org/abs/2406.08447): which factor should be random.
# - Li et al. 2025, *Beyond Zero Initialization: Investigating the Impact of Non-Zero Initialization on LoRA Fine-Tuning Dynamics*, [arXiv:2505.23194](https://arxiv.org/abs/2505.23194): both random.
