"""Detectors of other families, by a module of the user's own: `module:factory` names a function that returns one."""

import importlib
import sys
from contextlib import suppress
from pathlib import Path

from detguard import DetguardError, first_line
from detguard.detectors.base import Detector


def is_custom(name: str | Path) -> bool:
    """Whether a name is one of a module and a function in it."""
    module, colon, factory = str(name).rpartition(":")
    return bool(colon) and factory.isidentifier() and all(part.isidentifier() for part in module.split("."))


def nearly_custom(name: str | Path) -> str | None:
    """What to write instead of a name like `folder/file.py:factory`; None: it is nothing like it."""
    file, colon, factory = str(name).rpartition(":")
    wanted = f"{file.removesuffix('.py').strip('./').replace('/', '.')}:{factory}"
    return wanted if colon and is_custom(wanted) and Path(file).suffix in ("", ".py") else None


def load_custom(name: str, device: str = "cpu", *, trust: bool) -> Detector:
    """The detector that a function returns; its module is looked for in the working folder, too.

    factory: takes the name of a torch device, as `cuda:0`, alone; `self.device = torch.device(device)`.

    Raises:
        DetguardError: it is not trusted to run, cannot be imported, or returns something else.
    """
    if not trust:
        raise DetguardError(f"{name}: would run code of yours; if you wrote it or trust it, give `trust`")
    module, _, factory = name.rpartition(":")
    here = str(Path.cwd())  # which their code may change
    sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module), factory)(device)
    except Exception as error:  # it is the user's own code that runs here
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        where = f"; looked in the working folder, {here}, and among what is installed" if missing else ""
        raise DetguardError(f"{name}: cannot be made ({type(error).__name__}: {first_line(error)}){where}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(here)
    if not isinstance(made, Detector):
        raise DetguardError(f"{name}: returned {type(made).__name__}; expected a detguard.detectors.base.Detector")
    return made
