"""llama.cpp as the judge of exported files: log-probabilities of the whole vocabulary, adapters, tokens, chats.

Its wheel is optional: without it these tests are skipped. F32 files with an fp32 cache and without flash attention are held to
5e-4; in other types llama.cpp rounds activations as well, so there the divergence is bounded.
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_server import asked, completion, distribution
from test_export_gguf import MODELS, PATTERNS, edited, trained_adapter
from tiny_folder import write_model

from minisft.cli.main import main
from minisft.config import LoRAConfig
from minisft.data.chat import encode_chat, resolve_template
from minisft.data.examples import Message
from minisft.formats import load_adapter_, load_model
from minisft.merging.certificate import kl_divergence
from minisft.merging.export_gguf import export_gguf
from minisft.merging.verify_gguf import verify_gguf
from minisft.model import CausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None,
        reason="needs llama.cpp: pip install -e '.[llamacpp]' (Linux)",
    ),
]
BOUND = 5e-4
PROMPTS = ([3, 200, 7, 90, 11, 40, 41], [97, 98, 99, 32, 100], [60])


def log_probs(model: CausalLM, ids: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].log_softmax(0)


def compare(model: CausalLM, file: Path, prompts: tuple[list[int], ...], adapter: Path | None = None) -> float:
    """The largest difference of a log-probability, over the whole vocabulary after each prompt that gives any."""
    size = model.config.vocab_size
    answers = asked(file, [completion(ids, size) for ids in prompts], adapter)
    worst, compared = 0.0, 0
    for ids, answer in zip(prompts, answers, strict=True):
        if not answer.get("completion_probabilities"):
            continue  # the drawn token is half a character
        theirs, ours = distribution(answer), log_probs(model, ids)
        assert sorted(theirs) == list(range(size))
        worst = max(worst, max(abs(float(ours[i]) - value) for i, value in theirs.items()))
        compared += 1
    assert compared
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", tmp_path / "s", MODELS[name])
    export_gguf(tmp_path / "m.gguf", str(tmp_path / "m"), outtype="f32", compare=False)
    assert compare(load_model(tmp_path / "m")[0], tmp_path / "m.gguf", PROMPTS) < BOUND


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama-biases", PATTERNS),
        ("qwen3", replace(PATTERNS, use_rslora=False)),
        ("qwen2-untied", LoRAConfig(rank=2, alpha=7.0, targets=("embed_tokens", "k_proj", "lm_head"))),
    ],
)
def test_an_adapter_beside_its_base_is_the_unmerged_model(name: str, lora: LoRAConfig, tmp_path: Path) -> None:
    write_model(tmp_path / "m", tmp_path / "s", MODELS[name])
    adapter = trained_adapter(tmp_path / "m", tmp_path / "a", lora)
    export_gguf(tmp_path / "m.gguf", str(tmp_path / "m"), outtype="f32", compare=False)
    export_gguf(tmp_path / "a.gguf", None, adapter, adapter_only=True, outtype="f32", compare=False)
    model, _ = load_model(tmp_path / "m")
    without = log_probs(model, PROMPTS[0])
    load_adapter_(model, adapter)
    assert float((log_probs(model, PROMPTS[0]) - without).abs().max()) > 0.1  # there is something to get wrong
    assert compare(model, tmp_path / "m.gguf", PROMPTS, tmp_path / "a.gguf") < BOUND


def test_verify_asks_for_the_golden_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m", tmp_path / "s", MODELS["llama"])
    file, other = tmp_path / "m.gguf", tmp_path / "o.gguf"
    export_gguf(file, str(tmp_path / "m"), outtype="f32")
    assert main(["verify", "--gguf", str(file)]) == 0
    assert "tokens equal in 7 of 7 prompts" in capsys.readouterr().out
    adapter = trained_adapter(tmp_path / "m", tmp_path / "a", PATTERNS)
    export_gguf(tmp_path / "a.gguf", None, adapter, adapter_only=True, outtype="f32")
    assert verify_gguf(tmp_path / "a.gguf", file).good
    # The golden answers of one model beside the weights of another: the base's numbers after a merge that did nothing.
    export_gguf(other, None, adapter, outtype="f32")
    golden = json.loads((tmp_path / "o.golden.json").read_text())
    golden["sha256"] = json.loads((tmp_path / "m.golden.json").read_text())["sha256"]
    (tmp_path / "m.golden.json").write_text(json.dumps(golden))
    assert main(["verify", "--gguf", str(file)]) == 6
    assert "numeric/not-this-model" in capsys.readouterr().err


def test_a_file_that_llama_cpp_does_not_take_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m", tmp_path / "s", MODELS["llama"])
    file = tmp_path / "m.gguf"
    export_gguf(file, str(tmp_path / "m"), outtype="f32")
    raw = file.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.1.ffn_nurm.weight")
    from minisft.formats.source import file_sha256

    file.write_bytes(raw)
    golden = json.loads((tmp_path / "m.golden.json").read_text()) | {"sha256": file_sha256(file)}
    (tmp_path / "m.golden.json").write_text(json.dumps(golden))
    assert main(["verify", "--gguf", str(file)]) == 4
    err = capsys.readouterr().err
    assert "model/llama-cpp" in err
    assert err.count("\n") == 1


# ---- tokens ----------------------------------------------------------------------------------------------------------


PIECES = (
    *("parcel", " the", "  ", "\n", "\n\n", "\t", "48-117", "12,50", "3.14", "1000000", "\r\n", "     return", "A", "b "),
    *("é", "Zürich", "e\u0301", "ß", "東京", "한국", "Привет", "مرحبا", "🙂", "👩‍👧", "½", "٣٤", "€", "\u00a0", "\u200b"),
    *("'s", "'ll", "don't", "'RE", "{}", "==", "...", " <|", "|>", "x_1", "CamelCase", "#", "https://a.b/c?d=e", "()"),
)


def sample_texts(count: int) -> list[str]:
    """Texts that are hard on a splitting rule: runs of spaces, numerals of other scripts, accents, emoji, code."""
    draw = random.Random(1)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count)]


def chats(count: int, texts: list[str]) -> list[list[Message]]:
    draw, made = random.Random(2), []
    for _ in range(count):
        turns = [Message("system", draw.choice(texts))] if draw.random() < 0.4 else []
        for _ in range(draw.randint(0, 2)):
            turns += [Message("user", draw.choice(texts)), Message("assistant", draw.choice(texts))]
        made.append([*turns, Message("user", draw.choice(texts))])
    return made


def same_tokens(folder: Path, file: Path, count: int) -> None:
    """Ids of ``count`` texts with control tokens read and not, and of ``count`` rendered chats, are ours."""
    tokenizer = load_model(folder)[1]
    template, texts = resolve_template(tokenizer), sample_texts(count)
    control = list(tokenizer.special_tokens)
    spelt = [f"{control[i % len(control)]}{text}{control[-1]}" for i, text in enumerate(texts)]
    talks = chats(count, texts)
    requests = [("/tokenize", {"content": text, "parse_special": False}) for text in (*texts, *spelt)]
    requests += [("/tokenize", {"content": text, "parse_special": True}) for text in (*texts, *spelt)]
    rendered = [template.render(talk, add_generation_prompt=True).text for talk in talks]
    requests += [("/tokenize", {"content": text, "parse_special": True}) for text in rendered]
    bodies = [[{"role": m.role, "content": m.content} for m in talk] for talk in talks]
    answers = asked(file, [*requests, *(("/apply-template", {"messages": body}) for body in bodies)])
    expected = [tokenizer.encode(text, control=special) for special in (False, True) for text in (*texts, *spelt)]
    expected += [encode_chat(tokenizer, template, talk, add_generation_prompt=True).input_ids for talk in talks]
    wrong = [
        (request[1]["content"], answer["tokens"], ids)
        for request, answer, ids in zip(requests, answers[: len(requests)], expected, strict=True)
        if answer["tokens"] != ids
    ]
    assert not wrong, f"{len(wrong)} of {len(requests)}; the first: {wrong[0]}"
    assert [answer["prompt"] for answer in answers[len(requests) :]] == rendered


def small_with_smollm2s_tokenizer(smollm2_path: Path, out: Path) -> Path:
    """SmolLM2's whole vocabulary over a model of two tiny layers."""
    _, tokenizer = load_model(smollm2_path)
    write_model(out, out.with_name("scratch"), replace(MODELS["llama"], vocab_size=tokenizer.vocab_size))
    tokenizer.save(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    return edited(out, out.with_name("whole"), "tokenizer_config.json", **settings)


@pytest.mark.smollm2
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_texts_and_chats_have_the_same_ids(count: int, smollm2_path: Path, tmp_path: Path) -> None:
    folder = small_with_smollm2s_tokenizer(smollm2_path, tmp_path / "m")
    export_gguf(tmp_path / "m.gguf", str(folder), outtype="f32", compare=False)
    same_tokens(folder, tmp_path / "m.gguf", count)


# ---- the pretrained model --------------------------------------------------------------------------------------------

SENTENCES = (
    "The parcel arrived on Tuesday, but the box was",
    "def area(radius):\n    return",
    "<|im_start|>user\nWhere is my order 48-117?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.smollm2
@pytest.mark.exhaustive
def test_smollm2_over_the_whole_vocabulary(smollm2_path: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(smollm2_path)
    export_gguf(tmp_path / "m.gguf", str(smollm2_path), outtype="f32", compare=False)
    prompts = tuple(tokenizer.encode(text, control=True) for text in SENTENCES)
    assert compare(model, tmp_path / "m.gguf", prompts) < BOUND


@pytest.mark.smollm2
@pytest.mark.exhaustive
@pytest.mark.parametrize(("outtype", "bound"), [("f16", 5e-4), ("bf16", 2e-3), ("q8_0", 0.05)])
def test_smollm2_in_fewer_bits(outtype: str, bound: float, smollm2_path: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(smollm2_path)
    export_gguf(tmp_path / "m.gguf", str(smollm2_path), outtype=outtype, compare=False)
    prompts = [tokenizer.encode(text, control=True) for text in SENTENCES]
    answers = asked(tmp_path / "m.gguf", [completion(ids, model.config.vocab_size) for ids in prompts])
    for ids, answer in zip(prompts, answers, strict=True):
        theirs = torch.tensor([value for _, value in sorted(distribution(answer).items())])
        assert float(kl_divergence(log_probs(model, ids)[None], theirs[None])) < bound
