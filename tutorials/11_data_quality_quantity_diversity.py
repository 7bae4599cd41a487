# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: "Data: quality, quantity, diversity"
#     minutes: 2
#     needs: tiny
#     after: ["01", "02"]
#     contract:
#       ifd: minisft.selection.scores.score_rows
#       jaccard: minisft.quality.near_duplicates.jaccard
#       clusters: minisft.quality.near_duplicates.join
#       far_apart: minisft.selection.diversity.greedy
#       rank_correlation: minisft.selection.ranking.spearman
#     refs: [zhou2023lima, liu2023what, li2023quantity, zhao2024long, xia2024rethinking, northcutt2019confident]
# ---

# %% [markdown]
# # 11 Data: quality, quantity, diversity
#
# You grade a pool of training rows before you train on it, and then spend a budget of tokens on it in six ways. At the end you
# can say what a score finds and what it cannot find, how many clean rows a dirty pool is worth, and which two baselines a
# selection has to beat before anybody should believe in it.

# %% [markdown]
# ## You need, you get
#
# **You need** page 01 (the loss of an answer) and page 02 (prompts and targets). No pretrained model, no GPU: a small counter is
# trained in front of you.
#
# **You get** six functions, about 35 lines: `ifd`, `auc`, `rank_correlation`, `jaccard`, `clusters` and `far_apart`. Five of them
# equal the library's, which `minisft inspect --quality` and `minisft select` run; `auc` grades them.

# %% tags=["setup"]
import copy
import json
import math
import random
import tempfile
from collections import namedtuple
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import shared
from minisft.loss import token_log_probs
from minisft.quality.near_duplicates import join, near_pairs
from minisft.quality.text import Runs
from minisft.quickstart.parcel_task import parcel_rows
from minisft.selection.diversity import greedy, threshold_for
from minisft.selection.ranking import spearman
from minisft.selection.run import select_rows
from minisft.selection.settings import Settings

shared.start("11", seed=0)
C = shared.COLORS

# %% [markdown]
# The toy counts. A message holds two numbers among other words, in one of 40 wordings, and the answer is the numbers from the first
# to the second. The base model has read books about counting and sheets of messages, but no chat. 24 wordings are for training,
# 16 for the test, so a good test score means that the model understands wordings it has never seen. The cell is folded.

# %% tags=["drawing"]
TOP = 9
MESSAGE_WORDS = "please count from to up say the numbers between and I want list me for now then with next would"
FILLERS = MESSAGE_WORDS.split()
WORDS = ["<start>", "<end>", "user", "assistant", "\n", ":", ".", *FILLERS, *map(str, range(1, TOP + 1))]
WORD_ID = {word: i for i, word in enumerate(WORDS)}
END = WORD_ID["<end>"]
TASKS = [(first, last) for first in range(1, TOP + 1) for last in range(first, TOP + 1)]  # 45
Row = namedtuple("Row", "text answer kind")  # the message, the ids of the answer with its end, "clean" or what is wrong


def ids_of(text):
    return [WORD_ID[word] for word in text.split(" ")]


def counted(first, last):
    return " ".join(map(str, range(first, last + 1)))


def new_wording(draw):
    """Three to six words with two places for numbers."""
    words = draw.sample(FILLERS, draw.randint(3, 6))
    first, last = sorted(draw.sample(range(len(words) + 1), 2))
    return " ".join([*words[:first], "{0}", *words[first:last], "{1}", *words[last:]])


def document(draw):
    """40 tokens of books ("3 to 6 : 3 4 5 6 .") and sheets ("please list 3 up 6 now .")."""
    sentences = []
    for first, last in draw.choices(TASKS, k=8):
        book = f"{first} to {last} : {counted(first, last)} ."
        sentences.append(draw.choice([book, new_wording(draw).format(first, last) + " ."]))
    return ids_of(" ".join(sentences))[:40]


def prompt_of(text):
    return ids_of(f"<start> user \n {text}{' ' * bool(text)}<end> \n <start> assistant \n")


def clean_row(wording, task):
    return Row(wording.format(*task), [*ids_of(counted(*task)), END], "clean")


def padded(rows):
    """Ids, and targets that are -100 outside the answers: [B, T] each."""
    return shared.padded((prompt_of(row.text), row.answer) for row in rows)


wordings = [new_wording(random.Random(f"wording {i}")) for i in range(40)]
TRAIN, TEST = wordings[:24], wordings[24:]
torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
base, draw = shared.newborn(len(WORDS)), random.Random(0)
optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3, fused=True)
for _ in range(110):
    text = torch.tensor([document(draw) for _ in range(48)])  # [48, 40]
    shared.step_(base, optimizer, text, text)

# %% [markdown]
# Training and testing, the same for all arms of this page: 40 steps of 16 rows, whatever the rows are. So every arm costs the same,
# and a small set is read more often than a large one.

# %%
SEEDS = range(3)  # the rows, their order, the pool: all are drawn anew
STEPS, BATCH = 40, 16
test = [clean_row(TEST[i % len(TEST)], TASKS[i % len(TASKS)]) for i in range(180)]


def tuned(model, rows, seed):
    """A copy of the model after SFT on the rows."""
    model, draw, queue = copy.deepcopy(model), random.Random(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    ids, targets = padded(rows)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)  # down to zero, so that the end is calm
        while len(queue) < BATCH:  # the next pass over the rows
            queue += draw.sample(range(len(rows)), len(rows))
        shared.step_(model, optimizer, ids[queue[:BATCH]], targets[queue[:BATCH]])
        del queue[:BATCH]
    return model


@torch.no_grad()
def right(model, rows=test):
    """The share of rows where the likeliest token is the right one at every place: the greedy answer is right."""
    ids, targets = padded(rows)
    hit = (model(ids[:, :-1]).argmax(-1) == targets[:, 1:]) | (targets[:, 1:] == -100)  # [B, T - 1]
    return hit.all(1).float().mean().item()


# %% [markdown]
# And this is the pool that somebody hands you: 240 rows, mostly in four popular wordings. Because we plant the defects ourselves we
# know where they are, and every tool on this page can be graded. 12 rows of each kind:

# %%
KINDS = ["another row's answer", "one number wrong", "cut short", "looping", "near copy", "leaked test row"]


