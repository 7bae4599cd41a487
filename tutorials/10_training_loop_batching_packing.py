# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: The training loop, batching and packing
#     minutes: 1
#     needs: tiny
#     after: ["02"]
#     contract:
#       pack: minisft.batching.pack
#       collate: minisft.batching.collate
#       block_mask: minisft.attention.attend
#       learning_rate: minisft.schedule.learning_rate
#       train_step: minisft.step.train_step
#     refs: [krell2021efficient, ding2024fewer, su2021roformer, loshchilov2017decoupled, loshchilov2016sgdr]
# ---

# %% [markdown]
# # 10 The training loop, batching and packing
#
# You will write one complete training step: pack ragged rows into a tensor, keep them from seeing each other, add up the loss, divide once, clip, update.
# You will see that packing changes how rows lie in memory and nothing else, and measure what it saves.
# At the end your step leaves a model with the same weights as the step of `minisft`.

# %% [markdown]
# ## You need, you get
#
# **You need** page 02 (targets are the tokens shifted by one, and only the answer is supervised). No pretrained model: a tiny transformer learns to count in front of you.
#
# **You get** five functions, about 45 lines, that together are a correct training step, and three experiments that tell a correct step from one that only looks like it.

# %% tags=["setup"]
import copy
import itertools
import math
import random
import time
from collections import namedtuple

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import minisft.batching
import minisft.schedule
import minisft.step
import shared
from minisft.config import ModelConfig
from minisft.data.chat import Encoded
from minisft.elementwise import rotate
from minisft.model import CausalLM, rope_angles
from minisft.optim import MasterAdamW

shared.start("10", seed=0)
C = shared.COLORS
IGNORE, PAD = -100, 0  # a target that is not learned; the token that fills holes
Row = namedtuple("Row", "input_ids supervised")  # a row of data: token ids, and for each whether it is to be learned

# %% [markdown]
# Rows of text have different lengths, a tensor does not. The usual way out is to fill the short rows up. Our data on this page are rows that count: *begin, start, stride, then the numbers up to 59, end*.
# Counting in ones takes many tokens, counting in nines a few, so the lengths are as uneven as those of real chats. Here are 16 such rows, laid out in two ways.

# %%
BEGIN, END, FIRST = 1, 2, 3  # FIRST is the id of the number 0
VOCAB = FIRST + 60


def counting_row(start, stride):
    """E.g. begin 40 8 | 48 56 end: the two numbers are the question, what follows them is the answer."""
    answer = [FIRST + n for n in range(start + stride, 60, stride)] + [END]
    return Row([BEGIN, FIRST + start, FIRST + stride, *answer], [False] * 3 + [True] * len(answer))


def random_rows(count, seed):
    draw = random.Random(seed)
    return [counting_row(draw.randrange(50), draw.randrange(1, 10)) for _ in range(count)]


# %% tags=["drawing"]
def draw_layout(ax, owners, width, title):
    """One coloured stripe a row of data, grey where a position is empty; `owners` lists, for each tensor row, (data row, tokens)."""
    names = ("blue", "orange", "green", "purple", "black")
    for y, items in enumerate(owners):
        ax.barh(y, width, color=C["grey"], alpha=0.22, height=0.86)
        left = 0
        for index, length in items:
            ax.barh(y, length, left=left, color=C[names[index % 5]], alpha=0.8, height=0.86, edgecolor="white", linewidth=1.2)
            left += length
    used = sum(length for items in owners for _, length in items)
    ax.set_title(f"{title}: {len(owners)} x {width} positions, {1 - used / (len(owners) * width):.0%} empty", fontsize=10)
    ax.set(xlabel="position in the row (tokens)", yticks=[], xlim=(0, width), ylim=(len(owners) - 0.4, -0.6))
    ax.grid(False)
    ax.spines["left"].set_visible(False)


# %%
CAPACITY = 64
rows = random_rows(16, seed=1)
lengths = [len(row.input_ids) for row in rows]
bins = minisft.batching.pack(lengths, CAPACITY)  # you write this one below

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=3.2, columns=2)
draw_layout(axes[0], [[(i, n)] for i, n in enumerate(lengths)], max(lengths), "padded")
draw_layout(axes[1], [[(i, lengths[i]) for i in items] for items in bins], CAPACITY, "packed")
axes[1].set_ylim(len(lengths) - 0.4, -0.6)
shared.show(
    fig,
    "padding_and_packing",
    "Packing fills a few rows (right) with what padding spreads over sixteen, mostly empty ones (left, grey).",
)

# %% [markdown]
# ## The idea
#
# **Packing** puts several rows of data one behind the other into one row of the tensor. Finding the best arrangement is a famous hard problem; a simple rule comes close:
# take the longest row first, and put it where the *least* room is left over. That is called best-fit decreasing.
#
# Now neighbours share a row. *Attention* is the part of a transformer in which a token reads the tokens before it (what it reads from them is a weighted sum; a mask says which ones it may read).
# It would let the second row of data read the first. So every position carries the number of its **segment**, and a token may look only at earlier tokens of its own segment.
# On paper the allowed pairs form square blocks along the diagonal: a **block mask**.
#
# **The loss** is a sum over the supervised tokens, divided *once*, by how many supervised tokens the whole step has. A step may be too large for the memory and cut into **micro-batches**,
# whose gradients add up. If each part divides by its own number of tokens, tokens in small parts count more than others, and how you cut decides what the model learns.
#
# **The update** comes last. A gradient that is too long is shortened (clipping), and AdamW decides how far each weight
# moves. The learning rate rises for a few steps and then falls along a cosine.

