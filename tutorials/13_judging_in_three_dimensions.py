# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Judging a fine-tune in three dimensions
#     minutes: 1.25
#     needs: tiny
#     after: ["01", "12"]
#     contract:
#       wilson: minisft.evaluation.metrics.wilson
#       mcnemar: minisft.evaluation.paired.mcnemar
#       bootstrap: minisft.evaluation.statistics.bootstrap_mean
#       detectable: minisft.evaluation.paired.detectable_difference
#       always_valid: minisft.judging.ab_statistics.always_valid_interval
#       verdict: minisft.judging.gates.judge_gates
#     refs: [miller2024adding, hendrycks2020measuring, johari2015always]
# ---

# %% [markdown]
# # 13 Judging a fine-tune in three dimensions
#
# You fine-tune one model in two ways and judge both: on the task, on what they could do before, and by what users do. Both learn the
# task; whether they may be shipped, the task alone cannot tell. At the end you can fill in a card of one page from which somebody else can decide.

# %% [markdown]
# ## You need, you get
#
# **You need** page 01 (log-probabilities) and the toy of page 12. No pretrained model, no GPU, no statistics beyond a mean.
#
# **You get** six functions, about 30 lines: `wilson`, `mcnemar`, `bootstrap`, `detectable`, `always_valid`, `verdict`. They equal the
# library's, which `minisft eval`, `compare`, `arena` and `ab` run.

# %% tags=["setup"]
import copy
import math
import random

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import shared
from minisft.generation import generate

shared.start("13", seed=0)
C = shared.COLORS

# %% [markdown]
# The toy is a small relative of page 12's: it has read books that count ("3 to 6 : 3 4 5 6 ."), and then learned to answer "up 3 to
# 6" in a chat. The new task is "down 6 to 3". The cell that defines all this is folded.

# %% tags=["drawing"]
TOP = 16
WORDS = ["<start>", "<end>", "user", "assistant", "\n", "up", "down", "to", ":", ".", *map(str, range(1, TOP + 1))]
WORD_ID = {word: i for i, word in enumerate(WORDS)}
END = WORD_ID["<end>"]
RANGES = [(first, last) for first in range(1, TOP + 1) for last in range(first, TOP + 1)]  # 136 of them


def ids_of(text):
    return [WORD_ID[word] for word in text.split(" ")]


def book(draw):
    """32 tokens of "3 to 6 : 3 4 5 6 . 9 to 10 : 9 10 . ..."."""
    sentences = (f"{a} to {b} : {' '.join(map(str, range(a, b + 1)))} ." for a, b in draw.choices(RANGES, k=8))
    return ids_of(" ".join(sentences))[:32]


def chat(way, first, last):
    """Prompt and right answer."""
    step = 1 if way == "up" else -1
    prompt = ids_of(f"<start> user \n {way} {first} to {last} <end> \n <start> assistant \n")
    return prompt, [*ids_of(" ".join(map(str, range(first, last + step, step)))), END]


def tuned_on(model, rows, steps, lr):
    """A copy of the model after SFT on the rows, loss on the answers only."""
    tuned, draw = copy.deepcopy(model), random.Random(0)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr)
    for _ in range(steps):
        shared.step_(tuned, optimizer, *shared.padded(draw.sample(rows, min(48, len(rows)))))
    return tuned


# %%
torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
draw = random.Random(0)
base = shared.newborn(len(WORDS))
optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
for _ in range(110):
    text = torch.tensor([book(draw) for _ in range(48)])  # [48, 32]
    shared.step_(base, optimizer, text, text)

ups = [chat("up", first, last) for first, last in RANGES]  # the old skill: all 136 tasks
downs = [chat("down", last, first) for first, last in draw.sample(RANGES, len(RANGES))]
practice, pool, test = downs[:50], downs[50:76], downs[76:]  # 50 to train on, 26 in reserve, 60 to judge by
texts = torch.tensor([book(draw) for _ in range(300)])  # [300, 32]: books that no model has read

models = {"before": tuned_on(base, ups, steps=100, lr=1e-3)}
models["down only"] = tuned_on(models["before"], practice, steps=40, lr=2e-3)
models["with replay"] = tuned_on(models["before"], practice + draw.sample(ups, 50), steps=80, lr=2e-3)

# %% [markdown]
# Two fine-tunes of one model: on 50 new rows alone, and on the same rows mixed with 50 old ones ("replay"). Each of the three models is
# asked the same things, and what it says is kept **row by row**: everything on this page is computed from these lists.


# %%
def right(model, rows):
    """1 or 0 for each row: is the greedy answer the right one, end token included?"""
    said = generate(model, [p for p, _ in rows], max_new_tokens=TOP + 2, eos_ids=[END], batch_size=256)
    return np.array([float(ids == answer) for ids, (_, answer) in zip(said, rows, strict=True)])  # [N]


