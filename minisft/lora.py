"""LoRA: a frozen layer plus a trained product of two thin matrices. DoRA: the same, with trained row lengths.

W' = W + scaling * B A. B starts at zero, so a fresh adapter changes nothing, bit for bit. The factors are fp32 masters
whatever the dtype of the base, and the base never gets a gradient; it may be dense or held in 4 bits (QLoRA). Every adapter
can say what D = W' - W is, also for a few rows at a time (``delta_rows``). What this room refuses: several adapters at once,
merging inside ``forward``, ``train`` or ``eval``, DoRA over embeddings.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minisft.common.autograd import Context
from minisft.common.errors import UserError
from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_nf4 import Update, add_update_, dense_matmul, serves_dense, serves_update
from minisft.matmul import Linear, linear, product_dtype
from minisft.nf4 import CHUNK
from minisft.nf4_linear import NF4Linear, nf4_matmul, nf4_matmul_t

FrozenLinear = nn.Linear | NF4Linear


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_rank(rank: int, shape: tuple[int, ...], where: str = "") -> None:
    """Refuse a rank below 1 or above the smaller side of the weight."""
    if not 1 <= rank <= min(shape):
        raise UserError(
            "config/bad-rank",
            "the rank does not fit the layer",
            where=where,
            found=f"rank {rank}",
            expected=f"1 to {min(shape)} for a weight of shape {' x '.join(map(str, shape))}",
            fix="choose a smaller --rank or fewer --targets",
        )


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """W + D in fp32 or wider, not yet rounded.

    Args:
        weight: W, any float dtype.
        delta: D, of the same shape, fp32 or wider.

    Returns:
        a new tensor; where D is zero W is kept bit for bit (-0.0 + 0.0 would be +0.0).
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), delta.dtype)
    base = weight.to(wide)
    return torch.where(delta == 0, base, base + delta.to(wide))


def _base_product(base: FrozenLinear, rows: Tensor) -> Tensor:
    """rows W^T + b in the dtype of ``rows``, as the base alone would do it: (M, in) -> (M, out), contiguous."""
    if isinstance(base, NF4Linear):
        return nf4_matmul(rows, base.quantized, base.bias)
    bias = None if base.bias is None else base.bias.to(rows.dtype)
    if isinstance(base, Linear) and serves_dense(rows, base.weight):
        return dense_matmul(rows, base.weight, bias)
    return nn.functional.linear(rows, base.weight.to(rows.dtype), bias)


def _product(base: FrozenLinear, rows: Tensor, xa: Tensor, up: Tensor) -> Tensor:
    """rows W^T + b + xa up, in the dtype of ``rows``: (M, in), (M, rank), (rank, out) -> (M, out)."""
    if isinstance(base, NF4Linear) or (isinstance(base, Linear) and serves_dense(rows, base.weight)):
        return _base_product(base, rows).addmm_(xa, up)
    # Bias first, as nn.Linear does it: a zero update then leaves every bit in place, whatever the order of the sums below.
    y = xa @ up if base.bias is None else torch.addmm(base.bias.to(rows.dtype), xa, up)
    return y.addmm_(rows, base.weight.to(rows.dtype).T)


def _product_of_few(base: FrozenLinear, x: Tensor, update: Update) -> Tensor:
    """The base's product and the update, in one call where the base's is our own code's too: a call costs as much as either."""
    if isinstance(base, NF4Linear):
        y = cpu_nf4.matmul(x, base.quantized, base.bias, update)
        if y is not None:
            return y
    elif isinstance(base, Linear) and serves_dense(x, weight := base.weight):
        return dense_matmul(x, weight, base.bias, update)
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    y = add_update_(_base_product(base, rows), rows, update)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _product_t(base: FrozenLinear, g: Tensor, gb: Tensor, down: Tensor) -> Tensor:
    """g W + gb down, in the dtype of ``g``: (M, out), (M, rank), (rank, in) -> (M, in)."""
    if isinstance(base, NF4Linear):
        return nf4_matmul_t(g, base.quantized).addmm_(gb, down)
    return (gb @ down).addmm_(g, base.weight.to(g.dtype))


def _adapted(x: Tensor, lora_A: Tensor, lora_B: Tensor, base: FrozenLinear, scaling: float) -> tuple[Tensor, Tensor]:
    """x W^T + b + scaling (x A^T) B^T, (..., out) in the dtype of ``x``, without a gradient; and x A^T, (M, rank)."""
    wide = product_dtype(x)
    if wide == torch.float32 and serves_update(x, lora_A, lora_B):
        xa = torch.empty(x.numel() // x.shape[-1], lora_A.shape[0], dtype=wide)
        return _product_of_few(base, x, Update(lora_A, lora_B, scaling, xa)), xa
    rows = x.reshape(-1, x.shape[-1]).to(wide)  # (M, in)
    xa = rows @ lora_A.to(wide).T  # (M, rank)
    y = _product(base, rows, xa * scaling, lora_B.to(wide).T)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1]), xa


