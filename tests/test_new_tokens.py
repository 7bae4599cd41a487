"""``--add-tokens``: a run through the real command line and all that follows it, the rows' arithmetic, PEFT as the oracle."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_folder import CONFIG, digest, stopped_copy, write_model
from torch import nn

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.config import LoRAConfig
from minisft.data.new_tokens import NewToken, add_tokens, read_tokens
from minisft.formats import load_adapter_, load_model, load_tokenizer, save_adapter
from minisft.formats.adapter_rows import rows_name, saved_tokenizer
from minisft.loss import head_loss_sum, token_log_probs
from minisft.merging import certificate
from minisft.merging.base_and_adapter import open_adapted
from minisft.new_rows import EMBEDDING, HEAD, NOISE, grow_, train_rows_, wrap_rows_
from minisft.surgery import adapters_off, apply_lora_
from minisft.trained_rows import EmbeddingRows, HeadRows, own_rows, row_modules

pytestmark = pytest.mark.slow

OLD = CONFIG.vocab_size
FIXED = ("--rank", "2", "--alpha", "3", "--lr", "0.01", "--dtype", "fp32", "--batch-size", "4")


def write_shop(folder: Path, tied: bool) -> Path:
    """A model, rows that use two new tokens, and the file that lists them."""
    write_model(folder / "model", folder / "scratch", replace(CONFIG, tie_word_embeddings=tied))
    turns = [(f"say {'<a>' if i % 2 else '<b>'} {chr(97 + i)}", f"{'<a>' if i % 3 else '<b>'}!") for i in range(16)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokens.txt").write_text("<a>\n\n<b>\n")
    return folder


def train(shop: Path, out: str, *more: str, steps: int = 4) -> int:
    named = ("--model", shop / "model", "--data", shop / "rows.jsonl", "--out", shop / out, "--steps", steps, *FIXED, *more)
    return main(["train", *map(str, named)])


def _do_not_draw(layers: Sequence[object]) -> bytes:
    assert layers
    return b"<svg/>"


@pytest.fixture(scope="module", autouse=True)
def _no_pictures_of_merges() -> Iterator[None]:
    """Merges are compared and certified here, but not drawn, which costs more than a tiny merge (test_certificate does)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "draw_layers", _do_not_draw)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A model (tied or not), rows and tokens, a finished run in ``run``, its merge in ``merged``; each made once."""

    @functools.cache
    def made(tied: bool) -> Path:
        folder = write_shop(tmp_path_factory.mktemp("shop"), tied)
        assert train(folder, "run", "--add-tokens", str(folder / "tokens.txt")) == 0
        assert main(["merge", "--adapter", str(folder / "run/adapter"), "--out", str(folder / "merged")]) == 0
        return folder

    return made


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def shop(request: pytest.FixtureRequest, make: Callable[[bool], Path]) -> Path:
    return make(request.param)


@pytest.fixture
def tied(make: Callable[[bool], Path]) -> Path:
    return make(True)


def tables(folder: Path) -> dict[str, torch.Tensor]:
    names = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
    stored = load_file(folder / "model.safetensors")
    return {path: stored[name] for path, name in names.items() if name in stored}


# ---- what follows a run ----------------------------------------------------------------------------------------------


def test_old_rows_keep_every_bit_and_the_new_ones_are_those_of_the_file(shop: Path) -> None:
    base, merged = tables(shop / "model"), tables(shop / "merged")
    assert base.keys() == merged.keys()
    trained = load_file(shop / "run/adapter/adapter_model.safetensors")
    for path, table in base.items():
        assert merged[path].shape == (OLD + 2, CONFIG.hidden_size)
        assert torch.equal(merged[path][:OLD], table)
        assert torch.equal(merged[path][OLD:], trained[rows_name(path)])
        moved = (merged[path][OLD:] - table.double().mean(0)).abs().max()
        assert moved > 3 * NOISE * table.std()  # they have learned something
    config = json.loads((shop / "run/adapter/adapter_config.json").read_text())
    ids = [OLD, OLD + 1]
    assert config["trainable_token_indices"] == (ids if len(base) == 1 else {"embed_tokens": ids, "lm_head": ids})
    assert json.loads((shop / "merged/config.json").read_text())["vocab_size"] == OLD + 2


def test_merged_and_unmerged_answer_alike(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = str(shop / "model"), str(shop / "run/adapter")
    assert main(["verify", "--merged", str(shop / "merged"), "--model", model, "--adapter", adapter]) == 0
    capsys.readouterr()
    said = {}
    for name, words in {
        "unmerged": ["--model", model, "--adapter", adapter],
        "merged": ["--model", str(shop / "merged")],
    }.items():
        assert main(["generate", *words, "--prompt", "say <a> c", "--max-new-tokens", "8", "--dtype", "fp32"]) == 0
        out = str(shop / f"{name}.json")
        assert (
            main(["eval", *words, "--data", str(shop / "rows.jsonl"), "--metric", "loss", "--out", out, "--dtype", "fp32"]) == 0
        )
        said[name] = capsys.readouterr().out.splitlines()[0], round(json.loads(Path(out).read_text())["score"], 5)
    assert said["merged"] == said["unmerged"]


def test_a_merge_that_lost_a_row_is_found(tied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(tied / "merged", tmp_path / "wrong")
    stored = load_file(tied / "merged/model.safetensors")
    stored["model.embed_tokens.weight"][OLD + 1] += 0.01
    save_file(stored, tmp_path / "wrong/model.safetensors", {"format": "pt"})
    words = ["--merged", tmp_path / "wrong", "--model", tied / "model", "--adapter", tied / "run/adapter"]
    assert main(["verify", *map(str, words)]) == 6
    assert "model.embed_tokens.weight" in capsys.readouterr().err


def test_a_resumed_run_ends_in_the_same_bits(shop: Path, tmp_path: Path) -> None:
    out = stopped_copy(shop / "run", tmp_path / "again", 3)
    shutil.copy(shop / "tokens.txt", tmp_path / "moved.txt")
    assert train(shop, out, "--add-tokens", str(tmp_path / "moved.txt"), "--resume") == 0
    assert digest(Path(out)) == digest(shop / "run")


def test_peft_gives_the_same_logits_and_transformers_the_same_ids(shop: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shop / "model", dtype=torch.float32)
    theirs.resize_token_embeddings(OLD + 2, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        theirs = peft.PeftModel.from_pretrained(theirs, str(shop / "run/adapter")).eval()
    ours, _ = load_model(shop / "model")
    load_adapter_(ours.eval(), shop / "run/adapter")
    ids = torch.tensor([[OLD, 5, OLD + 1, 200, OLD, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    for folder in ("run/adapter", "merged"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(shop / folder)
        text = "say <a>x <b><|im_end|>"
        assert tokenizer(text, add_special_tokens=False).input_ids == load_tokenizer(shop / folder).encode(text, control=True)
        assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [OLD, OLD + 1]


@pytest.mark.parametrize(
    ("tied", "indices"),
    [(True, [9, 3, 250]), (False, [9, 3, 250]), (False, {"lm_head": [7, 1]}), (False, {"embed_tokens": [4], "lm_head": [7]})],
    ids=str,
)
def test_ours_loads_what_peft_trained(make: Callable[[bool], Path], tied: bool, indices: object, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shop = make(tied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shop / "model", dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        theirs.save_pretrained(tmp_path / "a")
    ours, _ = load_model(shop / "model")
    load_adapter_(ours.eval(), tmp_path / "a")
    ids = torch.tensor([[9, 3, 250, 7, 1, 4, 60]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_run_that_starts_from_the_adapter_has_its_tokens(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(w) for w in ("train", "--model", tied / "model", "--data", tied / "rows.jsonl", "--out", tied / "more")]
    assert main([*words, "--init-adapter", str(tied / "run/adapter"), "--steps", "1", "--dtype", "fp32", "--lr", "0.01"]) == 0
    assert (tied / "more/adapter/tokenizer.json").read_bytes() == (tied / "run/adapter/tokenizer.json").read_bytes()
    before, after = (load_file(tied / name / "adapter/adapter_model.safetensors") for name in ("run", "more"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_served_adapter_has_its_own_tokenizer(tied: Path) -> None:
    from minisft.serving.lanes import load_lanes

    lanes = load_lanes(tied / "model", {"more": tied / "run/adapter"}, dtype="fp32")
    base, adapted = lanes.values()
    assert len(base.tokenizer.encode("<a>")) == 3
    assert adapted.tokenizer.encode("<a>") == [OLD]
    assert base.model.config.vocab_size == OLD
    assert adapted.model(torch.tensor([[OLD]])).shape == (1, 1, OLD + 2)


def test_a_merged_model_goes_to_gguf_and_the_adapter_alone_does_not(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tied / "m.gguf")
    assert (
        main(
            ["export", "--adapter", str(tied / "run/adapter"), "--out", out, "--outtype", "f32", "--model", str(tied / "model")]
        )
        == 0
    )
    model, tokenizer = load_model(out)
    assert tokenizer.encode("<a>") == [OLD]
    merged, _ = load_model(tied / "merged")
    ids = torch.tensor([[OLD, 3, OLD + 1]])
    torch.testing.assert_close(model(ids), merged(ids), rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(["export", "--adapter", str(tied / "run/adapter"), "--adapter-only", "--out", str(tied / "a.gguf")]) == 4
    assert "new tokens have no form in a GGUF adapter file" in capsys.readouterr().err


# ---- other runs ------------------------------------------------------------------------------------------------------


def test_all_rows_are_trained_when_asked(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tied, "all", "--add-tokens", str(tied / "tokens.txt"), "--train-tokens", "all", steps=1) == 0
    assert f"{OLD + 2} of them are trained, {(OLD + 2) * CONFIG.hidden_size * 4:,} bytes" in capsys.readouterr().out
    rows = load_file(tied / "all/adapter/adapter_model.safetensors")[rows_name(EMBEDDING)]
    table = tables(tied / "model")[EMBEDDING]
    assert rows.shape == (OLD + 2, CONFIG.hidden_size)
    assert not torch.equal(rows[:OLD], table)
    assert (rows[:OLD] - table).abs().max() < 0.02  # one step of 0.01 away from where they started


def test_a_full_run_writes_a_model_that_knows_the_tokens(tied: Path) -> None:
    named = (
        "--model",
        tied / "model",
        "--data",
        tied / "rows.jsonl",
        "--out",
        tied / "full",
        "--add-tokens",
        tied / "tokens.txt",
    )
    assert main(["train", *map(str, named), "--method", "full", "--steps", "1", "--dtype", "fp32"]) == 0
    model, tokenizer = load_model(tied / "full/model")
    assert tokenizer.encode("<b>") == [OLD + 1]
    rows = model.model.embed_tokens.weight[OLD:]
    assert not torch.equal(rows[0], rows[1])


def test_qlora_and_unused_tokens(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tied / "three.txt").write_text("<a>\n<b>\n<never>\na\n")
    assert train(tied, "nf4", "--add-tokens", str(tied / "three.txt"), "--quant", "nf4", "--use-dora", steps=1) == 0
    said = capsys.readouterr().out
    assert "1 of 3 new tokens stand in no row and learn nothing of their use: <never>" in said
    assert "1 of 4 tokens are one token already and stay as they are: a" in said
    assert main(["merge", "--adapter", str(tied / "nf4/adapter"), "--out", str(tied / "nf4-merged")]) == 0


def test_a_special_token_is_structure_and_not_text(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tmp_path / "scratch")
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(["<think>", {"content": "<|end|>", "special": True}, {"content": "<|x|>"}]))
    tokens = read_tokens(file)
    assert tokens == (NewToken("<think>"), NewToken("<|end|>", True), NewToken("<|x|>"))
    base = load_tokenizer(tmp_path / "model")
    tokenizer, _ = add_tokens(base, tokens)
    assert tokenizer.encode("<think><|end|><|x|>", control=True) == [OLD, OLD + 1, OLD + 2]
    assert tokenizer.encode("<think><|x|>") == [OLD, OLD + 2]
    assert OLD + 1 not in tokenizer.encode("<|end|>")
    assert tokenizer.decode([OLD, OLD + 1]) == "<think>"
    assert base.vocab_size == OLD
    assert len(base.encode("<think>")) == 7


# ---- the rows --------------------------------------------------------------------------------------------------------


def grown(tied: bool, dtype: torch.dtype = torch.float64, rows: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A tiny model with new rows, and its tables as they were."""
    model = tiny.build(replace(tiny.LLAMA, tie_word_embeddings=tied), dtype)
    before = model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()
    grow_(model, tiny.VOCAB + rows)
    return model, *before


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_as_the_mean_with_a_little_noise(tied: bool) -> None:
    made = []
    for seed in (0, 0, 1):
        model, *old = grown(tied)
        new = [tiny.VOCAB, tiny.VOCAB + 1, tiny.VOCAB + 2]
        train_rows_(model, [2, *new], new, seed)
        modules = own_rows(model)
        assert [*modules] == ([EMBEDDING] if tied else [EMBEDDING, HEAD])
        for module, table in zip(modules.values(), old, strict=False):
            assert torch.equal(module.base.weight[: tiny.VOCAB], table)
            assert torch.equal(module.rows[0], table[2])
            assert torch.equal(module.base.weight[tiny.VOCAB + 1], module.base.weight[tiny.VOCAB])
            noise = (module.rows[1:] - table.mean(0)) / table.std(0, correction=0)
            assert 0.3 * NOISE < noise.std() < 3 * NOISE
            assert noise.abs().max() < 6 * NOISE
        made.append(torch.cat([module.rows.detach()[1:] for module in modules.values()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert len({tuple(row.tolist()) for row in made[0]}) == len(made[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [4, 32], ids=["some", "all"])
def test_the_loss_and_its_gradient_are_those_of_a_dense_table(tied: bool, count: int) -> None:
    model, *_ = grown(tied)
    ids = [1, 5, 29, 31] if count == 4 else list(range(32))
    train_rows_(model, ids, [29, 31])
    with torch.no_grad():
        for module in own_rows(model).values():
            module.rows.add_(tiny.randn(*module.rows.shape, seed=3))
    batch = torch.tensor([[1, 29, 7, 31, 5, 5, 2, 30]])
    targets = torch.tensor([[29, -100, 31, 5, 1, 3, 30, 29]])
    dense = tiny.build(replace(model.config, tie_word_embeddings=tied))
    whole = {path: module.merged_rows(module.base.weight.detach()) for path, module in row_modules(model).items()}
    dense.load_state_dict({n.replace(".base.", "."): p for n, p in model.state_dict().items() if not n.endswith(".rows")})
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(whole[EMBEDDING])
        dense.lm_head.weight.copy_(whole[HEAD])
    weights, scored = tiny.randn(7, seed=4), targets != -100
    hidden = model.hidden(batch)
    loss = head_loss_sum(hidden, model.loss_head, targets) + token_log_probs(hidden, model.loss_head, targets, 0.7) @ weights
    logits = dense(batch)[scored]  # from here it is PyTorch's own: a dense head in our loss would share its gradient's code
    expected, at_07 = ((logits / t).log_softmax(-1).gather(1, targets[scored][:, None])[:, 0] for t in (1.0, 0.7))
    expected = at_07 @ weights - expected.sum()
    for each, total in ((model, loss), (dense, expected)):
        (total + each(batch).square().sum()).backward()  # the head as a module, too
    tiny.assert_close(loss, expected)
    for path, module in own_rows(model).items():
        assert module.base.weight.grad is None
        tiny.assert_close(module.rows.grad, dense.get_submodule(path).weight.grad[module.ids], name=path)
    with adapters_off(model), torch.no_grad():
        same = nn.functional.linear(model.hidden(batch), model.lm_head.base.weight)
        tiny.assert_close(model(batch), same)
        assert head_loss_sum(model.hidden(batch), model.loss_head, targets) > 0


def test_rows_stay_fp32_in_a_bf16_model() -> None:
    model, *_ = grown(True, torch.float32)
    train_rows_(model, [29, 30], [29, 30])
    rows = own_rows(model)[EMBEDDING].rows
    before = rows.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(rows, before)
    assert model.lm_head.rows is rows
    assert model(torch.tensor([[29, 30]])).dtype == torch.bfloat16


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no tokens, or too many"),
        (b"<a>\n<b>\n<a>\n", "tokens.txt:3; found <a>, as in 1"),
        (b"<a>\n <b>\n", "a token has white space at an end"),
        (b"<a>\n<\x07>\n", "a token has a control character"),
        (b"<a>\n" + b"x" * 201, "a token has 201 characters"),
        (b"<a>\xff", "the file is not UTF-8"),
        (b"a\nb\n", "error[tokenizer/no-new-token]"),
        ("\u0120\n".encode(), "error[tokenizer/taken]"),  # how byte-level vocabularies write a space
        (None, "cannot read the file of tokens"),
    ],
)
def test_a_bad_file_of_tokens_is_one_error(
    tied: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tied / "bad" / "tokens.txt"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    assert train(tied, "never", "--add-tokens", str(file)) in (3, 4)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tied / "never").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "the file is no list"), ("[1]", "an entry is no token"), ('[{"content": "x", "lstrip": true}]', "an entry is no"),
     ("[", "the file is not JSON"), ('[""]', "a token has no text")],
)  # fmt: skip
def test_a_bad_json_list_is_one_error(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read_tokens(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--init-adapter", "run/adapter"), "an adapter brings its own tokens"),
        (("--parallel", "shard"), "--parallel replicate"),
        (("--targets", "q_proj", "embed_tokens"), "error[config/new-tokens]"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tied: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = (
        "train",
        "--model",
        tied / "model",
        "--data",
        tied / "rows.jsonl",
        "--out",
        tied / "never",
        "--steps",
        "1",
        "--rank",
        "2",
    )
    paths = [str(tied / word) if "/" in word else word for word in more]
    assert main([*map(str, named), "--add-tokens", str(tied / "tokens.txt"), *paths]) == 2
    assert said in capsys.readouterr().err
    assert not (tied / "never").exists()


def test_what_takes_an_adapter_apart_refuses_one_with_tokens(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, model, rows = str(tied / "run/adapter"), str(tied / "model"), str(tied / "rows.jsonl")
    sweep = ["sweep", "--model", model, "--adapter", adapter, "--data", rows, "--general", rows, "--out", "x"]
    for words, said in (
        (["combine", "--adapter", adapter, "--out", "x"], "minisft merge"),
        (["export", "--adapter", adapter, "--format", "peft", "--plain", "--out", "x"], "minisft merge"),
        (["diff", "--a", model, "--b", adapter], "trained without --add-tokens"),
        (["merge", "--adapter", adapter, "--scale", "0.5", "--out", "x"], "leave the scale at 1"),
        (sweep, "leave the scale at 1"),
    ):
        assert main([str(tied / word) if word == "x" else word for word in words]) != 0
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("error[")
        assert not (tied / "x").exists()


def test_a_changed_list_of_tokens_is_another_run(tied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("<a>\n<b>\n<c>\n")
    assert train(tied, "run", "--add-tokens", str(tmp_path / "other.txt"), "--resume") == 5
    assert "add_tokens.sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t: c.update(trainable_token_indices=[OLD, OLD + 2]), "beyond the base's vocabulary"),
        (lambda c, t: c.update(trainable_token_indices=[OLD, OLD]), "a row stands there twice"),
        (lambda c, t: c.update(trainable_token_indices={"norm": [1]}), "no rows of embed_tokens or lm_head"),
        (lambda c, t: c.update(trainable_token_indices=[OLD, OLD + 1, 3]), "are not as the config says"),
        (lambda c, t: c.update(trainable_token_indices=None), "tensors that belong to no target"),
        (lambda c, t: t.pop(rows_name(EMBEDDING)), "tensors are missing"),
        (lambda c, t: t[rows_name(EMBEDDING)].fill_(float("nan")), "NaN or infinity"),
    ],
)
def test_a_damaged_adapter_changes_nothing(tied: Path, change: object, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(tied / "run/adapter", folder)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    change(config, tensors)  # type: ignore[operator]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    model, _ = load_model(tied / "model")
    with pytest.raises(UserError, match=said):
        load_adapter_(model, folder)
    assert model.config.vocab_size == OLD
    assert not row_modules(model)


def test_another_tokenizer_beside_the_rows_is_refused(tied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(tied / "run/adapter", tmp_path / "a")
    text = (tmp_path / "a/tokenizer.json").read_text()
    (tmp_path / "a/tokenizer.json").write_text(text.replace('"<|im_end|>"', '"<|am_end|>"'))
    settings = (tmp_path / "a/tokenizer_config.json").read_text()
    (tmp_path / "a/tokenizer_config.json").write_text(settings.replace("<|im_end|>", "<|am_end|>"))
    (tmp_path / "a/special_tokens_map.json").unlink()
    assert main(["generate", "--model", str(tied / "model"), "--adapter", str(tmp_path / "a"), "--prompt", "a"]) == 4
    assert "error[adapter/tokenizer]" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_rows_comes_back_whole(tied: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model", tmp_path / "scratch", replace(CONFIG, tie_word_embeddings=tied))
    model, base = load_model(tmp_path / "model")
    old = {path: model.get_submodule(path).weight.detach().clone() for path in (EMBEDDING, HEAD)}
    tokenizer, _ = add_tokens(base, [NewToken("<a>"), NewToken("<b>")])
    grow_(model, tokenizer.vocab_size)
    apply_lora_(model, LoRAConfig(rank=2))
    train_rows_(model, [3, OLD, OLD + 1], tokenizer.new_ids)
    with torch.no_grad():
        for module in own_rows(model).values():
            module.rows.normal_()
    save_adapter(model.eval(), tmp_path / "a", tokenizer=tokenizer)
    again, _ = load_model(tmp_path / "model")
    load_adapter_(again.eval(), tmp_path / "a")
    ids = torch.tensor([[3, OLD, OLD + 1, 4]])
    assert torch.equal(again(ids), model(ids))
    assert saved_tokenizer(tmp_path / "a", base).encode("<b>") == [OLD + 1]
    files = open_adapted(tmp_path / "a")  # what a merge reads
    for path, module in own_rows(model).items():
        expected = torch.cat([old[path], torch.zeros(2, CONFIG.hidden_size)])
        expected[module.ids] = module.rows.detach()
        pieces = files.stored_weight(f"{path}.weight")
        assert pieces.shape == tuple(expected.shape)
        flat = expected.flatten()
        border, last = OLD * CONFIG.hidden_size, len(flat)
        for begin, end in ((0, last), (45, 60), (border - 5, border + 5), (border + 3, last), (last - 1, last)):
            assert torch.equal(pieces.read(begin, end), flat[begin:end])


def test_rows_are_saved_with_a_tokenizer_or_not_at_all(tmp_path: Path) -> None:
    model = tiny.build(tiny.LLAMA)
    apply_lora_(model, LoRAConfig(rank=2))
    wrap_rows_(model, {EMBEDDING: [3]})
    assert isinstance(model.model.embed_tokens, EmbeddingRows)
    assert isinstance(model.lm_head, HeadRows)
    with pytest.raises(UserError, match="adapter/no-tokenizer"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
