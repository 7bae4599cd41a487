"""Canaries: what a hostile template, file name or text would do if it got through, tried and looked for."""

from __future__ import annotations

import contextlib
import html.parser
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_folder import TEMPLATE, write_rows, write_shop

from minisft.cli.main import main
from minisft.common.errors import UserError
from minisft.data.messages import Message
from minisft.data.template import ChatTemplate
from minisft.formats.source import regular_file
from minisft.judging.bad_cases import BadCase
from minisft.judging.compare_page import _case
from minisft.merging.report_html import _pairs
from minisft.quality import html as pages

Note = Callable[[str, object], None]

# ---- templates -------------------------------------------------------------------------------------------------------

SECRET = "canary-4f1d"
RUN = "os.system('touch canary')"
GLOBALS = ("lipsum", "cycler.__init__", "joiner.__init__", "namespace.__init__")
INJECTIONS = [
    *(f"{{{{ {name}.__globals__.os.system('touch canary') }}}}" for name in GLOBALS),
    *(f"{{{{ {name}['__glo' ~ 'bals__']['os'].environ['CANARY'] }}}}" for name in GLOBALS),
    *(f"{{{{ ({name}|attr('__globals__'))['os'].popen('touch canary').read() }}}}" for name in GLOBALS[:3]),
    "{{ lipsum.__globals__['__builtins__'].open('canary', 'w').close() }}",
    "{{ lipsum.__globals__.__builtins__['__import__']('os').environ.CANARY }}",
    "{{ lipsum.__globals__.__builtins__.eval(\"__import__('os').system('touch canary')\") }}",
    "{{ lipsum.__globals__.__builtins__.exec(\"open('canary', 'w')\") }}",
    "{{ self.__init__.__globals__.__builtins__.open('canary', 'w') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.environ.CANARY }}",
    "{% for c in ''.__class__.__mro__[-1].__subclasses__() if c.__name__ == '_wrap_close' %}"
    "{{ c.__init__.__globals__.environ.CANARY }}{% endfor %}",
    "{% for c in [].__class__.__base__.__subclasses__() if c.__name__ == 'Popen' %}{{ c('touch canary', shell=True).wait()"
    " }}{% endfor %}",
    "{% for c in ''['__class__']['__mro__'][-1]['__subclasses__']() if c.__name__ == '_wrap_close' %}"
    "{{ c.__init__.__globals__['system']('touch canary') }}{% endfor %}",
    "{{ messages.__class__.__init__.__objclass__.__subclasses__() }}{{ lipsum.__globals__.os.environ.CANARY }}",
    "{{ '{0.__init__.__globals__[os].environ[CANARY]}'.format(cycler) }}",
    "{{ '{x.__globals__[os].environ[CANARY]}'.format_map({'x': lipsum}) }}",
    "{{ ('%s' % lipsum.__globals__)[:0] }}{{ lipsum.__globals__.os.getenv('CANARY') }}",
    "{% set g = lipsum.__globals__ %}{% set o = g.os %}{{ o.system('touch canary') }}",
    "{% macro m(f) %}{{ f.__globals__.os.system('touch canary') }}{% endmacro %}{{ m(lipsum) }}",
    "{% call(x) cycler() %}{% endcall %}{{ cycler.__init__.__globals__.os.environ.CANARY }}",
    "{{ [lipsum]|map(attribute='__globals__')|map(attribute='os')|map(attribute='environ')|list }}",
    "{{ ([lipsum]|map('attr', '__globals__')|list)[0].os.environ.CANARY }}",
    "{{ dict.__init__.__objclass__.__base__.__subclasses__()|length }}{{ cycler.__init__.__globals__.os.environ.CANARY }}",
    "{{ range.__class__.__mro__ }}{{ joiner.__init__.__globals__.os.environ.CANARY }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__.os.environ.CANARY }}{{ lipsum.__globals__.os.environ.CANARY }}",
    "{{ lipsum.__globals__.os.listdir('.') }}{{ lipsum.__globals__.os.mkdir('canary') }}",
    "{{ lipsum.__globals__.os.rename('bait', 'canary') }}",
    "{{ raise_exception.__globals__.Path('canary').touch() }}{{ lipsum.__globals__.os.environ.CANARY }}",
    "{{ strftime_now.__globals__ }}{{ lipsum.__globals__.os.environ.CANARY }}",
]  # fmt: skip


