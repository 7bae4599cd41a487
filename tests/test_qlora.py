"""QLoRA: training, resuming, saving and loading over a base in 4 bits, and that it costs no more memory than promised."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_formats_gguf import write as write_gguf
from tiny import FAMILIES, assert_close, assert_same, build, gradients
from tiny_folder import CONFIG, digest, losses, quiet, run_config, write_model, write_shop, write_tokenizer
from torch import Tensor, nn

from minisft.batching import micro_batches
from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig, RunConfig
from minisft.data.chat import Encoded
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_adapter_, load_model, loading, save_adapter, save_model, save_quantized
from minisft.formats.gguf_file import load_gguf
from minisft.formats.gguf_header import read_gguf
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, quantize
from minisft.step import batch_loss_sum
from minisft.surgery import apply_lora_, lora_modules, nf4_modules, num_parameters, quantize_, weight_bytes
from minisft.training.train import train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("qlora"))


def config(shop: Path, out: Path, **changes: object) -> RunConfig:
    return run_config(shop, out, **{"steps": 20, "eval_every": 5, "quant": "nf4", **changes})


def randomise_(model: nn.Module, std: float = 0.1) -> None:
    """Adapters as after some training."""
    torch.manual_seed(1)
    for adapter in lora_modules(model).values():
        nn.init.normal_(adapter.lora_B, std=std)


def densified(model: CausalLM) -> CausalLM:
    """A dense model with the weights that the 4-bit layers stand for."""
    dense = CausalLM(model.config).to(model.dtype)
    weights = {f"{path}.weight": layer.dequantized_weight(model.dtype) for path, layer in nf4_modules(model).items()}
    dense.load_state_dict({**model.state_dict(), **weights}, strict=False)
    return dense


# Loading


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer is not None}


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig("fp4", 128, False, ("q_proj", "down_proj"))], ids=["nf4", "some"])
def test_loading_in_4_bits_is_loading_and_quantizing(shop: Path, tmp_path: Path, kind: str, quant: QuantConfig) -> None:
    """Bit for bit, in whichever dtype the rest of the model is held."""

    def load(dtype: torch.dtype, quant: QuantConfig | None) -> CausalLM:
        if kind == "folder":
            return load_model(shop / "model", dtype, quant=quant)[0]
        return load_gguf(read_gguf(tmp_path / "m.gguf"), dtype, CPU, quant)

    if kind == "gguf":
        write_gguf(load_model(shop / "model")[0], tmp_path / "m.gguf")
    expected = load(torch.float32, None)
    paths = quantize_(expected, quant)
    assert len(paths) == (14 if quant.targets == "all-linear" else 4)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(dtype, quant)
        assert list(nf4_modules(model)) == paths
        found = packed_bytes(model)
        assert found.keys() == packed_bytes(expected).keys()
        assert all(torch.equal(found[name], buffer) for name, buffer in packed_bytes(expected).items())
        assert all(layer.weight_dtype == dtype for layer in nf4_modules(model).values())
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("order", ["bias-first", "bias-last"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_may_bring_biases_and_packed_weights_in_any_order(order: str, packed: bool) -> None:
    source = build(FAMILIES["llama-biases"], torch.float32)
    quant = QuantConfig()
    items: list[tuple[str, Tensor | QuantizedWeight]] = [(n, p.detach().clone()) for n, p in source.named_parameters()]
    items.sort(key=lambda item: item[0].endswith(".bias"), reverse=order == "bias-first")
    expected = build(FAMILIES["llama-biases"], torch.float32)
    paths = quantize_(expected, quant)
    if packed:
        wanted = {f"{path}.weight" for path in paths}
        items = [(n, quantize(t) if n in wanted and isinstance(t, Tensor) else t) for n, t in items]
    model = loading.empty_model(source.config)
    loading.fill_(model, items, torch.float32, CPU, None if packed else quant)
    assert list(nf4_modules(model)) == paths
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert torch.equal(model(torch.arange(6)[None]), expected(torch.arange(6)[None]))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "no_such"])
def test_impossible_targets_are_refused_before_anything_is_read(
    shop: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "in_4_bits", None)  # would fail if it were reached
    with pytest.raises(UserError) as error:
        load_model(shop / "model", quant=QuantConfig(targets=(target,)))
    assert error.value.code == ("config/no-such-target" if target == "no_such" else "model/not-quantizable")


def test_a_number_that_cannot_be_quantized_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_model(tmp_path / "m", tmp_path / "scratch")
    model, tokenizer = load_model(tmp_path / "m")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[2, 3] = torch.nan
    save_model(model, tokenizer, tmp_path / "bad")
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight\[2, 3\]") as error:
        load_model(tmp_path / "bad", quant=QuantConfig())
    assert error.value.code == "model/non-finite-weight"


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_bytes_are_known_before_they_are_there(double_quant: bool) -> None:
    sizes = [(1, 1), (7, 9), (64, 64), (3, 4096), (129, 255)]
    for (rows, columns), block_size in itertools.product(sizes, (32, 64, 4096)):
        quant = QuantConfig(block_size=block_size, double_quant=double_quant)
        q = quantize(torch.ones(rows, columns), block_size, double_quant)
        assert loading.nf4_bytes(rows * columns, quant) == q.nbytes


def test_the_memory_check_counts_4_bits_as_4_bits(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(shop / "model", quant=QuantConfig())
    needed = weight_bytes(model) + model.model.embed_tokens.weight.numel() * 4  # and the largest tensor again
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed)
    load_model(shop / "model", quant=QuantConfig())
    with pytest.raises(UserError, match="--quant nf4"):
        load_model(shop / "model")
    monkeypatch.setattr(loading, "available_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match="model/too-large"):
        load_model(shop / "model", quant=QuantConfig())


def test_a_stream_in_4_bits_holds_one_dense_tensor(shop: Path) -> None:
    """Counts the dense tensors that are alive whenever the next one is about to be made."""
    source, _ = load_model(shop / "model")
    model, quant = loading.empty_model(source.config), QuantConfig()
    chosen = loading.quantized_bytes(model, quant)
    dense: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in source.named_parameters():
            assert not any(tensor() is not None for tensor in dense), name
            copy = [parameter.detach().clone()]
            if name in chosen:
                dense.append(weakref.ref(copy[0]))
            yield name, copy.pop()

    loading.fill_(model, tensors(), torch.float32, CPU, quant)
    assert len(dense) == 14


PEAK = """
import sys
import torch
from minisft.config import QuantConfig
from minisft.formats import load_model
from minisft.nf4_linear import NF4Linear
from minisft.training.runlog import peak_memory_bytes
from minisft.surgery import weight_bytes

