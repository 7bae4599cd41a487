"""Models in a GGUF file: llama.cpp's names, types and row order turned into ours.

Weights are dequantized to fp32, a piece that fits the processor's cache at a time. In files of the
llama architecture the rows of q and k are interleaved for another form of RoPE; they are put back. What a 4-bit file gives
is a different base than the model it was made from, which is why a loaded model remembers its file's type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig, QuantConfig, RopeScaling
from minisft.formats.fields import Fields
from minisft.formats.file_bytes import read_bytes, read_into
from minisft.formats.gguf_header import GGUF, Scalar, TensorInfo
from minisft.formats.loading import (
    EMBEDDING,
    HEAD,
    check_memory,
    check_shapes,
    empty_model,
    expected_shapes,
    fill_,
    quantized_bytes,
)
from minisft.kernels import cpu_gguf
from minisft.kernels.exact_copy import Source, remember_source
from minisft.model import CausalLM, rope_angles

ARCHITECTURES = ("llama", "qwen2", "qwen3")
CHUNK_ITEMS = 2**20  # read at once, in whole blocks of every type: what was read is still in the cache when it is decoded
PACKAGE_ITEMS = 2**17  # dequantized at once by one thread of the package: 512 KiB in fp32, so its temporaries stay there too
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}

OUTER = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROPE_FREQS = "rope_freqs.weight"  # not a weight: how much each frequency of RoPE is stretched


def load_gguf(gguf: GGUF, dtype: torch.dtype, device: torch.device, quant: QuantConfig | None = None) -> CausalLM:
    """Build the model that a checked header describes and stream the weights into it, those that ``quant`` names in 4 bits.

    Args:
        gguf: the checked header.
        dtype: of all parameters that stay dense.
        device: where they go.
        quant: which linears are quantized when they are read.

    Returns:
        the model, in training mode.

    Raises:
        UserError: unsupported architecture, missing or unexpected tensors, a type that has no dequantizer, no memory.
    """
    config, names = check_gguf(gguf)
    model = empty_model(config)
    expected = expected_shapes(model)
    check_memory(expected, dtype, device, quantized_bytes(model, quant))
    fill_(model, _weights(gguf, names, config), dtype, device, quant)
    if dtype == torch.float32 and device.type == "cpu":
        _remember_blocks(model, gguf, names, config)
    return model


def _remember_blocks(model: CausalLM, gguf: GGUF, names: dict[str, str], config: ModelConfig) -> None:
    """Let decoding find the blocks of each dense weight in the file again: they are fewer bytes than fp32 numbers."""
    interleaved, parameters = interleaved_heads(gguf, config), dict(model.named_parameters())
    for theirs, ours in names.items():
        info = gguf.tensors[theirs]
        if ours in parameters and len(info.shape) == 2:
            read = functools.partial(_read_blocks, gguf.path.resolve(), info, interleaved.get(theirs))
            remember_source(parameters[ours], Source(info.type_name, read))


def _read_blocks(path: Path, info: TensorInfo, heads: int | None) -> Tensor | None:
    try:
        blocks = read_bytes(path, info.begin, info.num_bytes)
    except UserError:
        return None
    return our_order(blocks.view(info.shape[0], -1), heads)


def check_gguf(gguf: GGUF) -> tuple[ModelConfig, dict[str, str]]:
    """The model's shape, and our name for each of the file's weights, once it is certain that these are the right ones.

    Raises:
        UserError: unsupported architecture, missing or unexpected tensors.
    """
    config = gguf_config(gguf)
    names = {name: hugging_face_name(name) for name in gguf.tensors if name != ROPE_FREQS}
    shapes = {ours: gguf.tensors[theirs].shape for theirs, ours in names.items()}
    check_shapes(expected_shapes(empty_model(config)), shapes, gguf.path)
    return config, names


def file_dtype(gguf: GGUF) -> str:
    """The type that most weights are stored in, e.g. ``Q4_1``."""
    items: Counter[str] = Counter()
    for info in gguf.tensors.values():
        items[info.type_name] += math.prod(info.shape)
    return items.most_common(1)[0][0]


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; a name we do not know stays as it is."""
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in INNER:
        return name
    return f"model.layers.{parts[1]}.{INNER[parts[2]]}.{parts[3]}"


