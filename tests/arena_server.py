"""An arena for tests, without a model: ``python tests/arena_server.py FOLDER PORT [live]`` serves until it is killed.

Side a answers in capitals, side b word by word the other way round; a prompt that asks for an attack gets markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from minisft.data.messages import Message
from minisft.judging.arena import make_arena, open_arena, prepare, serve_arena

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e\x07" + "w" * 1_000_000
PROMPTS = ["first question", "second question", "an attack", "fourth question", "fifth question", "sixth question"]


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def answer_a(messages: list[Message], show: Callable[[str], None]) -> str:
    return _said(messages[-1].content.upper(), show)


def answer_b(messages: list[Message], show: Callable[[str], None]) -> str:
    text = messages[-1].content
    return _said(HOSTILE if "attack" in text else " ".join(reversed(text.split())), show)


def _said(text: str, show: Callable[[str], None]) -> str:
    for start in range(0, len(text), 4096):
        show(text[start : start + 4096])
    return text


def main(folder: Path, port: int, live: bool) -> None:
    folder.mkdir(exist_ok=True)
    answers = {"a": answer_a, "b": answer_b}
    store = open_arena(folder, ("model one", "model two"), write_prompts(folder))
    if not live:
        prepare(store, answers, None)
    arena = make_arena(store, answers, live=live, host="127.0.0.1", port=port, token=None)
    serve_arena(arena, "127.0.0.1", port, folder, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "live" in sys.argv)
