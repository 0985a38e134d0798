"""Resize down (or up) and back to the photo's own size."""

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor
from typing_extensions import override

from detguard.photos import Photo, resize_adjoint
from detguard.transforms.base import Transform, number


@dataclass(frozen=True)
class Resize(Transform):
    """Bilinear to `factor` times the size and back. Its exact gradient is the adjoint of both maps."""

    factor: float
    kind = "resize"
    example = "resize:0.5"
    reads = number, 0.05, 4, "a factor"

    def _size(self, photo: Photo) -> tuple[int, int]:
        return max(1, round(photo.shape[0] * self.factor)), max(1, round(photo.shape[1] * self.factor))

    @override
    def __call__(self, photo: Photo) -> Photo:
        height, width = self._size(photo)
        small = cv2.resize(photo, (width, height), interpolation=cv2.INTER_LINEAR)
        back = cv2.resize(small, (photo.shape[1], photo.shape[0]), interpolation=cv2.INTER_LINEAR)
        return back.astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """The gradient at the photo, exact but for OpenCV's rounding."""
        return resize_adjoint(resize_adjoint(gradient, self._size(photo)), photo.shape[:2])
