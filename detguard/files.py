"""Files and text as if a stranger wrote them: regular, of bounded size, parsed by parsers that build plain data only.

What detguard reads from disk comes through `open_file`, but for what libraries open by its name: of weights,
`detectors/load.py` sees first that they are regular and of bounded size.
"""

import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from detguard import DetguardError

# What a JSON or YAML file calls an object or mapping: names with values, which whoever reads them checks.
JsonObject = dict[str, Any]
# Bytes that a file of each kind may have: far over what any real one needs, far under what a machine has.
MAX_TEXT = 64 << 20
MAX_PHOTO = 512 << 20
MAX_ANNOTATIONS = 2 << 30
MAX_LINE = 16 << 20
# What `write_file` calls a file that is not whole yet; a kill may leave one behind.
PARTIAL = ".partial"
# A tree may be so deep, and so much larger for the aliases in it, as nobody writes by hand.
MAX_DEPTH = 64
MAX_ALIASED = 4
_NESTED = (dict, list)
# Parts of a tree, each of which takes some hundred bytes when it is read.
MAX_EVENTS = 5_000_000


class Temporary:
    """A folder that is there as long as this is."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="detguard-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


class FileError(DetguardError):
    """A file that cannot be read or written; the message starts with its path."""


@contextmanager
def open_file(file: str | Path, most: int | None = None) -> Iterator[BinaryIO]:
    """A regular file, of at most `most` bytes where they are bounded, open for reading.

    Raises:
        FileError: missing, unreadable, larger, or no regular file: a pipe would be waited for, a device never ends.
    """
    try:
        # Without O_NONBLOCK, to open a pipe is to wait for who writes to it.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(file, flags)
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise FileError(f"{file}: cannot be read ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{file}: not a regular file")
    with open(descriptor, "rb") as stream:  # noqa: PTH123
        if most is not None and os.fstat(descriptor).st_size > most:
            raise FileError(_over(file, most))
        yield stream


def read_file(file: str | Path, most: int = MAX_TEXT) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        FileError: as `open_file`, or larger.
    """
    with open_file(file) as stream:
        try:
            # Not as many bytes as are allowed: Python would take the memory for them at once.
            data = stream.read(min(os.fstat(stream.fileno()).st_size, most) + 1)
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error.strerror or error})") from error
    if len(data) > most:
        raise FileError(_over(file, most))
    return data


def _over(file: str | Path, most: int) -> str:
    return f"{file}: over the limit of {most >> 20 or most / 2**20:g} MiB"


def shipped(name: str) -> Path:
    """A folder that detguard comes with: inside the installed package, or at the top of the source tree."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else inside.parent.parent / name


# Unlike those of `Path`, they raise of no name: where nobody can look, there is none.
is_file, is_folder = os.path.isfile, os.path.isdir


def write_file(file: Path, data: bytes | Iterable[bytes]) -> None:
    """Put `data` into `file`, whole or not at all: written beside it, flushed to the disk, then renamed.

    data: all at once, or block by block; what making a block raises is raised.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    # Not of the file's own name: one of 255 bytes leaves no room for more.
    # And by chance: processes of several machines have the same numbers, and folders that they share.
    partial = file.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.writelines([data] if isinstance(data, bytes) else data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException as error:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError | ValueError):
            raise
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError):  # of the folder's name, as `mkdir` says it
            reason = f"{file.parent} is not a folder"
        raise FileError(f"{file}: cannot be written ({reason})") from error


def read_json(file: str | Path, most: int = MAX_TEXT) -> Any:
    """What a JSON file says.

    Raises:
        FileError: as `read_file`, or it is not JSON.
    """
    try:
        return parse_json(read_file(file, most))
    except ValueError as error:
        raise FileError(f"{file}: not JSON ({error})") from error


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says, in UTF-8.

    Raises:
        ValueError: it is not JSON, or nested as deep as nobody writes.
    """
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level: list[Any] = [[tree]]
    for _ in range(MAX_DEPTH + 1):
        parts = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        if not (level := [part for part in parts if isinstance(part, _NESTED)]):
            return tree
    raise ValueError("nested too deep")  # what is made of it by recursion would end in an error


def read_yaml(file: str | Path, most: int = MAX_TEXT) -> object:
    """What a YAML file of at most so many bytes says, in plain lists, dicts, texts, numbers, booleans and nulls.

    Numbers, booleans and nulls are those that PyYAML writes; all else is text, so that a class named `no` or `12:30` is
    called that.

    Raises:
        FileError: as `read_file`, or it is not YAML, names types, is nested deep or grows by its aliases.
    """
    data = read_file(file, most)
    try:
        return _parse_yaml(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileError(f"{file}: not a readable yaml ({' '.join(str(error).split())})") from error


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader without dates, base-60 numbers, merges and what else YAML 1.1 sees in plain text."""

    yaml_implicit_resolvers: dict[str, list[object]] = {}  # noqa: RUF012


def _scalar(tag: str, pattern: str, first: str, made: Callable[[str], object]) -> None:
    tag = f"tag:yaml.org,2002:{tag}"
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), ["", *first])
    _Loader.add_constructor(tag, lambda loader, node: made(node.value))


_scalar("null", "~|null|Null|NULL|", "~nN", lambda text: None)
_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true")
_scalar("int", "[-+]?(0|[1-9][0-9]{0,18})", "-+0123456789", int)
# As PyYAML writes them: "-.5" it leaves unquoted, as a text.
_scalar("float", r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", "-+.0123456789", float)


def _parse_yaml(text: str) -> object:
    depth = 0
    # Events are not nested: too deep or too large a tree is seen before it is built.
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > MAX_EVENTS:
            raise ValueError(f"over {MAX_EVENTS} parts")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise ValueError(f"names a type, {tag}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        sizes: dict[int, int] = {}
        if _whole_size(root, sizes) > MAX_ALIASED * len(sizes) + 1000:
            raise ValueError("its aliases make it many times larger")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _whole_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes a tree has where each alias is a copy; sizes: those of the subtrees, by identity."""
    if id(node) not in sizes:
        sizes[id(node)] = 1 << 62  # what contains itself has no end
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        sizes[id(node)] = 1 + sum(_whole_size(child, sizes) for pair in pairs for child in pair)
    return sizes[id(node)]


def printable(text: str) -> str:
    """`text` with what a terminal would obey, not show, as escapes: controls, new lines, direction, surrogates."""
    if text.isprintable():  # most is, and long texts are told so quickly
        return text
    return "".join(c if unicodedata.category(c) not in _OBEYED else ascii(c)[1:-1] for c in text)


_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
