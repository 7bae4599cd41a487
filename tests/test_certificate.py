"""The certificate and ``verify``, through the command line: PEFT's merges pass, every kind of broken merge is named."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_folder import CONFIG, write_model, write_rows

from minisft.cli.main import main
from minisft.config import LoRAConfig, QuantConfig
from minisft.data.chat import resolve_template
from minisft.data.messages import read_dataset
from minisft.effect import LayerReport
from minisft.evaluation.evaluate import evaluate
from minisft.formats import load_adapter_, load_model, save_adapter
from minisft.formats.hf import SINGLE
from minisft.merge_weights import merge
from minisft.merging import certificate
from minisft.merging.certificate import PAGE, PLOT, REPORT, ModelReport, judge, kl_divergence
from minisft.merging.report_html import page
from minisft.surgery import adapters_off, apply_lora_, lora_modules

pytestmark = pytest.mark.slow

# Square q_proj: a transposed update has its shape.
SQUARE = replace(CONFIG, num_kv_heads=4, tie_word_embeddings=False)
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GOOD_MODEL = ModelReport("built-in", 10, 1e-9, 1e-8, 0.01, 1e-4, 1.0, files_intact=True)


class Shop:
    """A base, another base, an adapter over the first, rows."""

    def __init__(self, folder: Path, quant: QuantConfig | None = None, size: float = 0.3) -> None:
        self.folder, self.quant = folder, quant
        self.base = write_model(folder / "base", folder / "scratch", SQUARE)
        self.data = write_rows(folder / "rows.jsonl", 6)
        self.adapter = folder / "adapter"
        self.out = folder / "out"
        model, _ = load_model(self.base, quant=quant)
        apply_lora_(model, LoRAConfig(rank=2, alpha=8.0, targets=("q_proj", "up_proj")))
        draw = torch.Generator().manual_seed(5)
        for layer in lora_modules(model).values():
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=draw) * size
        save_adapter(model, self.adapter)

    def merge(self, *more: object, out: Path | None = None) -> int:
        return main([str(w) for w in ("merge", "--adapter", self.adapter, "--out", out or self.out, *more)])

    def verify(self, merged: Path, *more: object) -> int:
        return main([str(w) for w in ("verify", "--adapter", self.adapter, "--merged", merged, *more)])

    def report(self) -> dict[str, dict[str, object]]:
        return json.loads((self.out / REPORT).read_text())

    def changed(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        """A copy of the base whose weights were changed by hand."""
        folder = self.folder / "changed"
        folder.mkdir()
        for path in self.base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(self.base / SINGLE)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
        return folder

    def updates(self) -> dict[str, torch.Tensor]:
        """scaling B A of each adapted weight, from the files by hand: alpha / rank = 4."""
        factors = load_file(self.adapter / "adapter_model.safetensors")
        names = [name.removesuffix("lora_A.weight") for name in factors if "lora_A" in name]
        found = {}
        for name in names:
            update = 4.0 * factors[name + "lora_B.weight"].double() @ factors[name + "lora_A.weight"].double()
            found[name.removeprefix("base_model.model.") + "weight"] = update
        return found


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


# ---- the certificate -------------------------------------------------------------------------------------------------


def test_merge_writes_a_certificate_that_verify_confirms(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.merge("--data", shop.data) == 0
    printed = capsys.readouterr().out
    assert "merged onto base" in printed
    assert "equivalent (effect error" in printed
    report = shop.report()
    assert report["verdict"]["words"] == "equivalent"
    paths = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert [row["path"] for row in report["layers"]] == paths
    model = report["model"]
    assert model["files_intact"] is True
    assert model["kl_max"] < 1e-9 < model["adapter_kl_mean"]
    assert model["logit_max"] < 1e-4
    assert shop.verify(shop.out) == 0
    assert "4 of them adapted" in capsys.readouterr().out


def test_the_loss_is_that_of_evaluate_and_the_yardstick_the_adapters_effect(shop: Shop) -> None:
    assert shop.merge("--data", shop.data, "--dtype", "bf16") == 0
    found = shop.report()["model"]
    model, tokenizer = load_model(shop.base)
    load_adapter_(model, shop.adapter)
    template, examples = resolve_template(tokenizer), read_dataset(shop.data).examples
    assert found["loss_unmerged"] == pytest.approx(evaluate(model, tokenizer, template, examples, "loss").score, rel=1e-6)
    merged, _ = load_model(shop.out)
    assert found["loss_merged"] == pytest.approx(evaluate(merged, tokenizer, template, examples, "loss").score, rel=1e-6)
    assert found["positions"] == evaluate(merged, tokenizer, template, examples, "loss").extra["tokens"]
    assert 0 < found["kl_mean"] < found["adapter_kl_mean"]
    assert shop.report()["verdict"]["words"] == "equivalent up to rounding"


def test_without_data_our_sentences_are_read_and_without_check_none(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shop.merge() == 0
    report = shop.report()["model"]
    assert (report["text"], report["positions"]) == ("built-in", certificate.MAX_POSITIONS)
    assert report["loss_merged"] is None
    ids = load_model(shop.base)[1].encode(certificate.SENTENCES[0])
    model, _ = load_model(shop.base)
    load_adapter_(model, shop.adapter)
    monkeypatch.setattr(certificate, "SENTENCES", certificate.SENTENCES[:1])
    shop.out = shop.folder / "second"
    assert shop.merge() == 0
    with torch.no_grad(), adapters_off(model):
        base = model(torch.tensor([ids]))[0, :-1]
    with torch.no_grad():
        unmerged = model(torch.tensor([ids]))[0, :-1]
    p, q = unmerged.double().softmax(1), base.double().softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert shop.report()["model"]["adapter_kl_mean"] == pytest.approx(expected, rel=1e-4)
    shop.out = shop.folder / "third"
    assert shop.merge("--no-check") == 0
    assert shop.report()["model"] == "not checked"


def test_a_damaged_file_is_another_model(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "file_sha256", lambda path: "0" * 64)
    assert shop.merge() == 0
    assert shop.report()["verdict"]["words"] == "different model"


def test_onto_the_original_is_called_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(tmp_path, QuantConfig())
    assert shop.merge("--onto", "original", "--no-check") == 0
    assert "different model (base shift" in capsys.readouterr().out
    assert shop.verify(shop.out, "--onto", "original") == 0
    assert shop.verify(shop.out) == 6
    shop.out = tmp_path / "dequantized"
    assert shop.merge() == 0
    assert shop.report()["base"]["in_training"] == "nf4, blocks of 64, double quantization"
    assert shop.verify(shop.out, "--data", shop.data) == 0
    assert shop.verify(shop.out, "--onto", "original") == 6


@given(seed=st.integers(0, 2**31), spread=st.floats(0.01, 20))
def test_kl_is_the_formula(seed: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, 7, generator=draw) * spread for _ in range(2))
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(1), p.double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(kl_divergence(p, q), expected, rtol=1e-10, atol=1e-13)
    assert kl_divergence(p, p).max() == 0


def layer(**changes: float) -> LayerReport:
    return LayerReport("a.b", **{"delta_ratio": 0.1, "fraction_lost": 0.0, "effect_error": 1e-5, "survival": 1.0, **changes})


@pytest.mark.parametrize(
    ("layers", "model", "words", "number"),
    [
        ([layer()], None, "equivalent", "effect error"),
        ([layer(), layer(effect_error=0.2)], GOOD_MODEL, "equivalent up to rounding", "effect error"),
        ([layer(), layer(survival=0.49)], GOOD_MODEL, "adapter lost", "survival"),
        ([layer(base_shift=3.0)], GOOD_MODEL, "different model", "base shift"),
        ([layer()], replace(GOOD_MODEL, files_intact=False), "different model", "files"),
        ([layer()], replace(GOOD_MODEL, kl_mean=0.0026), "different model", "KL"),
        ([layer()], replace(GOOD_MODEL, kl_mean=0.0024), "equivalent up to rounding", "KL"),
        ([layer()], replace(GOOD_MODEL, kl_mean=9e-5, adapter_kl_mean=0.0), "equivalent", "effect error"),
        ([layer()], replace(GOOD_MODEL, kl_mean=2e-4, adapter_kl_mean=0.0), "different model", "KL"),
    ],
)
def test_the_verdict_names_the_number_that_decided_it(
    layers: list[LayerReport], model: ModelReport | None, words: str, number: str
) -> None:
    verdict = judge(layers, model)
    assert verdict.words == words
    assert number in verdict.number
    assert f"{verdict.value:.3g}" in str(verdict)


class Page(HTMLParser):
    """The tags of a page, and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href") and not (v or "").startswith("#")]


