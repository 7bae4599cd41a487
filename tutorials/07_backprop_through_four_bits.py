# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Backprop through frozen 4-bit weights
#     minutes: 1
#     needs: tiny
#     after: ["03", "05"]
#     contract:
#       FourBitLinear: minisft.nf4_linear.NF4Linear
#       QLoRALinear: minisft.lora.LoRALinear
#     refs: [dettmers2023qlora, chen2016sublinear]
# ---

# %% [markdown]
# # 07 Backprop through frozen 4-bit weights
#
# A weight that is stored in 4 bits has to become ordinary numbers again before anything can be multiplied with it. On this
# page you write the layer that does so in forward *and* in backward, and keeps nothing in between. bitsandbytes does the
# same. You will also see the simpler version, which many tutorials show, and measure that it keeps all the memory it was
# meant to save.

# %% [markdown]
# ## You need, you get
#
# **You need** page 03 (LoRA) and page 05 (a weight as 4-bit codes and scales), and to have called `loss.backward()` before.
# Page 06 (the scales in 8 bits again) is what `nf4.quantize` does unless told otherwise; here it only makes the packed weight a
# little smaller, and `absmax2=None, offset=None` means that it was not done. No GPU, no model.
#
# **You get** a linear layer with a 4-bit weight that gradients flow through, two instruments that tell what autograd keeps
# in memory, and a small but complete QLoRA training run.

# %% tags=["setup"]
import torch

import shared

shared.start("07", seed=0)

from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from minisft import nf4

# %% [markdown]
# Here is the whole page in one picture, before any of it is explained. Time runs from left to right: first the forward pass of
# a layer, then a long wait while all the layers that come after it have their turn, then the backward pass of this layer. The
# areas are to scale.

# %% tags=["drawing"]
SHAPE = (576, 576)  # [out, in]: an attention projection of a small language model
picture_q = nf4.quantize(torch.randn(SHAPE))
packed_bytes, dense_bytes = picture_q.nbytes, picture_q.shape.numel() * 4  # a dense weight has 4 bytes a number

from matplotlib.patches import Rectangle


def draw_story(ax, title, kept):
    """One layer's life: the packed weight below, the dense weight above it wherever it is in memory."""
    side, small = 1.0, (packed_bytes / dense_bytes) ** 0.5
    ax.add_patch(Rectangle((0, 0), 8, small, color=shared.COLORS["blue"], alpha=0.25, lw=0))
    for left in (0, 7):
        ax.add_patch(Rectangle((left, 0), small, small, color=shared.COLORS["blue"]))
        solid = {"facecolor": shared.COLORS["orange"], "edgecolor": shared.COLORS["orange"]}
        ax.add_patch(Rectangle((left, 0.6), side, side, **solid))
    if kept:
        ax.add_patch(Rectangle((1, 0.6), 6, side, color=shared.COLORS["orange"], alpha=0.3, lw=0))
    ax.text(4, 0.6 + side / 2, "the dense weight stays" if kept else "nothing dense is kept", ha="center", va="center")
    ax.annotate("", (4.9, 1.85), (3.1, 1.85), arrowprops={"arrowstyle": "->", "color": shared.COLORS["grey"]})
    ax.text(4, 1.88, "time", ha="center", va="bottom", color=shared.COLORS["grey"])
    ax.text(4, small / 2, "the packed weight, always there", ha="center", va="center")
    for left, word in ((0, "forward"), (7, "backward")):
        ax.text(left + side / 2, 1.75, word, ha="center")
    ax.set(xlim=(-0.1, 8.1), ylim=(-0.1, 2.2), title=title, aspect="equal")
    ax.axis("off")


# %% tags=["drawing"]
fig, axes = shared.figure(height=4.6, rows=2)
draw_story(axes[0], "The simple version: the dense weight waits for backward", kept=True)
draw_story(axes[1], "The version of this page: made twice, never kept", kept=False)
shared.show(
    fig,
    "story",
    alt="The simple version keeps the dense weight (large square) from forward to backward; this page's makes it twice and "
    "keeps only the packed weight (small square).",
)
shared.say(
    f"The orange square stands for {dense_bytes:,} bytes, the blue one for {packed_bytes:,}. If the orange one stays, the layer "
    f"holds {1 + packed_bytes / dense_bytes:.2f} times what it would hold without any quantization."
)

