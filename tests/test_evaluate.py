"""Evaluation: every metric against the same number computed by another road, and every refusal."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import UserError
from minisft.config import ModelConfig
from minisft.data.chat import Encoded
from minisft.data.messages import Example, Message
from minisft.evaluation import evaluate as evaluate_module
from minisft.evaluation import references
from minisft.evaluation.evaluate import EvalResult, RowResult, evaluate, write
from minisft.evaluation.metrics import Z_95, exact_match, is_json, json_equal, json_match, token_f1, wilson
from minisft.evaluation.multiple_choice import make_question, option_log_probs
from minisft.generation import generate
from minisft.model import CausalLM

END = 0
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=128,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=96,
)


class CharTokenizer:
    special_tokens: ClassVar[dict[str, int]] = {}
    eos_ids = (END, 1)
    pad_id = END

    def decode(self, ids, skip_special=True):
        return "".join(map(chr, ids))

    def encode(self, text, control=False):
        return [*map(ord, text)]


def encode(messages, *, turns="last", add_generation_prompt=False, row=0, where="") -> Encoded:
    """A chat format of one id per character: role initial, text, END and a line break after it."""
    ids, supervised = [], []
    for place, message in enumerate(messages):
        trained = message.role == "assistant" and (turns == "all" or place == len(messages) - 1)
        ids += [ord(message.role[0].upper()), *map(ord, message.content), END, ord("\n")]
        supervised += [False, *[trained] * (len(message.content) + 1), False]
    if add_generation_prompt:
        ids, supervised = [*ids, ord("A")], [*supervised, False]
    first = supervised.index(True) if True in supervised else len(ids)
    return Encoded(ids, supervised, row, 0, first)


@pytest.fixture(autouse=True)
def char_chat(monkeypatch):
    monkeypatch.setattr(evaluate_module, "stop_ids", lambda tokenizer, template: tokenizer.eos_ids)
    monkeypatch.setattr(evaluate_module, "encode_chat", lambda tokenizer, template, messages, **kw: encode(messages, **kw))
    monkeypatch.setattr(references, "answer_text", lambda tokenizer, template, example: example.messages[-1].content)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    draw = torch.Generator().manual_seed(8)
    tiny = CausalLM(CONFIG).double()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
    return tiny.requires_grad_(False)


def score(model, examples, metric, **settings) -> EvalResult:
    return evaluate(model, CharTokenizer(), SimpleNamespace(generation_prompt="A"), examples, metric, **settings)


def chat(prompt: str, answer: str, row: int = 1, **reference) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), row, reference)


# --- options


def slow_log_prob(model: CausalLM, prompt: list[int], option: list[int]) -> float:
    """One whole forward pass for one option."""
    log_probs = model(torch.tensor([[*prompt, *option]]))[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) + t - 1, token]) for t, token in enumerate(option))


ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)  # few letters: many options begin alike, or contain each other


@pytest.mark.slow
@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=6)), min_size=1, max_size=3))
def test_option_log_probs_equal_one_pass_each(model, questions):
    found = option_log_probs(model, questions)
    for (prompt, options), log_probs in zip(questions, found, strict=True):
        assert log_probs == pytest.approx([slow_log_prob(model, prompt, option) for option in options], abs=1e-9)


def test_a_prompt_is_read_once_for_all_its_options(model, monkeypatch):
    seen = []
    real = CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, i, **kw: seen.append(tuple(i.shape)) or real(self, i, **kw))
    option_log_probs(model, [(list(range(1, 10)), [[1, 2, 3], [1, 2, 4], [1, 5], [7]])])
    assert seen == [(1, 8 + 4 + 4 + 3 + 2)]  # the prompt's last token stands before each option, which it predicts


labels = ["card", "card_late", "cash", "pin"]


def test_choice_takes_the_likeliest_option_with_its_end(model):
    examples = [chat(f"q{i}", labels[i % 4], row=i + 1) for i in range(10)]
    result = score(model, examples, "choice")
    for example, row in zip(examples, result.rows, strict=True):
        prompt = encode(example.messages[:-1], add_generation_prompt=True).input_ids
        sums = {label: slow_log_prob(model, prompt, [*map(ord, label), END]) for label in labels}
        assert row.prediction == max(sums, key=sums.get)
        assert row.extra["prediction_norm"] == max(sums, key=lambda label: sums[label] / len(label))
        assert row.extra["log_prob_reference"] == pytest.approx(sums[row.reference])
        assert row.score == (row.prediction == row.reference)
    assert result.score == sum(r.score for r in result.rows) / 10
    assert result.extra["acc_norm"] == sum(r.extra["prediction_norm"] == r.reference for r in result.rows) / 10
    assert result.extra["chance"] == 0.25


def test_labels_come_from_the_whole_file(model):
    examples = [chat(f"q{i}", label, row=i + 1) for i, label in enumerate(labels)]
    assert score(model, examples, "choice", limit=2).extra["chance"] == 0.25


def test_a_row_may_bring_its_own_choices(model):
    result = score(model, [chat("q", "no", choices=["yes", "no", "why"])], "choice")
    assert result.rows[0].prediction in ("yes", "no", "why")
    assert result.extra["chance"] == pytest.approx(1 / 3)


def test_a_merge_across_the_border_shortens_the_prompt():
    """Here "A" and "x" become one id when they meet, so the options part before the answer's own first character."""

    def merging(example, messages):
        plain = encode(messages)
        at = plain.prompt_length - 1
        if plain.input_ids[at + 1] != ord("x"):
            return plain
        merged = [*plain.input_ids[:at], 127, *plain.input_ids[at + 2 :]]
        return replace(plain, input_ids=merged, supervised=plain.supervised[:at] + plain.supervised[at + 1 :], prompt_length=at)

    question = make_question(chat("q", "xy", choices=["xy", "zy"]), [], merging)
    assert question.prompt == encode([Message("user", "q")]).input_ids
    assert question.tails == [[127, ord("y"), END], [ord("A"), ord("z"), ord("y"), END]]


