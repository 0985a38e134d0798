"""Attacked frames as members of a group: themselves or what transforms make of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detguard import DetguardError
from detguard.photos import frames_tensor, photos_of
from detguard.transforms.base import Drawn, Geometric, Transform
from detguard.transforms.parse import parse_transforms


def parse_members(specs: str) -> tuple[Transform, ...]:
    """The transforms that training frames may go through, by specs as of `parse_transforms`.

    Raises:
        DetguardError: there is none such, or it moves pixels, which what is wanted of a frame does not follow.
    """
    transforms = parse_transforms(specs)
    for transform in transforms:
        if isinstance(transform.low if isinstance(transform, Drawn) else transform, Geometric):
            raise DetguardError(
                f"`transforms` {transform}: moves pixels away from their labels; expected transforms "
                "that leave them in place, as in median:3,jpeg:75"
            )
    return tuple(transforms)


class Members:
    """Shows frames as members of a group: each as it is or through one of `transforms`, drawn anew every time.

    seeds: of each frame, its random numbers, so that they are the same however many processes train. Transforms are
    OpenCV's code on the CPU: with some, and only then, a step waits for its device.
    """

    def __init__(self, transforms: Sequence[Transform], seeds: Iterable[tuple[int, ...]]) -> None:
        self.transforms = transforms
        self.generators = [np.random.default_rng(seed) for seed in seeds] if transforms else []

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames, float32 [B, 3, H, W] in 0..1, in 8 bit where they went through a transform.

        The gradient goes straight through, or by the transform's own rule where it must not.
        """
        if not self.transforms or not len(frames):
            return frames
        shown: Tensor = _Shown.apply(frames, [self._draw(rng) for rng in self.generators])
        return shown

    def _draw(self, rng: np.random.Generator) -> Transform | None:
        number = int(rng.integers(len(self.transforms) + 1))
        return self.transforms[number - 1].draw(rng) if number else None


class _Shown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, drawn: list[Transform | None]) -> Tensor:
        rows = [row for row, transform in enumerate(drawn) if transform is not None]
        photos = zip(rows, photos_of(frames[rows]), strict=True)
        chosen = [(row, t, photo) for row, photo in photos if (t := drawn[row]) is not None]
        ctx.pulled = [one for one in chosen if not one[1].straight]
        if not chosen:
            return frames.clone()
        made = frames_tensor([transform(photo) for _, transform, photo in chosen], frames.device)
        return frames.index_copy(0, torch.tensor(rows, device=frames.device), made)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.pulled:
            gradient = gradient.clone()
        for row, transform, photo in ctx.pulled:
            gradient[row] = transform.pull_back(photo, gradient[row])
        return gradient, None