# %% [markdown]
# ## The idea
#
# In fine-tuning with LoRA the large weight $W$ is frozen. It never learns, so its own gradient is never needed. But the
# layers *before* it, nearer the input, do learn (they have adapters too), and their gradients have to pass through $W$ on the
# way back. So backward needs the values of $W$, and only those.
#
# PyTorch's autograd has one general answer to "backward needs a value": it **saves** the tensor during forward. For an
# ordinary layer this costs nothing. The saved tensor *is* the parameter, which exists anyway, and saving means keeping a
# reference, not making a copy. For a 4-bit layer it costs everything. The dense $W$ is a temporary, made a moment ago from the
# packed codes, and saving it keeps it alive until backward. Every layer does that. So just before the first backward step the
# whole model is in memory in the dtype of the computation: bf16 in practice, fp32 on this page.
#
# The way out: do not save what is cheap to make again. Save the packed codes (which exist anyway), throw the dense weight
# away, and dequantize **a second time** in backward. That trade, computing again rather than remembering, is an old one;
# *checkpointing* is its general form and makes whole stretches of forward run again. Here we need so little of it that we can
# do it by hand: one `torch.autograd.Function`, which is PyTorch's way to say "for this step I write forward and backward
# myself".

# %% [markdown]
# ## The formula
#
# With $x$ of shape tokens by in, and $W$ of shape out by in:
#
# $$y = x W^T$$
#
# $$\frac{\partial L}{\partial x} = \frac{\partial L}{\partial y} \, W$$
#
# $$\frac{\partial L}{\partial W} = \left(\frac{\partial L}{\partial y}\right)^T x$$
#
# The first gradient is wanted. It needs $W$, but not $x$. The second is not wanted, because $W$ is frozen. It is the only one
# that needs $x$, so a frozen layer does not have to keep its input either. All that backward has to find again is
#
# $$W = \mathrm{levels}[\mathrm{code}] \cdot \mathrm{absmax}$$
#
# and that is in the packed weight.

# %% [markdown]
# ## By hand: 3 x 4
#
# Three of the sixteen NF4 levels are whole numbers: code 0 is -1, code 7 is 0 and code 15 (`F`) is 1. A weight made only of
# them can be worked out with a pencil. Let each row of four be one block with one scale:
#
# | bytes | codes | scale | row of W |
# |---|---|---|---|
# | `F7 0F` | 15 7 0 15 | 2 | 2, 0, -2, 2 |
# | `70 F7` | 7 0 15 7 | 1 | 0, -1, 1, 0 |
# | `0F 7F` | 0 15 7 15 | 3 | -3, 3, 0, 3 |
#
# *Forward*, with x = (1, 2, 1, 1): multiply x with each row and add up. y = (2 + 0 - 2 + 2, 0 - 2 + 1 + 0, -3 + 6 + 0 + 3) =
# (2, -1, 6).
#
# *Backward*: say the loss hands us the gradient g = (1, 2, -1), one number for each output. Add up the rows with these
# weights: 1 · (2, 0, -2, 2) + 2 · (0, -1, 1, 0) - 1 · (-3, 3, 0, 3) = (5, -5, 0, -1).
#
# Note what was used: the rows of W, and not x. The gradient of W itself would be the 3 x 4 table of all products of a g with
# an x. We do not compute it.

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
W = nf4.dequantize(pencil)  # [3, 4]
x = torch.tensor([[1.0, 2.0, 1.0, 1.0]])  # [1, 4]
g = torch.tensor([[1.0, 2.0, -1.0]])  # [1, 3]
print("W      =", W.tolist())
print("x W^T  =", (x @ W.T).tolist())
print("g W    =", (g @ W).tolist())

# %% [markdown]
# ## Build it
#
# **First the matmul.** An `autograd.Function` has two static methods. `forward` is handed the inputs and a notepad called
# `ctx`, in which it may write down what backward will need. `backward` is handed the gradient of the output and returns one
# gradient for each input of `forward`, or `None` for what has none.
#
# Inside `forward` autograd is switched off, so the dense weight that `F.linear` uses is forgotten as soon as the method
# returns. What we write into `ctx` is the packed weight.


