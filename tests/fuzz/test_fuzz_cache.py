import shutil
import sqlite3
import zlib

import torch
from hypothesis import strategies as st
from mutations import mutated
from safetensors.torch import save

from detguard.detections import Detections
from detguard.evaluation.cache import Cache, pack, unpack

FOUND = Detections(torch.rand(5, 4), torch.rand(5), torch.arange(5), torch.rand(3))
TENSORS = save({"boxes": FOUND.boxes, "scores": FOUND.scores, "classes": FOUND.classes.int()})
TOKENS = [
    b"F32",
    b"F64",
    b"BF16",
    b"I64",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"boxes"',
    b"9" * 19,
    b"-1",
    b"[0]",
    b"[9999999999,4]",
]
VALUES = [None, 7, 0.5, "text", b"", b"x" * 20, bytes(100_000)]


def test_cache_entries(fuzz):
    fuzz(mutated([pack(FOUND)]) | mutated([TENSORS], TOKENS).map(zlib.compress), unpack)


def test_cache_files(tmp_path, fuzz):
    whole = tmp_path / "whole.sqlite"
    Cache(whole).put((str(number), pack(FOUND) * 5) for number in range(20))

    def read(case):
        data, statement, values = case
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        file = tmp_path / "runs" / "cache.sqlite"
        file.parent.mkdir()
        file.write_bytes(data)
        if statement:
            with sqlite3.connect(file) as database:
                database.execute(statement, values)
        cache = Cache(file, lambda message: None)
        for number in range(20):
            cache.get(str(number))
        cache.put([("new", b"1")])
        assert cache.get("new") == b"1"

    statements = st.one_of(
        st.tuples(st.just("update entries set value = ? where key > '1'"), st.tuples(st.sampled_from(VALUES))),
        st.tuples(st.just("update entries set key = key || ?"), st.just(("a",))),
        st.tuples(
            st.sampled_from(["drop table entries", "create table other (key)", "pragma user_version = 7"]), st.just(())
        ),
        st.tuples(st.just("create trigger t after insert on entries begin delete from entries; end"), st.just(())),
    )
    data = whole.read_bytes()
    files = mutated([data, data[:100] + bytes(len(data) - 100), b""], [b"\r", b"\x0a", b"\xff" * 100, bytes(100)])
    fuzz(st.tuples(files, st.just(""), st.just(())) | statements.map(lambda one: (data, *one)), read)
