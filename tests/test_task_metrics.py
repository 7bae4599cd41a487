"""Label metrics, BLEU, chrF and ROUGE: scikit-learn, sacrebleu and rouge-score are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.evaluation import text_metrics
from minisft.evaluation.label_metrics import confusion_codes, label_scores, table_of
from minisft.evaluation.rescore import rescore, with_interval
from minisft.evaluation.results import EvalResult, RowResult
from minisft.evaluation.statistics import bootstrap_mean, wilson_interval

LABELS = ["a", "b", "c", "d"]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS[:3]), st.sampled_from([*LABELS, "elsewhere"])), min_size=1, max_size=60)


def result_of(pairs, metric="exact_match", **extra):
    rows = [RowResult(i, said, right, float(said == right), {"stopped": True}) for i, (right, said) in enumerate(pairs, 1)]
    return EvalResult(sum(r.score for r in rows) / len(rows), len(rows), metric, {"not_stopped": 0, **extra}, rows)


def scores_of(pairs, labels=LABELS):
    codes = confusion_codes([r for r, _ in pairs], [p for _, p in pairs], labels)
    return label_scores(table_of(codes, len(labels)), labels)


@pytest.mark.slow
@given(PAIRS)
def test_label_scores_are_scikit_learns(pairs):
    """With absent classes, classes that are only predicted, and predictions outside the label set."""
    metrics = pytest.importorskip("sklearn.metrics")
    right, said, ours = [r for r, _ in pairs], [p for _, p in pairs], scores_of(pairs)
    fixed = {"labels": LABELS, "zero_division": 0}
    assert ours.accuracy == pytest.approx(metrics.accuracy_score(right, said))
    for name in ("macro", "micro", "weighted"):
        assert getattr(ours, f"{name}_f1") == pytest.approx(metrics.f1_score(right, said, average=name, **fixed))
    assert ours.mcc == pytest.approx(metrics.matthews_corrcoef(right, said))
    p, r, f, support = metrics.precision_recall_fscore_support(right, said, **fixed)
    assert [c.precision for c in ours.classes] == pytest.approx(p.tolist())
    assert [c.recall for c in ours.classes] == pytest.approx(r.tolist())
    assert [c.f1 for c in ours.classes] == pytest.approx(f.tolist())
    assert [c.support for c in ours.classes] == support.tolist()
    assert ours.confusion[:, :-1].tolist() == metrics.confusion_matrix(right, said, labels=LABELS).tolist()
    assert ours.confusion.sum() == len(pairs)  # nothing is dropped


def test_macro_f1_is_the_mean_of_f1_and_not_the_f1_of_means():
    pairs = [("a", "a")] * 9 + [("a", "b")] * 9 + [("b", "b")]
    ours = scores_of(pairs, ["a", "b"])
    p, r = (np.mean([getattr(c, name) for c in ours.classes]) for name in ("precision", "recall"))
    assert ours.macro_f1 == pytest.approx((18 / 27 + 2 / 11) / 2)
    assert ours.macro_f1 != pytest.approx(2 * p * r / (p + r), abs=0.01)


def test_a_reference_outside_the_label_set_is_refused():
    with pytest.raises(UserError, match="data/bad-labels"):
        rescore(result_of([("a", "a"), ("z", "a")]), "label", labels=["a", "b"])
    with pytest.raises(UserError, match="data/bad-labels"):
        rescore(result_of([("a", "a")]), "label")


def test_label_has_intervals_for_all_that_it_reports():
    pairs = [("a", "a")] * 30 + [("b", "b")] * 10 + [("b", "a")] * 10 + [("a", "x")] * 5
    result = rescore(result_of(pairs), "label")
    assert result.score == pytest.approx(40 / 55)
    assert result.extra["interval_95"] == [wilson_interval(40, 55).low, wilson_interval(40, 55).high]
    assert result.extra["outside_labels"] == 5
    for name in ("macro_f1", "mcc"):
        low, high = result.extra[f"{name}_interval_95"]
        assert low < result.extra[name] < high


# --- clusters and empty references


def test_clustered_rows_have_the_cluster_interval():
    pairs = [("a", "a")] * 30 + [("a", "b")] * 30
    clusters = [i // 10 for i in range(60)]
    result = with_interval(result_of(pairs), clusters)
    expected = bootstrap_mean([1.0] * 30 + [0.0] * 30, clusters)
    assert result.extra["interval_95"] == [expected.low, expected.high]
    assert result.extra["clusters"] == 6
    plain = with_interval(result_of(pairs)).extra["interval_95"]
    assert plain[1] - plain[0] < 0.5 * (expected.high - expected.low)


@pytest.mark.parametrize("metric", ["label", "bleu", "rouge", "f1", "exact_match"])
def test_an_empty_reference_is_refused(metric):
    with pytest.raises(UserError, match=r"data/empty-reference.*row 2"):
        rescore(result_of([("a", "a"), (" ", "a")]), metric)


def test_several_metrics_from_one_pass():
    result = result_of([("the cat", "a cat"), ("dog", "dog")])
    assert rescore(result, "f1").score == 1.0  # no articles
    assert rescore(result, "exact_match").score == 0.5
    with pytest.raises(UserError, match="data/reference-not-json"):
        rescore(result, "json")


# --- text metrics

TEXTS = [
    ("the quick brown fox jumps over the lazy dog", "the quick brown fox jumped over a lazy dog"),
    ("it is what it is and nothing else at all", "it is what it is"),
    ("a completely different sentence stands here now", "nothing of the kind was written"),
]


@pytest.mark.parametrize("tokenize", ["13a", "char"])
def test_bleu_and_chrf_are_sacrebleus_of_the_corpus(tokenize):
    sacrebleu = pytest.importorskip("sacrebleu")
    said, right = [p for _, p in TEXTS] * 3, [r for r, _ in TEXTS] * 3
    ours = text_metrics.bleu(said, right, tokenize)
    assert ours.interval.estimate == pytest.approx(sacrebleu.corpus_bleu(said, [right], tokenize=tokenize).score)
    assert f"tok:{tokenize}" in ours.signature
    assert ours.interval.low < ours.interval.estimate < ours.interval.high
    assert text_metrics.chrf(said, right).interval.estimate == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)


def test_bleu_warns_where_it_means_little():
    pytest.importorskip("sacrebleu")
    assert "chrF" in text_metrics.bleu(["yes sir"], ["yes sir"]).warnings[0]
    long = ["one two three four five"] * 100
    assert text_metrics.bleu(long, long).warnings == ()
    assert text_metrics.bleu(["yes sir"], ["yes sir"]).interval.estimate == 0.0  # no run of four words
    assert text_metrics.chrf(["yes sir"], ["yes sir"]).interval.estimate == pytest.approx(100)


def test_a_corpus_score_is_not_the_mean_of_rows():
    pytest.importorskip("sacrebleu")
    result = rescore(result_of(TEXTS), "bleu")
    assert result.extra["corpus_score"] == pytest.approx(100 * result.score)
    assert result.score != pytest.approx(np.mean([row.score for row in result.rows]), abs=0.01)
    assert "tok:13a" in result.extra["signature"]


@pytest.mark.slow
def test_rouge_is_rouge_scores_on_english():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(text_metrics.ROUGE_TYPES))
    ours = text_metrics.rouge([p for _, p in TEXTS], [r for r, _ in TEXTS])
    for i, (right, said) in enumerate(TEXTS):
        theirs = scorer.score(right, said)
        assert [ours[name][i] for name in ours] == pytest.approx([theirs[name].fmeasure for name in ours])


@pytest.mark.parametrize("text", ["柏林是德国的首都", "Привет, мир", "今日は良い天気です", "안녕 세상", "γειά σου κόσμε"])
def test_identical_texts_of_any_script_have_rouge_1(text):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"])
    assert scorer.score(text, text)["rouge1"].fmeasure == 0.0  # what the library's own tokenizer gives
    assert text_metrics.rouge([text], [text])["rouge1"] == [1.0]


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config/missing-extra.*minisft\[metrics\]"):
        text_metrics.bleu(["a"], ["a"])


def test_exact_match_says_how_texts_were_normalized():
    found = result_of([("The answer: Paris", "answer paris!"), ("a", "b"), ("x", " x\n")])
    strict, loose = (rescore(found, "exact_match", normalize=name) for name in ("none", "squad"))
    assert [row.score for row in strict.rows] == [0.0, 0.0, 1.0]
    assert [row.score for row in loose.rows] == [1.0, 0.0, 1.0]
    assert (strict.extra["normalize"], loose.extra["normalize"]) == ("none", "squad")