def test_the_page_is_whole_loads_nothing_and_escapes_names(shop: Shop) -> None:
    assert shop.merge() == 0
    text = (shop.out / PAGE).read_text()
    found = Page(text)
    assert not found.loads
    assert "script" not in found.tags
    assert {"svg", "table", "h1"} <= set(found.tags)
    assert Q in text
    svg = ElementTree.fromstring((shop.out / PLOT).read_text())
    assert svg.tag.endswith("svg")
    report = shop.report()
    report["layers"][0]["path"] = report["base"]["name"] = "<script>alert(1)</script>\x1b[31m"
    hostile = page(report, "<svg/>")
    assert "script" not in Page(hostile).tags
    assert "\x1b" not in hostile
    assert "&lt;script&gt;" in hostile


def test_the_same_merge_gives_the_same_files(shop: Shop) -> None:
    assert shop.merge() == 0
    first = {path.name: path.read_bytes() for path in shop.out.iterdir()}
    shop.out.rename(shop.folder / "first")
    assert shop.merge() == 0
    assert {path.name: path.read_bytes() for path in shop.out.iterdir()} == first


# ---- verify: merges of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_of_peft_passes(shop: Shop, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(shop.base), dtype=dtype)
    merged = peft.PeftModel.from_pretrained(model, str(shop.adapter)).merge_and_unload()
    merged.save_pretrained(str(shop.out))
    assert shop.verify(shop.out) == 0
    assert "equivalent" in capsys.readouterr().out


