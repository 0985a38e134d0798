"""Reading `torch.save` archives as data: nothing that they name is imported, called or built.

A pickle is a program: it names functions and has them called. Here every name becomes a `Named`, and every call of it a
`Record` of what would have been called with what. Only plain containers become real, and tensors, by `Archive.tensor`,
when somebody asks for one.
"""

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from detguard import DetguardError
from detguard.files import MAX_DEPTH, read_file

MAX_BYTES = 4 << 30
# Classes that a detector may know, and sides of a frame, px.
MOST_CLASSES = 10_000
SIZES = range(32, 4097)
# Of a pickle and of a zip's table of contents: the largest networks need a tenth of that.
MAX_PICKLE = 32 << 20
MAX_DIRECTORY = 4 << 20
MAX_INSTRUCTIONS = 2_000_000
MAX_DIMENSIONS = 8
# Tensors may share their bytes, but all of them together may not take many times what the file has.
MOST_SHARED = 4

# Where the names in a checkpoint of a detector come from; one of elsewhere has no business there.
KNOWN_MODULES = (
    "torch", "torchvision", "ultralytics", "numpy", "collections", "pathlib", "datetime", "types", "argparse",
    "functools", "copyreg", "copy_reg", "_codecs",
)  # fmt: skip
CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "builtins.set": set, "builtins.frozenset": frozenset, "builtins.list": list, "builtins.dict": dict,
    "builtins.tuple": tuple, "torch.Size": tuple,
}  # fmt: skip
PLAIN_BUILTINS = ("bytearray", "complex", "slice", "range", "object")
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
REBUILT = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


class CheckpointError(DetguardError):
    """A checkpoint that is refused; the message starts with its file."""


class Damaged(Exception):
    """What is wrong with a pickle or a zip, for the message of a CheckpointError."""


class Unknown(Damaged):
    """What a pickle or a recipe has in it that detguard does not build."""


@dataclass(frozen=True)
class Named:
    """A function or class that a pickle names, as its name and no more."""

    name: str


@dataclass(eq=False)
class Record:
    """A call or an object of a pickle: what would have been called, with what, and the state that it would have got."""

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Numbers in the archive: how many of which type, and the entry that holds them."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor in the archive, as where it lies in its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


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


_Unpickler: Any = pickle._Unpickler  # whose stack type stubs do not know


