"""Hostile files for line 14 of the scorecard: good files changed where it hurts, by number, so that each can be made again.

A mutation knows the format: it changes a count, a length, a type, an offset, a key or a nesting of a file whose rest stays
right, so that the reader gets past the first check. Some bytes are flipped or cut off afterwards.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import cast

JSON = object
HOSTILE_TEXTS = (
    "", "x" * 5000, "\x1b[2J\x1b]0;x\x07", "../../etc/passwd", "/etc/passwd", "a\x00b", "\u202eevil", "\ud800", "{{7*7}}",
    "<script>alert(1)</script>", "%s%n", "NaN", "٣", "nul\n\r", "__class__", "1" * 400,
)  # fmt: skip
HOSTILE_VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**63),
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), 10**399, [], {}, [[]], [None] * 50, [0] * 2000,
    {"": {}},
    [-1, 2**63], *HOSTILE_TEXTS,
)  # fmt: skip
# Pieces of text that no JSON writer writes.
RAW = (
    b"NaN",
    b"1e999",
    b'{"a":1,"a":2}',
    b"[" * 70 + b"]" * 70,
    b'"\\ud800"',
    b"\xff",
    b"9" * 5000,
    b"\x00",
    b"[" * 100_000,
    b'{"a":' * 70,
)
NUMBERS = (
    0,
    1,
    2,
    7,
    9,
    31,
    32,
    33,
    2**8,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


# ---- JSON ----------------------------------------------------------------------------------------------------------------


def places(value: JSON, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where something stands in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated_json(draw: random.Random, value: JSON, shallow: bool = False) -> JSON:
    """A document with one to three changes: of a value, a key, an order, a nesting. ``shallow``: near the top, mostly."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        everywhere = [place for place in places(value) if place]
        if shallow:
            everywhere = [p for p in everywhere if len(p) <= draw.choice((1, 1, 2, 9))] or everywhere
        if not everywhere:
            return copy.deepcopy(draw.choice(HOSTILE_VALUES))
        *way, key = draw.choice(everywhere)
        owner = value
        for step in way:
            owner = _inside(owner)[step]
        _change(draw, _inside(owner), key)
    return value


def _inside(value: JSON) -> dict[object, JSON]:
    """What stands in an object by its keys, or in a list by its indices: both are changed in one way."""
    assert isinstance(value, (dict, list))
    return cast("dict[object, JSON]", value)


def _change(draw: random.Random, owner: dict[object, JSON], key: object) -> None:
    what, value = draw.randrange(12), owner[key]
    if what < 3:
        owner[key] = copy.deepcopy(draw.choice(HOSTILE_VALUES))
    elif what >= 9:  # another value of its own type, which gets further
        owner[key] = _alike(draw, value)
    elif what in (3, 4):
        del owner[key]
    elif what == 5 and isinstance(value, (int, float)):
        owner[key] = value * draw.choice((-1, 0, 2, 1000)) + draw.choice((-1, 0, 1, 0.5))
    elif what == 6 and isinstance(owner, dict):  # a list has no keys to give
        owner[draw.choice(HOSTILE_TEXTS)] = owner.pop(key)
    elif what == 7:
        owner[key] = [value] * draw.choice((1, 2, 50))
    else:
        for _ in range(draw.choice((1, 3, 70))):
            value = {"a": value} if draw.random() < 0.5 else [value]
        owner[key] = value


def _alike(draw: random.Random, value: JSON) -> JSON:
    if isinstance(value, bool) or value is None:
        return draw.choice((True, False, None))
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, value * 2, *NUMBERS))
    if isinstance(value, float):
        return draw.choice((0.0, -value, value * 1e30, 1e-300, 0.3))
    if isinstance(value, str):
        return draw.choice((value[::-1], value * 2, value.upper(), "(a+)+$", "(?<=a)b", "[", "\\p{N}{1,9999}", *HOSTILE_TEXTS))
    return draw.choice((list(value)[:1] * 3 if isinstance(value, list) else {}, value))


def json_bytes(draw: random.Random, value: JSON) -> bytes:
    """The document as text, one time in five with a piece of text that breaks it."""
    raw = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return broken_text(draw, raw) if draw.random() < 0.2 else raw


def broken_text(draw: random.Random, raw: bytes) -> bytes:
    at = draw.randrange(len(raw) + 1)
    return raw[:at] + draw.choice(RAW) + raw[at + draw.choice((0, 0, 1, 5)) :]


