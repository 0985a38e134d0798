"""How far an adversarial photo may go. Projecting and verifying are two functions, so that one can catch the other."""

import numpy as np
import torch
from torch import Tensor

from detguard.photos import Photo


def linf_bounds(original: Photo, eps: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The lowest and highest photo within `eps` levels of `original` and within 0..255; float32 [H, W, 3]."""
    levels = torch.from_numpy(original).to(device).float()
    return (levels - eps).clamp_(0, 255), (levels + eps).clamp_(0, 255)


def project_linf(photo: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """The photo nearest to `photo`, float32 [H, W, 3] levels, within `linf_bounds`."""
    return torch.clamp(photo, *bounds)


def largest_difference(photo: Photo, original: Photo) -> int:
    """The budget that `photo` really uses, in levels, read off saved pixels.

    Raises:
        ValueError: the photos differ in shape.
    """
    if photo.shape != original.shape:
        raise ValueError(f"shape {photo.shape} is not the original's {original.shape}")
    return int(np.abs(photo.astype(np.int16) - original.astype(np.int16)).max())


def random_start(bounds: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """A photo of whole levels drawn uniformly from within `linf_bounds`, float32 [H, W, 3] levels."""
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds[0].ceil(), bounds[1].floor()
    share = torch.rand(low.shape, generator=generator).to(low.device)
    return (low + ((high - low + 1) * share).floor()).minimum(high)
