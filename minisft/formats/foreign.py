"""Models that our decoder does not compute: transformers does, and a probe decides whether it may (extra ``any``).

``ForeignLM`` stands where ``CausalLM`` stands: hidden states of segments, a head, linears under the names of the file, so
that adapters, 4 bits, the loss and the loop are the same code. The idea to take home: no list of names says what works.
When a model is loaded, random tokens go through it: head(hidden) must be its logits, what stands to the right of a token must
not reach it, a second pass must give the same, and each linear must see each token once. Rows that lie one behind the
other must give what they give alone; where they do not, each row is computed by itself, which costs padding.

Packed rows are told apart by their positions, which begin again at 0, and by nothing else: an attention mask of ones or a
cache would make transformers join them. No code from a model's folder is run, and pickled weights are refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisft.attention import Segments
from minisft.common.errors import UserError, listing, visible
from minisft.config import ModelConfig, QuantConfig
from minisft.formats.families import FAMILIES
from minisft.formats.fields import Fields, read_json_object
from minisft.formats.hf import read_headers
from minisft.formats.hf_config import WITH_TRANSFORMERS
from minisft.formats.loading import check_memory
from minisft.formats.source import regular_file
from minisft.model import CausalLM, KVCache, direct
from minisft.surgery import quantize_

# Every word of transformers for a probability of dropping something; training here draws from its own seeds only.
_DROPOUTS = (
    "attention_dropout", "hidden_dropout", "activation_dropout", "classifier_dropout", "dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "ffn_pdrop", "residual_dropout", "embedding_dropout", "embed_dropout", "emb_pdrop", "layerdrop",
    "attn_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "ffn_dropout",
)  # fmt: skip
_PROBED = (5, 1, 7, 4)  # lengths of the probe's rows
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def foreign_type(folder: Path) -> str | None:
    """The ``model_type`` of a folder whose model our decoder does not compute; None for one that it does, or without any."""
    if not (folder / "config.json").exists():
        return None
    found = read_json_object(regular_file(folder, "config.json"), "model/bad-config").get("model_type")
    return found if isinstance(found, str) and found not in FAMILIES else None


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
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids, segment_ids, cache, prefix_length, noise: as in ``CausalLM.hidden``; a cache is a ``TokenCache``.

        Returns:
            (B, T, D) in the model's dtype.
        """
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


def foreign_context(folder: Path) -> int:
    """The most tokens that a model of ``foreign_type`` is made for, as its file says it; 2048 where it does not."""
    fields = Fields(read_json_object(regular_file(folder, "config.json"), "model/bad-config"), visible(folder))
    return fields.integer("max_position_embeddings", fields.integer("n_positions", 2048))


@torch.no_grad()
def probe_(model: ForeignLM, where: str) -> None:
    """Send random tokens through the model, and set ``model.packs`` by what comes out.

    Two results are the same if the norm of their difference is below sqrt(eps) of their own, eps being the dtype's, or
    that of fp32: some roundings are let through, a row that sees another one is not.

    Args:
        model: as loaded; in training mode, as in the loop.
        where: the model's name, for messages.

    Raises:
        UserError: ``model/foreign``: head(hidden) is not the logits, a token sees what follows it, two passes differ, or a
            linear does not see each token once. The number found is named.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(model.config.vocab_size, (1, n), generator=draw).to(model.device) for n in _PROBED]
    model.train()
    try:
        calls = _calls(model, tokens[2])
        logits = model.theirs(input_ids=tokens[2], use_cache=False).logits
    except Exception as error:  # the shapes may contradict each other, or a library be missing
        raise _refused("it does not compute a row of tokens", where, visible(error, 300), "logits") from None
    alone = [model.hidden(ids) for ids in tokens]
    _require_same("head(hidden) is not the logits", model.head(alone[2]), logits, where)
    _require_same("two passes differ", model.hidden(tokens[2]), alone[2], where)
    behind = model.hidden(torch.cat((tokens[2], tokens[0]), 1))[:, : _PROBED[2]]
    _require_same("a token sees what follows it", behind, alone[2], where)
    if odd := [f"{path} ({seen} of {_PROBED[2]} tokens)" for path, seen in calls.items() if seen != _PROBED[2]] or not calls:
        found = listing(odd, 4) if isinstance(odd, list) else "no nn.Linear at all"
        raise _refused("not every linear sees each token once (experts are like that)", where, found, "each called once")
    model.packs = model.packs and _packs(model, tokens, torch.cat(alone, 1), where)
    _say_what_is_no_linear(model, where)


def _say_what_is_no_linear(model: ForeignLM, where: str) -> None:
    """Count the matrices that neither adapters nor 4 bits reach: of experts, routers and convolutions."""
    owners = [m for m in model.modules() if not isinstance(m, (nn.Linear, nn.Embedding))]
    outside = {id(p) for m in owners for p in m.parameters(recurse=False) if p.ndim >= 2}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) in outside}
    if sizes:
        everything = sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{where}: {sum(sizes.values()):,} of {everything:,} weights are in no linear (experts are like that); adapters "
            f"and 4 bits leave them as they are: {listing(sizes, 2)}",
            stacklevel=3,
        )


def _calls(model: ForeignLM, ids: Tensor) -> dict[str, int]:
    """How many tokens each linear but the head sees when ``ids`` pass through once."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head}
    seen = dict.fromkeys(linears, 0)

    def watch(path: str) -> Any:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] += args[0].numel() // args[0].shape[-1]

        return count

    hooks = [linear.register_forward_pre_hook(watch(path)) for path, linear in linears.items()]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _packs(model: ForeignLM, tokens: list[Tensor], apart: Tensor, where: str) -> bool:
    """Whether rows one behind the other give what each gives alone; says so if not."""
    numbers = torch.cat([torch.full_like(ids, i + 1) for i, ids in enumerate(tokens)], 1)
    found = _difference(model.hidden(torch.cat(tokens, 1), segment_ids=numbers), apart)
    if found <= _tolerance(apart):
        return True
    warnings.warn(f"{where}: packed rows see each other (off by {found:.2g}); each row is computed by itself", stacklevel=4)
    return False


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def _tolerance(like: Tensor) -> float:
    return max(torch.finfo(kind).eps for kind in (like.dtype, torch.float32)) ** 0.5  # norms are in fp32, whatever the model is


def _require_same(what: str, found: Tensor, expected: Tensor, where: str) -> None:
    difference = _difference(found, expected) if found.shape == expected.shape else float("inf")
    if not difference <= _tolerance(expected):
        raise _refused(what, where, f"off by {difference:.2g}", f"at most {_tolerance(expected):.2g}")


def _refused(what: str, where: str, found: str, expected: str) -> UserError:
    return UserError(
        "model/foreign", f"transformers computes this model in a way that cannot be trained here: {what}", where=where,
        found=found, expected=expected, fix=f"train it with another program, or take one of {listing(FAMILIES)}",
    )  # fmt: skip
