"""Weights read from exact copies in 12 or 16 bits: steps against those of the weights themselves, changes, the command line."""

from __future__ import annotations

import functools
import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import test_fast_decode
import tiny
import tiny_folder
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fast_decode import CONFIG, PROMPTS, UNTIED, needs_native
from test_twelve_bit import of_words as of_16_bits
from test_twelve_bit import unpacked
from torch import Tensor, nn

import minisft
from minisft.cli.commands_judging import arena_command
from minisft.cli.flags import parse
from minisft.cli.main import main
from minisft.config import LoRAConfig, ModelConfig
from minisft.evaluation import compressed
from minisft.evaluation.compressed import (
    CompressedWeights,
    decode_compressed_,
    decode_compressed_if_memory_allows_,
    free_compressed_,
)
from minisft.evaluation.fast_decode import dense_weights, exact_decode_, fast_decode_
from minisft.formats import load_adapter_, save_adapter, save_model
from minisft.generation import ChatCache, Sampling, _scored_tokens, generate, read_prompts
from minisft.judging import arena
from minisft.kernels import cpu_nf4, exact_copy, twelve_bit, weight_copies
from minisft.kernels.cpu_decode import MAX_ROWS
from minisft.kernels.eight_bit import is_made
from minisft.kernels.exact_copy import exact_bf16, exact_copy_of, max_copy_bytes
from minisft.kernels.twelve_bit import BLOCK, BLOCK_BYTES, TwelveBitWeight
from minisft.merge_weights import merge_, unmerge_
from minisft.model import CausalLM
from minisft.native import decoder as native_decoder
from minisft.native.decoder import NativeDecoder, decode_path, in_compressed, next_logits_of
from minisft.optim import MasterAdamW
from minisft.serving import server
from minisft.serving.lanes import load_lanes, sharing_copy
from minisft.surgery import apply_lora_, lora_modules

