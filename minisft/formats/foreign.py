"""``ForeignLM``: a model of transformers in the place of ``CausalLM``.

It gives hidden states of segments, a head, and linears under the names of the file, so that adapters, 4 bits, the loss and the
loop are the same code. The idea to take home: packed rows are told apart by their positions, which begin again at 0, and by
nothing else; an attention mask of ones or a cache would make transformers join them. Models for which that is not
enough have ``packs`` False (``foreign_probe`` finds out), and each of their rows is computed by itself, which costs padding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from minisft.attention import Segments
from minisft.config import ModelConfig
from minisft.model import CausalLM, KVCache, direct


class TokenCache(KVCache):
    """What has been read of each row, as ids: each step computes whole rows again, which any model can."""

    def __init__(self, batch_size: int, max_length: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def max_length(self) -> int:
        """How many tokens a row can hold."""
        return self.ids.shape[1]

    def select(self, rows: Tensor) -> TokenCache:
        """A cache of the given rows, in that order."""
        chosen = TokenCache(0, 0, self.ids.device)
        chosen.ids, chosen.lengths = self.ids[rows], self.lengths[rows]
        return chosen

    def part(self, row: int, length: int) -> TokenCache:
        """A view of one row's first ``length`` tokens."""
        chosen = TokenCache(0, 0, self.ids.device)
        chosen.ids, chosen.lengths = self.ids[row : row + 1, :length], torch.full_like(self.lengths[:1], length)
        return chosen

    def keep_(self, rows: Any) -> None:
        """Forget all rows but these."""
        index = torch.tensor(list(rows), device=self.ids.device)
        self.ids, self.lengths = self.ids[index], self.lengths[index]

    def put_(self, start: int, other: KVCache) -> None:
        """Copy what ``other`` has read into the rows from ``start`` on."""
        assert isinstance(other, TokenCache)
        rows, end = slice(start, start + len(other.lengths)), int(other.lengths.max())
        self.ids[rows, :end], self.lengths[rows] = other.ids[:, :end], other.lengths


