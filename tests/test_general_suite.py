"""Several metrics in one pass, plain text, and the suite of general ability, on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rows_files import write_jsonl
from tiny_folder import rows as chat_rows
from tiny_folder import write_model

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import EVAL_METRICS, LoRAConfig
from minisft.data.chat import resolve_template
from minisft.data.messages import read_dataset
from minisft.evaluation import evaluate as single
from minisft.evaluation import plain_text
from minisft.evaluation.general_suite import (
    SuiteData,
    cloze,
    distance,
    own_questions,
    read_mmlu,
    read_texts,
    run_suite,
    web_text,
)
from minisft.evaluation.paired import compare_paired
from minisft.evaluation.plain_text import Continuation, bits_per_byte, kl_per_token, log_probs, split_continuation, windows
from minisft.evaluation.several import ALL_METRICS, evaluate_all
from minisft.formats import load_model
from minisft.surgery import apply_lora_, scale_adapters_

pytestmark = pytest.mark.slow

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Ein Text mit Umlauten: äöüß.", "柏林是德国的首都。" * 3, "x" * 200]
HEADER = "The following are multiple choice questions (with answers) about  s.\n\n"
MMLU = [
    {"subject": "s", "input": f"{HEADER}One and\nmore?\nA. a1\nB. b two\nC. c\nD. d\nAnswer:", "output": "B"},
    {"question": "Two?", "choices": ["yes", "no"], "answer": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("suite")
    write_model(made / "model", made / "scratch")
    write_jsonl(made / "rows.jsonl", chat_rows(12))
    write_jsonl(made / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(made / "mmlu.jsonl", MMLU)
    return made


@pytest.fixture
def loaded(folder):
    model, tokenizer = load_model(folder / "model", torch.float32)
    return model.eval(), tokenizer, resolve_template(tokenizer)


def naive(model, ids, first):
    """sum log p of ids[first:], one token after another, in fp64."""
    total = 0.0
    for t in range(first, len(ids)):
        logits = model(torch.tensor([ids[:t]])).double()[0, -1]
        total += float(logits.log_softmax(-1)[ids[t]])
    return total


# --- plain text


def test_continuations_are_scored_token_by_token(loaded):
    model, tokenizer, _ = loaded
    parts = [split_continuation(tokenizer, "Question: x\nAnswer:", f" {c}") for c in ("yes", "no way")] + [
        Continuation([5], [7, 9, 11])
    ]
    with torch.inference_mode():
        expected = [naive(model, [*p.context, *p.target], len(p.context)) for p in parts]
    for batch_size in (1, 3):
        assert log_probs(model, parts, tokenizer.pad_id, batch_size) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_options_of_one_question_read_its_context_once(loaded, monkeypatch, batch_size):
    model, _, _ = loaded
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, 90, (n,), generator=draw).tolist()

    contexts = [ids(n) for n in (9, 12, 1, 30, 10)]
    parts = [Continuation(contexts[k], ids(n)) for n in (1, 3, 5, 2) for k in range(5)]  # families apart from each other
    tokens = 0
    hidden = model.hidden

    def counting(input_ids, **more):
        nonlocal tokens
        tokens += int((more["segment_ids"] > 0).sum())
        return hidden(input_ids, **more)

    monkeypatch.setattr(model, "hidden", counting)
    found = log_probs(model, parts, 0, batch_size)
    monkeypatch.undo()
    wanted = [naive(model, [*part.context, *part.target], len(part.context)) for part in parts]
    assert found == pytest.approx(wanted, rel=1e-5)
    apart = sum(len(part.context) + len(part.target) for part in parts)
    assert tokens == apart if batch_size == 1 else tokens < 0.8 * apart


@pytest.mark.parametrize("num_options", [1, 3])
def test_what_all_contexts_begin_with_is_computed_once(loaded, monkeypatch, num_options):
    model, _, _ = loaded
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 90, (n,), generator=draw).tolist()

    instruction = ids(20)
    # One context is the instruction and no more: its last token predicts, so it belongs to each part.
    contexts = [instruction + ids(n) for n in (4, 0, 9, 4)]
    parts = [Continuation(context, ids(2)) for context in contexts for _ in range(num_options)]
    seen = []
    hidden = model.hidden

    def counting(input_ids, **more):
        ids = more.get("segment_ids", torch.ones_like(input_ids))
        seen.append(int((ids > 0).sum()))
        return hidden(input_ids, **more)

    monkeypatch.setattr(model, "hidden", counting)
    found = log_probs(model, parts, 0, 2 * num_options)
    monkeypatch.undo()
    assert found == pytest.approx([naive(model, [*p.context, *p.target], len(p.context)) for p in parts], rel=1e-5)
    assert seen[0] == 19
    computed_once = 19 + sum(len(context) - 19 for context in contexts)
    # A batch shares the shortest of its prefixes, all but a context's last token at best.
    assert sum(seen) <= computed_once + num_options * (4 * 2 + 4 + 9)


def test_a_beginning_of_little_length_is_left_in_each_part(monkeypatch):
    monkeypatch.setattr(plain_text, "_sums", lambda model, families, pad_id, past: [0.0] * sum(map(len, families)))
    parts = [Continuation([1, k], [*range(40)]) for k in range(8)]
    assert log_probs(None, parts, 0) == [0.0] * 8  # type: ignore[arg-type]  # a model would be asked for a cache


def test_batches_of_questions_compute_little_more_than_each_alone(monkeypatch):
    """Forty contexts of 40 to 79 tokens with four options each: a batch shares only the shortest of its contexts."""
    made: list[tuple[int, int, int]] = []

    def sums(model, families, pad_id, past):
        made.append((plain_text._cost(families), sum(plain_text._cost([family]) for family in families), len(families)))
        return [0.0] * sum(map(len, families))

    monkeypatch.setattr(plain_text, "_sums", sums)
    parts = [Continuation([n, *range(1, n)], [k, 1, 2, 3]) for n in range(40, 80) for k in range(4)]
    assert log_probs(None, parts, 0, len(parts)) == [0.0] * len(parts)  # type: ignore[arg-type]
    assert sum(apart for _, apart, _ in made) == sum(
        n - 1 + 4 * (1 + 4) for n in range(40, 80)
    )  # a context's last token with each option
    assert all(cost <= apart + 32 * (joined - 1) for cost, apart, joined in made)
    assert len(made) < 20


def test_trailing_spaces_of_a_context_belong_to_the_continuation(loaded):
    tokenizer = loaded[1]
    assert split_continuation(tokenizer, "a  ", "b") == split_continuation(tokenizer, "a", "  b")
    empty = split_continuation(tokenizer, "", "ab")
    assert len(empty.context) == 1
    assert tokenizer.decode(empty.target) == "ab"


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_every_token_is_predicted_once_in_windows(loaded, size):
    tokenizer, text = loaded[1], "a text of some twenty tokens"
    parts = list(windows(tokenizer, text, size))
    assert [i for part in parts for i in part.target] == tokenizer.encode(text)
    assert all(len(part.context) + len(part.target) <= size + 1 for part in parts)
    assert all(part.context for part in parts)
    if len(parts) > 1:
        assert len(parts[-1].context) + len(parts[-1].target) == size + 1  # the last window has all the context it can have


def test_bits_per_byte_counts_utf8_bytes(loaded):
    model, tokenizer, _ = loaded
    found = bits_per_byte(model, tokenizer, TEXTS)
    for text, bits in zip(TEXTS, found, strict=True):
        ids = [tokenizer.eos_ids[0], *tokenizer.encode(text)]
        with torch.inference_mode():
            expected = -naive(model, ids, 1) / math.log(2) / len(text.encode())
        assert bits.per_byte == pytest.approx(expected, rel=1e-4)
        assert bits.num_bytes == len(text.encode())


def test_the_distance_to_oneself_is_zero_and_to_another_model_positive(loaded, folder):
    model, tokenizer, _ = loaded
    assert kl_per_token(model, model, tokenizer, TEXTS) == [0.0] * 4
    other = noisy(folder, 0.3)
    first = kl_per_token(model, other, tokenizer, TEXTS[:1])[0]
    ids = torch.tensor([[tokenizer.eos_ids[0], *tokenizer.encode(TEXTS[0])]])
    with torch.inference_mode():
        p, q = (m(ids).double()[0, :-1].log_softmax(-1) for m in (model, other))
    assert first == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert first > 0


def noisy(folder, scale):
    torch.manual_seed(0)
    model, _ = load_model(folder / "model", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(scale * parameter.std() * torch.randn_like(parameter))
    return model.eval()


# --- the suite


def test_questions_in_letter_form_become_cloze(folder):
    first, second = read_mmlu(folder / "mmlu.jsonl")
    assert (first.question, first.choices, first.answer) == ("One and\nmore?", ("a1", "b two", "c", "d"), 1)
    assert (second.question, second.choices, second.answer) == ("Two?", ("yes", "no"), 1)


def test_cloze_takes_the_likeliest_text_by_sum_and_by_characters(loaded, folder):
    model, tokenizer, _ = loaded
    questions = read_mmlu(folder / "mmlu.jsonl")
    result = cloze(model, tokenizer, questions, "mmlu")
    assert result.extra["form"] == "mmlu/cloze/plain/0-shot"
    for row, q in zip(result.rows, questions, strict=True):
        ids = [tokenizer.encode(f"Question: {q.question}\nAnswer: {c}") for c in q.choices]
        context = len(tokenizer.encode(f"Question: {q.question}\nAnswer:"))
        with torch.inference_mode():
            totals = [naive(model, i, context) for i in ids]
        assert row.prediction == q.choices[max(range(len(totals)), key=totals.__getitem__)]
        by_length = [t / len(c) for t, c in zip(totals, q.choices, strict=True)]
        assert row.extra["prediction_norm"] == q.choices[max(range(len(totals)), key=by_length.__getitem__)]


def test_an_adapter_at_scale_0_is_the_base_bit_for_bit(loaded, folder):
    model, tokenizer, template = loaded
    data = SuiteData(read_mmlu(folder / "mmlu.jsonl"), "mmlu", read_texts(folder / "texts.jsonl"), "texts")
    before = run_suite(model, tokenizer, template, data)
    adapted, _ = load_model(folder / "model", torch.float32)
    apply_lora_(adapted, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = run_suite(adapted.eval(), tokenizer, template, data, model)
    assert changed["bits_per_byte"].score != before["bits_per_byte"].score
    assert changed["kl"].score > 0
    scale_adapters_(adapted, 0.0)
    assert run_suite(adapted, tokenizer, template, data) == before


def test_a_planted_forgetting_is_seen_by_bits_per_byte_where_questions_see_nothing(loaded, folder):
    """The same noise on every weight: sixty questions stay within their interval, paired texts do not."""
    model, tokenizer, template = loaded
    worse = noisy(folder, 0.05)
    texts = [(i, f"{TEXTS[i % 4]} {i} {'abcdefgh'[i % 8] * (i % 13)}") for i in range(120)]
    bits = [[r.score for r in web_text(m, tokenizer, texts, "t").rows] for m in (model, worse)]
    questions = [[r.score for r in own_questions(m, tokenizer, template).rows] for m in (model, worse)]
    by_text, by_question = compare_paired(bits[0], bits[1]), compare_paired(questions[0], questions[1])
    assert by_text.p_value < 0.001
    assert by_question.p_value > 0.05


# --- several metrics


def test_the_flags_know_the_metrics():
    assert set(EVAL_METRICS) == set(ALL_METRICS)


def test_several_metrics_are_those_of_single_passes(loaded, folder, monkeypatch):
    model, tokenizer, template = loaded
    examples = read_dataset(folder / "rows.jsonl").examples
    calls = []
    monkeypatch.setattr("minisft.evaluation.several.evaluate", lambda *a, **k: calls.append(a[4]) or single.evaluate(*a, **k))
    found = evaluate_all(
        model, tokenizer, template, examples, ["exact_match", "f1", "label", "choice", "loss"], max_new_tokens=4
    )
    assert calls == ["exact_match", "choice", "loss"]  # the model answered once
    for metric in ("exact_match", "f1", "choice", "loss"):
        alone = single.evaluate(model, tokenizer, template, examples, metric, max_new_tokens=4)
        assert found[metric].score == alone.score
        assert [r.score for r in found[metric].rows] == [r.score for r in alone.rows]
    assert len(found["f1"].extra["interval_95"]) == 2
    bits = evaluate_all(model, tokenizer, template, examples, ["bits_per_byte"])["bits_per_byte"]
    nats = sum(r.score * r.extra["tokens"] for r in found["loss"].rows)
    total = sum(len(e.messages[-1].content.encode()) for e in examples)
    assert sum(r.score * r.extra["bytes"] for r in bits.rows) == pytest.approx(nats / math.log(2))
    assert sum(r.extra["bytes"] for r in bits.rows) == total


def test_the_command_scores_several_metrics_by_cluster(folder, tmp_path, capsys):
    words = ["eval", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--max-new-tokens", "3"]
    rest = ["--metric", "exact_match", "f1", "--cluster", "id", "--out", str(tmp_path / "r.json")]
    assert main([*words, *rest]) == 0
    assert "f1 0." in capsys.readouterr().out
    head = json.loads((tmp_path / "r.f1.json").read_text())
    assert head["clusters"] == 12
    assert set(head) >= {"interval_95", "form", "data_sha256", "template_sha256", "decoding"}
    assert len((tmp_path / "r.exact_match.rows.jsonl").read_text().splitlines()) == 12


def test_the_suite_runs_and_its_parts_can_be_compared(folder, tmp_path, capsys):
    files = ["--mmlu", str(folder / "mmlu.jsonl"), "--texts", str(folder / "texts.jsonl")]
    words = ["eval", "--suite", "general", "--model", str(folder / "model"), *files]
    assert main([*words, "--base", str(folder / "model"), "--out", str(tmp_path / "a.json")]) == 0
    assert main([*words, "--out", str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "mmlu/cloze/plain/0-shot" in printed
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["kl"]["score"] == 0.0
    pair = [str(tmp_path / f"{name}.bits_per_byte.rows.jsonl") for name in "ab"]
    assert main(["compare", *pair, "--out", str(tmp_path / "cmp")]) in (0, 9)
    other = [str(tmp_path / "a.bits_per_byte.rows.jsonl"), str(tmp_path / "a.kl.rows.jsonl")]
    assert main(["compare", *other, "--out", str(tmp_path / "cmp2")]) == 3  # another metric


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"input": "no options", "output": "A"}, "data/bad-question"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "data/bad-question"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "data/bad-question"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "data/bad-question"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, code):
    with pytest.raises(UserError, match=code):
        read_mmlu(write_jsonl(tmp_path / "q.jsonl", [row]))


def test_bad_texts_are_named(tmp_path):
    with pytest.raises(UserError, match="data/no-text"):
        read_texts(write_jsonl(tmp_path / "t.jsonl", [{"text": " "}]))
    with pytest.raises(UserError, match="data/no-rows"):
        read_texts(write_jsonl(tmp_path / "e.jsonl", []))


def test_distance_reads_forty_texts_at_most(loaded):
    model, tokenizer, _ = loaded
    assert distance(model, model, tokenizer, [(i, "abc") for i in range(50)]).n == 40


def test_a_row_knows_what_was_asked(loaded, folder):
    """Another system message is another prompt; the suite's rows know their question and their text."""
    model, tokenizer, template = loaded
    examples = read_dataset(folder / "rows.jsonl", keep_duplicates=True).examples
    plain, same, other = (
        evaluate_all(model, tokenizer, template, examples, ["exact_match", "loss"], max_new_tokens=2, limit=3, system=system)
        for system in (None, None, "Answer briefly.")
    )
    for metric in ("exact_match", "loss"):
        digests = [[row.extra["prompt_sha256"] for row in found[metric].rows] for found in (plain, same, other)]
        assert digests[0] == digests[1]
        assert not set(digests[0]) & set(digests[2])
        assert len(set(digests[0])) == 3
    texts = web_text(model, tokenizer, read_texts(folder / "texts.jsonl"), "t")
    questions = cloze(model, tokenizer, read_mmlu(folder / "mmlu.jsonl"), "m")
    assert len({row.extra["prompt_sha256"] for row in (*texts.rows, *questions.rows)}) == len(TEXTS) + len(MMLU)
