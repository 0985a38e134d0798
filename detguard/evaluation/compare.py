"""Whether two models' figures can be compared, and whether they differ by more than chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detguard.evaluation.bootstrap import error_95

Row = Mapping[str, Any]
# Protocols whose AP is compared, with what must be the same.
SAME: dict[str, tuple[str, ...]] = {
    "clean": (),
    "corruptions": ("kinds", "severities"),
    "corruption_file": ("file",),
    "attack": ("eps", "steps", "restarts", "queries"),
    "transfer": ("eps", "from"),
    "blackbox": ("eps", "queries"),
    "universal": ("eps", "file"),
}
# What may differ, since it is a part of the model or may be what is compared, but must be said.
TOLD = ("imgsz", "nms", "seed", "version")


@dataclass(frozen=True)
class Difference:
    """Of a figure: how much larger than the first model's, and half of the 95 % interval; None: too few photos."""

    value: float
    error: float | None

    @property
    def noise(self) -> bool:
        """Whether there may be no difference at all."""
        return self.error is None or abs(self.value) <= self.error


def same_photos(first: Row, other: Row) -> bool:
    """Whether two models were shown the same photos with the same labels, so that figures are of the same."""
    return bool(first["setting"]["photos_sha256"] == other["setting"]["photos_sha256"])


def unlike(first: Row, other: Row, protocol: str) -> list[str]:
    """The settings by which two figures of a protocol are not of the same, like "steps 20, 40"."""
    pairs = [(name, _setting(first, protocol, name), _setting(other, protocol, name)) for name in SAME[protocol]]
    return [f"{name} {a}, {b}" for name, a, b in pairs if a != b]


def _setting(row: Row, protocol: str, name: str) -> Any:
    found = row[protocol]
    if name == "severities":
        return ",".join(next(iter(found["kinds"].values()))["severities"])
    return "+".join(found[name]) if name in ("from", "kinds") else found.get(name, "-")


def also_unlike(first: Row, other: Row) -> list[str]:
    """Settings that differ and leave figures comparable, like "imgsz 320, 640"."""
    pairs = [(name, first["setting"][name], other["setting"][name]) for name in TOLD]
    return [f"{name} {a}, {b}" for name, a, b in pairs if a != b]


def ap_of(row: Row, protocol: str) -> float | None:
    """AP of a protocol's headline figure."""
    found = row[protocol]["shown"]["universal"] if protocol == "universal" else row[protocol]
    ap: float | None = found["AP"]
    return ap


def difference(first: Row, other: Row, draws: tuple[Row, Row], protocol: str) -> Difference | None:
    """Of one figure, by what both are in the same draws of the same photos; None: there is none.

    draws: of each model, protocol -> AP in each draw.
    """
    before, after = ap_of(first, protocol), ap_of(other, protocol)
    if before is None or after is None:
        return None
    a, b = (np.array(one[protocol], float) for one in draws)
    return Difference(after - before, error_95(b - a, first["setting"]["photos"]))
