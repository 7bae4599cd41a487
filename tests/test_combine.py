"""Combining adapters: the sum of dense updates by another road, the dense SVD as judge, PEFT and the real front door."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny_folder
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_formats_adapter import logits, randomise_, tiny_llama
from tiny import assert_close, randn
from torch import Tensor, nn

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.formats import load_adapter_, load_model, save_adapter
from minisft.merging.combine import Combined, Update, add_updates, combine, lower_rank
from minisft.merging.combine_files import combine_folders, read_stored
from minisft.merging.streaming import merge_folder
from minisft.merging.verify import verify
from minisft.surgery import apply_lora_, lora_modules

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

sides = st.sampled_from([1, 2, 3, 7, 16, 33])
weights = st.sampled_from([-1.5, 0.0, 0.3, 1.0, 2.0])
seeds = st.integers(0, 2**31)


@st.composite
def updates(draw: st.DrawFn, inputs: int, outputs: int) -> Update:
    rank = draw(st.integers(1, min(inputs, outputs)))
    seed, alpha, rslora = draw(seeds), draw(st.sampled_from([-2.0, 0.5, 7.0])), draw(st.booleans())
    return Update(randn(rank, inputs, seed=seed), randn(outputs, rank, seed=seed + 1), alpha, rslora)


def dense(update: Update) -> Tensor:
    """scaling * B A, term by term."""
    divisor = update.rank**0.5 if update.use_rslora else update.rank
    terms = (torch.outer(b, a) for a, b in zip(update.A.double(), update.B.double().T, strict=True))
    return sum(terms, torch.zeros(())) * update.alpha / divisor


# One layer, in fp64


@given(inputs=sides, outputs=sides, count=st.integers(1, 4), data=st.data())
def test_stacking_is_the_sum(inputs, outputs, count, data):
    parts = [(data.draw(weights), data.draw(updates(inputs, outputs))) for _ in range(count)]
    together = add_updates(parts)
    assert_close(dense(together), sum(weight * dense(part) for weight, part in parts))
    assert together.rank == sum(part.rank for _, part in parts)
    assert abs(together.square() - float(dense(together).square().sum())) <= 1e-11 * (1 + together.square())
    for use_rslora in (False, True):  # the same scaling, said in both ways
        alpha = together.alpha_for(use_rslora)
        assert alpha / (together.rank**0.5 if use_rslora else together.rank) == pytest.approx(together.scaling, rel=1e-14)


@given(inputs=sides, outputs=sides, data=st.data(), weight=weights)
def test_one_part_keeps_its_factors(inputs, outputs, data, weight):
    part = data.draw(updates(inputs, outputs))
    alone = add_updates([(weight, part)])
    assert alone.A is part.A
    assert alone.B is part.B
    assert alone.alpha == weight * part.alpha
    assert alone.use_rslora == part.use_rslora


@given(inputs=sides, outputs=sides, count=st.integers(1, 3), rank=st.integers(1, 12), data=st.data())
def test_no_lower_rank_is_nearer(inputs, outputs, count, rank, data):
    """Eckart and Young: the distance is that of the dense matrix's own truncated SVD, also for stacks higher than the layer."""
    exact = add_updates([(1.0, data.draw(updates(inputs, outputs))) for _ in range(count)])
    lower, lost = lower_rank(exact, rank)
    target = dense(exact)
    singular = torch.linalg.svdvals(target)
    best = float(singular[rank:].square().sum())
    scale = 1 + float(singular.square().sum())
    assert lower.rank == min(rank, exact.rank, inputs, outputs)
    assert lower.scaling == 1.0
    assert abs(lost - best) <= 1e-12 * scale
    assert abs(float((target - dense(lower)).square().sum()) - best) <= 1e-12 * scale
    if rank >= min(inputs, outputs):
        assert_close(dense(lower), target)


def test_the_dense_sum_is_never_made():
    """A million by a million would be 4 TB; with thin factors it is a second."""
    side = 10**6
    parts = [(0.5, Update(torch.ones(1, side), torch.ones(side, 1), 2.0)) for _ in range(2)]
    lower, lost = lower_rank(add_updates(parts), 1)
    assert lower.rank == 1
    assert lost <= 1e-12 * side**2
    assert lower.square() == pytest.approx((2.0 * side) ** 2, rel=1e-6)


