"""Keywords of the functions for Python that their options take, and where else an option of the command line is."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from detguard import DetguardError
from detguard.detectors.base import Detector

# What stands for options of the command line in every function.
ELSEWHERE = {
    "model": "`detector`, the first argument",
    "map": "`class_map`, a mapping",
} | dict.fromkeys(("imgsz", "trust", "end_to_end", "top_k", "fusion", "iou", "device"), "of `load_detector`")


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
        DetguardError: something is no detector.
    """
    detectors = [given] if isinstance(given, Detector | str) or not hasattr(given, "__iter__") else list(given)
    for one in detectors:
        if not isinstance(one, Detector):
            raise DetguardError(f"`detector` {one!r}: expected one of load_detector(), as load_detector('detguard-n')")
    return detectors
