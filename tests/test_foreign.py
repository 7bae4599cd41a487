"""Models that transformers computes, trained by our loop: three architectures, what the probe refuses, what PEFT loads.

The oracle is the library itself, called in the plain way: one row, no packing, no cache.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch
from tiny import assert_close
from torch import Tensor

import minisft
from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig
from minisft.formats import context_length, load_adapter_, load_model, save_adapter, save_model
from minisft.formats.foreign import ForeignLM
from minisft.generation import Sampling, generate, read_prompts
from minisft.loss import cross_entropy_sum, head_loss_sum
from minisft.merge_weights import merge, merge_
from minisft.native.decoder import decode_path, next_logits_of
from minisft.serving.batch import Batch, Job
from minisft.serving.lanes import load_lanes
from minisft.serving.prefix_cache import PrefixCache
from minisft.step import set_checkpointing
from minisft.surgery import apply_lora_, lora_modules, nf4_modules

transformers: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'minisft[any]'")
warnings.filterwarnings("ignore", message=".*computed by transformers.*")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(computed by transformers|computed by itself).*"),
]

SIZES = {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# model_type -> (transformers' config class, what differs from SIZES, whether rows can be packed)
KINDS: dict[str, tuple[str, dict[str, object], bool]] = {
    "gpt_neox": ("GPTNeoXConfig", {"attention_dropout": 0.1, "hidden_dropout": 0.1}, True),
    "phi": ("PhiConfig", {"resid_pdrop": 0.1}, True),  # a head with a bias
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}, False),  # tied, learned positions
    "gemma2": ("Gemma2Config", {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}, True),
    "cohere": ("CohereConfig", {"logit_scale": 0.3, "num_key_value_heads": 2}, True),
}
kinds = pytest.mark.parametrize("kind", KINDS)
three = pytest.mark.parametrize("kind", ["gpt_neox", "phi", "opt"])


def write_model(folder: Path, config_class: str, **changes: object) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    theirs.save_pretrained(str(folder))
    tiny_folder.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {kind: write_model(root / kind, name, **changes) for kind, (name, changes, _) in KINDS.items()}


def loaded(folder: Path, **options: Any) -> ForeignLM:
    model = load_model(folder, **options)[0]
    assert isinstance(model, ForeignLM)
    return model


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).eval()
    with torch.no_grad():
        return model(ids).logits


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(seed))


@kinds
def test_logits_are_theirs_however_rows_lie(folders: dict[str, Path], kind: str) -> None:
    """In training mode: their dropout is off, because the loop draws from its own seeds."""
    model, lengths = loaded(folders[kind], dtype=torch.float64), [5, 1, 7]
    assert model.packs == KINDS[kind][2]
    rows = list(ids_of(sum(lengths)).split(lengths))
    apart = torch.cat([their_logits(folders[kind], row[None])[0] for row in rows])
    assert_close(torch.cat([model(row[None])[0] for row in rows]), apart, 1e-6)
    packed = torch.cat([torch.zeros(1, dtype=torch.int64), *rows, torch.zeros(2, dtype=torch.int64)])[None]
    numbers = torch.tensor([[0] + [1] * 5 + [2] + [3] * 7 + [0] * 2])
    assert_close(model(packed, segment_ids=numbers)[0, 1:14], apart, 1e-6)
    padded, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, -len(row) :], mask[i, -len(row) :] = row, 1
    assert_close(model(padded, segment_ids=mask)[mask.bool()], apart, 1e-6)


@three
def test_a_shared_prefix_and_noise_reach_their_rows(folders: dict[str, Path], kind: str) -> None:
    model, prefix, ends = loaded(folders[kind], dtype=torch.float64), ids_of(5), [ids_of(4, seed=2), ids_of(3, seed=3)]
    row, numbers = torch.cat([prefix, *ends])[None], torch.tensor([[1] * 5 + [2] * 4 + [3] * 3])
    hidden = model.hidden(row, segment_ids=numbers, prefix_length=5)[0]
    first, second = (model.hidden(torch.cat([prefix, end])[None])[0] for end in ends)
    assert_close(hidden, torch.cat([first, second[5:]]))
    for length in (5, 3):
        past = model.new_cache(1, 8)
        model.hidden(prefix[None, :length], cache=past)
        rest = {"segment_ids": numbers[:, length:], "prefix_length": 5 - length, "past": past}
        assert_close(model.hidden(row[:, length:], **rest)[0], torch.cat([first[length:], second[5:]]))
    noise = 0.1 * torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers = torch.tensor([[1] * 9 + [2] * 3])
    alone = model.hidden(row[:, 9:], noise=noise[:, 9:])
    assert_close(model.hidden(row, segment_ids=numbers, noise=noise)[:, 9:], alone)
    assert not torch.allclose(alone, model.hidden(row[:, 9:]))


@kinds
def test_the_loss_is_that_of_their_logits(folders: dict[str, Path], kind: str) -> None:
    """Of the bare head it would be another function where logits are scaled (Cohere) or capped (Gemma 2)."""
    model, ids, targets = loaded(folders[kind], dtype=torch.float64), ids_of(2, 6), ids_of(2, 6, seed=4)
    expected = cross_entropy_sum(their_logits(folders[kind], ids).flatten(0, 1), targets.flatten())
    assert_close(head_loss_sum(model.hidden(ids), model.loss_head, targets), expected, 1e-6)


@pytest.mark.parametrize(
    ("kind", "quant"),
    [
        ("gpt_neox", "none"), ("phi", "nf4"), ("opt", "none"),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [("gpt_neox", "nf4"), ("phi", "none"), ("opt", "nf4")]),
    ],
)  # fmt: skip
def test_trained_by_the_loop_and_loaded_by_peft(folders: dict[str, Path], kind: str, quant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = tiny_folder.write_rows(tmp_path / "rows.jsonl")
    run = minisft.RunConfig(
        model=str(folders[kind]), data=str(rows), out=str(tmp_path / "run"), steps=6, batch_size=4, lr=1e-2, dtype="fp32",
        rank=2, quant=quant, validation_share=0.2, eval_every=3,
    )  # fmt: skip
    result = minisft.train(run, log=tiny_folder.quiet)
    losses = [float(str(row["loss"])) for row in tiny_folder.losses(tmp_path / "run") if row.get("loss") is not None]
    assert losses[-1] < losses[0] - 0.3
    model = loaded(folders[kind], quant=QuantConfig() if quant == "nf4" else None)
    assert len(nf4_modules(model)) == (0 if quant == "none" else len(lora_targets(model)))
    load_adapter_(model, result.weights)
    ids = ids_of(2, 9)
    base = transformers.AutoModelForCausalLM.from_pretrained(str(folders[kind]))
    if quant == "nf4":  # PEFT over the numbers that the four bits stand for
        for path, layer in nf4_modules(model).items():
            base.get_submodule(path.removesuffix(".base")).weight.data = layer.dequantized_weight(torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(result.weights)).eval()
    with torch.no_grad():
        assert_close(model(ids), theirs(ids).logits, 1e-4)
        with theirs.disable_adapter():
            assert not torch.allclose(model(ids), theirs(ids).logits, atol=1e-3)


def lora_targets(model: ForeignLM) -> list[str]:
    linears = [m for m in model.modules() if type(m).__name__ in ("Linear", "NF4Linear") and m is not model.lm_head]
    return [str(m) for m in linears]


@three
def test_each_step_of_writing_has_the_logits_of_a_full_pass(folders: dict[str, Path], kind: str) -> None:
    model, texts = loaded(folders[kind]).eval(), [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 1, 4]]
    assert decode_path(model) == "PyTorch (transformers computes the model)"
    with torch.inference_mode():
        cache, hidden = read_prompts(model, texts, 4)
        logits, next_logits = model.head(hidden), next_logits_of(model, cache)
        for step in range(4):
            for row, text in enumerate(texts):
                assert_close(logits[row], model(torch.tensor([text]))[0, -1], 1e-4)
                text.append(int(logits[row].argmax()))
            if step == 1:  # one row has ended
                texts = [texts[0], texts[2]]
                cache.keep_([0, 2])
            logits = next_logits(torch.tensor([text[-1] for text in texts]), cache)


@pytest.mark.parametrize("kind", ["gpt_neox", "opt"])
def test_rows_of_the_server_join_leave_and_grow(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that come one after the other, over the base and over an adapter, get the text of ``generate`` alone."""
    monkeypatch.setattr("minisft.serving.batch.ROOM", 3)
    prompts, lengths = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]], [9, 4, 8]
    adapted = loaded(folders[kind])
    apply_lora_(adapted, LoRAConfig(rank=2, alpha=3.0))
    for layer in lora_modules(adapted).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    save_adapter(adapted, tmp_path / "a")
    lanes = load_lanes(folders[kind], {"a": tmp_path / "a"}, template="plain", dtype="fp32")
    base, other = (lane.model for lane in lanes.values())
    assert [p.data_ptr() for p in base.parameters()] == [p.data_ptr() for n, p in other.named_parameters() if "lora_" not in n]
    texts = []
    for lane, model in zip(lanes.values(), (loaded(folders[kind]), adapted), strict=True):
        lane = replace(lane, eos_ids=frozenset())
        batch, found = Batch(lane.model, PrefixCache(10**9)), [[] for _ in prompts]
        for out, prompt, length in zip(found, prompts, lengths, strict=True):
            batch.admit([Job(lane, prompt, 1, length, Sampling(), (), 0, lambda piece, out=out: out.append(piece.score.token))])
            batch.step()
        while batch.rows:
            batch.step()
        asked = zip(prompts, lengths, strict=True)
        assert found == [generate(model, [prompt], max_new_tokens=length, eos_ids=())[0] for prompt, length in asked]
        texts.append(found)
    assert texts[0] != texts[1]


