"""Median, Gaussian, motion and defocus blur."""

from abc import abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from detguard.photos import Photo
from detguard.transforms.base import Transform, whole_number


def _odd(value: str, low: int, high: int, what: str) -> int:
    size = whole_number(value, low, high, what)
    if size % 2 == 0:
        raise ValueError(f"expected {what} in {low}..{high}")
    return size


@dataclass(frozen=True)
class Median(Transform):
    """OpenCV's median blur, per channel, borders replicated. Its exact gradient goes to the pixel that was chosen."""

    size: int
    kind = "median"
    example = "median:3"

    @classmethod
    def parse(cls, value: str) -> "Median":
        """`median:K` with K 3, 5 or 7."""
        if value not in ("3", "5", "7"):
            raise ValueError("expected a window of 3, 5 or 7")
        return cls(int(value))

    @override
    def __call__(self, photo: Photo) -> Photo:
        return cv2.medianBlur(photo, self.size).astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Exact; among equal pixels of a window one is taken."""
        height, width, _ = photo.shape
        radius = self.size // 2
        y, x = torch.arange(height)[:, None] - radius, torch.arange(width) - radius
        out = torch.empty_like(gradient)
        for channel in range(3):
            plane = torch.from_numpy(photo[..., channel].astype(np.float32))[None, None]
            windows = F.unfold(F.pad(plane, [radius] * 4, mode="replicate"), self.size)[0]  # each column is one
            chosen = windows.median(0).indices.view(height, width)
            rows, columns = (y + chosen // self.size).clamp(0, height - 1), (x + chosen % self.size).clamp(0, width - 1)
            target = (rows * width + columns).flatten().to(gradient.device)
            flat = gradient.new_zeros(height * width).index_add_(0, target, gradient[channel].reshape(-1))
            out[channel] = flat.view(height, width)
        return out


@dataclass(frozen=True)
class Gaussian(Transform):
    """OpenCV's Gaussian blur with its own sigma for the window, borders reflected."""

    size: int
    kind = "gaussian"
    example = "gaussian:3"
    reads = _odd, 3, 31, "an odd window"

    @override
    def __call__(self, photo: Photo) -> Photo:
        return cv2.GaussianBlur(photo, (self.size, self.size), 0).astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Exact but for OpenCV's rounding: the adjoint of the padded convolution."""
        kernel = torch.from_numpy(cv2.getGaussianKernel(self.size, 0)).to(gradient)
        return _adjoint(gradient, kernel, kernel.T)


class Kernel(Transform):
    """A blur by a `kernel` that is the same upside down and mirrored, borders reflected."""

    @abstractmethod
    def kernel(self) -> NDArray[np.float32]:
        """Weights, float32 [K, K], K odd, of sum 1."""

    @override
    def __call__(self, photo: Photo) -> Photo:
        return cv2.filter2D(photo, -1, self.kernel()).astype(np.uint8, copy=False)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Exact but for OpenCV's rounding: the adjoint of the padded convolution."""
        return _adjoint(gradient, torch.from_numpy(self.kernel()).to(gradient))


@dataclass(frozen=True)
class Motion(Kernel):
    """What a camera sees that moves sideways by `length` pixels."""

    length: int
    kind = "motion"
    example = "motion:7"
    reads = _odd, 3, 63, "an odd window"

    @override
    def kernel(self) -> NDArray[np.float32]:
        weights = np.zeros((self.length, self.length), np.float32)
        weights[self.length // 2] = 1 / self.length
        return weights


@dataclass(frozen=True)
class Defocus(Kernel):
    """What a lens out of focus makes of a photo: every point becomes a disc of `size` px."""

    size: int
    kind = "defocus"
    example = "defocus:5"
    reads = _odd, 3, 63, "an odd window"

    @override
    def kernel(self) -> NDArray[np.float32]:
        y, x = np.mgrid[: self.size, : self.size] - self.size // 2
        # Pixels at the rim count by about how much of them the disc covers.
        weights = np.clip(self.size / 2 + 0.5 - np.hypot(x, y), 0, 1)
        return (weights / weights.sum()).astype(np.float32)


def _adjoint(gradient: Tensor, *kernels: Tensor) -> Tensor:
    """The adjoint, of a gradient [3, H, W], of reflecting borders and convolving by kernels, one after the other."""
    back = gradient[:, None]
    for kernel in kernels:
        back = F.conv_transpose2d(back, kernel[None, None])
    for dim, side in ((2, gradient.shape[1]), (3, gradient.shape[2])):
        sources = _reflected(side, (back.shape[dim] - side) // 2).to(back.device)
        shape = [*back.shape[:dim], side, *back.shape[dim + 1 :]]
        back = back.new_zeros(shape).index_add_(dim, sources, back)
    return back[:, 0]


def _reflected(side: int, radius: int) -> Tensor:
    """Which pixel of a row or column of `side` each of the padded one is, by OpenCV: it may reflect many times."""
    border = cv2.BORDER_REFLECT_101
    return torch.tensor([cv2.borderInterpolate(i, side, border) for i in range(-radius, side + radius)])
