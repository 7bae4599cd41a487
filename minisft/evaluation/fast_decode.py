"""``--fast-decode``: a step that reads dense weights in 8 bits, and how far what it writes is from the model's own.

At one token a step takes as long as reading the weights does. ``fast_decode_`` has the native steps of a model read every dense
linear and the head as ``kernels/eight_bit.py`` rounds them; beside 4-bit layers the head is most of what is read. Prompts,
scores, training and merging use the weights as they are, and so do steps of more rows than a native one takes. Adapters, norms
and the table of embeddings stay as they are. ``Drift`` says what was traded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.generation import no_dropout, read_prompts
from minisft.kernels.cpu_decode import MAX_ROWS, Unsupported
from minisft.kernels.eight_bit import eight_bits_of, forget
from minisft.model import CausalLM
from minisft.native.decoder import NativeDecoder, in_eight_bits

DRIFT_TOKENS = 16  # written after each prompt


@dataclass(frozen=True)
class Drift:
    """How far steps in 8 bits are from the model's own, at tokens that the model itself writes greedily.

    Attributes:
        num_bytes: memory that the 8 bits take, beside the weights.
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


def fast_decode_(model: CausalLM, prompts: Sequence[Sequence[int]]) -> Drift:
    """Let steps of one token read a model's dense weights in 8 bits, until ``exact_decode_``.

    Args:
        model: with or without adapters. A weight that changes is rounded again for the next batch of prompts, but for a change
            in place through ``.data``, which PyTorch does not count: then call this again.
        prompts: token ids of a few texts like those to come, none empty: the drift is measured in the model's answers to them.
            The first 16 are taken, and of each the end, if it is longer than the model's context.

    Returns:
        what it costs.

    Raises:
        UserError: ``config/fast-decode``: native code does not decode this model here; ``data/no-prompt``.

    Cost: 8.5 bits for each dense weight, a second or two for a thousand million of them, and the time of 32 steps.
    """
    if not prompts:
        raise UserError("data/no-prompt", "there is no prompt to measure the drift with", expected="token ids of a text")
    if model in in_eight_bits:
        exact_decode_(model)
    try:
        drift = _drift(model, prompts[:MAX_ROWS])
    except Unsupported as reason:
        raise UserError(
            "config/fast-decode", "fast decoding is not possible here", where="--fast-decode", found=str(reason),
            expected="a model that native code decodes: on a CPU, with a C++ compiler", fix="leave --fast-decode away",
        ) from reason  # fmt: skip
    in_eight_bits.add(model)
    return drift


def exact_decode_(model: CausalLM) -> None:
    """Let steps read the weights as they are again, and free the 8 bits, which other models of the same weights make anew."""
    in_eight_bits.discard(model)
    for weight in _dense(model):
        forget(weight)


def _dense(model: CausalLM) -> list[Tensor]:
    """The weights of linears that are not in 4 bits."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


@torch.inference_mode()
def _drift(model: CausalLM, prompts: Sequence[Sequence[int]]) -> Drift:
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
    kl = torch.cat(kls)
    copies = {id(weight): eight_bits_of(weight) for weight in _dense(model)}.values()
    num_bytes = sum(copy.codes.nbytes + copy.scales.nbytes for copy in copies)
    return Drift(num_bytes, len(kl), float(kl.mean()), float(kl.max()), int(torch.cat(same).sum()))
