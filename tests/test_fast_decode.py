"""``--fast-decode``: 8 bits against their formula, steps against a model of the rounded weights, drift, what is refused."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import tiny_folder
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import minisft
from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.evaluation.fast_decode import DRIFT_TOKENS, Drift, exact_decode_, fast_decode_
from minisft.generation import ChatCache, Sampling, _scored_tokens, generate, read_prompts
from minisft.kernels import cpu_build, cpu_nf4, eight_bit
from minisft.kernels.cpu_decode import Unsupported
from minisft.kernels.eight_bit import eight_bits_of, quantize_8bit
from minisft.model import CausalLM
from minisft.native.decoder import NativeDecoder, in_eight_bits, next_logits_of
from minisft.optim import MasterAdamW
from minisft.serving.lanes import sharing_copy
from minisft.surgery import apply_lora_, lora_modules, quantize_

CONFIG = replace(tiny.LLAMA, hidden_size=64, intermediate_size=96, num_heads=8, num_kv_heads=2, head_dim=12)
UNTIED = replace(CONFIG, tie_word_embeddings=False, hidden_size=48, intermediate_size=80, qkv_bias=True)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [3], [5, 6, 7], [8, 9, 1]]
needs_native = pytest.mark.skipif(
    cpu_build.load().reason in ("no C++ compiler found", "MINISFT_NATIVE=0"), reason="needs the compiled library"
)


def made(
    config: ModelConfig = CONFIG, kind: str = "fp32", adapted: bool = False, numbers: torch.dtype | None = None
) -> CausalLM:
    """``kind``: fp32 or bf16, and "+nf4" for linears in 4 bits. Weights hold ``numbers`` of another dtype, adapters do not."""
    name, _, quant = kind.partition("+")
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    model = tiny.build(config, numbers or dtype).to(dtype)
    if quant:
        quantize_(model, QuantConfig())
    if adapted:
        apply_lora_(model, LoRAConfig(rank=5, alpha=3.0))
        draw = torch.Generator().manual_seed(7)
        for layer in lora_modules(model).values():
            layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=draw) * 0.2
    return model.eval().requires_grad_(False)


# ---- the format ----------------------------------------------------------------------------------------------------------


def by_hand(row: list[float]) -> tuple[list[int], float]:
    """One block in fp64: its codes and its scale."""
    scale = max(map(abs, row)) / 127
    return [round(w / scale) if scale else 0 for w in row], scale


@pytest.mark.parametrize(("features", "block"), [(16, 16), (48, 16), (96, 32), (192, 64), (256, 64), (576, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_the_formula(features: int, block: int, dtype: torch.dtype) -> None:
    weight = tiny.randn(5, features).to(dtype)
    found = quantize_8bit(weight)
    assert (found.block_size, found.codes.dtype, found.scales.dtype) == (block, torch.int8, torch.float32)
    for i, row in enumerate(weight.double().tolist()):
        for b in range(features // block):
            codes, scale = by_hand(row[b * block : (b + 1) * block])
            assert found.scales[i, b] == pytest.approx(scale, rel=1e-6)
            # A quotient within a rounding of one half may fall to either side.
            ours = found.codes[i, b * block : (b + 1) * block].tolist()
            near = [abs(abs(w / scale) % 1 - 0.5) < 1e-4 for w in row[b * block : (b + 1) * block]]
            assert all(a == c or tie for a, c, tie in zip(ours, codes, near, strict=True))


finite = st.floats(-(2.0**126), 2.0**126, width=32)


@given(st.lists(finite, min_size=32, max_size=32))
def test_error_is_at_most_half_a_scale(numbers: list[float]) -> None:
    """Zeros, subnormal numbers and large ones too; two roundings of fp32 come on top."""
    weight = torch.tensor([numbers], dtype=torch.float32)
    found = quantize_8bit(weight)
    error = (found.dequantize().double() - weight.double()).abs()
    exact_scale = weight.abs().max().double() / 127
    assert (error <= exact_scale * (0.5 + 1e-4) + 64 * 2.0**-149).all()
    assert int(found.codes.min()) >= -127
    negated = quantize_8bit(-weight)
    assert torch.equal(negated.codes, -found.codes)


def test_whatever_is_rounded_at_once_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = tiny.randn(37, 64).float()
    whole = quantize_8bit(weight)
    monkeypatch.setattr(eight_bit, "AT_ONCE", 640)
    parts = quantize_8bit(weight)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    weight = torch.ones(2, 128)
    weight[1, 70] = bad
    found = quantize_8bit(weight).dequantize()
    assert found[1, 64:].isnan().all()
    assert torch.equal(found[0], weight[0])
    assert torch.equal(found[1, :64], weight[1, :64])


# ---- steps ---------------------------------------------------------------------------------------------------------------


def rounded(model: CausalLM) -> CausalLM:
    """A copy in fp32 whose dense linears hold what 8 bits hold; the embedding keeps its own numbers."""
    same = copy.deepcopy(model)
    for linear in [module for module in same.modules() if isinstance(module, nn.Linear)]:
        linear.weight = nn.Parameter(quantize_8bit(linear.weight).dequantize(), requires_grad=False)
    return same


@needs_native
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("config", "kind"), [(CONFIG, "fp32"), (CONFIG, "bf16"), (CONFIG, "fp32+nf4"), (UNTIED, "fp32"), (UNTIED, "bf16")]
)
def test_a_step_has_the_bits_of_the_rounded_weights(config: ModelConfig, kind: str, adapted: bool) -> None:
    """Any number of rows. Both are native steps: that one of dense fp32 weights is right, test_native_decode.py shows."""
    model = made(config, kind, adapted)
    same = rounded(model)
    with torch.inference_mode():
        for count in (1, 2, 3, 5, 8, 16):
            prompts = [[1, 2, n] for n in range(count)]
            ours, theirs, plain = (read_prompts(model, prompts, 3)[0] for _ in range(3))
            fast, dense = NativeDecoder(model, ours, eight_bits=True), NativeDecoder(same, theirs)
            exact = NativeDecoder(model, plain).logits(torch.arange(count), plain)
            for turn in range(2):
                tokens = torch.arange(count) + turn
                found = fast.logits(tokens, ours)
                wanted = dense.logits(tokens, theirs)
                assert torch.equal(found, wanted) or (cpu_nf4.tile_floats() and count >= 10)  # AMX tiles scale a block's sum
                tiny.assert_close(found, wanted, 1e-5 if model.dtype == torch.float32 else 0.02)
                assert turn or not torch.equal(found, exact)


def scores(model: CausalLM) -> Tensor:
    """One step as ``generate`` computes it."""
    with torch.inference_mode():
        cache = read_prompts(model, PROMPTS, 1)[0]
        return next_logits_of(model, cache)(torch.tensor([1, 2, 3, 4]), cache)


@needs_native
def test_it_is_switched_on_and_off() -> None:
    model = made(adapted=True)
    before, other = scores(model), made(adapted=True)
    drift = fast_decode_(model, PROMPTS)
    assert torch.equal(scores(other), before)  # another model of the same numbers is not touched
    found = scores(model)
    assert not torch.equal(found, before)
    with torch.inference_mode():
        cache = read_prompts(model, PROMPTS, 1)[0]
        assert torch.equal(found, NativeDecoder(model, cache, eight_bits=True).logits(torch.tensor([1, 2, 3, 4]), cache))
    exact_decode_(model)
    assert torch.equal(scores(model), before)
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert drift.num_bytes == sum(w.numel() + 4 * w.numel() // quantize_8bit(w).block_size for w in linears)


def scale_in_place_(model: CausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight.mul_(-3)


def replace_data_(model: CausalLM) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = -3 * weight.data


def replace_parameter_(model: CausalLM) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(-3 * layer.weight, requires_grad=False)


def change_behind_its_back_(model: CausalLM) -> None:
    """Not counted by PyTorch."""
    model.model.layers[1].mlp.up_proj.weight.data.mul_(-3)


@needs_native
@pytest.mark.parametrize("change", [scale_in_place_, replace_data_, replace_parameter_, change_behind_its_back_])
def test_changed_weights_are_rounded_again(change) -> None:
    model = made()
    fast_decode_(model, PROMPTS)
    before = scores(model)
    change(model)
    after = scores(model)
    assert (after - before).abs().max() > 0.01
    fresh = made()
    scale_in_place_(fresh)
    fast_decode_(fresh, PROMPTS)
    assert torch.equal(after, scores(fresh))


@needs_native
def test_a_change_of_one_row_is_seen() -> None:
    """Of a large weight, in which few numbers are compared: PyTorch counts it."""
    model = made(replace(CONFIG, intermediate_size=960))
    fast_decode_(model, PROMPTS)
    before = scores(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7:9].add_(2.0)
    assert not torch.equal(scores(model), before)


@needs_native
def test_training_in_full_is_seen() -> None:
    """The fused AdamW of PyTorch writes to fp32 parameters without counting it."""
    model = made()
    fast_decode_(model, PROMPTS)
    for parameter in model.parameters():
        parameter.requires_grad_().grad = torch.ones_like(parameter)
    MasterAdamW(dict(model.named_parameters()), betas=(0.9, 0.999), weight_decay=0.0).step(0.05)
    after = scores(model)
    fast_decode_(model, PROMPTS)
    assert torch.equal(after, scores(model))


@needs_native
def test_more_rows_than_one_native_step_takes() -> None:
    """In parts, so that a row's text does not depend on how many others there are."""
    model = made(adapted=True)
    fast_decode_(model, PROMPTS)
    prompts = [[1, 2, n % 20, 3] for n in range(37)]
    together = generate(model, prompts, max_new_tokens=6, eos_ids=(), batch_size=37)
    assert together == generate(model, prompts, max_new_tokens=6, eos_ids=(), batch_size=5)
    exact_decode_(model)
    assert together != generate(model, prompts, max_new_tokens=6, eos_ids=())