class _AdaptedContext(Context, Protocol):
    base: FrozenLinear
    scaling: float


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T through a frozen W, dense or in 4 bits.

    One product is added onto the other (``addmm_``), so the update costs no pass of its own over y. A W in 4 bits is rebuilt
    for each of the two products and dropped after it.
    Kept for backward: x (which its neighbours share) and x A^T (rank columns); never y, W, W^T or a cast copy of x.
    """

    @staticmethod
    def forward(ctx: _AdaptedContext, x: Tensor, lora_A: Tensor, lora_B: Tensor, base: FrozenLinear, scaling: float) -> Tensor:
        y, xa = _adapted(x, lora_A, lora_B, base, scaling)
        ctx.save_for_backward(x, lora_A, lora_B, xa)
        ctx.base, ctx.scaling = base, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: _AdaptedContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, lora_A, lora_B, xa = ctx.saved_tensors
        wide = product_dtype(grad)
        g = grad.reshape(-1, grad.shape[-1]).to(wide)  # (M, out)
        gb = (g @ lora_B.to(wide)) * ctx.scaling  # (M, rank)
        grad_A = gb.T @ x.reshape(-1, x.shape[-1]).to(wide) if ctx.needs_input_grad[1] else None
        grad_B = (xa.T @ g).T * ctx.scaling if ctx.needs_input_grad[2] else None  # this order: g is read along its rows
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _product_t(ctx.base, g, gb, lora_A.to(wide)).to(x.dtype).view(x.shape)
        # The factors are fp32 masters: their gradients are too, also where the products ran in bf16.
        return (
            grad_x,
            None if grad_A is None else grad_A.to(lora_A.dtype),
            None if grad_B is None else grad_B.to(lora_B.dtype),
            None,
            None,
        )


class _Adapter(nn.Module):
    """What a linear and an embedding adapter share: the frozen base, the factors and their scaling.

    Raises:
        UserError: rank below 1 or above the smaller side of the base.
    """

    def __init__(
        self,
        base: FrozenLinear | nn.Embedding,
        shape: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
    ) -> None:
        super().__init__()
        check_rank(rank, shape)
        rows, columns = shape
        self.base: FrozenLinear | nn.Embedding = base.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = scaling_of(rank, alpha, use_rslora)
        self.dropout = nn.Dropout(dropout)
        dtype, device = _dtype_and_device(base)
        master = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
        self.lora_A = nn.Parameter(torch.zeros(rank, columns, dtype=master, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=master, device=device))
        self.enabled = True  # surgery.adapters_off turns it off for a while

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module, untyped upstream
        """Move with the model, but stay fp32: ``model.to(bfloat16)`` must not round the masters."""
        masters = {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, before in masters.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device)
                parameter.grad = None  # it was rounded along
        return self

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """Rows of scaling * B A, laid out as the base's weight, in the masters' dtype."""
        raise NotImplementedError  # a linear lays them out (out, in), an embedding (num_embeddings, dim)

    def delta_rows(self, weight_rows: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of D = W' - W, given these rows of W, which need not be the base's; a plain LoRA's do not depend on W."""
        return self.update_rows(rows)

    def delta_weight(self) -> Tensor:
        """D = W' - W of the whole layer, shaped as the base's weight, in the masters' dtype."""
        return self.update_rows()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


def _dtype_and_device(base: FrozenLinear | nn.Embedding) -> tuple[torch.dtype, torch.device]:
    """Those of the base's weight; for one in 4 bits the dtype it was made from."""
    if isinstance(base, NF4Linear):
        return base.weight_dtype, base.packed.device
    return base.weight.dtype, base.weight.device


