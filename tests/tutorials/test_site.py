"""The site: built once, its links and names checked in the HTML, its pages opened in a real browser.

What is built are the committed notebooks and the docstrings as they are. The browser gets the pages from this machine alone;
anything else that a page asks for is a failure.
"""

from __future__ import annotations

import ast
import fcntl
import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

import minisft

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = ROOT / "tutorials/site"
NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.ipynb"))
WIDTHS = (375, 1280)
LIBRARY_LINE = re.compile(r"^\.\. library:: (\S+)$", re.MULTILINE)
FETCHING = {"src", "srcset", "poster", "data", "action", "background"}  # attributes whose address a browser loads by itself


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}: pip install -e '.[site]'")


# ---- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The built site; the workers of one run share it."""
    for module in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        needs(module)
    if not NOTEBOOKS:
        pytest.skip("no notebook has been built yet: make tutorials")
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    out = shared / "site"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "site.status").exists():
            command = [sys.executable, str(SITE / "build.py"), str(out)]
            built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
            (shared / "site.status").write_text(f"{built.returncode}\n{built.stderr}")
    status, _, messages = (shared / "site.status").read_text().partition("\n")
    assert status == "0", f"the site cannot be built:\n{messages}"
    return out


class Document(HTMLParser):
    """What one page defines (``ids``), links to, and makes the browser fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.following: dict[str, str] = {}  # "next-page" and "prev-page"
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            for direction in {"next-page", "prev-page"} & set(values.get("class", "").split()):
                self.following[direction] = values["href"]
        elif "href" in values and not values["href"].startswith("#"):  # <link>, <image>, <use>
            self.fetched.append(values["href"])
        self.fetched += [values[name] for name in FETCHING & values.keys()]
        self.fetched += addresses_in_css(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += addresses_in_css(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def addresses_in_css(text: str) -> list[str]:
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def is_external(address: str) -> bool:
    return bool(urlsplit(address).netloc) or address.startswith(("http:", "https:"))


@pytest.fixture(scope="session")
def documents(site: Path) -> dict[Path, Document]:
    return {path: Document(path) for path in sorted(site.rglob("*.html"))}


@pytest.mark.exhaustive
def test_every_link_resolves(site: Path, documents: dict[Path, Document]) -> None:
    broken = []
    for path, document in documents.items():
        for address in {*document.links, *document.fetched}:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                broken.append(f"{path.relative_to(site)}: {address}: no such file")
            elif target in documents and parts.fragment and unquote(parts.fragment) not in documents[target].ids:
                broken.append(f"{path.relative_to(site)}: {address}: no such place")
    assert not broken, "\n".join(broken)


@pytest.mark.exhaustive
def test_nothing_comes_from_another_host(site: Path, documents: dict[Path, Document]) -> None:
    fetched = {str(path.relative_to(site)): document.fetched for path, document in documents.items()}
    fetched |= {str(path.relative_to(site)): addresses_in_css(path.read_text("utf-8")) for path in site.rglob("*.css")}
    external = [f"{name}: {address}" for name, addresses in fetched.items() for address in addresses if is_external(address)]
    assert not external, "\n".join(external)
    assert fetched["index.html"], "the parser has found nothing that is fetched at all"


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="a.png" srcset="https://cdn.example/a.png 2x">',
        "<style>@import 'https://fonts.example/css';</style>",
        '<p style="background: url(https://cdn.example/a.png)">text</p>',
    ],
)
def test_the_parser_sees_what_would_be_fetched(markup: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(markup)
    assert any(is_external(address) for address in Document(tmp_path / "page.html").fetched)


def test_a_link_that_a_reader_clicks_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<a href="https://arxiv.org/abs/2106.09685">Hu et al.</a>')
    assert Document(tmp_path / "page.html").fetched == []


# ---- the library's pages -----------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names(path: Path) -> list[str]:
    """The module in ``path`` and its public functions and classes, from its source."""
    module = module_of(path)
    definitions = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = [node.name for node in body if isinstance(node, definitions) and not node.name.startswith("_")]
    return [f"module-{module}", *(f"{module}.{name}" for name in names)]


def test_every_module_has_its_line_on_the_page_of_its_folder() -> None:
    """``minisft/data/chat.py`` is in ``api/data.rst``; what lies flat is in ``api/flat.rst``."""
    listed = [(page.stem, name) for page in (SITE / "api").glob("*.rst") for name in LIBRARY_LINE.findall(page.read_text())]
    wanted = set()
    for path in (ROOT / "minisft").rglob("*.py"):
        folder = path.parent.relative_to(ROOT / "minisft").parts
        wanted.add((folder[0] if folder else "flat", module_of(path)))
    wanted.discard(("flat", "minisft"))  # the package itself is the page "The library"
    missing = sorted(f"{page}.rst: .. library:: {name}" for page, name in wanted - set(listed))
    assert not missing, f"add one line each to tutorials/site/api: {missing}"
    assert len(listed) == len(set(listed)), "a module is listed twice"


@pytest.mark.exhaustive
def test_every_public_name_has_its_place(site: Path, documents: dict[Path, Document]) -> None:
    shown = [name for path, document in documents.items() if path.parent == site / "api" for name in document.ids]
    front_door = [getattr(minisft, name) for name in minisft.__all__]
    wanted = {f"{thing.__module__}.{thing.__qualname__}" for thing in front_door}
    for path in (ROOT / "minisft").rglob("*.py"):
        wanted |= set(public_names(path)) - {"module-minisft"}  # the package itself is the page "The library"
    assert not wanted - set(shown), f"add these to a page in tutorials/site/api: {sorted(wanted - set(shown))}"
    twice = {name for name in wanted if shown.count(name) > 1}
    assert not twice, f"on two pages: {sorted(twice)}"


@pytest.mark.exhaustive
def test_the_library_lists_what_the_package_offers(site: Path) -> None:
    text = (site / "api/index.html").read_text("utf-8")
    assert [name for name in minisft.__all__ if f'.{name}"' not in text] == []


# ---- the order of the pages --------------------------------------------------------------------------------------------


def walk(documents: dict[Path, Document], start: Path, direction: str) -> list[Path]:
    path, seen = start, [start]
    while direction in documents[path].following:
        path = (path.parent / documents[path].following[direction]).resolve()
        assert path not in seen, f"{direction} goes round in a circle at {path.name}"
        seen.append(path)
    return seen


@pytest.mark.exhaustive
def test_next_and_previous_go_through_all_pages_in_order(site: Path, documents: dict[Path, Document]) -> None:
    forward = walk(documents, site / "index.html", "next-page")
    assert walk(documents, forward[-1], "prev-page") == forward[::-1]
    tutorials = [path.stem for path in forward if path.parent.name == "tutorials"]
    assert tutorials == [path.stem for path in NOTEBOOKS]
    assert [path.parent.name for path in forward[1 : len(tutorials) + 1]] == ["tutorials"] * len(tutorials)
    assert set((site / "api").glob("*.html")) <= set(forward)


@pytest.mark.exhaustive
def test_the_landing_page_shows_the_whole_path(site: Path) -> None:
    """Thirteen pages in four lanes, each a link with its times."""
    text = (site / "index.html").read_text("utf-8")
    numbers = re.findall(r'class="card[^>]*><b>(\d\d)</b>', text)
    assert sorted(numbers) == [f"{n:02}" for n in range(1, 14)]
    links = re.findall(r'<a class="card[^"]*" href="tutorials/(\w+)\.html">(.*?)</a>', text)
    assert sorted(stem for stem, _ in links) == [path.stem for path in NOTEBOOKS]
    assert all(re.search(r"run [\d.]+ min, read \d+ min", words) for _, words in links)
    assert len(NOTEBOOKS) == 13
    assert "merge_cpu" not in text, "the benchmark has a page of its own"


# ---- in a browser ------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """The tests report what fails; a line for each request would bury it."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def watched(browser: Browser, address: str) -> Iterator[Page]:
    """A page that notes everything that must not happen."""
    page = browser.new_page(reduced_motion="reduce")  # no smooth scrolling to wait for
    problems: list[str] = []

    def note(happened: bool, what: str) -> None:
        if happened:
            problems.append(f"{page.url}: {what}")

    page.on("console", lambda message: note(message.type == "error", f"console: {message.text}"))
    page.on("pageerror", lambda error: note(True, str(error)))
    page.on("request", lambda sent: note(not sent.url.startswith((address, "data:")), f"asks for {sent.url[:200]}"))
    # Going to the next page stops what is still being loaded for this one.
    page.on("requestfailed", lambda sent: note(sent.failure != "net::ERR_ABORTED", f"cannot load {sent.url[:200]}"))
    yield page
    page.close()
    assert not problems, "\n".join(problems)


