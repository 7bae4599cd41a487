"""Does llama.cpp answer as minisft does? The rows of a file, asked with their chats; answers compared character by character.

    minisft eval --model M --adapter A --data test.jsonl --metric json --out minisft.json
    minisft export --model M --adapter A --out m.gguf --outtype f32
    python benchmarks/llama_cpp_answers.py --gguf m.gguf --data test.jsonl --answers minisft.rows.jsonl --out llama.json

The answers of minisft are those that ``minisft eval`` wrote. Needs the extra ``llamacpp``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import provenance

from minisft.common.llama_cpp import ask

MAX_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()]
    ours = [json.loads(line)["prediction"] for line in given.answers.read_text(encoding="utf-8").splitlines()]
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "cache_prompt": False}
    answers = ask(given.gguf, [{**settings, "messages": row["messages"][:-1]} for row in rows], 512)
    theirs = [answer["choices"][0]["message"]["content"] for answer in answers]
    right = [row["messages"][-1]["content"] for row in rows]
    differing = [
        {"row": number, "minisft": a, "llama.cpp": b}
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)
        if a.strip() != b.strip()
    ]
    found = {
        "rows": len(rows),
        "same_answers": len(rows) - len(differing),
        "right_minisft": sum(a.strip() == r for a, r in zip(ours, right, strict=True)),
        "right_llama_cpp": sum(b.strip() == r for b, r in zip(theirs, right, strict=True)),
        "differing": differing,
        "provenance": provenance(),
    }
    given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("rows", "same_answers", "right_minisft", "right_llama_cpp")}))


if __name__ == "__main__":
    main()
