"""What a transform is: photo -> picture, and how boxes and gradients go there and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor
from typing_extensions import override

from detguard.detections import Detections, box_area
from detguard.photos import Photo, decode_photo, encode_png
from detguard.transforms.warp import Warp

# straight-through: the gradient goes to the same place of the photo unchanged, which is the attack method's own
# definition; exact: by the transform's `pull_back`.
GradientRule = Literal["straight-through", "exact"]
# Of an object, the share of its box that a picture must show for it to count there.
VISIBLE = 0.5


class Transform(ABC):
    """A transform of photos with its parameter; `str()` gives the spec that the command line reads.

    Subclasses whose pixels do not stay where they are are `Geometric`; those that are random override `draw`. A frozen
    dataclass with one field does best: it is what `str()` shows.

    Attributes:
        kind: the word before the colon.
        example: a spec that is right, for errors and tests.
        reads: what reads the parameter, `number` or `whole_number`, and what that takes beside the text.
        suffix: of the file that `encode` makes.
        straight: whether gradients may go straight through to the same place.
    """

    kind: ClassVar[str]
    example: ClassVar[str]
    reads: ClassVar[tuple[Callable[..., float], float, float, str]]
    suffix: ClassVar[str] = ".png"
    straight: ClassVar[bool] = True

    def __str__(self) -> str:
        """The spec, e.g. `jpeg:75`: the kind and its only field."""
        (value,) = vars(self).values()
        return f"{self.kind}:{value}" if isinstance(value, str) else f"{self.kind}:{value:g}"

    @classmethod
    def parse(cls, value: str) -> "Transform":
        """From the part of the spec after the colon, by `reads`; overridden where it is no such number.

        Raises:
            ValueError: it is no such parameter; says what was expected.
        """
        read, *span = cls.reads
        return cls(read(value, *span))  # type: ignore[call-arg]

    @abstractmethod
    def __call__(self, photo: Photo) -> Photo:
        """The picture that the transform makes.

        Args:
            photo: `uint8 [H, W, 3]` RGB.

        Returns:
            `uint8 [H, W, 3]` RGB; of another shape only where `warp` says so.
        """

    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Gradient at the output, brought to the photo: exact, by a surrogate, or, as here, straight through (BPDA).

        Args:
            photo: what was transformed, `uint8 [H, W, 3]`.
            gradient: of the loss at the output, float32 [3, H', W'].

        Returns:
            Float32 [3, H, W].
        """
        return gradient

    def draw(self, rng: np.random.Generator) -> "Transform":
        """The transform with all that is random in it drawn: itself, unless something is.

        Args:
            rng: the only source of random numbers.
        """
        return self

    @property
    def random(self) -> bool:
        """Whether something in it is still to be drawn."""
        return self.draw(np.random.default_rng(0)) is not self

    def warp(self, shape: tuple[int, int]) -> Warp | None:
        """Where the pixels of a photo of (height, width) go; None: they stay where they are."""
        return None

    def encode(self, photo: Photo) -> bytes:
        """The bytes of a file (of `suffix`) that holds the transformed photo."""
        return encode_png(self(photo))


def seen(
    transform: Transform | None, shape: tuple[int, int], clean: Detections, attacked: Tensor
) -> tuple[Detections, Tensor]:
    """What was found in a photo of (height, width) as it lies in the picture that a transform makes of it.

    Objects that the picture hardly shows are left out. attacked: which of `clean`, bool [K]; returned for what is left.
    """
    warp = transform.warp(shape) if transform else None
    if warp is None or not len(clean):
        return clean, attacked
    boxes, high, wide = warp.boxes(clean.boxes), *warp.picture
    shown = boxes.clamp(min=0).minimum(boxes.new_tensor([wide, high, wide, high]))
    visible = box_area(shown) / box_area(boxes).clamp(min=1e-6) >= VISIBLE
    return replace(clean, boxes=shown)[visible], attacked[visible]


class Encoded(Transform):
    """A transform that is what its own kind of file makes of a photo, so that the saved member is what the loop saw."""

    @override
    def __call__(self, photo: Photo) -> Photo:
        return decode_photo(self.encode(photo))

    @abstractmethod
    @override
    def encode(self, photo: Photo) -> bytes:
        """The bytes of the file that is saved for this member."""


class Geometric(Transform):
    """A transform that only moves pixels, by its `warp`."""

    straight = False

    @abstractmethod
    @override
    def warp(self, shape: tuple[int, int]) -> Warp:
        """Where the pixels of a photo of (height, width) go."""

    @override
    def __call__(self, photo: Photo) -> Photo:
        return self.warp(photo.shape[:2])(photo)

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        """Exact but for OpenCV's rounding: the adjoint of the bilinear map."""
        return self.warp(photo.shape[:2]).pull_back(gradient)


@dataclass(frozen=True)
class Drawn(Transform):
    """A transform with a parameter drawn anew each time between two ends, like `rotate:-5..5`."""

    low: Transform
    high: Transform
    ends: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.low}..{str(self.high).partition(':')[2]}"

    @classmethod
    def between(cls, kind: type[Transform], low: str, high: str) -> "Drawn":
        """A kind between two parameters; raises ValueError with what was expected."""
        if not (low and high):
            raise ValueError("expected numbers on both sides of ..")
        ends = kind.parse(low), kind.parse(high)
        try:
            numbers = float(low), float(high)
        except ValueError:
            raise ValueError("expected numbers on both sides of ..") from None
        if numbers[0] == numbers[1]:
            raise ValueError("expected two different numbers, or one alone")
        if numbers[0] > numbers[1]:
            raise ValueError(f"expected the smaller number first, {high}..{low}")
        return cls(*ends, numbers)

    @override
    def draw(self, rng: np.random.Generator) -> Transform:
        low, high = self.ends
        kind = type(self.low)
        if not all(isinstance(value, int) for value in vars(self.low).values()):
            return kind.parse(f"{rng.uniform(low, high):.4g}").draw(rng)
        numbers = rng.permutation(np.arange(int(low), int(high) + 1))
        return next(drawn for number in numbers.tolist() if (drawn := _parsed(kind, number))).draw(rng)

    @override
    def __call__(self, photo: Photo) -> Photo:
        raise TypeError(f"{self}: is drawn first")

    @override
    def pull_back(self, photo: Photo, gradient: Tensor) -> Tensor:
        raise TypeError(f"{self}: is drawn first")


def _parsed(kind: type[Transform], number: int) -> Transform | None:
    """The transform with that parameter, unless it has none such (a window that is even)."""
    try:
        return kind.parse(str(number))
    except ValueError:
        return None


def whole_number(value: str, low: int, high: int, what: str) -> int:
    """The parameter of a spec as a whole number.

    Args:
        value: the text after the colon.
        low: the least that is right.
        high: the most.
        what: it is, with its article, for the error.

    Raises:
        ValueError: it is none in low..high; says what was expected.
    """
    if not value.isdigit() or not low <= int(value) <= high:
        raise ValueError(f"expected {what} in {low}..{high}")
    return int(value)


def number(value: str, low: float, high: float, what: str) -> float:
    """The parameter of a spec as a number, as `whole_number`.

    Raises:
        ValueError: it is none in low..high; says what was expected.
    """
    try:
        found = float(value)
    except ValueError:
        found = np.nan
    if not low <= found <= high:
        raise ValueError(f"expected {what} in {low:g}..{high:g}")
    return found
