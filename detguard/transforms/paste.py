"""A patch on the objects of a picture: one geometry for frames that it learns from and for photos that judge it.

A patch is a square, float32 [3, S, S], 0..1, RGB. Its side is a share of the square root of the area of an object's
box; its middle is that of the upper half of the box.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from detguard.photos import Letterbox, Photo, frames_tensor, photos_of
from detguard.transforms.warp import Warp

# What is drawn anew for each object: factors of the side, degrees, shares of the side by which a corner moves, factors
# and offsets of the colours, deviation of the noise.
SCALE, ANGLE, TILT, CONTRAST, BRIGHTNESS, NOISE = (0.8, 1.2), 15.0, 0.08, (0.8, 1.2), 0.1, 0.05
CORNERS = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


@dataclass(frozen=True, eq=False)
class Look:
    """How a patch appears on one object; by default as it is.

    scale: of its side; angle: degrees; tilt: float64 [4, 2], how far each corner moves, in sides; contrast, brightness:
    of its colours; noise: deviation, 0..1.
    """

    scale: float = 1.0
    angle: float = 0.0
    tilt: NDArray[np.float64] | float = 0.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Look":
        """One of those that printing, light and view make (expectation over transformation, Athalye et al. 2018)."""
        return cls(
            rng.uniform(*SCALE),
            rng.uniform(-ANGLE, ANGLE),
            rng.uniform(-TILT, TILT, (4, 2)),
            rng.uniform(*CONTRAST),
            rng.uniform(-BRIGHTNESS, BRIGHTNESS),
            NOISE,
        )


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a patch lies in a picture, and its look there.

    corners: float64 [4, 2] xy, pixels, clockwise from the top left; size: (height, width) of the picture.
    """

    corners: NDArray[np.float64]
    size: tuple[int, int]
    look: Look

    @classmethod
    def on(cls, box: Iterable[float], share: float, size: tuple[int, int], look: Look | None = None) -> "Spot":
        """That on an object's box (x1, y1, x2, y2) in a picture of `size`; share: of the root of the box's area."""
        look = look or Look()
        x1, y1, x2, y2 = box
        side = share * look.scale * np.sqrt(max(x2 - x1, 0) * max(y2 - y1, 0))
        cos, sin = np.cos(np.radians(look.angle)), np.sin(np.radians(look.angle))
        turned = (CORNERS + look.tilt) @ np.array([[cos, sin], [-sin, cos]])
        return cls(side * turned + [(x1 + x2) / 2, (3 * y1 + y2) / 4], size, look)

    def in_frame(self, letterbox: Letterbox) -> "Spot":
        """The same spot of a photo in the frame of a detector."""
        scale = np.divide(letterbox.resized, letterbox.photo)[::-1]
        return replace(self, corners=self.corners * scale + letterbox.offset[::-1], size=letterbox.frame)

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture that hold all of the patch that is in it."""
        low, high = np.floor(self.corners.min(0)), np.ceil(self.corners.max(0))
        x, y = (np.clip([a, b], 0, side) for a, b, side in zip(low, high, self.size[::-1], strict=True))
        return slice(int(y[0]), int(y[1])), slice(int(x[0]), int(x[1]))

    @property
    def side(self) -> int:
        """The longest side of the spot in whole pixels."""
        lengths = np.linalg.norm(self.corners - np.roll(self.corners, 1, axis=0), axis=1)
        return round(float(lengths.max()))


def paste(picture: Tensor, patch: Tensor, spots: Iterable[Spot], generator: torch.Generator | None = None) -> Tensor:
    """The picture [3, H, W], 0..1, with the patch on all spots, the last on top; differentiable in the patch.

    generator: of the noise, on the patch's device. A pixel is the patch's where its middle is in it.
    """
    picture = picture.clone()
    for spot in spots:
        rows, columns = spot.window
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not height or not width or not spot.side:
            continue
        # Bilinear sampling reads only some pixels of a patch that is shown smaller.
        small = min(spot.side, patch.shape[1])
        shown = interpolate(patch[None], (small, small), mode="bilinear", antialias=True)
        shown = shown * spot.look.contrast + spot.look.brightness
        if spot.look.noise:
            shown = shown + spot.look.noise * torch.randn(shown.shape, generator=generator, device=shown.device)
        corners = (spot.corners - [columns.start, rows.start]).astype(np.float32)
        square = ((CORNERS + 0.5) * small).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(square, corners).astype(np.float64)
        warp = Warp(matrix, (small, small), (height, width))
        places = warp.places.to(patch)
        there = grid_sample(shown.clamp(0, 1), places, padding_mode="border", align_corners=False)[0]
        inside = (places.abs() <= 1).all(3)
        picture[:, rows, columns] = torch.where(inside, there, picture[:, rows, columns])
    return picture


def paste_on_photo(photo: Photo, patch: Photo, boxes: Tensor, share: float) -> Photo:
    """The photo, `uint8 [H, W, 3]`, with the patch, `uint8 [S, S, 3]`, as it is on each of the boxes [N, 4] xyxy."""
    planes, square = (frames_tensor([image])[0] for image in (photo, patch))
    pasted = paste(planes, square, [Spot.on(box, share, photo.shape[:2]) for box in boxes.tolist()])
    return photos_of(pasted[None])[0]
