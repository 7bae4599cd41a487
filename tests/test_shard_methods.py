"""What is trained on a shared base beside plain LoRA: two and three processes compute what one does."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp  # here, so that the forked processes need not import it
import torch.distributed.tensor
from ranks import on_ranks
from safetensors.torch import load_file
from test_parallel import RAGGED, rows
from tiny_folder import CONFIG, write_model
from torch import Tensor

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, QuantConfig, RunConfig
from minisft.formats import load_model, save_adapter
from minisft.formats.source import resolve
from minisft.model import CausalLM
from minisft.parallel.shard import load_sharded, share_bytes, share_of
from minisft.parallel.world import ALONE, World
from minisft.surgery import apply_lora_, lora_modules
from minisft.training.dpo import EncodedPair
from minisft.training.dpo_run import DPOTrainer
from minisft.training.init_adapter import load_init_adapter_, with_adapter_settings
from minisft.training.plan import plan, read_shape
from minisft.training.preference_config import DPOConfig
from minisft.training.run_data import RunData
from minisft.training.sft import SFTTrainer
from minisft.training.shard_plan import trained_bytes_of
from minisft.training.shardable import require_shardable

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIZES = (2, 3)  # three: shares of different sizes, and empty ones
TOKENIZER = SimpleNamespace(pad_id=0, new_ids=())
TEMPLATE = SimpleNamespace(source="")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tied head, one without, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("shard")
    write_model(folder / "tied", folder / "scratch")
    write_model(
        folder / "untied", folder / "scratch-2", replace(CONFIG, tie_word_embeddings=False, model_type="qwen3", qk_norm=True)
    )
    model, _ = load_model(str(folder / "tied"), torch.float64)
    apply_lora_(model, LoRAConfig(rank=3, alpha=5.0, targets=("q_proj", "up_proj"), use_rslora=True, use_dora=True))
    fill_(model)
    save_adapter(model, folder / "adapter")
    return folder


def fill_(model: CausalLM) -> None:
    """Adapters as after some training: at B = 0 the other factor has no gradient."""
    draw = torch.Generator().manual_seed(7)
    for adapter in lora_modules(model).values():
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data = factor + 0.3 * torch.randn(factor.shape, generator=draw, dtype=torch.float64).to(factor.dtype)


@dataclass(frozen=True)
class Case:
    """A model, how its base is held, and what is trained."""

    model: str = "tied"
    quant: QuantConfig | None = None
    settings: dict[str, object] = field(default_factory=lambda: {"rank": 2, "alpha": 3.0})


LORA = {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "down_proj")}
CASES = {
    "a dora adapter to start from": Case(settings={"init_adapter": "adapter"}),
    "dora, 4 bits": Case("untied", QuantConfig(block_size=32), {**LORA, "use_dora": True}),
    "full, tied": Case(settings={"method": "full", "weight_decay": 0.1}),
    "full, untied": Case("untied", settings={"method": "full", "checkpointing": "full", "neftune_alpha": 5.0}),
    "full, some layers": Case("untied", settings={"method": "full", "targets": ("down_proj", "q_proj")}),
    "pissa": Case("untied", settings={**LORA, "init": "pissa", "dropout": 0.2}),
}


PAIRS = [*((name, 2) for name in CASES), ("full, untied", 3)]  # three: shares of no row, too


@dataclass(frozen=True)
class Found:
    """What one process knows after the backward of a step, and after the next step."""

    start: dict[str, Tensor]
    before: float
    loss: float
    norm: float
    gradients: dict[str, Tensor]
    validation: float
    trained: dict[str, Tensor]
    held: tuple[int, ...]
    restored: float


def load(shop: Path, case: Case, run: RunConfig, world: World) -> CausalLM:
    path = str(shop / case.model)
    if world.size == 1:
        return load_model(path, torch.float64, quant=case.quant)[0]
    return load_sharded(path, torch.float64, CPU, case.quant, world, trained=run.method == "full")[0]


def trainer(shop: Path, case: Case, world: World) -> SFTTrainer:
    settings = dict(case.settings)
    if "init_adapter" in settings:
        settings["init_adapter"] = str(shop / "adapter")
    run = RunConfig(
        "m", "d", "o", batch_size=5, micro_batch_size=1, steps=9, lr=1e-2, clip=0.5,
        parallel="shard" if world.size > 1 else "auto", **settings,
    )  # fmt: skip
    model = load(shop, case, run, world)
    if run.init_adapter is not None:
        run, _ = with_adapter_settings(run, model)
        load_init_adapter_(model, run)
    data = RunData(rows(RAGGED[:5]), rows([4, 9, 6]), {}, {})
    return SFTTrainer(run, model, TOKENIZER, TEMPLATE, data, lambda text: None, world)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def compute(shop: Path, case: Case, world: World) -> Found:
    made = trainer(shop, case, world)
    weights = share_bytes(made.model)
    start, before = copies(made.optimizer.parameters), made.evaluate()[0]
    if "init_adapter" not in case.settings:
        fill_(made.model)
    loss = made._summed_gradients(1, made.batches(1))
    norm = made.optimizer.grad_norm()
    gradients = copies({name: p.grad for name, p in made.optimizer.parameters.items()})
    made.optimizer.zero_grad()
    made.step(2, made.batches(2), 1e-2)
    validation, trained = made.evaluate()[0], copies(made.optimizer.parameters)
    moments = [t for state in made.optimizer.adamw.state.values() for t in state.values() if t.ndim]
    held = (weights, *(sum(t.numel() * t.element_size() for t in ts) for ts in (moments, gradients.values())))
    restored = before
    if case.settings.get("method") == "full" and case.model == "tied":
        made.optimizer.load_state({f"{name}/master": tensor for name, tensor in start.items()})
        restored = made.evaluate()[0]
    return Found(start, before, loss, norm, gradients, validation, trained, held, restored)


@pytest.fixture(scope="module")
def found(shop: Path) -> dict[int, list[dict[str, Found]]]:
    """Number of processes -> what each of them computes, by case."""

    def cases(world: World) -> dict[str, Found]:
        return {name: compute(shop, case, world) for name, case in CASES.items() if (name, max(2, world.size)) in PAIRS}

    return {1: [cases(ALONE)]} | {size: on_ranks(size, cases) for size in SIZES}


def own_rows(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What a process has of each tensor."""
    return {name: tensor[slice(*share_of(len(tensor), world))] for name, tensor in tensors.items()}


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_on_shares_it_is_the_training_of_one_process(found: dict[int, list[dict[str, Found]]], name: str, size: int) -> None:
    expected = found[1][0][name]
    for rank, one in enumerate(processes[name] for processes in found[size]):
        parts = own_rows if CASES[name].settings.get("method") == "full" else lambda tensors, world: tensors
        start, gradients, trained = (
            parts(tensors, World(rank, size)) for tensors in (expected.start, expected.gradients, expected.trained)
        )
        assert all(torch.equal(one.start[key], value) for key, value in start.items())
        assert one.loss == pytest.approx(expected.loss, rel=1e-12)
        assert one.norm == pytest.approx(expected.norm, rel=1e-12)
        tiny.assert_same(one.gradients, gradients)
        assert one.validation == pytest.approx(expected.validation, rel=1e-9)
        assert one.before == pytest.approx(expected.before, rel=1e-12)
        assert one.restored == pytest.approx(one.before, rel=1e-12)  # though embedding and head had been gathered
        tiny.assert_same(one.trained, trained, 1e-7)


