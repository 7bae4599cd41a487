"""Errors: a class a family, one line each, and a fix where only the user can decide."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest

from minisft.common.errors import FAMILIES, ConfigError, DataError, ResourceError, UserError

PACKAGE = Path(__file__).resolve().parent.parent / "minisft"
NEEDS_FIX = ("config/", "adapter/")


def calls(path: Path) -> list[tuple[int, str, bool]]:
    """(line, code, says a fix) of each ``UserError`` that a module raises with a code written out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.lineno, node.args[0].value, any(k.arg in ("fix", None) for k in node.keywords))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("UserError")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_only_the_user_can_decide_says_the_fix(path: Path) -> None:
    assert not [(line, code) for line, code, fix in calls(path) if code.startswith(NEEDS_FIX) and not fix]


def test_every_family_is_a_class_that_can_be_caught() -> None:
    for family, kind in FAMILIES.items():
        error = UserError(f"{family}/slug", "what", fix="this")
        assert type(error) is kind
        assert isinstance(error, UserError)
        assert str(error) == f"error[{family}/slug] what; fix: this"
    assert UserError("disk/full", "x").exit_code == ResourceError.exit_code == 7
    with pytest.raises(DataError):
        raise UserError("data/empty", "no rows")
    assert not isinstance(UserError("data/empty", "no rows"), ConfigError)


def test_an_error_survives_a_copy() -> None:
    """A worker's exception is pickled on its way to the parent."""
    error = UserError("model/no-file", "no such file", where="m", found="nothing", expected="a file", fix="give one")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is type(error)
        assert (str(again), again.code, again.exit_code) == (str(error), error.code, error.exit_code)
