"""From rows to batches: every row once, targets shifted once, and no way of cutting a step changes its gradient."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, assert_close, assert_same, gradients, shared_with_lora
from torch import Tensor, nn

from minisft.batching import (
    MIN_SHARED_FRACTION,
    Batch,
    collate,
    collate_shared,
    epoch_order,
    micro_batches,
    pack,
    shared_prefix,
    step_rows,
)
from minisft.data.chat import Encoded
from minisft.loss import IGNORE_INDEX, head_loss_sum

PAD = VOCAB - 1
seeds = st.integers(0, 2**31)


def encoded(ids: list[int], supervised: list[bool], row: int) -> Encoded:
    return Encoded(ids, supervised, row=row, control_tokens_in_text=0, prompt_length=0)


@st.composite
def data_rows(draw: st.DrawFn, max_size: int = 8) -> list[Encoded]:
    """Rows of ragged length, any flags at all (the first token's too), padding ids among the tokens; some begin alike."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=max_size))
    tokens = st.tuples(st.integers(0, VOCAB - 1), st.booleans())
    unsupervised = st.tuples(st.integers(0, VOCAB - 1), st.just(False))
    beginning = draw(st.just([]) | st.lists(unsupervised, max_size=6) | st.lists(tokens, max_size=6))
    rows = [beginning + draw(st.lists(tokens, min_size=n, max_size=n)) for n in lengths]
    return [encoded([t for t, _ in row], [s for _, s in row], 10 + i) for i, row in enumerate(rows)]


# Order


@given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 12), epochs=st.integers(1, 4), seed=seeds)
def test_every_epoch_has_every_row_once(num_rows, batch_size, epochs, seed):
    steps = math.ceil(num_rows * epochs / batch_size)
    series = list(itertools.chain.from_iterable(step_rows(step, batch_size, num_rows, seed) for step in range(1, steps + 1)))
    assert len(series) == steps * batch_size
    for epoch in range(epochs):
        rows = series[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(rows) == list(range(num_rows))
        assert rows == epoch_order(epoch, num_rows, seed)


@given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 12), step=st.integers(1, 50), seed=seeds)
def test_a_step_does_not_depend_on_history(num_rows, batch_size, step, seed):
    torch.manual_seed(seed)
    expected = step_rows(step, batch_size, num_rows, seed)
    torch.randn(7)
    for earlier in range(1, 4):
        step_rows(earlier, batch_size, num_rows, seed)
    assert step_rows(step, batch_size, num_rows, seed) == expected
    doubled = step_rows(2 * step - 1, batch_size, num_rows, seed) + step_rows(2 * step, batch_size, num_rows, seed)
    assert doubled == step_rows(step, 2 * batch_size, num_rows, seed)  # the series is one, however it is cut


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(epoch, 20, seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


# Packing


@given(lengths=st.lists(st.integers(0, 14), max_size=30), capacity=st.integers(1, 12))
def test_pack(lengths, capacity):
    """Every item once; only an over-long one exceeds the capacity, and it lies alone."""
    bins = pack(lengths, capacity)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    for items in bins:
        assert items
        assert sum(lengths[i] for i in items) <= capacity or len(items) == 1
    overlong = [i for i, length in enumerate(lengths) if length > capacity]
    assert all([i] in bins for i in overlong)
    # Any-fit: no two bins could have been one. So at most one bin is half empty or more.
    fills = sorted(sum(lengths[i] for i in items) for items in bins if items[0] not in overlong)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity
    assert bins == pack(lengths, capacity)


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimum by trying everything: each item into each open bin, or a new one."""
    best = len(lengths)

    def place(item: int, room: tuple[int, ...]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if item == len(lengths):
            best = len(room)
            return
        for free in set(room):
            if free >= lengths[item]:
                rest = list(room)
                rest.remove(free)
                place(item + 1, tuple(sorted([*rest, free - lengths[item]])))
        place(item + 1, tuple(sorted([*room, capacity - lengths[item]])))

    place(0, ())
    return best


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_pack_is_never_worse_than_its_bound(lengths):
    """Best-fit decreasing takes at most 3/2 of the optimum (Simchi-Levi 1994), and never fewer bins than there must be."""
    used, optimum = len(pack(lengths, 12)), fewest_bins(lengths, 12)
    assert optimum <= used <= 1.5 * optimum


def test_pack_takes_the_tightest_gap():
    assert sorted(map(sorted, pack([6, 7, 3, 4], 10))) == [[0, 3], [1, 2]]


def test_packing_many_rows_is_fast_and_tight():
    rng = random.Random(0)
    lengths = [rng.randint(1, 900) for _ in range(20_000)]
    assert len(pack(lengths, 1024)) <= 1.02 * sum(lengths) / 1024


# Collating


def naive_targets(row: Encoded) -> list[int]:
    """What place i must predict: token i + 1, if that one is to be learned."""
    following = zip(row.input_ids[1:], row.supervised[1:], strict=True)
    return [token if learn else IGNORE_INDEX for token, learn in following] + [IGNORE_INDEX]


def read_back(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each segment of each batch row, in order; a common beginning put back before each."""
    P = batch.prefix_length
    if P > 0:
        ids, targets, segment_ids = (x[0].tolist() for x in (batch.input_ids, batch.target_ids, batch.segment_ids))
        assert targets[:P] == [IGNORE_INDEX] * P
        rests = [[i for i, s in enumerate(segment_ids) if s == segment] for segment in range(2, max(segment_ids) + 1)]
        return [([ids[i] for i in (*range(P), *rest)], [targets[i] for i in (*range(P), *rest)]) for rest in rests]
    found = []
    for ids, target_ids, segment_ids in zip(batch.input_ids, batch.target_ids, batch.segment_ids, strict=True):
        for segment in range(1, int(segment_ids.max()) + 1):
            inside = segment_ids == segment
            found.append((ids[inside].tolist(), target_ids[inside].tolist()))
    return found


@given(rows=data_rows(), packed=st.booleans(), rng=st.randoms(use_true_random=False))
def test_collate(rows, packed, rng):
    """Each row comes back whole with its targets shifted once; a row's last token is never asked for the next row's first."""
    order = list(range(len(rows)))
    bins = [[i] for i in order]
    if packed:
        rng.shuffle(order)
        cuts = sorted(rng.sample(range(1, len(rows)), rng.randint(0, len(rows) - 1)))
        bins = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(rows)])]
    batch = collate(rows, PAD, bins if packed else None)
    flat = [i for items in bins for i in items]
    assert read_back(batch) == [(rows[i].input_ids, naive_targets(rows[i])) for i in flat]
    padding = batch.segment_ids == 0
    assert (batch.input_ids[padding] == PAD).all()
    assert (batch.target_ids[padding] == IGNORE_INDEX).all()
    assert batch.input_ids.shape == (len(bins), max(sum(len(rows[i].input_ids) for i in items) for items in bins))
    assert batch.num_tokens == sum(len(row.input_ids) for row in rows)
    assert batch.num_targets == sum(sum(row.supervised[1:]) for row in rows)
    assert batch.rows == tuple(row.row for row in rows)
    assert {t.dtype for t in (batch.input_ids, batch.target_ids, batch.segment_ids)} == {torch.int64}


