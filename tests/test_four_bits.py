"""Merging into 4 bits with fitted codes, through the command line: what is written, certified, verified and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from tiny_folder import CONFIG, write_model, write_rows

from minisft.cli.main import main
from minisft.config import LoRAConfig, QuantConfig
from minisft.data.chat import resolve_template
from minisft.data.encoding import encode_dataset
from minisft.data.messages import read_dataset
from minisft.formats import load_adapter_, load_model, save_adapter, save_quantized
from minisft.merging import four_bits
from minisft.merging.base_and_adapter import open_adapted
from minisft.merging.certificate import PAGE, PLOT, REPORT, compare_models, judge
from minisft.merging.compensate import requantize_compensated
from minisft.model import CausalLM
from minisft.surgery import apply_lora_, lora_modules, nf4_modules

pytestmark = pytest.mark.slow

# Layers with enough inputs that errors can cancel, and rows of whole blocks.
ROOMY = replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=16, num_layers=1)
held_otherwise = pytest.mark.filterwarnings("ignore:.*held otherwise")
BASES = pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["dense", "nf4"])
LAYERS = 7


class Shop:
    """A base, an adapter that was trained on it as it is or in 4 bits, text to calibrate on, other rows to judge by."""

    def __init__(self, folder: Path, quant: QuantConfig | None, size: float = 0.15) -> None:
        self.folder, self.quant, self.out, self.adapter = folder, quant, folder / "out", folder / "adapter"
        self.base = write_model(folder / "base", folder / "scratch", ROOMY)
        self.text, self.data = write_rows(folder / "text.jsonl", 40), folder / "data.jsonl"
        self.data.write_text("".join(f'{{"prompt": "tell {i}", "completion": "ABC {i * i}"}}\n' for i in range(8)))
        model, _ = load_model(self.base, quant=quant)
        apply_lora_(model, LoRAConfig(rank=2, alpha=4.0))
        for i, layer in enumerate(lora_modules(model).values()):
            layer.lora_B.data = size * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i))
        save_adapter(model, self.adapter)

    def merge(self, *more: object) -> int:
        return main([str(w) for w in ("merge", "--adapter", self.adapter, "--out", self.out, *more)])

    def compensated(self, *more: object) -> int:
        return self.merge("--onto", "compensated", "--calibration", self.text, "--data", self.data, *more)

    def verify(self, merged: Path, *more: object) -> int:
        words = ("verify", "--adapter", self.adapter, "--merged", merged, "--onto", "compensated", "--data", self.data, *more)
        return main([str(word) for word in words])

    def report(self) -> dict:
        return json.loads((self.out / REPORT).read_text())


def rows(shop: Shop) -> list[list[int]]:
    """Ids of the calibration text, as training encodes it."""
    tokenizer = load_model(shop.base)[1]
    examples = read_dataset(shop.text).examples
    return [row.input_ids for row in encode_dataset(examples, tokenizer, resolve_template(tokenizer), 512).rows]


def by_hand(shop: Shop) -> CausalLM:
    """The same merge with the loaded model. Over a base that was dense in training, W is the dense weight."""
    model, _ = load_model(shop.base, quant=QuantConfig())
    load_adapter_(model, shop.adapter)
    dense, _ = load_model(shop.base)
    original = None if shop.quant is not None else (lambda name: dense.get_parameter(name).detach())
    return requantize_compensated(model, rows(shop), original=original)[0]


@BASES
@held_otherwise
def test_from_the_command_line_to_a_verified_folder(
    quant: QuantConfig | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Shop(tmp_path, quant)
    assert shop.compensated() == 0
    printed, report, tokens = capsys.readouterr().out, shop.report(), sum(map(len, rows(shop)))
    assert f"{LAYERS} layers merged onto compensated, float32; 4 bits with codes fitted to {tokens:,} tokens" in printed
    said = {"onto": "compensated", "way": "both", "calibration": str(shop.text), "calibration_tokens": tokens}
    assert report["merged"] == {**said, "dtype": "float32", "files": {}}
    assert report["base"]["in_training"] == ("dense" if quant is None else "nf4, blocks of 64, double quantization")
    assert report["verdict"]["number"] == "KL of the merge / KL of the adapter"
    assert report["verdict"]["value"] == report["model"]["kl_mean"] / report["model"]["adapter_kl_mean"] < 0.4
    assert report["verdict"]["words"] == "equivalent up to rounding"
    assert all(row["output_error"] <= row["plain_output_error"] * (1 + 1e-6) for row in report["layers"])
    assert "plain output error" in (shop.out / PAGE).read_text()
    assert "codes moved" in (shop.out / PLOT).read_text()
    loaded, expected = nf4_modules(load_model(shop.out)[0]), nf4_modules(by_hand(shop))
    assert len(loaded) == LAYERS
    assert all(torch.equal(loaded[path].packed, layer.packed) for path, layer in expected.items())
    assert shop.verify(shop.out) == 0
    assert "not chosen anew" in capsys.readouterr().out
    assert shop.verify(shop.out, "--calibration", shop.text) == 0
    assert "chosen anew, 100.0% of them the same" in capsys.readouterr().out


@held_otherwise
def test_codes_for_a_dense_base_make_up_for_its_quantization_too(tmp_path: Path) -> None:
    """With W taken for what its 4 bits stand for, the merged model is further from the one that was trained."""
    shop = Shop(tmp_path, None)
    assert shop.compensated() == 0
    ours = shop.report()["model"]["kl_mean"]
    assert shop.report()["model"]["adapter_kl_mean"] > 0.1
    model, tokenizer = load_model(shop.base, quant=QuantConfig())
    load_adapter_(model, shop.adapter)
    save_quantized(requantize_compensated(model, rows(shop))[0], tokenizer, tmp_path / "other")
    files = open_adapted(shop.adapter)
    assert ours < 0.8 * compare_models(files, tmp_path / "other", shop.data).kl_mean


def test_verify_tells_other_folders_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(tmp_path, QuantConfig())
    assert shop.compensated() == 0
    model, tokenizer = load_model(shop.base, quant=QuantConfig())
    save_quantized(model, tokenizer, tmp_path / "unmerged")
    capsys.readouterr()
    assert shop.verify(tmp_path / "unmerged") == 6  # KL / KL = 1
    assert "KL of the adapter 1, limit" in capsys.readouterr().err
    assert shop.verify(tmp_path / "unmerged", "--calibration", shop.text) == 6
    assert "found 0.0% of the codes that fitting moves" in capsys.readouterr().err
    assert shop.verify(shop.out, "--scale", 0.5, "--calibration", shop.text) == 6
    assert "not those that this text gives" in capsys.readouterr().err
    shop.out = tmp_path / "dense"
    assert shop.merge("--no-check") == 0
    assert shop.verify(shop.out) == 4
    assert "whose codes should be fitted is not in 4 bits" in capsys.readouterr().err
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    save_quantized(model, tokenizer, tmp_path / "changed")
    assert shop.verify(tmp_path / "changed") == 6
    assert "model.norm.weight" in capsys.readouterr().err


def test_an_adapter_smaller_than_the_bases_quantization_makes_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Shop(tmp_path, None, size=0.01)
    assert shop.compensated() == 0
    assert "warning: the adapter was trained on a base held otherwise" in capsys.readouterr().err
    assert shop.report()["verdict"]["words"] == "different model"


def test_unchecked_is_said_to_be_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(tmp_path, QuantConfig())
    assert shop.compensated("--no-check") == 0
    assert "not compared (positions compared 0, limit 1)" in capsys.readouterr().out
    assert not judge([], None, "compensated").good


def test_text_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bits, "MAX_CALIBRATION_TOKENS", 50)
    shop = Shop(tmp_path, QuantConfig())
    tokenizer = load_model(shop.base)[1]
    found = four_bits.calibration_rows(shop.text, tokenizer, resolve_template(tokenizer), 512)
    assert list(chain.from_iterable(found)) == list(chain.from_iterable(rows(shop)))[:50]


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(tmp_path, QuantConfig())

    def refused(status: int, code: str, *more: object) -> None:
        assert shop.merge(*more) == status
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1
        assert message[0].startswith(f"error[{code}]")
        assert not shop.out.exists()

    refused(2, "config/no-calibration", "--onto", "compensated")
    refused(3, "data/no-file", "--onto", "compensated", "--calibration", tmp_path / "none.jsonl")
    for onto in ("dequantized", "original", "requantized"):
        refused(2, "config/unused-calibration", "--onto", onto, "--calibration", shop.text)
    refused(2, "config/usage", "--onto", "compensate", "--calibration", shop.text)
    assert shop.verify(shop.base, "--onto", "dequantized", "--calibration", shop.text) == 2
