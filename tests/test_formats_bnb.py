"""4-bit folders: transformers with bitsandbytes is the oracle in both directions, byte for byte; every lie is refused once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_folder import write_model, write_tokenizer
from torch import Tensor, nn

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.formats import Tokenizer, bnb, load_model, loading, save_model, save_quantized
from minisft.formats.fields import Fields
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, dequantize
from minisft.nf4_linear import NF4Linear
from minisft.surgery import apply_lora_, quantize_

pytestmark = pytest.mark.slow

# Ragged on purpose: 18 000 weights are 281 blocks of 64 and a quarter, so that the scales fill more than one block of 256.
CONFIG = ModelConfig(
    model_type="llama", vocab_size=258, hidden_size=36, intermediate_size=500, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=10, max_position_embeddings=64, qkv_bias=True, o_bias=True,
)  # fmt: skip
LINEARS = 7
FORMS = [QuantConfig(levels, block, nested) for levels, block, nested in product(("nf4", "fp4"), (64, 128), (True, False))]
# bitsandbytes' AVX-512 loop misplaces scales in ragged rows; there only the flat formula over its own tables is an oracle.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


def build(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    return tiny.build(config, torch.float32).to(dtype)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_model(build(), tokenizer, folder)
    return folder


def quantized(form: QuantConfig, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    model = build(config, dtype)
    quantize_(model, form)
    return model


def layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {f"{path}.weight": m.quantized for path, m in model.named_modules() if isinstance(m, NF4Linear)}


def same_bytes(actual: Tensor, expected: Tensor) -> bool:
    kind = (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    return kind and torch.equal(
        actual.contiguous().view(-1, 1).view(torch.uint8), expected.contiguous().view(-1, 1).view(torch.uint8)
    )


def assert_same_files(actual: Path, expected: Path) -> None:
    ours, theirs = load_file(actual / WEIGHTS), load_file(expected / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bytes(ours[name], theirs[name])] == []


def assert_same_model(actual: CausalLM, expected: CausalLM) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bytes(ours[name], theirs[name])] == []
    assert [(q.block_size, q.shape, q.dtype) for q in layers(actual).values()] == [
        (q.block_size, q.shape, q.dtype) for q in layers(expected).values()
    ]


# ---- both directions against transformers and bitsandbytes -----------------------------------------------------------


def with_transformers(dense: Path, out: Path, form: QuantConfig, storage: str | None = None) -> nn.Module:
    """The dense folder quantized and saved by transformers and bitsandbytes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form.levels,
        bnb_4bit_use_double_quant=form.double_quant,
        bnb_4bit_quant_storage=storage,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(str(dense), quantization_config=settings)
    model.save_pretrained(str(out))
    for file in dense.glob("*token*"):
        shutil.copy(file, out)
    return model


def from_transformers(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder))


def their_weights(model: nn.Module) -> dict[str, Tensor]:
    """Dense weights of their 4-bit layers, before any forward pass (which may repack them in place)."""
    import bitsandbytes

    return {
        f"{path}.weight": their_dequantize(m.weight.data, m.weight.quant_state)
        for path, m in model.named_modules()
        if isinstance(m, bitsandbytes.nn.Linear4bit)
    }


def their_dequantize(packed: Tensor, state: object) -> Tensor:
    """levels[code] * absmax over the flat tensor, from their tables; their own kernel too where it can be trusted."""
    from bitsandbytes import functional

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    pairs = packed.view(torch.uint8).flatten().int()
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[: state.shape.numel()]
    flat = state.code[codes] * absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    weight = flat.to(state.dtype).view(state.shape)
    if not AVX512:
        assert torch.equal(functional.dequantize_4bit(packed, state), weight)
    return weight


