"""Attack object detectors, harden them, and prove both in COCO numbers."""

import os

__version__ = "0.1.0"

# Ultralytics reads these once, at its first import. Nothing is installed on behalf of a file; that weights are read as
# data does not depend on them (see detectors/checkpoint.py).
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
# albumentations asks the network for a newer version of itself at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


class DetguardError(Exception):
    """Something the user can mend: the message names the file or option, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