def test_factors_in_low_precision_are_widened_once():
    part = Update(randn(2, 5).bfloat16(), randn(4, 2).bfloat16(), 3.0)
    together = add_updates([(0.3, part), (1.0, part)])
    assert together.A.dtype == together.B.dtype == torch.float32
    assert torch.equal(together.A, part.A.float().repeat(2, 1))
    assert torch.equal(together.B[:, :2], (part.B.double() * (0.3 * 1.5)).float())
    assert lower_rank(part, 1)[0].A.dtype == torch.float32


# Several layers


@given(data=st.data(), rank=st.integers(1, 6))
def test_errors_are_those_of_the_dense_matrices(data, rank):
    first = {"a": data.draw(updates(9, 7)), "b": data.draw(updates(5, 8))}
    second = {"b": data.draw(updates(5, 8)), "c": data.draw(updates(6, 6))}
    found = combine([(1.0, first), (-0.5, second)], rank)
    exact = {"a": dense(first["a"]), "b": dense(first["b"]) - 0.5 * dense(second["b"]), "c": -0.5 * dense(second["c"])}
    lost = {path: float((dense(found.updates[path]) - exact[path]).norm()) for path in exact}
    size = {path: float(exact[path].norm()) for path in exact}
    for path in exact:
        assert found.updates[path].rank <= rank
        assert found.errors.get(path, 0.0) == pytest.approx(lost[path] / size[path], abs=1e-7)
    in_all = sum(x**2 for x in lost.values()) ** 0.5 / sum(x**2 for x in size.values()) ** 0.5
    assert found.error == pytest.approx(in_all, abs=1e-7)


def test_a_stack_higher_than_its_layer_loses_nothing():
    part = Update(randn(3, 4), randn(5, 3, seed=1), 2.0)
    found = combine([(1.0, {"a": part}), (1.0, {"a": Update(randn(3, 4, seed=2), randn(5, 3, seed=3), 2.0)})])
    assert found.updates["a"].rank == 4
    assert found == Combined(found.updates, {}, 0.0)


def test_opposite_adapters_cancel():
    part = {"a": Update(randn(3, 9), randn(8, 3, seed=1), 2.0)}
    found = combine([(1.0, part), (-1.0, part)])
    assert_close(dense(found.updates["a"]), torch.zeros(8, 9))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_and_ranks_out_of_range(weight):
    part = {"a": Update(randn(1, 2), randn(2, 1), 1.0)}
    with pytest.raises(UserError, match="weight of an adapter"):
        combine([(weight, part)])
    with pytest.raises(UserError, match="--rank"):
        combine([(1.0, part)], rank=0)


def test_shapes_that_do_not_fit_are_named():
    one, other = {"a.b": Update(randn(1, 2), randn(2, 1), 1.0)}, {"a.b": Update(randn(1, 2), randn(3, 1), 1.0)}
    with pytest.raises(UserError, match=r"different shapes: a\.b; found 2 x 2 and 3 x 2"):
        combine([(1.0, one), (1.0, other)])


# Folders


CONFIGS = {
    "q": LoRAConfig(rank=4, alpha=6.0, targets=("q_proj", "embed_tokens")),
    "all": LoRAConfig(rank=3, alpha=6.0, use_rslora=True, dropout=0.25),
    "ranks": LoRAConfig(rank=4, alpha=8.0, rank_pattern={"v_proj": 2, "1.mlp.up_proj": 7}, alpha_pattern={"q_proj": 3.5}),
    "regex": LoRAConfig(rank=7, alpha=49.0, targets=r".*layers\.0\.(mlp|self_attn)\.[a-q]\w*"),
}


def write(name: str, folder: Path, fingerprint: str | None = "a" * 64, template: str | None = None) -> Path:
    model = tiny_llama()
    apply_lora_(model, CONFIGS[name], seed=len(name))
    randomise_(model)
    save_adapter(model, folder / name, base_name="tiny", fingerprint=fingerprint, template=template)
    return folder / name


