"""Decoding in one native call against the readable model: logits, texts, what is refused, and what changes are seen."""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minisft import matmul
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.formats import load_adapter_, save_adapter
from minisft.generation import generate, read_prompts, sample_groups
from minisft.kernels import cpu_build, cpu_nf4
from minisft.kernels.cpu_decode import MAX_ROWS, Pointers, Unsupported
from minisft.kernels.eight_bit import quantize_8bit
from minisft.kernels.exact_copy import exact_copy_of
from minisft.merge_weights import merge_
from minisft.model import CausalLM, KVCache
from minisft.native import decoder as native_decoder
from minisft.native.decoder import NativeDecoder, decode_path, next_logits_of
from minisft.nf4_linear import NF4Linear
from minisft.serving.lanes import sharing_copy
from minisft.surgery import adapters_off, apply_lora_, lora_modules, quantize_
from tests import tiny

# Rows of 4-bit weights come in groups of 32; a head of 12 is no whole vector, and 8 heads of it are not the hidden size.
FAMILIES = {
    name: replace(config, hidden_size=64, intermediate_size=96, num_heads=8, num_kv_heads=2, head_dim=12)
    for name, config in tiny.FAMILIES.items()
}
# For dense weights alone: groups of 16, and one query head for each kv head.
ODD = replace(tiny.QWEN3, hidden_size=48, intermediate_size=80, num_heads=8, num_kv_heads=8, head_dim=10)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3], [5, 6, 7], [8, 9, 1, 2, 2]]


@pytest.fixture(autouse=True)
def needs_native() -> None:
    """Skips where there is nothing to compile with; a build that fails is a failure."""
    if (reason := cpu_build.load().reason) in ("no C++ compiler found", "MINISFT_NATIVE=0"):
        pytest.skip(f"needs the compiled library: {reason}")
    assert reason == ""


TAILS = replace(FAMILIES["llama"], intermediate_size=128, vocab_size=77)  # 77 outputs: two tiles and a part, odd


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def built(config: ModelConfig, kind: str, adapted: bool = False, rank: int = 5) -> CausalLM:
    """A random model in eval mode: ``kind`` fp32 or bf16, behind it nf4 for linears in 4 bits, or nf4-plain (fp32 scales)."""
    dtype, _, quant = kind.partition("+")
    model = tiny.build(config, torch.bfloat16 if dtype == "bf16" else torch.float32)
    if quant:
        quantize_(model, QuantConfig(double_quant=quant == "nf4"))
    if adapted:
        apply_lora_(model, LoRAConfig(rank=rank, alpha=3.0))
        randomize_adapters_(model)
    return model.eval().requires_grad_(False)


def randomize_adapters_(model: nn.Module, seed: int = 7) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.randn(factor.shape, generator=draw) * 0.2