def dpo(shop: Path, out: str, world: World, settings: dict[str, object]) -> tuple[dict[str, Tensor], list[float], int]:
    """Gradient, numbers and reference of a DPO step on pairs that are a batch each; and how many batches had none."""
    sides = rows([6, 9, 4, 12, 5, 7, 8, 3, 11, 10, 2, 5, 30, 31], prefix=3)
    pairs = [EncodedPair(a, replace(b, row=a.row)) for a, b in zip(sides[::2], sides[1::2], strict=True)]
    run = DPOConfig(
        "m", "d", out, batch_size=5, max_length=8, steps=9, lr=1e-2, loss="ipo", rpo_alpha=0.3,
        parallel="shard" if world.size > 1 else "auto", **settings,
    )  # fmt: skip
    model = load(shop, Case(), run, world)
    if run.init_adapter is not None:
        run, _ = with_adapter_settings(run, model)
        load_init_adapter_(model, run)
    made = DPOTrainer(run, model, TOKENIZER, TEMPLATE, RunData(pairs[:5], pairs[4:], {}, {}), lambda text: None, world)
    made.prepare()
    fill_(model)  # after the reference, so that pairs have margins
    batches = made.batches(1)
    loss = made._summed_gradients(1, batches)
    gradients = copies({name: p.grad for name, p in made.optimizer.parameters.items()})
    reference = torch.tensor([made.reference[pair] for pair in range(8)]).flatten().tolist()
    numbers = [loss, *astuple(made.stats), made.evaluate()[0], *reference]
    return gradients, numbers, sum(not batch.rows for batch in batches)


