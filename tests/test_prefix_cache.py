"""What a server keeps of earlier requests: found by its beginning, within its memory, and without a change to any answer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisft.cli.main import main
from minisft.config import LoRAConfig
from minisft.evaluation.compressed import decode_compressed_
from minisft.evaluation.fast_decode import fast_decode_
from minisft.generation import Sampling, generate, read_prompts, read_suffixes
from minisft.kernels import cpu_build
from minisft.model import CausalLM, KVCache
from minisft.serving import batch, prefix_cache
from minisft.serving.batch import Batch, Job, Piece
from minisft.serving.lanes import Lane, sharing_copy
from minisft.serving.prefix_cache import MIN_SHARED, PrefixCache
from minisft.surgery import apply_lora_, lora_modules
from tests.test_native_decode import FAMILIES

CONFIG = replace(FAMILIES["llama"], max_position_embeddings=256)
EOS = 1
LONG = [2 + n % 20 for n in range(50)]


def built(**changes: object) -> CausalLM:
    return tiny.build(replace(CONFIG, **changes), torch.float32).eval().requires_grad_(False)


class Words:
    """A tokenizer as far as a batch asks one."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def lane_of(model: CausalLM) -> Lane:
    return Lane("m", model, Words(), None, frozenset([EOS]))  # type: ignore[arg-type]


class Asked:
    """Requests of a batch, and what they were given."""

    def __init__(self, max_bytes: int = 10**9) -> None:
        self.cache = PrefixCache(max_bytes)
        self.batches: dict[int, Batch] = {}

    def start(self, model: CausalLM, *prompts: list[int], tokens: int = 6, choices: int = 1) -> list[Job]:
        rows = self.batches.setdefault(id(model), Batch(model, self.cache))
        jobs = [Job(lane_of(model), p, choices, tokens, Sampling(), (), None, lambda _: None) for p in prompts]
        rows.admit(jobs)
        return jobs

    def rows(self, model: CausalLM) -> list[list[int]]:
        """What all rows say until they end, row by row as they were admitted."""
        going = self.batches[id(model)]
        rows = list(going.rows)
        while going.rows:
            going.step()
        return [row.ids for row in rows]

    def __call__(self, model: CausalLM, *prompts: list[int], **more: int) -> tuple[list[list[int]], list[int]]:
        jobs = self.start(model, *prompts, **more)
        order = {id(job.prompt): i for i, job in enumerate(jobs)}
        rows = list(self.batches[id(model)].rows)
        said = self.rows(model)
        found: list[list[int]] = [[] for _ in jobs]
        for row, ids in zip(rows, said, strict=True):
            if (place := order.get(id(row.job.prompt))) is not None:
                found[place] = ids
        return found, [job.num_cached for job in jobs]


def wanted(model: CausalLM, *prompts: list[int], tokens: int = 6) -> list[list[int]]:
    return generate(model, prompts, max_new_tokens=tokens, eos_ids=(EOS,))


def test_the_next_turn_computes_what_is_new() -> None:
    model, asked = built(), Asked()
    first, known = asked(model, LONG)
    assert (first, known) == (wanted(model, LONG), [0])
    turn = [*LONG, *first[0], 5, 6, 7]
    second, known = asked(model, turn)
    assert second == wanted(model, turn)
    assert known == [len(LONG) + len(first[0]) - 1]  # the last token that was written was never read
    again, known = asked(model, turn)
    assert (again, known) == (second, [len(turn) - 1])
    assert len(asked.cache._rows) == 1  # a chat is kept once, as far as it has come


def test_edits_and_other_chats_use_the_beginning_that_is_the_same() -> None:
    model, asked = built(), Asked()
    asked(model, LONG)
    for cut in (MIN_SHARED - 1, MIN_SHARED, 40):
        prompt = [*LONG[:cut], 25, 26]
        said, known = asked(model, prompt)
        assert said == wanted(model, prompt)
        assert known == [cut if cut >= MIN_SHARED else 0]