class _Reader(_Unpickler):
    """Python's own unpickler with the instructions that make data; those that call and build make records."""

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))

    def load(self) -> Any:
        # As the base class has it but for its frames, which would be read without being counted.
        self.read, self.readline = self._file_read, self._file_readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        for _ in range(MAX_INSTRUCTIONS):
            code = self.read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            if not code or code[0] not in self.dispatch:
                raise Damaged("its pickle is cut short, or has instructions that no checkpoint needs")
            self.dispatch[code[0]](self)
        raise Damaged("it has more objects than a detector needs")

    def find_class(self, module: str, name: str) -> Named:
        module = "builtins" if module == "__builtin__" else module
        known = module.partition(".")[0] in KNOWN_MODULES
        if not known and f"{module}.{name}" not in CONTAINERS and (module != "builtins" or name not in PLAIN_BUILTINS):
            raise Unknown(f"made with classes that detguard does not know: {module}.{name}")
        return Named(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", Named(name), str(key), str(), int(numel)) if key.isdecimal() and numel >= 0:
                dtype = STORAGES.get(name.removeprefix("torch."))
                if dtype is not None:
                    return Storage(dtype, key, numel)
        raise Damaged("holds tensors of an unknown kind")

    def load_frame(self) -> None:
        self.read(8)  # its length; what it frames follows as if there were none

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        self.stack[-2:] = [(*self.stack[-2], self.stack[-1])]
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def load_append(self) -> None:
        self._add([self.stack.pop()])

    def load_appends(self) -> None:
        self._add(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def load_additems(self) -> None:
        self._add(self.pop_mark())

    def load_frozenset(self) -> None:
        self.stack.append(frozenset(map(_key, self.pop_mark())))

    def _add(self, items: list[Any]) -> None:
        match self.stack[-1]:
            case list(into) | Record(items=into):
                into.extend(items)
            case set(into):
                into.update(map(_key, items))
            case _:
                raise Damaged("adds to what is no list")

    def _set(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], Record):
            return self._add(items)
        if not isinstance(self.stack[-1], dict):
            raise Damaged("sets an item of what is no dict")
        self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    dispatch = {
        code[0]: _Unpickler.dispatch[code[0]]
        for code in (
            pickle.PROTO, pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.INT, pickle.BININT,
            pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING,
            pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
            pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1,
            pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.LIST,
            pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.GET, pickle.BINGET, pickle.LONG_BINGET,
            pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL,
            pickle.BINPERSID,
        )
    } | {
        pickle.FRAME[0]: load_frame, pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex, pickle.BUILD[0]: load_build, pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip


def _key(value: Any) -> Any:
    """A key of a dict or member of a set: what cannot be made to have the hash of thousands of others."""
    if isinstance(value, str | float | bytes | Named | Record | None) or (
        isinstance(value, int) and abs(value) < 2**63
    ):
        return value
    raise Damaged("has a key that is neither text nor number")


def _called(function: Any, args: Any) -> Any:
    """What stands for a call: a container, a stored tensor, or a record."""
    if not isinstance(function, Named) or not isinstance(args, tuple):
        raise Damaged("calls what is no function")
    name = function.name
    if name in CONTAINERS:
        return _contained(CONTAINERS[name], *args)
    if name in REBUILT:
        return _stored(args)
    if name in PARAMETERS and args and isinstance(args[0], Stored):
        return args[0]
    return Record(name, args)


def _contained(kind: Callable[..., Any], items: Any = (), *more: Any) -> Any:
    if more or not isinstance(items, list | tuple | dict | set | frozenset):
        raise Damaged("has a container of something odd")
    if kind is dict:
        return {_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}
    return kind(map(_key, items) if kind in (set, frozenset) else items)


def _stored(args: tuple[Any, ...]) -> Stored:
    match args:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            whole = len(size) == len(stride) <= MAX_DIMENSIONS
            if whole and offset >= 0 and all(isinstance(n, int) and n >= 0 for n in (*size, *stride)):
                return Stored(storage, offset, size, stride)
    raise Damaged("holds a tensor of no shape")


class Archive:
    """A `torch.save` archive: `root`, what it holds, as plain data and records; `tensor` makes a stored tensor real.

    Raises:
        CheckpointError: no such archive, damaged, too large, or made with names of elsewhere than KNOWN_MODULES.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._data = _Limited(read_file(file, MAX_BYTES), MAX_DIRECTORY)
        self._left = MOST_SHARED * self._data.length + MAX_PICKLE
        try:
            self._zip = zipfile.ZipFile(self._data)
            self._data.most = MAX_BYTES
            self.root: Any = self._read_root()
        except Exception as error:  # of a zip and a pickle that a stranger wrote, anything
            raise self.refused(error) from error

    def refused(self, error: Exception) -> CheckpointError:
        """The error of this file for what is wrong with it."""
        if isinstance(error, Unknown):
            return CheckpointError(f"{self.file}: refused, {error}; add --trust if you know where it comes from")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"{self.file}: damaged, or not a checkpoint ({reason})")

    def _read_root(self) -> Any:
        names = [name for name in self._zip.namelist() if name.count("/") == 1]
        (pickled,) = [name for name in names if name.endswith("/data.pkl")] or [""]
        if not pickled:
            raise zipfile.BadZipFile("no data.pkl in it")
        self._folder = pickled.removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in names:
            raise zipfile.BadZipFile("a TorchScript archive; give the .pt that it was exported from")
        if f"{self._folder}byteorder" in names and self._entry("byteorder", 16) != b"little":
            raise zipfile.BadZipFile("written by a big-endian machine")
        return _Reader(self._entry("data.pkl", MAX_PICKLE)).load()

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
                raise Damaged("its tensors are many times larger than the file")
            if not count:
                return torch.empty(stored.size, dtype=storage.dtype)
            data = self._entry(f"data/{storage.key}", MAX_BYTES)
            if len(data) < storage.numel * storage.dtype.itemsize:
                raise Damaged("holds a storage that is larger than its entry")
            numbers = torch.frombuffer(bytearray(data), dtype=storage.dtype, count=storage.numel)
            return numbers.as_strided(stored.size, stored.stride, stored.offset).clone()
        except (Damaged, KeyError, zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
            raise self.refused(error) from error

    def plain(self, value: Any, depth: int = 0) -> Any:
        """`value` with its tensors real.

        Raises:
            CheckpointError: there are records in it, or it is nested too deep.
        """
        if depth > MAX_DEPTH:
            raise self.refused(Damaged("nested too deep"))
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

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._zip.close()


def read_state(file: Path) -> Any:
    """What a training state or a state dict in a `torch.save` archive holds: plain containers, numbers and tensors.

    Raises:
        CheckpointError: no such archive, damaged, too large, or more than that is in it.
    """
    with Archive(file) as archive:
        return archive.plain(archive.root)