@pytest.mark.parametrize("storage", [None, "bfloat16"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.block_size == 64], ids=str)
def test_we_read_what_they_write(dense: Path, tmp_path: Path, form: QuantConfig, storage: str | None) -> None:
    theirs = with_transformers(dense, tmp_path / "theirs", form, storage)
    model, tokenizer = load_model(tmp_path / "theirs", dtype=torch.bfloat16)
    assert model.origin.file_dtype == form.levels.upper()
    expected = their_weights(theirs)
    assert len(expected) == LINEARS
    assert layers(model).keys() == expected.keys()
    for name, q in layers(model).items():
        assert torch.equal(dequantize(q), expected[name]), name
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    for name, q in layers(model).items():
        assert same_bytes(q.packed, stored[name].view(torch.uint8).flatten())
        assert same_bytes(q.absmax, stored[f"{name}.absmax"])
        assert same_bytes(q.levels, stored[f"{name}.quant_map"])
        assert (q.absmax2 is not None) == form.double_quant
    dense_parameters = dict(model.named_parameters())
    assert all(same_bytes(dense_parameters[name], stored[name]) for name in dense_parameters)
    save_quantized(model, tokenizer, tmp_path / "ours")
    if storage is None:
        assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_same_model(load_model(tmp_path / "ours", dtype=torch.bfloat16)[0], model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_they_read_what_we_write(tmp_path: Path, tokenizer: Tokenizer, form: QuantConfig, dtype: torch.dtype) -> None:
    model = quantized(form, dtype=dtype)
    save_quantized(model, tokenizer, tmp_path / "ours")
    theirs = from_transformers(tmp_path / "ours")
    expected = {name: dequantize(q) for name, q in layers(model).items()}
    found = their_weights(theirs)
    assert len(found) == LINEARS
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], weight) for name, weight in expected.items())
    parameters = dict(theirs.named_parameters())
    assert all(same_bytes(parameters[name].data, parameter.data) for name, parameter in model.named_parameters())


