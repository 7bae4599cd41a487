"""Line 14 of the scorecard: 20 000 hostile files, read under a memory limit; only success or a coded error will do.

Every file is read in a forked child whose address space may grow by 64 MiB and no more; the child tells of each when it is
done with it, so a crash or a hang has a number too. ``python benchmarks/scorecard_fuzz.py FORMAT NUMBER`` reads one again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scorecard_mutants import broken_bytes, gguf, gguf_keys, json_bytes, mutated_json, rows, safetensors, template, written
from scorecard_parts import use_tests

COUNTS = {"safetensors": 4500, "gguf": 5500, "json": 2000, "jsonl": 5500, "tokenizer": 1500, "template": 1000}
MEMORY_BYTES = 64 * 2**20
HANG_S = 30.0  # of wall clock, on a machine that others use too
A_CHILD = 500  # files that one child reads
LOOPED = "ran longer than 2 s"
CONFIGS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)

Reader = Callable[[random.Random, Path], None]


# ---- what is read --------------------------------------------------------------------------------------------------------


def readers(folder: Path) -> dict[str, Reader]:
    """For each format, a function that makes a mutant in a folder and reads it as minisft does; built over good files."""
    use_tests()
    with contextlib.suppress(ImportError):
        import pyarrow.parquet  # noqa: F401  # a library that is loaded late must not be loaded under the limit
    import torch
    from gguf import GGMLQuantizationType
    from tiny_folder import TEMPLATE, write_model

    from minisft.common.errors import UserError
    from minisft.config import LoRAConfig, QuantConfig
    from minisft.data.chat import encode_chat
    from minisft.data.messages import read_dataset
    from minisft.data.template import ChatTemplate
    from minisft.data.tokenizer import Tokenizer
    from minisft.formats import load_adapter_, load_model, save_adapter, save_model, save_quantized
    from minisft.formats.gguf_file import load_gguf
    from minisft.formats.gguf_header import read_gguf
    from minisft.merging.export_gguf import export_gguf
    from minisft.surgery import apply_lora_

    good = write_model(folder / "good", folder / "scratch")
    model, tokenizer = load_model(good)
    save_model(model, tokenizer, folder / "sharded", max_shard_bytes=20_000)
    packed, _ = load_model(good, quant=QuantConfig(block_size=64))
    save_quantized(packed, tokenizer, folder / "packed")
    apply_lora_(model, LoRAConfig(rank=2, alpha=3.0))
    save_adapter(model, folder / "adapter")
    export_gguf(folder / "good.gguf", str(good), log=lambda text: None)
    whole = read_gguf(folder / "good.gguf")
    raw = (folder / "good.gguf").read_bytes()
    data_start = min(info.begin for info in whole.tensors.values())
    keys = gguf_keys(whole.metadata)
    tensors = [
        (name, list(reversed(info.shape)), int(GGMLQuantizationType[info.type_name]), info.begin - data_start)
        for name, info in whole.tensors.items()
    ]
    special, base = {"bos_token": "<s>", "eos_token": "<|im_end|>"}, load_model(good)[0].requires_grad_(False)
    chatml = ChatTemplate(TEMPLATE, special)

    def read_safetensors(draw: random.Random, into: Path) -> None:
        source, name = draw.choice((("good", "model"), ("packed", "model"), ("adapter", "adapter_model")))
        shutil.copytree(folder / source, into / "m")
        path = into / "m" / f"{name}.safetensors"
        path.write_bytes(safetensors(draw, path.read_bytes()))
        load_adapter_(copy.deepcopy(base), into / "m") if source == "adapter" else load_model(into / "m")

    def read_a_gguf(draw: random.Random, into: Path) -> None:
        found = read_gguf(written(into / "m.gguf", gguf(draw, keys, tensors, raw[data_start:])))
        load_gguf(found, torch.float32, torch.device("cpu"))
        Tokenizer.from_gguf(found.metadata)

    def read_json(draw: random.Random, into: Path) -> None:
        name = draw.choice(CONFIGS)
        source = {"adapter_config.json": "adapter", "model.safetensors.index.json": "sharded"}.get(
            name, draw.choice(("good", "packed"))
        )
        shutil.copytree(folder / source, into / "m")
        path = into / "m" / name
        path.write_bytes(
            broken_bytes(draw, json_bytes(draw, mutated_json(draw, json.loads(path.read_bytes()), shallow=True)), 0.05)
        )
        load_adapter_(copy.deepcopy(base), into / "m") if source == "adapter" else load_model(into / "m")

    def read_rows(draw: random.Random, into: Path) -> None:
        data = read_dataset(written(into / "rows.jsonl", rows(draw, SEED_ROWS)))
        for example in data.examples:
            encode_chat(tokenizer, chatml, example.messages, where="row")

    def read_tokenizer(draw: random.Random, into: Path) -> None:
        document = json.loads((good / "tokenizer.json").read_bytes())
        if draw.random() < 0.4:
            document["pre_tokenizer"] = draw.choice(SPLITTERS)
        shutil.copytree(good, into / "m", ignore=shutil.ignore_patterns("*.safetensors"))
        if draw.random() < 0.7:  # a document in which the 256 letters of the vocabulary are not what is mostly hit
            vocabulary, document["model"]["vocab"] = document["model"]["vocab"], {}
            document = mutated_json(draw, document)
            with contextlib.suppress(TypeError, KeyError):
                document["model"]["vocab"] = document["model"]["vocab"] or vocabulary
        else:
            document = mutated_json(draw, document)
        written(into / "m" / "tokenizer.json", json_bytes(draw, document))
        found = Tokenizer.from_folder(into / "m")
        found.decode(found.encode("Hello, ÄÖ 日本 <|im_end|>"))

    def read_template(draw: random.Random, into: Path) -> None:
        from minisft.data.messages import Message

        ChatTemplate(template(draw, TEMPLATE), special).render([Message("user", "a"), Message("assistant", "b")])

    # What is imported late, when a folder's model is not one of ours, must be there before the limit is.
    shutil.copytree(good, folder / "foreign")
    (folder / "foreign" / "config.json").write_text('{"model_type": "no-such-model"}')
    with contextlib.suppress(UserError):
        load_model(folder / "foreign")
    return {
        "safetensors": read_safetensors, "gguf": read_a_gguf, "json": read_json, "jsonl": read_rows,
        "tokenizer": read_tokenizer, "template": read_template,
    }  # fmt: skip


SEED_ROWS: list[dict[str, object]] = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "train": True},
        ]
    },
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "r", "input": "i", "output": "b", "system": "s", "history": [["q", "a"]]},
    {"prompt": "q", "completion": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {
        "messages": [
            {"role": "user", "content": "<|im_end|>q"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
        ],
        "id": 7,
    },
]


def _splitter(kind: str, pattern: str) -> dict[str, object]:
    return {"type": kind, "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, "content": "x"}


SPLITTERS = [
    *(_splitter("Split", pattern) for pattern in ("(a+)+$", "(?:(?:a*)*)*b", "\\p{L}+|\\p{N}", "(.*)\\1{9}x", "(?=(.*))*", "",
    "(", "x{1000000}")),
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 500},
    {"type": "Whitespace"}, {"type": "FixedLength", "length": 0}, {"type": "Punctuation", "behavior": "MergedWithNext"},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}, {"type": "CharDelimiterSplit",
    "delimiter": ""},
]  # fmt: skip


# ---- reading them all ----------------------------------------------------------------------------------------------------


@dataclass
class Fuzzed:
    """What came of the files: how many were read, how many refused, and what was wrong."""

    files: int = 0
    read: int = 0
    refused: int = 0
    longest_s: float = 0.0  # of CPU time, children included, for one file; without the templates stopped after their 2 s
    stopped: int = 0  # templates and tokenizers stopped after their 2 s
    longest_stopped_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)


def seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def judge(read: Reader, draw: random.Random, into: Path) -> tuple[str, str]:
    """``read``, ``refused`` with the error, or ``fault`` with what happened."""
    from minisft.common.errors import UserError

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read(draw, into)
        if hostile := [str(w.message) for w in said if not str(w.message).isprintable()]:
            return "fault", f"a warning with control characters: {hostile[0]!r}"
    except UserError as error:
        text = str(error)
        return ("refused", text) if text.isprintable() else ("fault", f"an error with control characters: {text!r}")
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {str(error)[:200]!r} at {_last_line(error)}"
    return "read", ""


def _last_line(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/minisft/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def read_some(name: str, read: Reader, numbers: range, scratch: Path, say: int) -> None:
    """In a child: read these files, and tell of each in a line."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    for number in numbers:
        into = scratch / "file"
        into.mkdir()
        began = seconds()
        kind, text = judge(read, random.Random(f"{name}/{number}"), into)
        line = json.dumps([number, kind, text[:400], seconds() - began]).encode()
        os.write(say, line + b"\n")
        shutil.rmtree(into)


