"""What the merge benchmark times: a model or a layer as base, with its adapter beside it, and merged, in two libraries' hands.

Everything starts from the same numbers: minisft's weights (and 4-bit codes) are the peer's, and so are the adapter's factors.
B is random and as large as training makes it (|D| is 2 % of |W|), so that the adapter does real work. The NF4 base is merged
by minisft onto what its codes stand for (``dequantized``: the function that was trained, and dense); PEFT's
``merge_and_unload`` goes back to 4 bits, which is another function, and is timed as what it is. The costs beside the times are
counted by formula, never measured.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from nf4_cases import copies, gaussian, linear_4bit, same_weight
from torch import Tensor, nn

from minisft import nf4
from minisft.config import LoRAConfig
from minisft.formats import load_model
from minisft.generation import generate
from minisft.lora import LoRALinear
from minisft.matmul import Linear
from minisft.merge_weights import merge_
from minisft.model import CausalLM, KVCache
from minisft.nf4 import QuantizedWeight
from minisft.nf4_linear import NF4Linear
from minisft.surgery import apply_lora_, lora_modules, match_targets, replace_module

MINISFT, PEFT = "minisft", "peft"
BASE, UNMERGED, MERGED = "base", "unmerged", "merged"
MODEL = "model"
BASES = ("fp32", "bf16", "nf4")
UPDATE_SIZE = 0.02  # |D| / |W|, as adapters have it after a fine-tuning
STORED_BITS = {"fp32": 32.0, "bf16": 16.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
# How far two libraries may be apart on the same function, and a merged one from its unmerged one: root mean square error of
# the logits as a share of their size. bf16 rounds after each of some 200 products, and a bf16 merge once more.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "nf4": 1e-3}


@dataclass(frozen=True)
class Work:
    """``decode``: one more token for each of ``batch`` rows; ``prefill``: ``tokens`` of one row; ``generate``: both."""

    kind: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.batch if self.kind == 'decode' else self.tokens}"


@dataclass(frozen=True)
class Sizes:
    """``context``: tokens in the KV cache before a decode step, and the prompt of a generation; ``main_rank`` is in the plot.

    ``every_rank``: the work that is measured at all ranks; elsewhere, the others would tell nothing that these do not.
    ``rotate_bytes``: a single layer has copies enough to exceed it, and with it the last-level cache.
    """

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))  # (out, in)
    works: tuple[Work, ...] = (
        Work("decode", 1, 1), Work("decode", 8, 1), Work("prefill", 1, 128), Work("prefill", 1, 512), Work("generate", 1, 64),
    )  # fmt: skip
    ranks: tuple[int, ...] = (8, 16, 64)
    main_rank: int = 16
    every_rank: tuple[str, ...] = ("decode",)
    context: int = 128
    rotate_bytes: int = 128 * 2**20
    sample_s: float = 0.1
    most_s: float = 60.0  # for all rounds of a cell; a cell that would take longer has fewer of them


QUICK = Sizes(
    shapes=((96, 64),),
    works=(Work("decode", 1, 1), Work("decode", 2, 1), Work("prefill", 1, 8), Work("generate", 1, 3)),
    ranks=(2, 4),
    main_rank=4,
    context=5,
    rotate_bytes=2**16,
    sample_s=0.001,
)


# ---- who takes part --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One contestant: a library, what it holds, and the rank of an adapter beside the weights (0: there is none)."""

    library: str
    kind: str
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.library} {self.kind}" + (f" {self.rank}" if self.kind == UNMERGED else "")


@dataclass(frozen=True)
class Subject:
    """A model or a layer in all its forms, with the same numbers in each."""

    name: str
    base: str
    forms: dict[Form, nn.Module]
    linears: tuple[tuple[int, int], ...]  # (out, in) of each adapted layer
    activations: torch.dtype  # 4-bit layers multiply in it, too
    device: str


def forms_of(ranks: Sequence[int]) -> list[tuple[str, int]]:
    return [(BASE, 0), *((UNMERGED, rank) for rank in ranks), (MERGED, 0)]


def same_tensors(model: nn.Module) -> nn.Module:
    """A copy of the tree whose modules can be replaced, over the very same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def model_subject(folder: Path, base: str, sizes: Sizes, device: str) -> Subject:
    """The model at ``folder``, whose files hold it in the dtype of its activations."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    dtype = activations(base, device)
    ours = load_model(folder, dtype=dtype, device=device)[0].requires_grad_(False).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).requires_grad_(False).eval()
    paths = match_targets(ours, "all-linear")
    return _subject((MODEL, base, dtype, device), ours, theirs, paths, sizes)