def delta_of(folder: Path) -> dict[str, Tensor]:
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter_(model, folder)
    return {path: layer.delta_weight().double() for path, layer in lora_modules(model).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_adapter_with_weight_one_is_itself(name: str, tmp_path: Path) -> None:
    """Bit for bit, settings too. (PEFT 0.21 makes an rsLoRA adapter sqrt(rank) times too strong here.)"""
    folder = write(name, tmp_path, template="t")
    combine_folders([(folder, 1.0)], tmp_path / "out")
    for file in ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"):
        assert (folder / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize("names", [("all", "ranks"), ("q", "all"), ("ranks", "regex"), ("q", "all", "regex")], ids="+".join)
def test_folders_add_up(names: tuple[str, ...], tmp_path: Path) -> None:
    """Here and in PEFT, whatever the targets, ranks and scalings; one layer's update equals the sum of the dense ones."""
    parts = [(write(name, tmp_path), weight) for name, weight in zip(names, (0.75, -1.25, 2.0), strict=False)]
    combine_folders(parts, tmp_path / "out")
    expected: dict[str, Tensor] = {}
    for folder, weight in parts:
        for path, delta in delta_of(folder).items():
            expected[path] = expected.get(path, torch.zeros(())) + weight * delta
    found = delta_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert_close(found[path], delta, 1e-5, path)
    ours = tiny_llama()
    load_adapter_(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    facts = json.loads((tmp_path / "out" / "minisft.json").read_text())
    assert facts["base"]["fingerprint"] == "a" * 64
    assert [source["weight"] for source in facts["combined_from"]] == [weight for _, weight in parts]


def test_stacking_equals_pefts() -> None:
    """Two adapters with other ranks and alphas, without rsLoRA: there PEFT's ``cat`` is right."""
    module = nn.Sequential(nn.Linear(6, 5))
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0"]))
    layer, parts = wrapped.base_model.model[0], []
    for name, weight, alpha in (("default", 0.7, 7.0), ("other", -0.3, 1.0)):
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        nn.init.normal_(B)
        parts.append((weight, Update(A.detach(), B.detach(), alpha)))
    wrapped.add_weighted_adapter(["default", "other"], [0.7, -0.3], "both", combination_type="cat")
    assert_close(dense(add_updates(parts)), layer.get_delta_weight("both"), 1e-6)


def test_peft_writes_folders_that_add_up(tmp_path: Path) -> None:
    for index, rslora in enumerate((False, True)):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", use_rslora=rslora)
        theirs = peft.get_peft_model(tiny_llama(), config)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        theirs.save_pretrained(str(tmp_path / str(index)))
    combine_folders([(tmp_path / "0", 0.5), (tmp_path / "1", 0.5)], tmp_path / "out")
    first, second, both = (delta_of(tmp_path / name) for name in ("0", "1", "out"))
    assert all(layer.rank == 8 for layer in read_stored(tmp_path / "out").updates.values())
    for path in first:
        assert_close(both[path], (first[path] + second[path]) / 2, 1e-6)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    one, other = write("all", tmp_path), write("ranks", tmp_path, "b" * 64)
    with pytest.raises(UserError, match="different bases") as error:
        combine_folders([(one, 1.0), (other, 1.0)], tmp_path / "out")
    assert error.value.code == "adapter/base-mismatch"
    assert not (tmp_path / "out").exists()


def test_doubts_are_told(tmp_path: Path) -> None:
    """Other names without fingerprints, another form of the base, other templates: a warning each."""
    one, other = write("all", tmp_path, template="one"), write("ranks", tmp_path, template="another")
    (other / "minisft.json").write_text(json.dumps({"base": {"fingerprint": None, "quantization": {"levels": "nf4"}}}))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other"}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        combine_folders([(one, 1.0), (other, 1.0)], tmp_path / "out")
    said = " / ".join(str(warning.message) for warning in caught)
    assert all(words in said for words in ("other, tiny", "not held in the same bits", "different chat templates"))
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_dora_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_lora_(model, LoRAConfig(rank=2, targets=("q_proj",), use_dora=True))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(UserError, match="do not add") as error:
        combine_folders([(tmp_path / "a", 1.0)], tmp_path / "out")
    assert error.value.code == "adapter/dora"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"r": 5}, "adapter/rank"),
        ({"alpha_pattern": {"(q": 2}}, "adapter/bad-config"),
        ({"alpha_pattern": {r"(\w+\.?)*!": 2}}, "adapter/bad-config"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(settings: dict[str, object], code: str, tmp_path: Path) -> None:
    path = write("all", tmp_path) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UserError) as error:
        read_stored(tmp_path / "all")
    assert error.value.code == code


A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({B0: None}, "missing-tensor", "1 of 28 tensors are missing"),
        ({A0: None}, "unexpected-tensor", B0),
        ({"base_model.model.lm_head.weight": torch.ones(2)}, "unexpected-tensor", "lm_head"),
        ({B0: torch.ones(32, 2)}, "rank", "B [32, 2]"),
        ({A0: torch.ones(33, 32), B0: torch.ones(32, 33)}, "rank", "1 to 32"),
        ({A0: torch.ones(0, 32), B0: torch.ones(32, 0)}, "rank", "1 to 32"),
        ({A0: torch.ones(3)}, "shape", "no matrix"),
        ({A0: torch.ones(3, 32, dtype=torch.int8)}, "dtype", "I8"),
        ({A0: torch.full((3, 32), torch.inf)}, "non-finite", "96 of 96"),
    ],
)
def test_tensors_that_make_no_adapter(changes: dict[str, Tensor | None], code: str, said: str, tmp_path: Path) -> None:
    path = write("all", tmp_path) / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError) as error:
        read_stored(tmp_path / "all")
    assert error.value.code == f"adapter/{code}"
    assert said in str(error.value)


