"""Figures that an evaluation must reach, as a check of CI."""

import re
from collections.abc import Iterator
from typing import Literal, cast, get_args

from detguard import DetguardError
from detguard.evaluation.metrics import Metrics

# Protocols whose AP is a figure of the headline.
Figured = Literal["clean", "corruptions", "attack", "transfer", "blackbox"]
FIGURED: tuple[Figured, ...] = get_args(Figured)
Floors = dict[tuple[Figured, Literal["AP", "AP50"]], float]


def read_floors(text: str, protocols: tuple[str, ...]) -> Floors:
    """From "AP=.2,clean.AP50=.6" to figures by protocol and name; without a protocol, the figure is of every other one.

    Args:
        text: [PROTOCOL.]AP=X or [PROTOCOL.]AP50=X, comma-separated, each X in 0..1.
        protocols: those that are measured.

    Raises:
        DetguardError: it is none, or of a protocol that is not measured.
    """
    measured = [name for name in FIGURED if name in protocols]
    general: Floors = {}
    named: Floors = {}
    for part in text.split(","):
        read = re.fullmatch(r"\s*(?:([a-z]+)\.)?(AP|AP50)\s*=\s*(0|1|0?\.\d{1,6}|1\.0+)\s*", part, re.ASCII)
        if not read:
            raise DetguardError(f"`fail_under` '{part}': expected AP=X, AP50=X or attack.AP=X, X in 0..1")
        if (read[1] and read[1] not in measured) or not measured:
            raise DetguardError(f"`fail_under` {part}: not measured; `protocols` has {', '.join(measured) or 'no AP'}")
        of, stat = cast(Figured | None, read[1]), cast(Literal["AP", "AP50"], read[2])
        if of:
            named[of, stat] = float(read[3])
        else:
            general |= {(protocol, stat): float(read[3]) for protocol in measured}
    return general | named


def shortfalls(metrics: Metrics, floors: Floors) -> Iterator[str]:
    """What does not reach its floor, a line each; figures without objects to measure do not."""
    for model, found in metrics.items():
        for (protocol, stat), floor in floors.items():
            value = found[protocol][stat]
            if value is None or value < floor:
                # As many digits as a floor may have, where fewer would make the two look the same.
                digits = 3 if round(floor, 3) == floor and (value is None or value < floor - 0.001) else 6
                shown = "not measured" if value is None else f"{value:.{digits}f}"
                yield f"{model}: {protocol} {stat} {shown}, expected {floor:.{digits}f} or more"
