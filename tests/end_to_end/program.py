"""The program as a user runs it."""

import os
import subprocess
import sys


def command(*arguments):
    return [sys.executable, "-m", "detguard.cli", *map(str, arguments)]


def detguard(*arguments, cwd, columns=200, stdin=None, timeout=600, **options):
    environment = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout,
        check=False, **options,
    )  # fmt: skip
