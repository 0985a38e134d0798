"""Transforms that move pixels: rotate, crop, flip, stretch and perspective."""

import math
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from detguard.transforms.base import Geometric, number
from detguard.transforms.warp import Warp


@dataclass(frozen=True)
class Rotate(Geometric):
    """Turn about the middle, counterclockwise, in a picture of the same size."""

    degrees: float
    kind = "rotate"
    example = "rotate:5"
    reads = number, -180, 180, "degrees"

    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        c, s = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        return Warp.centred(np.array([[c, s], [-s, c]]), shape)


@dataclass(frozen=True)
class Crop(Geometric):
    """The middle of the photo, a share of its height and width."""

    share: float
    kind = "crop"
    example = "crop:0.9"
    reads = number, 0.1, 1, "a share"

    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        # Whole pixels, so that none is blurred.
        height, width = (max(1, round(side * self.share)) for side in shape)
        matrix = np.eye(3)
        matrix[:2, 2] = -((shape[1] - width) // 2), -((shape[0] - height) // 2)
        return Warp(matrix, shape, (height, width))


@dataclass(frozen=True)
class Flip(Geometric):
    """Mirror, left to right or top to bottom."""

    way: str
    kind = "flip"
    example = "flip:h"

    @classmethod
    def parse(cls, value: str) -> "Flip":
        """`flip:h` left to right, `flip:v` top to bottom."""
        if value not in ("h", "v"):
            raise ValueError("expected h (left to right) or v (top to bottom)")
        return cls(value)

    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        return Warp.centred(np.diag([-1.0, 1.0] if self.way == "h" else [1.0, -1.0]), shape)


@dataclass(frozen=True)
class Stretch(Geometric):
    """Wider or narrower by a factor, the height as it was."""

    factor: float
    kind = "stretch"
    example = "stretch:1.1"
    reads = number, 0.25, 4, "a factor"

    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        width = max(1, round(shape[1] * self.factor))
        return Warp.centred(np.diag([width / shape[1], 1.0]), shape, (shape[0], width))


@dataclass(frozen=True)
class Perspective(Geometric):
    """As seen from the side: the left or (negative) the right edge shrinks by a share of the height."""

    share: float
    kind = "perspective"
    example = "perspective:0.1"
    reads = number, -0.5, 0.5, "a share"

    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        """The edge that stays keeps its place; depth grows evenly towards the other."""
        height, width = shape
        far = 1 / (1 - abs(self.share)) - 1
        # x / w of 0..1 from the far edge on has depth 1 + far * (1 - x / w); the middle line stays level.
        matrix = np.array(
            [[1.0, 0.0, 0.0], [-height / 2 * far / width, 1.0, height / 2 * far], [-far / width, 0.0, 1 + far]]
        )
        if self.share < 0:
            mirror = Warp.centred(np.diag([-1.0, 1.0]), shape).matrix
            matrix = mirror @ matrix @ mirror
        return Warp(matrix, shape, shape)