def test_recomputing_layers_changes_no_gradient(folders: dict[str, Path]) -> None:
    found = []
    for how in ("none", "full"):
        model, ids = loaded(folders["gpt_neox"], dtype=torch.float64), ids_of(2, 8)
        apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
        for layer in lora_modules(model).values():
            torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
        set_checkpointing(model, how)
        head_loss_sum(model.hidden(ids), model.loss_head, ids).backward()
        assert model.theirs.is_gradient_checkpointing == (how == "full")
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close(found[1], found[0])


def test_merged_in_place_and_saved_it_is_transformers_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = load_model(folders["gpt_neox"])
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    ids = ids_of(2, 9)
    expected = model(ids).detach()
    with pytest.raises(UserError, match=r"model/foreign.*merge_\("):
        merge(model)
    save_adapter(model, tmp_path / "a")
    merge_(model)
    save_model(model, tokenizer, tmp_path / "merged")
    assert_close(their_logits(tmp_path / "merged", ids), expected, 1e-4)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (settings["model_type"], settings["attention_dropout"], settings["hidden_dropout"]) == ("gpt_neox", 0.1, 0.1)


def test_context_is_the_files(folders: dict[str, Path]) -> None:
    assert context_length(folders["opt"]) == 512


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_the_probe_names_the_number_it_found(tmp_path: Path) -> None:
    """BERT's head is more than a linear, Mamba uses a weight past its layer, GPT-2 has no linears."""
    bert = refusal(write_model(tmp_path / "bert", "BertConfig"))
    assert "error[model/foreign]" in bert
    assert "head(hidden) is not the logits" in bert
    assert "found off by 0." in bert
    mamba = refusal(write_model(tmp_path / "mamba", "MambaConfig", state_size=4))
    assert "mixer.dt_proj (0 of 7 tokens)" in mamba
    assert "no nn.Linear" in refusal(write_model(tmp_path / "gpt2", "GPT2Config"))


