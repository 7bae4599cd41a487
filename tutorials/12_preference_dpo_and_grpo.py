# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: "Preference: DPO and GRPO from scratch"
#     minutes: 2
#     needs: tiny
#     after: ["01", "03"]
#     contract:
#       reply_log_probs: minisft.loss.token_log_probs
#       dpo_loss: minisft.preference.dpo_loss
#       sample_group: minisft.generation.sample_groups
#       advantages: minisft.preference.advantages
#       grpo_loss: minisft.preference.grpo_loss
#     refs: [rafailov2023direct, shao2024deepseekmath, pang2024iterative, razin2024unintentional, liu2025understanding,
#            yu2025dapo]
# ---

# %% [markdown]
# # 12 Preference: DPO and GRPO from scratch
#
# You write the two losses that come after SFT: DPO, which learns from pairs of replies, and GRPO, which lets the model write
# replies and learns from a score for each. You train the counter of page 01 with both, and look at what each does to the
# log-probabilities. At the end you can say which one to use, and what to watch while it runs.

# %% [markdown]
# ## You need, you get
#
# **You need** page 01 (the log-probability of a reply) and page 03 (adapters). No pretrained model, no GPU: the toy of page 01
# is trained in front of you.
#
# **You get** five functions, about 30 lines: `reply_log_probs`, `dpo_loss`, `sample_group`, `advantages`, `grpo_loss`. They equal
# the library's, which `minisft dpo` and `minisft grpo` run.

# %% tags=["setup"]
import copy
import math
import random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import minisft.preference as library
import shared
from minisft.config import LoRAConfig
from minisft.data.chat import Encoded
from minisft.evaluation.metrics import wilson
from minisft.generation import generate, sample_groups
from minisft.surgery import adapters_off, apply_lora_
from minisft.training.dpo import DPOSettings, EncodedPair, pair_batch, pair_gradients

shared.start("12", seed=0)
C = shared.COLORS

# %% [markdown]
# The toy is that of page 01: a vocabulary of 21 words, a base model that has read sheets and books about counting, and chats that
# ask it to count from one number to another. The cell that defines it is folded.

# %% tags=["drawing"]
WORDS = ["<start>", "<end>", "user", "assistant", "\n", "count", "to", ":", ".", *map(str, range(1, 13))]
WORD_ID = {word: i for i, word in enumerate(WORDS)}
END = WORD_ID["<end>"]
RANGES = [(first, last) for first in range(1, 13) for last in range(first, 13)]  # 78 tasks


def ids_of(text):
    return [WORD_ID[word] for word in text.split(" ")]


def counted(first, last):
    return " ".join(map(str, range(first, last + 1)))


def document():
    """32 tokens of a sheet ("count 3 to 6 . count ...") or of a book ("3 to 6 : 3 4 5 6 . ...")."""
    sentence = random.choice(["count {0} to {1} .", "{0} to {1} : {2} ."])
    return ids_of(" ".join(sentence.format(*ends, counted(*ends)) for ends in random.choices(RANGES, k=8)))[:32]


def chat(first, last):
    """Prompt and answer in a template."""
    prompt = ids_of(f"<start> user \n count {first} to {last} <end> \n <start> assistant \n")
    return prompt, [*ids_of(counted(first, last)), END]


def train_(tiny, batches, lr):
    """Next-token training; a target of -100 does not count."""
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=lr)
    for ids, targets in batches:
        shared.step_(tiny, optimizer, ids, targets)


# %%
SPLITS = range(4)  # every result below is shown for four ways to choose the 26 practice tasks
LIMIT = 14  # tokens; the longest right reply has 13


def split(seed):
    """26 tasks to practise on, and the 52 others: the test."""
    ranges = random.Random(seed).sample(RANGES, len(RANGES))
    return [chat(*ends) for ends in ranges[:26]], [chat(*ends) for ends in ranges[26:]]


def after_sft(base, practice):
    """40 steps of SFT on the practice tasks, loss on the answers only."""
    tuned = copy.deepcopy(base)
    train_(tuned, [shared.padded(practice)] * 40, lr=1e-3)  # ids and targets, [26, T] each
    return tuned


torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
base = shared.newborn(len(WORDS))
documents = (torch.tensor([document() for _ in range(48)]) for _ in range(150))  # [48, 32] each
train_(base, ((text, text) for text in documents), lr=5e-3)
data = {seed: split(seed) for seed in SPLITS}
instruct = {seed: after_sft(base, practice) for seed, (practice, _) in data.items()}

# %% [markdown]
# Both methods start from the model after SFT, and both look at *several* replies to one prompt. Here are eight that it wrote
# itself, drawn from its probabilities. Checking them is easy: a program compares each with the right answer.

# %%
GROUP = 8
practice, _ = data[0]
groups = sample_groups(instruct[0], [prompt for prompt, _ in practice], GROUP, max_new_tokens=LIMIT, eos_ids=[END], seed=1)
hits = [sum(reply.ids == answer for reply in group) for group, (_, answer) in zip(groups, practice, strict=True)]
shown = min(range(len(hits)), key=lambda i: (abs(hits[i] - 3), -len(practice[i][1])))  # about three of eight, a long answer

# %% tags=["drawing"]
prompt, answer = practice[shown]
replies = sorted((reply.ids for reply in groups[shown]), key=lambda ids: ids != answer)
short = {"<end>": "end", "<start>": "start", "assistant": "asst", "\n": "\\n"}
fig, ax = shared.figure(width=6.2, height=3.5)
for y, ids in enumerate(replies):
    for x, token in enumerate(ids):
        agrees = x < len(answer) and answer[x] == token
        word = short.get(WORDS[token], WORDS[token])
        ax.barh(y, 0.92, left=x, height=0.78, color=C["blue"] if agrees else C["orange"], alpha=0.3)
        ax.text(x + 0.46, y, word, ha="center", va="center", fontsize=8 if len(word) > 3 else 10)
    ax.text(LIMIT + 0.3, y, f"{int(ids == answer)}", va="center", fontweight="bold")
