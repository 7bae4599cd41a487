"""Every public function, class and module says what it is, in one form; read off the source with ``ast``.

A function with three or more parameters lists each of them under ``Args``, what comes back under ``Returns`` and what it raises
under ``Raises``. A shorter one may say all that in its sentence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minisft"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MIN_PARAMETERS = 3
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[ast.ClassDef | Function]:
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, Function) and not n.name.startswith("_"))


def parameters(node: Function) -> list[str]:
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return [a.arg for a in every if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def raises(node: Function) -> bool:
    """Whether the function's own body raises, not one that is defined inside it."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, ast.Raise) and inner.exc is not None:
            return True
        if not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            waiting += ast.iter_child_nodes(inner)
    return False


def section(doc: str, title: str) -> str | None:
    """The indented text under ``title:``, or None."""
    match = re.search(rf"^{title}:[^\n]*\n((?:[ \t]+\S[^\n]*\n|\s*\n)+)", doc + "\n", re.M)
    return match[1] if match else None


def complaints(node: ast.ClassDef | Function) -> list[str]:
    """What is missing from a docstring."""
    doc = ast.get_docstring(node)
    if any(isinstance(d, ast.Attribute) and d.attr in ("setter", "deleter") for d in node.decorator_list):
        return []
    if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):  # the function itself is documented
        return []
    if doc is None:
        is_forward = node.name in ("forward", "backward", "extra_repr", "setup_context")
        return [] if is_forward else [f"{node.name}: no docstring"]
    bad = [] if doc.split("\n", 1)[0].rstrip().endswith((".", ":", "?")) else [f"{node.name}: the first line is no sentence"]
    if isinstance(node, ast.ClassDef) or len(parameters(node)) < MIN_PARAMETERS:
        return bad
    args = section(doc, "Args")
    if args is None:
        bad.append(f"{node.name}: no Args")
    else:
        named = set(re.findall(r"\w+", " ".join(re.findall(r"^\s*([*\w, `]+?)(?: \([^)]*\))?:", args, re.M))))
        bad += [f"{node.name}: Args lacks {name}" for name in parameters(node) if name not in named]
    returns = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn", "Never")
    if returns and not re.search(r"^(Returns|Yields):", doc, re.M):
        bad.append(f"{node.name}: no Returns")
    if raises(node) and section(doc, "Raises") is None:
        bad.append(f"{node.name}: no Raises")
    return bad


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    found = (
        []
        if doc.split("\n\n", 1)[0].rstrip().endswith((".", ":"))
        else ["the module's docstring does not open with a sentence"]
    )
    assert not found + [text for node in public(tree) for text in complaints(node)]


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("def f(): pass", ["f: no docstring"]),
        ('def f(a, b, c):\n  """Does."""', ["f: no Args"]),
        ('def f(a, b, c):\n  """Does.\n\n  Args:\n    a, b: two.\n  """', ["f: Args lacks c"]),
        ('def f(a, b, c) -> int:\n  """Does.\n\n  Args:\n    a, b: two.\n    c: one.\n  """', ["f: no Returns"]),
        ('def f(a, b, c):\n  """Does.\n\n  Args:\n    a, b, c: three.\n  """\n  raise ValueError', ["f: no Raises"]),
        ('def f(a, b):\n  """Does a and b."""\n  raise ValueError', []),
    ],
)
def test_the_reader_of_docstrings_itself(source: str, bad: list[str]) -> None:
    assert [text for node in public(ast.parse(source)) for text in complaints(node)] == bad