@torch.no_grad()
def nats(model, texts):
    """Mean of -log p over the tokens of each text: [N, T] -> [N]."""
    log_p = model(texts[:, :-1]).log_softmax(-1).gather(-1, texts[:, 1:, None]).squeeze(-1)  # [N, T - 1]
    return -log_p.mean(1).double().numpy()


scores = {name: {"task": right(m, test), "old": right(m, ups), "text": nats(m, texts)} for name, m in models.items()}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=2.9, columns=3)
names = ["before", "down only", "with replay"]
panels = [("task", "task: 60 new tasks", "right (share)"), ("old", "general: 136 old tasks", "right (share)")]
panels += [("text", "general: 300 texts", "nats a token")]
for ax, (key, title, label) in zip(axes, panels, strict=True):
    means = [scores[name][key].mean() for name in names]
    ax.bar(names, means, color=[C["grey"], C["orange"], C["blue"]], alpha=0.85)
    for x, mean in enumerate(means):
        ax.text(x, mean, f"{mean:.2f}", ha="center", va="bottom", fontsize=9)
    ax.set(title=title, ylabel=label, ylim=(0, 1.18 * max(means)))
    ax.set_xticks(range(3), ["before", "down\nonly", "with\nreplay"])
    ax.grid(visible=False, axis="x")
shared.show(
    fig,
    "means",
    "Both fine-tunes learned the new task, and one of them lost nearly all the rest; lower is better on the right.",
)

# %% [markdown]
# If you look only at the left panel, you may ship the wrong model. And if you look at all three, you still do not know which of
# these differences are more than luck.

# %% [markdown]
# ## The idea
#
# **Three dimensions.** The *task* is what you trained. *General ability* is what the model could do before and should still do.
# *Business effect* is what people do with it: they stay, they complain, they buy. No sum of the three makes sense, because nobody
# can say how many right answers a lost skill is worth. So a card has three panels, and each has a limit that was chosen before.
#
# **A score is an estimate.** Other test rows would have given another number. An *interval* says how much another: it
# is made so that in 95 of 100 such experiments it holds the true value.
#
# **Same rows, so compare pairs.** Two models that answer the same rows share what is easy and what is hard. Rows that both have right, or
# both wrong, say nothing about which is better. Only the others count, the *discordant* ones.
#
# **The unit that was drawn is the unit that counts.** Ten messages of one user are not ten users.
#
# **Say beforehand what you could find.** With few rows only a large difference can show. "No difference was found" then says
# nothing. To claim that nothing was *lost*, the whole interval has to lie above a limit.

# %% [markdown]
# ## The formula
#
# Of $n$ rows $k$ are right, $p = k / n$ and $z$ is the number of standard errors that such an interval reaches, about two. **Wilson's**
# interval holds the rates under which $k$ would be no surprise:
#
# $$\frac{p + z^2 / 2n \; \pm \; z \sqrt{p (1 - p) / n + z^2 / 4 n^2}}{1 + z^2 / n}$$
#
# **McNemar's test.** $b$ rows are right under A only, $c$ under B only. Without a difference each of the $b + c$ falls to either side like
# a coin. How surprising is the smaller count? With $X$ the heads of $b + c$ coins,
#
# $$P = \min(1, \; 2 \, \Pr [X \le \min(b, c)])$$
#
# **Bootstrap.** Draw as many units as there are, with replacement, and take the mean; do it thousands of times. The middle 95 of 100
# of these means are the interval.
#
# **What could be found.** With $d = (b + c) / n$, the share of discordant rows, a true difference of
#
# $$\Delta = (z + z_{80}) \sqrt{d / n}$$
#
# is found in 80 of 100 experiments; $z_{80}$ is the point of the normal curve with 80 of 100 draws below it.
#
# **Always valid.** If you look at a running experiment again and again, one look is bound to be a lucky one. An interval that holds at all
# looks at once is wider. With $\delta$ the difference so far, $V$ its variance and $\tau$ the size of effect that you expect:
#
# $$\delta \pm \sqrt{\frac{2 V (V + \tau^2)}{\tau^2} \left( \ln \frac{1}{\alpha} + \frac{1}{2} \ln \frac{V + \tau^2}{V} \right)}$$