ax.text(LIMIT + 0.3, -0.9, "score", va="center", ha="center", fontsize=9)
wrong = next(y for y, ids in enumerate(replies) if ids != answer)
for y, word in ((0, "chosen"), (wrong, "rejected")):
    ax.text(-0.2, y, word, ha="right", va="center", fontweight="bold")
ax.set(ylim=(len(replies) - 0.4, -1.4), xlim=(-2.3, LIMIT + 0.9), yticks=[], xticks=[])
ax.set_title(" ".join(WORDS[i] for i in prompt[3:7]), fontsize=11)
ax.grid(visible=False)
ax.spines[["left", "bottom"]].set_visible(False)
shared.show(
    fig,
    "group",
    "DPO takes a pair out of these replies, GRPO takes all eight with a score each. Blue: as in the right answer.",
)

# %% [markdown]
# ## The idea
#
# SFT shows a model what to say, and only that. It does not show what *not* to say, and it does not use the model's own replies.
# The last stage uses both. Two methods do it, from two kinds of data:
#
# - **DPO** (direct preference optimization) takes pairs: one prompt, a better and a worse reply. It raises the *margin* between
#   the two. No reply is written during training, so it costs about as much as SFT on both replies.
# - **GRPO** (group relative policy optimization) takes prompts and a **reward**, a function that scores a reply. The model writes a
#   group of replies to each prompt. Replies that score above the group's mean become more likely, the others less. This is
#   reinforcement learning, and much of its time goes into writing replies.
#
# Both compare with a **reference**: the model as it was before the first step. It says how far the model has gone, and
# going far costs. You might expect a second copy of the model in memory. With an adapter you need none: switch a fresh adapter
# off (`adapters_off`), and the model *is* its reference.
#
# ### Base, instruct, chat: which command makes which
#
# | from | to | you need | command |
# |---|---|---|---|
# | raw text | **base** | far more text and time than a fine-tune | none: minisft starts from a base model that exists |
# | base | **instruct**: answers in a template and stops | prompts with an answer each | `minisft train --model BASE --data chats.jsonl --out sft` |
# | instruct | **chat**: prefers what people preferred | pairs: chosen and rejected | `minisft dpo --model BASE --init-adapter sft/adapter --data pairs.jsonl --out chat` |
# | instruct | better at what a program can check | prompts and a reward | `minisft grpo --model BASE --init-adapter sft/adapter --data prompts.jsonl --reward exact_match --out chat` |
#
# If you start from a model that is an instruct model already, leave `--init-adapter` out. With it, the reference is *that* adapter
# as it was, not the bare base. The names are used loosely: many models called Instruct have had DPO or GRPO too.

# %% [markdown]
# ## The formula
#
# Let $x$ be a prompt, $y_c$ the chosen reply and $y_r$ the rejected one. As on page 01, $\log \pi(y \mid x)$ is the sum over the
# tokens of the reply, its end token included. The log ratio to the reference, for each of the two, and their margin:
#
# $$d = \log \frac{\pi(y_c \mid x)}{\pi_{ref}(y_c \mid x)} - \log \frac{\pi(y_r \mid x)}{\pi_{ref}(y_r \mid x)}, \qquad L_{DPO} = - \log \sigma(\beta d)$$
#
# with $\sigma(z) = 1 / (1 + e^{-z})$. Before the first step both ratios are 1, so $d = 0$ and the loss is $\ln 2$, whatever the
# model. Its gradient is a weighted cross-entropy, up for one reply and down for the other, with one weight for both:
#
# $$\nabla L_{DPO} = - \beta \, \sigma(-\beta d) \left( \nabla \log \pi(y_c \mid x) - \nabla \log \pi(y_r \mid x) \right)$$
#
# GRPO draws replies $y_1 \dots y_G$ with rewards $r_1 \dots r_G$. The **advantage** says how much better than its group a reply
# was: $A_i = r_i - \mathrm{mean}(r)$. (The first paper also divides by the standard deviation of the group.) Every token of reply
# $i$ gets the same advantage, and with $N$ tokens in all replies together:
#
# $$L_{GRPO} = \frac{1}{N} \sum_i \sum_t \left( - \rho_{i,t} A_i + \beta k_{i,t} \right), \qquad \rho = \frac{\pi}{\pi_{old}}, \qquad k = e^{u} - u - 1, \qquad u = \log \frac{\pi_{ref}}{\pi}$$
#
# $\pi_{old}$ is the model that wrote the replies. We take *one* step on each group, so at that moment $\pi_{old} = \pi$ and
# $\rho = 1$; only its gradient matters. (With several steps on one group $\rho$ drifts, and is then clipped: exercise 1.)
#
# $k$ is called k3. It is never negative, 0 where both models agree, and its mean over replies of the model is the KL
# divergence, a measure in nats of how far $\pi$ has gone from the reference.

# %% [markdown]
# ## By hand: 3 x 4
#
# Three pairs, four probabilities each, $\beta = 1/2$. Every reference probability is 1/16:
#
# | pair | chosen now | chosen ref | rejected now | rejected ref | ratios | $e^{\beta d}$ | $\sigma(\beta d)$ | loss |
# |---|---|---|---|---|---|---|---|---|
# | 1 | 1/16 | 1/16 | 1/16 | 1/16 | 1 and 1 | 1 | 1/2 | ln 2 = 0.69 |
# | 2 | 1/64 | 1/16 | 1/256 | 1/16 | 1/4 and 1/16 | 2 | 2/3 | ln 1.5 = 0.41 |
# | 3 | 1/8 | 1/16 | 1/2 | 1/16 | 2 and 8 | 1/2 | 1/3 | ln 3 = 1.10 |
#
# Look at pair 2. The chosen reply is four times *less* likely than before, and the loss has fallen. In pair 3 the chosen reply is
# twice as likely as before, and the loss has risen. DPO sees the margin and nothing else.
#
# A group of four replies with rewards 1, 0, 0, 0 has the mean 1/4 and the advantages 3/4, -1/4, -1/4, -1/4. A group with
# 0, 0, 0, 0 has the advantages 0, 0, 0, 0: it teaches nothing. Nor does 1, 1, 1, 1.

