"""``--fast-decode``: a step that reads dense weights in 8 bits, and how far what it writes is from the model's own.

At one token a step takes as long as reading the weights does. ``fast_decode_`` has the native steps of a model read every dense
linear and the head as ``kernels/eight_bit.py`` rounds them; beside 4-bit layers the head is most of what is read. Prompts,
scores of given answers, training and merging use the weights as they are. Adapters, norms and the table of embeddings stay
as they are. ``Drift`` says what was traded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.generation import no_dropout, read_prompts
from minisft.kernels import exact_copy
from minisft.kernels.cpu_decode import MAX_ROWS, Unsupported
from minisft.kernels.eight_bit import eight_bits_of, forget, is_made
from minisft.merge_weights import put_aside
from minisft.model import CausalLM
from minisft.native.decoder import NativeDecoder, in_eight_bits, not_fast

DRIFT_TOKENS = 16  # written after each prompt


@dataclass(frozen=True)
class Drift:
    """How far steps in 8 bits are from the model's own, at tokens that the model itself writes greedily.

    Attributes:
        num_bytes: memory that the 8 bits take, beside the weights, but for those that another model of the same weights has.
        num_tokens: compared.
        mean_kl, largest_kl: KL(model || model in 8 bits) of the next token's distribution, in nats a token.
        num_same: tokens at which the likeliest one is the same.
    """

    num_bytes: int
    num_tokens: int
    mean_kl: float
    largest_kl: float
    num_same: int

    def __str__(self) -> str:
        kl = f"KL {self.mean_kl:.1e} nats a token, {self.largest_kl:.1e} at most"
        same = f"the likeliest token the same at {self.num_same} of {self.num_tokens}"
        return f"fast decoding: dense weights read in 8 bits ({self.num_bytes / 1e6:.0f} MB more memory): {kl}; {same}"


def fast_decode_(model: CausalLM, prompts: Sequence[Sequence[int]], name: str = "") -> Drift:
    """Let steps of one token read a model's dense weights in 8 bits, until ``exact_decode_``; copies of it do as before.

    Exact copies, which nothing reads meanwhile, are freed.

    Args:
        model: with or without adapters. A weight that changes is rounded again for the next batch of prompts, see
            ``WeightCopies`` for the changes that are not seen: then call this again.
        prompts: token ids of a few texts like those to come, none empty: the drift is measured in the model's answers to them.
            The first 16 are taken, and of each the end, if it is longer than the model's context.
        name: the model's among several, for the error.

    Returns:
        what it costs.

    Raises:
        UserError: ``config/fast-decode``: native code does not decode this model here; ``data/no-prompt``;
            ``model/non-finite-weight``: the model's logits are no numbers.

    Cost: 8.5 bits for each dense weight, four seconds for a thousand million of them, and the time of 32 steps.
    """
    if not prompts or not all(prompts):
        expected = "token ids of at least one text"
        raise UserError("data/no-prompt", "there is nothing to measure the drift with", expected=expected)
    if model in in_eight_bits:
        exact_decode_(model)
    new = [weight for weight in dense_weights(model) if not is_made(weight)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that PyTorch generates: here nothing is generated
            kl, num_same = _drift(model, prompts[:MAX_ROWS])
    except Unsupported as reason:
        raise not_fast(reason, name) from reason
    if not bool(kl.isfinite().all()):
        raise UserError("model/non-finite-weight", "the model's logits are not finite", where=name or "the model")
    in_eight_bits.add(model)
    for weight in dense_weights(model):
        exact_copy.forget(weight)
    copies = {id(weight): eight_bits_of(weight) for weight in new}.values()
    num_bytes = sum(made.nbytes for made in copies)
    return Drift(num_bytes, len(kl), float(kl.mean()), float(kl.max()), num_same)


def exact_decode_(model: CausalLM) -> None:
    """Let steps read the weights as they are again, and free the 8 bits, which other models of the same weights make anew."""
    in_eight_bits.discard(model)
    for weight in held_weights(model):
        forget(weight)


def dense_weights(model: nn.Module) -> list[Tensor]:
    """The weights of linears that are not in 4 bits, the head's among them."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def held_weights(model: CausalLM) -> list[Tensor]:
    """``dense_weights``, and those that ``merge_`` has put aside."""
    return [weight for module in (model, *put_aside(model)) for weight in dense_weights(module)]


@torch.inference_mode()
def _drift(model: CausalLM, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """KL (N,) at the tokens that the model writes, and at how many of them the likeliest is the same."""
    context = model.config.max_position_embeddings
    num_tokens = min(DRIFT_TOKENS, context // 2)
    ends = [prompt[-(context - num_tokens) :] for prompt in prompts]
    with no_dropout(model):
        cache, hidden_BD = read_prompts(model, ends, num_tokens)
        other = cache.select(torch.arange(len(prompts)))
        exact, fast = NativeDecoder(model, cache), NativeDecoder(model, other, eight_bits=True)
        tokens = model.head(hidden_BD).argmax(-1)
        kls, same = [], []
        for _ in range(num_tokens):
            p, q = (d.logits(tokens, c).double().log_softmax(-1) for d, c in ((exact, cache), (fast, other)))
            kls.append((p.exp() * (p - q)).sum(-1))
            tokens = p.argmax(-1)
            same.append(tokens == q.argmax(-1))
    return torch.cat(kls), int(torch.cat(same).sum())