class LoRALinear(_Adapter):
    """y = x W^T + b + scaling * dropout(x) A^T B^T.

    Args:
        base: an ``nn.Linear`` or ``NF4Linear`` with weight (out, in); it is frozen here.
        rank, alpha, dropout, use_rslora: see ``LoRAConfig``.

    ``lora_A`` is (rank, in), uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as the reference code); ``lora_B`` is
    (out, rank), zero.

    Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023, arXiv:2305.14314, equation 5.
    """

    base: FrozenLinear

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
        super().__init__(base, (base.out_features, base.in_features), rank, alpha, dropout, use_rslora)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A random, B zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        drops = self.training and self.dropout.p > 0
        if not (drops or torch.is_grad_enabled()):  # at one token, autograd's own work takes as long as the update
            return _adapted(x, self.lora_A, self.lora_B, self.base, self.scaling)[0]
        if drops or any(p.requires_grad for p in self.base.parameters()):
            return self.base(x) + self.scaling * self._update(self.dropout(x))
        return _AdaptedLinear.apply(x, self.lora_A, self.lora_B, self.base, self.scaling)

    def _update(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """scaling * B A, (out, in) or some rows of it, in the masters' dtype."""
        return self.scaling * (self.lora_B.detach()[rows] @ self.lora_A.detach())


class DoRALinear(LoRALinear):
    """y = g * (x W^T + scaling * x A^T B^T) + b, where g = m / |W + scaling * B A| stretches each output.

    W' = g * (W + scaling * B A): the norms are those of the rows, over the inputs, so m (out,) holds the lengths of the rows
    of W' and A and B only their directions. m is fp32 or wider and starts as the norms of W: then g is exactly 1, and a fresh
    adapter changes no bit. In backward the norms are constants (section 4.3). The scaling acts inside the norm, so scaling 0
    does not give W back once m has been trained. A row of W that is zero stays zero.

    Precision: the norms are taken in the masters' dtype; what g multiplies has the dtype of x, the product is fp32 or wider
    and rounded once more.

    Cost: W + scaling * B A in every forward, a slab of rows at a time, which is most of the time at one token: merge before
    generating much. One more tensor like y is kept for backward.
    Ref: Liu et al. 2024, arXiv:2402.09353, equation 5. Dropout and embeddings are not offered.
    """

    lora_magnitude_vector: nn.Parameter  # the name that PEFT's files use

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, use_rslora: bool = False) -> None:
        super().__init__(base, rank, alpha, use_rslora=use_rslora)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A random, B zero, m the norms of W's rows."""
        super().reset_parameters(generator)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        stretch, bias = _stretch(self.lora_magnitude_vector, self.row_norms()), self.base.bias
        # g (y - b) + b, written so that y comes through whole where g is 1.
        stretched = y * stretch if bias is None else torch.addcmul((1 - stretch) * bias, y, stretch)
        return stretched.to(y.dtype)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + scaling * B A| of each row, (out,), in the masters' dtype, without a gradient."""
        base = self.base
        weight = cpu_nf4.dense_weight(base.quantized, self.lora_A.dtype) if isinstance(base, NF4Linear) else base.weight
        step = max(1, CHUNK // weight.shape[1])
        slabs = (slice(begin, begin + step) for begin in range(0, weight.shape[0], step))
        return torch.cat([torch.linalg.vector_norm(self.update_rows(rows).add_(weight[rows]), dim=1) for rows in slabs])

    def delta_rows(self, weight_rows: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of (g - 1) W + g * scaling * B A, with g for these rows of W."""
        update = self.update_rows(rows)
        weight = weight_rows.to(torch.promote_types(weight_rows.dtype, update.dtype))
        norms = torch.linalg.vector_norm(weight + update, dim=1)
        stretch = _stretch(self.lora_magnitude_vector.detach()[rows], norms).unsqueeze(1)
        return (stretch - 1) * weight + stretch * update

    def delta_weight(self) -> Tensor:
        """W' - W, (out, in), in the masters' dtype, with the base's W."""
        base = self.base
        dense = base.dequantized_weight(self.lora_A.dtype) if isinstance(base, NF4Linear) else base.weight.detach()
        return self.delta_rows(dense)


def _stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / |row|; a row without a direction is multiplied by m, and stays zero."""
    return magnitude / norms.masked_fill(norms == 0, 1.0)


class LoRAEmbedding(_Adapter):
    """y = W[ids] + scaling * A^T[ids] B^T.

    ``lora_A`` is (rank, num_embeddings), zero; ``lora_B`` is (dim, rank), standard normal: the layout and start of PEFT.
    """

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
        super().__init__(base, (base.embedding_dim, base.num_embeddings), rank, alpha, dropout, use_rslora)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A fresh adapter: A zero, B random."""
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if not self.enabled:
            return y
        rows = nn.functional.embedding(ids, self.lora_A.T)  # (..., rank)
        return y + (self.scaling * (rows @ self.lora_B.T)).to(y.dtype)

    def update_rows(self, rows: slice = slice(None)) -> Tensor:
        """scaling * (B A)^T, (num_embeddings, dim) or some rows of it, in the masters' dtype."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach()[:, rows]).T