# %% [markdown]
# ## The formula
#
# With micro-batches $j = 1 \dots J$, supervised tokens $i$, and $N$ supervised tokens in the whole step:
#
# $$L = \frac{1}{N} \sum_j \sum_{i \in j} - \log p(t_i), \qquad N = \sum_j N_j$$
#
# The mean of the means is $\frac{1}{J} \sum_j \frac{1}{N_j} \sum_{i \in j} - \log p(t_i)$. In general it is the same only if all $N_j$ are equal.
#
# Clipping: let $|g|$ be the length of *all* gradients taken as one long vector. If $|g| > c$, multiply every one of them by $c / |g|$.
# It comes after the last micro-batch, for only then is the gradient whole.
#
# AdamW keeps two running means for every weight, of its gradient $g$ and of $g^2$. In step $k$, with rate $\eta$ and weight decay $\lambda$:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$$
#
# $$w \leftarrow w - \eta \lambda w - \eta \, \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}$$
#
# And the rate, with $W$ warm-up steps of $K$ and a peak $\hat\eta$. Steps count from 1, and none of them has rate zero, since a
# step without a rate learns nothing:
#
# $$\eta_k = \begin{cases} \hat\eta \, \frac{k}{W + 1} & k \le W \\ \frac{\hat\eta}{2} \left(1 + \cos \pi \frac{k - 1 - W}{K - W}\right) & k > W \end{cases}$$
#
# It is at its peak in step $W + 1$ and would be zero in step $K + 1$. Why warm up? In the first steps the running means rest on a handful of gradients, and AdamW would take full steps because of them.

# %% [markdown]
# ## By hand: 3 x 4
#
# Three rows of 1, 4 and 3 tokens. Padded, they are $3 \times 4$ positions, of which 4 are empty. Now pack them with room for 4:
#
# 1. Longest first: the row of 4 opens the first bin and fills it.
# 2. The row of 3 finds no room, so it opens a second bin. One position is left there.
# 3. The row of 1 fits exactly there. Two bins, $2 \times 4$ positions, none empty.
#
# The second bin holds segments `1 1 1 2`. Which token (down) may look at which (across)?
#
# $$\begin{pmatrix} 1 & 0 & 0 & 0 \\ 1 & 1 & 0 & 0 \\ 1 & 1 & 1 & 0 \\ 0 & 0 & 0 & 1 \end{pmatrix}$$
#
# The last token is a row of its own and sees only itself.
#
# Now the loss. Say one micro-batch has a single supervised token with loss 4, another has three with loss 1 each. Over all four tokens the mean is $(4 + 1 + 1 + 1) / 4 = 1.75$.
# The mean of the two means is $(4 + 1) / 2 = 2.5$: the single token got a weight of one half instead of one quarter.

# %% [markdown]
# ## Build it
#
# The packer, and the tensors. `collate` is also the only function that shifts and masks targets. Three rules are in it:
#
# - The target *at* a position is the token *after* it, if that one is supervised.
# - The last position of a row has no target: the next token belongs to another row.
# - Empty positions are known by their segment number 0 and never by their token id. Some models (SmolLM2 is one) use the same id
#   for padding and for the end of an answer. If you mask "all tokens with the padding id", you mask every end, and the model
#   never learns to stop.


# %% tags=["build"]
def pack(lengths, capacity):
    """Best-fit decreasing: lists of indices that share a row. Whatever is longer than the capacity gets a bin of its own."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fill = [sum(lengths[j] for j in items) for items in bins]  # [bins]
        fits = [b for b in range(len(bins)) if fill[b] + lengths[i] <= capacity]
        if fits:
            bins[max(fits, key=lambda b: fill[b])].append(i)  # the fullest that still takes it
        else:
            bins.append([i])
    return bins


def collate(rows, bins):
    """Rows laid out as `bins` say: input ids, targets and segments, [B, T] each."""
    T = max(sum(len(rows[i].input_ids) for i in items) for items in bins)
    input_ids = torch.full((len(bins), T), PAD)  # [B, T]
    targets = torch.full((len(bins), T), IGNORE)  # [B, T]
    segments = torch.zeros(len(bins), T, dtype=torch.int64)  # [B, T], 0 where nothing is
    for b, items in enumerate(bins):
        end = 0
        for number, i in enumerate(items, start=1):
            ids, learn = torch.tensor(rows[i].input_ids), torch.tensor(rows[i].supervised)  # [n], [n]
            start, end = end, end + len(ids)
            input_ids[b, start:end], segments[b, start:end] = ids, number
            targets[b, start : end - 1] = torch.where(learn[1:], ids[1:], IGNORE)  # [n - 1]
    return input_ids, targets, segments


def block_mask(segments):
    """May a token (down) look at another (across)? [B, T] -> [B, T, T]."""
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    return same.tril()  # [B, T, T], the past and itself


# %% [markdown]
# Then the rate and the step. Read the step line by line: it counts before it computes, because the divisor must be known before the first `backward`.


# %% tags=["build"]
def learning_rate(step, total, peak, warmup):
    """Rises in a straight line for `warmup` steps, then falls along a cosine. Steps count from 1."""
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - 1 - warmup) / (total - warmup)  # from 0, and never quite 1
    return peak * (1 + math.cos(math.pi * progress)) / 2


def train_step(model, optimizer, batches, lr, clip):
    """One optimizer step over micro-batches; returns the mean loss per supervised token and the gradient's norm."""
    num_targets = sum(int((targets != IGNORE).sum()) for _, targets, _ in batches)  # of the whole step
    optimizer.zero_grad()
    total = 0.0
    for input_ids, targets, segments in batches:
        logits = model(input_ids, segment_ids=segments)  # [B, T, V]
        loss_sum = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")  # scalar
        (loss_sum / num_targets).backward()  # adds to what earlier micro-batches left in .grad
        total += loss_sum.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total / num_targets, norm


