"""What was found on one photo, kept by the hash of everything that it depends on, in one SQLite file."""

import hashlib
import json
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load, save

from detguard import DetguardError
from detguard.detections import Detections
from detguard.files import MAX_PHOTO, is_file
from detguard.runs import versions

DEFAULT = Path("runs/evaluate/cache.sqlite")
# To be raised with every change of ours that changes what is found: attacks, corruptions, NMS, layers, fusion.
RESULTS = 13
TABLE = "entries (key text primary key, value blob)"
# Bytes of the digest before each blob, of a blob, and of packed detections.
DIGEST = 16
MAX_ENTRY = MAX_PHOTO
MAX_UNPACKED = 1 << 20
# What SQLite fails at for other reasons: another process, the rights, the disk.
NO_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM,
}  # fmt: skip
# Of these, a disk that is full.
DISK = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
# A disk on which each new file is damaged is no place for a cache.
MOST_BEGUN = 3


class Cache:
    """Blobs by key. Each `put` is one transaction: a killed run leaves whole entries or none.

    A damaged entry is one that is not there. A damaged file is set aside, beside it, and begun anew; `begun` counts.
    on_warning: called with what is wrong with either, once; alone: no other process has the file open, else one that
    is damaged is left to the user.

    Raises:
        DetguardError: the file cannot be opened or written.
    """

    def __init__(
        self, file: Path = DEFAULT, on_warning: Callable[[str], object] = warnings.warn, *, alone: bool = True
    ) -> None:
        self.file = file
        self.begun = 0
        self._alone = alone
        self._warn = on_warning
        self._damaged = False
        self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.exists() and not is_file(self.file):
                raise DetguardError(f"{self.file}: not a regular file; move it away")
            database = sqlite3.connect(self.file, timeout=60)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            database.execute("pragma trusted_schema = off")
            database.text_factory = bytes  # text is none of ours, and may be no UTF-8
            database.execute(f"create table if not exists {TABLE}")
            database.commit()
            # A stranger's could have triggers, which run when something is put in.
            tables = database.execute("select sql from sqlite_master where sql is not null").fetchall()
            if tables != [(f"CREATE TABLE {TABLE}".encode(),)]:
                raise sqlite3.DatabaseError("not a cache of detguard's")
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of an error that quotes the file
            database.close()
            return self._anew(error)
        return database

    def _unusable(self, error: Exception) -> DetguardError:
        if _code(error) in DISK:
            return DetguardError(f"{self.file}: cannot be written ({error}); free some space, what is in it is kept")
        if not self.file.exists():
            return DetguardError(
                f"{self.file}: cannot be made, and what is found is kept there ({error}); start detguard in a folder "
                "that can be written, results go where `out` says"
            )
        return DetguardError(f"{self.file}: cannot be used as a cache ({error}); delete it or make it writable")

    def _anew(self, error: Exception) -> sqlite3.Connection:
        """Set the file aside if that is what an error is about, and open a new one."""
        if _code(error) in NO_DAMAGE or self.begun == MOST_BEGUN or not self._alone:
            raise self._unusable(error) from error
        self.begun += 1
        aside = next(
            name for n in count(1) if not (name := self.file.with_name(f"{self.file.name}.damaged-{n}")).exists()
        )
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):  # or what is left would be taken for that of the new one
                with suppress(FileNotFoundError):
                    self.file.with_name(self.file.name + suffix).rename(aside.with_name(aside.name + suffix))
        except OSError as failed:
            raise self._unusable(failed) from failed
        self._warn(f"{self.file}: damaged ({error}); set aside as {aside.name} and begun anew")
        return self._open()

    def get(self, key: str) -> bytes | None:
        """The blob of a key, if it is there and as it was put in."""
        try:
            row = self._database.execute(
                "select value from entries where key = ? and coalesce(length(value), 0) <= ?", (key, MAX_ENTRY)
            ).fetchone()
        except sqlite3.Error as error:
            self._database = self._anew(error)
            return None
        if row is None:
            return None
        value = row[0]
        if isinstance(value, bytes) and value[:DIGEST] == _digest(value[DIGEST:]):
            return value[DIGEST:]
        if not self._damaged:
            self._warn(f"{self.file}: damaged entries in it are made again")
        self._damaged = True
        return None

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def put(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Add entries, all or none, and flush them to the disk.

        Raises:
            DetguardError: the disk is full or the file was taken away.
        """
        rows = [(key, _digest(blob) + blob) for key, blob in entries]
        try:
            self._insert(rows)
        except sqlite3.Error as error:
            try:
                self._database = self._anew(error)
                self._insert(rows)
            except sqlite3.Error as again:
                raise DetguardError(f"{self.file}: cannot be written ({again})") from again

    def _insert(self, rows: list[tuple[str, bytes]]) -> None:
        with self._database:
            self._database.executemany("insert or replace into entries values (?, ?)", rows)


def _code(error: Exception) -> int:
    """SQLite's own code of an error, without what it adds to it; 0: of none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _digest(blob: bytes) -> bytes:
    return hashlib.blake2b(blob, digest_size=DIGEST).digest()


def entry_key(**parts: object) -> str:
    """The key of an entry: a hash of all that it depends on, the versions of the code included."""
    return hashlib.sha256(json.dumps([RESULTS, versions(), parts], sort_keys=True).encode()).hexdigest()


def pack(detections: Detections) -> bytes:
    """Detections as the bytes that the cache keeps."""
    classes = detections.classes.to(torch.int32)
    tensors = {"boxes": detections.boxes, "scores": detections.scores, "classes": classes}
    if detections.experts is not None:
        tensors["experts"] = detections.experts
    return zlib.compress(save(tensors))


def foreign(why: object, file: object = "the cache") -> DetguardError:
    """The error of an entry that detguard has not written."""
    return DetguardError(f"{file}: an entry is not detguard's ({why}); delete the file")


def unpack(data: bytes) -> Detections:
    """The reverse of `pack`.

    Raises:
        DetguardError: it was not made by `pack`.
    """
    try:
        unpacked = zlib.decompressobj().decompress(data, MAX_UNPACKED)
        tensors = load(unpacked)
        boxes, scores, classes = (tensors.pop(name) for name in ("boxes", "scores", "classes"))
        experts = tensors.pop("experts", None)
    except Exception as error:  # of a stranger's bytes, the reader of tensors can raise anything
        raise foreign(error) from error
    shapes = [boxes.shape, scores.shape, classes.shape]
    types = [boxes.dtype, scores.dtype, classes.dtype]
    number = len(boxes) if boxes.ndim else 0
    if shapes != [(number, 4), (number,), (number,)] or types != [torch.float32, torch.float32, torch.int32]:
        raise foreign(f"shapes {shapes}")
    if experts is not None and (experts.ndim != 1 or experts.dtype != torch.float32):
        raise foreign("experts")
    return Detections(boxes, scores, classes.long(), experts)
