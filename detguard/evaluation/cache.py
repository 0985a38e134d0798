"""What was found on one photo, kept by the hash of everything that it depends on, in one SQLite file."""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from detguard import DetguardError, __version__
from detguard.detections import Detections

DEFAULT = Path("runs/evaluate/cache.sqlite")
# To be raised with every change of ours that changes what is found: attacks, corruptions, NMS.
RESULTS = 4
LIBRARIES = ("torch", "ultralytics", "opencv-python", "albumentations")


class Cache:
    """Blobs by key. Each `put` is one transaction: a killed run leaves whole entries or none.

    Raises:
        DetguardError: the file cannot be opened or is not such a cache.
    """

    def __init__(self, file: Path = DEFAULT) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60)
            self._database.execute("create table if not exists entries (key text primary key, value blob)")
            self._database.commit()
        except (OSError, sqlite3.Error) as error:
            raise DetguardError(
                f"{file}: cannot be used as a cache ({error}); delete it or make it writable"
            ) from error

    def get(self, key: str) -> bytes | None:
        """The blob of a key, if it is there."""
        row = self._database.execute("select value from entries where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def __contains__(self, key: str) -> bool:
        return self._database.execute("select 1 from entries where key = ?", (key,)).fetchone() is not None

    def put(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Add entries, all or none, and flush them to the disk.

        Raises:
            DetguardError: the disk is full or the file was taken away.
        """
        try:
            with self._database:
                self._database.executemany("insert or replace into entries values (?, ?)", entries)
        except sqlite3.Error as error:
            raise DetguardError(f"{self.file}: cannot be written ({error})") from error


def entry_key(**parts: Any) -> str:
    """The key of an entry: a hash of all that it depends on, the versions of the code included."""
    return hashlib.sha256(json.dumps([_versions(), parts], sort_keys=True).encode()).hexdigest()


@cache
def _versions() -> list[object]:
    return [__version__, RESULTS, *(version(name) for name in LIBRARIES)]


def pack(detections: Detections) -> bytes:
    """Detections as bytes."""
    classes = detections.classes.to(torch.int32)
    tensors = {"boxes": detections.boxes, "scores": detections.scores, "classes": classes}
    if detections.experts is not None:
        tensors["experts"] = detections.experts
    return zlib.compress(save(tensors))


def unpack(data: bytes) -> Detections:
    """The reverse of `pack`."""
    tensors = load(zlib.decompress(data))
    return Detections(tensors["boxes"], tensors["scores"], tensors["classes"].long(), tensors.get("experts"))