# %% [markdown]
# Your functions on the three rows of the pencil example:

# %%
three = [Row([11], [True]), Row([21, 22, 23, 24], [False, True, True, True]), Row([31, 32, 33], [False, False, True])]
print("bins:    ", pack([1, 4, 3], capacity=4))
input_ids, targets, segments = collate(three, pack([1, 4, 3], capacity=4))
print("ids:     ", input_ids.tolist())
print("targets: ", targets.tolist())
print("segments:", segments.tolist())
print("mask of the second bin:\n", block_mask(segments)[1].int())

# %% [markdown]
# Row 31 32 33 learns only its last token, 33, which is the target at the position of 32. The single token 11 has nothing to predict it, so it can have no target at all.

# %% [markdown]
# ## Run it
#
# ### Packed equals separate
#
# A tiny transformer, its weights still random. The loss of five rows, each alone; then of the same rows packed behind each other.

# %%
# The sizes of a very small transformer, named much as in Llama's configuration.
CONFIG = ModelConfig(
    model_type="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip


# %%
def tiny_model(config=CONFIG):
    torch.manual_seed(5)
    model = CausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    return model


@torch.no_grad()
def token_losses(model, batch):
    """The loss of every position, 0 where there is no target: [B, T]."""
    input_ids, targets, segments = batch
    logits = model(input_ids, segment_ids=segments)  # [B, T, V]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(targets)


def row_losses(model, rows, items, segments=None):
    """The summed loss of each row of one bin; `segments` replaces the bin's own."""
    batch = collate(rows, [items])
    if segments is not None:
        batch = (batch[0], batch[1], segments)
    losses = token_losses(model, batch)[0]  # [T]
    return [part.sum().item() for part in losses.split([len(rows[i].input_ids) for i in items])]


model = tiny_model()
bin_of_five = max(pack(lengths, CAPACITY), key=len)[:5]
alone = [row_losses(model, rows, [i])[0] for i in bin_of_five]
packed = row_losses(model, rows, bin_of_five)
largest = max(abs(a - b) / a for a, b in zip(alone, packed, strict=True))
torch.testing.assert_close(torch.tensor(packed), torch.tensor(alone))
shared.say(f"Each row has the loss it has alone; the largest relative difference is {largest:.0e}, which is rounding.")

# %% [markdown]
# This is the mask that makes it so, beside the one that a model uses if it does not know of segments. Everything orange is a token of one row of data looking at another's.

# %%
segments = collate(rows, [bin_of_five])[2]  # [1, T]
right, naive = block_mask(segments)[0], block_mask(torch.ones_like(segments))[0]  # [T, T] each
leaks = int((naive & ~right).sum())

# %% tags=["drawing"]
fig, axes = shared.figure(width=6.6, height=3.3, columns=2)
for ax, mask, title in zip(axes, (right, naive), ("block mask", f"plain causal mask: {leaks} leaks"), strict=True):
    T = len(mask)
    for allowed, color in ((mask & right, C["blue"]), (mask & ~right, C["orange"])):
        down, across = allowed.nonzero(as_tuple=True)
        ax.scatter(across, down, s=9, marker="s", color=color, linewidths=0)
    ax.set(xlim=(-1, T), ylim=(T, -1), aspect="equal", xlabel="token looked at", ylabel="token that looks")
    ax.set_title(title, fontsize=10)
    ax.grid(False)
shared.show(
    fig,
    "block_mask",
    "The block mask (left) keeps each row of data to itself; a plain causal mask lets later rows read earlier ones (right, orange).",
)

# %% [markdown]
# ### Must positions start again at zero?
#
# In a packed row the second segment begins at position 20, say. Llama and its relatives use **rotary positions** (RoPE). There,
# attention between two tokens depends on what they are and on their distance, but not on where they are, so any start will do.
# With **learned positions**, where every position has a vector of its own that is added to the token's, it does not. Both claims
# in one cell: one attention head, one segment of 12 tokens, started at position 0 and at position 20.

# %%
draw = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(12, 1, 16, generator=draw, dtype=torch.float64) for _ in range(3))  # [T, heads, head dim]
learned = torch.randn(64, 1, 16, generator=draw, dtype=torch.float64)  # [positions, 1, head dim]


def attended(q, k):
    """Causal attention of one segment, [T, heads, head dim]."""
    return scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True).transpose(0, 1)


def rope_from(start):
    cos, sin = rope_angles(CONFIG, torch.arange(start, start + 12), torch.float64)  # [T, 1, head dim / 2] each
    return attended(rotate(q, cos, sin), rotate(k, cos, sin))


def learned_from(start):
    added = learned[start : start + 12]  # [T, 1, head dim]
    return attended(q + added, k + added)


moved_rope = (rope_from(20) - rope_from(0)).abs().max().item()
moved_learned = (learned_from(20) - learned_from(0)).abs().max().item()
assert moved_rope < 1e-5 < moved_learned
shared.say(
    f"Starting at 20 instead of 0 moves the output by at most {moved_rope:.0e} with RoPE (rounding of the angles), and by up to {moved_learned:.2f} with learned positions."
)

