"""How long data work takes on a large pool: inspect --quality, select, the start of train, and peers on the same rows.

    python benchmarks/bench_data.py                      # 300 000 rows: about half an hour on two cores
    python benchmarks/bench_data.py --rows 20000 --out build/bench
    python benchmarks/bench_data.py --only train         # one part anew; the others stay in the results file

The pool (``data_pool.py``) is the same bytes for the same number of rows. Each command is a process of its own; seconds, CPU
seconds (of all threads) and peak memory are the whole process's. Peers: datasketch's MinHash and LSH on the same shingles of
20 000 rows, timed without reading them, and transformers' ``apply_chat_template`` and tokenizer on 5 000 rows. Results:
benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_pool import write_pool
from harness import out_folder, provenance, save

CHILD = Path(__file__).parent / "measured_child.py"
MODEL = "smollm2-135m-instruct"
PEER_ROWS, CHAT_ROWS = 20_000, 5_000


def measured(*command: object) -> dict:
    """Seconds, CPU seconds and peak memory of ``minisft`` with these words."""
    words = [sys.executable, str(CHILD), sys.executable, "-m", "minisft", *map(str, command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    cell = json.loads(done.stdout.strip().splitlines()[-1]) | {"load_after": os.getloadavg()[0]}
    print(json.dumps({" ".join(map(str, command[:1])): cell}), flush=True)
    return cell


def inspect(pool: Path, test: Path, folder: Path) -> dict:
    return measured("inspect", "--data", pool, "--quality", "--against", test, "--out", folder / "report")


def select(pool: Path, folder: Path) -> dict:
    out = folder / "picked.jsonl"
    return measured("select", "--data", pool, "--out", out, "--dedup", "near", "--drop-defects", "--score", "length")


def train(pool: Path, folder: Path) -> dict[str, dict]:
    """A run of one step, before and after its rows are kept."""
    os.environ["MINISFT_CACHE"] = str(folder / "cache")  # empty at first
    cells = {}
    for name in ("first", "from the cache"):
        run = ("train", "--model", MODEL, "--data", pool, "--out", folder / name.replace(" ", "-"))
        cells[name] = measured(*run, "--steps", 1, "--batch-size", 1, "--max-length", 512, "--validation-share", 0)
    return cells


def near_copies(pool: Path) -> dict:
    """Our MinHash, LSH and verification beside datasketch's MinHash and LSH, on the same shingles."""
    from minisft.quality.near_duplicates import NUM_HASHES, find_pairs, near_pairs, rows_of_band, shingle_sets
    from minisft.quality.pool import read_pool

    few = pool.with_name("few.jsonl")
    with pool.open() as lines:
        few.write_text("".join(line for _, line in zip(range(PEER_ROWS), lines, strict=False)))
    words = read_pool(str(few)).words
    sets = shingle_sets(words)
    began = time.perf_counter()
    ours = find_pairs(sets.select, len(sets), 0.8, exact=False)
    cell: dict = {"rows": len(sets), "ours_s": time.perf_counter() - began, "ours_pairs": len(ours.first)}
    exact = near_pairs(sets, 0.8, exact=True)
    cell["exact_pairs"] = len(exact.first)
    try:
        import datasketch
    except ImportError:
        return cell | {"peer": "datasketch is not installed"}
    began = time.perf_counter()
    r = rows_of_band(0.8)
    index = datasketch.MinHashLSH(num_perm=NUM_HASHES, params=(NUM_HASHES // r, r))
    hashed = datasketch.MinHash.bulk([[value.tobytes() for value in sets[i]] for i in range(len(sets))], num_perm=NUM_HASHES)
    pairs = set()
    for i, signature in enumerate(hashed):
        pairs |= {(j, i) for j in index.query(signature)}
        index.insert(i, signature)
    seconds = time.perf_counter() - began
    mine = set(zip(ours.first.tolist(), ours.second.tolist(), strict=True))
    return cell | {
        "peer": f"datasketch {datasketch.__version__}", "peer_s": seconds, "ratio": seconds / cell["ours_s"],
        "peer_pairs": len(pairs), "peer_unverified": len(pairs - mine), "only_ours": len(mine - pairs),
    }  # fmt: skip


def tokens(pool: Path) -> dict:
    """Our encoding of chats beside transformers' on the same rows; both must give the same ids."""
    from minisft.data.chat import resolve_template
    from minisft.data.encoding import encode_dataset
    from minisft.data.messages import read_dataset
    from minisft.formats import load_tokenizer

    few = pool.with_name("chats.jsonl")
    with pool.open() as lines:
        few.write_text("".join(line for _, line in zip(range(CHAT_ROWS), lines, strict=False)))
    examples = read_dataset(few).examples
    tokenizer = load_tokenizer(MODEL)
    template = resolve_template(tokenizer)
    began = time.perf_counter()
    ours = encode_dataset(examples, tokenizer, template, 4096).rows
    cell: dict = {"rows": len(examples), "ours_s": time.perf_counter() - began}
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return cell | {"peer": "transformers is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        peer = PreTrainedTokenizerFast.from_pretrained(folder)
    peer.chat_template = tokenizer.chat_template
    chats = [[{"role": m.role, "content": m.content} for m in example.messages] for example in examples]
    began = time.perf_counter()
    theirs = [peer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]
    seconds = time.perf_counter() - began
    same = np.mean([list(row.input_ids) == ids for row, ids in zip(ours, theirs, strict=True)])
    return cell | {
        "peer": "transformers, row by row",
        "peer_s": seconds,
        "ratio": seconds / cell["ours_s"],
        "same_ids": float(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results file")
    parser.add_argument("--only", choices=("inspect", "select", "train", "near", "tokens"), nargs="+")
    given = parser.parse_args()
    out = out_folder(given.out, given.rows < 300_000)
    path = out / "data.json"
    result = json.loads(path.read_text()) if given.only and path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool, test = folder / "pool.jsonl", folder / "test.jsonl"
        write_pool(pool, test, given.rows)
        parts = {
            "inspect": lambda: inspect(pool, test, folder),
            "select": lambda: select(pool, folder),
            "train": lambda: train(pool, folder),
            "near": lambda: near_copies(pool),
            "tokens": lambda: tokens(pool),
        }
        facts = {"rows": given.rows, "pool_bytes": pool.stat().st_size}
        for part in given.only or parts:
            result[part] = parts[part]() | {"pool": facts} | provenance()
            print(json.dumps({part: result[part]}, indent=1), flush=True)
            save("data", result, out)  # each as it comes: the whole takes half an hour
    print(path)


if __name__ == "__main__":
    main()