@functools.cache
def exact(config: ModelConfig, kind: str, adapted: bool = False, rank: int = 5) -> CausalLM:
    """The same numbers in fp64, dense: what both ways of computing should give."""
    model, same = tiny.build(config, torch.float64), built(config, kind, adapted, rank)
    if adapted:
        apply_lora_(model, LoRAConfig(rank=rank, alpha=3.0))
    modules = dict(same.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = modules[name.rpartition(".")[0]]
            stored = (
                layer.dequantized_weight(torch.float32) if isinstance(layer, NF4Linear) and name.endswith("weight") else None
            )
            parameter.copy_(same.get_parameter(name) if stored is None else stored)
    return model.eval().requires_grad_(False)


def step(model: CausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    return model.head(model.hidden(tokens[:, None], cache=cache)[:, 0])


@torch.inference_mode()
def check_against(model: CausalLM, true: CausalLM, prompts: list[list[int]], steps: int) -> None:
    """The native logits are at most four times as far from the exact ones as the readable model's, or 16 roundings of a logit.

    Both round after the same sums: in fp32 they differ in the order of additions alone; in bf16 the native step rounds
    what enters the cache and the readable model every intermediate. So the readable model's own error is the bound.
    """
    ours, readable, precise = (read_prompts(m, prompts, steps)[0] for m in (model, model, true))
    decoder = NativeDecoder(model, ours)
    errors, own_errors, largest = [], [], 1.0
    for n in range(steps):
        tokens = torch.arange(n, n + len(prompts)) % model.config.vocab_size
        wanted = step(true, tokens, precise)
        found = decoder.logits(tokens, ours)
        assert found.dtype == model.dtype
        errors.append((found.double() - wanted).abs().max())
        own_errors.append((step(model, tokens, readable).double() - wanted).abs().max())
        largest = max(largest, float(wanted.abs().max()))
    assert ours.lengths.tolist() == readable.lengths.tolist()
    unit = 2.0**-24 if model.dtype == torch.float32 else 2.0**-8
    assert float(max(errors)) <= 4 * float(max(own_errors)) + 16 * unit * largest
    assert float(max(errors)) <= 1000 * unit * largest  # and neither is nonsense


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp32+nf4", "bf16+nf4-plain"])
@pytest.mark.parametrize("adapted", [False, True])
def test_logits_of_every_family(name: str, kind: str, adapted: bool) -> None:
    check_against(built(FAMILIES[name], kind, adapted), exact(FAMILIES[name], kind, adapted), PROMPTS, 6)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_ranks(rank: int, kind: str) -> None:
    """Less than a vector, one or two, more than one; where tiles multiply 16 rows too."""
    for prompts in (PROMPTS, [[1 + n % 7, 2, 3] for n in range(MAX_ROWS)]):
        check_against(built(TAILS, kind, True, rank), exact(TAILS, kind, True, rank), prompts, 2)


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_a_bf16_model_reads_its_adapter_in_bf16(rank: int, multiplies_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU multiplies bf16, as products of many rows do: rounding the factors before changes no bit. Else it does."""
    monkeypatch.setattr(matmul, "_cpu_multiplies_bf16", lambda: multiplies_bf16)
    for kind in ("bf16", "fp32"):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(built(TAILS, kind, True, rank))
            for layer in lora_modules(model).values():
                for factor in (layer.lora_A, layer.lora_B):
                    factor.data = factor.data.to(dtype).float()
            with torch.inference_mode():
                cache = read_prompts(built(TAILS, kind), PROMPTS, 1)[0]
                found.append(NativeDecoder(model, cache).logits(torch.tensor([1, 2, 3, 4]), cache).float())
        assert torch.equal(*found) == (kind == "bf16" and multiplies_bf16)


@pytest.mark.parametrize(
    ("of_A", "of_B", "reason"),
    [(torch.float32, torch.bfloat16, "two dtypes"), (torch.float64, torch.float64, "a factor of q is float64")],
)
def test_factors_that_are_not_read_are_refused(of_A: torch.dtype, of_B: torch.dtype, reason: str) -> None:
    update = (torch.zeros(2, 32, dtype=of_A), torch.zeros(8, 2, dtype=of_B), 1.0)
    with pytest.raises(Unsupported, match=reason):
        Pointers().linear(torch.zeros(8, 32), None, update, "q")


@pytest.mark.slow
@given(
    st.lists(st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=MAX_ROWS),
    st.sampled_from([ODD, FAMILIES["mistral"]]),
)
def test_any_rows_of_any_length(prompts: list[list[int]], config: ModelConfig) -> None:
    check_against(built(config, "fp32"), exact(config, "fp32"), prompts, 2)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 40])
@pytest.mark.parametrize("window", [None, 1, 2, 16])
def test_cache_lengths_and_windows(length: int, window: int | None) -> None:
    config = replace(FAMILIES["llama"], sliding_window=window)
    check_against(built(config, "fp32"), exact(config, "fp32"), [list(range(length % 29)) + [1] * (length - length % 29)], 3)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp32+nf4"])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(kind: str) -> None:
    """Whatever the number of rows and of threads: every output is summed by one thread in one order, or with AMX in two."""
    model = built(FAMILIES["qwen3"], kind, adapted=True)
    prompts, tokens = [[1, 2, n] for n in range(MAX_ROWS)], torch.arange(MAX_ROWS)
    with torch.inference_mode():
        whole = read_prompts(model, prompts, 3)[0]
        wanted: dict[tuple[bool, int], Tensor] = {}
        for count in (MAX_ROWS, 9, 8, 6, 5, 3, 2, 1):
            cache = whole.select(torch.arange(count))
            with threads(1 + count % 2):
                found = NativeDecoder(model, cache).logits(tokens[:count], cache)
            by_tiles = cpu_nf4.tile_floats() > 0 and count >= TILED.get(kind, MAX_ROWS + 1)
            assert all(torch.equal(row, wanted.setdefault((by_tiles, i), row)) for i, row in enumerate(found))


# ---- tiles of AMX --------------------------------------------------------------------------------------------------------

TILED = {"bf16": 6, "fp32+nf4": 10}  # rows from which on tiles multiply
needs_tiles = pytest.mark.skipif(not cpu_nf4.tile_floats(), reason="needs a CPU with AMX, and leave to use it")


@needs_tiles
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("kind", "count"), [("bf16", 6), ("bf16", 9), ("bf16", 16), ("fp32+nf4", 10), ("bf16+nf4-plain", 16)])
@pytest.mark.parametrize("config", [FAMILIES["qwen3"], FAMILIES["llama-biases"], TAILS], ids=["qwen3", "biases", "tails"])
def test_tiles_against_the_readable_model(config: ModelConfig, kind: str, count: int, adapted: bool) -> None:
    prompts = [[1 + n % 7, 2, 3, *range(n % 5)] for n in range(count)]
    check_against(built(config, kind, adapted), exact(config, kind, adapted), prompts, 3)


@needs_tiles
def test_outputs_that_two_tiles_compute_are_added_once() -> None:
    """48 outputs are a tile and a half, and what attention and MLP give is added to what is there."""
    config = replace(TAILS, hidden_size=48)
    prompts = [[1 + n % 7, 2, 3] for n in range(9)]
    check_against(built(config, "bf16"), exact(config, "bf16"), prompts, 3)


@needs_tiles
@pytest.mark.parametrize("count", [10, 11, 16])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((kind, sizes) for kind in ("bf16", "copies") for sizes in ((64, 77), (96, 45), (128, 32), (640, 100))),
        *(("8 bits", sizes) for sizes in ((64, 77), (96, 45), (640, 100))),
        ("nf4 32", (96, 45)), ("nf4 64", (64, 77)), ("nf4 64", (640, 100)), ("nf4-plain 128", (128, 32)),
    ],
)  # fmt: skip
def test_tiles_lose_no_bit_of_what_they_multiply(
    kind: str, sizes: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head alone, whose logits are fp32 until they are rounded: as exact as the products of fp32 vectors are."""
    D, V = sizes
    shape = {"hidden_size": D, "vocab_size": V, "num_layers": 1, "rms_norm_eps": 1e-9, "tie_word_embeddings": False}
    config = replace(FAMILIES["llama"], **shape)
    model = tiny.build(config, torch.bfloat16 if kind == "bf16" else torch.float32).eval().requires_grad_(False)
    model.model.norm.weight.fill_(1)
    for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        linear.weight.zero_()  # a layer that adds nothing
    weight = model.lm_head.weight
    if kind.startswith("nf4"):
        name, block = kind.split()
        model.lm_head = NF4Linear.from_linear(model.lm_head, int(block), double_quant=name == "nf4")
        weight = model.lm_head.dequantized_weight(torch.float32)
    elif kind == "8 bits":
        weight = quantize_8bit(weight).dequantize()
    elif kind == "copies":  # in 12 bits, but for 96 inputs; some blocks stand apart
        weight[::12, 5], weight[3] = 1e-9, weight[3] * (torch.arange(D) % 7 > 0)
        weight.copy_(weight.bfloat16())
        copy = exact_copy_of(weight)
        assert len(copy.apart) > 0 if D % 64 == 0 else copy.dtype == torch.bfloat16
    x = model.model.embed_tokens.weight[torch.arange(count) % V].double()
    normed, true = x / (x.square().mean(-1, keepdim=True) + 1e-9).sqrt(), weight.double()
    ways = []
    for tiled in (True, False):
        monkeypatch.setattr(cpu_nf4, "USE_TILES", tiled)
        with torch.inference_mode():
            cache = KVCache(config, count, 2, model.dtype)
            decoder = NativeDecoder(model, cache, eight_bits=kind == "8 bits", compressed=kind == "copies")
            decoder._dtype = torch.float32
            found = decoder.logits(torch.arange(count) % V, cache)
        ways.append(found)
        error = (found.double() - normed @ true.T).abs() / (normed.abs() @ true.abs().T)
        assert float(error.max()) <= 8 * 2.0**-24
    assert not torch.equal(*ways)


@contextmanager
def readable_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise Unsupported("the test asks for the readable model")

    with monkeypatch.context() as patch:
        patch.setattr(native_decoder, "NativeDecoder", refuse)
        yield


@pytest.mark.slow
def test_greedy_texts_of_200_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end at different tokens, so they leave the batch one by one."""
    model = built(FAMILIES["llama"], "fp32", adapted=True)
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (200,), generator=draw).tolist()
    prompts = [torch.randint(0, tiny.VOCAB, (n,), generator=draw).tolist() for n in lengths]
    settings = {"max_new_tokens": 12, "eos_ids": (1, 2)}
    found = generate(model, prompts, **settings)
    with readable_only(monkeypatch):
        assert generate(model, prompts, **settings) == found
    assert len({len(ids) for ids in found}) > 5


def test_samples_and_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(FAMILIES["qwen2"], "fp32")
    settings = {"max_new_tokens": 8, "eos_ids": (1, 2, 3), "seed": 5, "batch_size": 24}  # more rows than a native step takes
    found = sample_groups(model, PROMPTS, 6, **settings)
    with readable_only(monkeypatch):
        wanted = sample_groups(model, PROMPTS, 6, **settings)
    for ours, theirs in zip(chain(*found), chain(*wanted), strict=True):
        assert ours.ids == theirs.ids
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


@pytest.mark.smollm2
def test_greedy_texts_of_the_pretrained_model(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisft.formats import load_model

    model, tokenizer = load_model(str(smollm2_path), dtype=torch.float32)
    model.eval()
    prompts = [tokenizer.encode(f"{n} parcels left Basel on Monday. The first") for n in range(1, 9)]
    assert decode_path(model, 8).startswith("native code")
    found = generate(model, prompts, max_new_tokens=4, eos_ids=())
    with readable_only(monkeypatch):
        assert generate(model, prompts, max_new_tokens=4, eos_ids=()) == found


# ---- what is seen --------------------------------------------------------------------------------------------------------


def fresh(adapted: bool = True) -> CausalLM:
    model = tiny.build(FAMILIES["llama"], torch.float32)
    if adapted:
        apply_lora_(model, LoRAConfig(rank=3, alpha=3.0))
        randomize_adapters_(model)
    return model.eval().requires_grad_(False)


def scores(model: CausalLM) -> tuple[Tensor, Tensor]:
    """The same step twice: by what ``generate`` uses, and by the readable model."""
    with torch.inference_mode():
        ours, theirs = (read_prompts(model, PROMPTS, 1)[0] for _ in range(2))
        tokens = torch.tensor([1, 2, 3, 4])
        return next_logits_of(model, ours)(tokens, ours), step(model, tokens, theirs)


def scale_(model: CausalLM) -> None:
    for layer in lora_modules(model).values():
        layer.scaling *= -2


def replace_weight_(model: CausalLM) -> None:
    weight = model.model.layers[1].mlp.up_proj.base.weight
    weight.data = -weight.data


def train_(model: CausalLM) -> None:
    for layer in lora_modules(model).values():
        layer.lora_B.data.mul_(0.1)


@pytest.mark.parametrize("change", [scale_, replace_weight_, train_, merge_])
def test_changes_between_generations_are_seen(change: Callable[[CausalLM], object]) -> None:
    model = fresh()
    before, _ = scores(model)
    change(model)
    assert decode_path(model).startswith("native code")
    after, wanted = scores(model)
    tiny.assert_close(after, wanted, 1e-5)
    assert change is merge_ or (after - before).abs().max() > 0.1


def test_adapters_that_are_off_add_nothing() -> None:
    model = fresh()
    with adapters_off(model):
        off, wanted = scores(model)
    tiny.assert_close(off, wanted, 1e-5)
    assert torch.equal(off, scores(fresh(adapted=False))[0])


def test_no_weight_is_copied() -> None:
    """A change in place is seen even by a decoder that was made before it."""
    model = fresh()
    with torch.inference_mode():
        cache = read_prompts(model, [[1, 2, 3]], 4)[0]
        decoder = NativeDecoder(model, cache)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    with torch.inference_mode():
        other = cache.select(torch.tensor([0]))
        token = torch.tensor([4])
        tiny.assert_close(decoder.logits(token, cache), step(model, token, other), 1e-5)


def test_models_as_they_are_trained_and_loaded_take_the_native_path(tmp_path: Path) -> None:
    """With dropout in the adapters, which trains but does not write; the second model is filled from files."""
    trained = tiny.build(FAMILIES["llama"], torch.float32)
    apply_lora_(trained, LoRAConfig(rank=3, alpha=3.0, dropout=0.1))
    randomize_adapters_(trained)
    save_adapter(trained, tmp_path / "a")
    loaded = tiny.build(FAMILIES["llama"], torch.float32)
    load_adapter_(loaded, tmp_path / "a")
    found = []
    for model in (trained.eval(), sharing_copy(loaded.eval())):
        assert decode_path(model).startswith("native code")
        ours, wanted = scores(model)
        tiny.assert_close(ours, wanted, 1e-5)
        found.append(ours)
    assert torch.equal(*found)


# ---- what is left to the readable model ----------------------------------------------------------------------------------


def hook_(model: CausalLM) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def dora_(model: CausalLM) -> None:
    apply_lora_(model, LoRAConfig(rank=2, alpha=2.0, use_dora=True))


def adapt_embedding_(model: CausalLM) -> None:
    apply_lora_(model, LoRAConfig(rank=2, alpha=2.0, targets=("embed_tokens",)))


def transpose_(model: CausalLM) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T


def replace_forward_(model: CausalLM) -> None:
    layer = model.model.layers[1]
    layer.forward = layer.forward


REFUSED = {
    "model.layers.0.mlp has a hook": hook_,
    "is a DoRALinear": dora_,
    "is a LoRAEmbedding": adapt_embedding_,
    "computes in float64": CausalLM.double,
    "computes in float16": CausalLM.half,
    "is not contiguous": transpose_,
    "in training mode": CausalLM.train,
    "forward of model.layers.1 was replaced": replace_forward_,
    "has another eps": lambda model: setattr(model.model.norm, "eps", 0.5),
    "has the shape": lambda model: setattr(model.model, "embed_tokens", nn.Embedding(99, 64)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_left_to_the_readable_model(reason: str) -> None:
    model = fresh(adapted=False)
    assert decode_path(model).startswith("native code")
    REFUSED[reason](model)
    assert re.fullmatch(rf"PyTorch \(.*{re.escape(reason)}.*\)", decode_path(model))
    with torch.inference_mode():
        cache = KVCache(model.config, 1, 3, model.dtype)
        assert next_logits_of(model.eval(), cache)(torch.tensor([1]), cache).shape == (1, tiny.VOCAB)


@pytest.mark.parametrize(
    "switch",
    [
        {"nope_layers": (1,)}, {"sliding_window": 4, "global_layers": (1,)}, {"local_rope_theta": 1e3}, {"norms": "both"},
        {"norm_plus_one": True}, {"activation": "gelu"}, {"embedding_multiplier": 2.0}, {"attention_multiplier": 0.5},
        {"residual_multiplier": 0.5}, {"logits_divisor": 2.0}, {"logits_softcap": 5.0}, {"qk_norm": True, "qk_norm_flat": True},
    ],
    ids=lambda switch: list(switch)[-1],
)  # fmt: skip
def test_switches_without_native_code_are_named(switch: dict[str, Any]) -> None:
    """Computing such a model without its switch would give fluent text of another model."""
    config = replace(FAMILIES["llama"], **switch)
    name = list(switch)[-1]
    assert decode_path(tiny.build(config, torch.float32).eval()) == f"PyTorch (the model's {name} is {switch[name]})"


def test_widths_and_rows_that_are_not_served() -> None:
    assert decode_path(built(FAMILIES["llama"], "fp32"), MAX_ROWS + 1) == "PyTorch (17 rows, more than 16)"
    assert "no multiple of 16" in decode_path(tiny.build(tiny.LLAMA, torch.float32).eval())
    model = built(ODD, "fp32")
    assert "no multiple of 32" in decode_path(built(ODD, "fp32+nf4"))
    assert decode_path(CausalLM(ODD).to("meta").eval()) == "PyTorch (the model is on meta)"
    with torch.autocast("cpu"):
        assert decode_path(model) == "PyTorch (autocast is on)"
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hook" in decode_path(model)
    finally:
        hook.remove()


def test_a_full_cache_is_an_error() -> None:
    model = built(FAMILIES["llama"], "fp32")
    with torch.inference_mode():
        cache = read_prompts(model, [[1, 2], [3]], 1)[0]
        decoder = NativeDecoder(model, cache)
        decoder.logits(torch.tensor([1, 2]), cache)
        with pytest.raises(ValueError, match="holds 3 tokens; 4"):
            decoder.logits(torch.tensor([1, 2]), cache)
        with pytest.raises(Unsupported, match="another shape"):
            decoder.logits(torch.tensor([1]), cache)
        with pytest.raises(Unsupported, match="another shape"):
            decoder.logits(torch.tensor([1]), KVCache(model.config, 1, 4, model.dtype))
        with pytest.raises(Unsupported, match="17 rows"):
            decoder.logits(torch.zeros(17, dtype=torch.int64), cache)


def test_without_a_compiler_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    monkeypatch.setattr(cpu_build, "load", lambda: cpu_build.Native(None, "no C++ compiler found"))
    native_decoder._no_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
            found = generate(built(FAMILIES["llama"], "fp32"), PROMPTS, max_new_tokens=3, eos_ids=())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_path(built(FAMILIES["llama"], "fp32")) == "PyTorch (no C++ compiler found)"
    finally:
        native_decoder._no_library.cache_clear()
    monkeypatch.undo()
    assert generate(built(FAMILIES["llama"], "fp32"), PROMPTS, max_new_tokens=3, eos_ids=()) == found


# ---- other instructions, and a compiler that looks for faults ------------------------------------------------------------


OTHERS = ("attention", "cpu_adapter", "cpu_elementwise", "cpu_nf4", "fast_decode", "formats_gguf", "compressed")
OTHERS += ("twelve_bit", "gguf_copy")


def run_again(folder: Path, options: str, environment: dict[str, str], tiles: bool = False) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "MINISFT_CACHE": str(folder), **environment}
    compiler = environment.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    environment["CXX"] = f"{compiler} {options}"
    chosen = "family or lengths or same_bits or full_cache or rms_norm or swiglu or rotate or few_rows or any_bytes"
    chosen += " or values_and_gradients or large_scores or common_beginning or past_is or blocks_of_queries or rounded_weights"
    chosen += " or thin_products or weights_themselves or any_words or every_number or row_holds or decoded_weights"
    names = ["native_decode", *OTHERS]
    if tiles:
        chosen += " or tiles or for_any_threads or always_found"
        names.append("cpu_split")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]
    return run.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", ["-DNF4_PORTABLE", "-DNF4_PORTABLE -DLANES=16", "-DNF4_AVX2"])
def test_with_other_instructions(options: str, tmp_path: Path) -> None:
    assert " passed" in run_again(tmp_path, options, {})


@pytest.mark.exhaustive
def test_with_sanitizers(tmp_path: Path) -> None:
    """Reads and writes outside of memory, and undefined behaviour, end the process; loads and stores of tiles are not seen."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs GCC's sanitizers: no g++")
    asan, ubsan = (_library_of(compiler, f"lib{name}.so") for name in ("asan", "ubsan"))
    script = tmp_path / "compiler"  # without optimization this takes a minute less
    script.write_text(SANITIZED.format(compiler=compiler, libraries=f"{asan} {ubsan}"))
    script.chmod(0o755)
    environment = {"CXX": str(script), "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "MINISFT_HYPOTHESIS": "fast"}
    assert " passed" in run_again(tmp_path / "cache", "", environment, tiles=cpu_nf4.tile_floats() > 0)


SANITIZED = """#!/bin/sh
unset LD_PRELOAD
for argument; do
    shift
    test "$argument" = -O3 && argument=-O1
    set -- "$@" "$argument"
done
exec {compiler} "$@" -fsanitize=address,undefined -fno-sanitize-recover=all -g {libraries}
"""


def _library_of(compiler: str, name: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs GCC's {name}")
    return path