# %%
now_c, now_r = torch.tensor([1 / 16, 1 / 64, 1 / 8]).log(), torch.tensor([1 / 16, 1 / 256, 1 / 2]).log()  # [3], [3]
ref = torch.full((3,), 1 / 16).log()  # [3]
by_hand = -F.logsigmoid(0.5 * ((now_c - ref) - (now_r - ref)))  # [3]
torch.testing.assert_close(by_hand, torch.tensor([2.0, 1.5, 3.0]).log())
print("losses:", [round(v, 2) for v in by_hand.tolist()])

# %% [markdown]
# ## Build it
#
# **Log-probabilities.** `log_probs` of page 01, for many replies at once and with a gradient. Rows are padded on the right. The
# mask marks the positions that predict a token of the reply, the end token included.
#
# **DPO.** Three lines. It wants sums over the tokens, not means.


# %% tags=["build"]
def reply_log_probs(model, prompts, replies):
    """log p of every token of every reply, 0 elsewhere: [B, T - 1]; and where they are, as a mask of the same shape."""
    ids = pad_sequence([torch.tensor(p + r) for p, r in zip(prompts, replies, strict=True)], batch_first=True)  # [B, T]
    log_p = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, T - 1, V] -> [B, T - 1]
    begin = torch.tensor([[len(p)] for p in prompts])  # [B, 1]
    end = begin + torch.tensor([[len(r)] for r in replies])  # [B, 1]
    predicted = torch.arange(1, ids.shape[1])  # [T - 1]: column t predicts token t + 1
    mask = (predicted >= begin) & (predicted < end)  # [B, T - 1]
    return log_p * mask, mask


def dpo_loss(chosen, rejected, chosen_ref, rejected_ref, beta):
    """The loss of each pair. All four [P]: log-probabilities of whole replies, in nats."""
    d = (chosen - chosen_ref) - (rejected - rejected_ref)  # [P]
    return -F.logsigmoid(beta * d)  # [P]


# %% [markdown]
# **A group.** To draw a token from probabilities, line them up from the likeliest on, take a random number between 0 and 1, and
# choose the token at which the running sum passes it. All random numbers come from outside, one for each reply and step.
#
# **Advantages.** Equal rewards are recognized by comparing them, not by subtracting a mean that may be rounded: 0 has to be
# exactly 0.
#
# **GRPO.** `log_probs.detach()` is the same number without a gradient, so `ratio` is 1 and has the gradient of the
# log-probability.


# %% tags=["build"]
@torch.no_grad()
def sample_group(model, prompt, draws, end_ids):
    """One reply for each row of `draws` [G, L], numbers in [0, 1). It ends with one of `end_ids`, or has L tokens."""
    ids = torch.tensor([prompt] * len(draws))  # [G, P]
    for draw in draws.T:  # [G], L times
        p, order = model(ids)[:, -1].softmax(-1).sort(-1, descending=True)  # [G, V], [G, V]
        place = (p.cumsum(-1) <= draw[:, None]).sum(-1, keepdim=True)  # [G, 1]: where the running sum passes the draw
        ids = torch.cat([ids, order.gather(-1, place.clamp(max=p.shape[-1] - 1))], -1)  # [G, P + 1], [G, P + 2], ...
    replies = ids[:, len(prompt) :].tolist()  # G lists of L
    ends = [next((i + 1 for i, token in enumerate(reply) if token in end_ids), len(reply)) for reply in replies]
    return [reply[:end] for reply, end in zip(replies, ends, strict=True)]


def advantages(rewards, divide_by_std=False):
    """How much better than its group each reply is: [G] -> [G]."""
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    above = rewards - rewards.mean()
    return above / (rewards.std() + 1e-4) if divide_by_std else above


def grpo_loss(log_probs, log_probs_ref, A, mask, beta):
    """One step's loss. [B, T] each, but A: [B], one advantage a reply."""
    ratio = (log_probs - log_probs.detach()).exp()  # [B, T]: 1, with a gradient
    u = log_probs_ref - log_probs  # [B, T]
    k3 = u.exp() - u - 1  # [B, T]
    return ((beta * k3 - A[:, None] * ratio) * mask).sum() / mask.sum()  # over the tokens of all replies


# %% [markdown]
# ## Run it
#
# ### Pairs: DPO
#
# The pairs: for each of the 26 practice tasks the right answer is chosen, and a wrong reply of the model's own is rejected.
# The model after SFT is frozen and gets an adapter of rank 4. Three arms, 30 steps each:
#
# - **DPO**;
# - **DPO + NLL**: DPO, plus the cross-entropy of the chosen reply per token (NLL, negative log-likelihood), as in SFT;
# - **SFT again**: that cross-entropy alone. Without this control you could not tell what the preference adds.
#
# Before you run it, guess: will the chosen reply become more likely under DPO?


# %%
def pairs_of(model, tasks):
    """(prompt, right answer, a wrong reply of the model), where eight replies contain a wrong one."""
    groups = sample_groups(model, [prompt for prompt, _ in tasks], GROUP, max_new_tokens=LIMIT, eos_ids=[END], seed=1)
    wrong = [[reply.ids for reply in group if reply.ids != answer] for group, (_, answer) in zip(groups, tasks, strict=True)]
    return [(prompt, answer, found[0]) for (prompt, answer), found in zip(tasks, wrong, strict=True) if found]


def with_adapter(model, lr):
    """A copy with a fresh adapter of rank 4, and an optimizer for the adapter alone."""
    model = copy.deepcopy(model)
    apply_lora_(model, LoRAConfig(rank=4, alpha=8), seed=0)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)


def right(model, tasks):
    """For each task, whether the greedy reply is the answer."""
    said = generate(model, [prompt for prompt, _ in tasks], max_new_tokens=LIMIT, eos_ids=[END], batch_size=64)
    return [reply == answer for reply, (_, answer) in zip(said, tasks, strict=True)]


