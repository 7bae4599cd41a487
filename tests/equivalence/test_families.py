"""Whole models: unmerged, merged, saved and loaded again, or loaded by transformers, a model is one function."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, DENSE, IDS, PATTERNED, SIDES, adapted, digest, logits, roundoff
from tiny import FAMILIES, LLAMA, VOCAB, assert_close

from minisft.config import LoRAConfig
from minisft.formats import Tokenizer, load_adapter_, load_model, save_adapter, save_model
from minisft.merge_weights import merge, merge_, splits_tie
from minisft.surgery import adapters_off, lora_modules

every_family = pytest.mark.parametrize("family", FAMILIES)
every_side = pytest.mark.parametrize("side", SIDES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As many characters as the tiny models have ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {chr(0x100 + i): i for i in range(VOCAB)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return Tokenizer.from_folder(folder)


def lora(side: str, **changes: object) -> LoRAConfig:
    return LoRAConfig(rank=2, alpha=3.0, targets=SIDES[side], **changes)


# ---- merged ----------------------------------------------------------------------------------------------------------


@every_family
@every_side
def test_merged_logits_equal_unmerged(family: str, side: str) -> None:
    """L1 for a model, in fp64, in place and as a new model; and the adapters do change the logits."""
    model = adapted(FAMILIES[family], lora(side))
    expected = logits(model)
    with adapters_off(model):
        assert float((logits(model) - expected).abs().max()) > 0.1
    assert_close(logits(merge(model)[0]), expected, 1e-10)
    merge_(model)
    assert_close(logits(model), expected, 1e-10)


@every_family
@pytest.mark.parametrize("base", [base for base in BASES if "fp64" in base])
@pytest.mark.parametrize("use_dora", [False, True])
def test_ranks_and_scalings_of_their_own(family: str, base: str, use_dora: bool) -> None:
    """rsLoRA, DoRA, negative and zero alpha, ranks and alphas that differ by layer; also over 4 bits."""
    model = adapted(FAMILIES[family], dataclasses.replace(PATTERNED, use_dora=use_dora), base)
    assert {a.rank for a in lora_modules(model).values()} == {1, 3, 5}
    assert {a.scaling for a in lora_modules(model).values()} >= {0.0, -2.5 / 3**0.5, -2.5, 0.5 / 3**0.5}
    expected = logits(model)
    assert_close(logits(merge(model)[0]), expected, 1e-10)
    merge_(model)
    assert_close(logits(model), expected, 1e-10)


@pytest.mark.slow
@given(data=st.data())
def test_any_adapters_on_any_family(data: st.DataObject) -> None:
    """L1 with whatever targets, ranks and scalings hypothesis thinks of."""
    config = FAMILIES[data.draw(st.sampled_from(list(FAMILIES)))]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    targets = tuple(data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
    ranks = {name: data.draw(st.integers(1, 3)) for name in targets}
    alphas = {name: data.draw(st.floats(-3, 3)) for name in targets}
    model = adapted(config, LoRAConfig(1, 3.0, 0.0, data.draw(st.booleans()), targets, ranks, alphas))
    expected = logits(model)
    assert_close(logits(merge(model)[0]), expected, 1e-10)


@every_family
@pytest.mark.parametrize("base", BASES)
def test_in_every_dtype_the_merge_is_nearer_than_the_base(family: str, base: str) -> None:
    """L2 for a model. Errors grow through the layers, so the yardstick is what the adapters do: most of it must be there."""
    model = adapted(FAMILIES[family], lora("neither"), base, scale=0.2)
    unmerged = logits(model).double()
    with adapters_off(model):
        effect = float((logits(model).double() - unmerged).norm())
    for merged in (logits(merge(model)[0]), merge_(model) and logits(model)):
        assert float((merged.double() - unmerged).norm()) < 40 * roundoff(BASES[base].dtype) * effect + 1e-5 * effect


@pytest.mark.parametrize("base", [base for base in BASES if BASES[base].in_4_bits])
def test_the_dtype_that_four_bits_were_made_from_does_not_matter(base: str) -> None:
    """A checkpoint in 4 bits says what it was made from; a model in another dtype still merges to its own."""
    model = adapted(LLAMA, lora("neither"), base)
    for adapter in lora_modules(model).values():
        adapter.base.weight_dtype = torch.float32 if model.dtype != torch.float32 else torch.bfloat16
    expected = logits(model)
    merge_(model)
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    assert logits(model).dtype == expected.dtype


# ---- saved and loaded ------------------------------------------------------------------------------------------------


@every_family
@every_side
def test_a_saved_merge_loads_bit_for_bit(family: str, side: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """L21. Weights, tie and logits; a head that was untied by its adapter stays untied."""
    model = adapted(FAMILIES[family], lora(side), "fp32")
    merged, _ = merge(model)
    save_model(merged, tokenizer, tmp_path / "merged")
    again, _ = load_model(tmp_path / "merged")
    assert digest(again) == digest(merged)
    assert again.config == merged.config
    assert again.config.tie_word_embeddings == (model.config.tie_word_embeddings and side == "neither")
    assert again.config.tie_word_embeddings == (again.lm_head.weight is again.model.embed_tokens.weight)
    assert splits_tie(lora_modules(model)) == (side != "neither")
    assert torch.equal(logits(again.eval()), logits(merged))


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("base", ["fp64", "bf16", "nf4-double", "nf4-double-of-bf16"])
def test_a_merge_saved_in_any_dtype_loads_bit_for_bit(base: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """L21 for every base and dtype of the result; in place gives the same file."""
    wanted = BASES[dtype].dtype
    model = adapted(LLAMA, lora("head"), base)
    merged, _ = merge(model, dtype=wanted)
    assert {p.dtype for p in merged.parameters()} == {wanted}
    save_model(merged, tokenizer, tmp_path / "merged")
    again, _ = load_model(tmp_path / "merged", wanted)
    assert digest(again) == digest(merged)
    assert torch.equal(logits(again.eval()), logits(merged))


@pytest.mark.parametrize("base", DENSE)
def test_the_same_merge_makes_the_same_files(base: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """L21. Byte for byte, whether merged in place or into a new model."""
    model = adapted(LLAMA, lora("both"), base)
    save_model(merge(model)[0], tokenizer, tmp_path / "new")
    merge_(model)
    save_model(model, tokenizer, tmp_path / "in-place")
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        for folder in (tmp_path / "new", tmp_path / "in-place")
    )
    assert "model.safetensors" in first
    assert first == second


@every_side
def test_an_adapter_from_a_file_merges_to_the_same_bits(side: str, tmp_path: Path) -> None:
    """Save the adapter, load it onto the base again, merge: as if it had never left."""
    model = adapted(LLAMA, lora(side), "fp32")
    save_adapter(model, tmp_path / "adapter")
    fresh = adapted(LLAMA, lora(side), "fp32", scale=0.0)
    for path, adapter in lora_modules(fresh).items():
        parent, _, name = path.rpartition(".")
        setattr(fresh.get_submodule(parent), name, adapter.base)
    load_adapter_(fresh, tmp_path / "adapter")
    merged, again = merge(model)[0], merge(fresh)[0]
    assert digest(merged) == digest(again)


# ---- transformers ----------------------------------------------------------------------------------------------------


# Every family, and every side of a tied and of an untied head.
@pytest.mark.parametrize(
    ("family", "side"), [(f, s) for f in FAMILIES for s in SIDES if s == "neither" or f in ("llama", "mistral", "qwen2")]
)
def test_transformers_loads_the_merge_with_equal_logits(family: str, side: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Their code, our folder: the unmerged model's function, tied and untied heads included."""
    transformers = pytest.importorskip("transformers")
    model = adapted(FAMILIES[family], lora(side), "fp32")
    expected = logits(model)
    save_model(merge(model)[0], tokenizer, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager").eval()
    assert_close(logits(theirs), expected, 2e-5)
    embedding, head = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert (embedding is head) == (FAMILIES[family].tie_word_embeddings and side == "neither")


def test_the_comparisons_look_past_the_sliding_window() -> None:
    """They would prove nothing about windows on rows that fit into one."""
    windows = [config.sliding_window for config in FAMILIES.values() if config.sliding_window]
    assert windows
    assert max(windows) < IDS.shape[1]
