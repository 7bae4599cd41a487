"""Scores of rows by a model: by hand on models whose losses are known, and what must not change them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import byte_tokenizer
from tiny_folder import write_model
from torch import Tensor, nn

from minisft.common.errors import UserError
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.messages import Example, Message
from minisft.formats import load_model
from minisft.model import CausalLM
from minisft.selection.score_file import ScoreLog, read_scores, to_line, write_scores
from minisft.selection.scores import Judge, RowScore, score_rows


class Bigram(nn.Module):
    """log p(next | this token) from a table: nothing else of the text matters. Shaped like ``CausalLM`` for the judge."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.table = table.log_softmax(-1)
        self.lm_head = nn.Identity()
        self.config = type("Config", (), {"max_position_embeddings": 400, "num_layers": 1})()
        self.model = nn.Module()
        self.model.norm = nn.LayerNorm(1)
        self.loss_head = self.lm_head

    def hidden(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        return self.table[input_ids]


class Copier(Bigram):
    """Repeats: after a token that stood in the text before, what followed it then is near certain; else as the bigram table."""

    def hidden(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        out = self.table[input_ids].clone()
        for b, ids in enumerate(input_ids.tolist()):
            for t in range(len(ids)):
                earlier = [i for i in range(t) if ids[i] == ids[t] and ids[i - 1 : i] == ids[t - 1 : t]]
                if earlier:
                    boost = out[b, t].clone()
                    boost[ids[earlier[-1] + 1]] += 12
                    out[b, t] = boost.log_softmax(-1)
        return out


def chat(prompt: str, answer: str, row: int = 1) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), row)


def judge(model: nn.Module, batch_size: int = 4, max_length: int = 400, states: bool = False) -> Judge:
    tokenizer = byte_tokenizer()
    return Judge(model, tokenizer, resolve_template(tokenizer, "chatml"), max_length, batch_size, True, states)  # type: ignore[arg-type]


def scores(who: Judge, examples: Sequence[Example]) -> list[RowScore]:
    found = {s.row: s for part in score_rows(who, examples, range(len(examples))) for s in part}
    assert sorted(found) == list(range(len(examples)))
    return [found[i] for i in sorted(found)]


@pytest.fixture(scope="module")
def bigram() -> Bigram:
    return Bigram(byte_tokenizer().vocab_size)


def test_loss_is_the_mean_of_the_tables_entries(bigram: Bigram) -> None:
    example = chat("What?", "abc")
    (score,) = scores(judge(bigram), [example])
    encoded = encode_chat(byte_tokenizer(), judge(bigram).template, example.messages)
    ids = encoded.input_ids
    entries = [-bigram.table[ids[t - 1], ids[t]] for t in range(1, len(ids)) if encoded.supervised[t]]
    assert score.targets == len(entries) == 4  # a, b, c and the end of the turn
    assert score.loss == pytest.approx(float(sum(entries)) / 4, abs=1e-5)
    assert score.tokens == len(ids)


def test_a_prompt_that_cannot_matter_gives_exactly_one(bigram: Bigram) -> None:
    for score in scores(judge(bigram), [chat("one thing", "another"), chat("x" * 50, "yes"), chat("", "no")]):
        assert score.ifd == 1.0
        assert score.pmi == 0.0
        assert score.ppl_ifd == 1.0


def test_a_prompt_that_holds_the_answer_gives_less_than_one() -> None:
    model = Copier(byte_tokenizer().vocab_size)
    holds, other = scores(judge(model), [chat("the code is qwxz5678", "qwxz5678"), chat("the code is mnbv1234", "qwxz5678")])
    assert holds.ifd is not None
    assert other.ifd is not None
    assert holds.pmi is not None
    assert holds.ifd < 0.5 < 0.9 < other.ifd
    assert holds.pmi > 1
    assert holds.loss_alone == other.loss_alone  # the same answer without a prompt


@given(st.floats(0.01, 20), st.floats(0.01, 20))
def test_both_forms_come_from_the_same_two_means(loss: float, alone: float) -> None:
    score = RowScore(0, 9, 4, loss, alone)
    assert score.ifd == loss / alone
    assert score.pmi is not None
    assert score.ppl_ifd == pytest.approx(math.exp(-score.pmi)) == pytest.approx(math.exp(loss) / math.exp(alone))


