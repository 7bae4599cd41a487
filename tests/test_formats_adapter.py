"""Adapter folders: PEFT is the oracle in both directions; every refusal is provoked once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig
from minisft.formats import load_adapter_, save_adapter
from minisft.formats.source import Origin, set_origin_
from minisft.surgery import apply_lora_, lora_modules, quantize_

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 9, 3, 60, 2, 7]])


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).eval()


def randomise_(model: nn.Module) -> None:
    """A trained-looking adapter: no factor is zero."""
    torch.manual_seed(1)
    for adapter in lora_modules(model).values():
        nn.init.normal_(adapter.lora_A, std=0.3)
        nn.init.normal_(adapter.lora_B, std=0.3)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


CONFIGS = {
    "all": LoRAConfig(rank=4, alpha=6.0),
    "rslora": LoRAConfig(rank=4, alpha=6.0, use_rslora=True, dropout=0.25),
    "embedding": LoRAConfig(rank=4, alpha=8.0, targets=("q_proj", "embed_tokens")),
    "ranks": LoRAConfig(
        rank=4, alpha=8.0, rank_pattern={"v_proj": 2, "1.mlp.up_proj": 7}, alpha_pattern={"layers.0.self_attn.q_proj": 3.5}
    ),
    "some": LoRAConfig(rank=3, alpha=8.0, targets=("model.layers.1.self_attn.q_proj", "down_proj")),
    "regex": LoRAConfig(rank=3, alpha=8.0, targets=r".*layers\.0\.(mlp|self_attn)\.[a-q]\w*"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_ours_with_equal_logits(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    base = logits(model)
    apply_lora_(model, CONFIGS[name])
    randomise_(model)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a", base_name="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT uses what transformers deprecates
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"))
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    assert config.base_model_name_or_path == "tiny"
    assert config.use_rslora == CONFIGS[name].use_rslora
    assert config.lora_dropout == CONFIGS[name].dropout


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.(k_proj|up_proj)"},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.1.*": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3},
    },
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    "layers of a list": {
        "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "lay.rs"],
    },
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by pattern": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*(up|k)_proj"},
    "excluded from pattern": {"target_modules": r".*\.(k_proj|up_proj)", "exclude_modules": ["k_proj"]},
    "all at once": {
        "target_modules": ["q_proj", "v_proj"], "exclude_modules": r"model\.layers\.\d+\.self_attn\.q_proj",
        "layers_to_transform": [1],
        "layers_pattern": "layers", "rank_pattern": {"v_proj": 2},
    },
    "start": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "untied": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
}  # fmt: skip


def peft_adapter(folder: Path, **settings: Any) -> Any:
    """An adapter of PEFT, as if trained for a while and saved in ``folder``; the model that has it."""
    embedded = settings.pop("save_embedding_layers", "auto")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)).eval()
        torch.manual_seed(2)
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        theirs.save_pretrained(str(folder), save_embedding_layers=embedded)
    return theirs


def agrees(folder: Path, theirs: Any) -> list[str]:
    """Our model with the adapter gives PEFT's logits; returns the adapted paths."""
    model = tiny_llama()
    paths = load_adapter_(model, folder)
    assert paths == list(lora_modules(model))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-2
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_ours_loads_peft_with_equal_logits(name: str, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path / "a", **PEFT_CONFIGS[name])
    paths = agrees(tmp_path / "a", theirs)
    assert set(paths) == set(theirs.targeted_module_names)
    model = tiny_llama()
    load_adapter_(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")  # what we write selects the same modules by itself
    assert load_adapter_(tiny_llama(), tmp_path / "b") == paths


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["lm_head", "up_proj"]])
def test_weights_of_the_base_beside_the_factors_are_harmless_while_they_are_its_own(targets: list[str], tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path / "a", target_modules=targets, save_embedding_layers=True)
    stored = [name for name in load_file(tmp_path / "a" / "adapter_model.safetensors") if "lora_" not in name]
    assert stored
    agrees(tmp_path / "a", theirs)
    for name in stored:
        peft_adapter(tmp_path / name, target_modules=targets, save_embedding_layers=True)
        weights = tmp_path / name / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors[name][3, 5] += 1e-3
        save_file(tensors, weights)
        message = refused(tmp_path / name, "unsupported")
        assert name in message
        assert "merge_and_unload" in message


