"""Rows and texts of ``exp_peft_full``: cipher text, bank messages, web text, random facts; and a small model that knows facts.

Nothing is shared between training, choosing a rate (validation) and judging (test).
"""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch

from minisft.batching import micro_batches
from minisft.config import ModelConfig
from minisft.data.chat import Encoded
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.general_suite import ClozeQuestion, read_mmlu
from minisft.formats import save_model
from minisft.loss import head_loss_sum
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.quickstart.parcel_task import parcel_rows
from minisft.schedule import learning_rate
from minisft.step import train_step

CHUNK = 160  # characters of a row of text
PROMPT = "Continue."
INSTRUCTION = "Name the intent of this message to a bank, in one short label."
Row = dict[str, str]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    cipher_rows: int = 64
    banking_rows: int = 160
    validation_rows: int = 12
    test_rows: int = 24
    web_texts: int = 40
    questions: int = 16
    kl_texts: int = 10


TINY = Sizes(cipher_rows=8, banking_rows=8, validation_rows=2, test_rows=3, web_texts=2, questions=2, kl_texts=1)


class Source:
    """Texts, bank messages and questions: real ones from a folder, or made up on the spot for a trial."""

    def __init__(self, folder: Path, sizes: Sizes, tiny: bool) -> None:
        self.sizes = sizes
        if tiny:
            texts = [" ".join(str(m) for m in _contents(row)) for row in parcel_rows("train", 400, 5)]
            self.texts = [" ".join(texts[i : i + 4]) for i in range(0, 400, 4)]
            self.bank = [{"text": t, "label": f"intent_{i % 3}"} for i, t in enumerate(texts[:100])]
            self.questions = [ClozeQuestion(i, "", f"{i} + 1?", (str(i + 1), str(i), "7", "9"), 0) for i in range(1, 9)]
        else:
            self.texts = [json.loads(line)["text"] for line in (folder / "c4_sample.jsonl").read_text().splitlines()]
            self.bank = [json.loads(line) for line in (folder / "banking77_train.jsonl").read_text().splitlines()]
            self.questions = read_mmlu(folder / "mmlu_val.jsonl", sizes.questions)
        random.Random(1).shuffle(self.bank)

    @property
    def web(self) -> list[str]:
        """Web texts that no run is trained on, and of which no cipher text is made."""
        return [text[:CHUNK] for text in self.texts[-self.sizes.web_texts :]]

    def rows(self, kind: str, split: str, seed: int = 0) -> list[Row]:
        """Rows of ``cipher``, ``web`` or ``banking``; the seed draws the training rows only."""
        return self._banking(split, seed) if kind == "banking" else self._text(split, seed, kind == "cipher")

    def _text(self, split: str, seed: int, ciphered: bool) -> list[Row]:
        sizes = self.sizes
        chunks = [t[i : i + CHUNK] for t in self.texts[: -sizes.web_texts] for i in range(0, len(t) - CHUNK + 1, CHUNK)]
        chunks = [cipher(chunk) if ciphered else chunk for chunk in chunks]
        held = sizes.validation_rows + sizes.test_rows
        pool, last = chunks[:-held], chunks[-held:]
        chosen = {
            "train": lambda: random.Random(seed).sample(pool, sizes.cipher_rows),
            "validation": lambda: last[: sizes.validation_rows],
            "test": lambda: last[sizes.validation_rows :],
        }[split]()
        return [{"prompt": PROMPT, "completion": chunk} for chunk in chosen]

    def _banking(self, split: str, seed: int) -> list[Row]:
        sizes = self.sizes
        held = 2 * sizes.validation_rows + 3 * sizes.test_rows
        pool, last = self.bank[:-held], self.bank[-held:]
        chosen = {
            "train": lambda: random.Random(seed).sample(pool, sizes.banking_rows),
            "validation": lambda: last[: 2 * sizes.validation_rows],
            "test": lambda: last[2 * sizes.validation_rows :],
        }[split]()
        return [{"prompt": f"{INSTRUCTION}\n{row['text']}", "completion": row["label"].replace("_", " ")} for row in chosen]