@needs_native
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_an_adapter_of_the_head(config: ModelConfig) -> None:
    model = made(config)
    apply_lora_(model, LoRAConfig(rank=3, targets=("lm_head", "q_proj")))
    for layer in lora_modules(model).values():
        nn.init.normal_(layer.lora_B)
    model.eval()
    exact = scores(model)
    with torch.inference_mode():
        cache = read_prompts(model, PROMPTS, 1)[0]
        tiny.assert_close(exact, model.head(model.hidden(torch.tensor([[1], [2], [3], [4]]), cache=cache)[:, 0]), 1e-5)
    fast_decode_(model, PROMPTS)
    assert (scores(model) - exact).abs().max() > 1e-4
    with torch.inference_mode():
        caches = [read_prompts(m, PROMPTS, 1)[0] for m in (model, model)]
        same = NativeDecoder(rounded(model), caches[0]).logits(torch.arange(4), caches[0])
        assert torch.equal(NativeDecoder(model, caches[1], eight_bits=True).logits(torch.arange(4), caches[1]), same)


@needs_native
def test_turns_of_a_chat_are_read_with_the_weights_as_they_are() -> None:
    model, kept, turns = made(), ChatCache(), []
    fast_decode_(model, PROMPTS)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    for _ in range(3):
        tokens = [token for _, token, *_ in _scored_tokens(model, {0: prompt}, 8, (), Sampling(), scored=False, kept=kept)]
        turns.append(tokens)
        assert tokens == generate(model, [prompt], max_new_tokens=8, eos_ids=())[0]
        prompt = [*prompt, *tokens, 9, 3]
        cache, _ = kept.read(model, [prompt], 1)
        fresh, _ = read_prompts(model, [prompt], 1)
        tiny.assert_close(cache.keys[:, :, :, : len(prompt)], fresh.keys[:, :, :, : len(prompt)], 1e-5)
    assert len(set(map(tuple, turns))) == 3


