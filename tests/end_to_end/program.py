"""The program as a user runs it: a process of its own, forked from one that has imported what takes seconds."""

import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# Not detguard, which every fork imports itself, nor anything that reads the environment of a command.
SLOW_TO_IMPORT = ["torch", "torchvision", "ultralytics", "ultralytics.models", "kornia", "cv2", "pycocotools.mask"]


def command(*arguments):
    """The command line, for tests that start, signal and kill it themselves."""
    return [sys.executable, "-m", "detguard", *map(str, arguments)]


def detguard(*arguments, cwd, columns=200, stdin=None, timeout=600, preexec_fn=None):
    """Its exit code and what it has printed."""
    environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin or "")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(SLOW_TO_IMPORT)
        line = [str(one) for one in arguments]
        process = context.Process(target=run, args=(line, str(cwd), environment, streams, preexec_fn))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"detguard {' '.join(line)}: still running after {timeout} s")
        out, err = (stream.read_text() for stream in streams[1:])
        return subprocess.CompletedProcess(line, process.exitcode, out, err)


def together(*arguments, folders, local=None):
    """What one process in each folder has printed, all of one launch, `local` of them on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        place = partial(take_place, rank, len(folders), local or len(folders), port)
        return detguard(*arguments, cwd=folders[rank], timeout=240, preexec_fn=place)

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(one, range(len(folders))))


def take_place(rank, count, local, port):
    """Have the process that calls be one of a launch, as torchrun does."""
    place = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})


def run(arguments, cwd, environment, streams, preexec_fn):
    """What a process does instead of `python -m detguard`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        file = os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = (io.TextIOWrapper(io.FileIO(n, "rw"[n]), encoding="utf-8") for n in (0, 1))
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.argv = ["detguard", *arguments]
    if preexec_fn:
        preexec_fn()
    from detguard.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
