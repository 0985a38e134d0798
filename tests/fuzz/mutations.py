"""Inputs near to valid ones: bytes with some of them changed, and trees of plain data with odd values in them."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

LEVELS = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01"]
NUMBERS = [
    b"\xff" * 4,
    b"\x7f" + b"\xff" * 3,
    b"\x00" * 4,
    b"\x80\x00\x00\x00",
    b"\x00\x00\xff\xff",
    b"\xff\xff",
    b"\x00\x01",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), int("9" * 400), 0.5, 1e308, -1e-320, math.nan, math.inf,
    -math.inf, "", " ", "a", "0", "nan", "\0", "\ud800", "é" * 200, "a" * 5000, "../x", "/", ".", "..", "*", "~",
    "a/b", "images", "C:\\x", "\n", [], [[]], {}, {"": ""}, [None], [0], ["a"], [1, 2, 3, 4], {"a": 1}, {0: "a"},
    {"0": {}},
]  # fmt: skip


def mutated(valid: Sequence[bytes], tokens: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """One of `valid` with a few places changed, cut out, cut off, doubled or filled with `tokens`; or unchanged."""
    pieces = st.one_of(
        st.sampled_from([*LEVELS, *NUMBERS]),
        st.binary(min_size=1, max_size=8),
        *([st.sampled_from(tokens)] * 2 if tokens else []),
    )
    edit = st.tuples(st.sampled_from(EDITS), st.floats(0, 1), st.integers(1, 64), pieces)
    # Most headers are at the start.
    early = st.tuples(st.sampled_from(EDITS), st.floats(0, 0.1), st.integers(1, 8), pieces)
    return st.builds(_edited, st.sampled_from(valid), st.lists(edit | early, max_size=4))


def _over(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def _insert(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at:]


def _remove(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at] + data[at + size :]


def _repeat(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at] + data[at : at + size] * (1 + min(len(piece), 8) ** 2) + data[at + size :]


def _cut(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at]


def _flip(data: bytes, at: int, size: int, piece: bytes) -> bytes:
    return data[:at] + bytes(b ^ (1 << size % 8) for b in data[at : at + 1]) + data[at + 1 :]


EDITS: list[Callable[[bytes, int, int, bytes], bytes]] = [_over, _over, _flip, _flip, _insert, _remove, _repeat, _cut]


def _edited(data: bytes, edits: list[tuple[Callable, float, int, bytes]]) -> bytes:
    for edit, where, size, piece in edits:
        data = edit(data, int(where * len(data)), size, piece)
    return data


def odd_tree(tree: Any, values: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """`tree` with up to three of its nodes or keys replaced, left out or doubled; `values`: further odd ones."""
    value = st.sampled_from([*VALUES, *values])
    edit = st.tuples(
        st.lists(st.integers(0, 20), min_size=1, max_size=6), st.sampled_from(["set", "del", "key"]), value
    )
    return st.builds(_odd, st.just(tree), st.lists(edit, min_size=1, max_size=3))


def _odd(tree: Any, edits: list[tuple[list[int], str, Any]]) -> Any:
    tree = copy.deepcopy(tree)
    for path, kind, value in edits:
        tree = _replaced(tree, path, kind, copy.deepcopy(value))
    return tree


def _replaced(tree: Any, path: list[int], kind: str, value: Any) -> Any:
    if not isinstance(tree, dict | list) or not tree or not path:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    if len(path) > 1 and isinstance(tree[key], dict | list) and tree[key]:
        tree[key] = _replaced(tree[key], path[1:], kind, value)
    elif kind == "del":
        del tree[key]
    elif kind == "key" and isinstance(tree, dict):
        tree[value if isinstance(value, str | int | float | bool | None) else str(value)] = tree.pop(key)
    elif kind == "key":
        tree.append(copy.deepcopy(tree[key]))
    else:
        tree[key] = value
    return tree