@pytest.fixture
def cage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and an environment in which every payload has something to find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", SECRET)
    (tmp_path / "bait").write_text("")
    return tmp_path


def _escaped(render: Callable[[], str], cage: Path) -> bool:
    """Whether a payload did what it wanted: its text or its error shows the secret, or the folder is another."""
    try:
        said = render()
    except Exception as error:
        said = str(error)
    done = SECRET in said or (cage / "canary").exists() or not (cage / "bait").exists()
    for left in cage.iterdir():
        left.rmdir() if left.is_dir() else left.unlink()
    (cage / "bait").write_text("")
    return done


@pytest.mark.slow
def test_no_template_reaches_the_machine(cage: Path, record_property: Note) -> None:
    escaped = []
    for payload in INJECTIONS:
        if _escaped(lambda payload=payload: ChatTemplate(TEMPLATE + payload, {}).render([Message("user", "q")]).text, cage):
            escaped.append(payload)
    assert not escaped
    record_property("injections", len(INJECTIONS))


def test_the_same_payloads_work_without_the_sandbox(cage: Path, record_property: Note) -> None:
    """Negative control: Jinja2 as it comes, which two of eight trainers use."""
    plain = jinja2.Environment()
    plain.globals |= {"raise_exception": regular_file, "strftime_now": regular_file}
    worked = sum(_escaped(lambda p=p: plain.from_string(p).render(messages=[{"role": "user"}]), cage) for p in INJECTIONS)
    assert worked >= 0.6 * len(INJECTIONS)
    record_property("control escapes", worked)


# ---- names of files --------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["..", ".", "", "~", "a", "inside", "link", "/", "\0", "\\", "..\\", "outside", "%2e%2e", "\udcff", "x" * 300]
)


@given(st.lists(PIECES, max_size=5).map("/".join) | st.lists(PIECES, max_size=4).map("".join) | st.text(max_size=9))
def test_no_name_leads_out_of_its_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "names"
    folder = root / "in"
    if not folder.exists():
        folder.mkdir(parents=True)
        (root / "outside").write_text("")
        (folder / "inside").write_text("")
        (folder / "link").symlink_to(root / "outside")
    try:
        found = regular_file(folder, name, "model/shard")
    except UserError as error:
        said = str(error)
    else:
        said = ""
        assert found.resolve() == folder / "inside"
    assert not acts(said)


# ---- markup and control characters -----------------------------------------------------------------------------------

HOSTILE_TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from(["<script>", "</div>", "<img src=x onerror=a>", '"', "'", "<!--", "-->", "&lt;", "\x1b[2J", "\x9b",
    "\u202e", "]]>", "a",
                     "</style>", "<svg onload=a>", "\x00", "\x07", "{{1}}", "javascript:", "`", "=", " ", "\u2028", "\ud800"]),
    max_size=6,
).map("".join)  # fmt: skip


def acts(text: str) -> list[str]:
    """The characters, but for line breaks, that act on a terminal or a page: controls, lone surrogates, directions."""
    orders, directions = ("Cc", "Cs", "Zl", "Zp"), ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return [c for c in text if c != "\n" and (unicodedata.category(c) in orders or unicodedata.bidirectional(c) in directions)]


class _Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", ()))


def _case_of(text: str) -> str:
    return _case(BadCase(3, "shared", text, 0.5, text, text, text, text, near=(text,)))