# %% tags=["build"]
class FrozenProduct(torch.autograd.Function):
    """y = x W^T for a W in 4 bits. No dense weight outlives a call."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q  # a reference to bytes that the layer owns anyway
        return F.linear(x, nf4.dequantize(q, x.dtype))  # [..., in] times [out, in]^T: [..., out]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        grad_x = grad_y @ nf4.dequantize(ctx.q, grad_y.dtype)  # [..., out] times [out, in]: [..., in]
        return grad_x, None  # None: nothing in q learns


# %% [markdown]
# `once_differentiable` says that our backward cannot be differentiated once more; PyTorch then raises an error if you try it.
#
# **Then two layers.** The first only holds the packed weight. The second puts a LoRA update beside it, exactly as on page 03:
# that is all there is to QLoRA's forward.


# %% tags=["build"]
class FourBitLinear(nn.Module):
    """A frozen linear layer without bias. Its only tensors are those of the packed weight."""

    def __init__(self, weight):  # [out, in]
        super().__init__()
        self.q = nf4.quantize(weight)

    def forward(self, x):
        return FrozenProduct.apply(x, self.q)  # [..., in] to [..., out]


class QLoRALinear(nn.Module):
    """y = x W^T + (alpha / rank) x A^T B^T, with W in 4 bits."""

    def __init__(self, weight, rank, alpha):  # [out, in]
        super().__init__()
        out_features, in_features = weight.shape
        self.base, self.scaling = FourBitLinear(weight), alpha / rank
        self.lora_A = nn.Parameter((torch.rand(rank, in_features) * 2 - 1) / in_features**0.5)  # [rank, in]
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))  # [out, rank]

    def forward(self, x):
        update = x @ self.lora_A.T @ self.lora_B.T  # [..., in] to [..., rank] to [..., out]
        return self.base(x) + self.scaling * update


# %% [markdown]
# **Last the instrument.** Autograd lets us look over its shoulder: a pair of *saved-tensor hooks* is called with every tensor
# it puts away for backward, and again when it takes one out. Ours writes down the bytes and hands the tensor through. Two
# details make the count honest. Several tensors can be views of the same memory (`W` and `W.T` are), so we count *storages*,
# the memory below the tensors, and each only once. And a storage that exists anyway, such as a parameter's, costs nothing to
# keep, so the caller can name those.
#
# One thing the hooks do not see: what we hang onto `ctx` ourselves, such as `ctx.q`. That one is owned by the layer, so it
# costs nothing; a dense weight hidden there would escape this instrument. The second one, further down, is there to find
# it.


# %% tags=["build"]
@contextmanager
def count_saved(*owned):
    """A dict from each storage that autograd keeps to its bytes; the storages of the tensors in `owned` do not count."""
    anyway = {tensor.untyped_storage().data_ptr() for tensor in owned}
    saved = {}

    def put_away(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(put_away, lambda tensor: tensor):
        yield saved


# %% [markdown]
# ## Run it
#
# One layer first, in three forms. `naive` is what one writes without thinking of backward: dequantize, multiply, done.


# %%
def naive(x, q):
    return F.linear(x, nf4.dequantize(q, x.dtype))  # [..., in] to [..., out]


layer = FourBitLinear(torch.randn(512, 512))
dense = nf4.dequantize(layer.q)  # [512, 512]
x = torch.randn(32, 512, requires_grad=True)  # [tokens, in]

kept = {}
for name, product in {
    "an ordinary frozen layer": lambda: F.linear(x, dense),
    "4 bits, naive": lambda: naive(x, layer.q),
    "4 bits, ours": lambda: layer(x),
}.items():
    with count_saved(x, dense) as saved:
        y = product()
    kept[name] = sum(saved.values())
    print(f"{name:25} keeps {kept[name]:9,} bytes for backward")
print(f"{'the packed weight':25} is    {layer.q.nbytes:9,} bytes")

# %% [markdown]
# The ordinary layer keeps nothing extra, since the weight it saved is the one it has. The naive one keeps the dense weight. Ours
# keeps nothing.
#
# Is the gradient still right? Backward multiplies with the same numbers in the same order, so it must agree with the ordinary
# layer to the last bit:


# %%
def gradient(product):
    (grad,) = torch.autograd.grad(product(x).square().sum(), x)
    return grad  # [tokens, in]


assert torch.equal(gradient(layer), gradient(lambda x: F.linear(x, dense)))
print("gradients of ours and of the ordinary layer: the same bits")

# %% [markdown]
# Now a block as it is in a language model: up to a wider space, a nonlinearity, down again. We compare five ways to run
# it, and count three kinds of bytes: what is **stored** all the time, the **dense weights** that are kept for backward, and
# the **activations** that are kept for backward. Two of the five use PyTorch's checkpointing, which keeps only the input of
# the block and runs the block's whole forward a second time when backward arrives.

# %%
from time import perf_counter

from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN, TOKENS = 576, 1536, 256
up, down = nf4.quantize(torch.randn(HIDDEN, WIDTH) * 0.04), nf4.quantize(torch.randn(WIDTH, HIDDEN) * 0.03)
dense_up, dense_down = nf4.dequantize(up), nf4.dequantize(down)  # [hidden, width], [width, hidden]


def block(product, up, down):
    return lambda x: product(F.gelu(product(x, up)), down)  # [tokens, width] to [tokens, hidden] to [tokens, width]


def checkpointed(function):
    return lambda x: checkpoint(function, x, use_reentrant=False)


WAYS = {
    "dense, frozen": block(F.linear, dense_up, dense_down),
    "4 bits, naive": block(naive, up, down),
    "4 bits, ours": block(FrozenProduct.apply, up, down),
    "naive + checkpoint": checkpointed(block(naive, up, down)),
    "ours + checkpoint": checkpointed(block(FrozenProduct.apply, up, down)),
}


# %%
def measure(name):
    """(stored, dense weights kept, activations kept) in bytes, and the median time of forward and backward in milliseconds."""
    times = []
    for _ in range(7):
        # The input comes out of an earlier layer, so nobody else keeps it alive.
        x = torch.randn(TOKENS, WIDTH).requires_grad_()  # [tokens, width]
        start = perf_counter()
        with count_saved(dense_up, dense_down) as saved:
            y = WAYS[name](x)
        weights = sum(size for size in saved.values() if size == dense_up.nbytes)
        activations = sum(saved.values()) - weights
        y.sum().backward()
        times.append(perf_counter() - start)
    stored = dense_up.nbytes + dense_down.nbytes if name == "dense, frozen" else up.nbytes + down.nbytes
    return (stored, weights, activations), 1000 * sorted(times)[3]


measured = {name: measure(name) for name in WAYS}

# %% tags=["drawing"]
fig, ax = shared.figure(height=3.4)
kinds = (("stored", "blue"), ("dense weights kept", "orange"), ("activations kept", "grey"))
for row, (sizes, _) in enumerate(measured.values()):
    left = 0.0
    for size, (_, color) in zip(sizes, kinds, strict=True):
        ax.barh(row, size / 1e6, left=left, color=shared.COLORS[color], height=0.6)
        left += size / 1e6
    ax.text(left + 0.15, row, f"{left:.1f} MB", va="center")
for (kind, color), left in zip(kinds, (0.0, 0.27, 0.66), strict=True):
    ax.text(left, 1.03, f"■ {kind}", color=shared.COLORS[color], transform=ax.transAxes, fontweight="bold")
ax.set_yticks(range(len(measured)), measured)
ax.set(xlabel=f"megabytes for one block, {TOKENS} tokens, before its backward begins", xlim=(0, 11))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
shared.show(
    fig,
    "saved_bytes",
    alt="Naive four bits needs more memory than the dense block; ours needs only packed weights and activations; "
    "with checkpointing only the block's input is kept.",
)

# %% tags=["drawing"]
total = {name: f"{sum(sizes) / 1e6:.1f} MB" for name, (sizes, _) in measured.items()}
taken = {name: f"{ms:.0f} ms" for name, (_, ms) in measured.items()}
slower = measured["4 bits, ours"][1] / measured["dense, frozen"][1] - 1
shared.say(
    f"Before its backward the naive block holds **{total['4 bits, naive']}**, the dense one, which was never quantized, "
    f"{total['dense, frozen']}, and ours {total['4 bits, ours']}."
)
shared.say(
    f"Forward and backward took {taken['dense, frozen']} dense, {taken['4 bits, naive']} naive, {taken['4 bits, ours']} ours and "
    f"{taken['naive + checkpoint']} naive with a checkpoint. So 4 bits cost {slower:.0%} more time than dense weights here."
)

# %% [markdown]
# Three things to read from it. *Naive four bits is no saving at all while you train*: it holds the packed weight and the
# dense one. *Checkpointing also removes the dense weight*, because the naive forward that kept it is thrown away and run
# again; so a naive QLoRA may hide its flaw behind a checkpoint, and then pays for a second matmul where a second
# dequantization would have been enough. And *the two add up*: ours is about weights, checkpointing is mostly about activations, and
# real runs on long texts use both.
#
# Our second dequantization is not free. Here it runs as plain PyTorch on a CPU, which is the slowest place for it. Its cost
# does not grow with the number of tokens, and that of the matmul does. So the longer the batch, the smaller its share:


# %%
def milliseconds(function, repeats=5):
    def once():
        start = perf_counter()
        function()
        return perf_counter() - start

    return 1000 * sorted(once() for _ in range(repeats))[repeats // 2]


one_dequantize = milliseconds(lambda: nf4.dequantize(up))
for tokens in (16, 256, 4096):
    grad_y = torch.randn(tokens, HIDDEN)  # [tokens, out]
    product_ms = milliseconds(lambda grad_y=grad_y: grad_y @ dense_up)
    print(f"{tokens:5} tokens: the matmul {product_ms:7.2f} ms, the second dequantization {one_dequantize:5.2f} ms")

# %% [markdown]
# ### A real little QLoRA run
#
# Now the thing itself. A stack of eight layers plays the pretrained model. The *teacher* is the same stack after it was
# fine-tuned, so that every weight has moved a little. The *student* has the pretrained weights in 4 bits, frozen, and a LoRA
# update beside each. It learns the teacher's answers. (What fine-tuning did has rank 3, since we made it so, and the adapters
# have rank 8, so they could hold all of it. That real updates are of low rank is not shown here.)

# %%
LAYERS, SIZE, RANK = 8, 128, 8
pretrained = [torch.randn(SIZE, SIZE) / SIZE**0.5 for _ in range(LAYERS)]  # each [size, size]
drift = [0.5 * torch.randn(SIZE, 3) @ torch.randn(3, SIZE) / SIZE for _ in range(LAYERS)]  # what fine-tuning did
inputs = torch.randn(256, SIZE)  # [tokens, size]


def run_stack(layers, h):
    for layer in layers:
        h = h + torch.tanh(layer(h))  # [tokens, size]
    return h


# %%
with torch.no_grad():
    wanted = run_stack([lambda h, W=W + D: h @ W.T for W, D in zip(pretrained, drift, strict=True)], inputs)
    unrounded = F.mse_loss(run_stack([lambda h, W=W: h @ W.T for W in pretrained], inputs), wanted).item()

student = nn.ModuleList(QLoRALinear(W, rank=RANK, alpha=2 * RANK) for W in pretrained)


def train(student, steps=120):
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(run_stack(student, inputs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


trained = sum(p.numel() for p in student.parameters())
losses = train(student)
shared.say(
    f"{trained:,} numbers learned, {LAYERS * SIZE**2:,} stayed frozen in 4 bits. "
    f"The loss went from {losses[0]:.3f} to {losses[-1]:.4f} in {len(losses)} steps. With unrounded weights it would have begun "
    f"at {unrounded:.3f}: the rest is the error of 4 bits, and the adapters learn to make up for that too."
)

# %% [markdown]
# And while it runs? Let us watch the dense weights come and go during one training step. The second instrument is simpler
# than the first: we note the storage of every dense weight that `nf4.dequantize` makes, without keeping it alive (a *weak*
# reference), and ask at each moment how many of them still exist. For this one cell we slip the note-taking in with
# `mock.patch`.

# %%
from unittest import mock


class NaiveLinear(QLoRALinear):
    """The same layer, same numbers, with the naive matmul."""

    def forward(self, x):
        update = x @ self.lora_A.T @ self.lora_B.T  # first, as above: the gradients of x then add up in the same order
        return naive(x, self.base.q) + self.scaling * update  # [..., in] to [..., out]


def watch(kind):
    """(moment, bytes of dense weights alive) through one forward and backward. A moment is counted in layers."""
    made, story, real_dequantize = [], [(0.0, 0)], nf4.dequantize
    layers = [kind(W, RANK, 2 * RANK) for W in pretrained]

    def note(moment):
        story.append((moment, sum(SIZE * SIZE * 4 for storage in made if not storage.expired())))

    def watched(q, dtype=None):
        weight = real_dequantize(q, dtype)
        made.append(StorageWeakRef(weight.untyped_storage()))
        note(story[-1][0] // 1 + 0.5)  # in the middle of a layer
        return weight

    with mock.patch.object(nf4, "dequantize", watched):
        h = inputs.clone().requires_grad_()
        for number, layer in enumerate(layers):
            h.register_hook(lambda grad, moment=2 * LAYERS - number: note(float(moment)))  # the gradient has come back to here
            h = h + torch.tanh(layer(h))  # [tokens, size]
            note(number + 1.0)
        h.sum().backward()
    return story


stories = {"naive": watch(NaiveLinear), "ours": watch(QLoRALinear)}

# %% tags=["drawing"]
fig, axes = shared.figure(height=3.4, columns=2)
axes[0].plot(losses, color=shared.COLORS["blue"])
axes[0].set(xlabel="training step", ylabel="mean squared error", yscale="log", title="The student learns")
for story, color in zip(stories.values(), ("orange", "blue"), strict=True):
    moments, alive = zip(*story, strict=True)
    axes[1].plot(moments, [size / 1e3 for size in alive], marker="o", markersize=3, color=shared.COLORS[color])
axes[1].axvline(LAYERS, color=shared.COLORS["grey"], linestyle=":", linewidth=1)
axes[1].text(LAYERS, 530, "naive", color=shared.COLORS["orange"], ha="center", va="bottom", fontweight="bold")
axes[1].text(LAYERS, 95, "ours", color=shared.COLORS["blue"], ha="center", va="bottom", fontweight="bold")
axes[1].set(
    xlabel="layers passed: forward, then backward",
    ylabel="dense weights alive, kilobytes",
    title="Dense weights in one step",
    xticks=range(0, 2 * LAYERS + 1, 4),
    ylim=(-15, 600),
)
shared.show(
    fig,
    "training",
    alt="The student learns (left). Right: naive dense weights pile up layer by layer until backward; "
    "ours never has more than one at a time.",
)
peaks = {name: max(size for _, size in story) for name, story in stories.items()}
shared.say(
    f"At its peak the naive stack had {peaks['naive']:,} bytes of dense weights in memory, ours {peaks['ours']:,}. "
    f"One layer has {SIZE * SIZE * 4:,}."
)

# %% [markdown]
# The orange curve grows with the depth of the model; the blue one does not. In a model of 32 layers with seven matrices each
# the orange peak is 224 matrices high, and the blue one is one matrix. And it is the same training. Started from the same point,
# both give the same losses, bit for bit:


# %%
def losses_of(kind):
    torch.manual_seed(1)
    return train(nn.ModuleList(kind(W, RANK, 2 * RANK) for W in pretrained), steps=10)


torch.set_num_threads(1)  # with several threads, a busy machine may add up in another order
assert losses_of(NaiveLinear) == losses_of(QLoRALinear)
print("ten steps naive and ten steps ours: the same losses, to the last bit")

# %% [markdown]
# ## The same as the library
#
# `minisft.nf4_linear.NF4Linear` is this layer with a bias, faster dequantization and kernels for GPUs.
# `minisft.lora.LoRALinear` is the adapter around it. (For sixteen rows or fewer the library's CPU code multiplies straight
# from the codes and adds up in another order; we compare on more rows, where both do the same and the bits must agree.)

# %%
from minisft.lora import LoRALinear
from minisft.nf4_linear import NF4Linear

source = nn.Linear(200, 72, bias=False)
ours, theirs = FourBitLinear(source.weight), NF4Linear.from_linear(source)
x = torch.randn(3, 20, 200, requires_grad=True)  # [batch, time, in]
assert torch.equal(ours(x), theirs(x))
assert torch.equal(gradient(ours), gradient(theirs))

ours, theirs = QLoRALinear(source.weight, rank=4, alpha=8), LoRALinear(NF4Linear.from_linear(source), rank=4, alpha=8)
with torch.no_grad():
    ours.lora_B.normal_()
    theirs.lora_A.copy_(ours.lora_A)
    theirs.lora_B.copy_(ours.lora_B)
torch.testing.assert_close(ours(x), theirs(x))
grads, library_grads = (torch.autograd.grad(m(x).square().mean(), (m.lora_A, m.lora_B, x)) for m in (ours, theirs))
for grad, expected in zip(grads, library_grads, strict=True):
    torch.testing.assert_close(grad, expected)

with count_saved(x) as saved:
    y = FourBitLinear(source.weight)(x)
assert saved == {}, "no byte is kept for backward"

x64 = torch.randn(5, 200, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda x: FrozenProduct.apply(x, theirs.base.quantized), x64)
print("the library's layers agree, nothing is saved, and the gradient is the true slope (gradcheck, float64)")

# %% [markdown]
# `gradcheck` is the strictest of these: it nudges each input a little, looks how the output really moves, and compares with
# what our `backward` claims. It takes float64, because a small nudge is lost in the rounding of float32.

# %% [markdown]
# ## What usually goes wrong
#
# **"Dequantize in forward, `F.linear`, done: memory saved."** You have seen it: nothing is saved until the last layer's
# backward. The flaw is easy to miss, because *no Python variable* refers to the dense weight any more. It is held by the
# graph behind the output, in C++. The second exercise is about catching it.
#
# **"The weight is frozen, so its matmul needs no gradient: put it under `no_grad`."** Then the chain is cut there, and
# whatever comes before it never learns:

# %%
earlier = QLoRALinear(torch.randn(64, 64) / 8, rank=4, alpha=8)
later = FourBitLinear(torch.randn(64, 64) / 8)
x = torch.randn(20, 64)
nn.init.normal_(earlier.lora_B)

with torch.no_grad():
    cut = later(earlier(x))
print("under no_grad: the output has a graph behind it:", cut.requires_grad)

later(earlier(x)).sum().backward()
assert earlier.lora_A.grad.any()
print("with our matmul: the earlier layer gets its gradient, although the later one is frozen")
assert not cut.requires_grad

# %% [markdown]
# **"Backward should use the original weight, it is more exact."** It would be the exact gradient of a model that is not the
# one that ran. The rounding to 4 bits happened once, before training; what runs now is a linear map with the rounded weight,
# and *its* slope is what backward has to return. There is nothing approximate about it, and no "straight-through estimator"
# is needed: that is for methods that round again at every step. `gradcheck` sees the difference at once:

# %%
original = torch.randn(24, 64, dtype=torch.float64)  # [out, in]


class OriginalInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        return F.linear(x, nf4.dequantize(q, x.dtype))  # [..., in] to [..., out]

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ original, None  # the wrong weight: [..., out] to [..., in]


small_q = nf4.quantize(original)
x64 = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
right = torch.autograd.gradcheck(lambda x: FrozenProduct.apply(x, small_q), x64, raise_exception=False)
wrong = torch.autograd.gradcheck(lambda x: OriginalInBackward.apply(x, small_q), x64, raise_exception=False)
gap = (original - nf4.dequantize(small_q)).norm() / original.norm()
shared.say(
    f"gradcheck of ours: {right}. With the original weight in backward: {wrong}. "
    f"The two weights differ by {100 * gap:.0f} % of their length, and so do the gradients, about."
)
assert right
assert not wrong

# %% [markdown]
# ## Exercises
#
# **1. Add the bias.** Write `biased_linear(x, q, bias)`: $y = x W^T + b$ for a bias that learns. The gradient reaches `x` and
# `bias`, and no dense weight is kept. You will need an `autograd.Function` of your own (or an idea that spares you one).


# %% tags=["exercise"]
def biased_linear(x, q, bias):
    """x: [..., in], q: the packed weight [out, in], bias: [out]. Returns [..., out]."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_biased_linear(answer):
    torch.manual_seed(3)
    q, bias = nf4.quantize(torch.randn(48, 96)), torch.randn(48, requires_grad=True)
    dense, x = nf4.dequantize(q), torch.randn(2, 5, 96, requires_grad=True)  # [48, 96], [batch, time, in]
    slope = torch.randn(2, 5, 48)  # [batch, time, out]
    with count_saved(x, bias) as saved:
        y = answer(x, q, bias)
    expected = F.linear(x, dense, bias)
    assert y.shape == expected.shape, f"the output has shape {tuple(y.shape)}, not {tuple(expected.shape)}"
    torch.testing.assert_close(y, expected, msg="the output is not x W^T + b")
    assert max(saved.values(), default=0) < dense.nbytes, "a dense weight is kept for backward: dequantize again in backward"
    try:
        grads = torch.autograd.grad(y, (x, bias), slope, allow_unused=True)
    except RuntimeError as error:
        raise AssertionError(f"backward fails, look at the shapes of the gradients. PyTorch says: {error}") from error
    grad_x, grad_bias = torch.autograd.grad(expected, (x, bias), slope)
    assert grads[1] is not None, "the bias gets no gradient: backward returns one gradient for each input of forward"
    assert grads[0] is not None, "x gets no gradient: the layers before this one would not learn"
    torch.testing.assert_close(grads[0], grad_x, msg="the gradient of x is not grad_y W")
    torch.testing.assert_close(grads[1], grad_bias, msg="every token adds to the gradient of the bias: sum over all of them")