def _contents(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def cipher(text: str, seed: int = 16) -> str:
    """Every letter replaced by another one, the same everywhere; case, digits and signs stay."""
    letters = list(string.ascii_lowercase)
    other = letters[:]
    random.Random(seed).shuffle(other)
    small = dict(zip(letters, other, strict=True))
    return "".join(small.get(c) or (small[c.lower()].upper() if c.lower() in small else c) for c in text)


# ---- random facts and a model of our own -------------------------------------------------------------------------------

DIGITS = 5
BITS_A_FACT = DIGITS * math.log2(10)  # 16.6
CONTROL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def facts(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` names, all different, each with five random digits: 16.6 bits that follow from nothing."""
    draw = random.Random(f"facts/{seed}")
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(draw.choices(string.ascii_lowercase, k=5)))
    ordered = sorted(names)
    draw.shuffle(ordered)
    return [(name, f"{draw.randrange(10**DIGITS):0{DIGITS}}") for name in ordered]


def own_tokenizer(scratch: Path) -> Tokenizer:
    """256 bytes and two control tokens."""
    scratch.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL])
    backend.save(str(scratch / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    (scratch / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(scratch)


def own_config(tiny: bool) -> ModelConfig:
    """About 0.2 million parameters; for a trial far fewer."""
    size, layers = (32, 2) if tiny else (64, 4)
    return ModelConfig(
        "llama", 258, size, 3 * size, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=size // 4, rms_norm_eps=1e-5,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip


def encode_facts(tokenizer: Tokenizer, known: Sequence[tuple[str, str]]) -> list[Encoded]:
    """``name=digits`` as tokens; the digits are supervised."""
    rows = []
    for i, (name, code) in enumerate(known, 1):
        context, target = tokenizer.encode(f"{name}="), tokenizer.encode(code)
        supervised = [False] * len(context) + [True] * len(target)
        rows.append(Encoded([*context, *target], supervised, i, 0, len(context)))
    return rows


def start_small_(model: CausalLM, seed: int) -> None:
    """Normal weights of deviation 0.05 and norms of 1: a model this narrow learns sooner than from the usual 0.02."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.05, generator=draw)


def learn(model: CausalLM, rows: Sequence[Encoded], steps: int, batch: int, lr: float, seed: int, pad_id: int) -> None:
    """Plain training of what ``model`` has trainable: AdamW, cosine, clip 1."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = MasterAdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)
    draw = random.Random(f"order/{seed}")
    order: list[int] = []
    model.train()
    for step in range(1, steps + 1):
        while len(order) < batch:
            order += draw.sample(range(len(rows)), len(rows))
        chosen, order = [rows[i] for i in order[:batch]], order[batch:]
        batches = micro_batches(chosen, batch, pad_id, False, 64, share_prefix=False)
        train_step(model, optimizer, batches, learning_rate(step, steps, lr, max(1, steps // 20), "cosine"), clip=1.0)


@torch.inference_mode()
def recalled_bits(model: CausalLM, rows: Sequence[Encoded], pad_id: int, batch: int = 256) -> float:
    """max(0, n * 16.6 bits - the model's code length of all digits): what is saved over writing them down.

    An untrained model recalls none, one that knows every fact n * 16.6. Facts that are worse than a guess count against the
    others: otherwise luck would count and bad luck would not.
    """
    model.eval()
    total = len(rows) * BITS_A_FACT
    for start in range(0, len(rows), batch):
        (cut,) = micro_batches(rows[start : start + batch], batch, pad_id, False, 64, share_prefix=False)
        hidden = model.hidden(cut.input_ids, segment_ids=cut.segment_ids)
        for states, targets in zip(hidden, cut.target_ids, strict=True):
            total -= float(head_loss_sum(states, model.lm_head, targets)) / math.log(2)
    return max(0.0, total)


def make_own_model(folder: Path, tiny: bool, count: int, steps: int) -> Path:
    """The base of P1, made once: it has learned ``count`` facts of the same form (seed 0), none of which is asked for later."""
    if not folder.is_dir():
        tokenizer = own_tokenizer(folder.parent / "own-tokenizer")
        model = CausalLM(own_config(tiny))
        start_small_(model, 0)
        rows = encode_facts(tokenizer, facts(count, 0))
        learn(model, rows, steps, 64, 3e-3, 0, tokenizer.pad_id)
        print(f"  own model: knows {recalled_bits(model, rows, tokenizer.pad_id) / (len(rows) * BITS_A_FACT):.0%} of its facts")
        save_model(model, tokenizer, folder)
    return folder