UNPACKS_FAST = exact_copy.unpacks_fast
NUM_LINEARS = 15  # seven in each of two layers, and the head
MIN_TILED = {16: 6, 12: 9}  # rows from which on tiles multiply, by bits
WHOLE = replace(CONFIG, hidden_size=128, intermediate_size=192, head_dim=16, tie_word_embeddings=False)  # all in 12 bits
made = functools.partial(test_fast_decode.made, numbers=torch.bfloat16)  # as models are published


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is equal to the same NaN, and 0 not to -0."""
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture(autouse=True)
def whatever_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_copy, "unpacks_fast", lambda: True)


def numbers_of(weight: Tensor) -> Tensor:
    """Those of its copy, in bf16."""
    copy = exact_copy_of(weight)
    return of_16_bits(unpacked(copy), torch.bfloat16) if isinstance(copy, TwelveBitWeight) else copy


def zero_copy_(weight: Tensor) -> None:
    copy = exact_copy_of(weight)
    for tensor in (copy.packed, copy.base, copy.apart) if isinstance(copy, TwelveBitWeight) else (copy,):
        tensor.zero_()


def copied_bytes(weights: list[Tensor]) -> int:
    """Of fp32 weights of random numbers: 12 bits and what a row and a block apart take, else 16."""
    total = 0
    for weight in weights:
        out, features = weight.shape
        if features % BLOCK:
            total += 2 * weight.numel()
        else:
            apart = len(exact_copy_of(weight).apart)
            total += out * (features // BLOCK) * BLOCK_BYTES + out + 4 * (out + 1) + 8 * (apart + 1) + 2 * BLOCK * apart
    return total


# ---- a copy --------------------------------------------------------------------------------------------------------------

# fp32 words: 1, -1, largest and smallest bf16 numbers, 0, -0, subnormal, infinities, NaN quiet and signalling with payloads.
SPECIAL = [
    0x3F800000, 0xBF800000, 0x7F7F0000, 0x00800000, 0x00000000, 0x80000000, 0x00010000, 0x807F0000, 0x7F800000, 0xFF800000,
    0x7FC00000, 0xFFC00000, 0x7F810000, 0xFFAB0000, 0x7FFF0000,
]  # fmt: skip


def of_words(words: list[int]) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_special_numbers_keep_their_bits() -> None:
    found = exact_copy_of(of_words(SPECIAL).view(3, 5))
    assert (found.dtype, found.shape) == (torch.bfloat16, (3, 5))
    assert [word & 0xFFFF for word in found.view(torch.int16).flatten().tolist()] == [word >> 16 for word in SPECIAL]


halves = st.one_of(st.just(0), st.integers(0, 2**16 - 1), st.sampled_from([1, 0x8000]))


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), halves), min_size=1, max_size=12), st.integers(1, 5))
def test_a_copy_is_exact_or_there_is_none(numbers: list[tuple[int, int]], at_once: int) -> None:
    weight = of_words([upper << 16 | lower for upper, lower in numbers])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_copy, "AT_ONCE", at_once)
        found = exact_bf16(weight)
    if any(lower for _, lower in numbers):
        assert found is None
    else:
        assert found is not None
        assert [word & 0xFFFF for word in found.view(torch.int16).tolist()] == [upper for upper, _ in numbers]


def test_what_cannot_be_copied_is_read_as_it_is() -> None:
    class Other(Tensor):
        pass

    plain = torch.ones(4, 6)
    assert exact_copy_of(plain) is not plain
    others = [
        plain.bfloat16(),
        plain.double(),
        torch.ones(6, 4).T,
        torch.ones(4, 6, device="meta"),
        torch.ones(4, 6).as_subclass(Other),
    ]
    for weight in [*others, torch.full((4, 6), 1.001)]:
        assert exact_copy_of(weight) is weight


@pytest.mark.parametrize(("instructions", "bits"), [("AVX-512", 12), ("AVX2", 12), ("portable", 16)])
@needs_native
def test_portable_code_reads_no_fewer_than_16_bits(instructions: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_copy, "unpacks_fast", UNPACKS_FAST)
    monkeypatch.setattr(cpu_nf4, "instructions", lambda: instructions)
    weight = torch.ones(64, 64)
    assert isinstance(exact_copy_of(weight), TwelveBitWeight) == (bits == 12)
    assert max_copy_bytes(weight) == 2 * 64 * 64
    half = weight.bfloat16()
    assert (exact_copy_of(half) is half) == (max_copy_bytes(half) == 0) == (bits == 16)


@needs_native
def test_bf16_of_any_range_is_read_as_it_is() -> None:
    weight = torch.ones(4, 64).bfloat16()
    assert exact_copy_of(weight) is not weight
    weight[2, 7] = 1e-9  # one block of four
    assert exact_copy_of(weight) is weight
    assert exact_copy_of(weight.float()).dtype == torch.bfloat16


@needs_native
def test_tiles_of_12_bits_add_as_those_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(WHOLE)
    found = logits_of(model, 9, True)
    free_compressed_(model)
    monkeypatch.setattr(exact_copy, "pack_12_bits", lambda weight: None)
    assert all(map(same_bits, found, logits_of(model, 9, True)))
    assert exact_copy_of(model.lm_head.weight).dtype == torch.bfloat16


def test_a_weight_that_has_no_copy_is_not_read_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, asked = torch.ones(3, 5), []
    weight[2, 4] = 1.001
    monkeypatch.setattr(exact_copy._copies, "_make", lambda w: asked.append(w) or exact_bf16(w))
    assert exact_copy_of(weight) is exact_copy_of(weight) is weight
    assert len(asked) == 1
    weight[2, 4] = 1
    assert torch.equal(exact_copy_of(weight), weight.bfloat16())
    assert len(asked) == 2


def test_a_weight_made_in_inference_mode() -> None:
    """It counts no changes: the numbers alone say that it has changed."""
    with torch.inference_mode():
        weight = torch.ones(4, 6)
    first = exact_copy_of(weight)
    assert first.dtype == torch.bfloat16
    assert exact_copy_of(weight) is first
    with torch.inference_mode():
        weight.mul_(-2)
    assert torch.equal(exact_copy_of(weight), weight.bfloat16())


def test_the_old_copy_is_freed_before_the_new_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen = torch.ones(4, 6), []
    old = weakref.ref(exact_copy_of(weight))
    monkeypatch.setattr(exact_copy._copies, "_make", lambda w: seen.append(old()) or exact_bf16(w))
    weight.mul_(2)
    assert exact_copy_of(weight).dtype == torch.bfloat16
    assert seen == [None]


@pytest.mark.parametrize("shape", [(64, 64), (256, 512), (512, 256), (1024, 64)])
def test_the_numbers_that_are_compared_lie_in_many_columns(shape: tuple[int, int]) -> None:
    """Of sizes that are powers of two as well: what PyTorch does not count is seen outside of the first column."""
    weight = torch.ones(shape)
    assert weight.numel() > weight_copies.NUM_SEEN
    assert numbers_of(weight)[0, 1] == 1
    weight.data[:, 1:] = 2
    assert torch.equal(numbers_of(weight), weight.bfloat16())


# ---- steps ---------------------------------------------------------------------------------------------------------------

CASES = [(CONFIG, "fp32"), (CONFIG, "fp32+nf4"), (UNTIED, "fp32"), (replace(CONFIG, qk_norm=True, sliding_window=3), "fp32")]
CASES += [(WHOLE, "fp32"), (WHOLE, "bf16"), (WHOLE, "bf16+nf4")]


def logits_of(model: CausalLM, count: int, packed: bool, steps: int = 2) -> list[Tensor]:
    """Of native steps."""
    with torch.inference_mode():
        cache = read_prompts(model, [[1, 2, n % 7] for n in range(count)], steps)[0]
        decoder = NativeDecoder(model, cache, compressed=packed)
        decoder._dtype = torch.float32  # as they are summed
        return [decoder.logits((torch.arange(count) + turn) % tiny.VOCAB, cache) for turn in range(steps)]


@needs_native
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_a_step_has_the_bits_of_the_weights_themselves(config: ModelConfig, kind: str, adapted: bool, monkeypatch) -> None:
    """By vectors for any number of rows, with zeros and numbers that stand apart, and where weights are in bf16 by tiles too.

    Tiles of what is fp32, test_native_decode.py holds to the error of a sum in fp32.
    """
    model = made(config, kind, adapted)
    for weight in dense_weights(model):
        weight[::5, 3], weight[1::16, 40::64] = 0, 1e-9
        weight.copy_(weight.bfloat16())
    min_tiled = MAX_ROWS + 1 if "bf16" in kind else MIN_TILED[12 if config is WHOLE else 16]
    for count in (1, 2, 3, 4, 5, 6, 8, 9, 16):
        found, wanted = (logits_of(model, count, packed) for packed in (True, False))
        for ours, theirs in zip(found, wanted, strict=True):
            if count < min_tiled or not cpu_nf4.tile_floats():
                assert same_bits(ours, theirs)
            tiny.assert_close(ours, theirs, 1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_nf4, "USE_TILES", False)
            assert all(map(same_bits, logits_of(model, count, True), logits_of(model, count, False)))


@needs_native
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_it_is_the_copies_that_are_read(config: ModelConfig, kind: str) -> None:
    """Zeros in the copies of the head, or of the layers, are what a step multiplies."""
    model = made(config, kind)
    plain = logits_of(model, 2, False)
    decode_compressed_(model)
    zero_copy_(model.lm_head.weight)
    assert not any(map(torch.any, logits_of(model, 2, True)))
    assert all(map(same_bits, logits_of(model, 2, False), plain))
    free_compressed_(model)
    layers = [weight for weight in dense_weights(model) if weight is not model.lm_head.weight]
    assert len(layers) == (0 if "nf4" in kind else NUM_LINEARS - 1)
    for weight in layers:
        zero_copy_(weight)
    with torch.inference_mode():
        x = model.model.norm(model.model.embed_tokens(torch.arange(2)))  # layers add nothing but their biases
        if layers and not config.qkv_bias:
            tiny.assert_close(logits_of(model, 2, True)[0], model.head(x).float(), 1e-5 if kind == "fp32" else 1e-2)


@needs_native
@pytest.mark.parametrize("config", [UNTIED, WHOLE], ids=["16 bits", "12 bits"])
def test_special_numbers_in_a_step(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the head with what no published model has; payloads go through the sums as they do from fp32."""
    monkeypatch.setattr(twelve_bit, "MAX_APART", 1.0)
    model = made(config)
    for row, word in enumerate(SPECIAL):
        model.lm_head.weight[row, row] = of_words([word])[0]
    model.lm_head.weight[20] = of_words([0x00010000])[0]
    copy = exact_copy_of(model.lm_head.weight)
    assert len(copy.apart) > 5 if config is WHOLE else copy.dtype == torch.bfloat16
    for count in (1, 5):
        found, wanted = (logits_of(model, count, packed) for packed in (True, False))
        assert all(map(same_bits, found, wanted))
    assert 5 <= int((~found[0].isfinite()).any(0).sum()) <= len(SPECIAL)  # columns of infinities and NaN, and no others


