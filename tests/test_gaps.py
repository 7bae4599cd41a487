"""Bugs that every other test let live when they were planted (``mutants.py``), each with the test that sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_folder import write_model, write_rows

import minisft.evaluation.evaluate
from minisft.batching import collate, micro_batches, step_rows
from minisft.common.seeds import derive_seed
from minisft.config import LoRAConfig, RunConfig
from minisft.data.chat import Encoded, resolve_template
from minisft.data.messages import Example, Message
from minisft.data.template import ChatTemplate
from minisft.evaluation.evaluate import evaluate
from minisft.evaluation.metrics import Metric
from minisft.formats import load_adapter_, load_model
from minisft.optim import MasterAdamW
from minisft.step import prepare_method, train_step
from minisft.surgery import lora_modules
from minisft.training.run_data import prepare_data
from minisft.training.train import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing(poison: float) -> None:
    model = tiny.build_with_lora(tiny.LLAMA, LoRAConfig(rank=2), torch.float32)
    optimizer = MasterAdamW(
        {n: p for n, p in model.named_parameters() if p.requires_grad}, betas=(0.9, 0.999), weight_decay=0.0
    )
    batch = collate([Encoded([1, 2, 3, 4], [False, False, True, True], 1, 0, 2)], pad_id=0)
    adapter = next(iter(lora_modules(model).values()))
    adapter.lora_B.register_hook(lambda gradient: gradient * poison)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train_step(model, optimizer, [batch], 1e-2)
    assert torch.tensor(result.loss).isfinite()
    assert result.skipped
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_end_token_is_no_part_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding drops control tokens anyway, so this takes an end token that is ordinary text."""
    model, tokenizer = load_model(write_model(tmp_path / "model", tmp_path / "scratch"))
    said, _ = tokenizer.encode_with_offsets("yes.", control=False)
    monkeypatch.setattr(minisft.evaluation.evaluate, "stop_ids", lambda tokenizer, template: said[-1:])
    monkeypatch.setattr(minisft.evaluation.evaluate, "generate", lambda model, prompts, **settings: [said for _ in prompts])
    example = Example((Message("user", "?"), Message("assistant", "yes")), 1, {})
    (row,) = evaluate(model, tokenizer, resolve_template(tokenizer), [example], "exact_match").rows
    assert (row.prediction, row.score, row.extra["stopped"]) == ("yes", 1.0, True)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("metric", ["exact_match", "json", "f1"])
@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("<think>\n\n</think>\n\n[1]", "[1]", 1.0),
        ("<think>so [2]?</think>[1]", "[1]", 1.0),
        ("[1]", "[1]", 1.0),
        ("<think>[1]</think>[2]", "[1]", 0.0),
        ("<think>[1]", "[1]", 0.0),
        ("<think>x</think>[1]", "<think>y</think>[1]", 1.0),
    ],
)
def test_a_thinking_block_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, said: str, answer: str, score: float
) -> None:
    model, tokenizer = load_model(write_model(tmp_path / "model", tmp_path / "scratch"))
    source = THINKING.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    template = ChatTemplate(source, tokenizer.special_names)
    ids = [*tokenizer.encode(said), 257]
    monkeypatch.setattr(minisft.evaluation.evaluate, "generate", lambda model, prompts, **settings: [ids for _ in prompts])
    example = Example((Message("user", "?"), Message("assistant", answer)), 1, {})
    (row,) = evaluate(model, tokenizer, template, [example], metric).rows
    if metric == "f1" and said == "<think>[1]":
        assert row.score < 1
    else:
        assert (row.score, row.reference) == (score, "[1]")


def quiet(text: str) -> None:
    """The run's sentences are not what this test looks at."""


def test_a_run_is_the_steps_that_its_settings_say(tmp_path: Path) -> None:
    """Every setting that shapes an update, none of them at its default, against the same steps taken one by one."""
    write_model(tmp_path / "model", tmp_path / "scratch")
    write_rows(tmp_path / "rows.jsonl", 20)
    run = RunConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "run"), dtype="fp32", seed=3,
        steps=6, batch_size=4, micro_batch_size=2, rank=2, alpha=3.0, dropout=0.3, lr=1e-2, schedule="linear", warmup=0.5,
        beta1=0.8, beta2=0.9, weight_decay=0.3, clip=0.05, validation_share=0.0, packing=False,
    )  # fmt: skip
    train(run, log=quiet)
    trained, tokenizer = load_model(run.model)
    load_adapter_(trained, tmp_path / "run" / "adapter")

    model, _ = load_model(run.model)
    optimizer = MasterAdamW(prepare_method(model, run), betas=(0.8, 0.9), weight_decay=0.3)
    _, data = prepare_data(run, tokenizer, quiet)
    rates = [0.0025, 0.005, 0.0075, 0.01, 0.01 * 2 / 3, 0.01 / 3]  # three steps of warm-up, then down to zero at a seventh
    for step, rate in enumerate(rates, start=1):
        rows = [data.train[i] for i in step_rows(step, 4, len(data.train), 3)]
        batches = micro_batches(rows, 2, tokenizer.pad_id, packing=False, capacity=run.max_length)
        result = train_step(model, optimizer, batches, rate, clip=0.05, dropout_seed=derive_seed(3, "dropout", step))
        assert result.grad_norm > 0.05
    for path, adapter in lora_modules(model).items():
        other = lora_modules(trained)[path]
        torch.testing.assert_close(other.lora_A, adapter.lora_A, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(other.lora_B, adapter.lora_B, rtol=1e-6, atol=1e-8)
