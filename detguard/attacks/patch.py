"""A patch that hides objects of some classes on whatever photo it is pasted on (Thys et al. 2019)."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from detguard import defaults
from detguard.attacks.pictures import Picture, Stage
from detguard.photos import Photo, photos_of
from detguard.transforms.paste import Look, Spot, paste, paste_on_photo

# Darker and brighter is not printed as it is shown: bounds instead of a list of a printer's colours
# (non-printability score, Sharif et al. 2016, eq. 6).
PRINTABLE = (0.05, 0.95)
# Weight of the total variation beside the loss of a photo's objects, as of Thys et al. (2019).
SMOOTHNESS = 2.5
CENTIMETRES_PER_INCH = 2.54


@dataclass(frozen=True)
class Patch(Picture):
    """A square that objects wear. size: its side, a share of the root of the area of an object's box; pixels: of it."""

    kind = "patch"
    size: float = defaults.Picture.size
    pixels: int = defaults.Picture.pixels

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return PRINTABLE

    @override
    def start(self, generator: torch.Generator) -> Tensor:
        """Grey with a little noise: no colour is nearer than another."""
        shape = (3, self.pixels, self.pixels)
        return 0.5 + 0.05 * torch.randn(shape, generator=generator, device=generator.device)

    @override
    def change(self, frame: Tensor, picture: Tensor, stage: Stage, rng: np.random.Generator) -> Tensor:
        """On each object that is attacked, with a look and noise of its own."""
        generator = torch.Generator(frame.device).manual_seed(int(rng.integers(2**31)))
        place = stage.letterbox
        # Square in the photo, as it is printed: a frame may be stretched.
        boxes = place.boxes_to_photo(stage.objects[stage.attacked].boxes).tolist()
        spots = [Spot.on(box, self.size, place.photo, Look.draw(rng)).in_frame(place) for box in boxes]
        return paste(frame, picture, spots, generator)

    @override
    def on_photo(self, photo: Photo, picture: Photo, boxes: Tensor) -> Photo:
        return paste_on_photo(photo, picture, boxes, self.size)

    @override
    def image(self, picture: Tensor) -> Photo:
        return photos_of(picture[None])[0]

    @override
    def roughness(self, picture: Tensor) -> Tensor:
        return SMOOTHNESS * total_variation(picture)


def total_variation(patch: Tensor) -> Tensor:
    """Scalar: the mean difference of neighbours in a patch [3, S, S]: what is smooth can be printed (Thys et al.)."""
    return patch.diff(dim=1).abs().mean() + patch.diff(dim=2).abs().mean()


def printable_png(patch: Photo, centimetres: float) -> bytes:
    """A PNG of the patch, `uint8 [S, S, 3]`, that is printed with a side of so many centimetres."""
    stream = io.BytesIO()
    dpi = len(patch) / centimetres * CENTIMETRES_PER_INCH
    Image.fromarray(patch).save(stream, "PNG", dpi=(dpi, dpi))
    return stream.getvalue()
