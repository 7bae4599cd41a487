"""The decoder: equal to transformers, indifferent to how tokens lie in the batch, and the same with a KV cache."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    FAMILIES,
    LLAMA,
    LLAMA3_ROPE,
    VOCAB,
    assert_close,
    assert_same,
    build,
    gradients,
    randn,
    shared,
    shared_with_lora,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisft.config import ModelConfig
from minisft.model import CausalLM, KVCache, rope_angles

families = pytest.mark.parametrize("family", FAMILIES)
any_family = st.sampled_from(list(FAMILIES))
token_ids = st.integers(0, VOCAB - 1)
texts = st.lists(token_ids, min_size=1, max_size=7)


# Oracle: transformers


def reference(config: ModelConfig) -> Any:
    """The same shape as a transformers model, without weights of its own worth keeping."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    name = names[config.model_type]
    extra = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias} if name == "Llama" else {}
    if name == "Mistral":
        extra = {"sliding_window": config.sliding_window}
    theirs = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
        **extra,
    )
    return getattr(transformers, f"{name}ForCausalLM")(theirs).eval()


@pytest.mark.parametrize("tied", [True, False])
@families
def test_logits_equal_transformers(family, tied):
    """The state dict carries over by name alone, and fp32 logits agree to 1e-4."""
    config = dataclasses.replace(FAMILIES[family], tie_word_embeddings=tied)
    ours, theirs = build(config, torch.float32), reference(config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        actual = ours(ids)
    assert float(expected.std()) > 0.3  # random, not flat: the comparison says something
    assert float((actual - expected).abs().max()) <= 1e-4


@families
def test_left_padding_equals_transformers(family):
    """Their way (attention mask and position ids) and ours (segment ids) mean the same."""
    config = FAMILIES[family]
    ours, theirs = build(config, torch.float32), reference(config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8, [0] * 7 + [1]])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        actual = ours(ids, segment_ids=mask)
    assert float((actual - expected)[mask.bool()].abs().max()) <= 1e-4


@pytest.mark.parametrize("config", [LLAMA, LLAMA3_ROPE], ids=["default", "llama3"])
def test_rope_angles_equal_transformers(config):
    positions = torch.tensor([0, 1, 5, 63, 100_000])
    rotary = reference(config).model.rotary_emb
    expected_cos, expected_sin = rotary(torch.zeros(1), positions[None])
    cos, sin = rope_angles(config, positions, torch.float32)
    half = config.head_dim // 2
    assert_close(cos[:, 0], expected_cos[0, :, :half], 1e-6)
    assert_close(sin[:, 0], expected_sin[0, :, :half], 1e-6)


def test_llama3_rope_by_hand():
    """Short waves are kept, long ones stretched by the factor, and the config at hand has some of each and a blend."""
    cos, sin = rope_angles(LLAMA3_ROPE, torch.tensor([1]), torch.float64)
    angle = torch.atan2(sin, cos).flatten()
    plain = 1000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    wavelength = 2 * torch.pi / plain
    assert (wavelength < 32 / 4).any()
    assert (wavelength > 32).any()
    keep = ((32 / wavelength - 1) / 3).clamp(0, 1)  # the published rule in one line
    assert ((keep > 0) & (keep < 1)).any()
    assert_close(angle, plain * (keep + (1 - keep) / 8), 1e-6)


# The batch is only a place to lie in

layouts = st.tuples(st.lists(texts, min_size=1, max_size=4), st.randoms(use_true_random=False))


