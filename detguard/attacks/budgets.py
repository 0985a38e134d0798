"""How far an adversarial photo may go. A new kind of budget is a class and its line in `BUDGETS`.

Keeping a photo within a budget (`project`, `levels`) and verifying it (`used`) share no code, so that one can catch the
other. Tensors are photos of any layout and number: the last three dimensions are one, its values from 0 to `white`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from detguard import DetguardError
from detguard.photos import Photo

WHITE = 255.0


@dataclass(frozen=True)
class Budget(ABC):
    """A largest change of a photo. eps: in the budget's own `unit`, which is `scale` levels."""

    eps: float
    kind: ClassVar[str]
    unit: ClassVar[str]
    scale: ClassVar[float]

    def __str__(self) -> str:
        return f"{self.eps:g} {self.unit}"

    @abstractmethod
    def start(self, original: Tensor, seed: int) -> Tensor:
        """A photo drawn at random within the budget, in levels, from numbers of the CPU: the same on any device."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length 1, as the budget measures it, by which a loss of that `gradient` rises most."""

    @abstractmethod
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        """The photo nearest to `x` within the budget around `original` and within 0..`white`."""

    def levels(self, x: Tensor, original: Tensor) -> Tensor:
        """`x`, which is within the budget, in whole levels as it would be saved, and still within it: float32."""
        return x.round()

    @abstractmethod
    def used(self, photo: Photo, original: Photo) -> float:
        """How much of the budget a saved photo really uses, read off its pixels, in the unit of `eps`.

        Raises:
            ValueError: the photos differ in shape.
        """


@dataclass(frozen=True)
class Linf(Budget):
    """No value of a pixel changes by more than `eps` levels of 255."""

    kind = "linf"
    unit = "of 255 levels"
    scale = 1.0

    @override
    def start(self, original: Tensor, seed: int) -> Tensor:
        """Whole levels, all alike likely."""
        share = torch.rand(original.shape, generator=torch.Generator().manual_seed(seed)).to(original.device)
        low, high = (original - self.eps).clamp_(min=0).ceil(), (original + self.eps).clamp_(max=WHITE).floor()
        return (low + ((high - low + 1) * share).floor()).minimum(high)

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    @override
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        reach = self.eps * white / WHITE
        return torch.maximum(x, original - reach).minimum(original + reach).clamp_(0, white)

    @override
    def used(self, photo: Photo, original: Photo) -> float:
        return largest_difference(photo, original)


@dataclass(frozen=True)
class L2(Budget):
    """The root of the sum of all squared changes is at most `eps`, a change from black to white counted as 1.

    It grows with the photo: a change of 2 levels in every value is 7.5 of 640 x 480 px.
    """

    kind = "l2"
    unit = "(Euclidean, black to white is 1)"
    scale = WHITE

    @override
    def start(self, original: Tensor, seed: int) -> Tensor:
        """In a direction drawn from a normal distribution, at the budget's surface."""
        noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed)).to(original.device)
        return self.project(original + self.direction(noise) * self.eps * WHITE, original)

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient / _norm(gradient).clamp(min=1e-30)

    @override
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        """Into the range of pixels first, which the way back to the ball does not leave."""
        change = x.clamp(0, white) - original
        return original + change * (self.eps * white / _norm(change).clamp(min=1e-30)).clamp(max=1)

    @override
    def levels(self, x: Tensor, original: Tensor) -> Tensor:
        """Rounding may leave the ball: the change shrinks until it does not, at last by dropping fractions."""
        change, most = x - original, self.eps * WHITE
        for _ in range(3):
            rounded = change.round()
            over = _norm(rounded.double()) / most
            if not (over > 1).any():
                return original + rounded
            change = change / over.clamp(min=1).to(change)
        return original + (x - original).trunc()

    @override
    def used(self, photo: Photo, original: Photo) -> float:
        _same_shape(photo, original)
        change = photo.astype(np.int64) - original
        return math.sqrt(int((change * change).sum())) / WHITE


BUDGETS: dict[str, type[Budget]] = {kind.kind: kind for kind in (Linf, L2)}


def parse_budget(norm: str, eps: float) -> Budget:
    """The budget of a kind of `BUDGETS`.

    Raises:
        DetguardError: no such kind, or a size that it does not have.
    """
    if norm not in BUDGETS:
        raise DetguardError(f"--norm {norm}: expected one of {', '.join(BUDGETS)}")
    if norm == Linf.kind and (eps != round(eps) or not 0 <= eps <= WHITE):
        raise DetguardError(f"--eps {eps:g}: expected whole levels of 0..255, as files hold no others")
    if not 0 <= eps < math.inf:
        raise DetguardError(f"--eps {eps:g}: expected a number of 0 or more")
    return BUDGETS[norm](eps)


def largest_difference(photo: Photo, original: Photo) -> int:
    """The largest change of any value, in levels, read off saved pixels.

    Raises:
        ValueError: the photos differ in shape.
    """
    _same_shape(photo, original)
    return int(np.abs(photo.astype(np.int16) - original.astype(np.int16)).max())


def _same_shape(photo: Photo, original: Photo) -> None:
    if photo.shape != original.shape:
        raise ValueError(f"shape {photo.shape} is not the original's {original.shape}")


def _norm(x: Tensor) -> Tensor:
    """The Euclidean length of each photo, [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(-3, -2, -1), keepdim=True)
