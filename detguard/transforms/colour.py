"""Brightness, contrast, gamma, hue, inverted colours and fewer levels, each by a formula on values of 0..255."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from detguard.photos import Photo
from detguard.transforms.base import Transform, number, whole_number

# The value that a change of contrast leaves as it is.
MIDDLE = 127.5


class Curve(Transform):
    """A transform of every value by one `curve`; its exact gradient is the slope there, 0 where it is cut off."""

    @abstractmethod
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """What values become, before they are rounded and cut off at 0 and 255."""

    @override
    def __call__(self, photo: Photo) -> Photo:
        return cv2.LUT(photo, self._levels().clip(0, 255).round().astype(np.uint8)).astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        levels = self._levels()
        slope = np.gradient(levels) * ((levels >= 0) & (levels <= 255))
        there = torch.from_numpy(slope.astype(np.float32)[photo]).to(gradient)
        return gradient * there.permute(2, 0, 1)

    def _levels(self) -> NDArray[np.float64]:
        return self.curve(np.arange(256, dtype=np.float64))


@dataclass(frozen=True)
class Brightness(Curve):
    """Values times 1 + `share`; below 0 is darker."""

    share: float
    kind = "brightness"
    example = "brightness:0.2"
    reads = number, -0.9, 3, "a share"

    @override
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values * (1 + self.share)


@dataclass(frozen=True)
class Contrast(Curve):
    """Distances from middle grey times 1 + `share`; below 0 is flatter."""

    share: float
    kind = "contrast"
    example = "contrast:-0.3"
    reads = number, -0.9, 3, "a share"

    @override
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return MIDDLE + (values - MIDDLE) * (1 + self.share)


@dataclass(frozen=True)
class Gamma(Curve):
    """Values of 0..1 to the power of `exponent`; over 1 is darker."""

    exponent: float
    kind = "gamma"
    example = "gamma:1.5"
    reads = number, 0.2, 5, "an exponent"

    @override
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return 255 * (values / 255) ** self.exponent


@dataclass(frozen=True)
class Posterize(Curve):
    """Only the first `bits` of each value. Its gradient is that of the line through the steps."""

    bits: int
    kind = "posterize"
    example = "posterize:4"
    reads = whole_number, 1, 7, "bits"

    @override
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        step = 2 ** (8 - self.bits)
        return values // step * step

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Invert(Curve):
    """The negative of a share of the photo: `invert:1` is the whole of it."""

    share: float
    kind = "invert"
    example = "invert:1"
    reads = number, 0, 1, "a share"
    straight = False

    @override
    def curve(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return (1 - self.share) * values + self.share * (255 - values)


@dataclass(frozen=True)
class Hue(Transform):
    """Colours turned about the axis of greys, which stay as they are, by a linear map; 120 turns red into green."""

    degrees: float
    kind = "hue"
    example = "hue:15"
    reads = number, -180, 180, "degrees"
    straight = False

    @property
    def _matrix(self) -> NDArray[np.float64]:
        """Rodrigues' formula for the axis (1, 1, 1)."""
        c, s = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        return c * np.eye(3) + s * cross + (1 - c) / 3

    @override
    def __call__(self, photo: Photo) -> Photo:
        return cv2.transform(photo, self._matrix).astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Exact but for rounding: 0 where a value is cut off at 0 or 255."""
        turned = photo.reshape(-1, 3) @ self._matrix.T
        inside = torch.from_numpy((turned >= 0) & (turned <= 255)).to(gradient.device).view(*photo.shape)
        kept = gradient * inside.permute(2, 0, 1)
        return torch.einsum("ij,ihw->jhw", torch.from_numpy(self._matrix).to(gradient), kept)