def test_a_file_without_factors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, write("all", tmp_path) / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no factor of any module"):
        read_stored(tmp_path / "all")


# The command


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder.write_model(tmp_path / "model", tmp_path / "scratch")


def test_the_command_combines_and_the_result_is_used(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        model, _ = load_model(base)
        apply_lora_(model, LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "up_proj")), index)
        randomise_(model)
        save_adapter(model, tmp_path / f"a:{index}")
    words = ["combine", "--adapter", f"{tmp_path}/a:0", f"{tmp_path}/a:1:0.5", "--out"]
    assert main([*words, str(tmp_path / "sum")]) == 0
    assert "4 modules of rank 6, the exact sum" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "low"), "--rank", "2"]) == 0
    assert "4 modules of rank 2, the nearest of this rank: relative error 0." in capsys.readouterr().out
    weight = load_file(tmp_path / "low" / "adapter_model.safetensors")
    assert {len(factor) for name, factor in weight.items() if "lora_A" in name} == {2}
    talk = ["generate", "--model", str(base), "--adapter", str(tmp_path / "sum"), "--prompt", "hi", "--max-new-tokens", "3"]
    assert main([*talk, "--scale", "0.5"]) == 0
    assert main([*words, str(tmp_path / "sum")]) == 2  # it is there already
    assert main([*words[:-2], f"{tmp_path}/a:1:x", "--out", str(tmp_path / "other")]) == 2
    assert "weight is no number" in capsys.readouterr().err


def narrowed(base: Path, folder: Path, seed: int) -> Path:
    """An adapter as PEFT writes it, on the second layer only, with embedding and head of a tied base repeated beside it."""
    model, _ = load_model(base)
    apply_lora_(model, LoRAConfig(rank=3, alpha=6.0, targets=r".*\.1\..*(q|up)_proj"), seed)
    randomise_(model)
    save_adapter(model, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"target_modules": ["q_proj", "up_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    repeated = {f"base_model.model.{name}.weight": embedding.clone() for name in ("model.embed_tokens", "lm_head")}
    save_file(load_file(folder / "adapter_model.safetensors") | repeated, folder / "adapter_model.safetensors")
    return folder


def test_settings_that_narrow_and_weights_of_the_base_are_read_by_every_command(base: Path, tmp_path: Path) -> None:
    adapters = [(narrowed(base, tmp_path / str(seed), seed), 0.5) for seed in range(2)]
    combined = combine_folders(adapters, tmp_path / "sum")
    assert set(combined.updates) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    deltas = []
    for folder in (*(folder for folder, _ in adapters), tmp_path / "sum"):
        model, _ = load_model(base)
        load_adapter_(model, folder)
        deltas.append({path: layer.delta_weight() for path, layer in lora_modules(model).items()})
        merge_folder(folder, tmp_path / f"merged-{folder.name}", dtype=torch.float32)
        verify(tmp_path / f"merged-{folder.name}", folder).require()
    for path, delta in deltas[2].items():
        assert_close(delta, (deltas[0][path] + deltas[1][path]) / 2, 1e-6)


@pytest.mark.parametrize("name", ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"])
def test_a_changed_weight_of_the_base_is_refused_by_every_command(base: Path, name: str, tmp_path: Path) -> None:
    folder = narrowed(base, tmp_path / "a", 0)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[name][200, 3] += 1e-3
    save_file(tensors, weights)
    for command in (lambda: combine_folders([(folder, 1.0)], tmp_path / "out"), lambda: merge_folder(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=name) as error:
            command()
        assert error.value.code == "adapter/unsupported"
    assert not (tmp_path / "out").exists()


def test_weights_of_a_base_that_is_not_there_are_not_taken_on_trust(base: Path, tmp_path: Path) -> None:
    folder = narrowed(base, tmp_path / "a", 0)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="save_embedding_layers=False") as error:
        read_stored(folder)
    assert error.value.code == "adapter/unexpected-tensor"


def test_scale_without_an_adapter_is_an_error(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(base), "--prompt", "hi", "--scale", "0.5"]) == 4
    assert "no adapters to scale" in capsys.readouterr().err