# Folded solutions are opened first, so that what is inside is measured too.
MEASURE = """() => {
    document.querySelectorAll("details").forEach(fold => { fold.open = true })
    const root = document.documentElement, problems = []
    if (root.scrollWidth > root.clientWidth) {
        const wide = [...document.querySelectorAll("article *")].find(e => e.getBoundingClientRect().right > root.clientWidth)
        problems.push(`${root.scrollWidth - root.clientWidth} px too wide, perhaps: ${wide?.outerHTML.slice(0, 200)}`)
    }
    for (const shown of document.querySelectorAll("article img, article figure, article math")) {
        const box = shown.getBoundingClientRect()
        if (!(box.width > 0 && box.height > 0) || shown.naturalWidth === 0)
            problems.push(`no size: ${shown.outerHTML.slice(0, 120)}`)
    }
    for (const image of document.querySelectorAll("article img")) {
        const right = image.getBoundingClientRect().right
        if (right > root.clientWidth + 1) problems.push(`cut off: ${image.outerHTML.slice(0, 120)}`)
        if (!image.alt) problems.push(`no description: ${image.outerHTML.slice(0, 120)}`)
    }
    return problems
}"""


def at_each_width(page: Page) -> Iterator[int]:
    """The page in each width, without loading it again."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        yield width


@pytest.mark.exhaustive
def test_every_page_is_shown_whole(watched: Page, address: str, site: Path, documents: dict[Path, Document]) -> None:
    pages = [*walk(documents, site / "index.html", "next-page"), site / "search.html", site / "_modules/minisft/lora.html"]
    problems = []
    for path in pages:
        name = path.relative_to(site).as_posix()
        watched.goto(address + name, wait_until="load")
        for width in at_each_width(watched):
            problems += [f"{name} at {width} px: {problem}" for problem in watched.evaluate(MEASURE)]
    assert not problems, "\n".join(problems)


@pytest.mark.exhaustive
def test_folded_solutions_open(watched: Page, address: str) -> None:
    for notebook in NOTEBOOKS:
        watched.goto(f"{address}tutorials/{notebook.stem}.html", wait_until="load")
        folds = watched.locator("details:has(summary:text('Solution'))").all()
        assert folds, f"{notebook.stem} has no solution"
        codes = [fold.locator("pre").first for fold in folds]
        assert not any(code.is_visible() for code in codes), f"{notebook.stem}: a solution is not folded"
        for width, opens in zip(at_each_width(watched), (True, False), strict=True):  # opened in one, closed in the other
            for fold, code in zip(folds, codes, strict=True):
                fold.locator("summary").click()
                assert code.is_visible() == opens, f"{notebook.stem} at {width} px: a solution does not open or close"


@pytest.mark.exhaustive
def test_next_and_previous_can_be_clicked(watched: Page, address: str) -> None:
    watched.goto(address + "index.html")
    for _ in at_each_width(watched):
        watched.locator("a.next-page").click()
        watched.wait_for_url(f"**/{NOTEBOOKS[0].stem}.html")
        watched.locator("a.prev-page").click()
        watched.wait_for_url("**/index.html")


@pytest.mark.exhaustive
def test_dark_and_light(watched: Page, address: str) -> None:
    watched.goto(address + "index.html")
    shades = []
    for scheme in ("light", "dark"):
        watched.emulate_media(color_scheme=scheme)
        colours = watched.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        shades.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours])
    (light_page, light_ink), (dark_page, dark_ink) = shades
    assert light_page > light_ink + 300
    assert dark_ink > dark_page + 300


@pytest.mark.exhaustive
def test_search_finds_a_function(watched: Page, address: str) -> None:
    watched.goto(address + "search.html?q=apply_lora_")
    watched.locator("#search-results li a").first.wait_for(timeout=60_000)
    assert "flat" in (watched.locator("#search-results li a").first.get_attribute("href") or "")


# ---- the extensions ----------------------------------------------------------------------------------------------------


def extension(name: str) -> ModuleType:
    needs("sphinx")
    needs("latex2mathml")
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"extension/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("display", ["inline", "block"])
def test_a_formula_becomes_mathml(display: str) -> None:
    markup = extension("mathml").to_mathml(r"W' = W + \frac{\alpha}{r} B A", display)
    assert f'display="{display}"' in markup
    assert "<mfrac>" in markup
    assert "W\N{PRIME}" in markup


def test_bars_stand_close_to_what_they_measure() -> None:
    markup = extension("mathml").to_mathml(r"\arg\max_c |w - c|", "inline")
    assert markup.count('lspace="0" rspace="0">|<') == 2
    assert ">arg<" in markup


def test_each_matrix_has_a_row_of_its_own() -> None:
    """Its parentheses would stretch to the tallest matrix of the formula otherwise."""
    markup = extension("mathml").to_mathml(
        r"A = \begin{pmatrix} 1 & 0 \end{pmatrix}, x = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", "block"
    )
    assert len(re.findall(r"<mrow><mo>\(</mo><mtable>(?:(?!mtable).)*</mtable><mo>\)</mo></mrow>", markup)) == 2
    alone = extension("mathml").to_mathml(r"\begin{pmatrix} 1 & 0 \end{pmatrix}", "block")
    assert alone.count("<mrow><mo>(</mo><mtable>") == 1


def test_a_prime_is_raised_once() -> None:
    to_mathml = extension("mathml").to_mathml
    assert "<mrow><mi>W\N{PRIME}</mi></mrow>" in to_mathml("W'", "inline")
    assert "<msub><mi>W\N{PRIME}</mi><mi>q</mi></msub>" in to_mathml("W'_q", "inline")
    assert "<msup><mi>W</mi><mi>T</mi></msup>" in to_mathml("W^T", "inline")


@pytest.mark.parametrize("latex", [r"\nosuchcommand{x}", r"\frac{1}", "x_{", "a & b", r"\left( x", r"\begin{cases} 1"])
def test_a_formula_that_cannot_be_shown_is_refused(latex: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        extension("mathml").to_mathml(latex, "inline")


@pytest.mark.slow
def test_such_a_formula_stops_the_build_and_is_named(tmp_path: Path) -> None:
    needs("sphinx")
    needs("latex2mathml")
    settings = f"import sys; sys.path.insert(0, {str(SITE / 'extension')!r})"
    (tmp_path / "conf.py").write_text(f"{settings}\nextensions = ['mathml']\nhtml_math_renderer = 'mathml'\n")
    (tmp_path / "index.rst").write_text("Page\n====\n\n:math:`\\nosuchcommand{x}`\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(tmp_path), str(tmp_path / "out")]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert built.returncode != 0
    assert re.search(r"index\.rst.*: the formula .*nosuchcommand", built.stderr)


def rendered(docstring: str) -> str:
    """The text that a reader sees of a docstring, by way of docutils, which must find nothing to complain about."""
    lines = extension("docstrings").to_rest(docstring.splitlines())
    from docutils.core import publish_doctree

    settings = {"report_level": 1, "halt_level": 1, "warning_stream": False}
    return publish_doctree("\n".join(lines), settings_overrides=settings).astext()


@pytest.mark.parametrize(
    "line",
    [
        "|W + scaling * B A| of each row, (out,), and x_i * y_i.",
        "Call merge_ or unmerge_ before, see [1]_ and *args, **kwargs.",
        "A. Name that begins like a list; (B, T) ids; C:\\path.",
        "(A) is no list, 1. nor is this.",
        "sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...].",
    ],
)
def test_prose_in_a_docstring_is_shown_as_written(line: str) -> None:
    assert rendered(line) == line


def test_literals_sections_and_displays_of_a_docstring() -> None:
    text = rendered(
        "Rows become ``Example``s.\n\nArgs:\n    x: (B, T), of\n        two lines.\n    k, v: (B, K).\n\n    a = b * c\n"
        "Raises:\n    UserError: ``data/x``.\nRef: Hu et al. 2021, arXiv:2106.09685."
    )
    assert "Rows become Examples." in text
    assert "x: (B, T), of two lines." in text
    assert "k, v: (B, K)." in text
    assert text.index("a = b * c") < text.index("UserError: data/x.") < text.index("arXiv:2106.09685")


def test_names_lead_to_what_they_mean() -> None:
    kinds = {
        "minisft.nf4": "module",
        "minisft.nf4.quantize": "function",
        "minisft.model": "module",
        "minisft.kernels.cpu_nf4.quantize": "function",
        "minisft.surgery.apply_lora_": "function",
        "minisft.model.KVCache.max_length": "property",
    }
    names = extension("links").Names(kinds)
    assert names.meaning("nf4.quantize", "minisft.model") == "minisft.nf4.quantize"
    assert names.meaning("quantize", "minisft.kernels.cpu_nf4") == "minisft.kernels.cpu_nf4.quantize"
    assert names.meaning("apply_lora_", "minisft.model") == "minisft.surgery.apply_lora_"
    assert names.meaning("model.py", "") == "minisft.model"
    assert names.room("nf4") == "minisft.nf4"
    for ambiguous in ("quantize", "nf4", "model", "max_length"):
        assert names.meaning(ambiguous, "minisft.surgery") is None
