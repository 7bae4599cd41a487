"""A base of which each process holds a share: gathered it is the same bits, and what is trained on it is the same."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp  # here, so that the forked processes need not import it
import torch.distributed.tensor
from ranks import on_ranks
from test_parallel import RAGGED, rows
from tiny_folder import CONFIG, write_model
from torch import Tensor

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import QuantConfig, RunConfig
from minisft.formats import lazy_weights, load_model
from minisft.formats.source import resolve
from minisft.parallel.shard import SHARDED, gathered, load_sharded, share_bytes, share_of
from minisft.parallel.world import ALONE, World
from minisft.surgery import lora_modules, nf4_modules, num_parameters, weight_bytes
from minisft.training.plan import read_shape
from minisft.training.preference_config import GRPOConfig
from minisft.training.run_data import RunData
from minisft.training.several import check_world
from minisft.training.sft import SFTTrainer
from minisft.training.shard_plan import share_bytes_of
from minisft.training.train import _load as load_base

CPU = torch.device("cpu")
# Where a model comes from, and how it is quantized when it is read.
FORMS = {
    "dense": ("dense", None),
    "nf4": ("dense", QuantConfig()),
    "stored in 4 bits": ("packed", None),
    "untied, plain scales": ("untied", QuantConfig(block_size=32, double_quant=False)),
}

CASES = [*((name, 2) for name in FORMS), ("nf4", 3)]  # three: shares of different sizes, and empty ones


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shard")
    write_model(folder / "dense", folder / "scratch")
    write_model(
        folder / "untied", folder / "scratch-2", replace(CONFIG, tie_word_embeddings=False, model_type="qwen2", qkv_bias=True)
    )
    assert main(["quantize", "--model", str(folder / "dense"), "--out", str(folder / "packed")]) == 0
    return {name: str(folder / name) for name in ("dense", "untied", "packed")}


@dataclass(frozen=True)
class Found:
    """What one process holds and computes."""

    whole: dict[str, Tensor]
    fixed: dict[str, Tensor]
    share: int
    read: int
    counts: tuple[int, int]
    loss: float
    gradients: dict[str, Tensor]
    losses: list[float]
    validation: float
    codes_alive: int


def trainer(model: object, world: World, checkpointing: str) -> SFTTrainer:
    run = RunConfig(
        "m", "d", "o", batch_size=5, micro_batch_size=1, steps=9, rank=2, alpha=3.0, dropout=0.2, lr=1e-2,
        checkpointing=checkpointing, targets=("all-linear",), parallel="shard" if world.size > 1 else "auto",
    )  # fmt: skip
    data = RunData(rows(RAGGED[:5]), rows([4, 9, 6]), {}, {})
    made = SFTTrainer(
        run, model, SimpleNamespace(pad_id=0, new_ids=()), SimpleNamespace(source=""), data, lambda text: None, world
    )
    draw = torch.Generator().manual_seed(7)
    for adapter in lora_modules(model).values():
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data = 0.4 * torch.randn(factor.shape, generator=draw, dtype=torch.float64).to(factor.dtype)
    return made


def held(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is sharded, and what stays with every process, of a model that is whole."""
    tensors = dict(model.named_parameters()) | {
        f"{path}.{part}": tensor
        for path, layer in nf4_modules(model).items()
        for part in SHARDED
        if (tensor := getattr(layer, part)) is not None
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, fixed(model)


def fixed(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{part}": tensor
        for path, layer in nf4_modules(model).items()
        for part in ("levels", "offset")
        if (tensor := getattr(layer, part)) is not None
    }


def compute(models: dict[str, str], name: str, world: World) -> Found:
    source, quant = FORMS[name]
    read: list[int] = []
    share = codes_alive = 0
    if world.size == 1:
        model, _ = load_model(models[source], torch.float64, quant=quant)
        whole, same = held(model)
    else:
        whole_read = lazy_weights.read_bytes
        lazy_weights.read_bytes = lambda path, begin, count: read.append(count) or whole_read(path, begin, count)
        model, _ = load_sharded(models[source], torch.float64, CPU, quant, world)
        lazy_weights.read_bytes = whole_read
        share, same = share_bytes(model), fixed(model)
        whole = {key: tensor.clone() for key, tensor in gathered(model)}
    counts = num_parameters(model), weight_bytes(model)
    made = trainer(model, world, "full" if name.startswith("untied") else "none")
    if world.size > 1:
        made.model.hidden(made.batches(1)[0].input_ids)
        gc.collect()
        alive = {
            id(t.untyped_storage()): t for t in gc.get_objects() if type(t) is torch.nn.Parameter and t.dtype == torch.uint8
        }
        codes_alive = sum(t.untyped_storage().nbytes() for t in alive.values())
    loss = made._summed_gradients(1, made.batches(1))
    gradients = {key: p.grad.clone() for key, p in made.optimizer.parameters.items()}
    made.optimizer.zero_grad()
    losses = [made.step(step, made.batches(step), 1e-2).loss for step in (2,)]
    return Found(whole, same, share, sum(read), counts, loss, gradients, losses, made.evaluate()[0], codes_alive)


@pytest.fixture(scope="module")
def found(models: dict[str, str]) -> dict[int, list[dict[str, Found]]]:
    """Number of processes -> what each of them holds and computes, by form."""

    def all_forms(world: World) -> dict[str, Found]:
        return {name: compute(models, name, world) for name in FORMS}

    def some_forms(world: World) -> dict[str, Found]:
        return {name: compute(models, name, world) for name, size in CASES if size == 3}

    return {1: [all_forms(ALONE)], 2: on_ranks(2, all_forms), 3: on_ranks(3, some_forms)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES)
class TestShares:
    def test_gathered_they_are_the_bits_of_one_process(
        self, found: dict[int, list[dict[str, Found]]], name: str, size: int
    ) -> None:
        expected = found[1][0][name]
        for one in found[size]:
            assert one[name].whole.keys() == expected.whole.keys()
            for key, tensor in expected.whole.items():
                assert one[name].whole[key].dtype == tensor.dtype, key
                assert torch.equal(one[name].whole[key], tensor), key
            assert one[name].fixed.keys() == expected.fixed.keys()
            assert all(torch.equal(one[name].fixed[key], tensor) for key, tensor in expected.fixed.items())
            assert one[name].counts == expected.counts

    def test_each_process_holds_and_reads_its_part(
        self, found: dict[int, list[dict[str, Found]]], name: str, size: int
    ) -> None:
        total = sum(t.numel() * t.element_size() for t in found[1][0][name].whole.values())
        shares = [one[name].share for one in found[size]]
        assert sum(shares) == total
        largest_row = CONFIG.intermediate_size * 8  # the shares of a tensor differ by less than W rows
        assert max(shares) <= total / size + size * largest_row * len(found[1][0][name].whole)
        assert min(shares) < total / size + 1 < total
        if name in ("dense", "nf4"):  # two numbers a tensor at most, and the blocks that a share ends in
            stored = sum(math_numel(key, found) for key in found[1][0]["dense"].whole) * 4
            assert sum(one[name].read for one in found[size]) <= stored * (1.0 if name == "dense" else 1.5)
            assert max(one[name].read for one in found[size]) <= 0.7 * stored

    def test_a_step_on_them_is_the_step_of_one_process(
        self, found: dict[int, list[dict[str, Found]]], name: str, size: int
    ) -> None:
        expected = found[1][0][name]
        exact = next(iter(expected.gradients.values())).dtype == torch.float64
        assert exact == (name != "stored in 4 bits")  # where adapters have the dtype that the file was made from
        for one in found[size]:
            assert one[name].loss == pytest.approx(expected.loss, rel=1e-12)
            tiny.assert_same(one[name].gradients, expected.gradients, 1e-12 if exact else 1e-6)
            assert one[name].losses == pytest.approx(expected.losses, rel=1e-9 if exact else 1e-6)
            assert one[name].validation == pytest.approx(expected.validation, rel=1e-9 if exact else 1e-6)

    def test_no_layers_codes_stay_gathered_after_its_forward(
        self, found: dict[int, list[dict[str, Found]]], name: str, size: int
    ) -> None:
        codes = sum(t.numel() for t in found[1][0][name].whole.values() if t.dtype == torch.uint8)
        for one in found[size]:
            assert one[name].codes_alive <= codes / 2  # with all of them gathered it would be more than all


@pytest.mark.slow
def test_a_process_with_fewer_rows_has_batches_without_targets() -> None:
    def counts(world: World) -> tuple[int, ...]:
        made = trainer(tiny.build(tiny.LLAMA), world, "none")
        batches = made.batches(1)
        idle = [batch for batch in batches if not batch.num_targets]
        assert not sum(batch.num_tokens for batch in idle)
        return len(batches), len(idle), len(made._validation)

    assert on_ranks(2, counts) == [(3, 0, 2), (3, 1, 2)]  # of 5 rows and 3 validated ones, each a micro-batch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_plan_counts_the_share_that_the_first_process_holds(
    models: dict[str, str], found: dict[int, list[dict[str, Found]]], name: str, size: int
) -> None:
    source, quant = FORMS[name]
    bytes_of = share_bytes_of(read_shape(resolve(models[source]), quant), torch.float64, size)
    assert bytes_of.share == found[size][0][name].share == max(one[name].share for one in found[size])
    assert bytes_of.everywhere == sum(t.numel() * t.element_size() for t in found[1][0][name].fixed.values())
    whole = {key: t.numel() * t.element_size() for key, t in found[1][0][name].whole.items()}
    layers = [sum(n for key, n in whole.items() if key.startswith(f"model.layers.{i}.")) for i in range(CONFIG.num_layers)]
    assert bytes_of.gathered == sum(whole.values()) - sum(layers) + 2 * layers[0]


