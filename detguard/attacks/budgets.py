"""How far an adversarial photo may go. A new kind of budget is a class and its line in `BUDGETS`.

Keeping a photo within a budget (`project`, `levels`) and verifying it (`used`) share no code, so that one can catch the
other. Tensors are photos of any layout and number: the last three dimensions are one, its values from 0 to `white`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from detguard import DetguardError
from detguard.engine import with_doubles
from detguard.photos import Photo, largest_difference
from detguard.schema import Config

WHITE = 255.0
# Of a change, the share of its length that rounding may not go below.
SPENT = 0.9


@dataclass(frozen=True)
class Budget(ABC):
    """A largest change of a photo.

    Attributes:
        eps: in the budget's own `unit`.
        kind: what the command line and `BUDGETS` call it.
        unit: of `eps`, in words.
        scale: levels of 255 that one unit is.
    """

    eps: float
    kind: ClassVar[str]
    unit: ClassVar[str]
    scale: ClassVar[float]

    def __str__(self) -> str:
        return f"{self.eps:g} {self.unit}"

    def config(self) -> Config:
        """What `parse_budget` makes the budget of, as plain values."""
        return {"norm": self.kind, "eps": self.eps, "mask": None}

    def on(self, shape: tuple[int, int], boxes: Tensor) -> "Budget":
        """The budget on one photo.

        Args:
            shape: (height, width), px.
            boxes: of the objects that are attacked, float32 [N, 4], x1 y1 x2 y2, photo pixels.
        """
        return self

    @property
    def empty(self) -> bool:
        """Whether it leaves nothing of a photo that may change."""
        return False

    @abstractmethod
    def start(self, original: Tensor, seed: int) -> Tensor:
        """A photo drawn at random within the budget, in levels, from numbers of the CPU: the same on any device.

        Args:
            original: the clean photo, 0..255.
            seed: of what is drawn.
        """

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The step of length 1, as the budget measures it, by which a loss rises most.

        Args:
            gradient: of the loss at the photo.
        """

    @abstractmethod
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        """A photo near by within the budget and the range of pixels.

        Args:
            x: any photo, 0..`white` where it is one.
            original: the clean photo, in the same range.
            white: what a white pixel is, by default 255.
        """

    def levels(self, x: Tensor, original: Tensor) -> Tensor:
        """A photo in whole levels, as it would be saved, float32, and still within the budget.

        Args:
            x: within the budget, 0..255.
            original: the clean photo, 0..255.
        """
        return x.round()

    @abstractmethod
    def scattered(self, original: Tensor, rng: np.random.Generator) -> Tensor:
        """Where a random search starts: all of the budget, spread over the photo.

        Args:
            original: one clean photo, [H, W, 3], 0..255.
            rng: the only source of random numbers.
        """

    @abstractmethod
    def moved(self, x: Tensor, original: Tensor, share: float, rng: np.random.Generator) -> Tensor:
        """A proposal of a random search: one square is changed, still within the budget.

        Args:
            x: one photo within the budget, [H, W, 3], 0..255.
            original: the clean one.
            share: of the largest square's area, 1 at first.
            rng: the only source of random numbers.
        """

    @property
    @abstractmethod
    def step(self) -> float:
        """The usual length of a step, in the unit of `eps`."""

    @abstractmethod
    def between(self, low: float, high: float) -> float | None:
        """The size that a search for the least budget tries next; None: nothing is to be gained any more.

        Args:
            low: a size that is too small, in the unit of `eps`.
            high: one that is enough.
        """

    @abstractmethod
    def used(self, photo: Photo, original: Photo) -> float:
        """How much of the budget a saved photo really uses, read off its pixels, in the unit of `eps`.

        Args:
            photo: as it was read back, `uint8 [H, W, 3]`.
            original: the clean one.

        Raises:
            ValueError: the photos differ in shape.
        """


