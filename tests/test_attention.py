"""Attention over segments equals a softmax written out in fp64, one segment at a time, wherever the segments lie."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_nf4 import needs_native, threads
from tiny import assert_close, randn
from torch import Tensor

from minisft import attention, matmul
from minisft.attention import Segments, attend, attend_cached, cache_attn_mask
from minisft.kernels import cpu_nf4

windows = st.none() | st.integers(1, 8)
heads_and_kv_heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 2), (3, 3)])
seeds = st.integers(0, 2**31)

# A row of a batch: segments with gaps of padding before, between and after them.
row_layouts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7)), max_size=4)
layouts = st.tuples(st.lists(row_layouts, min_size=1, max_size=4), st.integers(0, 2))


def segment_ids_of(layout: tuple[list[list[tuple[int, int]]], int]) -> Tensor:
    """(B, T) segment ids; every number is new, so equal neighbours are always one segment."""
    rows, tail = layout
    name = itertools.count(1)
    lines = [[x for gap, length in row for x in [0] * gap + [next(name)] * length] for row in rows]
    T = max(1, max(map(len, lines)) + tail)
    return torch.tensor([line + [0] * (T - len(line)) for line in lines])


def places_of(segment_ids: Tensor) -> list[Tensor]:
    """The flat places of each segment, found by walking over the batch token by token."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, name in enumerate(segment_ids.flatten().tolist()):
        if name:
            found.setdefault((place // segment_ids.shape[1], name), []).append(place)
    return [torch.tensor(places) for places in found.values()]


def naive(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int | None) -> Tensor:
    """One query at a time: softmax over the keys it may see. Zero at padding."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for places in places_of(segment_ids):
        for t, place in enumerate(places):
            seen = places[max(0, t + 1 - (window or len(places))) : t + 1]
            keys, values = (x[seen].repeat_interleave(group, 1) for x in (k, v))  # (n, H, E)
            weights = torch.softmax(torch.einsum("he,nhe->nh", q[place], keys) / q.shape[-1] ** 0.5, 0)
            out = out.index_put((place,), torch.einsum("nh,nhe->he", weights, values))
    return out


# Who computes, and how far its dtype may lie from fp64.
PATHS = [pytest.param(torch.float32, 1e-5, id="C++"), pytest.param(torch.float64, 1e-12, id="PyTorch")]


@pytest.fixture(autouse=True)
def one_thread():
    needs_native()
    with threads(1):
        yield


@pytest.mark.parametrize(("dtype", "tolerance"), PATHS)
@given(layout=layouts, heads=heads_and_kv_heads, half=st.integers(1, 9), window=windows, seed=seeds)
def test_values_and_gradients(dtype, tolerance, layout, heads, half, window, seed):
    """Padding holds garbage, in the inputs and in the gradient that comes back: none of it reaches a real token."""
    segment_ids = segment_ids_of(layout)
    real = (segment_ids > 0).flatten()
    H, K = heads
    inputs = [randn(real.numel(), n, 2 * half, seed=seed + i) for i, n in enumerate((H, K, K))]
    upstream = randn(real.numel(), H, 2 * half, seed=seed + 3)
    ours, theirs = ([x.clone().requires_grad_() for x in copies] for copies in ([x.to(dtype) for x in inputs], inputs))
    out = attend(*ours, Segments.of(segment_ids), window)
    assert ("Native" in type(out.grad_fn).__name__) == (dtype == torch.float32 and bool(real.any()))
    gradients = torch.autograd.grad(out, ours, upstream.to(dtype))
    expected = naive(*theirs, segment_ids, window)
    assert_close(out[real], expected[real], tolerance)
    assert not out[~real].any()
    upstream = upstream * real[:, None, None]
    wanted = torch.autograd.grad(expected, theirs, upstream) if bool(real.any()) else [torch.zeros_like(x) for x in inputs]
    for a, b in zip(gradients, wanted, strict=True):
        assert_close(a, b, tolerance)
        assert not a[~real].any()  # exactly zero at padding


@pytest.mark.parametrize(("dtype", "tolerance"), PATHS)
@given(
    length=st.integers(1, 6),
    rests=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    heads=heads_and_kv_heads,
    window=windows,
    count=st.integers(1, 2),
    seed=seeds,
)
def test_a_common_beginning_is_as_good_as_one_in_each_segment(dtype, tolerance, length, rests, heads, window, count, seed):
    """Values: each segment with a beginning of its own. Gradients: what the copies get, summed."""
    H, K = heads
    stored = torch.tensor([[1] * length + [2 + i for i, n in enumerate(rests) for _ in range(n)]])
    tokens = torch.arange(stored.numel())
    # Every segment written out: the common tokens, then its own.
    copies = [torch.cat((tokens[:length], tokens[stored[0] == 2 + i])) for i in range(len(rests))]
    apart = torch.tensor([[1 + i for i, places in enumerate(copies) for _ in places]])
    take = torch.cat(copies)
    inputs = [randn(stored.numel(), n, 4, seed=seed + i).requires_grad_() for i, n in enumerate((H, K, K))]
    ours = [x.detach().to(dtype).requires_grad_() for x in inputs]
    segments = Segments.of(stored, length)
    assert segments.positions.flatten()[take].tolist() == [i for places in copies for i in range(len(places))]
    with threads(count):
        out = attend(*ours, segments, window)
    assert ("Native" in type(out.grad_fn).__name__) == (dtype == torch.float32)
    expected = naive(*(x[take] for x in inputs), apart, window)
    assert_close(out[take], expected, tolerance)
    upstream = randn(*out.shape, seed=seed + 3)
    first = {int(place): at for at, place in reversed(list(enumerate(take)))}
    once = torch.zeros_like(expected)  # the beginning's own output is used once, not once a copy
    for place, at in first.items():
        once[at] = upstream[place]
    with threads(count):
        gradients = torch.autograd.grad(out, ours, upstream.to(dtype))
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, once), strict=True):
        assert_close(a, b, tolerance)


@given(layouts)
def test_segments_say_where_tokens_lie(layout):
    segment_ids = segment_ids_of(layout)
    segments = Segments.of(segment_ids)
    expected = torch.zeros(segment_ids.numel(), dtype=torch.int64)
    for places in places_of(segment_ids):
        expected[places] = torch.arange(len(places))
    assert torch.equal(segments.positions.flatten(), expected)
    number = torch.arange(1, segment_ids.numel() + 1).view(-1, 1, 1)
    grid = segments.to_grid(number)
    for row, places in zip(grid.flatten(1), places_of(segment_ids), strict=False):  # a row more if there is no token at all
        assert row[: len(places)].tolist() == (places + 1).tolist()
        assert segments.trivial or set(row.tolist()) == set((places + 1).tolist())  # no other segment's behind them
    back = segments.from_grid(grid)
    assert torch.equal(back[segment_ids.flatten() > 0], number[segment_ids.flatten() > 0])
    assert grid.shape[0] == max(1, len(places_of(segment_ids)))  # one grid row a segment: never quadratic in the packed length
    assert grid.shape[1] == max([len(places) for places in places_of(segment_ids)], default=1)


def test_nothing_moves_without_need():
    right_padded = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert Segments.of(right_padded).trivial
    assert not Segments.of(right_padded.flip(1)).trivial
    assert not Segments.of(torch.tensor([[1, 2, 2]])).trivial


@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck(window):
    segments = Segments.of(torch.tensor([[1, 1, 1, 0], [0, 1, 2, 2]]))
    inputs = [randn(8, heads, 2, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    real = (torch.tensor([1, 1, 1, 0, 0, 1, 1, 1]) > 0)[:, None, None]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, segments, window) * real, inputs)


@pytest.mark.parametrize("tokens", [5, 10, 20, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), PATHS)
def test_large_scores_do_not_overflow(dtype, tolerance, tokens):
    """Scores of 1e4 would be infinite after exp; the softmax is then one-hot, also where the last two keys have the largest."""
    segment_ids = torch.ones(1, tokens, dtype=torch.int64)
    q, k, v = (randn(tokens, 1, 4, seed=i, dtype=dtype) for i in range(3))
    k[-1], k[-2] = 8 * q[-1], 7 * q[-1]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q * 100, k * 100, v, Segments.of(segment_ids))
    gradients = torch.autograd.grad(out.sum(), [q, k, v])
    assert_close(out, naive(q.double() * 100, k.double() * 100, v.double(), segment_ids, None), tolerance)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_not_kept(dtype):
    """What stays for backward grows with the tokens, never with their square."""
    kept: list[Tensor] = []
    tokens, segments = 40, Segments.of(torch.ones(1, 40, dtype=torch.int64))
    q, k, v = (randn(tokens, heads, 2, seed=heads, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(q, k, v, segments)
    assert kept
    assert max(t.numel() for t in kept) <= q.numel()


@pytest.mark.parametrize("fast_bf16", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_bf16_stays_close_to_fp64(native, fast_bf16):
    """On a CPU with and without bf16 products: within a few roundings of the exact result, gradients too."""
    segment_ids = torch.tensor([[1] * 9 + [2] * 4, [0] * 3 + [1] * 10])
    inputs = [randn(26, heads, 6, seed=heads).bfloat16() for heads in (4, 2, 2)]
    upstream = randn(26, 4, 6, seed=9).bfloat16() * (segment_ids > 0).view(-1, 1, 1)
    ours, exact = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    with (
        mock.patch.object(attention, "NATIVE_KEYS", attention.NATIVE_KEYS if native else 0),
        mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16),
    ):
        out = attend(*ours, Segments.of(segment_ids), 5)
        gradients = torch.autograd.grad(out, ours, upstream)
    assert ("Native" in type(out.grad_fn).__name__) == native
    expected = naive(*exact, segment_ids, 5)
    real = (segment_ids > 0).flatten()
    assert out.dtype == torch.bfloat16
    assert_close(out[real], expected[real], 0.02)
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a, b, 0.03)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("fast_bf16", [False, True])
@given(
    heads=heads_and_kv_heads,
    filled=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    new=st.integers(1, 4),
    window=windows,
    seed=seeds,
)
def test_cached_attention(dtype, tolerance, fast_bf16, heads, filled, new, window, seed):
    """Rows of different length in one cache; what lies beyond a row's end is garbage that nobody sees."""
    H, K = heads
    B, C = len(filled), max(filled) + new + 2
    k, v = (randn(B, K, C, 4, seed=seed + i).to(dtype) for i in range(2))
    q = randn(B, new, H, 4, seed=seed + 2).to(dtype)
    positions = torch.tensor(filled)[:, None] + torch.arange(new)
    with mock.patch.object(matmul, "_cpu_multiplies_bf16", return_value=fast_bf16):
        out = attend_cached(q, k, v, cache_attn_mask(positions, C, window))
    assert out.dtype == dtype
    for b, length in enumerate(filled):
        total = length + new
        whole_q = torch.cat([torch.zeros(length, H, 4, dtype=torch.float64), q[b].double()])
        keys, values = (x[b, :, :total].transpose(0, 1).double() for x in (k, v))
        expected = naive(whole_q, keys, values, torch.ones(1, total, dtype=torch.int64), window)
        assert_close(out[b], expected[length:], tolerance)


@given(
    past=st.integers(1, 5),
    prefix=st.integers(0, 3),
    rests=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    heads=heads_and_kv_heads,
    window=windows,
    seed=seeds,
)
def test_a_past_is_as_if_each_row_began_with_it(past, prefix, rests, heads, window, seed):
    H, K = heads
    ids = torch.tensor([[1] * prefix + [2 + i for i, n in enumerate(rests) for _ in range(n)]])
    before = tuple(randn(1, past, K, 4, seed=seed + i) for i in range(2))
    inputs = [randn(ids.numel(), n, 4, seed=seed + 2 + i) for i, n in enumerate((H, K, K))]
    segments = Segments.of(ids, prefix, past)
    exact = attend(*inputs, segments, window, before)
    q, *keys_values = (x.float().requires_grad_() for x in inputs)
    found = attend(q, *keys_values, segments, window, tuple(x.float() for x in before))
    assert "Native" in type(found.grad_fn).__name__
    assert_close(found, exact, 1e-5)
    for i, n in enumerate(rests):  # each segment written out
        own = (ids[0] == 2 + i).nonzero()[:, 0]
        tokens = torch.cat((torch.arange(prefix), own))
        whole_q = torch.cat((torch.zeros(past, H, 4, dtype=torch.float64), inputs[0][tokens]))
        keys, values = (torch.cat((x[0], y[tokens])) for x, y in zip(before, inputs[1:], strict=True))
        expected = naive(whole_q, keys, values, torch.ones(1, len(keys), dtype=torch.int64), window)
        assert_close(exact[own], expected[-n:])


LONG = Segments.of(torch.tensor([[1] * 70 + [2] * 31 + [0] * 2 + [3] * 24]))  # several blocks of queries, whole ones and rests


@pytest.mark.parametrize("window", [None, 20, 40])
def test_blocks_of_queries_come_together(window):
    exact = [randn(127, heads, 40, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    upstream = randn(127, 4, 40, seed=9)
    ours = [x.detach().float().requires_grad_() for x in exact]
    found, expected = attend(*ours, LONG, window), attend(*exact, LONG, window)
    gradients = torch.autograd.grad(found, ours, upstream.float())
    for a, b in zip((found, *gradients), (expected, *torch.autograd.grad(expected, exact, upstream)), strict=True):
        assert_close(a, b, 1e-5)


def test_same_bits_for_any_threads_and_neighbours():
    inputs = [randn(127, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2, 2)]
    alone = Segments.of(torch.ones(1, 31, dtype=torch.int64))
    found = []
    for count in (1, 2):
        with threads(count):
            ours = [x.clone().requires_grad_() for x in inputs]
            out = attend(*ours, LONG)
            found.append([out, *torch.autograd.grad(out.square().sum(), ours)])
    ours = [x[70:101].clone().requires_grad_() for x in inputs]
    out = attend(*ours, alone)
    found.append([out, *torch.autograd.grad(out.square().sum(), ours)])
    for one, two, own in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[70:101], own)


@pytest.mark.parametrize("window", [None, 20])
def test_what_stood_in_memory_reaches_no_number(window, monkeypatch):
    """Keys are turned in whole tiles, and scores are computed in whole vectors: what lies beyond the last key is anything."""

    def found():
        mine = [randn(127, heads, 40, seed=heads, dtype=torch.float32).requires_grad_() for heads in (4, 2, 2)]
        out = attend(*mine, LONG, window)
        return [x[:101] for x in (out, *torch.autograd.grad(out.square().sum(), mine))]  # padding follows

    clean = found()
    monkeypatch.setattr(torch, "empty", lambda *size, **given: torch.full(size, torch.nan, **given))
    assert all(torch.equal(a, b) for a, b in zip(found(), clean, strict=True))


def test_a_number_that_is_not_finite_stays_in_its_segment():
    q, k, v = (randn(127, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2, 2))
    clean = attend(q, k, v, LONG)
    for x in (q, k, v):
        x[80] = torch.nan
    found = attend(q, k, v, LONG)
    others = torch.tensor([*range(70), *range(101, 127)])  # token 80 is in the middle of the second segment
    assert torch.equal(found[others], clean[others])
    assert found[80:101].isnan().all()


@pytest.mark.parametrize(
    ("keys", "dtype", "native"),
    [
        (512, torch.float32, True),
        (513, torch.float32, False),
        (512, torch.bfloat16, True),
        (513, torch.bfloat16, False),
        (8, torch.float16, False),
    ],
)
def test_who_computes(keys: int, dtype: torch.dtype, native: bool) -> None:
    """The C++ where it is faster (benchmarks/LOG.md)."""
    q = randn(keys, 2, 4, seed=0).to(dtype).requires_grad_()
    out = attend(q, q, q, Segments.of(torch.ones(1, keys, dtype=torch.int64)))
    assert ("Native" in type(out.grad_fn).__name__) is native


def test_threads_without_a_head_are_left_to_pytorch() -> None:
    q, k = (randn(8, heads, 4, seed=0, dtype=torch.float32).requires_grad_() for heads in (2, 1))
    with threads(2):
        one, two = (attend(q, k, k, Segments.of(torch.tensor([ids]))) for ids in ([1] * 8, [1] * 4 + [2] * 4))
    assert ["Native" in type(out.grad_fn).__name__ for out in (one, two)] == [False, True]


def test_many_long_prefixes_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (randn(8, heads, 4, seed=0, dtype=torch.float32).requires_grad_() for heads in (2, 1))
    segments = Segments.of(torch.tensor([[1, 1, 1, 2]] * 2), 3)  # two prefixes of three keys of four numbers
    found = []
    for most in (24, 23):
        monkeypatch.setattr(attention, "PREFIX_NUMBERS", most)
        found.append(attend(q, k, k, segments))
    assert ["Native" in type(out.grad_fn).__name__ for out in found] == [True, False]
    assert_close(*found, 1e-6)


def test_attention_can_be_traced() -> None:
    """The compiler sees PyTorch's operators alone, without a break."""
    q = randn(9, 2, 4, seed=0, dtype=torch.float32)
    segments = Segments.of(torch.ones(1, 9, dtype=torch.int64))
    compiled = torch.compile(lambda q: attend(q, q, q, segments), backend="eager", fullgraph=True)
    assert_close(compiled(q), attend(q, q, q, segments), 1e-6)


def test_without_a_compiler_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    q = randn(9, 1, 4, seed=0, dtype=torch.float32).requires_grad_()
    segments = Segments.of(torch.ones(1, 9, dtype=torch.int64))
    found = attend(q, q, q, segments)
    monkeypatch.setattr(cpu_nf4, "library", lambda: None)
    other = attend(q, q, q, segments)
    assert "Native" not in type(other.grad_fn).__name__
    assert_close(found, other, 1e-6)
