"""SmolLM3, Granite, OLMo 2 and Gemma 3 in our own decoder: what their switches must not break, and what each one does.

That the logits are those of transformers is in ``test_formats_hf``, from its files and back. Here: a KV cache, packing,
adapters, 4 bits, merging and writing text, each against a plain way to the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from test_cpu_nf4 import needs_native, threads
from tiny import SWITCHED_FAMILIES, VOCAB, assert_close, build, build_with_lora
from torch import Tensor

from minisft import model as decoder
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.formats import load_adapter_, save_adapter
from minisft.generation import read_prompts
from minisft.kernels import cpu_attention
from minisft.loss import cross_entropy_sum, head_loss_sum, token_log_probs
from minisft.merge_weights import merge_
from minisft.model import CausalLM, KVCache
from minisft.native.decoder import next_logits_of
from minisft.surgery import adapters_off, apply_lora_, nf4_modules, quantize_

ONE = {"embedding_multiplier": 1.0, "attention_multiplier": None, "residual_multiplier": 1.0, "logits_divisor": 1.0}
families = pytest.mark.parametrize("config", SWITCHED_FAMILIES.values(), ids=list(SWITCHED_FAMILIES))


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@families
def test_a_cache_filled_in_uneven_pieces_gives_the_logits_of_one_pass(config: ModelConfig) -> None:
    model, ids = build(config), ids_of(2, 11)
    whole, cache = model(ids), KVCache(config, 2, 11, torch.float64)
    pieces = [model(part, cache=cache) for part in ids.split([4, 1, 1, 5], 1)]
    assert_close(torch.cat(pieces, 1), whole)


@families
def test_packed_rows_give_logits_and_gradients_of_separate_rows(config: ModelConfig) -> None:
    model, lengths = build(config), [5, 1, 7]
    rows = list(ids_of(sum(lengths)).split(lengths))
    segments = torch.tensor([[1] * 5 + [2] + [3] * 7 + [0] * 2])
    packed = torch.cat([*rows, torch.zeros(2, dtype=torch.int64)])[None]
    together = model(packed, segment_ids=segments)[0, :13]
    apart = torch.cat([model(row[None])[0] for row in rows])
    assert_close(together, apart)
    weight = tiny.randn(*together.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, expected = (torch.autograd.grad((logits * weight).sum(), parameters) for logits in (together, apart))
    tiny.assert_same(dict(zip(names, ours, strict=True)), dict(zip(names, expected, strict=True)))


@families
def test_a_shared_prefix_is_computed_once_with_the_same_result(config: ModelConfig) -> None:
    model, prefix, ends = build(config), ids_of(5), [ids_of(4, seed=2), ids_of(3, seed=3)]
    row = torch.cat([prefix, *ends])[None]
    hidden = model.hidden(row, segment_ids=torch.tensor([[1] * 5 + [2] * 4 + [3] * 3]), prefix_length=5)[0]
    first, second = (model.hidden(torch.cat([prefix, end])[None])[0] for end in ends)
    assert_close(hidden, torch.cat([first, second[5:]]))


@families
def test_what_is_long_is_read_in_pieces_with_the_same_result(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, at_once = build(config), [8, 3, 5], []
    prompts = [ids_of(length, seed=length).tolist() for length in lengths]
    attend = decoder.attend_cached
    monkeypatch.setattr(decoder, "attend_cached", lambda q, *more: at_once.append(q.shape[1]) or attend(q, *more))
    monkeypatch.setattr(decoder, "READ_AT_ONCE", 3)
    cache, last = read_prompts(model, prompts, 2)
    assert at_once == [3] * 2 * config.num_layers + [2] * config.num_layers
    assert cache.lengths.tolist() == lengths
    next_ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = torch.cat((last[:, None], model.hidden(next_ids, cache=cache)), 1)
    for row, prompt in enumerate(prompts):
        whole = model.hidden(torch.tensor([[*prompt, *next_ids[row].tolist()]]))[0]
        assert_close(found[row], whole[-3:])


@families
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_rows_that_continue_a_past_are_as_if_each_had_it(config: ModelConfig, prefix_length: int) -> None:
    model, before, rows = build(config), ids_of(6), ids_of(2, 7, seed=2)
    numbers = torch.tensor([[1] * 2 + [2] * 3 + [3] * 2, [1] * 2 + [2] * 4 + [0]])
    past = model.new_cache(1, 8)  # longer than what it holds
    model.hidden(before[None], cache=past)
    hidden = model.hidden(rows, segment_ids=numbers, prefix_length=prefix_length, past=past)
    for row, number, found in zip(rows, numbers, hidden, strict=True):
        for segment in range(1, int(number.max()) + 1):
            mine = number == segment
            prefix = row[:prefix_length] if segment > 1 else row[:0]
            written_out = torch.cat([before, prefix, row[mine]])[None]
            assert_close(found[mine], model.hidden(written_out)[0, -int(mine.sum()) :])
    assert int(past.lengths) == 6


@torch.no_grad()
def test_a_past_of_a_cache_goes_to_the_native_attention() -> None:
    needs_native()
    model = build(tiny.LLAMA, torch.float32)
    past = model.new_cache(1, 8)
    model.hidden(ids_of(6)[None], cache=past)
    with mock.patch.object(cpu_attention, "forward", wraps=cpu_attention.forward) as native, threads(1):
        model.hidden(ids_of(2, 7, seed=2), past=past)
    assert native.call_count == model.config.num_layers


@families
def test_the_loss_is_that_of_the_logits(config: ModelConfig) -> None:
    """The head has a divisor or a cap in some: the fused loss would train another function."""
    model, ids, targets = build(config), ids_of(2, 6), ids_of(2, 6, seed=4)
    hidden, logits = model.hidden(ids), model(ids).flatten(0, 1)
    assert_close(head_loss_sum(hidden, model.loss_head, targets), cross_entropy_sum(logits, targets.flatten()))
    expected = logits.log_softmax(-1).gather(1, targets.view(-1, 1)).squeeze(1)
    assert_close(token_log_probs(hidden, model.loss_head, targets), expected)


@families
def test_each_step_of_writing_has_the_logits_of_a_full_pass(config: ModelConfig) -> None:
    model, texts = build(config, torch.float32).eval(), [[3, 1, 4, 1, 5, 9, 2], [6, 5]]
    with torch.inference_mode():
        cache, hidden = read_prompts(model, texts, 6)
        logits, next_logits = model.head(hidden), next_logits_of(model, cache)
        for _ in range(6):
            for row, text in enumerate(texts):
                assert_close(logits[row], model(torch.tensor([text]))[0, -1], 1e-4)
                text.append(int(logits[row].argmax()))
            logits = next_logits(torch.tensor([text[-1] for text in texts]), cache)


@families
def test_adapters_merge_and_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    model, ids = build_with_lora(config, LoRAConfig(rank=2, alpha=3.0), torch.float32), ids_of(2, 9)
    adapted = model(ids)
    with adapters_off(model):
        assert (model(ids) - adapted).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a")
    again = build(config, torch.float32)
    load_adapter_(again, tmp_path / "a")
    assert torch.equal(again(ids), adapted)
    merge_(model)
    assert_close(model(ids), adapted, 1e-4)


@families
def test_four_bits_compute_the_dequantized_model_and_train_adapters(config: ModelConfig) -> None:
    model, dense = build(config, torch.float32), build(config, torch.float32)
    quantize_(model, QuantConfig(block_size=32))
    for path, layer in nf4_modules(model).items():
        dense.get_submodule(path).weight.data = layer.dequantized_weight(torch.float32)
    ids = ids_of(2, 9)
    assert_close(model(ids), dense(ids), 1e-5)
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    head_loss_sum(model.hidden(ids), model.loss_head, ids).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"lora_A", "lora_B"}
    assert all(bool(p.grad.any()) for name, p in trained.items() if name.endswith("lora_B"))


# What each switch does, by hand


def test_a_layer_without_rope_does_not_know_the_order_of_its_keys() -> None:
    """The last token's output of one such layer is the same whatever the order of the tokens before it."""
    config = replace(tiny.LLAMA, num_layers=1)
    ids, swapped = torch.tensor([[3, 8, 5, 2]]), torch.tensor([[8, 5, 3, 2]])
    for nope, equal in (((0,), True), ((), False)):
        model = build(replace(config, nope_layers=nope))
        difference = (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max()
        assert bool(difference < 1e-12) == equal


def reach(model: CausalLM, length: int = 12) -> int:
    """How many tokens, the last included, the last token's logits depend on."""
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *a: embedded.append(a[2].requires_grad_()) or a[2])
    logits = model(ids_of(1, length))
    hook.remove()
    (grad,) = torch.autograd.grad(logits[0, -1].sum(), embedded[0])
    return length - int(grad.abs().sum(-1).nonzero()[0])


def test_layers_that_are_global_ignore_the_window() -> None:
    config = replace(tiny.LLAMA, num_layers=2, sliding_window=3)
    assert reach(build(config)) == 5  # two windows of 3 share a token
    assert reach(build(replace(config, global_layers=(1,)))) == 12


def test_multipliers_are_weights_times_a_number() -> None:
    """A model with multipliers is a plain one whose embedding, queries, outputs and head are multiplied."""
    plain, switched = build(replace(tiny.GRANITE, **ONE, tie_word_embeddings=False)), tiny.GRANITE
    model = build(replace(switched, tie_word_embeddings=False))
    with torch.no_grad():
        plain.model.embed_tokens.weight *= switched.embedding_multiplier
        plain.lm_head.weight /= switched.logits_divisor
        for layer in plain.model.layers:
            layer.self_attn.q_proj.weight *= switched.attention_multiplier * switched.head_dim**0.5
            layer.self_attn.o_proj.weight *= switched.residual_multiplier
            layer.mlp.down_proj.weight *= switched.residual_multiplier
    ids = ids_of(2, 9)
    assert_close(model(ids), plain(ids))