def damaged(row, kind, draw, rows):
    """The answer of a row with a defect."""
    numbers = row.answer[:-1]
    if kind == "another row's answer":
        return draw.choice(rows).answer
    if kind == "one number wrong":
        place = draw.randrange(len(numbers))
        return [*numbers[:place], WORD_ID[str(draw.randint(1, TOP))], *row.answer[place + 1 :]]
    if kind == "cut short":
        return [*numbers[: max(1, len(numbers) // 2)], END]
    return [*(numbers * 4)[:12], END]  # looping


# %%
def pool(seed):
    """240 rows in the order of the file; no two of them are equal."""
    draw = random.Random(f"pool {seed}")
    popular, rare = ([(w, task) for w in some for task in TASKS] for some in (TRAIN[:4], TRAIN[4:]))
    rows = [clean_row(*pair) for pair in draw.sample(popular, 150) + draw.sample(rare, 66)]
    draw.shuffle(rows)
    longer = [place for place, row in enumerate(rows) if len(row.answer) > 2]  # two numbers or more: there is something to cut
    for number, place in enumerate(draw.sample(longer, 48)):
        kind, answer = KINDS[number // 12], rows[place].answer
        while answer == rows[place].answer:  # a wrong number may be the right one: again
            answer = damaged(rows[place], kind, draw, rows)
        rows[place] = Row(rows[place].text, answer, kind)
    for row in draw.sample([row for row in rows if row.kind == "clean"], 12):  # one word exchanged, the answer still right
        words = row.text.split(" ")
        place = draw.choice([i for i, word in enumerate(words) if word in FILLERS])
        words[place] = draw.choice([word for word in FILLERS if word not in words])
        rows.append(Row(" ".join(words), row.answer, "near copy"))
    return rows + [row._replace(kind="leaked test row") for row in draw.sample(test, 12)]


pools = {seed: pool(seed) for seed in SEEDS}

# %% tags=["drawing"]
fig, (ax, side) = shared.figure(width=6.6, height=6.0, rows=2)
seen = pools[0]
shown = [max((r for r in seen if r.kind == kind), key=lambda r: (min(len(r.answer), 7), r.text)) for kind in ("clean", *KINDS)]
for y, row in enumerate(shown):
    numbers = [word for word in row.text.split(" ") if word.isdigit()]
    truth = [*ids_of(counted(*map(int, numbers))), END]
    ax.text(0, y, row.kind, fontsize=8.5, fontweight="bold", va="bottom")
    ax.text(0, y + 0.06, row.text, fontsize=8.5, va="top", color=C["grey"])
    for x, token in enumerate(row.answer):
        word = {"<end>": "."}.get(WORDS[token], WORDS[token])
        fine = x < len(truth) and truth[x] == token
        ax.text(6.6 + 0.42 * x, y, word, fontsize=10, va="center", color=C["blue"] if fine else C["orange"])
ax.set(xlim=(0, 12.2), ylim=(6.7, -0.6), xticks=[], yticks=[])
ax.set_title("one row of each kind")
ax.grid(visible=False)
ax.spines[["left", "bottom"]].set_visible(False)
counts = [sum(wording.format(*task) == row.text for row in seen for task in TASKS) for wording in TRAIN]
side.bar(range(1, 25), counts, color=[C["purple"]] * 4 + [C["grey"]] * 20)
side.set(xlabel="training wording", ylabel="rows in the pool", title="how often each wording occurs")
shared.show(
    fig,
    "pool",
    "A pool has two faults at once: wrong answers (orange) in some rows, and most rows in a few wordings.",
)

# %% [markdown]
# ## The idea
#
# Three things decide what rows are worth:
#
# - **Quality**: is the answer right, whole, and an answer to *this* prompt?
# - **Quantity**: how many different rows are there? More help, and each further row helps less.
# - **Diversity**: do the rows cover what will be asked, or do they say one thing many times?
#
# They have to be balanced, because a budget of tokens buys only so much of each. Two papers set the terms. LIMA (Zhou et al. 2023)
# reports that rows from many sources beat more rows from one source. DEITA (Liu et al. 2023) scores each row for complexity and
# quality and then walks down from the best row, skipping what is too similar to a row that it has kept.
#
# The work has an order that does not depend on taste:
#
# 1. **Clean**: drop rows that give away the test, then copies, then defects that a rule can see. No model is needed.
# 2. **Score** what is left, with a number for each row.
# 3. **Spread**: fill the budget from the best score down, skipping what is too similar.
# 4. **Compare** with a *random* choice and with the *longest* rows, at the same number of tokens. Both cost nothing.

# %% [markdown]
# ## The formula
#
# $x$ is a prompt, $y$ its answer of $n$ tokens, and $l(y \mid x) = - \frac{1}{n} \sum_t \log p(y_t \mid x, y_{<t})$ the mean loss.
# **Instruction-following difficulty** (Li et al. 2023) asks how much the prompt helps. It compares with the same answer behind an
# empty prompt, over the same tokens:
#
# $$\mathrm{IFD} = \frac{l(y \mid x)}{l(y)}$$
#
# Near 0 the prompt says it all, at 1 it does not help, above 1 it hurts: prompt and answer do not belong together. Later work uses the
# ratio of perplexities $e^{l(y \mid x) - l(y)}$ under the same name. It ranks rows differently.
#
# **Similarity** of two sets, here of neighbouring word pairs, is Jaccard's: what they share, divided by what they have together.
#
# $$J(A, B) = \frac{|A \cap B|}{|A \cup B|}$$
#
# **The filter.** With a unit vector $v_i$ for each row, walk from the best score down and keep row $i$ if
# $\max_{j \, \mathrm{kept}} v_i \cdot v_j \le \tau$.
#
# **A grade for a score.** Take a bad row and a clean row at random. The AUC is the probability that the bad one has the larger score,
# a tie counting one half: 1 finds all bad rows at the top, 0 at the bottom, and 1/2 sees nothing.

# %% [markdown]
# ## By hand: 3 x 4
#
# Three answers of four tokens. Each token's probability with its prompt and behind an empty one; losses in bits, so that 1/8 costs 3:
#
# | row | with the prompt | loss | without | loss | IFD | ratio of perplexities |
# |---|---|---|---|---|---|---|
# | 1 | 1/2, 1/2, 1/2, 1/2 | 1 | 1/4, 1/4, 1/4, 1/4 | 2 | 1/2 | 1/2 |
# | 2 | 1/2, 1/4, 1/4, 1/8 | 2 | 1/16, 1/16, 1/16, 1/16 | 4 | 1/2 | 1/4 |
# | 3 | 1/8, 1/16, 1/4, 1/8 | 3 | 1/4, 1/2, 1/8, 1/4 | 2 | 3/2 | 2 |
#
# Row 3 has a prompt that makes its answer *less* likely. Rows 1 and 2 have the same IFD, and the other form puts row 1 above row 2.

# %%
with_prompt = torch.tensor([[1 / 2] * 4, [1 / 2, 1 / 4, 1 / 4, 1 / 8], [1 / 8, 1 / 16, 1 / 4, 1 / 8]])  # [3, 4]
without = torch.tensor([[1 / 4] * 4, [1 / 16] * 4, [1 / 4, 1 / 2, 1 / 8, 1 / 4]])  # [3, 4]
loss, alone = -with_prompt.log2().mean(1), -without.log2().mean(1)  # [3], [3]
print("IFD", (loss / alone).tolist(), " perplexities", (2 ** (loss - alone)).tolist())

# %% [markdown]
# ## Build it
#
# **Scores.** The mean loss of each answer, and its ratio to that behind the empty prompt. Rows are padded on the right, and the
# mask marks the places that predict a token of the answer. `auc` compares all pairs. `rank_correlation` asks whether a score is
# only length in disguise; equal values share the mean of their ranks.


# %% tags=["build"]
@torch.no_grad()
def mean_losses(model, prompts, answers):
    """-log p of the tokens of each answer, averaged: [N], in nats."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)], batch_first=True)  # [N, T]
    log_p = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [N, T - 1]
    begin, lengths = (torch.tensor([[len(part)] for part in parts]) for parts in (prompts, answers))  # [N, 1], [N, 1]
    place = torch.arange(1, ids.shape[1])  # [T - 1]: column t predicts token t + 1
    mask = (place >= begin) & (place < begin + lengths)  # [N, T - 1]
    return -(log_p * mask).sum(1) / mask.sum(1)


def ifd(model, prompts, answers, blanks):
    """How little each prompt helps: [N]. `blanks` are the prompts in their template, emptied."""
    return mean_losses(model, prompts, answers) / mean_losses(model, blanks, answers)


def auc(scores, bad):
    """P(a bad row scores higher than a clean one), a tie counting one half. Both [N], `bad` of truth values."""
    gap = scores[bad][:, None] - scores[~bad][None]  # [bad, clean]
    return ((gap > 0) + 0.5 * (gap == 0)).mean()


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks. Both [N]."""
    below = [(v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1) for v in (a, b)]  # [N]: rows below, ties half
    x, y = (rank - rank.mean() for rank in below)
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm else 0.0


# %% [markdown]
# **Copies.** All pairs of rows; similar ones are joined. If A is near B and B near C, all three are one cluster.
#
# **The filter.** A cosine is rounded before it is compared, so that the order in which a machine adds up decides nothing.


# %% tags=["build"]
def jaccard(a, b):
    """What two sets share, divided by all they have; 0 for two empty ones."""
    together = len(a | b)
    return len(a & b) / together if together else 0.0


def clusters(sets, threshold):
    """Groups of two or more rows (numbers, in order) that a chain of similar rows connects."""
    group = list(range(len(sets)))  # each row names the first row of its group
    for i, j in combinations(range(len(sets)), 2):
        if jaccard(sets[i], sets[j]) >= threshold:
            low, high = sorted((group[i], group[j]))
            group = [low if g == high else g for g in group]
    members = [[i for i, g in enumerate(group) if g == first] for first in range(len(sets))]
    return [rows for rows in members if len(rows) > 1]


def far_apart(vectors, order, threshold):
    """Walk `order`, the best first, and keep a row unless its cosine to a kept one is above the threshold. `vectors` [N, D]."""
    kept = []
    for row in order:
        nearest = max((round(float(vectors[row] @ vectors[other]), 5) for other in kept), default=-1.0)
        if nearest <= threshold:
            kept.append(row)
    return kept


# %% [markdown]
# ## Run it
#
# ### What each tool finds
#
# Six tools for six defects. Two losses: of the base model, which has never seen a chat, and of a **judge**, the base after 40 steps on
# 24 rows that you have checked yourself. Li et al. (2023) also give their model some rows before it scores. Then the judge's IFD,
# the length, a flag for rows that are near to an earlier one, and a flag for rows that are in the test.
#
# Before you run it, guess: which of the six finds a single wrong number? And which defect does no score find?

# %%
judges = {seed: tuned(base, [clean_row(w, random.Random(f"{seed} {w}").choice(TASKS)) for w in TRAIN], seed) for seed in SEEDS}
test_texts = {row.text for row in test}
BLANK = prompt_of("")


def word_pairs(row):
    """The neighbouring words of the message, and of the answer."""
    return {pair for part in (ids_of(row.text), row.answer) for pair in pairwise(part)}


def tools(rows, judge):
    """Six numbers for each row; a high one is meant to say: look here."""
    chats = [prompt_of(row.text) for row in rows], [row.answer for row in rows]
    near = {row for cluster in clusters([word_pairs(row) for row in rows], 0.65) for row in cluster[1:]}
    return {
        "loss,\nbase": mean_losses(base, *chats).double().numpy(),
        "loss,\njudge": mean_losses(judge, *chats).double().numpy(),
        "IFD,\njudge": ifd(judge, *chats, [BLANK] * len(rows)).double().numpy(),
        "length": np.array([float(len(row.answer)) for row in rows]),
        "near\nanother": np.array([float(i in near) for i in range(len(rows))]),
        "in the\ntest": np.array([float(row.text in test_texts) for row in rows]),
    }


scores = {seed: tools(rows, judges[seed]) for seed, rows in pools.items()}
kinds = {seed: np.array([row.kind for row in rows]) for seed, rows in pools.items()}


def grade_of(seed, name, kind):
    """AUC of one tool for one kind of defect, among the clean rows and those of that kind."""
    of = (kinds[seed] == kind) | (kinds[seed] == "clean")
    return auc(scores[seed][name][of], kinds[seed][of] == kind)


names = list(scores[0])
grades = np.array([[np.mean([grade_of(seed, name, kind) for seed in SEEDS]) for name in names] for kind in KINDS])

# %% tags=["drawing"]
fig, ax = shared.figure(width=7.0, height=3.8)
ax.imshow(grades, cmap="PuOr_r", vmin=-0.1, vmax=1.1, aspect="auto")
for y in range(len(KINDS)):
    for x in range(len(names)):
        strong = abs(grades[y, x] - 0.5) > 0.42
        ax.text(x, y, f"{grades[y, x]:.2f}", ha="center", va="center", fontsize=10, color="white" if strong else C["black"])
ax.set_xticks(range(len(names)), names)
ax.set_yticks(range(len(KINDS)), KINDS)
ax.grid(visible=False)
ax.set_title("AUC: 1 finds the defect, 0.5 is blind, 0 prefers it")
shared.show(
    fig,
    "tools",
    "No tool finds all defects: a judge's loss sees wrong answers, and copies and leaks need a comparison with other rows.",
)

# %% tags=["drawing"]
table = {kind: dict(zip(names, row, strict=True)) for kind, row in zip(KINDS, grades, strict=True)}
length = {name: np.mean([rank_correlation(s[name], s["length"]) for s in scores.values()]) for name in names[:3]}
shared.say(
    f"A single wrong number: AUC {table['one number wrong'][names[0]]:.2f} with the base model's loss, "
    f"{table['one number wrong'][names[1]]:.2f} with the judge's. The same column gives near copies "
    f"{table['near copy'][names[1]]:.2f}: their answers are right, so no score of a single row can find them. Rank correlation with "
    f"the length: loss of the base {length[names[0]]:+.2f}, of the judge {length[names[1]]:+.2f}, IFD {length[names[2]]:+.2f}. Above "
    "0.5, in either direction, a score is mostly length, and `minisft select` says so."
)

# %% [markdown]
# Look at the IFD column, and at how IFD is used: *take the highest values, up to 1*. Here the defects are at the top. On a pool whose
# answers are right, a high IFD means a hard row. On a dirty pool it means a wrong row first of all. So clean before you score.

# %% [markdown]
# ### Quantity, and what dirt costs
#
# 6, 24 and 96 clean rows over all 24 wordings; and 192 rows of which a quarter, or half, carry another row's answer. All arms take
# the same 40 steps.
#
# Before you run it, guess: how many clean rows are as good as 192 rows of which half are wrong?


# %%
def drawn(seed, count, wordings):
    """Clean rows over some wordings, none twice while that is possible."""
    draw = random.Random(f"rows {seed}")
    pairs = [(w, task) for w in wordings for task in TASKS]
    chosen = draw.sample(pairs, min(count, len(pairs)))
    return [clean_row(*pair) for pair in chosen + draw.choices(pairs, k=count - len(chosen))]


def with_wrong(rows, share, seed):
    """The first rows get the answer of another one."""
    draw, count = random.Random(f"wrong {seed}"), int(share * len(rows))
    other = [draw.choice([r.answer for r in rows if r.answer != row.answer]) for row in rows[:count]]
    return [row._replace(answer=answer) for row, answer in zip(rows, other, strict=False)] + rows[count:]


CLEAN, WRONG = (6, 24, 96), (0.25, 0.5)
quantity = {n: [right(tuned(base, drawn(seed, n, TRAIN), seed)) for seed in SEEDS] for n in CLEAN}
dirty = {s: [right(tuned(base, with_wrong(drawn(seed, 192, TRAIN), s, seed), seed)) for seed in SEEDS] for s in WRONG}

# %% tags=["drawing"]
means = [np.mean(quantity[n]) for n in CLEAN]
worth = {s: 2 ** np.interp(np.mean(dirty[s]), means, np.log2(CLEAN)) for s in WRONG}
fig, ax = shared.figure(width=6.2, height=3.5)
ax.plot(CLEAN, [100 * m for m in means], color=C["blue"])
for n in CLEAN:
    ax.plot([n] * 3, [100 * v for v in quantity[n]], "o", color=C["blue"], markersize=4)
ax.text(5.3, 100 * means[2], "clean rows", color=C["blue"], fontweight="bold")
for share, colour in zip(WRONG, ("purple", "orange"), strict=True):
    low, high = 100 * min(dirty[share]), 100 * max(dirty[share])
    ax.axhspan(low, high, color=C[colour], alpha=0.2)
    ax.text(104, (low + high) / 2, f"192 rows,\n{share:.0%} wrong", color=C[colour], va="center", fontsize=9, fontweight="bold")
    ax.plot(worth[share], 100 * np.mean(dirty[share]), "s", color=C[colour], markersize=7)
ax.set(xscale="log", xlabel="training rows, equal steps", ylabel="right answers, %", xlim=(5, 220), ylim=(0, None))
ax.set_xticks(CLEAN, map(str, CLEAN))
ax.minorticks_off()
shared.show(
    fig,
    "quantity",
    "Each further clean row helps less, and wrong rows put a pool back to a small clean set: squares show to which size.",
)

# %% tags=["drawing"]
size_of = {s: f"about {worth[s]:.0f}" if np.mean(dirty[s]) > means[0] else f"fewer than {CLEAN[0]}" for s in WRONG}
shared.say(
    f"From 6 to 24 clean rows the score rises by {100 * (means[1] - means[0]):.0f} points, from 24 to 96 by "
    f"{100 * (means[2] - means[1]):.0f}. 192 rows of which a quarter are wrong are worth {size_of[0.25]} clean ones, and of "
    f"which half are wrong {size_of[0.5]}. The pool with half wrong still *contains* 96 clean rows. The wrong ones do not "
    "merely add nothing: they take away."
)

# %% [markdown]
# ### Diversity at constant size
#
# 96 rows each time, all right, the tasks drawn alike; only the number of wordings differs. One wording has 45 tasks, so its rows
# repeat; that too is what "little diversity" means.

# %%
VARIETY = (1, 4, 16)
diversity = {
    k: [right(tuned(base, drawn(seed, 96, random.Random(f"some {seed}").sample(TRAIN, k)), seed)) for seed in SEEDS]
    for k in VARIETY
}

# %% tags=["drawing"]
fig, ax = shared.figure(width=4.8, height=3.0)
for x, k in enumerate(VARIETY):
    ax.bar(x, 100 * np.mean(diversity[k]), 0.6, color=C["green"], alpha=0.4)
    ax.plot([x - 0.08, x, x + 0.08], [100 * v for v in diversity[k]], "o", color=C["green"], markersize=4)
ax.set_xticks(range(3), [f"{k} wording{'s' * (k > 1)}" for k in VARIETY])
ax.set(ylabel="right answers, %", title="96 rows, tested on 16 other wordings")
ax.grid(visible=False, axis="x")
shared.show(
    fig, "diversity", "At the same number of rows, one wording teaches least about wordings never seen: dots are three draws."
)

# %% tags=["drawing"]
levels = [
    f"{k}: {100 * np.mean(diversity[k]):.0f} % right, the draws {100 * np.ptp(diversity[k]):.0f} points apart" for k in VARIETY
]
shared.say(
    f"Wordings and results: {'; '.join(levels)}. All rows are right and all arms cost the same. What differs is what the rows "
    "leave unsaid: from one wording alone a model cannot know which of its words matter. A gap that is smaller than the distance "
    "between draws is no result."
)

# %% [markdown]
# ### Spend a budget
#
# Now the pool with all its defects. Leaked rows go first, in every arm. Then each arm fills the same budget of answer tokens, a third
# of what the pool has:
#
# - **random** and **longest**, the two baselines;
# - **highest IFD** up to 1, as in Li et al.;
# - **lowest loss** of the judge;
# - **lowest loss, far apart**: the same order through `far_apart`, which is DEITA's shape. The vectors count words, and the
#   threshold is the one that keeps half of the rows;
# - **random of the clean**, which no tool can give you: it needs the truth. It shows what is possible.
#
# Before you run it, guess their order.


# %%
def vectors_of(rows):
    """Counts of words of the messages, centred, of unit length: [N, V]."""
    table = np.zeros((len(rows), len(WORDS)), np.float32)
    for i, row in enumerate(rows):
        np.add.at(table[i], ids_of(row.text), 1)
    table -= table.mean(0)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def filled(order, lengths, budget):
    """The rows of `order` that fit into the budget of tokens."""
    return [row for row, total in zip(order, np.cumsum(lengths[order]), strict=True) if total <= budget]


# %%
def choices(seed):
    """Arm -> rows of the pool, by number."""
    s, kind, draw = scores[seed], kinds[seed], random.Random(f"choice {seed}")
    legal = np.flatnonzero(s["in the\ntest"] == 0)
    loss, value = s["loss,\njudge"][legal], s["IFD,\njudge"][legal]
    shuffled, low = legal[draw.sample(range(len(legal)), len(legal))], legal[np.argsort(loss, kind="stable")]
    vectors = vectors_of(pools[seed])
    tau = threshold_for(vectors, low, keep_rate=0.5)
    orders = {
        "random": shuffled,
        "longest": legal[np.argsort(-s["length"][legal], kind="stable")],
        "highest IFD": np.array([row for row in legal[np.argsort(-value, kind="stable")] if s["IFD,\njudge"][row] <= 1]),
        "lowest loss": low,
        "lowest loss,\nfar apart": np.array(far_apart(vectors, low, tau)),
        "random of\nthe clean": shuffled[kind[shuffled] == "clean"],
    }
    return {arm: filled(order, s["length"], s["length"].sum() / 3) for arm, order in orders.items()}


chosen = {seed: choices(seed) for seed in SEEDS}
arms = list(chosen[0])
bought = {a: [right(tuned(base, [pools[seed][i] for i in chosen[seed][a]], seed)) for seed in SEEDS] for a in arms}

# %% tags=["drawing"]
share_clean = {a: np.mean([np.mean(kinds[s][chosen[s][a]] == "clean") for s in SEEDS]) for a in arms}


def covered(seed, arm):
    """How many of the 45 tasks have a right answer among the rows of an arm."""
    rows = [pools[seed][i] for i in chosen[seed][arm]]
    return len({tuple(filter(str.isdigit, r.text.split(" "))) for r in rows if r.kind in ("clean", "near copy")})


def known(arm):
    """The judge's mean loss on the clean rows of an arm."""
    return np.mean([scores[s]["loss,\njudge"][i] for s in SEEDS for i in chosen[s][arm] if kinds[s][i] == "clean"])


tasks_of = {a: np.mean([covered(seed, a) for seed in SEEDS]) for a in arms}
fig, axes = shared.figure(width=7.4, height=3.6, columns=3)
results = {a: 100 * np.mean(v) for a, v in bought.items()}
panels = (("right answers, %", results), ("clean rows, %", share_clean), ("tasks with a right row", tasks_of))
for ax, (title, values) in zip(axes, panels, strict=True):
    for y, arm in enumerate(arms):
        value = 100 * values[arm] if title.startswith("clean") else values[arm]
        colour = C["grey"] if arm in ("random", "longest") else C["green"] if arm == arms[-1] else C["blue"]
        ax.barh(y, value, color=colour, alpha=0.55)
        ax.text(value, y, f" {value:.0f}", va="center", fontsize=9)
        if title.startswith("right"):
            ax.plot([100 * v for v in bought[arm]], [y + 0.24] * 3, "o", color=colour, markersize=3)
    ax.set_yticks(range(len(arms)), arms if ax is axes[0] else [""] * len(arms))
    ax.set(title=title, xlim=(0, 1.25 * max(ax.get_xlim()[1], 1) / 1.05))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
shared.show(
    fig,
    "budget",
    "Clean rows are not enough: the rows of lowest loss cover fewer tasks, and spreading them out brings some back.",
)

# %% tags=["drawing"]


def compared(one, other):
    """The mean gap in points, and in how many pools it has the same sign."""
    if one == other:
        return "-"
    gaps = [100 * (a - b) for a, b in zip(bought[one], bought[other], strict=True)]
    return f"{np.mean(gaps):+.0f} points ({sum(g > 0 for g in gaps)} of {len(gaps)} pools better)"


names_of = {arm: arm.replace("\n", " ") for arm in arms}
shared.say(
    "Against random, at equal tokens:\n\n| choice | rows | against random | against longest |\n|---|---|---|---|\n"
    + "\n".join(
        f"| {names_of[arm]} | {np.mean([len(chosen[s][arm]) for s in SEEDS]):.0f} | {compared(arm, 'random')} | {compared(arm, 'longest')} |"
        for arm in arms
        if arm != "random"
    )
    + "\n\nThree pools and 180 test rows see only large gaps: one pool's result has a standard error of about "
    f"{100 * math.sqrt(0.25 / len(test)):.0f} points. A gap that changes its sign between pools is no result.\n\n"
    f"Why does the lowest loss not win with the cleanest rows? On its clean rows the judge's loss is {known('lowest loss'):.2f}, on "
    f"those of the random choice {known('random'):.2f}: it chooses what the judge knows already. And long rows are few rows, so "
    f"*longest* has right answers to only {tasks_of['longest']:.0f} of 45 tasks."
)

# %% [markdown]
# ### The same questions on a pretrained model
#
# `benchmarks/exp_data.py` asks them of SmolLM2-135M with LoRA on Banking77, bank messages with one of 77 intents each: wrong labels (E1),
# more rows (E2), few intents against many (E3), selection on a dirty and on a clean pool (E4), leaked test rows (E5). Each dot is one
# seed: *test* are rows of all intents, *six* rows of the six intents alone, *leaked* the test rows that were copied, and *fresh* other
# rows of their intents. What stands here is read from its results file; an experiment that has no lines there is not shown.

# %% tags=["drawing"]
RESULTS = shared.FOLDER.parent / "benchmarks" / "results"
lines = (RESULTS / "exp_data.jsonl").read_text().splitlines() if (RESULTS / "exp_data.jsonl").exists() else []
runs = [run for run in map(json.loads, (line for line in lines if line.endswith("}"))) if "arm" in run]
KEYS = {"E3": ("six", "test"), "E5": ("leaked", "fresh", "test")}
TITLES = {
    "E1": "E1 wrong labels",
    "E3": "E3 intents x rows of each",
    "E4": "E4 picked from a pool",
    "E5": "E5 copies of test rows",
}
have = [name for name in TITLES if any(run["experiment"] == name for run in runs)]
curves = [run["curve"] for run in runs if run["experiment"] == "E2"]
panels = [*have, *(["E2"] if curves else [])]
if panels:
    rows = math.ceil(len(panels) / 2)
    fig, axes = shared.figure(width=7.4, height=2.7 * rows, columns=2 if len(panels) > 1 else 1, rows=rows)
    flat = np.array(axes).flatten()
    for ax, name in zip(flat, panels, strict=False):
        if name == "E2":
            for curve in curves:
                ax.plot(
                    [p["rows"] for p in curve], [p["loss"] for p in curve], "o-", color=C["blue"], markersize=3, linewidth=0.8
                )
            ax.set(xscale="log", xlabel="rows, each seen once", ylabel="loss on test rows", title="E2 more rows")
            continue
        order = list(dict.fromkeys(run["arm"] for run in runs if run["experiment"] == name))
        for number, key in enumerate(KEYS.get(name, ("test",))):
            found = [
                (order.index(r["arm"]), r["losses"][key]["loss"])
                for r in runs
                if r["experiment"] == name and key in r["losses"]
            ]
            ax.plot([v for _, v in found], [-y - 0.2 * number for y, _ in found], "o", color=C[("blue", "orange", "green")[number]],
                    markersize=4, alpha=0.7, label=key)  # fmt: skip
        ax.set_yticks([-y for y in range(len(order))], order, fontsize=8)
        ax.set(title=TITLES[name], xlabel="loss on test rows")
        if name in KEYS:
            ax.legend(fontsize=8)
    for ax in flat[len(panels) :]:
        ax.set_visible(False)
    shared.show(fig, "pretrained", "The same questions on SmolLM2-135M and Banking77: a dot is a run, lower is better.")
else:
    shared.say("*There is no results file yet: `python benchmarks/exp_data.py` makes it.*")

# %% tags=["drawing"]
claims = json.loads((RESULTS / "exp_data_claims.json").read_text()) if (RESULTS / "exp_data_claims.json").exists() else []
if claims:
    shared.say(
        "What the field says, and what these runs show. The difference is in nats a token, with an interval that holds 95 of 100 "
        "such differences (paired bootstrap over test rows and seeds; with three seeds it is rather too narrow):\n\n| | claim | difference | interval | |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {c['experiment']} | {c['claim']} | {c['difference']:+.3f} | {c['low']:+.3f} to {c['high']:+.3f} | **{c['verdict']}** |"
            for c in claims
        )
    )

# %% [markdown]
# ### On text: `minisft select`
#
# The command does these steps in this order. Here as a Python call, on 300 messages about parcels with three kinds of dirt: 20 copies,
# 15 answers cut off, and 10 rows of the test file. No model is named, so lengths are words.

# %%
with tempfile.TemporaryDirectory() as folder:
    rows, secret = parcel_rows("train", 300), parcel_rows("test", 40)
    for row in rows[100:115]:
        row["messages"][2]["content"] = row["messages"][2]["content"][:20]  # cut off
    write = {"pool.jsonl": rows + rows[:20] + secret[:10], "test.jsonl": secret}
    for name, content in write.items():
        Path(folder, name).write_text("".join(json.dumps(row) + "\n" for row in content))
    settings = Settings(score="random", drop_defects=True, dedup="exact", diverse="kcenter", rows=100)
    picked = select_rows(
        f"{folder}/pool.jsonl", f"{folder}/picked.jsonl", settings, against=[f"{folder}/test.jsonl"]
    )  # also writes a report with the reason for every row, the scores and an HTML page
funnel = {step.split("/")[-1]: left for step, left in picked.funnel.items()}

# %% tags=["drawing"]
shared.say(
    "| step | rows left |\n|---|---|\n"
    + "\n".join(f"| {'not in the test file' if step == 'test.jsonl' else step} | {left} |" for step, left in funnel.items())
)

# %% [markdown]
# Two recipes from the literature, as commands. M is the model whose tokens and hidden states are used; the second is what ran above,
# with words instead:
#
# ```sh
# # DEITA's shape: best score first, skip what is too near to what is kept. The score is a column of your file.
# minisft select --data pool.jsonl --model M --score column:quality --diverse greedy --tokens T --out picked.jsonl
#
# # LIMA's claim: among rows of equal quality, take those that lie far apart.
# minisft select --data pool.jsonl --model M --score random --diverse kcenter --rows N --out picked.jsonl
# ```

# %% tags=["drawing"]
shared.say(
    f"**DEITA**, as its authors report: {shared.paper('liu2023what', 'rows'):,} chosen rows bring Mistral-7B to "
    f"{shared.paper('liu2023what', 'mt_bench_selected')} on MT-Bench, {shared.paper('liu2023what', 'rows_random'):,} random rows to "
    f"{shared.paper('liu2023what', 'mt_bench_random')}. The caveat: complexity and quality come from two scorers that were trained on "
    "ChatGPT's rankings, and a row's score adds up over its turns, so long chats win. A model as small as ours cannot give such "
    "scores, which is why `minisft` takes them as a column and never calls its own loss quality.\n\n"
    f"**LIMA**, as its authors report: {shared.paper('zhou2023lima', 'rows'):,} curated rows make a 65B model answer well, and "
    "diverse rows beat many rows of one source. The caveat: people and GPT-4 judged the *style* of answers. What such a model knows, "
    "it knew before."
)

# %% [markdown]
# ## The same as the library
#
# Five facts, asserted. Your `ifd` is made of the library's log-probabilities. Your clusters are those that the library finds through
# its index and verifies. Your filter keeps the rows that `greedy` keeps, on this pool and at three thresholds, and neither the order
# of the file nor the highest threshold (plain best-first) changes more than it should. Your rank correlation is `spearman`. And
# nothing that an arm chose stands in the test.

# %%
rows, judge = pools[0], judges[0]
prompts, answers = [prompt_of(row.text) for row in rows[:20]], [row.answer for row in rows[:20]]


def library_loss(prompt, answer):
    targets = torch.tensor([[-100] * (len(prompt) - 1) + answer])  # [1, T]
    with torch.no_grad():
        return -token_log_probs(judge.hidden(torch.tensor([prompt + answer[:-1]])), judge.lm_head, targets).mean()


theirs = [library_loss(p, a) / library_loss(BLANK, a) for p, a in zip(prompts, answers, strict=True)]
torch.testing.assert_close(ifd(judge, prompts, answers, [BLANK] * 20), torch.stack(theirs), rtol=1e-4, atol=1e-5)

sets = [word_pairs(row) for row in rows]
runs_of = Runs.of([np.sort(np.array([a * 64 + b + 1 for a, b in s], np.uint64)) << np.uint64(40) for s in sets])
assert clusters(sets, 0.65) == [list(cluster.rows) for cluster in join(len(sets), near_pairs(runs_of, 0.65))]

loss, vectors = scores[0]["loss,\njudge"], vectors_of(rows)
order = np.argsort(loss, kind="stable")
for tau in (0.2, 0.5, 0.8):
    assert far_apart(vectors, order, tau) == greedy(vectors, order, tau).tolist()
assert far_apart(vectors, order, 1.0) == order.tolist()  # nothing is more similar than a copy: plain best-first
other = np.random.default_rng(0).permutation(len(rows))  # the same file in another order
moved = far_apart(vectors[other], np.argsort(loss[other], kind="stable"), 0.5)
assert [int(other[row]) for row in moved] == far_apart(vectors, order, 0.5)
assert math.isclose(rank_correlation(loss, scores[0]["length"]), spearman(loss, scores[0]["length"]))
assert not test_texts & {pools[seed][i].text for seed in SEEDS for arm in arms for i in chosen[seed][arm]}
print(f"ifd, {len(clusters(sets, 0.65))} clusters, three thresholds and a permutation agree; no arm trained on a test row")

# %% [markdown]
# ## What usually goes wrong
#
# **1. "High loss = bad row."** High loss means *surprising to this model*. A wrong answer surprises a model that knows the task. To one
# that does not, everything is surprising, and to one that knows little, the hard rows are. Take from each pool the 48 rows with the
# highest loss, as many as there are broken answers, and look at what they are:

# %%
BROKEN = KINDS[:4]
worst = {
    name: [np.isin(kinds[s][np.argsort(-scores[s][f"loss,\n{name}"])[:48]], BROKEN).mean() for s in SEEDS]
    for name in ("base", "judge")
}
shared.say(
    f"Broken answers among the 48 rows of highest loss: {np.mean(worst['base']):.0%} with the base model, {np.mean(worst['judge']):.0%} "
    "with the judge; a fifth would be chance. The others are right rows that this model finds hard. Delete all of them unseen, and you "
    "delete what there is to learn. Read them first."
)

# %% [markdown]
# **2. "LIMA: 1,000 rows are enough."** Enough for a 65B model that knew the answers already, and judged on style. A few rows bring out
# what a model has learned before; they do not put it in. Take the clean rows and a model that has *not* read the books:


# %%
def from_scratch(seed, n):
    return right(tuned(shared.newborn(len(WORDS)), drawn(seed, n, TRAIN), seed))


unread = {n: np.mean([from_scratch(seed, n) for seed in SEEDS]) for n in CLEAN[1:]}
shared.say(
    "Right answers after the books, and without them, on the same rows and steps: "
    + "; ".join(f"{n} rows {np.mean(quantity[n]):.0%} and {unread[n]:.0%}" for n in unread)
    + ". Few rows bring out what is there, and there has to be something. This experiment cannot replicate LIMA, and no model of this size can; it shows what the claim depends on."
)

# %% [markdown]
# **3. "My score beats random."** Against which random? One random subset may be unlucky; take three or more. Is it better than the
# *longest* rows? Zhao et al. (2024) found that the 1,000 longest rows beat two careful selections, and Xia et al. (2024) that on pools
# of millions of rows hardly any method beats random. And was the number of *tokens* equal? With equal rows, a score that likes
# length buys itself a larger budget. In exercise 2 you make a method out of nothing.
#
# **4. "We removed the test set."** Exact copies, yes. A leaked row often comes with other numbers, or with a greeting in front.
# That is exercise 1.

# %% [markdown]
# ## Exercises
#
# **1. Find the leaked rows.** A training row gives away a test row if the two share `n` words in a row, where every number counts as
# the same word. Return the numbers of the training rows that do. Rows are lists of words.


# %% tags=["exercise"]
def leaked(rows, tests, n):  # lists of lists of words, a number -> list of positions in `rows`
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_leaked(answer):
    tests = [["please", "send", "48", "clips", "to", "the", "old", "mill"], ["stop"]]
    rows = [["hello", "please", "send", "48", "clips", "to", "me"], ["please", "send", "52", "clips", "to", "us"]]
    rows.append(["send", "the", "old", "clips"])
    assert 0 in answer(rows, tests, 4), (
        "row 0 shares `please send 48 clips` with a test row: look everywhere, not only at the start"
    )
    assert 1 in answer(rows, tests, 4), "row 1 differs from the test in its number only: 48 and 52 count as the same word"
    assert 2 not in answer(rows, tests, 3), "row 2 has three words of the test, but not in a row"
    assert list(answer(rows, tests, 5)) == [0, 1], "return the positions, in order, each once"
    assert list(answer(rows, tests, 6)) == [], "no six words in a row are shared"
    assert list(answer([["stop"]], tests, 2)) == [], "a row shorter than n shares no n words"


shared.grade(check_leaked, leaked)


# %% tags=["solution"]
def leaked(rows, tests, n):
    def grams(words):
        masked = ["<number>" if word.isdigit() else word for word in words]
        return {tuple(masked[i : i + n]) for i in range(len(masked) - n + 1)}

    secret = set().union(*map(grams, tests))
    return [i for i, row in enumerate(rows) if grams(row) & secret]


shared.grade(check_leaked, leaked)

# %% [markdown]
# **2. Luck that looks like a method.** You try `k` random subsets and report the best on the test. The test scores of very many random
# subsets are given; each try is one of them, drawn with replacement. What will you report on average? (How probable is it that the
# best of `k` tries is at most the i-th smallest of $n$ scores?)


# %% tags=["exercise"]
def luck(scores, k):  # a list of numbers, a number of tries -> the expected best of k
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_luck(answer):
    assert math.isclose(answer([1, 0, 3, 4], 1), 2.0), "one try: the mean of all scores"
    assert math.isclose(answer([0, 1], 2), 0.75), "two tries of 0 or 1: in 3 of 4 cases at least one is 1"
    assert math.isclose(answer([1, 0], 2), 0.75), "the order of the scores must not matter: sort them"
    assert answer([0, 1], 50) <= 1, "the best try cannot beat the best score"
    assert math.isclose(answer([0, 2, 4], 2), 26 / 9), "each score weighs (i/n)^k - ((i-1)/n)^k, i its rank from the smallest"


shared.grade(check_luck, luck)


# %% tags=["solution"]
def luck(scores, k):
    n = len(scores)
    return sum(score * ((i / n) ** k - ((i - 1) / n) ** k) for i, score in enumerate(sorted(scores), 1))


shared.grade(check_luck, luck)

# %%
equal = np.random.default_rng(0).binomial(180, 0.5, 2000) / 180  # 2,000 models that are all equally good, on 180 test rows
print("mean of all:", f"{equal.mean():.1%};", ", ".join(f"best of {k}: {luck(equal.tolist(), k):.1%}" for k in (3, 5, 20)))

# %% [markdown]
# Nothing was better than anything else, and the best of five is several points "better than random". So choose on validation rows, and
# report the test once.
#
# **3. Open, without a check.** You have an hour to fix rows by hand. Which of the six defects do you fix first? Predict, then train
# on pools that hold 48 rows of one kind each, and compare with the pool without them.

# %% [markdown]
# ## What was not shown
#
# - **Real defects.** They are not planted, and nobody knows how many there are. `minisft inspect --quality` reports what its rules find;
#   read the rows that it shows.
# - **Wrong labels without a judge.** Northcutt et al. (2019) find them with probabilities from models that were not trained on the row
#   itself. Our judge had 24 checked rows instead.
# - **Large pools**, where all pairs are too many: MinHash proposes pairs, and the library verifies each (`docs/data.md`).
# - **Better vectors.** Word counts see wordings. The library can use a model's hidden states, or a column of embeddings.
# - **Tuning.** One rate, one number of steps. With fewer steps wrong rows hurt less, because a model learns them last.

# %% [markdown]
# ## Summary
#
# > - Clean first: leaked rows, copies, visible defects. That needs no model and pays in every pool.
# > - No score finds everything. A loss sees wrong answers; copies and leaks show only beside other rows.
# > - Wrong rows do not add little, they take away: a dirty pool is worth a much smaller clean one.
# > - At the same size, rows that differ beat rows that repeat. Far apart, but only among rows that are right.
# > - A selection has to beat random (three seeds or more) and longest, at equal tokens, on rows that did not choose it.
#
# You can now answer:
#
# <details>
# <summary>You take the rows with the highest IFD from a pool that nobody has cleaned, and the model gets worse. Why?</summary>
#
# A high IFD says that the prompt hardly helps to predict the answer. In a clean pool that is a hard row; in a dirty one it is a
# wrong answer more often. Clean first, or look at the rows on top.
#
# </details>
#
# <details>
# <summary>A colleague's method is two points better than one random subset. What do you ask?</summary>
#
# How far several random subsets lie apart, whether the tokens were equal, how the longest rows do, and whether the test rows had a
# part in choosing the method.
#
# </details>

# %% [markdown]
# ## References
#
# - Zhou et al. 2023, *LIMA: Less Is More for Alignment*, [arXiv:2305.11206](https://arxiv.org/abs/2305.11206): few curated rows,
#   diversity against quantity.
# - Liu et al. 2023, *What Makes Good Data for Alignment?* (DEITA), [arXiv:2312.15685](https://arxiv.org/abs/2312.15685): score
#   first, then a filter.
# - Li et al. 2023, *From Quantity to Quality*, [arXiv:2308.12032](https://arxiv.org/abs/2308.12032): IFD.
# - Zhao et al. 2024, *Long Is More for Alignment*, [arXiv:2402.04833](https://arxiv.org/abs/2402.04833): the longest rows as a
#   baseline.
# - Xia et al. 2024, *Rethinking Data Selection at Scale*, [arXiv:2410.09335](https://arxiv.org/abs/2410.09335): random as a baseline.
# - Northcutt et al. 2019, *Confident Learning*, [arXiv:1911.00068](https://arxiv.org/abs/1911.00068): wrong labels.