def layer_subject(shape: tuple[int, int], base: str, sizes: Sizes, device: str) -> Subject:
    """One linear layer of shape (out, in) in a tree of its own."""
    dtype = activations(base, device)
    weight = nn.Parameter(gaussian(*shape, seed=1, dtype=dtype, device=device) * 0.02, requires_grad=False)
    trees = []
    for kind in (Linear, nn.Linear):
        layer = kind(shape[1], shape[0], bias=False, device="meta")
        layer.weight = weight
        trees.append(nn.Sequential(layer).eval())
    return _subject((f"{shape[0]}x{shape[1]}", base, dtype, device), *trees, ["0"], sizes)


def activations(base: str, device: str) -> torch.dtype:
    """A CPU computes beside 4 bits in fp32, a GPU in bf16."""
    return torch.bfloat16 if base == "bf16" or (base == "nf4" and device != "cpu") else torch.float32


def _subject(
    facts: tuple[str, str, torch.dtype, str], ours: nn.Module, theirs: nn.Module, paths: list[str], sizes: Sizes
) -> Subject:
    """All forms of one base; ``facts`` are its name, base, activations and device."""
    name, base, dtype, device = facts
    linears = tuple(tuple(ours.get_submodule(path).weight.shape) for path in paths)
    if base == "nf4":
        _put_in_4_bits(ours, theirs, paths, dtype)
    made: dict[Form, nn.Module] = {Form(MINISFT, BASE): ours, Form(PEFT, BASE): theirs}
    for rank in dict.fromkeys((*sizes.ranks, sizes.main_rank)):
        adapted = same_tensors(ours)
        apply_lora_(adapted, LoRAConfig(rank=rank, alpha=2.0 * rank, targets=tuple(paths)))
        for index, adapter in enumerate(lora_modules(adapted).values()):
            train_(adapter, seed=index)
        made[Form(MINISFT, UNMERGED, rank)] = adapted.eval()
        made[Form(PEFT, UNMERGED, rank)] = _in_peft(theirs, adapted, paths, rank)
    merged = same_tensors(made[Form(MINISFT, UNMERGED, sizes.main_rank)])
    merge_(merged, dtype)
    made[Form(MINISFT, MERGED)] = merged
    # Copied with its weights: PEFT adds to the very tensors that its base is made of.
    made[Form(PEFT, MERGED)] = copy.deepcopy(made[Form(PEFT, UNMERGED, sizes.main_rank)]).merge_and_unload()
    forms = {form: made[form] for form in (Form(lib, k, r) for lib in (MINISFT, PEFT) for k, r in forms_of(sizes.ranks))}
    return Subject(name, base, forms, linears, dtype, device)


def _put_in_4_bits(ours: nn.Module, theirs: nn.Module, paths: list[str], dtype: torch.dtype) -> None:
    """bitsandbytes quantizes; minisft takes copies of its codes and scales (on some CPUs its layer later repacks them)."""
    for path in paths:
        dense = ours.get_submodule(path)
        assert isinstance(dense, nn.Linear)
        assert dense.bias is None, "a bias would have to be carried over"
        layer = linear_4bit(dense.weight.detach(), dtype)
        weight = same_weight(layer.weight.data, layer.weight.quant_state)
        check_peer(path, layer, weight)
        replace_module(ours, path, NF4Linear(weight).eval())
        replace_module(theirs, path, layer.eval())
    theirs.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for


def check_peer(path: str, layer: nn.Linear, weight: QuantizedWeight) -> None:
    """Whether bitsandbytes decodes its own codes to ``levels[code] * absmax[block]``; no comparison makes sense where not.

    On CPUs with AVX-512, bitsandbytes 0.50 lets a new block begin with every row, but a block runs over the flat weight.
    So rows of 16, 32, 48, 80 or 96 numbers come out wrong by 28 to 47 %, and rows of whole blocks (64, 128, ...) are right.
    """
    from bitsandbytes.functional import dequantize_4bit

    expected = nf4.dequantize(weight, torch.float32)
    error = _distance(dequantize_4bit(layer.weight.data, layer.weight.quant_state), expected)
    if error > 2.0**-8:  # half a unit in the last place of bf16 is less
        raise SystemExit(
            f"{path}: on this machine bitsandbytes decodes a weight of shape {' x '.join(map(str, weight.shape))} wrongly, "
            f"off by {error:.0%} from its own tables; rows of whole blocks of {weight.block_size} are decoded rightly"
        )