# %% [markdown]
# So with RoPE the block mask alone is enough. `minisft` starts every segment at zero anyway: angles of small numbers are rounded less, and every row then computes what it would compute alone.
#
# ### Learning to count, three times
#
# Three models start from the same weights and, in every step, all three see the same 16 new rows. One gets them padded and cut into four micro-batches, one packed in a single batch, one packed *without* the block mask.

# %%
STEPS, PEAK, WARMUP, ROWS = 100, 0.01, 10, 16
data = [random_rows(ROWS, seed=1000 + step) for step in range(1, STEPS + 1)]
validation = random_rows(64, seed=7)


def padded_in_four(rows):
    return [collate(rows[i : i + 4], [[0], [1], [2], [3]]) for i in range(0, len(rows), 4)]


def packed_in_one(rows):
    return [collate(rows, pack([len(row.input_ids) for row in rows], CAPACITY))]


def packed_naively(rows):
    [(input_ids, targets, segments)] = packed_in_one(rows)
    return [(input_ids, targets, (segments > 0).long())]  # all one segment: each token sees all earlier ones


def train(layout):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, rows in enumerate(data, start=1):
        losses.append(train_step(model, optimizer, layout(rows), learning_rate(step, STEPS, PEAK, WARMUP), clip=1.0)[0])
    batch = collate(validation, [[i] for i in range(len(validation))])  # every row alone
    return model, losses, (token_losses(model, batch).sum() / (batch[1] != IGNORE).sum()).item()


trained = {layout.__name__: train(layout) for layout in (padded_in_four, packed_in_one, packed_naively)}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.9, columns=2)
steps = range(1, STEPS + 1)
axes[0].plot(steps, [learning_rate(step, STEPS, PEAK, WARMUP) for step in steps], color=C["grey"])
axes[0].set(xlabel="step", ylabel="learning rate", ylim=(0, 1.1 * PEAK))
axes[0].annotate("warm-up", (WARMUP, PEAK / 2), xytext=(6, 0), textcoords="offset points", fontsize=9)
axes[1].plot(steps, trained["packed_naively"][1], color=C["orange"], linewidth=1.2, label="packed, no block mask")
axes[1].plot(steps, trained["packed_in_one"][1], color=C["blue"], label="packed")
axes[1].plot(
    steps[::4],
    trained["padded_in_four"][1][::4],
    color=C["black"],
    linestyle="none",
    marker="o",
    markersize=3.5,
    markerfacecolor="none",
    label="padded, four micro-batches",
)
axes[1].set(xlabel="step", ylabel="loss per supervised token (nats)", ylim=(0, None))
axes[1].legend(fontsize=8)
shared.show(
    fig,
    "learning_to_count",
    "Packed (line) and padded (circles) are the same training; without a block mask it is another one. Left: the learning rate.",
)

# %% tags=["drawing"]
gap = max(abs(a - b) for a, b in zip(trained["padded_in_four"][1], trained["packed_in_one"][1], strict=True))
good, bad = trained["packed_in_one"][2], trained["packed_naively"][2]
shared.say(
    f"Padded and packed are the same training: over {STEPS} steps their losses never differ by more than {gap:.1g}. "
    f"On new rows, each read alone, the packed model has a loss of **{good:.3f}** and the one trained without a block mask **{bad:.3f}**"
    + (
        ", although it saw the same rows as often."
        if bad > 1.05 * good
        else ": here the leak did little harm in the end, though it was a different training."
    )
)

# %% [markdown]
# ### What does packing save?
#
# A larger model, 48 rows, forward and backward. Three ways: padded in the order of the data, padded after sorting by length (so that neighbours in a micro-batch are about equally long), and packed.
# Only real tokens are counted.

# %%
wide = tiny_model(ModelConfig(
    model_type="llama", vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_layers=3,
    num_heads=6, num_kv_heads=2, head_dim=32, max_position_embeddings=128,
))  # fmt: skip
many = random_rows(48, seed=3)
by_length = sorted(many, key=lambda row: -len(row.input_ids))
alone_in_bins = [[i] for i in range(12)]
layouts = {
    "padded, as they come": [collate(many[i : i + 12], alone_in_bins) for i in range(0, 48, 12)],
    "padded, sorted by length": [collate(by_length[i : i + 12], alone_in_bins) for i in range(0, 48, 12)],
    "packed": packed_in_one(many),
}
tokens = sum(len(row.input_ids) for row in many)
still = torch.optim.SGD(wide.parameters())  # rate 0 below: every repetition computes the same


def seconds(batches):
    begin = time.perf_counter()
    train_step(wide, still, batches, lr=0.0, clip=1.0)
    return time.perf_counter() - begin


seconds(layouts["packed"])  # the first call is always slow
times = {name: [] for name in layouts}
for _ in range(5):  # in turns, so that a busy moment of the machine hits all of them
    for name, batches in layouts.items():
        times[name].append(seconds(batches))
best = {name: min(values) for name, values in times.items()}
positions = {name: sum(batch[0].numel() for batch in batches) for name, batches in layouts.items()}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.2, columns=2)
labels = list(layouts)
axes[0].barh(labels, [positions[name] for name in labels], color=C["grey"], alpha=0.35)
axes[0].barh(labels, [tokens] * 3, color=C["blue"])
axes[0].set(xlabel="positions computed (blue: real tokens)", xlim=(0, 1.22 * max(positions.values())))
speeds = [tokens / best[name] for name in labels]
axes[1].barh(labels, speeds, color=C["blue"])
for row, name in enumerate(labels):
    axes[0].text(positions[name], row, f" {positions[name]:,}", va="center", fontsize=9)
    axes[1].text(speeds[row], row, f" {speeds[row]:,.0f}", va="center", fontsize=9)
