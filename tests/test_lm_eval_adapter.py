"""lm-evaluation-harness on a tiny model: its own Hugging Face backend is the oracle, request by request, without a network."""

from __future__ import annotations

import json

import pytest
import tiny
import tokenizers
import torch
from tiny_folder import CONFIG, write_tokenizer
from tiny_folder import write_model as write_plain

from minisft.common import extras
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation import lm_eval_adapter
from minisft.formats import load_model, save_model
from minisft.surgery import apply_lora_, lora_modules

CONTEXTS = ["", "Question: one and\nmore?\nAnswer:", "ends in spaces  ", "äöü 柏林", "<|im_start|>user\nhi<|im_end|>"]
CONTEXTS += ["".join(str(i * i) for i in range(40))]  # longer than the window, and no part of it is like another
CHOICES = [" yes", " no", " a much longer continuation", "é", "z<|im_end|>"]
ONE_TOKEN = [("Letter:", letter) for letter in "ABCD"]
TEXTS = ["", "a", "The quick brown fox. " * 3, "柏林是德国的首都。" * 12, "<|im_end|>odd"]
WINDOW = 64


def write_with_bos(folder, scratch):
    """The same model behind a tokenizer whose post-processor puts a begin token before every text."""
    scratch.mkdir()
    write_tokenizer(scratch, bos_token="<|im_start|>", add_bos_token=True)
    backend = tokenizers.Tokenizer.from_file(str(scratch / "tokenizer.json"))
    begin = ("<|im_start|>", backend.token_to_id("<|im_start|>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    backend.save(str(scratch / "tokenizer.json"))
    model = tiny.build(CONFIG, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    save_model(model, Tokenizer.from_folder(scratch), folder)


@pytest.fixture(scope="module", params=["eos", "bos"])
def pair(request, tmp_path_factory):
    """Ours and the oracle on one folder, with a window that long texts do not fit into."""
    pytest.importorskip("lm_eval", reason="needs the extra eval-harness")
    pytest.importorskip("transformers", reason="the oracle is the harness's Hugging Face backend")
    from lm_eval.models.huggingface import HFLM

    made = tmp_path_factory.mktemp("harness")
    {"eos": write_plain, "bos": write_with_bos}[request.param](made / "model", made / "scratch")
    theirs = HFLM(pretrained=str(made / "model"), device="cpu", dtype="float32", batch_size=3, max_length=WINDOW)
    return ours(made / "model"), theirs


def ours(folder, **settings):
    model, tokenizer = load_model(folder, torch.float32)
    return lm_eval_adapter.MinisftLM(model.eval(), tokenizer, **{"batch_size": 5, "max_length": WINDOW, **settings})


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, tuple(args), i) for i, args in enumerate(arguments)]


def agree(found, expected):
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.slow
def test_log_likelihoods_are_the_harness_backends(pair):
    """Empty contexts, spaces at the border, control tokens, letters of one question, contexts longer than the window."""
    mine, theirs = pair
    asked = instances("loglikelihood", [*((c, o) for c in CONTEXTS for o in CHOICES), *ONE_TOKEN, ("", "<|im_start|>a")])
    agree(mine.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True))


@pytest.mark.slow
def test_what_the_model_would_write_is_greedy(pair):
    mine, theirs = pair
    written = [mine.generate_until(instances("generate_until", [(c, {"max_gen_toks": 3})]))[0] for c in CONTEXTS[1:]]
    conts = [(c, text) for c, text in zip(CONTEXTS[1:], written, strict=True) if text]
    asked = instances("loglikelihood", [*conts, *((c, text + "~") for c, text in conts)])
    found = mine.loglikelihood(asked, disable_tqdm=True)
    agree(found, theirs.loglikelihood(asked, disable_tqdm=True))
    assert {greedy for _, greedy in found} == {True, False}


@pytest.mark.slow
def test_whole_texts_are_the_harness_backends(pair):
    mine, theirs = pair
    asked = instances("loglikelihood_rolling", [(text,) for text in TEXTS if text])
    found = mine.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)