def lay_out(segments: list[list[int]], how: str, rng: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids, segment ids and the flat places of each segment; whatever is not a segment is filled with random ids."""
    rows = [[i] for i in range(len(segments))] if how != "packed" else [[] for _ in range(len(segments))]
    if how == "packed":
        for i in range(len(segments)):
            rows[rng.randrange(len(rows))].append(i)
        rows = [row for row in rows if row] + [[]] * rng.randrange(2)
    longest = max(sum(len(segments[i]) for i in row) for row in rows)
    T = longest + rng.randrange(4)
    ids = torch.tensor([[rng.randrange(VOCAB) for _ in range(T)] for _ in rows])
    segment_ids = torch.zeros_like(ids)
    places: list[Tensor] = [torch.empty(0)] * len(segments)
    for b, row in enumerate(rows):
        room = T - sum(len(segments[i]) for i in row)
        at = 0
        for name, i in enumerate(row, start=1):
            gap = {"left": room, "right": 0, "packed": rng.randint(0, room)}[how]
            room, at = room - gap, at + gap
            places[i] = b * T + torch.arange(at, at + len(segments[i]))
            ids[b, at : at + len(segments[i])] = torch.tensor(segments[i])
            segment_ids[b, at : at + len(segments[i])] = name
            at += len(segments[i])
    return ids, segment_ids, places


def one_by_one(model: CausalLM, segments: list[list[int]]) -> list[Tensor]:
    return [model.hidden(torch.tensor([segment]))[0] for segment in segments]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["left", "right", "packed"])
@given(family=any_family, layout=layouts)
def test_layout_changes_nothing(how, family, layout):
    """Hidden states of real tokens and adapter gradients: packed = padded on either side = each row alone."""
    segments, rng = layout
    model = shared_with_lora(FAMILIES[family])
    weights = [randn(len(segment), LLAMA.hidden_size, seed=i) for i, segment in enumerate(segments)]
    expected = one_by_one(model, segments)
    sum((h * w).sum() for h, w in zip(expected, weights, strict=True)).backward()
    expected_gradients = gradients(model)
    ids, segment_ids, places = lay_out(segments, how, rng)
    flat = model.hidden(ids, segment_ids=segment_ids).flatten(0, 1)
    for h, place in zip(expected, places, strict=True):
        assert_close(flat[place], h)
    sum((flat[place] * w).sum() for place, w in zip(places, weights, strict=True)).backward()
    assert_same(gradients(model), expected_gradients)


@pytest.mark.slow
@given(family=any_family, layout=layouts, seed=st.integers(0, 1000))
def test_padding_neither_speaks_nor_learns(family, layout, seed):
    """Other ids at padding change no bit of a real token; the padding's own embeddings get a gradient of exactly zero."""
    segments, rng = layout
    model = shared(FAMILIES[family])
    ids, segment_ids, _ = lay_out([[x % (VOCAB - 1) for x in s] for s in segments], "packed", rng)
    real = segment_ids > 0
    embeddings = model.model.embed_tokens.weight.clone().requires_grad_()
    with mock.patch.object(model.model.embed_tokens, "forward", lambda flat: embeddings[flat]):
        first = model.hidden(torch.where(real, ids, VOCAB - 1), segment_ids=segment_ids)  # an id no real token has
        other = model.hidden(torch.where(real, ids, seed % VOCAB), segment_ids=segment_ids)
    assert torch.equal(first[real], other[real])
    (gradient,) = torch.autograd.grad((first * real.unsqueeze(-1) * randn(*first.shape)).sum(), embeddings)
    assert gradient[ids[real].unique()].any()
    assert not gradient[VOCAB - 1].any()


def test_no_segment_ids_means_one_segment_a_row():
    model = build(LLAMA)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(model(ids), model(ids, segment_ids=torch.full_like(ids, 7)))


@families
def test_the_future_is_not_seen(family):
    model = build(FAMILIES[family])
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 7:] = 28
    assert torch.equal(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(ids)[:, 7:], model(changed)[:, 7:])


def test_sliding_window_reaches_layers_times_window_back():
    """Two layers with a window of 4 see 2 * (4 - 1) = 6 tokens back, and no further."""
    model = build(FAMILIES["mistral"])
    ids = torch.arange(12)[None]
    for distance, visible in ((6, True), (7, False)):
        changed = ids.clone()
        changed[0, 11 - distance] = 28
        assert torch.equal(model(ids)[0, 11], model(changed)[0, 11]) is not visible


@families
def test_activation_checkpointing_changes_no_gradient(family):
    model = shared_with_lora(FAMILIES[family])
    ids, segment_ids = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1]])

    def run() -> dict[str, Tensor]:
        hidden = model.hidden(ids, segment_ids=segment_ids)
        (hidden * randn(*hidden.shape)).sum().backward()
        return gradients(model)

    plain = run()
    model.wrap_layer = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    whole_layers = run()
    model.wrap_mlp = model.wrap_layer
    assert_same(whole_layers, plain, 0.0)
    assert_same(run(), plain, 0.0)


# KV cache


def read_in_chunks(model: CausalLM, rows: list[list[int]], chunks: list[list[int]], cache: KVCache) -> list[Tensor]:
    """Logits of each row, read ``chunks[n][b]`` tokens at a time; shorter rows are padded right with garbage."""
    read = [0] * len(rows)
    logits: list[list[Tensor]] = [[] for _ in rows]
    for sizes in chunks:
        parts = [row[at : at + size] for row, at, size in zip(rows, read, sizes, strict=True)]
        T = max(map(len, parts))
        if T == 0:
            continue
        ids = torch.tensor([part + [VOCAB - 1] * (T - len(part)) for part in parts])
        segment_ids = torch.tensor([[1] * len(part) + [0] * (T - len(part)) for part in parts])
        with torch.no_grad():
            out = model(ids, segment_ids=segment_ids, cache=cache)
        for b, part in enumerate(parts):
            logits[b].append(out[b, : len(part)])
            read[b] += len(part)
    return [torch.cat(pieces) if pieces else torch.empty(0, VOCAB) for pieces in logits]


