"""The memory bill of a training run, before a weight is loaded.

Shapes come from the headers of the model's files, the bytes of a step from ``memory_estimate.py``, the interpreter's share
from this very process. The lines are bytes altogether and bytes alive at the moment of the peak, because not everything lives
at once: activations go as gradients come. The bill refuses nothing that is only too large; it says so, and what to change.

Blocks are counted; the gaps between them are an estimate. The command line keeps all blocks in glibc's heap (``device.py``),
where a freed large block is often not reused as a whole, likely because small long-lived ones have settled in it. A newcomer
leaves with one idea: ask before you load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minisft.common.checks import require
from minisft.common.device import DTYPES, pick_device, pick_dtype, tunes_allocator
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.config import ModelConfig, QuantConfig, RunConfig
from minisft.formats.bnb import require_same
from minisft.formats.gguf_file import gguf_config
from minisft.formats.gguf_header import read_gguf
from minisft.formats.hf import check_folder
from minisft.formats.loading import available_bytes, empty_model, expected_shapes, nf4_bytes
from minisft.formats.source import Source, resolve
from minisft.matmul import compute_dtype
from minisft.model import CausalLM
from minisft.optim import MasterAdamW
from minisft.step import prepare_method, train_step
from minisft.surgery import quantization_targets
from minisft.training.init_adapter import with_adapter_settings
from minisft.training.memory_estimate import Shape, estimate_step, full_batch
from minisft.training.new_tokens import rows_of_run
from minisft.training.shard_plan import share_bytes_of, trained_bytes_of
from minisft.training.shardable import require_shardable

Kind = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Kind, ...] = ("none", "selective", "full")
HEAP_GAPS = 0.17  # of the peak, with the allocator tuned: 12 to 24 % in our runs (benchmarks/LOG.md)
NO_GAPS = "MALLOC_MMAP_THRESHOLD_=262144"  # a mapping of its own for each block from 256 KiB, given back when it is freed
# What the estimate counts, as the bill calls it.
NAMES = {
    "weights": "dense weights",
    "adapters": "adapters, fp32",
    "optimizer": "optimizer: moments, fp32 master weights",
    "gradients": "gradients",
    "activations": "activations kept for backward",
    "temporary": "temporary",
}


# ---- the bill --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One line: bytes of it altogether, and bytes alive at the moment of the peak."""

    name: str
    whole: int
    at_peak: int


@dataclass(frozen=True)
class Bill:
    """What a run will occupy, in bytes.

    Attributes:
        title: what was asked.
        items: the lines, with the run's own checkpointing.
        checkpointing: the run's own.
        kept, peaks: activations kept for backward, and the peak of a step, by kind of checkpointing.
        loading: peak while the model is loaded: what is held of it and the largest tensor once more in fp32.
        free: what this machine can give to the run now; None if that is not known.
    """

    title: str
    items: tuple[Item, ...]
    checkpointing: str
    kept: Mapping[str, int]
    peaks: Mapping[str, int]
    loading: int
    free: int | None

    @property
    def total(self) -> int:
        """The most that is alive at one moment."""
        return max(self.loading, self.peaks[self.checkpointing])

    @property
    def fits(self) -> bool | None:
        """Whether there is as much memory; None if that is not known."""
        return None if self.free is None else self.total <= self.free

    def to_dict(self) -> dict[str, JSON]:
        """The bill as JSON, bytes throughout."""
        items: dict[str, JSON] = {i.name: {"whole": i.whole, "at_peak": i.at_peak} for i in self.items}
        kinds: dict[str, JSON] = {kind: {"kept": self.kept[kind], "peak": self.peaks[kind]} for kind in CHECKPOINTING}
        facts: dict[str, JSON] = {"title": self.title, "items": items, "checkpointing": self.checkpointing, "by_kind": kinds}
        return facts | {"loading": self.loading, "total": self.total, "free": self.free, "fits": self.fits}


def render(bill: Bill) -> str:
    """The bill as lines for people."""
    width = max(len(item.name) for item in bill.items)
    lines = [bill.title, "", f"{'':{width}}  {'altogether':>12}  {'at the peak':>12}"]
    lines += [f"{item.name:{width}}  {size(item.whole):>12}  {size(item.at_peak):>12}" for item in bill.items]
    lines += [f"{'peak of a step':{width}}  {'':>12}  {size(bill.peaks[bill.checkpointing]):>12}"]
    lines += [f"{'peak while loading':{width}}  {'':>12}  {size(bill.loading):>12}", ""]
    lines += [f"{'--checkpointing':{width}}  {'activations':>12}  {'peak':>12}"]
    for kind in CHECKPOINTING:
        mark = "  <- this run" if kind == bill.checkpointing else ""
        lines.append(f"{kind:{width}}  {size(bill.kept[kind]):>12}  {size(bill.peaks[kind]):>12}{mark}")
    lines += ["", *_verdict(bill)]
    return "\n".join(lines)


