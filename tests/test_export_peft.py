"""The plain form of an adapter: one rank, one scale, no patterns, and the effect of the original."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_export_gguf import MODELS, PATTERNS, run, trained_adapter
from tiny_folder import write_model

from minisft.config import LoRAConfig
from minisft.formats import load_adapter_, load_model
from minisft.formats.adapter_tensors import tensor_names
from minisft.formats.safetensors_file import read_header, read_tensors
from minisft.merging.export_peft import export_peft
from minisft.surgery import lora_modules

pytestmark = pytest.mark.slow

IDS = torch.tensor([[3, 200, 7, 90, 11, 40]])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    return write_model(root / "m", root / "s", MODELS["qwen3"])


def logits(model_folder: Path, adapter: Path) -> torch.Tensor:
    model, _ = load_model(model_folder)
    load_adapter_(model, adapter)
    model.eval()
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize(
    "lora",
    [PATTERNS, replace(PATTERNS, use_rslora=False), LoRAConfig(rank=2, alpha=7.0, targets=("embed_tokens", "v_proj"))],
)
def test_one_rank_one_scale_and_the_same_effect(model_folder: Path, lora: LoRAConfig, tmp_path: Path) -> None:
    adapter = trained_adapter(model_folder, tmp_path / "a", lora)
    done = export_peft(adapter, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    highest = max([lora.rank, *lora.rank_pattern.values()])
    assert config["r"] == config["lora_alpha"] == done.rank == highest
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"], config["use_dora"]) == ({}, {}, False, False)
    model, _ = load_model(model_folder)
    load_adapter_(model, adapter)
    assert config["target_modules"] == sorted(lora_modules(model))
    # Read as vLLM reads it: scale 1 and the two tensors, nothing else.
    header = read_header(tmp_path / "plain" / "adapter_model.safetensors", "adapter")
    tensors = dict(read_tensors(header, list(header.entries), "adapter"))
    for path, layer in lora_modules(model).items():
        A, B = (tensors[name] for name in tensor_names(path, path.endswith("embed_tokens")))
        assert A.shape[0] == B.shape[1] == highest
        update = (B.double() @ A.double()).T if path.endswith("embed_tokens") else B.double() @ A.double()
        expected = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()
        tiny.assert_close(update, expected.T if path.endswith("embed_tokens") else expected, 3e-7, path)
    tiny.assert_close(logits(model_folder, tmp_path / "plain"), logits(model_folder, adapter), 1e-5)


def test_peft_computes_the_same_from_both(model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    adapter = trained_adapter(model_folder, tmp_path / "a", PATTERNS)
    export_peft(adapter, tmp_path / "plain")
    found = []
    for folder in (adapter, tmp_path / "plain"):
        base = transformers.AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float32)
        with torch.no_grad():
            found.append(peft.PeftModel.from_pretrained(base, str(folder)).eval()(IDS).logits)
    tiny.assert_close(found[1], found[0], 1e-5)
    tiny.assert_close(found[1], logits(model_folder, adapter), 1e-4)


def test_the_command_and_what_it_refuses(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained_adapter(model_folder, tmp_path / "a", LoRAConfig(rank=9, alpha=5.0))
    dora = trained_adapter(model_folder, tmp_path / "dora", LoRAConfig(rank=2, alpha=5.0, use_dora=True))
    pattern = LoRAConfig(rank=2, alpha=5.0, targets=("lm_head", "k_proj"), rank_pattern={"lm_head": 30})
    high = trained_adapter(model_folder, tmp_path / "high", pattern)
    words = ("export", "--format", "peft", "--plain", "--adapter")
    status, out, err = run(capsys, *words, adapter, "--out", tmp_path / "d", "--outtype", "bf16")
    assert (status, err) == (0, "")
    assert "--max-lora-rank 16" in out
    entries = read_header(tmp_path / "d" / "adapter_model.safetensors", "adapter").entries.values()
    assert {entry.dtype for entry in entries} == {"BF16"}
    for folder, code, fix in ((dora, "adapter/dora", "merge"), (high, "adapter/rank", "minisft combine")):
        status, _, err = run(capsys, *words, folder, "--out", tmp_path / "x")
        assert (status, code in err, fix in err, (tmp_path / "x").exists()) == (4, True, True, False), err
    assert run(capsys, *words, adapter, "--out", tmp_path / "d")[0] == 2  # there already
