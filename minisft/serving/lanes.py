"""The models that are offered: the base and its adapters, each a decoder of its own over the same weights in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minisft.common.device import answering_dtype, pick_device
from minisft.config import QuantConfig
from minisft.data.chat import resolve_template, stop_ids
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.formats import load_adapter_, load_model
from minisft.formats.adapter import saved_template
from minisft.formats.adapter_rows import saved_tokenizer
from minisft.model import CausalLM
from minisft.serving.settings import base_id


@dataclass(frozen=True)
class Lane:
    """One model by name; requests for it are computed together, those for another one beside it.

    Attributes:
        name: what clients call it.
        model: the decoder, in ``eval`` mode.
        tokenizer: the base's, or that of an adapter with tokens of its own.
        template: the chat template; None for a base model without one, which only continues text.
        eos_ids: tokens that end an answer.
    """

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]


def load_lanes(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    template: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quant: QuantConfig | None = None,
) -> dict[str, Lane]:
    """Load the base once and every adapter on top of it.

    Args:
        model: folder, GGUF file, hub id or name.
        adapters: name -> folder.
        template: for all of them; by default the base's, and for an adapter the one that it was trained with.
        dtype: ``auto``, ``bf16`` or ``fp32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        quant: hold the linears in 4 bits.

    Returns:
        the base first, then the adapters, by name.

    Raises:
        UserError: everything that can be wrong with the files.

    Cost: the base once, and the adapters' own weights.
    """
    place = pick_device(device)
    base, tokenizer = load_model(model, answering_dtype(dtype, place), place, quant)
    base.requires_grad_(False)
    lanes = {base_id(model): _lane(base_id(model), base.eval(), tokenizer, template)}
    for name, folder in adapters.items():
        adapted = sharing_copy(base)
        load_adapter_(adapted, folder)
        lanes[name] = _lane(name, adapted.eval(), saved_tokenizer(folder, tokenizer), template or saved_template(folder))
    return lanes


def sharing_copy(model: CausalLM) -> CausalLM:
    """Modules of its own over the same tensors: what is wrapped or replaced in one is not in the other."""
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    made = copy.deepcopy(model, shared)
    assert isinstance(made, nn.Module)
    return made


def _lane(name: str, model: CausalLM, tokenizer: Tokenizer, choice: str | None) -> Lane:
    if choice is None and tokenizer.chat_template is None:
        return Lane(name, model, tokenizer, None, frozenset(tokenizer.eos_ids))
    template = resolve_template(tokenizer, choice)
    return Lane(name, model, tokenizer, template, frozenset(stop_ids(tokenizer, template)))
