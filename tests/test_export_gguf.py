"""Exported GGUF files: the ``gguf`` package judges the bytes, our own reader takes them back, the command line refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import tiny_folder
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_formats_gguf import NAMES, compare_with_reader, interleave, llama_cpp_name

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, RopeScaling
from minisft.data.chat import encode_chat, resolve_template, stop_ids
from minisft.data.examples import Message
from minisft.data.gguf_tokenizer import gguf_tokenizer
from minisft.data.gguf_vocabulary import RULES, build_bpe
from minisft.data.template import CHATML, ChatTemplate
from minisft.data.tokenizer import SpecialTokens, Tokenizer
from minisft.formats import load_adapter_, load_model, save_adapter, save_model
from minisft.formats.gguf_header import read_gguf
from minisft.formats.gguf_names import architecture_of
from minisft.formats.gguf_types import OUT_TYPES, encode
from minisft.merging.export_gguf import export_gguf
from minisft.merging.modelfile import modelfile
from minisft.merging.streaming import merge_folder
from minisft.surgery import apply_lora_, lora_modules

pytestmark = pytest.mark.slow

# llama.cpp's qwen2 divides the hidden size by the heads.
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)  # as Llama 3.1 has it: the reader knows no other
SIZES = {"vocab_size": 258, "max_position_embeddings": 512, "hidden_size": 32, "intermediate_size": 48}
MODELS: dict[str, ModelConfig] = {
    name: replace(config, **SIZES) for name, config in tiny.FAMILIES.items() if name not in ("mistral", "llama3-rope")
} | {
    "llama3-rope": replace(tiny.LLAMA3_ROPE, **SIZES, rope_theta=500000.0, rope_scaling=ROPE),
    "qwen2": replace(tiny.QWEN2, **SIZES, **HEADS),
    "qwen2-untied": replace(tiny.QWEN2, **SIZES, **HEADS, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder.write_model(root / name, root / f"{name}-scratch", shape) for name, shape in MODELS.items()}


def trained_adapter(model_folder: Path, out: Path, lora: LoRAConfig, seed: int = 5) -> Path:
    """An adapter whose factors are all random, as if it had been trained for a while."""
    model, _ = load_model(model_folder)
    apply_lora_(model, lora)
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = 0.2 * torch.randn(factor.shape, generator=draw)
    save_adapter(model, out)
    return out


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", OUT_TYPES)
@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama3-rope", "qwen2", "qwen3"])
def test_the_package_reads_the_keys_and_its_quantizer_gives_the_bytes(
    folders: dict[str, Path], name: str, outtype: str, tmp_path: Path
) -> None:
    file, shape = tmp_path / "m.gguf", MODELS[name]
    export_gguf(file, str(folders[name]), outtype=outtype, compare=False)
    compare_with_reader(file)
    reader = gguf.GGUFReader(str(file))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = {llama_cpp_name(key): (key, value) for key, value in load_model(folders[name])[0].named_parameters()}
    assert set(stored) - {"rope_freqs.weight"} == set(weights)  # a tied head is not there a second time
    for theirs, (key, value) in weights.items():
        kind = gguf.GGMLQuantizationType[outtype.upper()] if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        if kind == gguf.GGMLQuantizationType.Q8_0 and value.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        rows = value.detach().numpy()
        if shape.model_type == "llama" and (".q_proj." in key or ".k_proj." in key):
            rows = interleave(rows, shape.num_heads if ".q_proj." in key else shape.num_kv_heads)
        expected = gguf.quants.quantize(rows, kind)
        assert stored[theirs].tensor_type == kind, theirs
        assert stored[theirs].data.tobytes() == expected.tobytes(), theirs


def test_the_keys_are_all_that_llama_cpp_needs(folders: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(tmp_path / "m.gguf", str(folders["qwen3"]), outtype="q8_0", compare=False)
    keys, shape = read_gguf(tmp_path / "m.gguf").metadata, MODELS["qwen3"]
    expected = {
        "general.architecture": "qwen3", "general.type": "model", "general.file_type": 7, "general.quantization_version": 2,
        "qwen3.context_length": 512, "qwen3.embedding_length": 32, "qwen3.block_count": 2, "qwen3.feed_forward_length": 48,
        "qwen3.attention.head_count": 6, "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 14,
        "qwen3.attention.value_length": 14, "qwen3.rope.dimension_count": 14, "qwen3.rope.freq_base": 100.0,
        "qwen3.vocab_size": 258,
    }  # fmt: skip
    assert expected.items() <= keys.items()
    assert shape.hidden_size // shape.num_heads != 14  # without the key a reader would take 5


@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.integers(1, 40))
def test_eight_bits_are_the_packages_bit_for_bit(seed: int, exponent: float, blocks: int) -> None:
    numbers = (torch.randn(blocks, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).round(decimals=3)
    raw, back = encode("w", numbers, OUT_TYPES["q8_0"])
    expected = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert raw.numpy().tobytes() == expected.tobytes()
    assert np.array_equal(back.numpy(), gguf.quants.dequantize(expected, gguf.GGMLQuantizationType.Q8_0))


def test_a_code_between_two_numbers_goes_away_from_zero() -> None:
    """127 sets the scale to 1, so that 0.5, 1.5 and -2.5 are exactly between two codes."""
    block = torch.zeros(32)
    block[:4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    assert encode("w", block, OUT_TYPES["q8_0"])[1][:4].tolist() == [127.0, 1.0, 2.0, -3.0]


@pytest.mark.parametrize("name", MODELS)
def test_export_and_load_again_bit_for_bit(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    export_gguf(tmp_path / "m.gguf", str(folders[name]), outtype="f32", compare=False)
    model, tokenizer = load_model(folders[name])
    again, their_tokenizer = load_model(tmp_path / "m.gguf")
    weights = again.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert replace(again.config, rms_norm_eps=0.0) == replace(model.config, rms_norm_eps=0.0)  # stored in fp32 there
    assert again.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-6)
    chat = [Message("user", "Ä parcel, 12!"), Message("assistant", "Yes.")]
    both = [encode_chat(t, resolve_template(t), chat).input_ids for t in (tokenizer, their_tokenizer)]
    assert both[0] == both[1]
    assert their_tokenizer.eos_ids == tokenizer.eos_ids
    assert their_tokenizer.special_tokens == tokenizer.special_tokens


# ---- adapters --------------------------------------------------------------------------------------------------------

PATTERNS = LoRAConfig(
    rank=3, alpha=5.0, use_rslora=True, rank_pattern={"q_proj": 2, "down_proj": 4}, alpha_pattern={"layers.1.mlp.up_proj": 9.0}
)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", PATTERNS),
        ("qwen2", replace(PATTERNS, use_rslora=False)),
        ("llama3-rope", LoRAConfig(rank=2, alpha=7.0, targets=("embed_tokens", "k_proj", "lm_head"))),
    ],
)
def test_alone_each_module_has_its_own_scaling(folders: dict[str, Path], name: str, lora: LoRAConfig, tmp_path: Path) -> None:
    """llama.cpp's formula, alpha / rank of the tensor * B A, over the file's own numbers gives each module's update."""
    adapter = trained_adapter(folders[name], tmp_path / "a", lora)
    export_gguf(tmp_path / "a.gguf", None, adapter, adapter_only=True, outtype="f32", compare=False)
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 1.0)
    assert not [key for key in keys if key.startswith("tokenizer")]
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    model, _ = load_model(folders[name])
    load_adapter_(model, adapter)
    modules = lora_modules(model)
    assert len(stored) == 2 * len(modules)
    for path, layer in modules.items():
        theirs = llama_cpp_name(f"{path}.weight")
        A, B = stored[f"{theirs}.lora_a"].astype(np.float64), stored[f"{theirs}.lora_b"].astype(np.float64)
        A = A.T if path.endswith("embed_tokens") else A
        update = keys["adapter.lora.alpha"] / A.shape[0] * (B @ A)
        expected = layer.delta_weight().detach().numpy()
        if path.endswith("embed_tokens"):
            expected = expected.T
        elif MODELS[name].model_type == "llama" and path.endswith(("q_proj", "k_proj")):
            expected = interleave(expected, MODELS[name].num_heads if path.endswith("q_proj") else MODELS[name].num_kv_heads)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_merged_it_holds_the_bits_of_a_merged_folder(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    adapter = trained_adapter(folders[name], tmp_path / "a", PATTERNS)
    done = export_gguf(tmp_path / "m.gguf", None, adapter, outtype="f32")
    merge_folder(adapter, tmp_path / "merged", dtype=torch.float32)
    expected, found = (load_model(tmp_path / place)[0].state_dict() for place in ("merged", "m.gguf"))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert done.verdict is not None
    assert done.verdict.words == "equivalent"
    assert done.report is not None
    assert len(done.report.layers) == 14
    merge = json.loads((tmp_path / "m.golden.json").read_text())["merge"]
    assert merge["survival"] == done.report.survival > 0.999


def test_one_side_of_a_tied_head_makes_two_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = trained_adapter(folders["llama"], tmp_path / "a", LoRAConfig(rank=2, alpha=3.0, targets=("lm_head", "v_proj")))
    export_gguf(tmp_path / "m.gguf", None, adapter, outtype="f32", compare=False)
    model, _ = load_model(folders["llama"])
    load_adapter_(model, adapter)
    again, _ = load_model(tmp_path / "m.gguf")
    ids = torch.tensor([[3, 200, 7, 90, 11]])
    with torch.no_grad():
        tiny.assert_close(again(ids), model(ids), 1e-5)


# ---- golden answers and the Modelfile --------------------------------------------------------------------------------


def test_golden_answers_are_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    export_gguf(tmp_path / "m.gguf", str(folders["llama"]), outtype="q8_0")
    content = json.loads((tmp_path / "m.golden.json").read_text())
    model, tokenizer = load_model(folders["llama"])
    stops = stop_ids(tokenizer, resolve_template(tokenizer))
    assert len(content["prompts"]) == 7
    for prompt in content["prompts"]:
        assert prompt["ids"] == tokenizer.encode(prompt["text"], control=True)
        ids = list(prompt["ids"])
        with torch.no_grad():
            logs = model(torch.tensor([ids]))[0, -1].log_softmax(0)
            for token in prompt["answer_ids"]:  # greedy, one token after the other, the whole text anew each time
                assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
                assert ids[len(prompt["ids"]) :].count(token) == 0 or token not in stops
                ids.append(token)
        for i, value in prompt["first"]:
            assert value == pytest.approx(float(logs[i]), abs=1e-4)
        assert [value for _, value in prompt["first"]] == sorted((value for _, value in prompt["first"]), reverse=True)


def llama3(messages: str = "") -> str:
    return (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
        "{% endfor %}" + messages + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )


def test_a_template_for_ollama_only_where_it_is_proved() -> None:
    bos = {"bos_token": "<|begin_of_text|>"}
    text, why = modelfile("m.gguf", ChatTemplate(CHATML, {}), ["<|im_end|>", 'a"b'])
    assert why == ""
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}')
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "a\\"b"\n' in text
    assert "<|eot_id|>" in modelfile("m.gguf", ChatTemplate(llama3(), bos), [])[0]
    for source, words in (
        (llama3("{{ ' ' if messages|length > 2 }}"), "a chat of 3 turns"),
        (CHATML.replace("{% for", "{% if messages[0].role != 'system' %}<|im_start|>system\nS<|im_end|>\n{% endif %}{% for", 1),
         "adds something of its own"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "neither ChatML nor Llama 3"),
    ):  # fmt: skip
        text, why = modelfile("a.gguf", ChatTemplate(source, bos), ["</s>"], base="llama3.2:1b")
        assert "TEMPLATE" not in text
        assert text.startswith("FROM llama3.2:1b\nADAPTER ./a.gguf\n")
        assert words in why


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_every_rule_is_found_by_what_it_does() -> None:
    for name in (rule for rule in RULES if rule != "default"):
        metadata = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
            "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
        }  # fmt: skip
        keys = gguf_tokenizer(Tokenizer.from_gguf(metadata), None, 6).keys
        assert keys["tokenizer.ggml.pre"] == name
        assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<e>", "[PAD4]", "[PAD5]"]
        assert keys["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 5]
        assert keys["tokenizer.ggml.merges"] == ["a b"]


def byte_tokenizer(eos: str = "<e>", template: str | None = None, **token: bool) -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": [],
        "tokenizer.ggml.tokens": sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        "tokenizer.ggml.token_type": [1] * 256,
    }  # fmt: skip
    backend = build_bpe(metadata)
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, **token) for text in ("<e>", "<|im_end|>", "<x>")])
    backend.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    names = {"eos_token": eos} if eos else {}
    return Tokenizer(backend, SpecialTokens(names, (256,) if eos else (), None, False), template)


