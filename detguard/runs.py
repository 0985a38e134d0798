"""Run folders: created once, records appended when their files are safely on disk, resumed after a kill."""

import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from detguard import DetguardError, __version__
from detguard.files import FileError, read_yaml, write_file

Record = dict[str, Any]


def photo_keys(files: Sequence[Path]) -> dict[str, Path]:
    """A name for each photo's results: its stem, with a number where stems repeat."""
    keys: dict[str, Path] = {}
    for file in files:
        key, number = file.stem, 1
        while key in keys:
            number += 1
            key = f"{file.stem}-{number}"
        keys[key] = file
    return keys


class RunError(DetguardError):
    """A run folder that cannot be made, read or resumed."""


class Run:
    """The folder of one invocation: `config.yaml`, `results.jsonl`, and the files that records name."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def create(cls, command: str, out: Path | None, config: dict[str, Any]) -> "Run":
        """A new folder, `out` or the next free `runs/<command>/<number>`, with its config.yaml.

        Raises:
            RunError: `out` already holds a run, or cannot be written.
        """
        if out is None:
            parent = Path("runs") / command
            taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()] if parent.is_dir() else []
            out = parent / f"{max(taken, default=0) + 1:03d}"
        elif (out / "config.yaml").exists():
            raise RunError(f"{out}: already holds a run; choose another --out or continue it with --resume {out}")
        versions = {name: version(name) for name in ("torch", "ultralytics", "opencv-python")}
        config = {"command": command, **config, "versions": {"detguard": __version__, **versions}}
        run = cls(out, config)
        run.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        return run

    @classmethod
    def open(cls, folder: Path, command: str) -> "Run":
        """An existing run of `command`.

        Raises:
            RunError: no run there, damaged, or of another command.
        """
        file = folder / "config.yaml"
        try:
            config = read_yaml(file)
        except FileError as error:
            raise RunError(f"{folder}: no {command} run here ({file.name} cannot be read)") from error
        if not isinstance(config, dict) or config.get("command") != command:
            raise RunError(f"{folder}: not a run of 'detguard {command}'")
        return cls(folder, config)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run, whole or not at all."""
        write_file(self.folder / name, data)

    def path(self, name: str) -> Path:
        """The path of a file that a record names.

        Raises:
            RunError: the name leads out of the run's folder.
        """
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise RunError(f"{self.folder / 'results.jsonl'}: '{name}' leads out of the run's folder")
        return path

    def append(self, record: Record) -> None:
        """Add a record to results.jsonl and flush it to the disk.

        Raises:
            RunError: the disk is full or the file cannot be written.
        """
        file = self.folder / "results.jsonl"
        try:
            with file.open("ab") as stream:
                stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RunError(f"{file}: cannot be written ({error.strerror or error})") from error

    def records(self) -> list[Record]:
        """All whole records; a last line that a kill cut short is left out.

        Raises:
            RunError: a line before the last is not JSON.
        """
        file = self.folder / "results.jsonl"
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
        records = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RunError(f"{file}:{number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise RunError(f"{file}:{number}: expected an object")
            records.append(record)
        return records

    def keep(self, records: list[Record]) -> None:
        """Replace results.jsonl by `records`: the start of a resumed run."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.write("results.jsonl", lines.encode())
