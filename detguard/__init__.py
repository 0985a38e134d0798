"""Attack object detectors, harden them, and prove both in COCO numbers."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detguard.attacks.budgets import L2, Linf, Masked
    from detguard.detectors.load import load_detector
    from detguard.objectives import Fabricate, Flood, Mislabel, Untargeted, Vanish
    from detguard.objectives.base import Selection
    from detguard.workflows.adapt import adapt
    from detguard.workflows.attack import Result, attack, verify
    from detguard.workflows.evaluate import evaluate
    from detguard.workflows.harden import Trained, harden
    from detguard.workflows.monitor import monitor
    from detguard.workflows.pictures import Learned, patch, universal

__all__ = [
    "L2", "DetguardError", "Fabricate", "Flood", "Learned", "Linf", "Masked", "Mislabel", "Result",
    "Selection", "Trained", "Untargeted", "Vanish", "adapt", "attack", "evaluate", "harden", "load_detector", "monitor",
    "patch", "universal", "verify",
]  # fmt: skip

__version__ = "0.1.0"

# Ultralytics reads these once, at its first import. Nothing is installed on behalf of a file; that weights are read as
# data does not depend on them (see detectors/checkpoint.py).
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
# albumentations asks the network for a newer version of itself at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


class DetguardError(Exception):
    """Something the user can mend: the message names the file or option, what was expected and what to do.

    Options are named as fields in backticks, as `keep_others`; the command line shows them as it has them.
    told: another process of a launch says it already.
    """

    told = False


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of Python and NumPy, or of torch, which has one of its own on some devices alone."""
    if isinstance(error, RuntimeError):
        told = f"{type(error).__name__}: {error}"
        words = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
        return any(word in told for word in words)
    return isinstance(error, MemoryError)


# Where the rest is: imported when it is first used, as torch and the detectors take seconds.
_MODULES = {
    "attacks.budgets": ("L2", "Linf", "Masked"),
    "detectors.load": ("load_detector",),
    "objectives": ("Fabricate", "Flood", "Mislabel", "Untargeted", "Vanish"),
    "objectives.base": ("Selection",),
    "workflows.adapt": ("adapt",),
    "workflows.attack": ("Result", "attack", "verify"),
    "workflows.evaluate": ("evaluate",),
    "workflows.harden": ("Trained", "harden"),
    "workflows.monitor": ("monitor",),
    "workflows.pictures": ("Learned", "patch", "universal"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'detguard' has no attribute '{name}'")
    return getattr(import_module(f"detguard.{_PLACES[name]}"), name)