def scores(model: CausalLM) -> Tensor:
    """One step of four rows as ``generate`` computes it."""
    with torch.inference_mode():
        cache = read_prompts(model, PROMPTS, 1)[0]
        return next_logits_of(model, cache)(torch.tensor([1, 2, 3, 4]), cache)


@torch.inference_mode()
def reads_copies(model: CausalLM) -> bool:
    """Whether a step as ``generate`` computes it reads a copy of the head: zeros in one would change the logits."""
    before, weight = scores(model), model.lm_head.weight
    if weight not in exact_copy._copies:
        return False
    zero_copy_(weight)
    changed = not same_bits(scores(model), before)
    exact_copy.forget(weight)
    return changed


@needs_native
def test_it_is_switched_on_and_off() -> None:
    model, other = made(adapted=True), made(adapted=True)
    assert not reads_copies(model)
    before = scores(model)
    found = decode_compressed_(model)
    assert found == CompressedWeights(NUM_LINEARS, copied_bytes(list(dense_weights(model))))
    assert same_bits(scores(model), before)
    assert reads_copies(model)
    assert not reads_copies(other)  # another model of the same numbers is not touched
    free_compressed_(model)
    assert not any(weight in exact_copy._copies for weight in dense_weights(model))
    assert not reads_copies(model)
    assert same_bits(scores(model), before)