@given(rows=data_rows(), size=st.integers(1, 9), packing=st.booleans(), capacity=st.integers(1, 20))
def test_micro_batches_cut_a_step(rows, size, packing, capacity):
    batches = micro_batches(rows, size, PAD, packing, capacity)
    assert len(batches) == math.ceil(len(rows) / size)
    assert sorted(itertools.chain.from_iterable(map(read_back, batches))) == sorted(
        (r.input_ids, naive_targets(r)) for r in rows
    )
    assert sorted(itertools.chain.from_iterable(b.rows for b in batches)) == [row.row for row in rows]
    assert sum(b.num_tokens for b in batches) == sum(len(row.input_ids) for row in rows)
    longest = max(len(row.input_ids) for row in rows)
    if packing:
        assert all(b.prefix_length or b.input_ids.shape[1] <= max(capacity, longest) for b in batches)
        unshared = micro_batches(rows, size, PAD, True, capacity, share_prefix=False)
        assert all(b.prefix_length == 0 for b in unshared)
    else:
        assert all(b.input_ids.shape[0] <= size for b in batches)
        ends = [(int((b.segment_ids > 0).sum(1).min()), int((b.segment_ids > 0).sum(1).max())) for b in batches]
        assert all(shortest >= longest for (shortest, _), (_, longest) in itertools.pairwise(ends))


@given(rows=data_rows())
def test_the_shared_prefix_is_the_longest_that_may_be(rows):
    """By its definition: tokens that all rows have, a token after them in each, and no target on the way."""

    def may_share(length: int) -> bool:
        alike = len({tuple(row.input_ids[:length]) for row in rows}) == 1
        return alike and all(len(row.input_ids) > length and not any(row.supervised[1 : length + 1]) for row in rows)

    length = shared_prefix(rows)
    assert length >= 0
    assert length == max(n for n in range(20) if may_share(n) or n == 0)


def test_a_beginning_is_shared_where_it_saves_enough():
    def batch_of(common: int, own: int) -> Batch:
        rows = [encoded([1] * common + [2 + i] * own, [False] * (common + own - 1) + [True], i) for i in range(4)]
        (batch,) = micro_batches(rows, 4, PAD, True, 1000)
        return batch

    long = batch_of(20, 10)
    assert (long.prefix_length, long.input_ids.shape, long.num_tokens, long.num_targets) == (20, (1, 60), 120, 4)
    assert long.rows == (0, 1, 2, 3)
    few = batch_of(1, 10)
    assert MIN_SHARED_FRACTION * 44 > 3  # three tokens of 44 would be saved
    assert (few.prefix_length, few.input_ids.shape) == (0, (1, 44))
    alone = micro_batches([encoded([1] * 9, [False] * 8 + [True], 0)], 1, PAD, True, 1000)[0]
    assert alone.prefix_length == 0


