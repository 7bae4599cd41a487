"""Filling an empty model tensor by tensor, whatever the file format.

A reader yields (name, tensor) pairs with Hugging Face names; the model starts on the meta device, where it costs nothing,
and each of its parameters is born when its tensor arrives. So the peak is the finished model plus what the reader holds:
one tensor. A layer that is wanted in 4 bits is quantized at that moment too, so its dense weight never meets another's.
Before the first byte is allocated, names and shapes are compared and the size is held against the free memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig, QuantConfig
from minisft.model import CausalLM
from minisft.nf4 import NESTED_BLOCK_SIZE, QuantizedWeight
from minisft.nf4_linear import NF4Linear
from minisft.surgery import in_4_bits, quantization_targets, replace_module

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def empty_model(config: ModelConfig) -> CausalLM:
    """The model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        return CausalLM(config)


def expected_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Names and shapes a file must hold; a tied head is not among them."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # which lists a tied pair once


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compare what the configuration promises with what the file declares.

    Args:
        expected: name -> shape, by the configuration.
        found: name -> shape, by the file.
        where: the file or folder, for messages.

    Raises:
        UserError: missing or unexpected tensors (listed), or one shape that differs (both shown).
    """
    shown = visible(where)
    if missing := [name for name in expected if name not in found]:
        raise UserError("model/missing-tensor", "tensors are missing", where=shown, expected=listing(missing, 6))
    if extra := [name for name in found if name not in expected]:
        raise UserError(
            "model/unexpected-tensor", "tensors that this architecture does not have", where=shown, found=listing(extra, 6)
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                "model/shape",
                f"tensor {visible(name)} has another shape than the configuration says",
                where=shown,
                found=str(list(found[name])),
                expected=str(list(shape)),
            )


def quantized_bytes(model: CausalLM, quant: QuantConfig | None) -> dict[str, int]:
    """What each weight that ``quant`` asks for will occupy (``QuantizedWeight.nbytes``), by name, before it is there.

    Raises:
        UserError: what ``surgery.quantization_targets`` refuses.
    """
    paths = [] if quant is None else quantization_targets(model, quant)
    return {f"{path}.weight": nf4_bytes(model.get_parameter(f"{path}.weight").numel(), quant) for path in paths if quant}


def nf4_bytes(numel: int, quant: QuantConfig) -> int:
    """Bytes of ``numel`` weights in 4 bits: codes, 16 levels, and per block a scale of 4 bytes or a code of 1."""
    blocks = -(-numel // quant.block_size)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 if quant.double_quant else 4 * blocks
    return -(-numel // 2) + scales + 16 * 4


def check_memory(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, packed: Mapping[str, int] | None = None
) -> None:
    """Refuse a model that cannot fit before anything is allocated.

    Args:
        packed: bytes of the tensors that are not held in ``dtype``, by name (``quantized_bytes``).
        shapes: of all tensors, by name.
        dtype: of those that stay dense.
        device: where they go.

    Raises:
        UserError: ``model/too-large``, with the bytes needed (all tensors, and the largest once more in fp32) and the
            bytes free.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    held = {name: size * dtype.itemsize for name, size in sizes.items()} | dict(packed or {})
    needed, free = sum(held.values()) + max(sizes.values()) * 4, available_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            "model/too-large",
            "the model does not fit into memory",
            where=str(device),
            found=f"{free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB",
            fix="use --dtype bf16, --quant nf4, a smaller model or a larger machine",
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device: what the kernel calls available, within the container's limit. None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = [bound for bound in (_machine_bytes(), _container_bytes()) if bound is not None]
    return min(bounds, default=None)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: free pages are the nearest there is
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return int(limit) - int(used) + int(statistics.get("inactive_file", 0))  # file pages are given back when needed


def fill_(
    model: CausalLM,
    tensors: Iterable[tuple[str, torch.Tensor | QuantizedWeight]],
    dtype: torch.dtype,
    device: torch.device,
    quant: QuantConfig | None = None,
) -> None:
    """Replace the meta parameters by the tensors of the stream, converted to ``dtype`` on ``device``, then tie the head.

    Args:
        tensors: (name, tensor) pairs whose tensors nobody else holds: they become the parameters themselves where
            dtype and device already agree. A ``QuantizedWeight`` named ``X.weight`` makes X an ``NF4Linear`` as it is.
        quant: which layers are quantized as they arrive, from the numbers as the reader gives them: the codes do not
            depend on ``dtype``.
        model: on the meta device; changed in place.
        dtype, device: of the parameters.

    Raises:
        UserError: what ``surgery.quantization_targets`` refuses; a weight to be quantized that is not finite.
    """
    chosen = quantized_bytes(model, quant)
    for name, tensor in tensors:
        if isinstance(tensor, QuantizedWeight):
            _place_packed(model, name, tensor, device)
        elif quant is not None and name in chosen:
            _place_quantized(model, name, tensor.to(device), dtype, quant)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
        del tensor  # or it would live on while the reader makes the next one
    if model.config.tie_word_embeddings:
        model.tie()


def _place_quantized(model: CausalLM, name: str, weight: torch.Tensor, dtype: torch.dtype, quant: QuantConfig) -> None:
    path = name.removesuffix(".weight")
    linear = _linear(model, path)
    linear.weight = nn.Parameter(weight)
    layer = in_4_bits(path, linear, quant)
    layer.weight_dtype = dtype  # the dense weight would be converted
    replace_module(model, path, layer)


def _place_packed(model: CausalLM, name: str, weight: QuantizedWeight, device: torch.device) -> None:
    path, layer = name.removesuffix(".weight"), NF4Linear(weight).to(device)
    layer.bias = _linear(model, path).bias  # if it has yet to arrive it is on the meta device, from which nothing can be moved
    replace_module(model, path, layer)


def _linear(model: CausalLM, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer
