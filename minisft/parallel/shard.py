"""A model of which each process holds a share: FSDP2, one decoder layer gathered at a time, adapters whole.

``fully_shard`` cuts every weight along its first axis. Before a layer is computed its shares are gathered, after that they are
dropped, and backward gathers them again. Weights in 4 bits are sharded as what they are: codes stay uint8 and scales stay
scales, as frozen parameters (a buffer would be copied to every process), so what is gathered equals bit for bit what one
process would hold. Of a frozen base gathering is all that is asked of FSDP: it has no gradient, and adapters are summed as in
``world``. A model that is trained itself is held in fp32 (in bf16 runs layers are gathered in bf16), and its gradients are
summed over the processes, never averaged.

Each process reads its own share of every tensor from the files, 1 / W of the bytes. A model is never whole anywhere.

Ref: Zhao et al. 2023, arXiv:2304.11277, section 3; PyTorch's ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minisft.config import QuantConfig
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_tokenizer
from minisft.formats.lazy_weights import Packed, Pieces, StoredModel, open_model
from minisft.formats.loading import empty_model, expected_shapes, quantized_bytes
from minisft.formats.source import Origin, resolve, set_origin_
from minisft.kernels import cpu_nf4
from minisft.model import CausalLM
from minisft.nf4 import NESTED_BLOCK_SIZE, QuantizedWeight, codebook, quantize_absmax
from minisft.nf4_linear import NF4Linear
from minisft.parallel.world import World
from minisft.surgery import nf4_modules, replace_module

SHARDED = ("packed", "absmax", "absmax2")  # of a layer in 4 bits; its 16 levels and the mean of its scales are everywhere


def share_of(length: int, world: World) -> tuple[int, int]:
    """The range [begin, end) of ``length`` rows that this process holds: FSDP's cut, the last share may be short or empty."""
    size = -(-length // world.size)
    return min(world.rank * size, length), min((world.rank + 1) * size, length)


def load_sharded(
    path: str, dtype: torch.dtype, device: torch.device, quant: QuantConfig | None, world: World, trained: bool = False
) -> tuple[CausalLM, Tokenizer]:
    """Load this process's share of a model, and its tokenizer.

    Args:
        path: as for ``load_model``.
        dtype: of the dense weights.
        device: of this process.
        quant: which linears are quantized when they are read; the codes are those of ``load_model``.
        world: the processes, joined.
        trained: whether the dense weights themselves will be: then shares are fp32 at least, rounded to ``dtype`` once.

    Returns:
        The model, all of it frozen, ready for adapters or to be trained; and the tokenizer.

    Raises:
        UserError: what can be wrong with the files.

    Cost: reads 1 / W of the file's bytes; holds 1 / W of the model, and while reading the share of one tensor in fp32.
    """
    source = resolve(path)
    stored, tokenizer = open_model(source), load_tokenizer(path)
    held = torch.promote_types(dtype, torch.float32) if trained else dtype
    model = empty_model(stored.config).to(held).requires_grad_(False)
    tokenizer.check_embedding(model.config.vocab_size)
    forms = dict(stored.in_4_bits)
    if quant is not None:
        forms |= {name: quant for name in quantized_bytes(model, quant) if name not in forms}
    for name, form in forms.items():
        _place_empty(model, name, form, dtype)
    if model.config.tie_word_embeddings:
        model.tie()
    shard_(model, device, world, dtype)
    _fill(model, stored, forms, dtype, device, world)
    set_origin_(model, Origin(source.name, str(source.path), source.kind, stored.file_dtype))
    return model, tokenizer


def shard_(model: CausalLM, device: torch.device, world: World, dtype: torch.dtype | None = None) -> None:
    """Cut a model into shares: one group for each decoder layer, and one for embedding, final norm and head.

    Args:
        model: whole; changed in place.
        device: where its shares are to lie.
        world: the processes that share it.
        dtype: that layers are gathered and computed in, where that is not the one they are held in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for layer in nf4_modules(model).values():
        _hold_as_parameters(layer)
    mesh = init_device_mesh(device.type, (world.size,))
    policy, held = MixedPrecisionPolicy(), model.dtype
    if dtype is not None and dtype != held:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=held, cast_forward_inputs=False)
        model.activations_dtype = dtype
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # Embedding and head are one group, so a tied pair is gathered once; it stays whole until backward has ended, because the
    # loss multiplies by the head outside of the model.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for group in (model, *model.model.layers):  # the loss is divided already; gloo cannot multiply while it adds
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    # It returns a view, which nothing changes in place: that is what PyTorch would warn of in every run.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def take_over_(model: CausalLM) -> None:
    """Let FSDP take over the shares as they are now, which it does when it first gathers; all processes must take part.

    From here on the memory of each share is where it stays. What is to be trained must be known by now.
    """
    for group in (*model.model.layers, model):
        group.unshard()
        group.reshard()


def _hold_as_parameters(layer: NF4Linear) -> None:
    for name in SHARDED:
        tensor = getattr(layer, name)
        if tensor is not None:
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


# ---- reading shares --------------------------------------------------------------------------------------------------


def _place_empty(model: CausalLM, name: str, form: QuantConfig, dtype: torch.dtype) -> None:
    """A layer in 4 bits without its numbers, in the place of a linear without its."""
    path = name.removesuffix(".weight")
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    blocks = -(-linear.weight.numel() // form.block_size)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nested = form.double_quant
    q = QuantizedWeight(
        packed=empty(-(-linear.weight.numel() // 2), dtype=torch.uint8),
        absmax=empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        absmax2=empty(-(-blocks // NESTED_BLOCK_SIZE), dtype=torch.float32) if nested else None,
        offset=torch.zeros(()) if nested else None,
        levels=codebook(form.levels),
        block_size=form.block_size,
        shape=linear.weight.shape,
        dtype=dtype,
    )
    replace_module(model, path, NF4Linear(q, linear.bias))


def _fill(
    model: CausalLM, stored: StoredModel, forms: dict[str, QuantConfig], dtype: torch.dtype, device: torch.device, world: World
) -> None:
    for name in expected_shapes(empty_model(model.config)):
        pieces, path = stored.open[name](), name.rpartition(".")[0]
        if name not in forms:
            share = _dense_share(pieces, world).to(device=device, dtype=dtype)
            _set_share(model, name, share.to(model.get_parameter(name).dtype))  # where it is trained, fp32 of what was read
            continue
        layer = model.get_submodule(path)
        assert isinstance(layer, NF4Linear)
        packed_share, q = _quantized_share(pieces, name, forms[name], dtype, world)
        layer.weight_dtype = q.dtype
        layer.levels = q.levels.to(device)
        layer.offset = None if q.offset is None else q.offset.to(device)
        _set_share(model, f"{path}.packed", packed_share.to(device))
        for part in ("absmax", "absmax2"):
            whole = getattr(q, part)
            if whole is not None:
                _set_share(model, f"{path}.{part}", whole[slice(*share_of(len(whole), world))].clone().to(device))
    if model.config.tie_word_embeddings:
        model.tie()


def _set_share(model: CausalLM, name: str, share: Tensor) -> None:
    """Give a sharded parameter on the meta device this process's numbers; FSDP takes them over at the first forward."""
    from torch.distributed.tensor import DTensor

    owner, _, leaf = name.rpartition(".")
    empty = model.get_parameter(name)
    assert isinstance(empty, DTensor)
    assert empty.to_local().shape == share.shape, f"{name}: a share of {tuple(share.shape)}"
    full = DTensor.from_local(
        share, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
    )
    setattr(model.get_submodule(owner), leaf, nn.Parameter(full, requires_grad=False))


def _dense_share(pieces: Pieces, world: World) -> Tensor:
    """Rows [begin, end) of a dense weight, in the dtype of its pieces."""
    rows, columns = pieces.shape[0], math.prod(pieces.shape[1:])
    begin, end = share_of(rows, world)
    if begin == end:
        return torch.empty(0, *pieces.shape[1:])
    return pieces.read(begin * columns, end * columns).view(end - begin, *pieces.shape[1:])


def _quantized_share(
    pieces: Pieces, name: str, form: QuantConfig, dtype: torch.dtype, world: World
) -> tuple[Tensor, QuantizedWeight]:
    """This process's codes, and the weight's scales (all of them: they are small, and the nested ones depend on each other)."""
    length = math.prod(pieces.shape)
    codes = share_of(-(-length // 2), world)
    if isinstance(pieces, Packed):
        return pieces.codes(*codes), pieces.form
    size, blocks = form.block_size, -(-length // form.block_size)
    first, last = share_of(blocks, world)
    # Whole blocks that hold both this process's codes and the blocks whose scales it computes.
    begin, end = min(first * size, 2 * codes[0] // size * size), min(length, max(last, -(-2 * codes[1] // size)) * size)
    absmax = torch.zeros(blocks)
    packed = torch.empty(0, dtype=torch.uint8)
    if begin < end:
        q = cpu_nf4.quantize(pieces.read(begin, end), size, False, form.levels, name=name)
        absmax[first:last] = q.absmax[first - begin // size : last - begin // size]
        packed = q.packed[codes[0] - begin // 2 : codes[1] - begin // 2].clone()
    world.sum_table_(absmax)
    scales, absmax2, offset = quantize_absmax(absmax) if form.double_quant else (absmax, None, None)
    nothing = torch.empty(0, dtype=torch.uint8)
    shape = torch.Size(pieces.shape)
    return packed, QuantizedWeight(nothing, scales, absmax2, offset, codebook(form.levels), size, shape, dtype)


# ---- looking at a sharded model ----------------------------------------------------------------------------------------


def gathered(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each sharded parameter, one at a time; all processes must take part."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter.full_tensor()


def share_bytes(model: CausalLM) -> int:
    """Bytes of this process's share of the base."""
    from torch.distributed.tensor import DTensor

    shares = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    return sum(share.numel() * share.element_size() for share in shares)