def test_moving_a_batch_keeps_everything():
    batch = collate([encoded([1, 2, 3], [False, True, True], 4)], PAD)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.target_ids, moved.segment_ids)} == {"meta"}
    assert (moved.num_targets, moved.num_tokens, moved.rows) == (2, 3, (4,))


# The law of the step


def step_gradient(model: nn.Module, rows: list[Encoded], size: int, packing: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one optimizer step, divided once by all its targets."""
    batches = micro_batches(rows, size, PAD, packing, capacity=24)
    num_targets = sum(b.num_targets for b in batches)
    total = 0.0
    for b in batches:
        hidden = model.hidden(b.input_ids, segment_ids=b.segment_ids, prefix_length=b.prefix_length)
        loss = head_loss_sum(hidden, model.lm_head, b.target_ids) / num_targets
        loss.backward()
        total += loss.item()
    return total, gradients(model)


@given(rows=data_rows(max_size=6), family=st.sampled_from(list(FAMILIES)), size=st.integers(1, 6), packing=st.booleans())
def test_no_cut_of_a_step_changes_its_gradient(rows, family, size, packing):
    """Cut into ``size`` rows at a time, padded or packed, equals all at once, padded: ragged rows, fp64, 1e-12."""
    assume(any(any(row.supervised[1:]) for row in rows))
    model = shared_with_lora(FAMILIES[family])
    loss, expected = step_gradient(model, rows, len(rows), False)
    other_loss, found = step_gradient(model, rows, size, packing)
    assert abs(other_loss - loss) <= 1e-12 * max(1.0, loss)
    assert_same(found, expected)


@given(
    beginning=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7),
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=5),
    family=st.sampled_from(list(FAMILIES)),
    seed=seeds,
)
def test_a_beginning_computed_once_changes_no_gradient(beginning, lengths, family, seed):
    """Stored once or once a row: the same loss and gradient, sliding windows and every family included, fp64, 1e-12."""
    draw = random.Random(seed)
    rests = [[draw.randrange(VOCAB) for _ in range(n)] for n in lengths]
    rows = [encoded(beginning + rest, [False] * (len(beginning) + 1) + [True] * (len(rest) - 1), 0) for rest in rests]
    model, P = shared_with_lora(FAMILIES[family]), shared_prefix(rows)
    assert len(beginning) <= P
    found = []
    for b in (collate(rows, PAD), collate_shared(rows, PAD, P), collate_shared(rows, PAD, 1)):
        hidden = model.hidden(b.input_ids, segment_ids=b.segment_ids, prefix_length=b.prefix_length)
        loss = head_loss_sum(hidden, model.lm_head, b.target_ids) / b.num_targets
        loss.backward()
        found.append((loss.item(), gradients(model)))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-12 * max(1.0, loss)
        assert_same(gradient, found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_by_one_equals_four_by_two_equals_one_by_eight(family):
    """One row of eight has a single target, another none at all: averaging means of means would show."""
    lengths = [9, 2, 5, 7, 3, 8, 4, 6]
    flags = [[j > n // 2 for j in range(n)] for n in lengths]
    flags[0] = [False] * 8 + [True]
    flags[3] = [False] * 7
    rows = [encoded([(7 * i + 3 * j) % VOCAB for j in range(n)], flags[i], i) for i, n in enumerate(lengths)]
    model = shared_with_lora(FAMILIES[family])
    loss, expected = step_gradient(model, rows, 8, False)
    for size, packing in ((1, False), (2, False), (2, True), (4, True), (8, True)):
        other_loss, found = step_gradient(model, rows, size, packing)
        assert abs(other_loss - loss) <= 1e-12 * loss
        assert_same(found, expected)


@given(rows=data_rows(max_size=4))
def test_step_loss_is_the_mean_over_targets(rows):
    """Against the definition: -log p of every supervised token given the row before it, each row alone."""
    assume(any(any(row.supervised[1:]) for row in rows))
    model = shared_with_lora(FAMILIES["llama"])
    terms = []
    for row in rows:
        log_p = torch.log_softmax(model(torch.tensor([row.input_ids]))[0], -1)
        terms += [-log_p[i - 1, token] for i, token in enumerate(row.input_ids) if i > 0 and row.supervised[i]]
    loss, _ = step_gradient(model, rows, 2, True)
    assert_close(torch.tensor(loss, dtype=torch.float64), torch.stack(terms).mean())


@pytest.mark.parametrize("token", [0, PAD])
def test_padding_is_known_by_its_place(token):
    """Rows that contain the padding id learn it like any other token."""
    batch = collate([encoded([1, token, token], [False, True, True], 1), encoded([2], [False], 2)], PAD)
    assert batch.target_ids.tolist() == [[token, token, IGNORE_INDEX], [IGNORE_INDEX] * 3]
    assert batch.segment_ids.tolist() == [[1, 1, 1], [1, 0, 0]]
