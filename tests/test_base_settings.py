"""What a base's folder says beside its weights is still there after a merge, a quantization and an export."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_folder
import torch
from torch import nn

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig
from minisft.formats import load_model, save_adapter, save_model, save_quantized
from minisft.formats.base_settings import not_kept
from minisft.merging.certified import merge_and_certify, quantize_folder, verify_merge
from minisft.merging.streaming import merge_folder
from minisft.surgery import apply_lora_, lora_modules, quantize_

pytestmark = pytest.mark.slow

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
TOKENIZER = {
    "model_max_length": 512, "padding_side": "left", "tokenizer_class": "Qwen2Tokenizer", "clean_up_tokenization_spaces": True,
    "eos_token": {"content": "<|im_end|>", "lstrip": False, "special": True},
}  # fmt: skip
FILES = {"LICENSE": "do what you like", "merges.txt": "#version: 0.2\n", "added_tokens.json": '{"<|im_start|>": 256}'}


def add(path: Path, **keys: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny_folder.write_model(tmp_path / "model", tmp_path / "scratch")
    add(folder / "generation_config.json", eos_token_id=[257, 256], **SAMPLING)
    add(folder / "tokenizer_config.json", **TOKENIZER)
    add(folder / "special_tokens_map.json", eos_token=TOKENIZER["eos_token"], additional_special_tokens=["<|im_start|>"])
    add(folder / "config.json", use_cache=False)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    return folder


def adapter(base: Path, folder: Path, template: str | None = None) -> Path:
    model, _ = load_model(base)
    apply_lora_(model, LoRAConfig(rank=2, alpha=2.0, targets=("q_proj",)))
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(model, folder, template=template)
    return folder


def merged(base: Path, out: Path) -> tuple[str, ...]:
    found = merge_folder(adapter(base, out.with_name("adapter")), out)
    assert found.summary.endswith(not_kept(found.not_kept))
    return found.not_kept


def quantized(base: Path, out: Path) -> tuple[str, ...]:
    model, tokenizer = load_model(base)
    quantize_(model, QuantConfig())
    return save_quantized(model, tokenizer, out, torch.bfloat16).not_kept


def exported(base: Path, out: Path) -> tuple[str, ...]:
    model, tokenizer = load_model(base)
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr("warnings.warn", lambda message, **_: told.append(str(message)))
        save_model(model, tokenizer, out)
    return tuple(told[0].split("base: ")[1].split(", ")) if told else ()


WAYS = pytest.mark.parametrize("write", [merged, quantized, exported])


@WAYS
def test_settings_of_the_base_stay(write: Callable[[Path, Path], tuple[str, ...]], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write(base, out) == ()
    assert read(out / "generation_config.json") == {
        **SAMPLING,
        "bos_token_id": None,
        "eos_token_id": [257, 256],
        "pad_token_id": 257,
    }
    settings = read(out / "tokenizer_config.json")
    assert {name: settings[name] for name in TOKENIZER} == TOKENIZER
    assert settings["pad_token"] == "<|im_end|>"
    assert read(out / "special_tokens_map.json")["additional_special_tokens"] == ["<|im_start|>"]
    assert read(out / "config.json")["use_cache"] is False
    assert {name: (out / name).read_text() for name in FILES} == FILES
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"
    _, tokenizer = load_model(out)
    _, before = load_model(base)
    assert (tokenizer.eos_ids, tokenizer.special_names) == (before.eos_ids, before.special_names)


@WAYS
def test_what_cannot_stay_is_named(write: Callable[[Path, Path], tuple[str, ...]], base: Path, tmp_path: Path) -> None:
    """Code and what names it, a file that nobody here knows, and one that a link fetches from elsewhere."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    add(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    (base / "tokenization_x.py").write_text("raise SystemExit")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "vocab.json").symlink_to(secret)
    (base / "README.md").write_text("what the base is")
    out = tmp_path / "out"
    lost = {"tokenizer_config.json: auto_map", "tokenization_x.py", "preprocessor_config.json", "vocab.json"}
    assert set(write(base, out)) == lost
    settings = read(out / "tokenizer_config.json")
    assert "auto_map" not in settings
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"tokenization_x.py", "preprocessor_config.json", "vocab.json", "README.md"} & {f.name for f in out.iterdir()}