@pytest.mark.slow
def test_the_bill_of_one_of_several_processes(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    def bill(*words: str) -> dict[str, dict[str, dict[str, int]]]:
        argv = [
            "plan",
            "--model",
            models["dense"],
            "--json",
            "--quant",
            "nf4",
            "--dtype",
            "fp32",
            "--batch-size",
            "4",
            "--rank",
            "2",
        ]
        assert main([*argv, *words]) == 0
        return json.loads(capsys.readouterr().out)

    one, shared = bill("--batch-size", "2"), bill("--parallel", "shard", "--world-size", "3", "--batch-size", "6")
    share = share_bytes_of(read_shape(resolve(models["dense"]), QuantConfig()), torch.float32, 3)
    assert shared["items"]["dense weights"]["whole"] == share.dense < one["items"]["dense weights"]["whole"]
    assert shared["items"]["4-bit codes"]["whole"] == share.codes
    assert shared["items"]["gathered: embedding, head, two layers"]["at_peak"] == share.gathered
    assert shared["items"]["adapters, fp32"] == one["items"]["adapters, fp32"]
    assert "one of 3 processes (shard)" in shared["title"]
    kept = "activations kept for backward"  # of two rows in either: six are shared by three
    assert shared["items"][kept] == one["items"][kept]
    assert main(["plan", "--model", models["dense"], "--parallel", "shard"]) == 2
    assert "--world-size 1" in capsys.readouterr().err


def math_numel(key: str, found: dict[int, list[dict[str, Found]]]) -> int:
    return found[1][0]["dense"].whole[key].numel()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9])
