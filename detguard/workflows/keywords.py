"""Keywords of the functions for Python that their options take, and where else an option of the command line is."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

from detguard import DetguardError
from detguard.detectors.base import Detector
from detguard.transforms.base import Transform
from detguard.transforms.parse import written

# What stands for options of the command line in every function.
ELSEWHERE = {
    "model": "`detector`, the first argument",
    "map": "`class_map`, a mapping",
} | dict.fromkeys(("imgsz", "trust", "end_to_end", "top_k", "fusion", "iou", "device"), "of `load_detector`")

# Keywords that a run that is gone on with takes anew.
KEPT_BY_NO_RUN = {"resume", "device", "workers", "trust", "log", "on_stage", "on_step"}


def refuse_unknown(
    function: str, given: Collection[str], known: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """See that all keywords are some that a function knows.

    Args:
        function: its name.
        given: the keywords.
        known: those that it knows.
        elsewhere: what stands for an option of the command line in this function, beside `ELSEWHERE`.

    Raises:
        TypeError: one is not; says what to write instead, where that is known.
    """
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    near = get_close_matches(unknown[0], known, n=1)
    meant = (ELSEWHERE | dict(elsewhere or {})).get(unknown[0]) or (f"did you mean `{near[0]}`?" if near else "")
    raise TypeError(f"{function}() got an unexpected keyword argument '{unknown[0]}'" + (meant and f": {meant}"))


def as_detectors(given: Any) -> Sequence[Detector]:
    """One detector, or several, as a list of them.

    Args:
        given: what a user did.

    Raises:
        DetguardError: something is no detector, or there is none.
    """
    detectors = [given] if isinstance(given, Detector | str) or not hasattr(given, "__iter__") else list(given)
    for one in detectors or [given]:
        if not isinstance(one, Detector):
            raise DetguardError(f"`detector` {one!r}: expected one of load_detector(), as load_detector('detguard-n')")
    return detectors


def as_detector(given: Any) -> Detector:
    """One detector.

    Args:
        given: what a user did.

    Raises:
        DetguardError: it is none.
    """
    return as_detectors([given])[0]


def as_specs(transforms: Any) -> str:
    """Transforms as the specs that a run keeps.

    Args:
        transforms: what a user gave: specs, a transform, transforms and specs one by one, or None.

    Raises:
        DetguardError: they are none of these, or one cannot be read again.
    """
    if transforms is None:
        return "none"
    if isinstance(transforms, str):
        return transforms
    listed = [transforms] if isinstance(transforms, Transform) else transforms
    if not isinstance(listed, Iterable):
        raise DetguardError(f"`transforms` {transforms!r}: expected specs, as 'median:3,jpeg:75', or a list of them")
    return written(list(listed))


def only_resumes(function: Callable[..., object], given: Mapping[str, Any]) -> None:
    """See that a function that goes on with a run is given nothing that the run says already.

    Args:
        function: whose signature says what is given where nothing is.
        given: its arguments by name, as of `locals()`.

    Raises:
        DetguardError: it is.
    """
    for name, one in signature(function).parameters.items():
        several = one.kind is one.VAR_KEYWORD
        if name not in KEPT_BY_NO_RUN and given[name] != ({} if several else one.default):
            named = next(iter(given[name])) if several else name
            raise DetguardError(f"`resume`: takes all options from the run; leave out `{named}`")
