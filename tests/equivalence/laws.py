"""What the laws speak of: a layer with an adapter, the same layer in fp64, and how far the two may differ.

A law says that two roads lead to one function: the unmerged layer, its merged form, and the formula

    y = W x + s B A x + b        (DoRA: y = g (W x + s B A x) + b with g = m / |W + s B A|, row by row)

evaluated in fp64 (``Exact``). Rounding is the only excuse for a difference, so the allowance is derived from the numbers at
hand, never chosen: ``worst_case`` holds for any data, and ``statistical`` (four times it, on Gaussian data) is sharper.

``KINDS`` and ``BASES`` list what the laws are held against; add a kind of adapter or of base there and every law covers it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tiny import build, randn
from torch import Tensor, nn

from minisft.adapter import Adapter
from minisft.config import LoRAConfig, ModelConfig, QuantConfig
from minisft.dora import DoRALinear
from minisft.lora import LoRAEmbedding, LoRALinear
from minisft.matmul import Linear, compute_dtype
from minisft.merge_weights import merge_
from minisft.model import CausalLM
from minisft.nf4_linear import NF4Linear
from minisft.surgery import apply_lora_, lora_modules, quantize_

# ---- which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """How the frozen weight is stored: in ``dtype``, or in 4 bits made from it."""

    dtype: torch.dtype
    in_4_bits: bool = False
    double_quant: bool = False


LORA = ("linear", "linear-no-bias", "embedding")
KINDS = (*LORA, "dora")
BASES = {
    "fp64": Base(torch.float64),
    "fp32": Base(torch.float32),
    "bf16": Base(torch.bfloat16),
    "fp16": Base(torch.float16),
    "nf4-of-fp64": Base(torch.float64, True),
    "nf4": Base(torch.float32, True),
    "nf4-double": Base(torch.float32, True, True),
    "nf4-double-of-bf16": Base(torch.bfloat16, True, True),
    "nf4-of-fp16": Base(torch.float16, True),
}
LAYERS = [(kind, base) for kind, base in itertools.product(KINDS, BASES) if not (kind == "embedding" and BASES[base].in_4_bits)]
IN_FP64 = [name for name, base in BASES.items() if base.dtype == torch.float64]
DENSE = [name for name, base in BASES.items() if not base.in_4_bits]
IN_4_BITS = [name for name, base in BASES.items() if base.in_4_bits]

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)
BATCHES = ((), (0,), (1,), (5,), (2, 3), (0, 3))
ALPHAS = (3.0, -2.5, 0.5, 0.0, 17.0)  # equal to no rank, so that alpha is never mistaken for scaling


def _outlier(x: Tensor) -> Tensor:
    if x.numel():
        x.view(-1)[x.numel() // 2] *= 8
    return x


# What the numbers look like. All but the first are made to break code that only ever saw Gaussian data.
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "one outlier": _outlier,
    "all equal": torch.ones_like,
    "one sign": torch.abs,
    "mostly zeros of both signs": lambda x: torch.where(x > 1, x, x.sign() * 0.0),
    "subnormal in fp16": lambda x: x * 2.0**-20,
    "subnormal in fp32": lambda x: x * 2.0**-130,
}


@dataclass(frozen=True)
class Case:
    """One layer with an adapter that was trained for a while, and an input; every number follows from these fields."""

    kind: str
    base: str
    inputs: int
    outputs: int
    rank: int
    alpha: float = 3.0
    use_rslora: bool = False
    batch: tuple[int, ...] = (5,)
    layout: str = "contiguous"
    exponents: tuple[int, int, int, int] = (0, 0, 0, 0)  # of two, for W, A, B and x
    patterns: tuple[str, str, str, str] = ("gaussian",) * 4
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations."""
        return BASES[self.base].dtype

    def numbers(self, which: int, *shape: int) -> Tensor:
        """W, A, B or x (0 to 3) in fp64, before rounding."""
        raw = PATTERNS[self.patterns[which]](randn(*shape, seed=self.seed + which))
        return raw * 2.0 ** self.exponents[which]

    def model(self) -> nn.Sequential:
        """The layer with its adapter, alone in a tree."""
        adapter = self._adapter(self._base())
        with torch.no_grad():
            adapter.lora_A.copy_(self.numbers(1, *adapter.lora_A.shape))
            adapter.lora_B.copy_(self.numbers(2, *adapter.lora_B.shape))
            if isinstance(adapter, DoRALinear):
                adapter.lora_magnitude_vector.mul_(1 + 0.3 * randn(self.outputs, seed=self.seed + 4))
        return nn.Sequential(adapter).eval()

    def dense_layer(self) -> nn.Module:
        """The frozen layer, before it is quantized if it is."""
        if self.kind == "embedding":
            layer: nn.Module = nn.Embedding(self.inputs, self.outputs, dtype=self.dtype)
        else:
            layer = Linear(self.inputs, self.outputs, bias=self.kind in ("linear", "dora"), dtype=self.dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(self.numbers(0, *parameter.shape))
        return layer

    def _base(self) -> nn.Module:
        layer = self.dense_layer()
        if BASES[self.base].in_4_bits:
            assert isinstance(layer, nn.Linear)
            return NF4Linear.from_linear(layer, double_quant=BASES[self.base].double_quant)
        return layer

    def _adapter(self, base: nn.Module) -> Adapter:
        if isinstance(base, nn.Embedding):
            return LoRAEmbedding(base, self.rank, self.alpha, use_rslora=self.use_rslora)
        assert isinstance(base, (nn.Linear, NF4Linear))
        if self.kind == "dora":
            return DoRALinear(base, self.rank, self.alpha, use_rslora=self.use_rslora)
        return LoRALinear(base, self.rank, self.alpha, use_rslora=self.use_rslora)

    def input(self) -> Tensor:
        """Ids for an embedding, else activations; laid out in memory as ``layout`` says."""
        if self.kind == "embedding":
            draw = torch.Generator().manual_seed(self.seed)
            return laid_out(torch.randint(self.inputs, self.batch, generator=draw), self.layout)
        return laid_out(self.numbers(3, *self.batch, self.inputs).to(self.dtype), self.layout)


LAYOUTS = ("contiguous", "transposed", "expanded", "offset", "strided")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in memory that a careless kernel would read wrongly. An expanded one repeats its first row, with stride 0."""
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.ndim >= 1 and len(x):
        return x[:1].expand_as(x)
    if layout == "offset":
        return torch.cat([x.new_ones(3), x.reshape(-1)])[3:].view(x.shape)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


@st.composite
def cases(draw: st.DrawFn, *bases: str, hostile: bool = True, kinds: tuple[str, ...] = KINDS) -> Case:
    """Any layer over one of these bases (by default any). ``hostile`` varies magnitudes and patterns; else all is Gaussian."""
    kind, base = draw(st.sampled_from([(kind, base) for kind, base in LAYERS if kind in kinds and base in (bases or BASES)]))
    inputs, outputs = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    exponents, patterns = (0, 0, 0, 0), ("gaussian",) * 4
    if hostile:
        lowest, highest = (-6, 1) if BASES[base].dtype == torch.float16 else (-40, 30)
        exponents = draw(st.tuples(*[st.integers(lowest, highest)] * 4))
        patterns = draw(st.tuples(*[st.sampled_from(list(PATTERNS))] * 4))
    return Case(
        kind,
        base,
        inputs,
        outputs,
        rank=draw(st.integers(1, min(inputs, outputs, 9))),
        alpha=draw(st.sampled_from(ALPHAS)),
        use_rslora=draw(st.booleans()),
        batch=draw(st.sampled_from(BATCHES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        exponents=exponents,
        patterns=patterns,
        seed=draw(st.integers(0, 2**20)),
    )


# ---- the same layer in fp64 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """W (O, I), A (R, I), B (O, R), s, b (O), x (N, I) and for DoRA the lengths m (O), in fp64.

    An embedding is the linear layer of one-hot inputs.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    s: float
    b: Tensor
    x: Tensor
    m: Tensor | None = None

    @functools.cached_property
    def U(self) -> Tensor:  # noqa: N802  # the letters of the formulas
        """s B A."""
        return self.s * sum((torch.outer(self.B[:, r], self.A[r]) for r in range(len(self.A))), torch.zeros_like(self.W))

    @functools.cached_property
    def norms(self) -> Tensor:
        """What DoRA divides the rows of W + U by, (O): their lengths, and 1 for a row of zeros."""
        norms = (self.W + self.U).norm(dim=1)
        return torch.where(norms == 0, 1.0, norms)

    @functools.cached_property
    def g(self) -> Tensor:
        """How far DoRA stretches each row of W + U, (O); else 1."""
        return torch.ones_like(self.b) if self.m is None else self.m / self.norms

    @functools.cached_property
    def D(self) -> Tensor:  # noqa: N802
        """W' - W."""
        return self.U if self.m is None else self.g[:, None] * (self.W + self.U) - self.W

    @functools.cached_property
    def y(self) -> Tensor:
        return self.x @ (self.W + self.D).T + self.b

    @functools.cached_property
    def terms(self) -> Tensor:
        """|W| + |s||B||A|, (O, I)."""
        return self.W.abs() + abs(self.s) * self.B.abs() @ self.A.abs()

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """|W||x| + |s||B||A||x| + |b|: what all the terms of y add up to if none cancels another. (N, O).

        DoRA stretches them, and writes them as (g - 1) W x + ... and (1 - g) b: at most 2 (1 + |g|) times as much.
        """
        total = self.x.abs() @ self.terms.T + self.b.abs()
        return total if self.m is None else 2 * (1 + self.g.abs()) * total

    def g_error(self, eps: float) -> Tensor:
        """The largest relative error of g, (O): that of a sum of squares, and of the row that is squared."""
        if self.m is None:
            return torch.zeros_like(self.b)
        condition = self.terms.norm(dim=1) / (self.W + self.U).norm(dim=1)
        return eps * (self.W.shape[1] + 4 + (len(self.A) + 4) * condition.nan_to_num(1.0))


def exact(case: Case, model: nn.Sequential, x: Tensor) -> Exact:
    """What ``model`` computes from ``x``, taken apart. W is what is stored (of 4 bits: level times scale)."""
    layer = model[0]
    s = case.alpha / (case.rank**0.5 if case.use_rslora else case.rank)
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    W = weight_of(layer).double()
    if case.kind == "embedding":
        one_hot = nn.functional.one_hot(x.reshape(-1), case.inputs).double()
        return Exact(W.T, A, B, s, torch.zeros(case.outputs, dtype=torch.float64), one_hot)
    bias = torch.zeros(case.outputs) if layer.base.bias is None else layer.base.bias.detach()
    m = layer.lora_magnitude_vector.detach().double() if case.kind == "dora" else None
    return Exact(W, A, B, s, bias.double(), x.reshape(-1, case.inputs).double(), m)


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight of a layer, or of the base under its adapter."""
    base = getattr(layer, "base", layer)
    return base.dequantized_weight(torch.float32) if isinstance(base, NF4Linear) else base.weight.detach()


def merged_copy(case: Case) -> nn.Sequential:
    """The same layer, merged in place."""
    model = case.model()
    merge_(model)
    return model


# ---- how far two roads may differ ------------------------------------------------------------------------------------


def roundoff(dtype: torch.dtype) -> float:
    """u, the largest relative error of rounding to nearest: bf16 2^-8, fp16 2^-11, fp32 2^-24, fp64 2^-53."""
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """The largest absolute error of rounding a number into the subnormal range: fp16 2^-25."""
    return torch.finfo(dtype).smallest_normal * roundoff(dtype)


def sum_roundoff(dtype: torch.dtype) -> float:
    """e, the unit roundoff of the arithmetic: fp32 or wider, whatever the numbers are stored in."""
    return min(2.0**-24, roundoff(dtype))


def worst_case(e: Exact, dtype: torch.dtype) -> Tensor:
    """The most by which merged and unmerged can differ, element by element, for numbers stored in ``dtype``; (N, O).

    With T = ``dtype``, u its unit roundoff, R rounding to T, sums in fp32 (roundoff eps = 2^-24) and D = s B A:

        y_unmerged = R(R(W x) + R(s R(B R(A x))) + b),   y_merged = R(R(W + D) x + b)

        |y_merged - y_unmerged| <= u ( |W+D||x| + 2|y| + |Wx| + 3|Dx| + |s||B||Ax| )
                                     weight      outputs      scaled update   hidden
                                 + 2 n eps ( |W||x| + |s||B||A||x| + |b| ),   n = inputs + rank + 3: the sums

    to first order (2 % is added for the others), and an absolute error for each number that may be subnormal. Where products
    themselves run in T (CPUs with bf16 instructions) the fp32 factors and a weight from 4 bits are rounded to T as well:
    u ( |W| + 2|s||B||A| ) |x| more. DoRA: what the unmerged layer rounds is stretched by g; ``_stretching`` is what is new.
    """
    u, eps, x = roundoff(dtype), sum_roundoff(dtype), e.x.abs()
    num_sums = e.W.shape[1] + e.A.shape[0] + 3
    hidden = abs(e.s) * (e.x @ e.A.T).abs() @ e.B.abs().T
    unmerged = (e.x @ e.W.T).abs() + 3 * (e.x @ e.U.T).abs() + hidden
    rounded = x @ (e.W + e.D).abs().T + 2 * e.y.abs() + e.g.abs() * unmerged
    if multiplies_in(dtype):
        rounded = rounded + 2 * e.magnitude
    stretching = _stretching(e, u, e.g_error(eps))
    return 1.02 * (u * rounded + 2 * num_sums * eps * e.magnitude + stretching) + _absolute(e, dtype)


def _stretching(e: Exact, u: float, g_error: Tensor) -> Tensor:
    """DoRA's own errors, (N, O): its output, and the one that it stretches, are rounded once more; and g is not exact."""
    if e.m is None:
        return torch.zeros(())
    plain = e.x @ (e.W + e.U).T
    stretched = e.g.abs() * (e.x.abs() @ (e.W + e.U).abs().T)
    return u * (e.y.abs() + 2 * e.g.abs() * (plain + e.b).abs()) + 2 * g_error * stretched


def statistical(e: Exact, dtype: torch.dtype) -> Tensor:
    """What to expect of ``worst_case`` when errors are independent: sums over k become root sums of squares; (N, O).

        u ( sqrt((W+D)^2 x^2) + 2|y| + |Wx| + 3|Dx| + sqrt(s^2 B^2 (Ax)^2) )
        + 2 sqrt(n) eps sqrt((W^2 + s^2 B^2 A^2) x^2 + b^2)

    The largest error of random Gaussian layers is 1.2 to 1.3 times this; the laws allow 4 times.
    """
    u, eps, x2 = roundoff(dtype), sum_roundoff(dtype), e.x.square()
    num_sums = e.W.shape[1] + e.A.shape[0] + 3
    hidden = abs(e.s) * ((e.x @ e.A.T).square() @ e.B.square().T).sqrt()
    spread = (x2 @ e.W.square().T + e.s**2 * (x2 @ e.A.square().T) @ e.B.square().T + e.b.square()).sqrt()
    if e.m is not None:
        spread = 2 * (1 + e.g.abs()) * spread
    weight = (x2 @ (e.W + e.D).square().T).sqrt()
    unmerged = (e.x @ e.W.T).abs() + 3 * (e.x @ e.U.T).abs() + hidden
    rounded = weight + 2 * e.y.abs() + e.g.abs() * unmerged
    if multiplies_in(dtype):
        rounded = rounded + 2 * spread
    stretching = _stretching(e, u, e.g_error(eps) / e.W.shape[1] ** 0.5)
    return u * rounded + 2 * num_sums**0.5 * eps * spread + stretching + _absolute(e, dtype)


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies the 16-bit ``dtype`` without widening it first."""
    return dtype.itemsize == 2 and compute_dtype(torch.empty(0, dtype=dtype)) == dtype


def _absolute(e: Exact, dtype: torch.dtype) -> Tensor:
    """Underflow: of every rounded weight times its input, of the outputs, of the hidden numbers times B, and in fp32 sums."""
    inputs, factors = e.x.abs().sum(1, keepdim=True), abs(e.s) * e.B.abs().sum(1)
    in_storage = underflow(dtype) * (inputs + factors + 4)
    in_sums = underflow(min(dtype, torch.float32, key=roundoff)) * 2 * (e.W.shape[1] + e.A.shape[0])
    return (in_storage + in_sums * ((1 + abs(e.s)) * (1 + inputs) + factors)) * (1 if e.m is None else 1 + e.g.abs())


def fits(e: Exact, dtype: torch.dtype) -> bool:
    """Whether nothing on either road can overflow: half the largest number is not reached, nor in fp32 on the way.

    DoRA squares numbers, so their squares must fit into fp32 too; and a direction must not be what cancelling has left over.
    """
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 2
    if e.m is not None:
        lengths, terms = (e.W + e.U).norm(dim=1), e.terms.norm(dim=1)
        if not bool(((terms == 0) | ((lengths > terms / 16) & (lengths > 2.0**-50) & (terms < 2.0**60))).all()):
            return False
    return all(bool((t.abs() < largest).all()) for t in (e.magnitude, e.W.abs() + e.D.abs(), e.x @ e.A.T, e.B @ e.A))


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor, what: str) -> None:
    """|actual - expected| <= allowed, element by element; says by how much it is missed."""
    error = (actual.detach().double().reshape(expected.shape) - expected.detach().double()).abs()
    worst = float((error / allowed).max()) if error.numel() else 0.0
    assert bool((error <= allowed).all()), f"{what}: {worst:.3g} times what rounding allows"


# ---- whole models, and bits ------------------------------------------------------------------------------------------

# Which sides of a tied head are adapted.
SIDES: dict[str, str | tuple[str, ...]] = {
    "neither": "all-linear",
    "embedding": ("q_proj", "down_proj", "embed_tokens"),
    "head": ("q_proj", "down_proj", "lm_head"),
    "both": ("q_proj", "down_proj", "embed_tokens", "lm_head"),
}
PATTERNED = LoRAConfig(
    rank=3,
    alpha=-2.5,
    use_rslora=True,
    rank_pattern={"v_proj": 1, "1.mlp.up_proj": 5},
    alpha_pattern={"o_proj": 0.5, "k_proj": 0.0},
)
IDS = torch.tensor([[1, 5, 9, 3, 20, 2, 7, 8, 8, 28], [4, 4, 4, 6, 1, 0, 2, 23, 11, 12]])


def adapted(config: ModelConfig, lora: LoRAConfig, base: str = "fp64", scale: float = 0.4) -> CausalLM:
    """A tiny random model over this base whose adapters are random in both factors, in evaluation mode."""
    kind = BASES[base]
    model = build(config, kind.dtype)
    if kind.in_4_bits:
        quantize_(model, QuantConfig(double_quant=kind.double_quant))
    apply_lora_(model, lora)
    with torch.no_grad():
        for i, layer in enumerate(lora_modules(model).values()):
            for j, factor in enumerate((layer.lora_A, layer.lora_B)):
                factor.copy_(scale * randn(*factor.shape, seed=100 + 2 * i + j))
            if isinstance(layer, DoRALinear):
                layer.lora_magnitude_vector.mul_(1 + scale * randn(len(layer.lora_magnitude_vector), seed=300 + i))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, tied ones under both names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def digest(model: nn.Module) -> dict[str, str]:
    """sha256 of the bits of every tensor, with its dtype and shape: equal digests, equal models."""
    return {name: bits(tensor) for name, tensor in tensors(model)}


def bits(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"


def storages(model: nn.Module) -> set[int]:
    """Where the model's numbers lie in memory."""
    return {tensor.untyped_storage().data_ptr() for _, tensor in tensors(model)}
