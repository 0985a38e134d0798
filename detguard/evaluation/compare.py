"""Whether two models' figures can be compared, and whether they differ by more than chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from detguard.evaluation.attacks import ATTACKS, SQUARE
from detguard.evaluation.bootstrap import error_95
from detguard.evaluation.metrics import ModelMetrics

# Protocols whose AP is compared, with what must be the same.
Compared = Literal["clean", "corruptions", "corruption_file", "attack", "transfer", "blackbox", "patch", "universal"]
SAME: dict[Compared, tuple[str, ...]] = {
    "clean": (),
    "corruptions": ("kinds", "severities"),
    "corruption_file": ("content",),
    "attack": ("eps", "steps", "restarts", "queries", "attacks"),
    "transfer": ("eps", "steps", "restarts", "queries", "attacks", "from"),
    "blackbox": ("eps", "queries"),
    "patch": ("class", "size", "content"),
    "universal": ("eps", "content"),
}
# What may differ, since it is a part of the model or may be what is compared, but must be said.
ALSO = ("imgsz", "nms", "nms_inside", "seed", "version")


@dataclass(frozen=True)
class Difference:
    """Of a figure: how much larger than the first model's, and half of the 95 % interval; None: too few photos."""

    value: float
    error: float | None


def same_photos(first: ModelMetrics, other: ModelMetrics) -> bool:
    """Whether two models were shown the same photos with the same labels, so that figures are of the same."""
    return first["setting"]["photos_sha256"] == other["setting"]["photos_sha256"]


def unlike(first: ModelMetrics, other: ModelMetrics, protocol: Compared) -> list[str]:
    """The settings by which two figures of a protocol are not of the same, like "steps 20, 40"."""
    pairs = [(name, _setting(first, protocol, name), _setting(other, protocol, name)) for name in SAME[protocol]]
    return [f"{name} {a}, {b}" for name, a, b in pairs if a != b]


def _setting(row: ModelMetrics, protocol: Compared, name: str) -> object:
    found: Mapping[str, object] = row[protocol]
    if protocol == "corruptions":
        kinds = row["corruptions"]["kinds"]
        return "+".join(sorted(kinds if name == "kinds" else next(iter(kinds.values()))["severities"]))
    if name == "from":  # weights of one name may be others
        return "+".join(f"{source} {digest[:8]}" for source, digest in sorted(row["transfer"]["sources"].items()))
    if name == "attacks":  # not what follows from them, nor those that are made for an ensemble beside them
        made_for = next(iter(row["attack"]["budgets"].values())) if protocol == "attack" else row["transfer"]
        shown = made_for["attacks"]
        return "+".join(sorted(part for part in shown if part.partition("-")[0] in (*ATTACKS, SQUARE)))
    return found.get(name, "-")


def also_unlike(first: ModelMetrics, other: ModelMetrics) -> list[str]:
    """Settings that differ and leave figures comparable, like "imgsz 320, 640"."""
    pairs = [(name, dict(first["setting"]).get(name), dict(other["setting"]).get(name)) for name in ALSO]
    return [f"{name} {a}, {b}" for name, a, b in pairs if a != b]


def ap_of(row: ModelMetrics, protocol: Compared) -> float | None:
    """The AP that stands for a protocol as a whole."""
    if protocol == "universal":
        return row["universal"]["shown"]["universal"]["AP"]
    if protocol == "patch":
        worn = row["patch"]["shown"]["patch"]
        return worn and worn["AP"]
    return row[protocol]["AP"]


def drawn_of(row: ModelMetrics, protocol: Compared) -> int:
    """The photos that a figure's error is by; none where those with an object of a patch's class were too few."""
    if protocol == "patch":
        worn = row["patch"]["shown"]["patch"]
        if worn is None or worn.get("AP_error") is None:
            return 0
    return row["setting"]["photos"]


def difference(
    before: float, after: float, draws: tuple[list[float | None], list[float | None]], photos: int
) -> Difference:
    """Of two figures, by what both are in the same draws of so many photos."""
    a, b = (np.array(one, float) for one in draws)
    return Difference(after - before, error_95(b - a, photos))
