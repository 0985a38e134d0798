import io
import json

from mutations import mutated, odd_tree

from detguard.data.entries import DataError
from detguard.data.stream import Labelled, as_line, from_lines, lines_of

NAMES = {0: "person", 1: "bus"}
LINE = {
    "id": "17",
    "photo": "a.jpg",
    "objects": [{"class": "bus", "box": [1, 2, 30, 40]}],
    "classes": ["bus"],
    "time": 7,
}
TOKENS = [
    b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"[" * 2000, b"{", b"}", b"]", b'"', b"\n", b"\\ud800", b"\\u0000",
    b"\xff", b"\xef\xbb\xbf", b"null", b"true", b"1e999", b"../", b"a" * 5000,
]  # fmt: skip


def test_json_lines(fuzz):
    def read(data):
        for one in from_lines(lines_of(io.BytesIO(data + b"\n" + json.dumps(LINE).encode())), NAMES):
            if isinstance(one, Labelled):
                as_line(one, NAMES)
        assert not isinstance(one, DataError)  # whatever came before it

    trees = odd_tree(LINE).map(lambda tree: json.dumps(tree).encode())
    fuzz(trees | mutated([json.dumps(LINE).encode()], TOKENS), read)