# %%
def train_pairs(model, pairs, held_out, preference, nll, steps=30):
    """`preference` and `nll` are the weights of the two terms. Returns the model, and what was seen at each step."""
    prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
    lengths = torch.tensor([len(reply) for reply in chosen])  # [P]
    model, optimizer = with_adapter(model, lr=1e-3)
    with torch.no_grad(), adapters_off(model):  # the reference, once, before the first step
        ref = reply_log_probs(model, prompts * 2, chosen + rejected)[0].sum(1).chunk(2)  # [P], [P]
    seen = {"loss": [], "chosen": [], "rejected": [], "right": {0: sum(right(model, held_out))}}
    for step in range(1, steps + 1):
        now = reply_log_probs(model, prompts * 2, chosen + rejected)[0].sum(1).chunk(2)  # [P], [P]
        margin_loss = dpo_loss(*now, *ref, beta=0.1).mean()
        loss = preference * margin_loss + nll * (-now[0] / lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen["loss"].append(margin_loss.item())
        seen["chosen"].append((now[0] - ref[0]).mean().item())
        seen["rejected"].append((now[1] - ref[1]).mean().item())
        if step % 10 == 0:
            seen["right"][step] = sum(right(model, held_out))
    return model, seen


# %%
ARMS = {"SFT again": (0, 1), "DPO": (1, 0), "DPO + NLL": (1, 1)}
trained, curves = {name: {} for name in ARMS}, {name: {} for name in ARMS}
for seed, (practice, held_out) in data.items():
    pairs = pairs_of(instruct[seed], practice)
    for name, weights in ARMS.items():
        trained[name][seed], curves[name][seed] = train_pairs(instruct[seed], pairs, held_out, *weights)

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.0, height=6.2, columns=2, rows=3)
for column, name in enumerate(("DPO", "DPO + NLL")):
    for seen in curves[name].values():
        axes[0, column].plot(seen["chosen"], color=C["blue"], linewidth=1.2)
        axes[0, column].plot(seen["rejected"], color=C["orange"], linewidth=1.2)
        axes[1, column].plot(seen["loss"], color=C["black"], linewidth=1.2)
        axes[2, column].plot(list(seen["right"]), list(seen["right"].values()), "o-", color=C["green"], markersize=3.5)
    axes[0, column].axhline(0, color=C["grey"], linewidth=0.8)
    axes[1, column].axhline(math.log(2), color=C["grey"], linewidth=0.8, linestyle=":")
    axes[0, column].set(title=name)
    axes[1, column].set(ylim=(0, 0.75))
    axes[2, column].set(xlabel="step", ylim=(0, 52))
lowest = min(ax.get_ylim()[0] for ax in axes[0])
for ax in axes[0]:
    ax.set(ylim=(lowest, 4))
axes[0, 0].text(2, lowest + 6.5, "chosen", color=C["blue"], fontweight="bold")
axes[0, 0].text(2, lowest + 2.5, "rejected", color=C["orange"], fontweight="bold")
axes[1, 0].text(29, math.log(2) - 0.02, "ln 2", ha="right", va="top", color=C["grey"], fontsize=9)
axes[0, 0].set_ylabel("log-probability,\nchange in nats")
axes[1, 0].set_ylabel("DPO loss")
axes[2, 0].set_ylabel("right of 52\nunseen tasks")
shared.show(
    fig,
    "pairs",
    "DPO's loss falls while both replies become less likely and unseen tasks get worse (left); with the NLL term "
    "the chosen reply rises (right). A line for each of four splits.",
)

# %% tags=["drawing"]


def last_of(name, key):
    return [seen[key][-1] for seen in curves[name].values()]