def broken_bytes(draw: random.Random, raw: bytes, likely: float = 0.15) -> bytes:
    """Sometimes a few bytes flipped, sometimes the end cut off or something added."""
    if draw.random() < likely and raw:
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 2, 8))):
            changed[draw.randrange(min(len(raw), draw.choice((64, 4096, len(raw)))))] = draw.randrange(256)
        raw = bytes(changed)
    if draw.random() < likely:
        raw = raw[: draw.randrange(len(raw) + 1)] if draw.random() < 0.7 else raw + bytes(draw.choice((1, 7, 4096)))
    return raw


# ---- safetensors and GGUF ------------------------------------------------------------------------------------------------


def safetensors(draw: random.Random, seed: bytes) -> bytes:
    """A header changed in one to three places over data that stays; or another length, or a header still true."""
    length = int.from_bytes(seed[:8], "little")
    good = json.loads(seed[8 : 8 + length])
    if draw.random() < 0.3:
        return _true_header(draw, good, seed[8 + length :])
    header = json_bytes(draw, mutated_json(draw, good))
    said = draw.choice((0, 1, len(header) - 1, len(header) + 1, *NUMBERS)) if draw.random() < 0.1 else len(header)
    return broken_bytes(draw, struct.pack("<Q", said) + header + seed[8 + length :])


def _true_header(draw: random.Random, header: dict[str, dict], data: bytes) -> bytes:
    """Right by the format and wrong for the model: a dtype of the same size, a shape turned, another name or numbers."""
    names = [name for name in header if name != "__metadata__"]
    first, second = header[draw.choice(names)], draw.choice(names)
    what = draw.randrange(4)
    if what == 0:
        same = (
            ("F32", "I32", "U32"),
            ("F16", "BF16", "I16", "U16"),
            ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"),
            ("F64", "I64", "U64"),
        )
        first["dtype"] = draw.choice(next(kinds for kinds in same if first["dtype"] in kinds))
    elif what == 1:
        first["shape"] = draw.choice((first["shape"][::-1], [*first["shape"], 1], [1, *first["shape"]]))
    elif what == 2:
        header[draw.choice((second + "x", second.upper(), "model.layers.99.x", "lm_head.weight"))] = header.pop(second)
    changed = bytearray(data)
    for _ in range(draw.choice((0, 1, 40))):
        at = draw.randrange(len(changed))
        changed[at : at + 4] = draw.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 4, bytes(4), b'":,{'))[
            : len(changed) - at
        ]
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(changed)


Key = tuple[str, int, object]  # name, type, value


def gguf_keys(metadata: Mapping[str, object]) -> list[Key]:
    """The metadata as a list that can be changed, with types of the format."""
    kinds: dict[type, int] = {bool: 7, int: 4, float: 6, str: 8, list: 9}
    return [(name, kinds[type(value)], value) for name, value in metadata.items()]


def _gguf_value(kind: int, value: object, item_kind: int | None = None) -> bytes:
    if kind == 9:
        items = list(value) if isinstance(value, list) else [value]
        of = item_kind if item_kind is not None else {str: 8, float: 6, bool: 7}.get(type(items[0]) if items else int, 5)
        return struct.pack("<IQ", of, len(items)) + b"".join(_gguf_value(of, item) for item in items)
    if kind == 8:
        raw = str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw
    number = value if isinstance(value, (int, float)) else 0
    if kind in (6, 12):
        return struct.pack("<f" if kind == 6 else "<d", number)
    size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 7: 1}.get(kind, 8)
    return (int(number) % 2 ** (8 * size)).to_bytes(size, "little")


def gguf(draw: random.Random, keys: list[Key], tensors: list[tuple[str, list[int], int, int]], data: bytes) -> bytes:
    """A file with one to three fields changed: a count, a length, a type, a value, a shape, an offset, a name, an order."""
    keys, tensors = list(keys), [(name, list(dims), kind, offset) for name, dims, kind, offset in tensors]
    counts: dict[str, int] = {}
    spoiled: dict[int, bytes] = {}
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, what = draw.randrange(len(keys)), draw.randrange(11)
        name, kind, value = keys[at]
        if what < 3:
            hostile = draw.choice(HOSTILE_TEXTS if kind == 8 else NUMBERS)
            keys[at] = (name, kind, [*value[:2], hostile] if isinstance(value, list) and value else hostile)
        elif what == 3:
            keys[at] = (name, draw.choice((*range(13), 99)), value if not isinstance(value, list) else value[:3])
        elif what == 4:
            keys[at] = (draw.choice((*HOSTILE_TEXTS, keys[0][0])), kind, value)
        elif what == 5:
            del keys[at]
        elif what == 6:
            spoiled[at] = struct.pack("<IQ", draw.choice((*range(13), 99)), draw.choice(NUMBERS))
        elif what == 7:
            counts[draw.choice(("keys", "tensors"))] = draw.choice(NUMBERS)
        else:
            _change_tensor(draw, tensors)
        if not keys or not tensors:
            break
    body = b"".join(
        _gguf_value(8, n) + struct.pack("<I", k) + (spoiled.get(i) or _gguf_value(k, v)) for i, (n, k, v) in enumerate(keys)
    )
    body += b"".join(_tensor(*tensor) for tensor in tensors)
    magic, version = (
        (b"GGUF", 3) if draw.random() < 0.98 else (draw.choice((b"GGML", b"PK\3\4")), draw.choice((0, 1, 2, 2**31)))
    )
    head = magic + struct.pack("<IQQ", version, counts.get("tensors", len(tensors)), counts.get("keys", len(keys))) + body
    return broken_bytes(draw, head + bytes(-len(head) % 32) + data)