@pytest.mark.slow
def test_continuations_are_the_harness_backends(pair):
    """Of several lengths, with stop texts that the model does write, and contexts that have to be cut on the left."""
    mine, theirs = pair
    # The backend asks only a batch's first text whether it has a begin token already, so such texts go by themselves.
    for contexts in ([c for c in CONTEXTS if c and "<|" not in c], [c for c in CONTEXTS if "<|" in c]):
        whole = [(c, {"max_gen_toks": 20}) for c in contexts]
        first = theirs.generate_until(instances("generate_until", whole), disable_tqdm=True)
        stops = [text[3:5] for text in first if len(text) > 5]
        settings = [{"until": until, "max_gen_toks": 20, "do_sample": False} for until in ([], stops, "a")]
        asked = instances("generate_until", [(c, each) for c in contexts for each in settings])
        found = mine.generate_until(asked, disable_tqdm=True)
        assert found == theirs.generate_until(asked, disable_tqdm=True)
        assert min(map(len, found)) < max(map(len, found))  # some were cut


@pytest.mark.slow
def test_an_adapter_takes_part_and_the_batch_size_changes_nothing(pair, tmp_path):
    mine, _ = pair
    model, tokenizer = mine.model, mine.text_tokenizer
    asked = instances("loglikelihood", [(c, o) for c in CONTEXTS for o in CHOICES])
    before = mine.loglikelihood(asked, disable_tqdm=True)
    agree(lm_eval_adapter.MinisftLM(model, tokenizer, batch_size=1, max_length=WINDOW).loglikelihood(asked, True), before)
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0, dropout=0.5))
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    try:
        model.train()  # dropout must not act
        after = mine.loglikelihood(asked, disable_tqdm=True)
        agree(mine.loglikelihood(asked, disable_tqdm=True), after)
        assert max(abs(a - b) for (a, _), (b, _) in zip(before, after, strict=True)) > 1e-2
    finally:
        for layer in lora_modules(model).values():
            torch.nn.init.zeros_(layer.lora_B)


@pytest.mark.slow
def test_a_whole_task_gives_the_same_table(pair, tmp_path, monkeypatch):
    """``simple_evaluate`` on a task of the harness's own form, with a chat template and without, from local files."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # seconds of asking git, pip and the machine
    rows = [{"q": f"What is {i}?", "choices": ["yes", "no way", f"{i}"], "answer": i % 3} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: 'Question: {{q}}\\nAnswer:'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\nnum_fewshot: 0\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for chat in (False, True):
        tables = []
        for model in pair:
            found = lm_eval.simple_evaluate(
                model=model, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0, apply_chat_template=chat
            )
            tables.append({name: value for name, value in found["results"]["tiny_choice"].items() if "stderr" not in name})
        assert tables[0] == tables[1]
        assert "acc_norm,none" in tables[0]


@pytest.mark.slow
def test_chats_are_the_texts_that_the_backend_makes(pair):
    mine, theirs = pair
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is "}]
    assert mine.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    ended = mine.apply_chat_template(chat, add_generation_prompt=False)
    assert ended == theirs.apply_chat_template(chat, add_generation_prompt=False)
    assert ended.endswith("The answer is ")
    assert mine.chat_template(True) == mine.text_tokenizer.chat_template
    assert mine.chat_template(False) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": WINDOW}, "no place"), ({"max_gen_toks": 0}, "no place")],
)
def test_settings_that_cannot_be_met_are_refused(pair, settings, words):
    with pytest.raises(UserError, match=words):
        pair[0].generate_until(instances("generate_until", [("a", settings)]))


@pytest.mark.slow
def test_continuations_that_cannot_be_scored_are_refused(pair):
    for continuation in ("", "x" * (WINDOW + 1)):
        with pytest.raises(UserError, match="continuation"):
            pair[0]._loglikelihood_tokens([(None, [1], pair[0].tok_encode(continuation, add_special_tokens=False))])
    with pytest.raises(UserError, match="max_length"):
        lm_eval_adapter.MinisftLM(pair[0].model, pair[0].text_tokenizer, max_length=10_000)


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    lm_eval_adapter._harness_class.cache_clear()
    with pytest.raises(UserError, match=r"eval-harness"):
        lm_eval_adapter.MinisftLM  # noqa: B018  # asking is enough
    with pytest.raises(AttributeError, match="Other"):
        lm_eval_adapter.Other  # noqa: B018