@pytest.mark.slow
def test_how_the_factors_were_started_does_not_matter_afterwards(tmp_path: Path) -> None:
    """EVA spreads the rank over the layers by what it has seen of the data, and PEFT writes its settings beside the factors."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM",
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0),
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    torch.manual_seed(4)
    batches = [{"input_ids": torch.randint(0, 64, (2, 9)), "attention_mask": torch.ones(2, 9).long()} for _ in range(8)]
    peft.initialize_lora_eva_weights(theirs, dataloader=batches, show_progress_bar=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2.0)
    theirs.eval().save_pretrained(str(tmp_path / "a"))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["eva_config"]
    assert settings["init_lora_weights"] == "eva"
    agrees(tmp_path / "a", theirs)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_was_changed_with_the_factors_is_refused_until_it_is_converted(init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "first"))
    theirs.peft_config["default"].init_lora_weights = init
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2.0)
    theirs.save_pretrained(str(tmp_path / "a"))
    assert "path_initial_model_for_weight_conversion" in refused(tmp_path / "a", "unsupported")
    theirs.save_pretrained(str(tmp_path / "b"), path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    agrees(tmp_path / "b", theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    model, again = tiny_llama(), tiny_llama()
    apply_lora_(model, CONFIGS[name])
    randomise_(model)
    save_adapter(model, tmp_path / "a", base_name="tiny", fingerprint="f" * 64, facts={"step": 3})
    load_adapter_(again, tmp_path / "a")
    save_adapter(again, tmp_path / "b", base_name="tiny", fingerprint="f" * 64, facts={"step": 3})
    for file in ("adapter_config.json", "adapter_model.safetensors", "minisft.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "minisft.json").read_text())["base"]["fingerprint"] == "f" * 64


class Twins(nn.Module):
    """``lin`` is a path of its own and the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.Module()
        self.block.lin = nn.Linear(8, 8)