def _tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    raw = name.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _change_tensor(draw: random.Random, tensors: list[tuple[str, list[int], int, int]]) -> None:
    at = draw.randrange(len(tensors))
    name, dims, kind, offset = tensors[at]
    what = draw.randrange(6)
    if what == 0:
        dims = [*dims, draw.choice(NUMBERS)] if draw.random() < 0.5 else dims[:-1]
    elif what == 1 and dims:
        dims[draw.randrange(len(dims))] = draw.choice(NUMBERS)
    elif what == 2:
        kind = draw.choice((*range(40), 2**31))
    elif what == 3:
        offset = draw.choice((*NUMBERS, offset + 1, offset + 32, max(0, offset - 32)))
    elif what == 4:
        name = draw.choice((*HOSTILE_TEXTS, tensors[0][0]))
    else:
        del tensors[at]
        return
    tensors[at] = (name, dims, kind, offset)


# ---- templates and rows --------------------------------------------------------------------------------------------------

TEMPLATE_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if loop.first %}", "{% endif %}", "{{ m.content }}",
    "{{ messages[0]['role'] }}",
    "{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ 'x' * 10**9 }}", "{% set x = 'a' %}", "{% set ns = namespace(n=0) %}",
    "{{ x.__class__ }}",
    "{% generation %}", "{% endgeneration %}", "{{ raise_exception('no') }}",
    "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}", "{{", "}}",
    "{% include 'x' %}", "{{ ''|attr('__class__') }}", "{{ range(99999)|list|length }}", "{{ messages|tojson }}",
    "{{ strftime_now('%Y') }}",
    "{{ lipsum() }}", "{{ 9**9**5 }}", "{{ ('x'|center(10**9)) }}", "{# ", " #}", "\x00", "\x1b[2J", "{% raw %}",
    "{{ undefined.a.b }}",
    "{{ messages|map(attribute='content')|join }}", "{{ (1,2)|random }}", "{{ dict(a=1) }}", "{{ [[]]|sum(start=[]) }}",
    "{{ '%d' % 'a' }}",
    "{{ messages[0].content[::-1] }}", "{{ caller() }}", "{% break %}", "{% continue %}", "{{ self }}", "{{ {}|items|list }}",
    "\ud800",
)  # fmt: skip


def template(draw: random.Random, seed: str) -> str:
    """A template with pieces put in, taken out and doubled."""
    parts = seed.replace("{%", "\0{%").replace("{{", "\0{{").split("\0")
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(parts) + 1)
        if draw.random() < 0.7:
            parts.insert(at, draw.choice(TEMPLATE_PIECES))
        elif parts:
            parts.pop(at % len(parts))
    return "".join(parts) * draw.choice((1, 1, 1, 1, 2, 50))


def rows(draw: random.Random, seeds: list[dict[str, object]]) -> bytes:
    """A file of a few rows, one of them changed; sometimes the text between rows is broken too."""
    seed = draw.choice(seeds)
    chosen = [json.dumps(seed).encode()] * draw.choice((0, 1, 2))
    chosen.insert(draw.randrange(len(chosen) + 1), json_bytes(draw, mutated_json(draw, seed, shallow=True)))
    raw = draw.choice((*[b"\n"] * 8, b"\r\n", b"\n\n", b" ", b"\x1e")).join(chosen) + b"\n"
    start = draw.choice((b"",) * 40 + (b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"\x1f\x8b", b"PAR1", b"PK\3\4", b"# "))
    return broken_bytes(draw, start + raw, 0.05)


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