@st.composite
def ragged_chunks(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of their own lengths, and into which pieces each is cut; an empty piece is allowed."""
    rows = draw(st.lists(st.lists(token_ids, min_size=1, max_size=10), min_size=1, max_size=4))
    chunks = draw(st.lists(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)), max_size=3))
    return rows, [*chunks, [10] * len(rows)]


def cache_for(model: CausalLM, batch_size: int) -> KVCache:
    return KVCache(model.config, batch_size, 40, torch.float64)


@given(family=any_family, plan=ragged_chunks())
def test_any_chunks_through_the_cache_equal_one_pass(family, plan):
    rows, chunks = plan
    model = shared(FAMILIES[family])
    cache = cache_for(model, len(rows))
    found = read_in_chunks(model, rows, chunks, cache)
    assert cache.lengths.tolist() == [len(row) for row in rows]
    for row, logits in zip(rows, found, strict=True):
        assert_close(logits, model(torch.tensor([row]))[0])


@given(family=any_family, plan=ragged_chunks(), data=st.data())
def test_selected_rows_go_on_independently(family, plan, data):
    """``select`` copies: any rows in any order, also several times, each with a continuation of its own."""
    rows, chunks = plan
    model = shared(FAMILIES[family])
    cache = cache_for(model, len(rows))
    read_in_chunks(model, rows, chunks, cache)
    keys, lengths = cache.keys.clone(), cache.lengths.clone()
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    more = [data.draw(st.lists(token_ids, min_size=1, max_size=5)) for _ in chosen]
    found = read_in_chunks(model, more, [[5] * len(more)], cache.select(torch.tensor(chosen)))
    for i, continuation, logits in zip(chosen, more, found, strict=True):
        assert_close(logits, model(torch.tensor([rows[i] + continuation]))[0, len(rows[i]) :])
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.lengths, lengths)


def test_full_cache_says_so():
    model = build(LLAMA)
    cache = KVCache(LLAMA, 1, 3, torch.float64)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
        with pytest.raises(ValueError, match="holds 3 tokens; 4 are needed"):
            model(torch.tensor([[3, 4]]), cache=cache)
    assert cache.max_length == 3


# Construction


@families
def test_parameters_are_those_of_the_config(family):
    """Counted by hand from the shape, so neither a bias nor a norm can go missing."""
    c = FAMILIES[family]
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = (
        c.hidden_size * (2 * q + 2 * kv) + c.qkv_bias * (q + 2 * kv) + c.o_bias * c.hidden_size + c.qk_norm * 2 * c.head_dim
    )
    mlp = 3 * c.hidden_size * c.intermediate_size + c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
    heads = 1 if c.tie_word_embeddings else 2
    total = c.num_layers * (attention + mlp + 2 * c.hidden_size) + c.hidden_size + heads * c.vocab_size * c.hidden_size
    assert sum(p.numel() for p in CausalLM(c).parameters()) == total


@families
def test_builds_on_the_meta_device_without_buffers(family):
    with torch.device("meta"):
        model = CausalLM(FAMILIES[family])
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.buffers())  # RoPE tables are computed, so nothing is left without storage


def test_tied_head_is_one_parameter():
    model = CausalLM(LLAMA)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert CausalLM(LLAMA3_ROPE).lm_head.weight is not CausalLM(LLAMA3_ROPE).model.embed_tokens.weight


@families
def test_bf16_stays_close_to_fp64(family):
    """Same weights, rounded; the logits' error is that of a few bf16 roundings, not of a wrong dtype somewhere."""
    narrow = build(FAMILIES[family], torch.bfloat16)
    wide = build(FAMILIES[family])
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    ids = torch.arange(24).view(2, 12)
    actual, expected = narrow(ids), wide(ids)
    assert narrow.dtype == actual.dtype == torch.bfloat16
    assert float((actual.double() - expected).detach().norm() / expected.detach().norm()) < 0.03


@families
def test_forward_changes_nothing(family):
    model = build(FAMILIES[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(torch.arange(6)[None])
    model.eval()(torch.arange(6)[None])
    assert_same(model.state_dict(), before, 0.0)


@pytest.mark.slow
def test_an_empty_model_costs_no_import_of_the_compiler():
    """On the meta device PyTorch draws random numbers through its compiler: its import takes longer than loading a model."""
    code = (
        "import sys; from minisft.formats.loading import empty_model; from tiny import LLAMA; empty_model(LLAMA);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})
