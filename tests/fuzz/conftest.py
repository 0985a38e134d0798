"""The one frame of all fuzzers: what it gives a reader may raise DetguardError, and do nothing worse.

A fuzzer is a test that takes `fuzz` and calls it once, with a strategy of inputs and the reader of one. Together they
take DETGUARD_FUZZ_SECONDS, 12 by default with the same inputs in every run; where the variable is set, the inputs are
others each time, unless DETGUARD_FUZZ_SEED is too. With `-p guided` they are chosen for the code that they reach.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from detguard import DetguardError

SECONDS = 10.0
MEMORY = 2 << 30
# What no reader has to do.
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
KEPT = Path(__file__).parents[2] / "build" / "fuzz"
BATCH = 500


class Worse(BaseException):
    """Something that no handler of exceptions may take for an error of the input."""


class TimeIsUp(BaseException):
    """The end of a fuzzer; Hypothesis lets it through."""


@dataclass
class Outcome:
    """What came of the inputs of one reader; findings: those that ended alike -> how many there were."""

    inputs: int = 0
    read: int = 0
    seconds: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)


outcomes: dict[str, Outcome] = {}
watching = False


@sys.addaudithook
def refuse(event: str, _: Any) -> None:
    if watching and event in FORBIDDEN:
        raise Worse(f"{event} while reading")


def over_time(*_: object) -> None:
    raise Worse(f"over {SECONDS:g} s")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[SearchStrategy, Callable], None]:
    """Give a reader inputs until its share of the time is over; fails where one ends in anything but DetguardError."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    fuzzers = sum("fuzz" in getattr(item, "fixturenames", ()) for item in request.session.items)
    given_seconds = os.environ.get("DETGUARD_FUZZ_SECONDS")
    seconds = float(given_seconds or 12) / fuzzers
    first = int(os.environ.get("DETGUARD_FUZZ_SEED", random.randrange(2**40) if given_seconds else 0))
    outcome = outcomes[name] = Outcome()

    def run(inputs: SearchStrategy, read: Callable[[Any], object]) -> None:
        began = time.monotonic()

        def one(value: Any) -> None:
            if time.monotonic() - began > seconds:
                raise TimeIsUp
            outcome.inputs += 1
            if (finding := worse(read, value)) is None:
                outcome.read += 1
            elif finding:
                if finding not in outcome.findings:  # the files of the first one
                    kept = KEPT / name / str(len(outcome.findings))
                    shutil.copytree(tmp_path, kept, symlinks=True, dirs_exist_ok=True)
                    (kept / "FINDING").write_text(f"{finding}\n{value!r}\n", errors="surrogateescape")
                outcome.findings[finding] = outcome.findings.get(finding, 0) + 1

        options = settings(
            max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
        )
        previous = signal.signal(signal.SIGALRM, over_time)
        try:
            if guided := sys.modules.get("guided"):
                fuzz_one = options(given(inputs)(one)).hypothesis.fuzz_one_input
                told = guided.search(fuzz_one, TimeIsUp, lambda: json.dumps(asdict(outcome)).encode())
                vars(outcome).update(json.loads(told))
            else:
                for number in count(first):
                    options(seed(number)(given(inputs)(one)))()
        except TimeIsUp:
            pass
        finally:
            signal.signal(signal.SIGALRM, previous)
        outcome.seconds = time.monotonic() - began
        assert not outcome.findings, f"first of each in {KEPT / name}"

    return run


def worse(read: Callable[[Any], object], value: Any) -> str | None:
    """What reading a value ended in; None: it was read, empty: it was refused."""
    global watching
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watching = True
    finding: str | None = None
    try:
        read(value)
    except DetguardError:
        finding = ""
    except (Exception, Worse) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "detguard/" in f.filename), frames[-1])
        finding = f"{type(error).__name__} in {Path(place.filename).name}, {place.name}"
        finding += f": {error}" if isinstance(error, Worse) else ""
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - began > SECONDS:
        return f"over {SECONDS:g} s"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if after > peak and after * 1024 - pages * resource.getpagesize() > MEMORY:
        return f"over {MEMORY >> 30} GiB"
    return finding


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line per reader."""
    for name, o in outcomes.items():
        inputs = f"{o.inputs} inputs ({o.read} read), {o.seconds:.0f} s"
        terminalreporter.write_line(f"fuzz {name}: {inputs}, {sum(o.findings.values())} findings")
        for finding, number in o.findings.items():
            terminalreporter.write_line(f"    {number} x {finding}")