axes[1].set(xlabel="real tokens a second", yticks=[], xlim=(0, 1.22 * max(speeds)))
for ax in axes:
    ax.invert_yaxis()
shared.show(
    fig,
    "tokens_per_second",
    "Packing computes hardly any empty positions (left), and so the most real tokens a second (right).",
)

# %% tags=["drawing"]
slow, sorted_only, fast = (tokens / best[name] for name in labels)
shared.say(
    f"On this machine: {slow:,.0f} tokens a second padded, {sorted_only:,.0f} after sorting, {fast:,.0f} packed: packing is "
    f"**{fast / slow:.1f} times** as fast as padding as they come, and {fast / sorted_only:.1f} times as fast as sorting alone. "
    f"The padded batches compute {positions[labels[0]] / positions['packed']:.1f} times as many positions as the packed one. Expect less in time: "
    "for attention the library lays packed rows out one by one again, and clipping costs the same in every layout."
)

# %% [markdown]
# Sorting within the step is nearly free and gets much of the gain, so compare packing with *that*. And the gain is a property of
# your data: rows of equal length have nothing to save.
#
# ### When all rows share a prefix
#
# This part shows a feature of the library; you may skip it. Chats often start with the same system message. Nothing later can
# change what the model computes for it, because tokens look back and never forward. So `minisft` computes such a prefix *once* a
# batch and lets every row continue it (`batching.shared_prefix`, `batching.collate_shared`). Its gradient is the sum of what all
# rows send back. Here are eight rows that share 30 tokens:

# %%
system = list(range(FIRST, FIRST + 30))
chats = [
    Encoded(system + row.input_ids, [False] * 30 + row.supervised, row=n, control_tokens_in_text=0, prompt_length=33)
    for n, row in enumerate(rows[:8])
]
own = [len(row.input_ids) for row in rows[:8]]
common = minisft.batching.shared_prefix(chats)  # a token or two of the rows themselves may be common too
once = minisft.batching.collate_shared(chats, PAD, common)
chat_bins = pack([30 + n for n in own], 128)
as_packed = minisft.batching.collate(chats, PAD, chat_bins)
sums = [minisft.step.batch_loss_sum(model, batch).item() for batch in (as_packed, once)]
torch.testing.assert_close(*sums, rtol=1e-6, atol=0)  # fp32 adds up in another order

# %% tags=["drawing"]
fig, ax = shared.figure(width=7.4, height=2.6)
names = ("blue", "orange", "green", "purple")
for y, items in enumerate(chat_bins):
    left = 0
    for i in items:
        for length, color, shade in ((common, C["grey"], 0.6), (30 + own[i] - common, C[names[i % 4]], 0.8)):
            ax.barh(y, length, left=left, color=color, alpha=shade, edgecolor="white")
            left += length
y = len(chat_bins) + 0.7
ax.barh(y, common, color=C["grey"], alpha=0.6, edgecolor="white")
left = common
for i, n in enumerate(own):
    ax.barh(y, 30 + n - common, left=left, color=C[names[i % 4]], alpha=0.8, edgecolor="white")
    left += 30 + n - common
ax.set(
    yticks=[(len(chat_bins) - 1) / 2, y],
    yticklabels=["packed", "prefix\nonce"],
    xlabel="position (tokens); grey: the common prefix",
    ylim=(y + 0.6, -0.6),
)
ax.grid(False)
shared.show(
    fig,
    "prefix_once",
    "The common prefix (grey) is computed once (below) instead of once for each packed row (above).",
)
shared.say(
    f"{as_packed.input_ids.numel()} positions packed, {once.input_ids.numel()} with the prefix once, and the same loss: {sums[0]:.3f} and {sums[1]:.3f}."
)

# %% [markdown]
# ## The same as the library
#
# Five claims: the same bins, the same tensors, the same attention, the same rates, and after three whole steps the same weights. The step runs in double precision, so that only a real difference could show;
# your side is `torch.optim.AdamW` and your `train_step`, the other side is `minisft`'s optimizer, its packer (which shares prefixes), its chunked loss and its clipping.

# %%
assert pack(lengths, CAPACITY) == minisft.batching.pack(lengths, CAPACITY)
encoded = [
    Encoded(row.input_ids, row.supervised, row=n, control_tokens_in_text=0, prompt_length=3) for n, row in enumerate(rows)
]
theirs = minisft.batching.collate(encoded, PAD, bins)
for mine, other in zip(collate(rows, bins), (theirs.input_ids, theirs.target_ids, theirs.segment_ids), strict=True):
    assert torch.equal(mine, other)

from minisft.attention import Segments, attend

segments = theirs.segment_ids  # [B, T]
B, T = segments.shape
q, k, v = (torch.randn(B, T, 4, 8) for _ in range(3))  # [B, T, heads, head dim]
mine = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=block_mask(segments)[:, None]).transpose(
    1, 2
)
other = attend(*(t.flatten(0, 1) for t in (q, k, v)), Segments.of(segments)).view(B, T, 4, 8)
torch.testing.assert_close(mine[segments > 0], other[segments > 0])

# %%
rates = [learning_rate(step, STEPS, PEAK, WARMUP) for step in steps]
assert rates == [minisft.schedule.learning_rate(step, STEPS, PEAK, WARMUP, "cosine") for step in steps]