def spread(values, digits=1):
    low, high = min(values), max(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


fell = sum(value < 0 for value in last_of("DPO", "chosen"))
before = [seen["right"][0] for seen in curves["DPO"].values()]
after = [seen["right"][30] for seen in curves["DPO"].values()]
best = [max(list(seen["right"].values())[1:]) for seen in curves["DPO"].values()]
shared.say(
    f"Under DPO the loss begins at {math.log(2):.2f} and ends at {spread(last_of('DPO', 'loss'), 2)}. The log-probability of the "
    f"**chosen** reply changes by {spread(last_of('DPO', 'chosen'))} nats (it falls in {fell} of {len(SPLITS)} splits), that of "
    f"the rejected one by {spread(last_of('DPO', 'rejected'))}. So the margin grows, as the loss asks."
)
shared.say(
    f"Right answers to unseen tasks go from {', '.join(map(str, before))} to {', '.join(map(str, after))} of 52. The best count after "
    f"10 steps or more is {', '.join(map(str, best))}: "
    + (
        "stopping early loses less, and gains nothing here."
        if max(b - a for a, b in zip(before, best, strict=True)) <= 0
        else "stopping early matters."
    )
)
shared.say(
    f"With the NLL term the chosen reply changes by {spread(last_of('DPO + NLL', 'chosen'))} nats, and the rejected one still "
    f"falls by {spread([-v for v in last_of('DPO + NLL', 'rejected')])}."
)

# %% [markdown]
# Where does the probability go? Probabilities add up to 1, so it goes to replies that are neither. DPO's loss compares two
# replies, and nothing in it asks that either be likely. The tokens with which both begin cancel in $d$, so the loss does not hold
# them in place. Razin et al. (2024) call this likelihood displacement, and find it strongest for pairs that resemble each
# other. Ours do: a right reply and a near miss. So take the size of the damage as this toy's, not as DPO's in general.

# %% [markdown]
# ### Groups: GRPO
#
# Now without pairs. In each of 20 steps: take 13 practice tasks, write eight replies to each, let a program score them, and take
# one step. The loop uses the library's `sample_groups`, which works on many prompts at once and reads them once (a KV cache).
# That it draws what your `sample_group` draws is asserted below.


# %%
def is_right(reply, answer):
    return float(reply == answer)  # the whole reply, end token included


def write(model, tasks, reward, seed):
    """A group for each task: prompts and replies, row by row, and rewards [tasks, G]."""
    groups = sample_groups(model, [p for p, _ in tasks], GROUP, max_new_tokens=LIMIT, eos_ids=[END], seed=seed, batch_size=128)
    rewards = [[reward(reply.ids, answer) for reply in group] for group, (_, answer) in zip(groups, tasks, strict=True)]
    prompts = [prompt for prompt, _ in tasks for _ in range(GROUP)]
    return prompts, [reply.ids for group in groups for reply in group], torch.tensor(rewards)


# %%
def train_groups(model, tasks, reward, steps=20, beta=0.04):
    model, optimizer = with_adapter(model, lr=1e-2)
    order, seen = random.Random(0), {"reward": [], "kl": [], "loss": [], "gradient": []}
    for step in range(steps):
        prompts, replies, rewards = write(model, order.sample(tasks, 13), reward, seed=step)
        A = torch.cat([advantages(group) for group in rewards])  # [13 * G]
        with torch.no_grad(), adapters_off(model):  # the reference, on new text in every step
            ref, _ = reply_log_probs(model, prompts, replies)  # [13 * G, T]
        log_probs, mask = reply_log_probs(model, prompts, replies)
        loss = grpo_loss(log_probs, ref, A, mask, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kl = library.kl_estimate(log_probs.detach()[mask], ref[mask]).mean()
        gradient = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
        for name, value in zip(seen, (rewards.mean(), kl, loss, gradient), strict=True):
            seen[name].append(float(value.detach()))
    return model, seen


trained["GRPO"], curves["GRPO"] = {}, {}
for seed, (practice, _) in data.items():
    trained["GRPO"][seed], curves["GRPO"][seed] = train_groups(instruct[seed], practice, is_right)

# %% tags=["drawing"]


def smooth(values):
    return [sum(values[max(0, i - 2) : i + 3]) / len(values[max(0, i - 2) : i + 3]) for i in range(len(values))]


fig, axes = shared.figure(width=7.0, height=3.0, columns=2)
for seen in curves["GRPO"].values():
    axes[0].plot(smooth(seen["reward"]), color=C["purple"], linewidth=1.3)
    axes[1].plot(seen["kl"], color=C["grey"], linewidth=1.3)
axes[0].set(xlabel="step", ylabel="share of right replies", ylim=(0, 1), title="reward (mean of 5 steps)")
axes[1].set(xlabel="step", ylabel="nats a token", title="KL from the reference")
axes[1].set_ylim(bottom=0)
shared.show(
    fig,
    "groups",
    "GRPO's reward rises in every split while the model stays within a fraction of a nat of its reference.",
)

# %% tags=["drawing"]
first = [sum(seen["reward"][:5]) / 5 for seen in curves["GRPO"].values()]
final = [sum(seen["reward"][-5:]) / 5 for seen in curves["GRPO"].values()]
shared.say(
    f"Share of right replies, drawn at random, on the practice tasks: {spread(first, 2)} in the first five steps, "
    f"{spread(final, 2)} in the last five. The KL at the end is {spread([seen['kl'][-1] for seen in curves['GRPO'].values()], 2)} "
    "nats a token."
)
shared.say(
    f"The loss tells nothing of this: at the first step it is between "
    f"{min(abs(seen['loss'][0]) for seen in curves['GRPO'].values()):.3f} and "
    f"{max(abs(seen['loss'][0]) for seen in curves['GRPO'].values()):.3f} in size, although the gradient is not zero "
    f"(norm {spread([seen['gradient'][0] for seen in curves['GRPO'].values()], 2)}). Watch the reward."
)

# %% [markdown]
# ### All of them
#
# The 52 unseen tasks of each split, answered in two ways: **greedy**, the likeliest token each time, and **drawn**, four replies a
# task from the model's probabilities, as GRPO's training does. The interval is Wilson's for 208 tasks. Splits share their tasks
# and the base model, so it is a little too narrow; the dots show each split by itself.

# %%
models = {"base": dict.fromkeys(SPLITS, base), "SFT": instruct, **trained}
TESTS = 52 * len(SPLITS)


def drawn(model, tasks):
    """For each task, the share of right replies among four drawn ones."""
    groups = sample_groups(model, [p for p, _ in tasks], 4, max_new_tokens=LIMIT, eos_ids=[END], seed=7, batch_size=208)
    return [sum(reply.ids == answer for reply in group) / 4 for group, (_, answer) in zip(groups, tasks, strict=True)]


ways = {"greedy": right, "drawn": drawn}
scores = {  # way -> arm -> split -> a number in [0, 1] for each of 52 tasks
    way: {name: [by(model, data[seed][1]) for seed, model in of.items()] for name, of in models.items()}
    for way, by in ways.items()
}

# %% tags=["drawing"]
fig, ax = shared.figure(width=7.0, height=3.5)
for shift, (way, by_arm) in enumerate(scores.items()):
    colour = C[("blue", "purple")[shift]]
    for place, found in enumerate(by_arm.values()):
        x, share = place + 0.4 * shift - 0.2, sum(map(sum, found)) / TESTS
        low, high = wilson(share, TESTS)
        ax.bar(x, 100 * share, 0.37, color=colour, alpha=0.4, label=way if place == 0 else None)
        ax.errorbar(x, 100 * share, [[100 * (share - low)], [100 * (high - share)]], color=C["black"], capsize=3, linewidth=1.2)
        ax.plot(
            [x + 0.06 * (i - 1.5) for i in range(len(found))],
            [100 * sum(f) / 52 for f in found],
            "o",
            color=colour,
            markersize=3,
        )
        top = 100 * max(high, *(sum(f) / 52 for f in found))
        ax.text(x, top + 2, f"{100 * share:.0f}", fontsize=9, va="bottom", ha="center")
ax.set_xticks(range(len(models)), [name.replace(" ", "\n", 1) for name in models], fontsize=9)
ax.set(ylabel="right answers, %", ylim=(0, 100), title=f"{TESTS} unseen tasks in four splits")
ax.grid(visible=False, axis="x")
ax.legend(loc="upper left")
shared.show(
    fig,
    "arms",
    "DPO alone ruins this counter and the NLL term repairs most of it; GRPO's gain over SFT shows where replies are drawn. "
    "Bars: all splits, with Wilson intervals; dots: each split.",
)

# %% tags=["drawing"]


def duel(way, one, other):
    """On the same tasks: how many `one` does better on, how many `other`; and what a sign test at 5 % says."""
    pairs = [pair for a, b in zip(scores[way][one], scores[way][other], strict=True) for pair in zip(a, b, strict=True)]
    more, less = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    low, high = wilson(more / (more + less), more + less) if more + less else (0, 1)
    verdict = f"**{one}** is better" if low > 0.5 else f"**{other}** is better" if high < 0.5 else "no clear difference"
    return f"| {one} / {other} | {way} | {more} | {less} | {verdict} |"


DUELS = [
    ("DPO", "SFT"),
    ("DPO + NLL", "SFT"),
    ("DPO + NLL", "SFT again"),
    ("GRPO", "SFT"),
    ("GRPO", "SFT again"),
    ("GRPO", "DPO + NLL"),
]
shared.say(
    "Compare two arms on the *same* tasks, and count the tasks on which they differ (sign test):\n\n"
    "| first / second | replies | better: first | better: second | |\n|---|---|---|---|---|\n"
    + "\n".join(duel(way, *arms) for arms in DUELS for way in scores)
)

# %% [markdown]
# What to take from it, and what not:
#
# - "SFT again" is a strong control. It learns from the right answers, and so does the NLL term: on this toy, where every practice
#   task *has* one right answer in the data, look in the table whether a preference loss adds anything to it.
# - GRPO saw no right answer but its own, only scores. It makes a right reply that was likely likelier still, so look for its gain
#   where replies are drawn. How much the greedy replies gain is in the table too.
# - This is not "GRPO beats DPO". The checker is perfect, and the pairs are near misses. Where no program can check a reply, GRPO
#   has no such reward, and pairs are what people can give.

# %% [markdown]
# ## The same as the library
#
# Four facts, asserted. At step 0 DPO's loss is exactly $\ln 2$. The gradient that reaches the adapter through your loss is that of
# the library's training step (`pair_gradients`, which reads the prompt once for both replies and scores in chunks), and it is
# $-\beta \sigma(-\beta d)$ times the difference of the two gradients, as the formula says. With the adapter off, a *trained*
# model is its reference, bit for bit. And a group of equal rewards has a gradient of exactly 0.

# %%
pairs = pairs_of(instruct[0], data[0][0])
prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
P, BETA = len(pairs), 0.1


def gradient_of(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


model, _ = with_adapter(instruct[0], lr=0)
both = reply_log_probs(model, prompts * 2, chosen + rejected)[0].sum(1)  # [2 P]
with torch.no_grad(), adapters_off(model):
    ref = reply_log_probs(model, prompts * 2, chosen + rejected)[0].sum(1)  # [2 P]
losses = dpo_loss(*both.chunk(2), *ref.chunk(2), BETA)  # [P]
assert (losses == torch.tensor(math.log(2))).all()  # not close: equal
mine = gradient_of(model, losses.mean())
assert mine.any()
formula = -BETA * 0.5 * (gradient_of(model, both[:P].mean()) - gradient_of(model, both[P:].mean()))  # sigma(0) is 1/2
torch.testing.assert_close(mine, formula, rtol=1e-4, atol=1e-7)

# %%
flags = [[[False] * len(p) + [True] * len(r) for p, r in zip(prompts, side, strict=True)] for side in (chosen, rejected)]
batches, reference = [], {}
for i, prompt in enumerate(prompts):
    sides = [
        Encoded(prompt + side[i], marks[i], i, 0, len(prompt)) for side, marks in zip((chosen, rejected), flags, strict=True)
    ]
    batches.append(pair_batch(EncodedPair(*sides), pad_id=END))
    reference[i] = float(ref[i]), float(ref[P + i])
stats = pair_gradients(model, batches, reference, DPOSettings(beta=BETA))  # the library's step: it calls backward itself
theirs = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
assert abs(stats.loss - math.log(2)) < 1e-5

for name in ("DPO", "GRPO"):  # trained, and with the adapter off the same bits as the model that they started from
    with torch.no_grad(), adapters_off(trained[name][0]):
        switched_off = reply_log_probs(trained[name][0], prompts, chosen)[0]
    with torch.no_grad():
        assert torch.equal(switched_off, reply_log_probs(instruct[0], prompts, chosen)[0])
        assert not torch.equal(switched_off, reply_log_probs(trained[name][0], prompts, chosen)[0])
print(f"DPO: loss ln 2 in all {P} pairs; {len(mine):,} gradients agree; adapter off = before, bit for bit")

# %%
from minisft.common.seeds import derive_seed  # where the library takes its random numbers from

prompt, answer = data[0][0][shown]
draws = torch.tensor([[derive_seed(1, "sample", g, t) / 2**63 for t in range(LIMIT)] for g in range(GROUP)])  # [G, L]
(group,) = sample_groups(instruct[0], [prompt], GROUP, max_new_tokens=LIMIT, eos_ids=[END], seed=1)
replies = sample_group(instruct[0], prompt, draws, {END})
assert replies == [reply.ids for reply in group]  # the same eight replies

log_probs, mask = reply_log_probs(model, [prompt] * GROUP, replies)  # [G, T], [G, T]
torch.testing.assert_close(log_probs[mask].tolist(), [v for reply in group for v in reply.log_probs], rtol=1e-3, atol=1e-4)
rewards = torch.tensor([is_right(reply, answer) for reply in replies], dtype=torch.float64)  # [G]
A = advantages(rewards)
assert torch.equal(A, library.advantages(rewards))
lengths, ref = mask.sum(1), log_probs.detach() + 0.1  # [G], and a reference that is not the model
value = library.grpo_loss(log_probs[mask], log_probs[mask].detach(), A, lengths, beta=0.5, reference_log_probs=ref[mask])
torch.testing.assert_close(grpo_loss(log_probs, ref, A, mask, beta=0.5).float(), value.float())

for equal in (0.0, 1.0, 0.1):  # eight equal rewards: not a small gradient, none
    assert not gradient_of(model, grpo_loss(log_probs, ref, advantages(torch.full((GROUP,), equal)), mask, beta=0.0)).any()
print("GRPO: the same replies, advantages and loss; a group of equal rewards has gradient 0")

# %% [markdown]
# ## What usually goes wrong
#
# **1. "DPO makes the chosen reply more likely."** It makes the *margin* larger. You have seen both replies fall. So log
# `logps/chosen` beside the loss. If it falls, add the NLL term (`--rpo-alpha`), as Pang et al. (2024) do.
#
# **2. "Reinforcement learning teaches what the model could not do."** It can only pay for what the model already writes, now and
# then. Start GRPO from the *base* model, which has never written a right reply with an end token:

# %%
untouched, _ = with_adapter(base, lr=0)
tried, seen = train_groups(base, data[0][0], is_right, steps=3, beta=0.0)
moved = sum(not torch.equal(a, b) for a, b in zip(untouched.parameters(), tried.parameters(), strict=True))
shared.say(
    f"In 3 steps the base wrote {3 * 13 * GROUP} replies; {sum(round(v * 13 * GROUP) for v in seen['reward'])} were right. "
    f"Tensors that changed: {moved}."
    + (
        " All advantages were 0, so nothing was learned, and it stays so until some reply is right. SFT has to come first."
        if not moved
        else ""
    )
)

# %% [markdown]
# And after SFT? For each practice task, the share of right replies among 16, before GRPO and after it:

# %%
chances = {"before": [], "after": []}
for seed, (practice, _) in data.items():
    for when, model in (("before", instruct[seed]), ("after", trained["GRPO"][seed])):
        groups = sample_groups(model, [p for p, _ in practice], 16, max_new_tokens=LIMIT, eos_ids=[END], seed=9, batch_size=416)
        chances[when] += [sum(r.ids == a for r in g) / 16 for g, (_, a) in zip(groups, practice, strict=True)]

# %% tags=["drawing"]
fig, ax = shared.figure(width=4.4, height=4.0)
ax.plot([0, 1], [0, 1], color=C["grey"], linewidth=0.8)
ax.plot(chances["before"], chances["after"], "o", color=C["purple"], alpha=0.5, markersize=5)
ax.text(0.75, 0.69, "no change", rotation=45, ha="right", va="top", fontsize=9, color=C["grey"])
ax.set(xlabel="right of 16 before GRPO (share)", ylabel="right of 16 after", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
shared.show(
    fig,
    "chances",
    "GRPO makes likely right replies surer, and some of the less likely ones are lost: a dot for each practice task.",
)

# %% tags=["drawing"]
often = [b for a, b in zip(chances["before"], chances["after"], strict=True) if a >= 0.5]
rare = [b for a, b in zip(chances["before"], chances["after"], strict=True) if a < 0.25]
shared.say(
    f"Of {len(often)} tasks that were right in half of the replies or more, {sum(b >= 0.5 for b in often)} still are, "
    f"{sum(b >= 0.75 for b in often)} of them in three quarters or more. Of {len(rare)} that were right in less than a quarter, "
    f"{sum(b >= 0.5 for b in rare)} rise to a half or more, and {sum(b == 0 for b in rare)} are at 0 of 16 now. A rare task is "
    "lifted by what the model learns on the others, or it is lost."
)

# %% [markdown]
# **3. "The reward is what I want."** The reward is what you *pay*. Here is the same loop with another reward, the share of the
# longest length: "longer replies are better", a preference that human labels are often said to contain.

# %%
longest, seen = train_groups(instruct[0], data[0][0], lambda reply, answer: len(reply) / LIMIT, steps=15, beta=0.0)
said = generate(longest, [prompt for prompt, _ in data[0][1][:3]], max_new_tokens=LIMIT, eos_ids=[END])
for (prompt, _), reply in zip(data[0][1], said, strict=False):
    print(" ".join(WORDS[i] for i in prompt[3:7]), " -> ", " ".join(WORDS[i] for i in reply))

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.0, height=2.9, columns=2)
for found, colour in ((curves["GRPO"][0], "purple"), (seen, "orange")):
    axes[0].plot(smooth(found["reward"]), color=C[colour])
    axes[1].plot(found["kl"], color=C[colour])
axes[0].text(14.7, 1.0, "reward: long", color=C["orange"], va="center", fontweight="bold")
axes[0].text(19, 0.76, "reward: right", color=C["purple"], ha="right", va="top", fontweight="bold")
axes[0].set(xlabel="step", ylabel="mean reward", ylim=(0, 1.05), title="paid")
axes[1].set(xlabel="step", ylabel="nats a token", title="KL from the reference")
shared.show(
    fig, "hacked", "Paid for length, the model earns the most and is useless; the KL gives it away (split 0, both rewards)."
)

# %% tags=["drawing"]
shared.say(
    f"The reward climbs to {seen['reward'][-1]:.2f} (1 is all that can be paid), and {sum(right(longest, data[0][1]))} of 52 answers "
    f"are right. The KL says it: {seen['kl'][-1]:.1f} nats a token, against {curves['GRPO'][0]['kl'][-1]:.2f}. "
    "Read samples. Watch KL and length beside the reward."
)

# %% [markdown]
# ## Exercises
#
# **1. Clipping.** If you take several steps on one group, the model moves away from the one that wrote it, and $\rho$ is no longer
# 1. Then each token's loss is $-\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A)$. The minimum makes it one-sided:
# a token that has been pushed far enough in the direction of its advantage is left alone, but one that went the wrong way
# is still pulled back. Return the loss of each token.


# %% tags=["exercise"]
def clipped(log_probs, old_log_probs, A, epsilon):  # [N], [N], [N], a number -> [N]
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_clipped(answer):
    rho = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.7])  # [5]
    A = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])  # [5]
    old = torch.full((5,), -1.5)  # [5]
    log_probs = (rho.log() + old).requires_grad_()  # [5]
    losses = answer(log_probs, old, A, 0.2)
    assert losses.shape == (5,), "return one loss for each token"
    assert losses[0] < 0, "a loss is minimized: a good reply (A = 2) has a loss below 0"
    assert torch.isclose(losses[0], torch.tensor(-2.0)), "where nothing has moved, rho is 1: the ratio is exp(new - old)"
    (slope,) = torch.autograd.grad(losses.sum(), log_probs)
    assert slope[1] == 0, "A > 0 and rho = 1.3: pushed far enough, so no gradient"
    assert slope[3] != 0, "A < 0 and rho = 1.3: this token went the wrong way; the minimum keeps its gradient"
    assert slope[4] == 0, "A < 0 and rho = 0.7: pushed far enough, so no gradient"
    torch.testing.assert_close(
        losses.detach(), torch.tensor([-2.0, -2.4, -1.4, 2.6, 1.6]), msg="the values are not those of the formula"
    )


