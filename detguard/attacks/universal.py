"""One perturbation that is added to every photo (Moosavi-Dezfooli et al. 2017), within an L-inf budget."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from detguard import DetguardError, defaults
from detguard.attacks.pictures import Picture, Stage
from detguard.photos import Photo

# The level of a saved perturbation that changes nothing, and the largest change that its levels can say.
NOTHING, LARGEST = 128, 127


@dataclass(frozen=True)
class Universal(Picture):
    """A change of at most `eps` levels of 255, stretched over the whole photo; its PNG holds 128 + the change.

    pixels: of its side, as large as the detector's frame so that it is learned as it is seen.
    """

    kind = "universal"
    eps: int = defaults.Picture.eps
    pixels: int = 640

    @classmethod
    def of(cls, eps: float, pixels: int) -> "Universal":
        """One that is to be learned.

        Raises:
            DetguardError: a PNG cannot hold it.
        """
        if not 1 <= eps <= LARGEST or eps != int(eps):
            raise DetguardError(
                f"`eps` {eps}: expected whole levels of 1..{LARGEST}, as 128 + the change must fit a PNG"
            )
        return cls(int(eps), pixels)

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return (-self.eps / 255, self.eps / 255)

    @override
    def start(self, generator: torch.Generator) -> Tensor:
        """Random within the budget: at no change at all every direction of a step looks the same to Adam."""
        shape = (3, self.pixels, self.pixels)
        share = torch.rand(shape, generator=generator, device=generator.device)
        return (2 * share - 1) * self.eps / 255

    @override
    def change(self, frame: Tensor, picture: Tensor, stage: Stage, rng: np.random.Generator) -> Tensor:
        """The photo's part of the frame alone: padding is put around photos that are changed already."""
        (height, width), (top, left) = stage.letterbox.resized, stage.letterbox.offset
        window = (slice(None), slice(top, top + height), slice(left, left + width))
        changed = frame.clone()
        changed[window] = (frame[window] + stretched(picture, (height, width))).clamp(0, 1)
        return changed

    @override
    def on_photo(self, photo: Photo, picture: Photo, boxes: Tensor) -> Photo:
        """The photo with the change added, stretched to its size; boxes do not matter."""
        levels = torch.from_numpy(picture.astype(np.float32) - NOTHING).permute(2, 0, 1)
        change = stretched(levels, photo.shape[:2]).round().permute(1, 2, 0).numpy()
        return np.clip(photo + change, 0, 255).astype(np.uint8)

    @override
    def image(self, picture: Tensor) -> Photo:
        levels = (picture * 255).round() + NOTHING
        return levels.byte().permute(1, 2, 0).contiguous().cpu().numpy()

    @override
    def shown(self, picture: Photo) -> tuple[Photo, str]:
        """Changes as large as levels allow: a few of them are an even grey to the eye."""
        times = LARGEST // self.eps
        levels = NOTHING + times * (picture.astype(np.int16) - NOTHING)
        return levels.astype(np.uint8), f", changes {times} times as large" if times > 1 else ""


def stretched(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [3, S, S] over a photo of `size` (height, width): bilinear, so that no value leaves its range."""
    return interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def largest_change(picture: Photo) -> int:
    """The budget that a saved perturbation uses, levels."""
    return int(np.abs(picture.astype(np.int16) - NOTHING).max())
