"""Where a transform that moves pixels takes a photo: the picture, its boxes, and gradients on their way back."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detguard.photos import Photo

Matrix = NDArray[np.float64]
# Pixel i of a row lies between i and i + 1, and OpenCV counts from its middle.
TO_MIDDLES: Matrix = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])


@dataclass(frozen=True, eq=False)
class Warp:
    """A perspective map from places in a photo to places in a picture of it, which is black where no photo is.

    Attributes:
        matrix: float64 [3, 3], (x, y, 1) of the photo -> of the picture, up to a factor.
        photo: (height, width), px.
        picture: (height, width), px.
    """

    matrix: Matrix
    photo: tuple[int, int]
    picture: tuple[int, int]

    @classmethod
    def centred(cls, linear: Matrix, photo: tuple[int, int], picture: tuple[int, int] | None = None) -> "Warp":
        """The linear map [2, 2] about the middle of the photo, which becomes that of the picture."""
        picture = picture or photo
        middle, new = (np.array([size[1] / 2, size[0] / 2]) for size in (photo, picture))
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = linear, new - linear @ middle
        return cls(matrix, photo, picture)

    def __call__(self, photo: Photo) -> Photo:
        """The picture, `uint8 [H', W', 3]`, bilinear."""
        by_middles = np.linalg.inv(TO_MIDDLES) @ self.matrix @ TO_MIDDLES
        moved = cv2.warpPerspective(photo, by_middles, self.picture[::-1], flags=cv2.INTER_LINEAR)
        return moved.astype(np.uint8, copy=False)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Gradient at the picture, [3, H', W'], at the photo, [3, H, W]: the adjoint but for OpenCV's rounding."""
        planes = gradient.new_zeros(1, 3, *self.photo)
        places = self.places.to(gradient)
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient[None].contiguous(), planes, places, 0, 0, False, [True, False]
        )[0][0]

    @cached_property
    def places(self) -> Tensor:
        """Where each pixel of the picture lies in the photo, float32 [1, H', W', 2], -1..1 from edge to edge."""
        y, x = np.mgrid[: self.picture[0], : self.picture[1]] + 0.5
        places = np.linalg.inv(self.matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        scaled = 2 * places[:2] / places[2] / np.array([[self.photo[1]], [self.photo[0]]]) - 1
        return torch.from_numpy(scaled.T.reshape(1, *self.picture, 2).astype(np.float32))

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes [N, 4] xyxy of the photo as boxes of the picture, which may reach over its sides.

        Each is that of the turned ellipse within the box, as objects seldom fill the corners of theirs: the box of the
        turned box would grow with every degree, and no detector finds such.
        """
        matrix = torch.from_numpy(self.matrix)
        middle = (boxes[:, :2] + boxes[:, 2:]).double() / 2
        half = (boxes[:, 2:] - boxes[:, :2]).double() / 2
        there = torch.cat([middle, torch.ones_like(middle[:, :1])], 1) @ matrix.T
        middle, depth = there[:, :2] / there[:, 2:], there[:, 2, None, None]
        # How the map changes places near the middle.
        local = (matrix[:2, :2] - middle[:, :, None] * matrix[2, :2]) / depth
        reach = (local * half[:, None, :]).square().sum(2).sqrt()
        return torch.cat([middle - reach, middle + reach], 1).to(boxes)
