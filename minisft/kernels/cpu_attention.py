"""Causal attention within segments on a CPU, forward and backward, by ``cpu_attention.cpp``.

q, k and v are fp32 or bf16 and lie as the layers left them: no grid, no padding, no copy of a key for each query head. All is
multiplied and summed in fp32. ``attention.py`` holds the same in PyTorch and asks ``can_use_native`` who computes. A sum has
one order, whatever the other segments; only that of a prefix's gradient depends on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minisft.kernels import cpu_nf4

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_TENSORS = (
    *("q", "k", "v", "past_k", "past_v", "grad"),
    *("out", "grad_q", "grad_k", "grad_v"),
    *("first", "length", "owner", "memory"),
)
_SIZES = ("S", "H", "K", "E", "past", "prefixes", "prefix_length", "window", "longest")


class _Attention(ctypes.Structure):
    """``Attention`` in cpu_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int32),
    )


class Spans(NamedTuple):
    """Where segments lie among N tokens. The last ones are the prefixes that others continue; no two share a token.

    Attributes:
        first, length: (S,) int64 on the CPU: the first token, and how many there are, 1 at least.
        owner: (S,) int64 on the CPU: the number of the prefix before a segment; -1 for none, and at the prefixes themselves.
        prefixes: how many of the segments are prefixes.
        prefix_length: the tokens of each prefix.
        longest: the most keys that a segment has, those of its prefix included.
        num_tokens: N.
        complete: whether each of the N tokens is in a segment.
    """

    first: Tensor
    length: Tensor
    owner: Tensor
    prefixes: int
    prefix_length: int
    longest: int
    num_tokens: int
    complete: bool


def can_use_native(*tensors: Tensor) -> bool:
    """Whether the C++ takes q, k, v and what goes with them: all fp32 or all bf16, on the CPU and without gaps.

    Fake tensors are taken too and give fake ones: what a step keeps is then what ``minisft plan`` counts.
    """
    first = tensors[0]
    if first.dtype not in _DTYPES or not first.is_cpu or torch.compiler.is_compiling():
        return False
    plain = all(t.dtype == first.dtype and (_is_fake(t) or cpu_nf4.has_numbers(t)) and t.numel() for t in tensors)
    return plain and cpu_nf4.library() is not None


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None = None, past: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment and what it continues, causal.

    Args:
        q: (N, H, E).
        k, v: (N, K, E), K dividing H.
        spans: the segments.
        window: how many keys a query sees, itself included; None for all.
        past: keys and values (1, C, K, E) of tokens before all segments.

    Returns:
        (N, H, E), zero for tokens of no segment.
    """
    out = torch.empty_like(q) if spans.complete else torch.zeros_like(q)
    _call(q, k, v, spans, window, past, out=out)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``forward``.

    Args:
        grad: (N, H, E), in the dtype of the others.
        q, k, v, spans, window, past: as there.

    Returns:
        those of q, k and v, zero for tokens of no segment; a past gets none.
    """
    gradients = [torch.empty_like(x) if spans.complete else torch.zeros_like(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = gradients
    _call(q, k, v, spans, window, past, grad=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    return grad_q, grad_k, grad_v


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    window: int | None,
    past: tuple[Tensor, Tensor] | None,
    **others: Tensor,
) -> None:
    if _is_fake(q):
        return
    library, (N, H, E), K = cpu_nf4.library(), q.shape, k.shape[1]
    assert library is not None, "ask can_use_native first"
    assert k.shape == v.shape == (N, K, E), f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}"
    assert H % K == 0, f"{H} heads do not share {K} kv heads evenly"
    assert spans.num_tokens == N, f"segments of {spans.num_tokens} tokens for {N}"
    assert past is None or past[0].shape == past[1].shape == (1, past[0].shape[1], K, E), "a past of other heads"
    tensors = {"q": q, "k": k, "v": v, "first": spans.first, "length": spans.length, "owner": spans.owner, **others}
    if past is not None:
        tensors |= {"past_k": past[0], "past_v": past[1]}
    call = _Attention(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
    call.past = 0 if past is None else past[0].shape[1]
    call.S, call.H, call.K, call.E = len(spans.first), H, K, E
    call.prefixes, call.prefix_length = spans.prefixes, spans.prefix_length
    call.window, call.longest, call.threads = window or 0, spans.longest + call.past, torch.get_num_threads()
    library.attention_memory.restype = ctypes.c_int64
    memory = torch.empty(library.attention_memory(ctypes.byref(call)), dtype=torch.float32)
    call.memory = memory.data_ptr()
    getattr(library, f"attention_{_DTYPES[q.dtype]}")(ctypes.byref(call))