def test_the_answer_alone_keeps_its_template_and_all_its_tokens(bigram: Bigram) -> None:
    """A template without any markup: a start token stands before an answer that nothing precedes."""
    tokenizer = byte_tokenizer()
    plain = replace(judge(bigram), template=resolve_template(tokenizer, "plain"))
    (score,) = scores(plain, [chat("Q: why? ", "because")])
    assert score.loss_alone is not None
    first, start = tokenizer.encode("b")[0], tokenizer.bos_id
    rest = [start, *tokenizer.encode("because"), tokenizer.special_tokens["<|im_end|>"]]
    expected = -sum(bigram.table[a, b] for a, b in itertools.pairwise(rest)) / (len(rest) - 1)
    assert rest[1] == first
    assert score.loss_alone == pytest.approx(float(expected), abs=1e-5)


def test_rows_without_a_score_have_a_reason_and_are_never_cut(bigram: Bigram) -> None:
    context = Example((Message("user", "a"), Message("assistant", "b", train=False)), 1)
    found = scores(judge(bigram, max_length=60), [chat("x" * 100, "yes"), context, chat("short", "yes")])
    assert found[0].reason.startswith("too long: ")
    assert found[1].reason == "no supervised token"
    assert [s.loss is None for s in found] == [True, True, False]


def test_a_loss_that_is_no_number_is_an_error(bigram: Bigram) -> None:
    broken = Bigram(byte_tokenizer().vocab_size)
    broken.table = broken.table * math.nan
    with pytest.raises(UserError, match=r"numeric/non-finite-loss.*row 1"):
        scores(judge(broken), [chat("a", "b")])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    return write_model(folder / "model", folder / "scratch")


def tiny_judge(folder: Path, batch_size: int) -> Judge:
    model, tokenizer = load_model(folder)
    assert isinstance(model, CausalLM)
    return Judge(model.eval(), tokenizer, resolve_template(tokenizer), 300, batch_size, True, True)


