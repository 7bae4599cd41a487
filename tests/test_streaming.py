"""Merging from file to file: the loaded models' merge, transformers and the safetensors library are the oracles."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from test_formats_gguf import config as gguf_shape
from test_formats_gguf import tiny as random_model
from test_formats_gguf import write as write_gguf
from tiny_folder import CONFIG, write_model

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.data.tokenizer import Tokenizer
from minisft.effect import SURVIVAL_FLOOR
from minisft.formats import load_adapter_, load_model, save_adapter, save_model, save_quantized
from minisft.formats.gguf_file import load_gguf
from minisft.formats.gguf_header import read_gguf
from minisft.formats.hf import INDEX, SINGLE
from minisft.formats.lazy_weights import In4Bits, open_model
from minisft.formats.shard_writer import TensorSpec, write_shards
from minisft.formats.source import resolve
from minisft.merge_weights import merge
from minisft.merging import base_and_adapter
from minisft.merging.base_and_adapter import MARK, row_ranges
from minisft.merging.streaming import merge_folder
from minisft.model import CausalLM
from minisft.nf4 import dequantize, quantize
from minisft.surgery import apply_lora_, lora_modules

pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 5, 9, 3, 60, 2, 7, 8, 8, 30, 31, 0]])
NF4 = QuantConfig()
ODD = QuantConfig("fp4", 128, double_quant=False)
# Wide enough that layers are cut into several pieces once PIECE is made small, and with sides that are no multiples of 16.
WIDE = ModelConfig(
    model_type="llama", vocab_size=258, hidden_size=36, intermediate_size=75, num_layers=2, num_heads=3, num_kv_heads=1,
    head_dim=14, rms_norm_eps=1e-5, max_position_embeddings=512, tie_word_embeddings=True, qkv_bias=True, o_bias=True,
    mlp_bias=True,
)  # fmt: skip
KINDS = ("fp32", "bf16", "nf4", "fp4-on-bf16", "4-bit-folder")
ALL = LoRAConfig(rank=3, alpha=7.0)
SMALL_PIECES = 2048


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_and_adapter, "PIECE", SMALL_PIECES)


def train_(model: CausalLM, size: float = 0.05) -> None:
    """As if trained for a while: both factors random."""
    draw = torch.Generator().manual_seed(3)
    for layer in lora_modules(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.randn(factor.shape, generator=draw) * size


def base_of(kind: str, folder: Path, config: ModelConfig = WIDE) -> tuple[Path, QuantConfig | None]:
    """A base of each kind, and how training holds it."""
    dense = write_model(folder / "dense", folder / "scratch", config)
    if kind in ("fp32", "nf4"):
        return dense, NF4 if kind == "nf4" else None
    model, tokenizer = load_model(dense, quant=NF4 if kind == "4-bit-folder" else None)
    write = save_quantized if kind == "4-bit-folder" else save_model
    write(model, tokenizer, folder / kind, torch.bfloat16)
    return folder / kind, ODD if kind == "fp4-on-bf16" else None


def trained(folder: Path, base: Path, quant: QuantConfig | None, lora: LoRAConfig = ALL, size: float = 0.05) -> Path:
    """An adapter over ``base``, saved."""
    model, _ = load_model(base, quant=quant)
    apply_lora_(model, lora)
    train_(model, size)
    save_adapter(model, folder / "adapter", template="adapter's own: {{ messages }}")
    return folder / "adapter"


def in_memory(base: Path, adapter: Path, quant: QuantConfig | None) -> CausalLM:
    model, _ = load_model(base, quant=quant)
    load_adapter_(model, adapter)
    return model


def assert_equal_models(actual: CausalLM, expected: CausalLM) -> None:
    assert actual.config == expected.config
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert actual.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(actual.state_dict()[name], tensor), name


# ---- the merged folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_loaded_models_merge_bit_for_bit(kind: str, tmp_path: Path) -> None:
    base, quant = base_of(kind, tmp_path)
    adapter = trained(tmp_path, base, quant)
    merged = merge_folder(adapter, tmp_path / "out", dtype=torch.float32)
    expected, report = merge(in_memory(base, adapter, quant))
    loaded, _ = load_model(tmp_path / "out")
    assert_equal_models(loaded, expected)
    assert [layer.path for layer in merged.report.layers] == [layer.path for layer in report.layers]
    for layer, other in zip(merged.report.layers, report.layers, strict=True):
        assert layer.survival == pytest.approx(other.survival, rel=1e-12)
        assert layer.effect_error == pytest.approx(other.effect_error, rel=1e-9)
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(oracle(IDS).logits, loaded(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head", "q_proj"), ("embed_tokens", "lm_head"), ("down_proj",)])
def test_every_side_of_a_tied_head_in_16_bits(targets: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None, LoRAConfig(rank=2, alpha=8.0, use_rslora=True, targets=targets))
    merge_folder(adapter, tmp_path / "out", dtype=dtype)
    expected, _ = merge(in_memory(base, adapter, None), dtype=dtype)
    loaded, _ = load_model(tmp_path / "out", dtype)
    assert_equal_models(loaded, expected)
    assert loaded.config.tie_word_embeddings == (targets == ("down_proj",))


def test_onto_original_adds_to_the_weights_before_they_were_quantized(tmp_path: Path) -> None:
    base, quant = base_of("nf4", tmp_path)
    adapter = trained(tmp_path, base, quant)
    merged = merge_folder(adapter, tmp_path / "out", onto="original")
    dense = dict(load_model(base)[0].named_parameters())
    expected, report = merge(in_memory(base, adapter, quant), "original", original=lambda name: dense[name].detach())
    assert_equal_models(load_model(tmp_path / "out")[0], expected)
    shifts = [layer.base_shift for layer in report.layers]
    assert [layer.base_shift for layer in merged.report.layers] == pytest.approx(shifts)
    assert min(shifts) > 0


def test_onto_requantized_is_the_merge_back_to_4_bits(tmp_path: Path) -> None:
    base, quant = base_of("nf4", tmp_path)
    adapter = trained(tmp_path, base, quant, size=0.4)
    merge_folder(adapter, tmp_path / "out", onto="requantized", dtype=torch.float32)
    expected, _ = merge(in_memory(base, adapter, quant), "requantized")
    assert_equal_models(load_model(tmp_path / "out")[0], expected)


def test_scale_is_a_factor_on_the_update(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    merge_folder(adapter, tmp_path / "out", scale=-0.5)
    model = in_memory(base, adapter, None)
    for layer in lora_modules(model).values():
        layer.lora_B.data *= -0.5  # a power of two: no rounding
    assert_equal_models(load_model(tmp_path / "out")[0], merge(model)[0])


def test_the_dtype_is_that_of_the_base_unless_asked(tmp_path: Path) -> None:
    base, _ = base_of("bf16", tmp_path)
    adapter = trained(tmp_path, base, None, size=0.4)
    assert merge_folder(adapter, tmp_path / "out").dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / SINGLE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_all_that_belongs_to_a_model_folder_and_modes_by_umask(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    before = os.umask(0o027)
    try:
        merge_folder(adapter, tmp_path / "out")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == "adapter's own: {{ messages }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert Tokenizer.from_folder(out).encode("a b") == Tokenizer.from_folder(base).encode("a b")
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


def test_an_adapter_of_peft_that_repeats_the_embedding(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, _ = base_of("fp32", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge_folder(tmp_path / "adapter", tmp_path / "out", str(base))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")[0](IDS), wrapped.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.smollm2
def test_the_pretrained_model(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # pieces of the usual size
    model, _ = load_model(smollm2_path, quant=NF4)
    apply_lora_(model, LoRAConfig(rank=8, alpha=16.0))
    train_(model, 0.02)
    save_adapter(model, tmp_path / "adapter")
    merged = merge_folder(tmp_path / "adapter", tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    expected, _ = merge(model, dtype=torch.bfloat16)
    assert_equal_models(load_model(tmp_path / "out", torch.bfloat16)[0], expected)


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
def test_shards_and_index_are_those_of_save_model(limit: int, tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    merge_folder(adapter, tmp_path / "out", max_shard_bytes=limit)
    expected, _ = merge(in_memory(base, adapter, None))
    save_model(expected, Tokenizer.from_folder(base), tmp_path / "saved", max_shard_bytes=limit)
    names = [path.name for path in sorted((tmp_path / "saved").iterdir()) if path.name != "chat_template.jinja"]
    assert (INDEX in names) == (limit < 10**9)
    for name in names:
        if name.endswith(".safetensors"):  # but for the mark in the header
            ours, theirs = load_file(tmp_path / "out" / name), load_file(tmp_path / "saved" / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        else:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_the_bytes_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7).to(torch.bfloat16),
        "ä \"quoted\"": torch.randn(2, 2, 2).to(torch.float16),
        "c": torch.arange(9, dtype=torch.uint8),
        "d": torch.randn(4, dtype=torch.float64),
        "B.weight": torch.randn(1, 1),
        "none": torch.empty(0, 3),
    }  # fmt: skip
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    records = write_shards(tmp_path, specs, lambda name: tensors[name].flatten().split(2), {})
    written = (tmp_path / SINGLE).read_bytes()
    assert written == save(tensors, metadata={"format": "pt"})
    assert records[SINGLE].num_bytes == len(written)


def test_pieces_that_break_the_promise(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (4,))}
    with pytest.raises(ValueError, match="12"):
        write_shards(tmp_path, specs, lambda name: [torch.zeros(3)], {})
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ValueError, match="float16"):
        write_shards(tmp_path, specs, lambda name: [torch.zeros(4, dtype=torch.float16)], {})


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, CausalLM]]:
    """A base of each kind and the model that ``load_model`` makes of it."""
    found = {}
    for kind in ("fp32", "bf16", "4-bit-folder"):
        base, _ = base_of(kind, tmp_path_factory.mktemp(kind))
        found[kind] = base, load_model(base)[0]
    for name, changes in {"gguf": {"qkv_bias": True}, "q4": {"tie_word_embeddings": True}}.items():
        path = tmp_path_factory.mktemp(name) / "model.gguf"
        kind = gguf.GGMLQuantizationType.Q4_1 if name == "q4" else gguf.GGMLQuantizationType.F16
        write_gguf(random_model(gguf_shape("llama", **changes)), path, kind)
        found[name] = path, load_gguf(read_gguf(path), torch.float32, torch.device("cpu"))
    return found


def dense_weight(model: CausalLM, name: str) -> torch.Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    return (
        owner.dequantized_weight(torch.float32)
        if hasattr(owner, "packed") and name.endswith("weight")
        else model.get_parameter(name)
    )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "4-bit-folder", "gguf", "q4"])
@given(data=st.data())
def test_any_piece_is_that_part_of_the_loaded_weight(
    kind: str, stored: dict[str, tuple[Path, CausalLM]], data: st.DataObject
) -> None:
    path, model = stored[kind]
    files = open_model(resolve(path))
    name = data.draw(st.sampled_from(sorted(files.open)))
    expected = dense_weight(model, name).detach().flatten()
    begin = data.draw(st.integers(0, expected.numel() - 1))
    end = data.draw(st.integers(begin + 1, expected.numel()))
    weight = files.open[name]()
    assert tuple(weight.shape) == tuple(dense_weight(model, name).shape)
    assert torch.equal(weight.read(begin, end).float(), expected[begin:end])


@given(
    data=st.data(), form=st.builds(QuantConfig, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 4096]), st.booleans())
)
def test_any_piece_in_4_bits_is_that_part_of_the_quantized_weight(
    form: QuantConfig, stored: dict[str, tuple[Path, CausalLM]], data: st.DataObject
) -> None:
    path, model = stored["bf16"]
    files = open_model(resolve(path))
    name = data.draw(st.sampled_from([name for name in sorted(files.open) if "proj.weight" in name]))
    dense = model.get_parameter(name).detach()
    expected = dequantize(quantize(dense, form.block_size, form.double_quant, form.levels), torch.float32).flatten()
    begin = data.draw(st.integers(0, expected.numel() - 1))
    end = data.draw(st.integers(begin + 1, expected.numel()))
    assert torch.equal(In4Bits(name, files.open[name](), form).read(begin, end), expected[begin:end])


@given(rows=st.integers(1, 3000), columns=st.integers(1, 3000))
def test_row_ranges_cover_every_row_once_and_none_is_tiny(rows: int, columns: int) -> None:
    ranges = list(row_ranges((rows, columns)))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == rows
    assert all(end == begin for (_, end), (begin, _) in pairwise(ranges))
    assert all(begin % 16 == 0 for begin, _ in ranges)
    assert all(end - begin >= min(16, rows) for begin, end in ranges)
    assert all((end - begin) * columns <= max(SMALL_PIECES, 16 * columns) + 15 * columns for begin, end in ranges)


# ---- memory ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys
import torch
torch.set_num_threads(1)
from minisft.merging.streaming import merge_folder

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = kib("VmRSS:")
for adapter in sys.argv[1:]:  # what the first one needs once, and keeps, counts in both
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark falls to what is there now
    merge_folder(adapter, adapter + "-merged")
    print(kib("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bases of 1 and 6 layers, 11 and 63 MB in fp32."""
    shape = replace(CONFIG, hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=8, head_dim=64)
    return {n: base_of("fp32", tmp_path_factory.mktemp(f"{n}"), replace(shape, num_layers=n))[0] for n in (1, 6)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, NF4], ids=["dense", "nf4"])
