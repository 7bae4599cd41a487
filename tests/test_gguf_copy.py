"""Weights of a GGUF file in its own bits: every type against the decoded weights, files that change, what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_compressed import logits_of, same_bits
from test_fast_decode import needs_native
from test_formats_gguf import MODELS, TYPE, write
from test_formats_gguf import tiny as gguf_model
from torch import Tensor

import minisft
from minisft.config import LoRAConfig, QuantConfig
from minisft.evaluation import compressed
from minisft.evaluation.compressed import decode_compressed_, decode_compressed_if_memory_allows_, free_compressed_
from minisft.evaluation.fast_decode import dense_weights
from minisft.formats.gguf_file import load_gguf
from minisft.formats.gguf_header import read_gguf
from minisft.kernels import cpu_gguf, cpu_nf4, exact_copy, gguf_copy
from minisft.kernels.cpu_gguf import BLOCKS
from minisft.kernels.eight_bit import EightBitWeight
from minisft.kernels.exact_copy import Source, exact_copy_of, max_copy_bytes, remember_source
from minisft.kernels.gguf_copy import BITS, FourBitWeight, from_blocks
from minisft.merge_weights import merge_
from minisft.model import CausalLM
from minisft.native.decoder import decode_path
from minisft.surgery import apply_lora_, lora_modules

pytestmark = needs_native
NUM_LINEARS = 15
TILED, MIN_TILED_8 = ("Q5_0", "Q8_0"), 10  # blocks of 32 in 8 bits are multiplied by tiles from so many rows on
SCALES = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}  # where a block has fp16; else at 0
WIDE, NARROW = (256, 768, 32), (64, 96, 12)  # hidden and intermediate size, of a head


@pytest.fixture(autouse=True)
def whatever_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_copy, "unpacks_fast", lambda: True)


def random_blocks(type_name: str, out: int, features: int, seed: int) -> Tensor:
    """Any codes and inner scales; the scales in fp16 are small, and one of 9 is negative."""
    draw = torch.Generator().manual_seed(seed)
    items, size = BLOCKS[type_name]
    blocks = torch.randint(0, 256, (out, features // items, size), dtype=torch.uint8, generator=draw)
    for at in SCALES.get(type_name, [0]):
        scale = torch.rand(out, features // items, generator=draw).mul_(0.01).half()
        scale[::3, ::3] *= -1
        blocks[:, :, at : at + 2] = scale[..., None].view(torch.uint8)
    return blocks.flatten(1)


def decoded(type_name: str, blocks: Tensor) -> Tensor:
    items, size = BLOCKS[type_name]
    numbers = torch.empty(len(blocks), blocks.shape[1] // size * items)
    cpu_gguf.decode(type_name, blocks.flatten(), numbers.flatten())
    return numbers


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("type_name", "sizes"),
    [(name, sizes) for name, (items, _) in BLOCKS.items() for sizes in (WIDE, NARROW) if not sizes[0] % items],
)
def test_a_step_has_the_bits_of_the_decoded_weights(
    type_name: str, sizes: tuple[int, int, int], adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_copy, "AT_ONCE", 3000)  # some rows
    hidden, intermediate, head_dim = sizes
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_heads": 8, "num_kv_heads": 2, "head_dim": head_dim}
    model = tiny.build(replace(tiny.LLAMA, **shape), torch.float32).eval().requires_grad_(False)
    for weight in dense_weights(model):
        blocks = random_blocks(type_name, *weight.shape, weight.numel())
        weight.copy_(decoded(type_name, blocks))
        remember_source(weight, Source(type_name, lambda blocks=blocks: blocks))
    if adapted:
        apply_lora_(model, LoRAConfig(rank=3))
        for layer in lora_modules(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        model.eval().requires_grad_(False)
    bits = BITS.get(type_name, 0)
    kind = {0: Tensor, 5: FourBitWeight, 6: FourBitWeight}.get(bits, EightBitWeight)
    for weight in dense_weights(model):
        copy = exact_copy_of(weight)
        assert isinstance(copy, kind)
        assert max_copy_bytes(weight) == bits * weight.numel() / 8
        assert copy is weight or (copy.shape, copy.nbytes) == (weight.shape, max_copy_bytes(weight))
    for count in (1, 2, 5, 8, 9, 16):
        found, wanted = (logits_of(model, count, packed) for packed in (True, False))
        for ours, theirs in zip(found, wanted, strict=True):
            assert theirs.isfinite().all()
            tiny.assert_close(ours, theirs, 1e-5)
            if count < MIN_TILED_8 or type_name not in TILED or not cpu_nf4.tile_floats():
                assert same_bits(ours, theirs)


@pytest.mark.parametrize("type_name", BITS)
def test_one_other_bit_and_there_is_no_copy(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(type_name, 5, 512, 1)
    weight = decoded(type_name, blocks)
    assert from_blocks(type_name, blocks, weight) is not None
    assert from_blocks(type_name, blocks, weight[:4]) is None
    assert from_blocks(type_name, blocks, weight[:, :256].contiguous()) is None
    weight.view(torch.int32)[4, 511] ^= 1
    assert from_blocks(type_name, blocks, weight) is None
    weight.view(torch.int32)[4, 511] ^= 1
    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    assert from_blocks(type_name, blocks, weight) is None


def loaded(path: Path, dtype: torch.dtype = torch.float32, quant: QuantConfig | None = None) -> CausalLM:
    return load_gguf(read_gguf(path), dtype, torch.device("cpu"), quant).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "llama-tied-odd-heads", "qwen2"])
@pytest.mark.parametrize("stored", [TYPE.Q4_1, TYPE.Q8_0])
def test_a_loaded_model_reads_its_own_blocks(name: str, stored: TYPE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q and k that llama.cpp has reordered among them."""
    shape = MODELS[name] if MODELS[name].head_dim == 16 else replace(MODELS[name], num_heads=16, head_dim=10)
    write(gguf_model(shape), tmp_path / "m.gguf", stored)
    monkeypatch.chdir(tmp_path)
    model = loaded(Path("m.gguf"))
    monkeypatch.chdir("/")  # the file is found all the same
    plain = logits_of(model, 2, False)
    found = decode_compressed_(model)
    weights = list(dense_weights(model))
    assert found.num_weights == NUM_LINEARS
    assert found.num_bytes == sum(map(max_copy_bytes, weights)) == sum(w.numel() for w in weights) * BITS[stored.name] // 8
    assert all(map(same_bits, logits_of(model, 2, True), plain))
    assert decode_path(model).endswith(f"weights of {NUM_LINEARS} linears read compressed")


