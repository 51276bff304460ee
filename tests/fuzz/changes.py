"""Changes of inputs, drawn by hypothesis: of JSON and YAML trees, of bytes, and of a PNG's chunks."""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ODD: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, float("nan"), float("inf"), -float("inf"), 1e300, 2e8),
    *(
        255,
        256,
        65535,
        2**31,
        2**32,
        2**63,
        10**30,
        "",
        "0",
        "1",
        "false",
        "a",
        "é",
        "e\u0301",
        "\ud800",
        "\x00",
        "x" * 600,
    ),
    *([], [[]], [1], {}, {"a": 1}, "../a.jpg", "a.jpg", "/etc/passwd", "line\nline", "car", "sky"),
    *([[1, 2, 3, 4, 5, 6]], [[0, 0, 8, 6]], [[0, 0, 8, 0, 8]], {"size": [6, 8], "counts": [48]}),
    *(
        {"size": [6, 8], "counts": "0"},
        {"size": [6, 8], "counts": "Oa1"},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": [6, 8], "counts": [0, 48]},
    ),
)
"""Values that files hold by mistake; the compressed run lengths "Oa1" are -1 and 49."""


def inputs(count: int) -> settings:
    """So many inputs, the same in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a tree is, the tree itself left out."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from paths(value, (*path, key))


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any, odd: Sequence[Any] = ODD) -> Any:
    """A tree with one to three values replaced, taken away, given twice or nudged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        if not (places := list(paths(tree))):
            break
        *above, key = draw(st.sampled_from(places))
        holder = tree
        for each in above:
            holder = holder[each]
        value = holder[key]
        change = draw(st.sampled_from(("odd", "odd", "odd", "nudge", "nudge", "gone", "twice", "moved")))
        if change == "gone":
            del holder[key]
        elif change == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif change == "moved":
            other = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(_at(tree, other))
        elif change == "nudge" and isinstance(value, (int, float)) and not isinstance(value, bool):
            holder[key] = value + draw(st.sampled_from((-1, 1, 0.5, -0.5, 100, 1e9)))
        elif change == "nudge" and isinstance(value, str):
            holder[key] = draw(st.sampled_from((value[:-1], value + "x", value.upper(), f" {value}", value + "\n")))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(odd)))
    return tree


def _at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four stretches replaced, taken away or added, or without their end."""
    changed = bytearray(data)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        length = draw(st.integers(1, 8))
        change = draw(st.sampled_from(("set", "set", "set", "set", "gone", "added", "cut")))
        if change == "set":
            changed[at : at + 1] = bytes([draw(st.sampled_from((0, 1, 127, 128, 255)) | st.integers(0, 255))])
        elif change == "gone":
            del changed[at : at + length]
        elif change == "added":
            changed[at:at] = draw(st.binary(min_size=length, max_size=length))
        else:
            del changed[at:]
    return bytes(changed)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and contents of a whole PNG's chunks."""
    found, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png(values: np.ndarray, bits: int, *, palette: bool = False) -> bytes:
    """(h, w) numbers as a PNG of grey values, or of a palette's indices, of so many bits; or (h, w, 3) colours of 8."""
    width, kind = values.shape[1], 2 if values.ndim == 3 else 3 if palette else 0
    if values.ndim == 3:
        rows = values.astype(np.uint8)
    elif bits == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        singles = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = np.packbits(singles.reshape(len(values), -1).astype(np.uint8), axis=1)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, len(values), bits, kind, 0, 0, 0)
    colours = [(b"PLTE", bytes(range(256)) * 3 if bits == 8 else bytes(3 * 2**bits))] if palette else []
    return _png_of([(b"IHDR", header), *colours, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")])


def _png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A file with right lengths and checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@st.composite
def changed_png(draw: st.DrawFn, data: bytes) -> bytes:
    """A PNG with a chunk changed, taken away, given twice or put elsewhere. Its checksums are right."""
    chunks = png_chunks(data)
    place = draw(st.integers(0, len(chunks) - 1))
    name, contents = chunks[place]
    change = draw(st.sampled_from(("contents", "contents", "contents", "pixels", "gone", "twice", "moved", "name")))
    if change == "contents":
        chunks[place] = (name, draw(changed_bytes(contents)))
    elif change == "pixels":
        packed = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
        whole = zlib.compress(draw(changed_bytes(packed)))
        first = next(at for at, (kind, _) in enumerate(chunks) if kind == b"IDAT")
        rest = [(kind, body) for kind, body in chunks[first:] if kind != b"IDAT"]
        chunks = [*chunks[:first], (b"IDAT", whole), *rest]
    elif change == "gone":
        del chunks[place]
    elif change == "name":
        chunks[place] = (
            draw(st.sampled_from((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"eXIf", b"iCCP", b"zzZz"))),
            contents,
        )
    else:
        chunks.insert(draw(st.integers(0, len(chunks))), chunks[place] if change == "twice" else chunks.pop(place))
    return _png_of(chunks)
