import os
import select
import signal
import subprocess
import sys
import threading
import time

import cv2
import pytest
import torch
from torch.utils.data._utils import signal_handling

from detguard.data.ahead import GLANCE, AheadError, _Makers, ahead


def torch_handler():
    """Whether torch has set its handler."""
    return signal_handling._SIGCHLD_handler_set


def numbers(number):
    return number, os.getpid()


def test_things_come_in_order_from_processes_of_their_own():
    found = list(ahead(numbers, 3, 7, workers=2))
    assert [number for number, _ in found] == [3, 4, 5, 6]
    makers = {maker for _, maker in found}
    assert len(makers) == 2
    assert os.getpid() not in makers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_started_again_at_what_is_missing(number):
    things = ahead(lambda n: (n, os.getpid(), torch.zeros(1 << 20)), 0, 4)
    first = next(things)
    os.kill(first[1], number)
    time.sleep(0.2)  # the time of a step
    rest = list(things)
    assert [n for n, *_ in rest] == [1, 2, 3]
    assert rest[-1][1] != first[1]


def test_the_death_of_a_process_does_not_break_into_a_step():
    things = ahead(numbers, 0, 4)
    os.kill(next(things)[1], signal.SIGKILL)
    time.sleep(0.2)  # in which a handler of its death would raise
    assert len(list(things)) == 3


def test_afterwards_opencv_and_the_deaths_of_processes_are_the_callers_as_before():
    def handler(*_):
        pass

    threads, theirs, torchs = cv2.getNumThreads(), signal.signal(signal.SIGCHLD, handler), torch_handler()
    cv2.setNumThreads(2)
    try:
        first, second = ahead(numbers, 0, 2), ahead(numbers, 0, 2)
        next(first)
        next(second)
        assert len([*first, *second]) == 2  # the outer one ends before the inner one
        assert (cv2.getNumThreads(), signal.getsignal(signal.SIGCHLD), torch_handler()) == (2, handler, torchs)
    finally:
        cv2.setNumThreads(threads)
        signal.signal(signal.SIGCHLD, theirs)


def test_one_that_hangs_is_started_again():
    things = ahead(numbers, 0, 8, patience=0.5)
    _, maker = next(things)
    os.kill(maker, signal.SIGSTOP)
    assert [n for n, *_ in things] == list(range(1, 8))


def test_one_that_is_always_killed_is_an_error():
    with pytest.raises(AheadError, match="3 times at number 1; "):
        list(ahead(lambda n: os.kill(os.getpid(), signal.SIGKILL), 0, 2))


def test_a_death_is_noticed_sooner_than_by_the_loader_itself():
    began = time.monotonic()
    with pytest.raises(AheadError):
        list(ahead(lambda n: os.kill(os.getpid(), signal.SIGKILL), 0, 2))
    assert time.monotonic() - began < 10  # it looks every five seconds, for each of three starts


def test_what_takes_longer_than_a_glance_is_waited_for():
    def slow(number):
        time.sleep(2.5 * GLANCE * (number == 1))
        return numbers(number)

    found = list(ahead(slow, 0, 3))
    assert [number for number, _ in found] == [0, 1, 2]
    assert len({maker for _, maker in found}) == 1


def test_what_goes_wrong_in_it_goes_wrong_here():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda n: 1 // n, 0, 2))


def test_it_is_gone_when_nothing_more_is_wanted():
    things = ahead(numbers, 0, 10)
    _, maker = next(things)
    things.close()
    with pytest.raises(ProcessLookupError):
        os.kill(maker, 0)


def test_the_thread_that_pins_ends_before_the_processes_that_it_reads_from():
    makers, alive, asked = _Makers(numbers, 0, 4, 1, 2, 0, pinned=False), [], threading.Event()
    pinning, kill = threading.Thread(target=asked.wait), makers._kill
    pinning.start()
    makers._things._pin_memory_thread, makers._things._pin_memory_thread_done_event = pinning, asked
    makers._kill = lambda: (alive.append(pinning.is_alive()), kill())
    makers.end()
    assert alive == [False]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends at its next batch")
def test_it_dies_with_its_parent_even_where_it_does_nothing():
    code = (
        "import os, time; from detguard.data.ahead import ahead\n"
        "def make(number):\n"
        "    if number: time.sleep(60)\n"
        "    return os.getpid()\n"
        "things = ahead(make, 0, 2); print(next(things), flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    parent.kill()
    # The end of its output, which the process has open, too.
    assert select.select([parent.stdout], [], [], 20)[0], "it is still there"
    assert parent.stdout.read() == ""