shared.grade(check_clipped, clipped)


# %% tags=["solution"]
def clipped(log_probs, old_log_probs, A, epsilon):
    rho = (log_probs - old_log_probs).exp()  # [N]
    return -torch.minimum(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A)  # [N]


shared.grade(check_clipped, clipped)

# %% [markdown]
# **2. How many groups teach?** A group teaches only if its rewards differ. A task is right with probability $p$ in each of $G$
# independent replies. How probable is a group with at least one right *and* at least one wrong reply?


# %% tags=["exercise"]
def teaches(p, G):  # a probability, a number of replies -> a probability
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_teaches(answer):
    assert answer(0.5, 1) == 0, "a group of one reply has nothing to compare with"
    assert answer(0.0, 8) == 0, "p = 0: all replies are wrong"
    assert answer(1.0, 8) == 0, "p = 1: all replies are right, and equal rewards teach nothing either"
    assert math.isclose(answer(0.5, 2), 0.5), "p = 1/2, two replies: right-wrong or wrong-right, 2 of 4 cases"
    assert math.isclose(answer(0.2, 4), 0.5888), "count all that is left: 1 minus all right, minus all wrong"


shared.grade(check_teaches, teaches)


# %% tags=["solution"]
def teaches(p, G):
    return 1 - p**G - (1 - p) ** G