@needs_native
def test_8_bits_win() -> None:
    model = made()
    fast_decode_(model, PROMPTS)
    rounded = scores(model)
    assert decode_compressed_(model) == CompressedWeights(0, 0)
    assert same_bits(scores(model), rounded)
    assert "compressed" not in decode_path(model)
    exact_decode_(model)
    assert reads_copies(model)
    fast_decode_(model, PROMPTS)
    assert not any(weight in exact_copy._copies for weight in dense_weights(model))  # nothing would read them
    assert same_bits(scores(model), rounded)


@needs_native
@pytest.mark.parametrize(("kind", "linears"), [("fp32", NUM_LINEARS), ("fp32+nf4", 1), ("bf16", 11), ("bf16+nf4", 1)])
def test_what_is_copied_of_which_model(kind: str, linears: int) -> None:
    """Beside 4-bit layers the head; of bf16 what is a multiple of 64, so not two of a layer. ``decode_path`` says it."""
    model = made(kind=kind)
    plain = decode_path(model)
    assert plain.startswith("native code")
    assert "compressed" not in plain
    found = decode_compressed_(model)
    copied = [w for w in dense_weights(model) if kind == "fp32" or w.shape[1] % BLOCK == 0]
    assert found == CompressedWeights(linears, copied_bytes(copied))
    assert decode_path(model) == f"{plain}, weights of {linears} linears read compressed"