def test_a_quantized_base_is_not_called_quantized_after_a_dense_merge(base: Path, tmp_path: Path) -> None:
    quantized(base, tmp_path / "four")
    merged(tmp_path / "four", tmp_path / "out")
    assert "quantization_config" not in read(tmp_path / "out" / "config.json")
    assert read(tmp_path / "out" / "generation_config.json")["temperature"] == 0.6


def test_each_command_is_one_call(base: Path, tmp_path: Path) -> None:
    trained, lines = adapter(base, tmp_path / "adapter"), []
    found = merge_and_certify(trained, tmp_path / "out", dtype=torch.float32, log=lines.append)
    assert found.verdict.words == "equivalent"
    assert found.models is not None
    assert lines == [found.merged.summary]
    assert read(tmp_path / "out" / "merge_report.json")["model"] != "not checked"
    checked, verdict = verify_merge(tmp_path / "out", trained, log=lines.append)
    assert verdict.good
    assert lines[1:] == [checked.summary]
    assert quantize_folder(base, tmp_path / "four", dtype=torch.float32).num_quantized == 14
    with pytest.raises(UserError, match="not-this-merge"):
        verify_merge(base, trained)
    with pytest.raises(UserError, match="out-in-model"):
        quantize_folder(base, base / "four")
    with pytest.raises(UserError, match="data/"):
        merge_and_certify(trained, tmp_path / "no", data=tmp_path / "nothing.jsonl")
    assert not (tmp_path / "no").exists()


def test_what_was_guessed_of_the_tokenizer_and_left_of_the_rows_is_said(base: Path, tmp_path: Path) -> None:
    for settings in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        settings.write_text(json.dumps({k: v for k, v in read(settings).items() if k != "pad_token"}))
    trained, rows, lines = adapter(base, tmp_path / "adapter"), tiny_folder.write_rows(tmp_path / "rows.jsonl", 3), []
    merge_and_certify(trained, tmp_path / "out", data=rows, compare=False, log=lines.append)
    assert f"{rows}: columns not used: id" in lines
    assert any("names no padding token" in line for line in lines)
    lines.clear()
    quantize_folder(base, tmp_path / "four", dtype=torch.float32, log=lines.append)
    assert any("names no padding token" in line for line in lines)


@pytest.mark.parametrize("command", [["generate", "--prompt", "hi"], ["chat"]])
def test_what_was_guessed_of_the_tokenizer_is_said_beside_an_answer(
    base: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for settings in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        settings.write_text(json.dumps({k: v for k, v in read(settings).items() if k != "pad_token"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\n"))
    assert main([*command, "--model", str(base), "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert "names no padding token" in printed.err
    assert "names no padding token" not in printed.out


def test_one_template_decides(base: Path, tmp_path: Path) -> None:
    """The adapter's. An older one in the tokenizer's settings would be what other programs use."""
    add(base / "tokenizer_config.json", chat_template=(base / "chat_template.jinja").read_text())
    assert merged(base, tmp_path / "same") == ()
    assert "chat_template" in read(tmp_path / "same" / "tokenizer_config.json")
    found = merge_folder(adapter(base, tmp_path / "other", "{{ messages }}"), tmp_path / "out")
    assert found.not_kept == ("tokenizer_config.json: chat_template",)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template" not in read(tmp_path / "out" / "tokenizer_config.json")


def test_another_tokenizer_does_not_get_the_settings_of_the_base(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base)
    tokenizer.special_names = tokenizer.special_names | {"eos_token": "<|im_start|>"}
    with pytest.warns(UserWarning, match=r"not kept of the base: tokenizer_config\.json"):
        save_model(model, tokenizer, tmp_path / "out")
    assert "model_max_length" not in read(tmp_path / "out" / "tokenizer_config.json")


def test_settings_that_are_no_json_leave_nothing_half_written(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base)
    (base / "special_tokens_map.json").write_text("[1")
    with pytest.raises(UserError, match="special_tokens_map"):
        save_model(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
