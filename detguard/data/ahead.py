"""What takes long to make, made ahead by a process that lives and dies with this one."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Timer
from typing import Any, TypeVar

import torch

from detguard import DetguardError

Thing = TypeVar("Thing")
# Makes the thing of a number, and calls what it is given whenever it has come on a little.
Make = Callable[[int, Callable[[], None]], Thing]
# Seconds without a sign of life after which a process hangs, and how often in a row one is started for one thing.
PATIENCE, ATTEMPTS = 45.0, 3


class AheadError(DetguardError):
    """A process that is killed or hangs whenever it is started."""


def ahead(make: Make[Thing], first: int, last: int) -> Iterator[Thing]:
    """The things of numbers `first` to `last`; each is made while the one before is used.

    A process that is killed or hangs is started again, at the number that is missing.

    Raises:
        AheadError: it is killed or hangs again and again.
    """
    number, failed = first, 0
    while number < last:
        process = _Maker(make, number, last)
        try:
            while number < last:
                thing = process.next()
                number, failed = number + 1, 0
                yield thing
        except _Lost:
            failed += 1
            if failed == ATTEMPTS:
                raise AheadError(
                    f"the process that makes training batches was killed or hung {ATTEMPTS} times at batch "
                    f"{number + 1}; see that there is memory for it, and go on with --resume"
                ) from None
        finally:
            process.end()


class _Lost(Exception):
    """The process was killed, or hung and was therefore killed."""


class _Maker:
    """A process that makes the things from `first` to `last`."""

    def __init__(self, make: Make[Any], first: int, last: int) -> None:
        # A fork shares what `make` knows, such as all photos; elsewhere that is copied.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._made, end = context.Pipe(duplex=False)
        arguments = make, first, last, self._made, end, os.getpid()
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        end.close()  # or its death would not be seen

    def next(self) -> Any:
        """The next thing, or what kept the process from making it.

        Raises:
            _Lost: there is no process any more.
        """
        made = None  # a sign of life
        while made is None:
            # Not by waiting for the pipe to be readable: a process may hang with half a thing in it.
            watch = Timer(PATIENCE, self._process.kill)
            watch.start()
            try:
                made = self._made.recv()
            except (EOFError, OSError):
                raise _Lost from None
            finally:
                watch.cancel()
        if isinstance(made, Exception):
            raise made
        return made

    def end(self) -> None:
        """Have no process any more."""
        self._process.kill()
        self._process.join()
        self._made.close()


def _serve(make: Make[Any], first: int, last: int, ours: Connection, made: Connection, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: to be sent when the parent ends
        if os.getppid() != parent:
            return  # it has ended
        ours.close()  # forked, too, and while anyone has it open, to send to a dead parent is to wait for ever
    # Ctrl-C and the like, which all processes of a group get, are for the parent alone: it saves, then ends us.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with suppress(BrokenPipeError):  # there is no parent
        for number in range(first, last):
            try:
                made.send(make(number, lambda: made.send(None)))
            except Exception as error:
                made.send(error)
                raise
