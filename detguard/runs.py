"""Run folders: claimed by one process, created once, appended when files are safely on disk, resumed after a kill."""

import errno
import json
import os
import re
import shlex
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar
from weakref import WeakValueDictionary

import yaml
from typing_extensions import override

from detguard import DetguardError, __version__
from detguard.files import (
    MAX_ANNOTATIONS,
    MAX_LINE,
    PARTIAL,
    FileError,
    is_file,
    open_file,
    parse_json,
    read_file,
    read_yaml,
    write_file,
)
from detguard.schema import CONFIGS, EVENTS, RECORDS, Config, misfit

if TYPE_CHECKING:
    from detguard.ranks import Ranks

try:
    import fcntl
except ImportError:  # not on Windows, where two processes on one run are not noticed
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]

LOCK, NO_LOCKS = ".lock", "cannot be locked, as several processes on one run need it"
CONFIG = "config.yaml"
RESULTS = "results.jsonl"
# Of a run, what stood for photos without being files of them; and where it is while what was there before still is.
INPUTS, STAGED = "inputs", ".inputs"
# In that folder, the names of all that was made there, until the run has begun.
MADE = ".detguard-made"
# Bytes of a photo's name that its results are called by: file systems take 255, with what is added to it.
LONGEST_KEY = 200
# Of files to be written in place: no link is followed, no pipe is waited for.
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LIBRARIES = (
    "torch", "torchvision", "kornia", "ultralytics", "transformers", "timm", "onnxruntime", "onnxruntime-gpu",
    "opencv-python", "opencv-python-headless", "pillow", "pillow-heif", "albumentations", "albucore",
    "imagecorruptions-imaug", "scikit-image", "scipy", "numba", "numpy",
)  # fmt: skip