def test_pairs_on_shares_give_the_step_of_one_process(shop: Path, tmp_path: Path) -> None:
    """From the base, and from an adapter, whose own numbers are the reference then; and all weights."""
    starts = {"base": LORA, "adapter": {"init_adapter": str(shop / "adapter")}, "full": {"method": "full"}}

    def steps(world: World) -> list[tuple[dict[str, Tensor], list[float], int]]:
        return [dpo(shop, str(tmp_path / f"{name}-{world.size}"), world, start) for name, start in starts.items()]

    for name in starts:
        for size in (1, 2):
            (tmp_path / f"{name}-{size}").mkdir()
    alone, found = steps(ALONE), on_ranks(2, steps)
    assert [one[0][2] for one in found] == [0, 1]  # of five batches the second process has two
    for rank, one in enumerate(found):
        for name, (gradients, numbers, _), expected in zip(starts, one, alone, strict=True):
            tiny.assert_same(gradients, own_rows(expected[0], World(rank, 2)) if name == "full" else expected[0])
            assert numbers == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize(("name", "size"), [pair for pair in PAIRS if CASES[pair[0]].settings.get("method") == "full"])
def test_the_plan_counts_what_the_first_process_holds(
    shop: Path, found: dict[int, list[dict[str, Found]]], name: str, size: int
) -> None:
    shape = read_shape(resolve(str(shop / CASES[name].model)), None)
    planned = trained_bytes_of(shape, torch.float64, found[1][0][name].trained, size)
    held = [one[name].held for one in found[size]]
    assert (planned.weights, planned.moments, planned.gradients) == held[0] == tuple(map(max, zip(*held, strict=True)))
    assert [sum(kind) for kind in zip(*held, strict=True)][1:] == list(found[1][0][name].held[1:])


def test_the_bill_of_full_training_in_shares(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 training: shares are fp32; a layer's gradients are bf16 until they are sent in fp32."""
    monkeypatch.setattr("minisft.training.plan.CHECKPOINTING", ("none",))  # the others would say the same of these lines
    monkeypatch.setattr("minisft.training.plan._process_bytes", lambda run: 0)
    run = RunConfig(str(shop / "untied"), "d", "o", method="full", dtype="bf16", max_length=16, parallel="shard", batch_size=6)
    bill = {item.name: item for item in plan(run, 3).items}
    shapes = {name: tensor.shape for name, tensor in load_file(shop / "untied" / "model.safetensors").items()}
    share = sum(-(-shape[0] // 3) * shape[1:].numel() for shape in shapes.values())
    layer = sum(shape.numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    root = sum(shape.numel() for name, shape in shapes.items() if "layers" not in name)
    assert bill["dense weights"].whole == 4 * share
    assert bill["optimizer: moments, fp32 master weights"].whole == 8 * share
    assert bill["gradients"].whole == 4 * share
    assert bill["gathered: embedding, head, two layers"].at_peak == 2 * (root + 2 * layer)
    assert bill["their gradients, until they are added up"].at_peak == 2 * root + max(4 * root, 6 * layer)


def test_an_adapter_with_rows_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"trainable_token_indices": [3]}))
    run = RunConfig("m", "d", "o", parallel="shard", init_adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"config/shard.*--init-adapter with trained tokens.*--parallel replicate"):
        require_shardable(run)