def results(name: str, read: Reader, count: int, folder: Path) -> Iterator[tuple[int, str, str, float]]:
    """(number, kind, text, CPU seconds) of each of ``count`` files; a child that dies or hangs is a fault of its file."""
    number = 0
    while number < count:
        scratch = Path(tempfile.mkdtemp(dir=folder))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                read_some(name, read, range(number, min(count, number + A_CHILD)), scratch, writer)
            finally:
                os._exit(0)
        os.close(writer)
        last, end = number, min(count, number + A_CHILD)
        with os.fdopen(reader, "rb") as pipe:
            while number < end and select.select([pipe], [], [], HANG_S)[0] and (line := pipe.readline()):
                number, kind, text, spent = json.loads(line)
                yield number, kind, text, spent
                number += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(scratch)
        if number < end:
            yield number, "fault", f"the reading process hung or died: status {status}", 0.0
            number += 1
        assert number > last


def fuzz(counts: dict[str, int], done: Callable[[Fuzzed], object] = lambda _: None) -> dict[str, Fuzzed]:
    """Read so many hostile files of each format."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="minisft-scorecard-", dir=memory if os.access(memory, os.W_OK) else None) as name:
        folder = Path(name)
        found = {}
        for kind, read in readers(folder).items():
            warm = folder / "warm"
            warm.mkdir()
            judge(read, random.Random(0), warm)  # imports what reading needs, before the limit
            shutil.rmtree(warm)
            found[kind] = one = Fuzzed()
            for number, verdict, text, spent in results(kind, read, counts[kind], folder):
                one.files += 1
                if LOOPED in text and verdict == "refused":
                    one.stopped += 1
                    one.longest_stopped_s = max(one.longest_stopped_s, spent)
                else:
                    one.longest_s = max(one.longest_s, spent)
                one.read += verdict == "read"
                one.refused += verdict == "refused"
                one.codes[text.partition("]")[0].removeprefix("error[") if verdict == "refused" else verdict] += 1
                if verdict == "fault":
                    one.faults.append(f"{kind} {number}: {text}")
                done(one)
        return found


def hostile_files(quick: bool) -> dict[str, object]:
    """Line 14."""
    found = fuzz({kind: count // 100 if quick else count for kind, count in COUNTS.items()})
    every = list(found.values())
    return {
        "files": sum(one.files for one in every), "read": sum(one.read for one in every),
        "refused": sum(one.refused for one in every), "faults": sum(len(one.faults) for one in every),
        "longest s": max(one.longest_s for one in every), "stopped": sum(one.stopped for one in every),
        "longest stopped s": max(one.longest_stopped_s for one in every),
        "formats": sum(bool(one.read and one.refused) for one in every),  # of which some were read and some refused
        "by format": {kind: {"files": one.files, "read": one.read, "refused": dict(one.codes)} for kind, one in found.items()},
        "failures": [fault for one in every for fault in one.faults][:20], "quick": quick,
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        chosen, at = sys.argv[1], sys.argv[2]
        (Path(place) / "file").mkdir()
        reading = readers(Path(place))[chosen]
        reading(random.Random(f"{chosen}/{at}"), Path(place) / "file")
