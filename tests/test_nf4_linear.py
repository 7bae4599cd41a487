"""The 4-bit linear layer: dense autograd's gradients, nothing dense kept, dtypes left alone, one operator when compiled."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from minisft import nf4
from minisft.common.errors import UserError
from minisft.kernels import cpu_nf4
from minisft.kernels.cpu_matmul import MAX_ROWS, can_use_native
from minisft.matmul import frozen_linear, frozen_linear_t
from minisft.nf4 import QuantizedWeight, dequantize, quantize
from minisft.nf4_linear import NF4Linear

OUT, IN = 40, 96  # rows of one and a half blocks
BUFFERS = ("packed", "absmax", "absmax2", "offset", "levels")


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, **options: object) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), **options)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, IN, generator=g, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randn(*shape, OUT, generator=g, dtype=torch.float64).to(dtype)


def dense_gradients(module: NF4Linear, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autograd makes of an ordinary linear layer over the dequantized weight."""
    x = x.detach().clone().requires_grad_()
    bias = None if module.bias is None else module.bias.detach().clone().requires_grad_()
    y = F.linear(x, module.dequantized_weight(x.dtype), bias)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad, None if bias is None else bias.grad


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["native", "reference"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The products in C++, where it compiles, and those without it."""
    if request.param == "reference":
        monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    return request.param


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 5), (MAX_ROWS + 1,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_dense_autograd(
    shape: tuple[int, ...], bias: bool, double_quant: bool, dtype: torch.dtype, road: str
) -> None:
    """To the bit in fp32, but for a few rows in C++, which sum in another order (``test_cpu_nf4.py`` has the bound)."""
    module = layer(bias, dtype, double_quant=double_quant)
    x, grad = inputs(shape, dtype)
    y = module(x)
    y.backward(grad)
    wanted = dense_gradients(module, x, grad)
    found = (y.detach(), x.grad, None if module.bias is None else module.bias.grad)
    other_order = can_use_native(x, module.quantized)
    assert not (other_order and road == "reference")
    for ours, dense in zip(found, wanted, strict=True):
        if dense is None:
            assert ours is None
        elif ours is found[0] and other_order:
            torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)
        elif dtype == torch.float64:
            torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(ours, dense)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias: bool) -> None:
    module = layer(bias, torch.float64)
    x, _ = inputs((3,), torch.float64)
    parameters = [x] if module.bias is None else [x, module.bias]
    assert torch.autograd.gradcheck(lambda *_: module(x), parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_one_product_of_fp64(dtype: torch.dtype) -> None:
    """Bound: rounding W, the sum and the result, u (|W||x| + |b| + |y|) with the fp32 sum's k e (|W||x| + |b|)."""
    module = layer(True, dtype)
    x, grad = inputs((50,), dtype)
    y = module(x)
    y.backward(grad)
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    weight = module.dequantized_weight(torch.float64)
    assert module.bias is not None
    u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for ours, left, right, offset in (
        (y, x.detach().double(), weight.T, module.bias.detach().double()),
        (x.grad, grad.double(), weight, torch.zeros(IN, dtype=torch.float64)),
    ):
        exact = left @ right + offset
        absolute = left.abs() @ right.abs() + offset.abs()
        bound = u * (absolute + exact.abs()) + 2.0**-24 * (IN + OUT) * absolute
        assert bool(((ours.detach().double() - exact).abs() <= bound).all())


def test_an_input_without_gradient_gets_none_and_the_bias_still_does() -> None:
    module = layer()
    x, grad = inputs((3,), torch.float32)
    module(x.detach()).backward(grad)
    assert module.bias is not None
    assert module.bias.grad is not None
    assert torch.equal(module.bias.grad, grad.sum(0))


def test_the_weight_is_no_parameter() -> None:
    assert [name for name, _ in layer().named_parameters()] == ["bias"]
    assert not any(b.requires_grad for b in layer().buffers())


def test_functional_products_equal_the_layers() -> None:
    module = layer(bias=False)
    x, grad = inputs((4,), torch.float32)
    y = module(x)
    y.backward(grad)
    assert torch.equal(frozen_linear(x.detach(), module.quantized), y.detach())
    assert x.grad is not None
    assert torch.equal(frozen_linear_t(grad, module.quantized), x.grad)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_no_dense_weight_is_saved_for_backward() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    module = layer()
    x, _ = inputs((3,), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x * 1.0)
        assert saved == []
        F.linear(x * 1.0, module.dequantized_weight())  # the same hook sees what an ordinary layer saves
    assert any(tensor.numel() == OUT * IN for tensor in saved)


@pytest.mark.slow
def test_the_dense_weight_dies_with_each_product_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def recording(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        dense = dequantize(q, dtype)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    monkeypatch.setattr(nf4, "dequantize", recording)
    module = layer()
    x, grad = inputs((MAX_ROWS + 1,), torch.float32)
    y = module(x)
    gc.collect()
    assert [ref() for ref in made] == [None]
    y.backward(grad)
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_layers_share_a_buffer_and_still_have_their_own_gradients(road: str) -> None:
    """The second layer overwrites the first one's weight before backward; each must decode its own again."""
    torch.manual_seed(0)
    one, two = (NF4Linear.from_linear(nn.Linear(IN, IN, bias=False)) for _ in range(2))
    x = torch.randn(50, IN, requires_grad=True)
    two(one(x)).sum().backward()
    assert x.grad is not None
    dense = [m.dequantized_weight() for m in (one, two)]
    torch.testing.assert_close(x.grad, torch.ones(50, IN) @ dense[1] @ dense[0])


def test_a_product_called_outside_of_autograd_carries_no_gradient(road: str) -> None:
    module = layer()
    for rows in (3, 50):
        x, grad = inputs((rows,), torch.float32)
        assert not frozen_linear(x, module.quantized, module.bias).requires_grad
        assert not frozen_linear_t(grad.requires_grad_(), module.quantized).requires_grad


INTERPRETED = """
import torch
from minisft import matmul, nf4
torch.manual_seed(0)
for inputs in (64, 72):  # whole groups of 32, and not: two kinds of kernel
    for nested in (False, True):
        q = nf4.quantize(torch.randn(48, inputs), double_quant=nested)
        for shape in ((inputs,), (2, 3, inputs), (0, inputs)):
            x = torch.randn(shape)
            y = matmul.triton_matmul(x, q)
            torch.testing.assert_close(y, x @ nf4.dequantize(q).T, rtol=1e-4, atol=1e-4)
            back = matmul.triton_matmul_t(y, q)
            torch.testing.assert_close(back, y @ nf4.dequantize(q), rtol=1e-4, atol=1e-3)
print("equal")
"""


@pytest.mark.slow
def test_the_gpus_products_under_the_interpreter() -> None:
    """What CUDA tensors are handed to; a process of its own, because Triton interprets or compiles for a whole process."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout == "equal\n", run.stderr


# ---- a module like others, except for its dtype ----------------------------------------------------------------------


def _same_buffers(one: NF4Linear, other: NF4Linear) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a, b)
        for name in BUFFERS
        if (a := one._buffers[name]) is not None and (b := other._buffers[name]) is not None
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: nn.Sequential(m).bfloat16()[0],
        lambda m: m.to("cpu", torch.float16),
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_changing_the_dtype_leaves_the_weight_alone(change: Callable[[NF4Linear], NF4Linear], double_quant: bool) -> None:
    module = layer(double_quant=double_quant)
    before = copy.deepcopy(module)
    changed = change(module)
    assert _same_buffers(changed, before)
    assert changed.bias is not None
    assert changed.bias.dtype != torch.float32
    assert torch.equal(changed.dequantized_weight(), before.dequantized_weight())


def test_moving_to_a_device_moves_every_buffer_and_keeps_dtypes() -> None:
    module = layer()
    dtypes = [b.dtype for b in module.buffers()]
    for moved in (copy.deepcopy(module).to("meta"), copy.deepcopy(module).to("meta", torch.bfloat16)):
        assert all(b.is_meta for b in moved.buffers())
        assert [b.dtype for b in moved.buffers()] == dtypes
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert _same_buffers(empty, module)


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trip(double_quant: bool) -> None:
    module = layer(double_quant=double_quant)
    state = module.state_dict()
    nested = {"absmax2", "offset"} if double_quant else set()
    assert set(state) == {"packed", "absmax", "levels", "bias"} | nested
    torch.manual_seed(9)
    other = NF4Linear.from_linear(nn.Linear(IN, OUT), double_quant=double_quant)
    assert not torch.equal(other.packed, module.packed)
    other.load_state_dict(state)
    assert _same_buffers(other, module)


def test_the_buffers_are_the_quantized_weight_without_a_copy() -> None:
    q = quantize(torch.randn(OUT, IN))
    module = NF4Linear(q)
    assert module.packed is q.packed
    assert module.quantized.nbytes == q.nbytes == sum(b.nbytes for b in module.buffers())
    assert (module.in_features, module.out_features) == (IN, OUT)
    assert module.weight_dtype == torch.float32


def test_only_a_matrix_makes_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4, 4\)"):
        NF4Linear(quantize(torch.ones(4, 4, 4)))


def test_a_bad_weight_is_named() -> None:
    linear = nn.Linear(IN, OUT)
    nn.init.constant_(linear.weight, torch.nan)
    with pytest.raises(UserError, match=r"layers\.0\.q_proj\.weight\[0, 0\]"):
        NF4Linear.from_linear(linear, name="layers.0.q_proj.weight")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled_it_is_one_opaque_operator_each_way(double_quant: bool) -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    module = layer(double_quant=double_quant)
    compiled = torch.compile(
        lambda x: module(x.sin()).cos(), fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    x, grad = inputs((2, 5), torch.float32)
    compiled(x).backward(grad)
    eager_x = x.detach().clone().requires_grad_()
    module(eager_x.sin()).cos().backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, eager_x.grad)
    forward, backward = graphs
    assert [name for name in forward if "minisft" in name] == ["minisft.nf4_matmul.default"]
    assert [name for name in backward if "minisft" in name] == ["minisft.nf4_matmul_t.default"]
    assert not any(word in name for name in forward + backward for word in ("index", "shift", "bitwise", "mm."))


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_operators_keep_pytorchs_contract(double_quant: bool) -> None:
    module = layer(double_quant=double_quant)
    x, grad = inputs((2, 5), torch.float32)
    fields = (*(module._buffers[name] for name in BUFFERS), 64, [OUT, IN])
    torch.library.opcheck(torch.ops.minisft.nf4_matmul.default, (x.detach(), module.bias.detach(), *fields))
    torch.library.opcheck(torch.ops.minisft.nf4_matmul_t.default, (grad, *fields))
