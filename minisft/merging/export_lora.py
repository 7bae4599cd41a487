"""An adapter alone in llama.cpp's form: the factors of each layer by the name of the layer's tensor.

llama.cpp scales every module by alpha / rank, with one alpha for the file and the rank of the tensor: it knows neither rsLoRA
nor alphas that differ. So alpha is written as 1, and each module's own scaling times its rank is multiplied into B, rounded
once. The rows of B follow those of the weight (q and k of ``llama``). Refused are adapters that the form cannot hold: DoRA,
whose update depends on the weight, and one side of a tied head, since both sides are one tensor there.

Ref: llama.cpp, ``src/llama-adapter.cpp``, ``get_scale``.
"""

from __future__ import annotations

from torch import Tensor

from minisft.common.errors import UserError, listing, visible
from minisft.dora import DoRALinear
from minisft.formats.gguf_header import Metadata
from minisft.formats.gguf_names import llama_cpp_name, their_order
from minisft.lora import LoRAEmbedding
from minisft.merge_weights import splits_tie
from minisft.merging.base_and_adapter import AdaptedFiles

MERGE_FIX = "leave --adapter-only away: the merged model has no such limit"


def lora_keys() -> Metadata:
    """The metadata of an adapter file, but for architecture and name."""
    return {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}


def lora_tensors(files: AdaptedFiles) -> dict[str, Tensor]:
    """``<tensor>.lora_a`` (rank, in) and ``<tensor>.lora_b`` (out, rank) of every module, fp32.

    In the model's order; the A of an embedding is (in, rank). The base gives shapes only.

    Raises:
        UserError: ``adapter/no-gguf``.
    """
    if dora := [path for path, adapter in files.adapters.items() if isinstance(adapter, DoRALinear)]:
        raise _refusal(files, "DoRA has no form in a GGUF adapter file", listing(map(visible, dora), 3))
    if files.rows:
        raise _refusal(files, "new tokens have no form in a GGUF adapter file", listing(files.rows, 2))
    if files.stored.config.tie_word_embeddings and splits_tie(files.adapters):
        raise _refusal(files, "the adapter is on one side of a tied head, which is one tensor in a GGUF file", "tied weights")
    found: dict[str, Tensor] = {}
    for path, adapter in files.adapters.items():
        A, B = (factor.detach() for factor in adapter.factors())
        name = f"{path}.weight"
        theirs, order = llama_cpp_name(name), their_order(name, files.stored.config)
        B = (B.double() * (adapter.scaling * A.shape[0])).float()
        found[f"{theirs}.lora_a"] = (A.T if isinstance(adapter, LoRAEmbedding) else A).float().contiguous()
        found[f"{theirs}.lora_b"] = B if order is None else B[order]
    return found


def _refusal(files: AdaptedFiles, what: str, found: str) -> UserError:
    return UserError("adapter/no-gguf", what, where=visible(files.folder), found=found, expected="plain LoRA", fix=MERGE_FIX)
