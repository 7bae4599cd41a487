"""Formulas become MathML while the site is built, so that no script and no font has to be fetched to read them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import latex2mathml.exceptions
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

logger = getLogger(__name__)

LATEX_ERRORS = tuple(
    kind for kind in vars(latex2mathml.exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)
)

ARG = re.compile(r"\\arg(?![a-zA-Z])")  # the one common operator that the library does not know
BARS = ("|", "\N{DOUBLE VERTICAL LINE}")
PARTS = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "msubsup": 3, "mover": 2, "munder": 2, "munderover": 3}

PRIMES = {"\N{PRIME}", "\N{DOUBLE PRIME}", "\N{TRIPLE PRIME}"}
NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"

ElementTree.register_namespace("", NAMESPACE.strip("{}"))


def to_mathml(latex: str, display: str) -> str:
    """``<math>`` for a formula, ``display`` being inline or block.

    Raises:
        ValueError: the formula cannot be converted. The library passes on a command that it does not know as text, a bare
            ``&`` too, and does not miss a denominator, so these are looked for in what comes out.
    """
    try:
        root = ElementTree.fromstring(convert(ARG.sub(r"\\operatorname{arg}", latex), display=display))
    except (*LATEX_ERRORS, ElementTree.ParseError) as error:
        raise ValueError(f"{type(error).__name__} {error}".strip()) from error
    for element in root.iter():
        _merge_prime(element)
        _fence_tables(element)
    unknown = [text for text in root.itertext() if "\\" in text]
    if unknown:
        raise ValueError(f"unknown command {unknown[0]}")
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        if len(element) != PARTS.get(name, len(element)):
            raise ValueError(f"a part of {name} is missing")
        if name == "mo" and element.text in BARS:
            element.attrib |= {"lspace": "0", "rspace": "0"}  # they stand around what they measure, not between two things
    return ElementTree.tostring(root, encoding="unicode")


def _merge_prime(element: ElementTree.Element) -> None:
    """``W'``: the sign is drawn raised already, and would float above the line if it were a superscript on top."""
    name = element.tag.removeprefix(NAMESPACE)
    if name not in ("msup", "msubsup") or element[-1].text not in PRIMES or len(element[0]):
        return
    element[0].text = f"{element[0].text}{element[-1].text}"
    element.remove(element[-1])
    element.tag = NAMESPACE + {"msup": "mrow", "msubsup": "msub"}[name]


def _fence_tables(element: ElementTree.Element) -> None:
    """``( table )`` in a row of its own: parentheses stretch to the tallest thing in their row."""
    children = list(element)
    for i, (before, table, after) in enumerate(zip(children, children[1:], children[2:], strict=False)):
        tags = [child.tag.removeprefix(NAMESPACE) for child in (before, table, after)]
        if tags == ["mo", "mtable", "mo"] and len(children) > 3:
            row = ElementTree.Element(NAMESPACE + "mrow")
            row.extend((before, table, after))
            element[:] = [*children[:i], row, *children[i + 3 :]]
            _fence_tables(element)
            return


def _append(writer: HTML5Translator, node: nodes.math | nodes.math_block, display: str) -> None:
    latex = node.astext()
    try:
        markup = to_mathml(latex, display)
    except ValueError as error:
        place = node if node.source else writer.builder.current_docname
        logger.warning("the formula %r cannot be shown as MathML: %s", latex, error, location=place)  # fails the build
        markup = ""
    tag = "span" if display == "inline" else "div"
    writer.body.append(f'<{tag} class="math" role="math">{markup}</{tag}>')
    raise nodes.SkipNode


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    _append(writer, node, "inline")


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    _append(writer, node, "block")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
