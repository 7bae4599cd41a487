"""``hf:org/name``: caches laid out by hand, no network; the hub's own libraries say what is in them and what is a split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_folder import write_model

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data import hub_data
from minisft.data.hub_data import HubData, choose, parse_hub
from minisft.data.messages import read_dataset
from minisft.data.pairs import read_pairs
from minisft.data.prompts import read_prompts
from minisft.data.sources import Source, parse_sources

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which the hub's library looks too."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def lay_out(
    cache: Path, files: dict[str, bytes | str], repo: str = "org/name", commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A data set as ``hf download`` leaves it: blobs, links to them, and what ``main`` is."""
    root = cache / f"datasets--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob, link = root / "blobs" / f"{commit[:2]}{number}", root / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content if isinstance(content, bytes) else content.encode())
        link.symlink_to(blob)
    return root / "snapshots" / commit


def row(text: str) -> str:
    return json.dumps({"prompt": f"say {text}", "completion": text}) + "\n"


def texts(entry: str) -> list[str]:
    return [example.messages[-1].content for example in read_dataset(entry).examples]


CONFIGS = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: ["en/b.jsonl", "en/a*.jsonl"]
  - split: held
    path: en/deep/**/*.jsonl
- config_name: de
  data_files: "de.csv"
---
# Text
"""
FILES = {
    "README.md": CONFIGS,
    "en/b.jsonl": row("b1") + row("b2"),
    "en/a1.jsonl": row("a1"),
    "en/aside/z.jsonl": row("another folder"),
    "en/deep/x/y.jsonl": row("held"),
    "de.csv": "prompt,completion\nsag,ja\n",
    "make.py": "raise SystemExit('a script was run')",
}


def test_the_head_of_the_readme_says_what_belongs_together(cache: Path) -> None:
    lay_out(cache, FILES)
    assert texts("hf:org/name") == ["a1", "b1", "b2"]  # files in sorted order, rows in theirs
    assert texts("hf:org/name#held") == ["held"]
    assert texts("hf:org/name:de") == ["ja"]
    assert texts("hf:org/name:en@main#train") == ["a1", "b1", "b2"]
    dataset = read_dataset("hf:org/name")
    assert [example.row for example in dataset.examples] == [1, 2, 3]
    assert any(f"split train, revision {COMMIT[:12]}, en/a1.jsonl, en/b.jsonl" in note for note in dataset.notes)


def test_revisions_are_branches_tags_and_commits(cache: Path) -> None:
    lay_out(cache, {"rows.jsonl": row("old")}, commit=OLDER, ref="v1")
    lay_out(cache, {"rows.jsonl": row("new")})
    assert texts("hf:org/name") == ["new"]
    assert texts("hf:org/name@v1") == texts(f"hf:org/name@{OLDER}") == ["old"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"], None),
        (["train.jsonl", "valid.jsonl", "test.csv"], None),
        (["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"], None),
        (["rows.jsonl", "more.jsonl"], None),
        (["my-train-rows.json", "my_eval.json"], None),
        (["data/easy-00000-of-00001.parquet", "data/hard-00000-of-00001.parquet"], None),
        (["training.tsv", "constraint.tsv"], {"train": ["training.tsv"]}),
    ],
    ids=str,
)
def test_names_of_files_say_the_split_as_the_hub_reads_them(names: list[str], expected: object, tmp_path: Path) -> None:
    found = hub_data._by_name(sorted(names))
    if expected is not None:
        assert found == expected
        return
    files = pytest.importorskip("datasets.data_files", reason="needs datasets: pip install -e '.[oracles]'")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    patterns = files.get_data_patterns(str(tmp_path))
    theirs = files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path))
    assert found == {
        str(split): sorted(Path(f).relative_to(tmp_path).as_posix() for f in each) for split, each in theirs.items()
    }


def test_without_a_list_a_folder_is_a_configuration() -> None:
    names = ["en/train.jsonl", "en/test.jsonl", "de/train.jsonl"]
    assert choose(names, {}, HubData("o/n", "en")).names == ("en/train.jsonl",)
    assert choose(names, {}, HubData("o/n")).names == ("de/train.jsonl", "en/train.jsonl")
    nested = {"configs": [{"config_name": "en", "data_dir": "en"}, {"config_name": "x", "data_files": {"test": "de/*"}}]}
    assert choose(names, nested, HubData("o/n", "en", None, "test")).names == ("en/test.jsonl",)
    assert choose(names, nested, HubData("o/n", "x")).split == "test"


@pytest.mark.slow
def test_every_reader_of_rows_takes_one(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n"
    lay_out(cache, {"train.jsonl": pair, "test.jsonl.gz": gzip.compress(pair.encode())}, "org/pairs")
    assert [len(read_pairs(f"hf:org/pairs{split}").pairs) for split in ("", "#test")] == [1, 1]
    lay_out(cache, {f"train-{i:05d}-of-00002.jsonl": "".join(row(f"{i}{c}") for c in "abcdefgh") for i in range(2)})
    assert len(read_prompts("hf:org/name").prompts) == 16
    model = str(write_model(tmp_path / "model", tmp_path / "scratch"))
    named = ["train", "--model", model, "--out", str(tmp_path / "run"), "--steps", "1", "--dtype", "fp32", "--rank", "2"]
    lay_out(cache, {"text.jsonl": '{"text": "what the model should not forget"}\n'}, "org/text")
    named += ["--data", "hf:org/name", "--replay", "hf:org/text", "--replay-share", "0.3", "--validation-share", "0"]
    assert main(named) == 0
    facts = json.loads((tmp_path / "run/data.json").read_text())
    assert facts["train"]["path"] == "hf:org/name"
    assert main(["inspect", "--model", model, "--data", "hf:org/name"]) == 0
    assert main(["eval", "--model", model, "--data", "hf:org/name", "--metric", "loss", "--out", str(tmp_path / "e")]) == 0
    assert main(["select", "--data", "hf:org/name", "--out", str(tmp_path / "s.jsonl"), "--rows", "3"]) == 0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 3
    # Other rows under the same name are another run.
    (cache / "datasets--org--name/blobs/aa1").write_text(row("another"))
    capsys.readouterr()
    assert main([*named, "--resume"]) == 5
    assert "data.train" in capsys.readouterr().err


def test_entries_are_taken_apart_and_weighed() -> None:
    assert parse_hub("hf:squad") == HubData("squad")
    assert parse_hub("hf:o/n:c.1@v1.0/x#val") == HubData("o/n", "c.1", "v1.0/x", "val")
    assert parse_sources(["hf:o/n:c:0.7", "hf:o/n#test:3"]) == (Source("hf:o/n:c", 0.7), Source("hf:o/n#test", 3.0))
    assert parse_sources("hf:o/n:2023#train") == (Source("hf:o/n:2023#train"),)
    for entry in ("hf:", "hf:o/n/x", "hf:../../etc", "hf:o/..", "hf:o/n#", "hf:o/n@../x", "hf:o/n:a:b:c"):
        with pytest.raises(UserError, match="config/bad-hub-id"):
            parse_sources(entry)


@pytest.mark.parametrize(
    ("files", "entry", "said"),
    [
        (None, "hf:org/name", r"data/not-cached.*hf download --repo-type dataset org/name"),
        (FILES, "hf:org/name@v9", "data/not-cached"),
        (FILES, "hf:org/name:fr", "data/hub-config.*expected en, de"),
        (FILES, "hf:org/name#test", "data/hub-split.*found test; expected held, train"),
        ({"name.py": "", "README.md": "# x"}, "hf:org/name", "data/hub-script.*found name.py"),
        ({"a.txt": "", "b.bin": ""}, "hf:org/name", "data/hub-files"),
        (
            {"train-00000-of-00003.jsonl": row("a"), "train-00002-of-00003.jsonl": row("b")},
            "hf:org/name",
            "data/hub-incomplete",
        ),
        (
            {"de/train-00001-of-00002.jsonl": row("a"), "en/train-00000-of-00002.jsonl": row("b")},
            "hf:org/name",
            "data/hub-incomplete.*no de/train-00000-of-00002",
        ),
        ({"README.md": "---\n- [\n---\n", "a.jsonl": row("a")}, "hf:org/name", "data/hub-readme"),
        ({"README.md": "x" * (2**22 + 1), "a.jsonl": row("a")}, "hf:org/name", "data/hub-readme.*too large"),
        (
            {"validation.jsonl": row("a"), "test.jsonl": row("a")},
            "hf:org/name",
            "none is named train.*expected test, validation",
        ),
        ({"a.jsonl": "{"}, "hf:org/name", "data/bad-json"),
    ],
)
def test_what_is_not_there_is_one_error_that_lists_what_is(
    cache: Path, files: dict[str, bytes | str] | None, entry: str, said: str
) -> None:
    if files is not None:
        lay_out(cache, files)
    with pytest.raises(UserError, match=said):
        read_dataset(entry)


def test_a_link_out_of_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    snapshot = lay_out(cache, {"a.jsonl": row("a")})
    (tmp_path / "secret.jsonl").write_text(row("secret"))
    (snapshot / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match="data/bad-file"):
        read_dataset("hf:org/name")


def test_with_a_network_only_what_is_missing_is_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    lay_out(cache, {"train.jsonl": row("cached")})
    assert texts("hf:org/name") == ["cached"]  # nothing is asked: the test's sockets refuse
    asked: list[object] = []
    real = huggingface_hub.snapshot_download

    def download(repo: str, **settings: object) -> str:
        if settings.get("local_files_only"):
            return real(repo, **settings)
        asked.append(settings["allow_patterns"])
        return str(lay_out(cache, {"test.jsonl": row("fetched")}, commit=OLDER))

    names = ["train.jsonl", "test.jsonl", "x.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert texts("hf:org/name#test") == ["fetched"]
    assert asked == [["test.jsonl", "README.md"]]

    def fail(*_: object, **__: object) -> None:
        raise type("ConnectError", (Exception,), {})("no route")  # as httpx: no OSError

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(UserError, match=r"data/download.*no route"):
        read_dataset("hf:org/other")
