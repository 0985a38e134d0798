"""What takes long to make, made ahead by processes that live and die with this one."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Timer, current_thread, main_thread
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from detguard import DetguardError
from detguard.engine import die_with

Thing = TypeVar("Thing")
# Seconds in which a thing must come, and how often in a row processes are started for one thing.
PATIENCE, ATTEMPTS = 60.0, 3
# Seconds after which a DataLoader that waits looks whether its processes live; by itself it does so every five.
GLANCE = 0.2
_depth = 0  # of `_undisturbed`


class AheadError(DetguardError):
    """Processes that are killed or hang whenever they are started."""


def ahead(
    make: Callable[[int], Thing],
    first: int,
    last: int,
    workers: int = 1,
    patience: float = PATIENCE,
    *,
    depth: int = 2,
    niceness: int = 0,
    pinned: bool = False,
) -> Generator[Thing, None, None]:
    """The things of numbers `first` to `last`, in order, made by `workers` processes while those before are used.

    A process that is killed, or whose thing has not come in `patience` seconds, is started again with all others, at
    the number that is missing. depth: how many things each process makes ahead; niceness: by how much less they are
    than this process is served; pinned: tensors are in memory that a GPU copies from by itself.

    Raises:
        AheadError: it is killed or hangs again and again.
    """
    with _undisturbed():
        number, failed = first, 0
        while number < last:
            makers = _Makers(make, number, last, workers, depth, niceness, pinned=pinned)
            try:
                while number < last:
                    thing = makers.next(patience)
                    number, failed = number + 1, 0
                    yield thing
            except _Lost:
                failed += 1
                if failed == ATTEMPTS:
                    raise AheadError(
                        f"a process that makes photos ahead was killed or hung {ATTEMPTS} times at number {number + 1};"
                        " see that there is memory for it, in containers shared memory too (--shm-size), or give fewer "
                        "`workers` where there is such an option, and go on with `resume`"
                    ) from None
            finally:
                makers.end()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Have OpenCV work in one thread and nothing raise the death of a process; afterwards all is as it was."""
    global _depth
    if _depth:  # as within another one it is so already
        yield
        return
    threads, torchs = cv2.getNumThreads(), signal_handling._SIGCHLD_handler_set
    cv2.setNumThreads(1)  # its threads would take turns with torch's, and a forked process would wait for them for ever
    # torch's own handler would raise the death of a process in the midst of a step, or of a start.
    signal_handling._SIGCHLD_handler_set = True
    theirs = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if _handles_deaths() else None
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        cv2.setNumThreads(threads)
        signal_handling._SIGCHLD_handler_set = torchs
        if theirs is not None and _handles_deaths():
            signal.signal(signal.SIGCHLD, theirs)


def _handles_deaths() -> bool:
    return hasattr(signal, "SIGCHLD") and current_thread() is main_thread()


class _Lost(Exception):
    """A process was killed, or hung and was therefore killed."""


class _Things(Dataset[Thing]):
    def __init__(self, make: Callable[[int], Thing]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Thing:
        return self.make(number)


class _Makers(Generic[Thing]):
    """The processes that make the things from `first` to `last`: those of a DataLoader."""

    def __init__(
        self, make: Callable[[int], Thing], first: int, last: int, workers: int, depth: int, niceness: int, *,
        pinned: bool,
    ) -> None:  # fmt: skip
        loader = DataLoader(
            _Things(make),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=depth,
            pin_memory=pinned,
            timeout=GLANCE,
            worker_init_fn=partial(_settle, os.getpid(), niceness),
            # A fork shares what `make` knows, such as all photos; elsewhere that is copied.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # or it would draw from that of training
        )
        others = set(multiprocessing.active_children())
        self._things: Any = iter(loader)
        self._processes: list[BaseProcess] = [p for p in multiprocessing.active_children() if p not in others]

    def next(self, patience: float) -> Thing:
        """The next thing, or what kept a process from making it.

        Raises:
            _Lost: one of the processes is no more.
        """
        watch = Timer(patience, self._kill)
        watch.start()
        try:
            while not self._died(0):
                try:
                    return next(self._things)
                except (RuntimeError, OSError, EOFError) as error:  # the latter of things that a dead process had still
                    if str(error).startswith("DataLoader timed out"):  # after `GLANCE`
                        continue
                    if not self._died(1):
                        raise
            raise _Lost
        finally:
            watch.cancel()

    def end(self) -> None:
        """End the processes and forget what they have made."""
        if pinning := getattr(self._things, "_pin_memory_thread", None):  # it would say that they are no more
            self._things._pin_memory_thread_done_event.set()
            pinning.join(GLANCE)
        self._kill()
        del self._things

    def _died(self, seconds: float) -> bool:
        return bool(wait([process.sentinel for process in self._processes], seconds))

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _settle(parent: int, niceness: int, _: int) -> None:
    """Have a process that was just started die with its parent, leave signals to it, and stand back behind others."""
    die_with(parent)
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)
    # Ctrl-C and the like, which all processes of a group get, are for the parent alone: it saves, then ends us.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what it shares is not its own to end, and to count it would copy it