model_a = tiny_model().double()
model_b = copy.deepcopy(model_a)
optimizer_a = torch.optim.AdamW(model_a.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
optimizer_b = MasterAdamW(dict(model_b.named_parameters()), betas=(0.9, 0.95), weight_decay=0.0)
for step in (1, 2, 3):
    loss, norm = train_step(model_a, optimizer_a, packed_in_one(rows), rates[step], clip=1.0)
    batches = minisft.batching.micro_batches(encoded, 4, PAD, packing=True, capacity=CAPACITY)
    result = minisft.step.train_step(model_b, optimizer_b, batches, rates[step], clip=1.0)
    torch.testing.assert_close((loss, norm), (result.loss, result.grad_norm))
for mine, other in zip(model_a.parameters(), model_b.parameters(), strict=True):
    torch.testing.assert_close(mine, other)
print("bins, tensors, attention, rates, losses and weights equal the library's")

# %% [markdown]
# And `torch.optim.AdamW` itself, so that nothing is hidden: the formula above, in four lines, on one weight.

# %%
w = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
adamw = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01, eps=1e-8)
by_hand, m, v = 2.0, 0.0, 0.0
seen = [by_hand]  # the weight before and after each step
for step, g in enumerate((3.0, -1.0, 0.5), start=1):
    w.grad = torch.tensor([g], dtype=torch.float64)
    adamw.step()
    m = 0.9 * m + 0.1 * g
    v = 0.95 * v + 0.05 * g * g
    by_hand -= 0.1 * 0.01 * by_hand
    by_hand -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
    print(f"step {step}: torch {w.item():.6f}, by hand {by_hand:.6f}")
    seen.append(by_hand)
assert math.isclose(w.item(), by_hand, rel_tol=1e-12)
moved, decay = seen[0] - seen[1], 0.1 * 0.01 * seen[0]
shared.say(
    f"Look at the first step: the weight moved by {moved:.3f}. Weight decay took {decay:.3f} of it (0.1 · 0.01 · 2), and the gradient of 3 the other "
    f"{moved - decay:.3f}, the learning rate and no more. A gradient of 300 would have done the same. "
    "That is why Adam tolerates many mistakes in the scale of the loss, and why such mistakes stay unnoticed."
)

# %% [markdown]
# ## What usually goes wrong
#
# ### "Packing means joining rows with an end token"
#
# Our rows do end with an end token. The model that learned with the right mask reads five rows: each alone, packed with the block mask, and joined without one.

# %%
counter = trained["packed_in_one"][0]
ones = torch.ones_like(collate(rows, [bin_of_five])[2])  # [1, T]: everything one segment
readings = {
    "alone": [row_losses(counter, rows, [i])[0] for i in bin_of_five],
    "packed, block mask": row_losses(counter, rows, bin_of_five),
    "joined, no mask": row_losses(counter, rows, bin_of_five, segments=ones),
}

# %% tags=["drawing"]
fig, ax = shared.figure(width=7.0, height=2.9)
for shift, (name, losses), color in zip((-0.27, 0, 0.27), readings.items(), (C["black"], C["blue"], C["orange"]), strict=True):
    counts = [sum(rows[i].supervised) for i in bin_of_five]
    ax.bar(
        [x + shift for x in range(5)],
        [loss / n for loss, n in zip(losses, counts, strict=True)],
        width=0.25,
        color=color,
        label=name,
    )
ax.set(
    xticks=range(5), xticklabels=[f"row {n}" for n in range(1, 6)], ylabel="loss per token (nats)", xlabel="position in the bin"
)
ax.legend(fontsize=8)
shared.show(
    fig,
    "leak",
    "With a block mask every packed row has the loss that it has alone; joined without a mask, all but the first row change.",
)

first_same = math.isclose(readings["alone"][0], readings["joined, no mask"][0], rel_tol=1e-4)
second = readings["joined, no mask"][1] / readings["alone"][1]
assert first_same
assert not math.isclose(second, 1, rel_tol=1e-3)
shared.say(
    f"The first row has nothing before it and does not notice. The second row's loss is **{second:.1f} times** what it is alone, end token or not. "
    "An end token is a hint that a model could learn to use; a mask does not depend on learning."
)

# %% [markdown]
# ### "Average the losses of the micro-batches"
#
# The gradient of 16 rows, cut in several ways. With the right divisor every cut gives the gradient of the whole; with the mean of means each cut gives another one.


# %%
def gradient(batches, mean_of_means):
    model.zero_grad()
    num_targets = sum(int((targets != IGNORE).sum()) for _, targets, _ in batches)
    for input_ids, targets, segments in batches:
        logits = model(input_ids, segment_ids=segments)  # [B, T, V]
        loss_sum = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        own_targets = int((targets != IGNORE).sum())
        (loss_sum / own_targets / len(batches) if mean_of_means else loss_sum / num_targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def cut(rows, size):
    return [collate(rows[i : i + size], [[j] for j in range(len(rows[i : i + size]))]) for i in range(0, len(rows), size)]


whole = gradient(cut(rows, 16), mean_of_means=False)
sizes = [16, 8, 5, 4, 2, 1]
error = {
    wrong: [((gradient(cut(rows, size), wrong) - whole).norm() / whole.norm()).item() for size in sizes]
    for wrong in (False, True)
}

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.6, height=2.8)
for wrong, color, marker, name in ((True, C["orange"], "o", "mean of means"), (False, C["blue"], "s", "divided once")):
    ax.plot(range(6), [max(e, 1e-8) for e in error[wrong]], color=color, marker=marker)
    ax.annotate(
        name, (5, max(error[wrong][5], 1e-8)), xytext=(-4, 8), textcoords="offset points", color=color, ha="right", fontsize=9
    )