def test_shares_are_those_of_torch_chunk(length: int) -> None:
    for size in (2, 3, 5):
        chunks = torch.arange(length).chunk(size)
        for rank in range(size):
            begin, end = share_of(length, World(rank, size))
            expected = chunks[rank].tolist() if rank < len(chunks) else []
            assert list(range(begin, end)) == expected


def test_what_cannot_be_done_in_shares_is_refused() -> None:
    run = RunConfig("m", "d", "o", parallel="shard", method="full", optim="adamw8bit")
    for world in (ALONE, World(0, 2, 0, 2)):  # not told to start torchrun first
        with pytest.raises(UserError, match=r"config/shard.*found --optim adamw8bit with --method full"):
            check_world(run, world, dry_run=False, log=print)
    with pytest.raises(UserError, match=r"config/shard.*found minisft grpo"):
        check_world(GRPOConfig("m", "d", "o", parallel="shard", reward="json"), World(0, 2, 0, 2), dry_run=False, log=print)
    with pytest.raises(UserError, match="config/one-process"):
        check_world(RunConfig("m", "d", "o"), World(0, 2, 0, 2), dry_run=True, log=print)


def test_a_model_that_transformers_computes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(UserError, match=r"config/shard.*found gpt_neox, a model that transformers computes.*--parallel"):
        load_base(RunConfig(str(tmp_path), "d", "o", parallel="shard"), CPU, World(0, 2, 0, 2))
