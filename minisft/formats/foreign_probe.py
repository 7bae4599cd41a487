"""The probe that decides whether a model of transformers may be trained here, and whether its rows can be packed.

No list of names says what works: random tokens go through the model. head(hidden) must be its logits, what stands to the
right of a token must not reach it, a second pass must give the same, and each linear must see each token once. Rows that lie
one behind the other must give what they give alone; where they do not, ``packs`` becomes False, and that is said. So is the
count of weights that no adapter reaches.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from minisft.common.errors import UserError, listing, visible
from minisft.formats.families import FAMILIES
from minisft.formats.foreign import ForeignLM

_PROBED = (5, 1, 7, 4)  # lengths of the rows


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