def test_known_and_new_prompts_of_any_lengths_together() -> None:
    """Their rows stand in one batch with those already there, each at positions of its own."""
    model, asked = built(), Asked()
    asked(model, LONG, LONG[::-1])
    prompts = [[*LONG[:cut], 20, *range(2, 2 + more)] for cut, more in ((45, 3), (33, 14), (50, 1))]
    prompts += [[*LONG[::-1][:40], 3], [9, 8, 7], [4] * 60]
    asked.start(model, [5, 5, 6], tokens=12)
    row = asked.batches[id(model)].rows[0]
    asked.batches[id(model)].step()
    said, known = asked(model, *prompts)
    assert row.ids == wanted(model, [5, 5, 6], tokens=12)[0]
    assert known == [45, 33, 50, 40, 0, 0]
    assert said == wanted(model, *prompts)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 9)), min_size=1, max_size=8))
def test_no_answer_changes_whatever_came_before(requests: list[tuple[int, int, int]]) -> None:
    model, asked = SHARED, Asked(40_000)
    for start, length, more in requests:
        prompt = [*BASES[start][:length], *range(3, 3 + more)]
        said, _ = asked(model, prompt, tokens=3)
        assert said == wanted(model, prompt, tokens=3)


SHARED = built()
BASES = [[random.Random(seed // 2).randrange(2, 20) for _ in range(60)] for seed in range(4)]


def test_several_choices_are_read_once_and_kept_once() -> None:
    """Drawn ones, which differ."""
    model, asked = built(), Asked()
    asked(model, LONG)
    rows_of, sampling = asked.batches[id(model)], Sampling(temperature=1.0, seed=3)
    prompts = [*LONG, 3], [*LONG[:40], 9]
    jobs = [Job(lane_of(model), prompt, 3, 6, sampling, (), None, lambda _: None) for prompt in prompts]
    rows_of.admit(jobs)
    assert [row.choice for row in rows_of.rows] == [0, 1, 2] * 2
    said = asked.rows(model)
    drawn = [generate(model, [p] * 3, max_new_tokens=6, eos_ids=(EOS,), temperature=1.0, seed=3) for p in prompts]
    assert said == [*drawn[0], *drawn[1]]
    assert len(set(map(tuple, said))) > 3
    assert [job.num_cached for job in jobs] == [50, 40]
    assert len(asked.cache._rows) == 3  # with that of the request before, which went on in another way


def test_prompts_that_share_more_than_is_known_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, computed = built(), Asked(), list[int]()
    asked(model, LONG)
    hidden = CausalLM.hidden

    def counting(self: CausalLM, input_ids: torch.Tensor, **more: object) -> torch.Tensor:
        computed.append(input_ids.numel())
        return hidden(self, input_ids, **more)

    document = [*LONG[:40], *[3, 7, 11] * 20]
    prompts = [[*document, n, 4] for n in range(5)]
    right = wanted(model, *prompts)
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "hidden", counting)
        asked.start(model, *prompts)
    assert sum(computed) == 60 + 5 * 2
    assert asked.rows(model) == right


def test_scores_over_long_prefixes_have_a_limit() -> None:
    """New tokens are few, and each looks at all that is known."""
    model = built()
    jobs = [Job(lane_of(model), [1] * 4000, 1, 1, Sampling(), (), None, lambda _: None) for _ in range(6)]
    for job in jobs:
        job.num_cached = 3700
    sizes = [len(group) for group in batch._groups(jobs)]
    assert sizes == [1] * 6
    for job in jobs:
        job.num_cached = 3900
    assert [len(group) for group in batch._groups(jobs)] == [5, 1]


def test_models_do_not_read_each_others_keys() -> None:
    base = built()
    other = sharing_copy(base)
    apply_lora_(other, LoRAConfig(rank=3, alpha=9.0))
    for layer in lora_modules(other).values():
        torch.nn.init.normal_(layer.lora_B)
    other.eval()
    asked = Asked()
    assert asked(base, LONG) == (wanted(base, LONG), [0])
    assert asked(other, LONG) == (wanted(other, LONG), [0])
    assert asked(base, LONG) == (wanted(base, LONG), [49])
    assert wanted(base, LONG) != wanted(other, LONG)


def test_a_row_that_nobody_waits_for_is_kept_as_far_as_it_came() -> None:
    model, asked = built(), Asked()
    (job,) = asked.start(model, LONG, tokens=20)
    for _ in range(4):
        asked.batches[id(model)].step()
    ids = [*LONG, *asked.batches[id(model)].rows[0].ids]
    job.cancelled = True
    asked.batches[id(model)].step()
    assert [row.ids.tolist() for row in asked.cache._rows] == [ids]  # all four were read by the step after them
    prompt = [*ids, 3, 4]
    assert asked(model, prompt) == (wanted(model, prompt), [len(ids)])


@pytest.mark.skipif(cpu_build.load().reason != "", reason="needs the compiled library")
def test_rounded_weights_leave_no_keys_behind() -> None:
    """Prompts are read with the weights as they are; what steps wrote is read again."""
    model, asked = built(), Asked()
    fast_decode_(model, [[1, 2, 3]])
    said, _ = asked(model, LONG)
    turn = [*LONG, *said[0], 3]
    assert asked(model, turn) == (wanted(model, turn), [len(LONG)])
    cache, _ = read_prompts(model, [LONG], 0)
    (kept,) = [row for row in asked.cache._rows if row.ids.tolist()[: len(LONG)] == LONG]
    tiny.assert_close(kept.cache.keys[:, 0, :, : len(LONG)], cache.keys[:, 0], 1e-6)


@pytest.mark.skipif(cpu_build.load().reason != "", reason="needs the compiled library")
def test_exact_copies_leave_all_keys_behind() -> None:
    """Exact copies are the same numbers: what steps wrote with them is not read again."""
    model, asked = built().bfloat16().float(), Asked()
    said = wanted(model, LONG)[0]
    turn = [*LONG, *said, 3]
    answer = wanted(model, turn)
    assert decode_compressed_(model).num_weights > 0
    assert asked(model, LONG) == ([said], [0])
    assert asked(model, turn) == (answer, [len(LONG) + len(said) - 1])


# ---- the store -----------------------------------------------------------------------------------------------------------


def row_of(model: CausalLM, ids: list[int]) -> KVCache:
    """A row whose keys tell its ids."""
    cache = model.new_cache(1, len(ids))
    cache.keys[:] = torch.tensor(ids, dtype=torch.float32)[:, None]
    cache.values[:] = -cache.keys
    cache.lengths[:] = len(ids)
    return cache


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


ids_st = st.lists(st.integers(0, 1), min_size=MIN_SHARED - 2, max_size=MIN_SHARED + 6)


@given(st.lists(st.tuples(st.booleans(), ids_st), max_size=12), st.integers(0, 5))
def test_the_store_against_lists(steps: list[tuple[bool, list[int]]], capacity: int) -> None:
    """By another road: rows as lists in the order of their use, compared token by token."""
    one = sum(x.nbytes for x in (row_of(SHARED, [0]).keys, row_of(SHARED, [0]).values))
    limit = capacity * MIN_SHARED * one
    store, model_rows = PrefixCache(limit), list[list[int]]()
    for is_find, ids in steps:
        if is_find:
            commons = [
                next((i for i, (a, b) in enumerate(zip(r, ids[:-1], strict=False)) if a != b), min(len(r), len(ids) - 1))
                for r in model_rows
            ]
            found = store.find(SHARED, ids)
            longest = max(commons, default=0)
            assert (found is None) == (longest < MIN_SHARED)
            if found is not None:
                assert int(found.lengths) == longest
                assert found.keys[0, 0, 0, :, 0].tolist() == ids[:longest]
                assert found.values[-1, 0, -1, :, -1].tolist() == [-i for i in ids[:longest]]
                last = max(i for i, n in enumerate(commons) if n == longest)
                model_rows.append(model_rows.pop(last))
        else:
            store.keep(SHARED, ids, row_of(SHARED, ids))
            if len(ids) >= MIN_SHARED and len(ids) * one <= limit and not any(r[: len(ids)] == ids for r in model_rows):
                model_rows = [r for r in model_rows if ids[: len(r)] != r] + [ids]
                while sum(map(len, model_rows)) * one > limit:
                    model_rows.pop(0)
        assert [row.ids.tolist() for row in store._rows] == model_rows
        assert store.num_bytes == sum(map(len, model_rows)) * one <= limit


def test_what_is_kept_is_a_copy() -> None:
    """A row lies in a cache that goes on being written."""
    store, row = PrefixCache(10**9), row_of(SHARED, LONG)
    store.keep(SHARED, LONG, row)
    row.keys.zero_()
    found = store.find(SHARED, LONG)
    assert found is not None
    assert found.keys[0, 0, 0, :, 0].tolist() == LONG[:-1]


def test_nothing_is_kept_of_models_without_keys() -> None:
    class Foreign(CausalLM):
        pass

    model = Foreign(CONFIG).eval()
    store = PrefixCache(10**9)
    store.keep(model, LONG, row_of(SHARED, LONG))
    assert store.num_bytes == 0


def test_without_memory_nothing_is_kept() -> None:
    asked = Asked(0)
    for _ in range(2):
        assert asked(SHARED, LONG) == (wanted(SHARED, LONG), [0])


ALL = {**tiny.FAMILIES, "gemma3": tiny.GEMMA3, "smollm3": tiny.SMOLLM3, "window": replace(tiny.LLAMA, sliding_window=7)}


LENGTHS = [((50, 30), (20, 19), (2, 1), (1, 0)), ((50, 49), (40, 1)), ((600, 3), (530, 529), (40, 5))]  # of prompts; known


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_suffixes_of_any_length_are_read_as_whole_prompts_are(name: str, lengths: tuple[tuple[int, int], ...]) -> None:
    """Of windows, of RoPE of two kinds, and longer than what is read at once."""
    model = tiny.build(replace(ALL[name], max_position_embeddings=700)).eval().requires_grad_(False)
    draw = random.Random(5)
    prompts = [[draw.randrange(2, 20) for _ in range(length)] for length, _ in lengths]
    pasts = [read_prompts(model, [p], 0)[0].part(0, known) for p, (_, known) in zip(prompts, lengths, strict=True)]
    cache, found = read_suffixes(model, prompts, pasts, 1)
    tiny.assert_close(found, torch.cat([model.hidden(torch.tensor([p]))[:, -1] for p in prompts]), 1e-11)
    assert cache.lengths.tolist() == [length for length, _ in lengths]
    for row, prompt in enumerate(prompts):
        alone = model.new_cache(1, len(prompt))
        model.hidden(torch.tensor([prompt]), cache=alone)
        tiny.assert_close(cache.part(row, len(prompt)).keys, alone.keys, 1e-11)
    wanted_next = torch.cat([model.hidden(torch.tensor([[*p, 3]]))[:, -1:] for p in prompts])
    tiny.assert_close(model.hidden(torch.tensor([[3]] * len(prompts)), cache=cache), wanted_next, 1e-11)


def test_a_row_larger_than_the_memory_pushes_nothing_out() -> None:
    one = sum(x.nbytes for x in (row_of(SHARED, [0]).keys, row_of(SHARED, [0]).values))
    store = PrefixCache(100 * one)
    store.keep(SHARED, LONG, row_of(SHARED, LONG))
    longer = [*LONG, *range(60)]
    store.keep(SHARED, longer, row_of(SHARED, longer))
    assert [row.ids.tolist() for row in store._rows] == [LONG]


def test_rows_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_KEPT_ROWS", 2)
    store = PrefixCache(10**9)
    rows = [[n, *LONG] for n in range(4)]
    for ids in rows:
        store.keep(SHARED, ids, row_of(SHARED, ids))
    assert [row.ids.tolist() for row in store._rows] == rows[2:]


def test_a_negative_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette")
    assert main(["serve", "--model", "x", "--prefix-cache-mb", "-1"]) == 2
    assert "--prefix-cache-mb" in capsys.readouterr().err


def test_pieces_are_as_before() -> None:
    """A batch tells the same to whoever asked, known or not."""
    model, asked, told = built(), Asked(), [list[Piece | None](), list[Piece | None]()]
    for pieces in told:
        rows = asked.batches.setdefault(id(model), Batch(model, asked.cache))
        rows.admit([Job(lane_of(model), LONG, 1, 5, Sampling(), (), 2, pieces.append)])
        while rows.rows:
            rows.step()
    first, second = told
    assert len(first) == 5
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert (a.text, a.finish) == (b.text, b.finish)
        assert a.score is None or a.score.log_prob == pytest.approx(b.score.log_prob, abs=1e-5)