torch.set_num_threads(1)
NF4Linear.from_linear(torch.nn.Linear(64, 64))  # whatever is set up at the first use
before = peak_memory_bytes()
model, _ = load_model(sys.argv[1], torch.bfloat16, quant=QuantConfig())
print(peak_memory_bytes() - before, weight_bytes(model), weight_bytes(model, torch.bfloat16))
"""


@pytest.mark.slow
def test_peak_memory_of_loading_in_4_bits(tmp_path: Path) -> None:
    """At most the quantized model, its largest tensor in fp32 and 64 MiB, the pages of the mapped file counted in."""
    shape = ModelConfig("llama", 2048, 2048, 5632, num_layers=3, num_heads=16, num_kv_heads=4, head_dim=128)
    shape = dataclasses.replace(shape, tie_word_embeddings=True)
    model = loading.empty_model(shape).to(torch.bfloat16).to_empty(device="cpu")
    model.tie()
    largest = max(p.numel() for p in model.parameters())
    noise = torch.randn(largest, generator=torch.Generator().manual_seed(0)).bfloat16()
    for parameter in model.parameters():
        parameter.data = noise[: parameter.numel()].view(parameter.shape).clone()
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    save_model(model, Tokenizer.from_folder(tmp_path / "tokenizer"), tmp_path / "m")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    peak, quantized, dense = map(int, done.stdout.split())
    promised = quantized + largest * 4 + 64 * 2**20
    assert peak <= promised
    assert promised < dense  # or a loader that keeps everything dense would pass


# Training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_in_4_bits_trains_like_the_dense_model_of_the_same_weights(family: str, double_quant: bool) -> None:
    """Loss and every adapter's gradient in fp64."""
    model = build(FAMILIES[family])
    quantize_(model, QuantConfig(double_quant=double_quant))
    dense, lora = densified(model), LoRAConfig(rank=2, alpha=3.0)
    results = []
    for each in (model, dense):
        apply_lora_(each, lora)
        randomise_(each, 0.4)
        ids = torch.randint(tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
        loss = nn.functional.cross_entropy(each(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(each)})
    assert len(results[0]) == 1 + 2 * 14
    assert_same(results[0], results[1])


def test_no_dense_weight_is_kept_for_backward(shop: Path) -> None:
    """What the whole model saves for backward holds nothing of the size of a weight that it does not own."""
    model, _ = load_model(shop / "model", quant=QuantConfig())
    apply_lora_(model, LoRAConfig(rank=2))
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes = {layer.in_features * layer.out_features for layer in nf4_modules(model).values()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.arange(5)[None]).sum()  # 5 tokens: no activation has as many elements as a weight
    assert kept
    assert not [t.shape for t in kept if t.untyped_storage().data_ptr() not in owned and t.numel() in sizes]


def test_packed_and_separate_rows_have_equal_losses(shop: Path) -> None:
    model = load_model(shop / "model", torch.float64, quant=QuantConfig())[0]
    apply_lora_(model, LoRAConfig(rank=2))
    randomise_(model)
    lengths = range(6, 24, 3)  # all rows begin alike, which packing may make use of
    rows = [Encoded([5, 6, 7, *range(n - 3)], [i >= 3 for i in range(n)], n, 0, 3) for n in lengths]
    results = []
    for packing in (True, False):
        losses = [batch_loss_sum(model, batch) for batch in micro_batches(rows, 6 if packing else 1, 0, packing, 64)]
        torch.stack(losses).sum().backward()
        results.append({"loss": torch.stack(losses).sum().detach(), **gradients(model)})
    assert_same(results[0], results[1])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, "packing": True, "double_quant": False}], ids=["plain", "packed"])
