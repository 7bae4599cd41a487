"""Which kernel serves a product: decided by the number of rows, and by nothing that has to be measured on the way.

Few rows: read the 4 bits and multiply at once. Many rows: decode the weight once and use the dense product. A weight whose
rows are not whole groups of 32 always takes the second road, which refuses no shape. Imports no Triton until a product runs.
"""

from __future__ import annotations

from torch import Tensor

from minisft.kernels.arguments import GROUP
from minisft.kernels.workspace import matmul_backward_dense, matmul_dense
from minisft.nf4 import QuantizedWeight

MATVEC_ROWS = 4
SMALL_ROWS = 128


def matmul(x_MI: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x W^T``: (M, in_features) to (M, out_features) in the dtype of x, for any M, zero too."""
    num_rows = len(x_MI)
    if not 0 < num_rows <= SMALL_ROWS or weight.shape[1] % GROUP:
        return matmul_dense(x_MI, weight)
    if num_rows <= MATVEC_ROWS:
        from minisft.kernels.matvec import matvec

        return matvec(x_MI, weight)
    from minisft.kernels.matmul_small import matmul_small

    return matmul_small(x_MI, weight)


def matmul_backward(grad_MO: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad W``: (M, out_features) to (M, in_features) in the dtype of ``grad_MO``, for any M, zero too."""
    if not 0 < len(grad_MO) <= SMALL_ROWS or weight.shape[1] % GROUP:
        return matmul_backward_dense(grad_MO, weight)
    from minisft.kernels.matmul_backward import matmul_backward as fused

    return fused(grad_MO, weight)
