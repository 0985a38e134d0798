import os
import select
import signal
import subprocess
import sys
import time

import pytest

import detguard.data.ahead as module
from detguard.data.ahead import AheadError, ahead


def numbers(number, alive):
    return number, os.getpid()


def test_things_come_in_order_from_a_process_of_their_own():
    found = list(ahead(numbers, 3, 6))
    assert [number for number, _ in found] == [3, 4, 5]
    assert {maker for _, maker in found} != {os.getpid()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_started_again_at_what_is_missing(number):
    things = ahead(lambda n, alive: (n, os.getpid(), bytes(1 << 20)), 0, 4)
    first = next(things)
    os.kill(first[1], number)
    rest = list(things)
    assert [n for n, *_ in rest] == [1, 2, 3]
    assert rest[-1][1] != first[1]


def test_one_that_hangs_with_half_a_thing_sent_is_started_again(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    things = ahead(lambda n, alive: (n, os.getpid(), bytes(1 << 22)), 0, 3)
    _, maker, _ = next(things)
    time.sleep(0.2)  # more than a pipe holds is on its way
    os.kill(maker, signal.SIGSTOP)
    assert [n for n, *_ in things] == [1, 2]


def test_one_that_is_slow_but_comes_on_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1.0)

    def slowly(number, alive):
        for _ in range(15):
            time.sleep(0.1)
            alive()
        return os.getpid()

    assert len(set(ahead(slowly, 0, 2))) == 1


def test_one_that_is_always_killed_is_an_error():
    with pytest.raises(AheadError, match="3 times at batch 1; "):
        list(ahead(lambda n, alive: os.kill(os.getpid(), signal.SIGKILL), 0, 2))


def test_what_goes_wrong_in_it_goes_wrong_here():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda n, alive: 1 // n, 0, 2))


def test_it_is_gone_when_nothing_more_is_wanted():
    things = ahead(numbers, 0, 10)
    _, maker = next(things)
    things.close()
    with pytest.raises(ProcessLookupError):
        os.kill(maker, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends at its next batch")
def test_it_dies_with_its_parent_even_where_it_does_nothing():
    code = (
        "import os, time; from detguard.data.ahead import ahead\n"
        "def make(number, alive):\n"
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