@pytest.mark.slow
def test_a_path_that_ends_another_path_is_told_apart(tmp_path: Path) -> None:
    model = Twins()
    apply_lora_(model, LoRAConfig(rank=2, alpha=2.0, targets="lin"))
    randomise_(model)
    save_adapter(model, tmp_path / "a")
    assert load_adapter_(Twins(), tmp_path / "a") == ["lin"]
    both = Twins()
    apply_lora_(both, LoRAConfig(rank=2, alpha=2.0, targets=("lin",), rank_pattern={"^lin": 3}))
    randomise_(both)
    save_adapter(both, tmp_path / "b")
    again = Twins()
    load_adapter_(again, tmp_path / "b")
    assert {path: adapter.rank for path, adapter in lora_modules(again).items()} == {"lin": 3, "block.lin": 2}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter on the q projections of the tiny model."""
    model = tiny_llama()
    apply_lora_(model, LoRAConfig(rank=4, alpha=8.0, targets=("q_proj",)))
    randomise_(model)
    save_adapter(model, tmp_path / "saved", base_name="tiny", fingerprint="a" * 64)
    return tmp_path / "saved"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, code: str, model: nn.Module | None = None) -> str:
    model = tiny_llama() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_adapter_(model, folder)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert caught.value.code == f"adapter/{code}"
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("target_parameters", ["model.layers.0.mlp.up_proj.weight"]),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [3]),
        ("init_lora_weights", "pissa"),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("some_option_of_next_year", "on"),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_unsupported_options_are_named(saved: Path, name: str, value: object) -> None:
    edit(saved, **{name: value})
    message = refused(saved, "unsupported")
    assert name in message
    assert "; fix: " in message


def test_tied_adapters_of_embedding_and_head_are_refused(saved: Path) -> None:
    edit(saved, ensure_weight_tying=True, target_modules=["q_proj", "lm_head"])
    assert "ensure_weight_tying" in refused(saved, "unsupported")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_options_at_nothing_are_ignored(saved: Path, value: object) -> None:
    edit(saved, some_option_of_next_year=value)
    load_adapter_(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"r": "4"}, "bad-config", "r"),
        ({"r": 0}, "bad-config", "rank"),
        ({"lora_dropout": 1.5}, "bad-config", "dropout"),
        ({"target_modules": 3}, "bad-config", "target_modules"),
        ({"target_modules": []}, "bad-config", "target_modules"),
        ({"target_modules": ["no_such_module"]}, "base-mismatch", "no_such_module"),
        ({"target_modules": "(q_proj"}, "bad-config", "pattern"),
        ({"target_modules": r"(\w+\.?)*!"}, "bad-config", "longer than 2 s"),
        ({"rank_pattern": {"q_proj": "x"}}, "bad-config", "q_proj"),
        ({"r": 3}, "rank", "expected rank 3"),
        ({"target_modules": ["q_proj", "v_proj"]}, "missing-tensor", "4 of 8 tensors are missing"),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, "missing-tensor", "layers.0.self_attn.v_proj"),
        ({"layers_to_transform": [1]}, "unexpected-tensor", "layers.0.self_attn.q_proj"),
        ({"layers_to_transform": 0}, "unexpected-tensor", "layers.1.self_attn.q_proj"),
        ({"layers_to_transform": [2]}, "base-mismatch", "layers_to_transform"),
        ({"layers_to_transform": [0.5]}, "bad-config", "layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "bad-config", "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(lay"}, "bad-config", "patterns"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "unexpected-tensor", "layers.1.self_attn.q_proj"),
        ({"exclude_modules": r"(q_proj"}, "bad-config", "patterns"),
        ({"exclude_modules": [3]}, "bad-config", "exclude_modules"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, "unexpected-tensor", "layers.1.self_attn.q_proj"),
    ],
)
def test_wrong_settings(saved: Path, changes: dict[str, object], code: str, said: str) -> None:
    edit(saved, **changes)
    assert said in refused(saved, code)


def test_names_that_this_model_lacks_do_no_harm(saved: Path) -> None:
    edit(saved, target_modules=["q_proj", "c_attn"])
    assert len(load_adapter_(tiny_llama(), saved)) == 2


A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")


def test_wrong_tensors(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    good = load_file(weights)

    def write(**changes: torch.Tensor) -> None:
        save_file({**good, **{{"A": A0, "B": B0}.get(name, name): tensor for name, tensor in changes.items()}}, weights)

    save_file({name: tensor for name, tensor in good.items() if name != B0}, weights)
    assert B0 in refused(saved, "missing-tensor")
    write(**{"base_model.model.lm_head.weight": torch.zeros(64, 32)})
    assert "lm_head" in refused(saved, "unsupported")
    write(**{"base_model.model.model.rotary.weight": torch.zeros(64, 32)})
    assert "rotary" in refused(saved, "unexpected-tensor")
    write(A=torch.ones(4, 40))
    message = refused(saved, "base-mismatch")
    assert "32 x 40" in message
    assert "32 x 32" in message
    write(A=torch.ones(4, 32, dtype=torch.int32))
    assert "I32" in refused(saved, "dtype")
    write(A=torch.ones(128))
    refused(saved, "shape")
    write(A=torch.ones(4, 32).index_fill(1, torch.tensor([7]), float("nan")))
    message = refused(saved, "non-finite")
    assert "4 of 128" in message
    assert "(0, 7)" in message
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "truncated" in refused(saved, "safetensors")
    weights.unlink()
    refused(saved, "no-weights")
    (saved / "adapter_config.json").unlink()
    refused(saved, "no-config")


def test_dora_needs_its_lengths_in_the_right_shape(saved: Path) -> None:
    edit(saved, use_dora=True, lora_dropout=0.5)  # a dropout that does nothing outside of training
    assert "2 of 6 tensors are missing" in refused(saved, "missing-tensor")
    weights = saved / "adapter_model.safetensors"
    factors = load_file(weights)
    lengths = {
        name.removesuffix("lora_A.weight") + "lora_magnitude_vector": torch.ones(32) for name in factors if "lora_A" in name
    }
    first = min(lengths)
    for wrong, code, said in (
        (torch.ones(33), "base-mismatch", "33 row lengths"),
        (torch.ones(32, 1), "shape", "no vector"),
        (torch.ones(32, dtype=torch.int32), "dtype", "I32"),
        (torch.full((32,), torch.nan), "non-finite", "NaN"),
    ):
        save_file({**factors, **lengths, first: wrong}, weights)
        assert said in refused(saved, code)
    save_file({**factors, **lengths}, weights)
    assert len(load_adapter_(tiny_llama(), saved)) == 2


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_dora_over_an_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT takes its norms over the vocabulary, one for each dimension: they are not the lengths of rows."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM", use_dora=True)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "a"))
    assert "use_dora over an embedding" in refused(tmp_path / "a", "unsupported")


def test_an_adapter_without_effect_is_loaded_with_a_warning(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    save_file({**load_file(weights), B0: torch.zeros(32, 4)}, weights)
    with pytest.warns(UserWarning, match="no effect in 1 of 2 modules"):
        load_adapter_(tiny_llama(), saved)


def test_a_second_adapter_is_refused(saved: Path) -> None:
    model = tiny_llama()
    load_adapter_(model, saved)
    refused(saved, "already-there", model)


def test_another_base_is_refused_unless_asked_for(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"other weights")
    model = tiny_llama()
    set_origin_(model, Origin("other", str(file), "gguf", "Q4_1"))
    message = refused(saved, "base-mismatch", model)
    assert "load tiny" in message
    assert "other (" in message
    load_adapter_(model, saved, allow_other_base=True)


def test_an_embedding_that_peft_changed_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_lora_(model, LoRAConfig(rank=2, alpha=2.0, targets=("embed_tokens",)))
    randomise_(model)
    save_adapter(model, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    stored = tiny_llama().model.embed_tokens.weight.detach().clone()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(weights), name: stored}, weights)
    load_adapter_(tiny_llama(), tmp_path / "a")
    save_file({**load_file(weights), name: stored + 1}, weights)
    assert name in refused(tmp_path / "a", "unsupported")


def test_saving_nothing_or_over_something_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter/none"):
        save_adapter(tiny_llama(), tmp_path / "none")
    model = tiny_llama()
    load_adapter_(model, saved)
    before = (saved / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"config/out-exists"):
        save_adapter(model, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["saved"]


def quantized(config: QuantConfig | None) -> nn.Module:
    model = tiny_llama()
    if config is not None:
        quantize_(model, config)
    return model


NF4, PLAIN = QuantConfig(), QuantConfig(double_quant=False)
WORDS = {None: "dense weights", NF4: "block_size 64, double_quant True, levels nf4", PLAIN: "block_size 64, double_quant False"}


@pytest.mark.parametrize("trained_on", WORDS)
@pytest.mark.parametrize("loaded_on", WORDS)
def test_another_quantization_of_the_base_is_told(
    trained_on: QuantConfig | None, loaded_on: QuantConfig | None, tmp_path: Path
) -> None:
    model = quantized(trained_on)
    apply_lora_(model, CONFIGS["some"])
    randomise_(model)
    save_adapter(model, tmp_path / "a")
    again = quantized(loaded_on)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paths = load_adapter_(again, tmp_path / "a")
    assert paths == list(lora_modules(model))
    told = [str(w.message) for w in caught]
    if trained_on == loaded_on:
        assert told == []
        assert torch.equal(logits(again), logits(model))
    else:
        assert len(told) == 1
        assert f"here {WORDS[loaded_on]}" in told[0]
        assert f"in training {WORDS[trained_on]}" in told[0]


def test_the_quantization_is_recorded_where_peft_does_not_look(tmp_path: Path) -> None:
    """The weights and the settings are the same files whether the base was dense or not; only minisft.json tells."""
    for name, config in (("dense", None), ("nf4", NF4)):
        model = quantized(config)
        apply_lora_(model, CONFIGS["ranks"])
        save_adapter(model, tmp_path / name, fingerprint="f" * 64)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "dense" / file).read_bytes() == (tmp_path / "nf4" / file).read_bytes()
    dense, nf4 = (json.loads((tmp_path / name / "minisft.json").read_text())["base"] for name in ("dense", "nf4"))
    assert dense.pop("quantization") is None
    assert nf4.pop("quantization") == {"levels": "nf4", "block_size": 64, "double_quant": True}
    assert dense == nf4
    assert nf4["fingerprint"] == "f" * 64


def test_an_adapter_that_brings_a_base_layer_of_its_own_is_refused_over_4_bits(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    save_file({**load_file(weights), name: tiny_llama().model.layers[0].self_attn.q_proj.weight.detach().clone()}, weights)
    assert name in refused(saved, "unsupported", quantized(NF4))


def test_a_mangled_record_of_the_quantization_is_no_traceback(saved: Path) -> None:
    (saved / "minisft.json").write_text(json.dumps({"base": {"quantization": ["\x1b[2J" * 9]}}))
    with pytest.warns(UserWarning, match="trained on a base held otherwise") as told:
        load_adapter_(tiny_llama(), saved)
    assert "\x1b" not in str(told[0].message)