def test_their_logits_are_ours(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows_of_whole_blocks = replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=32)
    model = quantized(QuantConfig(), rows_of_whole_blocks, torch.float32)
    save_quantized(model, tokenizer, tmp_path / "ours")
    theirs = from_transformers(tmp_path / "ours").train()  # in eval mode some CPUs repack the weights and round to bf16
    ids = torch.arange(24).view(2, 12) * 7 % 258
    with torch.no_grad():
        tiny.assert_close(model(ids), theirs(ids).logits, 1e-5)


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_our_quantizer_writes_their_file(dense: Path, tmp_path: Path, levels: str) -> None:
    """The same dense folder through both programs. (With double quantization their CPU table is coarser than ours.)"""
    form = QuantConfig(levels, double_quant=False)
    with_transformers(dense, tmp_path / "theirs", form)
    model, tokenizer = load_model(dense, torch.bfloat16, quant=form)
    save_quantized(model, tokenizer, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_what_stays_dense_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = quantized(QuantConfig(targets=("q_proj", "down_proj")))
    sizes = save_quantized(model, tokenizer, tmp_path / "ours")
    assert (sizes.num_quantized, sizes.num_dense) == (2, 6)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert sorted(name.rsplit(".", 1)[-1] for name in settings["llm_int8_skip_modules"]) == [
        "gate_proj", "k_proj", "lm_head", "o_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert their_weights(from_transformers(tmp_path / "ours")).keys() == layers(model).keys()
    assert_same_model(load_model(tmp_path / "ours", dtype=torch.bfloat16)[0], model)


def test_a_head_in_four_bits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = quantized(QuantConfig(targets=("lm_head",)))
    save_quantized(model, tokenizer, tmp_path / "ours")
    assert list(their_weights(from_transformers(tmp_path / "ours"))) == ["lm_head.weight"]
    assert_same_model(load_model(tmp_path / "ours", dtype=torch.bfloat16)[0], model)


def test_config_is_what_transformers_writes(dense: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with_transformers(dense, tmp_path / "theirs", QuantConfig())
    save_quantized(quantized(QuantConfig()), tokenizer, tmp_path / "ours")
    ours, theirs = (
        json.loads((tmp_path / who / "config.json").read_text())["quantization_config"] for who in ("ours", "theirs")
    )
    assert ours | {"llm_int8_skip_modules": None, "bnb_4bit_compute_dtype": "float32"} == theirs
    assert (ours["llm_int8_skip_modules"], ours["bnb_4bit_compute_dtype"]) == (["lm_head"], "bfloat16")


# ---- our own round trip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shard_bytes", [10**9, 300])
def test_saved_loaded_saved(tmp_path: Path, tokenizer: Tokenizer, family: str, shard_bytes: int) -> None:
    """Every family, also with the parts of a weight spread over several files: equal bits, and equal files."""
    config = replace(tiny.FAMILIES[family], vocab_size=258)
    model = quantized(QuantConfig(block_size=32), config)
    save_quantized(model, tokenizer, tmp_path / "one", max_shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "one").glob("*.safetensors"))) > 1) == (shard_bytes == 300)
    again, _ = load_model(tmp_path / "one", dtype=torch.bfloat16)
    assert_same_model(again, model)
    save_quantized(again, tokenizer, tmp_path / "two", max_shard_bytes=shard_bytes)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_dense_parameters_take_the_dtype_and_scales_do_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = quantized(QuantConfig())
    save_quantized(model, tokenizer, tmp_path / "m")
    wide, _ = load_model(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(q.dtype == torch.bfloat16 and q.absmax2.dtype == torch.float32 for q in layers(wide).values())
    save_quantized(wide, tokenizer, tmp_path / "again", dtype=torch.bfloat16)
    assert_same_files(tmp_path / "again", tmp_path / "m")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_no_tensor_of_the_model_is_a_view_of_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_quantized(quantized(QuantConfig()), tokenizer, tmp_path / "m")
    model, _ = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert len(layers(model)) == LINEARS
    assert str(tmp_path / "m" / WEIGHTS) not in Path("/proc/self/maps").read_text()


def test_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sizes = save_quantized(quantized(QuantConfig()), tokenizer, tmp_path / "m")
    assert sizes.dense_bytes == sum(p.numel() for p in build().parameters()) * 2
    assert sizes.stored_bytes == sum(t.numel() * t.element_size() for t in load_file(tmp_path / "m" / WEIGHTS).values())
    assert (sizes.num_quantized, sizes.num_dense) == (LINEARS, 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_quantized_folder_is_never_quantized_again(tmp_path: Path, tokenizer: Tokenizer, form: QuantConfig) -> None:
    model = quantized(form)
    save_quantized(model, tokenizer, tmp_path / "m")
    assert_same_model(load_model(tmp_path / "m", torch.bfloat16, quant=form)[0], model)
    for other in FORMS:
        if other != form:
            with pytest.raises(UserError, match="model/already-quantized") as caught:
                load_model(tmp_path / "m", torch.bfloat16, quant=other)
            assert f"block size {form.block_size}" in str(caught.value)


def test_memory_is_that_of_four_bits(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(QuantConfig(), dtype=torch.float32)
    save_quantized(model, tokenizer, tmp_path / "m")
    held = sum(q.nbytes for q in layers(model).values()) + sum(p.numel() * 4 for p in model.parameters())
    needed = held + 500 * 36 * 4  # and the largest tensor once more
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed)
    load_model(tmp_path / "m")
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed - 1)
    monkeypatch.setattr("minisft.formats.hf.fill_", None)  # would fail if it were reached
    with pytest.raises(UserError, match="model/too-large"):
        load_model(tmp_path / "m")


# ---- what is not written ---------------------------------------------------------------------------------------------


def test_save_refuses_what_the_format_cannot_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    refusals = [
        ("model/not-quantized", build()),
        ("model/unsupported", quantized(QuantConfig("int4"))),
        ("model/unsupported", quantized(QuantConfig(), dtype=torch.float64)),
    ]
    adapted = quantized(QuantConfig(targets=("q_proj",)))
    apply_lora_(adapted, LoRAConfig(rank=2, targets=("k_proj",)))
    for code, model in [*refusals, ("adapter/not-merged", adapted)]:
        with pytest.raises(UserError, match=code):
            save_quantized(model, tokenizer, tmp_path / "m")
    with pytest.raises(UserError, match="model/not-dense"):
        save_model(quantized(QuantConfig()), tokenizer, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisft.formats.hf_write.write_shards", fail)
    with pytest.raises(UserError, match="disk/full"):
        save_quantized(quantized(QuantConfig()), tokenizer, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "dense", tmp_path / "scratch", replace(CONFIG, num_layers=2))
    argv = ["quantize", "--model", str(source), "--out", str(tmp_path / "q"), "--no-double-quant", "--block-size", "128"]
    assert main([*argv, "--dtype", "fp16"]) == 0
    assert "14 linears in 4 bits, 1 dense; 0.3 MB in fp16, 0.1 MB as stored" in capsys.readouterr().out
    model, _ = load_model(tmp_path / "q", torch.float16)
    assert {(q.block_size, q.absmax2, q.dtype) for q in layers(model).values()} == {(128, None, torch.float16)}
    assert main(["generate", "--model", str(tmp_path / "q"), "--prompt", "hi", "--max-new-tokens", "2"]) == 0


def test_23_block_size(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--model", str(dense), "--out", str(tmp_path / "q"), "--block-size", "48"]) == 2
    assert "found 48; expected one of 32, 64" in capsys.readouterr().err


def test_24_a_folder_that_cannot_be_new(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisft.formats.load_model", None)  # refused before it would be called
    (folder.parent / "used").mkdir()
    (folder.parent / "used" / "file").touch()
    for out, code in ((folder, "out-in-model"), (folder / "q", "out-in-model"), (folder.parent / "used", "out-exists")):
        assert main(["quantize", "--model", str(folder), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error[config/{code}]")
    assert not (folder / "q").exists()


def test_36_a_weight_that_is_not_a_number(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "m"))
    tensors = load_file(folder / WEIGHTS)
    tensors[DOWN][3, 5] = torch.nan
    tensors[DOWN][3, 6] = torch.inf
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert main(["quantize", "--model", str(folder), "--out", str(tmp_path / "q")]) == 4
    message = capsys.readouterr().err
    assert message.startswith(f"error[model/non-finite-weight] a weight is not a finite fp32 number: {DOWN}[3, 5]")
    assert "the first of 2 such" in message
    assert not (tmp_path / "q").exists()


@pytest.mark.exhaustive
@pytest.mark.smollm2
def test_the_pretrained_model_in_transformers(smollm2_path: Path, tmp_path: Path) -> None:
    assert main(["quantize", "--model", str(smollm2_path), "--out", str(tmp_path / "q")]) == 0
    model, _ = load_model(tmp_path / "q", torch.bfloat16)
    found = their_weights(from_transformers(tmp_path / "q"))
    assert len(found) == 210
    assert all(same_bytes(found[name], dequantize(q)) for name, q in layers(model).items())


# ---- what is not read ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "model"
    save_quantized(quantized(QuantConfig()), tokenizer, folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], code: str, *said: str) -> None:
    """One line, exit status 4, no traceback, through the real command line."""
    assert main(["generate", "--model", str(folder), "--prompt", "hi"]) == 4
    message = capsys.readouterr().err
    assert message.startswith(f"error[model/{code}] "), message
    assert message.count("\n") == 1
    assert all(part in message for part in said), message


Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def say(**changes: object) -> Callable[[Tensors], object]:
    """Change the JSON of one weight; None takes a key away."""

    def change(tensors: Tensors) -> None:
        values = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = as_tensor(json.dumps({key: value for key, value in values.items() if value is not None}).encode())

    return change


def put(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    """Replace one tensor of the weight."""
    name = DOWN + part
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def at(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[place] = value
        return changed

    return make


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (say(quant_type="fp4"), "bad-config", ("quant_type", "found 'fp4'; expected nf4")),
        (say(quant_type=None), "bad-config", ("quant_type", "missing")),
        (say(blocksize=63), "bad-config", ("blocksize", "found 63; expected 32, 64")),
        (say(blocksize=2**70), "bad-config", ("blocksize",)),
        (say(blocksize="64"), "bad-config", ("blocksize", "an integer")),
        (say(blocksize=128), "shape", ("down_proj.weight.absmax", "found U8 [282]; expected U8 [141]")),
        (say(dtype="float8"), "bad-config", ("dtype", "float8", "bfloat16")),
        (say(dtype=16), "bad-config", ("dtype", "a string")),
        (say(shape=[500, 36]), "bad-config", ("shape", "found [500, 36]; expected [36, 500]")),
        (say(shape=[2**40, 2**40]), "bad-config", ("shape",)),
        (say(nested_blocksize=64), "bad-config", ("nested_blocksize", "expected 256")),
        (say(nested_dtype="float16"), "bad-config", ("nested_dtype", "expected float32")),
        (say(nested_offset="1"), "bad-config", ("nested_offset", "a number")),
        (say(nested_offset=1e39), "bad-config", ("nested_offset", "finite")),
        (say(nested_offset=None), "bad-config", ("nested_offset", "missing")),
        (say(surprise=1), "unsupported", ("surprise",)),
        (lambda t: t.update({STATE: as_tensor(b"{")}), "bad-config", ("bitsandbytes__nf4",)),
        (lambda t: t.update({STATE: as_tensor(b"\xff\x1b[31m")}), "bad-config", ("bitsandbytes__nf4",)),
        (lambda t: t.update({STATE: as_tensor(b"[1]")}), "bad-config", ("found list",)),
        (lambda t: t.update({STATE: as_tensor(b'{"shape": 1, "shape": 2}')}), "bad-config", ("duplicate key",)),
        (lambda t: t.update({STATE: as_tensor(b'{"nested_offset": NaN}')}), "bad-config", ("NaN",)),
        (lambda t: t.update({STATE: torch.zeros(5000, dtype=torch.uint8)}), "shape", ("at most 4096 bytes",)),
        (lambda t: t.update({STATE: torch.zeros(9)}), "shape", ("found F32 [9]",)),
        (lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].clone()}), "unexpected-tensor", ("twice", "__fp4")),
        (lambda t: t.pop(STATE), "missing-tensor", (STATE,)),
        (lambda t: t.pop(DOWN), "missing-tensor", (f"expected {DOWN}",)),
        (lambda t: t.pop(f"{DOWN}.absmax"), "missing-tensor", (f"{DOWN}.absmax",)),
        (lambda t: t.pop(f"{DOWN}.quant_map"), "missing-tensor", (f"{DOWN}.quant_map",)),
        (lambda t: t.pop(f"{DOWN}.nested_absmax"), "missing-tensor", (f"{DOWN}.nested_absmax",)),
        (lambda t: t.pop(f"{DOWN}.nested_quant_map"), "missing-tensor", (f"{DOWN}.nested_quant_map",)),
        (lambda t: t.update({f"{DOWN}.SCB": torch.ones(36)}), "unexpected-tensor", (f"{DOWN}.SCB",)),
        (
            lambda t: t.update({"model.embed_tokens.weight.absmax": torch.ones(3)}),
            "unexpected-tensor",
            ("embed_tokens.weight.absmax",),
        ),
        (put("", lambda x: x[:-1]), "shape", (DOWN, "found U8 [8999, 1]; expected 9000 bytes")),
        (put("", lambda x: x.to(torch.int64)), "shape", ("found I64",)),
        (put(".absmax", lambda x: x[:-1]), "shape", ("found U8 [281]; expected U8 [282]",)),
        (put(".absmax", lambda x: x.float()), "shape", ("found F32 [282]; expected U8 [282]",)),
        (put(".nested_absmax", lambda x: x[:1]), "shape", ("found F32 [1]; expected F32 [2]",)),
        (put(".nested_absmax", lambda x: x.half()), "shape", ("found F16 [2]; expected F32 [2]",)),
        (put(".nested_quant_map", lambda x: x[:255]), "shape", ("found F32 [255]",)),
        (put(".quant_map", lambda x: x[:, None]), "shape", ("found F32 [16, 1]; expected F32 [16]",)),
        (put(".quant_map", lambda x: x.flip(0)), "unsupported", ("quant_map", "another table")),
        (put(".quant_map", at(3, -0.3949)), "unsupported", ("quant_map", "another table")),
        (put(".nested_quant_map", at(7, torch.nan)), "unsupported", ("nested_quant_map", "another table")),
        (put(".nested_absmax", at(1, torch.inf)), "non-finite-weight", ("down_proj.weight.absmax[256]",)),
    ],
)  # fmt: skip
def test_a_part_that_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tensors], object], code: str, said: tuple[str, ...]
) -> None:
    rewrite(folder, change)
    refused(folder, capsys, code, *said)