PAGES: dict[str, Callable[[str], str]] = {
    "document": lambda text: pages.document(text, [pages.heading(text, text)]),
    "table": lambda text: pages.table([text, "b"], [[text, 1]], excerpts=True),
    "marked": lambda text: pages.table(["a"], [[pages.marked(f"ab{text}cd", 1, 2)]]),
    "bars": lambda text: pages.bars({text: 3}),
    "merge report": lambda text: _pairs({"a": {"k": text}, "b": text}),
    "comparison": _case_of,
}


@pytest.mark.parametrize("page", PAGES)
@given(text=HOSTILE_TEXT)
def test_text_adds_no_element_to_a_page(page: str, text: str) -> None:
    shown = PAGES[page](f"x{text}")
    markup = [element for element in _Elements(shown).seen if element[0] not in ("del", "ins")]
    assert markup == [element for element in _Elements(PAGES[page]("x")).seen if element[0] not in ("del", "ins")]
    assert not acts(shown)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("canaries"))


@pytest.mark.slow
@given(text=HOSTILE_TEXT, place=st.sampled_from(["content", "role", "key", "file", "flag"]))
def test_nothing_from_a_file_or_flag_acts_on_a_terminal(
    shop: Path, tmp_path_factory: pytest.TempPathFactory, text: str, place: str
) -> None:
    assume(place not in ("file", "flag") or not set(text) & {"\0", "\ud800"})  # which no word of a command line can hold
    turns = [{"role": text if place == "role" else "user", "content": text if place == "content" else "q"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "a"}], **({text: text} if place == "key" else {})}
    path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    path.write_text(json.dumps(row) + "\n")
    file = f"nowhere{text}" if place == "file" else str(path)
    words = ["inspect", "--data", file, "--model", str(shop / "model"), *([f"--{text}"] if place == "flag" else [])]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(words)
    assert not acts(said.getvalue())


# ---- the network -----------------------------------------------------------------------------------------------------

_calls: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _calls is not None and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        _calls.append(f"{event} {arguments[-1]}")


@pytest.fixture
def network_calls() -> Iterator[list[str]]:
    """What the interpreter itself notes of every connection, made through whatever library."""
    global _calls
    if not hasattr(sys, "_minisft_watched"):
        sys.addaudithook(_watch)  # stays for the process: it can only be told not to listen
        sys._minisft_watched = True  # type: ignore[attr-defined]  # a mark of ours, which sys does not have
    _calls = []
    yield _calls
    _calls = None


@pytest.mark.slow
def test_no_command_asks_the_network(shop: Path, tmp_path: Path, network_calls: list[str], record_property: Note) -> None:
    model, run, rows = str(shop / "model"), tmp_path / "run", str(write_rows(tmp_path / "rows.jsonl", 30))
    adapter, answers = str(run / "adapter"), str(tmp_path / "answers")
    commands = [
        ["inspect", "--data", rows, "--model", model],
        ["train", "--model", model, "--data", rows, "--out", str(run), "--steps", "2", "--batch-size", "2", "--rank", "2",
        "--dtype", "fp32"],
        ["merge", "--adapter", adapter, "--out", str(tmp_path / "merged")],
        ["generate", "--model", str(tmp_path / "merged"), "--prompt", "hi", "--max-new-tokens", "2"],
        ["eval", "--model", model, "--adapter", adapter, "--data", rows, "--metric", "exact_match", "--max-new-tokens", "2",
        "--out", answers],
        ["plan", "--model", model, "--data", rows, "--rank", "2"],
    ]  # fmt: skip
    for words in commands:
        assert main(words) == 0, words
    assert not network_calls
    record_property("commands", len(commands))
    record_property("network calls", len(network_calls))


def test_the_watch_on_the_network_works(network_calls: list[str]) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as door, pytest.raises(OSError, match="No such file"):
        door.connect(os.fspath("nowhere"))
    assert len(network_calls) == 1
