"""``adapter_model.safetensors``: what PEFT calls the tensors of an adapter, and reading them without believing the file.

A module has two factors, with DoRA also the lengths of its rows. Given a model the names and shapes are known beforehand;
without one they are taken from the header and checked against each other. Beside them a file may repeat weights of the base
(PEFT does so with ``save_embedding_layers``), which is harmless while they are the base's own. The one idea: all names and
shapes are settled from the header, before a number is read.

Ref: PEFT 0.21, ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, listing, visible
from minisft.formats.safetensors_file import Header, read_tensors
from minisft.nf4_linear import NF4Linear

PREFIX = "base_model.model."  # PEFT's wrapper and its own ``model``
MAGNITUDE = "lora_magnitude_vector"
_FLOATS = ("F32", "BF16", "F16", "F64")
_FIRST_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_embedding_A)", re.DOTALL)
_BASE_WEIGHT = re.compile(re.escape(PREFIX) + r"((?:(?!lora_).)+?)(?:\.base_layer)?\.(weight|bias)", re.DOTALL)
AGAIN = "save the adapter again"


def tensor_names(path: str, is_embedding: bool) -> tuple[str, str]:
    """The names of A and B of the module at ``path``; those of an embedding have no ``.weight``."""
    first, last = ("lora_embedding_", "") if is_embedding else ("lora_", ".weight")
    return f"{PREFIX}{path}.{first}A{last}", f"{PREFIX}{path}.{first}B{last}"


def magnitude_name(path: str) -> str:
    """The name of DoRA's row lengths of the module at ``path``."""
    return f"{PREFIX}{path}.{MAGNITUDE}"


@dataclass(frozen=True)
class Factors:
    """Where the tensors of one module are in the file, and the shapes they must have: A, B and, with DoRA, the lengths."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_embedding: bool = False


def repeated_weights(header: Header) -> dict[str, str]:
    """Tensors that by their names are the base's own weights: name in the file -> name in the base."""
    found = {name: match for name in header.entries if (match := _BASE_WEIGHT.fullmatch(name))}
    return {name: f"{match[1]}.{match[2]}" for name, match in found.items()}


def same_weight(ours: Tensor, stored: Tensor) -> bool:
    """Whether two tensors are one weight, up to a conversion of one to the dtype of the other."""
    if ours.shape != stored.shape:
        return False
    return torch.equal(ours.to(stored.dtype), stored) or torch.equal(stored.to(ours.dtype), ours)


def changed_weight(name: str, header: Header) -> UserError:
    """The refusal of a tensor of the file that is a weight of the base, changed."""
    return UserError(
        "adapter/unsupported",
        "the adapter brings a changed weight of the base",
        where=visible(header.path),
        found=visible(name),
        expected="factors, and at most the base's own weights",
        fix="merge it with PEFT (merge_and_unload, save_pretrained) and load the result as a model",
    )


def factors_of(base: nn.Module, path: str, rank: int, use_dora: bool) -> Factors:
    """What the file must hold for one layer.

    Args:
        base: the layer, a linear or an embedding.
        path: of the layer in the model.
        rank: of the factors.
        use_dora: whether the lengths of rows are there, too.

    Returns:
        names and shapes.

    Raises:
        UserError: ``adapter/unsupported`` for DoRA over an embedding.
    """
    if isinstance(base, nn.Embedding):
        if use_dora:
            what, fix = "use_dora over an embedding", "merge it with PEFT (merge_and_unload) and load the result as a model"
            raise UserError("adapter/unsupported", what, where=visible(path), expected="plain LoRA", fix=fix)
        shapes = (rank, base.num_embeddings), (base.embedding_dim, rank)
        return Factors(tensor_names(path, True), shapes, is_embedding=True)
    assert isinstance(base, (nn.Linear, NF4Linear))
    names, shapes = tensor_names(path, False), ((rank, base.in_features), (base.out_features, rank))
    if not use_dora:
        return Factors(names, shapes)
    return Factors((*names, magnitude_name(path)), (*shapes, (base.out_features,)))


def stored_factors(header: Header) -> dict[str, Factors]:
    """The plain LoRA modules in a file, by path, with shapes that fit together; no model is needed.

    Weights of the base that the file repeats are passed over: ``repeated_weights`` lists them for the caller to compare.

    Raises:
        UserError: a factor without its partner, any other tensor, shapes that make no product.
    """
    first = [match for name in sorted(header.entries) if (match := _FIRST_FACTOR.fullmatch(name))]
    is_embedding = {match[1]: match[2] == "lora_embedding_A" for match in first}
    names = {path: tensor_names(path, kind) for path, kind in is_embedding.items()}
    if not names:
        what = "there is no factor of any module"
        raise UserError("adapter/missing-tensor", what, where=visible(header.path), fix="give an adapter of LoRA")
    check_names({name for pair in names.values() for name in pair}, header, repeated_weights(header))
    found: dict[str, Factors] = {}
    for path, (name_A, name_B) in names.items():
        (rank, inputs), (outputs, _) = _shape(name_A, 2, header), _shape(name_B, 2, header)
        found[path] = Factors((name_A, name_B), ((rank, inputs), (outputs, rank)), is_embedding[path])
        check_shapes(path, found[path], header)
    return found