ax.set(
    yscale="log",
    ylim=(3e-9, 10),
    xticks=range(6),
    xticklabels=sizes,
    xlabel="rows in a micro-batch (16 rows in all)",
    ylabel="relative error of the gradient",
)
shared.show(
    fig,
    "cuts",
    "Divided once, every cut gives the same gradient up to rounding; the mean of means is off as soon as there are two parts.",
)
assert max(error[False]) < 1e-5 < error[True][-1]
shared.say(
    f"Divided once, no cut is off by more than {max(error[False]):.0e} (an error of zero is drawn as 1e-8). The mean of means is off by **{error[True][-1]:.0%}** with one row at a time: "
    "every token of a short answer then counts more than one of a long answer. "
    f"Cut in fives it is off by {error[True][2]:.0%}: the sixteenth row is left alone in the last part, and counts as much as five."
)

# %% [markdown]
# ### "A row that does not fit can wait for the next batch"
#
# A loader that packs on the fly keeps a buffer of rows, fills each tensor row with the longest that still fit, and leaves the others for later. A row longer than the capacity is then never taken. Watch the buffer:


# %%
def fill_one(buffer, capacity):
    """The plausible wrong one: the longest that still fit; what does not fit stays in the buffer."""
    taken = []
    for length in sorted(buffer, reverse=True):
        if sum(taken) + length <= capacity:
            taken.append(length)
            buffer.remove(length)
    return taken


stream = itertools.cycle([9, 14, 30, 7, 80, 12, 25])  # every seventh row is too long for 64 positions
buffer, batch_tokens = [], []
while len(batch_tokens) < 30:
    while len(buffer) < 8:
        buffer.append(next(stream))
    batch_tokens.append(sum(fill_one(buffer, CAPACITY)))
empty = next(n for n, count in enumerate(batch_tokens, start=1) if count == 0)
shared.say(f"Tokens in each batch: `{batch_tokens}`")
shared.say(
    f"From batch {empty} on the buffer holds `{buffer}`, nothing is ever taken from it again, and every batch is empty. It takes a while to happen, so short tests pass."
)

# %% [markdown]
# What does a step with such a batch do? That depends on how the loss leaves out what is not learned: through `ignore_index`, or by multiplying all losses with a mask of zeros and ones.

# %%
nothing = torch.full((1, 8), PAD)  # [1, 8], only padding
ruined = {}
for way in ("`ignore_index`", "a mask"):
    broken = tiny_model()
    logits = broken(nothing).flatten(0, 1)  # [8, V]
    if way == "a mask":
        mask = torch.zeros(8)
        loss = (cross_entropy(logits, nothing.flatten(), reduction="none") * mask).sum() / mask.sum()
    else:
        loss = cross_entropy(logits, torch.full((8,), IGNORE))  # the mean over no targets
    loss.backward()
    torch.optim.AdamW(broken.parameters()).step()
    ruined[way] = sum(p.isnan().sum().item() for p in broken.parameters()) / sum(p.numel() for p in broken.parameters())
    shared.say(f"- With {way}: loss {loss.item()}, and after the step {ruined[way]:.0%} of the weights are NaN.")
assert ruined["`ignore_index`"] == 0 < ruined["a mask"]

# %% [markdown]
# So the number in the log says NaN either way, but only one of the two destroys the model; the other goes on without learning anything. Neither is what you want.
#
# Why the difference? With `ignore_index` the loss is 0 / 0, but no position has a gradient, so all gradients are zero. With the mask, the division gives 1 / 0, an infinity,
# and the mask's zeros times infinity are NaN for every weight that took part. (The others are the embeddings of tokens that did
# not occur.)
#
# Three things protect `minisft`: rows that do not fit are cut or dropped when they are read, with a message; `pack` gives an over-long row a bin of its own; and a step without targets is an error.

# %% [markdown]
# ## Exercises
#
# ### 1. Accumulate with unequal tokens
#
# Many models hand you the *mean* loss of a micro-batch. Run `backward` so that the gradients left behind are those of the mean over **all** supervised tokens. `mean_loss(batch)` gives the mean as a tensor, `count(batch)` its number of supervised tokens.
# Watch out for a batch that has none: its mean is 0 / 0.