@pytest.mark.parametrize("choices", [["a"], ["a", "a", "b"], ["b", "c"], ["a", 3], "a", []])
def test_bad_choices_are_refused(model, choices):
    with pytest.raises(UserError, match=r"data/bad-choices.*row 7"):
        score(model, [chat("q", "a", row=7, choices=choices)], "choice")


# --- loss


@given(
    st.lists(st.tuples(st.text("ab", max_size=5), st.text("cd", min_size=1, max_size=9)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_loss_is_the_mean_over_tokens(model, texts, batch_size):
    examples = [chat(prompt, answer, row=i) for i, (prompt, answer) in enumerate(texts)]
    losses = []
    for example in examples:
        encoded = encode(example.messages, turns="all")
        log_probs = model(torch.tensor([encoded.input_ids]))[0].log_softmax(-1)
        losses += [-float(log_probs[t - 1, encoded.input_ids[t]]) for t, flag in enumerate(encoded.supervised) if flag]
    result = score(model, examples, "loss", batch_size=batch_size)
    assert result.score == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert result.extra == {"perplexity": pytest.approx(math.exp(sum(losses) / len(losses))), "tokens": len(losses)}


def test_loss_covers_every_assistant_turn(model):
    turns = (Message("user", "a"), Message("assistant", "bc"), Message("user", "d"), Message("assistant", "efg"))
    assert score(model, [Example(turns, 1)], "loss").extra["tokens"] == len("bc") + len("efg") + 2


# --- answers


def test_answers_are_compared_with_the_last_turn(model):
    prompts = [f"say {i}" for i in range(6)]
    ids = [encode([Message("user", p)], add_generation_prompt=True).input_ids for p in prompts]
    said = generate(model, ids, max_new_tokens=7, eos_ids=CharTokenizer.eos_ids)
    texts = ["".join(chr(t) for t in answer if t not in CharTokenizer.eos_ids) for answer in said]
    examples = [chat(p, text if i % 3 else "wrong", row=i + 1) for i, (p, text) in enumerate(zip(prompts, texts, strict=True))]
    result = score(model, examples, "exact_match", max_new_tokens=7, batch_size=4)
    assert [row.prediction for row in result.rows] == texts
    assert (result.score, result.n) == (4 / 6, 6)
    assert result.extra["not_stopped"] == sum(answer[-1] not in CharTokenizer.eos_ids for answer in said)


def test_broken_json_is_counted(model):
    result = score(model, [chat("q", '{"a": 1}')], "json", max_new_tokens=4)
    assert (result.score, result.extra["unparsable"]) == (0.0, int(not is_json(result.rows[0].prediction)))


@pytest.mark.parametrize("metric", ["exact_match", "f1", "choice", "loss"])
def test_batch_size_changes_nothing(model, metric):
    examples = [chat("q" * i, labels[i % 4], row=i) for i in range(1, 8)]
    one = score(model, examples, metric, batch_size=1, max_new_tokens=5)
    many = score(model, examples, metric, batch_size=5, max_new_tokens=5)
    assert many.score == pytest.approx(one.score, rel=1e-12)
    assert [(r.row, r.prediction) for r in many.rows] == [(r.row, r.prediction) for r in one.rows]


def test_a_system_turn_is_put_before_rows_without_one(model):
    spoken = Example((Message("system", "s"), *chat("q", "a").messages), 1)
    plain = chat("q", "a")
    assert score(model, [plain], "loss", system="s").score == score(model, [spoken], "loss", system="t").score
    assert score(model, [plain], "loss", system="s").score != score(model, [plain], "loss").score


def test_progress_reaches_the_total(model):
    told = []
    score(model, [chat("q", "a", row=i) for i in range(5)], "loss", batch_size=2, progress=lambda *t: told.append(t))
    assert told == [(2, 5), (4, 5), (5, 5)]


# --- refusals


@pytest.mark.parametrize(
    ("example", "code"),
    [
        (Example((Message("user", "a"),), 3), "data/no-reference"),
        (Example((Message("assistant", "a"),), 3), "data/no-reference"),
        (Example((Message("assistant", "a"), Message("user", "a")), 3), "data/no-reference"),
        (chat("q" * 95, "1", row=3), "data/row-too-long"),
        (chat("q", "not json", row=3), "data/reference-not-json"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(model, example, code):
    with pytest.raises(UserError, match=f"{code}.*row 3"):
        score(model, [chat("q", "1"), example], "json")


def test_bad_settings_are_refused(model):
    with pytest.raises(UserError, match="data/no-rows"):
        score(model, [], "loss")
    with pytest.raises(UserError, match="config/bad-value"):
        score(model, [chat("q", "a")], "loss", limit=0)
    with pytest.raises(UserError, match="unknown metric"):
        score(model, [chat("q", "a")], "bleu")


def test_a_broken_model_has_no_loss():
    broken = CausalLM(CONFIG).double()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="numeric/"):
        score(broken, [chat("q", "a")], "loss")


# --- text metrics


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_json_survives_spacing_order_and_fence(value):
    def turned(v):
        if isinstance(v, dict):
            return {k: turned(v[k]) for k in reversed(list(v))}
        return [turned(x) for x in v] if isinstance(v, list) else v

    reference = json.dumps(value)
    assert json_match(json.dumps(turned(value), indent=3), reference) == 1
    assert json_match(f"```json\n{reference}\n```\n", reference) == 1
    assert json_match(f"Here it is: {reference} !", reference) == 0
    assert json_match(json.dumps([value]), reference) == 0


@given(json_values, json_values)
def test_json_equality_is_equality_of_canonical_text(first, second):
    def canonical(v):
        if isinstance(v, dict):
            return {k: canonical(x) for k, x in v.items()}
        if isinstance(v, list):
            return [canonical(x) for x in v]
        return float(v) + 0.0 if isinstance(v, (int, float)) and not isinstance(v, bool) else v  # -0.0 equals 0

    same = json.dumps(canonical(first), sort_keys=True) == json.dumps(canonical(second), sort_keys=True)
    assert json_equal(first, second) == json_equal(second, first) == same


@pytest.mark.parametrize(
    ("said", "right", "equal"),
    [
        ("1", "1.0", 1),
        ("true", "1", 0),
        ("[0]", "[false]", 0),
        ("{", "{", 0),
        ("NaN", "NaN", 0),
        ('{"a":1,"a":1}', '{"a":1}', 0),
        ("", "null", 0),
    ],
)
def test_json_borders(said, right, equal):
    assert json_match(said, right) == equal


@pytest.mark.parametrize(
    ("said", "right", "f1"),
    [
        ("the cat sat", "a cat sat.", 1.0),
        ("cat", "cat sat", 2 * 1 * 0.5 / 1.5),
        ("cat cat dog", "cat dog dog", 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("x", "", 0.0),
        ("x", "y", 0.0),
    ],
)
def test_f1_by_hand(said, right, f1):
    assert token_f1(said, right) == pytest.approx(f1)
    assert token_f1(right, said) == pytest.approx(f1)


def test_exact_match_forgives_white_space_only():
    assert exact_match(" a b\n", "a b") == 1
    assert exact_match("a  b", "a b") == exact_match("A b", "a b") == 0


@given(st.integers(1, 500), st.data())
def test_wilson_ends_are_where_the_score_is_just_credible(n, data):
    """Each end p solves |p - share| = z sqrt(p (1 - p) / n), unless it is cut at 0 or 1."""
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for p in (low, high):
        assert abs(p - share) == pytest.approx(Z_95 * math.sqrt(p * (1 - p) / n), abs=1e-7)


# --- files


def test_write_leaves_two_whole_files(tmp_path):
    rows = [RowResult(4, "é\n", "e", 0.0, {"stopped": True}), RowResult(9, "x", "x", 1.0)]
    out = tmp_path / "new" / "scores.json"
    for _ in range(2):  # a second run replaces the first
        rows_path = write(EvalResult(0.5, 2, "exact_match", {"interval_95": [0.1, 0.9]}, rows), out)
    assert json.loads(out.read_text()) == {
        "score": 0.5,
        "n": 2,
        "metric": "exact_match",
        "interval_95": [0.1, 0.9],
        "rows": "scores.rows.jsonl",
    }
    assert [json.loads(line) for line in rows_path.read_text().splitlines()] == [
        {"row": 4, "score": 0.0, "prediction": "é\n", "reference": "e", "stopped": True},
        {"row": 9, "score": 1.0, "prediction": "x", "reference": "x"},
    ]
    assert sorted(p.name for p in out.parent.iterdir()) == ["scores.json", "scores.rows.jsonl"]


def test_acc_norm_divides_by_characters_and_acc_bytes_by_bytes():
    """As lm-eval's: an option of four characters in twelve bytes wins by bytes and not by characters."""
    from minisft.evaluation.evaluate import _choice_row
    from minisft.evaluation.multiple_choice import Question

    example = Example((Message("user", "q"), Message("assistant", "plain")), 1)
    question = Question(example, ["plain", "柏林柏林"], [1], [[2], [3]])
    row = _choice_row(question, [-5.0, -6.0])
    assert row.prediction == "plain"  # -5 > -6
    assert row.extra["prediction_norm"] == "plain"  # -5 / 5 > -6 / 4
    assert row.extra["prediction_bytes"] == "柏林柏林"  # -6 / 12 > -5 / 5