def test_scales_that_are_not_finite(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    save_quantized(quantized(QuantConfig(double_quant=False)), tokenizer, tmp_path / "m")
    rewrite(tmp_path / "m", put(".absmax", at(17, torch.nan)))
    refused(tmp_path / "m", capsys, "non-finite-weight", "down_proj.weight.absmax[17]", "the first of 1 such in 282 scales")


def test_a_tied_head_cannot_be_in_four_bits(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    save_quantized(quantized(QuantConfig(), replace(CONFIG, tie_word_embeddings=True)), tokenizer, tmp_path / "m")
    rewrite(
        tmp_path / "m",
        lambda t: t.update({name.replace(DOWN, "lm_head.weight"): t[name].clone() for name in list(t) if DOWN in name}),
    )
    refused(tmp_path / "m", capsys, "unexpected-tensor", "lm_head.weight.absmax")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "found 'gptq'"),
        ({"quant_method": "awq"}, "found 'awq'"),
        ({"quant_method": "fp8"}, "found 'fp8'"),
        ({"quant_method": "mxfp4"}, "found 'mxfp4'"),
        ({"quant_method": 4}, "quant_method"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "load_in_4bit"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({}, "load_in_4bit"),
    ],
)
def test_other_quantizations(folder: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], said: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    refused(folder, capsys, "unsupported", said, "bitsandbytes with load_in_4bit")


def test_files_of_2023_do_not_name_the_method(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    assert len(layers(load_model(folder)[0])) == LINEARS


GOOD = json.dumps(
    {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [36, 500], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.05,
    }
).encode()  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 40))
def test_a_mutated_description_is_refused_or_still_true(flips: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(GOOD)
    for place, value in flips:
        raw[place] = value
    try:
        values = bnb._json_object(as_tensor(bytes(raw[: len(raw) - cut] if cut % 2 else raw)), "state", Path("folder"))
        weight = bnb._parse(Fields(values, "state"), "w", "nf4", (36, 500), nested=True)
    except UserError:
        return
    assert (weight.shape, weight.levels) == (torch.Size((36, 500)), "nf4")
    assert weight.block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    assert weight.offset is not None
    assert torch.tensor(weight.offset, dtype=torch.float32).isfinite()