# %% [markdown]
# ## By hand: 3 x 4
#
# Three pairs of models on 20 rows. Four counts each: both right, only A, only B, neither.
#
# | pair | both | only A | only B | neither | A | B | gain | coins | $\Pr [X \le \min]$ | p |
# |---|---|---|---|---|---|---|---|---|---|---|
# | 1 | 8 | 1 | 1 | 10 | 9 | 9 | 0 | 2 | 3/4 | 1 |
# | 2 | 8 | 1 | 5 | 6 | 9 | 13 | 4 | 6 | 7/64 | 7/32 = 0.22 |
# | 3 | 2 | 0 | 6 | 12 | 2 | 8 | 6 | 6 | 1/64 | 1/32 = 0.03 |
#
# In pair 1 the capped value is meant: twice 3/4 is more than 1. Pairs 2 and 3 have the same number of coins; the difference between
# 5 of 6 and 6 of 6 decides. And the rows in "both" and "neither" never entered: double them, and no p changes.

# %%
for (only_a, only_b), p in {(1, 1): 1, (1, 5): 7 / 32, (0, 6): 1 / 32}.items():
    coins = only_a + only_b
    below = sum(math.comb(coins, i) for i in range(min(only_a, only_b) + 1)) / 2**coins
    assert min(1, 2 * below) == p
print("p:", 1, 7 / 32, 1 / 32)

# %% [markdown]
# ## Build it
#
# One line or a few for each formula. `bootstrap` adds up every unit first (a *cluster*: all rows of one user, of one document), and
# then draws units. `verdict` holds intervals against limits.

# %% tags=["build"]
Z, Z80 = 1.959964, 0.841621  # the normal curve's points at 97.5 % and 80 %


def wilson(k, n):  # counts -> (low, high)
    p, spread = k / n, Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0, (p + spread / 2 - half) / (1 + spread)), min(1, (p + spread / 2 + half) / (1 + spread))


def mcnemar(b, c):  # counts -> p
    below = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1, 2 * below)


def bootstrap(values, clusters, draws, rng):  # [N], [N] -> (low, high)
    _, unit = np.unique(clusters, return_inverse=True)  # [N]: the number of each row's unit
    sums, sizes = np.bincount(unit, values), np.bincount(unit)  # [U], [U]
    drawn = rng.integers(0, len(sums), (draws, len(sums)))  # [D, U]
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)  # [D]
    return tuple(np.quantile(means, [0.025, 0.975]))


def detectable(discordance, n):  # a share, a count -> a difference
    return (Z + Z80) * math.sqrt(discordance / n)


def always_valid(delta, V, tau, alpha=0.05):  # [...], [...] -> (low, high), each [...]
    wider = np.log(1 / alpha) + np.log((V + tau**2) / V) / 2
    half = np.sqrt(2 * V * (V + tau**2) / tau**2 * wider)
    return delta - half, delta + half


def verdict(limits, intervals):  # {name: limit}, {name: (low, high)} -> a word for each gate, and one for all
    words = {}
    for name, limit in limits.items():
        low, high = intervals[name]
        words[name] = "met" if low >= limit else "failed" if high < limit else "not shown"
    said = set(words.values())
    return words, "HOLD" if "failed" in said else "NOT SHOWN" if "not shown" in said else "SHIP"


# %% [markdown]
# ## Run it
#
# ### The task
#
# 60 rows. First what they can show, then what they show.

# %%
rng = np.random.default_rng(0)
n = len(test)
for name in ("down only", "with replay"):
    a, b = scores["before"]["task"], scores[name]["task"]  # [60], [60]
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    low, high = wilson(b.sum(), n)
    print(
        f"{name:12} {b.mean():4.0%} ({low:.0%} to {high:.0%}); broken {only_a}, fixed {only_b}, p {mcnemar(only_a, only_b):.1g}"
    )
    print(f"{'':12} a true gain of {detectable((only_a + only_b) / n, n):.0%} would have been found 4 times in 5")

# %% tags=["drawing"]
a, b = scores["down only"]["task"], scores["with replay"]["task"]
only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
p = mcnemar(only_a, only_b)
shared.say(
    f"Both gain on the model before. And the two against each other? {b.sum() - a.sum():+.0f} rows, {only_a} discordant rows one "
    f"way and {only_b} the other: p = {p:.2f}. "
    + ("On these 60 rows either may be the better one." if p > 0.05 else "That is more than luck.")
    + f" Had every answer been right, we would still only know that the rate lies above {wilson(n, n)[0]:.0%}."
)

# %% [markdown]
# ### General ability: which test sees a loss first?
#
# The bars above show a catastrophe, and any test sees that. What about a small loss? Between the model before and "down only" lie
# models with a part of the step: $W + s \, \Delta W$. At which $s$ does each test notice? Two tests count right answers of old tasks;
# one takes the log-probability of the same right answers, as page 01 does.
#
# <details>
# <summary>Predict before you run it: 60 old tasks right or wrong, all 136 of them, or the 136 by log-probability?</summary>
#
# The log-probabilities. An answer stays right until another token becomes the likeliest, and then it is one bit. A log-probability
# moves with every weight, and the difference on the *same* row has little noise.
#
# </details>