@needs_native
def test_one_other_number_keeps_its_weight_alone_in_fp32() -> None:
    model = made()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[95, 63] = 1 + 2.0**-23
    wanted, others = scores(model), [w for w in dense_weights(model) if w is not weight]
    assert decode_compressed_(model) == CompressedWeights(NUM_LINEARS - 1, copied_bytes(others))
    assert same_bits(scores(model), wanted)
    assert exact_copy_of(weight) is weight
    assert decode_path(model).endswith(f"of {NUM_LINEARS - 1} linears read compressed")


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        CausalLM.double,
        CausalLM.half,
        lambda m: setattr(m, "config", replace(CONFIG, activation="gelu")),
        lambda m: setattr(m.model.norm, "eps", 1.0),  # found after all linears
    ],
)
def test_where_native_code_does_not_decode_nothing_is_copied(change) -> None:
    """Copies of before are freed, too."""
    model = made()
    assert decode_compressed_(model).num_weights == NUM_LINEARS
    change(model)
    assert decode_compressed_(model) == CompressedWeights(0, 0)
    assert not any(weight in exact_copy._copies for weight in dense_weights(model))
    assert len(generate(model, PROMPTS, max_new_tokens=2, eos_ids=())) == len(PROMPTS)


@needs_native
def test_for_too_many_rows_nothing_is_copied() -> None:
    model = made()
    in_compressed.add(model)
    assert decode_path(model, MAX_ROWS + 1).startswith("PyTorch")
    assert not any(weight in exact_copy._copies for weight in dense_weights(model))


@needs_native
def test_a_model_in_training_mode_stays_in_it() -> None:
    model = made().train()
    assert decode_compressed_(model).num_weights == NUM_LINEARS
    assert all(module.training for module in model.modules())


# ---- changes -------------------------------------------------------------------------------------------------------------


def up(model: CausalLM) -> nn.Linear:
    layer = model.model.layers[1].mlp.up_proj
    return getattr(layer, "base", layer)


def scale_in_place_(model: CausalLM) -> None:
    up(model).weight.mul_(-4)


def replace_data_(model: CausalLM) -> None:
    weight = up(model).weight
    weight.data = -4 * weight.data


def replace_parameter_(model: CausalLM) -> None:
    up(model).weight = nn.Parameter(-4 * up(model).weight, requires_grad=False)


def change_behind_its_back_(model: CausalLM) -> None:
    """Not counted by PyTorch."""
    up(model).weight.data.mul_(-4)


def change_to_other_numbers_(model: CausalLM) -> None:
    up(model).weight.mul_(-1.7)


def train_(model: CausalLM) -> None:
    """The fused AdamW of PyTorch writes to fp32 parameters without counting it."""
    for parameter in model.parameters():
        parameter.requires_grad_().grad = torch.ones_like(parameter)
    MasterAdamW(dict(model.named_parameters()), betas=(0.9, 0.999), weight_decay=0.0).step(0.05)


@needs_native
@pytest.mark.parametrize(
    ("change", "adapted"),
    [
        (scale_in_place_, False), (replace_data_, False), (replace_parameter_, False), (change_behind_its_back_, False),
        (change_to_other_numbers_, True), (train_, False), (merge_, True),
    ],
)  # fmt: skip
def test_changed_weights_are_looked_at_again(change, adapted: bool) -> None:
    model = made(adapted=adapted)
    decode_compressed_(model)
    before, path = scores(model), decode_path(model)
    change(model)
    after = scores(model)
    assert not same_bits(after, before)
    assert change is merge_ or (after - before).abs().max() > 0.01
    copies = {merge_: 1, train_: 0, change_to_other_numbers_: NUM_LINEARS - 1}.get(
        change, NUM_LINEARS
    )  # merge_ leaves the head
    shown = decode_path(model).removeprefix(path.split(",")[0])
    assert shown == (f", weights of {copies} linears read compressed" if copies else "")
    free_compressed_(model)
    assert same_bits(scores(model), after)


