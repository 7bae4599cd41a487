"""Folders that transformers reads and writes, for models that our decoder does not compute (extra ``any``).

A model is loaded whole, probed (``foreign_probe``) and then quantized, if that is asked for. Refused are code from a
model's folder, pickled weights, and weights that are missing or quantized. The network is never asked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minisft.common.errors import UserError, listing, visible
from minisft.config import QuantConfig
from minisft.formats.families import FAMILIES
from minisft.formats.fields import Fields, read_json_object
from minisft.formats.foreign import ForeignLM
from minisft.formats.foreign_probe import probe_
from minisft.formats.hf import read_headers
from minisft.formats.hf_config import WITH_TRANSFORMERS
from minisft.formats.loading import check_memory
from minisft.formats.source import regular_file
from minisft.surgery import quantize_

# Every word of transformers for a probability of dropping something; training here draws from its own seeds only.
_DROPOUTS = (
    "attention_dropout", "hidden_dropout", "activation_dropout", "classifier_dropout", "dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "ffn_pdrop", "residual_dropout", "embedding_dropout", "embed_dropout", "emb_pdrop", "layerdrop",
    "attn_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "ffn_dropout",
)  # fmt: skip


def foreign_type(folder: Path) -> str | None:
    """The ``model_type`` of a folder whose model our decoder does not compute; None for one that it does, or without any."""
    if not (folder / "config.json").exists():
        return None
    found = read_json_object(regular_file(folder, "config.json"), "model/bad-config").get("model_type")
    return found if isinstance(found, str) and found not in FAMILIES else None


def foreign_context(folder: Path) -> int:
    """The most tokens that a model of ``foreign_type`` is made for, as its file says it; 2048 where it does not."""
    fields = Fields(read_json_object(regular_file(folder, "config.json"), "model/bad-config"), visible(folder))
    return fields.integer("max_position_embeddings", fields.integer("n_positions", 2048))


def load_foreign(folder: Path, dtype: torch.dtype, device: torch.device, quant: QuantConfig | None) -> tuple[ForeignLM, str]:
    """Load a model through transformers, and let it train if the probe passes.

    Args:
        folder: in Hugging Face's layout, with weights in safetensors.
        dtype: of all parameters that stay dense.
        device: where they go.
        quant: which linears are quantized, once all are read: here the dense model exists for a moment.

    Returns:
        the model, and what most of its weights were stored as.

    Raises:
        UserError: no transformers; a folder that it cannot read; weights that are missing; what ``probe_`` refuses.
    """
    kind = visible(foreign_type(folder))
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "model/unsupported", "our decoder does not compute this model type, and transformers is not installed",
            where=visible(folder), found=kind, expected=listing(FAMILIES), fix=WITH_TRANSFORMERS,
        )  # fmt: skip
    stored: Counter[str] = Counter()
    headers = read_headers(folder)
    for header in headers:
        stored.update({entry.dtype: torch.Size(entry.shape).numel() for entry in header.entries.values()})
    shapes = {name: tuple(entry.shape) for header in headers for name, entry in header.entries.items()}
    check_memory(shapes, dtype, device)
    model = ForeignLM(_read(folder, kind, dtype).to(device))
    warnings.warn(f"{visible(folder)}: model type {kind} is computed by transformers", stacklevel=3)
    probe_(model, str(visible(folder)))
    if quant is not None:
        quantize_(model, quant)
    return model.train(), stored.most_common(1)[0][0]


def _read(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """The model of transformers, from files of this machine only, all of its weights among them."""
    import transformers

    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **here)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("the weights are quantized; only dense ones are read")
        dropouts = {name: p for name in _DROPOUTS if isinstance(p := getattr(config, name, None), float)}
        config.update(dict.fromkeys(dropouts, 0.0))
        with _quiet(transformers.utils.logging):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **here
            )
        theirs, info = loaded
        theirs.config.update(dropouts)  # they belong to the model's settings, and are saved with it
        if theirs.get_output_embeddings() is None or theirs.get_decoder() is None:
            raise ValueError("the model names no output head or no decoder")
    except Exception as error:  # whatever a file can make somebody else's program raise
        raise UserError(
            "model/unsupported", "our decoder does not compute this model type, and transformers does not load it",
            where=visible(folder), found=f"{kind}: {visible(str(error).strip().splitlines()[0] if str(error) else error, 300)}",
            expected=f"{listing(FAMILIES)}, or a causal model of transformers",
        ) from None  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise UserError("model/missing-tensor", "tensors are missing", where=visible(folder), expected=listing(missing, 6))
    return theirs


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No bars and no tables of missing weights: those are an error of ours, in one line."""
    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()


def write_foreign(model: ForeignLM, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Their own ``config.json`` and weights, into a folder that exists.

    Args:
        model: dense, without adapters.
        folder: where the files go.
        dtype: of the stored weights.
        max_shard_bytes: weights beyond this go into several files.
    """
    import transformers

    weights = {name: tensor.to(dtype) for name, tensor in model.theirs.state_dict().items()}
    with _quiet(transformers.utils.logging):
        model.theirs.save_pretrained(str(folder), state_dict=weights, max_shard_size=max_shard_bytes)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