def test_weights_that_adapters_cannot_reach_are_counted(tmp_path: Path, folders: dict[str, Path]) -> None:
    """transformers holds all experts of a layer in two tensors; adapters go on the linears beside them."""
    folder = write_model(tmp_path / "m", "MixtralConfig", num_key_value_heads=2, num_local_experts=3)
    experts = 2 * 3 * (3 * 32 * 48 + 32)  # two layers, three experts: gate, up, down, and a row of the router
    said = rf"m: {experts:,} of [\d,]+ weights are in no linear.*layers\.0\.mlp\.gate\.weight.*and 4 more"
    with pytest.warns(UserWarning, match=said):
        model = loaded(folder)
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    assert {path.split(".")[3] for path in lora_modules(model)} == {"self_attn"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded(folders["gemma2"])
        loaded(folders["opt"])
    assert not [each for each in caught if "no linear" in str(each.message)]


def test_a_model_that_sees_ahead_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.gpt_neox.modeling_gpt_neox
    monkeypatch.setattr(attention, "create_causal_mask", lambda *args, **kwargs: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    monkeypatch.setattr(attention.GPTNeoXAttention, "is_causal", False, raising=False)
    assert "a token sees what follows it" in refusal(folders["gpt_neox"])


def test_rows_that_leak_are_computed_apart_and_that_is_said(tmp_path: Path) -> None:
    """Convolutions of LFM2 know no packing."""
    folder = write_model(tmp_path / "m", "Lfm2Config", num_key_value_heads=2, layer_types=["conv", "full_attention"])
    with pytest.warns(UserWarning, match=r"packed rows see each other \(off by 0\.\d+\); each row is computed by itself"):
        model = loaded(folder)
    rows = [ids_of(5), ids_of(4, seed=2)]
    together = model(torch.cat(rows)[None], segment_ids=torch.tensor([[1] * 5 + [2] * 4]))[0]
    assert_close(together, torch.cat([model(row[None])[0] for row in rows]), 1e-4)


def test_without_transformers_the_way_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    said = refusal(folders["phi"])
    assert "error[model/unsupported]" in said
    assert "found phi; expected llama, mistral, qwen2, qwen3, smollm3, granite, olmo2, gemma3_text" in said
    assert "fix: pip install 'minisft[any]'" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "no_such_model", "auto_map": {"AutoConfig": "evil.Config"}}, "no_such_model"),
        ({"hidden_size": "32"}, "phi"),
        ({"num_hidden_layers": 3}, "error[model/missing-tensor] tensors are missing"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "phi"),
    ],
)
def test_folders_that_are_not_what_they_say(
    folders: dict[str, Path], changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    for file in folders["phi"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text("raise SystemExit('code from the folder ran')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    assert said in refusal(tmp_path)