shared.grade(check_biased_linear, biased_linear)


# %% tags=["solution"]
def biased_linear(x, q, bias):
    # Adding is a step of its own, which autograd knows how to undo: the gradient of a sum is handed to both sides, and summed
    # over the tokens for the bias. It keeps nothing. (The library writes it into one Function, to spare a pass over y.)
    return FrozenProduct.apply(x, q) + bias  # [..., out] + [out]


shared.grade(check_biased_linear, biased_linear)

# %% [markdown]
# **2. Catch the naive layer.** Write `outlives(product, x, q)`: dequantize `q`, call `y = product(x, weight)`, let go of the
# weight (`del`), and say whether its memory is still in use *while `y` is alive*. It has to be `True` for `F.linear` when `x`
# requires a gradient. Try first what one would try first, `sys.getrefcount`, and see it fail.


# %% tags=["exercise"]
def outlives(product, x, q):
    """True if the memory of the dense weight is still in use after product(x, weight) returned and the weight was deleted."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_outlives(answer):
    q = nf4.quantize(torch.randn(32, 64))
    x = torch.randn(4, 64)  # [tokens, in]
    learning = x.clone().requires_grad_()

    def keeps_another_view(x, weight):
        y = x @ weight.T  # [tokens, out]
        y.note = weight.detach().view(-1)  # another tensor, the same memory
        return y

    assert answer(F.linear, learning, q) is True, (
        "F.linear keeps the weight when x requires a gradient. No Python reference shows it: the graph behind y holds the "
        "memory, from C++. Ask the storage, with StorageWeakRef"
    )
    assert answer(F.linear, x, q) is False, "without a gradient nothing is kept, and nothing must be claimed to be"
    assert answer(keeps_another_view, x, q) is True, (
        "the tensor died and its memory did not: another view of it lives. Ask the storage, not the tensor"
    )


shared.grade(check_outlives, outlives)


# %% tags=["solution"]
def outlives(product, x, q):
    weight = nf4.dequantize(q, x.dtype)  # [out, in]
    memory = StorageWeakRef(weight.untyped_storage())
    y = product(x, weight)  # [tokens, out]
    del weight
    return y is not None and not memory.expired()  # y is named to the end, so that its graph is alive when we ask


shared.grade(check_outlives, outlives)

# %% [markdown]
# ## What was not shown
#
# - **Speed.** The library dequantizes with compiled code on a CPU and with Triton kernels on a GPU (page 08). For a few
#   rows it multiplies straight from the codes without ever making the dense weight.

# %% tags=["drawing"]
base = shared.paper("dettmers2023qlora", "base_7b_mb")
adapters = shared.paper("dettmers2023qlora", "adapters_7b_mb")
input_gradients = shared.paper("dettmers2023qlora", "input_gradients_7b_mb")
with_checkpoints = shared.paper("dettmers2023qlora", "input_gradients_checkpointed_7b_mb")
shared.say(
    f"In the QLoRA paper's account of a model of 7 billion parameters, the 4-bit base takes {base:,} MB and the "
    f"adapters {adapters} MB. The input gradients of the adapters take {input_gradients} MB, and with "
    f"checkpointing {with_checkpoints} MB for each sequence."
)

# %% [markdown]
# ## Summary
#
# > - The gradient of the input needs the frozen weight; the weight's own gradient is not needed.
# > - `F.linear` on a dequantized weight keeps that dense weight until backward, in every layer.
# > - An autograd function that saves the packed weight and dequantizes twice keeps nothing extra.
# > - The gradient is exact: it is that of the layer with the rounded weight, which is the layer that runs.
# > - Checkpointing is for activations. It hides the flaw of the simple version, at a higher price.
#
# You can now answer:
#
# <details>
# <summary>A 4-bit model uses more memory in training than in generation. Which two things do you look for?</summary>
#
# Activations kept for backward, which are expected, and dense weights kept for backward, which are not. Saved-tensor hooks show
# both.
#
# </details>
#
# <details>
# <summary>Does QLoRA need a straight-through estimator?</summary>
#
# No. The weight is rounded once, before training. During training the layer is an ordinary linear map with a fixed weight.
#
# </details>

# %% [markdown]
# ## References
#
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*,
#   [arXiv:2305.14314](https://arxiv.org/abs/2305.14314). Equation 5 is our `QLoRALinear`, and the paragraph below it says
#   what is not computed.
# - Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*, [arXiv:1604.06174](https://arxiv.org/abs/1604.06174).
#   Computing again rather than remembering, for whole networks.