TURNS = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"


def test_the_end_of_a_turn_is_eos_and_the_models_own_comes_second() -> None:
    tokenizer = byte_tokenizer()
    found = gguf_tokenizer(tokenizer, ChatTemplate(TURNS, tokenizer.special_names), 260)
    assert (found.keys["tokenizer.ggml.eos_token_id"], found.keys["tokenizer.ggml.eot_token_id"]) == (257, 256)
    assert found.stops == ("<|im_end|>", "<e>")
    assert found.keys["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 3, 4]
    assert found.keys["tokenizer.ggml.add_bos_token"] is False
    base = gguf_tokenizer(tokenizer, None, 260)
    assert base.keys["tokenizer.ggml.eos_token_id"] == 256
    assert "tokenizer.chat_template" not in base.keys


def test_a_template_keeps_its_words_in_a_file_with_another_eos() -> None:
    """``eos_token`` means <e> in the model and <|im_end|> in the file; generation blocks are not known there."""
    marked = "{%- generation -%}\n{{ m.content }}<|im_end|>{% endgeneration %}"
    source = "{% for m in messages %}\n  " + marked + "\n{{ eos_token }}{% endfor %}"
    tokenizer = byte_tokenizer(template=source)
    keys = gguf_tokenizer(tokenizer, resolve_template(tokenizer), 260).keys
    written = str(keys["tokenizer.chat_template"])
    assert "{%- generation" not in written
    chat = [Message("user", "a"), Message("assistant", "b")]
    in_file = ChatTemplate(written, {"eos_token": "<|im_end|>", "bos_token": "x"})
    assert in_file.render(chat).text == resolve_template(tokenizer).render(chat).text
    assert in_file.render(chat).text.endswith("b<|im_end|><e>")


@pytest.mark.parametrize(
    ("tokenizer", "code", "said"),
    [
        (lambda: byte_tokenizer(eos=""), "tokenizer/no-gguf-eos", "eos_token"),
        (lambda: byte_tokenizer(lstrip=True), "tokenizer/no-gguf-token", "<|im_end|>"),
    ],
)
def test_what_the_metadata_cannot_express(tokenizer: object, code: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        gguf_tokenizer(tokenizer(), None, 260)  # type: ignore[operator]
    assert caught.value.code == code
    assert said in str(caught.value)
    assert "fix:" in str(caught.value)


# ---- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def edited(folder: Path, copy: Path, file: str, **changes: object) -> Path:
    """A copy of a model folder with changes in one of its JSON files."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps(values))
    return copy


def test_the_command_writes_three_files(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "export", "--model", folders["qwen2"], "--out", tmp_path / "d" / "m.gguf", "--outtype", "q8_0", "--ollama"
    )
    assert (status, err) == (0, "")
    assert "26 tensors" in out
    assert "2 matrices as f16" in out  # down_proj of both layers
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["m.Modelfile", "m.gguf", "m.golden.json"]


REFUSED = {
    "a window": (("--model", "windowed"), 4, "model/no-gguf", "sliding_window to null"),
    "a head length": (("--model", "heads"), 4, "model/no-gguf", "hidden size, 32"),
    "stretched waves": (("--model", "stretched"), 4, "model/no-gguf", "rope_type llama3"),
    "another family": (("--model", "granite"), 4, "model/no-gguf", "convert_hf_to_gguf.py"),
    "dora": (("--adapter", "dora", "--adapter-only"), 4, "adapter/no-gguf", "leave --adapter-only away"),
    "a tied head": (("--adapter", "head", "--adapter-only"), 4, "adapter/no-gguf", "leave --adapter-only away"),
    "tokens without rows": (("--adapter", "tokens"), 4, "adapter/missing-tensor", "trainable_tokens_delta"),
    "another rule": (("--model", "spaces"), 4, "tokenizer/no-gguf-rule", "convert_hf_to_gguf.py"),
    "another vocabulary": (("--model", "wordpiece"), 4, "tokenizer/no-gguf-model", "convert_hf_to_gguf.py"),
    "too large for f16": (("--model", "large", "--no-check"), 6, "numeric/export-not-finite", "--outtype bf16"),
    "no model": (("--model", "nothing"), 4, "model/not-found", "nothing"),
    "an adapter of 8 bits": (("--adapter", "dora", "--adapter-only", "--outtype", "q8_0"), 2, "config/bad-value", "f16"),
    "no adapter": (("--model", "qwen2", "--adapter-only"), 2, "config/bad-value", "--adapter DIR"),
    "nothing": ((), 2, "config/missing", "--model or --adapter"),
}


@pytest.fixture(scope="module")
def bad(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters that cannot be exported, by name."""
    root = tmp_path_factory.mktemp("bad")
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    edited(folders["qwen2"], root / "windowed", "config.json", **window)
    tiny_folder.write_model(root / "heads", root / "scratch", replace(tiny.QWEN2, **SIZES))
    tiny_folder.write_model(root / "stretched", root / "scratch-2", replace(MODELS["qwen3"], rope_scaling=ROPE))
    tiny_folder.write_model(root / "granite", root / "scratch-3", replace(tiny.GRANITE, **SIZES))
    trained_adapter(folders["qwen2"], root / "dora", LoRAConfig(rank=2, alpha=3.0, use_dora=True))
    trained_adapter(folders["llama"], root / "head", LoRAConfig(rank=2, alpha=3.0, targets=("lm_head",)))
    edited(root / "dora", root / "tokens", "adapter_config.json", trainable_token_indices=[3, 4])
    spaces = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    edited(folders["qwen2"], root / "spaces", "tokenizer.json", pre_tokenizer=spaces)
    words = edited(folders["qwen2"], root / "wordpiece", "config.json")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(list(tiny_folder.CONTROL))
    backend.save(str(words / "tokenizer.json"))
    model, tokenizer = load_model(folders["qwen2"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 70000.0
    save_model(model, tokenizer, root / "large")
    (root / "qwen2").symlink_to(folders["qwen2"])
    return root


NO_WORD = {
    "qk_norm": None, "sliding_window": 4, "nope_layers": (1,), "global_layers": (1,), "local_rope_theta": 1e3,
    "qk_norm_flat": True, "norms": "after", "norm_plus_one": True, "activation": "gelu", "embedding_multiplier": 2.0,
    "attention_multiplier": 0.5, "residual_multiplier": 0.5, "logits_divisor": 2.0, "logits_softcap": 5.0,
}  # fmt: skip
WRITTEN = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings", "qkv_bias", "o_bias",
    "mlp_bias",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_switch_that_the_file_has_no_word_for_is_refused(kind: str) -> None:
    """llama.cpp would compute another model without a word; a new field of ``ModelConfig`` has to be put on one side."""
    shape = MODELS[kind]
    assert {field.name for field in dataclasses.fields(ModelConfig)} == WRITTEN | NO_WORD.keys()
    assert architecture_of(shape, "m") == kind
    for name, value in NO_WORD.items():
        with pytest.raises(UserError, match="model/no-gguf"):
            architecture_of(replace(shape, **{name: not shape.qk_norm if name == "qk_norm" else value}), "m")
    if kind != "llama":
        with pytest.raises(UserError, match="no such stretching of RoPE"):
            architecture_of(replace(shape, rope_scaling=ROPE), "m")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_leaves_nothing_behind(
    name: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, status, code, said = REFUSED[name]
    paths = [bad / word if i and words[i - 1] in ("--model", "--adapter") else word for i, word in enumerate(words)]
    found, _, err = run(capsys, "export", *paths, "--out", tmp_path / "m.gguf")
    assert (found, f"error[{code}]" in err) == (status, True), err
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["m.gguf", "m.golden.json", "m.Modelfile"])
def test_nothing_is_written_over(
    there: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / there).write_text("mine")
    status, _, err = run(capsys, "export", "--model", folders["llama"], "--out", tmp_path / "m.gguf")
    assert (status, "config/out-exists" in err) == (2, True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minisft.merging import export_gguf as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "golden", full)  # after the weights have been written
    status, _, err = run(capsys, "export", "--model", folders["llama"], "--out", tmp_path / "m.gguf")
    assert (status, "disk/full" in err) == (7, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("verify", "--gguf", "m.gguf", "--merged", "d"), "config/bad-value"),
        (("verify", "--base", "b"), "config/usage"),
        (("verify", "--merged", "d"), "config/usage"),
        (("export", "--model", "m", "--out", "m.bin"), "config/bad-value"),
        (("export", "--model", "m", "--out", "m.gguf", "--plain"), "config/bad-value"),
        (("export", "--format", "peft", "--adapter", "a", "--out", "d"), "config/bad-value"),
        (("export", "--format", "peft", "--plain", "--out", "d"), "config/bad-value"),
        (("export", "--format", "peft", "--plain", "--adapter", "a", "--out", "d", "--ollama"), "config/bad-value"),
        (("export", "--format", "peft", "--plain", "--adapter", "a", "--out", "d", "--outtype", "q8_0"), "config/bad-value"),
    ],
)
def test_misuse(words: tuple[str, ...], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *words)
    assert (status, f"error[{code}]" in err, "fix:" in err) == (2, True, True), err


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
@pytest.mark.exhaustive
def test_an_export_needs_its_largest_tensor_and_64_mib(smollm2_path: Path, tmp_path: Path) -> None:
    program = f"""
import resource
from minisft.formats import load_tokenizer
from minisft.merging.export_gguf import _open, export_gguf
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
kept = _open({str(smollm2_path)!r}, None)  # the tokenizer and its metadata, which are no weights
before = peak()
export_gguf({str(tmp_path / "m.gguf")!r}, {str(smollm2_path)!r}, outtype="f16", compare=False)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    largest = 49152 * 576 * 2
    assert int(done.stdout) < largest + 64 * 2**20
    assert (tmp_path / "m.gguf").stat().st_size > 134_515_008 * 2


def test_names_go_both_ways() -> None:
    from minisft.formats.gguf_file import hugging_face_name
    from minisft.formats.gguf_names import llama_cpp_name as ours

    for part, theirs in NAMES.items():
        name = f"model.layers.7.{part}.weight"
        assert ours(name) == f"blk.7.{theirs}.weight"
        assert hugging_face_name(ours(name)) == name