@needs_native
def test_a_model_that_native_code_cannot_decode_any_more_is_an_error() -> None:
    model = made()
    fast_decode_(model, PROMPTS)
    apply_lora_(model, LoRAConfig(rank=2, use_dora=True))
    with pytest.raises(UserError, match=r"config/fast-decode.*DoRALinear"):
        generate(model.eval(), PROMPTS, max_new_tokens=2, eos_ids=())
    exact_decode_(model)
    assert len(generate(model, PROMPTS, max_new_tokens=2, eos_ids=())) == len(PROMPTS)


@needs_native
def test_rows_that_are_no_groups_of_16_are_not_read() -> None:
    with torch.inference_mode():
        model = made(tiny.LLAMA)
        with pytest.raises(Unsupported, match="no multiple of 16"):
            NativeDecoder(model, model.new_cache(1, 4), eight_bits=True)


@needs_native
def test_models_that_share_weights_share_the_eight_bits_and_free_them() -> None:
    gc.collect()
    kept = len(eight_bit._copies)
    base = made()
    adapted = sharing_copy(base)
    apply_lora_(adapted, LoRAConfig(rank=2))
    adapted.eval()
    fast_decode_(base, PROMPTS)
    first = len(eight_bit._copies)
    assert first == kept + 15  # seven linears in each of two layers, and the head
    fast_decode_(adapted, PROMPTS)
    assert len(eight_bit._copies) == first
    q = base.model.layers[0].self_attn.q_proj
    assert eight_bits_of(q.weight) is eight_bits_of(adapted.model.layers[0].self_attn.q_proj.base.weight)
    del base, adapted, q
    gc.collect()
    assert len(eight_bit._copies) == kept