def _verdict(bill: Bill) -> Iterable[str]:
    if bill.items[-1].at_peak:
        yield f"{NO_GAPS} in the environment avoids most of the gaps, and costs speed."
    if bill.free is None:
        yield f"needed: {size(bill.total)}; what is free on this machine is not known"
    else:
        yield f"needed: {size(bill.total)}; free on this machine: {size(bill.free)}; {'fits' if bill.fits else 'DOES NOT FIT'}"
    if bill.fits is False:
        smaller = [
            f"--checkpointing {kind} ({size(bill.peaks[kind])})" for kind in CHECKPOINTING if bill.peaks[kind] < bill.total
        ]
        yield f"to change: {', '.join(['a smaller --micro-batch-size (same result)', *smaller, '--quant nf4', '--dtype bf16'])}"


def size(num_bytes: int) -> str:
    """1536 MiB and more in GiB, the rest in MiB."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 1.5 * 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def plan(run: RunConfig, world_size: int = 1) -> Bill:
    """The memory bill of a training run, before anything is loaded; its data and output folder are not looked at.

    Args:
        run: the settings.
        world_size: processes that share each step; the bill is of one of them, the largest.

    Returns:
        Bytes by kind, by phase and by kind of checkpointing; ``render`` makes lines of them.

    Raises:
        UserError: a model that cannot be read, targets or a rank that do not fit it, full training of 4-bit weights.

    Cost: some seconds, whatever the size of the model.
    """
    device, source = pick_device(run.device), resolve(run.model)
    run = replace(_of_one_process(run, world_size), dtype=pick_dtype(run.dtype, device))
    libraries = _process_bytes(run) if device.type == "cpu" else 0
    shape = shape_of_run(run, source)
    run = _with_init_adapter(run, shape)
    run = replace(run, max_length=min(run.max_length, shape.config.max_position_embeddings))  # as the run itself
    if shape.in_4_bits and run.method == "full":
        raise UserError(
            "config/quantized-base", "weights in 4 bits cannot be trained in full", where="--method full",
            found=f"{len(shape.in_4_bits)} linears in 4 bits", fix="train adapters on them: --method lora",
        )  # fmt: skip
    fixed, totals = _in_shares(_fixed_items(shape, run, device, libraries), shape, run, world_size)
    always = sum(item.at_peak for item in fixed)
    steps = {kind: estimate_step(replace(run, checkpointing=kind), shape, device, totals) for kind in CHECKPOINTING}
    own = steps[run.checkpointing]
    gap_share = HEAP_GAPS if device.type == "cpu" and tunes_allocator() else 0.0
    gaps = round(gap_share * (always + sum(own.at_peak.values())))
    rows = run.micro_batch_size or run.batch_size
    free = available_bytes(device)
    return Bill(
        title=f"{visible(run.model)}, {run.method}, {run.dtype}, {rows} x {run.max_length} tokens at once, on {device}"
        + (f", one of {world_size} processes ({run.parallel})" if world_size > 1 else ""),
        items=(
            *fixed,
            *(Item(name, round(own.whole[kind]), round(own.at_peak[kind])) for kind, name in NAMES.items()),
            Item("gaps in the heap, estimated", gaps, gaps),
        ),
        checkpointing=run.checkpointing,
        kept={kind: round(step.whole["activations"]) for kind, step in steps.items()},
        peaks={kind: round((1 + gap_share) * (always + sum(step.at_peak.values()))) for kind, step in steps.items()},
        loading=libraries + sum(item.whole for item in fixed[1:3]) + _loading_bytes(shape, run, totals),
        free=None if free is None else free + libraries,  # which this process gives back when it ends
    )


def _with_init_adapter(run: RunConfig, shape: Shape) -> RunConfig:
    """The settings with what the adapter of ``--init-adapter`` decides; where its ranks differ, the largest for all layers."""
    if run.init_adapter is None:
        return run
    run, config = with_adapter_settings(run, empty_model(shape.config))
    return replace(run, rank=max(config.rank, *config.rank_pattern.values()) if config.rank_pattern else config.rank)


def _fixed_items(shape: Shape, run: RunConfig, device: torch.device, libraries: int) -> list[Item]:
    """What the estimate does not see: the process itself, and what belongs to weights in 4 bits."""
    numbers = {name: math.prod(shape.tensors[name]) for name in shape.in_4_bits}
    codes = sum(-(-n // 2) for n in numbers.values())
    scales = sum(nf4_bytes(n, shape.in_4_bits[name]) for name, n in numbers.items()) - codes
    matmul_dtype = compute_dtype(torch.empty(0, dtype=DTYPES[run.dtype], device=device))
    workspace = max(numbers.values(), default=0) * matmul_dtype.itemsize
    lines = {
        "interpreter and libraries": libraries,
        "4-bit codes": codes,
        "their scales": scales,
        "one 4-bit weight, made dense": workspace,
    }
    return [Item(name, amount, amount) for name, amount in lines.items()]


def _of_one_process(run: RunConfig, world_size: int) -> RunConfig:
    """The settings as one of several processes has them: its share of a step's rows is computed at once."""
    if run.parallel == "shard":
        require(
            world_size > 1,
            "--parallel shard",
            f"--world-size {world_size}",
            "2 or more",
            "give --world-size 4",
        )
        require_shardable(run)
    return run if run.micro_batch_size else replace(run, batch_size=-(-run.batch_size // world_size))


def _in_shares(fixed: list[Item], shape: Shape, run: RunConfig, world_size: int) -> tuple[list[Item], dict[str, int]]:
    """The fixed lines of a process that holds a share, and the bytes of the kinds that the step counts whole."""
    if run.parallel != "shard":
        return fixed, {}
    libraries, _, _, workspace = fixed
    dtype = DTYPES[run.dtype]
    share = share_bytes_of(shape, dtype, world_size)
    lines = {"4-bit codes": share.codes, "their scales": share.scales + share.everywhere, workspace.name: workspace.whole}
    lines["gathered: embedding, head, two layers"] = share.gathered
    totals = {"weights": share.dense}
    if run.method == "full":
        trained = trained_bytes_of(shape, dtype, prepare_method(empty_model(shape.config), run), world_size)
        lines["their gradients, until they are added up"] = trained.passing
        totals = {"weights": trained.weights, "optimizer": trained.moments, "gradients": trained.gradients}
    return [libraries, *(Item(name, amount, amount) for name, amount in lines.items())], totals


def _dense_bytes(shape: Shape, run: RunConfig) -> int:
    numbers = (math.prod(size) for name, size in shape.tensors.items() if name not in shape.in_4_bits)
    return sum(numbers) * DTYPES[run.dtype].itemsize


def _loading_bytes(shape: Shape, run: RunConfig, totals: Mapping[str, int]) -> int:
    dense = totals.get("weights", _dense_bytes(shape, run))
    return dense + max(math.prod(size) for size in shape.tensors.values()) * 4


# ---- the headers of the files ----------------------------------------------------------------------------------------------


def read_shape(source: Source, quant: QuantConfig | None) -> Shape:
    """The model that the headers of its files describe, checked as when it is loaded."""
    if source.kind == "gguf":
        config, stored = gguf_config(read_gguf(source.path)), {}
    else:
        checked = check_folder(source.path)
        config, stored = checked.config, {name: weight.form for name, weight in checked.in_4_bits.items()}
        if quant is not None:
            require_same(checked.in_4_bits, quant, source.path)
    model = empty_model(config)
    chosen = {} if quant is None else {f"{path}.weight": quant for path in quantization_targets(model, quant)}
    return Shape(config, expected_shapes(model), chosen | stored)


def shape_of_run(run: RunConfig, source: Source) -> Shape:
    """``read_shape``, with the rows that new tokens need.

    Args:
        run: the settings.
        source: the model that ``run.model`` names.

    Raises:
        UserError: what ``read_shape`` and ``rows_of_run`` refuse.
    """
    shape = read_shape(source, run.quantization)
    size, row_ids = rows_of_run(run, shape.config)
    config = replace(shape.config, vocab_size=size)
    return Shape(config, expected_shapes(empty_model(config)), shape.in_4_bits, row_ids)


# ---- this process ----------------------------------------------------------------------------------------------------


def _process_bytes(run: RunConfig) -> int:
    """Resident bytes of this process after a real step of a toy model: the interpreter, the libraries and their buffers."""
    toy = ModelConfig("llama", 256, 256, 512, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64)
    small = RunConfig("", "", "", dtype=run.dtype, checkpointing=run.checkpointing, batch_size=1, max_length=256, method="full")
    model = CausalLM(toy).to(DTYPES[run.dtype])
    optimizer = MasterAdamW(prepare_method(model, small), betas=(0.9, 0.999), weight_decay=0.0)
    train_step(model, optimizer, [full_batch(small, torch.device("cpu"))], lr=0.0)
    del model, optimizer
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: not known
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