def _weights(gguf: GGUF, names: dict[str, str], config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    interleaved = interleaved_heads(gguf, config)
    with gguf.path.open("rb", buffering=0) as file:
        for theirs, ours in names.items():
            info, heads = gguf.tensors[theirs], interleaved.get(theirs)
            # The tensor gets no name here: that would keep it alive while the next one is read.
            yield ours, our_order(read_tensor(file, info, theirs), heads)


def interleaved_heads(gguf: GGUF, config: ModelConfig) -> dict[str, int]:
    """The tensors of the file whose rows llama.cpp has reordered, each with its number of heads."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    if gguf.metadata["general.architecture"] != "llama":
        return {}
    return {name: heads[part] for name in gguf.tensors if (part := name.split(".")[-2]) in heads}


def our_order(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k: (pair, half) back to Hugging Face's (half, pair) within each head.

    Args:
        weight: (heads * E, ...), rows in the order x_0, x_{E/2}, x_1, x_{E/2 + 1}, ...
        heads: None for a weight whose rows lie as we want them.
    """
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def read_tensor(file: BinaryIO, info: TensorInfo, name: str) -> Tensor:
    """Read and dequantize one tensor: stored blocks -> fp32 of ``info.shape``, in the order of the file.

    The common types are decoded by our C++ where there is a compiler, the others by the ``gguf`` package: the same bits.

    Args:
        file: open for reading.
        info: where the tensor lies, and its type.
        name: of the tensor, for messages.

    Returns:
        the numbers.

    Raises:
        UserError: a type that the ``gguf`` package cannot dequantize; the file became shorter.
    """
    numbers = torch.empty(math.prod(info.shape), dtype=torch.float32)
    if info.type_name == "F32":
        read_into(file, info.begin, numbers)
    elif info.type_name in HALVES:
        for begin, stored in _stored(file, info):
            numbers[begin : begin + CHUNK_ITEMS] = stored.view(HALVES[info.type_name])
    elif cpu_gguf.can_decode(info.type_name):
        for begin, stored in _stored(file, info):
            cpu_gguf.decode(info.type_name, stored, numbers[begin : begin + CHUNK_ITEMS])
    else:
        _dequantize_by_package(file, info, name, numbers)
    return numbers.view(info.shape)


def _stored(file: BinaryIO, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """(first number, the bytes of it and the next), ``CHUNK_ITEMS`` at a time, in a buffer that the next ones overwrite."""
    items = math.prod(info.shape)
    buffer = torch.empty(info.num_bytes * min(CHUNK_ITEMS, items) // items, dtype=torch.uint8)
    for begin in range(0, items, CHUNK_ITEMS):
        stored = buffer[: info.num_bytes * min(CHUNK_ITEMS, items - begin) // items]
        read_into(file, info.begin + info.num_bytes * begin // items, stored)
        yield begin, stored


def _dequantize_by_package(file: BinaryIO, info: TensorInfo, name: str, numbers: Tensor) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[info.type_name]

    def fill(begin: int) -> None:
        chunk = numbers[begin : begin + PACKAGE_ITEMS]
        stored = torch.empty(info.num_bytes * len(chunk) // len(numbers), dtype=torch.uint8)
        read_into(file, info.begin + info.num_bytes * begin // len(numbers), stored)
        rows = stored.numpy().reshape(1, -1)  # one row: the package is slow on many
        chunk.copy_(torch.from_numpy(dequantize(rows, kind).reshape(-1)))

    try:
        list(_pool().map(fill, range(0, len(numbers), PACKAGE_ITEMS)))  # a list, so that errors come out here
    except NotImplementedError:
        what, fix = "tensors of this type cannot be dequantized", "convert the file to Q8_0 or F16"
        raise UserError("model/gguf", what, where=visible(name), found=info.type_name, fix=fix) from None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Made once: starting threads for each tensor would take longer than reading a small one."""
    return ThreadPoolExecutor(torch.get_num_threads())


def _refuse(fields: Fields, name: str, harmless: tuple[Scalar, ...]) -> None:
    if fields.values.get(name) not in (None, *harmless):
        raise fields.error(name, f"{listing(map(str, harmless))}: anything else is not supported")


def gguf_config(gguf: GGUF) -> ModelConfig:
    """Metadata -> ModelConfig.

    Raises:
        UserError: ``model/unsupported`` for another architecture, ``model/bad-config`` for bad or unsupported values.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or not isinstance(architecture, str):
        raise UserError(
            "model/unsupported",
            "unsupported architecture",
            where=visible(gguf.path),
            found=visible(architecture),
            expected=listing(ARCHITECTURES),
        )
    prefix = architecture + "."
    values = {name.removeprefix(prefix): value for name, value in gguf.metadata.items() if name.startswith(prefix)}
    keys = Fields(values, f"{visible(gguf.path)}: {architecture}")
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        _refuse(keys, name, (head_dim,))
    _refuse(keys, "expert_count", (0,))
    _refuse(keys, "rope.scaling.type", ("none",))
    window = keys.integer("attention.sliding_window", 0) or None
    embedding = gguf.tensors.get("token_embd.weight")
    theta = keys.number("rope.freq_base", 10000.0)
    config = ModelConfig(
        # A llama with a window is what Hugging Face calls mistral; llama.cpp knows one name for both.
        model_type="mistral" if architecture == "llama" and window else architecture,
        vocab_size=embedding.shape[0] if embedding and embedding.shape else keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=keys.integer("block_count"),
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        max_position_embeddings=keys.integer("context_length", 2048),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
        o_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in gguf.tensors,
        sliding_window=window,
    )
    return config if ROPE_FREQS not in gguf.tensors else dataclasses.replace(config, rope_scaling=_llama3_scaling(gguf, config))


def _llama3_scaling(gguf: GGUF, config: ModelConfig) -> RopeScaling:
    """The settings behind the stretch factors that llama.cpp stores for Llama 3.1 and 3.2.

    The file holds only (E/2,) numbers, original frequency / stretched frequency. All published models share three of the
    four settings and the largest number is the fourth; the guess counts only if it gives back every number of the file.
    """
    with gguf.path.open("rb", buffering=0) as file:
        stretch = read_tensor(file, gguf.tensors[ROPE_FREQS], ROPE_FREQS).double()
    guess = RopeScaling(float(stretch.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    expected = frequencies(config) / frequencies(dataclasses.replace(config, rope_scaling=guess))
    if stretch.shape != expected.shape or not torch.allclose(stretch, expected, rtol=1e-4):
        raise UserError(
            "model/unsupported",
            "unknown RoPE stretch factors",
            where=f"{visible(gguf.path)}: {ROPE_FREQS}",
            expected="those of Llama 3.1 or 3.2",
        )
    return guess


def frequencies(config: ModelConfig) -> torch.Tensor:
    """RoPE's frequencies, (E/2,) fp64: the angles at position 1."""
    cos, sin = rope_angles(config, torch.ones(1, dtype=torch.int64), torch.float64)
    return torch.atan2(sin, cos).flatten()