@dataclass(frozen=True)
class Linf(Budget):
    """No value of a pixel changes by more than `eps` levels of 255.

    Attributes:
        eps: whole levels, 0..255.
    """

    LARGEST: ClassVar[float] = 0.3
    kind = "linf"
    unit = "levels of 255"
    scale = 1.0

    @override
    def start(self, original: Tensor, seed: int) -> Tensor:
        """Start from noise: whole levels within the budget, all alike likely."""
        share = torch.rand(original.shape, generator=torch.Generator().manual_seed(seed)).to(original.device)
        low, high = (original - self.eps).clamp_(min=0).ceil(), (original + self.eps).clamp_(max=WHITE).floor()
        return (low + ((high - low + 1) * share).floor()).minimum(high)

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    @override
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        reach = self.eps * white / WHITE
        return (x - original).clamp_(-reach, reach).add_(original).clamp_(0, white)

    @override
    def scattered(self, original: Tensor, rng: np.random.Generator) -> Tensor:
        """Vertical stripes at corners of the budget, each as wide as a 320th of the photo."""
        width = original.shape[1]
        wide = max(1, width // 320)
        signs = rng.choice([-1, 1], (1, width // wide + 1, 3)).repeat(wide, 1)[:, :width]
        return self._corner(original, signs)

    @override
    def moved(self, x: Tensor, original: Tensor, share: float, rng: np.random.Generator) -> Tensor:
        """One square of the photo at a corner of the budget."""
        window = _window(_side(original, self.LARGEST * share), original, rng)
        moved = x.clone()
        moved[window] = self._corner(original[window], rng.choice([-1, 1], (3,)))
        return moved

    def _corner(self, original: Tensor, signs: np.ndarray) -> Tensor:
        """In whole levels."""
        return (original + math.floor(self.eps) * torch.from_numpy(signs).to(original)).clamp_(0, WHITE)

    @property
    @override
    def step(self) -> float:
        return 1

    @override
    def between(self, low: float, high: float) -> float | None:
        return (low + high) // 2 if high - low > 1 else None

    @override
    def used(self, photo: Photo, original: Photo) -> float:
        _same_shape(photo, original)
        return largest_difference(photo, original)


@dataclass(frozen=True)
class L2(Budget):
    """The root of the sum of all squared changes is at most `eps`, a change from black to white counted as 1.

    It grows with the photo: a change of 2 levels in every value is 7.5 of 640 x 480 px.

    Attributes:
        eps: 0 or more.
    """

    NEAR: ClassVar[float] = 0.05
    LARGEST: ClassVar[float] = 0.1
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
        """Rounding may leave the ball: the change shrinks until it does not.

        Where that, or rounding itself, takes much of a change of about half a level everywhere, it is spread instead.
        """
        change, most = x - original, self.eps * WHITE
        wanted = with_doubles(_norm(change)).double().clamp(max=most)
        shrunk = change
        for _ in range(3):
            rounded = shrunk.round()
            length = _norm(with_doubles(rounded).double())
            if not (length > most).any():
                return original + (_spread(change, wanted) if (length < SPENT * wanted).any() else rounded)
            shrunk = shrunk / (length / most).clamp(min=1).to(change)
        return original + _spread(change, wanted)

    @override
    def scattered(self, original: Tensor, rng: np.random.Generator) -> Tensor:
        """Squares of a fifth of the shorter side, of random signs, which hold as much each."""
        height, width = original.shape[:2]
        side = max(1, min(height, width) // 5)
        change = np.zeros((height, width, 3))
        for top in range(height % side // 2, height - side + 1, side):
            for left in range(width % side // 2, width - side + 1, side):
                change[top : top + side, left : left + side] = _bump(side, rng) * rng.choice([-1, 1], 3)
        direction = self.direction(torch.from_numpy(change).to(original))
        return self.project(original + self.eps * WHITE * direction, original)

    @override
    def moved(self, x: Tensor, original: Tensor, share: float, rng: np.random.Generator) -> Tensor:
        """What one window holds of the change, and what is left of the budget, moves to another (their algorithm 3)."""
        side = max(_side(original, self.LARGEST * share), min(3, *original.shape[:2]))
        to, emptied = (_window(side, original, rng) for _ in range(2))
        change = x - original
        unspent = max((self.eps * WHITE) ** 2 - float(change.square().sum()), 0.0)
        moved = change.clone()
        moved[to], moved[emptied] = 0, 0
        taken = (change - moved).square().sum((0, 1))
        bump = torch.from_numpy(_bump(side, rng) * rng.choice([-1, 1], 3)).to(x)
        shape = bump + change[to] / _length(change[to])
        moved[to] = shape / _length(shape) * (taken + unspent / 3).sqrt()
        return self.project(original + moved, original)

    @property
    @override
    def step(self) -> float:
        return max(self.eps / 5, 1e-4)

    @override
    def between(self, low: float, high: float) -> float | None:
        return (low + high) / 2 if high - low > self.NEAR * high else None

    @override
    def used(self, photo: Photo, original: Photo) -> float:
        _same_shape(photo, original)
        change = photo.astype(np.int64) - original
        return math.sqrt(int((change * change).sum())) / WHITE


@dataclass(frozen=True)
class Masked(Budget):
    """A budget that may be spent in one part of a photo only.

    Attributes:
        eps: as of the budget there.
        kind_within: of the budget there.
        where: "inside" the boxes of the objects that are attacked, "outside" them, or the corners x1, y1, x2, y2, x3,
            y3, ... of a polygon in pixels.
        mask: bool [H, W, 1] of one photo, by `on`.
    """

    kind_within: type[Budget]
    where: str | tuple[float, ...]
    mask: Tensor | None = field(default=None, compare=False)
    kind = "mask"

    @classmethod
    def of(cls, within: Budget, where: str | Sequence[float] | Sequence[Sequence[float]]) -> "Masked":
        """That part of a budget.

        Args:
            within: the budget there, as `Linf(8)`.
            where: as of the class, corners also as pairs.

        Raises:
            DetguardError: `within` is no budget of whole photos.
        """
        if not isinstance(within, Budget) or isinstance(within, Masked):
            raise DetguardError(f"`within` {within}: expected a budget of whole photos, as in Masked.of(Linf(8), ...)")
        return cls(within.eps, type(within), where if isinstance(where, str) else tuple(np.ravel(where).tolist()))

    @property
    def within(self) -> Budget:
        """The budget that holds in the part of the photo that may change."""
        return self.kind_within(self.eps)

    def __str__(self) -> str:
        part = f"{self.where} the objects" if isinstance(self.where, str) else "in a polygon"
        return f"{self.within} {part}"

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The unit of the budget within the part."""
        return self.within.unit

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Levels of 255 in one unit of the budget within the part."""
        return self.within.scale

    @override
    def config(self) -> Config:
        where = self.where if isinstance(self.where, str) else ",".join(f"{number:g}" for number in self.where)
        return self.within.config() | {"mask": where}

    @override
    def on(self, shape: tuple[int, int], boxes: Tensor) -> Budget:
        mask = np.zeros((*shape, 1), np.uint8)
        if isinstance(self.where, str):
            # As records keep boxes, so that a run can be verified by what it says.
            for x1, y1, x2, y2 in [[round(side, 1) for side in box] for box in boxes.tolist()]:
                mask[math.floor(max(y1, 0)) : math.ceil(y2), math.floor(max(x1, 0)) : math.ceil(x2)] = 1
            mask = 1 - mask if self.where == "outside" else mask
        else:
            cv2.fillPoly(mask, [np.array(self.where).round().astype(np.int32).reshape(-1, 2)], 1)
        return replace(self, mask=torch.from_numpy(mask).bool())

    def _part(self, like: Tensor) -> Tensor:
        assert self.mask is not None, "on() gives the mask"
        return self.mask.to(like.device)

    @override
    def start(self, original: Tensor, seed: int) -> Tensor:
        return torch.where(self._part(original), self.within.start(original, seed), original)

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        return self.within.direction(gradient * self._part(gradient))

    @override
    def project(self, x: Tensor, original: Tensor, white: float = WHITE) -> Tensor:
        return self.within.project(torch.where(self._part(x), x, original), original, white)

    @override
    def levels(self, x: Tensor, original: Tensor) -> Tensor:
        return self.within.levels(x, original)

    @property
    @override
    def empty(self) -> bool:
        return self._bounds is None

    @cached_property
    def _bounds(self) -> tuple[slice, slice] | None:
        """The smallest window with all of the part; None: there is nothing of it in the photo."""
        assert self.mask is not None, "on() gives the mask"
        rows, columns, _ = self.mask.nonzero(as_tuple=True)
        if not len(rows):
            return None
        return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)

    @override
    def scattered(self, original: Tensor, rng: np.random.Generator) -> Tensor:
        return self._inside(original, original, lambda _, there: self.within.scattered(there, rng))

    @override
    def moved(self, x: Tensor, original: Tensor, share: float, rng: np.random.Generator) -> Tensor:
        return self._inside(x, original, lambda now, there: self.within.moved(now, there, share, rng))

    def _inside(self, x: Tensor, original: Tensor, propose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What is proposed of the part's bounds, taken in the part itself."""
        if (bounds := self._bounds) is None:
            return x
        proposed = original.clone()
        proposed[bounds] = propose(x[bounds], original[bounds])
        return torch.where(self._part(x), proposed, original)

    @property
    @override
    def step(self) -> float:
        return self.within.step

    @override
    def between(self, low: float, high: float) -> float | None:
        return self.within.between(low, high)

    @override
    def used(self, photo: Photo, original: Photo) -> float:
        """How much of the budget is used in the part; infinite where anything changed elsewhere."""
        used = self.within.used(photo, original)
        assert self.mask is not None, "on() gives the mask"
        elsewhere = (photo != original).any(2) & ~self.mask[..., 0].numpy()
        return math.inf if elsewhere.any() else used


BUDGETS: dict[str, type[Budget]] = {kind.kind: kind for kind in (Linf, L2)}


def parse_budget(norm: str, eps: float, mask: str | None = None) -> Budget:
    """The budget of a kind of `BUDGETS`, everywhere or where `mask` says: inside, outside, or corners of a polygon.

    Raises:
        DetguardError: no such kind, or a size that it does not have.
    """
    if norm not in BUDGETS:
        raise DetguardError(f"`norm` {norm}: expected one of {', '.join(BUDGETS)}")
    if not isinstance(eps, Real) or not 0 <= eps < math.inf:
        shown = eps if isinstance(eps, Real) else repr(eps)
        raise DetguardError(f"`eps` {shown}: expected a number of 0 or more")
    if norm == Linf.kind and (eps != round(eps) or eps > WHITE):
        raise DetguardError(f"`eps` {eps:g}: expected whole levels of 0..255, as files hold no others")
    budget = BUDGETS[norm](eps)
    return budget if mask is None else Masked.of(budget, _parse_mask(mask))


def _parse_mask(mask: str) -> str | tuple[float, ...]:
    if mask in ("inside", "outside"):
        return mask
    try:
        corners = tuple(float(number) for number in mask.split(","))
    except ValueError:
        corners = ()
    if len(corners) < 6 or len(corners) % 2 or not all(0 <= number <= 1e5 for number in corners):
        raise DetguardError(
            f"`mask` '{mask}': expected inside, outside, or the corners x1,y1,x2,y2,x3,y3,... in pixels"
        )
    return corners


def _same_shape(photo: Photo, original: Photo) -> None:
    if photo.shape != original.shape:
        raise ValueError(f"shape {photo.shape} is not the original's {original.shape}")


def _side(photo: Tensor, share: float) -> int:
    """That of a square, if a `share` of the photo were one, as the shorter side has it."""
    return max(1, round(math.sqrt(share) * min(photo.shape[:2])))


def _window(side: int, photo: Tensor, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square somewhere in a photo."""
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    return slice(top, top + side), slice(left, left + side)


def _bump(side: int, rng: np.random.Generator) -> np.ndarray:
    """A square, [side, side, 1], of length 1: two halves of opposite signs, each highest in its middle.

    Its values are those of Andriushchenko et al. (2020), equation 2.
    """
    half = side // 2
    square = np.concatenate([_hill(half, side), -_hill(side - half, side)])
    square /= np.linalg.norm(square)
    return (square if rng.random() < 0.5 else square.T)[..., None]


def _hill(height: int, width: int) -> np.ndarray:
    """A rectangle of length 1 that falls off from its middle, [height, width]."""
    if not height:
        return np.zeros((height, width))
    y, x = np.ogrid[:height, :width]
    away = np.maximum(np.abs(y - height // 2), np.abs(x - width // 2))
    falling = 1 / np.arange(1, away.max() + 2) ** 2
    hill = falling[::-1].cumsum()[::-1][away]
    return hill / np.linalg.norm(hill)


def _length(change: Tensor) -> Tensor:
    """That of each channel, [3], of a change [H, W, 3]."""
    return torch.linalg.vector_norm(change, dim=(0, 1)).clamp(min=1e-30)


def _spread(change: Tensor, length: Tensor) -> Tensor:
    """A change in whole levels, [..., H, W, 3], no longer than `length`: the largest fractions become the next level.

    Of fractions that are alike, which ones is drawn by a seed, so that they are everywhere.
    """
    whole = change.trunc()
    fraction = (change - whole).abs().flatten(-3)
    drawn = torch.rand(fraction.shape[-1], generator=torch.Generator().manual_seed(0)).to(fraction)
    order = (fraction + 1e-3 * drawn).argsort(-1, descending=True)
    squares = with_doubles(whole).double().square().flatten(-3)
    more = 2 * squares.sqrt() + 1  # by which a square grows with a level more
    room = length.flatten(-3).square() - squares.sum(-1, keepdim=True)
    taken = more.gather(-1, order.to(more.device)).cumsum(-1) <= room
    up = torch.zeros_like(fraction).scatter_(-1, order, taken.to(fraction))
    return whole + change.sign() * (up * (fraction > 0)).view_as(change)


def _norm(x: Tensor) -> Tensor:
    """The Euclidean length of each photo, [..., 1, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(-3, -2, -1), keepdim=True)