def test_memory_does_not_grow_with_the_model(quant: QuantConfig | None, sizes: dict[int, Path], tmp_path: Path) -> None:
    adapters = []
    for layers, base in sizes.items():
        folder = tmp_path / str(layers)
        folder.mkdir()
        adapters.append(str(trained(folder, base, quant, LoRAConfig(rank=2, alpha=4.0))))
    child = subprocess.run([sys.executable, "-c", CHILD, *adapters], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    grown = {layers: int(kib) / 1024 for layers, kib in zip(sizes, child.stdout.split(), strict=True)}  # the small one first
    assert max(grown.values()) <= 64, grown
    assert grown[6] - grown[1] <= 16, grown


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse(code: str, adapter: Path, out: Path, **settings: object) -> str:
    """Refused with ``code``, and no trace of it is left where the folder would be."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        merge_folder(adapter, out, **settings)
    assert caught.value.code == code, caught.value
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_an_adapter_that_4_bits_would_lose_is_refused_unless_forced(tmp_path: Path) -> None:
    base, quant = base_of("nf4", tmp_path)
    adapter = trained(tmp_path, base, quant, size=0.01)
    said = refuse("numeric/adapter-lost", adapter, tmp_path / "out", onto="requantized")
    assert "model.layers" in said
    assert merge_folder(adapter, tmp_path / "out", onto="requantized", force=True).report.survival < SURVIVAL_FLOOR


def test_a_dense_base_has_one_target_and_4_bits_have_no_original(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    for onto in ("original", "requantized"):
        refuse("adapter/base-not-quantized", adapter, tmp_path / "out", onto=onto)
    (tmp_path / "other").mkdir()
    base, _ = base_of("4-bit-folder", tmp_path / "other")
    adapter = trained(tmp_path / "other", base, None)
    refuse("model/not-dense", adapter, tmp_path / "out", onto="original")


def test_16_bits_that_swallow_the_update_warn_and_name_the_dtype(tmp_path: Path) -> None:
    base, _ = base_of("bf16", tmp_path)
    adapter = trained(tmp_path, base, None, size=0.02)
    with pytest.warns(UserWarning, match=r"lost .*--dtype fp32"):
        assert merge_folder(adapter, tmp_path / "out").report.fraction_lost > 0.05
    merge_folder(adapter, tmp_path / "wide", dtype=torch.float32)


def test_merging_the_same_adapter_twice_is_refused(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    merge_folder(adapter, tmp_path / "out")
    (adapter / "minisft.json").unlink()  # so that no fingerprint tells the bases apart
    said = refuse("adapter/already-merged", adapter, tmp_path / "again", model=str(tmp_path / "out"))
    assert MARK not in said


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None, size=300.0)
    assert "float16" in refuse("numeric/merge-not-finite", adapter, tmp_path / "out", dtype=torch.float16)
    refuse("config/bad-value", adapter, tmp_path / "out", scale=float("nan"))


def test_a_base_that_is_another_or_gone(tmp_path: Path) -> None:
    base, _ = base_of("fp32", tmp_path)
    adapter = trained(tmp_path, base, None)
    other = write_model(tmp_path / "other", tmp_path / "scratch2", CONFIG)
    refuse("adapter/base-mismatch", adapter, tmp_path / "out", model=str(other))
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "--model" in refuse("adapter/no-base-name", adapter, tmp_path / "out")
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    refuse("model/not-found", adapter, tmp_path / "out")