# %% tags=["exercise"]
def accumulate(mean_loss, count, batches):
    """Call backward so that gradients equal those of the mean over all tokens of all batches. Returns nothing."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_accumulate(answer):
    def mean_loss(batch):  # as many models do it: all positions, times a mask
        return ((batch[0] @ weight).square() * batch[1]).sum() / batch[1].sum()

    def count(batch):
        return int(batch[1].sum())

    draw = torch.Generator().manual_seed(0)
    parts = [(torch.randn(5, 2, generator=draw), (torch.arange(5) < n).float()) for n in (1, 2, 5)]  # 8 tokens in three parts
    own = [
        2 * x[:n].T @ (x[:n] @ torch.tensor([1.0, -2.0])) for (x, mask), n in zip(parts, (1, 2, 5), strict=True)
    ]  # [2] each, by hand
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    answer(mean_loss, count, parts)
    got = weight.grad
    assert got is not None, "no gradient arrived: call backward for each batch"
    means = own[0] + own[1] / 2 + own[2] / 5
    assert not torch.allclose(got, means / 3), (
        "that is the mean of means: a token in a small batch counts more than one in a large batch"
    )
    assert not torch.allclose(got, means), "the gradients are too large: a mean must be weighted by its share of all tokens"
    assert torch.allclose(got, sum(own) / 8), "weight each mean by its own number of tokens over the number of all"
    weight.grad = None
    answer(mean_loss, count, [parts[0], (parts[1][0], torch.zeros(5)), *parts[1:]])
    assert not weight.grad.isnan().any(), "a batch without targets gave 0 / 0, and NaN times zero is still NaN: leave it out"
    assert torch.allclose(weight.grad, sum(own) / 8), "a batch without targets must change nothing"


shared.grade(check_accumulate, accumulate)


# %% tags=["solution"]
def accumulate(mean_loss, count, batches):
    total = sum(count(batch) for batch in batches)
    for batch in batches:
        if count(batch) > 0:
            (mean_loss(batch) * count(batch) / total).backward()


shared.grade(check_accumulate, accumulate)

# %% [markdown]
# ### 2. A packer that never clogs
#
# Correct the buffer of the last section. `take(buffer, capacity)` removes some lengths from the list `buffer` and returns them, as one tensor row: the longest first, as long as they fit. Whatever is longer than the capacity comes out alone.
# As long as the buffer is not empty, something must come out.


# %% tags=["exercise"]
def take(buffer, capacity):
    """Remove from `buffer` (a list of lengths) what goes into the next row, and return it as a list."""
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_take(answer):
    for lengths in ([9, 14, 30, 7, 80, 12, 25, 80], [64, 1, 65], [3, 3, 3], [200]):
        buffer, rows = list(lengths), []
        for _ in lengths:  # so many rows are enough for any packer that takes something each time
            if buffer:
                left = len(buffer)
                rows.append(answer(buffer, 64))
                assert rows[-1], (
                    f"nothing came out while the buffer held {buffer}: what is longer than the capacity stays there"
                )
                assert len(buffer) == left - len(rows[-1]), "what you return has to leave the buffer"
        assert sorted(itertools.chain.from_iterable(rows)) == sorted(lengths), (
            "every row exactly once: none dropped, none twice"
        )
        for row in rows:
            assert sum(row) <= 64 or len(row) == 1, f"{row} does not fit into 64: an over-long row has to come alone"
        packed = [row for row in rows if row[0] <= 64]
        assert all(sum(a) + min(b) > 64 for a, b in itertools.pairwise(packed)), (
            "a row was closed although another still fitted"
        )


shared.grade(check_take, take)


# %% tags=["solution"]
def take(buffer, capacity):
    taken = []
    for length in sorted(buffer, reverse=True):
        if sum(taken) + length <= capacity or not taken:  # the first always comes out, whatever its length
            taken.append(length)
            buffer.remove(length)
    return taken


shared.grade(check_take, take)

# %% [markdown]
# ## What was not shown
#
# - **Order and resuming.** Which rows a step sees should follow from the seed and the step's number alone; then a stopped run goes on with the same rows (`batching.step_rows`).
# - **A step that goes wrong.** The library's step changes nothing if the loss or the gradient is not finite, and checks in the first step that every adapter gets a gradient and nothing frozen does.
# - **Memory.** Logits of `[B, T, V]` are the largest tensor of the step when the vocabulary is large; `minisft.loss` never builds them whole, and can compute activations again instead of keeping them (page 07).
# - **Attention without a mask.** A `[T, T]` mask grows with the square of the packed length. The library computes each segment by itself, or gathers them into a grid, and needs no mask at all (`attention.Segments`).
# - **Validation.** Three splits, one of them locked away: whatever you choose by looking at a set can no longer be judged on it. Our validation rows are drawn from the same few hundred possible rows as the training rows. So that number says how well the model fits, not how it generalizes.
# - **Cutting rows.** Joining all text and cutting it at the capacity wastes nothing either, and tears answers apart; Ding et al. show what that costs in pretraining.

# %% [markdown]
# ## Summary
#
# > - Packing puts several rows into one; segment numbers and a block mask keep them apart.
# > - A step counts its supervised tokens first, sums all losses, and divides once.
# > - Clip after the last micro-batch, over all gradients together.
# > - Packing changes the layout and the speed. It changes neither the loss nor the gradient.
# > - A row that fits nowhere needs a rule, and a step without targets is an error.
#
# You can now answer:
#
# <details>
# <summary>With micro-batches of 1, the loss curve differs from that with micro-batches of 8. What is wrong?</summary>
#
# Most likely each micro-batch is divided by its own number of targets. Divide the sum once, by the targets of the whole step.
#
# </details>
#
# <details>
# <summary>Rows are joined with an end token between them and no block mask. Which rows have a wrong loss?</summary>
#
# All but the first of each packed row: they read what was put before them.
#
# </details>

# %% [markdown]
# ## References
#
# - Krell et al. 2021, *Efficient Sequence Packing without Cross-contamination*, [arXiv:2107.02027](https://arxiv.org/abs/2107.02027): packing, and the mask that it needs.
# - Ding et al. 2024, *Fewer Truncations Improve Language Modeling*, [arXiv:2404.10830](https://arxiv.org/abs/2404.10830): best-fit packing in pretraining.
# - Su et al. 2021, *RoFormer: Enhanced Transformer with Rotary Position Embedding*, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864).
# - Loshchilov and Hutter 2017, *Decoupled Weight Decay Regularization*, [arXiv:1711.05101](https://arxiv.org/abs/1711.05101): AdamW.
# - Loshchilov and Hutter 2016, *SGDR: Stochastic Gradient Descent with Warm Restarts*, [arXiv:1608.03983](https://arxiv.org/abs/1608.03983): the cosine.