shared.grade(check_teaches, teaches)

# %%
for p in (0.01, 0.05, 0.2, 0.5):
    print(f"p = {p:4.2f}: " + ", ".join(f"{teaches(p, G):4.0%} of groups of {G:2d}" for G in (2, 8, 32)))

# %% [markdown]
# So a task that the model almost never gets right needs a large group, easier prompts, or more SFT first.
#
# **3. Open, without a check.** A right-or-wrong score is one bit a reply, so GRPO has little to store. Does a rank of 1 do as
# well as a rank of 16? Predict, then change `with_adapter` and run all four splits. What do you have to do to the rate
# to make it a fair comparison?

# %% [markdown]
# ## What was not shown
#
# - **Real text.** Near misses of a counter are hard pairs for DPO. People's pairs differ in more than one token, and there DPO is
#   in wide use. This page shows what to watch, not what will happen to your model.
# - **Other losses** of the library: ipo, hinge and robust for pairs; three denominators for groups. A divisor that depends on a
#   reply's own length, or on a group's standard deviation, changes what is rewarded; Liu et al. (2025) show it, and Yu et al.
#   (2025) divide by all tokens of the step, as here.
# - **Several steps on one group**, where the clip of exercise 1 matters, and **rewards that are models**.
# - **Tuning.** One rate for each method, 30 and 20 steps. The comparison is of these settings.