def test_resuming_after_a_kill_ends_in_the_same_bits(shop: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    run = config(shop, tmp_path / "whole", save_every=5, keep_last=20, micro_batch_size=2, **changes)
    said: list[str] = []
    train(run, log=said.append)
    assert any(line.startswith("base: 14 linears in 4 bits, ") for line in said)
    expected, log = digest(tmp_path / "whole"), losses(tmp_path / "whole")
    assert log[-1]["loss"] < log[0]["loss"]
    for stop in (5, 15):
        out = tmp_path / f"from-{stop}"
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "adapter")
        for later in range(stop + 5, 21, 5):
            shutil.rmtree(out / "checkpoints" / f"step-{later}")
        train(dataclasses.replace(run, out=str(out)), resume=True, log=quiet)
        assert digest(out) == expected, f"resumed after step {stop}"
        assert losses(out) == log, f"resumed after step {stop}"


@pytest.mark.parametrize("change", [{"quant": "none"}, {"double_quant": False}])
def test_the_quantization_may_not_change_on_resume(shop: Path, tmp_path: Path, change: dict[str, object]) -> None:
    run = config(shop, tmp_path / "run", steps=2)
    train(run, log=quiet)
    with pytest.raises(UserError, match=rf"config\.{next(iter(change))}") as error:
        train(dataclasses.replace(run, **change), resume=True, log=quiet)
    assert error.value.code == "checkpoint/changed"


