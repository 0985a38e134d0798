"""Attack object detectors, harden them, and prove both in COCO numbers."""

import os

__version__ = "0.1.0"

# Ultralytics reads these once, at its first import. Weights are data: they are unpickled through its allow-list
# only, nothing is installed on their behalf, and --trust (see detectors/load.py) is the one way around.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
# albumentations asks the network for a newer version of itself at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


class DetguardError(Exception):
    """Something the user can mend: the message names the file or option, what was expected and what to do."""
