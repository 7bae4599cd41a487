"""Chat tokens without weights of their own are reported before they are trained, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folder import CONFIG, write_model

from minisft.config import LoRAConfig
from minisft.data.chat import Encoded, encode_chat, resolve_template
from minisft.data.messages import Message
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_model, save_model
from minisft.model import CausalLM
from minisft.surgery import apply_lora_
from minisft.training.untrained_tokens import untrained_tokens, untrained_tokens_of

pytestmark = pytest.mark.slow

START, STOP = 256, 257


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[CausalLM, Tokenizer]:
    return load_model(write_model(tmp_path / "model", tmp_path / "scratch", replace(CONFIG, tie_word_embeddings=False)))


def rows(tokenizer: Tokenizer, template: str | None = None) -> list[Encoded]:
    chat = (Message("user", "q"), Message("assistant", "a"))
    return [encode_chat(tokenizer, resolve_template(tokenizer, template), chat)]


def adapted(model: CausalLM, targets: str | tuple[str, ...] = ("q_proj",)) -> CausalLM:
    apply_lora_(model, LoRAConfig(rank=2, targets=targets))
    return model


def test_a_trained_base_needs_no_note(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    assert untrained_tokens(adapted(model), tokenizer, rows(tokenizer)) == ()


def test_a_stop_whose_row_is_zero_is_named(loaded: tuple[CausalLM, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        model.lm_head.weight[[START, STOP]] = 0
    save_model(model, tokenizer, tmp_path / "saved")
    (note,) = untrained_tokens(adapted(model), tokenizer, rows(tokenizer))
    assert "(head: <|im_end|>)" in note  # nothing teaches the model to write <|im_start|>
    assert "--template plain" in note
    saved = str(tmp_path / "saved")
    assert untrained_tokens_of(saved, tokenizer, rows(tokenizer)) == (note,)
    assert untrained_tokens_of(saved, tokenizer, rows(tokenizer), model) == (note,)
    model.lm_head.requires_grad_(True)
    assert untrained_tokens_of(saved, tokenizer, rows(tokenizer), model) == ()  # it is learned


def test_tokens_that_are_alike_are_named(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        model.model.embed_tokens.weight[START] = model.model.embed_tokens.weight[STOP]
    (note,) = untrained_tokens(adapted(model), tokenizer, rows(tokenizer))
    assert "(embedding: <|im_start|>, <|im_end|>)" in note
    plain = rows(tokenizer, "plain")
    assert START not in plain[0].input_ids
    assert untrained_tokens(model, tokenizer, plain) == ()  # one of the two alone is not mistaken for the other
    assert untrained_tokens(model, tokenizer, plain, rows(tokenizer)) == (note,)  # as rows to replay may use them


@pytest.mark.parametrize("full", [True, False])
def test_what_is_trained_may_start_from_zero(loaded: tuple[CausalLM, Tokenizer], full: bool) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        model.lm_head.weight[STOP] = 0
        model.model.embed_tokens.weight[STOP] = 0
    trained = model.requires_grad_(True) if full else adapted(model, ("q_proj", "embed_tokens", "lm_head"))
    assert untrained_tokens(trained, tokenizer, rows(tokenizer)) == ()