def train_(adapter: LoRALinear, seed: int) -> None:
    """Give B random numbers, so that |scaling * B A| is ``UPDATE_SIZE`` of |W|."""
    base = adapter.base
    weight = nf4.dequantize(base.quantized, torch.float32) if isinstance(base, NF4Linear) else base.weight.float()
    A, B = adapter.lora_A.data, gaussian(*adapter.lora_B.shape, seed=seed, device=str(weight.device))
    size = adapter.scaling * ((B.T @ B) * (A @ A.T)).sum().sqrt()  # |B A|^2 = tr(B^T B A A^T)
    adapter.lora_B.data = B * (UPDATE_SIZE * weight.norm() / size)


def _in_peft(theirs: nn.Module, ours: nn.Module, paths: list[str], rank: int) -> nn.Module:
    """PEFT's adapters on a tree over the same weights, with the factors of ``ours``."""
    from peft import LoraConfig, get_peft_model

    task = {"task_type": "CAUSAL_LM"} if isinstance(ours, CausalLM) else {}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths, **task)
    adapted = get_peft_model(same_tensors(theirs), config).eval().requires_grad_(False)
    for path in paths:
        layer, adapter = adapted.base_model.model.get_submodule(path), ours.get_submodule(path)
        layer.lora_A["default"].weight.data = adapter.lora_A.data.clone()
        layer.lora_B["default"].weight.data = adapter.lora_B.data.clone()
    return adapted


# ---- the work --------------------------------------------------------------------------------------------------------


def calls(subject: Subject, form: Form, work: Work, sizes: Sizes) -> list[Callable[[], Tensor]]:
    """The work as calls without arguments; of a layer one for each copy, so that no call finds its weight in the cache."""
    module = subject.forms[form]
    if subject.name != MODEL:
        rows = work.batch * work.tokens
        x = gaussian(rows, subject.linears[0][1], seed=2, dtype=subject.activations, device=subject.device)
        many = copies(int(_weight_bytes(subject, form)), sizes.rotate_bytes)
        modules = [module, *(copy.deepcopy(module) for _ in range(many - 1))]
        return [functools.partial(_quietly, m, x) for m in modules]
    length = work.tokens if work.kind == "prefill" else sizes.context
    ids = torch.randint(module.config.vocab_size, (work.batch, length), generator=torch.Generator().manual_seed(3))
    prepare = {"decode": _decode, "prefill": _prefill, "generate": _generate}[work.kind]
    return [prepare(module, ids.to(subject.device), work)]


@torch.inference_mode()
def _quietly(module: nn.Module, *arguments: Tensor) -> Tensor:
    return module(*arguments)


def _decode(model: nn.Module, ids: Tensor, work: Work) -> Callable[[], Tensor]:
    """One token a row after ``ids``, again and again: the caches are set back to where they were."""
    token = ids[:, :1]
    with torch.inference_mode():
        if isinstance(model, CausalLM):
            cache = KVCache(model.config, len(ids), ids.shape[1] + 1, model.dtype, ids.device)
            model.hidden(ids, cache=cache)
            filled = cache.lengths
        else:
            theirs = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def our_step() -> Tensor:
        cache.lengths = filled
        return model.head(model.hidden(token, cache=cache)[:, -1])

    @torch.inference_mode()
    def their_step() -> Tensor:
        logits = model(input_ids=token, past_key_values=theirs, use_cache=True, logits_to_keep=1).logits[:, -1]
        theirs.crop(-1)
        return logits

    return our_step if isinstance(model, CausalLM) else their_step


def _prefill(model: nn.Module, ids: Tensor, work: Work) -> Callable[[], Tensor]:
    """Read ``ids`` into a new KV cache; logits of the last place only, as generation needs them."""

    @torch.inference_mode()
    def ours() -> Tensor:
        cache = KVCache(model.config, len(ids), ids.shape[1], model.dtype, ids.device)
        return model.head(model.hidden(ids, cache=cache)[:, -1])

    @torch.inference_mode()
    def theirs() -> Tensor:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    return ours if isinstance(model, CausalLM) else theirs


