"""The program as a user runs it: a process of its own, forked from one that has imported what takes seconds."""

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

# Not detguard.cli, whose consoles read the environment of a command when they are made.
SLOW_TO_IMPORT = [
    "torch", "torchvision", "ultralytics", "ultralytics.models", "kornia", "cv2", "pycocotools.mask", "accelerate",
    "albumentations", "imagecorruptions", "matplotlib.pyplot", "river.drift", "scipy.optimize",
    "rich.progress", "typer.main", *(f"detguard.reports.{name}" for name in ("attack", "evaluation", "hardening")),
    *(f"detguard.workflows.{name}" for name in ("attack", "evaluate", "harden", "adapt", "monitor")),
]  # fmt: skip


class Started:
    """A program under way.

    Args:
        stdin: what it reads; None: nothing. Or "-": what `write` gives it, until `close`.
        environment: what is other in it than here.
        preexec_fn: what the process does first.
    """

    def __init__(self, *arguments, cwd, columns=200, stdin=None, environment=(), preexec_fn=None):
        self.line = [str(one) for one in arguments]
        self._folder = tempfile.TemporaryDirectory()
        streams = [Path(self._folder.name) / name for name in ("stdin", "stdout", "stderr")]
        if stdin == "-":
            os.mkfifo(streams[0])
        else:
            streams[0].write_bytes(stdin if isinstance(stdin, bytes) else (stdin or "").encode())
        self.out, self.err = streams[1:]
        environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"} | dict(environment)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(SLOW_TO_IMPORT)
        self._process = context.Process(target=run, args=(self.line, str(cwd), environment, streams, preexec_fn))
        self._process.start()
        self.pid = self._process.pid
        self._pipe = streams[0].open("w", buffering=1) if stdin == "-" else None

    @property
    def told(self):
        """What it has printed so far."""
        return "".join(file.read_text() for file in (self.out, self.err) if file.exists())

    @property
    def running(self):
        return self._process.exitcode is None

    def write(self, lines):
        self._pipe.write(lines)
        self._pipe.flush()

    def close(self):
        self._pipe.close()

    def wait_for(self, condition, seconds=240):
        """Wait until there is what `condition` asks for; that the program ends before is an error."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.005)

    def stop(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def ended(self, timeout=600):
        """Its exit code and what it has printed."""
        self._process.join(timeout)
        if self.running:
            self._process.kill()
            raise TimeoutError(f"detguard {' '.join(self.line)}: still running after {timeout} s")
        out, err = (stream.read_text() for stream in (self.out, self.err))
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.line, self._process.exitcode, out, err)


def detguard(*arguments, timeout=600, **options):
    """Its exit code and what it has printed."""
    return Started(*arguments, **options).ended(timeout)


def refusal(*arguments, cwd):
    """What it says of a command that it refuses: by a call in this process, which is sooner than to start one."""
    from detguard.cli import main

    argv, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ["detguard", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that a program would print, too
        try:
            main()
        except SystemExit as ended:
            return subprocess.CompletedProcess(sys.argv, ended.code, out.getvalue(), err.getvalue())
        finally:
            sys.argv = argv
            signal.signal(signal.SIGINT, handler)


def check_records():
    """Have no run write a record that it could not read again."""
    from detguard.runs import RESULTS, Run
    from detguard.schema import EVENTS, RECORDS, misfit

    append = Run.append

    def checked(run, record, name=RESULTS):
        append(run, record, name)
        shape = RECORDS[run.config["command"]] if name == RESULTS else EVENTS
        assert (wrong := misfit(json.loads(json.dumps(record)), shape)) is None, f"{name}: {wrong}"

    Run.append = checked


def hurried(count=2):
    """Have whom to ask be found out by fewer batches than sixteen, two where that is not looked at: a `preexec_fn`."""
    from detguard.hardening import adapt, kinds

    adapt.BATCHES = kinds.BATCHES = count


def launched(*arguments, folders, local=None, **options):
    """Processes of one launch, as torchrun starts them: one in each folder, `local` of them on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count, local = len(folders), local or len(folders)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank % local} for rank in range(count)]
    environments = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    places = zip(folders, environments, strict=True)
    return [Started(*arguments, cwd=cwd, environment=one, **options) for cwd, one in places]


def together(*arguments, **options):
    """What they have printed."""
    return [process.ended(240) for process in launched(*arguments, **options)]


def run(arguments, cwd, environment, streams, preexec_fn):
    """What a process does instead of `python -m detguard`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in the background
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

    check_records()
    try:
        main()
    finally:
        sys.stdout.flush()