@cache
def versions() -> Mapping[str, str]:
    """The versions of all that decides what is found, as far as it is installed."""
    found = {"detguard": __version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def photo_keys(files: Sequence[Path]) -> dict[str, Path]:
    """A name for each photo's results: its stem, cut where it is too long, with a number where stems repeat."""
    keys, numbers, taken = dict[str, Path](), dict[str, int](), set[str]()
    for file in files:
        name = file.stem.encode(errors="surrogatepass")
        stem = file.stem if len(name) <= LONGEST_KEY else name[:LONGEST_KEY].decode(errors="ignore")
        key, number = stem, numbers.get(stem, 1)
        while _on_disk(key) in taken:
            number += 1
            key = f"{stem}-{number}"
        keys[key], numbers[stem] = file, number
        taken.add(_on_disk(key))
    return keys


def _on_disk(name: str) -> str:
    """A name as file systems compare it that know no letter case, and no two ways of writing an accent."""
    return unicodedata.normalize("NFC", name).casefold()


class RunError(DetguardError):
    """A run folder that cannot be made, read or resumed."""


class Lock(FileIO):
    """The file by which a run belongs to a process, open once in it, until its last user is gone.

    The close of any descriptor of a file ends all locks of the process on it, also those taken by another one.
    """

    _open: ClassVar["WeakValueDictionary[tuple[int, int], Lock]"] = WeakValueDictionary()

    @classmethod
    def of(cls, file: Path) -> "Lock":
        """That of a file, which is made where there is none."""
        with suppress(OSError):
            there = file.lstat()
            lock = cls._open.get((there.st_dev, there.st_ino))
            if lock and not lock.closed:
                return lock
        lock = cls(os.open(file, os.O_RDWR | os.O_CREAT | PLAIN, 0o666), "r+")
        made = os.fstat(lock.fileno())
        cls._open[made.st_dev, made.st_ino] = lock
        return lock

    @override
    def __del__(self) -> None:
        self.close()


class Run:
    """The folder of one invocation: `config.yaml`, `results.jsonl`, and the files that records name."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        # Told of each record of results.jsonl once it is there.
        self.on_record: Callable[[Record], object] | None = None

    @classmethod
    def create(
        cls,
        command: str,
        out: Path | None,
        config: Config,
        files: Mapping[str, bytes] | None = None,
        *,
        exist_ok: bool = False,
        photos: Callable[[Path], Iterable[Path]] | None = None,
    ) -> "Run":
        """A new folder, `out` or the next free `runs/<command>/<number>`, with `files`, then its config.yaml.

        exist_ok: a run of the same command that is there already is replaced, once all photos are there. photos: gives
        those that the config is to name; what it makes of them, in the folder that it is told, becomes `inputs`.

        Raises:
            RunError: `out` already holds a run, another process is making one there, or it cannot be written.
        """
        try:
            folder, made = (next_free(Path("runs") / command), True) if out is None else (out, _make(out))
        except OSError as error:
            raise RunError(
                f"{error.filename}: cannot be made a folder ({error.strerror}); choose another `out`"
            ) from error
        run, locked = cls(folder, {"command": command, **config}), os.path.lexists(folder / LOCK)
        run.claim()
        try:
            run._begin(files or {}, photos, exist_ok=exist_ok)
        except BaseException:  # what has not begun leaves nothing behind
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            elif not locked:
                with suppress(OSError):
                    (folder / LOCK).unlink()
            raise
        return run

    def _begin(
        self,
        files: Mapping[str, bytes],
        photos: Callable[[Path], Iterable[Path]] | None,
        *,
        exist_ok: bool,
    ) -> None:
        """All of `create` that is done in the folder once it is claimed."""
        folder, command = self.folder, self.config["command"]
        _sweep(folder.iterdir())
        if replaced := exist_ok and (folder / CONFIG).exists():
            self.open(folder, command)  # nothing but a run is removed
        else:
            refuse_taken(folder, command, "choose another `out`")
            # All of them would be taken for parts of the run.
            from detguard.photos import SUFFIXES

            held = [p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES or p.name == "data.yaml"]
            if held:
                raise RunError(f"{folder}: holds photos or data of yours ({held[0]}); choose another `out`")
        inputs, staged = folder / INPUTS, folder / STAGED
        killed = is_file(inputs / MADE) and not inputs.is_symlink()  # before it had begun
        if photos:
            self.config["photos"] = self._staged(photos, folder if replaced else inputs if killed else None)
        self.config["versions"] = dict(versions())
        if replaced:
            self.clear(but=STAGED)
        elif killed:
            _take_back(inputs)
        if made := photos and staged.exists():
            try:
                if os.path.lexists(inputs):  # somebody's; a renaming would take the place of an empty one
                    shutil.rmtree(staged)
                    raise RunError(f"{inputs}: is there already; move it away, or choose another `out`")
                staged.rename(inputs)
            except OSError as error:
                raise RunError(f"{inputs}: cannot be written ({error.strerror})") from error
        for name, data in files.items():
            self.write(name, data)
        # Last: a run without it has not begun, and can be made again.
        self.write(CONFIG, _yaml(self.config))
        if made:
            with suppress(OSError):
                (inputs / MADE).unlink()

    def _staged(self, photos: Callable[[Path], Iterable[Path]], replaced: Path | None) -> list[str]:
        """The photos of a run that is being made, by the names that they will have; all or none are there.

        replaced: the folder that goes before they come, where one does.
        """
        staged = self.folder / STAGED
        shutil.rmtree(staged, ignore_errors=True)  # of one that was killed
        try:
            found = list(photos(staged))
            place = replaced and replaced.resolve()
            for one in found:
                if place and one.parent != staged and one.resolve().is_relative_to(place):
                    raise RunError(f"{one}: is in {replaced}, which would be replaced; choose another `name`")
            if staged.exists():
                self.write(f"{STAGED}/{MADE}", b"\0".join(os.fsencode(one.name) for one in staged.iterdir()))
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return [str(self.folder / INPUTS / one.name if one.parent == staged else one) for one in found]

    @classmethod
    def open(cls, folder: Path, command: str) -> "Run":
        """An existing run of `command`, to look at.

        Raises:
            RunError: no run there, damaged, of another command, or its config is none that detguard wrote.
        """
        file = folder / CONFIG
        try:
            config = read_yaml(file, MAX_ANNOTATIONS)  # it lists all photos
        except FileError as error:
            raise RunError(f"{folder}: no {command} run here ({error})") from error
        if not isinstance(config, dict) or config.get("command") != command:
            raise RunError(f"{folder}: not a run of 'detguard {command}'")
        if wrong := misfit(config, CONFIGS[command]):
            raise RunError(f"{file}: not one that detguard wrote ({wrong})")
        return cls(folder, config)

    @classmethod
    def resume(cls, folder: Path, command: str) -> "Run":
        """An existing run of `command`, to go on with: this process alone, without what was left half written.

        Raises:
            RunError: as `open` and `claim`.
        """
        run = cls.open(folder, command)
        run.claim()
        _sweep(Path(inside) / name for inside, _, names in os.walk(folder) for name in names)
        return run

    def claim(self) -> None:
        """Have this process alone write to the run, until it ends.

        Raises:
            RunError: another process does, or the folder cannot be written.
        """
        self._claim(0, 0)
        with suppress(OSError):  # a full disk; only the error of others tells of it
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(f"{os.getpid()}\n".encode())

    def share(self, ranks: "Ranks") -> None:
        """Have all processes of a launch write to the run, of which the first has claimed it, and none besides.

        Raises:
            RunError: one of them cannot see the folder.
        """
        if ranks.count == 1:
            return
        if ranks.first and fcntl:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_UN, 0, 1)  # all but the first byte of the lock
            except OSError as error:
                raise RunError(f"{self.folder / LOCK}: {NO_LOCKS} ({error.strerror})") from error
        ranks.wait()
        if not ranks.first:
            self._claim(1, ranks.rank)

    def _claim(self, length: int, start: int) -> None:
        """Hold some bytes of the lock, to its end by a length of 0, until this process ends."""
        file = self.folder / LOCK
        try:
            self._lock = Lock.of(file)
        except OSError as error:
            raise RunError(f"{file}: cannot be written ({error.strerror})") from error
        if fcntl is None:
            return
        try:
            # A lock that ends with the process, and that no process forked from it shares: none is ever stale.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                if (length, start) == (0, 0):
                    return  # a file system without locks, such as some of the network: nothing keeps others out
                raise RunError(f"{file}: {NO_LOCKS} ({error.strerror})") from error
            self._lock.seek(0)
            owner = self._lock.read(20).decode(errors="replace").strip()
            owner = f"process {owner}" if owner.isdecimal() else "another process"
            raise RunError(f"{self.folder}: {owner} is at work on this run; wait until it is done") from error

    def clear(self, but: str = LOCK) -> None:
        """Remove all that is in the folder of a claimed run but its lock; its config last, by which it is a run.

        but: what else stays.

        Raises:
            RunError: something cannot be removed.
        """
        try:
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == CONFIG):
                if path.name in (LOCK, but):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise RunError(f"{error.filename}: cannot be removed ({error.strerror})") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, whole or not at all."""
        write_file(self.path(name), data)

    def path(self, name: str) -> Path:
        """The path of a file of the run, such as a record names.

        Raises:
            RunError: the name leads out of the run's folder, or the folder is gone.
        """
        self.must_be_there()
        try:
            inside = (self.folder / name).resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # of links in a circle, of null bytes
            raise RunError(f"{self.folder}: '{name}' is no file of the run ({error})") from error
        if not inside:
            raise RunError(f"{self.folder}: '{name}' leads out of the run's folder")
        return self.folder / name

    def must_be_there(self) -> None:
        """See that the folder was not taken away: what writes into it would make it anew, without its config.

        Raises:
            RunError: it was.
        """
        if self.gone:
            raise RunError(f"{self.folder}: is gone; put it back and go on with `resume`")

    @property
    def gone(self) -> bool:
        """Whether the run's folder was taken away while the run was under way."""
        return not self.folder.is_dir()

    def append(self, record: Record, name: str = RESULTS) -> None:
        """Add a record to a file of records, in a line of its own, and flush it to the disk.

        Raises:
            RunError: the disk is full or the file cannot be written; then nothing is added. Or the folder is gone.
        """
        self.append_lines(_line(record), name)
        if self.on_record and name == RESULTS:
            self.on_record(record)

    def opened(self, name: str) -> FileIO:
        """A regular file of the run, to add to, made where there is none.

        Raises:
            RunError: the name leads out of the run's folder, or is that of a link, a pipe or a device.
            OSError: the file cannot be opened.
        """
        file = self.path(name)
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise RunError(f"{file}: not a regular file; take it away")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | PLAIN | getattr(os, "O_BINARY", 0)
        return FileIO(os.open(file, flags, 0o666), "a+")

    def append_lines(self, lines: bytes, name: str) -> None:
        """Add whole lines to a file of the run, as `append`."""
        try:
            with self.opened(name) as stream:
                with suppress(OSError):  # a file system without locks, where there is one process alone
                    if fcntl:
                        fcntl.lockf(stream, fcntl.LOCK_EX)  # of several processes of a launch, one after the other
                end = _start_of_last(stream, 0)
                stream.truncate(end)  # half a line, cut short by a kill
                try:
                    while lines:
                        lines = lines[stream.write(lines) :]
                    os.fsync(stream.fileno())
                except OSError:
                    stream.truncate(end)
                    raise
        except OSError as error:
            raise RunError(f"{self.folder / name}: cannot be written ({error.strerror or error})") from error

    def records(self, name: str = RESULTS, *, checked: bool = True) -> list[Record]:
        """All whole records of a file of them; a last line that a kill cut short is left out.

        checked: they have all fields that a record of the command has, of the right kind.

        Raises:
            RunError: a line before the last is not JSON or no such record.
        """
        return list(self.each(name, checked=checked, most=MAX_ANNOTATIONS))

    def each(
        self, name: str = RESULTS, *, checked: bool = True, most: int | None = None, last: int | None = None
    ) -> Iterator[Record]:
        """The records of `records`, one by one: a stream of weeks has more of them than memory holds.

        most: bytes that the file may have; last: of so many at the end alone, in the time that these take.

        Raises:
            RunError: as `records`.
        """
        file = self.folder / name
        if not os.path.lexists(file):
            return
        with open_file(file, most) as stream:
            if last is not None:
                stream.seek(_start_of_last(stream, last))
            for number in count(1):
                if not (line := stream.readline(MAX_LINE)).endswith(b"\n"):
                    if len(line) == MAX_LINE:
                        raise RunError(f"{file}:{number}: over {MAX_LINE >> 20} MiB; take the line out")
                    return
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise RunError(f"{file}:{number}: not JSON ({error}); take the line out") from error
                if not isinstance(record, dict):
                    raise RunError(f"{file}:{number}: expected an object; take the line out")
                if checked and (
                    wrong := misfit(record, EVENTS if name != RESULTS else RECORDS[self.config["command"]])
                ):
                    raise RunError(f"{file}:{number}: not a line that detguard wrote ({wrong}); take it out")
                yield record

    def cut(self, first: int) -> None:
        """Leave the first so many lines of results.jsonl alone: the start of a resumed stream.

        Raises:
            RunError: the file cannot be written.
        """
        if not (file := self.path(RESULTS)).exists():
            return
        try:
            with file.open("rb+") as stream:
                for _ in range(first):
                    stream.readline()
                stream.truncate(stream.tell())
        except OSError as error:
            raise RunError(f"{file}: cannot be written ({error.strerror or error})") from error

    def keep(self, records: list[Record]) -> None:
        """Replace results.jsonl by `records`: the start of a resumed run."""
        self.write(RESULTS, b"".join(map(_line, records)))


def shared_run(ranks: "Ranks", make: Callable[[], Run]) -> Run:
    """The run that the first rank makes or resumes; the others only know it."""
    mine: list[Run] = []

    def place() -> tuple[Path, Config]:
        mine.append(make())
        return mine[0].folder, mine[0].config

    folder, config = ranks.given(place)
    return mine[0] if mine else Run(folder, config)


def refuse_taken(folder: Path, command: str, advice: str) -> None:
    """See that a folder holds no run yet; advice: what to do where it does.

    Raises:
        RunError: it does.
    """
    if os.path.lexists(folder / CONFIG):
        go_on = (
            "" if command == "detect" else f", or go on with it: detguard {command} --resume {shlex.quote(str(folder))}"
        )
        raise RunError(f"{folder}: already holds a run; {advice}{go_on}")


def next_free(parent: Path) -> Path:
    """Make the folder after the last of those in `parent`, which are called by numbers; no other process gets it."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in parent.iterdir() if p.name.isdecimal() and len(p.name) < 10]
    number = max(taken, default=0)
    while True:
        number += 1
        with suppress(FileExistsError):
            (folder := parent / f"{number:03d}").mkdir()
            return folder


def _make(folder: Path) -> bool:
    """Make a folder; whether it was this call that did: of several processes, one alone may take it away again."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        folder.mkdir(exist_ok=True)  # an error where it is a file
        return False
    return True


def _sweep(files: Iterable[Path]) -> None:
    """Delete those that `write_file` left half written in a process that was killed."""
    for file in files:
        if re.fullmatch(rf"\.\d+(-[0-9a-f]+)?{re.escape(PARTIAL)}", file.name):
            with suppress(OSError):
                file.unlink()


def _take_back(inputs: Path) -> None:
    """Delete what a run that was killed before it had begun made as its inputs, but nothing that came there since.

    Raises:
        RunError: something cannot be removed.
    """
    made = set(read_file(inputs / MADE, MAX_ANNOTATIONS).split(b"\0"))
    try:
        for file in inputs.iterdir():
            if os.fsencode(file.name) in made:
                file.unlink()
        (inputs / MADE).unlink()  # last: what is killed here goes on
        with suppress(OSError):  # not empty
            inputs.rmdir()
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be removed ({error.strerror})") from error


def _line(record: Record) -> bytes:
    # Halves of surrogate pairs, in file names that are not UTF-8, as the escapes that JSON has for them.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _start_of_last(stream: FileIO | BinaryIO, count: int) -> int:
    """Where the last so many whole lines of a file begin; of none, where the last one ends."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        stream.seek(start)
        ends = [found.end() for found in re.finditer(rb"\n", stream.read(end - start))]
        if len(ends) > count:
            return start + ends[-1 - count]
        count, end = count - len(ends), start
    return 0


def _yaml(config: Config) -> bytes:
    plain = _unicode(config)
    # PyYAML writes some ends of lines as they are, and reads them as spaces.
    as_is = not re.search("[\x85\u2028\u2029]", json.dumps(plain, ensure_ascii=False))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=as_is).encode()


def _unicode(value: object) -> object:
    """Plain values with text that any UTF-8 file can hold: what is not, in file names, is shown as escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_unicode(key): _unicode(one) for key, one in value.items()}
    return [_unicode(one) for one in value] if isinstance(value, (list, tuple)) else value
