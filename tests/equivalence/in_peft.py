"""PEFT's layers with the numbers of a case, so that the same laws can be asked of them."""

from __future__ import annotations

import bitsandbytes
import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from laws import BASES, Case, bits
from torch import Tensor, nn

from minisft.common.errors import UserError

_ours = Case.model  # the suite may be told to ask PEFT's layer instead


def in_bitsandbytes(weight: Tensor, bias: Tensor | None, double_quant: bool = False) -> nn.Module:
    """The weight in bitsandbytes' NF4, on the CPU."""
    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def beside(case: Case, base: nn.Module | None = None, **options: object) -> nn.Module:
    """PEFT's layer with the base and the factors of ``case``."""
    ours = _ours(case)[0]
    tree = nn.Sequential(base or ours.base)
    tree.is_loaded_in_4bit = base is not None  # how PEFT tells bitsandbytes' layers from others
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,
        use_rslora=case.use_rslora,
        use_dora=case.kind == "dora",
        target_modules=["0"],
        **options,
    )
    theirs = peft.get_peft_model(tree, config).base_model.model[0]
    A, B = factors(theirs)
    with torch.no_grad():
        A.copy_(ours.lora_A)
        B.copy_(ours.lora_B)
        if case.kind == "dora":
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    return theirs.eval()


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of PEFT's layer."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


class PeftLayer(nn.Module):
    """PEFT's layer under the names by which the laws ask for a layer's numbers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        stored, base = BASES[case.base], None
        if stored.in_4_bits:
            dense = case.dense_layer()
            base = in_bitsandbytes(dense.weight.detach(), dense.bias, stored.double_quant)
        self.layer = beside(case, base)

    @property
    def base(self) -> nn.Module:
        return self.layer.get_base_layer()

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802
        return factors(self.layer)[0]

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802
        return factors(self.layer)[1]

    @property
    def lora_magnitude_vector(self) -> nn.Parameter:
        return self.layer.lora_magnitude_vector["default"].weight

    def row_norms(self) -> Tensor:
        return torch.linalg.vector_norm(weight_of(self) + self.delta_weight(), dim=1)

    def delta_weight(self) -> Tensor:
        return self.layer.get_delta_weight("default").detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model(case: Case) -> nn.Sequential:
    return nn.Sequential(PeftLayer(case)).eval()


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight under the adapter; of 4 bits, what bitsandbytes says that its codes stand for."""
    weight = layer.base.weight
    if not hasattr(weight, "quant_state"):
        return weight.detach()
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)


def merge_(tree: nn.Module) -> None:
    """With ``safe_merge``, PEFT's most careful way; what it refuses is refused as minisft does it."""
    try:
        tree[0].layer.merge(safe_merge=True)
    except ValueError as error:
        raise UserError("numeric/merge-not-finite", str(error)) from error


def unmerge_(tree: nn.Module) -> None:
    tree[0].layer.unmerge()


def state(tree: nn.Module) -> dict[str, str]:
    """The bits of the base and of the factors; where they lie in memory is nobody's promise."""
    return {name: bits(parameter.data) for name, parameter in tree.named_parameters()}
