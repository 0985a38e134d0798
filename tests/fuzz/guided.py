"""A plugin of pytest by which inputs are chosen for the code that they reach (Atheris, libFuzzer), not by chance.

    pip install atheris
    PYTHONPATH=tests/fuzz DETGUARD_FUZZ_SECONDS=600 python -m pytest -p guided tests/fuzz

A plugin is there before detguard is imported, which has to happen by way of its instrumentation.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

# detguard's own code, and what parses for it in Python.
atheris.instrument_imports(include=["detguard", "yaml"]).__enter__()

LARGEST = 8192  # bytes of what Hypothesis makes an input of


def search(one: Callable[[bytes], object], over: type[BaseException], outcome: Callable[[], bytes]) -> bytes:
    """Give inputs to `one` until it raises `over`, in a process of its own, as libFuzzer never returns; its outcome."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "outcome"
        if not (child := os.fork()):
            try:
                _until(one, over, lambda: told.write_bytes(outcome()))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the process that was given inputs has ended by {status}, as of a crash"
        return told.read_bytes()


def _until(one: Callable[[bytes], object], over: type[BaseException], end: Callable[[], object]) -> None:
    def checked(data: bytes) -> None:
        try:
            one(data)
        except over:
            end()
            os._exit(0)

    quiet = ["-verbosity=0", "-timeout=0", "-rss_limit_mb=0", "-malloc_limit_mb=0", "-print_final_stats=0"]
    seed = os.environ.get("DETGUARD_FUZZ_SEED") or random.randrange(1, 2**31)
    atheris.Setup([sys.argv[0], f"-max_len={LARGEST}", "-len_control=0", f"-seed={seed}", *quiet], checked)
    atheris.Fuzz()