@needs_native
def test_a_change_of_one_number_is_seen() -> None:
    """Of a large weight, in which few numbers are compared: PyTorch counts it."""
    model = made(replace(CONFIG, intermediate_size=960))
    decode_compressed_(model)
    before = scores(model)
    model.model.layers[1].mlp.down_proj.weight[3, 7].add_(2.5)
    assert not same_bits(scores(model), before)


# ---- memory --------------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_models_that_share_weights_share_the_copies_and_free_them(config: ModelConfig) -> None:
    gc.collect()
    kept = len(exact_copy._copies)
    base = made(config)
    adapted = sharing_copy(base)
    apply_lora_(adapted, LoRAConfig(rank=2))
    adapted.eval()
    found = decode_compressed_(base)
    assert len(exact_copy._copies) == kept + NUM_LINEARS
    assert decode_compressed_(adapted) == found
    assert len(exact_copy._copies) == kept + NUM_LINEARS
    q = base.model.layers[0].self_attn.q_proj
    assert exact_copy_of(q.weight) is exact_copy_of(adapted.model.layers[0].self_attn.q_proj.base.weight)
    assert (exact_copy_of(base.lm_head.weight) is exact_copy_of(base.model.embed_tokens.weight)) == (config is CONFIG)
    exact_copy.forget(base.model.embed_tokens.weight)
    del base, adapted, q
    gc.collect()
    assert len(exact_copy._copies) == kept


@needs_native
@pytest.mark.parametrize("merged", [False, True])
def test_the_bases_of_a_merged_model_are_freed_with_it(merged: bool) -> None:
    """``merge_`` keeps them for ``unmerge_``."""
    gc.collect()
    kept, model = len(exact_copy._copies), made(adapted=True)
    decode_compressed_(model)
    layers = [layer.base.weight for layer in lora_modules(model).values()]
    merge_(model)
    if not merged:
        unmerge_(model)
    free_compressed_(model)
    assert len(exact_copy._copies) == kept
    if merged:
        unmerge_(model)
    fast_decode_(model, PROMPTS)
    assert all(map(is_made, layers))
    merge_(model)
    exact_decode_(model)
    assert not any(map(is_made, layers))


