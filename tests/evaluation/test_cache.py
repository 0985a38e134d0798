import sqlite3
import subprocess
import sys
import tracemalloc
import zlib
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from safetensors.torch import save

from detguard import DetguardError, runs
from detguard.detections import Detections
from detguard.evaluation.cache import Cache, entry_key, pack, unpack

FOUND = Detections(torch.rand(5, 4) * 600, torch.rand(5), torch.arange(5), torch.rand(3))


@pytest.fixture
def told():
    return []


@pytest.fixture
def file(tmp_path, told):
    """A cache of many entries, more than fit a page."""
    cache = Cache(tmp_path / "cache.sqlite", told.append)
    cache.put((str(number), bytes([number]) * 2000) for number in range(50))
    return cache.file


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("boxes", "scores", "classes", "experts"))


def test_detections_survive_packing_to_the_bit():
    assert same(unpack(pack(FOUND)), FOUND)


def test_keys_differ_by_every_part():
    assert entry_key(a=1, b=2) == entry_key(b=2, a=1)
    assert len({entry_key(a=1), entry_key(a=2), entry_key(b=1)}) == 3


def test_a_cache_keeps_all_of_a_batch_or_nothing(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")

    def entries():
        yield "a", b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.put(entries())
    assert "a" not in cache
    cache.put([("a", b"1"), ("b", b"2")])
    assert Cache(tmp_path / "c.sqlite").get("b") == b"2"


@pytest.mark.parametrize("value", [b"", b"x", "text", 7, None, 0.5, bytes(3000), b"\xff" * 1000])
def test_a_damaged_entry_is_not_there_and_told_of_once(file, told, value):
    with sqlite3.connect(file) as database:
        database.execute("update entries set value = ? where key in ('1', '2')", (value,))
    cache = Cache(file, told.append)
    assert cache.get("1") is cache.get("2") is None
    assert cache.get("3") == bytes([3]) * 2000
    cache.put([("1", b"made again")])
    assert cache.get("1") == b"made again"
    assert len(told) == 1
    assert "damaged entries" in told[0]


@pytest.mark.parametrize("end", [16, 1000])
def test_an_entry_cut_short_is_not_there(file, told, end):
    with sqlite3.connect(file) as database:
        database.execute("update entries set value = substr(value, 1, ?)", (end,))
    assert Cache(file, told.append).get("1") is None


def text(data):
    return b"no database" * 500


def cut(data):
    return data[: len(data) // 2]


def scribbled(data):
    return data[:4096] + b"\xa5" * (len(data) - 4096)


def header(data):
    return data[:40] + b"\xff" * 60 + data[100:]


def schema(data):
    return data.replace(b"entries", b"ent\xffies").replace(b"CREATE", b"CREATX")  # SQLite's error quotes it


@pytest.mark.parametrize("damage", [text, cut, scribbled, header, schema])
def test_a_damaged_file_is_set_aside_and_begun_anew(file, told, damage):
    data = damage(file.read_bytes())
    file.write_bytes(data)
    cache = Cache(file, told.append)
    for number in range(50):
        cache.get(str(number))
    cache.put((str(number), b"new") for number in range(50))
    assert all(cache.get(str(number)) == b"new" for number in range(50))
    assert cache.begun == 1
    assert len(told) == 1
    assert "set aside as cache.sqlite.damaged-1" in told[0]
    assert file.with_name("cache.sqlite.damaged-1").read_bytes() == data
    assert Cache(file, told.append).get("7") == b"new"


def test_what_is_damaged_under_an_open_cache_is_set_aside_at_the_next_write(file, told):
    cache = Cache(file, told.append)
    file.write_bytes(scribbled(file.read_bytes()))
    cache.put([("new", b"1")])
    assert cache.get("new") == b"1"
    assert cache.begun == 1


def test_a_damaged_file_that_others_have_open_is_left_to_the_user(file, told):
    cache = Cache(file, told.append, alone=False)
    assert cache.get("1") == bytes([1]) * 2000
    data = scribbled(file.read_bytes())
    file.write_bytes(data)
    with pytest.raises(DetguardError, match=r"cache\.sqlite: cannot be used as a cache .*; delete it"):
        cache.put([("new", b"1")])
    assert file.read_bytes() == data
    assert told == []


def test_a_foreign_database_with_triggers_is_set_aside(file, told):
    with sqlite3.connect(file) as database:
        database.execute("create trigger t after insert on entries begin delete from entries; end")
    cache = Cache(file, told.append)
    cache.put([("a", b"1")])
    assert cache.get("a") == b"1"
    assert cache.begun == 1


def test_a_cache_that_cannot_be_opened_is_one_line_that_names_it(tmp_path):
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(DetguardError, match=r"folder\.sqlite: not a regular file"):
        Cache(tmp_path / "folder.sqlite")
    (tmp_path / "file").touch()
    with pytest.raises(DetguardError, match=r"cache\.sqlite: cannot be made, .*; start detguard in a folder"):
        Cache(tmp_path / "file" / "cache.sqlite")
    (tmp_path / "odd.sqlite").write_bytes(b"odd")
    with pytest.raises(DetguardError, match=r"odd\.sqlite: cannot be used as a cache .*; delete it or"):
        Cache(tmp_path / "odd.sqlite", alone=False)


def test_a_full_disk_costs_no_entry_and_says_what_to_do(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from detguard import DetguardError
from detguard.evaluation.cache import Cache
cache = Cache(Path("c.sqlite"))
cache.put([("first", b"found")])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cache.put([("second", bytes(1 << 20))])
except DetguardError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("c.sqlite: cannot be written (")
    assert "free some space" in run.stdout
    assert Cache(tmp_path / "c.sqlite").get("first") == b"found"
    assert not list(tmp_path.glob("*.damaged-*"))


BOXES, ONES, CLASSES = torch.ones(2, 4), torch.ones(2), torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        zlib.compress(b""),
        zlib.compress(save({"boxes": BOXES, "scores": ONES})),
        zlib.compress(save({"boxes": BOXES, "scores": torch.ones(3), "classes": CLASSES})),
        zlib.compress(save({"boxes": BOXES, "scores": ONES, "classes": torch.ones(2)})),
        zlib.compress(save({"boxes": torch.ones(()), "scores": ONES, "classes": CLASSES})),
        zlib.compress(save({"boxes": BOXES, "scores": ONES, "classes": CLASSES, "experts": torch.ones(1, 1)})),
        zlib.compress(save({"boxes": BOXES, "scores": ONES, "classes": CLASSES}))[:-20],
    ],
    ids=range(9),
)
def test_a_strangers_entry_is_one_line(data):
    with pytest.raises(DetguardError, match="an entry is not detguard's"):
        unpack(data)


def test_a_blob_is_not_unpacked_beyond_what_detections_can_be():
    bomb = zlib.compress(bytes(1 << 28))
    tracemalloc.start()
    with pytest.raises(DetguardError, match="an entry is not detguard's"):
        unpack(bomb)
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


@pytest.mark.parametrize("library", ["torchvision", "transformers", "timm", "onnxruntime"])
def test_nothing_that_another_version_of_a_library_found_is_used(monkeypatch, library):
    def version(name):
        if name == library:
            return versions.pop()
        raise PackageNotFoundError

    keys, versions = set(), ["2.0", "1.0"]
    monkeypatch.setattr(runs, "version", version)
    for _ in range(2):
        runs.versions.cache_clear()
        keys.add(entry_key(photo="a"))
    runs.versions.cache_clear()
    assert len(keys) == 2


def test_a_cache_that_another_process_holds_is_left_as_it_is(file, told, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **(options | {"timeout": 0.01})))
    cache, other = Cache(file, told.append), connect(file)
    other.execute("begin exclusive")
    with pytest.raises(DetguardError, match="locked"):
        cache.put([("new", b"2")])
    other.close()
    assert cache.get("1") == bytes([1]) * 2000
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert not told