# %%
@torch.no_grad()
def answer_log_p(model, rows):
    """log p of each row's right answer, in nats: [N]."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)  # [N, T]
    log_p = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [N, T - 1]
    return np.array([float(row[len(p) - 1 : len(p) + len(a) - 1].sum()) for row, (p, a) in zip(log_p, rows, strict=True)])


SCALES = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0]
before, after = (models[name].state_dict() for name in ("before", "down only"))
seen = {"60 tasks, right": [], "136 tasks, right": [], "136 tasks, log p": []}
for s in SCALES:
    part = copy.deepcopy(models["before"])
    part.load_state_dict({key: w + s * (after[key] - w) for key, w in before.items()})
    tasks = right(part, ups) - scores["before"]["old"]  # [136]
    log_p = answer_log_p(part, ups) - answer_log_p(models["before"], ups)  # [136]
    for name, change in zip(seen, (tasks[::2][:60], tasks, log_p), strict=True):
        seen[name].append((change.mean(), *bootstrap(change, np.arange(len(change)), 2_000, rng)))
first = {name: next((s for s, (_, _, high) in zip(SCALES, rows, strict=True) if high < 0), None) for name, rows in seen.items()}

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=3.1, columns=2)
styles = {"60 tasks, right": ("grey", "o", 0), "136 tasks, right": ("orange", "s", 0), "136 tasks, log p": ("blue", "^", 1)}
for name, (colour, mark, column) in styles.items():
    rows = [(s, *values) for s, values in zip(SCALES, seen[name], strict=True) if column == 0 or s <= 0.3]
    s, mean, low, high = np.array(rows).T
    axes[column].errorbar(
        s, mean, [mean - low, high - mean], color=C[colour], marker=mark, markersize=4, linewidth=1.2, label=name
    )
    if first[name] is not None:
        axes[column].axvline(first[name], color=C[colour], linestyle=":", linewidth=1.2)
for ax, title, label in zip(
    axes, ("right or wrong", "log-probability of the 136"), ("change of the share right", "change, nats"), strict=True
):
    ax.axhline(0, color=C["black"], linewidth=0.8)
    ax.set(xscale="log", xlabel="s, part of the step", ylabel=label, title=title, xlim=(0.015, 1.2))
    ax.set_xticks([0.02, 0.1, 0.3, 1], ["0.02", "0.1", "0.3", "1"])
    ax.minorticks_off()
axes[0].legend(loc="lower left")
shared.show(
    fig, "detectors", "The log-probabilities fall long before an answer is wrong; dotted lines mark where a test first sees it."
)

# %% tags=["drawing"]
part.load_state_dict({key: w + 0.1 * (after[key] - w) for key, w in before.items()})
texts_then = scores["before"]["text"] - nats(part, texts)  # [300]
shared.say(
    f"The log-probabilities see the loss at s = {first['136 tasks, log p']}, right or wrong at {first['136 tasks, right']} (136 tasks) "
    f"and {first['60 tasks, right']} (60 of them). No single test is safe: at s = 0.1 the 300 texts change by "
    f"{texts_then.mean():+.3f} nats, "
    + ("for the better. " if texts_then.mean() > 0 else "for the worse. ")
    + "For a pretrained model, take bits per byte of web texts as the alarm, and a benchmark such as MMLU (14,042 test questions, "
    "Hendrycks et al. 2020) to name in words what was lost."
)

# %% [markdown]
# ### Business effect: an A/B test
#
# Users are simulated, so we know the truth, and can see whether the test finds it. A user sends three messages, half of them new tasks,
# half old ones; after a right answer he comes back with one chance, after a wrong one with a smaller. Each user sees one model.

# %%
BACK = {0.0: 0.10, 1.0: 0.25}  # chance to come back after a wrong and after a right answer


def users(name, count, rng):
    """Messages of `count` users: whether each came back, [3 * count], and whose it is, [3 * count]."""
    skill = np.clip(rng.normal(1, 0.5, count), 0, 2)  # some users come back to anything, some to nothing
    asked = [rng.choice(scores[name][key], (count, 3)) for key in ("task", "old")]  # [count, 3] each
    was_right = np.where(rng.random((count, 3)) < 0.5, *asked)  # [count, 3]
    chance = np.where(was_right == 1, BACK[1.0], BACK[0.0]) * skill[:, None]  # [count, 3]
    return (rng.random((count, 3)) < chance).astype(float).ravel(), np.repeat(np.arange(count), 3)


def truth(name):
    share = (scores[name]["task"].mean() + scores[name]["old"].mean()) / 2
    return BACK[0.0] + (BACK[1.0] - BACK[0.0]) * share


effects = {}
control = users("before", 4_000, rng)[0].reshape(-1, 3).mean(1)  # [4000]: a user is the unit, not a message
for name in ("down only", "with replay"):
    arm = users(name, 4_000, rng)[0].reshape(-1, 3).mean(1)  # [4000]
    delta, V = arm.mean() - control.mean(), arm.var() / len(arm) + control.var() / len(control)
    effects[name] = delta, *always_valid(delta, V, tau=0.02)
    print(
        f"{name:12} {delta:+.3f} ({effects[name][1]:+.3f} to {effects[name][2]:+.3f}), in truth {truth(name) - truth('before'):+.3f}"
    )

# %% [markdown]
# ### The card
#
# Limits are set before anybody looks: the task gains ten points at least, old tasks lose five at most, texts a tenth of a nat,
# and users do not come back less than by one point in a hundred.

# %%
LIMITS = {"task": 0.10, "old tasks": -0.05, "texts": -0.10, "users": -0.01}
cards = {}
for name in ("down only", "with replay"):
    change = {
        "task": scores[name]["task"] - scores["before"]["task"],
        "old tasks": scores[name]["old"] - scores["before"]["old"],
        "texts": scores["before"]["text"] - scores[name]["text"],
    }
    found = {key: (d.mean(), *bootstrap(d, np.arange(len(d)), 4_000, rng)) for key, d in change.items()}
    cards[name] = {**found, "users": effects[name]}
    words, all_in_all = verdict(LIMITS, {key: bounds for key, (_, *bounds) in cards[name].items()})
    print(f"{name}: {all_in_all}", words)

# %% tags=["drawing"]
fig, axes = shared.figure(width=7.4, height=3.4, columns=4)
titles = {
    "task": "task\n60 rows",
    "old tasks": "general\n136 tasks",
    "texts": "general\n300 texts",
    "users": "business\n8,000 users",
}
for ax, (key, title) in zip(axes, titles.items(), strict=True):
    for x, (name, colour) in enumerate((("down only", "orange"), ("with replay", "blue"))):
        mean, low, high = cards[name][key]
        ax.errorbar(x, mean, [[mean - low], [high - mean]], color=C[colour], marker="o", markersize=6, capsize=4, linewidth=2)
    ax.axhline(0, color=C["black"], linewidth=0.8)
    ax.axhline(LIMITS[key], color=C["green"], linestyle="--", linewidth=1.2)
    ax.set(title=title, xlim=(-0.6, 1.6))
    ax.set_xticks([0, 1], ["down\nonly", "with\nreplay"])
    ax.grid(visible=False, axis="x")
axes[0].set_ylabel("gain over the model before")
shared.show(fig, "card", "The card: four gains with their intervals; the whole bar has to lie above the dashed limit.")

# %% tags=["drawing"]
words = {name: verdict(LIMITS, {key: bounds for key, (_, *bounds) in cards[name].items()}) for name in cards}
shared.say(
    " ".join(
        f"**{name}: {all_in_all}.** " + "; ".join(f"{key}: {word}" for key, word in each.items()) + "."
        for name, (each, all_in_all) in words.items()
    )
    + " `minisft compare` writes such a card as a page, with an exit status that a script can read."
)

# %% [markdown]
# ### Bad cases: look at what is wrong, mend the largest part
#
# A mean hides which rows are wrong. Cut them into slices, by something that you can act on. Here: by the length of the answer.


# %%
def slices(rows, was_right):
    """Right and all, by the number of numbers in the answer: 1 to 4, 5 to 8, 9 and more."""
    length = np.array([len(answer) - 1 for _, answer in rows])  # [N], without the end token
    bins = {"1 to 4": length <= 4, "5 to 8": (length > 4) & (length <= 8), "9 to 16": length > 8}
    return {name: (int(was_right[inside].sum()), int(inside.sum())) for name, inside in bins.items()}


first_try = slices(test, scores["with replay"]["task"])
worst = min(first_try, key=lambda name: first_try[name][0] / first_try[name][1])
low, high = map(int, worst.split(" to "))
more = [row for row in pool if low <= len(row[1]) - 1 <= high]  # from the reserve: never from the test
mended = tuned_on(models["before"], practice + more + draw.sample(ups, 50), steps=80, lr=2e-3)
second_try = slices(test, right(mended, test))

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.2, height=2.9)
for shift, tried, colour, label in (
    (-0.17, first_try, "grey", "50 rows"),
    (0.17, second_try, "green", f"+ {len(more)} rows of {worst}"),
):
    for x, (k, total) in enumerate(tried.values()):
        low, high = wilson(k, total)
        error = [[k / total - low], [high - k / total]]
        ax.bar(x + shift, k / total, 0.32, color=C[colour], alpha=0.8, label=label if x == 0 else None)
        ax.errorbar(x + shift, k / total, error, color=C["black"], capsize=3, linewidth=1)
        ax.text(x + shift + 0.02, 0.02, f"{k}/{total}", ha="center", fontsize=8)
ax.set(ylabel="right (share)", ylim=(0, 1.05), xlabel="numbers in the answer")
ax.set_xticks(range(3), list(first_try))
ax.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.2))
ax.grid(visible=False, axis="x")
shared.show(fig, "slices", "Right answers by the length of the answer, before and after rows of the worst length were added.")

# %% tags=["drawing"]
(k1, n1), (k2, _) = first_try[worst], second_try[worst]
all1, all2 = (sum(k for k, _ in tried.values()) for tried in (first_try, second_try))
shared.say(
    f"Answers of {worst} numbers were the worst: {k1} of {n1}. With {len(more)} rows of that length {k2} of {n1} are right, and "
    f"{all2} of {n} in all (it was {all1}). The other slices moved too: "
    + "; ".join(
        f"{name} from {first_try[name][0]} to {second_try[name][0]} of {first_try[name][1]}"
        for name in first_try
        if name != worst
    )
    + ". Slices are small and many, so they are for exploring: confirm on fresh rows what you find in them. The added rows came from the "
    "reserve. Had we moved the failures themselves into training, the test would measure memory from then on."
)

# %% [markdown]
# ## The same as the library
#
# Every function against the library's, on this page's own numbers. The bootstrap draws other units, so it agrees up to the luck of
# the draw.

# %%
from minisft.evaluation import metrics, paired, statistics
from minisft.judging import ab_statistics, gates

for k in range(n + 1):
    np.testing.assert_allclose(wilson(k, n), metrics.wilson(k / n, n), rtol=1e-12, atol=1e-15)
for b in range(12):
    assert all(math.isclose(mcnemar(b, c), paired.mcnemar(b, c).exact, rel_tol=1e-12) for c in range(12))
    assert math.isclose(detectable(b / n, n), paired.detectable_difference(b / n, n), rel_tol=1e-6, abs_tol=1e-12)
delta, low, high = effects["with replay"]
theirs = ab_statistics.always_valid_interval(delta, 1e-5, 0.02)
np.testing.assert_allclose(always_valid(delta, 1e-5, 0.02), (theirs.low, theirs.high), rtol=1e-9)

came, who = users("before", 300, rng)  # [900], [900]
mine, theirs = bootstrap(came, who, 10_000, rng), statistics.bootstrap_mean(came, who.tolist())
np.testing.assert_allclose(mine, (theirs.low, theirs.high), atol=0.1 * (theirs.high - theirs.low))

for name, card in cards.items():
    held = gates.judge_gates(
        [gates.Gate(key, limit) for key, limit in LIMITS.items()],
        {key: (statistics.Interval(*values), True) for key, values in card.items()},
    )
    assert ({g.gate.name: g.status for g in held}, gates.verdict_of(held)) == words[name]
print("the same as the library")

# %% [markdown]
# And do the intervals keep their promise? 2,000 simulated evaluations of 60 rows, for several true rates:

# %%
coverage = {}
for p in (0.05, 0.3, 0.5, 0.9, 0.99):
    hits = np.random.default_rng(1).binomial(60, p, 2_000)  # [2000]
    coverage[p] = np.mean([low <= p <= high for low, high in (wilson(k, 60) for k in hits)])
assert min(coverage.values()) > 0.91
assert np.mean(list(coverage.values())) >= 0.93
print("Wilson holds the true rate in", {p: f"{share:.1%}" for p, share in coverage.items()})

# %% [markdown]
# ## What usually goes wrong
#
# **1. Rows that are not independent.** Ten messages each of 40 users, and every user has a rate of his own. Treat messages as the unit,
# and the interval is far too narrow. 300 such experiments, each with both intervals:

# %%
held = {"messages": 0, "users": 0}
rng = np.random.default_rng(2)
for _ in range(300):
    own = rng.beta(0.5, 0.5, 40)  # [40]: many users are nearly always pleased, or nearly never; the mean is 1/2
    pleased = (rng.random((40, 10)) < own[:, None]).astype(float).ravel()  # [400]
    for unit, clusters in (("messages", np.arange(400)), ("users", np.repeat(np.arange(40), 10))):
        low, high = bootstrap(pleased, clusters, 200, rng)
        held[unit] += low <= 0.5 <= high
assert held["messages"] < 0.75 * 300 < 0.87 * 300 < held["users"]

# %% tags=["drawing"]
shared.say(
    f"Drawing messages, the 95 % interval held the truth in {held['messages'] / 300:.0%} of the experiments; drawing users, in "
    f"{held['users'] / 300:.0%}. Miller (2024) gives the formula for benchmarks whose questions share a text."
)

# %% [markdown]
# **2. Peeking.** An A/B test *without* any effect, looked at 20 times. "Stop as soon as `p < 0.05`" is wrong far more often than one
# time in twenty. The always-valid interval may be looked at as often as one likes (Johari et al. 2015).
#
# <details>
# <summary>Predict: how many of 100 tests without an effect show `p < 0.05` at one of 20 looks?</summary>
#
# Each look alone is wrong in 5 of 100. The looks share data, so it is not 20 times 5. The plot says.
#
# </details>

# %%
LOOKS, A_LOOK, RATE = 20, 100, 0.10
rng = np.random.default_rng(3)
sums = rng.binomial(A_LOOK, RATE, (2, 2_000, LOOKS)).cumsum(-1)  # [2, 2000, 20]: two arms, 2,000 tests
units = A_LOOK * np.arange(1, LOOKS + 1)  # [20]
rates = sums / units  # [2, 2000, 20]
delta, pooled = rates[1] - rates[0], rates.mean(0)  # [2000, 20] each
V = np.maximum(2 * pooled * (1 - pooled) / units, 1e-9)  # [2000, 20]
alarms = {"every look, p < 0.05": np.abs(delta) > Z * np.sqrt(V)}  # [2000, 20]
low, high = always_valid(delta, V, tau=0.03)
alarms["always valid"] = (low > 0) | (high < 0)
by_look = {name: np.maximum.accumulate(hit, axis=1).mean(0) for name, hit in alarms.items()}  # [20]
assert 0.18 < by_look["every look, p < 0.05"][-1] < 0.32
assert by_look["always valid"][-1] <= 0.05

# %% tags=["drawing"]
fig, ax = shared.figure(width=6.2, height=2.8)
for (name, shares), colour in zip(by_look.items(), ("orange", "blue"), strict=True):
    ax.plot(range(1, LOOKS + 1), shares, color=C[colour], marker="o", markersize=3)
    ax.text(LOOKS + 0.3, shares[-1], name, color=C[colour], va="center", fontsize=9)
ax.axhline(0.05, color=C["grey"], linestyle=":")
ax.set(xlabel="look", ylabel="tests that have raised an alarm", xlim=(0.5, 27), xticks=range(1, LOOKS + 1, 3))
shared.show(
    fig,
    "peeking",
    "Looking again and again at a test without an effect: false alarms pile up, except for the always-valid interval.",
)

# %% tags=["drawing"]
shared.say(
    f"After 20 looks {by_look['every look, p < 0.05'][-1]:.0%} of the tests have raised a false alarm, against "
    f"{by_look['always valid'][-1]:.1%}. The price is power: with one look at the end a real effect is found more often."
)

# %% [markdown]
# **3. Thumbs as a sample of users.** Those who are angry vote more. Four of five users are pleased; of the pleased, 2 in 100 vote, of
# the others 10 in 100.

# %%
pleased = rng.random(20_000) < 0.8  # [20000]
votes = rng.random(20_000) < np.where(pleased, 0.02, 0.10)  # [20000]
low, high = wilson(int(pleased[votes].sum()), int(votes.sum()))
shared.say(
    f"{votes.sum()} of 20,000 voted, and {pleased[votes].mean():.0%} of the thumbs point up ({low:.0%} to {high:.0%}); in truth "
    f"{pleased.mean():.0%} are pleased. No number of votes mends this: the interval shrinks around the wrong value. Use thumbs to find "
    "bad cases and to make pairs (`minisft feedback`), and compare two models in the *same* week by the *same* kind of vote."
)

# %% [markdown]
# ## Exercises
#
# **1. How many rows?** You expect a share `discordance` of rows that exactly one model gets right, and you want to find a true `gain`
# in four of five experiments. How many rows do you need? (Turn `detectable` round.)


# %% tags=["exercise"]
def rows_needed(discordance, gain):  # two shares -> a count
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_rows_needed(answer):
    assert isinstance(answer(0.2, 0.1), int), "a number of rows is a whole number"
    assert answer(0.2, 0.05) > answer(0.2, 0.1), "a smaller gain needs more rows"
    assert abs(answer(0.2, 0.05) / answer(0.2, 0.1) - 4) < 0.1, "half the gain needs four times the rows"
    assert answer(0.2, 0.1) > 100, "77 rows find it only every second time: the power is missing, Z + Z80"
    n = answer(0.2, 0.03)
    assert detectable(0.2, n) <= 0.03, "with so many rows the gain would still be too small to find: round up"
    assert detectable(0.2, n - 1) > 0.03, "fewer rows would do"


shared.grade(check_rows_needed, rows_needed)


# %% tags=["solution"]
def rows_needed(discordance, gain):
    return math.ceil(((Z + Z80) / gain) ** 2 * discordance)


shared.grade(check_rows_needed, rows_needed)

# %%
for gain in (0.10, 0.05, 0.03, 0.01):
    print(f"a gain of {gain:4.0%} at a discordance of 20 %: {rows_needed(0.2, gain):6,} rows")

# %% [markdown]
# **2. The leaked test row.** Some test prompts also stand in the training data, with other capitals or other white space. Give the
# positions of those test rows. (The library looks for near copies too: `minisft inspect --quality --test FILE`.)


# %% tags=["exercise"]
def leaked(train, test):  # two lists of texts -> a sorted list of positions in test
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_leaked(answer):
    train = ["Where is my parcel?", "Cancel  order 7", "hello"]
    assert answer(train, ["Something else"]) == [], "no test row occurs in the training data here"
    assert answer(train, ["x", "hello"]) == [1], "an exact copy is a leak; give its position in test, from 0"
    assert answer(train, ["WHERE is my parcel?"]) == [0], "capitals do not make another prompt"
    assert answer(train, ["cancel order\n7 "]) == [0], "nor does white space, inside or at the ends"
    assert answer(train, ["hello there", "he"]) == [], "a part of a prompt is not the prompt"
    assert answer(train, ["hello", "x", "HELLO"]) == [0, 2], "all positions, in order"


shared.grade(check_leaked, leaked)


# %% tags=["solution"]
def leaked(train, test):
    def plain(text):
        return " ".join(text.lower().split())

    known = {plain(text) for text in train}
    return [i for i, text in enumerate(test) if plain(text) in known]


shared.grade(check_leaked, leaked)

# %% [markdown]
# **3. Open, without a check.** Print twelve wrong answers of "with replay" on the test rows, and write one word behind each: what went
# wrong? Then write a rule that gives the same words. Which of your words would you train against, and how many rows of it do you
# have outside the test?

# %% [markdown]
# ## What was not shown
#
# - **A real model.** `minisft eval --suite general` runs bits per byte, MMLU in cloze form and sixty questions on yours;
#   `minisft compare` writes the card. The toy's numbers are its own: only the way to look at them carries over.
# - **Metrics of text** (BLEU, chrF, ROUGE, F1 of classes) and their traps.
# - **People side by side**: `minisft arena` shows two answers blind; win rates, flips with the order, agreement of judges.
# - **Several training runs.** Two runs that differ in their seed differ in their scores. A claim about a *method* needs at least three
#   runs, and its unit is the run.
# - **Judge models.** Their verdicts can be imported as votes; their biases come along.

# %% [markdown]
# ## Summary
#
# > - Three panels, never one score: the task, what was there before, what people do. Limits are set before anybody looks.
# > - Every number has an interval, and every comparison is of the same rows: only discordant ones count.
# > - First what the rows could show, then what they show. "Not shown" is an answer.
# > - Losses of general ability are seen first by log-probabilities of the same rows, last by a few questions, right or wrong.
# > - The unit that was drawn is the unit that counts, and a test that is looked at again and again needs an interval for that.
#
# You can now answer:
#
# <details>
# <summary>A colleague says: no significant difference on our 60 general questions, so nothing was forgotten. What do you ask for?</summary>
#
# The interval of the difference, and what could have been found. With 60 questions a loss of ten points is easily missed.
# "Nothing lost" is shown only if the whole interval lies above a limit that was chosen before; paired texts get there with less.
#
# </details>
#
# <details>
# <summary>Two models have overlapping intervals on one test set. May one still be better?</summary>
#
# Yes. The two intervals know nothing of each other, but the models answered the same rows. Compare pairs: with 0 rows broken and
# 6 fixed the better one is clear, however wide the two single intervals are.
#
# </details>

# %% [markdown]
# ## References
#
# - Miller 2024, *Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations*,
#   [arXiv:2411.00640](https://arxiv.org/abs/2411.00640): intervals, clusters, paired differences, and how many questions one needs.
# - Hendrycks et al. 2020, *Measuring Massive Multitask Language Understanding*,
#   [arXiv:2009.03300](https://arxiv.org/abs/2009.03300): MMLU.
# - Johari et al. 2015, *Always Valid Inference: Bringing Sequential Analysis to A/B Testing*,
#   [arXiv:1512.04922](https://arxiv.org/abs/1512.04922): the interval that may be looked at.