# ---- the drift -----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_drift_is_that_of_whole_passes(kind: str) -> None:
    """By another road: the model's own greedy answers, scored whole by the readable model and by one of rounded weights."""
    model = made(kind=kind)
    drift = fast_decode_(model, PROMPTS)
    exact_decode_(model)
    readable, other = copy.deepcopy(model).float().double(), rounded(model).double()
    answers = generate(model, PROMPTS, max_new_tokens=DRIFT_TOKENS + 1, eos_ids=())
    kls, same = [], 0
    with torch.inference_mode():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            cache, others = (m.new_cache(1, len(prompt) + DRIFT_TOKENS) for m in (readable, other))
            readable.hidden(torch.tensor([prompt]), cache=cache)
            others.put_(0, cache)  # prompts are read with the weights as they are
            for token in answer[:DRIFT_TOKENS]:
                p, q = (
                    m.head(m.hidden(torch.tensor([[token]]), cache=c)[:, 0]).log_softmax(-1)[0]
                    for m, c in ((readable, cache), (other, others))
                )
                kls.append(float((p.exp() * (p - q)).sum()))
                same += int(p.argmax() == q.argmax())
    assert drift.num_tokens == len(kls) == 4 * DRIFT_TOKENS
    tolerance = 1e-3 if kind == "fp32" else 0.5  # the cache and the logits of the one that ran were bf16
    assert drift.mean_kl == pytest.approx(sum(kls) / len(kls), rel=tolerance)
    assert drift.largest_kl == pytest.approx(max(kls), rel=2 * tolerance)
    assert abs(drift.num_same - same) <= (0 if kind == "fp32" else 3)
    assert drift.mean_kl > 0


@needs_native
def test_long_and_many_prompts_are_cut() -> None:
    model = made(replace(CONFIG, max_position_embeddings=20))
    assert fast_decode_(model, [list(range(19)), [1] * 40] * 20).num_tokens == 16 * 10
    model = made(replace(CONFIG, max_position_embeddings=64))
    assert fast_decode_(model, [list(range(29)) * 3]).num_tokens == DRIFT_TOKENS


