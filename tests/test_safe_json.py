"""Foreign text: strict JSON, messages that cannot harm a terminal, and errors of one shape."""

import json
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.common.errors import FAMILIES, UserError, listing, nearest, visible
from minisft.common.safe_json import MAX_DEPTH, MAX_DIGITS, loads, read_at_most

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(documents, st.booleans(), st.booleans())
def test_reads_what_the_standard_reader_reads(document, ascii_only, as_bytes):
    text = json.dumps(document, ensure_ascii=ascii_only)
    found = loads(text.encode() if as_bytes else text)
    assert found == document
    assert json.dumps(found) == json.dumps(json.loads(text))  # True is not 1, and -0.0 is not 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is not a JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        ("1e999", "number 1e999 is too large"),
        ("-1e999", "number -1e999 is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        ('[{"x": {"k": 1, "k": 1}}]', "duplicate key 'k'"),
        ('{"a": 1, "\\u0061": 2}', "duplicate key 'a'"),
        ('"\\ud800"', r"lone surrogate \\ud800"),
        ('{"ok": ["\\udfff x"]}', r"lone surrogate \\udfff"),
        ('{"\\ud83d": 1}', r"lone surrogate \\ud83d"),
        ("9" * (MAX_DIGITS + 1), "integer of 401 digits; at most 400"),
        ("[" * 65 + "]" * 65, "nested 65 deep; at most 64"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested 100000 deep"),
        ("[" * 1_000_000, "nested 1000000 deep"),
        (b"\xff\xfe", "codec can't decode"),
        (b'{"a": "\xc3"}', "codec can't decode"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ("[1, 2", "Expecting ',' delimiter"),
        ("1 2", "Extra data"),
        ('"a\nb"', "Invalid control character"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        loads(text)


def test_the_limits_themselves_are_fine():
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert loads("[" + "[]," * 5 + "[" * (MAX_DEPTH - 1) + "]" * MAX_DEPTH) is not None  # many brackets, no deeper
    assert loads("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    assert loads(json.dumps(["[{" * 500, '\\"[' * 500])) == ["[{" * 500, '\\"[' * 500]  # brackets in strings do not nest
    assert loads(json.dumps([[0]] * 500)) == [[0]] * 500  # nor do neighbours
    assert loads('"\\ud83d\\ude00"') == "😀"  # a pair is no lone surrogate
    assert loads(b"\xef\xbb\xbf{}") == {}  # a byte order mark


@given(st.text(alphabet='[]{}",:\\1u0d8a e', max_size=200) | st.text(max_size=30))
def test_any_text_is_a_document_or_a_value_error(text):
    try:
        found = loads(text)
    except ValueError:
        return
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode("utf-8")


@given(st.binary(max_size=40))
def test_any_bytes_are_a_document_or_a_value_error(data):
    try:
        loads(data)
    except ValueError:
        return


@pytest.mark.parametrize(("size", "limit", "found"), [(5, 10, 5), (10, 10, 10), (11, 10, 11), (5000, 10, 11), (0, 10, 0)])
def test_a_file_is_read_up_to_one_byte_beyond_the_limit(tmp_path: Path, size: int, limit: int, found: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    with (tmp_path / "a").open("rb") as file:
        assert read_at_most(file, limit) == bytes(found)


def test_a_small_file_reserves_little_memory_whatever_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"{}")
    tracemalloc.start()
    with (tmp_path / "a").open("rb") as file:
        read_at_most(file, 2**28)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# Messages


@given(st.text(st.characters(), max_size=40))
def test_visible_leaves_nothing_that_acts_on_a_terminal(text):
    shown = visible(text)
    for character in shown:
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\r\tc", r"a\x0ab\x0d\x09c"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\u2028\ud800\x9b", r"\u2028\ud800\x9b"),
        ("ü 日本 😀", "ü 日本 😀"),
        (3.5, "3.5"),
        ("x" * 201, "x" * 200 + "…"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_is_one_line_in_one_order(family):
    error = UserError(f"{family}/slug", "what", where="where", found="this", expected="that", fix="do it")
    assert str(error) == f"error[{family}/slug] what: where; found this; expected that; fix: do it"
    assert str(UserError(f"{family}/slug", "what")) == f"error[{family}/slug] what"
    assert error.exit_code == FAMILIES[family].exit_code
    assert isinstance(error, ValueError)


def test_an_unknown_family_is_our_own_mistake():
    with pytest.raises(KeyError):
        UserError("dta/slug", "what")


def test_exit_codes_never_mean_success_or_a_traceback():
    assert min(kind.exit_code for kind in FAMILIES.values()) > 1


def test_listing_and_nearest():
    assert listing([]) == "none"
    assert listing(["a", "b\x1b"]) == r"a, b\x1b"
    assert listing([str(i) for i in range(5)], 3) == "0, 1, 2 and 2 more"
    assert listing("abc", 3) == "a, b, c"
    assert nearest("q_prj", ["k_proj", "q_proj"]) == "did you mean 'q_proj'?"
    assert nearest("zzz", ["k_proj"]) == ""
    assert nearest("x", []) == ""