@pytest.mark.slow
def test_neither_the_batch_nor_its_padding_nor_the_order_changes_a_score(model_folder: Path) -> None:
    examples = [chat("q" * (1 + 7 * i % 40), "answer "[: 1 + i % 7] * (1 + i % 5), i) for i in range(23)]
    alone, together = scores(tiny_judge(model_folder, 1), examples), scores(tiny_judge(model_folder, 9), examples)
    backwards = scores(tiny_judge(model_folder, 5), examples[::-1])[::-1]
    for a, b, c in zip(alone, together, backwards, strict=True):
        assert (a.tokens, a.targets) == (b.tokens, b.targets) == (c.tokens, c.targets)
        assert a.loss == pytest.approx(b.loss, abs=2e-5) == pytest.approx(c.loss, abs=2e-5)
        assert a.loss_alone == pytest.approx(b.loss_alone, abs=2e-5)
        assert a.state is not None
        assert b.state is not None
        assert np.allclose(a.state.astype(float), b.state.astype(float), atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_threads_change_no_score(model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder)
    judge = Judge(model.eval().requires_grad_(False), tokenizer, resolve_template(tokenizer), 400, 4, True, True)
    rows = [Example((Message("user", "ab" * i), Message("assistant", "cd" * (i % 5 + 1))), i) for i in range(1, 12)]

    def scored() -> list[RowScore]:
        return sorted(itertools.chain.from_iterable(score_rows(judge, rows, range(len(rows)))), key=lambda s: s.row)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = scored()
        torch.set_num_threads(2)
        two = scored()
    finally:
        torch.set_num_threads(before)
    assert [replace(score, state=None) for score in one] == [replace(score, state=None) for score in two]
    for a, b in zip(one, two, strict=True):
        assert a.state is not None
        np.testing.assert_allclose(a.state, b.state, atol=1e-3)


def test_a_state_is_the_mean_over_the_rows_own_tokens(model_folder: Path) -> None:
    who = tiny_judge(model_folder, 2)
    examples = [chat("short", "a"), chat("a much longer prompt than the other", "bbb")]
    found = scores(who, examples)
    for score, example in zip(found, examples, strict=True):
        ids = torch.tensor([encode_chat(who.tokenizer, who.template, example.messages).input_ids])
        seen: list[Tensor] = []
        hook = who.model.model.layers[0].register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
        with torch.inference_mode():
            who.model.hidden(ids)
        hook.remove()
        assert score.state is not None
        assert np.allclose(score.state.astype(float), seen[0].mean(0).numpy(), atol=2e-3, rtol=2e-3)


# ---- on the disk ----

NAME = {"data_sha256": "a", "model": "b", "alone": True}


def some_scores() -> list[RowScore]:
    return [RowScore(i, 10 + i, 3, 1.5 + i, 2.0, state=np.arange(3, dtype=np.float16)) for i in range(4)] + [
        RowScore(4, 99, 9, reason="too long")
    ]


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.jsonl", NAME, (to_line(s, s.row + 1) for s in some_scores()))
    for score in read_scores(tmp_path / "s.jsonl", NAME, strict=True).values():
        expected = some_scores()[score.row]
        assert replace(score, state=None) == replace(expected, state=None)
        assert np.array_equal(score.state, expected.state) if expected.state is not None else score.state is None


def test_a_killed_run_goes_on_without_its_broken_last_line(tmp_path: Path) -> None:
    log = ScoreLog(tmp_path / "s.partial", NAME)
    log.add(some_scores()[:3])
    log.close()
    with (tmp_path / "s.partial").open("ab") as file:
        file.write(to_line(some_scores()[3], 0)[:20])
    again = ScoreLog(tmp_path / "s.partial", NAME)
    assert sorted(again.done) == [0, 1, 2]
    again.add(some_scores()[3:])
    again.close()
    assert sorted(read_scores(tmp_path / "s.partial", NAME, strict=True)) == [0, 1, 2, 3, 4]
    assert len((tmp_path / "s.partial").read_bytes().splitlines()) == 6


@pytest.mark.parametrize("key", list(NAME))
def test_scores_of_other_data_or_another_model_are_not_used(tmp_path: Path, key: str) -> None:
    log = ScoreLog(tmp_path / "s.partial", NAME)
    log.add(some_scores())
    log.close()
    other = {**NAME, key: "c"}
    with pytest.raises(UserError, match=rf"data/other-scores.*{key}"):
        read_scores(tmp_path / "s.partial", other, strict=True)
    fresh = ScoreLog(tmp_path / "s.partial", other)
    assert not fresh.done
    fresh.remove()
    assert not (tmp_path / "s.partial").exists()
    json.dumps(other)


# ---- the pretrained model ----

PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("Write a short poem about the sea.", "The waves roll in, the salt winds sing, and gulls cry out on silver wing."),
    ("How do I boil an egg?", "Put the egg in boiling water for eight minutes, then cool it under cold water."),
    ("Translate 'good morning' to Spanish.", "'Good morning' in Spanish is 'buenos d\u00edas'."),
    ("What do bees make?", "Bees make honey and beeswax."),
    ("Why is the sky blue?", "Air scatters blue sunlight more than red, so the sky looks blue."),
    ("Name three colors of the rainbow.", "Red, green and violet are three colors of the rainbow."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is 12 plus 7?", "12 plus 7 equals 19."),
    ("How can I sleep better?", "Go to bed at the same time each night and avoid screens before sleep."),
    ("What is photosynthesis?", "Photosynthesis is how plants turn sunlight, water and carbon dioxide into sugar."),
)


@pytest.mark.smollm2
@pytest.mark.exhaustive
def test_an_answer_of_another_row_fits_its_prompt_less(smollm2_path: Path) -> None:
    """AUC of pmi, swapped against clean: above one half with its whole interval, by resampling of rows."""
    swapped = [(question, PAIRS[(i + 5) % len(PAIRS)][1]) for i, (question, _) in enumerate(PAIRS)]
    examples = [
        Example((Message("user", question), Message("assistant", answer)), i)
        for i, (question, answer) in enumerate((*PAIRS, *swapped), 1)
    ]
    model, tokenizer = load_model(smollm2_path)
    judge = Judge(model.eval().requires_grad_(False), tokenizer, resolve_template(tokenizer), 256, 12, True, False)
    scores = sorted(itertools.chain.from_iterable(score_rows(judge, examples, range(len(examples)))), key=lambda s: s.row)
    clean, wrong = np.split(np.array([score.pmi for score in scores]), 2)
    above_one = [np.mean([score.ifd > 1 for score in part]) for part in (scores[: len(PAIRS)], scores[len(PAIRS) :])]
    draw = np.random.default_rng(0).integers(0, len(PAIRS), (2000, 2, len(PAIRS)))
    aucs = [(clean[a][:, None] > wrong[b][None, :]).mean() for a, b in draw]
    assert np.quantile(aucs, 0.025) > 0.7
    assert (wrong < 0).mean() > (clean < 0).mean()
    assert above_one[1] > above_one[0]