def _generate(model: nn.Module, ids: Tensor, work: Work) -> Callable[[], Tensor]:
    """Greedy, without an end token, so that all do the same work."""
    prompts, longest = ids.tolist(), ids.shape[1]

    def ours() -> Tensor:
        return torch.tensor(generate(model, prompts, max_new_tokens=work.tokens, eos_ids=()))

    @torch.inference_mode()
    def theirs() -> Tensor:
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=work.tokens,
            min_new_tokens=work.tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return tokens[:, longest:]

    return ours if isinstance(model, CausalLM) else theirs


# ---- are they the same function? -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """``value``: relative error of the output, or the share of other tokens; ``to``: the contestant it was compared with."""

    value: float
    to: str
    limit: float | None = field(default=None)


def differences(outputs: dict[Form, Tensor], subject: Subject, work: Work, main_rank: int) -> dict[Form, Difference]:
    """Each form against the other library's, a merged one against its unmerged one; more than ``TOLERANCE`` is an error.

    Two are not held to it: PEFT's merge of a 4-bit base is another function, and after a near tie greedy tokens part for good.
    """
    found = {}
    for form, output in outputs.items():
        kind, rank = (UNMERGED, main_rank) if form.kind == MERGED else (form.kind, form.rank)
        other = Form(form.library if form.kind == MERGED else PEFT if form.library == MINISFT else MINISFT, kind, rank)
        if other not in outputs:
            continue
        requantized = form == Form(PEFT, MERGED) and subject.base == "nf4"
        limit = None if requantized or work.kind == "generate" else _tolerance(subject, form.library != other.library)
        value = _distance(output, outputs[other])
        assert limit is None or value <= limit, f"{subject.name} {subject.base} {work.name}: {form.name} is off by {value}"
        found[form] = Difference(value, other.name, limit)
    return found


def _tolerance(subject: Subject, of_two_libraries: bool) -> float:
    """Where a CPU has bf16 instructions, bitsandbytes packs 4-bit weights for them and multiplies fp32 in bf16."""
    from bitsandbytes.nn import modules

    in_bf16 = subject.base == "nf4" and of_two_libraries and modules.has_avx512bf16()
    return TOLERANCE["bf16" if in_bf16 or _half(subject) else subject.base]


def _half(subject: Subject) -> bool:
    return subject.activations == torch.bfloat16


def _distance(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point():
        return float((found.cpu() != expected.cpu()).double().mean())
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


# ---- what it costs, by formula ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """``bytes``: every weight, adapter and KV entry read once a pass; ``products``: matrix products of the adapted layers."""

    flops: float
    bytes: float
    products: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.products + other.products)


def cost(subject: Subject, form: Form, work: Work, sizes: Sizes) -> Cost:
    if subject.name != MODEL or work.kind == "prefill":
        return _pass(subject, form, work.batch, work.tokens, 0)
    if work.kind == "decode":
        return _pass(subject, form, work.batch, 1, sizes.context)
    steps = [_pass(subject, form, work.batch, 1, sizes.context + step) for step in range(work.tokens - 1)]
    return sum(steps, _pass(subject, form, work.batch, sizes.context, 0))


def _pass(subject: Subject, form: Form, batch: int, tokens: int, before: int) -> Cost:
    """2 FLOPs a weight and row; for the adapter 2 R (in + out) a row; for attention 4 D a query and key."""
    rows, rank = batch * tokens, form.rank
    ends = sum(out + into for out, into in subject.linears)
    weights = sum(out * into for out, into in subject.linears)
    flops, moved = 2.0 * rows * (weights + rank * ends), _weight_bytes(subject, form) + 4.0 * rank * ends
    if subject.name == MODEL:
        config = subject.forms[Form(MINISFT, BASE)].config
        head = config.vocab_size * config.hidden_size
        keys, item = before + (tokens + 1) / 2, subject.activations.itemsize
        flops += 2.0 * batch * head + 4.0 * config.num_layers * rows * keys * config.num_heads * config.head_dim
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        moved += item * (head + batch * (before + tokens) * kv)
    return Cost(flops, moved, len(subject.linears) * (3 if rank else 1))


def _weight_bytes(subject: Subject, form: Form) -> float:
    """Of the adapted layers. A merged NF4 base is dense with minisft and in 4 bits again with PEFT."""
    dense = form == Form(MINISFT, MERGED) and subject.base == "nf4"
    bits = 8.0 * subject.activations.itemsize if dense else STORED_BITS[subject.base]
    return sum(out * into for out, into in subject.linears) * bits / 8
