"""A tiny random model as a Hugging Face folder, with a byte-level tokenizer and a ChatML template, and rows to train it on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import tiny
import tokenizers
import torch

from minisft.config import ModelConfig, RunConfig
from minisft.data.tokenizer import Tokenizer
from minisft.formats import save_model
from minisft.training.runlog import read_metrics

TIMES = ("tokens_per_s", "peak_memory_bytes")  # the only columns that may differ between two equal runs
CONTROL = ("<|im_start|>", "<|im_end|>")
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=258,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, **config: object) -> None:
    """256 bytes and two control tokens: every text has ids, and every id is easy to predict by hand."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, scratch: Path, config: ModelConfig = CONFIG) -> Path:
    """The whole folder, as ``save_model`` writes it."""
    scratch.mkdir()
    write_tokenizer(scratch)
    model = tiny.build(config, torch.float32)
    with torch.no_grad():  # logits of a freshly started model, not of one that is sure of everything
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    save_model(model, Tokenizer.from_folder(scratch), folder)
    return folder


def rows(count: int) -> list[dict[str, object]]:
    """Chats of uneven length."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {chr(97 + i % 26) * (1 + i % 7)}"},
                {"role": "assistant", "content": chr(65 + i % 26) * (1 + i % 3)},
            ],
            "id": i,
        }
        for i in range(count)
    ]


def write_rows(path: Path, count: int = 24) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def write_shop(folder: Path) -> Path:
    """A model in ``model`` and rows to train it on in ``rows.jsonl``."""
    write_model(folder / "model", folder / "scratch")
    write_rows(folder / "rows.jsonl", 30)
    return folder


def run_config(shop: Path, out: Path, **changes: object) -> RunConfig:
    """A short run of what ``write_shop`` made."""
    values: dict[str, object] = {
        "model": str(shop / "model"), "data": str(shop / "rows.jsonl"), "out": str(out), "batch_size": 4,
        "lr": 1e-2, "dtype": "fp32", "validation_share": 0.2,
    }  # fmt: skip
    if changes.get("method") != "full":
        values |= {"rank": 2, "alpha": 3.0}
    return RunConfig(**(values | changes))


def quiet(text: str) -> None:
    """The run's sentences are not what these tests look at."""


def losses(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


def digest(out: Path) -> dict[str, str]:
    """sha256 of everything that a finished run has computed."""
    last = max(out.glob("checkpoints/step-*"), key=lambda p: int(p.name.split("-")[1]))
    files = [*sorted(last.rglob("*.safetensors")), last / "state.json", *sorted((out / "adapter").iterdir())]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def stopped_copy(whole: Path, out: Path, step: int) -> str:
    """A copy of a finished run as it was when it stopped after ``step``, to resume; returns its folder."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "model", "step-*"))
    shutil.copytree(whole / "checkpoints" / f"step-{step}", out / "checkpoints" / f"step-{step}")
    return str(out)