def merge_by_hand(shop: Shop, tensors: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    for name, update in shop.updates().items():
        tensors[name] = (tensors[name].double() + factor * update).float()


def test_a_merge_by_hand_passes(shop: Shop) -> None:
    assert shop.verify(shop.changed(lambda tensors: merge_by_hand(shop, tensors))) == 0


def nothing(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    """An unmerged copy."""


def alpha_instead_of_alpha_over_rank(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    merge_by_hand(shop, tensors, 2.0)


def twice(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    for _ in range(2):
        merge_by_hand(shop, tensors)


def subtracted(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    merge_by_hand(shop, tensors, -1.0)


def one_layer_missing(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    before = tensors[UP + ".weight"]
    merge_by_hand(shop, tensors)
    tensors[UP + ".weight"] = before


def transposed(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    before = tensors[Q + ".weight"]
    merge_by_hand(shop, tensors)
    tensors[Q + ".weight"] = (before.double() + shop.updates()[Q + ".weight"].T).float()


def swapped(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    merge_by_hand(shop, tensors)
    other = "model.layers.0.self_attn.q_proj.weight"
    tensors[Q + ".weight"], tensors[other] = tensors[other], tensors[Q + ".weight"]


def one_entry(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    merge_by_hand(shop, tensors)
    tensors[UP + ".weight"][3, 4] *= 1.001


def another_tensor(shop: Shop, tensors: dict[str, torch.Tensor]) -> None:
    merge_by_hand(shop, tensors)
    tensors["model.norm.weight"][0] += 0.01


FIRST = "model.layers.0.self_attn.q_proj"
BROKEN = {
    nothing: (FIRST, "holds 0 times"),
    alpha_instead_of_alpha_over_rank: (FIRST, "holds 2 times"),
    twice: (FIRST, "holds 2 times"),
    subtracted: (FIRST, "holds -1 times"),
    one_layer_missing: (UP, "holds 0 times"),
    transposed: (Q, "1 of 21"),
    swapped: (FIRST, "2 of 21"),
    one_entry: (UP, "0.3% of the entries"),
    another_tensor: ("model.norm.weight", "6.2% of the entries"),
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_every_broken_merge_is_caught_with_the_layer_named(
    change: Callable[[Shop, dict[str, torch.Tensor]], None], shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = shop.changed(lambda tensors: change(shop, tensors))
    assert shop.verify(merged) == 6
    message = capsys.readouterr().err.strip()
    assert message.startswith("error[numeric/not-this-merge]")
    assert "\n" not in message
    for part in BROKEN[change]:
        assert part in message, message


def test_a_merge_onto_the_wrong_base_is_caught(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    def onto_another(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] * 1.01
        merge_by_hand(shop, tensors)

    assert shop.verify(shop.changed(onto_another)) == 6
    assert "21 of 21 tensors are wrong" in capsys.readouterr().err


def test_an_update_smaller_than_rounding_is_told_from_an_unmerged_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Shop(tmp_path, size=1e-4)  # every entry of a bf16 copy is within rounding of the merge
    in_bf16 = shop.changed(lambda tensors: tensors.update({n: t.to(torch.bfloat16) for n, t in tensors.items()}))
    config = json.loads((in_bf16 / "config.json").read_text())
    (in_bf16 / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    assert shop.verify(in_bf16) == 6
    assert "times the adapter's update" in capsys.readouterr().err


def test_a_forgotten_side_of_a_tied_head_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "base", tmp_path / "scratch", CONFIG)
    model, _ = load_model(base)
    apply_lora_(model, LoRAConfig(rank=2, alpha=8.0, targets=("embed_tokens",)))
    for adapter in lora_modules(model).values():
        adapter.lora_A.data.normal_(std=0.3)
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *words, "--out", str(tmp_path / "good"), "--no-check"]) == 0
    assert main(["verify", *words, "--merged", str(tmp_path / "good")]) == 0
    tied = tmp_path / "tied"  # the head follows the merged embedding
    tied.mkdir()
    for path in base.iterdir():
        (tied / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "good" / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, tied / SINGLE, {"format": "pt"})
    capsys.readouterr()
    assert main(["verify", *words, "--merged", str(tied)]) == 6
    assert "tied: lm_head.weight" in capsys.readouterr().err


# ---- bad input through the command line ------------------------------------------------------------------------------


def refused(shop: Shop, capsys: pytest.CaptureFixture[str], status: int, code: str, *words: object) -> None:
    before = sorted(path.relative_to(shop.folder) for path in shop.folder.rglob("*"))
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    message = capsys.readouterr().err.strip().splitlines()
    assert message[-1].startswith(f"error[{code}]"), message
    assert sorted(path.relative_to(shop.folder) for path in shop.folder.rglob("*")) == before


def test_44_a_folder_in_use_and_an_adapter_that_is_merged_already(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("merge", "--adapter", shop.adapter, "--no-check", "--out")
    assert main([*map(str, words), str(shop.out)]) == 0
    refused(shop, capsys, 2, "config/out-exists", *words, shop.out)
    refused(shop, capsys, 2, "config/out-exists", *words, shop.data)
    (shop.adapter / "minisft.json").unlink()
    refused(shop, capsys, 4, "adapter/already-merged", *words, shop.folder / "again", "--model", shop.out)


def test_adapters_that_do_not_fit(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(shop.folder / "other", shop.folder / "scratch2", CONFIG)
    words = ("merge", "--adapter", shop.adapter, "--out", shop.out)
    refused(shop, capsys, 4, "adapter/base-mismatch", *words, "--model", other)
    refused(shop, capsys, 4, "model/not-found", *words, "--model", shop.folder / "nowhere")
    refused(shop, capsys, 4, "adapter/no-config", "merge", "--adapter", shop.base, "--out", shop.out)
    refused(shop, capsys, 4, "adapter/base-not-quantized", *words, "--onto", "original")
    refused(shop, capsys, 3, "data/no-file", *words, "--data", shop.folder / "no-rows.jsonl")
    refused(shop, capsys, 2, "config/bad-value", *words, "--scale", "inf")
    refused(shop, capsys, 4, "model/no-config", "verify", "--adapter", shop.adapter, "--merged", shop.adapter)
    refused(shop, capsys, 4, "model/other-shape", "verify", "--adapter", shop.adapter, "--merged", other)
    weights = shop.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, weights)
    refused(shop, capsys, 4, "adapter/non-finite", *words)


def test_a_disk_that_fills_up_leaves_nothing(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    refused(shop, capsys, 7, "disk/full", "merge", "--adapter", shop.adapter, "--out", shop.out)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def test_a_merge_back_to_4_bits_is_judged_by_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(tmp_path, QuantConfig(), size=0.002)
    words = ("merge", "--adapter", shop.adapter, "--out", shop.out, "--onto", "requantized")
    refused(shop, capsys, 6, "numeric/adapter-lost", *words)
    assert shop.merge("--onto", "requantized", "--force") == 0
    assert shop.report()["verdict"]["words"] == "adapter lost"
    assert shop.verify(shop.out, "--onto", "requantized") == 6
    message = capsys.readouterr().err
    assert "4 of 21 tensors are wrong" in message  # and not those that were only copied, in 4 bits
    assert FIRST in message


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["dense", "nf4"])
def test_dora_goes_the_same_way(quant: QuantConfig | None, tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    model, _ = load_model(shop.base, quant=quant)
    apply_lora_(model, LoRAConfig(rank=2, alpha=8.0, use_dora=True))
    for layer in lora_modules(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(5)) * 0.1
        layer.lora_magnitude_vector.data *= 1.1
    shop.adapter = tmp_path / "dora"
    save_adapter(model, shop.adapter)
    assert shop.merge() == 0
    assert shop.report()["verdict"]["words"] == "equivalent"
    expected, _ = merge(model)
    for name, tensor in load_model(shop.out)[0].state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert shop.verify(shop.out) == 0
    assert shop.verify(shop.base) == 6