# %% [markdown]
# ## Summary
#
# > - DPO needs pairs, GRPO needs a reward; both are weighted cross-entropies and both start from an SFT model.
# > - The reference is the model before the first step. With a fresh adapter it is the adapter switched off.
# > - DPO raises the margin; the chosen reply itself may become less likely. Log it, and add the NLL term if it falls.
# > - GRPO learns only from groups whose rewards differ: no right reply in the group, no gradient.
# > - Watch reward, KL and samples. GRPO's loss says nothing, and a reward gets what it pays for.
#
# You can now answer:
#
# <details>
# <summary>DPO's loss falls nicely, and the model's answers get worse. Which number do you look at?</summary>
#
# The log-probability of the chosen replies, by itself. If it falls, the margin grows because the rejected ones fall faster.
# An NLL term on the chosen reply holds it up.
#
# </details>
#
# <details>
# <summary>GRPO's reward stays at 0 for the first hundred steps. Is the learning rate too low?</summary>
#
# No: with equal rewards in every group the gradient is exactly 0, at any rate. Use easier prompts, larger groups, or more SFT,
# until some replies are right.
#
# </details>

# %% [markdown]
# ## References
#
# - Rafailov et al. 2023, *Direct Preference Optimization*, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290): DPO, its loss
#   and its gradient.
# - Shao et al. 2024, *DeepSeekMath*, [arXiv:2402.03300](https://arxiv.org/abs/2402.03300): GRPO, and k3 as its KL term.
# - Pang et al. 2024, *Iterative Reasoning Preference Optimization*, [arXiv:2404.19733](https://arxiv.org/abs/2404.19733): DPO
#   with an NLL term.
# - Razin et al. 2024, *Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization*,
#   [arXiv:2410.08847](https://arxiv.org/abs/2410.08847): why both replies can fall.
# - Liu et al. 2025, *Understanding R1-Zero-Like Training: A Critical Perspective*,
#   [arXiv:2503.20783](https://arxiv.org/abs/2503.20783): what the divisors do.
# - Yu et al. 2025, *DAPO: An Open-Source LLM Reinforcement Learning System at Scale*,
#   [arXiv:2503.14476](https://arxiv.org/abs/2503.14476): one denominator for all tokens of a step.