def test_full_fine_tuning_of_a_folder_in_4_bits_is_refused(shop: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(shop / "model", quant=QuantConfig())
    save_quantized(model, tokenizer, tmp_path / "m4")
    with pytest.raises(UserError, match="14 linears in 4 bits") as error:
        train(config(shop, tmp_path / "run", model=str(tmp_path / "m4"), quant="none", method="full"), log=quiet)
    assert error.value.code == "config/quantized-base"
    assert not (tmp_path / "run").exists()
    result = train(config(shop, tmp_path / "run", model=str(tmp_path / "m4"), quant="none", steps=2), log=quiet)
    assert result.parameters - result.trainable == num_parameters(model)


# The command line


def test_the_command_line_end_to_end(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    flags = ["--steps", "3", "--batch-size", "4", "--rank", "2", "--validation-share", "0.2", "--dtype", "bf16"]
    base = ["--model", str(shop / "model")]
    assert main(["train", *base, "--data", str(shop / "rows.jsonl"), "--out", str(out), "--quant", "nf4", *flags]) == 0
    held, dense = (weight_bytes(load_model(shop / "model", torch.bfloat16, quant=q)[0]) for q in (QuantConfig(), None))
    assert f"base: 14 linears in 4 bits, {held:,} bytes instead of {dense:,} in bf16" in capsys.readouterr().out
    record = json.loads((out / "adapter" / "minisft.json").read_text())["base"]
    assert record["quantization"] == {"levels": "nf4", "block_size": 64, "double_quant": True}
    adapted = [*base, "--adapter", str(out / "adapter"), "--max-new-tokens", "2"]
    generate = ["generate", *adapted, "--prompt", "say aa"]
    assert main([*generate, "--quant", "nf4"]) == 0
    assert "warning" not in capsys.readouterr().err
    for other in ([], ["--quant", "nf4", "--no-double-quant"]):
        assert main([*generate, *other]) == 0
        assert "warning: the adapter was trained on a base held otherwise" in capsys.readouterr().err
    score = [*adapted, "--quant", "nf4", "--data", str(shop / "rows.jsonl"), "--limit", "3", "--out", str(tmp_path / "s.json")]
    assert main(["eval", *score, "--metric", "loss"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["n"] == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("say aa\n\n"))
    assert main(["chat", *adapted, "--quant", "nf4"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--quant", "none"]) == 5
    assert "config.quant" in capsys.readouterr().err
    assert main(["train", *base, "--data", "d", "--out", str(tmp_path / "x"), "--quant", "nf4", "--method", "full"]) == 2
    assert "a frozen 4-bit base has nothing to train in full" in capsys.readouterr().err


# Other programs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows of whole blocks, stored in bf16 as models are."""
    folder = tmp_path_factory.mktemp("wide")
    shape = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=16)
    model, tokenizer = load_model(write_model(folder / "fp32", folder / "scratch", shape))
    save_model(model, tokenizer, folder / "bf16", torch.bfloat16)
    return folder / "bf16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_peft_on_a_bitsandbytes_base_has_our_logits(
    wide: Path, tmp_path: Path, dtype: torch.dtype, tolerance: float, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged in fp64: ours is no further from it than theirs, and both are close.

    Theirs is the dense folder quantized by bitsandbytes itself; with double quantization, where its CPU code rounds the
    scales through a coarse table, it is a folder in 4 bits that we wrote.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    # On a CPU with bf16 instructions its layers pack their weights at the first call. fp32 is then multiplied in bf16, and
    # after state_dict(), which PEFT asks for, the same model's logits are off by 2 of 5 (bitsandbytes 0.50).
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    model, tokenizer = load_model(wide, dtype, quant=QuantConfig(double_quant=double_quant))
    if double_quant:
        save_quantized(model, tokenizer, tmp_path / "m4")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m4", dtype=dtype, device_map="cpu")
    else:
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(wide, quantization_config=how, dtype=dtype, device_map="cpu")
    apply_lora_(model, LoRAConfig(rank=4, alpha=8.0))
    randomise_(model)
    save_adapter(model, tmp_path / "a")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = theirs.eval()(ids).logits
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()(ids).logits
        ours = model.eval()(ids)
    assert (adapted - plain).abs().max() > 0.5
    again, exact = (load_model(wide, kind, quant=QuantConfig(double_quant=double_quant))[0] for kind in (dtype, torch.float64))
    for each in (again, exact):
        load_adapter_(each.eval(), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(ids), ours)
        assert_close(adapted, exact(ids), tolerance)
        assert_close(ours, exact(ids), tolerance)
        errors = [float((found.double() - exact(ids)).abs().mean()) for found in (ours, adapted)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_in_4_bits_is_transformers_on_the_dequantized_weights(smollm2_path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_model(smollm2_path, quant=QuantConfig())
    assert len(nf4_modules(model)) == 210
    assert num_parameters(model) == 134_515_008
    assert weight_bytes(model) / weight_bytes(model, torch.float32) < 0.35  # 113 MB of it is the embedding
    dense, _ = load_model(smollm2_path)
    ids = torch.tensor([tokenizer.encode("The parcel arrived on Tuesday, but the box was empty.")])
    with torch.no_grad():
        before = dense.eval()(ids)
        for path, layer in nf4_modules(model).items():
            dense.get_submodule(path).weight.copy_(layer.dequantized_weight())
        save_model(dense, tokenizer, tmp_path / "m")
        oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
        found = model.eval()(ids)
        assert_close(found, oracle(ids).logits, 1e-4)
    assert (found - before).abs().max() > 0.1  # four bits are not nothing
    assert (found.argmax(-1) == before.argmax(-1)).float().mean() > 0.6  # but the model still knows what it knew


def test_an_adapter_fits_the_4_bit_folder_of_its_base_and_of_no_other(shop: Path, tmp_path: Path) -> None:
    model, _ = load_model(shop / "model", quant=QuantConfig())
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    randomise_(model)
    save_adapter(model, tmp_path / "adapter")
    assert main(["quantize", "--model", str(shop / "model"), "--dtype", "fp32", "--out", str(tmp_path / "q")]) == 0
    in_4_bits, _ = load_model(tmp_path / "q")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter_(in_4_bits, tmp_path / "adapter")
    ids = torch.arange(7)[None]
    assert torch.equal(in_4_bits(ids), model(ids))

    write_model(tmp_path / "other", tmp_path / "scratch", dataclasses.replace(CONFIG, rms_norm_eps=1e-6))
    assert main(["quantize", "--model", str(tmp_path / "other"), "--dtype", "fp32", "--out", str(tmp_path / "q2")]) == 0
    with pytest.raises(UserError, match="adapter/base-mismatch"):
        load_adapter_(load_model(tmp_path / "q2")[0], tmp_path / "adapter")
