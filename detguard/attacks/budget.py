"""How far an adversarial photo may go. Projecting and verifying are two functions, so that one can catch the other."""

import numpy as np
import torch
from torch import Tensor

from detguard.photos import Photo


def project_linf(photo: Tensor, original: Tensor, eps: float) -> Tensor:
    """The nearest photo within `eps` levels of `original` in every value, and within 0..255; float32 [H, W, 3]."""
    return photo.maximum(original - eps).minimum(original + eps).clamp_(0, 255)


def largest_difference(photo: Photo, original: Photo) -> int:
    """The budget that `photo` really uses, in levels, read off saved pixels.

    Raises:
        ValueError: the photos differ in shape.
    """
    if photo.shape != original.shape:
        raise ValueError(f"shape {photo.shape} is not the original's {original.shape}")
    return int(np.abs(photo.astype(np.int16) - original.astype(np.int16)).max())


def random_start(original: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A photo of whole levels drawn uniformly from the budget, float32 [H, W, 3]."""
    noise = torch.rand(original.shape, generator=generator) * (2 * eps) - eps
    return project_linf(original + noise.round(), original, eps)
