"""Pickles read as data: nothing that they name is imported, called or built.

A pickle is a program: it names functions and has them called. Here every name becomes a `Named`, and every call of it a
`Record` of what would have been called with what. Only plain containers become real.
"""

import pickle
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch

MAX_INSTRUCTIONS = 2_000_000
MAX_DIMENSIONS = 8
# Characters of a name, and what a memo may be numbered by, as by pickle itself in a few bytes.
MAX_NAMED, MAX_MEMO = 512, 1 << 31

# Where the names in a checkpoint of a detector come from; one of elsewhere has no business there.
KNOWN_MODULES = (
    "torch", "torchvision", "ultralytics", "numpy", "collections", "pathlib", "datetime", "types", "argparse",
    "functools", "copyreg", "copy_reg", "_codecs",
)  # fmt: skip
CONTAINERS: dict[str, Callable[..., object]] = {
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


class Damaged(Exception):
    """What is wrong with a pickle or a zip, for the message of a CheckpointError."""


class Unknown(Damaged):
    """What a pickle or a recipe has in it that detguard does not build."""


@dataclass(frozen=True)
class Named:
    """A function or class that a pickle names, as its name and no more."""

    name: str


@dataclass(eq=False, repr=False)  # in words it may have no end
class Record:
    """A call or an object of a pickle: what would have been called, with what, and the state that it would have got."""

    kind: str
    args: tuple[object, ...] = ()
    state: Any = None
    items: list[object] = field(default_factory=list)


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


_Unpickler: Any = pickle._Unpickler  # whose stack type stubs do not know


class _Reader(_Unpickler):
    """Python's own unpickler with the instructions that make data; those that call and build make records."""

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))
        self.copied = 0

    def load(self) -> object:
        # As the base class has it but for its frames, which would be read without being counted.
        self.read, self.readline = self._file_read, self._file_readline
        self.metastack: list[list[object]] = []
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
        if len(module) + len(name) > MAX_NAMED:
            raise Damaged("names a class at a length that none has")
        module = "builtins" if module == "__builtin__" else module
        known = module.partition(".")[0] in KNOWN_MODULES
        if not known and f"{module}.{name}" not in CONTAINERS and (module != "builtins" or name not in PLAIN_BUILTINS):
            raise Unknown(f"made with classes that detguard does not know: {module}.{name}")
        return Named(f"{module}.{name}")

    def persistent_load(self, pid: object) -> Storage:
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
        if isinstance(self.stack[-1], Named) and self.stack[-1].name in CONTAINERS and args:
            self._copy(args[0])
        self.stack[-1] = _called(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        args, keywords = self.stack[-2:]
        if not isinstance(args, tuple):
            raise Damaged("calls what is no function")
        self._copy(args)
        self.stack[-2:] = [(*args, keywords)]
        self.load_reduce()

    def load_put(self) -> None:
        number = int(self.readline()[:-1])
        if not 0 <= number < MAX_MEMO:  # chosen by the file, thousands may have one hash
            raise Damaged("numbers what it remembers oddly")
        self.memo[number] = self.stack[-1]

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

    def _copy(self, items: object) -> None:
        """Count what an instruction copies: of one long list, a few bytes of the file can ask for a copy each."""
        self.copied += len(items) if isinstance(items, Sized) else 0
        if self.copied > MAX_INSTRUCTIONS:
            raise Damaged("it has more objects than a detector needs")

    def _add(self, items: list[object]) -> None:
        match self.stack[-1]:
            case list(into) | Record(items=into):
                into.extend(items)
            case set(into):
                into.update(map(_key, items))
            case _:
                raise Damaged("adds to what is no list")

    def _set(self, items: list[object]) -> None:
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
            pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL,
            pickle.BINPERSID,
        )
    } | {
        pickle.FRAME[0]: load_frame, pickle.PUT[0]: load_put, pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex, pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends, pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip


def _key(value: object) -> object:
    """A key of a dict or member of a set: what cannot be made to have the hash of thousands of others."""
    if isinstance(value, str | float | bytes | Named | Record | None) or (
        isinstance(value, int) and abs(value) < 2**63
    ):
        return value
    raise Damaged("has a key that is neither text nor number")


def _called(function: object, args: object) -> object:
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


def _contained(kind: Callable[..., object], items: object = (), *more: object) -> object:
    if more or not isinstance(items, list | tuple | dict | set | frozenset):
        raise Damaged("has a container of something odd")
    if kind is dict:
        return {_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}
    return kind(map(_key, items) if kind in (set, frozenset) else items)


def _stored(args: tuple[object, ...]) -> Stored:
    match args:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            whole = len(size) == len(stride) <= MAX_DIMENSIONS
            if whole and all(isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *size, *stride)):
                return Stored(storage, offset, size, stride)
    raise Damaged("holds a tensor of no shape")


def read_pickle(data: bytes) -> object:
    """What a pickle makes, as plain data, records and stored tensors.

    Raises:
        Damaged: it is cut short, has more in it than a detector needs, or names what is no part of one (Unknown).
    """
    return _Reader(data).load()