class ForeignLM(CausalLM):
    """A causal model of transformers in the place of our decoder.

    Its children are those of the other model, under the same names in the same dictionary: a layer that is replaced here is
    replaced there.

    Args:
        theirs: a ``PreTrainedModel`` with an output head.

    Attributes:
        theirs: the model of transformers.
        packs: whether rows can be computed one behind the other; ``probe_`` finds out.
    """

    theirs: Any

    def __init__(self, theirs: Any) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "theirs", theirs)  # past nn.Module: as a child it would change every name
        self._modules, self._parameters, self._buffers = theirs._modules, theirs._parameters, theirs._buffers
        self.packs = "position_ids" in inspect.signature(theirs.get_decoder().forward).parameters
        self.config = shape_of(theirs)
        self.wrap_layer = self.wrap_mlp = direct

    def get_output_embeddings(self) -> nn.Module:
        """The output head, as ``surgery.output_head`` asks for it."""
        return self.theirs.get_output_embeddings()

    @property
    def lm_head(self) -> nn.Module:  # type: ignore[override]  # a property where CausalLM has a child
        """The output head."""
        return self.get_output_embeddings()

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        return self.theirs.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return _weight(self.embedding).dtype

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return _weight(self.embedding).device

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache, of ids."""
        return TokenCache(batch_size, max_length, self.device)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix_length: int = 0,
        noise: Tensor | None = None,
        only: Tensor | None = None,
        past: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids, segment_ids, cache, prefix_length, noise, only, past: as in ``CausalLM.hidden``; a cache is a
                ``TokenCache``, so a past saves nothing here.

        Returns:
            (B, T, D) in the model's dtype, or (n, D).
        """
        past_length = 0
        if past is not None:
            assert isinstance(past, TokenCache)
            assert noise is None
            past_length = int(past.lengths)
            ids = torch.ones_like(input_ids) if segment_ids is None else segment_ids
            before = past.ids[:, :past_length].expand(len(input_ids), -1)
            input_ids, segment_ids = torch.cat((before, input_ids), 1), torch.cat((torch.ones_like(before), ids), 1)
        hidden = self._all_hidden(input_ids, segment_ids, cache, past_length + prefix_length, noise)[:, past_length:]
        return hidden if only is None else hidden.flatten(0, 1).index_select(0, only)

    def _all_hidden(
        self, input_ids: Tensor, segment_ids: Tensor | None, cache: KVCache | None, prefix_length: int, noise: Tensor | None
    ) -> Tensor:
        if cache is not None:
            assert isinstance(cache, TokenCache)
            return self._continued(input_ids, segment_ids, cache)
        segments = Segments.of(torch.ones_like(input_ids) if segment_ids is None else segment_ids, prefix_length)
        if segments.trivial and not prefix_length:  # padding to the right reaches nobody
            return self._decoded(input_ids, torch.arange(input_ids.shape[1], device=input_ids.device)[None], noise)
        if self.packs and not prefix_length:
            return self._decoded(input_ids, segments.positions, noise)
        return self._apart(input_ids, segments, noise)

    def _apart(self, input_ids: Tensor, segments: Segments, noise: Tensor | None) -> Tensor:
        """Each segment in a row of its own, behind the prefix that it continues."""
        P, (S, L), B = segments.prefix_length, segments.shape, segments.batch_size

        def rows(x_BT: Tensor) -> Tensor:
            flat = x_BT[:, P:].reshape(B * (x_BT.shape[1] - P), 1, -1)
            return torch.cat((x_BT[:, :P][segments.owner], segments.to_grid(flat).view(S, L, *x_BT.shape[2:])), 1)

        positions = torch.arange(P + L, device=input_ids.device)[None]
        hidden = self._decoded(rows(input_ids), positions, None if noise is None else rows(noise))
        first = torch.stack([(segments.owner == b).nonzero()[0, 0] for b in range(B)])  # one row that holds each prefix
        rest = segments.from_grid(hidden[:, P:, None]).view(B, -1, hidden.shape[-1])
        return torch.cat((hidden[first, :P], rest), 1) if P else rest

    def _continued(self, input_ids: Tensor, segment_ids: Tensor | None, cache: TokenCache) -> Tensor:
        B, T = input_ids.shape
        positions = cache.lengths[:, None] + torch.arange(T, device=input_ids.device)
        if (end := int(cache.lengths.max()) + T) > cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} tokens; {end} are needed")
        cache.ids = cache.ids.clone().scatter_(1, positions, input_ids)
        cache.lengths = cache.lengths + (T if segment_ids is None else (segment_ids > 0).sum(1))
        hidden = self._decoded(cache.ids[:, :end], torch.arange(end, device=input_ids.device)[None], None)
        return hidden[torch.arange(B, device=input_ids.device)[:, None], positions]

    def _decoded(self, input_ids: Tensor, positions: Tensor, noise: Tensor | None) -> Tensor:
        """One call of their decoder; without a mask and without a cache, either of which would join packed rows."""
        self._set_checkpointing()
        decoder = self.theirs.get_decoder()
        arguments: dict[str, Any] = {"use_cache": False, "attention_mask": None}
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            arguments["position_ids"] = positions.expand(input_ids.shape[0], -1)
        if noise is None:
            return decoder(input_ids=input_ids, **arguments).last_hidden_state
        embedded = self.embedding(input_ids)
        return decoder(inputs_embeds=embedded + noise.to(embedded.dtype), **arguments).last_hidden_state

    def _set_checkpointing(self) -> None:
        """What ``step.set_checkpointing`` asked for, in their way: whole layers, whichever kind it was."""
        wanted = self.wrap_layer is not direct or self.wrap_mlp is not direct
        if wanted and not self.theirs.is_gradient_checkpointing:
            self.theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _weight(embedding: nn.Module) -> Tensor:
    return getattr(embedding, "base", embedding).get_parameter("weight")


def shape_of(theirs: Any) -> ModelConfig:
    """What our code asks of a model's shape, in the words of ``ModelConfig``.

    Args:
        theirs: a model of transformers. Its scale and cap of the logits become ``logits_divisor`` and ``logits_softcap``.

    Raises:
        UserError: ``model/bad-config``, for sizes that no decoder has.
    """
    config, embedding, head = theirs.config.get_text_config(), theirs.get_input_embeddings(), theirs.get_output_embeddings()

    def number(*names: str, default: int) -> int:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), default)

    D, heads = number("hidden_size", default=embedding.weight.shape[1]), number("num_attention_heads", default=1)
    return ModelConfig(
        model_type=str(config.model_type),
        vocab_size=head.weight.shape[0],
        hidden_size=D,
        intermediate_size=number("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", default=4 * D),
        num_layers=number("num_hidden_layers", default=1),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(2, D // heads - D // heads % 2),
        max_position_embeddings=number("max_position_embeddings", "n_positions", default=2048),
        tie_word_embeddings=head.weight is embedding.weight,
        logits_divisor=float(getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1.0)),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
    )