@needs_native
def test_the_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the copies of all weights, a shared one counted once; other models than ours need nothing."""
    base, said = made(kind="fp32+nf4"), []
    lanes = [base, sharing_copy(base)]
    needed = 2 * tiny.VOCAB * 64  # the head alone is dense
    for free, allowed in ((2 * needed - 1, False), (2 * needed, True), (None, True)):
        monkeypatch.setattr(compressed, "available_bytes", lambda device, free=free: free)
        assert decode_compressed_if_memory_allows_(lanes, said.append) is allowed
        assert [model in in_compressed for model in lanes] == [allowed, allowed]
        for model in lanes:
            free_compressed_(model)
    assert len(said) == 1
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 0)
    odd = replace(UNTIED, num_heads=4)  # no size is a multiple of 64
    half, other, foreign = made(odd, kind="bf16"), tiny.build(CONFIG, torch.float32), made()
    foreign.__class__ = type("Foreign", (CausalLM,), {})
    assert decode_compressed_if_memory_allows_([half, other, foreign], said.append)  # what has no copy needs no memory
    assert foreign not in in_compressed
    for model in (made(), made(kind="bf16")):
        assert not decode_compressed_if_memory_allows_([model], said.append)
    assert len(said) == 3


@needs_native
def test_the_limit_of_memory_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 0)
    decode_compressed_if_memory_allows_([made(replace(CONFIG, intermediate_size=48000))], said.append)
    where = "are made where twice that is free; 0.00 GB are"
    assert said == [f"weights are read as they are: compressed copies would take up to 0.04 GB and {where}"]


@needs_native
def test_nothing_is_copied_before_it_is_needed() -> None:
    model = made()
    assert decode_compressed_if_memory_allows_([model], print)
    assert not any(weight in exact_copy._copies for weight in dense_weights(model))
    assert reads_copies(model)


# ---- what is kept of what was written ------------------------------------------------------------------------------------


@needs_native
def test_the_next_turn_of_a_chat_computes_what_is_new() -> None:
    """Unlike 8 bits: keys and values of what was written are those of the weights themselves, so they are kept."""
    model, kept = made(), ChatCache()
    decode_compressed_(model)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    tokens = [token for _, token, *_ in _scored_tokens(model, {0: prompt}, 8, (), Sampling(), scored=False, kept=kept)]
    assert kept.ids == [*prompt, *tokens[:-1]]  # the last one was not read any more
    free_compressed_(model)
    plain = ChatCache()
    assert tokens == [t for _, t, *_ in _scored_tokens(model, {0: prompt}, 8, (), Sampling(), scored=False, kept=plain)]
    length = len(kept.ids)
    assert same_bits(kept.cache.keys[..., :length, :].contiguous(), plain.cache.keys[..., :length, :].contiguous())


# ---- the command line ----------------------------------------------------------------------------------------------------

WIDE = replace(tiny_folder.CONFIG, hidden_size=64, intermediate_size=48, head_dim=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was published in bf16, and an adapter."""
    place = tmp_path_factory.mktemp("compressed")
    model, tokenizer = minisft.load_model(
        tiny_folder.write_model(place / "fp32", place / "scratch", WIDE), dtype=torch.bfloat16
    )
    save_model(model, tokenizer, place / "model")
    model, _ = minisft.load_model(place / "model")
    apply_lora_(model, LoRAConfig(rank=2))
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, place / "adapter")
    tiny_folder.write_rows(place / "rows.jsonl", 3)
    return place


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each linear that steps ask for, whether there is a copy."""
    copied: list[bool] = []

    def asked(weight: Tensor) -> TwelveBitWeight | Tensor:
        found = exact_copy_of(weight)
        copied.append(found is not weight)
        return found

    monkeypatch.setattr(native_decoder, "exact_copy_of", asked)
    return copied


@needs_native
@pytest.mark.parametrize("command", ["generate", "chat", "eval", "sweep"])
def test_commands_write_from_copies(folder: Path, command: str, read, capsys, monkeypatch, tmp_path: Path) -> None:
    words = [command, "--model", str(folder / "model"), "--max-new-tokens", "4", "--device", "cpu"]
    rows, general, out = folder / "rows.jsonl", tmp_path / "general.jsonl", tmp_path / "out"
    general.write_text('{"prompt": "a", "completion": "b", "choices": ["b", "c"]}\n', encoding="utf-8")
    more = {
        "generate": ["--prompt", "hello"], "chat": [],
        "eval": ["--data", str(rows), "--metric", "f1", "--out", str(out)],
        "sweep": ["--adapter", str(folder / "adapter"), "--data", str(rows), "--general", str(general), "--out", str(out)],
    }  # fmt: skip
    found = []
    for free in (10**12, 0):
        asked = iter(["hello", ""])
        monkeypatch.setattr("builtins.input", lambda _, asked=asked: next(asked))
        monkeypatch.setattr(compressed, "available_bytes", lambda device, free=free: free)
        assert main([*words, *more[command]]) == 0
        shutil.rmtree(out, ignore_errors=True)
        said, err = capsys.readouterr()
        assert err.count("weights are read as they are") == (free == 0)
        found.append((said, len(read), set(read)))
        read.clear()
    (text, count, copied), (plain, *off) = found
    assert (count % NUM_LINEARS, copied) == (0, {True})
    assert count > 0
    assert off == [0, set()]
    assert text == plain


@needs_native
def test_with_fast_decode_there_are_no_exact_copies(folder: Path, read, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 0)
    words = ["generate", "--model", str(folder / "model"), "--max-new-tokens", "4", "--prompt", "hello", "--fast-decode"]
    assert main(words) == 0
    assert read == []
    said = capsys.readouterr().err
    assert "8 bits" in said
    assert "read as they are" not in said


@needs_native
@pytest.mark.parametrize("together", [False, True])
def test_both_models_of_an_arena(folder: Path, together: bool, tmp_path: Path, capsys, monkeypatch) -> None:
    """Their copies are counted together: memory that is enough for one of them is not enough."""
    pytest.importorskip("starlette", reason="needs the server: pip install -e '.[serve]'")
    model, *_ = minisft.load_model(folder / "model")
    needed = sum(weight.nbytes // 2 for weight in dense_weights(model))
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 2 * (2 if together else 1) * needed)
    before, found = set(in_compressed), []

    def prepare(*_: object) -> None:
        found.append(len(set(in_compressed) - before))
        raise KeyboardInterrupt

    monkeypatch.setattr(arena, "prepare", prepare)
    names = [str(folder / "model"), f"{folder / 'model'}+{folder / 'adapter'}"]
    words = ["--prompts", str(folder / "rows.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        arena_command(parse(["arena", "--a", names[0], "--b", names[1], *words]))
    assert found == [2 if together else 0]
    assert capsys.readouterr().err.count("weights are read as they are") == (not together)


@needs_native
def test_the_base_that_a_suite_compares_with_writes_nothing(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """So it needs no copies, and says nothing of them."""
    (tmp_path / "texts.jsonl").write_text('{"text": "some text"}\n' * 3, encoding="utf-8")
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 0)
    words = ["--suite", "general", "--texts", str(tmp_path / "texts.jsonl"), "--base", str(folder / "model")]
    more = ["--model", str(folder / "model"), "--limit", "2", "--device", "cpu", "--out", str(tmp_path / "out.json")]
    assert main(["eval", *words, *more]) == 0
    assert capsys.readouterr().err.count("weights are read as they are") == 1


@needs_native
@pytest.mark.parametrize("fast", [False, True])
def test_a_server_copies_once_for_all_lanes_before_it_listens(
    folder: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    kept, seen, lanes = len(exact_copy._copies), [], []
    monkeypatch.setattr(server, "load_lanes", lambda *a, **k: lanes.append(load_lanes(*a, **k)) or lanes[0])
    monkeypatch.setattr(server, "run_server", lambda *_: seen.append(len(exact_copy._copies) - kept))
    server.serve(folder / "model", {"blue": folder / "adapter"}, device="cpu", fast_decode=fast, log=lambda _: None)
    assert seen == [0 if fast else NUM_LINEARS]
    paths = [decode_path(lane.model) for lane in lanes[0].values()]
    assert len(paths) == 2
    assert all(path.endswith(f"of {NUM_LINEARS} linears read compressed") != fast for path in paths)


@needs_native
def test_a_server_says_once_that_there_is_no_memory_for_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compressed, "available_bytes", lambda device: 0)
    monkeypatch.setattr(server, "run_server", lambda *_: None)
    server.serve(folder / "model", {"blue": folder / "adapter"}, device="cpu", log=said.append)
    assert [line.partition(":")[0] for line in said] == ["weights are read as they are"]


@needs_native
def test_python_calls_read_weights_as_they_are_unless_asked(folder: Path, read) -> None:
    model, tokenizer = minisft.load_model(folder / "model")
    load_adapter_(model, folder / "adapter")
    before = minisft.generate(model, tokenizer, "hello", max_new_tokens=4)
    assert read == []
    assert minisft.decode_compressed_(model).num_weights == NUM_LINEARS
    assert model.training
    read.clear()
    assert minisft.generate(model, tokenizer, "hello", max_new_tokens=4) == before
    assert read == [True] * NUM_LINEARS
    minisft.free_compressed_(model)
    read.clear()
    assert minisft.generate(model, tokenizer, "hello", max_new_tokens=4) == before
    assert read == []