def test_the_drift_in_words() -> None:
    text = str(Drift(12_400_000, 112, 0.00083, 0.0029, 109))
    assert text == (
        "fast decoding: dense weights read in 8 bits (12 MB more memory): KL 8.3e-04 nats a token, 2.9e-03 at most; "
        "the likeliest token the same at 109 of 112"
    )


# ---- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: made().double(), "computes in float64"),
        (lambda: made(replace(CONFIG, activation="gelu")), "activation is gelu"),
        pytest.param(lambda: made(tiny.LLAMA), "no multiple of 16", marks=needs_native),
    ],
)
def test_where_it_is_not_possible_nothing_is_switched_on(model, reason: str) -> None:
    asked = model()
    with pytest.raises(UserError, match=f"config/fast-decode.*blue.*{reason}"):
        fast_decode_(asked, PROMPTS, "blue")
    assert asked not in in_eight_bits
    assert len(generate(asked, PROMPTS, max_new_tokens=2, eos_ids=())) == len(PROMPTS)


@needs_native
def test_what_cannot_be_measured_is_refused() -> None:
    model = made()
    fast_decode_(model, PROMPTS)
    for nothing in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="data/no-prompt"):
            fast_decode_(model, nothing)
    assert model in in_eight_bits  # it was on, and stays so
    model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="model/non-finite-weight"):
        fast_decode_(model, PROMPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fast")
    config = replace(tiny_folder.CONFIG, hidden_size=32, intermediate_size=48, head_dim=8)
    return tiny_folder.write_model(place / "model", place / "scratch", config)


@needs_native
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_commands_say_what_it_costs(folder: Path, command: str, capsys, monkeypatch) -> None:
    """Beside the answer: only that is on standard output."""
    asked = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    words = [command, "--model", str(folder), "--max-new-tokens", "4", "--fast-decode"]
    assert main([*words, *(["--prompt", "hello"] if command == "generate" else [])]) == 0
    out, err = capsys.readouterr()
    assert "fast decoding: dense weights read in 8 bits (0 MB more memory): KL " in err
    assert "fast" not in out
    model, tokenizer = minisft.load_model(folder)
    fast_decode_(model.eval(), PROMPTS)
    assert out.strip() == minisft.generate(model, tokenizer, "hello", max_new_tokens=4).strip()


@needs_native
def test_the_server_says_it_for_each_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette", reason="needs the server: pip install -e '.[serve]'")
    from minisft.serving import server

    model, _ = minisft.load_model(folder)
    apply_lora_(model, LoRAConfig(rank=2))
    for layer in lora_modules(model).values():
        nn.init.ones_(layer.lora_B)
    minisft.save_adapter(model, tmp_path / "a")
    found: list[bool] = []

    def listen(*_: object) -> None:
        lanes = engine.call_args.args[0]
        found.extend(lane.model in in_eight_bits for lane in lanes.values())

    monkeypatch.setattr(server, "run_server", listen)
    monkeypatch.setattr(server, "Engine", engine := mock.Mock(wraps=server.Engine))
    for fast in (True, False):
        said: list[str] = []
        server.serve(folder, {"red": tmp_path / "a"}, fast_decode=fast, log=said.append)
        assert [line.partition(":")[0] for line in said] == (["model", "red"] if fast else [])
    assert found == [True, True, False, False]


def test_the_command_refuses_where_it_cannot(folder: Path, capsys, tmp_path: Path) -> None:
    """24 inputs are no multiple of 16. The model could write, but not as it was asked to."""
    odd = tiny_folder.write_model(tmp_path / "model", tmp_path / "scratch")
    assert main(["generate", "--model", str(odd), "--prompt", "hello", "--fast-decode"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[config/fast-decode] fast decoding is not possible here: --fast-decode; found ")
    assert err.count("\n") == 1