def test_a_weight_that_has_changed_is_read_as_it_is(tmp_path: Path) -> None:
    write(gguf_model(MODELS["llama"]), tmp_path / "m.gguf", TYPE.Q8_0)
    model = loaded(tmp_path / "m.gguf")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[63, 95] += 0.5
    assert decode_compressed_(model).num_weights == NUM_LINEARS - 1
    assert exact_copy_of(weight) is weight
    apply_lora_(model, LoRAConfig(rank=2))
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.eval()
    assert decode_compressed_(model).num_weights == NUM_LINEARS - 1  # beside an adapter they are the file's
    merge_(model)
    free_compressed_(model)
    assert decode_compressed_(model).num_weights == 1  # the head


@pytest.mark.parametrize("what", ["gone", "shorter", "other numbers"])
def test_a_file_that_has_changed_is_not_believed(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(gguf_model(MODELS["llama"]), path, TYPE.Q4_1)
    model, data = loaded(path), bytearray(path.read_bytes())
    plain = logits_of(model, 2, False)
    info = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    path.unlink()
    if what == "shorter":
        path.write_bytes(data[: info.begin])
    elif what == "other numbers":
        data[info.begin + info.num_bytes - 1] ^= 1
        path.write_bytes(data)
    count = decode_compressed_(model).num_weights
    assert count == NUM_LINEARS - 1 if what == "other numbers" else count < NUM_LINEARS - 1
    assert exact_copy_of(model.model.layers[1].mlp.down_proj.weight) is model.model.layers[1].mlp.down_proj.weight
    assert all(map(same_bits, logits_of(model, 2, True), plain))


def test_what_is_not_read_from_the_file(tmp_path: Path) -> None:
    """Weights in bf16 are rounded ones, and NF4 has 4 bits already; but beside it the head is dense."""
    write(gguf_model(MODELS["llama"]), tmp_path / "m.gguf", TYPE.Q8_0)
    asked: list[object] = []
    for half in (loaded(tmp_path / "m.gguf", torch.bfloat16), loaded(tmp_path / "m.gguf").bfloat16()):
        weight = half.lm_head.weight
        if weight in exact_copy._sources:  # the second one was loaded in fp32
            remember_source(weight, Source("Q8_0", lambda: asked.append(1)))
        assert not isinstance(exact_copy_of(weight), EightBitWeight)
    assert weight in exact_copy._sources
    assert asked == []
    packed = loaded(tmp_path / "m.gguf", quant=QuantConfig())
    assert decode_compressed_(packed).num_weights == 1
    assert isinstance(exact_copy_of(packed.lm_head.weight), EightBitWeight)


def test_the_limit_of_memory_counts_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gguf_model(MODELS["llama"]), tmp_path / "m.gguf", TYPE.Q4_1)
    model = loaded(tmp_path / "m.gguf")
    needed = sum(w.numel() for w in dense_weights(model)) * BITS["Q4_1"] // 8
    for free in (2 * needed - 1, 2 * needed):
        monkeypatch.setattr(compressed, "available_bytes", lambda device, free=free: free)
        assert decode_compressed_if_memory_allows_([model], lambda _: None) == (free == 2 * needed)


def test_portable_code_does_not_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(gguf_model(MODELS["llama"]), tmp_path / "m.gguf", TYPE.Q4_1)
    model = loaded(tmp_path / "m.gguf")
    monkeypatch.setattr(exact_copy, "unpacks_fast", lambda: False)
    assert decode_compressed_(model).num_weights == 0
    assert not any(map(max_copy_bytes, dense_weights(model)))


@pytest.mark.smollm2
def test_the_pretrained_model(smollm2_path: Path) -> None:
    model, _ = minisft.load_model(str(smollm2_path), dtype=torch.float32)
    model.eval().requires_grad_(False)
    found = decode_compressed_(model)
    assert found.num_weights == 211
    assert found.num_bytes < 1.15 * smollm2_path.stat().st_size
    for count in (1, 9):
        assert all(map(same_bits, *(logits_of(model, count, packed) for packed in (True, False))))
