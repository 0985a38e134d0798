"""`torch.save` archives read as data: their pickle by `pickles.py`, their tensors when somebody asks for one."""

import math
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detguard import DetguardError, first_line
from detguard.detectors.pickles import MAX_INSTRUCTIONS, Damaged, Named, Record, Stored, Unknown, read_pickle
from detguard.files import MAX_DEPTH, read_file

MAX_BYTES = 4 << 30
# Of a pickle and of a zip's table of contents: the largest networks need a tenth of that.
MAX_PICKLE = 32 << 20
MAX_DIRECTORY = 4 << 20
# Tensors may share their bytes, but all of them together may not take many times what the file has.
MOST_SHARED = 6


class CheckpointError(DetguardError):
    """A checkpoint that is refused; the message starts with its file."""


class _Limited(BytesIO):
    """Bytes that are given out in pieces of at most `most`."""

    def __init__(self, data: bytes, most: int) -> None:
        super().__init__(data)
        self.most, self.length = most, len(data)

    def read(self, size: int | None = -1) -> bytes:
        asked = self.length if size is None or size < 0 else size
        if asked > self.most and min(asked, self.length - self.tell()) > self.most:
            raise Damaged("its table of contents is larger than a detector needs")
        return super().read(size)


class Archive:
    """A `torch.save` archive: `root`, what it holds, as plain data and records; `tensor` makes a stored tensor real.

    Raises:
        CheckpointError: no such archive, damaged, too large, or made with names of elsewhere than KNOWN_MODULES.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._data = _Limited(read_file(file, MAX_BYTES), MAX_DIRECTORY)
        self._plain = 0
        self._left = MOST_SHARED * self._data.length + MAX_PICKLE
        try:
            self._zip = zipfile.ZipFile(self._data)
            self._data.most = MAX_BYTES
            self.root = self._read_root()
        except Exception as error:  # of a zip and a pickle that a stranger wrote, anything
            raise self.refused(error) from error

    def refused(self, error: Exception) -> CheckpointError:
        """The error of this file for what is wrong with it."""
        if isinstance(error, Unknown):
            return CheckpointError(f"{self.file}: refused, {error}; add `trust` if you know where it comes from")
        return CheckpointError(f"{self.file}: damaged, or not a checkpoint ({first_line(error)})")

    def _read_root(self) -> object:
        names = [name for name in self._zip.namelist() if name.count("/") == 1]
        (pickled,) = [name for name in names if name.endswith("/data.pkl")] or [""]
        if not pickled:
            raise zipfile.BadZipFile("no data.pkl in it")
        self._folder = pickled.removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in names:
            raise zipfile.BadZipFile("a TorchScript archive; give the .pt that it was exported from")
        if f"{self._folder}byteorder" in names and self._entry("byteorder", 16) != b"little":
            raise zipfile.BadZipFile("written by a big-endian machine")
        return read_pickle(self._entry("data.pkl", MAX_PICKLE))

    def _entry(self, name: str, most: int) -> bytes:
        entry = self._zip.getinfo(self._folder + name)
        if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= most:
            raise Damaged(f"its {name} is compressed or too large")
        return self._zip.read(entry)

    def tensor(self, stored: Stored) -> Tensor:
        """The tensor that is stored, in memory of its own.

        Raises:
            CheckpointError: it does not lie within its storage, its storage not within the file.
        """
        storage = stored.storage
        count = math.prod(stored.size)
        last = stored.offset + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
        try:
            if count and (last >= storage.numel or count > storage.numel):
                raise Damaged("holds a tensor that is larger than its storage")
            self._left -= count * storage.dtype.itemsize
            if self._left < 0:
                raise Damaged("its tensors are many times larger than the file, or read it many times")
            if not count:
                return torch.empty(stored.size, dtype=storage.dtype)
            data = self._entry(f"data/{storage.key}", MAX_BYTES)
            self._left -= len(data)  # a tensor of one number has all of its storage read
            if len(data) < storage.numel * storage.dtype.itemsize:
                raise Damaged("holds a storage that is larger than its entry")
            numbers = torch.frombuffer(bytearray(data), dtype=storage.dtype, count=storage.numel)
            return numbers.as_strided(stored.size, stored.stride, stored.offset).clone()
        except Exception as error:  # as above
            raise self.refused(error) from error

    def plain(self, value: object, depth: int = 0) -> object:
        """`value` with its tensors real.

        Raises:
            CheckpointError: there are records in it, or it is nested too deep.
        """
        self._plain += 1  # a list that holds another one twice, and so on, has more entries than any file
        if depth > MAX_DEPTH or self._plain > MAX_INSTRUCTIONS:
            raise self.refused(Damaged("nested too deep, or too often"))
        match value:
            case Stored():
                return self.tensor(value)
            case dict():
                return {key: self.plain(entry, depth + 1) for key, entry in value.items()}
            case list() | tuple():
                return type(value)(self.plain(entry, depth + 1) for entry in value)
            case Record(kind=name) | Named(name):
                raise self.refused(Unknown(f"made with classes that detguard does not know: {name}"))
            case _:
                return value


def read_state(file: Path) -> Any:
    """What a training state or a state dict in a `torch.save` archive holds: plain containers, numbers and tensors.

    Raises:
        CheckpointError: no such archive, damaged, too large, or more than that is in it.
    """
    archive = Archive(file)
    return archive.plain(archive.root)


def same_form(value: object, like: object) -> bool:
    """Whether a value from a file, whose tensors are on the CPU, is built like another.

    That is, of the same containers, keys and types, and tensors of the same shape, wherever those of the other are.
    """
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return False
        return all(getattr(value, name) == getattr(like, name) for name in ("shape", "dtype", "layout"))
    if isinstance(like, dict):
        return (
            isinstance(value, dict)
            and value.keys() == like.keys()
            and all(same_form(value[key], one) for key, one in like.items())
        )
    if isinstance(like, list):
        return isinstance(value, list) and len(value) == len(like) and all(map(same_form, value, like))
    return type(value) is type(like)
