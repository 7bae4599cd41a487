"""Two models side by side for people: answers prepared or live, votes kept, results with an interval that is valid at any time.

Both models stay in memory while the page is served, so that people can also chat with them. Everything stays on this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from minisft.common.atomic_files import make_folder, write_durably
from minisft.common.errors import UserError, visible
from minisft.common.local_server import address_of, check_access, own_hosts, run_server
from minisft.common.safe_json import JSON
from minisft.data.messages import Message, read_dataset
from minisft.judging.arena_app import Answer, Arena, make_app
from minisft.judging.arena_store import ArenaStore, Side
from minisft.judging.votes import headline, win_rate

VOTES, RESULT = "votes.sqlite", "arena.json"


def split_name(name: str) -> tuple[str, str | None]:
    """``MODEL+ADAPTER`` -> (model, adapter); a model whose path has a plus sign stays whole.

    Raises:
        UserError: nothing before or after the plus sign.
    """
    if "+" not in name or Path(name).exists():
        return name, None
    model, _, adapter = name.rpartition("+")
    if not model or not adapter:
        fix = "write MODEL, or MODEL+ADAPTER"
        raise UserError("config/bad-model", "a contestant cannot be read", found=visible(name, 80), fix=fix)
    return model, adapter


def open_arena(out: Path, names: tuple[str, str], prompts: str | Path, system: str | None = None) -> ArenaStore:
    """The votes in ``out``, new or to go on with; the prompts are those of the data file without their last answer.

    Args:
        out: folder.
        names: of the two models.
        prompts: rows whose turns before the last answer are asked.
        system: put before rows that have no system turn.

    Returns:
        the store, with every prompt in it.

    Raises:
        UserError: bad rows, no prompts, or a folder with votes on other models or prompts.
    """
    dataset = read_prompts(prompts)
    make_folder(out.absolute())
    store = ArenaStore(out / VOTES)
    digest = hashlib.sha256(json.dumps([[(m.role, m.content) for m in talk] for talk in dataset]).encode()).hexdigest()
    store.begin({"a": names[0], "b": names[1], "prompts": digest})
    for number, talk in enumerate(dataset, 1):
        asked = talk if system is None or talk[0].role == "system" else [Message("system", system), *talk]
        store.add_prompt(f"row-{number}", (asked, asked))
    return store


def read_prompts(path: str | Path) -> list[list[Message]]:
    """The conversation of each row up to its last user turn; rows with a ``prompt`` alone are allowed.

    Raises:
        UserError: rows that cannot be read, or no user turn.
    """
    talks = _bare_prompts(Path(path)) or [list(e.messages) for e in read_dataset(path, keep_duplicates=True).examples]
    asked = []
    for number, talk in enumerate(talks, 1):
        last = max((i for i, m in enumerate(talk) if m.role == "user"), default=None)
        if last is None:
            where = f"{visible(path)}: row {number}"
            raise UserError("data/no-prompt", "a row asks nothing", where=where, expected="a user turn")
        asked.append(talk[: last + 1])
    return asked


def _bare_prompts(path: Path) -> list[list[Message]] | None:
    """Rows that hold a prompt and no answer; None when the file has another form."""
    from minisft.data.json_rows import MAX_ROW_BYTES, RowFile

    talks = []
    for _, where, row in RowFile(path, MAX_ROW_BYTES).rows():
        if not isinstance(row.get("prompt"), str) or {"completion", "messages", "conversations"} & set(row):
            return None
        if not str(row["prompt"]).strip():
            raise UserError("data/no-prompt", "a row asks nothing", where=where, expected="a prompt")
        talks.append([Message("user", str(row["prompt"]))])
    return talks


def prepare(store: ArenaStore, answers: dict[Side, Answer], progress: Callable[[int, int], None] | None) -> None:
    """Let both models answer what they have not answered yet; an interrupted preparation goes on where it was.

    Args:
        store: with prompts.
        answers: who answers for each side.
        progress: called with (answers done, answers in all).
    """
    waiting: list[tuple[Side, str, list[Message]]] = []
    for side in answers:
        waiting += [(side, prompt, talk) for prompt, talk in store.unanswered(side)]
    for done, (side, prompt, talk) in enumerate(waiting, 1):
        store.set_answer(prompt, side, answers[side](talk, lambda piece: None))
        if progress is not None:
            progress(done, len(waiting))


def make_arena(
    store: ArenaStore, answers: dict[Side, Answer] | None, *, live: bool, host: str, port: int, token: str | None
) -> Arena:
    """Who may ask: this machine's own names, or with a token the host that is given.

    Args:
        store: with prompts.
        answers: who answers for each side; None: prepared answers only.
        live: answer when a prompt is shown.
        host, port: where the page is served.
        token: for another host than this machine.

    Returns:
        what ``make_app`` takes.

    Raises:
        UserError: another host without a token, or a token too short to be one.
    """
    check_arena_access(host, token)
    return Arena(store, answers, live, own_hosts(host, port), token)


def check_arena_access(host: str, token: str | None) -> None:
    """Refuse to open the page to the network without a token.

    Raises:
        UserError: another host without a token, or a token too short to be one.
    """
    check_access(host, token, "the page", "give --token with at least 16 characters; people open the page with #token=...")


def serve_arena(arena: Arena, host: str, port: int, out: Path, log: Callable[[str], None]) -> dict[str, JSON] | None:
    """Serve the page until it is interrupted, then write the result.

    Args:
        arena: what to serve.
        host, port: where.
        out: folder for ``arena.json``.
        log: called with the address, once the page can be opened.

    Returns:
        what ``write_result`` wrote.

    Raises:
        UserError: the port is taken.
    """
    address = f"{address_of(host, port)}/" + (f"#token={arena.token}" if arena.token else "")
    try:
        run_server(make_app(arena), host, port, lambda: log(address))
    finally:
        result = write_result(arena.store, out)
    return result


def write_result(store: ArenaStore, out: Path) -> dict[str, JSON] | None:
    """Write ``arena.json``: the win rate and how it was found; nothing without votes."""
    votes = store.judgements()
    if not votes:
        return None
    names, rate = store.meta(), win_rate(votes)
    result: dict[str, JSON] = {"a": names.get("a", "a"), "b": names.get("b", "b"), **rate.to_json()}
    result["headline"] = headline(rate, names.get("a", "a"), names.get("b", "b"))
    write_durably(out / RESULT, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    return result


def summary(result: dict[str, JSON] | None, names: Sequence[str]) -> str:
    """One line on the votes."""
    if result is None:
        return "no votes"
    rate, flips = result["always_valid"], result["flip_rate"]
    assert isinstance(rate, dict)
    low, high = (f"{float(str(rate[key])):.1%}" for key in ("low", "high"))
    flipped = "no pair in both orders" if flips is None else f"flip rate {float(str(flips)):.0%}"
    return (
        f"B ({visible(names[1], 60)}) over A ({visible(names[0], 60)}): {float(str(rate['estimate'])):.1%} "
        f"({low} to {high}, valid at any time), {result['pairs']} pairs; {flipped}"
    )