def check_names(expected: set[str], header: Header, tolerated: Collection[str] = ()) -> None:
    """Every tensor that is expected is there, and no other but those ``tolerated``.

    Args:
        expected: names of the factors.
        header: of the file.
        tolerated: further names that may be there.

    Raises:
        UserError: ``adapter/missing-tensor`` or ``adapter/unexpected-tensor``, with the names.
    """
    where, found = visible(header.path), set(header.entries)
    if missing := sorted(expected - found):
        raise UserError(
            "adapter/missing-tensor",
            f"{len(missing)} of {len(expected)} tensors are missing",
            where=where,
            expected=listing(missing, 6),
            fix=f"{AGAIN}, or take the modules without factors out of target_modules in adapter_config.json",
        )
    if extra := sorted(found - expected - set(tolerated)):
        raise UserError(
            "adapter/unexpected-tensor",
            "tensors that belong to no target",
            where=where,
            found=listing(extra, 6),
            fix="check that the base model is the right one, and that adapter_config.json belongs to these tensors",
        )


def check_shapes(path: str, factor: Factors, header: Header) -> None:
    """The tensors of one module are floats of the right shapes.

    Args:
        path: of the module.
        factor: what is expected.
        header: of the file.

    Raises:
        UserError: ``adapter/rank`` where the rank is wrong, ``adapter/base-mismatch`` where the base is another,
            ``adapter/dtype`` and ``adapter/shape`` for what is no matrix of floats.
    """
    where = visible(header.path)
    (rank, inputs), (outputs, _), *_ = factor.shapes
    (rank_A, in_A), (out_B, rank_B), *lengths = (
        _shape(name, len(expected), header) for name, expected in zip(factor.names, factor.shapes, strict=True)
    )
    if (rank_A, rank_B) != (rank, rank):
        raise UserError(
            "adapter/rank",
            f"{visible(path)} has another rank than the config says",
            where=where,
            found=f"A {[rank_A, in_A]}, B {[out_B, rank_B]}",
            expected=f"rank {rank}",
            fix="correct r or rank_pattern in adapter_config.json",
        )
    if (out_B, in_A) != (outputs, inputs) or any(shape != (outputs,) for shape in lengths):
        raise UserError(
            "adapter/base-mismatch",
            f"{visible(path)} was trained on a base of another shape",
            where=where,
            found=" and ".join([f"{out_B} x {in_A}", *(f"{shape[0]} row lengths" for shape in lengths)]),
            expected=f"{outputs} x {inputs} as in this model",
            fix="load the base model that adapter_config.json names",
        )
    if not 1 <= rank <= min(outputs, inputs):
        raise UserError(
            "adapter/rank",
            f"the rank of {visible(path)} does not fit its layer",
            where=where,
            found=str(rank),
            expected=f"1 to {min(outputs, inputs)}",
            fix="train it again with a lower rank",
        )


def _shape(name: str, num_dimensions: int, header: Header) -> tuple[int, ...]:
    """The shape of a float tensor with so many dimensions."""
    entry, where = header.entries[name], visible(header.path)
    if entry.dtype not in _FLOATS:
        raise UserError(
            "adapter/dtype",
            f"tensor {visible(name)} is not a float",
            where=where,
            found=entry.dtype,
            expected=" or ".join(_FLOATS),
            fix=f"{AGAIN} as floats",
        )
    if len(entry.shape) != num_dimensions:
        what = f"tensor {visible(name)} is no {'matrix' if num_dimensions == 2 else 'vector'}"
        raise UserError("adapter/shape", what, where=where, found=str(list(entry.shape)), fix=AGAIN)
    return entry.shape


def read_factors(factors: Mapping[str, Factors], header: Header) -> dict[str, Tensor]:
    """All tensors by name, finite; says so when some of them make no difference."""
    tensors = finite_tensors([name for factor in factors.values() for name in factor.names], header)
    products = {path: factor.names for path, factor in factors.items() if len(factor.names) == 2}  # lengths act by themselves
    idle = [path for path, names in products.items() if not all(tensors[name].any() for name in names)]
    if idle:
        share = f"no effect in {len(idle)} of {len(factors)} modules, a factor is all zero"
        warnings.warn(f"{visible(header.path)}: {share}: {listing(idle, 3)}", stacklevel=3)
    return tensors


def finite_tensors(names: list[str], header: Header) -> dict[str, Tensor]:
    """Tensors of the file by name; ``adapter/non-finite`` for a number that is none."""
    tensors = dict(read_tensors(header, names, "adapter"))
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise UserError(
                "adapter/non-finite",
                f"tensor {visible(name)} holds NaN or infinity",
                where=visible(header.path),
                found=f"{int(bad.sum())} of {bad.numel()}, the first at {first}",
                fix="take an earlier checkpoint, from before the training diverged",
            )
    return tensors
